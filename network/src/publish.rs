//! Published ports: sockets of the host that lead to ports of the guest.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kiln_abi::manifest::Protocol;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::NetworkError;

/// A port of the host that leads to a port of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publish {
    /// Address of the host; None for all addresses of both families.
    pub address: Option<IpAddr>,
    /// Port of the host; 0 for a free one.
    pub host: u16,
    /// Port of the guest.
    pub guest: u16,
    /// Transport.
    pub protocol: Protocol,
}

/// A published port whose socket its owner has opened: bound, and for TCP listening.
///
/// The owner may keep duplicates and use the socket again later: the network accepts from it, or receives and sends, sets
/// `O_NONBLOCK`, and in the end closes its own descriptor. It never shuts the socket down, so what it has not accepted
/// or received by then waits for whoever is next.
#[derive(Clone, Debug)]
pub struct Held {
    /// The socket.
    pub socket: Arc<OwnedFd>,
    /// Port of the guest.
    pub guest: u16,
    /// Transport.
    pub protocol: Protocol,
}

/// An open socket of the host for a published port.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) socket: Arc<OwnedFd>,
    pub(crate) address: SocketAddr,
    pub(crate) publish: Publish,
}

/// Opens the host's sockets of all published ports.
pub(crate) fn open(publish: &[Publish]) -> Result<Vec<Published>, NetworkError> {
    let mut opened = Vec::new();
    for publish in publish {
        match publish.address {
            Some(address) => {
                opened.push(open_one(publish, SocketAddr::new(address, publish.host))?)
            }
            None => {
                let first = open_one(
                    publish,
                    SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), publish.host),
                )?;
                let port = first.address.port();
                opened.push(first);
                match open_one(publish, SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)) {
                    Ok(second) => opened.push(second),
                    // A host without IPv6 serves IPv4 alone.
                    Err(NetworkError::AddressNotAvailable { .. }) => {}
                    Err(NetworkError::Port { source, .. })
                        if source.raw_os_error()
                            == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error()) => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(opened)
}

/// Takes the sockets that are open already.
pub(crate) fn hold(held: &[Held]) -> Result<Vec<Published>, NetworkError> {
    held.iter().map(hold_one).collect()
}

fn hold_one(held: &Held) -> Result<Published, NetworkError> {
    let failed = |source: rustix::io::Errno| NetworkError::Held {
        guest: held.guest,
        reason: source.to_string(),
    };
    let wrong = |reason: &str| NetworkError::Held {
        guest: held.guest,
        reason: reason.into(),
    };
    let (kind, name) = match held.protocol {
        Protocol::Tcp => (SocketType::STREAM, "it is not a TCP socket"),
        Protocol::Udp => (SocketType::DGRAM, "it is not a UDP socket"),
    };
    if sockopt::socket_type(&held.socket).map_err(failed)? != kind {
        return Err(wrong(name));
    }
    if held.protocol == Protocol::Tcp
        && !sockopt::socket_acceptconn(&held.socket).map_err(failed)?
    {
        return Err(wrong("it does not listen"));
    }
    let address = SocketAddr::try_from(rustix::net::getsockname(&held.socket).map_err(failed)?)
        .map_err(|_| wrong(name))?;
    rustix::io::ioctl_fionbio(&held.socket, true).map_err(failed)?;
    Ok(Published {
        socket: Arc::clone(&held.socket),
        address,
        publish: Publish {
            address: Some(address.ip()),
            host: address.port(),
            guest: held.guest,
            protocol: held.protocol,
        },
    })
}

fn open_one(publish: &Publish, address: SocketAddr) -> Result<Published, NetworkError> {
    let protocol = match publish.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    let open = || -> io::Result<Published> {
        let family = if address.is_ipv4() {
            AddressFamily::INET
        } else {
            AddressFamily::INET6
        };
        let kind = match publish.protocol {
            Protocol::Tcp => SocketType::STREAM,
            Protocol::Udp => SocketType::DGRAM,
        };
        let socket = rustix::net::socket_with(
            family,
            kind,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            None,
        )?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
        if publish.protocol == Protocol::Tcp {
            // Connections of an earlier run that are only remembered do not count.
            sockopt::set_socket_reuseaddr(&socket, true)?;
        }
        rustix::net::bind(&socket, &address)?;
        if publish.protocol == Protocol::Tcp {
            // The host lowers it to net.core.somaxconn.
            rustix::net::listen(&socket, 65535)?;
        }
        let address = SocketAddr::try_from(rustix::net::getsockname(&socket)?).unwrap_or(address);
        Ok(Published {
            socket: Arc::new(socket),
            address,
            publish: *publish,
        })
    };
    open().map_err(|source| match rustix::io::Errno::from_io_error(&source) {
        Some(rustix::io::Errno::ADDRINUSE) => NetworkError::PortInUse { address, protocol },
        Some(rustix::io::Errno::ACCESS) => NetworkError::PortNeedsPrivilege { address, protocol },
        Some(rustix::io::Errno::ADDRNOTAVAIL) => NetworkError::AddressNotAvailable { address },
        _ => NetworkError::Port {
            address,
            protocol,
            source,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_named() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let publish = Publish {
            address: Some(address.ip()),
            host: address.port(),
            guest: 80,
            protocol: Protocol::Tcp,
        };
        let error = open(&[publish]).unwrap_err().to_string();
        assert!(
            error.contains(&address.to_string()) && error.contains("stop that program"),
            "{error}"
        );
    }

    #[test]
    fn an_address_that_the_host_lacks_is_named() {
        let publish = Publish {
            address: Some("192.0.2.1".parse().unwrap()),
            host: 0,
            guest: 80,
            protocol: Protocol::Tcp,
        };
        let error = open(&[publish]).unwrap_err().to_string();
        assert!(error.contains("192.0.2.1"), "{error}");
    }

    #[test]
    fn all_addresses_share_one_free_port() {
        let opened = open(&[Publish {
            address: None,
            host: 0,
            guest: 80,
            protocol: Protocol::Tcp,
        }])
        .unwrap();
        assert!(
            opened.iter().all(
                |one| one.address.port() == opened[0].address.port() && one.address.port() != 0
            )
        );
    }
}

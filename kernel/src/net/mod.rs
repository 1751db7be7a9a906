//! Sockets and the network.
//!
//! * [`socket`] is what every socket offers the system calls; [`tcp`], [`udp`], [`echo`], [`unix`] and [`netlink`]
//!   implement it.
//! * [`local`] knows ports and listeners, and so connects what stays within the machine; [`stream`] carries it.
//! * [`backend`] is the trait of ways to other machines; [`host`] (`--net socket`) and [`stack`] (`--net direct`)
//!   implement it.
//! * [`address`], [`option`] and [`ioctl`] decode and encode.
//!
//! Not for: blocking (the system-call layer waits), name resolution, packet filters, multicast.

pub mod address;
pub mod backend;
mod device;
mod echo;
mod host;
mod ioctl;
mod local;
mod netlink;
pub mod option;
pub mod socket;
mod stack;
pub mod stream;
mod tcp;
mod udp;
mod unix;

#[cfg(test)]
mod tests;

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::atomic::{AtomicU64, Ordering},
};

use kiln_abi::{configuration::Network as NetworkConfiguration, link::ToKernel};
use linux_raw_sys::net as linux;

use crate::{
    Errno, Result,
    event::Events,
    file::File,
    fs::{Kind, Metadata},
    host::Host,
    link::{HostDescriptor, Link},
    trace,
};

pub use backend::Interface;
pub use device::FrameDevice;
pub use socket::{Caller, Incoming, Outgoing, Socket};
pub use unix::MAX_FILES;

use address::{AF_INET, AF_INET6, AF_NETLINK, AF_UNIX, loopback_like};
use backend::Network;
use host::HostNetwork;
use local::Tables;
use stack::StackNetwork;
use tcp::TcpSocket;
use udp::UdpSocket;
use unix::{Names, UnixSocket};

/// What all sockets share.
pub struct Shared {
    tables: Arc<Tables>,
    unix: Names,
    backend: Option<Arc<dyn Network>>,
    next_number: AtomicU64,
}

impl Shared {
    fn new(tables: Arc<Tables>, backend: Option<Arc<dyn Network>>) -> Arc<Shared> {
        Arc::new(Shared {
            tables,
            unix: Names::default(),
            backend,
            next_number: AtomicU64::new(1),
        })
    }

    /// An inode number for a socket.
    fn next_number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether an address is the machine's own.
    fn is_own(&self, ip: IpAddr) -> bool {
        ip.is_loopback()
            || ip.is_unspecified()
            || self
                .backend
                .as_ref()
                .is_some_and(|backend| backend.is_own(ip))
    }

    /// Whether a socket may be bound to an address. Before the machine has its addresses (DHCP), any will do: it may
    /// turn out to be the one.
    fn is_bindable(&self, ip: IpAddr) -> bool {
        self.is_own(ip)
            || self.backend.as_ref().is_some_and(|backend| {
                backend.interface().is_some_and(|interface| {
                    !interface
                        .addresses
                        .iter()
                        .any(|(own, _)| own.is_ipv4() == ip.is_ipv4())
                })
            })
    }

    /// The own address that the machine uses towards another one.
    fn source_for(&self, destination: IpAddr) -> Option<IpAddr> {
        if destination.is_loopback() {
            return Some(loopback_like(destination));
        }
        if self.is_own(destination) {
            return Some(destination);
        }
        let interface = self.backend.as_ref()?.interface()?;
        interface
            .addresses
            .iter()
            .map(|(ip, _)| *ip)
            .find(|ip| ip.is_ipv4() == destination.is_ipv4())
    }

    /// All interfaces, the loopback first.
    fn interfaces(&self) -> Vec<Interface> {
        let loopback = Interface {
            index: 1,
            name: "lo",
            mac: None,
            mtu: 65536,
            addresses: Vec::from([
                (IpAddr::V4(Ipv4Addr::LOCALHOST), 8),
                (IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
            ]),
            gateways: Vec::new(),
        };
        core::iter::once(loopback)
            .chain(
                self.backend
                    .as_ref()
                    .and_then(|backend| backend.interface()),
            )
            .collect()
    }
}

/// Attributes that `fstat(2)` tells of a socket.
fn metadata(number: u64) -> Metadata {
    Metadata {
        device: 8,
        inode: number,
        kind: Kind::Socket,
        permissions: 0o777,
        links: 1,
        uid: 0,
        gid: 0,
        special_device: 0,
        size: 0,
        block_size: 4096,
        blocks: 0,
        accessed: 0,
        modified: 0,
        changed: 0,
    }
}

/// The network of the kernel.
pub struct Net {
    shared: Arc<Shared>,
}

impl Net {
    /// The network as configured: loopback and Unix sockets always; `link` serves `--net socket`, `device` the kernel's
    /// own TCP/IP (when there is none, addresses other than the machine's own are unreachable). `memory_limit` is the
    /// instance's, in bytes: buffers are sized by it.
    #[must_use]
    pub fn new(
        host: Host,
        events: &Arc<Events>,
        link: Option<&Arc<Link>>,
        configuration: &NetworkConfiguration,
        memory_limit: u64,
        device: Option<Box<dyn FrameDevice>>,
    ) -> Net {
        let mut seed = [0; 2];
        // Without randomness ports are only easier to guess.
        let _ = host.entropy(&mut seed);
        let tables = Tables::new(u16::from_ne_bytes(seed));
        let backend: Option<Arc<dyn Network>> = match (configuration, link, device) {
            (NetworkConfiguration::None, ..) => None,
            (NetworkConfiguration::Socket { .. }, Some(link), _) => {
                Some(Arc::new(HostNetwork::new(host, events, link, &tables)))
            }
            (NetworkConfiguration::Socket { .. }, None, _) => {
                trace::warn!(
                    "net: the host's sockets need a monitor, and there is none: only the loopback works"
                );
                None
            }
            (NetworkConfiguration::Dhcp | NetworkConfiguration::Static(_), _, Some(device)) => {
                Some(StackNetwork::new(
                    host,
                    events,
                    link,
                    &tables,
                    configuration,
                    memory_limit,
                    device,
                ))
            }
            (NetworkConfiguration::Dhcp | NetworkConfiguration::Static(_), _, None) => None,
        };
        Net {
            shared: Shared::new(tables, backend),
        }
    }

    /// Does what is due at `now` (monotonic nanoseconds): packets that came, timers, packets to send. To be called by the
    /// main loop after events and before it waits. Gives the next deadline, if there is one.
    pub fn poll(&self, now: u64) -> Option<u64> {
        self.shared.backend.as_ref()?.poll(now)
    }

    /// A message of the monitor about connections or datagram sockets.
    pub fn receive(&self, message: ToKernel, descriptor: Option<HostDescriptor>) {
        if let Some(backend) = &self.shared.backend {
            backend.receive(message, descriptor);
        }
    }

    /// Name servers, if they have become known (by DHCP) or have changed since the last call.
    #[must_use]
    pub fn changed_name_servers(&self) -> Option<Vec<IpAddr>> {
        self.shared.backend.as_ref()?.changed_name_servers()
    }

    /// All interfaces, the loopback first.
    #[must_use]
    pub fn interfaces(&self) -> Vec<Interface> {
        self.shared.interfaces()
    }

    /// `socket(2)`; `kind` is without flags.
    ///
    /// # Errors
    /// `EAFNOSUPPORT`, `EPROTONOSUPPORT`, `ESOCKTNOSUPPORT`, `EPERM`.
    pub fn socket(&self, family: i32, kind: u32, protocol: i32) -> Result<Arc<dyn File>> {
        let shared = &self.shared;
        let family = u16::try_from(family).map_err(|_| Errno::EAFNOSUPPORT)?;
        match (family, kind, protocol) {
            (AF_INET | AF_INET6, linux::SOCK_STREAM, 0 | option::LEVEL_TCP) => {
                Ok(TcpSocket::new(shared, family))
            }
            (AF_INET | AF_INET6, linux::SOCK_DGRAM, 0 | option::LEVEL_UDP) => {
                Ok(UdpSocket::new(shared, family))
            }
            (AF_INET, linux::SOCK_DGRAM, option::PROTOCOL_ICMP)
            | (AF_INET6, linux::SOCK_DGRAM, option::PROTOCOL_ICMPV6) => {
                Ok(echo::EchoSocket::new(shared, family))
            }
            (AF_INET | AF_INET6, linux::SOCK_STREAM | linux::SOCK_DGRAM, _) => {
                trace::warn!(
                    "net: sockets of kind {kind} with protocol {protocol} are not supported"
                );
                Err(Errno::EPROTONOSUPPORT)
            }
            (AF_INET | AF_INET6, linux::SOCK_RAW, _) => {
                trace::warn!("net: raw sockets are not supported");
                Err(Errno::EPERM)
            }
            (AF_UNIX, linux::SOCK_STREAM | linux::SOCK_DGRAM | linux::SOCK_SEQPACKET, 0 | 1) => {
                Ok(UnixSocket::new(shared, kind))
            }
            // unix(7): a raw socket is taken as a datagram one.
            (AF_UNIX, linux::SOCK_RAW, 0 | 1) => Ok(UnixSocket::new(shared, linux::SOCK_DGRAM)),
            (AF_UNIX, linux::SOCK_STREAM | linux::SOCK_DGRAM | linux::SOCK_SEQPACKET, _) => {
                Err(Errno::EPROTONOSUPPORT)
            }
            (AF_NETLINK, linux::SOCK_RAW | linux::SOCK_DGRAM, netlink::ROUTE) => {
                Ok(netlink::NetlinkSocket::new(shared, kind))
            }
            (AF_NETLINK, linux::SOCK_RAW | linux::SOCK_DGRAM, _) => Err(Errno::EPROTONOSUPPORT),
            (AF_INET | AF_INET6 | AF_UNIX | AF_NETLINK, ..) => Err(Errno::ESOCKTNOSUPPORT),
            _ => Err(Errno::EAFNOSUPPORT),
        }
    }

    /// `socketpair(2)`; `kind` is without flags.
    ///
    /// # Errors
    /// `EAFNOSUPPORT`, `EOPNOTSUPP`, `EPROTONOSUPPORT`, `ESOCKTNOSUPPORT`.
    pub fn socket_pair(
        &self,
        family: i32,
        kind: u32,
        protocol: i32,
        caller: &Caller,
    ) -> Result<(Arc<dyn File>, Arc<dyn File>)> {
        match (u16::try_from(family), kind, protocol) {
            (
                Ok(AF_UNIX),
                linux::SOCK_STREAM | linux::SOCK_DGRAM | linux::SOCK_SEQPACKET,
                0 | 1,
            ) => {
                let (a, b) = UnixSocket::pair(&self.shared, kind, caller);
                Ok((a, b))
            }
            (Ok(AF_UNIX), linux::SOCK_STREAM | linux::SOCK_DGRAM | linux::SOCK_SEQPACKET, _) => {
                Err(Errno::EPROTONOSUPPORT)
            }
            (Ok(AF_UNIX), ..) => Err(Errno::ESOCKTNOSUPPORT),
            (Ok(AF_INET | AF_INET6), ..) => Err(Errno::EOPNOTSUPP),
            _ => Err(Errno::EAFNOSUPPORT),
        }
    }
}

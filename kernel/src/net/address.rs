//! Socket addresses: the program's `struct sockaddr` and what the kernel makes of it.

use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use linux_raw_sys::net as linux;

use crate::{Errno, Result};

/// `AF_UNSPEC`.
pub const AF_UNSPEC: u16 = linux::AF_UNSPEC as u16;
/// `AF_UNIX`.
pub const AF_UNIX: u16 = linux::AF_UNIX as u16;
/// `AF_INET`.
pub const AF_INET: u16 = linux::AF_INET as u16;
/// `AF_INET6`.
pub const AF_INET6: u16 = linux::AF_INET6 as u16;
/// `AF_NETLINK`.
pub const AF_NETLINK: u16 = linux::AF_NETLINK as u16;

/// Size of `struct sockaddr_storage`, the longest address.
pub const MAX_LENGTH: usize = 128;

/// Bytes of a Unix path or abstract name (`sun_path`).
const UNIX_PATH: usize = 108;

/// Name of a Unix socket (`unix(7)`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum UnixName {
    /// Not bound.
    #[default]
    Unnamed,
    /// Bound to a path in the file tree, as the program gave it.
    Path(Vec<u8>),
    /// In the abstract name space; without the leading zero byte.
    Abstract(Vec<u8>),
}

/// Any socket address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `AF_UNSPEC`: dissolves a datagram socket's association.
    Unspecified,
    /// `AF_INET` and `AF_INET6`; never an IPv4-mapped IPv6 address.
    Inet(SocketAddr),
    /// `AF_UNIX`.
    Unix(UnixName),
    /// `AF_NETLINK`: port identifier and groups.
    Netlink(u32, u32),
}

/// An address as the program sees it.
pub struct Encoded {
    bytes: [u8; MAX_LENGTH],
    length: usize,
}

impl Encoded {
    /// The parts, one after the other.
    fn of(parts: &[&[u8]]) -> Encoded {
        let mut encoded = Encoded {
            bytes: [0; MAX_LENGTH],
            length: 0,
        };
        for byte in parts.iter().copied().flatten() {
            if let Some(slot) = encoded.bytes.get_mut(encoded.length) {
                *slot = *byte;
                encoded.length += 1;
            }
        }
        encoded
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .ok_or(Errno::EINVAL)
}

impl Address {
    /// Understands a `struct sockaddr` of a given length.
    ///
    /// # Errors
    /// `EINVAL` when it is too short for its family, `EAFNOSUPPORT` for unknown families.
    pub fn decode(bytes: &[u8]) -> Result<Address> {
        let family = u16::from_ne_bytes(array(bytes, 0)?);
        match family {
            AF_UNSPEC => Ok(Address::Unspecified),
            AF_INET => {
                if bytes.len() < 16 {
                    return Err(Errno::EINVAL);
                }
                let port = u16::from_be_bytes(array(bytes, 2)?);
                Ok(Address::Inet(SocketAddr::new(
                    IpAddr::V4(Ipv4Addr::from(array::<4>(bytes, 4)?)),
                    port,
                )))
            }
            AF_INET6 => {
                // `sin6_scope_id` came later: RFC 2133 had 24 bytes.
                let port = u16::from_be_bytes(array(bytes, 2)?);
                let ip = Ipv6Addr::from(array::<16>(bytes, 8)?);
                let scope = array(bytes, 24).map_or(0, u32::from_ne_bytes);
                Ok(Address::Inet(match ip.to_ipv4_mapped() {
                    Some(ip) => SocketAddr::new(IpAddr::V4(ip), port),
                    None => SocketAddr::V6(SocketAddrV6::new(ip, port, 0, scope)),
                }))
            }
            AF_UNIX => {
                let path = bytes.get(2..).unwrap_or_default();
                if path.len() > UNIX_PATH {
                    return Err(Errno::EINVAL);
                }
                Ok(Address::Unix(match path.split_first() {
                    None => UnixName::Unnamed,
                    Some((0, name)) => UnixName::Abstract(name.to_vec()),
                    Some(_) => UnixName::Path(
                        path.split(|&byte| byte == 0)
                            .next()
                            .unwrap_or_default()
                            .to_vec(),
                    ),
                }))
            }
            AF_NETLINK => Ok(Address::Netlink(
                u32::from_ne_bytes(array(bytes, 4)?),
                u32::from_ne_bytes(array(bytes, 8)?),
            )),
            _ => Err(Errno::EAFNOSUPPORT),
        }
    }

    /// The form in which a socket of `family` tells it: an `AF_INET6` socket gives IPv4 addresses as IPv4-mapped ones.
    #[must_use]
    pub fn encode(&self, family: u16) -> Encoded {
        match self {
            Address::Unspecified => Encoded::of(&[&AF_UNSPEC.to_ne_bytes()]),
            Address::Inet(SocketAddr::V4(address)) if family != AF_INET6 => Encoded::of(&[
                &AF_INET.to_ne_bytes(),
                &address.port().to_be_bytes(),
                &address.ip().octets(),
                &[0; 8],
            ]),
            Address::Inet(address) => {
                let (ip, scope) = match address {
                    SocketAddr::V4(address) => (as_v6(*address.ip()), 0),
                    SocketAddr::V6(address) => (*address.ip(), address.scope_id()),
                };
                Encoded::of(&[
                    &AF_INET6.to_ne_bytes(),
                    &address.port().to_be_bytes(),
                    &[0; 4],
                    &ip.octets(),
                    &scope.to_ne_bytes(),
                ])
            }
            Address::Unix(name) => {
                let family = &AF_UNIX.to_ne_bytes();
                match name {
                    UnixName::Unnamed => Encoded::of(&[family]),
                    UnixName::Path(path) => Encoded::of(&[family, path, &[0]]),
                    UnixName::Abstract(name) => Encoded::of(&[family, &[0], name]),
                }
            }
            Address::Netlink(port, groups) => Encoded::of(&[
                &AF_NETLINK.to_ne_bytes(),
                &[0; 2],
                &port.to_ne_bytes(),
                &groups.to_ne_bytes(),
            ]),
        }
    }
}

/// An IPv4 address as an `AF_INET6` socket tells it. The unspecified address stays unspecified.
fn as_v6(ip: Ipv4Addr) -> Ipv6Addr {
    if ip.is_unspecified() {
        Ipv6Addr::UNSPECIFIED
    } else {
        ip.to_ipv6_mapped()
    }
}

/// The unspecified address of a socket family with port 0.
#[must_use]
pub fn unspecified(family: u16) -> SocketAddr {
    if family == AF_INET6 {
        SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0)
    } else {
        SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)
    }
}

/// The loopback address of the family of `ip`.
#[must_use]
pub fn loopback_like(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    }
}

/// Whether an address is the machine's own by definition: 127.0.0.0/8, ::1.
#[must_use]
pub fn is_loopback(ip: IpAddr) -> bool {
    ip.is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(text: &str, family: u16) -> SocketAddr {
        let address = Address::Inet(text.parse().unwrap());
        match Address::decode(address.encode(family).as_bytes()).unwrap() {
            Address::Inet(address) => address,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn inet_addresses_survive_both_families() {
        assert_eq!(round("10.1.2.3:80", AF_INET).to_string(), "10.1.2.3:80");
        assert_eq!(round("10.1.2.3:80", AF_INET6).to_string(), "10.1.2.3:80");
        assert_eq!(
            round("[fe80::1%3]:80", AF_INET6).to_string(),
            "[fe80::1%3]:80"
        );
        let mapped = Address::Inet("1.2.3.4:5".parse().unwrap()).encode(AF_INET6);
        assert_eq!(mapped.as_bytes().len(), 28);
        assert_eq!(mapped.as_bytes()[18..24], [0xff, 0xff, 1, 2, 3, 4]);
    }

    #[test]
    fn unix_names_keep_their_kind() {
        for name in [
            UnixName::Unnamed,
            UnixName::Path(b"/run/x".to_vec()),
            UnixName::Abstract(b"a\0b".to_vec()),
        ] {
            let address = Address::Unix(name);
            assert_eq!(
                Address::decode(address.encode(AF_UNIX).as_bytes()),
                Ok(address)
            );
        }
    }

    #[test]
    fn short_and_foreign_addresses_are_refused() {
        assert_eq!(Address::decode(&[]), Err(Errno::EINVAL));
        assert_eq!(Address::decode(&[2, 0, 0, 80]), Err(Errno::EINVAL));
        assert_eq!(Address::decode(&[99, 0, 0, 80]), Err(Errno::EAFNOSUPPORT));
        assert_eq!(Address::decode(&[1; 3]), Err(Errno::EAFNOSUPPORT));
        for length in 0..200 {
            for family in 0..20 {
                let mut bytes = alloc::vec![0x41; length];
                if let Some(first) = bytes.first_mut() {
                    *first = family;
                }
                let _ = Address::decode(&bytes);
            }
        }
    }
}

//! Requests of `ioctl(2)` that sockets know: queue lengths and the interface list (`netdevice(7)`).

use core::net::{IpAddr, Ipv4Addr};

use linux_raw_sys::ioctl as linux;

use crate::{
    Errno, Result,
    memory::user::{self, UserRange},
    trace,
};

use super::{
    Shared,
    address::{AF_INET, Address},
    backend::Interface,
    option::LEVEL_TCP,
    socket::Socket,
};

/// Bytes of a `struct ifreq`.
const REQUEST: usize = 40;
/// Bytes of its name.
const NAME: usize = 16;

/// `IFF_UP | IFF_RUNNING | IFF_LOOPBACK`, and for Ethernet `IFF_BROADCAST | IFF_MULTICAST` in place of the last.
#[must_use]
pub fn flags(interface: &Interface) -> u32 {
    if interface.mac.is_none() {
        0x49
    } else {
        0x1043
    }
}

/// The first IPv4 address with its mask.
fn v4(interface: &Interface) -> Result<(Ipv4Addr, Ipv4Addr)> {
    interface
        .addresses
        .iter()
        .find_map(|(ip, prefix)| match ip {
            IpAddr::V4(ip) => {
                let mask = u32::MAX
                    .checked_shl(32 - u32::from(*prefix).min(32))
                    .unwrap_or(0);
                Some((*ip, Ipv4Addr::from(mask)))
            }
            IpAddr::V6(_) => None,
        })
        .ok_or(Errno::EADDRNOTAVAIL)
}

/// A `struct sockaddr_in` without port.
fn socket_address(ip: Ipv4Addr) -> [u8; 16] {
    let mut bytes = [0; 16];
    let encoded = Address::Inet((ip, 0).into()).encode(AF_INET);
    for (to, from) in bytes.iter_mut().zip(encoded.as_bytes()) {
        *to = *from;
    }
    bytes
}

/// Answers a request.
///
/// # Errors
/// `ENOTTY` for unknown requests, `EPERM` for changes of interfaces, `ENODEV` for unknown interfaces.
pub fn ioctl(socket: &dyn Socket, request: u32, argument: u64) -> Result<usize> {
    let shared = &socket.base().shared;
    match request {
        // What waits at a listening TCP socket is no bytes (tcp(7)).
        linux::FIONREAD if socket.base().kind.protocol == LEVEL_TCP && socket.is_listening() => {
            Err(Errno::EINVAL)
        }
        linux::FIONREAD | linux::TIOCOUTQ => {
            let (input, output) = socket.queued();
            let queued = if request == linux::FIONREAD {
                input
            } else {
                output
            };
            user::write(argument, &i32::try_from(queued).unwrap_or(i32::MAX)).map(|()| 0)
        }
        // Urgent data is not supported, so the mark is never reached.
        linux::SIOCATMARK => user::write(argument, &0i32).map(|()| 0),
        linux::SIOCGIFCONF => list(shared, argument),
        linux::SIOCGIFNAME => {
            let index: u32 = user::read(argument + NAME as u64)?;
            let interface = shared
                .interfaces()
                .into_iter()
                .find(|i| i.index == index)
                .ok_or(Errno::ENODEV)?;
            let mut name = [0u8; NAME];
            for (to, from) in name.iter_mut().zip(interface.name.bytes()) {
                *to = from;
            }
            user::write(argument, &name).map(|()| 0)
        }
        linux::SIOCGIFFLAGS
        | linux::SIOCGIFADDR
        | linux::SIOCGIFDSTADDR
        | linux::SIOCGIFBRDADDR
        | linux::SIOCGIFNETMASK
        | linux::SIOCGIFMETRIC
        | linux::SIOCGIFMTU
        | linux::SIOCGIFHWADDR
        | linux::SIOCGIFINDEX
        | linux::SIOCGIFTXQLEN => one(shared, request, argument).map(|()| 0),
        linux::SIOCSIFFLAGS
        | linux::SIOCSIFADDR
        | linux::SIOCSIFBRDADDR
        | linux::SIOCSIFNETMASK
        | linux::SIOCSIFMTU
        | linux::SIOCSIFHWADDR
        | linux::SIOCADDRT
        | linux::SIOCDELRT => {
            trace::warn!(
                "net: interfaces and routes cannot be changed by the program (ioctl {request:#x})"
            );
            Err(Errno::EPERM)
        }
        _ => Err(Errno::ENOTTY),
    }
}

/// `SIOCGIFCONF`: interfaces with IPv4 addresses.
fn list(shared: &Shared, argument: u64) -> Result<usize> {
    let capacity: i32 = user::read(argument)?;
    let buffer: u64 = user::read(argument + 8)?;
    let interfaces = shared.interfaces();
    let with_address = interfaces
        .iter()
        .filter_map(|interface| Some((interface.name, v4(interface).ok()?.0)));
    let mut length = 0usize;
    for (name, ip) in with_address {
        if buffer != 0 {
            if length + REQUEST > usize::try_from(capacity).unwrap_or(0) {
                break;
            }
            let mut request = [0u8; REQUEST];
            for (to, from) in request.iter_mut().zip(name.bytes()) {
                *to = from;
            }
            request[NAME..NAME + 16].copy_from_slice(&socket_address(ip));
            UserRange::new(buffer + length as u64, REQUEST as u64)?.write(&request)?;
        }
        length += REQUEST;
    }
    user::write(argument, &i32::try_from(length).unwrap_or(i32::MAX))?;
    Ok(0)
}

/// A question about one interface, named in the request.
fn one(shared: &Shared, request: u32, argument: u64) -> Result<()> {
    let name: [u8; NAME] = user::read(argument)?;
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let interfaces = shared.interfaces();
    let interface = interfaces
        .iter()
        .find(|i| i.name.as_bytes() == name)
        .ok_or(Errno::ENODEV)?;
    let answer = argument + NAME as u64;
    match request {
        linux::SIOCGIFFLAGS => user::write(answer, &(flags(interface) as u16)),
        linux::SIOCGIFADDR | linux::SIOCGIFDSTADDR => {
            user::write(answer, &socket_address(v4(interface)?.0))
        }
        linux::SIOCGIFNETMASK => user::write(answer, &socket_address(v4(interface)?.1)),
        linux::SIOCGIFBRDADDR => {
            let (ip, mask) = v4(interface)?;
            user::write(
                answer,
                &socket_address(Ipv4Addr::from(u32::from(ip) | !u32::from(mask))),
            )
        }
        linux::SIOCGIFMETRIC => user::write(answer, &0i32),
        linux::SIOCGIFMTU => user::write(answer, &interface.mtu),
        linux::SIOCGIFINDEX => user::write(answer, &interface.index),
        linux::SIOCGIFTXQLEN => user::write(answer, &1000i32),
        _ => {
            // ARPHRD_LOOPBACK or ARPHRD_ETHER as the family, then the address.
            let mut bytes = [0u8; 16];
            let kind: u16 = if interface.mac.is_none() { 772 } else { 1 };
            bytes[..2].copy_from_slice(&kind.to_ne_bytes());
            bytes[2..8].copy_from_slice(&interface.mac.unwrap_or_default());
            user::write(answer, &bytes)
        }
    }
}

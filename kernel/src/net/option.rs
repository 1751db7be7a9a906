//! Socket options (`socket(7)`, `tcp(7)`, `ip(7)`, `ipv6(7)`).
//!
//! What always holds: an option that is not in the tables here gives `ENOPROTOOPT` and a line in the log, never a pretended
//! success. Options that only tune how the network below works (buffer sizes, keep-alive times, delays) are kept and told
//! back as `getsockopt(2)` demands, and given to the stack where it has them.

use alloc::vec::Vec;

use linux_raw_sys::{general::timeval, net as linux};

use crate::{
    Errno, Result,
    memory::user::{bytes_of, from_bytes},
    time, trace,
};

use super::address::{AF_INET, AF_INET6, AF_UNIX};

/// `SOL_SOCKET`.
pub const SOL_SOCKET: i32 = linux::SOL_SOCKET as i32;
/// `IPPROTO_IP`.
pub const LEVEL_IP: i32 = 0;
/// `IPPROTO_TCP`.
pub const LEVEL_TCP: i32 = 6;
/// `IPPROTO_UDP`.
pub const LEVEL_UDP: i32 = 17;
/// `IPPROTO_IPV6`.
pub const LEVEL_IPV6: i32 = 41;
/// `IPPROTO_ICMP`.
pub const PROTOCOL_ICMP: i32 = 1;
/// `IPPROTO_ICMPV6`.
pub const PROTOCOL_ICMPV6: i32 = 58;

/// Default buffers in bytes, as Linux's `net.core.rmem_default`.
pub const DEFAULT_BUFFER: u32 = 212_992;
/// Largest buffer that may be asked for (before Linux's doubling), in bytes.
const MAX_BUFFER: u32 = 4 << 20;
/// Smallest buffers (`SOCK_MIN_RCVBUF`, `SOCK_MIN_SNDBUF`).
const MIN_RECEIVE: u32 = 2304;
const MIN_SEND: u32 = 4608;

/// Values of options.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// `SO_REUSEADDR`.
    pub reuse_address: bool,
    /// `SO_REUSEPORT`.
    pub reuse_port: bool,
    /// `SO_KEEPALIVE`.
    pub keep_alive: bool,
    /// `SO_BROADCAST`.
    pub broadcast: bool,
    /// `SO_OOBINLINE`.
    pub out_of_band_inline: bool,
    /// `SO_DONTROUTE`.
    pub do_not_route: bool,
    /// `SO_TIMESTAMP` and `SO_TIMESTAMPNS`: 0 none, 1 microseconds, 2 nanoseconds.
    pub timestamp: u8,
    /// `SO_PRIORITY`.
    pub priority: u32,
    /// `SO_RCVLOWAT`.
    pub receive_low_water: u32,
    /// `SO_LINGER`: seconds when on.
    pub linger: Option<u32>,
    /// `SO_RCVBUF`, as told (doubled).
    pub receive_buffer: u32,
    /// `SO_SNDBUF`, as told (doubled).
    pub send_buffer: u32,
    /// Whether the program set the buffers.
    pub buffers_set: bool,
    /// `SO_RCVTIMEO` in nanoseconds; 0 is none.
    pub receive_timeout: u64,
    /// `SO_SNDTIMEO` in nanoseconds; 0 is none.
    pub send_timeout: u64,
    /// `SO_PASSCRED`.
    pub pass_credentials: bool,
    /// `TCP_NODELAY`.
    pub no_delay: bool,
    /// `TCP_CORK`.
    pub cork: bool,
    /// `TCP_KEEPIDLE` in seconds.
    pub keep_idle: u32,
    /// `TCP_KEEPINTVL` in seconds.
    pub keep_interval: u32,
    /// `TCP_KEEPCNT`.
    pub keep_count: u32,
    /// `TCP_SYNCNT`.
    pub syn_count: u32,
    /// `TCP_LINGER2` in seconds.
    pub linger2: i32,
    /// `TCP_DEFER_ACCEPT` in seconds.
    pub defer_accept: u32,
    /// `TCP_USER_TIMEOUT` in milliseconds.
    pub user_timeout: u32,
    /// `TCP_QUICKACK`.
    pub quick_ack: bool,
    /// `TCP_FASTOPEN`: queue length.
    pub fast_open: u32,
    /// `TCP_NOTSENT_LOWAT`.
    pub not_sent_low_water: u32,
    /// `IPV6_V6ONLY`.
    pub v6_only: bool,
    /// `IP_TOS`.
    pub tos: u8,
    /// `IPV6_TCLASS`.
    pub traffic_class: u8,
    /// `IP_TTL`.
    pub ttl: u8,
    /// `IPV6_UNICAST_HOPS`.
    pub hops: i32,
    /// `IP_PKTINFO`.
    pub packet_info: bool,
    /// `IPV6_RECVPKTINFO`.
    pub packet_info_v6: bool,
    /// `IP_RECVERR`, `IPV6_RECVERR`: errors of unconnected sends are told. There are none to tell beyond `SO_ERROR`.
    pub receive_errors: [bool; 2],
    /// `IP_MTU_DISCOVER`, `IPV6_MTU_DISCOVER`.
    pub mtu_discover: [u32; 2],
    /// `IP_BIND_ADDRESS_NO_PORT`.
    pub bind_address_no_port: bool,
    /// `IP_FREEBIND`, `IPV6_FREEBIND`.
    pub free_bind: bool,
    /// `IP_MULTICAST_TTL`.
    pub multicast_ttl: u8,
    /// `IP_MULTICAST_LOOP`.
    pub multicast_loop: bool,
}

/// What a new socket begins with.
const NEW: Options = Options {
    reuse_address: false,
    reuse_port: false,
    keep_alive: false,
    broadcast: false,
    out_of_band_inline: false,
    do_not_route: false,
    timestamp: 0,
    priority: 0,
    receive_low_water: 1,
    linger: None,
    receive_buffer: DEFAULT_BUFFER,
    send_buffer: DEFAULT_BUFFER,
    buffers_set: false,
    receive_timeout: 0,
    send_timeout: 0,
    pass_credentials: false,
    no_delay: false,
    cork: false,
    keep_idle: 7200,
    keep_interval: 75,
    keep_count: 9,
    syn_count: 6,
    linger2: 60,
    defer_accept: 0,
    user_timeout: 0,
    quick_ack: true,
    fast_open: 0,
    not_sent_low_water: 0,
    v6_only: false,
    tos: 0,
    traffic_class: 0,
    ttl: 64,
    hops: -1,
    packet_info: false,
    packet_info_v6: false,
    receive_errors: [false; 2],
    mtu_discover: [1; 2],
    bind_address_no_port: false,
    free_bind: false,
    multicast_ttl: 1,
    multicast_loop: true,
};

impl Default for Options {
    fn default() -> Options {
        NEW
    }
}

/// Family, kind (`SOCK_*`) and protocol of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketType {
    /// `AF_*`.
    pub family: u16,
    /// `SOCK_*` without flags.
    pub kind: u32,
    /// `IPPROTO_*`.
    pub protocol: i32,
}

impl SocketType {
    fn is_tcp(self) -> bool {
        self.protocol == LEVEL_TCP
    }

    fn is_inet(self) -> bool {
        matches!(self.family, AF_INET | AF_INET6)
    }
}

fn integer(value: &[u8]) -> Result<i32> {
    value
        .first_chunk::<4>()
        .map(|bytes| i32::from_ne_bytes(*bytes))
        .ok_or(Errno::EINVAL)
}

/// `IP_*` options may be given as one byte.
fn small_integer(value: &[u8]) -> Result<i32> {
    match value {
        [] => Err(Errno::EINVAL),
        [byte] => Ok(i32::from(*byte)),
        _ if value.len() < 4 => Ok(i32::from(value.first().copied().unwrap_or(0))),
        _ => integer(value),
    }
}

fn in_range(value: i32, low: i32, high: i32) -> Result<u32> {
    if (low..=high).contains(&value) {
        Ok(value.cast_unsigned())
    } else {
        Err(Errno::EINVAL)
    }
}

fn buffer(value: i32, minimum: u32) -> u32 {
    // Linux counts its own bookkeeping in and so doubles what is asked for (socket(7)).
    (value.max(0).cast_unsigned().min(MAX_BUFFER) * 2).max(minimum)
}

fn timeout(value: &[u8]) -> Result<u64> {
    let time: timeval = from_bytes(value).ok_or(Errno::EINVAL)?;
    if time.tv_usec < 0 || time.tv_usec >= 1_000_000 {
        return Err(Errno::EDOM);
    }
    if time.tv_sec < 0 {
        return Ok(1);
    }
    time::from_timeval(&time)
}

/// Logs an option that is not there, and gives the error for it.
pub fn unsupported(action: &str, socket: SocketType, level: i32, name: u32) -> Errno {
    // An option of another family is an error on Linux, too.
    if level != LEVEL_IPV6 || socket.family == AF_INET6 {
        trace::warn!(
            "net: {action}: option {name} of level {level} is not supported for family {} kind {}",
            socket.family,
            socket.kind
        );
    }
    Errno::ENOPROTOOPT
}

impl Options {
    /// Sets an option that needs nothing but its value kept.
    ///
    /// # Errors
    /// As `setsockopt(2)`.
    pub fn set(&mut self, socket: SocketType, level: i32, name: u32, value: &[u8]) -> Result<()> {
        match level {
            SOL_SOCKET => self.set_socket(socket, name, value),
            LEVEL_TCP if socket.is_tcp() => self.set_tcp(socket, name, value),
            LEVEL_IP if socket.is_inet() => self.set_ip(socket, name, value),
            LEVEL_IPV6 if socket.family == AF_INET6 => self.set_ipv6(socket, name, value),
            _ => Err(unsupported("setsockopt", socket, level, name)),
        }
    }

    fn set_socket(&mut self, socket: SocketType, name: u32, value: &[u8]) -> Result<()> {
        let flag = || integer(value).map(|value| value != 0);
        match name {
            linux::SO_REUSEADDR => self.reuse_address = flag()?,
            linux::SO_REUSEPORT => self.reuse_port = flag()?,
            linux::SO_KEEPALIVE => self.keep_alive = flag()?,
            linux::SO_BROADCAST => self.broadcast = flag()?,
            linux::SO_OOBINLINE => self.out_of_band_inline = flag()?,
            linux::SO_DONTROUTE => self.do_not_route = flag()?,
            linux::SO_PRIORITY => self.priority = in_range(integer(value)?, 0, 6)?,
            linux::SO_RCVLOWAT => self.receive_low_water = integer(value)?.max(1).cast_unsigned(),
            linux::SO_TIMESTAMP => self.timestamp = u8::from(flag()?),
            linux::SO_TIMESTAMPNS => self.timestamp = if flag()? { 2 } else { 0 },
            linux::SO_RCVBUF | linux::SO_RCVBUFFORCE => {
                self.receive_buffer = buffer(integer(value)?, MIN_RECEIVE);
                self.buffers_set = true;
            }
            linux::SO_SNDBUF | linux::SO_SNDBUFFORCE => {
                self.send_buffer = buffer(integer(value)?, MIN_SEND);
                self.buffers_set = true;
            }
            linux::SO_RCVTIMEO | linux::SO_RCVTIMEO_NEW => self.receive_timeout = timeout(value)?,
            linux::SO_SNDTIMEO | linux::SO_SNDTIMEO_NEW => self.send_timeout = timeout(value)?,
            linux::SO_PASSCRED if socket.family == AF_UNIX => self.pass_credentials = flag()?,
            linux::SO_LINGER => {
                let linger: linux::linger = from_bytes(value).ok_or(Errno::EINVAL)?;
                self.linger =
                    (linger.l_onoff != 0).then_some(linger.l_linger.max(0).cast_unsigned());
            }
            linux::SO_TYPE
            | linux::SO_DOMAIN
            | linux::SO_PROTOCOL
            | linux::SO_ERROR
            | linux::SO_ACCEPTCONN => {
                return Err(Errno::ENOPROTOOPT);
            }
            _ => return Err(unsupported("setsockopt", socket, SOL_SOCKET, name)),
        }
        Ok(())
    }

    fn set_tcp(&mut self, socket: SocketType, name: u32, value: &[u8]) -> Result<()> {
        if name == linux::TCP_CONGESTION {
            // The one algorithm that is told back.
            let text = value.split(|&byte| byte == 0).next().unwrap_or_default();
            return if text == CONGESTION {
                Ok(())
            } else {
                Err(Errno::ENOENT)
            };
        }
        let value = integer(value)?;
        match name {
            linux::TCP_NODELAY => self.no_delay = value != 0,
            linux::TCP_CORK => self.cork = value != 0,
            linux::TCP_KEEPIDLE => self.keep_idle = in_range(value, 1, 32767)?,
            linux::TCP_KEEPINTVL => self.keep_interval = in_range(value, 1, 32767)?,
            linux::TCP_KEEPCNT => self.keep_count = in_range(value, 1, 127)?,
            linux::TCP_SYNCNT => self.syn_count = in_range(value, 1, 127)?,
            linux::TCP_LINGER2 => self.linger2 = value,
            linux::TCP_DEFER_ACCEPT => self.defer_accept = value.max(0).cast_unsigned(),
            linux::TCP_USER_TIMEOUT => self.user_timeout = in_range(value, 0, i32::MAX)?,
            linux::TCP_QUICKACK => self.quick_ack = value != 0,
            linux::TCP_FASTOPEN => self.fast_open = in_range(value, 0, i32::MAX)?,
            linux::TCP_NOTSENT_LOWAT => self.not_sent_low_water = value.cast_unsigned(),
            _ => return Err(unsupported("setsockopt", socket, LEVEL_TCP, name)),
        }
        Ok(())
    }

    fn set_ip(&mut self, socket: SocketType, name: u32, value: &[u8]) -> Result<()> {
        match name {
            linux::IP_ADD_MEMBERSHIP | linux::IP_ADD_SOURCE_MEMBERSHIP => {
                trace::warn!("net: multicast groups are not supported");
                return Err(Errno::ENODEV);
            }
            linux::IP_DROP_MEMBERSHIP | linux::IP_DROP_SOURCE_MEMBERSHIP => {
                return Err(Errno::EADDRNOTAVAIL);
            }
            _ => {}
        }
        let value = small_integer(value)?;
        match name {
            linux::IP_TOS => self.tos = value as u8,
            linux::IP_TTL => {
                self.ttl = if value == -1 {
                    64
                } else {
                    in_range(value, 1, 255)? as u8
                }
            }
            linux::IP_PKTINFO => self.packet_info = value != 0,
            linux::IP_RECVERR => self.receive_errors[0] = value != 0,
            linux::IP_MTU_DISCOVER => self.mtu_discover[0] = in_range(value, 0, 5)?,
            linux::IP_BIND_ADDRESS_NO_PORT => self.bind_address_no_port = value != 0,
            linux::IP_FREEBIND => self.free_bind = value != 0,
            linux::IP_MULTICAST_TTL => {
                self.multicast_ttl = if value == -1 {
                    1
                } else {
                    in_range(value, 0, 255)? as u8
                }
            }
            linux::IP_MULTICAST_LOOP => self.multicast_loop = value != 0,
            _ => return Err(unsupported("setsockopt", socket, LEVEL_IP, name)),
        }
        Ok(())
    }

    fn set_ipv6(&mut self, socket: SocketType, name: u32, value: &[u8]) -> Result<()> {
        if name == linux::IPV6_ADD_MEMBERSHIP || name == linux::IPV6_JOIN_ANYCAST {
            trace::warn!("net: multicast groups are not supported");
            return Err(Errno::ENODEV);
        }
        let value = integer(value)?;
        match name {
            linux::IPV6_V6ONLY => self.v6_only = value != 0,
            linux::IPV6_RECVPKTINFO => self.packet_info_v6 = value != 0,
            linux::IPV6_UNICAST_HOPS => {
                self.hops = if value == -1 {
                    -1
                } else {
                    in_range(value, 0, 255)? as i32
                }
            }
            linux::IPV6_TCLASS => {
                self.traffic_class = if value == -1 {
                    0
                } else {
                    in_range(value, 0, 255)? as u8
                }
            }
            linux::IPV6_RECVERR => self.receive_errors[1] = value != 0,
            linux::IPV6_MTU_DISCOVER => self.mtu_discover[1] = in_range(value, 0, 5)?,
            linux::IPV6_FREEBIND => self.free_bind = value != 0,
            linux::IPV6_MULTICAST_HOPS => {
                self.multicast_ttl = if value == -1 {
                    1
                } else {
                    in_range(value, 0, 255)? as u8
                };
            }
            linux::IPV6_MULTICAST_LOOP => self.multicast_loop = value != 0,
            _ => return Err(unsupported("setsockopt", socket, LEVEL_IPV6, name)),
        }
        Ok(())
    }

    /// Tells an option that is in here; those that depend on the socket's state are the caller's.
    ///
    /// # Errors
    /// As `getsockopt(2)`.
    pub fn get(&self, socket: SocketType, level: i32, name: u32) -> Result<Vec<u8>> {
        let number = match (level, name) {
            (SOL_SOCKET, linux::SO_LINGER) => {
                let mut bytes = Vec::with_capacity(8);
                bytes.extend_from_slice(&i32::from(self.linger.is_some()).to_ne_bytes());
                bytes.extend_from_slice(&self.linger.unwrap_or(0).to_ne_bytes());
                return Ok(bytes);
            }
            (SOL_SOCKET, linux::SO_RCVTIMEO | linux::SO_RCVTIMEO_NEW) => {
                return Ok(bytes_of(&time::to_timeval(self.receive_timeout)).to_vec());
            }
            (SOL_SOCKET, linux::SO_SNDTIMEO | linux::SO_SNDTIMEO_NEW) => {
                return Ok(bytes_of(&time::to_timeval(self.send_timeout)).to_vec());
            }
            (LEVEL_TCP, linux::TCP_CONGESTION) if socket.is_tcp() => {
                let mut bytes = alloc::vec![0; 16];
                bytes[..CONGESTION.len()].copy_from_slice(CONGESTION);
                return Ok(bytes);
            }
            (SOL_SOCKET, _) => self.get_socket(socket, name)?,
            (LEVEL_TCP, _) if socket.is_tcp() => self.get_tcp(socket, name)?,
            (LEVEL_IP, _) if socket.is_inet() => self.get_ip(socket, name)?,
            (LEVEL_IPV6, _) if socket.family == AF_INET6 => self.get_ipv6(socket, name)?,
            // A level of another protocol: each family of Linux has its own error (ip_sockglue.c, ipv6_sockglue.c, sock.c).
            _ => {
                let error = unsupported("getsockopt", socket, level, name);
                return Err(match socket.family {
                    AF_INET6 => error,
                    _ => Errno::EOPNOTSUPP,
                });
            }
        };
        Ok(number.to_ne_bytes().to_vec())
    }

    fn get_socket(&self, socket: SocketType, name: u32) -> Result<i32> {
        Ok(match name {
            linux::SO_TYPE => socket.kind.cast_signed(),
            linux::SO_DOMAIN => i32::from(socket.family),
            linux::SO_PROTOCOL => socket.protocol,
            linux::SO_REUSEADDR => i32::from(self.reuse_address),
            linux::SO_REUSEPORT => i32::from(self.reuse_port),
            linux::SO_KEEPALIVE => i32::from(self.keep_alive),
            linux::SO_BROADCAST => i32::from(self.broadcast),
            linux::SO_OOBINLINE => i32::from(self.out_of_band_inline),
            linux::SO_DONTROUTE => i32::from(self.do_not_route),
            linux::SO_PRIORITY => self.priority.cast_signed(),
            linux::SO_RCVLOWAT => self.receive_low_water.cast_signed(),
            linux::SO_SNDLOWAT => 1,
            linux::SO_TIMESTAMP => i32::from(self.timestamp == 1),
            linux::SO_TIMESTAMPNS => i32::from(self.timestamp == 2),
            linux::SO_RCVBUF => self.receive_buffer.cast_signed(),
            linux::SO_SNDBUF => self.send_buffer.cast_signed(),
            linux::SO_PASSCRED => i32::from(self.pass_credentials),
            linux::SO_DEBUG | linux::SO_MARK | linux::SO_BUSY_POLL => 0,
            _ => return Err(unsupported("getsockopt", socket, SOL_SOCKET, name)),
        })
    }

    fn get_tcp(&self, socket: SocketType, name: u32) -> Result<i32> {
        Ok(match name {
            linux::TCP_NODELAY => i32::from(self.no_delay),
            linux::TCP_CORK => i32::from(self.cork),
            linux::TCP_KEEPIDLE => self.keep_idle.cast_signed(),
            linux::TCP_KEEPINTVL => self.keep_interval.cast_signed(),
            linux::TCP_KEEPCNT => self.keep_count.cast_signed(),
            linux::TCP_SYNCNT => self.syn_count.cast_signed(),
            linux::TCP_LINGER2 => self.linger2,
            linux::TCP_DEFER_ACCEPT => self.defer_accept.cast_signed(),
            linux::TCP_USER_TIMEOUT => self.user_timeout.cast_signed(),
            linux::TCP_QUICKACK => i32::from(self.quick_ack),
            linux::TCP_FASTOPEN => self.fast_open.cast_signed(),
            linux::TCP_NOTSENT_LOWAT => self.not_sent_low_water.cast_signed(),
            linux::TCP_MAXSEG => 1448,
            _ => return Err(unsupported("getsockopt", socket, LEVEL_TCP, name)),
        })
    }

    fn get_ip(&self, socket: SocketType, name: u32) -> Result<i32> {
        Ok(match name {
            linux::IP_TOS => i32::from(self.tos),
            linux::IP_TTL => i32::from(self.ttl),
            linux::IP_PKTINFO => i32::from(self.packet_info),
            linux::IP_RECVERR => i32::from(self.receive_errors[0]),
            linux::IP_MTU_DISCOVER => self.mtu_discover[0].cast_signed(),
            linux::IP_BIND_ADDRESS_NO_PORT => i32::from(self.bind_address_no_port),
            linux::IP_FREEBIND => i32::from(self.free_bind),
            linux::IP_MULTICAST_TTL => i32::from(self.multicast_ttl),
            linux::IP_MULTICAST_LOOP => i32::from(self.multicast_loop),
            _ => return Err(unsupported("getsockopt", socket, LEVEL_IP, name)),
        })
    }

    fn get_ipv6(&self, socket: SocketType, name: u32) -> Result<i32> {
        Ok(match name {
            linux::IPV6_V6ONLY => i32::from(self.v6_only),
            linux::IPV6_RECVPKTINFO => i32::from(self.packet_info_v6),
            linux::IPV6_UNICAST_HOPS => {
                if self.hops == -1 {
                    64
                } else {
                    self.hops
                }
            }
            linux::IPV6_TCLASS => i32::from(self.traffic_class),
            linux::IPV6_RECVERR => i32::from(self.receive_errors[1]),
            linux::IPV6_MTU_DISCOVER => self.mtu_discover[1].cast_signed(),
            linux::IPV6_FREEBIND => i32::from(self.free_bind),
            linux::IPV6_MULTICAST_HOPS => i32::from(self.multicast_ttl),
            linux::IPV6_MULTICAST_LOOP => i32::from(self.multicast_loop),
            _ => return Err(unsupported("getsockopt", socket, LEVEL_IPV6, name)),
        })
    }
}

/// The congestion control that is told, Linux's plainest.
const CONGESTION: &[u8] = b"reno";

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: SocketType = SocketType {
        family: AF_INET,
        kind: 1,
        protocol: LEVEL_TCP,
    };

    #[test]
    fn buffers_are_doubled_as_linux_does() {
        let mut options = Options::default();
        options
            .set(TCP, SOL_SOCKET, linux::SO_RCVBUF, &65536i32.to_ne_bytes())
            .unwrap();
        assert_eq!(
            options.get(TCP, SOL_SOCKET, linux::SO_RCVBUF).unwrap(),
            131_072i32.to_ne_bytes()
        );
        options
            .set(TCP, SOL_SOCKET, linux::SO_SNDBUF, &1i32.to_ne_bytes())
            .unwrap();
        assert_eq!(
            options.get(TCP, SOL_SOCKET, linux::SO_SNDBUF).unwrap(),
            4608i32.to_ne_bytes()
        );
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let mut options = Options::default();
        assert_eq!(
            options.set(TCP, SOL_SOCKET, 9999, &[1, 0, 0, 0]),
            Err(Errno::ENOPROTOOPT)
        );
        assert_eq!(
            options.set(TCP, LEVEL_IPV6, linux::IPV6_V6ONLY, &[1, 0, 0, 0]),
            Err(Errno::ENOPROTOOPT)
        );
        assert_eq!(
            options.set(TCP, SOL_SOCKET, linux::SO_REUSEADDR, &[1]),
            Err(Errno::EINVAL)
        );
        assert_eq!(
            options.set(TCP, LEVEL_TCP, linux::TCP_KEEPIDLE, &[0; 4]),
            Err(Errno::EINVAL)
        );
    }

    #[test]
    fn every_settable_flag_is_told_back() {
        for (level, name) in [
            (SOL_SOCKET, linux::SO_REUSEADDR),
            (SOL_SOCKET, linux::SO_REUSEPORT),
            (SOL_SOCKET, linux::SO_KEEPALIVE),
            (LEVEL_TCP, linux::TCP_NODELAY),
            (LEVEL_TCP, linux::TCP_CORK),
            (LEVEL_IP, linux::IP_PKTINFO),
        ] {
            let mut options = Options::default();
            options.set(TCP, level, name, &1i32.to_ne_bytes()).unwrap();
            assert_eq!(
                options.get(TCP, level, name).unwrap(),
                1i32.to_ne_bytes(),
                "{level} {name}"
            );
        }
    }
}

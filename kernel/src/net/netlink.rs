//! Netlink sockets, as far as `getifaddrs(3)`, `if_nameindex(3)` and readers of routes need them (`rtnetlink(7)`): dumps
//! of links, addresses and routes. Nothing can be changed (`EPERM`), and there are no notifications.

use alloc::{collections::VecDeque, sync::Arc, vec::Vec};
use core::net::IpAddr;

use crate::{
    Errno, Result,
    file::{Readiness, Sink, Source},
    sync::Mutex,
    trace,
};

use super::{
    Shared,
    address::{AF_INET, AF_INET6, AF_NETLINK, AF_UNSPEC, Address},
    backend::Interface,
    ioctl,
    socket::{Base, Caller, Incoming, Outgoing, Socket},
};

/// `NETLINK_ROUTE`: the one protocol that is supported.
pub const ROUTE: i32 = 0;

/// `SOL_NETLINK`.
const LEVEL_NETLINK: i32 = 270;

// Message types and flags of linux/netlink.h and linux/rtnetlink.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const NLM_F_MULTI: u16 = 2;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const HEADER: usize = 16;

// Attributes.
const IFLA_ADDRESS: u16 = 1;
const IFLA_BROADCAST: u16 = 2;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_TXQLEN: u16 = 13;
const IFLA_OPERSTATE: u16 = 16;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_LABEL: u16 = 3;
const IFA_BROADCAST: u16 = 4;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RTA_TABLE: u16 = 15;

/// Bytes of one answer datagram, as glibc's buffers expect at most a page.
const BATCH: usize = 3800;

/// A message under construction.
struct Builder {
    bytes: Vec<u8>,
}

impl Builder {
    fn new(kind: u16, flags: u16, sequence: u32, port: u32) -> Builder {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&port.to_ne_bytes());
        Builder { bytes }
    }

    fn raw(mut self, bytes: &[u8]) -> Builder {
        self.bytes.extend_from_slice(bytes);
        self
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Builder {
        let length = (4 + value.len()) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.align();
        self
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.align();
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }
}

fn octets(ip: &IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn family(ip: &IpAddr) -> u16 {
    if ip.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn link(interface: &Interface, sequence: u32, port: u32, flags: u16) -> Vec<u8> {
    let kind: u16 = if interface.mac.is_some() { 1 } else { 772 };
    let mut name = interface.name.as_bytes().to_vec();
    name.push(0);
    let broadcast = if interface.mac.is_some() {
        [0xff; 6]
    } else {
        [0; 6]
    };
    Builder::new(RTM_NEWLINK, flags, sequence, port)
        .raw(&[AF_UNSPEC as u8, 0])
        .raw(&kind.to_ne_bytes())
        .raw(&interface.index.to_ne_bytes())
        .raw(&ioctl::flags(interface).to_ne_bytes())
        .raw(&0u32.to_ne_bytes())
        .attribute(IFLA_IFNAME, &name)
        .attribute(IFLA_TXQLEN, &1000u32.to_ne_bytes())
        .attribute(
            IFLA_OPERSTATE,
            &[if interface.mac.is_some() { 6 } else { 0 }],
        )
        .attribute(IFLA_MTU, &interface.mtu.to_ne_bytes())
        .attribute(IFLA_ADDRESS, &interface.mac.unwrap_or_default())
        .attribute(IFLA_BROADCAST, &broadcast)
        .finish()
}

fn address(interface: &Interface, ip: &IpAddr, prefix: u8, sequence: u32, port: u32) -> Vec<u8> {
    // RT_SCOPE_HOST for the loopback, RT_SCOPE_LINK for link-local addresses, else RT_SCOPE_UNIVERSE.
    let scope = match ip {
        ip if ip.is_loopback() => 254,
        IpAddr::V6(ip) if ip.is_unicast_link_local() => 253,
        _ => 0u8,
    };
    let bytes = octets(ip);
    let mut name = interface.name.as_bytes().to_vec();
    name.push(0);
    let mut message = Builder::new(RTM_NEWADDR, NLM_F_MULTI, sequence, port)
        .raw(&[family(ip) as u8, prefix, 0x80, scope])
        .raw(&interface.index.to_ne_bytes())
        .attribute(IFA_ADDRESS, &bytes);
    if let IpAddr::V4(v4) = ip {
        message = message.attribute(IFA_LOCAL, &bytes);
        if interface.mac.is_some() {
            let host = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
            message = message.attribute(IFA_BROADCAST, &(u32::from(*v4) | host).to_be_bytes());
        }
        message = message.attribute(IFA_LABEL, &name);
    }
    message.finish()
}

fn route(
    interface: &Interface,
    destination: Option<(&IpAddr, u8)>,
    gateway: Option<&IpAddr>,
    source: Option<&IpAddr>,
    sequence: u32,
    port: u32,
) -> Option<Vec<u8>> {
    let family = family(destination.map(|(ip, _)| ip).or(gateway)?);
    let prefix = destination.map_or(0, |(_, prefix)| prefix);
    // RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_LINK or RT_SCOPE_UNIVERSE, RTN_UNICAST.
    let scope = if gateway.is_none() { 253 } else { 0 };
    let mut message = Builder::new(RTM_NEWROUTE, NLM_F_MULTI, sequence, port)
        .raw(&[family as u8, prefix, 0, 0, 254, 3, scope, 1])
        .raw(&0u32.to_ne_bytes())
        .attribute(RTA_TABLE, &254u32.to_ne_bytes());
    if let Some((ip, prefix)) = destination {
        let mut bytes = octets(ip);
        for (index, byte) in bytes.iter_mut().enumerate() {
            let bits = (usize::from(prefix)).saturating_sub(index * 8).min(8);
            *byte &= 0xffu8.checked_shl(8 - bits as u32).unwrap_or(0);
        }
        message = message.attribute(RTA_DST, &bytes);
    }
    if let Some(gateway) = gateway {
        message = message.attribute(RTA_GATEWAY, &octets(gateway));
    }
    if let Some(source) = source {
        message = message.attribute(RTA_PREFSRC, &octets(source));
    }
    Some(
        message
            .attribute(RTA_OIF, &interface.index.to_ne_bytes())
            .finish(),
    )
}

/// The answers to one request.
fn answer(
    interfaces: &[Interface],
    kind: u16,
    flags: u16,
    wanted: u16,
    sequence: u32,
    port: u32,
) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    let fits = |ip: &IpAddr| wanted == AF_UNSPEC || wanted == family(ip);
    match kind {
        RTM_GETLINK => {
            messages.extend(
                interfaces
                    .iter()
                    .map(|interface| link(interface, sequence, port, NLM_F_MULTI)),
            );
        }
        RTM_GETADDR => {
            for interface in interfaces {
                for (ip, prefix) in interface.addresses.iter().filter(|(ip, _)| fits(ip)) {
                    messages.push(address(interface, ip, *prefix, sequence, port));
                }
            }
        }
        RTM_GETROUTE => {
            for interface in interfaces
                .iter()
                .filter(|interface| interface.mac.is_some())
            {
                for gateway in interface.gateways.iter().filter(|ip| fits(ip)) {
                    messages.extend(route(interface, None, Some(gateway), None, sequence, port));
                }
                for (ip, prefix) in interface.addresses.iter().filter(|(ip, _)| fits(ip)) {
                    messages.extend(route(
                        interface,
                        Some((ip, *prefix)),
                        None,
                        Some(ip),
                        sequence,
                        port,
                    ));
                }
            }
        }
        _ => {
            trace::warn!("net: netlink request {kind} is not supported");
            // RTM_NEW*, RTM_DEL* and RTM_SET* would change something.
            let error = if kind >= RTM_NEWLINK && kind % 4 != 2 {
                Errno::EPERM
            } else {
                Errno::EOPNOTSUPP
            };
            return Vec::from([acknowledge(error.number(), kind, flags, sequence, port)]);
        }
    }
    if flags & NLM_F_DUMP == 0 {
        // One object was asked for; only dumps are offered.
        return Vec::from([acknowledge(
            Errno::EOPNOTSUPP.number(),
            kind,
            flags,
            sequence,
            port,
        )]);
    }
    let done = Builder::new(NLMSG_DONE, NLM_F_MULTI, sequence, port)
        .raw(&0i32.to_ne_bytes())
        .finish();
    messages.push(done);
    // Several messages go into one datagram.
    let mut datagrams: Vec<Vec<u8>> = Vec::new();
    for message in messages {
        match datagrams.last_mut() {
            Some(last) if last.len() + message.len() <= BATCH => last.extend_from_slice(&message),
            _ => datagrams.push(message),
        }
    }
    datagrams
}

fn acknowledge(error: i32, kind: u16, flags: u16, sequence: u32, port: u32) -> Vec<u8> {
    Builder::new(NLMSG_ERROR, 0, sequence, port)
        .raw(&(-error).to_ne_bytes())
        .raw(&(HEADER as u32).to_ne_bytes())
        .raw(&kind.to_ne_bytes())
        .raw(&flags.to_ne_bytes())
        .raw(&sequence.to_ne_bytes())
        .raw(&port.to_ne_bytes())
        .finish()
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

/// All answers to a buffer of requests. What is not a request is passed over.
fn answers(interfaces: &[Interface], mut bytes: &[u8], port: u32) -> Vec<Vec<u8>> {
    let mut datagrams = Vec::new();
    while let (Some(length), Some(kind), Some(flags), Some(sequence)) = (
        field(bytes, 0),
        field(bytes, 4),
        field(bytes, 6),
        field(bytes, 8),
    ) {
        let length = u32::from_ne_bytes(length) as usize;
        if length < HEADER || length > bytes.len() {
            break;
        }
        let (kind, flags) = (u16::from_ne_bytes(kind), u16::from_ne_bytes(flags));
        let sequence = u32::from_ne_bytes(sequence);
        let wanted = bytes.get(HEADER).copied().map_or(AF_UNSPEC, u16::from);
        if kind >= RTM_NEWLINK {
            datagrams.extend(answer(interfaces, kind, flags, wanted, sequence, port));
        } else if flags & NLM_F_ACK != 0 {
            datagrams.push(acknowledge(0, kind, flags, sequence, port));
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    datagrams
}

/// A netlink socket.
pub struct NetlinkSocket {
    base: Base,
    port: Mutex<u32>,
    queue: Mutex<VecDeque<Vec<u8>>>,
}

impl NetlinkSocket {
    /// A new socket of `NETLINK_ROUTE`.
    #[must_use]
    pub fn new(shared: &Arc<Shared>, kind: u32) -> Arc<NetlinkSocket> {
        Arc::new(NetlinkSocket {
            base: Base::new(shared, AF_NETLINK, kind, ROUTE),
            port: Mutex::new(0),
            queue: Mutex::new(VecDeque::new()),
        })
    }

    fn ensure_port(&self, caller: &Caller) -> u32 {
        let mut port = self.port.lock();
        if *port == 0 {
            // The first socket of a process gets its identifier, others something that no process has.
            *port = if self.base.number.is_multiple_of(2) {
                caller.process.max(1)
            } else {
                0x8000_0000 | self.base.number as u32
            };
        }
        *port
    }
}

impl Socket for NetlinkSocket {
    fn base(&self) -> &Base {
        &self.base
    }

    fn ready(&self) -> Readiness {
        if self.queue.lock().is_empty() {
            Readiness::WRITABLE
        } else {
            Readiness::READABLE | Readiness::WRITABLE
        }
    }

    fn bind(&self, caller: &Caller, address: &Address) -> Result<()> {
        let Address::Netlink(port, groups) = address else {
            return Err(Errno::EINVAL);
        };
        if *groups != 0 {
            trace::warn!(
                "net: netlink notifications (groups {groups:#x}) are not supported: nothing changes at run time"
            );
        }
        if *port != 0 {
            *self.port.lock() = *port;
        } else {
            self.ensure_port(caller);
        }
        Ok(())
    }

    fn connect(&self, caller: &Caller, address: &Address) -> Result<()> {
        if !matches!(address, Address::Netlink(0, _)) {
            return Err(Errno::ECONNREFUSED);
        }
        self.ensure_port(caller);
        Ok(())
    }

    fn local_address(&self) -> Result<Address> {
        Ok(Address::Netlink(*self.port.lock(), 0))
    }

    fn peer_address(&self) -> Result<Address> {
        Ok(Address::Netlink(0, 0))
    }

    fn send(
        &self,
        caller: &Caller,
        source: &mut Source<'_>,
        message: &mut Outgoing,
    ) -> Result<usize> {
        if !matches!(message.to, None | Some(Address::Netlink(0, _))) {
            return Err(Errno::ECONNREFUSED);
        }
        let port = self.ensure_port(caller);
        let bytes = source.take_vector(64 << 10)?;
        let datagrams = answers(&self.base.shared.interfaces(), &bytes, port);
        let any = !datagrams.is_empty();
        self.queue.lock().extend(datagrams);
        if any {
            self.base.watch.notify(Readiness::READABLE);
        }
        Ok(bytes.len())
    }

    fn receive(&self, sink: &mut Sink<'_>, peek: bool) -> Result<Incoming> {
        let mut queue = self.queue.lock();
        let datagram = queue.front().ok_or(Errno::EAGAIN)?;
        let incoming = Incoming::message(sink, datagram, Some(Address::Netlink(0, 0)))?;
        if !peek {
            queue.pop_front();
        }
        Ok(incoming)
    }

    fn shutdown(&self, _: bool, _: bool) -> Result<()> {
        Err(Errno::EOPNOTSUPP)
    }

    fn set_option(&self, level: i32, name: u32, value: &[u8]) -> Result<()> {
        if level == LEVEL_NETLINK {
            // Stricter checks and longer answers change nothing here (NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK).
            return if matches!(name, 11 | 12) {
                Ok(())
            } else {
                Err(super::option::unsupported(
                    "setsockopt",
                    self.base.kind,
                    level,
                    name,
                ))
            };
        }
        self.base
            .options
            .lock()
            .set(self.base.kind, level, name, value)
    }

    fn queued(&self) -> (usize, usize) {
        (self.queue.lock().front().map_or(0, Vec::len), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interfaces() -> Vec<Interface> {
        Vec::from([Interface {
            index: 2,
            name: "eth0",
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: 1500,
            addresses: Vec::from([
                ("10.0.2.15".parse().unwrap(), 24),
                ("fd00::15".parse().unwrap(), 64),
            ]),
            gateways: Vec::from(["10.0.2.2".parse().unwrap()]),
        }])
    }

    fn request(kind: u16, flags: u16) -> Vec<u8> {
        Builder::new(kind, flags, 7, 0).raw(&[0; 4]).finish()
    }

    #[test]
    fn dumps_end_with_done() {
        for (kind, messages) in [(RTM_GETLINK, 1), (RTM_GETADDR, 2), (RTM_GETROUTE, 3)] {
            let datagrams = answers(&interfaces(), &request(kind, NLM_F_DUMP | 1), 9);
            let [bytes] = datagrams.as_slice() else {
                panic!("{datagrams:?}")
            };
            let mut rest = bytes.as_slice();
            let mut kinds = Vec::new();
            while let Some(length) = field::<4>(rest, 0) {
                kinds.push(u16::from_ne_bytes(field(rest, 4).unwrap()));
                assert_eq!(field(rest, 8), Some(7u32.to_ne_bytes()));
                rest = &rest[u32::from_ne_bytes(length) as usize..];
            }
            assert_eq!(kinds.len(), messages + 1);
            assert_eq!(kinds.last(), Some(&NLMSG_DONE));
            assert!(
                kinds[..messages]
                    .iter()
                    .all(|&answered| answered == kind - 2)
            );
        }
    }

    #[test]
    fn changes_are_refused_and_noise_is_passed_over() {
        let datagrams = answers(&interfaces(), &request(RTM_NEWADDR, 5), 9);
        assert_eq!(
            field(&datagrams[0], 16),
            Some((-Errno::EPERM.number()).to_ne_bytes())
        );
        for length in 0..64 {
            for fill in [0, 1, 0x7f, 0xff] {
                let _ = answers(&interfaces(), &alloc::vec![fill; length], 1);
            }
        }
    }
}

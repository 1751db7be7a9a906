//! Datagrams: UDP sockets, echo sockets (`ping`), ICMP errors, and what a gateway takes and sends for others.
//!
//! Sources: RFC 768 (UDP), RFC 792 and RFC 4443 (ICMP), RFC 1122 section 4.1; `udp(7)` and `icmp(7)` for what the owner
//! sees: an echo socket is Linux's "ping socket", whose port is the identifier and whose data is the ICMP message.
//!
//! What always holds: every queue has a bound in bytes; what does not fit is lost coming in, and `WouldBlock` going out.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::net::{IpAddr, SocketAddr};
use hashbrown::HashMap;

use crate::checksum;
use crate::link::Link;
use crate::packet::{ICMP, ICMPV6, IPV4_HEADER, IpHeader, IpPacket, TCP, UDP, UDP_HEADER, ports};
use crate::socket::{Error, Event, Events, Readiness, SocketId};
use crate::stack::{Socket, Stack};
use crate::{Checksums, FrameSink, Moment};

/// Bytes that wait in one socket (`net.core.rmem_default` of Linux).
const RECEIVE_BYTES: usize = 212_992;
/// What a datagram counts for besides its data.
const OVERHEAD: usize = 256;
/// Bytes of all sockets that wait to be sent.
const SEND_BYTES: usize = 1 << 20;
/// Bytes of intercepted datagrams that wait for the owner.
const INTERCEPTED_BYTES: usize = 4 << 20;
/// Longest datagram data over IPv4 (`EMSGSIZE` beyond).
const LONGEST: usize = 65507;

const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const ECHO_REQUEST: u8 = 8;
const UNREACHABLE_V6: u8 = 1;
const PACKET_TOO_BIG_V6: u8 = 2;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// What a datagram is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DatagramKind {
    /// UDP.
    Udp,
    /// ICMP or ICMPv6 echo. The data is the message from its type on; the port of the asking side is the identifier,
    /// that of the answering side 0.
    Echo,
}

/// A datagram with its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// What it is.
    pub kind: DatagramKind,
    /// Where it comes from.
    pub source: SocketAddr,
    /// Where it goes.
    pub destination: SocketAddr,
    /// Its content.
    pub data: Vec<u8>,
}

/// A UDP or echo socket.
pub(crate) struct DatagramSocket {
    kind: DatagramKind,
    bound: Option<SocketAddr>,
    remote: Option<SocketAddr>,
    only_v6: bool,
    reuse_address: bool,
    hop_limit: Option<u8>,
    queue: VecDeque<Datagram>,
    bytes: usize,
    error: Option<Error>,
    read_shut: bool,
    /// Was told to wait for room to send.
    wants_room: bool,
    event_queued: bool,
}

impl DatagramSocket {
    pub(crate) fn event_taken(&mut self) {
        self.event_queued = false;
    }

    fn tell(&mut self, events: &mut Events, id: SocketId) {
        if !self.event_queued {
            self.event_queued = true;
            events.push(Event::Ready(id));
        }
    }
}

/// A packet that waits to be sent.
struct Outgoing {
    header: IpHeader,
    payload: Vec<u8>,
}

/// All that datagrams have besides the sockets themselves.
#[derive(Default)]
pub(crate) struct Datagrams {
    bound: HashMap<(DatagramKind, u16), Vec<SocketId>>,
    outgoing: VecDeque<Outgoing>,
    outgoing_bytes: usize,
    waiting: Vec<SocketId>,
    intercepted: VecDeque<Datagram>,
    intercepted_bytes: usize,
    identification: u32,
}

impl Datagrams {
    pub(crate) fn next_deadline(&self, sink_was_full: bool) -> Option<Moment> {
        (!self.outgoing.is_empty() && !sink_was_full).then_some(Moment::ZERO)
    }

    /// Whether nothing waits to be sent or taken.
    pub(crate) fn is_quiet(&self) -> bool {
        self.outgoing.is_empty() && self.intercepted.is_empty()
    }

    fn push(&mut self, header: IpHeader, payload: Vec<u8>) -> bool {
        if self.outgoing_bytes > SEND_BYTES {
            return false;
        }
        self.outgoing_bytes += payload.len() + OVERHEAD;
        self.outgoing.push_back(Outgoing { header, payload });
        true
    }
}

/// Everything that the owner calls for datagrams.
impl Stack {
    /// A new UDP or echo socket, neither bound nor connected.
    pub fn datagram_open(&mut self, kind: DatagramKind) -> SocketId {
        self.sockets
            .insert(Socket::Datagram(Box::new(DatagramSocket {
                kind,
                bound: None,
                remote: None,
                only_v6: false,
                reuse_address: false,
                hop_limit: None,
                queue: VecDeque::new(),
                bytes: 0,
                error: None,
                read_shut: false,
                wants_room: false,
                event_queued: false,
            })))
    }

    fn datagram_socket(&mut self, id: SocketId) -> Result<&mut DatagramSocket, Error> {
        match self.sockets.get_mut(id).ok_or(Error::NoSuchSocket)? {
            Socket::Datagram(socket) => Ok(socket),
            _ => Err(Error::Invalid),
        }
    }

    /// Allows several sockets to be bound to one address (`SO_REUSEADDR`); the last one bound gets the datagrams.
    ///
    /// # Errors
    /// `NoSuchSocket`; `Invalid` for another kind of socket.
    pub fn datagram_set_reuse_address(&mut self, id: SocketId, reuse: bool) -> Result<(), Error> {
        self.datagram_socket(id)?.reuse_address = reuse;
        Ok(())
    }

    /// Says whether a socket bound to `::` takes only IPv6 (`IPV6_V6ONLY`); by default it takes both.
    ///
    /// # Errors
    /// `NoSuchSocket`; `Invalid` for another kind of socket.
    pub fn datagram_set_only_v6(&mut self, id: SocketId, only_v6: bool) -> Result<(), Error> {
        self.datagram_socket(id)?.only_v6 = only_v6;
        Ok(())
    }

    /// Sets the time to live or hop limit of what is sent; None or 0 for the default, 64.
    ///
    /// # Errors
    /// `NoSuchSocket`; `Invalid` for another kind of socket.
    pub fn datagram_set_hop_limit(
        &mut self,
        id: SocketId,
        hop_limit: Option<u8>,
    ) -> Result<(), Error> {
        self.datagram_socket(id)?.hop_limit = hop_limit.filter(|limit| *limit != 0);
        Ok(())
    }

    /// Binds to an address and port (`bind(2)`). An unspecified address stands for all; port 0 for a free one.
    ///
    /// # Errors
    /// `AddressInUse`, `AddressNotAvailable`; `Invalid` when it is bound already.
    pub fn datagram_bind(&mut self, id: SocketId, address: SocketAddr) -> Result<(), Error> {
        let socket = self.datagram_socket(id)?;
        let (kind, only_v6, reuse) = (socket.kind, socket.only_v6, socket.reuse_address);
        if socket.bound.is_some() {
            return Err(Error::Invalid);
        }
        let ip = address.ip();
        if !ip.is_unspecified() && !self.link.is_own(ip) && !self.link.is_group(ip) {
            return Err(Error::AddressNotAvailable);
        }
        let mut address = address;
        if address.port() == 0 {
            let start = self.link.random();
            let free = (0..28232u64)
                .filter_map(|step| u16::try_from(32768 + (start.wrapping_add(step)) % 28232).ok())
                .find(|port| !self.datagrams.bound.contains_key(&(kind, *port)));
            address.set_port(free.ok_or(Error::AddressInUse)?);
        } else {
            for other in self
                .datagrams
                .bound
                .get(&(kind, address.port()))
                .into_iter()
                .flatten()
            {
                if let Some(Socket::Datagram(other)) = self.sockets.get(*other)
                    && let Some(bound) = other.bound
                    && crate::tcp::overlap(address, only_v6, bound, other.only_v6)
                    && !(reuse && other.reuse_address)
                {
                    return Err(Error::AddressInUse);
                }
            }
        }
        self.datagram_socket(id)?.bound = Some(address);
        self.datagrams
            .bound
            .entry((kind, address.port()))
            .or_default()
            .push(id);
        Ok(())
    }

    /// Sets the other end: what is sent goes there, and only what comes from there is received. None undoes it.
    ///
    /// # Errors
    /// `NetworkUnreachable`; those of [`datagram_bind`](Self::datagram_bind).
    pub fn datagram_connect(
        &mut self,
        id: SocketId,
        remote: Option<SocketAddr>,
    ) -> Result<(), Error> {
        if let Some(remote) = remote {
            if !self.link.reaches(remote.ip()) {
                return Err(Error::NetworkUnreachable);
            }
            self.datagram_bind_for(id, remote.ip())?;
        }
        let source = remote.and_then(|remote| self.link.source_for(remote.ip()));
        let socket = self.datagram_socket(id)?;
        socket.remote = remote;
        // As Linux: a connected socket's address is the one that it sends from.
        if let (Some(bound), Some(source)) = (&mut socket.bound, source)
            && bound.ip().is_unspecified()
        {
            bound.set_ip(source);
        }
        Ok(())
    }

    fn datagram_bind_for(&mut self, id: SocketId, destination: IpAddr) -> Result<(), Error> {
        if self.datagram_socket(id)?.bound.is_none() {
            let any = match destination {
                IpAddr::V4(_) => IpAddr::from([0; 4]),
                IpAddr::V6(_) => IpAddr::from([0; 16]),
            };
            self.datagram_bind(id, SocketAddr::new(any, 0))?;
        }
        Ok(())
    }

    /// Queues a datagram, to `destination` or to the other end that was set, and returns its length.
    ///
    /// # Errors
    /// `WouldBlock` when too much waits to be sent; `MessageTooLong`; `DestinationRequired`; `NetworkUnreachable`;
    /// the pending error, which it takes; those of [`datagram_bind`](Self::datagram_bind).
    pub fn datagram_send(
        &mut self,
        id: SocketId,
        destination: Option<SocketAddr>,
        data: &[u8],
    ) -> Result<usize, Error> {
        let socket = self.datagram_socket(id)?;
        if let Some(error) = socket.error.take() {
            return Err(error);
        }
        let destination = destination
            .or(socket.remote)
            .ok_or(Error::DestinationRequired)?;
        let (kind, hop_limit) = (socket.kind, socket.hop_limit);
        if data.len() > LONGEST {
            return Err(Error::MessageTooLong);
        }
        if kind == DatagramKind::Udp && destination.port() == 0 {
            return Err(Error::Invalid);
        }
        if !self.link.reaches(destination.ip()) {
            return Err(Error::NetworkUnreachable);
        }
        self.datagram_bind_for(id, destination.ip())?;
        let bound = self.datagram_socket(id)?.bound.ok_or(Error::Invalid)?;
        if bound.is_ipv4() && destination.is_ipv6() {
            return Err(Error::Invalid);
        }
        let source = match bound.ip() {
            ip if ip.is_unspecified() || self.link.is_group(ip) => self
                .link
                .source_for(destination.ip())
                .ok_or(Error::NetworkUnreachable)?,
            ip => ip,
        };
        if source.is_ipv4() != destination.is_ipv4() {
            return Err(Error::Invalid);
        }
        let mut message;
        let data = if kind == DatagramKind::Echo {
            let request = if destination.is_ipv4() {
                ECHO_REQUEST
            } else {
                ECHO_REQUEST_V6
            };
            // Linux lets only requests out, and puts the identifier in itself.
            if data.len() < 8 || data.first() != Some(&request) {
                return Err(Error::Invalid);
            }
            message = data.to_vec();
            if let Some(identifier) = message.get_mut(4..6) {
                identifier.copy_from_slice(&bound.port().to_be_bytes());
            }
            &message[..]
        } else {
            data
        };
        let source = SocketAddr::new(source, bound.port());
        if self.queue_datagram(kind, source, destination, hop_limit.unwrap_or(64), data) {
            return Ok(data.len());
        }
        let socket = self.datagram_socket(id)?;
        if !socket.wants_room {
            socket.wants_room = true;
            self.datagrams.waiting.push(id);
        }
        Err(Error::WouldBlock)
    }

    /// Takes the next datagram.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; the pending error, which it takes.
    pub fn datagram_receive(&mut self, id: SocketId) -> Result<Datagram, Error> {
        let socket = self.datagram_socket(id)?;
        if let Some(error) = socket.error.take() {
            return Err(error);
        }
        let datagram = socket.queue.pop_front().ok_or(Error::WouldBlock)?;
        socket.bytes -= datagram.data.len() + OVERHEAD;
        Ok(datagram)
    }

    /// Shows the next datagram without taking it (`MSG_PEEK`, `FIONREAD`).
    #[must_use]
    pub fn datagram_peek(&self, id: SocketId) -> Option<&Datagram> {
        match self.sockets.get(id)? {
            Socket::Datagram(socket) => socket.queue.front(),
            _ => None,
        }
    }

    /// The address that the socket is bound to.
    #[must_use]
    pub fn datagram_local_address(&self, id: SocketId) -> Option<SocketAddr> {
        match self.sockets.get(id)? {
            Socket::Datagram(socket) => socket.bound,
            _ => None,
        }
    }

    /// The other end that was set.
    #[must_use]
    pub fn datagram_remote_address(&self, id: SocketId) -> Option<SocketAddr> {
        match self.sockets.get(id)? {
            Socket::Datagram(socket) => socket.remote,
            _ => None,
        }
    }

    pub(crate) fn datagram_readiness(&self, id: SocketId) -> Readiness {
        let Some(Socket::Datagram(socket)) = self.sockets.get(id) else {
            return Readiness::empty();
        };
        let mut ready = Readiness::CONNECTED;
        ready.set(Readiness::READABLE, !socket.queue.is_empty());
        ready.set(
            Readiness::WRITABLE,
            self.datagrams.outgoing_bytes <= SEND_BYTES,
        );
        ready.set(Readiness::ERROR, socket.error.is_some());
        ready
    }

    pub(crate) fn datagram_take_error(&mut self, id: SocketId) -> Option<Error> {
        self.datagram_socket(id).ok()?.error.take()
    }

    pub(crate) fn datagram_close(&mut self, id: SocketId) {
        let Some(Socket::Datagram(socket)) = self.sockets.get(id) else {
            return;
        };
        if let Some(bound) = socket.bound
            && let Some(sockets) = self.datagrams.bound.get_mut(&(socket.kind, bound.port()))
        {
            sockets.retain(|other| *other != id);
            if sockets.is_empty() {
                self.datagrams.bound.remove(&(socket.kind, bound.port()));
            }
        }
        self.sockets.remove(id);
    }

    /// With [`crate::Configuration::intercept`]: the next datagram to an address that is not the stack's own.
    pub fn next_intercepted(&mut self) -> Option<Datagram> {
        let datagram = self.datagrams.intercepted.pop_front()?;
        self.datagrams.intercepted_bytes -= datagram.data.len() + OVERHEAD;
        Some(datagram)
    }

    /// Sends a datagram in the name of any address: a gateway's answer for another. False when it was lost, because
    /// too much waits to be sent or the addresses do not fit each other.
    pub fn send_datagram(&mut self, datagram: &Datagram) -> bool {
        let Datagram {
            kind,
            source,
            destination,
            data,
        } = datagram;
        source.is_ipv4() == destination.is_ipv4()
            && data.len() <= LONGEST
            && self.queue_datagram(*kind, *source, *destination, 64, data)
    }

    /// Tells the sender of an intercepted UDP datagram that its destination does not take it (ICMP port unreachable).
    pub fn refuse_datagram(&mut self, source: SocketAddr, destination: SocketAddr) {
        let mut header = [0; UDP_HEADER];
        header[0..2].copy_from_slice(&source.port().to_be_bytes());
        header[2..4].copy_from_slice(&destination.port().to_be_bytes());
        header[5] = 8;
        self.send_unreachable(
            UDP,
            source.ip(),
            destination.ip(),
            &header,
            Error::ConnectionRefused,
        );
    }

    /// Sends an ICMP destination unreachable to `source`, in the name of `destination`, about a packet between them.
    pub(crate) fn send_unreachable(
        &mut self,
        protocol: u8,
        source: IpAddr,
        destination: IpAddr,
        transport: &[u8],
        error: Error,
    ) {
        let original = IpHeader {
            source,
            destination,
            protocol,
            hop_limit: 64,
        };
        // Codes: RFC 792 page 4, RFC 4443 section 3.1.
        let (kind, code) = match (source.is_ipv4(), error) {
            (true, Error::ConnectionRefused) => (UNREACHABLE, 3),
            (true, Error::NetworkUnreachable) => (UNREACHABLE, 0),
            (true, _) => (UNREACHABLE, 1),
            (false, Error::ConnectionRefused) => (UNREACHABLE_V6, 4),
            (false, Error::NetworkUnreachable) => (UNREACHABLE_V6, 0),
            (false, _) => (UNREACHABLE_V6, 3),
        };
        let mut message = alloc::vec![0; 8 + original.length()];
        message[0] = kind;
        message[1] = code;
        original.write(&mut message[8..], transport.len());
        message.extend_from_slice(transport);
        let sender = if self.link.is_own(destination) {
            destination
        } else {
            self.icmp_source(source, destination)
        };
        self.queue_icmp(sender, source, message, 64);
    }

    /// The address that a gateway reports from: its own.
    fn icmp_source(&self, to: IpAddr, fallback: IpAddr) -> IpAddr {
        self.link.source_for(to).unwrap_or(fallback)
    }

    fn queue_icmp(
        &mut self,
        source: IpAddr,
        destination: IpAddr,
        mut message: Vec<u8>,
        hop_limit: u8,
    ) -> bool {
        let protocol = if destination.is_ipv4() { ICMP } else { ICMPV6 };
        let header = IpHeader {
            source,
            destination,
            protocol,
            hop_limit,
        };
        if let Some(field) = message.get_mut(2..4) {
            field.fill(0);
        }
        let sum = if destination.is_ipv4() {
            !checksum::of(&message)
        } else {
            header.checksum(&message)
        };
        if let Some(field) = message.get_mut(2..4) {
            field.copy_from_slice(&sum.to_be_bytes());
        }
        self.datagrams.push(header, message)
    }

    fn queue_datagram(
        &mut self,
        kind: DatagramKind,
        source: SocketAddr,
        destination: SocketAddr,
        hop_limit: u8,
        data: &[u8],
    ) -> bool {
        if kind == DatagramKind::Echo {
            return self.queue_icmp(source.ip(), destination.ip(), data.to_vec(), hop_limit);
        }
        let header = IpHeader {
            source: source.ip(),
            destination: destination.ip(),
            protocol: UDP,
            hop_limit,
        };
        let mut message = Vec::with_capacity(UDP_HEADER + data.len());
        message.extend_from_slice(&source.port().to_be_bytes());
        message.extend_from_slice(&destination.port().to_be_bytes());
        message.extend_from_slice(
            &u16::try_from(UDP_HEADER + data.len())
                .unwrap_or(0)
                .to_be_bytes(),
        );
        message.extend_from_slice(&[0, 0]);
        message.extend_from_slice(data);
        if self.link.checksums == Checksums::Software && !self.link.is_own(destination.ip()) {
            // A sum of zero is sent as all ones: zero means none (RFC 768).
            let sum = match header.checksum(&message) {
                0 => 0xffff,
                sum => sum,
            };
            if let Some(field) = message.get_mut(6..8) {
                field.copy_from_slice(&sum.to_be_bytes());
            }
        }
        self.datagrams.push(header, message)
    }
}

/// What packets, time and the link do.
impl Stack {
    /// Takes a UDP packet.
    pub(crate) fn datagram_receive_udp(&mut self, packet: &IpPacket<'_>, own: bool) {
        let Some((source_port, destination_port)) = ports(packet.payload) else {
            return;
        };
        let Some(lengths) = packet.payload.get(4..8) else {
            return;
        };
        let length = usize::from(u16::from_be_bytes([lengths[0], lengths[1]]));
        let Some(message) = packet.payload.get(..length) else {
            return;
        };
        let Some(data) = message.get(UDP_HEADER..) else {
            return;
        };
        let header = packet.header();
        let unsummed = lengths[2..4] == [0, 0];
        let summed = !own && self.link.checksums == Checksums::Software;
        let optional = unsummed && packet.source.is_ipv4();
        if summed && !optional && !header.verify(message) {
            return;
        }
        let source = SocketAddr::new(packet.source, source_port);
        let destination = SocketAddr::new(packet.destination, destination_port);
        if destination_port == 68 && self.dhcp_receive(data) {
            return;
        }
        let datagram = |data: &[u8]| Datagram {
            kind: DatagramKind::Udp,
            source,
            destination,
            data: data.to_vec(),
        };
        if self.deliver(DatagramKind::Udp, source, destination, data) {
            return;
        }
        if self.link.is_group(packet.destination) {
            return;
        }
        if !own && self.link.intercepts(packet.destination) {
            self.intercept(datagram(data));
        } else {
            let transport = message.get(..UDP_HEADER).unwrap_or_default().to_vec();
            self.send_unreachable(
                UDP,
                packet.source,
                packet.destination,
                &transport,
                Error::ConnectionRefused,
            );
        }
    }

    /// Takes an ICMP or ICMPv6 packet that is not of the link.
    pub(crate) fn datagram_receive_icmp(&mut self, packet: &IpPacket<'_>, own: bool) {
        let message = packet.payload;
        let Some(header) = message.first_chunk::<8>() else {
            return;
        };
        if !own && self.link.checksums == Checksums::Software {
            let right = match packet.protocol {
                ICMP => checksum::of(message) == !0,
                _ => packet.header().verify(message),
            };
            if !right {
                return;
            }
        }
        if (packet.protocol == ICMP) != packet.source.is_ipv4() {
            return;
        }
        let identifier = u16::from_be_bytes([header[4], header[5]]);
        match (packet.protocol, header[0]) {
            (ICMP, ECHO_REQUEST) | (ICMPV6, ECHO_REQUEST_V6) => {
                if self.link.intercepts(packet.destination)
                    && !self.link.is_own(packet.destination)
                    && !self.link.is_group(packet.destination)
                {
                    let datagram = Datagram {
                        kind: DatagramKind::Echo,
                        source: SocketAddr::new(packet.source, identifier),
                        destination: SocketAddr::new(packet.destination, 0),
                        data: message.to_vec(),
                    };
                    self.intercept(datagram);
                } else if !packet.source.is_unspecified() {
                    let mut answer = message.to_vec();
                    if let Some(kind) = answer.first_mut() {
                        *kind = if packet.protocol == ICMP {
                            ECHO_REPLY
                        } else {
                            ECHO_REPLY_V6
                        };
                    }
                    let from = if self.link.is_group(packet.destination) {
                        self.icmp_source(packet.source, packet.destination)
                    } else {
                        packet.destination
                    };
                    self.queue_icmp(from, packet.source, answer, 64);
                }
            }
            (ICMP, ECHO_REPLY) | (ICMPV6, ECHO_REPLY_V6) => {
                let source = SocketAddr::new(packet.source, 0);
                let destination = SocketAddr::new(packet.destination, identifier);
                self.deliver(DatagramKind::Echo, source, destination, message);
            }
            (ICMP, UNREACHABLE) | (ICMPV6, UNREACHABLE_V6 | PACKET_TOO_BIG_V6) => {
                let error = match (packet.protocol, header[0], header[1]) {
                    (ICMP, _, 3) | (ICMPV6, UNREACHABLE_V6, 4) => Error::ConnectionRefused,
                    (ICMP, _, 4) | (ICMPV6, PACKET_TOO_BIG_V6, _) => Error::MessageTooLong,
                    (_, _, 0) => Error::NetworkUnreachable,
                    _ => Error::HostUnreachable,
                };
                self.report(message.get(8..).unwrap_or_default(), error);
            }
            _ => {}
        }
    }

    /// Tells the socket that a packet came from (`original` is its start) that it did not arrive.
    pub(crate) fn report(&mut self, original: &[u8], error: Error) {
        let Some(packet) = parse_start(original) else {
            return;
        };
        match packet.protocol {
            TCP => self.tcp_undeliverable(&packet, error),
            UDP => {
                let Some((source, destination)) = ports(packet.payload) else {
                    return;
                };
                let local = SocketAddr::new(packet.source, source);
                let remote = SocketAddr::new(packet.destination, destination);
                let Some(id) = self.find(DatagramKind::Udp, remote, local) else {
                    return;
                };
                // As Linux: only a connected socket hears of it.
                if let Some(Socket::Datagram(socket)) = self.sockets.get_mut(id)
                    && socket.remote == Some(remote)
                {
                    socket.error = Some(error);
                    socket.tell(&mut self.events, id);
                }
            }
            _ => {}
        }
    }

    fn intercept(&mut self, datagram: Datagram) {
        let bytes = datagram.data.len() + OVERHEAD;
        if self.datagrams.intercepted_bytes + bytes <= INTERCEPTED_BYTES {
            self.datagrams.intercepted_bytes += bytes;
            self.datagrams.intercepted.push_back(datagram);
        }
    }

    /// The socket for a datagram: a connected one before one bound to the address before one bound to all; of equal
    /// ones the last.
    fn find(
        &self,
        kind: DatagramKind,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> Option<SocketId> {
        let group = self.link.is_group(destination.ip());
        let mut found = None;
        for id in self.datagrams.bound.get(&(kind, destination.port()))? {
            let Some(Socket::Datagram(socket)) = self.sockets.get(*id) else {
                continue;
            };
            let Some(bound) = socket.bound else { continue };
            let mut score = 0;
            if bound.ip() == destination.ip() {
                score += 2;
            } else if !bound.ip().is_unspecified() && !group {
                continue;
            } else if bound.is_ipv4() != destination.is_ipv4() {
                if bound.is_ipv4() || socket.only_v6 {
                    continue;
                }
            } else {
                score += 1;
            }
            if let Some(remote) = socket.remote {
                let same = match kind {
                    DatagramKind::Udp => remote == source,
                    DatagramKind::Echo => remote.ip() == source.ip(),
                };
                if !same {
                    continue;
                }
                score += 4;
            }
            if found.is_none_or(|(best, _)| score >= best) {
                found = Some((score, *id));
            }
        }
        found.map(|(_, id)| id)
    }

    fn deliver(
        &mut self,
        kind: DatagramKind,
        source: SocketAddr,
        destination: SocketAddr,
        data: &[u8],
    ) -> bool {
        let Some(id) = self.find(kind, source, destination) else {
            return false;
        };
        let Some(Socket::Datagram(socket)) = self.sockets.get_mut(id) else {
            return false;
        };
        if !socket.read_shut && socket.bytes + data.len() + OVERHEAD <= RECEIVE_BYTES {
            socket.bytes += data.len() + OVERHEAD;
            socket.queue.push_back(Datagram {
                kind,
                source,
                destination,
                data: data.to_vec(),
            });
            socket.tell(&mut self.events, id);
        }
        true
    }

    /// Sends what waits; true when there was something.
    pub(crate) fn datagram_poll(&mut self, now: Moment, sink: &mut dyn FrameSink) -> bool {
        let mut any = false;
        while let Some(outgoing) = self.datagrams.outgoing.front() {
            let own = self.link.is_own(outgoing.header.destination);
            if !self.link.has_room(sink, own) {
                break;
            }
            let Some(outgoing) = self.datagrams.outgoing.pop_front() else {
                break;
            };
            self.datagrams.outgoing_bytes -= outgoing.payload.len() + OVERHEAD;
            self.datagrams.identification = self.datagrams.identification.wrapping_add(1);
            let identification = self.datagrams.identification;
            send_packet(
                &mut self.link,
                now,
                sink,
                &outgoing.header,
                &outgoing.payload,
                own,
                identification,
            );
            any = true;
        }
        if !self.datagrams.waiting.is_empty() && self.datagrams.outgoing_bytes <= SEND_BYTES / 2 {
            for id in core::mem::take(&mut self.datagrams.waiting) {
                if let Some(Socket::Datagram(socket)) = self.sockets.get_mut(id) {
                    socket.wants_room = false;
                    socket.tell(&mut self.events, id);
                }
            }
        }
        any
    }
}

/// Reads the start of a packet that an ICMP error quotes: its total length is not there.
fn parse_start(bytes: &[u8]) -> Option<IpPacket<'_>> {
    let mut start = bytes.get(..bytes.len().min(128))?.to_vec();
    let length = u16::try_from(start.len()).ok()?;
    match start.first()? >> 4 {
        4 => start.get_mut(2..4)?.copy_from_slice(&length.to_be_bytes()),
        _ => start
            .get_mut(4..6)?
            .copy_from_slice(&length.checked_sub(40)?.to_be_bytes()),
    }
    let packet = IpPacket::parse(&start, false)?;
    let header = start.len() - packet.payload.len();
    // The same bytes, but for the lengths, so that nothing borrowed from the copy is left.
    Some(IpPacket {
        payload: bytes.get(header..start.len())?,
        whole: bytes,
        fragment: None,
        ..packet_values(&packet)
    })
}

/// The packet without what it borrows.
fn packet_values(packet: &IpPacket<'_>) -> IpPacket<'static> {
    IpPacket {
        source: packet.source,
        destination: packet.destination,
        protocol: packet.protocol,
        hop_limit: packet.hop_limit,
        payload: &[],
        whole: &[],
        fragment: None,
        extended: packet.extended,
    }
}

/// Sends a packet, in fragments when it is longer than the link allows (RFC 791 section 3.2, RFC 8200 section 4.5).
fn send_packet(
    link: &mut Link,
    now: Moment,
    sink: &mut dyn FrameSink,
    header: &IpHeader,
    payload: &[u8],
    own: bool,
    identification: u32,
) {
    let length = header.length();
    let mtu = if own { 65535 } else { link.mtu };
    if length + payload.len() <= mtu || payload.len() > 65535 {
        link.send(
            now,
            sink,
            header.destination,
            length + payload.len(),
            |packet| {
                header.write(packet, payload.len());
                if let Some(body) = packet.get_mut(length..) {
                    body.copy_from_slice(payload);
                }
            },
        );
        return;
    }
    let v4 = header.destination.is_ipv4();
    let extra = if v4 { 0 } else { 8 };
    let step = (mtu - length - extra) & !7;
    let mut offset = 0;
    for part in payload.chunks(step) {
        let more = offset + part.len() < payload.len();
        link.send(
            now,
            sink,
            header.destination,
            length + extra + part.len(),
            |packet| {
                let place = u16::try_from(offset).unwrap_or(0);
                if v4 {
                    header.write(packet, part.len());
                    if let Some(header) = packet.get_mut(..IPV4_HEADER) {
                        let field = (place / 8) | if more { 0x2000 } else { 0 };
                        header[4..6].copy_from_slice(&(identification as u16).to_be_bytes());
                        header[6..8].copy_from_slice(&field.to_be_bytes());
                        header[10..12].fill(0);
                        let sum = !checksum::of(header);
                        header[10..12].copy_from_slice(&sum.to_be_bytes());
                    }
                } else {
                    IpHeader {
                        protocol: 44,
                        ..*header
                    }
                    .write(packet, extra + part.len());
                    if let Some(fragment) = packet.get_mut(length..length + extra) {
                        fragment[0] = header.protocol;
                        fragment[1] = 0;
                        fragment[2..4].copy_from_slice(&(place | u16::from(more)).to_be_bytes());
                        fragment[4..8].copy_from_slice(&identification.to_be_bytes());
                    }
                }
                if let Some(body) = packet.get_mut(length + extra..) {
                    body.copy_from_slice(part);
                }
            },
        );
        offset += part.len();
    }
}

const _: () = assert!(LONGEST + UDP_HEADER + IPV4_HEADER == 65535);

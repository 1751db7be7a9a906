//! The stack: one link, its sockets, and the calls that move time and frames.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::net::IpAddr;

use crate::datagram::{DatagramSocket, Datagrams};
use crate::dhcp::DhcpClient;
use crate::fragment::Fragments;
use crate::link::Link;
use crate::packet::{ICMP, ICMPV6, IpPacket, TCP, UDP};
use crate::router::{Advertiser, Solicitor};
use crate::socket::{Error, Event, Events, Readiness, SocketId};
use crate::tcp::{Connection, Idle, Listener, Sockets, Tcp};
use crate::{Address, Configuration, FrameEncoder, FrameSink, Moment, Route};

/// Bytes of answers that may wait for the next poll.
const REPLY_BYTES: usize = 1 << 20;

/// One socket of any kind.
pub(crate) enum Socket {
    TcpIdle(Idle),
    TcpListener(Box<Listener>),
    TcpConnection(Box<Connection>),
    Datagram(Box<DatagramSocket>),
}

/// A TCP/IP stack with one Ethernet link and a loopback.
///
/// The owner gives it frames ([`receive`](Self::receive)), uses sockets, and then calls [`poll`](Self::poll): what is
/// to be sent is sent there, and what happened is then told by [`next_event`](Self::next_event). [`poll`](Self::poll)
/// is due at [`next_deadline`](Self::next_deadline), and when the sink has room again.
pub struct Stack {
    pub(crate) link: Link,
    pub(crate) sockets: Sockets,
    pub(crate) events: Events,
    pub(crate) tcp: Tcp,
    pub(crate) datagrams: Datagrams,
    pub(crate) dhcp: Option<DhcpClient>,
    pub(crate) solicitor: Option<Solicitor>,
    pub(crate) advertiser: Option<Advertiser>,
    fragments: Fragments,
    /// What received frames were answered with at once.
    replies: FrameEncoder,
    /// The last poll ended for want of room: the owner polls when there is some.
    sink_full: bool,
}

impl Stack {
    /// A stack without addresses but its IPv6 link-local one, and 127.0.0.0/8 and ::1, which every stack has.
    #[must_use]
    pub fn new(configuration: &Configuration) -> Stack {
        let mut link = Link::new(configuration);
        let tcp = Tcp::new(configuration, &mut link);
        Stack {
            link,
            sockets: Sockets::default(),
            events: Events::default(),
            tcp,
            datagrams: Datagrams::default(),
            dhcp: None,
            solicitor: None,
            advertiser: None,
            fragments: Fragments::default(),
            replies: FrameEncoder::new(REPLY_BYTES),
            sink_full: false,
        }
    }

    /// Own Ethernet address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.link.mac
    }

    /// Largest IP packet in bytes.
    #[must_use]
    pub fn mtu(&self) -> usize {
        self.link.mtu
    }

    /// Own addresses, without those of the loopback.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        self.link.addresses()
    }

    /// Adds an address, or changes its prefix. Its network is on the link.
    pub fn add_address(&mut self, address: IpAddr, prefix: u8) {
        self.link.add_address(Address { address, prefix });
    }

    /// Removes an address.
    pub fn remove_address(&mut self, address: IpAddr) {
        self.link.remove_address(address);
    }

    /// All routes but those to the networks of own addresses; the longest prefixes come first.
    #[must_use]
    pub fn routes(&self) -> &[Route] {
        self.link.routes()
    }

    /// Adds a route.
    pub fn add_route(&mut self, route: Route) {
        self.link.add_route(route);
    }

    /// Removes a route.
    pub fn remove_route(&mut self, route: &Route) {
        self.link.remove_route(route);
    }

    /// Sets the default route of the gateway's family, in place of the one there was.
    pub fn set_gateway(&mut self, gateway: IpAddr) {
        let route = default_route(gateway);
        if self.link.routes().contains(&route) {
            return;
        }
        let others: Vec<Route> = self
            .link
            .routes()
            .iter()
            .filter(|other| other.network == route.network)
            .copied()
            .collect();
        for other in others {
            self.link.remove_route(&other);
        }
        self.link.add_route(route);
    }

    /// Removes the default route over a gateway.
    pub fn remove_gateway(&mut self, gateway: IpAddr) {
        self.link.remove_route(&default_route(gateway));
    }

    /// Name servers that DHCP and router advertisements named.
    #[must_use]
    pub fn name_servers(&self) -> Vec<IpAddr> {
        let dhcp = self.dhcp.iter().flat_map(|client| client.name_servers());
        let routers = self
            .solicitor
            .iter()
            .flat_map(|solicitor| &solicitor.servers);
        dhcp.chain(routers).copied().collect()
    }

    /// Names a neighbour's Ethernet address for good: it is never asked for.
    pub fn add_neighbour(&mut self, address: IpAddr, mac: [u8; 6]) {
        self.link.add_neighbour(address, mac);
    }

    /// Takes one received Ethernet frame. Call [`poll`](Self::poll) after a batch of them: answers wait until then.
    pub fn receive(&mut self, now: Moment, frame: &[u8]) {
        let mut replies = core::mem::replace(&mut self.replies, FrameEncoder::new(0));
        if let Some((from, packet)) = self.link.receive(now, &mut replies, frame) {
            self.receive_packet(now, &mut replies, Some(from), &packet);
        }
        self.replies = replies;
    }

    /// Takes an IP packet from the link (`from` is the sender's Ethernet address) or the loopback.
    fn receive_packet(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        from: Option<[u8; 6]>,
        packet: &IpPacket<'_>,
    ) {
        if packet.fragment.is_some() {
            if let Some(payload) = self.fragments.receive(now, packet) {
                let whole = IpPacket {
                    payload: &payload,
                    whole: &[],
                    fragment: None,
                    extended: true,
                    ..*packet
                };
                self.receive_packet(now, sink, from, &whole);
            }
            return;
        }
        let own = from.is_none();
        match packet.protocol {
            TCP => self.tcp_receive_segment(now, sink, packet, own),
            UDP => self.datagram_receive_udp(packet, own),
            ICMP => self.datagram_receive_icmp(packet, own),
            ICMPV6 => {
                let of_link = from.is_some_and(|from| {
                    self.link.receive_neighbour_message(now, sink, from, packet)
                        || self.router_receive(now, sink, from, packet)
                });
                if !of_link {
                    self.datagram_receive_icmp(packet, own);
                }
            }
            _ => {}
        }
    }

    /// Sends what is to be sent and does what is due.
    pub fn poll(&mut self, now: Moment, sink: &mut dyn FrameSink) {
        while let Some(frame) = self.replies.take_frame() {
            if let Some(space) = sink.reserve(frame.len()) {
                space.copy_from_slice(frame);
                sink.commit();
            }
        }
        self.link.poll(now, sink);
        if !self.link.undeliverable.is_empty() {
            for bytes in core::mem::take(&mut self.link.undeliverable) {
                self.report(&bytes, Error::HostUnreachable);
            }
        }
        self.dhcp_poll(now, sink);
        self.router_poll(now, sink);
        loop {
            let mut any = self.tcp_poll(now, sink);
            any |= self.datagram_poll(now, sink);
            while let Some(bytes) = self.link.receive_loopback() {
                any = true;
                if let Some(packet) = IpPacket::parse(&bytes, false) {
                    self.receive_packet(now, sink, None, &packet);
                }
            }
            if !any {
                break;
            }
        }
        self.sink_full = !sink.has_room();
    }

    /// When [`poll`](Self::poll) is due next, if nothing comes before: a moment that has passed means at once, None
    /// means never.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Moment> {
        let replies = (!self.replies.pending().is_empty()).then_some(Moment::ZERO);
        let mut next = earlier(replies, self.link.next_deadline());
        next = earlier(next, self.tcp.next_deadline());
        next = earlier(next, self.datagrams.next_deadline(self.sink_full));
        if let Some(client) = &self.dhcp {
            next = earlier(next, client.next_deadline());
        }
        if let Some(solicitor) = &self.solicitor {
            next = earlier(next, solicitor.next_deadline());
        }
        if let Some(advertiser) = &self.advertiser {
            next = earlier(next, Some(advertiser.next));
        }
        next
    }

    /// Whether nothing is under way on the link, so that the other end may fall silent for any time: no packet waits to be
    /// sent, nothing sent waits for its acknowledgement, nothing received waits to be acknowledged or taken, and no
    /// connection is being made or ended. Connections may be open, also in one direction only.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.replies.pending().is_empty()
            && self.link.next_deadline().is_none()
            && self.datagrams.is_quiet()
            && self.events.is_empty()
            && self.sockets.iter().all(|socket| match socket {
                Socket::TcpConnection(connection) => connection.is_quiet(),
                _ => true,
            })
    }

    /// Connections that their owner has closed and that still have data for the other end.
    #[must_use]
    pub fn tcp_unsent_orphans(&self) -> usize {
        self.sockets
            .iter()
            .filter(|socket| match socket {
                Socket::TcpConnection(connection) => connection.is_unsent_orphan(),
                _ => false,
            })
            .count()
    }

    /// The next thing that happened. Each socket stands in the queue at most once.
    pub fn next_event(&mut self) -> Option<Event> {
        loop {
            let event = self.events.pop()?;
            match event {
                Event::Ready(id) => match self.sockets.get_mut(id) {
                    Some(Socket::TcpConnection(connection)) => connection.event_taken(),
                    Some(Socket::TcpListener(listener)) => listener.event_taken(),
                    Some(Socket::Datagram(socket)) => socket.event_taken(),
                    Some(Socket::TcpIdle(_)) => {}
                    None => continue,
                },
                Event::Intercepted(id) => {
                    if self.sockets.get(id).is_none() {
                        continue;
                    }
                }
                Event::Configured => {}
            }
            return Some(event);
        }
    }

    /// Whether [`next_event`](Self::next_event) may have something.
    #[must_use]
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// What can be done with a socket now.
    #[must_use]
    pub fn readiness(&self, id: SocketId) -> Readiness {
        match self.sockets.get(id) {
            Some(Socket::Datagram(_)) => self.datagram_readiness(id),
            _ => self.tcp_readiness(id),
        }
    }

    /// Takes the socket's pending error (`SO_ERROR`).
    pub fn take_error(&mut self, id: SocketId) -> Option<Error> {
        self.tcp_take_error(id)
            .or_else(|| self.datagram_take_error(id))
    }

    /// Closes a socket of any kind. Its name must not be used any more.
    pub fn close(&mut self, id: SocketId) {
        self.tcp_close(id);
        self.datagram_close(id);
    }
}

/// The earlier of two moments, if there is one.
pub(crate) fn earlier(a: Option<Moment>, b: Option<Moment>) -> Option<Moment> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    }
}

fn default_route(gateway: IpAddr) -> Route {
    let any = match gateway {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    };
    Route {
        network: Address {
            address: any,
            prefix: 0,
        },
        gateway: Some(gateway),
    }
}

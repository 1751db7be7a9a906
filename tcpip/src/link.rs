//! The Ethernet link and everything below TCP, UDP and ICMP echo: addresses, routes, neighbours, loopback.
//!
//! Sources: RFC 826 (ARP), RFC 4861 (neighbour discovery), RFC 1122 section 3.3.1 (routing of a host).
//!
//! What always holds: a packet to an own address never leaves the stack; the packets that wait for a neighbour, and
//! those on the loopback, are bounded.

use alloc::{collections::VecDeque, vec::Vec};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::time::Duration;

use crate::packet::{ETHERNET_HEADER, ICMPV6, IPV6_HEADER, IpHeader, IpPacket};
use crate::{Checksums, Configuration, FrameSink, MAXIMUM_FRAME, Moment};

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const BROADCAST: [u8; 6] = [0xff; 6];

const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;

/// How long an answer of a neighbour is good before it is asked again.
const NEIGHBOUR_LIFETIME: Duration = Duration::from_secs(60);
/// Time between two questions (RFC 4861 section 10, RETRANS_TIMER).
const NEIGHBOUR_RETRY: Duration = Duration::from_secs(1);
/// Questions before a neighbour counts as absent (MAX_MULTICAST_SOLICIT).
const NEIGHBOUR_ATTEMPTS: u8 = 3;
/// Neighbours that are remembered at one time.
const NEIGHBOURS: usize = 1024;
/// Packets that wait for one neighbour.
const WAITING: usize = 64;
/// Bytes on the loopback at one time.
const LOOPBACK_BYTES: usize = 4 << 20;

/// An own address and the length of its network's prefix in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Length of the prefix in bits.
    pub prefix: u8,
}

impl Address {
    /// Whether `other` is in this address's network.
    #[must_use]
    pub fn contains(&self, other: IpAddr) -> bool {
        match (self.address, other) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                let mask = u32::MAX
                    .checked_shl(32 - u32::from(self.prefix.min(32)))
                    .unwrap_or(0);
                (u32::from(own) ^ u32::from(other)) & mask == 0
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                let mask = u128::MAX
                    .checked_shl(128 - u32::from(self.prefix.min(128)))
                    .unwrap_or(0);
                (u128::from(own) ^ u128::from(other)) & mask == 0
            }
            _ => false,
        }
    }

    /// The network's directed broadcast address, of IPv4 networks that have one.
    fn broadcast(&self) -> Option<Ipv4Addr> {
        match self.address {
            IpAddr::V4(own) if self.prefix < 31 => {
                let host = u32::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0);
                Some(Ipv4Addr::from(u32::from(own) | host))
            }
            _ => None,
        }
    }
}

/// Where packets to a network go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The network.
    pub network: Address,
    /// The router; None for a network on the link itself.
    pub gateway: Option<IpAddr>,
}

struct Neighbour {
    address: IpAddr,
    mac: Option<[u8; 6]>,
    /// Until when `mac` needs no question; None for one that never does.
    fresh_until: Option<Moment>,
    /// Questions asked since the last answer.
    attempts: u8,
    ask_again: Moment,
    waiting: Vec<Vec<u8>>,
}

/// The link. See the module's head.
pub(crate) struct Link {
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: usize,
    pub(crate) checksums: Checksums,
    intercept: bool,
    intercept_own: bool,
    addresses: Vec<Address>,
    routes: Vec<Route>,
    /// Sorted by address.
    neighbours: Vec<Neighbour>,
    /// Neighbours that packets wait for, and when they are to be asked again.
    unresolved: Vec<IpAddr>,
    loopback: VecDeque<Vec<u8>>,
    loopback_bytes: usize,
    /// Packets whose neighbour did not answer, for their senders to hear of.
    pub(crate) undeliverable: Vec<Vec<u8>>,
    random: u64,
}

impl Link {
    pub(crate) fn new(configuration: &Configuration) -> Link {
        let mut mac = configuration.mac;
        mac[0] &= !1;
        Link {
            mac,
            mtu: configuration.mtu.clamp(1280, 65521),
            checksums: configuration.checksums,
            intercept: configuration.intercept,
            intercept_own: configuration.intercept_own,
            addresses: alloc::vec![Address {
                address: IpAddr::V6(link_local(mac)),
                prefix: 64
            }],
            routes: Vec::new(),
            neighbours: Vec::new(),
            unresolved: Vec::new(),
            loopback: VecDeque::new(),
            loopback_bytes: 0,
            undeliverable: Vec::new(),
            random: configuration.seed,
        }
    }

    /// The next pseudo random number (SplitMix64): good for identifiers and ports, not for secrets.
    pub(crate) fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.random;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    pub(crate) fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    pub(crate) fn add_address(&mut self, address: Address) {
        match self
            .addresses
            .iter_mut()
            .find(|own| own.address == address.address)
        {
            Some(own) => *own = address,
            None => self.addresses.push(address),
        }
    }

    pub(crate) fn remove_address(&mut self, address: IpAddr) {
        self.addresses.retain(|own| own.address != address);
    }

    pub(crate) fn routes(&self) -> &[Route] {
        &self.routes
    }

    pub(crate) fn add_route(&mut self, route: Route) {
        self.remove_route(&route);
        self.routes.push(route);
        self.routes
            .sort_by_key(|route| core::cmp::Reverse(route.network.prefix));
    }

    pub(crate) fn remove_route(&mut self, route: &Route) {
        self.routes.retain(|other| other != route);
    }

    /// A neighbour whose Ethernet address is known beforehand and never asked for.
    pub(crate) fn add_neighbour(&mut self, address: IpAddr, mac: [u8; 6]) {
        self.put_neighbour(Neighbour {
            address,
            mac: Some(mac),
            fresh_until: None,
            attempts: 0,
            ask_again: Moment::ZERO,
            waiting: Vec::new(),
        });
    }

    fn put_neighbour(&mut self, new: Neighbour) {
        match self.place_of(new.address) {
            Ok(place) => self.neighbours[place] = new,
            Err(place) => self.neighbours.insert(place, new),
        }
    }

    /// Where a neighbour is in the list, or would be.
    fn place_of(&self, address: IpAddr) -> Result<usize, usize> {
        self.neighbours
            .binary_search_by(|neighbour| neighbour.address.cmp(&address))
    }

    fn neighbour(&mut self, address: IpAddr) -> Option<&mut Neighbour> {
        let place = self.place_of(address).ok()?;
        self.neighbours.get_mut(place)
    }

    /// Whether packets to the address stay in this stack.
    pub(crate) fn is_own(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.addresses.iter().any(|own| own.address == address)
    }

    /// Whether a gateway's owner wants what goes to the address and no socket takes.
    pub(crate) fn intercepts(&self, address: IpAddr) -> bool {
        self.intercept && (self.intercept_own || !self.is_own(address))
    }

    /// Whether the address is one of many receivers.
    pub(crate) fn is_group(&self, address: IpAddr) -> bool {
        address.is_multicast()
            || match address {
                IpAddr::V4(address) => {
                    address.is_broadcast()
                        || self
                            .addresses
                            .iter()
                            .any(|own| own.broadcast() == Some(address))
                }
                IpAddr::V6(_) => false,
            }
    }

    /// The address that a packet to `destination` comes from when its sender does not choose; None when there is no
    /// address of the family.
    pub(crate) fn source_for(&self, destination: IpAddr) -> Option<IpAddr> {
        if self.is_own(destination) {
            return Some(destination);
        }
        let family = |own: &&Address| own.address.is_ipv4() == destination.is_ipv4();
        let scope = |own: &&Address| is_link_local(own.address) == is_link_local(destination);
        let next_hop = self.route(destination).unwrap_or(destination);
        let candidates = || self.addresses.iter().filter(family);
        candidates()
            .filter(scope)
            .find(|own| own.contains(next_hop))
            .or_else(|| candidates().find(scope))
            .or_else(|| candidates().next())
            .map(|own| own.address)
    }

    /// The neighbour that a packet to `destination` goes to; None without a route.
    pub(crate) fn route(&self, destination: IpAddr) -> Option<IpAddr> {
        if self.addresses.iter().any(|own| own.contains(destination)) || self.is_group(destination)
        {
            return Some(destination);
        }
        let route = self
            .routes
            .iter()
            .find(|route| route.network.contains(destination))?;
        Some(route.gateway.unwrap_or(destination))
    }

    /// Whether anything leads to `destination`.
    pub(crate) fn reaches(&self, destination: IpAddr) -> bool {
        self.is_own(destination) || self.route(destination).is_some()
    }

    /// Whether a packet to the destination can be sent now.
    pub(crate) fn has_room(&self, sink: &dyn FrameSink, own: bool) -> bool {
        if own {
            self.loopback_bytes < LOOPBACK_BYTES
        } else {
            sink.has_room()
        }
    }

    /// Sends an IP packet of `length` bytes, which `fill` writes. It is lost when there is no route or no room.
    pub(crate) fn send<R>(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        destination: IpAddr,
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        if self.is_own(destination) {
            let mut packet = alloc::vec![0; length];
            let result = fill(&mut packet);
            if self.loopback_bytes < 2 * LOOPBACK_BYTES {
                self.loopback_bytes += packet.len();
                self.loopback.push_back(packet);
            }
            return result;
        }
        let Some(next_hop) = self.route(destination) else {
            return fill(&mut alloc::vec![0; length]);
        };
        let mac = if self.is_group(destination) {
            Some(group_mac(destination))
        } else {
            self.lookup(now, sink, next_hop)
        };
        if let Some(mac) = mac {
            if let Some(frame) = sink.reserve(ETHERNET_HEADER + length)
                && let Some((header, packet)) = frame.split_first_chunk_mut::<ETHERNET_HEADER>()
            {
                *header = ethernet_header(mac, self.mac, ethertype(destination));
                let result = fill(packet);
                sink.commit();
                return result;
            }
            return fill(&mut alloc::vec![0; length]);
        }
        let mut packet = alloc::vec![0; length];
        let result = fill(&mut packet);
        if let Some(neighbour) = self.neighbour(next_hop) {
            if neighbour.waiting.len() >= WAITING {
                neighbour.waiting.remove(0);
            }
            neighbour.waiting.push(packet);
        }
        result
    }

    /// The neighbour's Ethernet address; asks when it is unknown or old.
    fn lookup(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        address: IpAddr,
    ) -> Option<[u8; 6]> {
        if let Some(neighbour) = self.neighbour(address) {
            match neighbour.fresh_until {
                None => return neighbour.mac,
                Some(until) if now < until && neighbour.mac.is_some() => return neighbour.mac,
                Some(_) => {}
            }
            if now < neighbour.ask_again {
                return neighbour.mac;
            }
            neighbour.ask_again = now + NEIGHBOUR_RETRY;
            neighbour.attempts = neighbour.attempts.saturating_add(1);
            if neighbour.attempts > NEIGHBOUR_ATTEMPTS {
                neighbour.mac = None;
            }
            let mac = neighbour.mac;
            if mac.is_none() && !self.unresolved.contains(&address) {
                self.unresolved.push(address);
            }
            self.ask(sink, address);
            return mac;
        }
        if self.neighbours.len() >= NEIGHBOURS {
            self.neighbours
                .retain(|neighbour| neighbour.fresh_until.is_none_or(|until| now < until));
            if self.neighbours.len() >= NEIGHBOURS {
                return None;
            }
        }
        self.put_neighbour(Neighbour {
            address,
            mac: None,
            fresh_until: Some(now),
            attempts: 1,
            ask_again: now + NEIGHBOUR_RETRY,
            waiting: Vec::new(),
        });
        self.unresolved.push(address);
        self.ask(sink, address);
        None
    }

    /// Sends an ARP request or a neighbour solicitation.
    fn ask(&mut self, sink: &mut dyn FrameSink, address: IpAddr) {
        match address {
            IpAddr::V4(target) => {
                let Some(IpAddr::V4(source)) = self.source_for(address) else {
                    return;
                };
                self.send_arp(sink, BROADCAST, 1, source, [0; 6], target);
            }
            IpAddr::V6(target) => {
                let Some(IpAddr::V6(source)) = self.source_for(address) else {
                    return;
                };
                let group = solicited_node(target);
                self.send_neighbour_message(
                    sink,
                    group_mac(IpAddr::V6(group)),
                    source,
                    group,
                    target,
                    false,
                );
            }
        }
    }

    fn send_arp(
        &self,
        sink: &mut dyn FrameSink,
        to: [u8; 6],
        operation: u8,
        source: Ipv4Addr,
        target_mac: [u8; 6],
        target: Ipv4Addr,
    ) {
        let Some(frame) = sink.reserve(ETHERNET_HEADER + 28) else {
            return;
        };
        let Some((header, body)) = frame.split_first_chunk_mut::<ETHERNET_HEADER>() else {
            return;
        };
        *header = ethernet_header(to, self.mac, ETHERTYPE_ARP);
        let parts: [&[u8]; 5] = [
            &[0, 1, 8, 0, 6, 4, 0, operation],
            &self.mac,
            &source.octets(),
            &target_mac,
            &target.octets(),
        ];
        for (to, from) in body.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        sink.commit();
    }

    /// Sends a neighbour solicitation for `target`, or the advertisement of it that answers one.
    fn send_neighbour_message(
        &self,
        sink: &mut dyn FrameSink,
        to: [u8; 6],
        source: Ipv6Addr,
        destination: Ipv6Addr,
        target: Ipv6Addr,
        answer: bool,
    ) {
        let mut message = [0; 32];
        // Solicited and override (RFC 4861 section 4.4); option 2 is the target's address, 1 the source's.
        message[0] = if answer {
            NEIGHBOR_ADVERTISEMENT
        } else {
            NEIGHBOR_SOLICITATION
        };
        message[4] = if answer { 0x60 } else { 0 };
        message[8..24].copy_from_slice(&target.octets());
        message[24] = if answer { 2 } else { 1 };
        message[25] = 1;
        message[26..32].copy_from_slice(&self.mac);
        self.send_icmpv6(sink, to, source, destination, &mut message);
    }

    /// Sends an ICMPv6 message of the link itself (hop limit 255), its checksum filled in.
    pub(crate) fn send_icmpv6(
        &self,
        sink: &mut dyn FrameSink,
        to: [u8; 6],
        source: Ipv6Addr,
        destination: Ipv6Addr,
        message: &mut [u8],
    ) {
        let header = IpHeader {
            source: IpAddr::V6(source),
            destination: IpAddr::V6(destination),
            protocol: ICMPV6,
            hop_limit: 255,
        };
        if let Some(field) = message.get_mut(2..4) {
            field.fill(0);
        }
        let sum = header.checksum(message);
        if let Some(field) = message.get_mut(2..4) {
            field.copy_from_slice(&sum.to_be_bytes());
        }
        let Some(frame) = sink.reserve(ETHERNET_HEADER + IPV6_HEADER + message.len()) else {
            return;
        };
        let Some((ethernet, packet)) = frame.split_first_chunk_mut::<ETHERNET_HEADER>() else {
            return;
        };
        *ethernet = ethernet_header(to, self.mac, ETHERTYPE_IPV6);
        header.write(packet, message.len());
        if let Some(body) = packet.get_mut(IPV6_HEADER..) {
            body.copy_from_slice(message);
        }
        sink.commit();
    }

    /// Sends an IP packet to a given Ethernet address, without route or neighbour: for DHCP.
    pub(crate) fn send_to_mac(&self, sink: &mut dyn FrameSink, to: [u8; 6], packet: &[u8]) {
        let ethertype = if packet.first().is_some_and(|first| first >> 4 == 6) {
            ETHERTYPE_IPV6
        } else {
            ETHERTYPE_IPV4
        };
        let Some(frame) = sink.reserve(ETHERNET_HEADER + packet.len()) else {
            return;
        };
        let Some((header, body)) = frame.split_first_chunk_mut::<ETHERNET_HEADER>() else {
            return;
        };
        *header = ethernet_header(to, self.mac, ethertype);
        body.copy_from_slice(packet);
        sink.commit();
    }

    /// Takes a received frame: handles ARP itself, returns the IP packet of others that are for this stack, with the
    /// sender's Ethernet address.
    pub(crate) fn receive<'a>(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        frame: &'a [u8],
    ) -> Option<([u8; 6], IpPacket<'a>)> {
        if frame.len() > MAXIMUM_FRAME {
            return None;
        }
        let (header, body) = frame.split_first_chunk::<ETHERNET_HEADER>()?;
        let (to, rest) = header.split_first_chunk::<6>()?;
        let (from, ethertype) = rest.split_first_chunk::<6>()?;
        if *to != self.mac && to[0] & 1 == 0 || from[0] & 1 != 0 {
            return None;
        }
        match <[u8; 2]>::try_from(ethertype).ok()? {
            ETHERTYPE_ARP => {
                self.receive_arp(now, sink, body);
                None
            }
            ETHERTYPE_IPV4 | ETHERTYPE_IPV6 => {
                let packet = IpPacket::parse(body, self.checksums == Checksums::Software)?;
                let family = packet.source.is_ipv4() == (*ethertype == ETHERTYPE_IPV4);
                // An own or a loopback address from outside is forged (RFC 1122 section 3.2.1.3).
                let forged = packet.destination.is_loopback() || self.is_own(packet.source);
                let sender = !packet.source.is_multicast() && !self.is_group(packet.source);
                let for_us = self.intercept
                    || self.is_own(packet.destination)
                    || self.is_group(packet.destination);
                (family && !forged && sender && for_us).then_some((*from, packet))
            }
            _ => None,
        }
    }

    /// The next packet on the loopback.
    pub(crate) fn receive_loopback(&mut self) -> Option<Vec<u8>> {
        let packet = self.loopback.pop_front()?;
        self.loopback_bytes -= packet.len();
        Some(packet)
    }

    fn receive_arp(&mut self, now: Moment, sink: &mut dyn FrameSink, body: &[u8]) {
        let Some(body) = body.first_chunk::<28>() else {
            return;
        };
        // Ethernet and IPv4, with their lengths.
        if body[..6] != [0, 1, 8, 0, 6, 4] {
            return;
        }
        let mac = |at: usize| {
            [
                body[at],
                body[at + 1],
                body[at + 2],
                body[at + 3],
                body[at + 4],
                body[at + 5],
            ]
        };
        let address = |at: usize| Ipv4Addr::new(body[at], body[at + 1], body[at + 2], body[at + 3]);
        let (sender_mac, sender, target) = (mac(8), address(14), address(24));
        if sender_mac[0] & 1 != 0
            || sender.is_broadcast()
            || sender.is_multicast()
            || self.is_own(IpAddr::V4(sender))
        {
            return;
        }
        let ours = self.is_own(IpAddr::V4(target));
        if !sender.is_unspecified() {
            self.learn(now, sink, IpAddr::V4(sender), sender_mac, ours);
        }
        if ours && body[6..8] == [0, 1] {
            self.send_arp(sink, sender_mac, 2, target, sender_mac, sender);
        }
    }

    /// Takes a neighbour discovery message; true when it was one.
    pub(crate) fn receive_neighbour_message(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        from: [u8; 6],
        packet: &IpPacket<'_>,
    ) -> bool {
        let Some(message) = packet.payload.first_chunk::<24>() else {
            return false;
        };
        let kind = message[0];
        if !matches!(kind, NEIGHBOR_SOLICITATION | NEIGHBOR_ADVERTISEMENT) {
            return false;
        }
        let (IpAddr::V6(source), Ok(target)) =
            (packet.source, <[u8; 16]>::try_from(&message[8..24]))
        else {
            return true;
        };
        let target = Ipv6Addr::from(target);
        if packet.hop_limit != 255 || message[1] != 0 || target.is_multicast() {
            return true;
        }
        let mac = link_layer_option(
            packet.payload.get(24..).unwrap_or_default(),
            kind == NEIGHBOR_ADVERTISEMENT,
        );
        if kind == NEIGHBOR_ADVERTISEMENT {
            if let Some(mac) = mac.or(Some(from))
                && !self.is_own(IpAddr::V6(target))
            {
                self.learn(now, sink, IpAddr::V6(target), mac, false);
            }
        } else if self.is_own(IpAddr::V6(target)) {
            if source.is_unspecified() {
                // Somebody tests whether the address is free (RFC 4862 section 5.4): all nodes hear that it is not.
                let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
                self.send_neighbour_message(
                    sink,
                    group_mac(IpAddr::V6(all)),
                    target,
                    all,
                    target,
                    true,
                );
            } else {
                let mac = mac.unwrap_or(from);
                self.learn(now, sink, packet.source, mac, true);
                self.send_neighbour_message(sink, mac, target, source, target, true);
            }
        }
        true
    }

    /// Remembers a neighbour's Ethernet address. One that nobody asked for is remembered only if it talks to us.
    pub(crate) fn learn(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        address: IpAddr,
        mac: [u8; 6],
        add: bool,
    ) {
        if mac[0] & 1 != 0 || (add && !self.addresses.iter().any(|own| own.contains(address))) {
            return;
        }
        if add && self.neighbours.len() < NEIGHBOURS && self.neighbour(address).is_none() {
            self.add_neighbour(address, mac);
            if let Some(neighbour) = self.neighbour(address) {
                neighbour.fresh_until = Some(now + NEIGHBOUR_LIFETIME);
            }
            return;
        }
        let Some(neighbour) = self.neighbour(address) else {
            return;
        };
        if neighbour.fresh_until.is_none() {
            return;
        }
        neighbour.mac = Some(mac);
        neighbour.fresh_until = Some(now + NEIGHBOUR_LIFETIME);
        neighbour.attempts = 0;
        for packet in core::mem::take(&mut neighbour.waiting) {
            self.send_to_mac(sink, mac, &packet);
        }
        self.unresolved.retain(|other| *other != address);
    }

    /// Asks again for neighbours that did not answer, and gives up on those that never did.
    pub(crate) fn poll(&mut self, now: Moment, sink: &mut dyn FrameSink) {
        let mut index = 0;
        while let Some(address) = self.unresolved.get(index).copied() {
            let Ok(place) = self.place_of(address) else {
                self.unresolved.swap_remove(index);
                continue;
            };
            let neighbour = &mut self.neighbours[place];
            if now < neighbour.ask_again {
                index += 1;
            } else if neighbour.attempts >= NEIGHBOUR_ATTEMPTS {
                self.undeliverable.append(&mut neighbour.waiting);
                self.neighbours.remove(place);
                self.unresolved.swap_remove(index);
            } else {
                neighbour.attempts += 1;
                neighbour.ask_again = now + NEIGHBOUR_RETRY;
                self.ask(sink, address);
                index += 1;
            }
        }
    }

    /// When [`poll`](Self::poll) has something to do.
    pub(crate) fn next_deadline(&self) -> Option<Moment> {
        if !self.loopback.is_empty() || !self.undeliverable.is_empty() {
            return Some(Moment::ZERO);
        }
        self.unresolved
            .iter()
            .filter_map(|address| {
                Some(
                    self.neighbours
                        .get(self.place_of(*address).ok()?)?
                        .ask_again,
                )
            })
            .min()
    }
}

/// The link-layer address option of a neighbour discovery message (RFC 4861 section 4.6.1).
pub(crate) fn link_layer_option(mut options: &[u8], target: bool) -> Option<[u8; 6]> {
    let wanted = if target { 2 } else { 1 };
    loop {
        let (kind, length) = (*options.first()?, usize::from(*options.get(1)?) * 8);
        if length == 0 {
            return None;
        }
        if kind == wanted && length == 8 {
            return options.get(2..8)?.try_into().ok();
        }
        options = options.get(length..)?;
    }
}

fn ethernet_header(to: [u8; 6], from: [u8; 6], ethertype: [u8; 2]) -> [u8; ETHERNET_HEADER] {
    [
        to[0],
        to[1],
        to[2],
        to[3],
        to[4],
        to[5],
        from[0],
        from[1],
        from[2],
        from[3],
        from[4],
        from[5],
        ethertype[0],
        ethertype[1],
    ]
}

fn ethertype(address: IpAddr) -> [u8; 2] {
    match address {
        IpAddr::V4(_) => ETHERTYPE_IPV4,
        IpAddr::V6(_) => ETHERTYPE_IPV6,
    }
}

/// The Ethernet address of a broadcast or multicast address (RFC 1112 section 6.4, RFC 2464 section 7).
pub(crate) fn group_mac(address: IpAddr) -> [u8; 6] {
    match address {
        IpAddr::V4(address) if address.is_multicast() => {
            let bytes = address.octets();
            [0x01, 0x00, 0x5e, bytes[1] & 0x7f, bytes[2], bytes[3]]
        }
        IpAddr::V4(_) => BROADCAST,
        IpAddr::V6(address) => {
            let bytes = address.octets();
            [0x33, 0x33, bytes[12], bytes[13], bytes[14], bytes[15]]
        }
    }
}

/// The interface identifier of an Ethernet address (RFC 4291 appendix A).
pub(crate) fn interface_identifier(mac: [u8; 6]) -> [u8; 8] {
    [
        mac[0] ^ 2,
        mac[1],
        mac[2],
        0xff,
        0xfe,
        mac[3],
        mac[4],
        mac[5],
    ]
}

/// The link-local address of an Ethernet address (RFC 4862 section 5.3).
pub(crate) fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let mut bytes = [0; 16];
    bytes[0] = 0xfe;
    bytes[1] = 0x80;
    bytes[8..].copy_from_slice(&interface_identifier(mac));
    Ipv6Addr::from(bytes)
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.is_unicast_link_local() || address.is_multicast(),
    }
}

/// The group in which the owner of an address listens for solicitations (RFC 4291 section 2.7.1).
fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let bytes = address.octets();
    Ipv6Addr::from([
        0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, bytes[13], bytes[14], bytes[15],
    ])
}

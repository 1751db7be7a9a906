//! Router advertisements: learning an IPv6 address, router and name servers from them (RFC 4861, RFC 4862, RFC 8106),
//! and sending them, for a gateway.
//!
//! Not for: duplicate address detection (the link has two ends, with addresses from one hand), privacy addresses,
//! DHCPv6. Lifetimes count only when they are zero: the router is there as long as the link is.

use alloc::vec::Vec;
use core::net::{IpAddr, Ipv6Addr};
use core::time::Duration;

use crate::link::{group_mac, interface_identifier, link_layer_option, link_local};
use crate::packet::IpPacket;
use crate::socket::Event;
use crate::stack::Stack;
use crate::{Address, FrameSink, Moment};

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const OPTION_PREFIX: u8 = 3;
const OPTION_MTU: u8 = 5;
const OPTION_NAME_SERVERS: u8 = 25;

/// Questions for a router, and the time between them (RFC 4861 section 10).
const SOLICITATIONS: u8 = 3;
const SOLICITATION_INTERVAL: Duration = Duration::from_secs(4);
/// Time between advertisements that nobody asked for. A router is forgotten after 65,535 seconds at most.
const ADVERTISEMENT_INTERVAL: Duration = Duration::from_secs(1800);
/// Name servers that are taken from one advertisement.
const NAME_SERVERS: usize = 8;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

/// What a gateway advertises.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advertisement {
    /// The network that hosts make addresses in.
    pub prefix: Ipv6Addr,
    /// Length of the prefix in bits; hosts make addresses only of 64.
    pub prefix_length: u8,
    /// Name servers.
    pub name_servers: Vec<Ipv6Addr>,
    /// Largest IP packet on the link in bytes.
    pub mtu: u32,
}

/// Asking for routers.
pub(crate) struct Solicitor {
    left: u8,
    next: Moment,
    pub(crate) servers: Vec<IpAddr>,
}

impl Solicitor {
    pub(crate) fn next_deadline(&self) -> Option<Moment> {
        (self.left > 0).then_some(self.next)
    }
}

/// Advertising oneself.
pub(crate) struct Advertiser {
    advertisement: Advertisement,
    pub(crate) next: Moment,
}

impl Stack {
    /// Starts to ask for IPv6 routers; what they advertise is taken. [`Event::Configured`] tells of each change.
    pub fn start_router_discovery(&mut self) {
        self.solicitor = Some(Solicitor {
            left: SOLICITATIONS,
            next: Moment::ZERO,
            servers: Vec::new(),
        });
    }

    /// Makes the stack a router that advertises itself, when asked and now and then.
    pub fn advertise(&mut self, advertisement: Advertisement) {
        self.advertiser = Some(Advertiser {
            advertisement,
            next: Moment::ZERO,
        });
    }

    /// Asks and advertises, when it is time to.
    pub(crate) fn router_poll(&mut self, now: Moment, sink: &mut dyn FrameSink) {
        if let Some(solicitor) = &mut self.solicitor
            && solicitor.left > 0
            && now >= solicitor.next
        {
            solicitor.left -= 1;
            solicitor.next = now + SOLICITATION_INTERVAL;
            let mut message = [0; 16];
            message[0] = ROUTER_SOLICITATION;
            message[8] = 1;
            message[9] = 1;
            message[10..16].copy_from_slice(&self.link.mac);
            let to = group_mac(IpAddr::V6(ALL_ROUTERS));
            self.link.send_icmpv6(
                sink,
                to,
                link_local(self.link.mac),
                ALL_ROUTERS,
                &mut message,
            );
        }
        if let Some(advertiser) = &mut self.advertiser
            && now >= advertiser.next
        {
            advertiser.next = now + ADVERTISEMENT_INTERVAL;
            self.send_advertisement(sink);
        }
    }

    fn send_advertisement(&mut self, sink: &mut dyn FrameSink) {
        let Some(Advertiser { advertisement, .. }) = &self.advertiser else {
            return;
        };
        // Hop limit 64, no flags, the longest router lifetime; no hints on neighbours.
        let mut message = alloc::vec![
            ROUTER_ADVERTISEMENT,
            0,
            0,
            0,
            64,
            0,
            0xff,
            0xff,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0
        ];
        message.extend_from_slice(&[1, 1]);
        message.extend_from_slice(&self.link.mac);
        message.extend_from_slice(&[OPTION_MTU, 1, 0, 0]);
        message.extend_from_slice(&advertisement.mtu.to_be_bytes());
        // On the link and for making addresses (L and A), for ever.
        message.extend_from_slice(&[OPTION_PREFIX, 4, advertisement.prefix_length, 0xc0]);
        message.extend_from_slice(&[0xff; 8]);
        message.extend_from_slice(&[0; 4]);
        message.extend_from_slice(&advertisement.prefix.octets());
        let servers = advertisement
            .name_servers
            .get(..advertisement.name_servers.len().min(NAME_SERVERS));
        if let Some(servers) = servers.filter(|servers| !servers.is_empty()) {
            message.extend_from_slice(&[
                OPTION_NAME_SERVERS,
                u8::try_from(1 + 2 * servers.len()).unwrap_or(1),
                0,
                0,
            ]);
            message.extend_from_slice(&[0xff; 4]);
            for server in servers {
                message.extend_from_slice(&server.octets());
            }
        }
        let to = group_mac(IpAddr::V6(ALL_NODES));
        self.link
            .send_icmpv6(sink, to, link_local(self.link.mac), ALL_NODES, &mut message);
    }

    /// Takes a router discovery message; true when it was one.
    pub(crate) fn router_receive(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        from: [u8; 6],
        packet: &IpPacket<'_>,
    ) -> bool {
        match packet.payload.first() {
            Some(&ROUTER_SOLICITATION) => {
                if packet.hop_limit == 255 && self.advertiser.is_some() {
                    if !packet.source.is_unspecified() {
                        self.link.learn(now, sink, packet.source, from, true);
                    }
                    self.send_advertisement(sink);
                }
                true
            }
            Some(&ROUTER_ADVERTISEMENT) => {
                let IpAddr::V6(router) = packet.source else {
                    return true;
                };
                if packet.hop_limit == 255
                    && self.solicitor.is_some()
                    && router.is_unicast_link_local()
                {
                    self.take_advertisement(now, sink, from, router, packet.payload);
                }
                true
            }
            _ => false,
        }
    }

    fn take_advertisement(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        from: [u8; 6],
        router: Ipv6Addr,
        message: &[u8],
    ) {
        let (Some(lifetime), Some(mut options)) = (message.get(6..8), message.get(16..)) else {
            return;
        };
        let before = (self.link.addresses().to_vec(), self.link.routes().to_vec());
        let mut servers = Vec::new();
        self.link.learn(
            now,
            sink,
            IpAddr::V6(router),
            link_layer_option(options, false).unwrap_or(from),
            true,
        );
        if lifetime == [0, 0] {
            self.remove_gateway(IpAddr::V6(router));
        } else {
            self.set_gateway(IpAddr::V6(router));
        }
        while let (Some(&kind), Some(&units)) = (options.first(), options.get(1)) {
            let Some((option, rest)) = options.split_at_checked(usize::from(units) * 8) else {
                break;
            };
            if option.is_empty() {
                break;
            }
            options = rest;
            match (kind, option.len()) {
                (OPTION_PREFIX, 32) => {
                    let prefix: Option<[u8; 8]> =
                        option.get(16..24).and_then(|prefix| prefix.try_into().ok());
                    let valid = option.get(4..8).is_some_and(|valid| valid != [0; 4]);
                    let Some(prefix) = prefix else { continue };
                    // Only networks of 64 bits that ask for it; never the link-local one.
                    if option[2] != 64
                        || option[3] & 0x40 == 0
                        || (prefix[0] == 0xfe && prefix[1] & 0xc0 == 0x80)
                    {
                        continue;
                    }
                    let mut address = [0; 16];
                    address[..8].copy_from_slice(&prefix);
                    address[8..].copy_from_slice(&interface_identifier(self.link.mac));
                    let address = IpAddr::from(address);
                    if !valid {
                        self.link.remove_address(address);
                    } else if self.link.addresses().len() < 16 && !address.is_multicast() {
                        self.link.add_address(Address {
                            address,
                            prefix: 64,
                        });
                    }
                }
                (OPTION_NAME_SERVERS, 24..) => {
                    let addresses = option.get(8..).unwrap_or_default().as_chunks::<16>().0;
                    servers.extend(
                        addresses
                            .iter()
                            .take(NAME_SERVERS)
                            .map(|address| IpAddr::from(*address)),
                    );
                }
                _ => {}
            }
        }
        let Some(solicitor) = &mut self.solicitor else {
            return;
        };
        solicitor.left = 0;
        let after = (self.link.addresses().to_vec(), self.link.routes().to_vec());
        if before != after || solicitor.servers != servers {
            solicitor.servers = servers;
            self.events.push(Event::Configured);
        }
    }
}

//! DHCP client for IPv4 (RFC 2131), and what a stack learns of its network from DHCP and router advertisements.
//!
//! Not for: leases kept over a restart, relays, DHCPv6.

use alloc::string::String;
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr};
use core::time::Duration;
use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress};

use crate::packet::{IPV4_HEADER, IpHeader, UDP, UDP_HEADER};
use crate::socket::Event;
use crate::stack::Stack;
use crate::{FrameSink, Moment};

/// Time to the first repetition of a question; it doubles up to [`SLOWEST`].
const RETRY: Duration = Duration::from_millis(500);
/// Longest time between repetitions.
const SLOWEST: Duration = Duration::from_secs(32);
/// Requests are repeated at intervals up to this before another server is looked for.
const GIVE_UP: Duration = Duration::from_secs(8);
/// Options that are asked for: mask, router, name servers (RFC 2132).
const WANTED: [u8; 3] = [1, 3, 6];

enum State {
    Discovering,
    Requesting {
        server: Ipv4Addr,
        address: Ipv4Addr,
    },
    Bound {
        server: Ipv4Addr,
        address: Ipv4Addr,
        expires: Moment,
    },
}

/// The client's state.
pub(crate) struct DhcpClient {
    hostname: Option<String>,
    state: State,
    transaction: u32,
    /// When to ask (again).
    ask_at: Moment,
    retry: Duration,
    asked: Moment,
    servers: Vec<IpAddr>,
}

impl DhcpClient {
    pub(crate) fn next_deadline(&self) -> Option<Moment> {
        Some(self.ask_at)
    }

    pub(crate) fn name_servers(&self) -> &[IpAddr] {
        &self.servers
    }
}

impl Stack {
    /// Starts to ask for an IPv4 address, a router and name servers by DHCP, and goes on as long as the stack lives.
    /// [`Event::Configured`] tells of each change. `hostname` is told to the server.
    pub fn start_dhcp(&mut self, hostname: Option<&str>) {
        let transaction = self.link.random() as u32;
        self.dhcp = Some(DhcpClient {
            hostname: hostname
                .filter(|name| !name.is_empty() && name.len() < 64)
                .map(String::from),
            state: State::Discovering,
            transaction,
            ask_at: Moment::ZERO,
            retry: RETRY,
            asked: Moment::ZERO,
            servers: Vec::new(),
        });
    }

    /// Asks, when it is time to.
    pub(crate) fn dhcp_poll(&mut self, now: Moment, sink: &mut dyn FrameSink) {
        let Some(client) = &mut self.dhcp else { return };
        if now < client.ask_at {
            return;
        }
        if let State::Bound {
            address, expires, ..
        } = client.state
            && now >= expires
        {
            client.state = State::Discovering;
            client.retry = RETRY;
            client.transaction = client.transaction.wrapping_add(1);
            self.link.remove_address(IpAddr::V4(address));
            self.events.push(Event::Configured);
        }
        if matches!(client.state, State::Requesting { .. }) && client.retry > GIVE_UP {
            // The server that offered has gone: anyone may answer.
            client.state = State::Discovering;
            client.retry = RETRY;
        }
        client.asked = now;
        client.ask_at = now + client.retry;
        client.retry = (client.retry * 2).min(SLOWEST);
        if let State::Bound { expires, .. } = client.state {
            client.ask_at = client.ask_at.min(expires);
        }
        let mac = EthernetAddress(self.link.mac);
        let options: Vec<DhcpOption<'_>> = client
            .hostname
            .iter()
            .map(|name| DhcpOption {
                kind: 12,
                data: name.as_bytes(),
            })
            .collect();
        let mut message = DhcpRepr {
            message_type: DhcpMessageType::Discover,
            transaction_id: client.transaction,
            secs: 0,
            client_hardware_address: mac,
            client_ip: Ipv4Addr::UNSPECIFIED,
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            // The answer must reach a stack that has no address yet.
            broadcast: true,
            requested_ip: None,
            client_identifier: Some(mac),
            server_identifier: None,
            parameter_request_list: Some(&WANTED),
            dns_servers: None,
            max_size: Some(1472),
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &options,
        };
        let mut source = Ipv4Addr::UNSPECIFIED;
        match client.state {
            State::Discovering => {}
            State::Requesting { server, address } => {
                message.message_type = DhcpMessageType::Request;
                message.requested_ip = Some(address);
                message.server_identifier = Some(server);
            }
            State::Bound { address, .. } => {
                message.message_type = DhcpMessageType::Request;
                message.client_ip = address;
                source = address;
            }
        }
        let length = message.buffer_len();
        let mut data = alloc::vec![0; UDP_HEADER + length];
        if let Some(body) = data.get_mut(UDP_HEADER..)
            && message.emit(&mut DhcpPacket::new_unchecked(body)).is_err()
        {
            return;
        }
        let header = IpHeader {
            source: IpAddr::V4(source),
            destination: IpAddr::V4(Ipv4Addr::BROADCAST),
            protocol: UDP,
            hop_limit: 64,
        };
        data[..6].copy_from_slice(&[0, 68, 0, 67, 0, 0]);
        let total = u16::try_from(data.len()).unwrap_or(0).to_be_bytes();
        data[4..6].copy_from_slice(&total);
        let sum = header.checksum(&data);
        data[6..8].copy_from_slice(&sum.to_be_bytes());
        let mut packet = alloc::vec![0; IPV4_HEADER];
        header.write(&mut packet, data.len());
        packet.extend_from_slice(&data);
        self.link.send_to_mac(sink, [0xff; 6], &packet);
    }

    /// Takes a message to the client's port; true when there is a client.
    pub(crate) fn dhcp_receive(&mut self, data: &[u8]) -> bool {
        let Some(client) = &mut self.dhcp else {
            return false;
        };
        let Ok(packet) = DhcpPacket::new_checked(data) else {
            return true;
        };
        let Ok(message) = DhcpRepr::parse(&packet) else {
            return true;
        };
        if message.transaction_id != client.transaction
            || message.client_hardware_address.0 != self.link.mac
        {
            return true;
        }
        let Some(server) = message.server_identifier else {
            return true;
        };
        match (&client.state, message.message_type) {
            (State::Discovering, DhcpMessageType::Offer) if is_host(message.your_ip) => {
                client.state = State::Requesting {
                    server,
                    address: message.your_ip,
                };
                client.retry = RETRY;
                client.ask_at = client.asked;
            }
            (
                State::Requesting { server: chosen, .. } | State::Bound { server: chosen, .. },
                DhcpMessageType::Ack,
            ) if *chosen == server => {
                let address = message.your_ip;
                if !is_host(address) {
                    return true;
                }
                let lease = u64::from(message.lease_duration.unwrap_or(3600).max(60));
                let expires = client.asked + Duration::from_secs(lease);
                let old = match client.state {
                    State::Bound { address, .. } => Some(address),
                    _ => None,
                };
                client.state = State::Bound {
                    server,
                    address,
                    expires,
                };
                client.ask_at = client.asked + Duration::from_secs(lease / 2);
                // What is left of the lease bounds how often it is asked for (RFC 2131 section 4.4.5).
                client.retry = Duration::from_secs((lease / 16).max(10));
                let servers: Vec<IpAddr> = message
                    .dns_servers
                    .iter()
                    .flatten()
                    .map(|server| IpAddr::V4(*server))
                    .collect();
                let mask = message
                    .subnet_mask
                    .map_or(24, |mask| u32::from(mask).leading_ones());
                let changed = old != Some(address) || client.servers != servers;
                client.servers = servers;
                if let Some(old) = old.filter(|old| *old != address) {
                    self.link.remove_address(IpAddr::V4(old));
                }
                self.link.add_address(crate::Address {
                    address: IpAddr::V4(address),
                    prefix: u8::try_from(mask).unwrap_or(24),
                });
                if let Some(router) = message.router {
                    self.set_gateway(IpAddr::V4(router));
                }
                if changed {
                    self.events.push(Event::Configured);
                }
            }
            (State::Requesting { .. } | State::Bound { .. }, DhcpMessageType::Nak) => {
                if let State::Bound { address, .. } = client.state {
                    self.link.remove_address(IpAddr::V4(address));
                    self.events.push(Event::Configured);
                }
                client.state = State::Discovering;
                client.retry = RETRY;
                client.ask_at = client.asked + RETRY;
            }
            _ => {}
        }
        true
    }
}

/// Whether the address can be that of one host.
fn is_host(address: Ipv4Addr) -> bool {
    !address.is_unspecified()
        && !address.is_multicast()
        && !address.is_broadcast()
        && !address.is_loopback()
}

//! Datagrams of the guest: UDP and echo through sockets of the host, published UDP ports, name service.
//!
//! A *flow* is all datagrams between one address and port of the guest and one other: it has one connected socket of
//! the host, so that the host's kernel sorts the answers and tells of refusals. A flow without traffic ends.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use kiln_tcpip::{Datagram, DatagramKind, Moment, Stack};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::NetworkConfiguration;
use crate::dns::{self, Reply};
use crate::error::remark;
use crate::host::{self, Poller, Token};
use crate::publish::Published;
use crate::splice::Slots;

/// Flows at one time: each takes a descriptor.
const FLOWS: usize = 2048;
/// How long a flow without traffic lasts (RFC 4787 asks for two minutes).
const IDLE: Duration = Duration::from_secs(120);
/// How long one to a name server or for an echo lasts.
const IDLE_SHORT: Duration = Duration::from_secs(20);
/// How often idle flows are looked for.
pub(crate) const SWEEP: Duration = Duration::from_secs(10);
/// Datagrams taken from one socket before others have a turn.
const BURST: usize = 64;
/// Ports of the gateway that stand for clients of published UDP ports.
const CLIENT_PORTS: std::ops::RangeInclusive<u16> = 20000..=65000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    kind: DatagramKind,
    guest: SocketAddr,
    /// As the guest sees it.
    remote: SocketAddr,
}

enum Way {
    /// Through a socket of its own, connected.
    Own(OwnedFd),
    /// To a name server: the socket, which server, and whether it has answered since the last question.
    NameServer {
        socket: OwnedFd,
        server: usize,
        answered: bool,
    },
    /// To a client of a published port.
    Published { index: u32, client: SocketAddr },
}

struct Flow {
    key: Key,
    way: Way,
    last: Moment,
}

/// All flows.
pub(crate) struct Flows {
    slots: Slots<Flow>,
    by_key: HashMap<Key, u32>,
    by_client: HashMap<(u32, SocketAddr), u32>,
    next_port: u16,
    resolvers: Vec<SocketAddr>,
    /// The host does not let us send echo requests; said once.
    echo_refused: bool,
    /// Bytes that ever passed in either direction; a datagram without any counts as one.
    passed: u64,
    /// The gateway's time, as it was last told.
    now: Moment,
    buffer: Vec<u8>,
}

impl Flows {
    pub(crate) fn new(configuration: &NetworkConfiguration) -> Flows {
        Flows {
            slots: Slots::new(),
            by_key: HashMap::new(),
            by_client: HashMap::new(),
            next_port: *CLIENT_PORTS.start(),
            resolvers: configuration
                .resolvers
                .clone()
                .unwrap_or_else(crate::configuration::host_resolvers),
            echo_refused: false,
            passed: 0,
            now: Moment::ZERO,
            buffer: vec![0; 65536],
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slots.len() == 0
    }

    /// Tells the time, which counts for all that comes after.
    pub(crate) fn set_time(&mut self, now: Moment) {
        self.now = now;
    }

    /// Bytes that ever passed in either direction.
    pub(crate) fn passed(&self) -> u64 {
        self.passed
    }

    /// The name servers that questions are forwarded to.
    pub(crate) fn resolvers(&self) -> &[SocketAddr] {
        &self.resolvers
    }

    /// Takes a datagram that the guest sent to anybody.
    pub(crate) fn take_from_guest(
        &mut self,
        configuration: &NetworkConfiguration,
        stack: &mut Stack,
        poller: &Poller,
        published: &[Published],
        datagram: &Datagram,
    ) {
        let key = Key {
            kind: datagram.kind,
            guest: datagram.source,
            remote: datagram.destination,
        };
        let to_us = is_ours(configuration, datagram.destination.ip());
        if to_us && datagram.kind == DatagramKind::Udp && datagram.destination.port() == 53 {
            if let Some(reply) = self.own_name(configuration, &datagram.data) {
                stack.send_datagram(&Datagram {
                    kind: DatagramKind::Udp,
                    source: datagram.destination,
                    destination: datagram.source,
                    data: reply,
                });
                return;
            }
            self.ask_name_server(stack, poller, key, &datagram.data);
            return;
        }
        self.passed += datagram.data.len().max(1) as u64;
        let index = match self.by_key.get(&key) {
            Some(index) => *index,
            None => {
                let Some(target) = reachable(configuration, datagram.destination) else {
                    stack.refuse_datagram(datagram.source, datagram.destination);
                    return;
                };
                let opened = match datagram.kind {
                    DatagramKind::Udp => host::connect_datagrams(&target),
                    DatagramKind::Echo => host::connect_echo(&target),
                };
                match opened {
                    Ok(socket) => match self.add(poller, key, Way::Own(socket)) {
                        Some(index) => index,
                        None => return,
                    },
                    Err(_) if datagram.kind == DatagramKind::Echo => {
                        if !self.echo_refused {
                            self.echo_refused = true;
                            remark(format_args!(
                                "the guest's ping of {} is dropped: this host lets the user send no echo \
                                 requests (sysctl net.ipv4.ping_group_range)",
                                target.ip()
                            ));
                        }
                        return;
                    }
                    Err(_) => {
                        stack.refuse_datagram(datagram.source, datagram.destination);
                        return;
                    }
                }
            }
        };
        let Some(flow) = self.slots.get_mut(index) else {
            return;
        };
        flow.last = self.now;
        let result = match &flow.way {
            Way::Own(socket) | Way::NameServer { socket, .. } => {
                rustix::net::send(socket, &datagram.data, SendFlags::NOSIGNAL)
            }
            Way::Published { index, client } => match published.get(*index as usize) {
                Some(published) => rustix::net::sendto(
                    &published.socket,
                    &datagram.data,
                    SendFlags::NOSIGNAL,
                    client,
                ),
                None => return,
            },
        };
        // What the host has no room for is lost, as anywhere.
        if result == Err(Errno::CONNREFUSED) {
            stack.refuse_datagram(datagram.source, datagram.destination);
        }
    }

    /// The answer to a question for an instance's name.
    fn own_name(&self, configuration: &NetworkConfiguration, message: &[u8]) -> Option<Vec<u8>> {
        let question = dns::parse_question(message)?;
        let own = configuration
            .hostname
            .as_deref()
            .is_some_and(|name| name.eq_ignore_ascii_case(&question.name));
        let addresses = if own {
            // The guest's IPv6 address is its own choice, if it follows the advertisements.
            Some(vec![IpAddr::V4(configuration.guest_v4)])
        } else {
            configuration
                .lookup
                .as_ref()
                .and_then(|lookup| lookup(&question.name))
        };
        let reply = match addresses {
            Some(addresses) => Reply::Addresses(addresses),
            None if self.resolvers.is_empty() => Reply::Failure,
            None => return None,
        };
        Some(dns::answer(message, &question, &reply))
    }

    fn ask_name_server(&mut self, stack: &mut Stack, poller: &Poller, key: Key, message: &[u8]) {
        // A question that comes while the last has no answer is likely that one again: the next server gets it.
        let mut server = 0;
        if let Some(index) = self.by_key.get(&key).copied()
            && let Some(Flow {
                way:
                    Way::NameServer {
                        server: last,
                        answered,
                        ..
                    },
                ..
            }) = self.slots.get_mut(index)
        {
            if *answered || self.resolvers.len() < 2 {
                server = *last;
            } else {
                server = (*last + 1) % self.resolvers.len();
                self.remove(index);
            }
        }
        let index = match self.by_key.get(&key) {
            Some(index) => *index,
            None => {
                let Some(address) = self.resolvers.get(server) else {
                    return;
                };
                let Ok(socket) = host::connect_datagrams(address) else {
                    stack.refuse_datagram(key.guest, key.remote);
                    return;
                };
                match self.add(
                    poller,
                    key,
                    Way::NameServer {
                        socket,
                        server,
                        answered: true,
                    },
                ) {
                    Some(index) => index,
                    None => return,
                }
            }
        };
        if let Some(flow) = self.slots.get_mut(index) {
            flow.last = self.now;
            if let Way::NameServer {
                socket, answered, ..
            } = &mut flow.way
            {
                *answered = false;
                self.passed += message.len().max(1) as u64;
                let _ = rustix::net::send(socket, message, SendFlags::NOSIGNAL);
            }
        }
    }

    fn add(&mut self, poller: &Poller, key: Key, way: Way) -> Option<u32> {
        if self.slots.len() >= FLOWS {
            self.sweep();
            if self.slots.len() >= FLOWS {
                return None;
            }
        }
        let client = match way {
            Way::Published { index, client } => Some((index, client)),
            _ => None,
        };
        let (index, generation) = self.slots.insert(Flow {
            key,
            way,
            last: self.now,
        });
        if let Some(Flow {
            way: Way::Own(socket) | Way::NameServer { socket, .. },
            ..
        }) = self.slots.get_mut(index)
            && poller.add(socket, Token::Flow(index, generation)).is_err()
        {
            self.slots.remove(index);
            return None;
        }
        self.by_key.insert(key, index);
        if let Some(client) = client {
            self.by_client.insert(client, index);
        }
        Some(index)
    }

    fn remove(&mut self, index: u32) {
        if let Some(flow) = self.slots.remove(index) {
            self.by_key.remove(&flow.key);
            if let Way::Published { index, client } = flow.way {
                self.by_client.remove(&(index, client));
            }
        }
    }

    /// Ends idle flows.
    pub(crate) fn sweep(&mut self) {
        for index in self.slots.indices() {
            let Some(flow) = self.slots.get_mut(index) else {
                continue;
            };
            let idle = match (&flow.way, flow.key.kind) {
                (Way::NameServer { .. }, _) | (_, DatagramKind::Echo) => IDLE_SHORT,
                _ => IDLE,
            };
            if self.now.saturating_sub(flow.last) > idle {
                self.remove(index);
            }
        }
    }

    /// Takes what has come for a flow; true when there may be more.
    pub(crate) fn take_from_host(
        &mut self,
        stack: &mut Stack,
        index: u32,
        generation: u16,
    ) -> bool {
        for _ in 0..BURST {
            let Some(flow) = self.slots.get_exact(index, generation) else {
                return false;
            };
            let (Way::Own(socket) | Way::NameServer { socket, .. }) = &flow.way else {
                return false;
            };
            match rustix::net::recv(socket, &mut self.buffer[..], RecvFlags::empty()) {
                Ok((count, _)) => {
                    flow.last = self.now;
                    if let Way::NameServer { answered, .. } = &mut flow.way {
                        *answered = true;
                    }
                    let key = flow.key;
                    let mut data = self.buffer.get(..count).unwrap_or_default().to_vec();
                    if key.kind == DatagramKind::Echo {
                        // The host's kernel has put its own identifier in.
                        let Some(identifier) = data.get_mut(4..6) else {
                            continue;
                        };
                        identifier.copy_from_slice(&key.guest.port().to_be_bytes());
                    }
                    self.passed += count.max(1) as u64;
                    let answer = Datagram {
                        kind: key.kind,
                        source: key.remote,
                        destination: key.guest,
                        data,
                    };
                    stack.send_datagram(&answer);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return false,
                Err(Errno::CONNREFUSED) => {
                    let key = flow.key;
                    stack.refuse_datagram(key.guest, key.remote);
                }
                Err(_) => {
                    self.remove(index);
                    return false;
                }
            }
        }
        true
    }

    /// Takes what has come for a published UDP port; true when there may be more.
    pub(crate) fn take_from_clients(
        &mut self,
        configuration: &NetworkConfiguration,
        stack: &mut Stack,
        poller: &Poller,
        published: &Published,
        place: u32,
    ) -> bool {
        for _ in 0..BURST {
            match rustix::net::recvfrom(&published.socket, &mut self.buffer[..], RecvFlags::empty())
            {
                Ok((count, _, Some(client))) => {
                    let Ok(client) = SocketAddr::try_from(client) else {
                        continue;
                    };
                    self.passed += count.max(1) as u64;
                    let data = self.buffer.get(..count).unwrap_or_default().to_vec();
                    let index = match self.by_client.get(&(place, client)) {
                        Some(index) => *index,
                        None => {
                            let guest = SocketAddr::new(
                                configuration.guest_v4.into(),
                                published.publish.guest,
                            );
                            let Some(remote) = self.client_address(configuration, guest) else {
                                continue;
                            };
                            let key = Key {
                                kind: DatagramKind::Udp,
                                guest,
                                remote,
                            };
                            match self.add(
                                poller,
                                key,
                                Way::Published {
                                    index: place,
                                    client,
                                },
                            ) {
                                Some(index) => index,
                                None => continue,
                            }
                        }
                    };
                    let Some(flow) = self.slots.get_mut(index) else {
                        continue;
                    };
                    flow.last = self.now;
                    let Key {
                        kind,
                        guest,
                        remote,
                    } = flow.key;
                    stack.send_datagram(&Datagram {
                        kind,
                        source: remote,
                        destination: guest,
                        data,
                    });
                }
                Ok(_) => {}
                Err(Errno::AGAIN) => return false,
                // An answer of the guest to a client that is gone: nobody is there to be told.
                Err(_) => {}
            }
        }
        true
    }

    /// An address of the gateway that stands for one client.
    fn client_address(
        &mut self,
        configuration: &NetworkConfiguration,
        guest: SocketAddr,
    ) -> Option<SocketAddr> {
        for _ in CLIENT_PORTS {
            let port = self.next_port;
            self.next_port = if port >= *CLIENT_PORTS.end() {
                *CLIENT_PORTS.start()
            } else {
                port + 1
            };
            let remote = SocketAddr::new(configuration.gateway_v4.into(), port);
            if !self.by_key.contains_key(&Key {
                kind: DatagramKind::Udp,
                guest,
                remote,
            }) {
                return Some(remote);
            }
        }
        None
    }
}

/// Whether an address is one of the gateway's own.
pub(crate) fn is_ours(configuration: &NetworkConfiguration, address: IpAddr) -> bool {
    address == IpAddr::V4(configuration.gateway_v4)
        || address == IpAddr::V4(configuration.dns_v4)
        || address == IpAddr::V6(configuration.gateway_v6)
}

/// Where the host is to connect to when the guest names an address; None when the guest may not go there.
pub(crate) fn reachable(
    configuration: &NetworkConfiguration,
    destination: SocketAddr,
) -> Option<SocketAddr> {
    let address = destination.ip();
    if is_ours(configuration, address) {
        let loopback = match address {
            IpAddr::V4(_) => IpAddr::from([127, 0, 0, 1]),
            IpAddr::V6(_) => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
        };
        return configuration
            .allow_host_loopback
            .then_some(SocketAddr::new(loopback, destination.port()));
    }
    let inside = match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX
                .checked_shl(32 - u32::from(configuration.prefix_v4.min(32)))
                .unwrap_or(0);
            (u32::from(address) ^ u32::from(configuration.gateway_v4)) & mask == 0
                || address.is_broadcast()
                || address.is_link_local()
        }
        IpAddr::V6(address) => {
            address.octets()[..8] == configuration.gateway_v6.octets()[..8]
                || address.is_unicast_link_local()
        }
    };
    (!inside && !address.is_multicast() && !host::is_host_loopback(address)).then_some(destination)
}

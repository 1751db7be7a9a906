//! Who uses which port, and who listens: the machine's own side of TCP and UDP.
//!
//! For every backend, and for connections within the machine (127.0.0.0/8, ::1 and own addresses), which never become
//! packets: a connection is a pair of stream ends ([`super::stream`]), a datagram goes straight into the receiver's queue.
//!
//! What always holds: a bound port is held by a [`PortLease`] and is free again when that is dropped.

use alloc::{
    collections::VecDeque,
    sync::{Arc, Weak},
    vec::Vec,
};
use core::net::{IpAddr, SocketAddr};

use crate::{
    Errno, Result,
    file::{Readiness, WatchList},
    hash::HashMap,
    sync::Mutex,
};

use super::{option::Options, socket::Stream, tcp::TcpSocket, udp::UdpSocket};

/// First of the ports given to sockets that ask for any, as Linux's `ip_local_port_range`.
const EPHEMERAL_FIRST: u16 = 32768;
/// Number of those ports.
const EPHEMERAL_COUNT: u16 = 28232;

/// What a binding covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scope {
    /// The address; unspecified for all of its family.
    pub ip: IpAddr,
    /// `::` that takes IPv4 too.
    pub dual: bool,
}

impl Scope {
    /// Whether two bindings to one port cover an address in common.
    fn overlaps(self, other: Scope) -> bool {
        match (self.ip, other.ip) {
            (IpAddr::V4(a), IpAddr::V4(b)) => a == b || a.is_unspecified() || b.is_unspecified(),
            (IpAddr::V6(a), IpAddr::V6(b)) => a == b || a.is_unspecified() || b.is_unspecified(),
            (IpAddr::V4(_), IpAddr::V6(_)) => other.dual,
            (IpAddr::V6(_), IpAddr::V4(_)) => self.dual,
        }
    }

    /// How well it fits a destination: `None` not at all, else the more the better.
    pub fn fits(self, destination: IpAddr) -> Option<u8> {
        if self.ip == destination {
            return Some(2);
        }
        match (self.ip, destination) {
            (IpAddr::V4(ip), IpAddr::V4(_)) if ip.is_unspecified() => Some(1),
            (IpAddr::V6(ip), IpAddr::V6(_)) if ip.is_unspecified() => Some(1),
            (IpAddr::V6(_), IpAddr::V4(_)) if self.dual => Some(0),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Binding {
    key: u64,
    port: u16,
    scope: Scope,
    reuse_address: bool,
    reuse_port: bool,
    listening: bool,
}

/// Number of lists that the bindings of a protocol are spread over.
const LISTS: usize = 256;

/// Bindings of one protocol.
#[derive(Default)]
struct Ports {
    /// By the port's remainder; none before the first binding.
    lists: Vec<Vec<Binding>>,
    next_key: u64,
    next_ephemeral: u16,
    datagrams: bool,
}

impl Ports {
    /// The list that bindings of a port are in, with those of some others.
    fn list(&mut self, port: u16) -> &mut Vec<Binding> {
        if self.lists.is_empty() {
            self.lists.resize_with(LISTS, Vec::new);
        }
        &mut self.lists[usize::from(port) % LISTS]
    }

    fn is_bound(&mut self, port: u16) -> bool {
        self.list(port).iter().any(|old| old.port == port)
    }

    fn conflicts(&mut self, new: &Binding) -> bool {
        let datagrams = self.datagrams;
        self.list(new.port).iter().any(|old| {
            let by_address = new.reuse_address
                && old.reuse_address
                && (datagrams || !old.listening && !new.listening);
            let by_port = new.reuse_port && old.reuse_port;
            old.overlaps(new) && !by_address && !by_port
        })
    }
}

impl Binding {
    /// Whether another binding covers an address and port in common.
    fn overlaps(&self, other: &Binding) -> bool {
        self.port == other.port && self.key != other.key && self.scope.overlaps(other.scope)
    }
}

/// Transport protocols with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Holds a bound port.
pub struct PortLease {
    tables: Weak<Tables>,
    transport: Transport,
    port: u16,
    key: u64,
}

impl PortLease {
    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The socket now listens: from now on only `SO_REUSEPORT` shares the port.
    ///
    /// # Errors
    /// `EADDRINUSE` when another socket listens on it.
    pub fn listen(&self) -> Result<()> {
        let Some(tables) = self.tables.upgrade() else {
            return Ok(());
        };
        let mut ports = tables.ports(self.transport).lock();
        let bindings = ports.list(self.port);
        let Some(place) = bindings.iter().position(|binding| binding.key == self.key) else {
            return Ok(());
        };
        let own = bindings[place];
        let conflict = bindings
            .iter()
            .any(|old| old.listening && old.overlaps(&own) && !(old.reuse_port && own.reuse_port));
        if conflict {
            return Err(Errno::EADDRINUSE);
        }
        bindings[place].listening = true;
        Ok(())
    }
}

impl Drop for PortLease {
    fn drop(&mut self) {
        let Some(tables) = self.tables.upgrade() else {
            return;
        };
        let mut ports = tables.ports(self.transport).lock();
        ports
            .list(self.port)
            .retain(|binding| binding.key != self.key);
    }
}

/// A connection that waits to be accepted.
pub struct Pending {
    /// The stream.
    pub stream: Arc<dyn Stream>,
    /// Who hears of its readiness.
    pub watch: Arc<WatchList>,
    /// Own address.
    pub local: SocketAddr,
    /// The peer.
    pub peer: SocketAddr,
    /// A connecting socket of this machine that becomes connected once this one gets its place in the queue.
    pub connector: Option<Weak<TcpSocket>>,
}

struct Queue {
    ready: VecDeque<Pending>,
    /// Connections beyond the backlog: their connectors wait.
    waiting: VecDeque<Pending>,
    backlog: usize,
    closed: bool,
}

/// A listening TCP socket's queue.
pub struct Listener {
    /// What it listens on.
    pub scope: Scope,
    /// Port.
    pub port: u16,
    queue: Mutex<Queue>,
    watch: Arc<WatchList>,
}

impl Listener {
    /// A queue of up to `backlog` connections.
    #[must_use]
    pub fn new(scope: Scope, port: u16, backlog: usize, watch: Arc<WatchList>) -> Arc<Listener> {
        let queue = Queue {
            ready: VecDeque::new(),
            waiting: VecDeque::new(),
            backlog,
            closed: false,
        };
        Arc::new(Listener {
            scope,
            port,
            queue: Mutex::new(queue),
            watch,
        })
    }

    /// Changes the backlog (`listen(2)` again).
    pub fn set_backlog(&self, backlog: usize) {
        self.queue.lock().backlog = backlog;
    }

    /// Adds a connection. Gives it back when the listener has closed. The result says whether it has its place in the
    /// queue already.
    ///
    /// # Errors
    /// The connection, when the listener has closed.
    pub fn push(&self, pending: Pending) -> Result<bool, Pending> {
        let mut queue = self.queue.lock();
        if queue.closed {
            return Err(pending);
        }
        // Linux accepts one more than the backlog says. What comes from elsewhere is connected already and has been
        // limited by its backend.
        if queue.ready.len() > queue.backlog && pending.connector.is_some() {
            queue.waiting.push_back(pending);
            return Ok(false);
        }
        queue.ready.push_back(pending);
        drop(queue);
        self.watch.notify(Readiness::READABLE);
        Ok(true)
    }

    /// The next connection.
    ///
    /// # Errors
    /// `EAGAIN` when there is none, `EINVAL` when the listener has closed.
    pub fn pop(&self) -> Result<Pending> {
        let mut queue = self.queue.lock();
        if queue.closed {
            return Err(Errno::EINVAL);
        }
        let pending = queue.ready.pop_front().ok_or(Errno::EAGAIN)?;
        let mut promoted = None;
        if let Some(mut next) = queue.waiting.pop_front() {
            promoted = next
                .connector
                .take()
                .and_then(|connector| connector.upgrade());
            queue.ready.push_back(next);
        }
        drop(queue);
        if let Some(connector) = promoted {
            connector.complete_waiting();
        }
        Ok(pending)
    }

    /// Whether a connection waits.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let queue = self.queue.lock();
        queue.closed || !queue.ready.is_empty()
    }

    /// How many connections wait, and the backlog.
    #[must_use]
    pub fn lengths(&self) -> (usize, usize) {
        let queue = self.queue.lock();
        (queue.ready.len(), queue.backlog)
    }

    /// Ends listening: what waits is reset.
    pub fn close(&self) {
        let mut queue = self.queue.lock();
        queue.closed = true;
        let ready = core::mem::take(&mut queue.ready);
        let waiting = core::mem::take(&mut queue.waiting);
        drop(queue);
        for pending in ready {
            pending.stream.close(true);
        }
        for pending in waiting {
            match pending.connector.and_then(|connector| connector.upgrade()) {
                Some(connector) => connector.fail(Errno::ECONNREFUSED),
                None => pending.stream.close(true),
            }
        }
        self.watch.notify(Readiness::READABLE | Readiness::HANGUP);
    }
}

/// Ports, listeners and datagram sockets of a machine.
#[derive(Default)]
pub struct Tables {
    tcp: Mutex<Ports>,
    udp: Mutex<Ports>,
    /// Sorted by port.
    listeners: Mutex<Vec<Arc<Listener>>>,
    datagrams: Mutex<HashMap<u16, Vec<Weak<UdpSocket>>>>,
    /// Spreads connections over listeners that share a port.
    turn: Mutex<usize>,
}

impl Tables {
    /// Nothing bound. `seed` is where the search for free ports begins.
    #[must_use]
    pub fn new(seed: u16) -> Arc<Tables> {
        let tables = Tables::default();
        tables.tcp.lock().next_ephemeral = seed;
        {
            let mut udp = tables.udp.lock();
            udp.next_ephemeral = seed.rotate_left(7);
            udp.datagrams = true;
        }
        Arc::new(tables)
    }

    fn ports(&self, transport: Transport) -> &Mutex<Ports> {
        match transport {
            Transport::Tcp => &self.tcp,
            Transport::Udp => &self.udp,
        }
    }

    /// Binds a port; 0 is any free one.
    ///
    /// # Errors
    /// `EADDRINUSE`.
    pub fn bind(
        self: &Arc<Tables>,
        transport: Transport,
        scope: Scope,
        port: u16,
        options: &Options,
    ) -> Result<PortLease> {
        let mut ports = self.ports(transport).lock();
        let key = ports.next_key;
        ports.next_key += 1;
        let mut binding = Binding {
            key,
            port,
            scope,
            reuse_address: options.reuse_address,
            reuse_port: options.reuse_port,
            listening: false,
        };
        if port == 0 {
            // A port that nobody has at all, so that it clashes with nothing later.
            let start = ports.next_ephemeral % EPHEMERAL_COUNT;
            binding.port = (0..EPHEMERAL_COUNT)
                .map(|step| EPHEMERAL_FIRST + (start + step) % EPHEMERAL_COUNT)
                .find(|port| !ports.is_bound(*port))
                .ok_or(Errno::EADDRINUSE)?;
            // Odd steps visit all ports, and neighbouring connections do not get neighbouring ports.
            ports.next_ephemeral = (binding.port - EPHEMERAL_FIRST).wrapping_add(1);
        } else if ports.conflicts(&binding) {
            return Err(Errno::EADDRINUSE);
        }
        ports.list(binding.port).push(binding);
        Ok(PortLease {
            tables: Arc::downgrade(self),
            transport,
            port: binding.port,
            key,
        })
    }

    /// Makes a listener known.
    pub fn add_listener(&self, listener: &Arc<Listener>) {
        let mut listeners = self.listeners.lock();
        let place = listeners.partition_point(|other| other.port <= listener.port);
        listeners.insert(place, Arc::clone(listener));
    }

    /// Forgets a listener. The result says whether others listen on the same address and port.
    pub fn remove_listener(&self, listener: &Arc<Listener>) -> bool {
        let mut listeners = self.listeners.lock();
        listeners.retain(|other| !Arc::ptr_eq(other, listener));
        let mut others = of_port(&listeners, listener.port).iter();
        others.any(|other| other.scope == listener.scope)
    }

    /// The listener for a connection to an address: the one with the closest scope; among equals they take turns.
    #[must_use]
    pub fn find_listener(&self, destination: SocketAddr) -> Option<Arc<Listener>> {
        let listeners = self.listeners.lock();
        let list = of_port(&listeners, destination.port());
        if let [only] = list {
            return only.scope.fits(destination.ip()).map(|_| Arc::clone(only));
        }
        let best = list
            .iter()
            .filter_map(|listener| listener.scope.fits(destination.ip()))
            .max()?;
        let fitting = || {
            list.iter()
                .filter(|listener| listener.scope.fits(destination.ip()) == Some(best))
        };
        let mut turn = self.turn.lock();
        *turn = turn.wrapping_add(1);
        fitting().nth(*turn % fitting().count().max(1)).cloned()
    }

    /// Makes a datagram socket known under its port.
    pub fn add_datagram(&self, port: u16, socket: Weak<UdpSocket>) {
        self.datagrams.lock().entry(port).or_default().push(socket);
    }

    /// Forgets a datagram socket.
    pub fn remove_datagram(&self, port: u16, socket: &Weak<UdpSocket>) {
        let mut datagrams = self.datagrams.lock();
        if let Some(list) = datagrams.get_mut(&port) {
            list.retain(|other| !Weak::ptr_eq(other, socket));
            if list.is_empty() {
                datagrams.remove(&port);
            }
        }
    }

    /// The datagram socket that a datagram between two addresses is for: connected ones first, then the closest scope.
    #[must_use]
    pub fn find_datagram(&self, from: SocketAddr, to: SocketAddr) -> Option<Arc<UdpSocket>> {
        let list: Vec<Arc<UdpSocket>> = self
            .datagrams
            .lock()
            .get(&to.port())?
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        list.into_iter()
            .filter_map(|socket| Some((socket.score(from, to)?, socket)))
            .max_by_key(|found| found.0)
            .map(|found| found.1)
    }

    /// Whether several datagram sockets have a port and an address in common with a scope.
    #[must_use]
    pub fn is_shared(&self, port: u16, scope: Scope) -> bool {
        let datagrams = self.datagrams.lock();
        let list = match datagrams.get(&port) {
            Some(list) if list.len() > 1 => list.clone(),
            _ => return false,
        };
        drop(datagrams);
        let sharers = list
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|socket| socket.scope().is_some_and(|other| other.overlaps(scope)));
        sharers.take(2).count() > 1
    }

    /// How many more connections the listeners of a port have room for.
    #[must_use]
    pub fn room(&self, port: u16) -> usize {
        of_port(&self.listeners.lock(), port)
            .iter()
            .map(|listener| {
                let (length, backlog) = listener.lengths();
                (backlog + 1).saturating_sub(length)
            })
            .sum()
    }
}

/// The listeners of a port, out of a list that is sorted by ports.
fn of_port(listeners: &[Arc<Listener>], port: u16) -> &[Arc<Listener>] {
    let from = listeners.partition_point(|other| other.port < port);
    let rest = listeners.get(from..).unwrap_or_default();
    let count = rest
        .iter()
        .take_while(|listener| listener.port == port)
        .count();
    rest.get(..count).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(text: &str, dual: bool) -> Scope {
        Scope {
            ip: text.parse().unwrap(),
            dual,
        }
    }

    fn bind(tables: &Arc<Tables>, ip: &str, port: u16, options: &Options) -> Result<PortLease> {
        tables.bind(
            Transport::Tcp,
            scope(ip, ip == "::" && !options.v6_only),
            port,
            options,
        )
    }

    #[test]
    fn a_port_belongs_to_one_until_it_is_let_go() {
        let tables = Tables::new(1);
        let options = Options::default();
        let lease = bind(&tables, "0.0.0.0", 80, &options).unwrap();
        assert_eq!(
            bind(&tables, "127.0.0.1", 80, &options).err(),
            Some(Errno::EADDRINUSE)
        );
        assert_eq!(
            bind(&tables, "::", 80, &options).err(),
            Some(Errno::EADDRINUSE)
        );
        assert!(
            bind(
                &tables,
                "::",
                80,
                &Options {
                    v6_only: true,
                    ..Options::default()
                }
            )
            .is_ok()
        );
        drop(lease);
        assert!(bind(&tables, "127.0.0.1", 80, &options).is_ok());
    }

    #[test]
    fn reuse_address_shares_until_one_listens() {
        let tables = Tables::new(1);
        let options = Options {
            reuse_address: true,
            ..Options::default()
        };
        let first = bind(&tables, "127.0.0.1", 80, &options).unwrap();
        let second = bind(&tables, "127.0.0.1", 80, &options).unwrap();
        first.listen().unwrap();
        assert_eq!(second.listen().err(), Some(Errno::EADDRINUSE));
        assert_eq!(
            bind(&tables, "0.0.0.0", 80, &options).err(),
            Some(Errno::EADDRINUSE)
        );
        assert!(bind(&tables, "127.0.0.2", 80, &options).is_ok());
    }

    #[test]
    fn reuse_port_shares_listening_and_takes_turns() {
        let tables = Tables::new(1);
        let options = Options {
            reuse_port: true,
            ..Options::default()
        };
        let leases: Vec<_> = (0..2)
            .map(|_| bind(&tables, "0.0.0.0", 80, &options).unwrap())
            .collect();
        let listeners: Vec<_> = leases
            .iter()
            .map(|lease| {
                lease.listen().unwrap();
                let listener =
                    Listener::new(scope("0.0.0.0", false), 80, 5, Arc::new(WatchList::new()));
                tables.add_listener(&listener);
                listener
            })
            .collect();
        let to = "127.0.0.1:80".parse().unwrap();
        let (a, b) = (
            tables.find_listener(to).unwrap(),
            tables.find_listener(to).unwrap(),
        );
        assert!(!Arc::ptr_eq(&a, &b));
        assert!(tables.remove_listener(&listeners[0]));
        assert!(!tables.remove_listener(&listeners[1]));
        assert!(tables.find_listener(to).is_none());
    }

    #[test]
    fn any_port_is_a_free_one_until_none_is_left() {
        let tables = Tables::new(u16::MAX);
        let options = Options::default();
        let mut leases = Vec::new();
        for _ in 0..EPHEMERAL_COUNT {
            leases.push(bind(&tables, "0.0.0.0", 0, &options).unwrap());
        }
        let mut ports: Vec<u16> = leases.iter().map(PortLease::port).collect();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), usize::from(EPHEMERAL_COUNT));
        assert_eq!(
            bind(&tables, "0.0.0.0", 0, &options).err(),
            Some(Errno::EADDRINUSE)
        );
    }

    #[test]
    fn the_closest_listener_gets_the_connection() {
        let tables = Tables::new(1);
        for (ip, dual) in [("::", true), ("127.0.0.1", false)] {
            tables.add_listener(&Listener::new(
                scope(ip, dual),
                80,
                5,
                Arc::new(WatchList::new()),
            ));
        }
        let found = |to: &str| {
            tables
                .find_listener(to.parse().unwrap())
                .map(|listener| listener.scope.ip.to_string())
        };
        assert_eq!(found("127.0.0.1:80").as_deref(), Some("127.0.0.1"));
        assert_eq!(found("127.0.0.2:80").as_deref(), Some("::"));
        assert_eq!(found("[::1]:80").as_deref(), Some("::"));
        assert_eq!(found("[::1]:81"), None);
    }
}

//! `--net direct`: the kernel's own TCP/IP over Ethernet frames.
//!
//! The protocol machine is [`kiln_tcpip`]; here it gets its device, its time and its sockets. Nothing is sent when a program
//! writes: bytes go into the connection's buffer, and [`Network::poll`], called by the main loop, cuts segments, hands
//! them to the device in one go, and tells those sockets that something became possible for. So what a program
//! writes between two waits travels together.
//!
//! What always holds: the stack's lock is never held while somebody is notified, nor while a TCP socket's own lock is
//! taken.

use alloc::{
    boxed::Box,
    sync::{Arc, Weak},
    vec::Vec,
};
use core::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use kiln_abi::{
    configuration::Network as NetworkConfiguration, host::Event as HostEvent, link::ToMonitor,
    manifest::Protocol,
};
use kiln_tcpip::{
    Checksums, Configuration, DatagramKind, Error, Event, FrameSink, KeepAlive,
    Readiness as StackReadiness, Shutdown, SocketId, Stack,
};

use crate::{
    Errno, Result,
    event::{EventHandler, Events},
    file::{Readiness, Sink, Source, WatchList},
    host::Host,
    link::Link,
    sync::{Mutex, MutexGuard},
    trace,
};

use super::{
    backend::{DatagramReceived, Datagrams, Interface, Network},
    device::FrameDevice,
    local::{Pending, Scope, Tables},
    option::Options,
    socket::Stream,
    tcp::TcpSocket,
};

/// Frames taken from the device before answers are sent.
const BATCH: usize = 128;

/// One part in so many of the instance's memory is what the buffers of connections aim at.
const BUFFER_SHARE: u64 = 8;
/// Bounds of that, in bytes.
const MIN_BUDGET: usize = 1 << 20;
const MAX_BUDGET: usize = 64 << 20;
/// So many connections may have the largest buffers.
const CONNECTIONS_AT_FULL_SIZE: usize = 32;

/// MTU of Ethernet.
const ETHERNET_MTU: u16 = 1500;

/// A poll that comes later than this, in nanoseconds, was not late: the whole instance was stopped (`SIGSTOP`).
const STOPPED: u64 = 1_000_000_000;

/// What an event of the stack is about.
enum Target {
    /// The listener of a port.
    Listener(u16),
    /// A connection that is being made, and the request's name.
    Connecting(Weak<TcpSocket>, Arc<WatchList>),
    /// A connection or a datagram socket.
    Watch(Arc<WatchList>),
}

struct Listening {
    id: SocketId,
    users: usize,
    /// What the monitor was told.
    address: SocketAddr,
}

struct Inner {
    stack: Stack,
    device: Box<dyn FrameDevice>,
    /// By [`SocketId::index`].
    targets: Vec<Option<(SocketId, Target)>>,
    /// One for each port that programs listen on.
    listeners: Vec<Listening>,
    /// Listeners whose queue was full: looked at again by each poll.
    stalled: Vec<(SocketId, u16)>,
    /// Names of attempts to connect.
    attempts: Vec<(u64, SocketId)>,
    next_attempt: u64,
    clock: Clock,
    /// Name servers are given by the run's configuration, or those found last.
    fixed_servers: bool,
    name_servers: Vec<IpAddr>,
}

/// The stack's time. It stands still while the whole instance is stopped: nothing can be heard meanwhile, and connections
/// would have timed out afterwards.
#[derive(Default)]
struct Clock {
    /// When the stack wants to be polled next, on the host's clock.
    deadline: Option<u64>,
    /// Nanoseconds that do not count.
    stopped: u64,
}

impl Clock {
    /// The stack's time for a poll.
    fn moment(&mut self, now: u64) -> Duration {
        let late = self
            .deadline
            .map_or(0, |deadline| now.saturating_sub(deadline));
        if late > STOPPED {
            self.stopped += late;
        }
        Duration::from_nanos(now.saturating_sub(self.stopped))
    }

    /// Takes note of when the stack wants the next poll, and says it on the host's clock.
    fn set_deadline(&mut self, now: u64, next: Option<Duration>) -> Option<u64> {
        let host = |moment: Duration| {
            let nanoseconds = u64::try_from(moment.as_nanos()).unwrap_or(u64::MAX);
            // What is due has waited for this poll alone.
            nanoseconds.saturating_add(self.stopped).max(now)
        };
        self.deadline = next.map(host);
        self.deadline
    }
}

impl Inner {
    fn set_target(&mut self, id: SocketId, target: Target) {
        let index = id.index();
        if index >= self.targets.len() {
            self.targets.resize_with(index + 1, || None);
        }
        if let Some(slot) = self.targets.get_mut(index) {
            *slot = Some((id, target));
        }
    }

    /// Where in `listeners` that of a port is.
    fn listener_of(&self, port: u16) -> Option<usize> {
        let mut listeners = self.listeners.iter();
        listeners.position(|listening| listening.address.port() == port)
    }

    fn target(&self, id: SocketId) -> Option<&Target> {
        let (owner, target) = self.targets.get(id.index())?.as_ref()?;
        (*owner == id).then_some(target)
    }

    fn forget(&mut self, id: SocketId) -> Option<Target> {
        let slot = self.targets.get_mut(id.index())?;
        match slot {
            Some((owner, _)) if *owner == id => slot.take().map(|(_, target)| target),
            _ => None,
        }
    }
}

/// Something to do once the stack's lock is free.
enum Action {
    Notify(Arc<WatchList>, Readiness),
    Connected(
        Weak<TcpSocket>,
        Arc<WatchList>,
        SocketId,
        SocketAddr,
        SocketAddr,
    ),
    Failed(Weak<TcpSocket>, Errno),
    Accepted(Pending),
}

/// The network of the kernel's own stack.
pub struct StackNetwork {
    this: Weak<StackNetwork>,
    inner: Mutex<Inner>,
    /// Whom to tell where programs listen.
    link: Option<Arc<Link>>,
    tables: Arc<Tables>,
    /// Something happened since the last poll: an event of the device, or a call of a socket.
    due: AtomicBool,
    /// An event of the device, to be acknowledged: its flags, and bit 32 set.
    event: AtomicU64,
    /// Name servers that DHCP or a router named and nobody has asked for yet.
    found_servers: Mutex<Option<Vec<IpAddr>>>,
    configured: AtomicBool,
}

fn errno(error: Error) -> Errno {
    match error {
        Error::WouldBlock => Errno::EAGAIN,
        Error::Invalid => Errno::EINVAL,
        Error::NoSuchSocket => Errno::EBADF,
        Error::NotConnected => Errno::ENOTCONN,
        Error::AlreadyConnected => Errno::EISCONN,
        Error::AddressInUse => Errno::EADDRINUSE,
        Error::AddressNotAvailable => Errno::EADDRNOTAVAIL,
        Error::NetworkUnreachable => Errno::ENETUNREACH,
        Error::HostUnreachable => Errno::EHOSTUNREACH,
        Error::ConnectionRefused => Errno::ECONNREFUSED,
        Error::ConnectionReset => Errno::ECONNRESET,
        Error::TimedOut => Errno::ETIMEDOUT,
        Error::BrokenPipe => Errno::EPIPE,
        Error::MessageTooLong => Errno::EMSGSIZE,
        Error::DestinationRequired => Errno::EDESTADDRREQ,
    }
}

fn readiness(ready: StackReadiness) -> Readiness {
    let mut result = Readiness::empty();
    if ready.contains(StackReadiness::READABLE) {
        result |= Readiness::READABLE;
    }
    if ready.contains(StackReadiness::WRITABLE) {
        result |= Readiness::WRITABLE;
    }
    if ready.contains(StackReadiness::READ_CLOSED) {
        result |= Readiness::READABLE | Readiness::READ_HANGUP;
    }
    if ready.contains(StackReadiness::WRITE_CLOSED) {
        result |= Readiness::WRITABLE;
    }
    if ready.contains(StackReadiness::READ_CLOSED | StackReadiness::WRITE_CLOSED) {
        result |= Readiness::HANGUP;
    }
    if ready.contains(StackReadiness::ERROR) {
        result |= Readiness::ERROR | Readiness::READABLE | Readiness::WRITABLE;
    }
    result
}

/// The device as the stack wants it.
struct DeviceSink<'a>(&'a mut dyn FrameDevice);

impl FrameSink for DeviceSink<'_> {
    fn has_room(&self) -> bool {
        self.0.has_room()
    }

    fn reserve(&mut self, length: usize) -> Option<&mut [u8]> {
        self.0.reserve(length)
    }

    fn commit(&mut self) {
        self.0.commit();
    }
}

impl StackNetwork {
    /// A stack over `device`, configured as the run says, with buffers that fit `memory_limit` (in bytes). Addresses by
    /// DHCP come while the program runs already.
    #[must_use]
    pub fn new(
        host: Host,
        events: &Arc<Events>,
        link: Option<&Arc<Link>>,
        tables: &Arc<Tables>,
        configuration: &NetworkConfiguration,
        memory_limit: u64,
        device: Box<dyn FrameDevice>,
    ) -> Arc<StackNetwork> {
        let mut seed = [0; 8];
        // Without randomness sequence numbers can be guessed; the network works all the same.
        if host.entropy(&mut seed).is_err() {
            seed = host.monotonic().to_ne_bytes();
        }
        let source = device.source();
        let budget = usize::try_from(memory_limit / BUFFER_SHARE)
            .unwrap_or(usize::MAX)
            .clamp(MIN_BUDGET, MAX_BUDGET);
        let mut stack = Stack::new(&Configuration {
            buffer_budget: budget,
            buffer_maximum: (budget / CONNECTIONS_AT_FULL_SIZE).clamp(16 << 10, 256 << 10),
            mac: device.mac(),
            mtu: device.mtu(),
            checksums: Checksums::Software,
            seed: u64::from_ne_bytes(seed),
            ..Configuration::default()
        });
        let mut fixed_servers = false;
        if let NetworkConfiguration::Static(fixed) = configuration {
            for &(ip, prefix) in &fixed.addresses {
                stack.add_address(ip, prefix);
            }
            for &gateway in &fixed.gateways {
                stack.set_gateway(gateway);
                if let Some(mac) = fixed.gateway_mac {
                    stack.add_neighbour(gateway, mac);
                }
            }
            fixed_servers = !fixed.name_servers.is_empty();
        } else {
            stack.start_dhcp(None);
            stack.start_router_discovery();
        }
        let network = Arc::new_cyclic(|this| StackNetwork {
            this: this.clone(),
            found_servers: Mutex::new(None),
            inner: Mutex::new(Inner {
                stack,
                device,
                targets: Vec::new(),
                listeners: Vec::new(),
                stalled: Vec::new(),
                attempts: Vec::new(),
                next_attempt: 1,
                clock: Clock::default(),
                fixed_servers,
                name_servers: Vec::new(),
            }),
            link: link.map(Arc::clone),
            tables: Arc::clone(tables),
            due: AtomicBool::new(true),
            event: AtomicU64::new(0),
            configured: AtomicBool::new(false),
        });
        events.register(source, Arc::clone(&network) as Arc<dyn EventHandler>);
        network
    }

    /// Has the next poll do its work.
    #[inline]
    fn touch(&self) {
        self.due.store(true, Ordering::Relaxed);
    }

    /// Tells the monitor that a program listens, or does no longer.
    fn tell(&self, address: SocketAddr, protocol: Protocol, listens: bool) {
        if let Some(link) = &self.link {
            link.send(&if listens {
                ToMonitor::Listen { address, protocol }
            } else {
                ToMonitor::Unlisten { address, protocol }
            });
        }
    }

    /// What an event of the stack asks for.
    fn react(&self, inner: &mut Inner, id: SocketId, actions: &mut Vec<Action>) {
        match inner.target(id) {
            Some(Target::Watch(watch)) => {
                let ready = readiness(inner.stack.readiness(id));
                actions.push(Action::Notify(Arc::clone(watch), ready));
            }
            Some(Target::Listener(port)) => self.accept_all(inner, id, *port, actions),
            Some(Target::Connecting(socket, watch)) => {
                let (socket, watch) = (socket.clone(), Arc::clone(watch));
                let ready = inner.stack.readiness(id);
                if ready.contains(StackReadiness::CONNECTED) {
                    let addresses = inner.stack.tcp_addresses(id);
                    inner.set_target(id, Target::Watch(Arc::clone(&watch)));
                    inner.attempts.retain(|(_, attempt)| *attempt != id);
                    if let Some((local, peer)) = addresses {
                        actions.push(Action::Connected(socket, watch, id, local, peer));
                    }
                } else if ready.intersects(StackReadiness::ERROR | StackReadiness::WRITE_CLOSED) {
                    let error = inner.stack.take_error(id).map_or(Errno::ETIMEDOUT, errno);
                    inner.forget(id);
                    inner.attempts.retain(|(_, attempt)| *attempt != id);
                    inner.stack.close(id);
                    actions.push(Action::Failed(socket, error));
                }
            }
            None => {}
        }
    }

    /// Takes connections out of a listener of the stack, as many as the program's queue has room for.
    fn accept_all(&self, inner: &mut Inner, id: SocketId, port: u16, actions: &mut Vec<Action>) {
        let mut room = self.tables.room(port);
        while room > 0 {
            let Ok(connection) = inner.stack.tcp_accept(id) else {
                return;
            };
            room -= 1;
            let watch = Arc::new(WatchList::new());
            inner.set_target(connection, Target::Watch(Arc::clone(&watch)));
            if let Some((local, peer)) = inner.stack.tcp_addresses(connection)
                && let Some(stream) = self.stream(connection, Arc::clone(&watch))
            {
                actions.push(Action::Accepted(Pending {
                    stream,
                    watch,
                    local,
                    peer,
                    connector: None,
                }));
            }
        }
        // There may be more; the next poll looks again.
        inner.stalled.push((id, port));
    }

    /// A connection as sockets have it; None only while the network itself is being made or dropped.
    fn stream(&self, id: SocketId, watch: Arc<WatchList>) -> Option<Arc<dyn Stream>> {
        Some(Arc::new(StackStream {
            network: self.this.upgrade()?,
            id,
            watch,
        }))
    }

    fn act(&self, action: Action) {
        match action {
            Action::Notify(watch, readiness) => watch.notify(readiness),
            Action::Connected(socket, watch, id, local, peer) => {
                let Some(stream) = self.stream(id, watch) else {
                    return;
                };
                match socket.upgrade() {
                    Some(socket) => socket.complete(stream, local, peer),
                    None => stream.close(true),
                }
            }
            Action::Failed(socket, error) => {
                if let Some(socket) = socket.upgrade() {
                    socket.fail(error);
                }
            }
            Action::Accepted(pending) => {
                let refused = match self.tables.find_listener(pending.local) {
                    Some(listener) => listener.push(pending).err(),
                    None => Some(pending),
                };
                if let Some(pending) = refused {
                    pending.stream.close(true);
                }
            }
        }
    }

    /// Takes note of what DHCP or a router said.
    fn reconfigure(&self, inner: &mut Inner) {
        if !inner.fixed_servers {
            let servers = inner.stack.name_servers();
            if servers != inner.name_servers {
                inner.name_servers.clone_from(&servers);
                *self.found_servers.lock() = Some(servers);
            }
        }
        let first = inner
            .stack
            .addresses()
            .iter()
            .any(|own| own.address.is_ipv4());
        if first && !self.configured.swap(true, Ordering::Relaxed) {
            for own in inner.stack.addresses() {
                trace::info!("net: own address {}/{}", own.address, own.prefix);
            }
        }
    }

    fn run(&self, now: u64) -> Option<u64> {
        let mut actions = Vec::new();
        let mut inner = self.inner.lock();
        let moment = inner.clock.moment(now);
        let event = self.event.swap(0, Ordering::Relaxed);
        if event != 0 {
            let source = inner.device.source();
            inner.device.acknowledge(HostEvent {
                source,
                flags: event as u32,
            });
        }
        self.due.store(false, Ordering::Relaxed);
        let mut received = 0;
        {
            let Inner { stack, device, .. } = &mut *inner;
            while received < BATCH {
                let Some(frame) = device.receive() else { break };
                stack.receive(moment, frame);
                received += 1;
            }
            stack.poll(moment, &mut DeviceSink(&mut **device));
            device.flush();
        }
        if received == BATCH {
            self.touch();
        }
        while let Some(event) = inner.stack.next_event() {
            match event {
                Event::Ready(id) => self.react(&mut inner, id, &mut actions),
                Event::Configured => self.reconfigure(&mut inner),
                Event::Intercepted(_) => {}
            }
        }
        if !inner.stalled.is_empty() {
            for (id, port) in core::mem::take(&mut inner.stalled) {
                self.accept_all(&mut inner, id, port, &mut actions);
            }
        }
        let next = inner.stack.next_deadline();
        let deadline = inner.clock.set_deadline(now, next);
        drop(inner);
        for action in actions {
            self.act(action);
        }
        if self.due.load(Ordering::Relaxed) {
            Some(now)
        } else {
            deadline
        }
    }
}

impl EventHandler for StackNetwork {
    fn handle(&self, event: HostEvent) {
        let flags = self.event.load(Ordering::Relaxed) | u64::from(event.flags) | 1 << 32;
        self.event.store(flags, Ordering::Relaxed);
        self.touch();
    }
}

impl Network for StackNetwork {
    fn listen(&self, scope: Scope, port: u16, backlog: usize) -> Result<()> {
        self.touch();
        let mut inner = self.inner.lock();
        if let Some(place) = inner.listener_of(port) {
            inner.listeners[place].users += 1;
            return Ok(());
        }
        // One listener takes a port's connections to all addresses, known now or later; the kernel's own table says whose
        // they are.
        let any = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port);
        let id = inner
            .stack
            .tcp_open_listener(any, backlog.max(16))
            .map_err(errno)?;
        inner.set_target(id, Target::Listener(port));
        let address = SocketAddr::new(scope.ip, port);
        let listening = Listening {
            id,
            users: 1,
            address,
        };
        inner.listeners.push(listening);
        drop(inner);
        self.tell(address, Protocol::Tcp, true);
        Ok(())
    }

    fn unlisten(&self, _: Scope, port: u16) {
        self.touch();
        let mut inner = self.inner.lock();
        let Some(place) = inner.listener_of(port) else {
            return;
        };
        let listening = &mut inner.listeners[place];
        listening.users -= 1;
        if listening.users == 0 {
            let (id, address) = (listening.id, listening.address);
            inner.listeners.swap_remove(place);
            inner.forget(id);
            inner.stalled.retain(|(stalled, _)| *stalled != id);
            inner.stack.close(id);
            drop(inner);
            self.tell(address, Protocol::Tcp, false);
        }
    }

    fn connect(
        &self,
        socket: &Weak<TcpSocket>,
        watch: &Arc<WatchList>,
        from: Option<SocketAddr>,
        to: SocketAddr,
        options: &Options,
    ) -> Result<u64> {
        self.touch();
        let mut inner = self.inner.lock();
        let id = inner.stack.tcp_open();
        let result = (|| {
            configure(&mut inner.stack, id, options)?;
            if let Some(mut from) = from {
                // A dual-stack socket's unspecified address serves both families.
                if from.is_ipv6() != to.is_ipv6() && from.ip().is_unspecified() {
                    from.set_ip(match to.ip() {
                        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
                    });
                }
                inner.stack.tcp_set_reuse_address(id, true)?;
                inner.stack.tcp_bind(id, from)?;
            }
            inner.stack.tcp_connect(id, to)
        })();
        if let Err(error) = result {
            inner.stack.close(id);
            return Err(errno(error));
        }
        inner.set_target(id, Target::Connecting(socket.clone(), Arc::clone(watch)));
        let attempt = inner.next_attempt;
        inner.next_attempt += 1;
        inner.attempts.push((attempt, id));
        Ok(attempt)
    }

    fn cancel(&self, attempt: u64) {
        self.touch();
        let mut inner = self.inner.lock();
        let place = inner.attempts.iter().position(|(name, _)| *name == attempt);
        if let Some((_, id)) = place.map(|place| inner.attempts.swap_remove(place)) {
            inner.forget(id);
            inner.stack.close(id);
        }
    }

    fn open_datagram(
        &self,
        bind: SocketAddr,
        dual: bool,
        watch: &Arc<WatchList>,
    ) -> Result<Arc<dyn Datagrams>> {
        self.touch();
        let mut inner = self.inner.lock();
        let id = inner.stack.datagram_open(DatagramKind::Udp);
        let result = (|| {
            inner.stack.datagram_set_reuse_address(id, true)?;
            inner.stack.datagram_set_only_v6(id, !dual)?;
            match inner.stack.datagram_bind(id, bind) {
                Err(Error::AddressNotAvailable) => {
                    // An address that the machine is to get yet.
                    let mut any = bind;
                    any.set_ip(match bind.ip() {
                        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
                    });
                    inner.stack.datagram_bind(id, any)
                }
                result => result,
            }
        })();
        if let Err(error) = result {
            inner.stack.close(id);
            return Err(errno(error));
        }
        inner.set_target(id, Target::Watch(Arc::clone(watch)));
        Ok(Arc::new(StackDatagrams {
            network: self.this.clone(),
            id,
            told: Mutex::new(None),
        }))
    }

    fn open_echo(&self, bind: SocketAddr, watch: &Arc<WatchList>) -> Result<Arc<dyn Datagrams>> {
        self.touch();
        let mut inner = self.inner.lock();
        let id = inner.stack.datagram_open(DatagramKind::Echo);
        let result = inner
            .stack
            .datagram_set_only_v6(id, true)
            .and_then(|()| inner.stack.datagram_bind(id, bind));
        if let Err(error) = result {
            inner.stack.close(id);
            return Err(errno(error));
        }
        inner.set_target(id, Target::Watch(Arc::clone(watch)));
        Ok(Arc::new(StackDatagrams {
            network: self.this.clone(),
            id,
            told: Mutex::new(None),
        }))
    }

    fn interface(&self) -> Option<Interface> {
        let inner = self.inner.lock();
        Some(Interface {
            index: 2,
            name: "eth0",
            mac: Some(inner.stack.mac()),
            mtu: u32::try_from(inner.stack.mtu()).unwrap_or(u32::from(ETHERNET_MTU)),
            addresses: inner
                .stack
                .addresses()
                .iter()
                .map(|own| (own.address, own.prefix))
                .collect(),
            gateways: inner
                .stack
                .routes()
                .iter()
                .filter_map(|route| route.gateway)
                .collect(),
        })
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        self.inner
            .lock()
            .stack
            .addresses()
            .iter()
            .any(|own| own.address == ip)
    }

    fn poll(&self, now: u64) -> Option<u64> {
        if !self.due.load(Ordering::Relaxed) {
            let deadline = self.inner.lock().clock.deadline;
            if deadline.is_none_or(|deadline| deadline > now) {
                return deadline;
            }
        }
        self.run(now)
    }

    fn changed_name_servers(&self) -> Option<Vec<IpAddr>> {
        self.found_servers.lock().take()
    }
}

fn configure(stack: &mut Stack, id: SocketId, options: &Options) -> Result<(), Error> {
    let keep_alive = options.keep_alive.then(|| KeepAlive {
        idle: Duration::from_secs(u64::from(options.keep_idle)),
        interval: Duration::from_secs(u64::from(options.keep_interval)),
        count: options.keep_count,
    });
    let hop_limit = (options.ttl != 64).then_some(options.ttl);
    stack.tcp_configure(id, options.no_delay, keep_alive, hop_limit)
}

/// A connection of the stack.
struct StackStream {
    network: Arc<StackNetwork>,
    id: SocketId,
    watch: Arc<WatchList>,
}

impl StackStream {
    /// The stack, to do something with that the next poll has to look after.
    fn open(&self) -> MutexGuard<'_, Inner> {
        self.network.touch();
        self.network.inner.lock()
    }
}

/// What a transfer came to, with what the program's memory refused meanwhile: that counts if nothing was moved before.
fn transferred(moved: Result<usize, Error>, fault: Option<Errno>) -> Result<usize> {
    match (moved, fault) {
        (Ok(0), Some(fault)) => Err(fault),
        (moved, _) => moved.map_err(errno),
    }
}

impl Stream for StackStream {
    fn receive(&self, sink: &mut Sink<'_>, peek: bool) -> Result<usize> {
        let mut inner = self.open();
        if peek {
            let mut bytes = alloc::vec![0; sink.remaining().min(64 << 10)];
            let count = inner.stack.tcp_peek(self.id, &mut bytes).map_err(errno)?;
            return sink.put(bytes.get(..count).unwrap_or_default());
        }
        let mut fault = None;
        let received = inner.stack.tcp_receive_with(self.id, &mut |bytes| {
            sink.put(bytes).unwrap_or_else(|error| {
                fault = Some(error);
                0
            })
        });
        transferred(received, fault)
    }

    fn send(&self, source: &mut Source<'_>, _: bool) -> Result<usize> {
        let mut fault = None;
        let sent = self.open().stack.tcp_send_with(self.id, &mut |space| {
            source.take(space).unwrap_or_else(|error| {
                fault = Some(error);
                0
            })
        });
        transferred(sent, fault)
    }

    fn readiness(&self) -> Readiness {
        readiness(self.network.inner.lock().stack.readiness(self.id))
    }

    fn shutdown(&self, read: bool, write: bool) -> Result<()> {
        let how = match (read, write) {
            (true, true) => Shutdown::Both,
            (true, false) => Shutdown::Read,
            _ => Shutdown::Write,
        };
        let result = self.open().stack.tcp_shutdown(self.id, how).map_err(errno);
        self.watch.notify(self.readiness());
        result
    }

    fn close(&self, abort: bool) {
        let mut inner = self.open();
        let target = inner.forget(self.id);
        if abort {
            // Fails only for a connection that has ended already.
            let _ = inner.stack.tcp_abort(self.id);
        }
        inner.stack.close(self.id);
        drop(inner);
        drop(target);
    }

    fn take_error(&self) -> Option<Errno> {
        self.open().stack.take_error(self.id).map(errno)
    }

    fn queued(&self) -> (usize, usize) {
        self.network.inner.lock().stack.tcp_queues(self.id)
    }

    fn configure(&self, options: &Options) {
        // Fails only for a connection that has ended already.
        let _ = configure(&mut self.open().stack, self.id, options);
    }
}

/// A datagram socket of the stack.
struct StackDatagrams {
    network: Weak<StackNetwork>,
    id: SocketId,
    /// The address that the monitor was told of.
    told: Mutex<Option<SocketAddr>>,
}

impl StackDatagrams {
    fn with<R>(&self, work: impl FnOnce(&mut Stack) -> R) -> Result<R> {
        let network = self.network.upgrade().ok_or(Errno::ENETDOWN)?;
        network.touch();
        let mut inner = network.inner.lock();
        Ok(work(&mut inner.stack))
    }
}

impl Datagrams for StackDatagrams {
    fn receive(
        &self,
        sink: &mut Sink<'_>,
        peek: bool,
        only: Option<SocketAddr>,
    ) -> Result<DatagramReceived> {
        let id = self.id;
        self.with(|stack| {
            loop {
                let Some(next) = stack.datagram_peek(id) else {
                    // Takes the pending error, if there is one.
                    return match stack.datagram_receive(id) {
                        Ok(_) => Err(Errno::EAGAIN),
                        Err(error) => Err(errno(error)),
                    };
                };
                if only.is_some_and(|only| only != next.source) {
                    let _ = stack.datagram_receive(id);
                    continue;
                }
                let received = DatagramReceived {
                    count: sink.put(&next.data)?,
                    full_length: next.data.len(),
                    from: next.source,
                    to: next.destination.ip(),
                };
                if !peek {
                    let _ = stack.datagram_receive(id);
                }
                return Ok(received);
            }
        })?
    }

    fn send(&self, source: &mut Source<'_>, to: SocketAddr) -> Result<usize> {
        let length = source.remaining();
        let bytes = source.take_vector(length)?;
        if bytes.len() < length {
            return Err(Errno::EFAULT);
        }
        self.with(|stack| stack.datagram_send(self.id, Some(to), &bytes))?
            .map_err(errno)
    }

    fn readiness(&self) -> Readiness {
        let Some(network) = self.network.upgrade() else {
            return Readiness::ERROR;
        };
        let inner = network.inner.lock();
        readiness(inner.stack.readiness(self.id)) - Readiness::HANGUP
    }

    fn waiting(&self) -> usize {
        self.with(|stack| {
            stack
                .datagram_peek(self.id)
                .map_or(0, |next| next.data.len())
        })
        .unwrap_or(0)
    }

    fn connect(&self, peer: Option<SocketAddr>) {
        // The stack finds the socket of a datagram by it, and tells a connected one what ICMP says. Where there is no way
        // to the peer, sending says so.
        let _ = self.with(|stack| stack.datagram_connect(self.id, peer));
    }

    fn take_error(&self) -> Option<Errno> {
        self.with(|stack| stack.take_error(self.id))
            .ok()
            .flatten()
            .map(errno)
    }

    fn announce(&self, address: SocketAddr) {
        if let Some(network) = self.network.upgrade() {
            network.tell(address, Protocol::Udp, true);
            *self.told.lock() = Some(address);
        }
    }

    fn close(&self) {
        let Some(network) = self.network.upgrade() else {
            return;
        };
        network.touch();
        let mut inner = network.inner.lock();
        let target = inner.forget(self.id);
        inner.stack.close(self.id);
        drop(inner);
        drop(target);
        if let Some(address) = self.told.lock().take() {
            network.tell(address, Protocol::Udp, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stack_does_not_see_the_time_that_it_was_stopped() {
        const SECOND: u64 = 1_000_000_000;
        let mut clock = Clock::default();
        assert_eq!(clock.moment(5 * SECOND), Duration::from_secs(5));
        let next = Some(Duration::from_secs(9));
        assert_eq!(clock.set_deadline(5 * SECOND, next), Some(9 * SECOND));
        // In time, and a little late.
        assert_eq!(clock.moment(8 * SECOND), Duration::from_secs(8));
        assert_eq!(
            clock.moment(9 * SECOND + SECOND / 2),
            Duration::from_millis(9500)
        );
        clock.set_deadline(9 * SECOND, next);
        // Stopped for an hour: the deadline is due, and no more than that.
        let hour = 3600 * SECOND;
        assert_eq!(clock.moment(hour), Duration::from_secs(9));
        let next = Some(Duration::from_secs(10));
        assert_eq!(clock.set_deadline(hour, next), Some(hour + SECOND));
        assert_eq!(clock.moment(hour + SECOND), Duration::from_secs(10));
        // What is due at once was not late before.
        let due = clock.set_deadline(2 * hour, Some(Duration::ZERO));
        assert_eq!(due, Some(2 * hour));
        assert_eq!(
            clock.moment(2 * hour),
            Duration::from_nanos(hour + 9 * SECOND)
        );
    }
}

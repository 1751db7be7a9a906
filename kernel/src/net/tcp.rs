//! TCP sockets (`tcp(7)`), whatever carries the connection.
//!
//! What always holds: once connected a socket stays so ([`Connection`] is set once), so reading and writing takes no lock of
//! this module. Watchers are notified with no lock of this module held.

use alloc::{
    sync::{Arc, Weak},
    vec::Vec,
};
use core::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
};

use linux_raw_sys::net as linux;
use spin::Once;

use crate::{
    Errno, Result,
    file::{File, Readiness, Sink, Source, WatchList},
    sync::Mutex,
};

use super::{
    Shared,
    address::{AF_INET, AF_INET6, Address, loopback_like, unspecified},
    local::{Listener, Pending, PortLease, Scope, Transport},
    option::{LEVEL_IPV6, LEVEL_TCP, Options},
    socket::{Base, Caller, Incoming, Outgoing, Socket, Stream},
    stream::{Rules, StreamEnd, pair},
};

/// Longest queue of connections (`net.core.somaxconn`).
pub const MAX_BACKLOG: usize = 4096;

/// Buffer of a direction of a connection within the machine, in bytes, unless the program sets it.
const LOCAL_BUFFER: usize = 256 << 10;

struct Bound {
    address: SocketAddr,
    scope: Scope,
    lease: Option<PortLease>,
}

enum State {
    Idle,
    Listening {
        listener: Arc<Listener>,
        on_backend: bool,
    },
    /// By the backend, or waiting for a place in a local listener's queue.
    Connecting {
        attempt: Option<u64>,
        waiting: Option<(StreamEnd, SocketAddr, SocketAddr)>,
    },
    Connected,
    Closed,
}

/// A connection.
struct Connection {
    stream: Arc<dyn Stream>,
    local: SocketAddr,
    peer: SocketAddr,
}

/// A TCP socket.
pub struct TcpSocket {
    this: Weak<TcpSocket>,
    base: Base,
    state: Mutex<State>,
    bound: Mutex<Option<Bound>>,
    connection: Once<Connection>,
    error: Mutex<Option<Errno>>,
    /// A background connect has succeeded and `connect(2)` has not said so yet.
    unannounced: AtomicBool,
    write_closed: AtomicBool,
}

impl Stream for StreamEnd {
    fn receive(&self, sink: &mut Sink<'_>, peek: bool) -> Result<usize> {
        StreamEnd::receive(self, sink, peek).map(|received| received.count)
    }

    fn send(&self, source: &mut Source<'_>, _: bool) -> Result<usize> {
        StreamEnd::send(self, source, None)
    }

    fn readiness(&self) -> Readiness {
        StreamEnd::readiness(self)
    }

    fn shutdown(&self, read: bool, write: bool) -> Result<()> {
        StreamEnd::shutdown(self, read, write);
        Ok(())
    }

    fn close(&self, abort: bool) {
        StreamEnd::close(self, abort);
    }

    fn take_error(&self) -> Option<Errno> {
        StreamEnd::take_error(self)
    }

    fn queued(&self) -> (usize, usize) {
        (self.available(), self.unread())
    }

    fn configure(&self, options: &Options) {
        if options.buffers_set {
            self.set_buffer(true, options.send_buffer as usize);
        }
    }
}

impl TcpSocket {
    /// A new socket of `AF_INET` or `AF_INET6`.
    #[must_use]
    pub fn new(shared: &Arc<Shared>, family: u16) -> Arc<TcpSocket> {
        TcpSocket::with(
            shared,
            family,
            Arc::new(WatchList::new()),
            Options::default(),
            State::Idle,
            None,
        )
    }

    fn with(
        shared: &Arc<Shared>,
        family: u16,
        watch: Arc<WatchList>,
        options: Options,
        state: State,
        connection: Option<Connection>,
    ) -> Arc<TcpSocket> {
        Arc::new_cyclic(|this| TcpSocket {
            this: this.clone(),
            base: Base::with(
                shared,
                family,
                linux::SOCK_STREAM,
                LEVEL_TCP,
                watch,
                options,
            ),
            state: Mutex::new(state),
            bound: Mutex::new(None),
            connection: connection.map_or_else(Once::new, Once::initialized),
            error: Mutex::new(None),
            unannounced: AtomicBool::new(false),
            write_closed: AtomicBool::new(false),
        })
    }

    /// The address as this socket may use it.
    fn inet(&self, address: &Address) -> Result<SocketAddr> {
        check_family(
            self.base.kind.family,
            self.base.options.lock().v6_only,
            address,
        )
    }

    /// Binds to any port if not bound.
    fn ensure_bound(&self, ip: IpAddr) -> Result<SocketAddr> {
        let mut bound = self.bound.lock();
        if let Some(bound) = &*bound {
            return Ok(bound.address);
        }
        let options = self.base.options.lock();
        let scope = Scope {
            ip,
            dual: self.base.kind.family == AF_INET6 && ip.is_unspecified() && !options.v6_only,
        };
        let lease = self
            .base
            .shared
            .tables
            .bind(Transport::Tcp, scope, 0, &options)?;
        let address = SocketAddr::new(ip, lease.port());
        *bound = Some(Bound {
            address,
            scope,
            lease: Some(lease),
        });
        Ok(address)
    }

    /// A background connect has succeeded. Closes the stream if the socket has gone meanwhile.
    pub fn complete(&self, stream: Arc<dyn Stream>, local: SocketAddr, peer: SocketAddr) {
        let mut state = self.state.lock();
        if !matches!(*state, State::Connecting { .. }) {
            drop(state);
            stream.close(true);
            return;
        }
        *state = State::Connected;
        drop(state);
        stream.configure(&self.base.options.lock());
        self.connection.call_once(|| Connection {
            stream,
            local,
            peer,
        });
        self.unannounced.store(true, Ordering::Relaxed);
        self.base
            .watch
            .notify(Readiness::WRITABLE | Readiness::READABLE);
    }

    /// The local listener has made place for this connecting socket.
    pub fn complete_waiting(&self) {
        let mut state = self.state.lock();
        let State::Connecting { waiting, .. } = &mut *state else {
            return;
        };
        let Some((end, local, peer)) = waiting.take() else {
            return;
        };
        drop(state);
        self.complete(Arc::new(end), local, peer);
    }

    /// A background connect has failed.
    pub fn fail(&self, error: Errno) {
        let mut state = self.state.lock();
        if !matches!(*state, State::Connecting { .. }) {
            return;
        }
        let earlier = core::mem::replace(&mut *state, State::Idle);
        drop(state);
        drop(earlier);
        *self.error.lock() = Some(error);
        self.base.watch.notify(Readiness::all());
    }

    /// Connects within the machine.
    fn connect_local(&self, to: SocketAddr, caller: &Caller) -> Result<()> {
        let source = match to.ip() {
            ip if ip.is_loopback() => loopback_like(ip),
            ip => ip,
        };
        let mut local = self.ensure_bound(source)?;
        if local.ip().is_unspecified() || local.is_ipv6() != to.is_ipv6() {
            local.set_ip(source);
        }
        let refused = || {
            if caller.non_blocking {
                // The refusal is learned in the background, as over a wire.
                *self.state.lock() = State::Connecting {
                    attempt: None,
                    waiting: None,
                };
                self.fail(Errno::ECONNREFUSED);
                return Err(Errno::EINPROGRESS);
            }
            Err(Errno::ECONNREFUSED)
        };
        let Some(listener) = self.base.shared.tables.find_listener(to) else {
            return refused();
        };
        let options = *self.base.options.lock();
        let limit = if options.buffers_set {
            options.send_buffer as usize
        } else {
            LOCAL_BUFFER
        };
        let peer_watch = Arc::new(WatchList::new());
        let (mine, theirs) = pair(
            Rules::Tcp,
            [Arc::clone(&self.base.watch), Arc::clone(&peer_watch)],
            limit,
        );
        let pending = Pending {
            stream: Arc::new(theirs),
            watch: peer_watch,
            local: to,
            peer: local,
            connector: Some(self.this.clone()),
        };
        // In place before the other side can look for it.
        *self.state.lock() = State::Connecting {
            attempt: None,
            waiting: Some((mine, local, to)),
        };
        match listener.push(pending) {
            Ok(true) => {
                self.complete_waiting();
                if caller.non_blocking {
                    return Err(Errno::EINPROGRESS);
                }
                self.unannounced.store(false, Ordering::Relaxed);
                Ok(())
            }
            Ok(false) => Err(Errno::EINPROGRESS),
            Err(_) => {
                *self.state.lock() = State::Idle;
                refused()
            }
        }
    }

    fn stream(&self) -> Result<&Arc<dyn Stream>> {
        match self.connection.get() {
            Some(connection) => Ok(&connection.stream),
            None => self.not_connected(),
        }
    }

    /// What reading or writing a socket without a connection gives.
    #[cold]
    fn not_connected<T>(&self) -> Result<T> {
        if let Some(error) = self.error.lock().take() {
            return Err(error);
        }
        match *self.state.lock() {
            State::Connecting { .. } => Err(Errno::EAGAIN),
            _ => Err(Errno::ENOTCONN),
        }
    }

    /// Ends everything, as the last close does.
    fn end(&self) {
        let state = core::mem::replace(&mut *self.state.lock(), State::Closed);
        let abort = self.base.options.lock().linger == Some(0);
        match state {
            State::Listening {
                listener,
                on_backend,
            } => {
                self.base.shared.tables.remove_listener(&listener);
                if on_backend && let Some(backend) = &self.base.shared.backend {
                    backend.unlisten(listener.scope, listener.port);
                }
                listener.close();
            }
            State::Connecting { attempt, waiting } => {
                if let Some(attempt) = attempt
                    && let Some(backend) = &self.base.shared.backend
                {
                    backend.cancel(attempt);
                }
                if let Some((end, ..)) = waiting {
                    StreamEnd::close(&end, true);
                }
            }
            State::Connected => {
                if let Some(connection) = self.connection.get() {
                    connection.stream.close(abort);
                }
            }
            State::Idle | State::Closed => {}
        }
        let bound = self.bound.lock().take();
        drop(bound);
    }

    /// `TCP_INFO` as far as it is known: the state and the settings. What is not known is zero.
    fn information(&self) -> Vec<u8> {
        let state = match *self.state.lock() {
            State::Idle | State::Closed => 7,
            State::Listening { .. } => 10,
            State::Connecting { .. } => 2,
            State::Connected => {
                let readiness = self
                    .connection
                    .get()
                    .map_or(Readiness::empty(), |c| c.stream.readiness());
                match (
                    readiness.contains(Readiness::READ_HANGUP),
                    self.write_closed.load(Ordering::Relaxed),
                ) {
                    _ if readiness.contains(Readiness::HANGUP) => 7,
                    (false, false) => 1,
                    (true, false) => 8,
                    (false, true) => 5,
                    (true, true) => 6,
                }
            }
        };
        let mut bytes = alloc::vec![0; size_of::<linux::tcp_info>()];
        bytes[0] = state;
        // tcpi_snd_mss and tcpi_rcv_mss, at 16 and 20; tcpi_unacked (for listeners: queue length) and tcpi_sacked
        // (for listeners: backlog), at 24 and 28.
        bytes[16..20].copy_from_slice(&1448u32.to_ne_bytes());
        bytes[20..24].copy_from_slice(&1448u32.to_ne_bytes());
        if let State::Listening { listener, .. } = &*self.state.lock() {
            let (length, backlog) = listener.lengths();
            bytes[24..28].copy_from_slice(&(length as u32).to_ne_bytes());
            bytes[28..32].copy_from_slice(&(backlog as u32).to_ne_bytes());
        }
        bytes
    }
}

/// Checks that an address can be used by a socket of a family.
///
/// # Errors
/// `EAFNOSUPPORT`, or `EINVAL` and `ENETUNREACH` for IPv4 on an IPv6-only socket.
pub fn check_family(family: u16, v6_only: bool, address: &Address) -> Result<SocketAddr> {
    match address {
        Address::Inet(address @ SocketAddr::V6(_)) if family == AF_INET6 => Ok(*address),
        Address::Inet(SocketAddr::V4(_)) if family == AF_INET6 && v6_only => Err(Errno::EINVAL),
        Address::Inet(address @ SocketAddr::V4(_)) => Ok(*address),
        // bind(2): an all-zero address without family is taken as AF_INET's.
        Address::Unspecified if family == AF_INET => Ok(unspecified(AF_INET)),
        _ => Err(Errno::EAFNOSUPPORT),
    }
}

impl Socket for TcpSocket {
    fn base(&self) -> &Base {
        &self.base
    }

    #[inline]
    fn take(&self, sink: &mut Sink<'_>) -> Result<usize> {
        self.stream()?.receive(sink, false)
    }

    #[inline]
    fn put(&self, source: &mut Source<'_>) -> Result<usize> {
        match self.connection.get() {
            Some(connection) => connection.stream.send(source, false),
            None => match self.not_connected() {
                Err(Errno::ENOTCONN) => Err(Errno::EPIPE),
                other => other,
            },
        }
    }

    fn ready(&self) -> Readiness {
        if let Some(connection) = self.connection.get() {
            return connection.stream.readiness();
        }
        let mut readiness = match &*self.state.lock() {
            State::Idle => Readiness::WRITABLE | Readiness::HANGUP,
            State::Listening { listener, .. } if listener.is_ready() => Readiness::READABLE,
            State::Listening { .. } | State::Connecting { .. } | State::Connected => {
                Readiness::empty()
            }
            State::Closed => Readiness::HANGUP,
        };
        if self.error.lock().is_some() {
            readiness |=
                Readiness::READABLE | Readiness::WRITABLE | Readiness::ERROR | Readiness::HANGUP;
        }
        readiness
    }

    fn close(&self) {
        self.end();
    }

    fn bind(&self, _: &Caller, address: &Address) -> Result<()> {
        let address = self.inet(address)?;
        if self.bound.lock().is_some() || !matches!(*self.state.lock(), State::Idle) {
            return Err(Errno::EINVAL);
        }
        let options = self.base.options.lock();
        let ip = address.ip();
        if !options.free_bind && !self.base.shared.is_bindable(ip) {
            return Err(Errno::EADDRNOTAVAIL);
        }
        let dual = self.base.kind.family == AF_INET6
            && ip.is_unspecified()
            && ip.is_ipv6()
            && !options.v6_only;
        let scope = Scope { ip, dual };
        let lease =
            self.base
                .shared
                .tables
                .bind(Transport::Tcp, scope, address.port(), &options)?;
        let mut address = address;
        address.set_port(lease.port());
        *self.bound.lock() = Some(Bound {
            address,
            scope,
            lease: Some(lease),
        });
        Ok(())
    }

    fn listen(&self, _: &Caller, backlog: i32) -> Result<()> {
        // A negative backlog is a very large one (the cast in Linux's listen).
        let backlog = usize::try_from(backlog)
            .unwrap_or(MAX_BACKLOG)
            .min(MAX_BACKLOG);
        match &*self.state.lock() {
            State::Listening { listener, .. } => {
                listener.set_backlog(backlog);
                return Ok(());
            }
            State::Idle => {}
            _ => return Err(Errno::EINVAL),
        }
        self.ensure_bound(unspecified(self.base.kind.family).ip())?;
        let bound = self.bound.lock();
        let bound = bound.as_ref().ok_or(Errno::EINVAL)?;
        if let Some(lease) = &bound.lease {
            lease.listen()?;
        }
        let listener = Listener::new(
            bound.scope,
            bound.address.port(),
            backlog,
            Arc::clone(&self.base.watch),
        );
        let mut on_backend = false;
        if let Some(backend) = &self.base.shared.backend
            && !bound.scope.ip.is_loopback()
        {
            backend.listen(bound.scope, bound.address.port(), backlog)?;
            on_backend = true;
        }
        self.base.shared.tables.add_listener(&listener);
        *self.state.lock() = State::Listening {
            listener,
            on_backend,
        };
        Ok(())
    }

    fn accept(&self) -> Result<(Arc<dyn File>, Address)> {
        let listener = match &*self.state.lock() {
            State::Listening { listener, .. } => Arc::clone(listener),
            _ => return Err(Errno::EINVAL),
        };
        let pending = listener.pop()?;
        let mut options = *self.base.options.lock();
        options.receive_timeout = 0;
        options.send_timeout = 0;
        pending.stream.configure(&options);
        let connection = Connection {
            stream: pending.stream,
            local: pending.local,
            peer: pending.peer,
        };
        let socket = TcpSocket::with(
            &self.base.shared,
            self.base.kind.family,
            pending.watch,
            options,
            State::Connected,
            Some(connection),
        );
        Ok((socket, Address::Inet(pending.peer)))
    }

    fn connect(&self, caller: &Caller, address: &Address) -> Result<()> {
        match *self.state.lock() {
            State::Connected if self.unannounced.swap(false, Ordering::Relaxed) => return Ok(()),
            State::Connected | State::Listening { .. } => return Err(Errno::EISCONN),
            State::Connecting { .. } => return Err(Errno::EALREADY),
            State::Closed => return Err(Errno::EBADF),
            State::Idle => {}
        }
        if let Some(error) = self.error.lock().take() {
            return Err(error);
        }
        if matches!(address, Address::Unspecified) {
            // Nothing to dissolve.
            return Ok(());
        }
        let mut to = self.inet(address).map_err(|error| match error {
            Errno::EINVAL => Errno::ENETUNREACH,
            other => other,
        })?;
        if to.ip().is_unspecified() {
            to.set_ip(loopback_like(to.ip()));
        }
        if self.base.shared.is_own(to.ip()) {
            return self.connect_local(to, caller);
        }
        let backend = self
            .base
            .shared
            .backend
            .as_ref()
            .ok_or(Errno::ENETUNREACH)?;
        let from = self.bound.lock().as_ref().map(|bound| bound.address);
        if from.is_some_and(|from| from.ip().is_loopback()) {
            // Nothing comes back to a loopback address.
            return Err(Errno::EINVAL);
        }
        *self.state.lock() = State::Connecting {
            attempt: None,
            waiting: None,
        };
        let options = *self.base.options.lock();
        match backend.connect(&self.this, &self.base.watch, from, to, &options) {
            Ok(number) => {
                if let State::Connecting { attempt, .. } = &mut *self.state.lock() {
                    *attempt = Some(number);
                }
                Err(Errno::EINPROGRESS)
            }
            Err(error) => {
                *self.state.lock() = State::Idle;
                Err(error)
            }
        }
    }

    fn finish_connect(&self) -> Result<()> {
        match *self.state.lock() {
            State::Connecting { .. } => return Err(Errno::EAGAIN),
            State::Connected => {
                self.unannounced.store(false, Ordering::Relaxed);
                return Ok(());
            }
            _ => {}
        }
        Err(self.take_error().unwrap_or(Errno::ECONNABORTED))
    }

    fn local_address(&self) -> Result<Address> {
        if let Some(connection) = self.connection.get() {
            return Ok(Address::Inet(connection.local));
        }
        let bound = self.bound.lock().as_ref().map(|bound| bound.address);
        Ok(Address::Inet(
            bound.unwrap_or(unspecified(self.base.kind.family)),
        ))
    }

    fn peer_address(&self) -> Result<Address> {
        self.connection
            .get()
            .map(|connection| Address::Inet(connection.peer))
            .ok_or(Errno::ENOTCONN)
    }

    fn send(&self, _: &Caller, source: &mut Source<'_>, message: &mut Outgoing) -> Result<usize> {
        if !message.files.is_empty() {
            return Err(Errno::EINVAL);
        }
        match self.connection.get() {
            Some(connection) => connection.stream.send(source, message.more),
            None => self.put(source),
        }
    }

    fn receive(&self, sink: &mut Sink<'_>, peek: bool) -> Result<Incoming> {
        self.stream()?.receive(sink, peek).map(Incoming::bytes)
    }

    fn shutdown(&self, read: bool, write: bool) -> Result<()> {
        if let Some(connection) = self.connection.get() {
            self.write_closed.fetch_or(write, Ordering::Relaxed);
            return connection.stream.shutdown(read, write);
        }
        if read && self.is_listening() {
            let bound = self.bound.lock().take();
            self.end();
            *self.state.lock() = State::Idle;
            *self.bound.lock() = bound;
            self.base
                .watch
                .notify(Readiness::READABLE | Readiness::HANGUP);
            return Ok(());
        }
        Err(Errno::ENOTCONN)
    }

    fn set_option(&self, level: i32, name: u32, value: &[u8]) -> Result<()> {
        let mut options = self.base.options.lock();
        if level == LEVEL_IPV6 && name == linux::IPV6_V6ONLY && self.bound.lock().is_some() {
            return Err(Errno::EINVAL);
        }
        options.set(self.base.kind, level, name, value)?;
        if let Some(connection) = self.connection.get() {
            connection.stream.configure(&options);
        }
        Ok(())
    }

    fn take_error(&self) -> Option<Errno> {
        let own = self.error.lock().take();
        own.or_else(|| {
            self.connection
                .get()
                .and_then(|connection| connection.stream.take_error())
        })
    }

    fn is_listening(&self) -> bool {
        matches!(*self.state.lock(), State::Listening { .. })
    }

    fn own_option(&self, level: i32, name: u32) -> Option<Vec<u8>> {
        match (level, name) {
            (LEVEL_TCP, linux::TCP_INFO) => Some(self.information()),
            _ => None,
        }
    }

    fn is_stream(&self) -> bool {
        true
    }

    fn queued(&self) -> (usize, usize) {
        self.connection
            .get()
            .map_or((0, 0), |connection| connection.stream.queued())
    }
}

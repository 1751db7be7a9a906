//! Listening, connections and the graceful stop: one thread that waits for its sockets with epoll.
//!
//! hyper speaks HTTP; the loop below is what it needs of a runtime. A general one (tokio) would do it too, but its start, its
//! signals and its timers were a third of what this program runs until its first response, which counts where a unikernel starts
//! for it.

use std::{
    convert::Infallible,
    fmt,
    future::{Ready, ready},
    io,
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Wake, Waker},
    time::{Duration, Instant},
};

use http_body::Body as _;
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::Service};
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{
    event::{
        Timespec,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
    },
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

use crate::{
    body::SiteBody,
    clock::Clock,
    connection::Connection,
    find::Root,
    log::{self, Entry, Log},
    options::Options,
    respond::Site,
};

/// How long a client may take over the head of its next request before its connection is closed.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a stop waits for requests in flight.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failed accept (out of descriptors): trying at once would only burn the processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Most bytes of a request's head. Also bounds what a connection holds.
const HEAD_BYTES: usize = 16 * 1024;
/// Connections that may wait to be accepted; the system lowers it to its own limit.
const BACKLOG: i32 = 4096;

/// Why the server could not start.
#[derive(Debug)]
pub enum ServerError {
    /// The directory to serve cannot be opened.
    Root(std::path::PathBuf, Errno),
    /// An address cannot be listened on.
    Listen(SocketAddr, Errno),
    /// The system does not give what any server needs.
    System(io::Error),
}

impl fmt::Display for ServerError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root(path, Errno::NOSYS) => write!(
                formatter,
                "cannot open {}: the system lacks openat2, which keeps all files outside it out of reach; \
                 use Linux 5.6 or newer",
                path.display()
            ),
            Self::Root(path, error) => write!(
                formatter,
                "cannot open {}: {error}; name the directory to serve with --root",
                path.display()
            ),
            Self::Listen(address, error) => write!(
                formatter,
                "cannot listen on {address}: {error}; choose another address with --listen"
            ),
            Self::System(error) => write!(formatter, "cannot start: {error}"),
        }
    }
}

impl From<io::Error> for ServerError {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

impl From<Errno> for ServerError {
    fn from(error: Errno) -> Self {
        Self::System(error.into())
    }
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
///
/// Whatever prevents the start; afterwards nothing does but a system that refuses to wait.
pub fn run(options: &Options) -> Result<(), ServerError> {
    let root = Root::open(&options.root)
        .map_err(|error| ServerError::Root(options.root.clone(), error))?;
    allow_many_connections();
    // Before the first connection: a signal must never end a request half way.
    let signals = signals()?;
    let listeners = listeners(&options.listen)?;
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    watch(&epoll, &signals, SIGNALS, EventFlags::IN)?;
    for (token, listener) in (LISTENERS..).zip(&listeners) {
        watch(&epoll, &listener.socket, token, EventFlags::IN)?;
        log::print(&format!("listening on http://{}\n", listener.address));
    }
    let clock = Clock::new();
    let mut builder = http1::Builder::new();
    builder
        .timer(clock.clone())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES);
    let woken = Arc::new(Woken(AtomicBool::new(false)));
    let server = Server {
        epoll,
        signals,
        connections: Connections {
            first: LISTENERS + listeners.len() as u64,
            slots: Vec::with_capacity(EVENTS),
            free: Vec::new(),
        },
        listeners,
        refused: None,
        again: Vec::new(),
        stop: None,
        builder,
        clock,
        waker: Waker::from(Arc::clone(&woken)),
        woken,
        site: Rc::new(Site::new(root, options.max_age)),
        log: options.log.then(|| Rc::new(Log::new())),
    };
    server.serve()
}

/// Raises the limit of open files to what the system allows. Without it the server works, for fewer clients.
fn allow_many_connections() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: limit.maximum,
                maximum: limit.maximum,
            },
        );
    }
}

/// SIGTERM and SIGINT, to be read. Blocked as they are, they interrupt nothing; neither does SIGPIPE: a client that goes away is
/// an error of the write.
fn signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    let stop = set;
    set.add(Signal::SIGPIPE);
    set.thread_block()?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    Ok(SignalFd::with_flags(&stop, flags)?)
}

/// Opens the sockets: the given ones, or port 80 of everything.
fn listeners(addresses: &[SocketAddr]) -> Result<Vec<Listener>, ServerError> {
    if addresses.is_empty() {
        let everything = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 80);
        let listener = listen(everything, false).or_else(|error| {
            if matches!(error, Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) {
                let everything = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 80);
                listen(everything, false).map_err(|error| ServerError::Listen(everything, error))
            } else {
                Err(ServerError::Listen(everything, error))
            }
        })?;
        return Ok(vec![listener]);
    }
    addresses
        .iter()
        .map(|&address| {
            // `[::]` takes IPv4 too, unless that has a socket of its own.
            let only_v6 = addresses
                .iter()
                .any(|other| other.is_ipv4() && other.port() == address.port());
            listen(address, only_v6).map_err(|error| ServerError::Listen(address, error))
        })
        .collect()
}

fn listen(mut address: SocketAddr, only_v6: bool) -> Result<Listener, Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket =
        rustix::net::socket_with(family, SocketType::STREAM, SOCKET_FLAGS, Some(ipproto::TCP))?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, only_v6)?;
    }
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    if address.port() == 0 {
        address = rustix::net::getsockname(&socket)?.try_into()?;
    }
    Ok(Listener { socket, address })
}

fn watch(epoll: &OwnedFd, file: impl AsFd, token: u64, events: EventFlags) -> Result<(), Errno> {
    epoll::add(epoll, file, EventData::new_u64(token), events)
}

/// Flags of every socket.
const SOCKET_FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);
/// By what epoll tells the signals' file.
const SIGNALS: u64 = 0;
/// By what epoll tells the first listening socket; the next ones, then the connections, have the numbers that follow.
const LISTENERS: u64 = 1;
/// How many events are taken at once.
const EVENTS: usize = 256;

/// A listening socket.
struct Listener {
    socket: OwnedFd,
    /// With the port that the system chose, if it was to choose one.
    address: SocketAddr,
}

struct Server {
    epoll: OwnedFd,
    signals: SignalFd,
    listeners: Vec<Listener>,
    /// Until when nothing is accepted, after a failure.
    refused: Option<Instant>,
    connections: Connections,
    /// Connections with more to do than they took at once.
    again: Vec<u64>,
    /// Set once the server is to stop: until when requests in flight are waited for.
    stop: Option<Instant>,
    builder: http1::Builder,
    clock: Clock,
    waker: Waker,
    woken: Arc<Woken>,
    site: Rc<Site>,
    /// Nothing for a server without log.
    log: Option<Rc<Log>>,
}

impl Server {
    fn serve(mut self) -> Result<(), ServerError> {
        let mut buffer = [MaybeUninit::<Event>::uninit(); EVENTS];
        loop {
            let timeout = self.timeout();
            let events = match epoll::wait(&self.epoll, &mut buffer, timeout.as_ref()) {
                Ok((events, _)) => events,
                // By SIGSTOP and SIGCONT.
                Err(Errno::INTR) => &mut [],
                Err(error) => return Err(error.into()),
            };
            for token in std::mem::take(&mut self.again) {
                self.drive(token);
            }
            for event in events {
                let token = event.data.u64();
                if token >= self.connections.first {
                    if let Some(connection) = self.connections.get(token) {
                        connection.note(event.flags);
                        self.drive(token);
                    }
                } else if token >= LISTENERS {
                    self.accept((token - LISTENERS) as usize);
                } else if self.is_told_to_stop() {
                    // For the second time: now.
                    self.stop = Some(Instant::now());
                }
            }
            if timeout.is_some() {
                self.look_at_the_time();
            }
            if let Some(log) = &self.log {
                log.write();
            }
            if self
                .stop
                .is_some_and(|end| self.connections.is_empty() || end <= Instant::now())
            {
                return Ok(());
            }
        }
    }

    /// How long to wait at most; nothing for as long as it takes.
    fn timeout(&self) -> Option<Timespec> {
        if !self.again.is_empty() {
            return Some(Timespec::default());
        }
        let next = [self.clock.next(), self.refused, self.stop]
            .into_iter()
            .flatten()
            .min()?;
        let time = next.saturating_duration_since(Instant::now());
        // Up to the next millisecond, which is what epoll counts in: waking too early would be for nothing.
        (time + Duration::from_millis(1)).try_into().ok()
    }

    /// Does what has become due.
    fn look_at_the_time(&mut self) {
        let now = Instant::now();
        if self.clock.next().is_some_and(|next| next <= now) {
            self.clock.reset();
            for token in self.connections.tokens() {
                self.drive(token);
            }
        }
        if self.refused.is_some_and(|end| end <= now) {
            self.refused = None;
            self.watch_listeners(EventFlags::IN);
        }
    }

    /// Accepts one connection. The listener is reported again while there are more.
    fn accept(&mut self, listener: usize) {
        let Some(listener) = self.listeners.get(listener) else {
            return;
        };
        match rustix::net::acceptfrom_with(&listener.socket, SOCKET_FLAGS) {
            Ok((socket, peer)) => {
                let client = peer
                    .and_then(|peer| SocketAddr::try_from(peer).ok())
                    .map_or(Ipv6Addr::UNSPECIFIED.into(), |peer| peer.ip());
                // The response's last piece must not wait for an acknowledgement. A socket that refuses is slow, not wrong.
                let _ = sockopt::set_tcp_nodelay(&socket, true);
                let answers = Answers {
                    site: Rc::clone(&self.site),
                    log: self.log.clone(),
                    client,
                };
                let connection = Connection::new(socket, &self.builder, answers);
                let token = self.connections.add(connection);
                // Its request may be there already.
                self.drive(token);
            }
            // The client has gone away again.
            Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => {}
            Err(error) => {
                eprintln!("kiln-site-server: cannot accept a connection: {error}");
                self.refused = Some(Instant::now() + ACCEPT_PAUSE);
                self.watch_listeners(EventFlags::empty());
            }
        }
    }

    fn watch_listeners(&self, events: EventFlags) {
        for (token, listener) in (LISTENERS..).zip(&self.listeners) {
            // Cannot fail for what is watched already.
            let _ = epoll::modify(
                &self.epoll,
                &listener.socket,
                EventData::new_u64(token),
                events,
            );
        }
    }

    /// Lets a connection do what it can, and drops it when it has ended.
    fn drive(&mut self, token: u64) {
        let Some(connection) = self.connections.get(token) else {
            return;
        };
        let mut ended = connection
            .poll(&mut Context::from_waker(&self.waker))
            .is_ready();
        if !ended && let Some((events, known)) = connection.to_watch() {
            let data = EventData::new_u64(token);
            let watched = if known {
                epoll::modify(&self.epoll, &*connection, data, events)
            } else {
                epoll::add(&self.epoll, &*connection, data, events)
            };
            // A connection that cannot be watched would never be served.
            ended = watched.is_err();
        }
        let again = self.woken.0.swap(false, Relaxed);
        if ended {
            self.connections.remove(token);
        } else if again {
            self.again.push(token);
        }
    }

    /// Takes a signal and begins to stop: accepts no more, and finishes the requests in flight. True if that is under way already.
    fn is_told_to_stop(&mut self) -> bool {
        if !matches!(self.signals.read_signal(), Ok(Some(_))) {
            return false;
        }
        if self.stop.is_some() {
            return true;
        }
        self.stop = Some(Instant::now() + STOP_TIMEOUT);
        self.listeners.clear();
        for token in self.connections.tokens() {
            if let Some(connection) = self.connections.get(token) {
                connection.finish();
                self.drive(token);
            }
        }
        false
    }
}

/// The open connections, each with a number until it ends.
struct Connections {
    /// The first one's number.
    first: u64,
    slots: Vec<Option<Box<Connection>>>,
    /// Slots without a connection.
    free: Vec<usize>,
}

impl Connections {
    fn add(&mut self, connection: Connection) -> u64 {
        let connection = Some(Box::new(connection));
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot] = connection;
                slot
            }
            None => {
                self.slots.push(connection);
                self.slots.len() - 1
            }
        };
        self.first + slot as u64
    }

    fn slot(&self, token: u64) -> usize {
        (token - self.first) as usize
    }

    fn get(&mut self, token: u64) -> Option<&mut Connection> {
        let slot = self.slot(token);
        self.slots.get_mut(slot)?.as_deref_mut()
    }

    fn remove(&mut self, token: u64) {
        let slot = self.slot(token);
        if self.slots.get_mut(slot).and_then(Option::take).is_some() {
            self.free.push(slot);
        }
    }

    fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Numbers among which those of all connections are.
    fn tokens(&self) -> std::ops::Range<u64> {
        self.first..self.first + self.slots.len() as u64
    }
}

/// Set when a connection wants to be polled again though its socket has no news. One for all: only the connection
/// that is polled can ask, since nothing else runs.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Relaxed);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.store(true, Relaxed);
    }
}

/// Answers the requests of one connection.
pub struct Answers {
    site: Rc<Site>,
    log: Option<Rc<Log>>,
    client: IpAddr,
}

impl Service<Request<Incoming>> for Answers {
    type Response = Response<SiteBody>;
    type Error = Infallible;
    type Future = Ready<Result<Response<SiteBody>, Infallible>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let response = self.site.answer(&request);
        if let Some(log) = &self.log {
            let length = response.body().size_hint().exact().unwrap_or_default();
            log.add(Entry::new(self.client, request, response.status(), length));
        }
        ready(Ok(response))
    }
}

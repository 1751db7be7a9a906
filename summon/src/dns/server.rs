//! The name server's sockets, and what waits.
//!
//! A loop of our own rather than hickory-server's: that one decodes each message wholly and starts a task for it, has no
//! notion of answers that wait with a bound, and does not leave truncation and dropping to us. Here warm names are
//! answered where they are read, a batch at a time (recvmmsg); only what has to wait gets a task.
//!
//! Always holds: no timer runs while nobody is connected and nothing is being forwarded; what waits is bounded.

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr, TcpListener as StdListener, UdpSocket as StdUdp},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{TcpListener, TcpStream, UdpSocket, tcp::OwnedReadHalf},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
    task::JoinSet,
    time::timeout,
};

use super::{
    answer::{self, Circumstances, NETWORK_ERROR, Outcome},
    forward::{Forward, Forwarder, with_id},
    network::is_near,
    query::{self, HEADER},
    statistics::{Counters, Statistics, count},
    zone::{Found, NotReady, Unit, Zone},
};

/// Room for what one receive may bring: the kernel joins datagrams of one sender up to this (UDP_GRO). Only touched as
/// far as it is used.
const RECEIVE: usize = 64 * 1024;
/// What the kernel is asked to hold of queries that are not yet read, bytes.
const BACKLOG: usize = 4 << 20;

/// How the name server is to be.
#[derive(Clone, Debug)]
pub struct Configuration {
    /// Where it listens, over UDP and TCP. Port 0: any free one, the same for both. `[::]` is IPv6 alone.
    pub listen: Vec<SocketAddr>,
    /// Who is asked about names that are not ours.
    pub forward: Forward,
    /// For whom. Empty: for clients with loopback, link-local and private addresses.
    pub forward_for: Vec<IpNet>,
    /// The file with the system's name servers, for [`Forward::System`].
    pub resolv_conf: PathBuf,
    /// Bounds.
    pub limits: Limits,
}

impl Default for Configuration {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 53))],
            forward: Forward::System,
            forward_for: Vec::new(),
            resolv_conf: "/etc/resolv.conf".into(),
            limits: Limits::default(),
        }
    }
}

/// What the name server takes on at most.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Queries that wait for units; over it, queries are dropped and counted.
    pub waiting: usize,
    /// Queries passed on to other servers and not yet answered; over it, they are dropped and counted.
    pub forwarding: usize,
    /// TCP connections; over it, new ones are closed.
    pub connections: usize,
    /// Unanswered queries of one TCP connection; over it, no more are read from it.
    pub queries_per_connection: usize,
    /// How long a TCP connection may be silent without a query open.
    pub idle: Duration,
    /// Longest answer over UDP, bytes: what passes through networks without fragments.
    pub payload: u16,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            waiting: 8192,
            forwarding: 256,
            connections: 256,
            queries_per_connection: 64,
            idle: Duration::from_secs(10),
            payload: 1232,
        }
    }
}

/// Why the name server cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No address given.
    #[error("the name server has nowhere to listen: give it an address, as in \"127.0.0.1:53\"")]
    Nowhere,
    /// The address cannot be listened on.
    #[error(
        "the name server cannot listen on {address} ({protocol}): {cause}{}",
        remedy(cause)
    )]
    Listen {
        /// Which.
        address: SocketAddr,
        /// UDP or TCP.
        protocol: &'static str,
        /// Why.
        cause: io::Error,
    },
}

fn remedy(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::PermissionDenied => {
            "; ports below 1024 are root's: run as root, or listen on another port, as in \"127.0.0.1:5353\""
        }
        io::ErrorKind::AddrInUse => {
            "; another name server is there: stop it, or listen on another address or port"
        }
        io::ErrorKind::AddrNotAvailable => "; it is no address of this machine",
        _ => "",
    }
}

/// The name server. Clones are the same server.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

struct Inner {
    zone: Arc<ArcSwap<Zone>>,
    counters: Counters,
    forwarder: Forwarder,
    forward_for: Vec<IpNet>,
    limits: Limits,
    addresses: Vec<SocketAddr>,
    /// Taken by `run`.
    sockets: Mutex<Vec<(StdUdp, StdListener)>>,
    stop: watch::Sender<bool>,
    pending: Arc<Pending>,
}

/// Who waits, so that a client that asks again is not answered twice, and so that there are not too many.
#[derive(Default)]
struct Pending {
    queries: Mutex<HashSet<Repeated>>,
    number: AtomicUsize,
    forwarded: AtomicUsize,
}

/// What makes a query over UDP the same as another.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Repeated {
    from: SocketAddr,
    to: Option<IpAddr>,
    id: [u8; 2],
    question: u64,
}

/// A place among those who wait; given back at its end.
struct Ticket {
    pending: Arc<Pending>,
    repeated: Option<Repeated>,
    forwarded: bool,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let counter = if self.forwarded {
            &self.pending.forwarded
        } else {
            &self.pending.number
        };
        counter.fetch_sub(1, Ordering::Relaxed);
        if let Some(repeated) = &self.repeated {
            self.pending
                .queries
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(repeated);
        }
    }
}

impl Pending {
    fn is_repeated(&self, query: &Repeated) -> bool {
        self.queries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(query)
    }

    fn nobody(&self) -> bool {
        self.number.load(Ordering::Relaxed) == 0 && self.forwarded.load(Ordering::Relaxed) == 0
    }

    fn enter(
        self: &Arc<Self>,
        repeated: Option<Repeated>,
        forwarded: bool,
        most: usize,
    ) -> Option<Ticket> {
        let counter = if forwarded {
            &self.forwarded
        } else {
            &self.number
        };
        if counter.fetch_add(1, Ordering::Relaxed) >= most {
            counter.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        if let Some(repeated) = repeated {
            self.queries
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(repeated);
        }
        Some(Ticket {
            pending: Arc::clone(self),
            repeated,
            forwarded,
        })
    }
}

/// A query that waits: all that is needed to answer it.
struct Waiting {
    message: Vec<u8>,
    under: Circumstances,
    _ticket: Ticket,
}

impl Server {
    /// Takes the sockets. Queries wait in them until [`Server::run`].
    pub async fn bind(configuration: Configuration, zone: Zone) -> Result<Self, Error> {
        if configuration.listen.is_empty() {
            return Err(Error::Nowhere);
        }
        let mut sockets = Vec::new();
        let mut addresses = Vec::new();
        for address in configuration.listen {
            let (udp, tcp, bound) = bind_both(address)?;
            addresses.push(bound);
            sockets.push((udp, tcp));
        }
        Ok(Self(Arc::new(Inner {
            zone: Arc::new(ArcSwap::from_pointee(zone)),
            counters: Counters::default(),
            forwarder: Forwarder::new(
                configuration.forward,
                configuration.resolv_conf,
                addresses.clone(),
            ),
            forward_for: configuration.forward_for,
            limits: configuration.limits,
            addresses,
            sockets: Mutex::new(sockets),
            stop: watch::Sender::new(false),
            pending: Arc::default(),
        })))
    }

    /// What it knows: store another to replace it. Takes effect with the next query.
    pub fn zone(&self) -> Arc<ArcSwap<Zone>> {
        Arc::clone(&self.0.zone)
    }

    /// Replaces what it knows.
    pub fn set_zone(&self, zone: Zone) {
        self.0.zone.store(Arc::new(zone));
    }

    /// Where it listens, with the ports it got, in the order of the configuration.
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &self.0.addresses
    }

    /// What it has counted.
    pub fn statistics(&self) -> Statistics {
        self.0.counters.read()
    }

    /// Queries that wait for a unit now, and queries passed on and not yet answered.
    pub fn waiting(&self) -> (usize, usize) {
        let pending = &self.0.pending;
        (
            pending.number.load(Ordering::Relaxed),
            pending.forwarded.load(Ordering::Relaxed),
        )
    }

    /// Serves until [`Server::shutdown`]; then the sockets are closed. A second call returns at once.
    pub async fn run(&self) -> Result<(), Error> {
        let sockets = std::mem::take(
            &mut *self
                .0
                .sockets
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let mut tasks = JoinSet::new();
        for ((udp, tcp), &address) in sockets.into_iter().zip(&self.0.addresses) {
            let failed = |protocol| {
                move |cause| Error::Listen {
                    address,
                    protocol,
                    cause,
                }
            };
            let udp = Udp::new(udp, address).map_err(failed("UDP"))?;
            let tcp = TcpListener::from_std(tcp).map_err(failed("TCP"))?;
            tasks.spawn(Arc::clone(&self.0).serve_udp(Arc::new(udp)));
            tasks.spawn(Arc::clone(&self.0).serve_tcp(tcp));
        }
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended
                && error.is_panic()
            {
                std::panic::resume_unwind(error.into_panic());
            }
        }
        Ok(())
    }

    /// Ends [`Server::run`]. Queries that wait are not answered: their clients ask again, whoever is there then.
    pub fn shutdown(&self) {
        self.0.stop.send_replace(true);
    }
}

/// One port for UDP and TCP.
fn bind_both(address: SocketAddr) -> Result<(StdUdp, StdListener, SocketAddr), Error> {
    let mut tries = if address.port() == 0 { 16 } else { 1 };
    loop {
        tries -= 1;
        let failed = |protocol, address| {
            move |cause| Error::Listen {
                address,
                protocol,
                cause,
            }
        };
        let tcp = bind_tcp(address).map_err(failed("TCP", address))?;
        let bound = tcp.local_addr().map_err(failed("TCP", address))?;
        match bind_udp(bound) {
            Ok(udp) => return Ok((udp, tcp, bound)),
            Err(cause) if tries > 0 && cause.kind() == io::ErrorKind::AddrInUse => {}
            Err(cause) => return Err(failed("UDP", bound)(cause)),
        }
    }
}

fn socket(address: SocketAddr, kind: SocketType) -> io::Result<std::os::fd::OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    Ok(socket)
}

fn bind_tcp(address: SocketAddr) -> io::Result<StdListener> {
    let socket = socket(address, SocketType::STREAM)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, 128)?;
    Ok(socket.into())
}

fn bind_udp(address: SocketAddr) -> io::Result<StdUdp> {
    let socket = socket(address, SocketType::DGRAM)?;
    // A thousand clients may ask within a moment. The kernel gives what it is allowed to.
    if sockopt::set_socket_recv_buffer_size_force(&socket, BACKLOG).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(&socket, BACKLOG);
    }
    rustix::net::bind(&socket, &address)?;
    Ok(socket.into())
}

/// A UDP socket.
struct Udp {
    socket: UdpSocket,
    state: UdpSocketState,
    /// It listens on all addresses: an answer has to say from which it comes.
    any: bool,
}

/// Where an answer over UDP goes, and from where.
#[derive(Clone, Copy)]
struct Peer {
    from: SocketAddr,
    to: Option<IpAddr>,
}

impl Udp {
    fn new(socket: StdUdp, address: SocketAddr) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self {
            socket: UdpSocket::from_std(socket)?,
            state,
            any: address.ip().is_unspecified(),
        })
    }

    async fn send(&self, peer: Peer, answer: &[u8]) -> io::Result<()> {
        let transmit = Transmit {
            destination: peer.from,
            ecn: None,
            contents: answer,
            segment_size: None,
            src_ip: peer.to,
        };
        let send = || self.state.try_send((&self.socket).into(), &transmit);
        match send() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.socket.async_io(Interest::WRITABLE, send).await
            }
            other => other,
        }
    }
}

fn digest(question: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    question.hash(&mut hasher);
    hasher.finish()
}

impl Inner {
    fn under(&self, client: IpAddr, tcp: bool) -> Circumstances {
        let near = || {
            if self.forward_for.is_empty() {
                is_near(client)
            } else {
                self.forward_for
                    .iter()
                    .any(|network| network.contains(&client))
            }
        };
        Circumstances {
            tcp,
            forwarding: self.forwarder.is_on() && near(),
            payload: self.limits.payload.max(512),
        }
    }

    async fn serve_udp(self: Arc<Self>, udp: Arc<Udp>) {
        let mut stop = self.stop.subscribe();
        let mut room = vec![0; BATCH_SIZE * RECEIVE];
        let mut about = [RecvMeta::default(); BATCH_SIZE];
        let mut out = Vec::with_capacity(usize::from(self.limits.payload.max(512)));
        loop {
            let received = tokio::select! {
                biased;
                received = udp.socket.async_io(Interest::READABLE, || {
                    let mut rooms = room.chunks_exact_mut(RECEIVE);
                    let mut slices: [_; BATCH_SIZE] =
                        std::array::from_fn(|_| IoSliceMut::new(rooms.next().unwrap_or_default()));
                    udp.state.recv((&udp.socket).into(), &mut slices, &mut about)
                }) => received,
                _ = stop.wait_for(|&stop| stop) => return,
            };
            let number = match received {
                Ok(number) => number,
                Err(error) => {
                    tracing::warn!(%error, "name server: cannot receive");
                    // It may last: not at full speed.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            };
            if *stop.borrow() {
                return;
            }
            for (room, about) in room.chunks_exact(RECEIVE).zip(&about).take(number) {
                let peer = Peer {
                    from: about.addr,
                    to: about.dst_ip.filter(|_| udp.any),
                };
                let Some(messages) = room.get(..about.len) else {
                    continue;
                };
                // A datagram without bytes has no chunk.
                if messages.is_empty() {
                    count(&self.counters.udp);
                    count(&self.counters.dropped_malformed);
                }
                for message in messages.chunks(about.stride.max(1)) {
                    count(&self.counters.udp);
                    self.datagram(&udp, peer, message, &mut out).await;
                }
            }
        }
    }

    async fn datagram(
        self: &Arc<Self>,
        udp: &Arc<Udp>,
        peer: Peer,
        message: &[u8],
        out: &mut Vec<u8>,
    ) {
        // Nobody can be answered at port 0.
        if peer.from.port() == 0 {
            count(&self.counters.dropped_malformed);
            return;
        }
        let repeated = || {
            Some(Repeated {
                from: peer.from,
                to: peer.to,
                id: *message.first_chunk()?,
                question: digest(message.get(HEADER..)?),
            })
        };
        if !self.pending.nobody()
            && repeated().is_some_and(|query| self.pending.is_repeated(&query))
        {
            count(&self.counters.repeated);
            return;
        }
        let under = self.under(peer.from.ip(), false);
        let outcome = answer::respond(&self.zone.load(), message, under, out);
        match outcome {
            Outcome::Send(sent) => {
                self.counters.sent(sent);
                self.send(udp, peer, out).await;
            }
            Outcome::Silence => count(&self.counters.dropped_malformed),
            Outcome::Wait(told) => {
                let Some(waiting) = self.enter(message, under, repeated(), false) else {
                    return;
                };
                let (server, udp) = (Arc::clone(self), Arc::clone(udp));
                tokio::spawn(async move {
                    if let Some((answer, unit)) = server.wait(waiting, told).await {
                        server.send(&udp, peer, &answer).await;
                        if let Some(unit) = unit {
                            unit.answered();
                        }
                    }
                });
            }
            Outcome::Forward => {
                let Some(waiting) = self.enter(message, under, repeated(), true) else {
                    return;
                };
                let (server, udp) = (Arc::clone(self), Arc::clone(udp));
                tokio::spawn(async move {
                    if let Some(answer) = server.ask_others(waiting).await {
                        server.send(&udp, peer, &answer).await;
                    }
                });
            }
        }
    }

    async fn send(&self, udp: &Udp, peer: Peer, answer: &[u8]) {
        if let Err(error) = udp.send(peer, answer).await {
            count(&self.counters.unsent);
            tracing::debug!(%error, to = %peer.from, "name server: cannot send");
        }
    }

    /// Lets a query wait, unless too many do.
    fn enter(
        &self,
        message: &[u8],
        under: Circumstances,
        repeated: Option<Repeated>,
        forwarded: bool,
    ) -> Option<Waiting> {
        let most = if forwarded {
            self.limits.forwarding
        } else {
            self.limits.waiting
        };
        let Some(ticket) = self.pending.enter(repeated, forwarded, most) else {
            count(&self.counters.dropped_busy);
            return None;
        };
        count(if forwarded {
            &self.counters.forwarded
        } else {
            &self.counters.waited
        });
        Some(Waiting {
            message: message.to_vec(),
            under,
            _ticket: ticket,
        })
    }

    /// Waits for a unit; its answer, and who is to be told when it is sent.
    async fn wait(
        &self,
        waiting: Waiting,
        told: oneshot::Receiver<Result<(), NotReady>>,
    ) -> Option<(Vec<u8>, Option<Arc<dyn Unit>>)> {
        let mut stop = self.stop.subscribe();
        let ready = tokio::select! {
            told = told => told.unwrap_or_else(|_| Err(NotReady("the unit was given up".into()))),
            _ = stop.wait_for(|&stop| stop) => return None,
        };
        // What holds now: a reload may have come meanwhile.
        let zone = self.zone.load();
        let mut answer = Vec::with_capacity(128);
        let message = &waiting.message;
        let sent = answer::finish(&zone, message, waiting.under, ready, &mut answer)?;
        self.counters.sent(sent);
        let unit = query::read(message)
            .ok()
            .and_then(|query| match zone.find(query.name()) {
                Found::Node(node, _) => node.unit.clone(),
                _ => None,
            });
        Some((answer, unit))
    }

    /// Asks others; SERVFAIL if that fails.
    async fn ask_others(&self, waiting: Waiting) -> Option<Vec<u8>> {
        let mut stop = self.stop.subscribe();
        let (message, under) = (&waiting.message, waiting.under);
        let asked = tokio::select! {
            asked = self.forwarder.ask(message, under.tcp, &self.counters) => asked,
            _ = stop.wait_for(|&stop| stop) => return None,
        };
        match asked {
            Ok(answer) => Some(with_id(&answer, *message.first_chunk()?)),
            Err(error) => {
                count(&self.counters.forward_failed);
                tracing::debug!(%error, "name server: a query that was passed on has no answer");
                let mut answer = Vec::new();
                let text = error.to_string();
                let sent = answer::fail(message, under, NETWORK_ERROR, &text, &mut answer)?;
                self.counters.code(sent.code);
                Some(answer)
            }
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        let mut stop = self.stop.subscribe();
        let places = Arc::new(Semaphore::new(self.limits.connections));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
                _ = stop.wait_for(|&stop| stop) => return,
            };
            match accepted {
                Ok((stream, client)) => {
                    count(&self.counters.connections);
                    let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                        count(&self.counters.connections_refused);
                        continue;
                    };
                    connections.spawn(Arc::clone(&self).connection(stream, client.ip(), place));
                }
                Err(error) => {
                    tracing::warn!(%error, "name server: cannot accept a connection");
                    // No descriptors left, most likely: they come back with time only.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        client: IpAddr,
        _place: OwnedSemaphorePermit,
    ) {
        let _ = stream.set_nodelay(true);
        let idle = self.limits.idle;
        let (read, mut write) = stream.into_split();
        let (answers, mut ready) = mpsc::channel::<Vec<u8>>(1);
        let reader = self.read_queries(read, client, answers);
        let writer = async {
            while let Some(answer) = ready.recv().await {
                // Who does not take answers is not served on.
                match timeout(idle, write.write_all(&answer)).await {
                    Ok(Ok(())) => {}
                    _ => return,
                }
            }
        };
        // The writer ends when the reader has ended and all that waits has been answered.
        tokio::pin!(writer);
        tokio::select! {
            () = reader => writer.await,
            () = &mut writer => {}
        }
    }

    /// Reads queries until the client has said all, says nothing for long, or says nonsense.
    async fn read_queries(
        self: &Arc<Self>,
        mut read: OwnedReadHalf,
        client: IpAddr,
        answers: mpsc::Sender<Vec<u8>>,
    ) {
        let most = self.limits.queries_per_connection.max(1);
        let places = Arc::new(Semaphore::new(most));
        let mut out = Vec::new();
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            let length = {
                let next = read.read_u16();
                tokio::pin!(next);
                loop {
                    match timeout(self.limits.idle, &mut next).await {
                        Ok(Ok(length)) => break usize::from(length),
                        Ok(Err(_)) => return,
                        // Only who has nothing open is idle. (This place is the one that is not in use.)
                        Err(_) if places.available_permits() + 1 == most => return,
                        Err(_) => {}
                    }
                }
            };
            let mut message = vec![0; length];
            match timeout(self.limits.idle, read.read_exact(&mut message)).await {
                Ok(Ok(_)) => {}
                _ => return,
            }
            count(&self.counters.tcp);
            let under = self.under(client, true);
            let outcome = answer::respond(&self.zone.load(), &message, under, &mut out);
            match outcome {
                Outcome::Send(sent) => {
                    self.counters.sent(sent);
                    if answers.send(framed(&out)).await.is_err() {
                        return;
                    }
                }
                Outcome::Silence => {
                    count(&self.counters.dropped_malformed);
                    return;
                }
                Outcome::Wait(told) => {
                    let Some(waiting) = self.enter(&message, under, None, false) else {
                        return;
                    };
                    let (server, answers) = (Arc::clone(self), answers.clone());
                    tokio::spawn(async move {
                        if let Some((answer, unit)) = server.wait(waiting, told).await
                            && answers.send(framed(&answer)).await.is_ok()
                            && let Some(unit) = unit
                        {
                            unit.answered();
                        }
                        drop(place);
                    });
                }
                Outcome::Forward => {
                    let Some(waiting) = self.enter(&message, under, None, true) else {
                        return;
                    };
                    let (server, answers) = (Arc::clone(self), answers.clone());
                    tokio::spawn(async move {
                        if let Some(answer) = server.ask_others(waiting).await {
                            let _ = answers.send(framed(&answer)).await;
                        }
                        drop(place);
                    });
                }
            }
        }
    }
}

/// A message behind its length (RFC 1035, 4.2.2), so that both go out together (RFC 7766, 8).
fn framed(message: &[u8]) -> Vec<u8> {
    // Answers are shorter than LONGEST_MESSAGE.
    let length = message.len() as u16;
    [&length.to_be_bytes(), message].concat()
}

//! TCP: connections, listeners and what binds them to ports. The state machine of one connection is smoltcp's.
//!
//! smoltcp walks all sockets of a set for each packet. So each connection has a set of its own, found by a hash of its
//! addresses and ports, and is worked on only when a segment came for it, its owner used it, or its timer is due.
//!
//! Sources: RFC 9293 (TCP), RFC 6056 (ephemeral ports), RFC 1122 section 4.2. `accept(2)`, `listen(2)`, `tcp(7)` for
//! what the owner sees.
//!
//! What always holds:
//! - A tuple in `tuples` names a connection that exists and is not finished, or a TIME-WAIT record.
//! - What is bound or listens is in `bound`; a connected socket is not.
//! - A connection in TIME-WAIT whose owner has closed it has no buffers: only a record of its last sequence numbers.
//! - A connection whose owner has not closed it keeps its slot, whatever the other end does.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::net::{IpAddr, SocketAddr};
use core::time::Duration;
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet, SocketStorage};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpListenEndpoint};

use crate::link::Link;
use crate::packet::{
    IPV4_HEADER, IPV6_HEADER, IpHeader, IpPacket, TCP, TCP_HEADER, fill_tcp_checksums,
    header_length, ports,
};
use crate::socket::{Error, Event, Events, Readiness, Shutdown, SocketId, Table};
use crate::stack::{Socket, Stack, earlier};
use crate::timer::Timers;
use crate::tuple::{Entry, Tuple, Tuples};
use crate::{Checksums, Configuration, FrameSink, Moment};

/// First and last port that are given out by themselves (`ip_local_port_range` of Linux).
const EPHEMERAL: core::ops::RangeInclusive<u16> = 32768..=60999;
/// How long an unanswered connect goes on (`tcp_syn_retries` of Linux gives 127 s).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(127);
/// How long a connection may stay half open.
const HALF_OPEN_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a connection that its owner has closed may take to end (`tcp_fin_timeout`).
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(60);
/// How long sent data may stay unanswered (`tcp_retries2` of Linux: about 15 minutes).
const SEND_TIMEOUT: Duration = Duration::from_secs(924);

/// How long the acknowledgement of little data waits for an answer to travel with.
const ACKNOWLEDGEMENT_DELAY: Duration = Duration::from_millis(10);

/// Received bytes whose acknowledgement may wait: as much as a question or an answer has. More may be all that the
/// other end has room for, also where it is less than a segment; to hold it up would stall the connection.
const LITTLE: usize = 2048;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// State of a TCP socket, with the names of RFC 9293 section 3.3.2.
pub use smoltcp::socket::tcp::State as TcpState;

/// Probing of an idle connection (`SO_KEEPALIVE`, `TCP_KEEPIDLE`, `TCP_KEEPINTVL`, `TCP_KEEPCNT` of `tcp(7)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive {
    /// Time without any segment before the first probe, and between probes.
    pub idle: Duration,
    /// Time that each unanswered probe adds before the connection counts as dead.
    pub interval: Duration,
    /// Probes that may stay unanswered.
    pub count: u32,
}

/// What the owner set; given on to accepted connections.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    no_delay: bool,
    keep_alive: Option<KeepAlive>,
    hop_limit: Option<u8>,
    reuse_address: bool,
    only_v6: bool,
}

/// A socket that neither listens nor is connected.
#[derive(Default)]
pub(crate) struct Idle {
    bound: Option<SocketAddr>,
    options: Options,
}

/// A listening socket.
pub(crate) struct Listener {
    bound: SocketAddr,
    options: Options,
    backlog: usize,
    /// Established connections that wait to be accepted.
    queue: VecDeque<SocketId>,
    event_queued: bool,
}

/// A connection, from its first segment on.
pub(crate) struct Connection {
    set: SocketSet<'static>,
    handle: SocketHandle,
    tuple: Tuple,
    options: Options,
    /// Both ends are in this stack.
    own: bool,
    /// The state at the last look.
    state: TcpState,
    /// The heap entry that counts.
    armed: Option<Moment>,
    /// In the list of connections to be worked on.
    pending: bool,
    /// A segment came since the last look.
    fresh: bool,
    /// There is a reason to send besides acknowledging data.
    urgent: bool,
    /// Received bytes that may not be acknowledged yet.
    unacknowledged: usize,
    /// Bytes that the owner has taken since the last segment, which made the window larger.
    taken: usize,
    /// When received data is acknowledged at last.
    acknowledge_at: Option<Moment>,
    /// The listener that made it, until it is established.
    listener: Option<SocketId>,
    /// Waits for the owner's word before it answers (intercepted).
    paused: bool,
    /// The owner has closed it.
    orphan: bool,
    /// The owner has aborted it: no error to report.
    aborted: bool,
    /// It has no tuple any more: nothing will come or go.
    finished: bool,
    connected: bool,
    read_closed: bool,
    read_shut: bool,
    error: Option<Error>,
    /// Readiness that the owner has been told of.
    ready: Readiness,
    /// Bytes in the receive buffer that the owner has been told of.
    told: usize,
    event_queued: bool,
    buffer: usize,
    timeout: Option<Duration>,
    trace: Trace,
}

impl Connection {
    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.set.get_mut(self.handle)
    }

    fn socket_ref(&self) -> &tcp::Socket<'static> {
        self.set.get(self.handle)
    }

    fn readiness(&self) -> Readiness {
        let socket = self.socket_ref();
        let mut ready = Readiness::empty();
        ready.set(Readiness::READABLE, socket.recv_queue() > 0);
        ready.set(
            Readiness::WRITABLE,
            socket.may_send() && has_send_space(socket),
        );
        ready.set(
            Readiness::READ_CLOSED,
            self.read_closed || self.read_shut || self.finished,
        );
        ready.set(
            Readiness::WRITE_CLOSED,
            self.finished || (self.connected && !socket.may_send()),
        );
        ready.set(Readiness::CONNECTED, self.connected);
        ready.set(Readiness::ERROR, self.error.is_some());
        ready
    }
}

/// Whether a third of the send buffer is free: as `sk_stream_is_writeable` of Linux, so that writers are not woken for
/// each acknowledged byte.
fn has_send_space(socket: &tcp::Socket<'_>) -> bool {
    (socket.send_capacity() - socket.send_queue()) * 3 >= socket.send_capacity()
}

/// What was last sent on a connection that is being ended: enough to answer in TIME-WAIT.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Trace {
    /// Something was sent since the end began.
    known: bool,
    /// The sequence number behind all that was sent.
    next: u32,
    acknowledgement: u32,
    window: u16,
}

/// All that TCP has besides the sockets themselves.
pub(crate) struct Tcp {
    link: Interface,
    loopback: Interface,
    /// For segments that no connection wants: smoltcp answers them with a reset.
    nobody: SocketSet<'static>,
    tuples: Tuples,
    /// Bound and listening sockets with their ports, sorted by these: seldom more than a few.
    bound: Vec<(u16, SocketId)>,
    pending: Vec<SocketId>,
    /// Connections that had something to send when there was no room.
    blocked: Vec<SocketId>,
    timers: Timers,
    time_wait: VecDeque<(Moment, Tuple)>,
    half_open: usize,
    /// Bytes in the buffers of all connections.
    buffered: usize,
    next_port: u16,
    configuration: Configuration,
}

impl Tcp {
    pub(crate) fn new(configuration: &Configuration, link: &mut Link) -> Tcp {
        let interface = |mtu, seed| {
            let mut capabilities = DeviceCapabilities::default();
            capabilities.medium = Medium::Ip;
            capabilities.max_transmission_unit = mtu;
            // They are verified and filled in here, as those of the other protocols.
            capabilities.checksum = ChecksumCapabilities::ignored();
            let mut config = Config::new(HardwareAddress::Ip);
            config.random_seed = seed;
            let mut interface = Interface::new(
                config,
                &mut Capabilities(capabilities),
                Instant::from_micros(0),
            );
            // The link has checked the destination, also for a gateway that takes all.
            interface.set_any_ip(true);
            interface
        };
        Tcp {
            loopback: interface(65535, link.random()),
            nobody: SocketSet::new(Vec::new()),
            tuples: Tuples::new(link.random()),
            bound: Vec::new(),
            pending: Vec::new(),
            blocked: Vec::new(),
            timers: Timers::default(),
            time_wait: VecDeque::new(),
            half_open: 0,
            buffered: 0,
            next_port: u16::try_from(link.random() % 28000).unwrap_or(0) + EPHEMERAL.start(),
            configuration: configuration.clone(),
            link: interface(link.mtu, link.random()),
        }
    }

    /// The size of each buffer of the next connection: what is left for buffers, so shared that many more fit.
    fn buffer_size(&self) -> usize {
        let share = self
            .configuration
            .buffer_budget
            .saturating_sub(self.buffered)
            / 32;
        let (minimum, maximum) = (
            self.configuration.buffer_minimum.max(1024),
            self.configuration.buffer_maximum,
        );
        (share.max(1).next_power_of_two() / 2).clamp(minimum, maximum.clamp(minimum, 1 << 30))
    }

    /// The first place in `bound` with a port that is not below `port`.
    fn bound_from(&self, port: u16) -> usize {
        self.bound.partition_point(|(other, _)| *other < port)
    }

    /// The sockets that are bound to a port.
    fn bound_to(&self, port: u16) -> impl Iterator<Item = SocketId> {
        let from = self.bound.get(self.bound_from(port)..).unwrap_or_default();
        from.iter()
            .take_while(move |(other, _)| *other == port)
            .map(|(_, id)| *id)
    }

    fn is_bound(&self, port: u16) -> bool {
        self.bound_to(port).next().is_some()
    }

    /// Whether a connection or a TIME-WAIT record has the local port. It looks at them all: only sockets that are bound
    /// without `SO_REUSEADDR` ask.
    fn is_used(&self, port: u16) -> bool {
        self.tuples.iter().any(|tuple| tuple.local.port() == port)
    }

    fn bind(&mut self, port: u16, id: SocketId) {
        let place = self.bound_from(port);
        self.bound.insert(place, (port, id));
    }

    fn unbind(&mut self, id: SocketId) {
        self.bound.retain(|(_, other)| *other != id);
    }

    pub(crate) fn next_deadline(&self) -> Option<Moment> {
        if !self.pending.is_empty() {
            return Some(Moment::ZERO);
        }
        let time_wait = self.time_wait.front().map(|(expires, _)| *expires);
        earlier(self.timers.earliest(), time_wait)
    }
}

/// A device that only says what it can do: smoltcp asks for one when an interface is made.
struct Capabilities(DeviceCapabilities);

impl Device for Capabilities {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Nothing;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Nothing)> {
        None
    }

    fn transmit(&mut self, _: Instant) -> Option<Nothing> {
        None
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.0.clone()
    }
}

/// The token that is never made.
enum Nothing {}

impl TxToken for Nothing {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, _: usize, _: F) -> R {
        match self {}
    }
}

/// One packet handed to smoltcp.
struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(self.0)
    }
}

/// What smoltcp sees as its device while it works on one connection.
struct Port<'a> {
    now: Moment,
    link: &'a mut Link,
    sink: &'a mut dyn FrameSink,
    packet: Option<&'a [u8]>,
    destination: IpAddr,
    own: bool,
    /// Where to note what is sent; None as long as the connection is not being ended.
    trace: Option<&'a mut Trace>,
}

/// Leave to send one packet.
struct Sending<'a> {
    now: Moment,
    link: &'a mut Link,
    sink: &'a mut dyn FrameSink,
    destination: IpAddr,
    own: bool,
    trace: Option<&'a mut Trace>,
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let Sending {
            now,
            link,
            sink,
            destination,
            own,
            trace,
        } = self;
        let summed = !own && link.checksums == Checksums::Software;
        link.send(now, sink, destination, length, |packet| {
            let result = write(packet);
            let header = header_length(&destination);
            if summed {
                fill_tcp_checksums(packet, header);
            }
            if let Some(trace) = trace {
                trace.note(packet, header);
            }
            result
        })
    }
}

impl Trace {
    fn note(&mut self, packet: &[u8], header: usize) {
        let Some((segment, _)) = packet
            .get(header..)
            .and_then(|rest| rest.split_first_chunk::<TCP_HEADER>())
        else {
            return;
        };
        let word = |at: usize| {
            u32::from_be_bytes([
                segment[at],
                segment[at + 1],
                segment[at + 2],
                segment[at + 3],
            ])
        };
        let length = packet.len() - header - usize::from(segment[12] >> 4) * 4;
        let control = u32::from(segment[13] & SYN != 0) + u32::from(segment[13] & FIN != 0);
        let next = word(4)
            .wrapping_add(u32::try_from(length).unwrap_or(0))
            .wrapping_add(control);
        // A retransmission lies behind what was sent before.
        if !self.known || next.wrapping_sub(self.next) < 1 << 31 {
            self.known = true;
            self.next = next;
        }
        self.acknowledgement = word(8);
        self.window = u16::from_be_bytes([segment[14], segment[15]]);
    }
}

impl Device for Port<'_> {
    type RxToken<'b>
        = Received<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Sending<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Sending<'_>)> {
        let packet = self.packet.take()?;
        Some((Received(packet), self.sending()))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        self.link
            .has_room(self.sink, self.own)
            .then(|| self.sending())
    }

    fn capabilities(&self) -> DeviceCapabilities {
        // smoltcp reads them only when the interface is made; here it asks and forgets.
        DeviceCapabilities::default()
    }
}

impl Port<'_> {
    fn sending(&mut self) -> Sending<'_> {
        Sending {
            now: self.now,
            link: self.link,
            sink: self.sink,
            destination: self.destination,
            own: self.own,
            trace: self.trace.as_deref_mut(),
        }
    }
}

/// Whether the owner has ended its direction, so that what is sent is worth noting.
fn is_closing(state: TcpState) -> bool {
    matches!(
        state,
        TcpState::FinWait1
            | TcpState::FinWait2
            | TcpState::Closing
            | TcpState::LastAck
            | TcpState::TimeWait
    )
}

fn instant(now: Moment) -> Instant {
    // Rounded up: a timer that is due must be due for smoltcp too.
    let micros = now.as_secs() as i64 * 1_000_000 + i64::from(now.subsec_nanos().div_ceil(1000));
    Instant::from_micros(micros)
}

fn moment(instant: Instant) -> Moment {
    Moment::from_micros(u64::try_from(instant.total_micros()).unwrap_or(0))
}

fn tell(events: &mut Events, queued: &mut bool, id: SocketId) {
    if !*queued {
        *queued = true;
        events.push(Event::Ready(id));
    }
}

/// Whether two sockets could both want a connection to one address and port.
pub(crate) fn overlap(a: SocketAddr, a_only_v6: bool, b: SocketAddr, b_only_v6: bool) -> bool {
    let (a_any, b_any) = (a.ip().is_unspecified(), b.ip().is_unspecified());
    match (a.is_ipv6(), b.is_ipv6()) {
        (true, true) | (false, false) => a_any || b_any || a.ip() == b.ip(),
        (true, false) => a_any && !a_only_v6,
        (false, true) => b_any && !b_only_v6,
    }
}

/// How the sockets of a port are found and used: everything that the owner calls for TCP.
impl Stack {
    /// A new TCP socket, neither bound nor connected.
    pub fn tcp_open(&mut self) -> SocketId {
        self.sockets.insert(Socket::TcpIdle(Idle::default()))
    }

    fn tcp_options(&mut self, id: SocketId) -> Result<&mut Options, Error> {
        match self.sockets.get_mut(id).ok_or(Error::NoSuchSocket)? {
            Socket::TcpIdle(idle) => Ok(&mut idle.options),
            Socket::TcpListener(listener) => Ok(&mut listener.options),
            Socket::TcpConnection(connection) => Ok(&mut connection.options),
            _ => Err(Error::Invalid),
        }
    }

    /// Sets [`no_delay`](Self::tcp_set_no_delay), probing of an idle connection, and the time to live or hop limit
    /// (`IP_TTL`, `IPV6_UNICAST_HOPS`; None or 0 for the default, 64).
    ///
    /// # Errors
    /// `NoSuchSocket`; `Invalid` for a socket that is not TCP.
    pub fn tcp_configure(
        &mut self,
        id: SocketId,
        no_delay: bool,
        keep_alive: Option<KeepAlive>,
        hop_limit: Option<u8>,
    ) -> Result<(), Error> {
        let options = self.tcp_options(id)?;
        options.no_delay = no_delay;
        options.keep_alive = keep_alive;
        options.hop_limit = hop_limit.filter(|limit| *limit != 0);
        self.tcp_apply_options(id);
        Ok(())
    }

    /// Sends small segments at once (`TCP_NODELAY`), or collects them until the last one is acknowledged (the default).
    ///
    /// # Errors
    /// `NoSuchSocket`; `Invalid` for a socket that is not TCP.
    pub fn tcp_set_no_delay(&mut self, id: SocketId, no_delay: bool) -> Result<(), Error> {
        self.tcp_options(id)?.no_delay = no_delay;
        self.tcp_apply_options(id);
        Ok(())
    }

    /// Allows an address to be bound whose connections are not all forgotten yet (`SO_REUSEADDR`).
    ///
    /// # Errors
    /// `NoSuchSocket`; `Invalid` for a socket that is not TCP.
    pub fn tcp_set_reuse_address(&mut self, id: SocketId, reuse: bool) -> Result<(), Error> {
        self.tcp_options(id)?.reuse_address = reuse;
        Ok(())
    }

    /// Says whether a socket bound to `::` takes only IPv6 (`IPV6_V6ONLY`); by default it takes both.
    ///
    /// # Errors
    /// `NoSuchSocket`; `Invalid` for a socket that is not TCP.
    pub fn tcp_set_only_v6(&mut self, id: SocketId, only_v6: bool) -> Result<(), Error> {
        self.tcp_options(id)?.only_v6 = only_v6;
        Ok(())
    }

    fn tcp_apply_options(&mut self, id: SocketId) {
        if let Some(Socket::TcpConnection(connection)) = self.sockets.get_mut(id) {
            let options = connection.options;
            let socket = connection.socket();
            socket.set_nagle_enabled(!options.no_delay);
            socket.set_hop_limit(options.hop_limit);
            let keep_alive = options
                .keep_alive
                .map(|keep_alive| keep_alive.idle.max(Duration::from_secs(1)).into());
            if socket.keep_alive() != keep_alive {
                socket.set_keep_alive(keep_alive);
            }
            self.tcp_mark(id);
        }
    }

    /// Binds to an address and port (`bind(2)`). An unspecified address stands for all; port 0 for a free one.
    ///
    /// # Errors
    /// `AddressInUse`, `AddressNotAvailable`; `Invalid` when it is bound or connected already.
    pub fn tcp_bind(&mut self, id: SocketId, address: SocketAddr) -> Result<(), Error> {
        let options = *self.tcp_options(id)?;
        match self.sockets.get(id) {
            Some(Socket::TcpIdle(Idle { bound: None, .. })) => {}
            _ => return Err(Error::Invalid),
        }
        if !address.ip().is_unspecified() && !self.link.is_own(address.ip()) {
            return Err(Error::AddressNotAvailable);
        }
        let mut address = address;
        if address.port() == 0 {
            let port = self.tcp_free_port(|tcp, port| !tcp.is_bound(port) && !tcp.is_used(port));
            address.set_port(port.ok_or(Error::AddressInUse)?);
        } else {
            self.tcp_check_bind(Some(id), address, options)?;
        }
        self.tcp.bind(address.port(), id);
        if let Some(Socket::TcpIdle(idle)) = self.sockets.get_mut(id) {
            idle.bound = Some(address);
        }
        Ok(())
    }

    /// A new socket that listens on an unspecified address, as one with `SO_REUSEADDR` would.
    ///
    /// # Errors
    /// `AddressInUse`; `AddressNotAvailable` when the address is that of one interface.
    pub fn tcp_open_listener(
        &mut self,
        bound: SocketAddr,
        backlog: usize,
    ) -> Result<SocketId, Error> {
        if !bound.ip().is_unspecified() {
            return Err(Error::AddressNotAvailable);
        }
        let options = Options {
            reuse_address: true,
            ..Options::default()
        };
        self.tcp_check_bind(None, bound, options)?;
        let listener = Listener::new(bound, options, backlog);
        let id = self.sockets.insert(Socket::TcpListener(listener));
        self.tcp.bind(bound.port(), id);
        Ok(id)
    }

    /// Linux's rules: a bound address is free for another socket only if both allow reuse and none listens; one that
    /// only has connections, if the new one allows reuse.
    fn tcp_check_bind(
        &self,
        id: Option<SocketId>,
        address: SocketAddr,
        options: Options,
    ) -> Result<(), Error> {
        for other in self.tcp.bound_to(address.port()) {
            let (bound, other_options, listens) = match self.sockets.get(other) {
                Some(Socket::TcpIdle(Idle {
                    bound: Some(bound),
                    options,
                })) => (*bound, *options, false),
                Some(Socket::TcpListener(listener)) => (listener.bound, listener.options, true),
                _ => continue,
            };
            if Some(other) != id
                && overlap(address, options.only_v6, bound, other_options.only_v6)
                && (listens || !options.reuse_address || !other_options.reuse_address)
            {
                return Err(Error::AddressInUse);
            }
        }
        if !options.reuse_address && self.tcp.is_used(address.port()) {
            return Err(Error::AddressInUse);
        }
        Ok(())
    }

    /// A port of the ephemeral range for which `free` holds, starting behind the last one.
    fn tcp_free_port(&mut self, free: impl Fn(&Tcp, u16) -> bool) -> Option<u16> {
        for _ in EPHEMERAL {
            let port = self.tcp.next_port;
            self.tcp.next_port = if port >= *EPHEMERAL.end() {
                *EPHEMERAL.start()
            } else {
                port + 1
            };
            if free(&self.tcp, port) {
                return Some(port);
            }
        }
        None
    }

    /// Listens (`listen(2)`); binds to any address and a free port when the socket is not bound. Again on a listener:
    /// changes its backlog.
    ///
    /// # Errors
    /// `AddressInUse` when another socket listens there; `Invalid` when the socket is connected.
    pub fn tcp_listen(&mut self, id: SocketId, backlog: usize) -> Result<(), Error> {
        if let Some(Socket::TcpListener(listener)) = self.sockets.get_mut(id) {
            listener.backlog = backlog.max(1);
            return Ok(());
        }
        let Some(Socket::TcpIdle(idle)) = self.sockets.get(id) else {
            return Err(Error::Invalid);
        };
        if idle.bound.is_none() {
            self.tcp_bind(id, SocketAddr::from(([0, 0, 0, 0], 0)))?;
        }
        let Some(Socket::TcpIdle(Idle {
            bound: Some(bound),
            options,
        })) = self.sockets.get(id)
        else {
            return Err(Error::Invalid);
        };
        let (bound, options) = (*bound, *options);
        let taken = self.tcp.bound_to(bound.port()).any(|other| {
            matches!(self.sockets.get(other), Some(Socket::TcpListener(listener))
                if overlap(bound, options.only_v6, listener.bound, listener.options.only_v6))
        });
        if taken {
            return Err(Error::AddressInUse);
        }
        if let Some(socket) = self.sockets.get_mut(id) {
            *socket = Socket::TcpListener(Listener::new(bound, options, backlog));
        }
        Ok(())
    }

    /// Takes the next established connection of a listener (`accept(2)`).
    ///
    /// # Errors
    /// `WouldBlock` when there is none; `Invalid` when the socket does not listen.
    pub fn tcp_accept(&mut self, id: SocketId) -> Result<SocketId, Error> {
        let Some(Socket::TcpListener(listener)) = self.sockets.get_mut(id) else {
            return Err(Error::Invalid);
        };
        listener.queue.pop_front().ok_or(Error::WouldBlock)
    }

    /// Starts to connect (`connect(2)`). Readiness says when it is done: `CONNECTED`, or `ERROR`.
    ///
    /// # Errors
    /// `NetworkUnreachable`, `AddressNotAvailable`, `AddressInUse`; `AlreadyConnected`.
    pub fn tcp_connect(&mut self, id: SocketId, remote: SocketAddr) -> Result<(), Error> {
        let (bound, options) = match self.sockets.get(id).ok_or(Error::NoSuchSocket)? {
            Socket::TcpIdle(idle) => (idle.bound, idle.options),
            Socket::TcpConnection(_) => return Err(Error::AlreadyConnected),
            _ => return Err(Error::Invalid),
        };
        let mut remote = remote;
        if remote.ip().is_unspecified() {
            // As Linux: the unspecified address is this host.
            remote.set_ip(match remote.ip() {
                IpAddr::V4(_) => IpAddr::from([127, 0, 0, 1]),
                IpAddr::V6(_) => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
            });
        }
        if remote.port() == 0 || self.link.is_group(remote.ip()) {
            return Err(Error::NetworkUnreachable);
        }
        if !self.link.reaches(remote.ip()) {
            return Err(Error::NetworkUnreachable);
        }
        let source = match bound
            .map(|bound| bound.ip())
            .filter(|address| !address.is_unspecified())
        {
            Some(address) if address.is_ipv4() == remote.is_ipv4() => address,
            Some(_) => return Err(Error::Invalid),
            None => self
                .link
                .source_for(remote.ip())
                .ok_or(Error::NetworkUnreachable)?,
        };
        let port = match bound {
            Some(bound) => bound.port(),
            None => {
                let tuple = |port| Tuple {
                    local: SocketAddr::new(source, port),
                    remote,
                };
                let unused = |tcp: &Tcp, port| !tcp.is_bound(port);
                // A port whose last connection to the same place is only remembered may be used again when no other
                // is left (`tcp_tw_reuse`).
                self.tcp_free_port(|tcp, port| {
                    unused(tcp, port) && tcp.tuples.get(&tuple(port)).is_none()
                })
                .or_else(|| {
                    self.tcp_free_port(|tcp, port| {
                        unused(tcp, port)
                            && matches!(tcp.tuples.get(&tuple(port)), Some(Entry::TimeWait { .. }))
                    })
                })
                .ok_or(Error::AddressNotAvailable)?
            }
        };
        let tuple = Tuple {
            local: SocketAddr::new(source, port),
            remote,
        };
        if matches!(self.tcp.tuples.get(&tuple), Some(Entry::Connection(_))) {
            return Err(Error::AddressNotAvailable);
        }
        let own = self.link.is_own(remote.ip());
        let mut connection = self.tcp_new_connection(tuple, options, own);
        let interface = if own {
            &mut self.tcp.loopback
        } else {
            &mut self.tcp.link
        };
        let result = connection
            .socket()
            .connect(interface.context(), remote, tuple.local);
        if result.is_err() {
            self.tcp.buffered -= 2 * connection.buffer;
            return Err(Error::NetworkUnreachable);
        }
        connection.state = TcpState::SynSent;
        if bound.is_some() {
            self.tcp.unbind(id);
        }
        self.tcp.tuples.insert(tuple, Entry::Connection(id));
        if let Some(socket) = self.sockets.get_mut(id) {
            *socket = Socket::TcpConnection(connection);
        }
        self.tcp_apply_options(id);
        self.tcp_mark(id);
        Ok(())
    }

    /// The address that the socket is bound to or connected from.
    #[must_use]
    pub fn tcp_local_address(&self, id: SocketId) -> Option<SocketAddr> {
        match self.sockets.get(id)? {
            Socket::TcpIdle(idle) => idle.bound,
            Socket::TcpListener(listener) => Some(listener.bound),
            Socket::TcpConnection(connection) => Some(connection.tuple.local),
            _ => None,
        }
    }

    /// The address that the socket is, or was, connected to.
    #[must_use]
    pub fn tcp_remote_address(&self, id: SocketId) -> Option<SocketAddr> {
        match self.sockets.get(id)? {
            Socket::TcpConnection(connection) => Some(connection.tuple.remote),
            _ => None,
        }
    }

    /// Both addresses of a connection: its own and the other end's.
    #[must_use]
    pub fn tcp_addresses(&self, id: SocketId) -> Option<(SocketAddr, SocketAddr)> {
        match self.sockets.get(id)? {
            Socket::TcpConnection(connection) => {
                Some((connection.tuple.local, connection.tuple.remote))
            }
            _ => None,
        }
    }

    /// The socket's state.
    #[must_use]
    pub fn tcp_state(&self, id: SocketId) -> TcpState {
        match self.sockets.get(id) {
            Some(Socket::TcpListener(_)) => TcpState::Listen,
            Some(Socket::TcpConnection(connection)) => connection.socket_ref().state(),
            _ => TcpState::Closed,
        }
    }

    /// Bytes that wait in the receive buffer and in the send buffer (`SIOCINQ`, `SIOCOUTQ`).
    #[must_use]
    pub fn tcp_queues(&self, id: SocketId) -> (usize, usize) {
        match self.sockets.get(id) {
            Some(Socket::TcpConnection(connection)) => {
                let socket = connection.socket_ref();
                (socket.recv_queue(), socket.send_queue())
            }
            _ => (0, 0),
        }
    }

    /// Capacity of the receive buffer and of the send buffer in bytes (`SO_RCVBUF`, `SO_SNDBUF`).
    #[must_use]
    pub fn tcp_capacities(&self, id: SocketId) -> (usize, usize) {
        match self.sockets.get(id) {
            Some(Socket::TcpConnection(connection)) => (connection.buffer, connection.buffer),
            _ => (self.tcp.buffer_size(), self.tcp.buffer_size()),
        }
    }

    fn tcp_connection(&mut self, id: SocketId) -> Result<&mut Connection, Error> {
        match self.sockets.get_mut(id).ok_or(Error::NoSuchSocket)? {
            Socket::TcpConnection(connection) => Ok(connection),
            Socket::TcpIdle(_) | Socket::TcpListener(_) => Err(Error::NotConnected),
            _ => Err(Error::Invalid),
        }
    }

    /// Queues bytes to be sent and returns how many.
    ///
    /// # Errors
    /// `WouldBlock` when the buffer is full or the connection is not established yet; `BrokenPipe` after a shutdown or
    /// the connection's end; the pending error, which it takes.
    pub fn tcp_send(&mut self, id: SocketId, data: &[u8]) -> Result<usize, Error> {
        let mut rest = data;
        self.tcp_send_with(id, &mut |space| {
            let count = space.len().min(rest.len());
            let (now, later) = rest.split_at(count);
            space[..count].copy_from_slice(now);
            rest = later;
            count
        })
    }

    /// Lets `write` put bytes straight into the free part of the send buffer and say how many; a second time where the
    /// buffer wraps around and the first part is full. It is not called when there is no room.
    ///
    /// # Errors
    /// As [`tcp_send`](Self::tcp_send).
    pub fn tcp_send_with(
        &mut self,
        id: SocketId,
        write: &mut dyn FnMut(&mut [u8]) -> usize,
    ) -> Result<usize, Error> {
        let connection = self.tcp_connection(id)?;
        let connected = connection.connected;
        let socket = connection.socket();
        if !socket.may_send() {
            if let Some(error) = connection.error.take() {
                connection.ready.remove(Readiness::ERROR);
                return Err(error);
            }
            return Err(if connected || connection.finished {
                Error::BrokenPipe
            } else {
                Error::WouldBlock
            });
        }
        if !socket.can_send() {
            connection.ready.remove(Readiness::WRITABLE);
            return Err(Error::WouldBlock);
        }
        let mut sent = 0;
        for _ in 0..2 {
            let (count, more) = socket
                .send(|space| {
                    let count = write(space).min(space.len());
                    (count, (count, count == space.len()))
                })
                .map_err(|_| Error::BrokenPipe)?;
            sent += count;
            if !more || !socket.can_send() {
                break;
            }
        }
        if !has_send_space(socket) {
            connection.ready.remove(Readiness::WRITABLE);
        }
        if sent > 0 {
            self.tcp_mark(id);
        }
        Ok(sent)
    }

    /// Takes received bytes and returns how many; 0 when the other end has sent all it will.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; `NotConnected`; the pending error, which it takes.
    pub fn tcp_receive(&mut self, id: SocketId, data: &mut [u8]) -> Result<usize, Error> {
        let mut done = 0;
        self.tcp_receive_with(id, &mut |bytes| {
            let rest = data.get_mut(done..).unwrap_or_default();
            let count = bytes.len().min(rest.len());
            rest[..count].copy_from_slice(&bytes[..count]);
            done += count;
            count
        })
    }

    /// Shows received bytes without taking them; otherwise as [`tcp_receive`](Self::tcp_receive) (`MSG_PEEK`).
    ///
    /// # Errors
    /// As [`tcp_receive`](Self::tcp_receive).
    pub fn tcp_peek(&mut self, id: SocketId, data: &mut [u8]) -> Result<usize, Error> {
        if self.tcp_receive_with(id, &mut |_| 0)? == 0 && self.tcp_queues(id).0 == 0 {
            return Ok(0);
        }
        let connection = self.tcp_connection(id)?;
        connection.ready.insert(Readiness::READABLE);
        connection
            .socket()
            .peek_slice(data)
            .map_err(|_| Error::NotConnected)
    }

    /// Lets `read` have the received bytes in place and say how many it took; a second time where the buffer wraps around
    /// and it took all of the first part. It is not called when there are none: 0 without a call is the end of the stream.
    ///
    /// # Errors
    /// As [`tcp_receive`](Self::tcp_receive).
    pub fn tcp_receive_with(
        &mut self,
        id: SocketId,
        read: &mut dyn FnMut(&[u8]) -> usize,
    ) -> Result<usize, Error> {
        let connection = self.tcp_connection(id)?;
        if !connection.connected && !connection.finished {
            return Err(Error::WouldBlock);
        }
        if connection.socket_ref().recv_queue() == 0 {
            if let Some(error) = connection.error.take() {
                connection.ready.remove(Readiness::ERROR);
                return Err(error);
            }
            connection.ready.remove(Readiness::READABLE);
            let ended = connection.read_closed || connection.read_shut || connection.finished;
            return if ended { Ok(0) } else { Err(Error::WouldBlock) };
        }
        let socket = connection.socket();
        let mut received = 0;
        let mut left = 0;
        // What comes behind the data (an error, the end) is for the next call.
        for _ in 0..2 {
            let (count, more) = socket
                .recv(|bytes| {
                    let count = read(bytes).min(bytes.len());
                    (count, (count, count == bytes.len()))
                })
                .unwrap_or((0, false));
            received += count;
            left = socket.recv_queue();
            if !more || left == 0 {
                break;
            }
        }
        connection.told = left;
        if left == 0 {
            connection.ready.remove(Readiness::READABLE);
        }
        // A window that grew by a quarter is worth telling of; the other end waits for no less.
        connection.taken += received;
        if connection.taken >= connection.buffer / 4 && !connection.finished {
            self.tcp_mark(id);
        }
        Ok(received)
    }

    /// Shuts down one or both directions (`shutdown(2)`): what was sent before still arrives.
    ///
    /// # Errors
    /// `NotConnected`.
    pub fn tcp_shutdown(&mut self, id: SocketId, how: Shutdown) -> Result<(), Error> {
        let connection = self.tcp_connection(id)?;
        if !connection.connected {
            return Err(Error::NotConnected);
        }
        if how != Shutdown::Write {
            connection.read_shut = true;
        }
        if how != Shutdown::Read {
            connection.socket().close();
        }
        self.tcp_mark(id);
        Ok(())
    }

    /// Lets an intercepted connection be established.
    ///
    /// # Errors
    /// `NoSuchSocket`; `Invalid` when the socket does not wait for that.
    pub fn tcp_admit(&mut self, id: SocketId) -> Result<(), Error> {
        let connection = self.tcp_connection(id)?;
        if !connection.paused {
            return Err(Error::Invalid);
        }
        connection.paused = false;
        connection.socket().pause_synack(false);
        self.tcp_mark(id);
        Ok(())
    }

    /// Refuses an intercepted connection and closes its socket: with a reset when the error is `ConnectionRefused`, by
    /// ICMP otherwise (`HostUnreachable`, `NetworkUnreachable`, ...).
    ///
    /// # Errors
    /// `NoSuchSocket`; `Invalid` when the socket does not wait for [`tcp_admit`](Self::tcp_admit).
    pub fn tcp_refuse(&mut self, id: SocketId, error: Error) -> Result<(), Error> {
        let connection = self.tcp_connection(id)?;
        if !connection.paused {
            return Err(Error::Invalid);
        }
        if error != Error::ConnectionRefused {
            let Tuple { local, remote } = connection.tuple;
            // The first eight bytes of the SYN: what RFC 792 asks for, and what hosts match it by.
            let mut transport = [0; 8];
            transport[0..2].copy_from_slice(&remote.port().to_be_bytes());
            transport[2..4].copy_from_slice(&local.port().to_be_bytes());
            transport[4..8].copy_from_slice(&connection.trace.acknowledgement.to_be_bytes());
            self.tcp.half_open = self.tcp.half_open.saturating_sub(1);
            self.tcp_forget(id);
            self.send_unreachable(TCP, remote.ip(), local.ip(), &transport, error);
            return Ok(());
        }
        self.close(id);
        Ok(())
    }

    /// Ends the connection at once; the other end gets a reset (`SO_LINGER` with 0). The socket must still be closed.
    ///
    /// # Errors
    /// `NoSuchSocket`, `NotConnected`.
    pub fn tcp_abort(&mut self, id: SocketId) -> Result<(), Error> {
        let connection = self.tcp_connection(id)?;
        if !connection.finished {
            connection.aborted = true;
            connection.socket().abort();
            self.tcp_mark(id);
        }
        Ok(())
    }

    /// Closes a TCP socket (`close(2)`): its name is gone, what was sent still arrives. Received data that nobody
    /// took makes it a reset (RFC 2525 section 2.17).
    pub(crate) fn tcp_close(&mut self, id: SocketId) {
        match self.sockets.get_mut(id) {
            Some(Socket::TcpIdle(idle)) => {
                if idle.bound.is_some() {
                    self.tcp.unbind(id);
                }
                self.sockets.remove(id);
            }
            Some(Socket::TcpListener(listener)) => {
                let queue = core::mem::take(&mut listener.queue);
                self.tcp.unbind(id);
                self.sockets.remove(id);
                for connection in queue {
                    let _ = self.tcp_abort(connection);
                    self.tcp_close(connection);
                }
            }
            Some(Socket::TcpConnection(connection)) => {
                if connection.finished {
                    self.tcp.buffered -= 2 * connection.buffer;
                    self.sockets.remove(id);
                    return;
                }
                connection.orphan = true;
                let unread = connection.socket_ref().recv_queue() > 0;
                if unread || connection.paused {
                    connection.aborted = true;
                    connection.socket().abort();
                } else {
                    connection.socket().close();
                }
                self.tcp_mark(id);
            }
            _ => {}
        }
    }

    /// Puts a connection on the list of those that have something to send.
    fn tcp_mark(&mut self, id: SocketId) {
        self.tcp_note(id, true);
    }

    /// Puts a connection on the list of those to be looked at; `urgent` when there is more to send than the
    /// acknowledgement of data, which can wait for something to travel with.
    fn tcp_note(&mut self, id: SocketId, urgent: bool) {
        if let Some(Socket::TcpConnection(connection)) = self.sockets.get_mut(id) {
            connection.urgent |= urgent;
            if !connection.pending {
                connection.pending = true;
                self.tcp.pending.push(id);
            }
        }
    }

    fn tcp_new_connection(&mut self, tuple: Tuple, options: Options, own: bool) -> Box<Connection> {
        let buffer = self.tcp.buffer_size();
        self.tcp.buffered += 2 * buffer;
        let mut set = SocketSet::new(alloc::vec![SocketStorage::EMPTY]);
        let [receive, send] = [buffer; 2].map(|size| alloc::vec![0; size]);
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(receive),
            tcp::SocketBuffer::new(send),
        );
        // smoltcp waits as long as less than a segment has come, although that may be all the window there is.
        socket.set_ack_delay(None);
        let handle = set.add(socket);
        Box::new(Connection {
            set,
            handle,
            tuple,
            options,
            own,
            state: TcpState::Closed,
            armed: None,
            pending: false,
            fresh: false,
            urgent: false,
            unacknowledged: 0,
            taken: 0,
            acknowledge_at: None,
            listener: None,
            paused: false,
            orphan: false,
            aborted: false,
            finished: false,
            connected: false,
            read_closed: false,
            read_shut: false,
            error: None,
            ready: Readiness::empty(),
            told: 0,
            event_queued: false,
            buffer,
            timeout: None,
            trace: Trace::default(),
        })
    }
}

/// What segments, time and the link do.
impl Stack {
    /// Takes a TCP segment.
    pub(crate) fn tcp_receive_segment(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        packet: &IpPacket<'_>,
        own: bool,
    ) {
        let Some((remote_port, local_port)) = ports(packet.payload) else {
            return;
        };
        let Some(&flags) = packet.payload.get(13) else {
            return;
        };
        if self.link.is_group(packet.destination) || packet.source.is_unspecified() {
            return;
        }
        if !own
            && self.link.checksums == Checksums::Software
            && !packet.header().verify(packet.payload)
        {
            return;
        }
        let tuple = Tuple {
            local: SocketAddr::new(packet.destination, local_port),
            remote: SocketAddr::new(packet.source, remote_port),
        };
        let asks = flags & (SYN | ACK | RST) == SYN;
        match self.tcp.tuples.get(&tuple) {
            Some(Entry::Connection(id)) => {
                let id = *id;
                if !self.tcp_is_void(id, packet) {
                    self.tcp_hand_over(now, sink, Some(id), packet, &tuple, own);
                }
                return;
            }
            // A new connection may take the place of one that is only remembered (RFC 1122 section 4.2.2.13): nothing
            // old can still be under way on a link that keeps the order.
            Some(Entry::TimeWait { .. }) if asks => self.tcp.tuples.remove(&tuple),
            Some(Entry::TimeWait { trace, .. }) => {
                let data = usize::from(packet.payload.get(12).copied().unwrap_or(0) >> 4) * 4
                    < packet.payload.len();
                if flags & RST == 0 && (flags & FIN != 0 || data) {
                    let trace = *trace;
                    self.tcp_send_acknowledgement(now, sink, &tuple, trace);
                }
                return;
            }
            None => {}
        }
        if asks {
            if let Some(id) = self.tcp_find_listener(tuple.local) {
                self.tcp_half_open(now, sink, id, tuple, packet, own);
                return;
            }
            if self.link.intercepts(packet.destination) && !own {
                self.tcp_intercept(now, sink, tuple, packet);
                return;
            }
        }
        self.tcp_hand_over(now, sink, None, packet, &tuple, own);
    }

    /// Whether a segment only repeats that all data but not the FIN arrived. smoltcp would count such segments, and at
    /// the third replace the timer that repeats the FIN by a fast retransmission of data that there is none of.
    fn tcp_is_void(&self, id: SocketId, packet: &IpPacket<'_>) -> bool {
        let Some(Socket::TcpConnection(connection)) = self.sockets.get(id) else {
            return false;
        };
        let socket = connection.socket_ref();
        let Some(header) = packet.payload.first_chunk::<TCP_HEADER>() else {
            return false;
        };
        matches!(
            socket.state(),
            TcpState::FinWait1 | TcpState::Closing | TcpState::LastAck
        ) && socket.send_queue() == 0
            && header[13] & (SYN | RST | FIN) == 0
            && usize::from(header[12] >> 4) * 4 == packet.payload.len()
            && connection.trace.known
            && header[8..12] != connection.trace.next.to_be_bytes()
    }

    /// The listener for an address: one bound to it before one bound to all.
    fn tcp_find_listener(&self, local: SocketAddr) -> Option<SocketId> {
        let mut found = None;
        for id in self.tcp.bound_to(local.port()) {
            let Some(Socket::TcpListener(listener)) = self.sockets.get(id) else {
                continue;
            };
            if listener.bound.ip() == local.ip() {
                return Some(id);
            }
            if overlap(local, true, listener.bound, listener.options.only_v6)
                && listener.bound.ip().is_unspecified()
            {
                // One of the same family is closer than one that takes both.
                if found.is_none() || listener.bound.is_ipv4() == local.is_ipv4() {
                    found = Some(id);
                }
            }
        }
        found
    }

    /// Makes a connection for a listener out of a SYN.
    fn tcp_half_open(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        id: SocketId,
        tuple: Tuple,
        packet: &IpPacket<'_>,
        own: bool,
    ) {
        let Some(Socket::TcpListener(listener)) = self.sockets.get(id) else {
            return;
        };
        // As Linux: what the listener does not take in time is not answered, and asks again.
        if listener.queue.len() > listener.backlog
            || self.tcp.half_open >= self.tcp.configuration.half_open_maximum
        {
            return;
        }
        let options = listener.options;
        let mut connection = self.tcp_new_connection(tuple, options, own);
        connection.listener = Some(id);
        self.tcp_first_segment(now, sink, connection, packet);
    }

    /// Makes a connection that waits for the owner's word out of a SYN to a foreign address.
    fn tcp_intercept(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        tuple: Tuple,
        packet: &IpPacket<'_>,
    ) {
        if self.tcp.half_open >= self.tcp.configuration.half_open_maximum {
            return;
        }
        let mut connection = self.tcp_new_connection(
            tuple,
            Options {
                no_delay: true,
                ..Options::default()
            },
            false,
        );
        connection.paused = true;
        connection.socket().pause_synack(true);
        if let Some(sequence) = packet
            .payload
            .get(4..8)
            .and_then(|bytes| bytes.try_into().ok())
        {
            // Nothing is sent before the owner's word, which may be to refuse.
            connection.trace.acknowledgement = u32::from_be_bytes(sequence);
        }
        if let Some(id) = self.tcp_first_segment(now, sink, connection, packet) {
            self.events.push(Event::Intercepted(id));
        }
    }

    fn tcp_first_segment(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        mut connection: Box<Connection>,
        packet: &IpPacket<'_>,
    ) -> Option<SocketId> {
        let tuple = connection.tuple;
        let own = connection.own;
        let endpoint = IpListenEndpoint {
            addr: Some(tuple.local.ip().into()),
            port: tuple.local.port(),
        };
        let buffer = connection.buffer;
        if connection.socket().listen(endpoint).is_err() {
            self.tcp.buffered -= 2 * buffer;
            return None;
        }
        let id = self.sockets.insert(Socket::TcpConnection(connection));
        self.tcp.half_open += 1;
        self.tcp_hand_over(now, sink, Some(id), packet, &tuple, own);
        self.tcp_apply_options(id);
        if let Some(Socket::TcpConnection(connection)) = self.sockets.get_mut(id) {
            if connection.socket().state() != TcpState::SynReceived {
                // The segment was damaged.
                self.tcp.half_open -= 1;
                self.tcp.buffered -= 2 * buffer;
                self.sockets.remove(id);
                return None;
            }
            connection.state = TcpState::SynReceived;
        }
        self.tcp.tuples.insert(tuple, Entry::Connection(id));
        Some(id)
    }

    /// Lets smoltcp take a segment for one connection, or answer one for none.
    fn tcp_hand_over(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        id: Option<SocketId>,
        packet: &IpPacket<'_>,
        tuple: &Tuple,
        own: bool,
    ) {
        // smoltcp takes plain headers only.
        let rebuilt;
        let whole = if packet.extended || packet.fragment.is_some() {
            let header = packet.header();
            let mut bytes = alloc::vec![0; header.length()];
            header.write(&mut bytes, packet.payload.len());
            bytes.extend_from_slice(packet.payload);
            rebuilt = bytes;
            &rebuilt[..]
        } else {
            packet.whole
        };
        let mut connection = match id.and_then(|id| self.sockets.get_mut(id)) {
            Some(Socket::TcpConnection(connection)) => Some(connection),
            _ => None,
        };
        let (set, trace) = match &mut connection {
            Some(connection) => {
                let closing = is_closing(connection.socket_ref().state());
                let trace = Some(&mut connection.trace).filter(|_| closing);
                (&mut connection.set, trace)
            }
            None => (&mut self.tcp.nobody, None),
        };
        let mut port = Port {
            now,
            link: &mut self.link,
            sink,
            packet: Some(whole),
            destination: tuple.remote.ip(),
            own,
            trace,
        };
        let interface = if own {
            &mut self.tcp.loopback
        } else {
            &mut self.tcp.link
        };
        interface.poll_ingress_single(instant(now), &mut port, set);
        if let Some(connection) = connection {
            connection.fresh = true;
            let header = packet
                .payload
                .get(12)
                .map_or(0, |byte| usize::from(byte >> 4) * 4);
            let control = packet
                .payload
                .get(13)
                .is_some_and(|flags| flags & (SYN | FIN | RST) != 0);
            connection.unacknowledged += packet.payload.len().saturating_sub(header);
            if let Some(id) = id {
                self.tcp_note(id, control);
            }
        }
    }

    /// Answers for a connection that is only remembered.
    fn tcp_send_acknowledgement(
        &mut self,
        now: Moment,
        sink: &mut dyn FrameSink,
        tuple: &Tuple,
        trace: Trace,
    ) {
        let header = IpHeader {
            source: tuple.local.ip(),
            destination: tuple.remote.ip(),
            protocol: TCP,
            hop_limit: 64,
        };
        let mut segment = [0; TCP_HEADER];
        segment[0..2].copy_from_slice(&tuple.local.port().to_be_bytes());
        segment[2..4].copy_from_slice(&tuple.remote.port().to_be_bytes());
        segment[4..8].copy_from_slice(&trace.next.to_be_bytes());
        segment[8..12].copy_from_slice(&trace.acknowledgement.to_be_bytes());
        segment[12] = 5 << 4;
        segment[13] = ACK;
        segment[14..16].copy_from_slice(&trace.window.to_be_bytes());
        let sum = header.checksum(&segment);
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        self.link.send(
            now,
            sink,
            tuple.remote.ip(),
            header.length() + TCP_HEADER,
            |packet| {
                header.write(packet, TCP_HEADER);
                if let Some(body) = packet.get_mut(header.length()..) {
                    body.copy_from_slice(&segment);
                }
            },
        );
    }

    /// Works on all connections that are due; true when there was one.
    pub(crate) fn tcp_poll(&mut self, now: Moment, sink: &mut dyn FrameSink) -> bool {
        while let Some((expires, tuple)) = self.tcp.time_wait.front().copied() {
            if expires > now {
                break;
            }
            self.tcp.time_wait.pop_front();
            if matches!(self.tcp.tuples.get(&tuple), Some(Entry::TimeWait { expires: own, .. }) if *own == expires)
            {
                self.tcp.tuples.remove(&tuple);
            }
        }
        while let Some((deadline, id)) = self.tcp.timers.pop_due(now) {
            if let Some(Socket::TcpConnection(connection)) = self.sockets.get_mut(id)
                && connection.armed == Some(deadline)
            {
                connection.armed = None;
                self.tcp_mark(id);
            }
        }
        if !self.tcp.blocked.is_empty() && sink.has_room() {
            for id in core::mem::take(&mut self.tcp.blocked) {
                self.tcp_mark(id);
            }
        }
        let mut work = core::mem::take(&mut self.tcp.pending);
        let any = !work.is_empty();
        for id in work.drain(..) {
            self.tcp_service(now, sink, id);
        }
        // Keep the larger list, so that it need not grow again.
        if self.tcp.pending.is_empty() {
            self.tcp.pending = work;
        }
        any
    }

    /// Sends what one connection has to send, and looks at what has become of it.
    fn tcp_service(&mut self, now: Moment, sink: &mut dyn FrameSink, id: SocketId) {
        let Some(Socket::TcpConnection(connection)) = self.sockets.get_mut(id) else {
            return;
        };
        connection.pending = false;
        if connection.finished {
            return;
        }
        // What a segment did, before anything is sent: the end of the connection came from the other side.
        let ended = matches!(
            connection.socket().state(),
            TcpState::Closed | TcpState::Listen
        );
        if ended && !connection.aborted && connection.state != TcpState::Closed {
            connection.error = match connection.state {
                TcpState::LastAck | TcpState::Closing | TcpState::TimeWait => None,
                TcpState::SynSent | TcpState::SynReceived => Some(Error::ConnectionRefused),
                _ => Some(Error::ConnectionReset),
            };
        }
        // A connection that its owner has closed takes no more data (as Linux: a reset says so).
        if connection.orphan
            && connection.socket().recv_queue() > 0
            && !connection.aborted
            && !ended
        {
            connection.aborted = true;
            connection.socket().abort();
        }
        let state = connection.socket().state();
        let timeout = connection.wanted_timeout();
        if timeout != connection.timeout {
            connection.timeout = timeout;
            connection.socket().set_timeout(timeout.map(Into::into));
        }
        // smoltcp would wipe a connection at the end of TIME-WAIT, with what its owner has not read.
        let idle = connection.state == TcpState::TimeWait && !connection.fresh;
        let holds = connection.holds_acknowledgement(now);
        let interface = if connection.own {
            &mut self.tcp.loopback
        } else {
            &mut self.tcp.link
        };
        let mut port = Port {
            now,
            link: &mut self.link,
            sink,
            packet: None,
            destination: connection.tuple.remote.ip(),
            own: connection.own,
            trace: Some(&mut connection.trace).filter(|_| is_closing(state)),
        };
        while !idle
            && !holds
            && interface.poll_egress(instant(now), &mut port, &mut connection.set)
                != PollResult::None
        {}
        let room = self.link.has_room(sink, connection.own);
        connection.fresh = false;

        let state = connection.socket_ref().state();
        let poll_at = if holds {
            connection.acknowledge_at
        } else {
            interface.poll_at(instant(now), &connection.set).map(moment)
        };
        let sending = poll_at.is_some_and(|at| at <= now) && !idle;
        if !holds && !sending {
            connection.urgent = false;
            connection.unacknowledged = 0;
            connection.taken = 0;
            connection.acknowledge_at = None;
        }
        let was = core::mem::replace(&mut connection.state, state);
        if !connection.connected
            && !matches!(
                state,
                TcpState::Closed | TcpState::Listen | TcpState::SynSent | TcpState::SynReceived
            )
        {
            connection.connected = true;
        }
        connection.read_closed |= matches!(
            state,
            TcpState::CloseWait | TcpState::LastAck | TcpState::Closing | TcpState::TimeWait
        );

        // What is still to be sent (a reset, the last acknowledgement) waits for room.
        let unsent = sending && !room;
        let over = matches!(state, TcpState::Closed | TcpState::Listen) && !unsent;
        if over && !ended && !connection.aborted && was != TcpState::Closed {
            connection.error = Some(Error::TimedOut);
        }
        let half_open = was == TcpState::SynReceived && state != TcpState::SynReceived;
        let listener = if connection.connected || over {
            connection.listener.take()
        } else {
            None
        };
        let connected = connection.connected;
        let orphan = connection.orphan;
        let remembered = orphan && state == TcpState::TimeWait && !unsent;
        if half_open {
            self.tcp.half_open = self.tcp.half_open.saturating_sub(1);
        }

        if let Some(listener_id) = listener {
            match self.sockets.get_mut(listener_id) {
                Some(Socket::TcpListener(listener)) if connected => {
                    listener.queue.push_back(id);
                    tell(&mut self.events, &mut listener.event_queued, listener_id);
                }
                // Nobody knows of it yet, and nobody will.
                _ => {
                    if over {
                        self.tcp_forget(id);
                    } else {
                        let _ = self.tcp_abort(id);
                        self.tcp_close(id);
                    }
                    return;
                }
            }
        }
        if remembered {
            if let Some(connection) = self.tcp_forget(id) {
                let (tuple, trace) = (connection.tuple, connection.trace);
                let expires = now + self.tcp.configuration.time_wait;
                self.tcp
                    .tuples
                    .insert(tuple, Entry::TimeWait { trace, expires });
                self.tcp.time_wait.push_back((expires, tuple));
            }
            return;
        }
        if over && orphan {
            self.tcp_forget(id);
            return;
        }
        let Some(Socket::TcpConnection(connection)) = self.sockets.get_mut(id) else {
            return;
        };
        if over {
            self.tcp.tuples.remove(&connection.tuple);
            connection.finished = true;
        } else if sending {
            if room {
                // smoltcp wants to send and does not: look again soon, but do not spin.
                arm(
                    &mut self.tcp.timers,
                    connection,
                    id,
                    now + Duration::from_millis(1),
                );
            } else {
                self.tcp.blocked.push(id);
            }
        } else if let Some(deadline) = poll_at.filter(|_| state != TcpState::TimeWait) {
            arm(&mut self.tcp.timers, connection, id, deadline);
        }
        let ready = connection.readiness();
        let queue = connection.socket_ref().recv_queue();
        let more = !(ready - connection.ready).is_empty() || queue > connection.told;
        connection.ready = ready;
        connection.told = queue;
        if more && !orphan && connection.listener.is_none() {
            tell(&mut self.events, &mut connection.event_queued, id);
        }
    }

    /// Drops a connection that nobody has a name for any more.
    fn tcp_forget(&mut self, id: SocketId) -> Option<Box<Connection>> {
        let Some(Socket::TcpConnection(connection)) = self.sockets.remove(id) else {
            return None;
        };
        self.tcp.tuples.remove(&connection.tuple);
        self.tcp.buffered -= 2 * connection.buffer;
        Some(connection)
    }

    /// Tells the connection that a packet of it belongs to that it did not arrive.
    pub(crate) fn tcp_undeliverable(&mut self, packet: &IpPacket<'_>, error: Error) {
        let Some((local_port, remote_port)) = ports(packet.payload) else {
            return;
        };
        let tuple = Tuple {
            local: SocketAddr::new(packet.source, local_port),
            remote: SocketAddr::new(packet.destination, remote_port),
        };
        let Some(Entry::Connection(id)) = self.tcp.tuples.get(&tuple) else {
            return;
        };
        let id = *id;
        let Some(Socket::TcpConnection(connection)) = self.sockets.get_mut(id) else {
            return;
        };
        // An established connection lives through it (RFC 1122 section 4.2.3.9).
        if connection.state != TcpState::SynSent || error == Error::MessageTooLong {
            return;
        }
        connection.error = Some(error);
        connection.finished = true;
        let orphan = connection.orphan;
        if orphan {
            self.tcp_forget(id);
            return;
        }
        connection.ready = connection.readiness();
        tell(&mut self.events, &mut connection.event_queued, id);
        self.tcp.tuples.remove(&tuple);
    }

    pub(crate) fn tcp_readiness(&self, id: SocketId) -> Readiness {
        match self.sockets.get(id) {
            Some(Socket::TcpConnection(connection)) => connection.readiness(),
            Some(Socket::TcpListener(listener)) if !listener.queue.is_empty() => {
                Readiness::READABLE
            }
            Some(Socket::TcpIdle(_)) => Readiness::WRITE_CLOSED | Readiness::READ_CLOSED,
            _ => Readiness::empty(),
        }
    }

    pub(crate) fn tcp_take_error(&mut self, id: SocketId) -> Option<Error> {
        let connection = self.tcp_connection(id).ok()?;
        connection.ready.remove(Readiness::ERROR);
        connection.error.take()
    }
}

impl Connection {
    /// Whether all that there is to send is the acknowledgement of little data, which can wait a moment for an answer
    /// to travel with (RFC 1122 section 4.2.3.2).
    fn holds_acknowledgement(&mut self, now: Moment) -> bool {
        let socket = self.socket_ref();
        let waits = !self.urgent
            && self.connected
            && !self.aborted
            && !self.orphan
            && matches!(socket.state(), TcpState::Established | TcpState::FinWait2)
            && socket.send_queue() == 0
            && self.unacknowledged > 0
            && self.unacknowledged < LITTLE;
        if !waits {
            return false;
        }
        now < *self
            .acknowledge_at
            .get_or_insert(now + ACKNOWLEDGEMENT_DELAY)
    }

    /// As [`Stack::is_quiet`] for one connection.
    pub(crate) fn is_quiet(&self) -> bool {
        let socket = self.socket_ref();
        let settled = matches!(
            socket.state(),
            TcpState::Established | TcpState::FinWait2 | TcpState::CloseWait | TcpState::TimeWait
        );
        self.finished
            || (settled
                && !self.pending
                && self.unacknowledged == 0
                && socket.send_queue() == 0
                && socket.recv_queue() == 0)
    }

    /// As [`Stack::tcp_unsent_orphans`] for one connection.
    pub(crate) fn is_unsent_orphan(&self) -> bool {
        self.orphan && !self.finished && self.socket_ref().send_queue() > 0
    }

    fn wanted_timeout(&self) -> Option<Duration> {
        let state = self.socket_ref().state();
        match state {
            TcpState::SynSent => Some(CONNECT_TIMEOUT),
            TcpState::SynReceived if !self.paused => Some(HALF_OPEN_TIMEOUT),
            _ if self.orphan && state != TcpState::TimeWait => Some(ORPHAN_TIMEOUT),
            _ => {
                let keep_alive = self
                    .options
                    .keep_alive
                    .map(|keep| keep.idle + keep.interval * keep.count);
                let sending = (self.socket_ref().send_queue() > 0).then_some(SEND_TIMEOUT);
                earlier(keep_alive, sending)
            }
        }
    }

    /// The owner has taken the event.
    pub(crate) fn event_taken(&mut self) {
        self.event_queued = false;
    }
}

impl Listener {
    fn new(bound: SocketAddr, options: Options, backlog: usize) -> Box<Listener> {
        Box::new(Listener {
            bound,
            options,
            backlog: backlog.max(1),
            queue: VecDeque::new(),
            event_queued: false,
        })
    }

    /// The owner has taken the event.
    pub(crate) fn event_taken(&mut self) {
        self.event_queued = false;
    }
}

fn arm(timers: &mut Timers, connection: &mut Connection, id: SocketId, deadline: Moment) {
    // One that comes too early is put back when it comes: cheaper than moving it with each segment.
    if connection.armed.is_none_or(|armed| deadline < armed) {
        connection.armed = Some(deadline);
        timers.push(deadline, id);
    }
}

// The sockets of all stacks are held here by value; their headers must fit the packets that smoltcp makes.
const _: () = assert!(IPV4_HEADER + TCP_HEADER == 40 && IPV6_HEADER + TCP_HEADER == 60);

/// For tests: how much TCP holds.
#[cfg(test)]
impl Stack {
    pub(crate) fn tcp_held(&self) -> (usize, usize, usize, usize) {
        (
            self.sockets.len(),
            self.tcp.tuples.len(),
            self.tcp.half_open,
            self.tcp.buffered,
        )
    }
}

/// The table of sockets, named here for its use above.
pub(crate) type Sockets = Table<Socket>;

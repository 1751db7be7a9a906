//! The gateway's thread: frames on one side, sockets of the host on the other.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kiln_abi::configuration::StaticNetwork;
use kiln_abi::manifest::Protocol;
use kiln_tcpip::{
    Advertisement, Configuration, Datagram, DatagramKind, Error, Event, FrameDecoder, FrameEncoder,
    FrameSink, Moment, Readiness, SocketId, Stack,
};
use rustix::io::Errno;
use rustix::net::{SocketFlags, sockopt};

use crate::datagram::{self, Flows, SWEEP};
use crate::error::remark;
use crate::host::{self, Change, Events, Poller, Token};
use crate::pcap::Capture;
use crate::publish::{self, Published};
use crate::splice::{Outcome, Slots, Splice, Stage};
use crate::{FrameEnd, NetworkConfiguration, NetworkError, Publish, dhcp};

/// Bytes of frames read at one time.
const READ_BYTES: usize = 512 << 10;
/// Bytes of frames that may wait to be written.
const WRITE_BYTES: usize = 512 << 10;
/// Reads of frames before the sockets have a turn.
const READS: usize = 8;
/// Clients of one published port that the guest is asked for at one time.
const KNOCKING: usize = 128;
/// Time between two questions while the guest does not listen yet: the first, and the longest.
const KNOCK_FIRST: Duration = Duration::from_millis(2);
const KNOCK_LONGEST: Duration = Duration::from_millis(50);
/// How long a guest that has accepted nothing yet may leave a question without an answer, the first and the longest: what is sent
/// before its network is up is lost. One that has told that it listens has its network, but may be slow.
const SILENCE_FIRST: Duration = Duration::from_millis(20);
const SILENCE_LONGEST: Duration = Duration::from_secs(1);
/// How long a client waits for a guest that does not listen.
const WAIT_LONGEST: Duration = Duration::from_secs(120);
/// How long accepting pauses when there are no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Places that the guest listens at, as it tells: more are not believed.
const LISTENS: usize = 1 << 17;
/// How long data that the guest has sent may take to reach the hosts' sockets after the guest has ended.
const DRAIN: Duration = Duration::from_secs(5);

/// How busy a network is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// TCP connections between the guest and the host, in either direction and whatever stage: also those that were
    /// accepted on the host and wait for the guest, those that the guest waits for, and those that are closed but still
    /// have data for the guest.
    pub connections: usize,
    /// Bytes of payload that ever passed between the guest and the host's sockets, TCP and UDP, both ways; an empty
    /// datagram counts as one. Never less than before.
    pub bytes: u64,
}

/// What the thread tells without being asked.
#[derive(Debug, Default)]
struct Counters {
    connections: AtomicUsize,
    bytes: AtomicU64,
}

impl Counters {
    fn activity(&self) -> Activity {
        Activity {
            connections: self.connections.load(Ordering::Acquire),
            bytes: self.bytes.load(Ordering::Acquire),
        }
    }
}

/// What the owner wants of the thread.
enum Command {
    Stop,
    Pause(SyncSender<Activity>),
    Suspend(SyncSender<bool>),
    Resume,
    Adopt(OwnedFd, u16),
    Listens(SocketAddr, Protocol),
    Unlistens(SocketAddr, Protocol),
}

/// A user-mode network, running in a thread of its own until it is stopped or the guest's side ends the stream.
#[derive(Debug)]
pub struct UserNetwork {
    published: Vec<(SocketAddr, Publish)>,
    static_network: StaticNetwork,
    commands: Sender<Command>,
    /// Told of each command.
    bell: Arc<OwnedFd>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

impl UserNetwork {
    /// Opens the published ports and starts the thread.
    ///
    /// # Errors
    /// When a port cannot be opened or used or the capture file cannot be made: the error names it. Nothing is left
    /// behind.
    pub fn start(
        configuration: NetworkConfiguration,
        end: FrameEnd,
    ) -> Result<UserNetwork, NetworkError> {
        host::raise_descriptor_limit();
        let mut published = publish::hold(&configuration.held)?;
        published.extend(publish::open(&configuration.publish)?);
        let addresses = published
            .iter()
            .map(|published| (published.address, published.publish))
            .collect();
        let static_network = configuration.static_network();
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let bell = rustix::event::eventfd(0, flags)
            .map_err(|error| NetworkError::system("eventfd")(error.into()))?;
        let bell = Arc::new(bell);
        let counters = Arc::new(Counters::default());
        let (commands, receiver) = channel();
        let owner = Owner {
            commands: receiver,
            bell: Arc::clone(&bell),
            counters: Arc::clone(&counters),
        };
        let mut gateway = Gateway::new(configuration, published, end, owner)?;
        let thread = std::thread::Builder::new()
            .name("kiln-network".into())
            .spawn(move || gateway.run())
            .map_err(NetworkError::system("starting a thread"))?;
        Ok(UserNetwork {
            published: addresses,
            static_network,
            commands,
            bell,
            counters,
            thread: Some(thread),
        })
    }

    /// The addresses of the host that lead to the guest, with their ports as they were given out: first those of
    /// [`NetworkConfiguration::held`] in their order, then those of [`NetworkConfiguration::publish`], where one that names
    /// no address gives two.
    #[must_use]
    pub fn published(&self) -> &[(SocketAddr, Publish)] {
        &self.published
    }

    /// What a guest that does not ask by DHCP is configured with.
    #[must_use]
    pub fn static_network(&self) -> &StaticNetwork {
        &self.static_network
    }

    /// False when the thread has ended.
    fn command(&self, command: Command) -> bool {
        let taken = self.commands.send(command).is_ok();
        // When it does not take more, it rings already.
        let _ = rustix::io::write(&*self.bell, &1u64.to_ne_bytes());
        taken
    }

    /// How busy the network is: cheap, and as of a moment ago.
    #[must_use]
    pub fn activity(&self) -> Activity {
        self.counters.activity()
    }

    /// Takes no more connections of published TCP ports, nor datagrams of published UDP ports, until
    /// [`resume`](Self::resume): they wait in the host's backlog and in the host's sockets, where they outlive this
    /// network if its owner holds the sockets. All else goes on.
    ///
    /// Returns when that holds: a connection that was accepted before, or that the guest had asked for, is counted in the
    /// result. Without connections when the network has ended.
    pub fn pause(&self) -> Activity {
        let (sender, receiver) = sync_channel(1);
        self.command(Command::Pause(sender));
        receiver.recv().unwrap_or_else(|_| self.activity())
    }

    /// Ends [`pause`](Self::pause) and [`suspend`](Self::suspend); what waits is taken now. The time asleep does not count
    /// for the connections: nothing has timed out by it.
    pub fn resume(&self) {
        self.command(Command::Resume);
    }

    /// Prepares for a guest that is about to be stopped (`SIGSTOP`) with its connections open.
    ///
    /// True: from now on the thread sleeps, without a timer, and leaves everything where it is. When somebody wants the
    /// guest - a client of a published port, data or the end on an open connection, a datagram, a connection that is
    /// adopted, or the guest itself, that sent something before it stopped - it calls [`NetworkConfiguration::wake`], once,
    /// and sleeps on until [`resume`](Self::resume). Clients that wait because of [`pause`](Self::pause) count too;
    /// those of a port that no program of the guest has ever listened on do not (where it tells).
    ///
    /// False: something is under way, and the guest is to go on; ask again later. That is: bytes that one side has sent and
    /// the other has not acknowledged or taken (so also a client that reads more slowly than the guest writes), a
    /// connection that is being made or ended, a client that waits for the guest, a frame that is only half there, or a
    /// guest that has not connected to the stream of frames yet. What the guest's programs have not read yet lies in the
    /// guest's memory and does not count. False also when there is no `wake`, or when the network has ended.
    #[must_use]
    pub fn suspend(&self) -> bool {
        let (sender, receiver) = sync_channel(1);
        self.command(Command::Suspend(sender));
        receiver.recv().unwrap_or(false)
    }

    /// Joins a stream connection of the host, TCP or Unix, to a port of the guest, as if it had been accepted on a
    /// published port; it waits until the guest listens. `O_NONBLOCK` is set, and the connection is shut down when the
    /// guest shuts its own down.
    ///
    /// # Errors
    /// When the descriptor cannot be used, or the network has ended.
    pub fn adopt(&self, connection: OwnedFd, guest_port: u16) -> io::Result<()> {
        if sockopt::socket_type(&connection)? != rustix::net::SocketType::STREAM {
            return Err(Errno::PROTOTYPE.into());
        }
        rustix::io::ioctl_fionbio(&connection, true)?;
        if self.command(Command::Adopt(connection, guest_port)) {
            Ok(())
        } else {
            Err(Errno::NETDOWN.into())
        }
    }

    /// A program of the guest listens now (TCP) or has bound (UDP), as [`kiln_abi::link::ToMonitor::Listen`] tells. Clients
    /// that wait for it are let in at once.
    pub fn guest_listens(&self, address: SocketAddr, protocol: Protocol) {
        self.command(Command::Listens(address, protocol));
    }

    /// The program has closed such a socket: with [`NetworkConfiguration::listens_told`] new clients wait again.
    pub fn guest_listens_no_more(&self, address: SocketAddr, protocol: Protocol) {
        self.command(Command::Unlistens(address, protocol));
    }

    /// Ends the network at once: all connections are reset.
    pub fn stop(&mut self) {
        self.command(Command::Stop);
        self.join();
    }

    /// Waits until the network has ended because the guest's side has.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Drop for UserNetwork {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Frames to the guest: an encoder, and the capture file.
struct Frames {
    encoder: FrameEncoder,
    capture: Option<Capture>,
    reserved: usize,
}

impl Frames {
    fn capture(&mut self, frame: &[u8]) {
        if let Some(capture) = &mut self.capture
            && let Err(error) = capture.add(frame)
        {
            remark(format_args!("the capture of frames ends: {error}"));
            self.capture = None;
        }
    }
}

impl FrameSink for Frames {
    fn has_room(&self) -> bool {
        self.encoder.has_room()
    }

    fn reserve(&mut self, length: usize) -> Option<&mut [u8]> {
        self.reserved = length;
        self.encoder.reserve(length)
    }

    fn commit(&mut self) {
        self.encoder.commit();
        if self.capture.is_some() {
            let pending = self.encoder.pending();
            let frame = pending
                .get(pending.len().saturating_sub(self.reserved)..)
                .unwrap_or_default()
                .to_vec();
            self.capture(&frame);
        }
    }
}

/// A socket of the host that leads to a port of the guest.
struct Door {
    /// There is more to accept, or datagrams to read.
    readable: bool,
    /// TCP: the guest's port, by its place. UDP: None.
    port: Option<usize>,
    /// UDP: the guest has told that a program has bound the port.
    bound: bool,
    /// The guest has told that a program listens, or has bound the port, at some time.
    used: bool,
}

/// A TCP port of the guest that clients of the host are led to.
#[derive(Default)]
struct Port {
    guest: u16,
    /// The guest has told that a program listens.
    listens: bool,
    /// It has told so since it was asked last.
    just_told: bool,
    /// Clients that the guest is to be asked for.
    waiting: VecDeque<u32>,
    /// Clients that it is being asked for.
    knocking: usize,
    /// The guest has accepted once: from then on a refusal is one.
    open: bool,
    delay: Option<Duration>,
    /// Not before this.
    next: Option<Moment>,
    /// While the guest has accepted nothing: the client it is being asked for, and until when it may answer.
    asked: Option<(u32, Moment)>,
    silence: Option<Duration>,
}

/// The thread's side of its owner.
struct Owner {
    commands: Receiver<Command>,
    bell: Arc<OwnedFd>,
    counters: Arc<Counters>,
}

/// A guest that may be stopped.
struct Suspension {
    /// When it began.
    since: Instant,
    /// The owner was woken, and has not resumed yet.
    woken: bool,
}

struct Gateway {
    configuration: NetworkConfiguration,
    /// Moved by the time that the guest was suspended: to the stack and all else that time does not exist.
    started: Instant,
    poller: Poller,
    stack: Stack,
    frames: Frames,
    decoder: FrameDecoder,
    stream: Option<UnixStream>,
    listener: Option<UnixListener>,
    readable: bool,
    writable: bool,
    dhcp: SocketId,
    published: Vec<Published>,
    /// For each published port.
    doors: Vec<Door>,
    ports: Vec<Port>,
    /// Where the guest listens, as it has told, and how many sockets: datagram sockets may share a port.
    listening: HashMap<(SocketAddr, Protocol), u32>,
    /// The guest can be reached: it has its address.
    addressed: bool,
    splices: Slots<Splice>,
    /// The splice of each socket of the stack, by the socket's index.
    by_socket: Vec<Option<(SocketId, u32)>>,
    flows: Flows,
    flows_readable: Vec<(u32, u16)>,
    next_sweep: Moment,
    /// Accepting goes on then.
    accept_again: Option<Moment>,
    /// Bytes that connections have moved.
    moved: u64,
    owner: Owner,
    /// The bell has rung.
    rung: bool,
    paused: bool,
    /// Who waits for the answer to a pause, and to a suspension.
    pausing: Vec<SyncSender<Activity>>,
    suspending: Vec<SyncSender<bool>>,
    suspended: Option<Suspension>,
}

impl Gateway {
    fn new(
        configuration: NetworkConfiguration,
        published: Vec<Published>,
        end: FrameEnd,
        owner: Owner,
    ) -> Result<Gateway, NetworkError> {
        let poller = Poller::new().map_err(NetworkError::system("epoll_create1"))?;
        let watch = NetworkError::system;
        poller
            .add(&owner.bell, Token::Bell)
            .map_err(watch("epoll_ctl"))?;
        for (index, published) in (0u32..).zip(&published) {
            poller
                .add(&published.socket, Token::Published(index))
                .map_err(watch("epoll_ctl"))?;
        }
        let (mut stream, mut listener) = (None, None);
        match end {
            FrameEnd::Stream(end) => {
                end.set_nonblocking(true).map_err(watch("fcntl"))?;
                poller
                    .add(&end, Token::Frames)
                    .map_err(watch("epoll_ctl"))?;
                stream = Some(end);
            }
            FrameEnd::Listener(end) => {
                end.set_nonblocking(true).map_err(watch("fcntl"))?;
                poller
                    .add(&end, Token::FrameListener)
                    .map_err(watch("epoll_ctl"))?;
                listener = Some(end);
            }
        }
        let capture = match &configuration.capture {
            Some(path) => Some(
                Capture::create(path).map_err(|source| NetworkError::Capture {
                    path: path.clone(),
                    source,
                })?,
            ),
            None => None,
        };
        let mut stack = make_stack(&configuration);
        let dhcp = stack.datagram_open(DatagramKind::Udp);
        // The port is free: nothing else is bound in a new stack.
        let _ = stack.datagram_bind(dhcp, SocketAddr::from(([0, 0, 0, 0], 67)));
        let flows = Flows::new(&configuration);
        let mut ports: Vec<Port> = Vec::new();
        let doors = published
            .iter()
            .map(|published| Door {
                readable: true,
                port: (published.publish.protocol == Protocol::Tcp)
                    .then(|| place_of(&mut ports, published.publish.guest)),
                bound: false,
                used: false,
            })
            .collect();
        Ok(Gateway {
            started: Instant::now(),
            poller,
            stack,
            frames: Frames {
                encoder: FrameEncoder::new(WRITE_BYTES),
                capture,
                reserved: 0,
            },
            decoder: FrameDecoder::new(READ_BYTES),
            stream,
            listener,
            readable: true,
            writable: true,
            dhcp,
            addressed: !(configuration.dhcp && configuration.listens_told),
            doors,
            ports,
            listening: HashMap::new(),
            published,
            splices: Slots::new(),
            by_socket: Vec::new(),
            flows,
            flows_readable: Vec::new(),
            next_sweep: Moment::ZERO,
            accept_again: None,
            moved: 0,
            owner,
            rung: false,
            paused: false,
            pausing: Vec::new(),
            suspending: Vec::new(),
            suspended: None,
            configuration,
        })
    }

    /// The time that counts: it stands still while the guest is suspended.
    fn now(&self) -> Moment {
        match &self.suspended {
            Some(suspension) => suspension.since.saturating_duration_since(self.started),
            None => self.started.elapsed(),
        }
    }

    fn run(&mut self) {
        let (mut changes, mut events) = (Vec::new(), Events::new());
        let mut work: Vec<u32> = Vec::new();
        loop {
            let mut wanted = false;
            for change in &changes {
                self.take_change(change, &mut work);
                wanted |= self.suspended.is_some() && self.is_for_guest(change);
            }
            if !self.obey(&mut wanted) {
                return;
            }
            if self.suspended.is_some() {
                if wanted {
                    self.wake();
                }
                if self.poller.wait(None, &mut events, &mut changes).is_err() {
                    return;
                }
                continue;
            }
            self.flows.set_time(self.now());
            self.accept_all();
            if !self.read_frames() {
                break;
            }
            for index in work.drain(..) {
                self.pump(index);
            }
            self.serve();
            self.answer();
            let timeout = if self.suspended.is_some() {
                None
            } else {
                self.timeout()
            };
            if self
                .poller
                .wait(timeout, &mut events, &mut changes)
                .is_err()
            {
                return;
            }
        }
        self.drain();
    }

    /// Whether something that epoll says is worth waking a suspended guest.
    fn is_for_guest(&mut self, change: &Change) -> bool {
        match change.token {
            Token::Bell | Token::FrameListener => false,
            // It has sent that before it was stopped.
            Token::Frames => change.readable,
            Token::Published(index) => {
                change.readable
                    && self
                        .doors
                        .get(index as usize)
                        .is_some_and(|door| door.used || !self.configuration.listens_told)
            }
            Token::Splice(index, generation) => self
                .splices
                .get_exact(index, generation)
                .is_some_and(|splice| change.failed || (change.readable && !splice.host_ended())),
            Token::Flow(..) => change.readable,
        }
    }

    /// Does what the owner has asked for; false when the network is to end. `wanted` is set when that needs the guest.
    fn obey(&mut self, wanted: &mut bool) -> bool {
        if !std::mem::take(&mut self.rung) {
            return true;
        }
        let _ = rustix::io::read(&*self.owner.bell, &mut [0; 8]);
        while let Ok(command) = self.owner.commands.try_recv() {
            match command {
                Command::Stop => return false,
                Command::Pause(answer) => {
                    self.paused = true;
                    self.accept_again = None;
                    // What the guest has sent so far counts.
                    self.readable = true;
                    if self.suspended.is_some() {
                        let _ = answer.send(self.activity());
                    } else {
                        self.pausing.push(answer);
                    }
                }
                Command::Suspend(answer) => {
                    self.readable = true;
                    if self.suspended.is_some() {
                        let _ = answer.send(true);
                    } else {
                        self.suspending.push(answer);
                    }
                }
                Command::Resume => {
                    self.paused = false;
                    if let Some(suspension) = self.suspended.take() {
                        self.started += suspension.since.elapsed();
                    }
                }
                Command::Adopt(connection, port) => {
                    self.adopt(connection, port);
                    *wanted = true;
                }
                Command::Listens(address, protocol) => self.guest_listens(address, protocol),
                Command::Unlistens(address, protocol) => {
                    self.guest_listens_no_more(address, protocol);
                }
            }
        }
        true
    }

    fn wake(&mut self) {
        if let Some(suspension) = &mut self.suspended
            && !suspension.woken
            && let Some(wake) = &self.configuration.wake
        {
            suspension.woken = true;
            wake();
        }
    }

    /// Answers the owner's questions, once all that was known when they came has been done.
    fn answer(&mut self) {
        let activity = self.activity();
        for answer in self.pausing.drain(..) {
            // Who does not wait any more need not know.
            let _ = answer.send(activity);
        }
        if self.suspending.is_empty() {
            return;
        }
        let quiet = self.configuration.wake.is_some() && self.is_quiet();
        for answer in std::mem::take(&mut self.suspending) {
            let _ = answer.send(quiet);
        }
        if quiet {
            self.suspended = Some(Suspension {
                since: Instant::now(),
                woken: false,
            });
        }
    }

    fn activity(&mut self) -> Activity {
        let counters = &self.owner.counters;
        let connections = self.splices.len() + self.stack.tcp_unsent_orphans();
        counters.connections.store(connections, Ordering::Release);
        counters
            .bytes
            .store(self.moved + self.flows.passed(), Ordering::Release);
        counters.activity()
    }

    /// Whether nothing is under way between the host and the guest; see [`UserNetwork::suspend`].
    fn is_quiet(&mut self) -> bool {
        self.stream.is_some()
            && !self.readable
            && self.decoder.is_empty()
            && self.frames.encoder.pending().is_empty()
            && self.stack.is_quiet()
            && self.flows_readable.is_empty()
            && !self.has_clients()
            && self.splices.indices().into_iter().all(|index| {
                self.splices.get_mut(index).is_some_and(|splice| {
                    splice.stage == Stage::Open && (!splice.readable || splice.host_ended())
                })
            })
    }

    /// Takes note of what epoll says.
    fn take_change(&mut self, change: &Change, work: &mut Vec<u32>) {
        match change.token {
            Token::Bell => self.rung = true,
            Token::Frames => {
                self.readable |= change.readable;
                self.writable |= change.writable;
                if change.hung_up
                    && let Some(suspension) = self.suspended.take()
                {
                    // The guest has ended, though it was stopped.
                    self.started += suspension.since.elapsed();
                }
            }
            Token::FrameListener => {
                if let Some(listener) = &self.listener
                    && let Ok((stream, _)) = listener.accept()
                    && stream.set_nonblocking(true).is_ok()
                    && self.poller.add(&stream, Token::Frames).is_ok()
                {
                    // One guest, once.
                    self.listener = None;
                    self.stream = Some(stream);
                    (self.readable, self.writable) = (true, true);
                }
            }
            Token::Published(index) => {
                if let Some(door) = self.doors.get_mut(index as usize) {
                    door.readable |= change.readable;
                }
            }
            Token::Splice(index, generation) => {
                if let Some(splice) = self.splices.get_exact(index, generation) {
                    splice.readable |= change.readable;
                    splice.writable |= change.writable;
                    splice.hung_up |= change.hung_up;
                    splice.failed |= change.failed;
                    work.push(index);
                }
            }
            Token::Flow(index, generation) => {
                if change.readable && !self.flows_readable.contains(&(index, generation)) {
                    self.flows_readable.push((index, generation));
                }
            }
        }
    }

    /// Reads frames; false when the stream has ended.
    fn read_frames(&mut self) -> bool {
        let now = self.now();
        for _ in 0..READS {
            let Some(stream) = self.stream.as_ref().filter(|_| self.readable) else {
                return true;
            };
            let space = self.decoder.space();
            let asked = space.len();
            match rustix::io::read(stream, space) {
                Ok(0) => return false,
                Ok(count) => {
                    self.decoder.filled(count);
                    // As for any stream: less than asked for means that there is no more.
                    self.readable = count == asked;
                }
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => continue,
                Err(_) => return false,
            }
            loop {
                match self.decoder.next_frame() {
                    Ok(Some(frame)) => {
                        self.stack.receive(now, frame);
                        self.frames.capture(frame);
                    }
                    Ok(None) => break,
                    Err(error) => {
                        remark(format_args!("{error}"));
                        return false;
                    }
                }
            }
        }
        true
    }

    /// Lets the stack work, does what it asks for, and writes frames, until nothing is left to do.
    fn serve(&mut self) {
        loop {
            let now = self.now();
            self.stack.poll(now, &mut self.frames);
            let mut any = false;
            while let Some(event) = self.stack.next_event() {
                any = true;
                match event {
                    Event::Ready(id) if id == self.dhcp => self.answer_dhcp(),
                    Event::Ready(id) => {
                        if let Some(index) = self.splice_of(id) {
                            self.pump(index);
                        }
                    }
                    Event::Intercepted(id) => self.dial(id),
                    Event::Configured => {}
                }
            }
            while let Some(datagram) = self.stack.next_intercepted() {
                any = true;
                self.flows.take_from_guest(
                    &self.configuration,
                    &mut self.stack,
                    &self.poller,
                    &self.published,
                    &datagram,
                );
            }
            any |= self.read_flows();
            any |= self.knock_all();
            let had_room = self.frames.has_room();
            self.write_frames();
            // With room again the stack may have more to send.
            any |= !had_room && self.frames.has_room();
            if !any {
                break;
            }
        }
        if let Some(capture) = &mut self.frames.capture
            && capture.flush().is_err()
        {
            self.frames.capture = None;
        }
        let now = self.now();
        if now >= self.next_sweep {
            self.next_sweep = now + SWEEP;
            self.flows.sweep();
        }
    }

    fn write_frames(&mut self) {
        let Some(stream) = &self.stream else { return };
        while self.writable && !self.frames.encoder.pending().is_empty() {
            match rustix::net::send(
                stream,
                self.frames.encoder.pending(),
                rustix::net::SendFlags::NOSIGNAL,
            ) {
                Ok(count) => self.frames.encoder.sent(count),
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                // The end shows in the next read.
                Err(_) => {
                    self.readable = true;
                    return;
                }
            }
        }
    }

    /// How long to wait for changes; None for ever.
    fn timeout(&self) -> Option<Duration> {
        if (self.readable && self.stream.is_some()) || !self.flows_readable.is_empty() {
            return Some(Duration::ZERO);
        }
        let sweep = (!self.flows.is_empty()).then_some(self.next_sweep);
        let knock = self
            .ports
            .iter()
            .filter(|port| {
                !port.waiting.is_empty() && port.knocking < port.limit() && self.may_knock(port)
            })
            .filter_map(|port| port.next)
            .min();
        let silence = self
            .ports
            .iter()
            .filter_map(|port| port.asked)
            .map(|(_, until)| until)
            .min();
        let next = [
            self.stack.next_deadline(),
            sweep,
            self.accept_again,
            knock,
            silence,
        ]
        .into_iter()
        .flatten()
        .min()?;
        Some(next.saturating_sub(self.now()))
    }

    /// Whether the guest may be asked for clients of a port.
    fn may_knock(&self, port: &Port) -> bool {
        !self.configuration.listens_told || (self.addressed && port.listens)
    }

    /// A program of the guest listens.
    fn guest_listens(&mut self, address: SocketAddr, protocol: Protocol) {
        // Nobody gets there from outside.
        if address.ip().to_canonical().is_loopback() || self.listening.len() >= LISTENS {
            return;
        }
        let sockets = self.listening.entry((address, protocol)).or_default();
        *sockets = sockets.saturating_add(1);
        for (door, published) in self.doors.iter_mut().zip(&self.published) {
            let publish = published.publish;
            door.used |= publish.protocol == protocol && publish.guest == address.port();
        }
        match protocol {
            Protocol::Tcp => {
                let soon = self.now() + KNOCK_FIRST;
                let found = self.ports.iter_mut();
                for port in found.filter(|port| port.guest == address.port()) {
                    port.listens = true;
                    port.just_told = true;
                    port.delay = None;
                    port.next = None;
                    if let Some((_, until)) = &mut port.asked {
                        // It was asked too early, and its refusal may be lost.
                        *until = soon.min(*until);
                        port.silence = Some(SILENCE_FIRST);
                    }
                }
            }
            Protocol::Udp => self.set_bound(address.port(), true),
        }
    }

    fn guest_listens_no_more(&mut self, address: SocketAddr, protocol: Protocol) {
        if let Some(sockets) = self.listening.get_mut(&(address, protocol)) {
            *sockets -= 1;
            if *sockets == 0 {
                self.listening.remove(&(address, protocol));
            }
        }
        let same = |(other, transport): &(SocketAddr, Protocol)| {
            other.port() == address.port() && *transport == protocol
        };
        if self.listening.keys().any(same) {
            return;
        }
        match protocol {
            Protocol::Tcp => {
                let found = self.ports.iter_mut();
                for port in found.filter(|port| port.guest == address.port()) {
                    port.listens = false;
                }
            }
            Protocol::Udp => self.set_bound(address.port(), false),
        }
    }

    fn set_bound(&mut self, guest: u16, bound: bool) {
        for (door, published) in self.doors.iter_mut().zip(&self.published) {
            if published.publish.protocol == Protocol::Udp && published.publish.guest == guest {
                door.bound = bound;
            }
        }
    }

    /// Whether clients of published ports wait for the guest. Ports that no program has ever cared for do not count.
    fn has_clients(&mut self) -> bool {
        let told = self.configuration.listens_told;
        let doors = self.doors.iter_mut().zip(&self.published);
        doors
            .filter(|(door, _)| door.used || !told)
            .any(|(door, published)| {
                // Nobody may have looked for a while.
                door.readable = door.readable && host::is_readable(&published.socket);
                door.readable
            })
    }

    fn answer_dhcp(&mut self) {
        while let Ok(request) = self.stack.datagram_receive(self.dhcp) {
            let Some(data) = dhcp::answer(&self.configuration, &request.data) else {
                continue;
            };
            // What is sent after it finds the guest with its address.
            let first = !self.addressed && dhcp::is_acknowledgement(&data);
            self.addressed |= first;
            // To all: the guest may not have the address yet.
            self.stack.send_datagram(&Datagram {
                kind: DatagramKind::Udp,
                source: SocketAddr::new(self.configuration.gateway_v4.into(), 67),
                destination: SocketAddr::from(([255, 255, 255, 255], 68)),
                data,
            });
            // The guest's network is coming up: what was asked before may be lost.
            let soon = self.now() + KNOCK_FIRST;
            for port in &mut self.ports {
                if let Some((_, until)) = &mut port.asked {
                    *until = soon.min(*until);
                    port.silence = Some(SILENCE_FIRST);
                }
            }
            if first {
                self.accept_all();
            }
        }
    }

    fn read_flows(&mut self) -> bool {
        let mut any = false;
        for (index, generation) in std::mem::take(&mut self.flows_readable) {
            any = true;
            if self
                .flows
                .take_from_host(&mut self.stack, index, generation)
            {
                self.flows_readable.push((index, generation));
            }
        }
        for index in 0..self.published.len() {
            let (Some(published), Some(door)) =
                (self.published.get(index), self.doors.get_mut(index))
            else {
                continue;
            };
            if door.readable
                && !self.paused
                && self.addressed
                && door.takes_datagrams(&self.configuration)
            {
                any = true;
                door.readable = self.flows.take_from_clients(
                    &self.configuration,
                    &mut self.stack,
                    &self.poller,
                    published,
                    index as u32,
                );
            }
        }
        any
    }

    fn splice_of(&self, id: SocketId) -> Option<u32> {
        self.by_socket
            .get(id.index())
            .copied()
            .flatten()
            .filter(|(socket, _)| *socket == id)
            .map(|(_, index)| index)
    }

    fn join(&mut self, id: SocketId, index: u32) {
        if self.by_socket.len() <= id.index() {
            self.by_socket.resize(id.index() + 1, None);
        }
        if let Some(entry) = self.by_socket.get_mut(id.index()) {
            *entry = Some((id, index));
        }
    }

    /// Accepts all clients of published TCP ports.
    fn accept_all(&mut self) {
        let now = self.now();
        if self.paused || self.accept_again.is_some_and(|at| now < at) {
            return;
        }
        self.accept_again = None;
        for index in 0..self.published.len() {
            let (Some(published), Some(door)) =
                (self.published.get(index), self.doors.get_mut(index))
            else {
                continue;
            };
            let Some(place) = door.port else { continue };
            let Some(port) = self.ports.get_mut(place) else {
                continue;
            };
            if self.configuration.listens_told && !(self.addressed && port.listens) {
                continue;
            }
            while door.readable {
                match rustix::net::accept_with(
                    &published.socket,
                    SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
                ) {
                    Ok(socket) => {
                        // Small answers must not wait for the client's acknowledgement.
                        let _ = sockopt::set_tcp_nodelay(&socket, true);
                        let mut splice = Splice::new(socket, Stage::Waiting, now);
                        splice.port = Some(place as u32);
                        if let Some(index) = add_splice(&mut self.splices, &self.poller, splice) {
                            port.waiting.push_back(index);
                        }
                    }
                    // Its owner has ended it.
                    Err(Errno::AGAIN | Errno::INVAL) => door.readable = false,
                    Err(Errno::INTR | Errno::CONNABORTED) => {}
                    Err(_) => {
                        // No descriptors or memory: the others wait in the host's backlog.
                        self.accept_again = Some(now + ACCEPT_PAUSE);
                        return;
                    }
                }
            }
        }
    }

    /// Takes a connection that the owner has accepted.
    fn adopt(&mut self, connection: OwnedFd, guest: u16) {
        // Small answers must not wait; a Unix socket has no such thing.
        let _ = sockopt::set_tcp_nodelay(&connection, true);
        let place = place_of(&mut self.ports, guest);
        let mut splice = Splice::new(connection, Stage::Waiting, self.now());
        splice.port = Some(place as u32);
        let Some(port) = self.ports.get_mut(place) else {
            return;
        };
        port.listens |= self
            .listening
            .keys()
            .any(|(address, protocol)| address.port() == guest && *protocol == Protocol::Tcp);
        if let Some(index) = add_splice(&mut self.splices, &self.poller, splice) {
            port.waiting.push_back(index);
        }
    }

    /// Asks the guest for waiting clients, as many as may be; true when it asked for one.
    fn knock_all(&mut self) -> bool {
        let now = self.now();
        let mut any = false;
        for index in 0..self.ports.len() {
            if let Some(port) = self.ports.get_mut(index)
                && let Some((place, until)) = port.asked
                && now >= until
            {
                let silence = port.silence.unwrap_or(SILENCE_FIRST);
                port.silence = Some((silence * 9 / 8).min(SILENCE_LONGEST));
                port.asked = None;
                self.knock_later(place);
            }
            while let Some(port) = self.ports.get_mut(index) {
                if port.waiting.is_empty()
                    || (self.configuration.listens_told && !(self.addressed && port.listens))
                    || port.knocking >= port.limit()
                    || port.next.is_some_and(|at| now < at)
                {
                    break;
                }
                let Some(place) = port.waiting.pop_front() else {
                    break;
                };
                let since = self.splices.get_mut(place).map(|splice| splice.since);
                if since.is_none_or(|since| now.saturating_sub(since) > WAIT_LONGEST) {
                    self.end(place, Outcome::GuestReset);
                    continue;
                }
                let guest_port = port.guest;
                let id = self.stack.tcp_open();
                let _ = self.stack.tcp_set_no_delay(id, true);
                let guest = SocketAddr::new(self.configuration.guest_v4.into(), guest_port);
                if self.stack.tcp_connect(id, guest).is_err() {
                    // All ports of the gateway are taken: soon some are free again.
                    self.stack.close(id);
                    port.waiting.push_front(place);
                    port.next = Some(now + KNOCK_LONGEST);
                    break;
                }
                port.knocking += 1;
                port.just_told = false;
                if !port.open {
                    let first = if self.configuration.listens_told {
                        SILENCE_LONGEST
                    } else {
                        SILENCE_FIRST
                    };
                    port.asked = Some((place, now + port.silence.unwrap_or(first)));
                }
                any = true;
                if let Some(splice) = self.splices.get_mut(place) {
                    splice.stage = Stage::Knocking;
                    splice.guest = Some(id);
                }
                self.join(id, place);
            }
        }
        any
    }

    /// Connects out for the guest.
    fn dial(&mut self, id: SocketId) {
        let Some(destination) = self.stack.tcp_local_address(id) else {
            return;
        };
        let ours = datagram::is_ours(&self.configuration, destination.ip());
        let target = if ours && destination.port() == 53 && !self.flows.resolvers().is_empty() {
            self.flows.resolvers().first().copied()
        } else {
            datagram::reachable(&self.configuration, destination)
        };
        let Some(target) = target else {
            let error = if ours {
                Error::ConnectionRefused
            } else {
                Error::HostUnreachable
            };
            let _ = self.stack.tcp_refuse(id, error);
            return;
        };
        match host::start_connect(&target) {
            Ok(socket) => {
                let mut splice = Splice::new(socket, Stage::Dialing, self.now());
                splice.guest = Some(id);
                // Not before epoll says that it is connected.
                splice.writable = false;
                match add_splice(&mut self.splices, &self.poller, splice) {
                    Some(place) => self.join(id, place),
                    None => {
                        let _ = self.stack.tcp_refuse(id, Error::HostUnreachable);
                    }
                }
            }
            Err(error) => {
                let _ = self.stack.tcp_refuse(id, refusal(&error));
            }
        }
    }

    /// Moves a connection on.
    fn pump(&mut self, index: u32) {
        let Some(splice) = self.splices.get_mut(index) else {
            return;
        };
        match splice.stage {
            Stage::Waiting => return,
            Stage::Dialing => {
                let Some(id) = splice.guest else { return };
                if self.stack.readiness(id).contains(Readiness::ERROR) {
                    self.end(index, Outcome::GuestReset);
                    return;
                }
                if !splice.writable {
                    return;
                }
                match sockopt::socket_error(&splice.host) {
                    Ok(Ok(())) => {
                        splice.stage = Stage::Open;
                        let _ = self.stack.tcp_admit(id);
                    }
                    Ok(Err(error)) | Err(error) => {
                        let _ = self.stack.tcp_refuse(id, refusal(&error.into()));
                        self.splices.remove(index);
                        return;
                    }
                }
            }
            Stage::Knocking => {
                let Some(id) = splice.guest else { return };
                let ready = self.stack.readiness(id);
                let place = splice.port.unwrap_or(0) as usize;
                let Some(port) = self.ports.get_mut(place) else {
                    return;
                };
                if ready.contains(Readiness::CONNECTED) {
                    splice.stage = Stage::Open;
                    port.knocking = port.knocking.saturating_sub(1);
                    port.open = true;
                    port.asked = None;
                    port.delay = None;
                    port.next = None;
                } else if ready.contains(Readiness::ERROR) {
                    let open = port.open;
                    self.knock_later(index);
                    if open {
                        self.end(index, Outcome::GuestReset);
                    }
                    return;
                } else {
                    return;
                }
            }
            Stage::Open => {}
        }
        let outcome = splice.pump(&mut self.stack, &mut self.moved);
        if splice.answered
            && splice.port.is_some()
            && let Some(tell) = self.configuration.answered.take()
        {
            tell();
        }
        if outcome != Outcome::Open {
            self.end(index, outcome);
        }
    }

    /// Ends a question to the guest; where it has accepted nothing yet, it is asked again soon.
    fn knock_later(&mut self, index: u32) {
        let Some(splice) = self.splices.get_mut(index) else {
            return;
        };
        if let Some(id) = splice.guest.take() {
            self.stack.close(id);
        }
        let now = self.now();
        let Some(splice) = self.splices.get_mut(index) else {
            return;
        };
        let Some(port) = self.ports.get_mut(splice.port.unwrap_or(0) as usize) else {
            return;
        };
        port.knocking = port.knocking.saturating_sub(1);
        port.asked = None;
        if port.open {
            return;
        }
        // The guest is still starting.
        splice.stage = Stage::Waiting;
        let delay = port
            .delay
            .map_or(KNOCK_FIRST, |delay| (delay * 5 / 4).min(KNOCK_LONGEST));
        if std::mem::take(&mut port.just_told) {
            // It listens since.
            port.next = None;
        } else {
            port.delay = Some(delay);
            port.next = Some(now + delay);
        }
        port.waiting.push_front(index);
    }

    fn end(&mut self, index: u32, outcome: Outcome) {
        let Some(splice) = self.splices.remove(index) else {
            return;
        };
        if matches!(outcome, Outcome::GuestReset) {
            splice.reset_host();
        }
        if let Some(id) = splice.guest {
            if outcome == Outcome::HostReset {
                let _ = self.stack.tcp_abort(id);
            }
            self.stack.close(id);
        }
    }

    /// The guest has ended: what it has sent goes on to the hosts' sockets, then all connections end.
    fn drain(&mut self) {
        self.stream = None;
        let end = Instant::now() + DRAIN;
        let (mut changes, mut events) = (Vec::new(), Events::new());
        loop {
            let mut left = false;
            for index in self.splices.indices() {
                let Some(splice) = self.splices.get_mut(index) else {
                    continue;
                };
                // Nothing goes to the guest any more.
                splice.readable = false;
                let outcome = splice.pump(&mut self.stack, &mut self.moved);
                let waits = splice
                    .guest
                    .is_some_and(|id| self.stack.tcp_queues(id).0 > 0);
                if outcome != Outcome::Open {
                    self.end(index, outcome);
                } else if waits {
                    left = true;
                } else {
                    self.end(index, Outcome::GuestReset);
                }
            }
            let now = Instant::now();
            if !left
                || now >= end
                || self
                    .poller
                    .wait(Some(end - now), &mut events, &mut changes)
                    .is_err()
            {
                break;
            }
            let mut work = Vec::new();
            for change in &changes {
                self.take_change(change, &mut work);
            }
            if !self.obey(&mut false) {
                return;
            }
            let activity = self.activity();
            for answer in self.pausing.drain(..) {
                let _ = answer.send(activity);
            }
            for answer in self.suspending.drain(..) {
                let _ = answer.send(false);
            }
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.owner.counters.connections.store(0, Ordering::Release);
    }
}

/// Takes a connection in and watches it; None, and it is closed, when it cannot be watched.
fn add_splice(splices: &mut Slots<Splice>, poller: &Poller, splice: Splice) -> Option<u32> {
    let (index, generation) = splices.insert(splice);
    let watched = splices.get_mut(index).is_some_and(|splice| {
        poller
            .add(&splice.host, Token::Splice(index, generation))
            .is_ok()
    });
    if !watched {
        splices.remove(index);
    }
    watched.then_some(index)
}

/// The place of one of the guest's TCP ports.
fn place_of(ports: &mut Vec<Port>, guest: u16) -> usize {
    ports
        .iter()
        .position(|port| port.guest == guest)
        .unwrap_or_else(|| {
            ports.push(Port {
                guest,
                ..Port::default()
            });
            ports.len() - 1
        })
}

impl Door {
    /// Whether datagrams are taken in: it is a UDP port, and a program wants them.
    fn takes_datagrams(&self, configuration: &NetworkConfiguration) -> bool {
        self.port.is_none() && (self.bound || !configuration.listens_told)
    }
}

impl Port {
    /// How many clients the guest may be asked for at one time: one, until it has accepted one.
    fn limit(&self) -> usize {
        if self.open { KNOCKING } else { 1 }
    }
}

/// The gateway's own stack.
fn make_stack(configuration: &NetworkConfiguration) -> Stack {
    let mut seed = [0; 8];
    // Without the host's random numbers the address space layout must do.
    let known = std::fs::File::open("/dev/urandom")
        .and_then(|mut file| io::Read::read_exact(&mut file, &mut seed));
    let seed = match known {
        Ok(()) => u64::from_ne_bytes(seed),
        Err(_) => std::ptr::from_ref(&seed) as u64,
    };
    let mut stack = Stack::new(&Configuration {
        mac: configuration.gateway_mac,
        mtu: usize::from(configuration.mtu),
        checksums: configuration.checksums,
        seed,
        buffer_budget: 64 << 20,
        buffer_minimum: 8 << 10,
        buffer_maximum: 256 << 10,
        half_open_maximum: 8192,
        // The link keeps the order, so nothing old can come.
        time_wait: Duration::from_secs(1),
        intercept: true,
        intercept_own: true,
    });
    stack.add_address(configuration.gateway_v4.into(), configuration.prefix_v4);
    if configuration.dns_v4 != configuration.gateway_v4 {
        stack.add_address(configuration.dns_v4.into(), configuration.prefix_v4);
    }
    stack.add_address(configuration.gateway_v6.into(), 64);
    // Known beforehand: a frame for the guest need not wait for its answer.
    for address in [
        IpAddr::V4(configuration.guest_v4),
        IpAddr::V6(configuration.guest_v6),
    ] {
        stack.add_neighbour(address, configuration.guest_mac);
    }
    let mut prefix = configuration.gateway_v6.octets();
    prefix[8..].fill(0);
    stack.advertise(Advertisement {
        prefix: Ipv6Addr::from(prefix),
        prefix_length: 64,
        name_servers: vec![configuration.gateway_v6],
        mtu: u32::from(configuration.mtu).max(1280),
    });
    stack
}

/// What the guest is told when the host could not connect.
fn refusal(error: &io::Error) -> Error {
    match error.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => Error::ConnectionRefused,
        ErrorKind::NetworkUnreachable => Error::NetworkUnreachable,
        // Out of descriptors: the guest may try again later.
        _ => Error::HostUnreachable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_stands_still_while_the_guest_is_suspended() {
        let mut configuration = NetworkConfiguration::new([2, 0, 0, 0, 0, 9]);
        configuration.wake = Some(Arc::new(|| {}));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (commands, receiver) = channel();
        let bell = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        let owner = Owner {
            commands: receiver,
            bell: Arc::new(bell),
            counters: Arc::default(),
        };
        let end = FrameEnd::Stream(theirs);
        let mut gateway = Gateway::new(configuration, Vec::new(), end, owner).unwrap();
        let obey = |gateway: &mut Gateway, command| {
            commands.send(command).unwrap();
            gateway.rung = true;
            assert!(gateway.obey(&mut false));
        };
        let (answer, answered) = sync_channel(1);
        obey(&mut gateway, Command::Suspend(answer));
        assert!(gateway.read_frames());
        gateway.serve();
        gateway.answer();
        assert!(answered.recv().unwrap());
        let then = gateway.now();
        assert_eq!(gateway.now(), then);
        // As if an hour had passed since.
        let hour = Duration::from_secs(3600);
        gateway.started -= hour;
        gateway.suspended.as_mut().unwrap().since -= hour;
        assert_eq!(gateway.now(), then);
        obey(&mut gateway, Command::Resume);
        assert!(gateway.now() >= then && gateway.now() < then + hour / 2);
        drop(ours);
    }
}

//! The gateway's thread: frames on one side, sockets of the host on the other.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
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
/// before its network is up is lost.
const SILENCE_FIRST: Duration = Duration::from_millis(20);
const SILENCE_LONGEST: Duration = Duration::from_secs(1);
/// How long a client waits for a guest that does not listen.
const WAIT_LONGEST: Duration = Duration::from_secs(120);
/// How long accepting pauses when there are no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long data that the guest has sent may take to reach the hosts' sockets after the guest has ended.
const DRAIN: Duration = Duration::from_secs(5);

/// A user-mode network, running in a thread of its own until it is stopped or the guest's side ends the stream.
#[derive(Debug)]
pub struct UserNetwork {
    published: Vec<(SocketAddr, Publish)>,
    static_network: StaticNetwork,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl UserNetwork {
    /// Opens the published ports and starts the thread.
    ///
    /// # Errors
    /// When a port cannot be opened or the capture file cannot be made: the error names it. Nothing is left behind.
    pub fn start(
        configuration: NetworkConfiguration,
        end: FrameEnd,
    ) -> Result<UserNetwork, NetworkError> {
        host::raise_descriptor_limit();
        let published = publish::open(&configuration.publish)?;
        let addresses = published
            .iter()
            .map(|published| (published.address, published.publish))
            .collect();
        let static_network = configuration.static_network();
        let stop = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)
            .map_err(|error| NetworkError::system("eventfd")(error.into()))?;
        let stop = Arc::new(stop);
        let mut gateway = Gateway::new(configuration, published, end, &stop)?;
        let thread = std::thread::Builder::new()
            .name("kiln-network".into())
            .spawn(move || gateway.run())
            .map_err(NetworkError::system("starting a thread"))?;
        Ok(UserNetwork {
            published: addresses,
            static_network,
            stop,
            thread: Some(thread),
        })
    }

    /// The addresses of the host that lead to the guest, with their ports as they were given out.
    #[must_use]
    pub fn published(&self) -> &[(SocketAddr, Publish)] {
        &self.published
    }

    /// What a guest that does not ask by DHCP is configured with.
    #[must_use]
    pub fn static_network(&self) -> &StaticNetwork {
        &self.static_network
    }

    /// Ends the network at once: all connections are reset.
    pub fn stop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
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
            eprintln!("kiln: the capture of frames ends: {error}");
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

/// What a published port has to do.
#[derive(Default)]
struct Port {
    /// The host has more to accept, or datagrams to read.
    readable: bool,
    /// Clients that the guest is to be asked for.
    waiting: VecDeque<u32>,
    /// Clients that it is being asked for.
    knocking: usize,
    /// The guest has accepted once: from then on a refusal is one.
    open: bool,
    delay: Option<Duration>,
    /// Not before this.
    next: Option<Instant>,
    /// While the guest has accepted nothing: the client it is being asked for, and until when it may answer.
    asked: Option<(u32, Instant)>,
    silence: Option<Duration>,
}

struct Gateway {
    configuration: NetworkConfiguration,
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
    ports: Vec<Port>,
    splices: Slots<Splice>,
    /// The splice of each socket of the stack, by the socket's index.
    by_socket: Vec<Option<(SocketId, u32)>>,
    flows: Flows,
    flows_readable: Vec<(u32, u16)>,
    next_sweep: Instant,
    /// Accepting goes on then.
    accept_again: Option<Instant>,
    stop: Arc<OwnedFd>,
}

impl Gateway {
    fn new(
        configuration: NetworkConfiguration,
        published: Vec<Published>,
        end: FrameEnd,
        stop: &Arc<OwnedFd>,
    ) -> Result<Gateway, NetworkError> {
        let poller = Poller::new().map_err(NetworkError::system("epoll_create1"))?;
        let watch = NetworkError::system;
        poller.add(stop, Token::Stop).map_err(watch("epoll_ctl"))?;
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
        let now = Instant::now();
        Ok(Gateway {
            started: now,
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
            ports: published
                .iter()
                .map(|_| Port {
                    readable: true,
                    ..Port::default()
                })
                .collect(),
            published,
            splices: Slots::new(),
            by_socket: Vec::new(),
            flows,
            flows_readable: Vec::new(),
            next_sweep: now,
            accept_again: None,
            stop: Arc::clone(stop),
            configuration,
        })
    }

    fn now(&self) -> Moment {
        self.started.elapsed()
    }

    fn run(&mut self) {
        let (mut changes, mut events) = (Vec::new(), Events::new());
        let mut work: Vec<u32> = Vec::new();
        loop {
            work.clear();
            for change in &changes {
                if !self.take_change(change, &mut work) {
                    return;
                }
            }
            self.accept_all();
            if !self.read_frames() {
                break;
            }
            for index in work.drain(..) {
                self.pump(index);
            }
            self.serve();
            let timeout = self.timeout();
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

    /// Takes note of what epoll says; false when the network is to end.
    fn take_change(&mut self, change: &Change, work: &mut Vec<u32>) -> bool {
        match change.token {
            Token::Stop => return !change.readable,
            Token::Frames => {
                self.readable |= change.readable;
                self.writable |= change.writable;
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
                if let Some(port) = self.ports.get_mut(index as usize) {
                    port.readable |= change.readable;
                }
            }
            Token::Splice(index, generation) => {
                if let Some(splice) = self.splices.get_exact(index, generation) {
                    splice.readable |= change.readable;
                    splice.writable |= change.writable;
                    splice.hung_up |= change.hung_up;
                    work.push(index);
                }
            }
            Token::Flow(index, generation) => {
                if change.readable && !self.flows_readable.contains(&(index, generation)) {
                    self.flows_readable.push((index, generation));
                }
            }
        }
        true
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
                        eprintln!("kiln: {error}");
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
        let now = Instant::now();
        if now >= self.next_sweep {
            self.next_sweep = now + SWEEP;
            self.flows.sweep(now);
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
        let now = Instant::now();
        let moment = self.now();
        let stack = self
            .stack
            .next_deadline()
            .map(|deadline| deadline.saturating_sub(moment));
        let sweep =
            (!self.flows.is_empty()).then(|| self.next_sweep.saturating_duration_since(now));
        let accept = self
            .accept_again
            .map(|at| at.saturating_duration_since(now));
        let knock = self
            .ports
            .iter()
            .filter(|port| !port.waiting.is_empty() && port.knocking < port.limit())
            .filter_map(|port| port.next)
            .map(|at| at.saturating_duration_since(now))
            .min();
        let silence = self
            .ports
            .iter()
            .filter_map(|port| port.asked)
            .map(|(_, until)| until.saturating_duration_since(now))
            .min();
        [stack, sweep, accept, knock, silence]
            .into_iter()
            .flatten()
            .min()
    }

    fn answer_dhcp(&mut self) {
        while let Ok(request) = self.stack.datagram_receive(self.dhcp) {
            let Some(data) = dhcp::answer(&self.configuration, &request.data) else {
                continue;
            };
            // To all: the guest may not have the address yet.
            self.stack.send_datagram(&Datagram {
                kind: DatagramKind::Udp,
                source: SocketAddr::new(self.configuration.gateway_v4.into(), 67),
                destination: SocketAddr::from(([255, 255, 255, 255], 68)),
                data,
            });
            // The guest's network is coming up: what was asked before may be lost.
            let soon = Instant::now() + KNOCK_FIRST;
            for port in &mut self.ports {
                if let Some((_, until)) = &mut port.asked {
                    *until = soon.min(*until);
                    port.silence = Some(SILENCE_FIRST);
                }
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
            let (Some(published), Some(port)) =
                (self.published.get(index), self.ports.get_mut(index))
            else {
                continue;
            };
            if published.publish.protocol == Protocol::Udp && port.readable {
                any = true;
                port.readable = self.flows.take_from_clients(
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
        if let Some(at) = self.accept_again {
            if Instant::now() < at {
                return;
            }
            self.accept_again = None;
        }
        for index in 0..self.published.len() {
            let (Some(published), Some(port)) =
                (self.published.get(index), self.ports.get_mut(index))
            else {
                continue;
            };
            if published.publish.protocol != Protocol::Tcp {
                continue;
            }
            while port.readable {
                match rustix::net::accept_with(
                    &published.socket,
                    SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
                ) {
                    Ok(socket) => {
                        // Small answers must not wait for the client's acknowledgement.
                        let _ = sockopt::set_tcp_nodelay(&socket, true);
                        let mut splice = Splice::new(socket, Stage::Waiting);
                        splice.published = Some(index as u32);
                        let (place, generation) = self.splices.insert(splice);
                        let watched = self.splices.get_mut(place).is_some_and(|splice| {
                            self.poller
                                .add(&splice.host, Token::Splice(place, generation))
                                .is_ok()
                        });
                        if watched {
                            port.waiting.push_back(place);
                        } else {
                            self.splices.remove(place);
                        }
                    }
                    Err(Errno::AGAIN) => port.readable = false,
                    Err(Errno::INTR | Errno::CONNABORTED) => {}
                    Err(_) => {
                        // No descriptors or memory: the others wait in the host's backlog.
                        self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                        return;
                    }
                }
            }
        }
    }

    /// Asks the guest for waiting clients, as many as may be; true when it asked for one.
    fn knock_all(&mut self) -> bool {
        let now = Instant::now();
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
                    || port.knocking >= port.limit()
                    || port.next.is_some_and(|at| now < at)
                {
                    break;
                }
                let Some(place) = port.waiting.pop_front() else {
                    break;
                };
                let since = self.splices.get_mut(place).map(|splice| splice.since);
                if since.is_none_or(|since| now.duration_since(since) > WAIT_LONGEST) {
                    self.end(place, Outcome::GuestReset);
                    continue;
                }
                let guest_port = self
                    .published
                    .get(index)
                    .map_or(0, |published| published.publish.guest);
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
                if !port.open {
                    port.asked = Some((place, now + port.silence.unwrap_or(SILENCE_FIRST)));
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
                let mut splice = Splice::new(socket, Stage::Dialing);
                splice.guest = Some(id);
                // Not before epoll says that it is connected.
                splice.writable = false;
                let (place, generation) = self.splices.insert(splice);
                let watched = self.splices.get_mut(place).is_some_and(|splice| {
                    self.poller
                        .add(&splice.host, Token::Splice(place, generation))
                        .is_ok()
                });
                if watched {
                    self.join(id, place);
                } else {
                    self.splices.remove(place);
                    let _ = self.stack.tcp_refuse(id, Error::HostUnreachable);
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
                let place = splice.published.unwrap_or(0) as usize;
                let Some(port) = self.ports.get_mut(place) else {
                    return;
                };
                if ready.contains(Readiness::CONNECTED) {
                    splice.stage = Stage::Open;
                    port.knocking -= 1;
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
        let outcome = splice.pump(&mut self.stack);
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
        let Some(port) = self.ports.get_mut(splice.published.unwrap_or(0) as usize) else {
            return;
        };
        port.knocking -= 1;
        port.asked = None;
        if port.open {
            return;
        }
        // The guest is still starting.
        splice.stage = Stage::Waiting;
        let delay = port
            .delay
            .map_or(KNOCK_FIRST, |delay| (delay * 5 / 4).min(KNOCK_LONGEST));
        port.delay = Some(delay);
        port.next = Some(Instant::now() + delay);
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
                let outcome = splice.pump(&mut self.stack);
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
                if !self.take_change(change, &mut work) {
                    return;
                }
            }
        }
        // Keeps the descriptor that the owner may still write to.
        let _ = &self.stop;
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

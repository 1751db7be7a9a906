//! The monitor: owns one running unikernel from its start to its last word.
//!
//! [`run`] binds the published ports, starts the engine, and then serves one event loop: the link, the console, the control
//! socket, signals to the monitor itself, and the end of the engine's process. With volumes, a second thread reads the link and
//! serves files, so that a slow disk delays neither connections nor `kill`.
//!
//! What always holds: the loop blocks nowhere but in `epoll_wait`, without a tick; an instance that never reached its
//! program leaves nothing behind; one that did leaves its last word in its state file before its lock goes free.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use kiln_abi::configuration::{Network, Volume};
use kiln_abi::host::exit_code;
use kiln_abi::link::{CONTROL, FIRST_VOLUME, ToKernel, ToMonitor};
use kiln_abi::manifest::Protocol;
use kiln_abi::process::{EXIT_MEMORY, EXIT_SHIM};
use kiln_network::UserNetwork;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;

use crate::arguments::{Publish, in_mount_order, signal_name};
use crate::console::{Log, Shown, Terminal};
use crate::control::{Activity, Event, Message, Request, Said, Server as ControlServer, Session};
use crate::direct;
use crate::engine::{End, Engine, Launch, Running};
use crate::error::Error;
use crate::link::{Fill, FrameReader, Sender, decode};
use crate::sockets::{Interest, SocketServer, Token};
use crate::state::{Instance, NetworkMode, Phase, now, now_microseconds};
use crate::volume::VolumeServer;

/// Name of the engine whose kernel gets its network's addresses with its configuration.
const PROCESS: &str = "process";
/// How long an engine's process may live on after its kernel said that the program has ended.
const GRACE_AFTER_EXIT: Duration = Duration::from_secs(5);
/// How long to wait before accepting again when this process or the host ran out of descriptors.
const RETRY: Duration = Duration::from_millis(50);
/// Most events that are remembered.
const MAX_HISTORY: usize = 256;
/// Bytes of a line of output that are looked through as one.
const MAX_LINE: usize = 8192;
/// Bytes of console output taken at once.
const CONSOLE_CHUNK: usize = 64 << 10;
/// How long a kernel may take to say how busy it is.
const ACTIVITY_PATIENCE: Duration = Duration::from_secs(5);
/// How long other work may keep a changed state from being saved.
const SAVE_LATEST: Duration = Duration::from_millis(50);
/// Bytes of standard input in one message.
const INPUT_CHUNK: usize = 16 << 10;

/// Told of what happens while an instance runs.
pub trait Observer {
    /// The program is about to run its first instruction.
    fn started(&mut self, instance: &Instance);
    /// Published ports now lead to a listening program.
    fn listening(&mut self, ports: &[Publish]);
    /// A remark of Kiln's own, which is in the log as well.
    fn remark(&mut self, text: &str);
    /// The monitor itself was told to end (SIGINT, SIGTERM): the program has been asked to.
    fn stopping(&mut self);
}

/// What an instance runs with, beside its configuration.
#[derive(Debug, Default)]
pub struct Setting {
    /// Show the console on standard output.
    pub output: bool,
    /// Give standard input to the program.
    pub input: bool,
    /// A session of the control socket from the start, which is told of events.
    pub session: Option<UnixStream>,
    /// Sockets that are bound already for published ports, by their place in the configuration.
    pub held: Vec<(usize, OwnedFd)>,
    /// A text in a line of the program's output to look for.
    pub line: Option<String>,
}

/// How an instance ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The exit code to pass on.
    pub code: i32,
    /// The program ran.
    pub started: bool,
    /// What happened, if it was not the program that ended.
    pub reason: Option<String>,
}

impl Ended {
    /// The instance ended before its program began: why. `console` is what was not shown yet.
    #[must_use]
    pub fn not_started(&self, console: &str) -> String {
        let reason = self
            .reason
            .as_deref()
            .unwrap_or("the unikernel ended before its program began");
        format!("{reason}\n{console}")
    }

    /// The kernel did its part: the image or the options are wrong.
    #[must_use]
    pub fn is_input(&self) -> bool {
        self.code == exit_code::CANNOT_START
    }
}

/// Kinds of wake-ups, in the upper byte of epoll's data.
mod wake {
    pub const LINK: u64 = 0;
    pub const CONSOLE: u64 = 1;
    pub const ENDED: u64 = 2;
    pub const SIGNAL: u64 = 3;
    pub const CONTROL: u64 = 4;
    pub const INPUT: u64 = 5;
    pub const OUTPUT: u64 = 6;
    pub const MESSAGES: u64 = 7;
    pub const SESSION: u64 = 8;
    pub const LISTENER: u64 = 9;
    pub const CONNECTING: u64 = 10;
    pub const NEWS: u64 = 11;
}

const KIND_SHIFT: u32 = 56;
const NUMBER_MASK: u64 = (1 << KIND_SHIFT) - 1;

fn data(kind: u64, number: u64) -> EventData {
    EventData::new_u64(kind << KIND_SHIFT | number & NUMBER_MASK)
}

/// The event loop's descriptor.
struct Poller(OwnedFd);

impl Poller {
    fn add(
        &self,
        descriptor: impl AsFd,
        flags: EventFlags,
        kind: u64,
        number: u64,
    ) -> io::Result<()> {
        Ok(epoll::add(&self.0, descriptor, data(kind, number), flags)?)
    }
}

impl Interest for Poller {
    fn readable(&mut self, descriptor: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        let (kind, number) = token_parts(token);
        self.add(descriptor, EventFlags::IN, kind, number)
    }
    fn writable(&mut self, descriptor: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        let (kind, number) = token_parts(token);
        self.add(
            descriptor,
            EventFlags::OUT | EventFlags::ONESHOT,
            kind,
            number,
        )
    }
    fn forget(&mut self, descriptor: BorrowedFd<'_>) {
        // It may not be there: then there is nothing to forget.
        let _ = epoll::delete(&self.0, descriptor);
    }
}

fn token_parts(token: Token) -> (u64, u64) {
    match token {
        Token::Listener(number) => (wake::LISTENER, u64::try_from(number).unwrap_or(NUMBER_MASK)),
        Token::Connecting(request) => (wake::CONNECTING, request),
    }
}

/// Where control messages come from.
enum Messages {
    /// This thread reads the link.
    Link(FrameReader),
    /// The volumes' thread does, and wakes us.
    Thread(Receiver<Result<ToMonitor, Error>>, Arc<OwnedFd>),
}

/// Runs an instance from its start to its end. Its state is saved along the way; removing it when it is no longer wanted
/// is left to the caller, except after an error before the engine's start.
///
/// # Errors
/// When it cannot be started (a port in use, a missing directory, an engine that refuses), or its kernel breaks the
/// link's protocol. Nothing of it runs then.
pub fn run(
    instance: &mut Instance,
    engine: &dyn Engine,
    setting: Setting,
    observer: &mut dyn Observer,
) -> Result<Ended, Error> {
    let mut monitor = Monitor::start(instance, engine, setting, observer)?;
    let outcome = monitor.serve();
    if outcome.is_err() {
        let _ = monitor.running.kill();
        let _ = monitor.running.wait();
    }
    let instance = &mut *monitor.instance;
    match &outcome {
        Ok(ended) => {
            instance.state.phase = if ended.reason.is_none() {
                Phase::Exited
            } else {
                Phase::Crashed
            };
            instance.state.exit_code = Some(ended.code);
            instance.state.reason.clone_from(&ended.reason);
        }
        Err(error) => {
            instance.state.phase = Phase::Crashed;
            instance.state.reason = Some(error.to_string());
        }
    }
    instance.state.ended = Some(now());
    instance.state.monitor = None;
    instance.state.process = None;
    let _ = std::fs::remove_file(instance.control_path());
    let saved = instance.save();
    if monitor.started {
        let (code, reason) = match &outcome {
            Ok(ended) => (ended.code, ended.reason.clone()),
            Err(error) => (1, Some(error.to_string())),
        };
        monitor.tell(Event::Ended { code, reason });
    }
    if let (Ok(_), Err(error)) = (&outcome, saved) {
        // The program's own end counts for whoever waits for it.
        monitor.observer.remark(&error.to_string());
    }
    outcome
}

struct Monitor<'a> {
    instance: &'a mut Instance,
    observer: &'a mut dyn Observer,
    running: Box<dyn Running>,
    poller: Poller,
    sender: Arc<Sender>,
    messages: Messages,
    sockets: Option<SocketServer>,
    /// The host's end of `--net direct`.
    user_network: Option<UserNetwork>,
    console: OwnedFd,
    console_open: bool,
    /// Console output is not read while standard output is stuck.
    console_paused: bool,
    log: Log,
    terminal: Option<Terminal>,
    control: ControlServer,
    sessions: HashMap<u64, Session>,
    next_session: u64,
    signals: UnixStream,
    stops: u32,
    input: Option<OwnedFd>,
    /// Standard input is a file: it cannot be waited for and is always ready.
    input_ready: bool,
    /// The link's descriptor is watched for room.
    link_watched: bool,
    link_closed: bool,
    sockets_paused: bool,
    retry: Option<Instant>,
    exited: Option<i32>,
    exit_deadline: Option<Instant>,
    killed: bool,
    started: bool,
    /// What has happened, for sessions that watch from later on.
    history: Vec<Message>,
    /// Sessions that wait to be told how busy the kernel is, and until when.
    asking: Vec<u64>,
    asking_deadline: Option<Instant>,
    /// Sockets that are held for published ports of `--net direct`.
    held: Vec<(usize, OwnedFd)>,
    /// The network has passed the first byte on to a client.
    answered: Arc<AtomicBool>,
    /// Rung by the network for that, and when somebody wants a suspended instance.
    news: Arc<OwnedFd>,
    /// A session has asked to accept nothing.
    paused: bool,
    suspended: bool,
    /// The state is to be saved when there is nothing else to do, and then at the latest.
    unsaved: Option<Instant>,
    line: Option<LineFinder>,
}

impl<'a> Monitor<'a> {
    fn start(
        instance: &'a mut Instance,
        engine: &dyn Engine,
        mut setting: Setting,
        observer: &'a mut dyn Observer,
    ) -> Result<Self, Error> {
        // Ten thousand connections need as many, here on their way and in the engine's process for their lives.
        kiln_network::raise_descriptor_limit();
        let configuration = &instance.configuration;
        let image = File::open(&configuration.image.path).map_err(Error::io(format!(
            "open the image {}",
            configuration.image.path.display()
        )))?;
        let mounts = in_mount_order(&configuration.volumes);
        let mut volumes = Vec::with_capacity(mounts.len());
        for volume in &mounts {
            volumes.push(VolumeServer::new(&volume.host, volume.read_only)?);
        }
        let mut ports = configuration.ports.clone();
        let mac = random_mac(instance.name());
        let mut frames = None;
        let mut user_network = None;
        let news = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(Error::io("make the event loop"))?;
        let news = Arc::new(news);
        let mut held = Vec::new();
        let answered = Arc::new(AtomicBool::new(false));
        let (network, sockets) = match &configuration.network {
            NetworkMode::None => (Network::None, None),
            NetworkMode::Socket => {
                let sockets = SocketServer::start(&mut ports, std::mem::take(&mut setting.held))?;
                let name_servers = host_name_servers();
                (Network::Socket { name_servers }, Some(sockets))
            }
            NetworkMode::Direct {
                addresses,
                gateways,
            } => {
                let (ours, theirs) =
                    UnixStream::pair().map_err(Error::io("make the frame stream"))?;
                let mut plan = direct::plan(mac, addresses, gateways, configuration)?;
                plan.mtu = if engine.name() == PROCESS {
                    kiln_network::LOCAL_MTU
                } else {
                    kiln_network::MACHINE_MTU
                };
                let bell = Arc::clone(&news);
                plan.wake = Some(Arc::new(move || {
                    let _ = rustix::io::write(&*bell, &1u64.to_ne_bytes());
                }));
                let (bell, told) = (Arc::clone(&news), Arc::clone(&answered));
                plan.answered = Some(Arc::new(move || {
                    told.store(true, Ordering::Release);
                    let _ = rustix::io::write(&*bell, &1u64.to_ne_bytes());
                }));
                let sockets = std::mem::take(&mut setting.held);
                for (place, socket) in &sockets {
                    let socket = socket
                        .try_clone()
                        .map_err(Error::io("hold a published port"))?;
                    held.push((*place, socket));
                }
                let started = direct::start(&plan, ours, &mut ports, sockets)?;
                // The guest is told all: asking for it would only cost time.
                let network = Network::Static(started.static_network().clone());
                frames = Some(OwnedFd::from(theirs));
                user_network = Some(started);
                (network, None)
            }
        };
        let (link, kernel_link) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(Error::io("make the link"))?;
        let (console, kernel_console) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map_err(Error::io("make the console's pipe"))?;
        rustix::io::ioctl_fionbio(&console, true).map_err(Error::io("make the console's pipe"))?;
        let poller = Poller(
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(Error::io("make the event loop"))?,
        );
        let log = Log::create(&instance.console_path()).map_err(Error::io(format!(
            "write {}",
            instance.console_path().display()
        )))?;
        let control = ControlServer::bind(instance).map_err(Error::io(format!(
            "make {}",
            instance.control_path().display()
        )))?;
        let signals = catch_signals().map_err(Error::io("catch signals"))?;
        let sender = Arc::new(Sender::new(link));

        let mut run = configuration.run.clone();
        run.network = network;
        run.link = true;
        run.input = setting.input;
        run.volumes = mounts
            .iter()
            .map(|volume| Volume {
                path: volume.path.clone(),
                read_only: volume.read_only,
            })
            .collect();
        run.realtime = Some(realtime());
        let launch = Launch {
            image_path: configuration.image.path.clone(),
            image,
            pieces: configuration.image.pieces,
            configuration: run.to_bytes(),
            memory: configuration.memory,
            console: kernel_console,
            link: kernel_link,
            frames,
            mac,
            directory: instance.directory().to_owned(),
        };
        let running = engine.start(launch)?;
        instance.state.ports = ports;
        instance.state.monitor = Some(std::process::id());
        instance.state.process = Some(running.pid());

        let messages = if volumes.is_empty() {
            Messages::Link(FrameReader::default())
        } else {
            let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(Error::io("make the volumes' thread"))?;
            let wake = Arc::new(wake);
            let (give, take) = sync_channel(1024);
            let (sender, waker) = (Arc::clone(&sender), Arc::clone(&wake));
            std::thread::Builder::new()
                .name("volumes".to_owned())
                .spawn(move || serve_volumes(&sender, volumes, &give, &waker))
                .map_err(Error::io("make the volumes' thread"))?;
            Messages::Thread(take, wake)
        };
        let mut monitor = Self {
            instance,
            observer,
            running,
            poller,
            sender,
            messages,
            sockets,
            user_network,
            console,
            console_open: true,
            console_paused: false,
            log,
            terminal: setting.output.then(Terminal::default),
            control,
            sessions: HashMap::new(),
            next_session: 0,
            signals,
            stops: 0,
            input: None,
            input_ready: false,
            link_watched: false,
            link_closed: false,
            sockets_paused: false,
            retry: None,
            exited: None,
            exit_deadline: None,
            killed: false,
            started: false,
            history: Vec::new(),
            asking: Vec::new(),
            asking_deadline: None,
            held,
            answered,
            news,
            paused: false,
            suspended: false,
            unsaved: None,
            line: setting.line.take().map(LineFinder::new),
        };
        monitor
            .watch(&mut setting)
            .map_err(Error::io("wait for the unikernel's events"))?;
        monitor.tell(Event::Engine);
        Ok(monitor)
    }

    /// Registers all sources of events.
    fn watch(&mut self, setting: &mut Setting) -> io::Result<()> {
        let poller = &self.poller;
        match &self.messages {
            Messages::Link(_) => poller.add(self.sender.socket(), EventFlags::IN, wake::LINK, 0)?,
            Messages::Thread(_, waker) => {
                poller.add(&**waker, EventFlags::IN, wake::MESSAGES, 0)?;
                poller.add(self.sender.socket(), EventFlags::empty(), wake::LINK, 0)?;
            }
        }
        poller.add(&*self.news, EventFlags::IN, wake::NEWS, 0)?;
        poller.add(&self.console, EventFlags::IN, wake::CONSOLE, 0)?;
        poller.add(self.running.ended(), EventFlags::IN, wake::ENDED, 0)?;
        poller.add(&self.signals, EventFlags::IN, wake::SIGNAL, 0)?;
        poller.add(self.control.socket(), EventFlags::IN, wake::CONTROL, 0)?;
        if let Some(stream) = setting.session.take() {
            let mut session = Session::new(stream)?;
            session.watching = true;
            self.poller.add(
                session.socket(),
                EventFlags::IN,
                wake::SESSION,
                self.next_session,
            )?;
            self.sessions.insert(self.next_session, session);
            self.next_session += 1;
        }
        let poller = &self.poller;
        if setting.input {
            let input = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 0)?;
            match poller.add(&input, EventFlags::IN, wake::INPUT, 0) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    self.input_ready = true
                }
                Err(error) => return Err(error),
            }
            self.input = Some(input);
        }
        Ok(())
    }

    /// The event loop, until the engine's process has ended.
    fn serve(&mut self) -> Result<Ended, Error> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        loop {
            self.settle()?;
            let limit = self.wait_limit();
            match epoll::wait(
                &self.poller.0,
                rustix::buffer::spare_capacity(&mut events),
                limit.as_ref(),
            ) {
                Ok(0) if self.unsaved.take().is_some() => self.note_state(),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::io("wait for events")(error)),
            }
            let mut ended = false;
            for event in events.drain(..) {
                let code = event.data.u64();
                let flags = event.flags;
                let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
                ended |= self.handle(code >> KIND_SHIFT, code & NUMBER_MASK, gone)?;
            }
            if ended {
                return self.finish();
            }
            self.check_deadlines()?;
        }
    }

    /// What is to be done before waiting: send what waits, and take up or put down what depends on room in the link.
    fn settle(&mut self) -> Result<(), Error> {
        let failed = || Error::io("speak to the kernel");
        if self.sender.pending() > 0 {
            self.sender.flush().map_err(failed())?;
        }
        if self.input_ready && self.sender.pending() == 0 {
            self.read_input()?;
        }
        let full = self.sender.pending() > 0;
        if full != self.link_watched && !self.link_closed {
            let mut flags = match self.messages {
                Messages::Link(_) => EventFlags::IN,
                Messages::Thread(..) => EventFlags::empty(),
            };
            flags.set(EventFlags::OUT, full);
            epoll::modify(
                &self.poller.0,
                self.sender.socket(),
                data(wake::LINK, 0),
                flags,
            )
            .map_err(Error::io("speak to the kernel"))?;
            self.link_watched = full;
        }
        if let Some(sockets) = &mut self.sockets
            && self.sockets_paused
            && !full
            && !self.paused
            && self.retry.is_none()
        {
            sockets.watch(&mut self.poller).map_err(failed())?;
            self.sockets_paused = false;
        }
        Ok(())
    }

    fn wait_limit(&self) -> Option<Timespec> {
        if self.unsaved.is_some() || (self.input_ready && self.sender.pending() == 0) {
            return Some(Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            });
        }
        let next = [self.retry, self.exit_deadline, self.asking_deadline]
            .into_iter()
            .flatten()
            .min()?;
        let left = next.saturating_duration_since(Instant::now()) + Duration::from_micros(100);
        Timespec::try_from(left).ok()
    }

    /// Saves the state of a program that runs. If that cannot be done, as on a full disk, others see it late: no reason to end it.
    fn note_state(&mut self) {
        let _ = self.instance.save();
    }

    fn check_deadlines(&mut self) -> Result<(), Error> {
        let time = Instant::now();
        if self.unsaved.take_if(|latest| *latest <= time).is_some() {
            self.note_state();
        }
        if self.retry.is_some_and(|retry| retry <= time) {
            self.retry = None;
        }
        if self
            .asking_deadline
            .is_some_and(|deadline| deadline <= time)
        {
            self.asking_deadline = None;
            for number in std::mem::take(&mut self.asking) {
                if let Some(session) = self.sessions.get_mut(&number) {
                    session.answer(Some("the kernel does not answer".to_owned()), None);
                }
            }
        }
        if self.exit_deadline.is_some_and(|deadline| deadline <= time) {
            self.exit_deadline = None;
            self.running
                .kill()
                .map_err(Error::io("end the unikernel"))?;
        }
        Ok(())
    }

    /// Handles one event; `gone`: the other end is closed. True when the engine's process has ended.
    fn handle(&mut self, kind: u64, number: u64, gone: bool) -> Result<bool, Error> {
        let link_failed = || Error::io("speak to the kernel");
        match kind {
            wake::LINK => {
                self.sender.flush().map_err(link_failed())?;
                self.read_link()?;
                if gone {
                    self.close_link();
                }
            }
            wake::MESSAGES => self.take_messages()?,
            wake::CONSOLE => self.read_console()?,
            wake::OUTPUT => self.flush_terminal()?,
            wake::ENDED => return Ok(true),
            wake::SIGNAL => self.take_signals()?,
            wake::INPUT => self.read_input()?,
            wake::CONTROL => {
                while let Some(session) = self
                    .control
                    .accept()
                    .map_err(Error::io("accept a command"))?
                {
                    let number = self.next_session;
                    self.next_session += 1;
                    self.poller
                        .add(session.socket(), EventFlags::IN, wake::SESSION, number)
                        .map_err(Error::io("accept a command"))?;
                    self.sessions.insert(number, session);
                }
            }
            wake::SESSION => self.hear(number)?,
            wake::NEWS => {
                let _ = rustix::io::read(&*self.news, &mut [0; 8]);
                if self.answered.swap(false, Ordering::Acquire) {
                    self.tell(Event::Answered);
                }
                self.resume()?;
            }
            wake::LISTENER => {
                self.resume()?;
                let number = usize::try_from(number).unwrap_or(usize::MAX);
                if let Some(sockets) = &mut self.sockets
                    && !sockets
                        .accept(number, &self.sender)
                        .map_err(link_failed())?
                {
                    sockets.pause(&mut self.poller);
                    self.sockets_paused = true;
                    if self.sender.pending() == 0 {
                        self.retry = Some(Instant::now() + RETRY);
                    }
                }
            }
            wake::CONNECTING => {
                self.resume()?;
                if let Some(sockets) = &mut self.sockets {
                    sockets
                        .connected(number, &self.sender, &mut self.poller)
                        .map_err(link_failed())?;
                }
            }
            _ => {}
        }
        Ok(false)
    }

    fn read_link(&mut self) -> Result<(), Error> {
        loop {
            let Messages::Link(reader) = &mut self.messages else {
                return Ok(());
            };
            let fill = reader
                .fill(self.sender.socket(), false)
                .map_err(Error::io("hear the kernel"))?;
            match fill {
                Fill::Bytes => {}
                Fill::Blocked => return Ok(()),
                Fill::End => {
                    self.close_link();
                    return Ok(());
                }
            }
            loop {
                let Messages::Link(reader) = &mut self.messages else {
                    return Ok(());
                };
                let Some(frame) = reader.next_frame()? else {
                    break;
                };
                if frame.channel != CONTROL {
                    return Err(Error::Protocol(format!(
                        "a request on channel {}, which is no volume",
                        frame.channel
                    )));
                }
                let message = decode(frame.payload)?;
                self.obey(message)?;
            }
        }
    }

    /// The kernel has closed its end: there is nothing to wait for but the end of its process.
    fn close_link(&mut self) {
        if !std::mem::replace(&mut self.link_closed, true) {
            self.poller.forget(self.sender.socket());
        }
    }

    fn take_messages(&mut self) -> Result<(), Error> {
        let Messages::Thread(messages, waker) = &self.messages else {
            return Ok(());
        };
        let _ = rustix::io::read(&**waker, &mut [0; 8]);
        let waiting: Vec<_> = messages.try_iter().collect();
        for message in waiting {
            self.obey(message?)?;
        }
        Ok(())
    }

    /// Does what the kernel asks.
    fn obey(&mut self, message: ToMonitor) -> Result<(), Error> {
        let failed = || Error::io("serve the kernel");
        match message {
            ToMonitor::Started { uptime } => {
                if !self.started {
                    self.started = true;
                    let at = now_microseconds();
                    self.instance.state.phase = Phase::Running;
                    self.instance.state.started = Some(now());
                    // First: whoever is told may look.
                    self.instance.save()?;
                    let ports = self.instance.state.ports.clone();
                    self.tell_at(at.saturating_sub(u64::from(uptime)), Event::Kernel);
                    self.tell_at(at, Event::Started { ports });
                    self.observer.started(self.instance);
                }
            }
            ToMonitor::Log(text) => self.remark(&text)?,
            ToMonitor::Exited { code } => {
                self.exited = Some(code);
                self.exit_deadline = Some(Instant::now() + GRACE_AFTER_EXIT);
            }
            ToMonitor::Listen { address, protocol } => {
                let ports = match &mut self.sockets {
                    Some(sockets) => sockets
                        .listen(address, protocol, &mut self.poller)
                        .map_err(failed())?,
                    None => self
                        .instance
                        .state
                        .ports
                        .iter()
                        .filter(|publish| {
                            publish.guest == address.port() && publish.protocol == protocol
                        })
                        .copied()
                        .collect(),
                };
                if let Some(network) = &self.user_network {
                    network.guest_listens(address, protocol);
                }
                if let Some(sockets) = &mut self.sockets {
                    sockets.deliver_arrivals(&self.sender).map_err(failed())?;
                }
                if !address.ip().to_canonical().is_loopback() {
                    let port = address.port();
                    self.tell(Event::Listening { port, protocol });
                }
                if !ports.is_empty() {
                    self.observer.listening(&ports);
                } else if address.ip().to_canonical().is_loopback() {
                    self.warn_of_loopback(address.port(), protocol)?;
                }
            }
            ToMonitor::Activity { connections, bytes } => {
                let waiting = self.sockets.as_ref().map_or(0, SocketServer::arrivals);
                let activity = Activity {
                    connections: u64::from(connections)
                        .saturating_add(u64::try_from(waiting).unwrap_or(u64::MAX)),
                    bytes,
                };
                self.asking_deadline = None;
                for number in std::mem::take(&mut self.asking) {
                    if let Some(session) = self.sessions.get_mut(&number) {
                        session.answer(None, Some(activity));
                    }
                }
            }
            ToMonitor::Answered => self.tell(Event::Answered),
            ToMonitor::Unlisten { address, protocol } => {
                if let Some(network) = &self.user_network {
                    network.guest_listens_no_more(address, protocol);
                }
                if let Some(sockets) = &mut self.sockets {
                    sockets.unlisten(address, protocol, &mut self.poller);
                }
            }
            ToMonitor::Connect {
                request,
                from: _,
                to,
            } => {
                let Some(sockets) = self.sockets.as_mut().filter(|_| request <= NUMBER_MASK) else {
                    return Err(Error::Protocol(
                        "a connection that is not its to ask for".to_owned(),
                    ));
                };
                sockets
                    .connect(request, to, &self.sender, &mut self.poller)
                    .map_err(failed())?;
            }
            ToMonitor::CancelConnect { request } => {
                if let Some(sockets) = &mut self.sockets {
                    sockets.cancel(request, &mut self.poller);
                }
            }
            ToMonitor::OpenDatagram {
                request,
                bind,
                both_families,
            } => {
                let Some(sockets) = &mut self.sockets else {
                    return Err(Error::Protocol(
                        "a socket that is not its to ask for".to_owned(),
                    ));
                };
                let published = sockets
                    .datagram(request, bind, both_families, &self.sender)
                    .map_err(failed())?;
                if published {
                    self.tell(Event::Listening {
                        port: bind.port(),
                        protocol: Protocol::Udp,
                    });
                }
            }
        }
        Ok(())
    }

    /// A published port that leads to a program listening on its own loopback will never answer: say so.
    fn warn_of_loopback(&mut self, port: u16, protocol: Protocol) -> Result<(), Error> {
        let published = self
            .instance
            .state
            .ports
            .iter()
            .any(|publish| publish.guest == port && publish.protocol == protocol);
        if published {
            self.remark(&format!(
                "the program listens on port {port} of its own loopback only, so the published port cannot reach it; let it listen on 0.0.0.0 or [::]"
            ))?;
        }
        Ok(())
    }

    fn remark(&mut self, text: &str) -> Result<(), Error> {
        // The program's output from before goes before it.
        self.read_console()?;
        self.log.remark(text);
        self.observer.remark(text);
        Ok(())
    }

    fn read_console(&mut self) -> Result<(), Error> {
        let mut buffer = [0; CONSOLE_CHUNK];
        // A few rounds, so that a program that writes without end does not keep others waiting.
        for _ in 0..4 {
            if self.console_paused || !self.console_open {
                return Ok(());
            }
            match rustix::io::read(&self.console, &mut buffer) {
                Ok(0) => {
                    self.console_open = false;
                    self.poller.forget(self.console.as_fd());
                }
                Ok(length) => {
                    let bytes = buffer.get(..length).unwrap_or_default();
                    self.log.write(bytes);
                    self.show(bytes)?;
                    if self.line.as_mut().is_some_and(|line| line.feed(bytes)) {
                        self.line = None;
                        self.tell(Event::Line);
                    }
                }
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::io("read the console")(error)),
            }
        }
        Ok(())
    }

    fn show(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let Some(terminal) = &mut self.terminal else {
            return Ok(());
        };
        match terminal
            .show(bytes)
            .map_err(Error::io("write to standard output"))?
        {
            Shown::All => {}
            Shown::Waiting => {
                let failed = || Error::io("wait for standard output");
                self.poller
                    .add(io::stdout(), EventFlags::OUT, wake::OUTPUT, 0)
                    .map_err(failed())?;
                self.poller.forget(self.console.as_fd());
                self.console_paused = true;
            }
            Shown::Closed => self.lose_terminal()?,
            Shown::HungUp => self.terminal = None,
        }
        Ok(())
    }

    fn flush_terminal(&mut self) -> Result<(), Error> {
        let Some(terminal) = &mut self.terminal else {
            return Ok(());
        };
        let shown = terminal
            .flush()
            .map_err(Error::io("write to standard output"))?;
        if shown == Shown::Waiting {
            return Ok(());
        }
        self.poller.forget(io::stdout().as_fd());
        if std::mem::take(&mut self.console_paused) && self.console_open {
            self.poller
                .add(&self.console, EventFlags::IN, wake::CONSOLE, 0)
                .map_err(Error::io("read the console"))?;
        }
        match shown {
            Shown::Closed => self.lose_terminal(),
            Shown::HungUp => {
                self.terminal = None;
                Ok(())
            }
            Shown::All | Shown::Waiting => Ok(()),
        }
    }

    /// Nobody reads standard output any more: the program gets the signal that a native one would get.
    fn lose_terminal(&mut self) -> Result<(), Error> {
        const SIGPIPE: u8 = 13;
        self.terminal = None;
        self.signal(SIGPIPE)
    }

    fn read_input(&mut self) -> Result<(), Error> {
        let Some(input) = &self.input else {
            self.input_ready = false;
            return Ok(());
        };
        let mut buffer = [0; INPUT_CHUNK];
        let length = match rustix::io::read(input, &mut buffer) {
            Ok(length) => length,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(()),
            // A terminal that went away reads as its end.
            Err(_) => 0,
        };
        if length == 0 {
            self.poller.forget(input.as_fd());
            self.input = None;
            self.input_ready = false;
        }
        let bytes = buffer.get(..length).unwrap_or_default().to_vec();
        self.resume()?;
        self.sender
            .control(&ToKernel::Input(bytes), None)
            .map_err(Error::io("speak to the kernel"))
    }

    fn signal(&mut self, signal: u8) -> Result<(), Error> {
        let failed = || Error::io("speak to the kernel");
        self.resume()?;
        self.sender
            .control(&ToKernel::Signal { signal }, None)
            .map_err(failed())?;
        self.running.interrupt().map_err(failed())
    }

    /// SIGINT, SIGTERM and the like to the monitor: the first asks the program to end, the second ends it.
    fn take_signals(&mut self) -> Result<(), Error> {
        const SIGTERM: u8 = 15;
        let mut buffer = [0; 64];
        let Ok(count) = self.signals.read(&mut buffer) else {
            return Ok(());
        };
        for _ in 0..count {
            self.stops += 1;
            if self.stops == 1 {
                self.observer.stopping();
                self.signal(SIGTERM)?;
            } else {
                self.kill()?;
            }
        }
        Ok(())
    }

    fn kill(&mut self) -> Result<(), Error> {
        self.killed = true;
        self.running.kill().map_err(Error::io("end the unikernel"))
    }

    /// Tells all who watch, and remembers for those who will.
    fn tell(&mut self, event: Event) {
        self.tell_at(now_microseconds(), event);
    }

    fn tell_at(&mut self, at: u64, event: Event) {
        let message = Message::Event { at, event };
        for session in self
            .sessions
            .values_mut()
            .filter(|session| session.watching)
        {
            session.say(&message);
        }
        // Only what happens once: whoever comes later has no use for the rest.
        let lasting = !matches!(
            message,
            Message::Event {
                event: Event::Suspended | Event::Resumed,
                ..
            }
        );
        if lasting && self.history.len() < MAX_HISTORY {
            self.history.push(message);
        }
    }

    fn hear(&mut self, number: u64) -> Result<(), Error> {
        loop {
            let Some(session) = self.sessions.get_mut(&number) else {
                return Ok(());
            };
            session.flush();
            match session.hear() {
                Said::Nothing => return Ok(()),
                Said::Gone => {
                    self.poller.forget(session.socket().as_fd());
                    self.sessions.remove(&number);
                    self.asking.retain(|asking| *asking != number);
                    return self.settle_pause();
                }
                Said::Request(request) => {
                    let outcome = self.grant(number, request);
                    if let Some(session) = self.sessions.get_mut(&number) {
                        match outcome {
                            Ok(Granted::Done) => session.answer(None, None),
                            Ok(Granted::Busy(activity)) => session.answer(None, Some(activity)),
                            Ok(Granted::Later) => {}
                            Err(error) => session.answer(Some(error.to_string()), None),
                        }
                    }
                }
            }
        }
    }

    /// Does what a session asks.
    fn grant(&mut self, number: u64, request: Request) -> Result<Granted, Error> {
        match request {
            Request::Ping => {}
            Request::Kill => self.kill()?,
            Request::Signal(signal) => self.signal(signal)?,
            Request::Watch => {
                if let Some(session) = self.sessions.get_mut(&number) {
                    for message in &self.history {
                        session.say(message);
                    }
                    if self.suspended {
                        session.say(&Message::Event {
                            at: now_microseconds(),
                            event: Event::Suspended,
                        });
                    }
                    session.watching = true;
                }
            }
            Request::Activity => return self.ask_activity(number),
            Request::Pause => {
                if let Some(session) = self.sessions.get_mut(&number) {
                    session.paused = true;
                }
                return self.pause(number);
            }
            Request::Continue => {
                if let Some(session) = self.sessions.get_mut(&number) {
                    session.paused = false;
                }
                self.settle_pause()?;
            }
            Request::Suspend => self.suspend()?,
            Request::Resume => self.resume()?,
            Request::Held => {
                let held = match &self.sockets {
                    Some(sockets) => sockets.held(),
                    None => self
                        .held
                        .iter()
                        .map(|(place, socket)| (*place, socket.as_fd()))
                        .collect(),
                };
                let (ports, sockets): (Vec<_>, Vec<_>) = held.into_iter().unzip();
                if let Some(session) = self.sessions.get_mut(&number) {
                    session
                        .say_held(ports, &sockets)
                        .map_err(Error::io("hand out the held sockets"))?;
                }
            }
            Request::Connection { guest, peer } => {
                let connection = self
                    .sessions
                    .get_mut(&number)
                    .and_then(Session::take_descriptor)
                    .ok_or_else(|| Error::Protocol("a connection without descriptor".to_owned()))?;
                self.adopt(guest, peer, connection)?;
            }
        }
        Ok(Granted::Done)
    }

    /// Accepts nothing from now on, and finds out how busy the instance is: the answer is given when the kernel has told.
    fn pause(&mut self, number: u64) -> Result<Granted, Error> {
        self.paused = true;
        if let Some(network) = &self.user_network {
            return Ok(Granted::Busy(network_activity(network.pause())));
        }
        if let Some(sockets) = &mut self.sockets {
            sockets.pause(&mut self.poller);
            self.sockets_paused = true;
            sockets.forget_news();
        }
        self.ask_activity(number)
    }

    fn ask_activity(&mut self, number: u64) -> Result<Granted, Error> {
        if let Some(network) = &self.user_network {
            return Ok(Granted::Busy(network_activity(network.activity())));
        }
        if self.sockets.is_none() {
            return Ok(Granted::Busy(Activity::default()));
        }
        if self.suspended {
            return Err(Error::environment("it is suspended", "resume it first"));
        }
        self.sender
            .control(&ToKernel::Activity, None)
            .map_err(Error::io("speak to the kernel"))?;
        self.running
            .interrupt()
            .map_err(Error::io("speak to the kernel"))?;
        self.asking.push(number);
        self.asking_deadline = Some(Instant::now() + ACTIVITY_PATIENCE);
        Ok(Granted::Later)
    }

    /// Accepts again when no session wants otherwise any more.
    fn settle_pause(&mut self) -> Result<(), Error> {
        if self.paused && !self.sessions.values().any(|session| session.paused) {
            self.paused = false;
            if let Some(network) = &self.user_network
                && !self.suspended
            {
                network.resume();
            }
            // Sockets are watched again by `settle`, when the link has room.
        }
        Ok(())
    }

    /// Stops everything until something comes. What came since the last pause wakes it at once.
    fn suspend(&mut self) -> Result<(), Error> {
        if self.suspended {
            return Ok(());
        }
        let failed = || Error::io("suspend the unikernel");
        if !self.started || self.exited.is_some() {
            return Err(Error::environment(
                "it is starting or ending",
                "try again when it runs",
            ));
        }
        if self.sender.pending() > 0 || !self.asking.is_empty() {
            return Err(Error::environment("it is busy", "try again later"));
        }
        if let Some(network) = &self.user_network
            && !network.suspend()
        {
            return Err(Error::environment("data is on its way", "try again later"));
        }
        self.running.suspend().map_err(failed())?;
        self.suspended = true;
        if let Some(sockets) = &mut self.sockets {
            self.poller
                .add(sockets.news(), EventFlags::IN, wake::NEWS, 0)
                .map_err(failed())?;
        }
        for session in self.sessions.values_mut() {
            session.paused = false;
        }
        self.settle_pause()?;
        self.instance.state.phase = Phase::Suspended;
        self.note_state();
        self.tell(Event::Suspended);
        Ok(())
    }

    /// Lets a suspended unikernel go on.
    fn resume(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.suspended) {
            return Ok(());
        }
        self.running
            .resume()
            .map_err(Error::io("resume the unikernel"))?;
        if let Some(sockets) = &self.sockets {
            self.poller.forget(sockets.news());
        }
        if let Some(network) = &self.user_network {
            network.resume();
        }
        self.tell(Event::Resumed);
        self.instance.state.phase = Phase::Running;
        // Whoever it goes on for is served first.
        self.unsaved = Some(Instant::now() + SAVE_LATEST);
        Ok(())
    }

    /// Takes a connection that was accepted elsewhere.
    fn adopt(
        &mut self,
        guest: u16,
        peer: Option<SocketAddr>,
        connection: OwnedFd,
    ) -> Result<(), Error> {
        self.resume()?;
        let failed = || Error::io("take the connection");
        let peer = match peer {
            Some(peer) => peer,
            None => rustix::net::getpeername(&connection)
                .map_err(io::Error::from)
                .map_err(failed())?
                .and_then(|peer| SocketAddr::try_from(peer).ok())
                .ok_or_else(|| failed()(io::ErrorKind::NotConnected.into()))?,
        };
        match (&mut self.sockets, &self.user_network) {
            (Some(sockets), _) => sockets
                .adopt(guest, peer, connection, &self.sender)
                .map_err(failed()),
            (None, Some(network)) => network.adopt(connection, guest).map_err(failed()),
            (None, None) => Err(Error::environment(
                "it has no network",
                "run it without --net none",
            )),
        }
    }

    /// The engine's process has ended: takes what it still had to say.
    fn finish(&mut self) -> Result<Ended, Error> {
        let end = self
            .running
            .wait()
            .map_err(Error::io("wait for the unikernel"))?;
        match &self.messages {
            Messages::Link(_) => {
                // A kernel that died in the middle of a message is judged by its end, not by that.
                let _ = self.read_link();
            }
            Messages::Thread(..) => self.drain_thread(),
        }
        self.drain_console()?;
        if let Some(mut network) = self.user_network.take()
            && !self.killed
        {
            // What the program sent last is still on its way; the network bounds how long it waits for slow clients.
            network.join();
        }
        Ok(judge(&end, self.exited, self.started, self.killed))
    }

    fn drain_thread(&mut self) {
        let limit = Instant::now() + Duration::from_secs(2);
        loop {
            let Messages::Thread(messages, _) = &self.messages else {
                return;
            };
            match messages.recv_timeout(limit.saturating_duration_since(Instant::now())) {
                Ok(Ok(message)) => {
                    if self.obey(message).is_err() {
                        return;
                    }
                }
                Ok(Err(_)) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return;
                }
            }
        }
    }

    /// Takes the rest of the console's output. Nothing else is left to do now, so this waits for whoever reads.
    fn drain_console(&mut self) -> Result<(), Error> {
        let mut buffer = [0; CONSOLE_CHUNK];
        loop {
            let length = match rustix::io::read(&self.console, &mut buffer) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => break,
                Ok(length) => length,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(Error::io("read the console")(error)),
            };
            let bytes = buffer.get(..length).unwrap_or_default();
            self.log.write(bytes);
            if let Some(terminal) = &mut self.terminal {
                let _ = terminal.show(bytes);
            }
        }
        while let Some(terminal) = &mut self.terminal {
            if !matches!(terminal.flush(), Ok(Shown::Waiting)) {
                break;
            }
            let output = io::stdout();
            let mut ready = [
                PollFd::new(&output, PollFlags::OUT),
                PollFd::new(&self.signals, PollFlags::IN),
            ];
            let waited = rustix::event::poll(&mut ready, None);
            if self.signals_waiting() || waited.is_err_and(|error| error != rustix::io::Errno::INTR)
            {
                break;
            }
        }
        Ok(())
    }

    fn signals_waiting(&mut self) -> bool {
        matches!(self.signals.read(&mut [0; 64]), Ok(count) if count > 0)
    }
}

/// What an end means. `killed`: the monitor was asked to.
fn judge(end: &End, exited: Option<i32>, started: bool, killed: bool) -> Ended {
    let ended = |code: i32, reason: Option<String>| Ended {
        code,
        started,
        reason,
    };
    match (exited, end) {
        (Some(code), _) if started => ended(code & 0xff, None),
        (None, End::Exited(exit_code::KERNEL_PANIC)) => ended(
            exit_code::KERNEL_PANIC,
            Some("the kernel panicked; its last words are in the log".to_owned()),
        ),
        (None, End::Exited(EXIT_MEMORY)) => ended(
            EXIT_MEMORY,
            Some("it took more memory than it was given; give it more with -m".to_owned()),
        ),
        // A kernel says so when its program has ended, also with 0: QEMU ends with that, too, when somebody sends it a signal.
        (None, End::Exited(0)) if started => ended(
            1,
            Some(
                "the unikernel ended without a word of its kernel, as when somebody on the host ends QEMU".to_owned(),
            ),
        ),
        (None, End::Exited(code)) if started => ended(code & 0xff, None),
        (None, End::Exited(EXIT_SHIM)) => ended(
            EXIT_SHIM,
            Some("the kernel could not be started; the console says why".to_owned()),
        ),
        (Some(exit_code::CANNOT_START), _) | (None, End::Exited(exit_code::CANNOT_START)) => ended(
            exit_code::CANNOT_START,
            Some("the program could not be started; the console says why".to_owned()),
        ),
        (Some(code), _) | (None, &End::Exited(code)) => ended(
            code & 0xff,
            Some(format!(
                "the unikernel ended with code {code} before its program began"
            )),
        ),
        (None, End::Signalled(signal)) if killed => ended(exit_code::SIGNAL_BASE + signal, None),
        (None, End::Signalled(signal)) => {
            const SIGKILL: i32 = 9;
            const SIGSYS: i32 = 31;
            let hint = match *signal {
                SIGKILL => " (by somebody on the host, or because the host ran out of memory)",
                SIGSYS => " (its confinement forbids what it tried)",
                _ => "",
            };
            ended(
                exit_code::SIGNAL_BASE + signal,
                Some(format!(
                    "the unikernel's process was killed by {}{hint}",
                    signal_name(*signal)
                )),
            )
        }
    }
}

/// What becomes of a session's request.
enum Granted {
    /// It is done.
    Done,
    /// It is done, and this is how busy the instance is.
    Busy(Activity),
    /// The answer is given when the kernel has told.
    Later,
}

fn network_activity(activity: kiln_network::Activity) -> Activity {
    Activity {
        connections: u64::try_from(activity.connections).unwrap_or(u64::MAX),
        bytes: activity.bytes,
    }
}

/// Looks for a text in the lines of a stream.
struct LineFinder {
    wanted: Vec<u8>,
    line: Vec<u8>,
}

impl LineFinder {
    fn new(wanted: String) -> Self {
        Self {
            wanted: wanted.into_bytes(),
            line: Vec::new(),
        }
    }

    /// More of the stream: whether the text has come.
    fn feed(&mut self, bytes: &[u8]) -> bool {
        for &byte in bytes {
            if byte == b'\n' {
                self.line.clear();
                continue;
            }
            self.line.push(byte);
            if self.line.ends_with(&self.wanted) {
                return true;
            }
            if self.line.len() > MAX_LINE.max(2 * self.wanted.len()) {
                self.line.drain(..self.line.len() - self.wanted.len());
            }
        }
        false
    }
}

/// The thread that reads the link and serves files.
fn serve_volumes(
    sender: &Sender,
    mut volumes: Vec<VolumeServer>,
    messages: &SyncSender<Result<ToMonitor, Error>>,
    waker: &OwnedFd,
) {
    let tell = |message| {
        let told = messages.send(message).is_ok();
        let _ = rustix::io::write(waker, &1u64.to_ne_bytes());
        told
    };
    let mut reader = FrameReader::default();
    loop {
        match reader.fill(sender.socket(), true) {
            Ok(Fill::Bytes | Fill::Blocked) => {}
            Ok(Fill::End) | Err(_) => return,
        }
        loop {
            let frame = match reader.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => {
                    tell(Err(error));
                    return;
                }
            };
            if frame.channel == CONTROL {
                let message = decode(frame.payload);
                let broken = message.is_err();
                if !tell(message) || broken {
                    return;
                }
                continue;
            }
            let number = usize::try_from(frame.channel - FIRST_VOLUME).unwrap_or(usize::MAX);
            let Some(volume) = volumes.get_mut(number) else {
                tell(Err(Error::Protocol(format!(
                    "a request on channel {}, which is no volume",
                    frame.channel
                ))));
                return;
            };
            let Some(reply) = volume.handle(frame.payload) else {
                continue;
            };
            if sender.send(frame.channel, reply, None).is_err() {
                return;
            }
            // A reply larger than the socket's buffer: go on as the kernel reads.
            while sender.pending() > 0 {
                let socket = sender.socket();
                let mut ready = [PollFd::from_borrowed_fd(socket, PollFlags::OUT)];
                if rustix::event::poll(&mut ready, None).is_err() || sender.flush().is_err() {
                    return;
                }
            }
        }
    }
}

/// One end of a pair whose other end gets a byte for each signal that means "stop".
fn catch_signals() -> io::Result<UnixStream> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
        // Who starts us with `nohup` wants the end of the terminal to mean nothing.
        if signal == SIGHUP && ignored(signal) {
            continue;
        }
        signal_hook::low_level::pipe::register(signal, theirs.try_clone()?)?;
    }
    Ok(ours)
}

/// Whether this process was started with a signal ignored (`SigIgn` in proc_pid_status(5)).
fn ignored(signal: i32) -> bool {
    crate::volume::read_small(Path::new("/proc/self/status")).is_ok_and(|status| {
        status
            .lines()
            .find_map(|line| line.strip_prefix("SigIgn:"))
            .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
    })
}

/// An Ethernet address of the instance's own: locally administered, for one station.
fn random_mac(name: &str) -> [u8; 6] {
    use std::hash::{BuildHasher, RandomState};
    let [a, b, c, d, e, ..] = RandomState::new().hash_one(name).to_le_bytes();
    [2, a, b, c, d, e]
}

fn realtime() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .ok()
        .and_then(|time| u64::try_from(time.as_nanos()).ok())
        .unwrap_or(0)
}

/// The host's name servers that programs can reach: not those on the host's loopback.
fn host_name_servers() -> Vec<IpAddr> {
    for path in ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"] {
        let servers = crate::volume::read_small(Path::new(path))
            .map(|text| name_servers(&text))
            .unwrap_or_default();
        if !servers.is_empty() {
            return servers;
        }
    }
    Vec::new()
}

/// The `nameserver` lines of a resolver configuration (resolv.conf(5)), at most three, without loopback addresses.
fn name_servers(text: &str) -> Vec<IpAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then_some(())?;
            words.next()?.parse::<IpAddr>().ok()
        })
        .filter(|address| !address.is_loopback() && !address.is_unspecified())
        .take(3)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::tail;
    use crate::control::Client;
    use crate::engine::{StartError, Unavailable};
    use crate::state::StateDirectory;
    use crate::state::tests::{Scratch, configuration};
    use kiln_abi::link::{HEADER, header, parse_header};
    use std::io::Write;
    use std::net::TcpStream;
    use std::sync::Mutex;
    use std::thread::JoinHandle;

    /// What a kernel of these tests can do.
    struct Kernel {
        link: UnixStream,
        console: File,
    }

    impl Kernel {
        fn say(&mut self, message: &ToMonitor) {
            let payload = postcard::to_extend(message, Vec::new()).unwrap();
            self.frame(CONTROL, &payload);
        }

        fn frame(&mut self, channel: u32, payload: &[u8]) {
            self.link
                .write_all(&header(channel, payload.len() as u32))
                .unwrap();
            self.link.write_all(payload).unwrap();
        }

        fn hear_frame(&mut self) -> Option<(u32, Vec<u8>)> {
            let mut head = [0; HEADER];
            self.link.read_exact(&mut head).ok()?;
            let (channel, length) = parse_header(head);
            let mut payload = vec![0; length as usize];
            self.link.read_exact(&mut payload).ok()?;
            Some((channel, payload))
        }

        fn hear(&mut self) -> Option<ToKernel> {
            let (channel, payload) = self.hear_frame()?;
            assert_eq!(channel, CONTROL);
            Some(postcard::from_bytes(&payload).unwrap())
        }
    }

    type Program = Box<dyn FnOnce(&mut Kernel) -> End + Send>;

    /// Runs a function in place of a kernel.
    struct Fake(Mutex<Option<Program>>);

    impl Fake {
        fn new(program: impl FnOnce(&mut Kernel) -> End + Send + 'static) -> Self {
            Self(Mutex::new(Some(Box::new(program))))
        }
    }

    struct FakeRunning {
        thread: Option<JoinHandle<End>>,
        ended: OwnedFd,
        link: UnixStream,
        killed: bool,
    }

    impl Engine for Fake {
        fn name(&self) -> &'static str {
            "fake"
        }
        fn available(&self) -> Result<(), Unavailable> {
            Ok(())
        }
        fn start(&self, launch: Launch) -> Result<Box<dyn Running>, StartError> {
            let link = UnixStream::from(launch.link);
            link.set_read_timeout(Some(Duration::from_secs(20)))
                .unwrap();
            let mut kernel = Kernel {
                link: link.try_clone().unwrap(),
                console: launch.console.into(),
            };
            let (ended, alive) = rustix::pipe::pipe().unwrap();
            let program = self.0.lock().unwrap().take().unwrap();
            let thread = std::thread::spawn(move || {
                let end = program(&mut kernel);
                drop(kernel);
                drop(alive);
                end
            });
            Ok(Box::new(FakeRunning {
                thread: Some(thread),
                ended,
                link,
                killed: false,
            }))
        }
    }

    impl Running for FakeRunning {
        fn pid(&self) -> u32 {
            1
        }
        fn ended(&self) -> BorrowedFd<'_> {
            self.ended.as_fd()
        }
        fn wait(&mut self) -> io::Result<End> {
            let end = self.thread.take().unwrap().join().unwrap();
            Ok(if self.killed { End::Signalled(9) } else { end })
        }
        fn kill(&mut self) -> io::Result<()> {
            self.killed = true;
            // The kernel of a test notices that its link has gone.
            let _ = self.link.shutdown(std::net::Shutdown::Both);
            Ok(())
        }
    }

    #[derive(Default)]
    struct Notes {
        started: u32,
        listening: Vec<Publish>,
        remarks: Vec<String>,
    }

    impl Observer for Notes {
        fn started(&mut self, _: &Instance) {
            self.started += 1;
        }
        fn listening(&mut self, ports: &[Publish]) {
            self.listening.extend(ports);
        }
        fn remark(&mut self, text: &str) {
            self.remarks.push(text.to_owned());
        }
        fn stopping(&mut self) {}
    }

    fn run_fake(
        state: &StateDirectory,
        change: impl FnOnce(&mut crate::state::InstanceConfiguration),
        program: impl FnOnce(&mut Kernel) -> End + Send + 'static,
    ) -> (Result<Ended, Error>, Notes) {
        let mut configuration = configuration("test");
        configuration.image.path = "/dev/null".into();
        change(&mut configuration);
        let mut instance = state.create(&configuration).unwrap();
        let mut notes = Notes::default();
        let outcome = run(
            &mut instance,
            &Fake::new(program),
            Setting::default(),
            &mut notes,
        );
        (outcome, notes)
    }

    #[test]
    fn output_remarks_and_exit_code_are_kept() {
        let scratch = Scratch::new();
        let (outcome, notes) = run_fake(
            &scratch.0,
            |_| {},
            |kernel| {
                kernel.say(&ToMonitor::Started { uptime: 9 });
                kernel.console.write_all(b"hello\n").unwrap();
                kernel.say(&ToMonitor::Log("unsupported call".to_owned()));
                kernel.say(&ToMonitor::Exited { code: 3 });
                End::Exited(0)
            },
        );
        let ended = Ended {
            code: 3,
            started: true,
            reason: None,
        };
        assert_eq!(outcome.unwrap(), ended);
        assert_eq!((notes.started, notes.remarks.len()), (1, 1));
        let instance = scratch.0.open("test").unwrap();
        assert_eq!(
            (instance.state.phase, instance.state.exit_code),
            (Phase::Exited, Some(3))
        );
        let text = tail(&instance.console_path(), 10);
        assert!(
            text.contains("hello\n") && text.contains("kiln: unsupported call\n"),
            "{text}"
        );
        assert!(!instance.control_path().exists());
    }

    #[test]
    fn panics_kills_and_early_ends_say_why() {
        let scratch = Scratch::new();
        for (end, started, code, word) in [
            (End::Exited(exit_code::KERNEL_PANIC), true, 254, "panicked"),
            (End::Signalled(31), true, 159, "SIGSYS"),
            (End::Signalled(9), true, 137, "memory"),
            (End::Exited(1), false, 1, "before its program began"),
            (End::Exited(0), true, 1, "without a word"),
        ] {
            let (outcome, _) = run_fake(
                &scratch.0,
                |_| {},
                move |kernel| {
                    if started {
                        kernel.say(&ToMonitor::Started { uptime: 9 });
                    }
                    end
                },
            );
            let ended = outcome.unwrap();
            assert_eq!(ended.code, code);
            assert!(ended.reason.unwrap().contains(word));
            let instance = scratch.0.open("test").unwrap();
            assert_eq!(instance.state.phase, Phase::Crashed);
            instance.remove().unwrap();
        }
    }

    #[test]
    fn a_kernel_that_breaks_the_protocol_is_ended() {
        let scratch = Scratch::new();
        let (outcome, _) = run_fake(
            &scratch.0,
            |_| {},
            |kernel| {
                kernel.frame(CONTROL, &[0xff; 20]);
                // Ends when the monitor cuts the link.
                while kernel.hear_frame().is_some() {}
                End::Exited(0)
            },
        );
        assert!(matches!(outcome, Err(Error::Protocol(_))));
        assert_eq!(scratch.0.open("test").unwrap().state.phase, Phase::Crashed);
    }

    #[test]
    fn connections_reach_the_kernel_and_commands_reach_the_monitor() {
        let scratch = Scratch::new();
        let state = scratch.0.clone();
        let (give, take) = std::sync::mpsc::channel();
        let commander = std::thread::spawn(move || {
            take.recv().unwrap();
            let end = Instant::now() + Duration::from_secs(10);
            let instance = loop {
                let instance = state.open("test").unwrap();
                assert!(instance.alive() && Instant::now() < end);
                if instance.state.phase == Phase::Running {
                    break instance;
                }
            };
            let port = instance.state.ports[0].host;
            let clients: Vec<_> = (0..500)
                .map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap())
                .collect();
            take.recv().unwrap();
            drop(clients);
            let mut client = Client::connect(&instance).unwrap();
            client.ask(Request::Signal(15)).unwrap();
            assert!(client.wait_end(Duration::from_secs(10)).unwrap());
            assert!(instance.wait_unlocked(Duration::from_secs(10)).unwrap());
            assert_eq!(state.open("test").unwrap().state.phase, Phase::Exited);
        });
        let (outcome, notes) = run_fake(
            &scratch.0,
            |configuration| {
                configuration.ports = crate::arguments::parse_publish("127.0.0.1:0:80").unwrap()
            },
            move |kernel| {
                kernel.say(&ToMonitor::Started { uptime: 9 });
                let address = "0.0.0.0:80".parse().unwrap();
                kernel.say(&ToMonitor::Listen {
                    address,
                    protocol: Protocol::Tcp,
                });
                give.send(()).unwrap();
                let mut accepted = 0;
                loop {
                    match kernel.hear() {
                        Some(ToKernel::Accepted { .. }) => {
                            accepted += 1;
                            if accepted == 500 {
                                give.send(()).unwrap();
                            }
                        }
                        Some(ToKernel::Signal { signal: 15 }) => break,
                        other => panic!("{other:?}"),
                    }
                }
                kernel.say(&ToMonitor::Exited { code: 143 });
                End::Exited(0)
            },
        );
        assert_eq!(outcome.unwrap().code, 143);
        assert_eq!(notes.listening.len(), 1);
        commander.join().unwrap();
    }

    #[test]
    fn volumes_are_served_beside_control_messages() {
        let scratch = Scratch::new();
        let shared = scratch.0.path().join("shared");
        std::fs::create_dir_all(&shared).unwrap();
        let (outcome, notes) = run_fake(
            &scratch.0,
            |configuration| {
                configuration.volumes = vec![crate::arguments::VolumeMount {
                    host: shared,
                    path: "/data".to_owned(),
                    read_only: false,
                }];
            },
            |kernel| {
                kernel.say(&ToMonitor::Started { uptime: 9 });
                for unique in 1..100u64 {
                    let mut request = Vec::new();
                    request.extend(56u32.to_le_bytes());
                    request.extend(26u32.to_le_bytes());
                    request.extend(unique.to_le_bytes());
                    request.extend([0; 24]);
                    for value in [7u32, 38, 0, 0] {
                        request.extend(value.to_le_bytes());
                    }
                    kernel.frame(FIRST_VOLUME, &request);
                    kernel.say(&ToMonitor::Log(format!("{unique}")));
                    let (channel, reply) = kernel.hear_frame().unwrap();
                    assert_eq!(channel, FIRST_VOLUME);
                    assert_eq!(reply[8..16], unique.to_le_bytes());
                }
                kernel.say(&ToMonitor::Exited { code: 0 });
                End::Exited(0)
            },
        );
        assert_eq!(outcome.unwrap().code, 0);
        assert_eq!(notes.remarks.len(), 99);
    }

    #[test]
    fn a_kill_ends_even_a_kernel_that_hears_nothing() {
        let scratch = Scratch::new();
        let state = scratch.0.clone();
        let (give, take) = std::sync::mpsc::channel();
        let commander = std::thread::spawn(move || {
            take.recv().unwrap();
            let instance = state.open("test").unwrap();
            Client::connect(&instance)
                .unwrap()
                .ask(Request::Kill)
                .unwrap();
        });
        let (outcome, _) = run_fake(
            &scratch.0,
            |_| {},
            move |kernel| {
                kernel.say(&ToMonitor::Started { uptime: 9 });
                give.send(()).unwrap();
                while kernel.hear_frame().is_some() {}
                End::Exited(0)
            },
        );
        assert_eq!(
            outcome.unwrap(),
            Ended {
                code: 137,
                started: true,
                reason: None
            }
        );
        commander.join().unwrap();
    }

    #[test]
    fn a_kernel_may_close_its_link_before_it_ends() {
        let scratch = Scratch::new();
        let shared = scratch.0.path().join("shared");
        std::fs::create_dir_all(&shared).unwrap();
        for volumes in [Vec::new(), vec![shared]] {
            let (outcome, _) = run_fake(
                &scratch.0,
                |configuration| {
                    configuration.volumes = volumes
                        .into_iter()
                        .map(|host| crate::arguments::VolumeMount {
                            host,
                            path: "/data".to_owned(),
                            read_only: false,
                        })
                        .collect();
                },
                |kernel| {
                    kernel.say(&ToMonitor::Started { uptime: 9 });
                    kernel.link.shutdown(std::net::Shutdown::Both).unwrap();
                    End::Exited(5)
                },
            );
            assert_eq!(outcome.unwrap().code, 5);
            scratch.0.open("test").unwrap().remove().unwrap();
        }
    }

    #[test]
    fn name_servers_are_those_a_program_can_reach() {
        let text = "# a comment\nsearch x\nnameserver 127.0.0.53\nnameserver 10.0.0.1\n nameserver ::1\nnameserver 2001:db8::1\nnameserver bad\n";
        let expected: Vec<IpAddr> =
            vec!["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        assert_eq!(name_servers(text), expected);
    }
}

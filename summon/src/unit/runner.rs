//! The task of one unit: does what its state machine says, and tells it what has come of that.
//!
//! It owns the unit's sockets for as long as the unit is configured. They are bound before the unit is first asked for and are
//! handed to each of its instances as duplicates, so that whoever comes early waits in the host's queue and nobody is
//! refused. While no instance accepts, the task watches them itself.
//!
//! Not here: when something is to be done ([`super::machine`]), and how an instance runs (`kiln-monitor`).

use std::collections::{HashSet, VecDeque};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use kiln_abi::manifest::Protocol;
use kiln_monitor::control::{self, Activity, Event as Said, Message, Request};
use kiln_monitor::launch::{self, Held};
use kiln_monitor::sockets::bind_held;
use kiln_monitor::state::{Instance, StateDirectory, now_microseconds};
use rustix::process::{Pid, Signal};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::machine::{Action, Event, Machine, State};
use super::{Core, Handle, Prepared, Unit, published, session};
use crate::configuration::Readiness;
use crate::dns::NotReady;
use crate::metrics::Metrics;
use crate::room::{Place, Room};
use crate::store::{Change, Statistics, Store};
use crate::timeline::{Cause, Event as Mark, Timeline};

/// How long a monitor may take to end after it was told to end at once.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// First and longest pause between two looks whether an HTTP path answers.
const PROBE_FIRST: Duration = Duration::from_millis(5);
const PROBE_LONGEST: Duration = Duration::from_millis(500);
/// How long one such request may take.
const PROBE_PATIENCE: Duration = Duration::from_secs(5);
/// Most connections of fronts that wait for a unit.
const MAX_WAITING: usize = 4096;
/// Lines of the console that are told when a start fails.
const LAST_LINES: usize = 10;

/// What a unit's task is told.
#[derive(Debug)]
pub enum Input {
    /// What the machine wants done.
    Actions(Vec<Action>),
    /// A start has brought an instance, or has not.
    Launched(u64, Result<Box<Launch>, String>),
    /// The monitor of an instance said something.
    Said(u64, Message),
    /// The monitor of an instance is gone.
    Gone(u64),
    /// An instance has shown that it is ready.
    Ready(u64),
    /// A connection for a port of the program.
    Deliver {
        /// The connection.
        connection: OwnedFd,
        /// The program's port.
        guest: u16,
        /// The client, if it is not the connection's own peer.
        peer: Option<SocketAddr>,
    },
    /// Another configuration.
    Configure(Box<Prepared>),
}

/// A monitor that was just started.
pub struct Launch {
    child: Option<Child>,
    monitor: u32,
    session: StdStream,
    place: Place,
}

impl std::fmt::Debug for Launch {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Launch").finish_non_exhaustive()
    }
}

/// What all units share.
pub struct Shared {
    /// Where instances live.
    pub state: StateDirectory,
    /// Ceilings.
    pub room: Arc<Room>,
    /// What survives.
    pub store: Arc<Store>,
    /// To the thread that writes to it.
    pub writer: std::sync::mpsc::Sender<Write>,
    /// Numbers.
    pub metrics: Arc<Metrics>,
    /// Monitors that this process has started and must wait for.
    pub children: Mutex<Vec<Child>>,
}

impl Shared {
    /// Waits for those children that have ended.
    pub fn reap(&self) {
        self.children
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }

    /// Has a change written to the store, beside everything else.
    pub fn remember(&self, change: Change) {
        // The thread ends after all who could send.
        let _ = self.writer.send(Write::Change(Box::new(change)));
    }

    /// Returns when all changes so far are written. Blocks.
    pub fn write_all(&self) {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        if self.writer.send(Write::Flush(sender)).is_ok() {
            let _ = receiver.recv();
        }
    }
}

/// For the thread that writes to the store.
#[derive(Debug)]
pub enum Write {
    /// Something to write.
    Change(Box<Change>),
    /// Tell when everything before this is written.
    Flush(std::sync::mpsc::SyncSender<()>),
}

/// Writes changes until all who send them are gone; what has come meanwhile goes into one transaction.
pub fn write_changes(store: &Store, writes: &std::sync::mpsc::Receiver<Write>) {
    while let Ok(first) = writes.recv() {
        let mut changes = Vec::new();
        let mut waiting = Vec::new();
        for write in std::iter::once(first).chain(writes.try_iter()) {
            match write {
                Write::Change(change) => changes.push(*change),
                Write::Flush(waiter) => waiting.push(waiter),
            }
        }
        if let Err(error) = store.write(&changes) {
            tracing::error!("{error}");
        }
        for waiter in waiting {
            let _ = waiter.send(());
        }
    }
}

/// A socket that is held for a published port.
#[derive(Debug)]
struct Socket {
    /// Where it is bound.
    address: SocketAddr,
    protocol: Protocol,
    socket: Arc<OwnedFd>,
}

/// An instance of the unit.
struct Running {
    session: Arc<UnixStream>,
    monitor: u32,
    /// Requests without an answer yet, in order.
    asked: VecDeque<Asked>,
    listening: HashSet<(u16, Protocol)>,
    started: bool,
    line: bool,
    ready: bool,
    /// Readiness is being looked for.
    probe: Option<AbortHandle>,
    /// When it is ended with more force.
    force: Option<(Instant, Force)>,
    /// It was told to end.
    ending: bool,
    ended: Option<Option<String>>,
    _place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// How busy it is, or to suspend: with the machine's number.
    Machine(u64),
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Force {
    /// The monitor is to end the instance.
    Kill,
    /// The monitor does not: end it.
    KillMonitor,
}

/// A unit's task.
pub struct Runner {
    unit: Handle,
    shared: Arc<Shared>,
    inbox: mpsc::UnboundedReceiver<Input>,
    prepared: Prepared,
    sockets: Vec<Socket>,
    /// The sockets while they are watched.
    watched: Vec<AsyncFd<Arc<OwnedFd>>>,
    running: Option<Running>,
    /// Each start has a number, so that late news of an old one are known as such.
    generation: u64,
    /// A start is under way.
    launching: bool,
    /// What is under way is to end as soon as it is there.
    end_launched: bool,
    deliveries: VecDeque<(OwnedFd, u16, Option<SocketAddr>)>,
}

/// An instance that an earlier summoner has left running.
pub struct Adopted {
    session: StdStream,
    monitor: u32,
    memory: u64,
    suspended: bool,
    sockets: Vec<(SocketAddr, Protocol, OwnedFd)>,
}

impl Adopted {
    /// Reaches the monitor of an instance, and gets the sockets that it holds. Blocks.
    ///
    /// # Errors
    /// When the monitor is not there or does not answer.
    pub fn reach(instance: &Instance) -> Result<Self, kiln_monitor::Error> {
        let session = control::connect(instance)?;
        let held = control::take_held(&session)?;
        let ports = &instance.configuration.ports;
        let sockets = held
            .into_iter()
            .filter_map(|(place, socket)| {
                let publish = ports.get(place)?;
                Some((
                    SocketAddr::new(publish.address?, publish.host),
                    publish.protocol,
                    socket,
                ))
            })
            .collect();
        Ok(Self {
            session,
            monitor: instance.state.monitor.unwrap_or(0),
            memory: instance.configuration.memory,
            suspended: instance.state.phase == kiln_monitor::state::Phase::Suspended,
            sockets,
        })
    }
}

impl Runner {
    /// A unit and its task, which has bound the unit's sockets and is to be spawned.
    ///
    /// # Errors
    /// Names the socket that cannot be bound, and what to do.
    pub fn new(
        shared: Arc<Shared>,
        prepared: Prepared,
        statistics: Statistics,
        adopted: Option<Adopted>,
        clock: Instant,
    ) -> Result<(Handle, Self), String> {
        let (sender, inbox) = mpsc::unbounded_channel();
        let mut sockets = Vec::new();
        let adopted = adopted.map(|mut adopted| {
            for (address, protocol, socket) in adopted.sockets.drain(..) {
                sockets.push(Socket {
                    address,
                    protocol,
                    socket: Arc::new(socket),
                });
            }
            adopted
        });
        let settings = prepared.settings();
        let (machine, actions) = match &adopted {
            Some(adopted) => (
                Machine::adopt(settings, adopted.suspended, clock.elapsed()),
                Vec::new(),
            ),
            None => Machine::new(settings, clock.elapsed()),
        };
        let metrics = shared.metrics.unit(&prepared.unit.name);
        let unit = Arc::new(Unit {
            name: prepared.unit.name.clone(),
            clock,
            core: Mutex::new(Core {
                machine,
                waiters: Vec::new(),
                statistics,
                trouble: None,
                timeline: None,
                asked_name: prepared.unit.dns.first().cloned().unwrap_or_default(),
            }),
            metrics,
            inbox: sender,
            left: AtomicBool::new(false),
        });
        shared.room.know(&unit);
        let mut runner = Self {
            unit: Arc::clone(&unit),
            shared,
            inbox,
            prepared,
            sockets,
            watched: Vec::new(),
            running: None,
            generation: 0,
            launching: false,
            end_launched: false,
            deliveries: VecDeque::new(),
        };
        runner.bind()?;
        {
            let mut core = unit.lock();
            unit.follow(&mut core, &actions, Cause::Floor);
        }
        unit.send(actions);
        if let Some(adopted) = adopted {
            let place = runner
                .shared
                .room
                .occupy(&runner.prepared.unit.name, adopted.memory);
            let launch = Launch {
                child: None,
                monitor: adopted.monitor,
                session: adopted.session,
                place,
            };
            runner
                .take_over(launch)
                .map_err(|error| error.to_string())?;
            if let Some(running) = &mut runner.running {
                // It was ready for the summoner that started it.
                running.ready = true;
            }
        }
        Ok((unit, runner))
    }

    /// Binds the sockets that are missing and closes those that are no longer wanted.
    fn bind(&mut self) -> Result<(), String> {
        let wanted = published(&self.prepared.unit, &self.prepared.addresses);
        let mut bound = Vec::with_capacity(wanted.len());
        let mut old = std::mem::take(&mut self.sockets);
        let mut failure = None;
        for publish in wanted {
            let (Some(ip), protocol) = (publish.address, publish.protocol) else {
                continue;
            };
            let address = SocketAddr::new(ip, publish.host);
            let known = old
                .iter()
                .position(|socket| (socket.address, socket.protocol) == (address, protocol));
            let socket = match known {
                Some(place) => old.swap_remove(place),
                None => match bind_held(address, protocol, publish.guest) {
                    Ok(socket) => Socket {
                        address,
                        protocol,
                        socket: Arc::new(socket),
                    },
                    Err(error) => {
                        failure.get_or_insert_with(|| {
                            format!("unit '{}': {error}", self.prepared.unit.name)
                        });
                        continue;
                    }
                },
            };
            bound.push(socket);
        }
        self.sockets = bound;
        failure.map_or(Ok(()), Err)
    }

    fn watch(&mut self) {
        self.watched.clear();
        for socket in &self.sockets {
            // Deprecated because a descriptor might be closed while it is registered; the shared ownership rules that out, and
            // what replaces it is unsafe.
            #[allow(deprecated)]
            let watched = AsyncFd::with_interest(Arc::clone(&socket.socket), Interest::READABLE);
            match watched {
                Ok(watched) => self.watched.push(watched),
                Err(error) => tracing::error!(
                    unit = self.prepared.unit.name,
                    "cannot watch {}: {error}",
                    socket.address
                ),
            }
        }
    }

    /// The unit's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.unit.name
    }

    /// Gives the unit up before it has lived: its sockets close, and an adopted instance goes on as it was.
    pub fn abandon(self) {
        self.shared
            .metrics
            .forget(&self.unit.name, &self.unit.metrics);
    }

    /// Lives the unit's life, until it is removed and nothing of it is left.
    pub async fn run(mut self) {
        if self.running.is_some() {
            // An adopted instance is to tell what has been.
            self.ask(Request::Watch, Asked::Other).await;
        }
        loop {
            let deadline = self.deadline();
            let watched = &self.watched;
            let knock = poll_fn(|context| {
                for (place, socket) in watched.iter().enumerate() {
                    if let Poll::Ready(Ok(mut guard)) = socket.poll_read_ready(context) {
                        guard.retain_ready();
                        return Poll::Ready(place);
                    }
                }
                Poll::Pending
            });
            tokio::select! {
                biased;
                input = self.inbox.recv() => match input {
                    Some(input) => self.take(input).await,
                    None => return,
                },
                place = knock => self.knock(place),
                () = sleep_until(deadline) => self.tick().await,
            }
            if self.unit.state() == State::Gone && self.running.is_none() && !self.launching {
                let (state, name) = (self.shared.state.clone(), self.unit.name.clone());
                let removed = tokio::task::spawn_blocking(move || remove_instance(&state, &name));
                if let Ok(Err(error)) = removed.await {
                    tracing::warn!(unit = self.unit.name, "{error}");
                }
                self.unit.left.store(true, Ordering::Release);
                self.shared
                    .metrics
                    .forget(&self.unit.name, &self.unit.metrics);
                return;
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let machine = self.unit.lock().machine.deadline();
        let machine = machine.and_then(|at| self.unit.clock.checked_add(at));
        let force = self
            .running
            .as_ref()
            .and_then(|running| running.force)
            .map(|(at, _)| at);
        [machine, force].into_iter().flatten().min()
    }

    fn knock(&mut self, place: usize) {
        let cause = match self.sockets.get(place) {
            Some(socket) if socket.protocol == Protocol::Udp => {
                Cause::Datagram(socket.address.port())
            }
            Some(socket) => Cause::Connection(socket.address.port()),
            None => return,
        };
        // Watched again when the machine says so.
        self.watched.clear();
        self.unit.event_by(Event::Knock, cause);
    }

    async fn tick(&mut self) {
        let now = Instant::now();
        let force = self
            .running
            .as_mut()
            .and_then(|running| running.force.take_if(|(at, _)| *at <= now));
        match force {
            Some((_, Force::Kill)) => self.kill().await,
            Some((_, Force::KillMonitor)) => self.kill_monitor(),
            None => {}
        }
        self.unit.event(Event::Tick);
    }

    async fn take(&mut self, input: Input) {
        match input {
            Input::Actions(actions) => {
                for action in actions {
                    self.act(action).await;
                }
            }
            Input::Launched(generation, outcome) => {
                if generation == self.generation {
                    self.launched(outcome).await;
                }
            }
            Input::Said(generation, message) => {
                if generation == self.generation {
                    self.said(message).await;
                }
            }
            Input::Gone(generation) => {
                if generation == self.generation {
                    self.gone();
                }
            }
            Input::Ready(generation) => {
                if generation == self.generation {
                    self.ready();
                }
            }
            Input::Deliver {
                connection,
                guest,
                peer,
            } => {
                if self.deliveries.len() < MAX_WAITING {
                    self.deliveries.push_back((connection, guest, peer));
                }
                self.deliver().await;
            }
            Input::Configure(prepared) => {
                self.prepared = *prepared;
                if let Err(error) = self.bind() {
                    tracing::error!("{error}");
                    self.unit.lock().trouble = Some(error);
                }
                if !self.watched.is_empty() {
                    self.watch();
                }
            }
        }
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::Watch => {
                // Who came in at a front and was not served.
                if self.deliveries.is_empty() {
                    self.watch();
                } else {
                    self.unit.event_by(Event::Knock, Cause::Connection(0));
                }
            }
            Action::Unwatch => self.watched.clear(),
            Action::Start => self.start(),
            Action::Release(ready) => {
                let outcome = if ready {
                    Ok(())
                } else {
                    let trouble = self.unit.trouble();
                    Err(NotReady(
                        trouble.unwrap_or_else(|| "it was stopped".to_owned()),
                    ))
                };
                self.unit.lock().release(&outcome);
            }
            Action::Sample(ticket) => self.ask(Request::Activity, Asked::Machine(ticket)).await,
            Action::Pause(ticket) => self.ask(Request::Pause, Asked::Machine(ticket)).await,
            Action::Continue => self.ask(Request::Continue, Asked::Other).await,
            Action::Suspend(ticket) => self.ask(Request::Suspend, Asked::Machine(ticket)).await,
            Action::Resume => self.ask(Request::Resume, Asked::Other).await,
            Action::GiveUp => {
                self.fail(format!(
                    "it was not ready within {:?}{}",
                    self.prepared.unit.ready_timeout,
                    self.last_lines()
                ));
                self.end(true).await;
            }
            Action::End(at_once) => self.end(at_once).await,
        }
    }

    /// Sends a request to the instance. One that cannot be reached is as good as gone, which is told by its stream.
    async fn ask(&mut self, request: Request, kind: Asked) {
        let Some(running) = &mut self.running else {
            return;
        };
        running.asked.push_back(kind);
        if let Err(error) = session::ask(&running.session, &request, None).await {
            tracing::debug!(unit = self.prepared.unit.name, "{request:?}: {error}");
        }
    }

    fn start(&mut self) {
        self.generation += 1;
        self.launching = true;
        self.end_launched = false;
        let generation = self.generation;
        let unit = Arc::clone(&self.unit);
        let shared = Arc::clone(&self.shared);
        let instance = self.prepared.instance.clone();
        let sockets: Vec<_> = self
            .sockets
            .iter()
            .map(|socket| Arc::clone(&socket.socket))
            .collect();
        let ports = self.prepared.unit.ports.len() * self.prepared.addresses.len();
        let missing = self.sockets.len() < ports;
        let line = match &self.prepared.unit.ready {
            Readiness::Line(text) => Some(text.clone()),
            _ => None,
        };
        tokio::spawn(async move {
            let outcome = async {
                let configuration = instance?;
                if missing {
                    return Err(unit
                        .trouble()
                        .unwrap_or_else(|| "one of its ports is in use".to_owned()));
                }
                let place = shared.room.take(&unit.name, configuration.memory).await?;
                let blocking = tokio::task::spawn_blocking(move || {
                    let launched = start_instance(&shared.state, &configuration, &sockets, line)?;
                    Ok(Box::new(Launch {
                        monitor: launched.child.id(),
                        child: Some(launched.child),
                        session: launched.session,
                        place,
                    }))
                });
                blocking.await.map_err(|error| error.to_string())?
            };
            let outcome = outcome.await;
            // The unit's task ends only after this.
            let _ = unit.inbox.send(Input::Launched(generation, outcome));
        });
    }

    async fn launched(&mut self, outcome: Result<Box<Launch>, String>) {
        self.launching = false;
        match outcome {
            Ok(launch) => {
                if let Err(error) = self.take_over(*launch) {
                    self.fail(error.to_string());
                    self.unit.event(Event::NotStarted);
                    return;
                }
                if let Some(timeline) = &mut self.unit.lock().timeline {
                    timeline.instance.clone_from(&self.unit.name);
                }
                self.note(Mark::Started, now_microseconds());
                self.count_memory();
                if std::mem::take(&mut self.end_launched) {
                    self.kill().await;
                } else {
                    self.deliver().await;
                }
            }
            Err(reason) => {
                self.fail(reason);
                self.unit.event(Event::NotStarted);
            }
        }
    }

    fn take_over(&mut self, launch: Launch) -> io::Result<()> {
        if let Some(child) = launch.child {
            self.shared
                .children
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(child);
        }
        launch.session.set_nonblocking(true)?;
        let session = Arc::new(UnixStream::from_std(launch.session)?);
        tokio::spawn(session::hear(
            Arc::clone(&session),
            self.generation,
            self.unit.inbox.clone(),
        ));
        self.running = Some(Running {
            session,
            monitor: launch.monitor,
            asked: VecDeque::new(),
            listening: HashSet::new(),
            started: false,
            line: false,
            ready: false,
            probe: None,
            force: None,
            ending: false,
            ended: None,
            _place: launch.place,
        });
        Ok(())
    }

    fn count_memory(&self) {
        let memory = i64::try_from(self.shared.room.memory()).unwrap_or(i64::MAX);
        self.shared.metrics.memory.set(memory);
    }

    fn note(&self, mark: Mark, at: u64) {
        self.unit.lock().note(mark, at);
    }

    /// A start has failed, or an instance has crashed.
    fn fail(&self, reason: String) {
        let unit = &self.prepared.unit.name;
        tracing::warn!(unit, "{}", reason.trim_end());
        self.unit.metrics.failures.inc();
        let mut core = self.unit.lock();
        core.statistics.failures += 1;
        if let Some(timeline) = &mut core.timeline {
            timeline.fail(reason.clone(), now_microseconds());
        }
        core.trouble = Some(reason);
    }

    /// The last lines of the console, for a start that failed.
    fn last_lines(&self) -> String {
        let Ok(instance) = self.shared.state.open(&self.prepared.unit.name) else {
            return String::new();
        };
        let lines = kiln_monitor::console::tail(&instance.console_path(), LAST_LINES);
        if lines.is_empty() {
            String::new()
        } else {
            format!("; its last lines:\n{lines}")
        }
    }

    async fn said(&mut self, message: Message) {
        let (at, event) = match message {
            Message::Answer { error, activity } => return self.answered(error, activity).await,
            Message::Event { at, event } => (at, event),
            Message::Held { .. } => return,
        };
        let Some(running) = &mut self.running else {
            return;
        };
        match event {
            Said::Engine => {}
            Said::Kernel => self.note(Mark::KernelUp, at),
            Said::Started { .. } => {
                running.started = true;
                self.note(Mark::ProgramStarted, at);
                self.consider_ready();
            }
            Said::Listening { port, protocol } => {
                running.listening.insert((port, protocol));
                self.note(Mark::Listening, at);
                self.consider_ready();
            }
            Said::Line => {
                running.line = true;
                self.consider_ready();
            }
            Said::Answered => {
                self.note(Mark::FirstByte, at);
                self.finish_timeline();
            }
            Said::Suspended => {
                self.unit.metrics.stops.inc();
                self.note(Mark::Suspended, at);
                self.finish_timeline();
                self.unit.lock().timeline = None;
                tracing::info!(unit = self.unit.name, "suspended");
                self.unit.event(Event::Suspended);
            }
            Said::Resumed => {
                let mut core = self.unit.lock();
                if core.timeline.is_none() {
                    // Nobody here has asked for that: something came for one of its sockets.
                    let port = self.sockets.first().map(|socket| socket.address.port());
                    let cause = Cause::Connection(port.unwrap_or_default());
                    core.timeline = Some(Timeline::new(self.unit.name.clone(), cause, at));
                }
                core.note(Mark::Resumed, at);
                drop(core);
                tracing::info!(unit = self.unit.name, "resumed");
                self.finish_timeline();
                self.unit.event(Event::Resumed);
            }
            Said::Failed(refusal) => running.ended = Some(Some(refusal.message)),
            Said::Ended { code, reason } => {
                let early = !running.ready && !running.ending;
                let reason = match reason {
                    None if early => Some(format!(
                        "the program ended with code {code} before it was ready{}",
                        self.last_lines()
                    )),
                    reason => reason,
                };
                if let Some(running) = &mut self.running {
                    running.ended = Some(reason);
                }
            }
        }
    }

    async fn answered(&mut self, error: Option<String>, activity: Option<Activity>) {
        let Some(running) = &mut self.running else {
            return;
        };
        match (running.asked.pop_front(), error, activity) {
            (Some(Asked::Machine(ticket)), None, Some(activity)) => {
                self.unit.event(Event::Activity {
                    ticket,
                    connections: activity.connections,
                    bytes: activity.bytes,
                });
            }
            (Some(Asked::Machine(ticket)), Some(error), _) => {
                tracing::debug!(unit = self.unit.name, "{error}");
                self.unit.event(Event::Refused { ticket });
            }
            _ => {}
        }
    }

    /// The instance is ready if it has shown all that is asked of it.
    fn consider_ready(&mut self) {
        let Some(running) = &mut self.running else {
            return;
        };
        if running.ready || !running.started || running.probe.is_some() {
            return;
        }
        let unit = &self.prepared.unit;
        let own = unit.ports.iter().map(|port| (port.guest, port.protocol));
        let fronts = unit.fronts.iter().map(|front| (front.port, Protocol::Tcp));
        let listens = own
            .chain(fronts)
            .all(|wanted| running.listening.contains(&wanted));
        let (inbox, generation) = (self.unit.inbox.clone(), self.generation);
        let ready = match &unit.ready {
            Readiness::Port => listens,
            Readiness::Line(_) => running.line,
            Readiness::Delay(delay) => {
                let delay = *delay;
                let task = tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    let _ = inbox.send(Input::Ready(generation));
                });
                running.probe = Some(task.abort_handle());
                false
            }
            Readiness::Http { path, port } => {
                if running.listening.contains(&(*port, Protocol::Tcp)) {
                    let host = unit.dns.first().cloned().unwrap_or_default();
                    let task = tokio::spawn(probe(inbox, generation, path.clone(), *port, host));
                    running.probe = Some(task.abort_handle());
                }
                false
            }
        };
        if ready {
            self.ready();
        }
    }

    fn ready(&mut self) {
        let Some(running) = &mut self.running else {
            return;
        };
        if std::mem::replace(&mut running.ready, true) {
            return;
        }
        let now = now_microseconds();
        let mut core = self.unit.lock();
        core.note(Mark::Ready, now);
        core.trouble = None;
        let took = core
            .timeline
            .as_ref()
            .map(|timeline| now.saturating_sub(timeline.start()));
        core.statistics.ready_microseconds = took.or(core.statistics.ready_microseconds);
        let statistics = core.statistics;
        drop(core);
        if let Some(took) = took {
            let took = Duration::from_micros(took);
            self.unit.metrics.became_ready(took, false);
            tracing::info!(unit = self.unit.name, ?took, "ready");
        }
        self.unit.event(Event::Ready);
        self.shared
            .remember(Change::Statistics(self.unit.name.clone(), statistics));
    }

    /// The present summons has come to its end: it is kept.
    fn finish_timeline(&self) {
        if let Some(timeline) = self.unit.timeline() {
            self.shared.remember(Change::Timeline(Box::new(timeline)));
        }
    }

    async fn end(&mut self, at_once: bool) {
        const SIGTERM: u8 = 15;
        if self.launching {
            self.end_launched = true;
            return;
        }
        if at_once {
            self.kill().await;
            return;
        }
        let grace = self.prepared.unit.grace;
        if let Some(running) = &mut self.running {
            running.ending = true;
            running.force = Some((Instant::now() + grace, Force::Kill));
        }
        // Nobody is accepted any more by a program that ends: who comes waits for the next instance.
        self.ask(Request::Pause, Asked::Other).await;
        self.ask(Request::Signal(SIGTERM), Asked::Other).await;
    }

    async fn kill(&mut self) {
        if let Some(running) = &mut self.running {
            running.ending = true;
            running.force = Some((Instant::now() + END_PATIENCE, Force::KillMonitor));
        }
        self.ask(Request::Kill, Asked::Other).await;
    }

    /// The monitor does not do what it is told: its end takes the instance with it.
    fn kill_monitor(&self) {
        let Some(running) = &self.running else { return };
        tracing::error!(unit = self.unit.name, "its monitor does not end it");
        let alive = self
            .shared
            .state
            .open(&self.unit.name)
            .is_ok_and(|instance| instance.alive());
        if let Some(pid) = i32::try_from(running.monitor).ok().and_then(Pid::from_raw)
            && alive
        {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }

    /// The monitor is gone, and the instance with it.
    fn gone(&mut self) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        if let Some(probe) = &running.probe {
            probe.abort();
        }
        self.shared.reap();
        let crash = match running.ended.take() {
            Some(reason) => reason.filter(|_| !running.ending),
            None if running.ending => None,
            None => Some("its monitor was killed".to_owned()),
        };
        let crashed = crash.is_some();
        self.unit.metrics.stops.inc();
        if let Some(reason) = crash {
            self.fail(reason);
        } else {
            tracing::info!(unit = self.unit.name, "stopped");
        }
        let mut core = self.unit.lock();
        core.note(Mark::Stopped, now_microseconds());
        core.statistics.last_stop = Some(now_microseconds());
        let statistics = core.statistics;
        drop(core);
        self.finish_timeline();
        self.shared
            .remember(Change::Statistics(self.unit.name.clone(), statistics));
        drop(running);
        self.count_memory();
        self.unit.event(Event::Ended { crashed });
    }

    /// Hands over the connections of fronts that wait.
    async fn deliver(&mut self) {
        while let Some(running) = &mut self.running {
            let Some((connection, guest, peer)) = self.deliveries.pop_front() else {
                return;
            };
            running.asked.push_back(Asked::Other);
            let request = Request::Connection { guest, peer };
            if let Err(error) = session::ask(&running.session, &request, Some(&connection)).await {
                tracing::debug!(unit = self.unit.name, "{error}");
                running.asked.pop_back();
                self.deliveries.push_front((connection, guest, peer));
                return;
            }
        }
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// Removes what the last instance of a unit that is gone has left.
fn remove_instance(state: &StateDirectory, name: &str) -> Result<(), kiln_monitor::Error> {
    if !state.exists(name) {
        return Ok(());
    }
    let instance = state.open(name)?;
    // It may be another's, also of a unit of the same name that has come since.
    if instance.configuration.unit.as_deref() == Some(name)
        && instance.wait_unlocked(END_PATIENCE)?
    {
        instance.remove()?;
    }
    Ok(())
}

/// Makes the instance and starts its monitor. What an earlier one of the same unit has left is removed first.
fn start_instance(
    state: &StateDirectory,
    configuration: &kiln_monitor::state::InstanceConfiguration,
    sockets: &[Arc<OwnedFd>],
    line: Option<String>,
) -> Result<launch::Launched, String> {
    let failed = |error: kiln_monitor::Error| match error.help() {
        Some(help) => format!("{error} ({help})"),
        None => error.to_string(),
    };
    if state.exists(&configuration.name)
        && let Ok(old) = state.open(&configuration.name)
    {
        if old.configuration.unit.as_ref() != Some(&configuration.name) {
            return Err(format!(
                "an instance that is not the summoner's has the unit's name '{0}' (rename the unit, or: kiln rm -f {0})",
                configuration.name
            ));
        }
        // The monitor may have said its last word and not be gone yet.
        if !old.wait_unlocked(END_PATIENCE).map_err(failed)? {
            return Err("its last instance does not end".to_owned());
        }
        old.remove().map_err(failed)?;
    }
    let instance = state.create(configuration).map_err(failed)?;
    let held: Vec<_> = sockets
        .iter()
        .enumerate()
        .map(|(port, socket)| Held {
            port,
            socket: socket.as_fd(),
        })
        .collect();
    match launch::launch(state, &instance, &held, line) {
        Ok(launched) => Ok(launched),
        Err(error) => {
            let _ = instance.remove();
            Err(failed(error))
        }
    }
}

/// Asks for a path over HTTP (RFC 9112) until it is answered with a status of 200 to 299.
async fn probe(
    inbox: mpsc::UnboundedSender<Input>,
    generation: u64,
    path: String,
    port: u16,
    host: String,
) {
    let mut pause = PROBE_FIRST;
    loop {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        let once = async {
            let (ours, theirs) = StdStream::pair()?;
            ours.set_nonblocking(true)?;
            let deliver = Input::Deliver {
                connection: theirs.into(),
                guest: port,
                peer: Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1)),
            };
            inbox
                .send(deliver)
                .map_err(|_| io::Error::from(io::ErrorKind::NotConnected))?;
            let mut ours = UnixStream::from_std(ours)?;
            ours.write_all(request.as_bytes()).await?;
            // "HTTP/1.1 204"
            let mut line = [0; 12];
            ours.read_exact(&mut line).await?;
            io::Result::Ok(line.starts_with(b"HTTP/1.") && line.get(9) == Some(&b'2'))
        };
        if let Ok(Ok(true)) = tokio::time::timeout(PROBE_PATIENCE, once).await {
            let _ = inbox.send(Input::Ready(generation));
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PROBE_LONGEST);
    }
}

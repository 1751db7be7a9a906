//! The summoner itself: brings configuration, units, name server, fronts, store and commands together.
//!
//! ```text
//! STATE/summon/
//!   lock         held (flock) by the living summoner
//!   control      its control socket
//!   store.redb   what survives its end
//!   summon.log   what it says when it runs in the background
//! ```
//!
//! What always holds: a configuration is checked as a whole before anything of it is done, and what a reload does not change
//! goes on untouched. (A port that turns out at a reload to be somebody else's leaves it half done: old units have gone or
//! changed, no new one has come. The next reload that succeeds makes it whole.) The truth about what runs is in the instances' folders; a summoner that starts finds its units there.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use kiln_monitor::Refusal;
use kiln_monitor::state::{InstanceConfiguration, StateDirectory, open_lock};
use rustix::fs::FlockOperation;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::address::Pool;
use crate::configuration::{self, Configuration, Forward, Machine};
use crate::control::{self, Answer, Request};
use crate::dns::{self, Zone};
use crate::front::{self, Fronts};
use crate::metrics::{self, Metrics};
use crate::room::{Ceilings, Room};
use crate::store::{self, Change, Statistics, Store};
use crate::unit::machine::{Event, State};
use crate::unit::runner::{Adopted, Runner, Shared, write_changes};
use crate::unit::{Handle, Prepared, published};

/// How long the end of all units may take when the summoner ends.
const END_PATIENCE: Duration = Duration::from_secs(60);
/// How long `ps` waits for units to say how busy they are.
const LOOK_PATIENCE: Duration = Duration::from_millis(200);
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// How long the task of a unit may take that is gone already.
const LEAVE_PATIENCE: Duration = Duration::from_secs(5);
/// How long answers to commands may take to leave at the end.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How often it is looked whether they have ended.
const END_LOOK: Duration = Duration::from_millis(10);

/// Makes the instance of a unit: finds or builds its image and checks its options. Blocks.
pub type Prepare =
    Arc<dyn Fn(&configuration::Unit) -> Result<InstanceConfiguration, String> + Send + Sync>;

/// Reads the configuration again. Blocks.
pub type Read = Arc<dyn Fn() -> Result<Configuration, String> + Send + Sync>;

/// Why a summoner cannot work, or does not do what is asked.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Error(pub Refusal);

impl Error {
    fn new(message: impl ToString, help: Option<String>, input: bool) -> Self {
        let message = message.to_string();
        Self(Refusal {
            message,
            help,
            input,
        })
    }

    fn environment(message: impl ToString, help: impl Into<String>) -> Self {
        Self::new(message, Some(help.into()), false)
    }

    fn input(message: impl ToString, help: impl Into<String>) -> Self {
        Self::new(message, Some(help.into()), true)
    }

    /// The text says all.
    fn plain(message: impl ToString) -> Self {
        Self::new(message, None, false)
    }

    /// What a user has written is wrong; the text says all.
    fn wrong(problems: impl ToString) -> Self {
        Self::new(problems, None, true)
    }

    fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |error| Self::plain(format!("cannot {action}: {error}"))
    }
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        Self::plain(error)
    }
}

impl From<dns::Error> for Error {
    fn from(error: dns::Error) -> Self {
        Self::plain(error)
    }
}

impl From<tokio::task::JoinError> for Error {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::plain(error)
    }
}

/// The summoner's folder in a state directory.
#[must_use]
pub fn directory(state: &StateDirectory) -> PathBuf {
    state.path().join("summon")
}

/// One unit.
struct Entry {
    unit: Handle,
    prepared: Prepared,
    /// It is to go; what is left of it is ending.
    leaving: bool,
}

/// What a summoner is made of.
pub struct Summoner {
    shared: Arc<Shared>,
    configuration: Configuration,
    entries: BTreeMap<String, Entry>,
    clock: Instant,
    dns: dns::Server,
    fronts: Fronts,
    prepare: Prepare,
    read: Read,
    control: UnixListener,
    directory: PathBuf,
    addresses: crate::interface::Addresses,
    metrics_server: Option<(SocketAddr, tokio::task::JoinHandle<()>)>,
    _lock: File,
}

/// Makes the folder and takes its lock.
fn take_lock(directory: &Path) -> Result<File, Error> {
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory);
    made.map_err(Error::io(format!("make {}", directory.display())))?;
    let path = directory.join("lock");
    let lock = open_lock(&path).map_err(Error::io(format!("open {}", path.display())))?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::environment(
            "another summoner is at work with this state directory",
            "see it with 'kiln summon ps' and end it with 'kiln summon down', or set KILN_STATE to a directory of its own",
        )),
        Err(error) => Err(Error::io(format!("lock {}", path.display()))(error.into())),
    }
}

impl Summoner {
    /// Binds everything, adopts what an earlier summoner has left running, and is then ready to [`Summoner::run`].
    ///
    /// # Errors
    /// Names what cannot be had. Nothing is left behind.
    pub async fn start(
        state: StateDirectory,
        configuration: Configuration,
        prepare: Prepare,
        read: Read,
    ) -> Result<Self, Error> {
        let directory = directory(&state);
        let lock = take_lock(&directory)?;
        let store = Store::open(&directory.join("store.redb"))?;
        let store = Arc::new(store);
        let shared_store = Arc::clone(&store);
        let dns = dns::Server::bind(dns_configuration(&configuration), Zone::default()).await?;
        let counted = dns.clone();
        let metrics = Arc::new(Metrics::new(move || counted.statistics()));
        let (writer, changes) = std::sync::mpsc::channel();
        let written = Arc::clone(&store);
        std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || write_changes(&written, &changes))
            .map_err(Error::io("start the store's thread"))?;
        let shared = Arc::new(Shared {
            state,
            room: Arc::new(Room::new(Arc::clone(&metrics))),
            store,
            writer,
            metrics,
            children: Mutex::default(),
        });
        let socket = directory.join(control::SOCKET);
        let control = {
            // A dead summoner's.
            let _ = std::fs::remove_file(&socket);
            let (_directory, path) = control::short_path(&directory)
                .map_err(Error::io(format!("open {}", directory.display())))?;
            UnixListener::bind(path).map_err(Error::io(format!("make {}", socket.display())))?
        };
        let mut summoner = Self {
            shared,
            configuration: configuration.clone(),
            entries: BTreeMap::new(),
            clock: Instant::now(),
            dns,
            fronts: Fronts::default(),
            prepare,
            read,
            control,
            directory,
            addresses: crate::interface::Addresses::new(shared_store),
            metrics_server: None,
            _lock: lock,
        };
        let adopted = summoner.find_running().await?;
        if let Err(error) = summoner.apply(configuration, adopted).await {
            summoner.addresses.undo();
            return Err(error);
        }
        Ok(summoner)
    }

    /// Where the name server listens.
    #[must_use]
    pub fn listening(&self) -> &[SocketAddr] {
        self.dns.local_addresses()
    }

    /// How many units there are, and how many of them run.
    #[must_use]
    pub fn count(&self) -> (usize, usize) {
        let running = self.entries.values().filter(|entry| entry.unit.occupies());
        (self.entries.len(), running.count())
    }

    /// The units' instances that an earlier summoner has left running.
    async fn find_running(&self) -> Result<BTreeMap<String, Adopted>, Error> {
        let state = self.shared.state.clone();
        let find = move || {
            let mut found = BTreeMap::new();
            let (instances, _) = state.list()?;
            for instance in instances {
                let Some(unit) = instance.configuration.unit.clone() else {
                    continue;
                };
                if !instance.alive() {
                    continue;
                }
                match Adopted::reach(&instance) {
                    Ok(adopted) => {
                        found.insert(unit, adopted);
                    }
                    Err(error) => tracing::warn!(unit, "it runs and cannot be adopted: {error}"),
                }
            }
            Ok(found)
        };
        tokio::task::spawn_blocking(find)
            .await?
            .map_err(|error: kiln_monitor::Error| Error::plain(error.to_string()))
    }

    /// A configuration with those of the added units that fit it; the others give way, and the log says so.
    fn with_added(configuration: &Configuration, added: Vec<configuration::Unit>) -> Configuration {
        let machine = Machine::current();
        let mut whole = configuration.clone();
        for unit in added {
            let name = unit.name.clone();
            match whole.with([unit], &machine) {
                Ok(with) => whole = with,
                Err(problems) => tracing::error!(
                    unit = name,
                    "the unit that was added does not fit the configuration any more, and is left out: {problems}"
                ),
            }
        }
        whole
    }

    /// Addresses for all units: fixed, leased before, or leased now.
    fn lease(
        &self,
        configuration: &Configuration,
    ) -> Result<Vec<(configuration::Unit, Vec<IpAddr>)>, Error> {
        let failed = |error: String| Error::input(error, "choose a larger pool in summon.toml");
        let leases = self.shared.store.leases()?;
        let reserved = configuration.reserved_addresses();
        let pool_of = |prefix: IpNet| Pool::new(prefix, reserved.clone(), leases.iter().cloned());
        let mut pool = pool_of(IpNet::V4(configuration.pool));
        let mut pool6 = configuration.pool6.map(|prefix| pool_of(IpNet::V6(prefix)));
        let mut changes = Vec::new();
        let mut all = Vec::with_capacity(configuration.units.len());
        for unit in configuration.units.values() {
            let (address, address6) = configuration.fixed_addresses(unit);
            let mut addresses: Vec<IpAddr> = address.map(IpAddr::V4).into_iter().collect();
            addresses.extend(address6.map(IpAddr::V6));
            let mut lease = |pool: &mut Pool| -> Result<(), Error> {
                let known = pool.get(&unit.name);
                let address = pool
                    .lease(&unit.name)
                    .map_err(|error| failed(error.to_string()))?;
                if known.is_none() {
                    changes.push(Change::Lease(unit.name.clone(), address));
                }
                addresses.push(address);
                Ok(())
            };
            if configuration.needs_lease(unit) {
                lease(&mut pool)?;
            }
            if configuration.needs_lease6(unit)
                && let Some(pool6) = &mut pool6
            {
                lease(pool6)?;
            }
            all.push((unit.clone(), addresses));
        }
        self.shared.store.write(&changes)?;
        Ok(all)
    }

    /// Finds or builds the images of units, each source once.
    async fn prepare_all(
        &self,
        units: Vec<(configuration::Unit, Vec<IpAddr>)>,
    ) -> Result<Vec<Prepared>, Error> {
        let prepare = Arc::clone(&self.prepare);
        let make = move |(unit, addresses): (configuration::Unit, Vec<IpAddr>)| {
            let instance = prepare(&unit).map(|mut instance| {
                instance.ports = published(&unit, &addresses);
                instance
            });
            Prepared {
                unit,
                addresses,
                instance,
            }
        };
        let make_all = move || units.into_iter().map(make).collect();
        Ok(tokio::task::spawn_blocking(make_all).await?)
    }

    /// Makes a configuration the present one. New units live from when all of it has succeeded; when it has not, none of
    /// them is there.
    async fn apply(
        &mut self,
        configuration: Configuration,
        adopted: BTreeMap<String, Adopted>,
    ) -> Result<(), Error> {
        let whole = Self::with_added(&configuration, self.shared.store.units()?);
        let prepared = self.prepare_all(self.lease(&whole)?).await?;
        for prepared in &prepared {
            if let Err(reason) = &prepared.instance {
                let name = &prepared.unit.name;
                return Err(Error::wrong(format!("unit '{name}': {reason}")));
            }
        }
        let fronts = Fronts::plan(&whole, whole.units.values())
            .map_err(|error| Error::input(error, "see [front.NAME] in summon.toml"))?;
        if let Some(interface) = &whole.interface {
            let addresses = prepared.iter().flat_map(|one| &one.addresses);
            self.addresses.add(interface, addresses).map_err(|error| {
                Error::environment(error, "run as root, or leave 'interface' out")
            })?;
        }
        let first = self.entries.is_empty();
        let mut begun = Vec::new();
        let switched = self
            .switch(&whole, prepared, fronts, adopted, &mut begun)
            .await;
        if let Err(error) = switched {
            for runner in begun {
                self.entries.remove(runner.name());
                runner.abandon();
            }
            // Nobody is to wait for one of them. What was said before could be said then.
            let _ = self.publish_zone(&self.configuration);
            return Err(error);
        }
        for runner in begun {
            tokio::spawn(runner.run());
        }
        if !first {
            let old = &self.configuration;
            if (&old.listen, &old.forward, &old.forward_for)
                != (
                    &configuration.listen,
                    &configuration.forward,
                    &configuration.forward_for,
                )
            {
                tracing::warn!(
                    "'listen', 'forward' and 'forward_for' change only when the summoner is started again ('kiln summon down --keep' leaves its units running)"
                );
            }
        }
        self.configuration = configuration;
        Ok(())
    }

    /// Changes over to a configuration that was checked. What can still fail is what the machine refuses: a port that somebody
    /// else has.
    async fn switch(
        &mut self,
        configuration: &Configuration,
        prepared: Vec<Prepared>,
        fronts: front::Plan,
        adopted: BTreeMap<String, Adopted>,
        begun: &mut Vec<Runner>,
    ) -> Result<(), Error> {
        self.shared.room.set(Ceilings {
            units: configuration.max_running,
            memory: configuration.max_memory,
        });
        let statistics = self.shared.store.statistics()?;
        let statistics_of = |name: &str| statistics.get(name).copied().unwrap_or_default();
        // Those that go, first: others may want their ports.
        for (name, entry) in &mut self.entries {
            if !configuration.units.contains_key(name) {
                entry.leaving = true;
                entry.unit.event(Event::Remove);
            }
        }
        self.wait_for_those_that_left().await;
        for (name, adopted) in adopted {
            match prepared.iter().find(|one| one.unit.name == name) {
                Some(one) => {
                    let statistics = statistics_of(&name);
                    begun.push(self.begin(one.clone(), statistics, Some(adopted))?);
                    self.shared.metrics.adopted.inc();
                    tracing::info!(unit = name, "adopted");
                }
                None => {
                    tracing::info!(unit = name, "no longer configured: ending it");
                    self.end_stray(&name);
                }
            }
        }
        for prepared in prepared {
            let name = prepared.unit.name.clone();
            if let Some(entry) = self.entries.get_mut(&name)
                && entry.unit.state() != State::Gone
            {
                if entry.prepared == prepared && !entry.leaving {
                    continue;
                }
                let stale = entry.prepared.instance != prepared.instance
                    || entry.prepared.addresses != prepared.addresses;
                entry.leaving = false;
                entry.prepared = prepared.clone();
                entry.unit.configure(prepared, stale);
                continue;
            }
            begun.push(self.begin(prepared, statistics_of(&name), None)?);
        }
        self.entries
            .retain(|_, entry| !(entry.leaving && entry.unit.state() == State::Gone));
        self.publish_zone(configuration)?;
        self.serve_metrics(configuration).await?;
        let handles = |name: &str| self.entries.get(name).map(|entry| Arc::clone(&entry.unit));
        self.fronts
            .set(fronts, handles)
            .await
            .map_err(|error| Error::environment(error, "choose another address or port"))?;
        let kept = self
            .entries
            .values()
            .filter(|entry| !entry.leaving || entry.unit.occupies());
        self.addresses.keep(
            configuration.interface.as_deref(),
            kept.flat_map(|entry| &entry.prepared.addresses),
        );
        Ok(())
    }

    /// Those that are gone give up their sockets in a moment: what comes next may want them.
    async fn wait_for_those_that_left(&self) {
        let gone = |entry: &Entry| entry.unit.state() == State::Gone && !entry.unit.has_left();
        let end = Instant::now() + LEAVE_PATIENCE;
        while self.entries.values().any(gone) && Instant::now() < end {
            tokio::time::sleep(END_LOOK).await;
        }
    }

    /// Ends an instance of a unit that is no longer configured.
    fn end_stray(&self, name: &str) {
        let state = self.shared.state.clone();
        let name = name.to_owned();
        tokio::task::spawn_blocking(move || {
            let Ok(instance) = state.open(&name) else {
                return;
            };
            if let Ok(mut client) = kiln_monitor::control::Client::connect(&instance) {
                let _ = client.ask(kiln_monitor::control::Request::Signal(15));
                if !matches!(client.wait_end(Duration::from_secs(10)), Ok(true)) {
                    let _ = client.ask(kiln_monitor::control::Request::Kill);
                }
            }
            if matches!(instance.wait_unlocked(Duration::from_secs(10)), Ok(true)) {
                let _ = instance.remove();
            }
        });
    }

    /// A new unit. It is there, and lives when its runner runs.
    fn begin(
        &mut self,
        prepared: Prepared,
        statistics: Statistics,
        adopted: Option<Adopted>,
    ) -> Result<Runner, Error> {
        let name = prepared.unit.name.clone();
        let (unit, runner) = Runner::new(
            Arc::clone(&self.shared),
            prepared.clone(),
            statistics,
            adopted,
            self.clock,
        )
        .map_err(|error| {
            Error::environment(
                error,
                "free that port, or give the unit another port or address",
            )
        })?;
        let entry = Entry {
            unit,
            prepared,
            leaving: false,
        };
        self.entries.insert(name, entry);
        Ok(runner)
    }

    /// Gives the name server what it is to answer.
    fn publish_zone(&self, configuration: &Configuration) -> Result<(), Error> {
        let failed =
            |error: dns::ZoneError| Error::input(error.to_string(), "see 'dns' in summon.toml");
        let mut zone = Zone::builder();
        for name in &configuration.zones {
            zone.authoritative(name).map_err(failed)?;
        }
        for entry in self.entries.values().filter(|entry| !entry.leaving) {
            for name in &entry.prepared.unit.dns {
                let known = dns::Name {
                    unit: Arc::clone(&entry.unit) as Arc<dyn dns::Unit>,
                    addresses: entry.prepared.addresses.clone(),
                    ttl: entry.prepared.unit.ttl,
                };
                zone.name(name, known).map_err(failed)?;
            }
        }
        // A serial that grows over the summoner's lives too.
        zone.serial(u32::try_from(kiln_monitor::state::now() / 1000).unwrap_or(u32::MAX));
        self.dns.set_zone(zone.build());
        Ok(())
    }

    async fn serve_metrics(&mut self, configuration: &Configuration) -> Result<(), Error> {
        let present = self.metrics_server.as_ref().map(|(address, _)| *address);
        if present == configuration.metrics {
            return Ok(());
        }
        if let Some((_, task)) = self.metrics_server.take() {
            task.abort();
        }
        let Some(address) = configuration.metrics else {
            return Ok(());
        };
        let listener = TcpListener::bind(address).await.map_err(|error| {
            Error::environment(
                format!("the metrics cannot be served at {address}: {error}"),
                "choose another address for 'metrics'",
            )
        })?;
        let metrics = Arc::clone(&self.shared.metrics);
        let task = tokio::spawn(async move {
            metrics::serve(listener, metrics).await;
        });
        self.metrics_server = Some((address, task));
        Ok(())
    }

    /// Serves until it is told to end.
    ///
    /// # Errors
    /// When the name server fails.
    pub async fn run(mut self) -> Result<(), Error> {
        let failed = || Error::io("catch signals");
        let mut hangup = signal(SignalKind::hangup()).map_err(failed())?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed())?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed())?;
        let mut child = signal(SignalKind::child()).map_err(failed())?;
        let (commands, mut inbox) = mpsc::channel::<(Request, oneshot::Sender<Answer>)>(64);
        let mut talks = JoinSet::new();
        let dns = self.dns.clone();
        let mut serving = tokio::spawn(async move { dns.run().await });
        let (keep, asked) = loop {
            tokio::select! {
                accepted = self.control.accept() => match accepted {
                    Ok((stream, _)) => {
                        talks.spawn(converse(stream, commands.clone()));
                    }
                    Err(error) => {
                        tracing::warn!("accept a command: {error}");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                },
                Some((request, answer)) = inbox.recv() => {
                    if let Request::Down { keep } = request {
                        break (keep, Some(answer));
                    }
                    let said = self.command(request).await;
                    let _ = answer.send(said);
                }
                _ = hangup.recv() => {
                    if let Err(error) = self.reload().await {
                        tracing::error!("the configuration is not taken: {error}");
                    }
                }
                Some(_) = talks.join_next() => {}
                _ = interrupt.recv() => break (false, None),
                _ = terminate.recv() => break (false, None),
                _ = child.recv() => self.shared.reap(),
                ended = &mut serving => {
                    let reason = match ended {
                        Ok(Ok(())) => "it ended".to_owned(),
                        Ok(Err(error)) => error.to_string(),
                        Err(error) => error.to_string(),
                    };
                    return Err(Error::plain(format!("the name server cannot go on: {reason}")));
                }
            }
        };
        self.dns.shutdown();
        if !keep {
            self.end_units().await;
            self.addresses.clear();
        }
        let _ = std::fs::remove_file(self.directory.join(control::SOCKET));
        let shared = Arc::clone(&self.shared);
        let _ = tokio::task::spawn_blocking(move || shared.write_all()).await;
        if let Some(asked) = asked {
            let _ = asked.send(Answer::Done);
            // The answer is to leave before this process does; clients that say nothing are not waited for.
            drop(inbox);
            let all_said = async { while talks.join_next().await.is_some() {} };
            let _ = tokio::time::timeout(LAST_WORDS, all_said).await;
        }
        Ok(())
    }

    /// Ends all units and waits for that.
    async fn end_units(&mut self) {
        tracing::info!("ending");
        for entry in self.entries.values() {
            entry.unit.event(Event::Remove);
            entry.unit.event(Event::Stop);
        }
        let end = Instant::now() + END_PATIENCE;
        while self.entries.values().any(|entry| !entry.unit.has_left()) && Instant::now() < end {
            tokio::time::sleep(END_LOOK).await;
        }
    }

    async fn reload(&mut self) -> Result<(), Error> {
        let read = Arc::clone(&self.read);
        let outcome = match tokio::task::spawn_blocking(move || read()).await {
            Ok(Ok(configuration)) => self.apply(configuration, BTreeMap::new()).await,
            Ok(Err(problems)) => Err(Error::wrong(problems)),
            Err(error) => Err(error.into()),
        };
        match &outcome {
            Ok(()) => {
                self.shared.metrics.reloads.inc();
                tracing::info!("reloaded: {} units", self.entries.len());
            }
            Err(_) => {
                self.shared.metrics.reload_failures.inc();
            }
        }
        outcome
    }

    async fn command(&mut self, request: Request) -> Answer {
        let outcome = match request {
            Request::Ps => {
                self.look().await;
                Ok(Answer::Units {
                    units: self
                        .entries
                        .values()
                        .filter(|entry| !(entry.leaving && entry.unit.state() == State::Gone))
                        .map(|entry| entry.unit.status(&entry.prepared))
                        .collect(),
                    listen: self.dns.local_addresses().to_vec(),
                })
            }
            Request::Start(names) => self.tell(&names, Event::Start),
            Request::Stop(names) => self.tell(&names, Event::Stop),
            Request::Add { unit, directory } => {
                match self.configuration.parse_unit(&unit, &directory) {
                    Ok(unit) => self.add(unit).await,
                    Err(problems) => Err(Error::wrong(problems)),
                }
            }
            Request::Rm(names) => self.remove(&names).await,
            Request::Reload => self.reload().await.map(|()| Answer::Done),
            Request::Trace(name) => self.trace(&name),
            Request::Down { .. } => Ok(Answer::Done),
        };
        outcome.unwrap_or_else(|Error(refusal)| Answer::Refused(refusal))
    }

    /// Has all units look how busy they are, and gives them a moment for it.
    async fn look(&self) {
        let asked: Vec<_> = self
            .entries
            .values()
            .filter(|entry| entry.unit.state() == (State::Ready { asked: None }))
            .map(|entry| &entry.unit)
            .collect();
        for unit in &asked {
            unit.event(Event::Look);
        }
        let end = Instant::now() + LOOK_PATIENCE;
        while !asked.iter().all(|unit| unit.settled()) && Instant::now() < end {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    fn entry(&self, name: &str) -> Result<&Entry, Error> {
        self.entries.get(name).ok_or_else(|| {
            Error::input(
                format!("there is no unit '{name}'"),
                "'kiln summon ps' lists them",
            )
        })
    }

    fn tell(&self, names: &[String], event: Event) -> Result<Answer, Error> {
        for name in names {
            self.entry(name)?;
        }
        for name in names {
            self.entry(name)?.unit.event(event);
        }
        Ok(Answer::Done)
    }

    fn trace(&self, name: &str) -> Result<Answer, Error> {
        let entry = self.entry(name)?;
        let mut all = self.shared.store.timelines(name)?;
        if let Some(present) = entry.unit.timeline() {
            all.retain(|one| one.start() != present.start());
            all.push(present);
        }
        Ok(Answer::Timelines(all))
    }

    async fn add(&mut self, unit: configuration::Unit) -> Result<Answer, Error> {
        let name = unit.name.clone();
        if self.configuration.units.contains_key(&name) {
            return Err(Error::input(
                format!("the unit '{name}' is in the configuration already"),
                "choose another name, or change it there and 'kiln summon reload'",
            ));
        }
        let store = Arc::clone(&self.shared.store);
        let before = store.units()?;
        let others = before.iter().filter(|other| other.name != name).cloned();
        Self::with_added(&self.configuration, others.collect())
            .with([unit.clone()], &Machine::current())
            .map_err(Error::wrong)?;
        let write = |change: Change| store.write(&[change]);
        write(Change::AddUnit(Box::new(unit)))?;
        let configuration = self.configuration.clone();
        if let Err(error) = self.apply(configuration, BTreeMap::new()).await {
            // As it was.
            let old = before.into_iter().find(|other| other.name == name);
            write(match old {
                Some(old) => Change::AddUnit(Box::new(old)),
                None => Change::RemoveUnit(name),
            })?;
            return Err(error);
        }
        Ok(Answer::Done)
    }

    async fn remove(&mut self, names: &[String]) -> Result<Answer, Error> {
        for name in names {
            self.entry(name)?;
            if self.configuration.units.contains_key(name) {
                return Err(Error::input(
                    format!("the unit '{name}' is in the configuration, and was not added"),
                    "take it out there and 'kiln summon reload'",
                ));
            }
        }
        let changes: Vec<_> = names
            .iter()
            .flat_map(|name| {
                [
                    Change::RemoveUnit(name.clone()),
                    Change::Release(name.clone()),
                ]
            })
            .collect();
        self.shared.store.write(&changes)?;
        let configuration = self.configuration.clone();
        self.apply(configuration, BTreeMap::new()).await?;
        Ok(Answer::Done)
    }
}

fn dns_configuration(configuration: &Configuration) -> dns::Configuration {
    dns::Configuration {
        listen: configuration.listen.clone(),
        forward: match &configuration.forward {
            Forward::System => dns::Forward::System,
            Forward::None => dns::Forward::Refuse,
            Forward::To(servers) => dns::Forward::To(servers.clone()),
        },
        forward_for: configuration.forward_for.clone(),
        ..dns::Configuration::default()
    }
}

/// Hears one request and answers it.
async fn converse(stream: UnixStream, commands: mpsc::Sender<(Request, oneshot::Sender<Answer>)>) {
    let (reading, mut writing) = stream.into_split();
    let mut line = String::new();
    let mut reading = BufReader::new(reading.take(control::MAX_LINE));
    if !matches!(reading.read_line(&mut line).await, Ok(length) if length > 0) {
        return;
    }
    let answer = match serde_json::from_str::<Request>(&line) {
        Ok(request) => {
            let (sender, receiver) = oneshot::channel();
            if commands.send((request, sender)).await.is_err() {
                return;
            }
            match receiver.await {
                Ok(answer) => answer,
                Err(_) => return,
            }
        }
        Err(error) => Answer::Refused(Refusal {
            message: format!("not a request: {error}"),
            help: Some("use the 'kiln' of the same version as the summoner".to_owned()),
            input: true,
        }),
    };
    if let Ok(mut text) = serde_json::to_vec(&answer) {
        text.push(b'\n');
        let _ = writing.write_all(&text).await;
    }
}

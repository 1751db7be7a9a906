//! The state directory: one folder per instance, readable by every later command.
//!
//! ```text
//! STATE/instances/NAME/
//!   lock          held (flock) by the living monitor, and by nobody else for longer than a look
//!   config.json   what was asked
//!   state.json    what `ps` shows
//!   console.log   the program's output (bounded; the older half is console.log.1)
//!   control       Unix socket of the living monitor
//!   monitor.log   what a monitor in the background says itself
//! ```
//!
//! What always holds: an instance's folder appears complete or not at all (it is made beside and renamed), its files are
//! replaced by renaming, and whoever dies leaves a free lock, by which the next command sees it. There is no daemon and
//! no other index: the folders are the truth.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_abi::configuration::RunConfiguration;
use rustix::fs::{FlockOperation, RenameFlags};
use serde::{Deserialize, Serialize};

use crate::arguments::{Publish, VolumeMount, parse_name};
use crate::engine::Pieces;
use crate::error::Error;

/// What was asked for an instance. Stays the same for its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceConfiguration {
    /// The instance's name.
    pub name: String,
    /// The image.
    pub image: ImageReference,
    /// Engine by name.
    pub engine: String,
    /// Memory in bytes.
    pub memory: u64,
    /// How the program reaches the network.
    pub network: NetworkMode,
    /// Published ports.
    pub ports: Vec<Publish>,
    /// Directories of the host.
    pub volumes: Vec<VolumeMount>,
    /// Remove the instance when it has ended.
    pub remove: bool,
    /// The unit that a summoner runs it for.
    #[serde(default)]
    pub unit: Option<String>,
    /// Give the monitor's standard input to the program.
    pub input: bool,
    /// What the kernel is told. Network, volumes and link are filled in by the monitor at the start.
    pub run: RunConfiguration,
}

/// The image of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageReference {
    /// What to show.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Where its pieces lie.
    pub pieces: Pieces,
}

/// `--net`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum NetworkMode {
    /// Loopback only.
    None,
    /// The host's sockets, handed over one by one.
    Socket,
    /// The kernel's own TCP/IP.
    Direct {
        /// Own addresses; empty: by DHCP and router advertisement.
        addresses: Vec<(std::net::IpAddr, u8)>,
        /// Default gateways.
        gateways: Vec<std::net::IpAddr>,
    },
}

impl NetworkMode {
    /// As `--net` takes it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            NetworkMode::None => "none",
            NetworkMode::Socket => "socket",
            NetworkMode::Direct { .. } => "direct",
        }
    }
}

/// Where an instance is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its monitor is at work, the program has not begun.
    Starting,
    /// The program runs.
    Running,
    /// Nothing of it runs until something comes for it.
    Suspended,
    /// The program ended by itself or by a signal.
    Exited,
    /// The unikernel ended in another way: a kernel panic, a killed process, a dead monitor.
    Crashed,
}

/// What `ps` shows of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceState {
    /// Where it is.
    pub phase: Phase,
    /// Exit code, when it has ended.
    pub exit_code: Option<i32>,
    /// Why it crashed.
    pub reason: Option<String>,
    /// The monitor's process.
    pub monitor: Option<u32>,
    /// The engine's process.
    pub process: Option<u32>,
    /// When the instance was made, milliseconds since 1970.
    pub created: u64,
    /// When the program began, milliseconds since 1970.
    pub started: Option<u64>,
    /// When it ended, milliseconds since 1970.
    pub ended: Option<u64>,
    /// Published ports with the ports really bound.
    pub ports: Vec<Publish>,
}

/// Milliseconds since 1970.
#[must_use]
pub fn now() -> u64 {
    now_microseconds() / 1000
}

/// Microseconds since 1970.
#[must_use]
pub fn now_microseconds() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// The state directory.
#[derive(Clone, Debug)]
pub struct StateDirectory {
    path: PathBuf,
}

impl StateDirectory {
    /// The directory that the environment names: `KILN_STATE`, else `/var/lib/kiln` for root, else
    /// `$XDG_STATE_HOME/kiln`, else `~/.local/state/kiln`.
    ///
    /// # Errors
    /// When there is no home directory to fall back to.
    pub fn from_environment() -> Result<Self, Error> {
        let variable =
            |name: &str| std::env::var_os(name).filter(|value: &OsString| !value.is_empty());
        let path = if let Some(path) = variable("KILN_STATE") {
            PathBuf::from(path)
        } else if rustix::process::geteuid().is_root() {
            PathBuf::from("/var/lib/kiln")
        } else if let Some(path) = variable("XDG_STATE_HOME") {
            Path::new(&path).join("kiln")
        } else if let Some(home) = variable("HOME") {
            Path::new(&home).join(".local/state/kiln")
        } else {
            return Err(Error::environment(
                "there is no place for Kiln's state: neither KILN_STATE nor HOME is set",
                "set KILN_STATE to a directory of yours",
            ));
        };
        let path =
            std::path::absolute(&path).map_err(Error::io(format!("use {}", path.display())))?;
        Ok(Self { path })
    }

    /// A state directory at a path.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn instances(&self) -> PathBuf {
        self.path.join("instances")
    }

    /// Where volumes with a name are kept.
    #[must_use]
    pub fn volumes(&self) -> PathBuf {
        self.path.join("volumes")
    }

    /// Makes an instance. Its lock is held by the returned value.
    ///
    /// # Errors
    /// When the name is taken, or the directory cannot be written.
    pub fn create(&self, configuration: &InstanceConfiguration) -> Result<Instance, Error> {
        let parent = self.instances();
        let path = parent.join(&configuration.name);
        let fresh = parent.join(format!(
            ".new-{}-{}",
            std::process::id(),
            configuration.name
        ));
        let mut builder = DirBuilder::new();
        builder.mode(0o700);
        match builder.create(&fresh) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                builder.recursive(true);
                builder
                    .create(&fresh)
                    .map_err(Error::io(format!("make {}", fresh.display())))?;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io(format!("make {}", fresh.display()))(error)),
        }
        let made = self.fill(&fresh, &path, configuration);
        if made.is_err() {
            let _ = fs::remove_dir_all(&fresh);
        }
        made
    }

    fn fill(
        &self,
        fresh: &Path,
        path: &Path,
        configuration: &InstanceConfiguration,
    ) -> Result<Instance, Error> {
        let lock = open_lock(&fresh.join("lock"))
            .map_err(Error::io(format!("make {}/lock", fresh.display())))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(Error::io(format!("lock {}/lock", fresh.display())))?;
        write_json(fresh, "config.json", configuration)?;
        let state = InstanceState {
            phase: Phase::Starting,
            exit_code: None,
            reason: None,
            monitor: None,
            process: None,
            created: now(),
            started: None,
            ended: None,
            ports: configuration.ports.clone(),
        };
        write_json(fresh, "state.json", &state)?;
        let renamed = rustix::fs::renameat_with(
            rustix::fs::CWD,
            fresh,
            rustix::fs::CWD,
            path,
            RenameFlags::NOREPLACE,
        );
        match renamed {
            Ok(()) => Ok(Instance {
                directory: path.to_owned(),
                configuration: configuration.clone(),
                state,
                lock: Some(lock),
            }),
            Err(rustix::io::Errno::EXIST) => Err(self.name_taken(&configuration.name)),
            Err(error) => Err(Error::io(format!("make {}", path.display()))(error)),
        }
    }

    /// The error for a name that is taken, with the words that fit the other instance's state.
    #[must_use]
    pub fn name_taken(&self, name: &str) -> Error {
        let force = if self.open(name).is_ok_and(|other| other.alive()) {
            "-f "
        } else {
            ""
        };
        Error::input(
            format!("the name '{name}' is taken by another instance"),
            format!("choose another with --name, or remove that one first: kiln rm {force}{name}"),
        )
    }

    /// Whether a name is taken.
    #[must_use]
    pub fn exists(&self, name: &str) -> bool {
        self.instances().join(name).exists()
    }

    /// All instances, oldest first. What dead monitors left behind is recognised and noted on the way.
    ///
    /// # Errors
    /// When the directory cannot be read. A damaged instance is passed over and named in the second list.
    pub fn list(&self) -> Result<(Vec<Instance>, Vec<Error>), Error> {
        let directory = self.instances();
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((Vec::new(), Vec::new()));
            }
            Err(error) => return Err(Error::io(format!("read {}", directory.display()))(error)),
        };
        let (mut instances, mut damaged) = (Vec::new(), Vec::new());
        for entry in entries {
            let entry = entry.map_err(Error::io(format!("read {}", directory.display())))?;
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
                continue;
            };
            if name.starts_with(".new-") {
                sweep(&entry.path());
                continue;
            }
            match self.open(&name) {
                Ok(instance) => instances.push(instance),
                // Removed while we looked.
                Err(Error::Input { .. }) => {}
                Err(error) => damaged.push(error),
            }
        }
        instances.sort_by(|a, b| {
            (a.state.created, &a.configuration.name).cmp(&(b.state.created, &b.configuration.name))
        });
        Ok((instances, damaged))
    }

    /// Opens an instance by name. If its monitor has died without a word, that is noted in its state first.
    ///
    /// # Errors
    /// When there is none of that name, or its files are damaged.
    pub fn open(&self, name: &str) -> Result<Instance, Error> {
        let unknown = || {
            Error::input(
                format!("there is no instance named '{name}'"),
                "'kiln ps' lists all instances",
            )
        };
        parse_name(name).map_err(|_| unknown())?;
        let directory = self.instances().join(name);
        if !directory.is_dir() {
            return Err(unknown());
        }
        let mut instance = Instance::read(directory.clone())
            .map_err(|error| if directory.is_dir() { error } else { unknown() })?;
        if instance.alive()
            && let Some(_lock) = instance.try_lock()?
        {
            // The monitor may have written its last word between our reading and our locking.
            instance.state = read_json(&directory, "state.json")?;
            if instance.alive() {
                instance.state.phase = Phase::Crashed;
                instance.state.ended = Some(now());
                instance.state.reason = Some("its monitor died".to_owned());
                instance.state.exit_code = None;
                instance.state.process = None;
                instance.state.monitor = None;
                // If that cannot be noted (the disk is full), the next to look finds it out as well; and whoever wants to
                // remove the instance must be able to.
                let _ = write_json(&directory, "state.json", &instance.state);
                let _ = fs::remove_file(directory.join(CONTROL));
            }
        }
        Ok(instance)
    }

    /// Removes an instance whose files cannot be read, if no monitor lives there.
    ///
    /// # Errors
    /// When a monitor holds its lock, or it cannot be removed.
    pub fn remove_damaged(&self, name: &str) -> Result<(), Error> {
        let name = parse_name(name)?;
        let directory = self.instances().join(&name);
        let lock = open_lock(&directory.join("lock"))
            .map_err(Error::io(format!("open {}/lock", directory.display())))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(Error::io(
            format!(
                "remove {}, which a living monitor uses",
                directory.display()
            ),
        ))?;
        fs::remove_dir_all(&directory).map_err(Error::io(format!("remove {}", directory.display())))
    }

    /// Opens an instance whose lock the caller's process got from the one that made it.
    ///
    /// # Errors
    /// When its files are damaged.
    pub fn adopt(&self, name: &str, lock: OwnedFd) -> Result<Instance, Error> {
        let mut instance = Instance::read(self.instances().join(name))?;
        instance.lock = Some(File::from(lock));
        Ok(instance)
    }
}

/// Name of the control socket in an instance's folder.
const CONTROL: &str = "control";

/// Removes what a command left that died while it made an instance.
fn sweep(path: &Path) {
    let old = || {
        fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|time| {
                time.elapsed()
                    .is_ok_and(|age| age > Duration::from_secs(60))
            })
    };
    let dead = match File::open(path.join("lock")) {
        Ok(lock) => rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
        Err(_) => true,
    };
    if dead && old() {
        let _ = fs::remove_dir_all(path);
    }
}

/// Opens a file to be locked, and makes it if it is missing.
///
/// # Errors
/// Those of `open(2)`.
pub fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

/// One instance's folder.
#[derive(Debug)]
pub struct Instance {
    directory: PathBuf,
    /// What was asked.
    pub configuration: InstanceConfiguration,
    /// What `ps` shows.
    pub state: InstanceState,
    lock: Option<File>,
}

impl Instance {
    fn read(directory: PathBuf) -> Result<Self, Error> {
        let configuration = read_json(&directory, "config.json")?;
        let state = read_json(&directory, "state.json")?;
        Ok(Self {
            directory,
            configuration,
            state,
            lock: None,
        })
    }

    /// The folder.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.configuration.name
    }

    /// Whether its monitor lives, by its state as of when it was opened.
    #[must_use]
    pub fn alive(&self) -> bool {
        matches!(
            self.state.phase,
            Phase::Starting | Phase::Running | Phase::Suspended
        )
    }

    /// Path of the control socket.
    #[must_use]
    pub fn control_path(&self) -> PathBuf {
        self.directory.join(CONTROL)
    }

    /// Path of the console log.
    #[must_use]
    pub fn console_path(&self) -> PathBuf {
        self.directory.join("console.log")
    }

    /// The lock of an instance that this process made, for a process that is to own it from now on.
    ///
    /// # Errors
    /// Those of `dup(2)`, and when this value does not hold the lock.
    pub fn lock_for_child(&self) -> io::Result<OwnedFd> {
        match &self.lock {
            Some(lock) => Ok(lock.try_clone()?.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Takes the lock if no monitor holds it.
    fn try_lock(&self) -> Result<Option<File>, Error> {
        let path = self.directory.join("lock");
        let lock = match open_lock(&path) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(format!("open {}", path.display()))(error)),
        };
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(lock)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(Error::io(format!("lock {}", path.display()))(error)),
        }
    }

    /// Waits until the monitor has let go of the lock, for at most `limit`. True when it has.
    ///
    /// # Errors
    /// When the lock cannot be tried.
    pub fn wait_unlocked(&self, limit: Duration) -> Result<bool, Error> {
        let end = std::time::Instant::now() + limit;
        loop {
            if !self.directory.exists() || self.try_lock()?.is_some() {
                return Ok(true);
            }
            if std::time::Instant::now() >= end {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Replaces the state file by the present state.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self) -> Result<(), Error> {
        write_json(&self.directory, "state.json", &self.state)
    }

    /// Removes the folder with all that is in it.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(self) -> Result<(), Error> {
        // Renamed first: no other command sees it half removed, and its name is free at once.
        let mut hidden = OsString::from(format!(".new-gone-{}-", std::process::id()));
        hidden.push(&self.configuration.name);
        let hidden = self.directory.with_file_name(hidden);
        let failed = || Error::io(format!("remove {}", self.directory.display()));
        match fs::rename(&self.directory, &hidden) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(failed()(error)),
        }
        fs::remove_dir_all(&hidden).map_err(failed())
    }

    /// A path to the control socket that is short enough for `sun_path` wherever the state directory lies. Valid as long
    /// as the returned directory stays open.
    ///
    /// # Errors
    /// Those of `open(2)`.
    pub fn short_control_path(&self) -> io::Result<(File, PathBuf)> {
        let directory = File::open(&self.directory)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{CONTROL}", directory.as_raw_fd()));
        Ok((directory, path))
    }
}

/// Largest state file that is read.
const MAX_JSON: u64 = 4 << 20;

fn read_json<T: serde::de::DeserializeOwned>(directory: &Path, name: &str) -> Result<T, Error> {
    let path = directory.join(name);
    let damaged = |reason: String| Error::Damaged {
        path: path.display().to_string(),
        reason,
    };
    let metadata = fs::metadata(&path).map_err(Error::io(format!("read {}", path.display())))?;
    if metadata.len() > MAX_JSON {
        return Err(damaged("it is too large".to_owned()));
    }
    let bytes = fs::read(&path).map_err(Error::io(format!("read {}", path.display())))?;
    serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))
}

/// Writes beside and renames, so that readers see the old file or the new one.
fn write_json<T: Serialize>(directory: &Path, name: &str, value: &T) -> Result<(), Error> {
    let path = directory.join(name);
    let failed = || Error::io(format!("write {}", path.display()));
    let bytes = serde_json::to_vec_pretty(value).map_err(|error| Error::Damaged {
        path: path.display().to_string(),
        reason: error.to_string(),
    })?;
    let fresh = directory.join(format!(".{name}.{}", std::process::id()));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)
        .map_err(failed())?;
    let written = file.write_all(&bytes);
    drop(file);
    written
        .and_then(|()| fs::rename(&fresh, &path))
        .map_err(|error| {
            let _ = fs::remove_file(&fresh);
            failed()(error)
        })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A directory of its own that goes with the value.
    pub(crate) struct Scratch(pub(crate) StateDirectory);

    impl Scratch {
        pub(crate) fn new() -> Self {
            use std::sync::atomic::{AtomicU32, Ordering};
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path =
                std::env::temp_dir().join(format!("kiln-state-{}-{number}", std::process::id()));
            Scratch(StateDirectory::at(path))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(self.0.path());
        }
    }

    pub(crate) fn configuration(name: &str) -> InstanceConfiguration {
        InstanceConfiguration {
            name: name.to_owned(),
            image: ImageReference {
                name: "test".to_owned(),
                path: PathBuf::from("/nonexistent"),
                pieces: Pieces::default(),
            },
            engine: "process".to_owned(),
            memory: 64 << 20,
            network: NetworkMode::Socket,
            ports: Vec::new(),
            volumes: Vec::new(),
            remove: false,
            unit: None,
            input: false,
            run: RunConfiguration::default(),
        }
    }

    #[test]
    fn names_are_unique() {
        let scratch = Scratch::new();
        let _first = scratch.0.create(&configuration("a")).unwrap();
        let error = scratch.0.create(&configuration("a")).unwrap_err();
        assert!(error.to_string().contains("taken"), "{error}");
        assert_eq!(
            fs::read_dir(scratch.0.instances()).unwrap().count(),
            1,
            "nothing half made stays"
        );
    }

    #[test]
    fn a_dead_instance_can_be_removed_when_nothing_can_be_written() {
        let scratch = Scratch::new();
        let mut instance = scratch.0.create(&configuration("a")).unwrap();
        instance.state.phase = Phase::Running;
        instance.save().unwrap();
        // In the way of every new state file, as a full disk is.
        let obstacle = instance
            .directory()
            .join(format!(".state.json.{}", std::process::id()));
        fs::create_dir(&obstacle).unwrap();
        assert!(instance.save().is_err());
        drop(instance);
        let (seen, damaged) = scratch.0.list().unwrap();
        assert!(damaged.is_empty(), "{damaged:?}");
        assert_eq!(seen[0].state.phase, Phase::Crashed);
        scratch.0.open("a").unwrap().remove().unwrap();
        assert!(!scratch.0.exists("a"));
    }

    #[test]
    fn a_living_monitor_is_seen_as_living_and_a_dead_one_as_dead() {
        let scratch = Scratch::new();
        let mut instance = scratch.0.create(&configuration("a")).unwrap();
        instance.state.phase = Phase::Running;
        instance.state.process = Some(1);
        instance.save().unwrap();
        assert!(scratch.0.open("a").unwrap().alive());
        assert!(!instance.wait_unlocked(Duration::ZERO).unwrap());
        // The lock goes with the last descriptor, as when the monitor is killed.
        drop(instance);
        let seen = scratch.0.open("a").unwrap();
        assert_eq!(seen.state.phase, Phase::Crashed);
        assert_eq!(seen.state.process, None);
        assert!(seen.state.reason.is_some() && seen.state.ended.is_some());
        assert!(seen.wait_unlocked(Duration::ZERO).unwrap());
        seen.remove().unwrap();
        assert!(scratch.0.open("a").is_err());
        assert!(scratch.0.list().unwrap().0.is_empty());
    }

    #[test]
    fn a_lock_survives_being_handed_to_a_child() {
        let scratch = Scratch::new();
        let instance = scratch.0.create(&configuration("a")).unwrap();
        let lock = instance.lock_for_child().unwrap();
        drop(instance);
        assert!(scratch.0.open("a").unwrap().alive());
        let adopted = scratch.0.adopt("a", lock).unwrap();
        assert!(scratch.0.open("a").unwrap().alive());
        drop(adopted);
        assert!(!scratch.0.open("a").unwrap().alive());
    }

    #[test]
    fn an_ended_instance_keeps_its_last_word() {
        let scratch = Scratch::new();
        let mut instance = scratch.0.create(&configuration("a")).unwrap();
        instance.state.phase = Phase::Exited;
        instance.state.exit_code = Some(3);
        instance.save().unwrap();
        drop(instance);
        let seen = scratch.0.open("a").unwrap();
        assert_eq!(
            (seen.state.phase, seen.state.exit_code),
            (Phase::Exited, Some(3))
        );
    }

    #[test]
    fn a_damaged_instance_does_not_hide_the_others() {
        let scratch = Scratch::new();
        drop(scratch.0.create(&configuration("a")).unwrap());
        drop(scratch.0.create(&configuration("b")).unwrap());
        fs::write(scratch.0.instances().join("a/state.json"), b"{\"phase\": 1").unwrap();
        let (instances, damaged) = scratch.0.list().unwrap();
        assert_eq!(
            instances.iter().map(Instance::name).collect::<Vec<_>>(),
            ["b"]
        );
        assert_eq!(damaged.len(), 1);
        assert!(
            damaged[0].to_string().contains("state.json"),
            "{}",
            damaged[0]
        );
    }

    #[test]
    fn names_that_leave_the_directory_are_unknown() {
        let scratch = Scratch::new();
        for name in ["..", "../x", "/", ""] {
            assert!(
                matches!(scratch.0.open(name), Err(Error::Input { .. })),
                "{name}"
            );
        }
    }
}

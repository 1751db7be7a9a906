//! What survives the summoner's own end: one file, changed in transactions.
//!
//! It holds address leases, addresses added to interfaces, units added at run time, statistics, which units were stopped by hand,
//! and the last timelines of each unit. What runs is not here: the state directory's instances say that themselves.
//!
//! Every change is on the disk when the call returns, and there as a whole or not at all, whenever the process or the machine
//! ends. That takes a moment ([`Store::write`] waits for the disk): call it from a thread that may block, with as many changes at
//! once as there are.
//!
//! What always holds: only one process has the file open.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::OpenOptions,
    net::IpAddr,
    os::unix::fs::OpenOptionsExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use redb::{
    Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError,
    TableDefinition, TableError, WriteTransaction,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{configuration::Unit, timeline::Timeline};

/// Timelines that are kept of each unit.
pub const TIMELINES: usize = 20;
/// Memory for pages of the file, in bytes.
const CACHE: usize = 1 << 20;
/// Version of what the tables hold.
const FORMAT: u64 = 1;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Unit and family (4, 6): address.
const LEASES: TableDefinition<'_, (&str, u8), &str> = TableDefinition::new("leases");
/// Unit: JSON.
const UNITS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("units");
const STATISTICS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("statistics");
const STOPPED: TableDefinition<'_, &str, ()> = TableDefinition::new("stopped");
/// Interface and address: added by a summoner, to be taken away again.
const ADDRESSES: TableDefinition<'_, (&str, &str), ()> = TableDefinition::new("addresses");
/// Unit and number: JSON. Numbers grow.
const TIMELINE: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("timelines");

/// What a unit has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Statistics {
    /// Starts, also those that failed.
    pub starts: u64,
    /// Starts after which it did not become ready.
    pub failures: u64,
    /// How long the last successful start took until it was ready, in microseconds.
    pub ready_microseconds: Option<u64>,
    /// When it was last asked for, in microseconds since 1970.
    pub last_query: Option<u64>,
    /// When it last stopped, in microseconds since 1970.
    pub last_stop: Option<u64>,
}

/// A change of the store.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A unit has this address (one for each family).
    Lease(String, IpAddr),
    /// A unit has no leased addresses any more.
    Release(String),
    /// A unit was added at run time, or replaced.
    AddUnit(Box<Unit>),
    /// A unit that was added at run time was removed, with all that is known of it.
    RemoveUnit(String),
    /// The statistics of a unit.
    Statistics(String, Statistics),
    /// A unit was stopped by hand (true), or may start again (false).
    Stopped(String, bool),
    /// An address is about to be added to an interface (true), or is taken away (false).
    Address(String, IpAddr, bool),
    /// A summons is finished.
    Timeline(Box<Timeline>),
}

/// Why the store cannot be used. The message has the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another summoner has it open.
    #[error("{path} is in use by another summoner: stop that one ('kiln summon stop' or Ctrl-C), or set KILN_STATE to a directory of its own", path = .0.display())]
    Locked(PathBuf),
    /// It does not hold what it should.
    #[error("{path} is damaged ({reason}): move it away and start again; running units are found all the same, but units may get other addresses, and units added with 'kiln summon add' must be added again", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A newer version has written it.
    #[error("{path} was written by a newer version of Kiln (format {format}): use that one, or move the file away", path = .path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u64,
    },
    /// The host refused something.
    #[error("cannot use {path}: {source}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// The open store.
pub struct Store {
    database: Database,
    path: PathBuf,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Store")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the file, or makes it. After a crash it is checked and mended, which takes a moment.
    ///
    /// # Errors
    /// When it is in use, damaged, newer, or the host refuses to open it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        // Others must not read who was asked for and when.
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|source| Error::Io {
                path: path.into(),
                source,
            })?;
        let open = || {
            Builder::new()
                .set_cache_size(CACHE)
                .set_check_integrity_on_open(true)
                .create(path)
        };
        // The check may take some kinds of damage for mistakes of its own and panic in builds with assertions.
        let database = catch_unwind(AssertUnwindSafe(open))
            .map_err(|_| damaged(path, "its structure is broken"))?
            .map_err(|error| database_error(path, error))?;
        let store = Self {
            database,
            path: path.to_owned(),
        };
        store.prepare()?;
        Ok(store)
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes all tables, so that reading finds them, and checks the format.
    fn prepare(&self) -> Result<(), Error> {
        self.transaction(|transaction| {
            transaction.open_table(LEASES)?;
            transaction.open_table(UNITS)?;
            transaction.open_table(STATISTICS)?;
            transaction.open_table(STOPPED)?;
            transaction.open_table(ADDRESSES)?;
            transaction.open_table(TIMELINE)?;
            let mut meta = transaction.open_table(META)?;
            let format = meta.get("format")?.map(|format| format.value());
            match format {
                None => {
                    meta.insert("format", FORMAT)?;
                    Ok(())
                }
                Some(FORMAT) => Ok(()),
                Some(format) => Err(Failure::Newer(format)),
            }
        })
    }

    /// Does all changes, or none of them if it fails, and waits until they are on the disk.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn write(&self, changes: &[Change]) -> Result<(), Error> {
        if changes.is_empty() {
            return Ok(());
        }
        self.transaction(|transaction| {
            for change in changes {
                apply(transaction, change)?;
            }
            Ok(())
        })
    }

    fn transaction(
        &self,
        work: impl FnOnce(&WriteTransaction) -> Result<(), Failure>,
    ) -> Result<(), Error> {
        let run = || -> Result<(), Failure> {
            let transaction = self
                .database
                .begin_write()
                .map_err(|error| Failure::Redb(error.into()))?;
            work(&transaction)?;
            transaction
                .commit()
                .map_err(|error| Failure::Redb(error.into()))
        };
        run().map_err(|failure| self.error(failure))
    }

    /// All leased addresses with their units.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn leases(&self) -> Result<Vec<(String, IpAddr)>, Error> {
        let run = || -> Result<_, Failure> {
            let mut all = Vec::new();
            for entry in self.read()?.open_table(LEASES)?.iter()? {
                let (key, value) = entry?;
                let address = value
                    .value()
                    .parse()
                    .map_err(|_| Failure::Value("a lease"))?;
                all.push((key.value().0.to_owned(), address));
            }
            Ok(all)
        };
        run().map_err(|failure| self.error(failure))
    }

    /// Units that were added at run time.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn units(&self) -> Result<Vec<Unit>, Error> {
        Ok(self.values(UNITS, "a unit")?.into_values().collect())
    }

    /// The statistics of all units, by name.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn statistics(&self) -> Result<BTreeMap<String, Statistics>, Error> {
        self.values(STATISTICS, "statistics")
    }

    /// Units that were stopped by hand.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn stopped(&self) -> Result<BTreeSet<String>, Error> {
        let run = || -> Result<_, Failure> {
            let mut all = BTreeSet::new();
            for entry in self.read()?.open_table(STOPPED)?.iter()? {
                all.insert(entry?.0.value().to_owned());
            }
            Ok(all)
        };
        run().map_err(|failure| self.error(failure))
    }

    /// Addresses that a summoner has added, or was about to add, with their interfaces.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn addresses(&self) -> Result<BTreeSet<(String, IpAddr)>, Error> {
        let run = || -> Result<_, Failure> {
            let mut all = BTreeSet::new();
            for entry in self.read()?.open_table(ADDRESSES)?.iter()? {
                let key = entry?.0;
                let (interface, address) = key.value();
                let address = address.parse().map_err(|_| Failure::Value("an address"))?;
                all.insert((interface.to_owned(), address));
            }
            Ok(all)
        };
        run().map_err(|failure| self.error(failure))
    }

    /// The last timelines of a unit, at most [`TIMELINES`], the oldest first.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn timelines(&self, unit: &str) -> Result<Vec<Timeline>, Error> {
        let run = || -> Result<_, Failure> {
            let table = self.read()?.open_table(TIMELINE)?;
            let mut all = Vec::new();
            for entry in table.range((unit, 0)..=(unit, u64::MAX))? {
                all.push(from_json(entry?.1.value(), "a timeline")?);
            }
            Ok(all)
        };
        run().map_err(|failure| self.error(failure))
    }

    fn read(&self) -> Result<redb::ReadTransaction, Failure> {
        self.database
            .begin_read()
            .map_err(|error| Failure::Redb(error.into()))
    }

    fn values<T: DeserializeOwned>(
        &self,
        table: TableDefinition<'_, &'static str, &'static [u8]>,
        what: &'static str,
    ) -> Result<BTreeMap<String, T>, Error> {
        let run = || -> Result<_, Failure> {
            let mut all = BTreeMap::new();
            for entry in self.read()?.open_table(table)?.iter()? {
                let (key, value) = entry?;
                all.insert(key.value().to_owned(), from_json(value.value(), what)?);
            }
            Ok(all)
        };
        run().map_err(|failure| self.error(failure))
    }

    fn error(&self, failure: Failure) -> Error {
        let path = self.path.clone();
        match failure {
            Failure::Newer(format) => Error::Newer { path, format },
            Failure::Value(what) => damaged(&path, what),
            Failure::Redb(redb::Error::Io(source)) => Error::Io { path, source },
            Failure::Redb(other) => damaged(&path, &other.to_string()),
        }
    }
}

/// What can go wrong within a transaction.
enum Failure {
    Redb(redb::Error),
    /// This cannot be understood.
    Value(&'static str),
    Newer(u64),
}

impl From<StorageError> for Failure {
    fn from(error: StorageError) -> Self {
        Self::Redb(error.into())
    }
}

impl From<TableError> for Failure {
    fn from(error: TableError) -> Self {
        Self::Redb(error.into())
    }
}

fn apply(transaction: &WriteTransaction, change: &Change) -> Result<(), Failure> {
    match change {
        Change::Lease(unit, address) => {
            let mut table = transaction.open_table(LEASES)?;
            let family = if address.is_ipv4() { 4 } else { 6 };
            table.insert((unit.as_str(), family), address.to_string().as_str())?;
        }
        Change::Release(unit) => release(transaction, unit)?,
        Change::AddUnit(unit) => {
            let mut table = transaction.open_table(UNITS)?;
            table.insert(unit.name.as_str(), to_json(unit, "a unit")?.as_slice())?;
        }
        Change::RemoveUnit(unit) => {
            transaction.open_table(UNITS)?.remove(unit.as_str())?;
            transaction.open_table(STATISTICS)?.remove(unit.as_str())?;
            transaction.open_table(STOPPED)?.remove(unit.as_str())?;
            let mut table = transaction.open_table(TIMELINE)?;
            table.retain_in((unit.as_str(), 0)..=(unit.as_str(), u64::MAX), |_, _| false)?;
            drop(table);
            release(transaction, unit)?;
        }
        Change::Statistics(unit, statistics) => {
            let mut table = transaction.open_table(STATISTICS)?;
            table.insert(unit.as_str(), to_json(statistics, "statistics")?.as_slice())?;
        }
        Change::Stopped(unit, true) => {
            transaction.open_table(STOPPED)?.insert(unit.as_str(), ())?;
        }
        Change::Stopped(unit, false) => {
            transaction.open_table(STOPPED)?.remove(unit.as_str())?;
        }
        Change::Address(interface, address, added) => {
            let mut table = transaction.open_table(ADDRESSES)?;
            let address = address.to_string();
            let key = (interface.as_str(), address.as_str());
            if *added {
                table.insert(key, ())?;
            } else {
                table.remove(key)?;
            }
        }
        Change::Timeline(timeline) => {
            let mut table = transaction.open_table(TIMELINE)?;
            let unit = timeline.unit.as_str();
            let mut numbers = Vec::new();
            for entry in table.range((unit, 0)..=(unit, u64::MAX))? {
                numbers.push(entry?.0.value().1);
            }
            let next = numbers.last().map_or(0, |last| last.saturating_add(1));
            table.insert((unit, next), to_json(timeline, "a timeline")?.as_slice())?;
            let old = (numbers.len() + 1).saturating_sub(TIMELINES);
            for number in numbers.into_iter().take(old) {
                table.remove((unit, number))?;
            }
        }
    }
    Ok(())
}

fn release(transaction: &WriteTransaction, unit: &str) -> Result<(), Failure> {
    let mut table = transaction.open_table(LEASES)?;
    for family in [4, 6] {
        table.remove((unit, family))?;
    }
    Ok(())
}

fn to_json(value: &impl Serialize, what: &'static str) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec(value).map_err(|_| Failure::Value(what))
}

fn from_json<T: DeserializeOwned>(bytes: &[u8], what: &'static str) -> Result<T, Failure> {
    serde_json::from_slice(bytes).map_err(|_| Failure::Value(what))
}

fn damaged(path: &Path, reason: &str) -> Error {
    Error::Damaged {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
}

fn database_error(path: &Path, error: DatabaseError) -> Error {
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
            Error::Locked(path.to_owned())
        }
        // What is no database at all is told as an error of input and output.
        DatabaseError::Storage(StorageError::Io(source))
            if !matches!(
                source.kind(),
                std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof
            ) =>
        {
            Error::Io {
                path: path.to_owned(),
                source,
            }
        }
        other => damaged(path, &other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{BufRead, BufReader},
        process::{Command, Stdio},
    };

    use super::*;
    use crate::{
        configuration::Configuration,
        timeline::{Cause, Event},
    };

    fn unit(name: &str) -> Unit {
        let text = format!("dns={name}.example.org,name={name},image=x,port=80");
        Configuration::default()
            .parse_unit(&text, Path::new("/"))
            .unwrap()
    }

    fn timeline(unit: &str, time: u64) -> Change {
        let mut timeline = Timeline::new(unit, Cause::Command, time);
        timeline.note(Event::Ready, time + 5);
        Change::Timeline(Box::new(timeline))
    }

    #[test]
    fn what_is_written_is_there_when_it_is_opened_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        let four: IpAddr = "127.78.0.1".parse().unwrap();
        let six: IpAddr = "fd00::1".parse().unwrap();
        let statistics = Statistics {
            starts: 3,
            failures: 1,
            ready_microseconds: Some(20_000),
            last_query: Some(7),
            last_stop: None,
        };
        {
            let store = Store::open(&path).unwrap();
            store
                .write(&[
                    Change::Lease("a".into(), four),
                    Change::Lease("a".into(), six),
                    Change::Lease("b".into(), six),
                    Change::AddUnit(Box::new(unit("a"))),
                    Change::AddUnit(Box::new(unit("b"))),
                    Change::Statistics("a".into(), statistics),
                    Change::Stopped("a".into(), true),
                    Change::Stopped("b".into(), true),
                    Change::Stopped("b".into(), false),
                ])
                .unwrap();
            for time in 0..30 {
                store
                    .write(&[timeline("a", time), timeline("ab", time)])
                    .unwrap();
            }
        }
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let store = Store::open(&path).unwrap();
        let lease = |unit: &str, address| (unit.to_owned(), address);
        assert_eq!(
            store.leases().unwrap(),
            [lease("a", four), lease("a", six), lease("b", six)]
        );
        assert_eq!(store.units().unwrap(), [unit("a"), unit("b")]);
        assert_eq!(store.statistics().unwrap()["a"], statistics);
        assert_eq!(
            store.stopped().unwrap().into_iter().collect::<Vec<_>>(),
            ["a"]
        );
        let timelines = store.timelines("a").unwrap();
        assert_eq!(timelines.len(), TIMELINES);
        assert_eq!((timelines[0].start(), timelines[19].start()), (10, 29));

        store.write(&[Change::RemoveUnit("a".into())]).unwrap();
        assert_eq!(store.leases().unwrap(), [lease("b", six)]);
        assert_eq!(store.units().unwrap().len(), 1);
        assert!(store.statistics().unwrap().is_empty() && store.stopped().unwrap().is_empty());
        assert!(store.timelines("a").unwrap().is_empty());
        assert_eq!(store.timelines("ab").unwrap().len(), TIMELINES);
        store.write(&[Change::Release("b".into())]).unwrap();
        assert!(store.leases().unwrap().is_empty());
        store.write(&[]).unwrap();
    }

    #[test]
    fn only_one_has_it_open() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        let store = Store::open(&path).unwrap();
        let error = Store::open(&path).unwrap_err();
        assert!(matches!(error, Error::Locked(_)), "{error}");
        assert!(error.to_string().contains("KILN_STATE"));
        drop(store);
        Store::open(&path).unwrap();
        let error = Store::open(&directory.path().join("none/store.redb")).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }

    #[test]
    fn damage_is_said_and_never_a_panic() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        {
            let store = Store::open(&path).unwrap();
            for time in 0..10 {
                store
                    .write(&[timeline("a", time), Change::AddUnit(Box::new(unit("b")))])
                    .unwrap();
            }
        }
        let good = fs::read(&path).unwrap();
        let mut refused = 0;
        let mut check = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            match Store::open(&path) {
                // Damage where nothing is kept does no harm.
                Ok(store) => assert!(store.timelines("a").unwrap().len() <= 10),
                Err(error) => {
                    refused += 1;
                    assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
                    assert!(error.to_string().contains("move it away"));
                }
            }
        };
        check(b"not a database at all");
        check(&[0; 4096]);
        for cut in [10, 100, good.len() / 2, good.len() - 4096] {
            check(&good[..cut]);
        }
        for place in (0..good.len()).step_by(good.len() / 60 + 1) {
            let mut bytes = good.clone();
            for byte in bytes.iter_mut().skip(place).take(64) {
                *byte ^= 0x5a;
            }
            check(&bytes);
        }
        assert!(refused >= 6, "{refused}");
    }

    /// Writes without end, and tells each number after it was written. Run by the test below in a process of its own.
    #[test]
    #[ignore = "a part of the next test"]
    fn writer() {
        let Some(path) = std::env::var_os("KILN_TEST_STORE") else {
            return;
        };
        let store = Store::open(Path::new(&path)).unwrap();
        for number in 0.. {
            let statistics = Statistics {
                starts: number,
                ..Statistics::default()
            };
            store
                .write(&[
                    Change::Statistics("a".into(), statistics),
                    timeline("a", number),
                ])
                .unwrap();
            println!("written {number}");
        }
    }

    #[test]
    fn what_was_written_survives_a_killed_writer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        for round in 1..=5u64 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--ignored",
                    "--exact",
                    "store::tests::writer",
                    "--nocapture",
                ])
                .env("KILN_TEST_STORE", &path)
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let output = BufReader::new(child.stdout.take().unwrap());
            let mut last = 0;
            let mut lines = output.lines().map_while(Result::ok);
            // Another moment of the write each time.
            for line in lines.by_ref() {
                if let Some(number) = line
                    .split("written ")
                    .nth(1)
                    .and_then(|text| text.parse().ok())
                {
                    last = number;
                    if number >= 7 * round {
                        break;
                    }
                }
            }
            child.kill().unwrap();
            // It may have told more before it died.
            for line in lines {
                if let Some(number) = line
                    .split("written ")
                    .nth(1)
                    .and_then(|text| text.parse().ok())
                {
                    last = number;
                }
            }
            child.wait().unwrap();
            let store = Store::open(&path).unwrap();
            let starts = store.statistics().unwrap()["a"].starts;
            assert!(starts == last || starts == last + 1, "{starts} of {last}");
            // Both halves of a transaction are there.
            let timelines = store.timelines("a").unwrap();
            assert_eq!(timelines.last().map(Timeline::start), Some(starts));
        }
    }
}

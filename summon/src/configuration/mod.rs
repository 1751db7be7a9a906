//! What the summoner is to do: `summon.toml`, the flags of `kiln summon`, and units added while it runs, as one checked
//! whole.
//!
//! All of it ends as one [`Configuration`], plain data. Nothing here binds a socket or starts anything; the machine is
//! only asked whether named files exist and which ports may be used ([`Machine`]).
//!
//! What always holds: a [`Configuration`] that [`Configuration::read`], [`Configuration::parse`] or
//! [`Configuration::with`] returned has passed all checks, also those between units; and every [`Problem`] says where it
//! is, at which key, and, if something can be done, what.
//!
//! # The file
//!
//! All keys may be missing. Paths are relative to the directory of `summon.toml`. Times are `"500ms"`, `"2s"`, `"5m"`,
//! `"1h"`, or a number of seconds. Where a list is meant, a single value will do.
//!
//! | key | default | meaning |
//! |---|---|---|
//! | `listen` | `["127.0.0.1:53"]` | where the name server listens, UDP and TCP |
//! | `forward` | `"system"` | where questions about other names go: `"system"`, `"none"` (refused), or addresses |
//! | `forward_for` | `["127.0.0.0/8", "::1/128"]` | whose questions are forwarded |
//! | `zones` | `[]` | names below these that no unit has do not exist; they are never forwarded |
//! | `ttl` | `60` | how long an answer may be kept, in seconds |
//! | `pool`, `pool6` | `"127.78.0.0/16"`, none | where units get their addresses from |
//! | `interface` | none | the addresses are added to this interface (needs root) |
//! | `metrics` | none | address of the Prometheus endpoint |
//! | `max_running`, `max_memory` | none | most units at once, most memory of all running units |
//! | `[front.NAME]` | | a port that several units share, see below |
//! | `[unit.NAME]` | | a unit, see below |
//!
//! | key of a front | default | meaning |
//! |---|---|---|
//! | `listen` | (needed) | addresses, such as `["192.0.2.1", "[2001:db8::1]:8080"]`; without port: 80, behind TLS 443 |
//! | `protocol` | (needed) | `"http"`: units are told apart by the `Host` header; `"tls"`: by the server name in the ClientHello, the unit has the certificate; `"https"`: by the same, TLS ends here and the unit gets plain HTTP/1 |
//! | `certificate`, `key` | none | PEM files for `https`: the chain that begins with the server's own certificate, and its private key without password. Read again at each reload |
//!
//! A connection belongs to the unit of its first request: what else is asked on it (keep-alive) reaches that unit too, also
//! for another's name. Names that no unit behind the front has are refused: 404, or the TLS alert unrecognized_name.
//! With `http` and `tls` the unit gets the accepted socket itself; with `https` every byte passes through the summoner,
//! and such connections end with it.
//!
//! | key of a unit | default | meaning |
//! |---|---|---|
//! | `dns` | (needed) | its names; `"*.example.org"` stands for all below |
//! | `source` (or `image`) | (needed) | program, directory, image file or stored image: what `kiln run` takes |
//! | `arguments` | the image's | arguments of the program |
//! | `ports` | `[]` | `"80"`, `"53/udp"`, `"8080:80"`: the port at the unit's address, and the program's if it differs |
//! | `front`, `front_port` | `[]`, 80 (443 behind `tls`) | shared ports that lead to it, and the program's port that they lead to |
//! | `certificate`, `key` | the front's | for names of this unit on an `https` front |
//! | `address`, `address6` | from the pools | fixed address; units may share one if their ports differ |
//! | `ttl` | the file's | in seconds |
//! | `stop`, `grace` | `"shutdown"`, `"10s"` | `"destroy"`, `"shutdown"` or `"suspend"`; time between SIGTERM and the end |
//! | `answer` | `"at-once"` | or `"ready"`: when the query that starts it is answered |
//! | `ready`, `ready_timeout` | `"port"`, `"30s"` | `"port"`, `{ http = "/health", port = 80 }`, `{ line = "Ready" }`, `{ delay = "500ms" }` |
//! | `min_running` | `0` | `1`: kept running, started again when it ends |
//! | `always` | `false` | started at once and never stopped for being idle |
//! | `idle` | 2 x `ttl` | how long nobody must need it before it is stopped |
//! | `memory`, `engine`, `net`, `environment`, `volumes`, `workdir`, `user`, `hostname`, `log`, `include`, `rewrite` | as `kiln run` | what the options of `kiln run` mean |

mod check;
mod flag;
mod machine;
mod problem;
mod reader;
mod text;
mod value;

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

pub use flag::Overrides;
pub use ipnet::{IpNet, Ipv4Net, Ipv6Net};
pub use kiln_abi::manifest::{Protocol, User};
pub use kiln_monitor::arguments::VolumeMount;
use kiln_monitor::arguments::parse_name;
use serde::{Deserialize, Serialize};

use check::Check;
use reader::{Defaults, Reader};
use value::Sources;

pub use machine::Machine;
pub use problem::{Place, Problem, Problems};
pub use text::{format_duration, parse_dns_name, parse_duration};

/// Name of the file.
pub const FILE_NAME: &str = "summon.toml";
/// How long an answer of the name server may be kept, in seconds, when nothing else is said.
pub const DEFAULT_TTL: u32 = 60;
/// Longest time to live of a DNS record, in seconds (RFC 2181, section 8).
pub const MAX_TTL: u32 = i32::MAX as u32;
/// Where units get addresses from when nothing else is said.
pub const DEFAULT_POOL: &str = "127.78.0.0/16";

/// Everything the summoner is to do, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// The file it was read from; none: flags only.
    pub path: Option<PathBuf>,
    /// Absolute directory that paths were relative to.
    pub directory: PathBuf,
    /// Where the name server listens, UDP and TCP. Never empty.
    pub listen: Vec<SocketAddr>,
    /// Where questions about names go that are not ours.
    pub forward: Forward,
    /// Who may have questions forwarded.
    pub forward_for: Vec<IpNet>,
    /// Names below these that no unit has do not exist. Lower case, no final dot.
    pub zones: Vec<String>,
    /// Time to live of units that say none, in seconds.
    pub ttl: u32,
    /// Where units get IPv4 addresses from.
    pub pool: Ipv4Net,
    /// Where units get IPv6 addresses from; none: they have none.
    pub pool6: Option<Ipv6Net>,
    /// Interface that addresses are added to; none: they are loopback's, or the machine's already.
    pub interface: Option<String>,
    /// Where the Prometheus endpoint listens.
    pub metrics: Option<SocketAddr>,
    /// Most units running at once.
    pub max_running: Option<u32>,
    /// Most memory of all running units together, in bytes.
    pub max_memory: Option<u64>,
    /// Shared ports, by name.
    pub fronts: BTreeMap<String, Front>,
    /// The units, by name.
    pub units: BTreeMap<String, Unit>,
}

/// Where questions about names go that are not ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Forward {
    /// To the system's resolvers (`/etc/resolv.conf`).
    System,
    /// Nowhere: they are refused.
    None,
    /// To these servers.
    To(Vec<SocketAddr>),
}

/// A port that several units share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Front {
    /// Its name.
    pub name: String,
    /// Where it listens. Never empty.
    pub listen: Vec<SocketAddr>,
    /// How units are told apart.
    pub protocol: FrontProtocol,
    /// Certificate chain (PEM) for [`FrontProtocol::Https`] of units that have none of their own. Absolute.
    pub certificate: Option<PathBuf>,
    /// Private key (PEM) of the certificate. Absolute; there if and only if the certificate is.
    pub key: Option<PathBuf>,
}

/// How the units behind a shared port are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FrontProtocol {
    /// By the `Host` header of the first request (RFC 9112, section 3.2).
    Http,
    /// By the server name in the TLS ClientHello (RFC 6066, section 3); the unit speaks TLS itself.
    Tls,
    /// By the server name; TLS ends here and the unit gets plain HTTP.
    Https,
}

impl FrontProtocol {
    /// The program's port when a unit does not say it.
    #[must_use]
    pub fn default_port(self) -> u16 {
        match self {
            Self::Http | Self::Https => 80,
            Self::Tls => 443,
        }
    }

    /// As in the file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Tls => "tls",
            Self::Https => "https",
        }
    }
}

/// A program that runs while somebody asks for it. Its JSON is what the store keeps of units added at run time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unit {
    /// Its name: `kiln_monitor::arguments::parse_name` accepts it.
    pub name: String,
    /// The names it is asked for by: lower case, no final dot, no two the same; the first label may be `*`. Never empty.
    pub dns: Vec<String>,
    /// An absolute path, or the name of a stored image (without a slash).
    pub source: PathBuf,
    /// Arguments of the program; none: the image's.
    pub arguments: Option<Vec<String>>,
    /// Ports at the unit's own address.
    pub ports: Vec<UnitPort>,
    /// Shared ports that lead to it.
    pub fronts: Vec<FrontUse>,
    /// Certificate chain (PEM) for its names on `https` fronts. Absolute.
    pub certificate: Option<PathBuf>,
    /// Private key (PEM) of the certificate. Absolute; there if and only if the certificate is.
    pub key: Option<PathBuf>,
    /// Fixed IPv4 address; none: from the pool, or, behind a front, the front's (see [`Configuration::fixed_addresses`]).
    pub address: Option<Ipv4Addr>,
    /// Fixed IPv6 address.
    pub address6: Option<Ipv6Addr>,
    /// Time to live of its records, in seconds; at most [`MAX_TTL`].
    pub ttl: u32,
    /// How it is stopped.
    pub stop: Stop,
    /// With [`Stop::Shutdown`]: time from SIGTERM to SIGKILL.
    pub grace: Duration,
    /// When the query that starts it is answered.
    pub answer: Answer,
    /// When it counts as ready.
    pub ready: Readiness,
    /// A start that takes longer has failed.
    pub ready_timeout: Duration,
    /// 1: it is kept running, and started again when it ends. 0: it is started on demand.
    pub min_running: u32,
    /// Started with the summoner and never stopped for being idle or for the ceilings.
    pub always: bool,
    /// How long nobody must need it before it is stopped.
    pub idle: Duration,
    /// Memory in bytes; none: the image's.
    pub memory: Option<u64>,
    /// Engine: `process`, `qemu` or `kvm`; none: the best one.
    pub engine: Option<String>,
    /// How the program reaches the network; none: the engine's usual way.
    pub net: Option<Net>,
    /// Environment, by name.
    pub environment: BTreeMap<String, String>,
    /// Directories (absolute) and volumes kept by Kiln (a name without a slash).
    pub volumes: Vec<VolumeMount>,
    /// Absolute working directory; none: the image's.
    pub workdir: Option<String>,
    /// Who the program runs as; none: as the image says.
    pub user: Option<User>,
    /// Host name; none: the unit's name.
    pub hostname: Option<String>,
    /// What the kernel logs.
    pub log: Option<String>,
    /// Files to add to an image that is built from the source.
    pub include: Vec<IncludeFile>,
    /// System calls of the program are rewritten when its image is built.
    pub rewrite: bool,
}

/// A port at a unit's address, and the program's port that it leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnitPort {
    /// Port at the unit's address. Not 0.
    pub host: u16,
    /// Port of the program. Not 0.
    pub guest: u16,
    /// Transport.
    pub protocol: Protocol,
}

/// A shared port that leads to a unit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrontUse {
    /// Name of the front.
    pub front: String,
    /// Port of the program, TCP.
    pub port: u16,
}

/// How a unit is stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stop {
    /// Ended at once.
    Destroy,
    /// SIGTERM, some time, the end.
    #[default]
    Shutdown,
    /// It keeps its memory and connections, and uses no processor time until it is needed again.
    Suspend,
}

/// When the query that starts a unit is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// At once: connections wait in the host's backlog until the program accepts them.
    #[default]
    AtOnce,
    /// When the unit is ready.
    Ready,
}

/// When a unit counts as ready.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Readiness {
    /// The program listens at its ports.
    #[default]
    Port,
    /// A request for a path is answered with a status of 200 to 299.
    Http {
        /// The path, with a leading slash.
        path: String,
        /// Port of the program.
        port: u16,
    },
    /// It prints a line that contains this text.
    Line(String),
    /// This time after the program began.
    Delay(Duration),
}

/// How the program reaches the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Net {
    /// The host's sockets.
    Socket,
    /// The kernel's own TCP/IP.
    Direct,
}

/// A file or directory of the host to add to an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IncludeFile {
    /// On the host, absolute.
    pub from: PathBuf,
    /// Absolute path in the image; none: as on the host.
    pub to: Option<String>,
}

impl Configuration {
    /// The fixed addresses of a unit: its own, or those of the fronts that it is behind. What is missing comes from the
    /// pools, unless the unit is behind a front: such a unit lives at its front's addresses alone.
    #[must_use]
    pub fn fixed_addresses(&self, unit: &Unit) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
        let (mut address, mut address6) = (unit.address, unit.address6);
        let fronts = unit
            .fronts
            .iter()
            .filter_map(|one| self.fronts.get(&one.front))
            .flat_map(|front| &front.listen)
            .map(SocketAddr::ip)
            .filter(|address| !address.is_unspecified());
        for front in fronts {
            match front {
                IpAddr::V4(front) => address = address.or(Some(front)),
                IpAddr::V6(front) => address6 = address6.or(Some(front)),
            }
        }
        (address, address6)
    }

    /// Whether a unit gets an IPv4 address from the pool.
    #[must_use]
    pub fn needs_lease(&self, unit: &Unit) -> bool {
        unit.fronts.is_empty() && unit.address.is_none()
    }

    /// Whether a unit gets an IPv6 address from the pool.
    #[must_use]
    pub fn needs_lease6(&self, unit: &Unit) -> bool {
        self.pool6.is_some() && unit.fronts.is_empty() && unit.address6.is_none()
    }

    /// Addresses that the pools must not give out: fixed ones of units, and those that the name server, the fronts and
    /// the metrics listen at. Unspecified addresses (`0.0.0.0`, `::`) are not among them.
    #[must_use]
    pub fn reserved_addresses(&self) -> Vec<IpAddr> {
        let listening = self
            .listen
            .iter()
            .chain(self.fronts.values().flat_map(|front| &front.listen))
            .chain(&self.metrics)
            .map(SocketAddr::ip);
        let fixed = self
            .units
            .values()
            .flat_map(|unit| [unit.address.map(IpAddr::V4), unit.address6.map(IpAddr::V6)]);
        let mut all: Vec<IpAddr> = listening
            .chain(fixed.flatten())
            .filter(|address| !address.is_unspecified())
            .collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// Largest file that is read, in bytes.
const MAX_LENGTH: u64 = 4 << 20;
/// Most units.
const MAX_UNITS: usize = 10_000;
/// Most fronts.
const MAX_FRONTS: usize = 1000;

impl Configuration {
    /// Reads a file, if there is one, and flags, and checks all of it.
    ///
    /// # Errors
    /// All problems.
    pub fn read(
        path: Option<&Path>,
        overrides: &Overrides,
        machine: &Machine,
    ) -> Result<Self, Problems> {
        let Some(path) = path else {
            return assemble(None, overrides, machine);
        };
        let text = read_text(path)?;
        assemble(Some((&text, path)), overrides, machine)
    }

    /// Checks the text of a file; `path` gives the directory that paths are relative to, and the name in messages.
    ///
    /// # Errors
    /// All problems.
    pub fn parse(text: &str, path: &Path, machine: &Machine) -> Result<Self, Problems> {
        assemble(Some((text, path)), &Overrides::default(), machine)
    }

    /// Reads a unit in one line: `dns=www.example.org,image=site.kiln,port=80,ttl=60,stop=suspend`. The keys are those of
    /// a unit in the file; `port`, `env`, `volume`, `argument` and `name` are understood too. A repeated key adds a
    /// value, `\,` is a comma in a value. Without `name`, the first DNS name is the unit's name. It is not yet checked
    /// together with the other units: [`Configuration::with`] does that.
    ///
    /// # Errors
    /// All problems.
    pub fn parse_unit(&self, text: &str, directory: &Path) -> Result<Unit, Problems> {
        let mut reader = Reader {
            sources: Sources::default(),
            marks: HashMap::new(),
        };
        let defaults = Defaults {
            directory: &absolute(directory),
            ttl: self.ttl,
            fronts: &self.fronts,
            look_for_files: true,
        };
        let unit = unit_from_flag(text, &mut reader, &defaults);
        reader.sources.into_result()?;
        // None without a problem cannot be; if it were, this would still be an error and not a wrong unit.
        unit.ok_or_else(|| {
            Problems::of_file(
                Path::new("--unit"),
                "it is not complete".into(),
                "give dns, image and port",
            )
        })
    }

    /// This configuration with more units, which come from [`Configuration::parse_unit`] or the store, checked as a whole.
    ///
    /// # Errors
    /// All problems.
    pub fn with(
        &self,
        units: impl IntoIterator<Item = Unit>,
        machine: &Machine,
    ) -> Result<Self, Problems> {
        let mut whole = self.clone();
        let mut reader = Reader {
            sources: Sources::default(),
            marks: HashMap::new(),
        };
        let fallback = reader.sources.add_named("added unit");
        for unit in units {
            if let Some(taken) = whole.units.get(&unit.name) {
                let key = format!("unit.{}", taken.name);
                reader.sources.tell(fallback, &key, taken_name());
                continue;
            }
            let mark = reader
                .sources
                .add_named(format!("added unit {}", unit.name));
            reader.marks.insert(format!("unit.{}", unit.name), mark);
            whole.units.insert(unit.name.clone(), unit);
        }
        Check {
            configuration: &whole,
            machine,
            reader: &mut reader,
            fallback,
        }
        .run();
        reader.sources.into_result()?;
        Ok(whole)
    }

    /// What is allowed but may not be meant, for people.
    #[must_use]
    pub fn remarks(&self) -> Vec<String> {
        let mut all = Vec::new();
        let public = self.listen.iter().any(|listen| !listen.ip().is_loopback());
        let open = self
            .forward_for
            .iter()
            .find(|network| network.prefix_len() == 0);
        if let (true, Some(open), true) = (public, open, self.forward != Forward::None) {
            all.push(format!("questions of anybody ({open}) are forwarded: an open resolver is used for attacks on others; narrow `forward_for`"));
        }
        if self.interface.is_none() {
            let needed = self.units.values().any(|unit| self.needs_lease(unit));
            if needed && !self.pool.network().is_loopback() {
                all.push(format!("the addresses of {} must be this machine's already, as no `interface` is given", self.pool));
            }
            if let Some(pool) = self.pool6.filter(|_| !self.units.is_empty()) {
                all.push(format!("the addresses of {pool} must be this machine's already, as no `interface` is given: ip -6 route add local {pool} dev lo"));
            }
        }
        all
    }
}

fn read_text(path: &Path) -> Result<String, Problems> {
    let cannot = |error: &std::io::Error| {
        Problems::of_file(
            path,
            format!("cannot be read: {error}"),
            "give the path of a summon.toml, or units with --unit",
        )
    };
    let length = std::fs::metadata(path)
        .map_err(|error| cannot(&error))?
        .len();
    if length > MAX_LENGTH {
        return Err(Problems::of_file(
            path,
            format!("is {length} bytes long"),
            "a summon.toml has at most 4 MiB",
        ));
    }
    let bytes = std::fs::read(path).map_err(|error| cannot(&error))?;
    String::from_utf8(bytes)
        .map_err(|_| Problems::of_file(path, "is not UTF-8 text".into(), "save it as UTF-8"))
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn taken_name() -> problem::Fault {
    problem::Fault::new(
        "there is a unit of this name already",
        "choose another name (name=...), or remove that one: kiln summon rm NAME",
    )
}

fn unit_from_flag(text: &str, reader: &mut Reader<'_>, defaults: &Defaults<'_>) -> Option<Unit> {
    let flag = flag::unit(text, &mut reader.sources);
    let Some(name) = flag.name else {
        let fault = problem::Fault::new(
            "it has no name to be asked for by",
            "add dns=www.example.org",
        );
        reader.sources.tell(flag.mark, "dns", fault);
        return None;
    };
    if let Err(error) = parse_name(&name) {
        reader.sources.tell(flag.mark, "name", error.into());
        return None;
    }
    let path = format!("unit.{name}");
    reader.marks.insert(path.clone(), flag.mark);
    reader.unit(&path, &name, flag.mark, &flag.entries, defaults)
}

/// Puts a configuration together: the file's keys, the flags over them, fronts, units, and then the checks of the whole.
fn assemble(
    file: Option<(&str, &Path)>,
    overrides: &Overrides,
    machine: &Machine,
) -> Result<Configuration, Problems> {
    let mut reader = Reader {
        sources: Sources::default(),
        marks: HashMap::new(),
    };
    let directory = match file {
        Some((_, path)) => match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => absolute(parent),
            _ => absolute(Path::new(".")),
        },
        None => absolute(Path::new(".")),
    };
    let entries = match file {
        Some((text, path)) => reader.sources.add_file(text, path),
        None => Vec::new(),
    };
    let fallback = reader.sources.add_named(match file {
        Some((_, path)) => path.display().to_string(),
        None => "kiln summon".to_owned(),
    });
    // After a mistake of syntax, what is missing may only have been lost: nothing is told but the mistake.
    let whole = reader.sources.is_fine();
    let mut configuration = Configuration {
        path: file.map(|(_, path)| absolute(path)),
        directory: directory.clone(),
        ..Configuration::default()
    };
    if whole {
        reader.globals(&entries, &mut configuration);
    }
    let flags = overrides.entries(&mut reader.sources);
    reader.globals(&flags, &mut configuration);
    if whole {
        for (path, entry, keys) in reader.named(&entries, "front", MAX_FRONTS) {
            let front = reader.front(&path, entry, keys, &directory);
            configuration.fronts.insert(front.name.clone(), front);
        }
    }
    let mut units = BTreeMap::new();
    let mut defaults = Defaults {
        directory: &directory,
        ttl: configuration.ttl,
        fronts: &configuration.fronts,
        look_for_files: machine.look_for_files,
    };
    if whole {
        for (path, entry, keys) in reader.named(&entries, "unit", MAX_UNITS) {
            if let Some(unit) = reader.unit(&path, &entry.name, entry.mark, keys, &defaults) {
                units.insert(unit.name.clone(), unit);
            }
        }
    }
    // Paths of flags are relative to where the command is given.
    let here = absolute(Path::new("."));
    defaults.directory = &here;
    for text in &overrides.units {
        if let Some(unit) = unit_from_flag(text, &mut reader, &defaults) {
            let key = format!("unit.{}", unit.name);
            let mark = reader.marks.get(&key).copied().unwrap_or(fallback);
            if units.contains_key(&unit.name) {
                reader.sources.tell(mark, &key, taken_name());
            } else {
                units.insert(unit.name.clone(), unit);
            }
        }
    }
    configuration.units = units;
    if whole {
        Check {
            configuration: &configuration,
            machine,
            reader: &mut reader,
            fallback,
        }
        .run();
    }
    reader.sources.into_result()?;
    Ok(configuration)
}

impl Default for Configuration {
    fn default() -> Self {
        let loopback = [
            IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
            IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
        ];
        Self {
            path: None,
            directory: PathBuf::from("/"),
            listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 53))],
            forward: Forward::System,
            forward_for: loopback.into(),
            zones: Vec::new(),
            ttl: DEFAULT_TTL,
            pool: Ipv4Net::new_assert(Ipv4Addr::new(127, 78, 0, 0), 16),
            pool6: None,
            interface: None,
            metrics: None,
            max_running: None,
            max_memory: None,
            fronts: BTreeMap::new(),
            units: BTreeMap::new(),
        }
    }
}

#[cfg(test)]
mod tests;

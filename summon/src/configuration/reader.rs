//! From trees of values to the types of a configuration: each key by itself. What concerns several keys or units at once is
//! `check`'s.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Component, Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use kiln_abi::manifest::Protocol;
use kiln_image::Include;
use kiln_monitor::arguments::{
    parse_environment, parse_hostname, parse_memory, parse_name, parse_user, parse_volume,
};

use super::{
    Answer, Configuration, Forward, Front, FrontProtocol, FrontUse, IncludeFile, MAX_TTL, Net,
    Readiness, Stop, Unit,
    problem::Fault,
    text::{nearest, parse_dns_name, parse_duration, parse_socket_address, parse_unit_ports},
    value::{Entry, Mark, Node, Sources, Value},
};

/// Keys of the file.
pub const KEYS: &[&str] = &[
    "listen",
    "forward",
    "forward_for",
    "zones",
    "ttl",
    "pool",
    "pool6",
    "interface",
    "metrics",
    "max_running",
    "max_memory",
    "front",
    "unit",
];

/// Keys of a front.
pub const FRONT_KEYS: &[&str] = &["listen", "protocol", "certificate", "key"];

/// Keys of a unit.
pub const UNIT_KEYS: &[&str] = &[
    "dns",
    "source",
    "image",
    "arguments",
    "ports",
    "front",
    "front_port",
    "certificate",
    "key",
    "address",
    "address6",
    "ttl",
    "stop",
    "grace",
    "answer",
    "ready",
    "ready_timeout",
    "min_running",
    "always",
    "idle",
    "memory",
    "engine",
    "net",
    "environment",
    "volumes",
    "workdir",
    "user",
    "hostname",
    "log",
    "include",
    "rewrite",
];

/// Most items of a list.
const MAX_ITEMS: usize = 1024;
/// Most ports of one unit.
const MAX_PORTS: usize = 256;
/// Longest name of an interface in bytes (`IFNAMSIZ` less the final zero, netdevice(7)).
const MAX_INTERFACE: usize = 15;
/// Longest time for a program to become ready or to end: an hour. Zero would never work.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
/// Shortest time of idleness when none is given.
const SHORTEST_IDLE: Duration = Duration::from_secs(1);

/// What units say nothing about.
pub struct Defaults<'a> {
    /// Where relative paths begin; absolute.
    pub directory: &'a Path,
    /// Time to live in seconds.
    pub ttl: u32,
    /// All fronts, for the program's port behind them.
    pub fronts: &'a BTreeMap<String, Front>,
    /// Whether files may be looked for.
    pub look_for_files: bool,
}

/// Reads values, notes problems, and remembers where things are for the checks to come.
pub struct Reader<'a> {
    /// Where values come from, and the problems.
    pub sources: Sources<'a>,
    /// Where keys and items of lists were written: `unit.www.dns`, `unit.www.dns.0`.
    pub marks: HashMap<String, Mark>,
}

/// The entries of a table whose keys are known.
struct Table<'n> {
    path: String,
    entries: &'n [Entry],
}

impl<'n> Table<'n> {
    fn get(&self, name: &str) -> Option<&'n Node> {
        self.entries
            .iter()
            .find(|entry| entry.name == name)
            .map(|entry| &entry.node)
    }

    /// The key's full name.
    fn key(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        }
    }
}

impl Reader<'_> {
    /// Notes that a key's value is wrong.
    pub fn tell(&mut self, node: &Node, key: &str, fault: impl Into<Fault>) {
        self.sources.tell(node.mark, key, fault.into());
    }

    fn expected(&mut self, node: &Node, key: &str, expected: &str) {
        let found = node.value.kind();
        self.tell(node, key, format!("expected {expected}, found {found}"));
    }

    fn table<'n>(&mut self, path: &str, entries: &'n [Entry], known: &[&'static str]) -> Table<'n> {
        let table = Table {
            path: path.to_owned(),
            entries,
        };
        for entry in entries {
            let key = table.key(&entry.name);
            if known.contains(&entry.name.as_str()) {
                self.marks.insert(key, entry.node.mark);
                continue;
            }
            if self.sources.is_full() {
                break;
            }
            let remedy = match nearest(&entry.name, known.iter().copied()) {
                // A line that stands below the head of a table by mistake.
                _ if KEYS.contains(&entry.name.as_str()) => {
                    format!(
                        "`{}` belongs above all [front...] and [unit...] lines",
                        entry.name
                    )
                }
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known keys: {}", known.join(", ")),
            };
            let fault = Fault::new("unknown key", remedy);
            self.sources.tell(entry.mark, &key, fault);
        }
        table
    }

    fn text<'n>(&mut self, node: &'n Node, key: &str) -> Option<&'n str> {
        match &node.value {
            Value::Text(text) | Value::Flag(text) => Some(text),
            _ => {
                self.expected(node, key, "a string");
                None
            }
        }
    }

    /// A string as `parse` understands it.
    fn parsed<T, E: Into<Fault>>(
        &mut self,
        table: &Table<'_>,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let node = table.get(name)?;
        self.parsed_node(node, &table.key(name), parse)
    }

    fn parsed_node<T, E: Into<Fault>>(
        &mut self,
        node: &Node,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let text = self.text(node, key)?;
        match parse(text) {
            Ok(value) => Some(value),
            Err(fault) => {
                self.tell(node, key, fault);
                None
            }
        }
    }

    /// A list of strings or numbers, as `parse` understands each; a single one will do. Marks each item that is new to
    /// the list.
    fn list<T: PartialEq, E: Into<Fault>>(
        &mut self,
        table: &Table<'_>,
        name: &str,
        mut parse: impl FnMut(&str) -> Result<T, E>,
    ) -> Vec<T> {
        let Some(node) = table.get(name) else {
            return Vec::new();
        };
        let key = table.key(name);
        if items(node).len() > MAX_ITEMS {
            self.tell(node, &key, format!("more than {MAX_ITEMS} are too many"));
            return Vec::new();
        }
        let mut all = Vec::new();
        for item in items(node) {
            let written = match &item.value {
                Value::Text(text) | Value::Flag(text) => text.clone(),
                Value::Integer(number) => number.to_string(),
                _ => {
                    self.expected(item, &key, "a string or a list of strings");
                    continue;
                }
            };
            match parse(&written) {
                Ok(value) => {
                    if !all.contains(&value) {
                        self.marks.insert(format!("{key}.{}", all.len()), item.mark);
                        all.push(value);
                    }
                }
                Err(fault) => self.tell(item, &key, fault),
            }
        }
        all
    }

    fn boolean(&mut self, table: &Table<'_>, name: &str) -> Option<bool> {
        let node = table.get(name)?;
        match &node.value {
            Value::Boolean(value) => Some(*value),
            Value::Flag(text) if text == "true" => Some(true),
            Value::Flag(text) if text == "false" => Some(false),
            _ => {
                self.expected(node, &table.key(name), "true or false");
                None
            }
        }
    }

    fn number(&mut self, table: &Table<'_>, name: &str, least: u32, most: u32) -> Option<u32> {
        let node = table.get(name)?;
        let key = table.key(name);
        let number = match &node.value {
            Value::Integer(number) => Some(*number),
            Value::Flag(text) => text.parse().ok(),
            _ => {
                self.expected(node, &key, "a number");
                return None;
            }
        };
        let number = number.and_then(|number| u32::try_from(number).ok());
        let fitting = number.filter(|number| (least..=most).contains(number));
        if fitting.is_none() {
            self.tell(
                node,
                &key,
                format!("expected a number from {least} to {most}"),
            );
        }
        fitting
    }

    fn duration(
        &mut self,
        table: &Table<'_>,
        name: &str,
        least: Duration,
        most: Duration,
    ) -> Option<Duration> {
        let node = table.get(name)?;
        self.duration_node(node, &table.key(name), least, most)
    }

    fn duration_node(
        &mut self,
        node: &Node,
        key: &str,
        least: Duration,
        most: Duration,
    ) -> Option<Duration> {
        let parsed = match &node.value {
            Value::Text(text) | Value::Flag(text) => parse_duration(text),
            Value::Integer(seconds) => parse_duration(&seconds.to_string()),
            Value::Other("a number with a fraction") => {
                Err("parts of a second are written as \"500ms\"".to_owned())
            }
            _ => {
                self.expected(
                    node,
                    key,
                    "a time such as \"500ms\", \"2s\", \"5m\" or a number of seconds",
                );
                return None;
            }
        };
        let fitting = parsed.and_then(|time| {
            if (least..=most).contains(&time) {
                Ok(time)
            } else {
                Err(format!(
                    "must be from {} to {}",
                    super::format_duration(least),
                    super::format_duration(most)
                ))
            }
        });
        match fitting {
            Ok(time) => Some(time),
            Err(reason) => {
                self.tell(node, key, reason);
                None
            }
        }
    }

    fn memory(&mut self, table: &Table<'_>, name: &str) -> Option<u64> {
        let node = table.get(name)?;
        if let Value::Integer(_) = node.value {
            // kiln.toml takes bytes, `kiln run` MiB: neither is guessed.
            let fault = Fault::new("the unit is missing", "write it as \"64M\" or \"1G\"");
            self.tell(node, &table.key(name), fault);
            return None;
        }
        self.parsed(table, name, parse_memory)
    }

    /// One of several words.
    fn word<T: Copy>(&mut self, table: &Table<'_>, name: &str, words: &[(&str, T)]) -> Option<T> {
        self.parsed(table, name, |text| {
            let found = words.iter().find(|(word, _)| *word == text);
            found.map(|(_, value)| *value).ok_or_else(|| {
                let known: Vec<String> = words
                    .iter()
                    .map(|(word, _)| format!("\"{word}\""))
                    .collect();
                let known = known.join(", ");
                let remedy = match nearest(text, words.iter().map(|(word, _)| *word)) {
                    Some(near) => format!("did you mean \"{near}\"? There are {known}"),
                    None => format!("use one of {known}"),
                };
                Fault::new(format!("\"{text}\" is unknown here"), remedy)
            })
        })
    }

    /// A file or directory, made absolute.
    fn path(&mut self, table: &Table<'_>, name: &str, directory: &Path) -> Option<PathBuf> {
        self.parsed(table, name, |text| {
            not_empty(text)?;
            Ok::<_, String>(join(directory, Path::new(text)))
        })
    }

    /// The keys above all tables.
    pub fn globals(&mut self, entries: &[Entry], configuration: &mut Configuration) {
        let table = self.table("", entries, KEYS);
        if table.get("listen").is_some() {
            configuration.listen = self.listen(&table, Some(53));
        }
        if let Some(node) = table.get("forward") {
            configuration.forward = self.forward(&table, node);
        }
        if table.get("forward_for").is_some() {
            configuration.forward_for = self.list(&table, "forward_for", parse_network);
        }
        if table.get("zones").is_some() {
            configuration.zones = self.list(&table, "zones", |text| parse_dns_name(text, false));
        }
        if let Some(ttl) = self.number(&table, "ttl", 0, MAX_TTL) {
            configuration.ttl = ttl;
        }
        if let Some(pool) = self.parsed(&table, "pool", |text| {
            parse_prefix::<Ipv4Net>(text, "127.78.0.0/16")
                .and_then(|pool| within(pool.prefix_len(), 8, 30, pool.trunc()))
        }) {
            configuration.pool = pool;
        }
        if let Some(pool) = self.parsed(&table, "pool6", |text| {
            parse_prefix::<Ipv6Net>(text, "fd00:6b69:6c6e::/64")
                .and_then(|pool| within(pool.prefix_len(), 32, 126, pool.trunc()))
        }) {
            configuration.pool6 = Some(pool);
        }
        if let Some(interface) = self.parsed(&table, "interface", |text| {
            let fits = |c: char| c.is_ascii_graphic() && c != '/' && c != ':';
            if text.is_empty()
                || text.len() > MAX_INTERFACE
                || !text.chars().all(fits)
                || text == "."
                || text == ".."
            {
                return Err(format!("\"{text}\" cannot be the name of an interface"));
            }
            Ok(text.to_owned())
        }) {
            configuration.interface = Some(interface);
        }
        if let Some(metrics) =
            self.parsed(&table, "metrics", |text| parse_socket_address(text, None))
        {
            configuration.metrics = Some(metrics);
        }
        if let Some(most) = self.number(&table, "max_running", 1, u32::MAX) {
            configuration.max_running = Some(most);
        }
        if let Some(most) = self.memory(&table, "max_memory") {
            configuration.max_memory = Some(most);
        }
    }

    fn listen(&mut self, table: &Table<'_>, usual: Option<u16>) -> Vec<std::net::SocketAddr> {
        let all = self.list(table, "listen", |text| parse_socket_address(text, usual));
        if let Some(node) = table.get("listen")
            && items(node).is_empty()
        {
            self.tell(node, &table.key("listen"), "the list is empty".to_owned());
        }
        all
    }

    fn forward(&mut self, table: &Table<'_>, node: &Node) -> Forward {
        let words: Vec<&str> = items(node)
            .iter()
            .filter_map(|item| match &item.value {
                Value::Text(text) | Value::Flag(text) => Some(text.as_str()),
                _ => None,
            })
            .collect();
        match words.as_slice() {
            ["system"] => return Forward::System,
            ["none"] => return Forward::None,
            _ => {}
        }
        let servers = self.list(table, "forward", |text| match text {
            "system" | "none" => Err(Fault::new(
                format!("\"{text}\" and other servers exclude each other"),
                "give \"system\", \"none\" or addresses",
            )),
            _ => parse_socket_address(text, Some(53)).map_err(|fault| Fault {
                remedy: Some("give \"system\", \"none\" or addresses such as 192.0.2.1:53".into()),
                ..fault
            }),
        });
        if servers.is_empty() {
            Forward::None
        } else {
            Forward::To(servers)
        }
    }

    /// The named tables below `front` or `unit`.
    pub fn named<'n>(
        &mut self,
        entries: &'n [Entry],
        group: &str,
        most: usize,
    ) -> Vec<(String, &'n Entry, &'n [Entry])> {
        let Some(entry) = entries.iter().find(|entry| entry.name == group) else {
            return Vec::new();
        };
        let Value::Table(named) = &entry.node.value else {
            self.expected(&entry.node, group, &format!("tables such as [{group}.web]"));
            return Vec::new();
        };
        if named.len() > most {
            let fault = Fault::new(
                format!("there are {}; at most {most} are possible", named.len()),
                "start a second summoner with a state directory of its own (KILN_STATE)",
            );
            self.tell(&entry.node, group, fault);
            return Vec::new();
        }
        let mut all = Vec::new();
        for entry in named {
            let key = format!("{group}.{}", entry.name);
            if let Err(error) = parse_name(&entry.name) {
                self.sources.tell(entry.mark, &key, error.into());
                continue;
            }
            self.marks.insert(key.clone(), entry.mark);
            match &entry.node.value {
                Value::Table(entries) => all.push((key, entry, entries.as_slice())),
                _ => self.expected(&entry.node, &key, &format!("a table: [{key}]")),
            }
        }
        all
    }

    /// A front. Where something is wrong, what is right is returned, so that units can name it.
    pub fn front(
        &mut self,
        path: &str,
        entry: &Entry,
        entries: &[Entry],
        directory: &Path,
    ) -> Front {
        let table = self.table(path, entries, FRONT_KEYS);
        if table.get("listen").is_none() {
            let fault = Fault::new(
                "`listen` is missing",
                "say where it listens: listen = [\"127.0.0.2:8080\"]",
            );
            self.sources.tell(entry.mark, path, fault);
        }
        let words = [
            ("http", FrontProtocol::Http),
            ("tls", FrontProtocol::Tls),
            ("https", FrontProtocol::Https),
        ];
        let protocol = self.word(&table, "protocol", &words);
        if table.get("protocol").is_none() {
            let fault = Fault::new(
                "`protocol` is missing",
                "add protocol = \"http\", \"tls\" (passed through) or \"https\" (ends here)",
            );
            self.sources.tell(entry.mark, path, fault);
        }
        let (certificate, key) = self.certificate(&table, directory);
        if let (Some(protocol @ (FrontProtocol::Http | FrontProtocol::Tls)), Some(_)) =
            (protocol, &certificate)
            && let Some(node) = table.get("certificate")
        {
            let fault = Fault::new(
                format!(
                    "a front with protocol \"{}\" uses no certificate",
                    protocol.name()
                ),
                "leave it out, or use protocol = \"https\"",
            );
            self.tell(node, &table.key("certificate"), fault);
        }
        Front {
            name: entry.name.clone(),
            listen: self.listen(
                &table,
                protocol.map(|protocol| match protocol {
                    FrontProtocol::Http => 80,
                    FrontProtocol::Tls | FrontProtocol::Https => 443,
                }),
            ),
            protocol: protocol.unwrap_or(FrontProtocol::Http),
            certificate,
            key,
        }
    }

    fn certificate(
        &mut self,
        table: &Table<'_>,
        directory: &Path,
    ) -> (Option<PathBuf>, Option<PathBuf>) {
        let certificate = self.path(table, "certificate", directory);
        let key = self.path(table, "key", directory);
        for (there, missing) in [("certificate", "key"), ("key", "certificate")] {
            if let (Some(node), None) = (table.get(there), table.get(missing)) {
                let fault = Fault::new(
                    format!("`{missing}` is missing"),
                    "give both `certificate` and `key`",
                );
                self.tell(node, &table.key(there), fault);
            }
        }
        (certificate, key)
    }

    /// A unit; none if what it cannot be without is missing or wrong.
    pub fn unit(
        &mut self,
        path: &str,
        name: &str,
        mark: Mark,
        entries: &[Entry],
        defaults: &Defaults<'_>,
    ) -> Option<Unit> {
        let table = self.table(path, entries, UNIT_KEYS);
        let directory = defaults.directory;
        let dns = self.list(&table, "dns", |text| parse_dns_name(text, true));
        let no_names = table.get("dns").is_none_or(|node| items(node).is_empty());
        if no_names {
            let fault = Fault::new(
                "it has no name to be asked for by",
                "add dns = [\"www.example.org\"]",
            );
            self.sources.tell(mark, path, fault);
        }
        let source = self.source(&table, mark, defaults);
        let ports = self.unit_ports(&table);
        let fronts = self.unit_fronts(&table, defaults);
        if !["ports", "front"]
            .iter()
            .any(|name| table.get(name).is_some())
        {
            let fault = Fault::new(
                "nothing leads to it",
                "add ports = [\"80\"], or front = [...] for a shared port",
            );
            self.sources.tell(mark, path, fault);
        }
        let (certificate, key) = self.certificate(&table, directory);
        let ttl = self
            .number(&table, "ttl", 0, MAX_TTL)
            .unwrap_or(defaults.ttl);
        let wait = Duration::from_millis(1)..=LONGEST_WAIT;
        let long = Duration::from_secs(365 * 24 * 3600);
        let first_port = ports
            .iter()
            .find(|port| port.protocol == Protocol::Tcp)
            .map(|port| port.guest)
            .or_else(|| fronts.first().map(|one| one.port));
        let ready = self.readiness(&table, first_port);
        let unit = Unit {
            name: name.to_owned(),
            arguments: table
                .get("arguments")
                .map(|_| self.strings(&table, "arguments")),
            address: self.parsed(&table, "address", |text| {
                unicast(text, "127.0.0.5", |address: &Ipv4Addr| {
                    address.is_unspecified() || address.is_multicast() || address.is_broadcast()
                })
            }),
            address6: self.parsed(&table, "address6", |text| {
                unicast(text, "fd00::5", |address: &Ipv6Addr| {
                    address.is_unspecified()
                        || address.is_multicast()
                        || address.to_ipv4_mapped().is_some()
                })
            }),
            stop: self
                .word(
                    &table,
                    "stop",
                    &[
                        ("destroy", Stop::Destroy),
                        ("shutdown", Stop::Shutdown),
                        ("suspend", Stop::Suspend),
                    ],
                )
                .unwrap_or_default(),
            grace: self
                .duration(&table, "grace", Duration::ZERO, *wait.end())
                .unwrap_or(Duration::from_secs(10)),
            answer: self
                .word(
                    &table,
                    "answer",
                    &[("at-once", Answer::AtOnce), ("ready", Answer::Ready)],
                )
                .unwrap_or_default(),
            ready,
            ready_timeout: self
                .duration(&table, "ready_timeout", *wait.start(), *wait.end())
                .unwrap_or(Duration::from_secs(30)),
            min_running: self.number(&table, "min_running", 0, 1).unwrap_or(0),
            always: self.boolean(&table, "always").unwrap_or(false),
            idle: self
                .duration(&table, "idle", Duration::from_millis(1), long)
                .unwrap_or_else(|| {
                    Duration::from_secs(2 * u64::from(ttl)).clamp(SHORTEST_IDLE, long)
                }),
            memory: self.memory(&table, "memory"),
            engine: self
                .word(
                    &table,
                    "engine",
                    &[("process", "process"), ("qemu", "qemu"), ("kvm", "kvm")],
                )
                .map(str::to_owned),
            net: self.word(
                &table,
                "net",
                &[("socket", Net::Socket), ("direct", Net::Direct)],
            ),
            environment: self.environment(&table),
            volumes: self.volumes(&table, directory),
            workdir: self.parsed(&table, "workdir", |text| {
                if text.starts_with('/') && !text.contains('\0') {
                    Ok(text.to_owned())
                } else {
                    Err(Fault::new(
                        format!("`{text}` is not an absolute path"),
                        "give it as the program sees it, such as \"/srv\"",
                    ))
                }
            }),
            user: self.user(&table),
            hostname: self.parsed(&table, "hostname", parse_hostname),
            log: self.parsed(&table, "log", |text| {
                not_empty(text).map(|()| text.to_owned())
            }),
            include: self.list(&table, "include", |text| include(text, directory)),
            rewrite: self.boolean(&table, "rewrite").unwrap_or(true),
            certificate,
            key,
            ttl,
            dns,
            source: source.clone().unwrap_or_default(),
            ports,
            fronts,
        };
        (source.is_some() && !unit.dns.is_empty()).then_some(unit)
    }

    fn source(
        &mut self,
        table: &Table<'_>,
        mark: Mark,
        defaults: &Defaults<'_>,
    ) -> Option<PathBuf> {
        let name = match (table.get("source"), table.get("image")) {
            (Some(_), Some(image)) => {
                let fault = Fault::new("`source` and `image` mean the same", "keep one of them");
                self.tell(image, &table.key("image"), fault);
                return None;
            }
            (Some(_), None) => "source",
            (None, Some(_)) => "image",
            (None, None) => {
                let fault = Fault::new(
                    "`source` is missing",
                    "say what runs: a program, a directory with kiln.toml or index.html, an image file or a stored image",
                );
                self.sources.tell(mark, &table.path, fault);
                return None;
            }
        };
        self.parsed(table, name, |text| {
            not_empty(text)?;
            let path = Path::new(text);
            let joined = join(defaults.directory, path);
            // As `kiln run`: what exists is a path; else a single word may be the name of a stored image.
            let exists = || defaults.look_for_files && joined.exists();
            if !text.contains('/') && kiln_image::project::check_name(text).is_ok() && !exists() {
                return Ok(path.to_owned());
            }
            Ok::<_, String>(joined)
        })
    }

    fn unit_ports(&mut self, table: &Table<'_>) -> Vec<super::UnitPort> {
        let groups = self.list(table, "ports", parse_unit_ports);
        let key = table.key("ports");
        let mut all: Vec<super::UnitPort> = Vec::new();
        let mut marks = Vec::new();
        for (index, group) in groups.into_iter().enumerate() {
            let mark = self.marks.get(&format!("{key}.{index}")).copied();
            for port in group {
                let taken = all
                    .iter()
                    .find(|one| one.host == port.host && one.protocol == port.protocol);
                match (taken, mark) {
                    (Some(taken), Some(mark)) if *taken != port => {
                        let fault = Fault::new(
                            format!(
                                "port {} leads to {} and to {}",
                                port.host, taken.guest, port.guest
                            ),
                            "give each port of the program a port of its own",
                        );
                        self.sources.tell(mark, &key, fault);
                    }
                    (Some(_), _) => {}
                    (None, _) => {
                        all.push(port);
                        marks.push(mark);
                    }
                }
            }
        }
        for (index, mark) in marks.into_iter().enumerate() {
            if let Some(mark) = mark {
                self.marks.insert(format!("{key}.{index}"), mark);
            }
        }
        if all.len() > MAX_PORTS
            && let Some(node) = table.get("ports")
        {
            self.tell(
                node,
                &key,
                format!(
                    "{} ports are too many: a unit has at most {MAX_PORTS}",
                    all.len()
                ),
            );
            all.truncate(MAX_PORTS);
        }
        if let (Some(node), true) = (table.get("ports"), all.is_empty())
            && items(node).is_empty()
            && table.get("front").is_none()
        {
            let fault = Fault::new(
                "the list is empty",
                "add the port that the program serves, such as \"80\"",
            );
            self.tell(node, &key, fault);
        }
        all
    }

    fn unit_fronts(&mut self, table: &Table<'_>, defaults: &Defaults<'_>) -> Vec<FrontUse> {
        let port = self.number(table, "front_port", 1, 65535);
        if let (Some(node), None) = (table.get("front_port"), table.get("front")) {
            let fault = Fault::new("there is no front", "add front = [...], or use `ports`");
            self.tell(node, &table.key("front_port"), fault);
        }
        let names = self.list(table, "front", |text| match defaults.fronts.get(text) {
            Some(front) => Ok((text.to_owned(), front.protocol.default_port())),
            None => Err(no_front(text, defaults.fronts)),
        });
        names
            .into_iter()
            .map(|(front, usual)| FrontUse {
                front,
                port: port
                    .and_then(|port| u16::try_from(port).ok())
                    .unwrap_or(usual),
            })
            .collect()
    }

    fn readiness(&mut self, table: &Table<'_>, first_port: Option<u16>) -> Readiness {
        let Some(node) = table.get("ready") else {
            return Readiness::default();
        };
        const FORM: &str = "use \"port\", { http = \"/health\", port = 80 }, { line = \"Ready\" } or { delay = \"500ms\" }";
        let key = table.key("ready");
        let entries = match &node.value {
            Value::Table(entries) => entries.clone(),
            Value::Text(text) | Value::Flag(text) => {
                // The short form of flags: http:/health, line:Ready, delay:500ms.
                match text.split_once(':') {
                    None if text == "port" => return Readiness::Port,
                    Some((kind @ ("http" | "line" | "delay"), value)) => vec![Entry {
                        name: kind.to_owned(),
                        mark: node.mark,
                        node: Node {
                            mark: node.mark,
                            value: Value::Flag(value.to_owned()),
                        },
                    }],
                    _ => {
                        self.tell(
                            node,
                            &key,
                            Fault::new(format!("\"{text}\" is unknown here"), FORM),
                        );
                        return Readiness::default();
                    }
                }
            }
            _ => {
                self.expected(node, &key, "a string or a table");
                return Readiness::default();
            }
        };
        let ready = self.table(&key, &entries, &["http", "port", "line", "delay"]);
        let kinds: Vec<&str> = ["http", "line", "delay"]
            .into_iter()
            .filter(|kind| ready.get(kind).is_some())
            .collect();
        let parsed = match kinds.as_slice() {
            ["http"] => {
                let path = self.parsed(&ready, "http", |text| {
                    if text.starts_with('/') && text.chars().all(|c| c.is_ascii_graphic()) {
                        Ok(text.to_owned())
                    } else {
                        Err(Fault::new(
                            format!("`{text}` is no path of a request"),
                            "it begins with / and has no spaces, such as \"/health\"",
                        ))
                    }
                });
                let port = match ready.get("port") {
                    Some(_) => self
                        .number(&ready, "port", 1, 65535)
                        .and_then(|port| u16::try_from(port).ok()),
                    None => first_port,
                };
                if ready.get("port").is_none() && port.is_none() {
                    let fault = Fault::new(
                        "the port to ask is missing",
                        "add it: { http = \"/health\", port = 80 }",
                    );
                    self.tell(node, &key, fault);
                }
                path.zip(port)
                    .map(|(path, port)| Readiness::Http { path, port })
            }
            ["line"] => self
                .parsed(&ready, "line", |text| {
                    not_empty(text)?;
                    if text.contains('\n') {
                        return Err("only one line can be waited for".to_owned());
                    }
                    Ok(text.to_owned())
                })
                .map(Readiness::Line),
            ["delay"] => self
                .duration(&ready, "delay", Duration::ZERO, LONGEST_WAIT)
                .map(Readiness::Delay),
            _ => {
                self.tell(
                    node,
                    &key,
                    Fault::new("it does not say one thing to wait for", FORM),
                );
                None
            }
        };
        if let (Some(port), false) = (ready.get("port"), kinds == ["http"]) {
            self.tell(
                port,
                &key,
                Fault::new("`port` goes with `http` alone", FORM),
            );
        }
        parsed.unwrap_or_default()
    }

    /// A list that may hold the same string twice.
    fn strings(&mut self, table: &Table<'_>, name: &str) -> Vec<String> {
        let Some(node) = table.get(name) else {
            return Vec::new();
        };
        let key = table.key(name);
        let mut all = Vec::new();
        for item in items(node) {
            if let Some(text) =
                self.parsed_node(item, &key, |text| no_zero(text).map(|()| text.to_owned()))
            {
                all.push(text);
            }
        }
        all
    }

    fn environment(&mut self, table: &Table<'_>) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        let Some(node) = table.get("environment") else {
            return all;
        };
        let key = table.key("environment");
        let inherited = |name: &str| std::env::var(name).ok();
        match &node.value {
            Value::Table(entries) => {
                for entry in entries {
                    let key = format!("{key}.{}", entry.name);
                    if entry.name.is_empty() || entry.name.contains(['=', '\0']) {
                        self.sources.tell(
                            entry.mark,
                            &key,
                            "this cannot be the name of a variable".to_owned().into(),
                        );
                        continue;
                    }
                    if let Some(text) = self.parsed_node(&entry.node, &key, |text| {
                        no_zero(text).map(|()| text.to_owned())
                    }) {
                        all.insert(entry.name.clone(), text);
                    }
                }
            }
            // As `kiln run -e`: NAME=VALUE, or NAME to pass on the summoner's own.
            _ => {
                for item in items(node) {
                    if let Some((name, value)) =
                        self.parsed_node(item, &key, |text| parse_environment(text, inherited))
                    {
                        all.insert(name, value);
                    }
                }
            }
        }
        all
    }

    fn volumes(&mut self, table: &Table<'_>, directory: &Path) -> Vec<super::VolumeMount> {
        let mut paths: Vec<String> = Vec::new();
        self.list(table, "volumes", |text| {
            let mut volume = parse_volume(text)?;
            let name = volume
                .host
                .to_str()
                .filter(|host| !host.contains('/') && !host.starts_with('.'));
            match name {
                Some(name) => {
                    parse_name(name)?;
                }
                None => volume.host = join(directory, &volume.host),
            }
            if text.contains('\0') {
                return Err(Fault::from("must not contain a zero byte".to_owned()));
            }
            if paths.contains(&volume.path) {
                return Err(Fault::new(
                    format!("two volumes are to be mounted at {}", volume.path),
                    "give each its own path",
                ));
            }
            paths.push(volume.path.clone());
            Ok::<_, Fault>(volume)
        })
    }

    fn user(&mut self, table: &Table<'_>) -> Option<super::User> {
        let node = table.get("user")?;
        let key = table.key("user");
        if let Value::Integer(number) = node.value {
            let text = Node {
                mark: node.mark,
                value: Value::Text(number.to_string()),
            };
            return self.parsed_node(&text, &key, parse_user);
        }
        self.parsed_node(node, &key, parse_user)
    }
}

/// A list's items, or a single value as a list.
fn items(node: &Node) -> &[Node] {
    match &node.value {
        Value::List(items) => items,
        _ => std::slice::from_ref(node),
    }
}

/// A front that a unit names and nobody made.
pub fn no_front(name: &str, fronts: &BTreeMap<String, Front>) -> Fault {
    let remedy = match nearest(name, fronts.keys().map(String::as_str)) {
        Some(near) => format!("did you mean \"{near}\"?"),
        None => format!("add it: [front.{name}]"),
    };
    Fault::new(format!("there is no front \"{name}\""), remedy)
}

fn no_zero(text: &str) -> Result<(), String> {
    if text.contains('\0') {
        return Err("must not contain a zero byte".into());
    }
    Ok(())
}

fn not_empty(text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("must not be empty".into());
    }
    no_zero(text)
}

/// Puts a directory before a relative path. Steps such as `..` stay, as links may be on the way.
fn join(directory: &Path, path: &Path) -> PathBuf {
    let path = path.strip_prefix(Component::CurDir).unwrap_or(path);
    if path.as_os_str().is_empty() {
        return directory.to_owned();
    }
    directory.join(path)
}

/// Reads what `kiln run --include` takes. Relative paths go to `/app` there, and must still do so once they are absolute.
fn include(text: &str, directory: &Path) -> Result<IncludeFile, String> {
    no_zero(text)?;
    let parsed = Include::parse(text).map_err(|error| error.to_string())?;
    let to = match (parsed.to, parsed.from.is_absolute()) {
        (Some(to), _) => Some(to),
        (None, true) => None,
        (None, false) => {
            let steps: Vec<_> = parsed
                .from
                .components()
                .map(|component| match component {
                    Component::Normal(step) => step.to_str().map(str::to_owned).ok_or(()),
                    Component::CurDir => Ok(String::new()),
                    _ => Err(()),
                })
                .filter(|step| step.as_ref().is_ok_and(|step| !step.is_empty()) || step.is_err())
                .collect::<Result<_, _>>()
                .map_err(|()| format!("`{text}` needs a place in the image: {text}:/app/..."))?;
            Some(format!("/app/{}", steps.join("/")))
        }
    };
    Ok(IncludeFile {
        from: join(directory, &parsed.from),
        to,
    })
}

/// Reads an address or a prefix.
fn parse_network(text: &str) -> Result<IpNet, Fault> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(address.into());
    }
    parse_prefix::<IpNet>(text, "127.0.0.0/8").map(|network| network.trunc())
}

fn parse_prefix<T: FromStr>(text: &str, example: &str) -> Result<T, Fault> {
    text.parse().map_err(|_| {
        Fault::new(
            format!("`{text}` is not a prefix of addresses"),
            format!("write it as {example}"),
        )
    })
}

fn within<T>(length: u8, least: u8, most: u8, prefix: T) -> Result<T, Fault> {
    if (least..=most).contains(&length) {
        return Ok(prefix);
    }
    let too = if length < least { "large" } else { "small" };
    Err(Fault::new(
        format!("/{length} is too {too} for a pool"),
        format!("use a length from /{least} to /{most}"),
    ))
}

fn unicast<T: FromStr>(
    text: &str,
    example: &str,
    refused: impl FnOnce(&T) -> bool,
) -> Result<T, Fault> {
    match text.parse() {
        Ok(address) if !refused(&address) => Ok(address),
        Ok(_) => Err(Fault::new(
            format!("{text} is not the address of one machine"),
            format!("choose one such as {example}"),
        )),
        Err(_) => Err(Fault::new(
            format!("`{text}` is not an address of this kind"),
            format!("write it as {example}"),
        )),
    }
}

//! Checks of a configuration as a whole: between units, and against this machine.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::Path,
};

use kiln_abi::manifest::Protocol;
use kiln_monitor::arguments::{format_memory, protocol_name};

use super::{
    Configuration, Forward, Front, FrontProtocol, Machine, Net, Unit,
    problem::Fault,
    reader::{Reader, no_front},
    value::Mark,
};

/// Least memory of a unit in bytes: what `kiln run` asks for (engine `process`; virtual machines).
const LEAST_MEMORY: u64 = 4 << 20;
const LEAST_MEMORY_OF_MACHINE: u64 = 8 << 20;

/// What the checks work with.
pub struct Check<'c, 'r, 's> {
    /// The configuration; may be incomplete where problems were found already.
    pub configuration: &'c Configuration,
    /// The machine.
    pub machine: &'c Machine,
    /// Takes problems, knows places.
    pub reader: &'r mut Reader<'s>,
    /// The place of what has none of its own.
    pub fallback: Mark,
}

/// Who listens somewhere.
struct Listener {
    address: IpAddr,
    port: u16,
    protocol: Protocol,
    /// For messages.
    owner: String,
    /// Key and the more exact key of the place.
    key: String,
    item: String,
}

/// Who listens at all addresses of a family, by port.
struct Everywhere<'l> {
    v4: HashMap<(u16, Protocol), &'l Listener>,
    v6: HashMap<(u16, Protocol), &'l Listener>,
}

impl<'l> Everywhere<'l> {
    fn of(listeners: &'l [Listener]) -> Self {
        let (mut v4, mut v6) = (HashMap::new(), HashMap::new());
        for listener in listeners.iter().filter(|one| one.address.is_unspecified()) {
            let family = if listener.address.is_ipv4() {
                &mut v4
            } else {
                &mut v6
            };
            family
                .entry((listener.port, listener.protocol))
                .or_insert(listener);
        }
        Self { v4, v6 }
    }

    /// Who keeps others from a port of an address (none: of any). A socket for all IPv6 addresses may take IPv4 as well, but
    /// not that of all IPv4 addresses, which stands beside it.
    fn taker(
        &self,
        address: Option<IpAddr>,
        port: u16,
        protocol: Protocol,
    ) -> Option<&'l Listener> {
        let key = (port, protocol);
        let v4 = self
            .v4
            .get(&key)
            .filter(|_| address.is_none_or(|address| address.is_ipv4()));
        let whole_v4 = address.is_some_and(|address| address.is_ipv4() && address.is_unspecified());
        let v6 = self.v6.get(&key).filter(|_| !whole_v4);
        v4.or(v6).copied()
    }
}

impl Check<'_, '_, '_> {
    /// Runs all checks.
    pub fn run(&mut self) {
        self.fronts();
        self.names();
        for unit in self.configuration.units.values() {
            self.unit(unit);
        }
        let listeners = self.listeners();
        self.conflicts(&listeners);
        self.privileged(&listeners);
        self.pools();
        self.ceilings();
        self.forwarding();
        if self.machine.look_for_files {
            self.files();
        }
    }

    /// Notes a problem at the first of these keys whose place is known; the first is the one that is named.
    fn tell(&mut self, keys: &[&str], fault: Fault) {
        let mark = keys
            .iter()
            .find_map(|key| self.reader.marks.get(*key))
            .copied()
            .unwrap_or(self.fallback);
        let key = keys.first().copied().unwrap_or_default();
        self.reader.sources.tell(mark, key, fault);
    }

    /// As [`Check::tell`], at an item of a list.
    fn tell_item(&mut self, key: &str, item: &str, fault: Fault) {
        let parent = key.rsplit_once('.').map_or("", |(parent, _)| parent);
        let mark = [item, key, parent]
            .iter()
            .find_map(|key| self.reader.marks.get(*key))
            .copied()
            .unwrap_or(self.fallback);
        self.reader.sources.tell(mark, key, fault);
    }

    fn fronts(&mut self) {
        let configuration = self.configuration;
        let mut used: HashSet<&str> = HashSet::new();
        for unit in configuration.units.values() {
            used.extend(unit.fronts.iter().map(|one| one.front.as_str()));
        }
        for front in configuration.fronts.values() {
            let own = |unit: &&Unit| {
                unit.certificate.is_none() && unit.fronts.iter().any(|one| one.front == front.name)
            };
            if front.protocol == FrontProtocol::Https
                && front.certificate.is_none()
                && (!used.contains(front.name.as_str())
                    || configuration.units.values().any(|unit| own(&unit)))
            {
                let which = match configuration.units.values().find(own) {
                    Some(unit) => format!("unit \"{}\" has none of its own", unit.name),
                    None => "no unit is behind it yet".to_owned(),
                };
                let key = format!("front.{}", front.name);
                self.tell(&[&key], Fault::new(
                    format!("protocol \"https\" needs a certificate, and {which}"),
                    "add certificate = \"cert.pem\" and key = \"key.pem\", or use protocol = \"tls\" to pass TLS through",
                ));
            }
        }
    }

    fn names(&mut self) {
        let configuration = self.configuration;
        let mut owners: HashMap<&str, &str> = HashMap::new();
        for unit in configuration.units.values() {
            for (index, name) in unit.dns.iter().enumerate() {
                if let Some(other) = owners.insert(name, &unit.name) {
                    let key = format!("unit.{}.dns", unit.name);
                    self.tell_item(
                        &key,
                        &format!("{key}.{index}"),
                        Fault::new(
                            format!("the name {name} is also that of unit \"{other}\""),
                            "give each name to one unit",
                        ),
                    );
                }
            }
        }
    }

    fn unit(&mut self, unit: &Unit) {
        let path = format!("unit.{}", unit.name);
        let key = |name: &str| format!("{path}.{name}");
        let configuration = self.configuration;
        let mut encrypted = false;
        let fixed = configuration.fixed_addresses(unit);
        for (index, one) in unit.fronts.iter().enumerate() {
            let item = format!("{path}.front.{index}");
            let Some(front) = configuration.fronts.get(&one.front) else {
                self.tell_item(
                    &key("front"),
                    &item,
                    no_front(&one.front, &configuration.fronts),
                );
                continue;
            };
            self.front_address(unit, front, fixed, &item);
            if front.protocol == FrontProtocol::Https {
                encrypted = true;
            }
        }
        if unit.certificate.is_some() && !encrypted {
            self.tell(
                &[&key("certificate"), &path],
                Fault::new(
                    "only units behind a front with protocol \"https\" use a certificate",
                    "leave it out, or name such a front",
                ),
            );
        }
        let machine = matches!(unit.engine.as_deref(), Some("qemu" | "kvm"));
        if machine && unit.net == Some(Net::Socket) {
            self.tell(&[&key("net"), &path], Fault::new(
                format!("\"socket\" is not possible on engine {}: a virtual machine takes no sockets of the host", unit.engine.as_deref().unwrap_or_default()),
                "use net = \"direct\" there, or engine = \"process\"",
            ));
        }
        let least = if machine {
            LEAST_MEMORY_OF_MACHINE
        } else {
            LEAST_MEMORY
        };
        if let Some(memory) = unit.memory {
            if memory < least {
                self.tell(
                    &[&key("memory"), &path],
                    Fault::new(
                        format!("{} are too little", format_memory(memory)),
                        format!("give at least \"{}M\"", least >> 20),
                    ),
                );
            }
            if let Some(most) = configuration.max_memory.filter(|most| memory > *most) {
                self.tell(
                    &[&key("memory"), &path],
                    Fault::new(
                        format!(
                            "{} are more than `max_memory` ({}) allows for all units together",
                            format_memory(memory),
                            format_memory(most)
                        ),
                        "raise `max_memory` or lower `memory`",
                    ),
                );
            }
        }
        if let Some(address) = unit.address
            && configuration.interface.is_some()
            && address.is_loopback()
        {
            self.tell(
                &[&key("address"), &path],
                Fault::new(
                    format!(
                        "{address} is a loopback address, and addresses are added to an interface"
                    ),
                    "choose an address of the interface's network, or leave `interface` out",
                ),
            );
        }
        if let Some(address) = unit.address {
            let pool = configuration.pool;
            if pool.contains(&address) && (address == pool.network() || address == pool.broadcast())
            {
                self.tell(&[&key("address"), &path], Fault::new(
                    format!("{address} is the first or last address of the pool {pool}, which no machine has"),
                    "choose another",
                ));
            }
        }
    }

    /// A name has the same addresses for all its ports: one behind a front lives where the front listens.
    fn front_address(
        &mut self,
        unit: &Unit,
        front: &Front,
        fixed: (Option<std::net::Ipv4Addr>, Option<std::net::Ipv6Addr>),
        item: &str,
    ) {
        if front.listen.is_empty() {
            return;
        }
        let path = format!("unit.{}", unit.name);
        let key = format!("{path}.front");
        if fixed == (None, None) {
            self.tell_item(&key, item, Fault::new(
                format!("front \"{}\" listens on all addresses, so which is this unit's is not said", front.name),
                "add `address` to the unit, or let the front listen on one address",
            ));
            return;
        }
        let fits = front.listen.iter().any(|listen| match listen.ip() {
            IpAddr::V4(address) => {
                address.is_unspecified() && fixed.0.is_some() || fixed.0 == Some(address)
            }
            IpAddr::V6(address) => address.is_unspecified() || fixed.1 == Some(address),
        });
        if !fits {
            let own: Vec<String> = [fixed.0.map(IpAddr::V4), fixed.1.map(IpAddr::V6)]
                .into_iter()
                .flatten()
                .map(|address| address.to_string())
                .collect();
            self.tell_item(&key, item, Fault::new(
                format!("front \"{}\" does not listen at the unit's address {}", front.name, own.join(", ")),
                "let all fronts of a unit listen at the same address, and leave the unit's `address` out",
            ));
        }
    }

    fn listeners(&self) -> Vec<Listener> {
        let configuration = self.configuration;
        let mut all = Vec::new();
        let mut add = |address: SocketAddr, protocol, owner: &str, key: &str, item: String| {
            all.push(Listener {
                address: address.ip(),
                port: address.port(),
                protocol,
                owner: owner.to_owned(),
                key: key.to_owned(),
                item,
            });
        };
        for (index, address) in configuration.listen.iter().enumerate() {
            for protocol in [Protocol::Udp, Protocol::Tcp] {
                add(
                    *address,
                    protocol,
                    "the name server",
                    "listen",
                    format!("listen.{index}"),
                );
            }
        }
        if let Some(address) = configuration.metrics {
            add(
                address,
                Protocol::Tcp,
                "the metrics",
                "metrics",
                "metrics".to_owned(),
            );
        }
        for front in configuration.fronts.values() {
            let key = format!("front.{}.listen", front.name);
            for (index, address) in front.listen.iter().enumerate() {
                let owner = format!("front \"{}\"", front.name);
                add(
                    *address,
                    Protocol::Tcp,
                    &owner,
                    &key,
                    format!("{key}.{index}"),
                );
            }
        }
        for unit in configuration.units.values() {
            let (v4, v6) = configuration.fixed_addresses(unit);
            let key = format!("unit.{}.ports", unit.name);
            let owner = format!("unit \"{}\"", unit.name);
            for address in [v4.map(IpAddr::V4), v6.map(IpAddr::V6)]
                .into_iter()
                .flatten()
            {
                for (index, port) in unit.ports.iter().enumerate() {
                    add(
                        SocketAddr::new(address, port.host),
                        port.protocol,
                        &owner,
                        &key,
                        format!("{key}.{index}"),
                    );
                }
            }
        }
        all
    }

    fn conflicts(&mut self, listeners: &[Listener]) {
        let mut at: HashMap<(IpAddr, u16, Protocol), &Listener> = HashMap::new();
        let everywhere = Everywhere::of(listeners);
        for listener in listeners {
            let whole = everywhere
                .taker(Some(listener.address), listener.port, listener.protocol)
                .filter(|whole| whole.item != listener.item);
            let other = at
                .insert(
                    (listener.address, listener.port, listener.protocol),
                    listener,
                )
                .or(whole);
            // The name server's two transports are one line of the file, told once.
            let told = listener.key == "listen" && listener.protocol == Protocol::Tcp;
            if let Some(other) = other.filter(|_| !told) {
                let reason = format!(
                    "{} is taken by {} already",
                    describe(other.address, listener.port, listener.protocol),
                    other.owner
                );
                let remedy =
                    "choose another port or address; several units share a port behind a front";
                self.tell_item(&listener.key, &listener.item, Fault::new(reason, remedy));
            }
        }
        // Units from the pool have addresses of their own, but not where somebody listens everywhere.
        let configuration = self.configuration;
        for unit in configuration.units.values() {
            if !configuration.needs_lease(unit) {
                continue;
            }
            for (index, port) in unit.ports.iter().enumerate() {
                if let Some(whole) = everywhere.taker(None, port.host, port.protocol) {
                    let key = format!("unit.{}.ports", unit.name);
                    let reason = format!(
                        "port {}/{} of all addresses is taken by {}",
                        port.host,
                        protocol_name(port.protocol),
                        whole.owner
                    );
                    let remedy = format!("let {} listen on one address", whole.owner);
                    self.tell_item(&key, &format!("{key}.{index}"), Fault::new(reason, remedy));
                }
            }
        }
    }

    fn privileged(&mut self, listeners: &[Listener]) {
        let first = self.machine.first_port;
        let refused =
            |port: u16| format!("port {port} cannot be used: below {first} they are root's");
        let mut told: HashSet<&str> = HashSet::new();
        for listener in listeners
            .iter()
            .filter(|one| one.port < first && !one.key.ends_with(".ports"))
        {
            if told.insert(&listener.item) {
                let remedy = if listener.key == "listen" {
                    "listen on a port such as 127.0.0.1:5353 (--listen), or run as root".to_owned()
                } else {
                    format!(
                        "use a port such as {}, or run as root",
                        free_port(listener.port)
                    )
                };
                self.tell_item(
                    &listener.key,
                    &listener.item,
                    Fault::new(refused(listener.port), remedy),
                );
            }
        }
        let configuration = self.configuration;
        for unit in configuration.units.values() {
            for (index, port) in unit.ports.iter().enumerate() {
                if port.host < first {
                    let key = format!("unit.{}.ports", unit.name);
                    let suffix = if port.protocol == Protocol::Udp {
                        "/udp"
                    } else {
                        ""
                    };
                    self.tell_item(&key, &format!("{key}.{index}"), Fault::new(
                        refused(port.host),
                        format!(
                            "use a HOST port above {}, such as \"{}:{}{suffix}\", or run as root",
                            first - 1,
                            free_port(port.host),
                            port.guest
                        ),
                    ));
                }
            }
        }
    }

    fn pools(&mut self) {
        let configuration = self.configuration;
        let reserved = configuration.reserved_addresses();
        let needed = configuration
            .units
            .values()
            .filter(|unit| configuration.needs_lease(unit))
            .count();
        let there = crate::address::capacity(configuration.pool.into(), &reserved);
        if (needed as u128) > there {
            self.tell(&["pool"], Fault::new(
                format!("{needed} units need an address, and {} has {there} to give", configuration.pool),
                "choose a larger pool such as 127.78.0.0/16, or give units a fixed `address` with different ports",
            ));
        }
        if let Some(pool) = configuration.pool6 {
            let needed = configuration
                .units
                .values()
                .filter(|unit| configuration.needs_lease6(unit))
                .count();
            let there = crate::address::capacity(pool.into(), &reserved);
            if (needed as u128) > there {
                self.tell(
                    &["pool6"],
                    Fault::new(
                        format!("{needed} units need an address, and {pool} has {there} to give"),
                        "choose a larger pool",
                    ),
                );
            }
        }
        let Some(interface) = &configuration.interface else {
            return;
        };
        if !self.machine.may_add_addresses {
            self.tell(
                &["interface"],
                Fault::new(
                    "adding addresses to an interface needs root (CAP_NET_ADMIN)",
                    "run as root, or leave `interface` out to use loopback addresses",
                ),
            );
        }
        if configuration.pool.network().is_loopback() && needed > 0 {
            self.tell(
                &["pool", "interface"],
                Fault::new(
                    format!(
                        "{} are loopback addresses, which others on {interface} cannot reach",
                        configuration.pool
                    ),
                    "set `pool` to free addresses of the interface's network",
                ),
            );
        }
        if self.machine.look_for_files && !crate::interface::exists(interface) {
            self.tell(
                &["interface"],
                Fault::new(
                    format!("there is no interface {interface} here"),
                    "'ip link' lists the interfaces",
                ),
            );
        }
    }

    fn ceilings(&mut self) {
        let configuration = self.configuration;
        let kept: Vec<&Unit> = configuration
            .units
            .values()
            .filter(|unit| unit.always || unit.min_running > 0)
            .collect();
        if let Some(most) = configuration
            .max_running
            .filter(|most| kept.len() > *most as usize)
        {
            self.tell(&["max_running"], Fault::new(
                format!("{} units are to run all the time (`always`, `min_running`), and {most} may", kept.len()),
                "raise `max_running`",
            ));
        }
        let memory: u64 = kept
            .iter()
            .filter_map(|unit| unit.memory)
            .fold(0, u64::saturating_add);
        if let Some(most) = configuration.max_memory.filter(|most| memory > *most) {
            self.tell(&["max_memory"], Fault::new(
                format!("units that are to run all the time (`always`, `min_running`) take {}, and {} may be used", format_memory(memory), format_memory(most)),
                "raise `max_memory`",
            ));
        }
    }

    fn forwarding(&mut self) {
        let configuration = self.configuration;
        let Forward::To(servers) = &configuration.forward else {
            return;
        };
        for (index, server) in servers.iter().enumerate() {
            let ourselves = configuration.listen.iter().any(|listen| {
                listen.port() == server.port()
                    && (listen.ip() == server.ip()
                        || (listen.ip().is_unspecified() && server.ip().is_loopback()))
            });
            if ourselves {
                self.tell_item(
                    "forward",
                    &format!("forward.{index}"),
                    Fault::new(
                        format!("{server} is this name server itself"),
                        "name another server, or use \"none\"",
                    ),
                );
            } else if server.ip().is_unspecified() {
                self.tell_item(
                    "forward",
                    &format!("forward.{index}"),
                    Fault::new(
                        format!("{} is nobody's address", server.ip()),
                        "name a server such as 192.0.2.1:53",
                    ),
                );
            }
        }
    }

    fn files(&mut self) {
        let configuration = self.configuration;
        for front in configuration.fronts.values() {
            let path = format!("front.{}", front.name);
            self.certificate(&path, front.certificate.as_deref(), front.key.as_deref());
        }
        for unit in configuration.units.values() {
            let path = format!("unit.{}", unit.name);
            self.certificate(&path, unit.certificate.as_deref(), unit.key.as_deref());
            let (source, image) = (format!("{path}.source"), format!("{path}.image"));
            if unit.source.is_absolute() && !unit.source.exists() {
                self.tell(
                    &[&source, &image, &path],
                    Fault::new(
                        format!("there is no {}", unit.source.display()),
                        format!(
                            "paths are relative to {}; 'kiln images' lists stored images",
                            configuration.directory.display()
                        ),
                    ),
                );
            }
            for (index, include) in unit.include.iter().enumerate() {
                if !include.from.exists() {
                    let key = format!("{path}.include");
                    self.tell_item(
                        &key,
                        &format!("{key}.{index}"),
                        Fault::new(
                            format!("there is no {}", include.from.display()),
                            format!(
                                "paths are relative to {}",
                                configuration.directory.display()
                            ),
                        ),
                    );
                }
            }
            for (index, volume) in unit.volumes.iter().enumerate() {
                if volume.host.is_absolute() && !volume.host.is_dir() {
                    let key = format!("{path}.volumes");
                    self.tell_item(
                        &key,
                        &format!("{key}.{index}"),
                        Fault::new(
                            format!("{} is no directory", volume.host.display()),
                            format!("make it first: mkdir -p {}", volume.host.display()),
                        ),
                    );
                }
            }
        }
    }

    fn certificate(&mut self, path: &str, certificate: Option<&Path>, key: Option<&Path>) {
        for (name, file) in [("certificate", certificate), ("key", key)] {
            if let Some(file) = file
                && let Err(error) = std::fs::File::open(file)
            {
                let key = format!("{path}.{name}");
                self.tell(
                    &[&key, path],
                    Fault::new(
                        format!("cannot read {}: {error}", file.display()),
                        format!(
                            "paths are relative to {}",
                            self.configuration.directory.display()
                        ),
                    ),
                );
            }
        }
    }
}

fn describe(address: IpAddr, port: u16, protocol: Protocol) -> String {
    format!(
        "{}/{}",
        SocketAddr::new(address, port),
        protocol_name(protocol)
    )
}

/// A port that looks like a privileged one.
fn free_port(port: u16) -> u16 {
    port.saturating_add(8000)
}

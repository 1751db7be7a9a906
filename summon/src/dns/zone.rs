//! What the name server knows: the units' names, their addresses, and the zones in which nothing else exists.
//!
//! Not for: what is asked of a unit, which is [`Unit`]'s; the wire, which is `answer`'s.
//!
//! Always holds: a zone never changes; a reload puts another in its place. Records are kept as they go onto the wire,
//! so that an answer is a matter of copying.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use hickory_proto::rr::{Name as Parsed, RecordType};
use tokio::sync::oneshot;

use super::name::{self, Key};

/// A unit as the name server sees it.
pub trait Unit: Send + Sync {
    /// Somebody asks for one of the unit's names (A, AAAA or ANY). Cheap: it is called on the way to each answer. Counts
    /// as interest in the unit.
    fn asked(&self) -> Asked;

    /// An answer that had to wait has been sent: for the timeline. Not called for answers given at once.
    fn answered(&self) {}
}

/// What a unit says to a query.
#[derive(Debug)]
pub enum Asked {
    /// Answer with the addresses now.
    Answer,
    /// Answer when told: with the addresses, or with SERVFAIL. A sender that is dropped means SERVFAIL as well.
    Wait(oneshot::Receiver<Result<(), NotReady>>),
    /// SERVFAIL at once: it is backing off, or was stopped by hand.
    Fail,
}

/// Why a unit did not become ready. Goes to clients as the text of an extended error (RFC 8914, code 14).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotReady(pub String);

impl fmt::Display for NotReady {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// One name of a unit.
#[derive(Clone)]
pub struct Name {
    /// Who is asked before an answer is given.
    pub unit: Arc<dyn Unit>,
    /// What is answered.
    pub addresses: Vec<IpAddr>,
    /// For how long the answer may be kept, seconds.
    pub ttl: u32,
}

/// Why a zone cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ZoneError {
    /// Not a domain name.
    #[error(
        "{0:?} is not a domain name: write labels of 1 to 63 letters, digits or hyphens with dots between them, as in \"www.example.org\""
    )]
    NotAName(String),
    /// Given to two units.
    #[error("the name {0:?} is given twice: give each name to one unit")]
    Twice(String),
    /// A star where none can be.
    #[error(
        "{0:?} cannot have a star: only a unit's name can, and only as its whole first label (\"*.example.org\")"
    )]
    Star(String),
}

/// Highest TTL (RFC 2181, 8), seconds.
const LONGEST_TTL: u32 = i32::MAX as u32;
/// Points to the name in the question: it always stands right behind the header (RFC 1035, 4.1.4).
const OWNER_IS_QUESTION: [u8; 2] = [0xc0, 12];
/// Most addresses of one kind at one name: more would not fit into any answer.
const MOST_ADDRESSES: usize = 2048;

/// Records of one name and type, ready for an answer.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    /// How many.
    pub count: u16,
    /// One behind the other, each with its owner.
    pub bytes: Box<[u8]>,
}

impl Records {
    fn new<const N: usize>(owner: &[u8], kind: RecordType, ttl: u32, all: &[[u8; N]]) -> Self {
        let all = &all[..all.len().min(MOST_ADDRESSES)];
        let mut bytes = Vec::with_capacity(all.len() * (owner.len() + 10 + N));
        for data in all {
            bytes.extend_from_slice(owner);
            bytes.extend(without_owner(kind, ttl, data));
        }
        Self {
            count: all.len() as u16,
            bytes: bytes.into(),
        }
    }

    fn addresses(owner: &[u8], ttl: u32, all: &[IpAddr]) -> [Self; 2] {
        let v4: Vec<_> = all
            .iter()
            .filter_map(|address| match address {
                IpAddr::V4(address) => Some(address.octets()),
                IpAddr::V6(_) => None,
            })
            .collect();
        let v6: Vec<_> = all
            .iter()
            .filter_map(|address| match address {
                IpAddr::V6(address) => Some(address.octets()),
                IpAddr::V4(_) => None,
            })
            .collect();
        [
            Self::new(owner, RecordType::A, ttl, &v4),
            Self::new(owner, RecordType::AAAA, ttl, &v6),
        ]
    }
}

/// A record behind its owner's name: type, class, TTL, length, data (RFC 1035, 4.1.3).
fn without_owner(kind: RecordType, ttl: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(10 + data.len());
    bytes.extend(u16::from(kind).to_be_bytes());
    bytes.extend([0, 1]);
    bytes.extend(ttl.min(LONGEST_TTL).to_be_bytes());
    bytes.extend((data.len() as u16).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// What is known at one name.
#[derive(Default)]
pub(super) struct Node {
    /// Who is asked first.
    pub unit: Option<Arc<dyn Unit>>,
    /// Its IPv4 addresses.
    pub v4: Records,
    /// Its IPv6 addresses.
    pub v6: Records,
    /// The name of the address that this name stands for.
    pub pointer: Option<Box<[u8]>>,
    /// The name begins a zone: it has SOA and NS.
    pub apex: bool,
}

/// Where a name belongs.
pub(super) enum Found<'a> {
    /// It exists; and where in it the name of its zone begins.
    Node(&'a Node, usize),
    /// It does not exist, in a zone of ours, whose name begins there in it.
    Missing(usize),
    /// Not ours.
    Foreign,
}

/// Everything that the name server knows. Immutable.
pub struct Zone {
    names: HashMap<Key, Node>,
    /// By what stands behind the star.
    wildcards: HashMap<Key, Node>,
    /// Zones in which nothing exists but what is said here.
    zones: HashSet<Key>,
    /// SOA, without owner: the same for all.
    pub(super) authority: Box<[u8]>,
    /// SOA as it is in negative answers: with the lower TTL (RFC 2308, 3).
    pub(super) negative: Box<[u8]>,
    /// NS, without owner.
    pub(super) server: Box<[u8]>,
    /// The addresses of the server named by NS.
    pub(super) glue: [Records; 2],
}

impl Zone {
    /// To make one.
    pub fn builder() -> ZoneBuilder {
        ZoneBuilder::default()
    }

    /// How many names units have.
    pub fn names(&self) -> usize {
        let units =
            |all: &HashMap<Key, Node>| all.values().filter(|node| node.unit.is_some()).count();
        units(&self.names) + units(&self.wildcards)
    }

    /// The key of the nearest zone around a name, as the place where its name begins.
    fn enclosing(&self, key: &[u8]) -> Option<usize> {
        if self.zones.is_empty() {
            return None;
        }
        std::iter::once(0)
            .chain(name::ancestors(key))
            .find(|&at| key.get(at..).is_some_and(|tail| self.zones.contains(tail)))
    }

    pub(super) fn find(&self, key: &[u8]) -> Found<'_> {
        if let Some(node) = self.names.get(key) {
            let zone = if node.apex {
                0
            } else {
                self.enclosing(key).unwrap_or(0)
            };
            return Found::Node(node, zone);
        }
        if !self.wildcards.is_empty() {
            for at in name::ancestors(key) {
                let Some(tail) = key.get(at..) else { break };
                if let Some(node) = self.wildcards.get(tail) {
                    return Found::Node(node, self.enclosing(key).unwrap_or(0));
                }
                // A star stands only for what is right below the nearest name that exists (RFC 4592, 3.3.1).
                if self.names.contains_key(tail) {
                    break;
                }
            }
        }
        match self.enclosing(key) {
            Some(at) => Found::Missing(at),
            None => Found::Foreign,
        }
    }
}

impl fmt::Debug for Zone {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Zone")
            .field("names", &self.names())
            .field("zones", &self.zones.len())
            .finish_non_exhaustive()
    }
}

impl Default for Zone {
    /// One in which there is nothing.
    fn default() -> Self {
        Self::builder().build()
    }
}

/// Makes a [`Zone`].
pub struct ZoneBuilder {
    names: HashMap<Key, Node>,
    wildcards: HashMap<Key, Node>,
    reverse: HashMap<IpAddr, (Key, u32)>,
    zones: HashSet<Key>,
    primary: Key,
    primary_addresses: Vec<IpAddr>,
    hostmaster: Key,
    serial: u32,
    ttl: u32,
    negative_ttl: u32,
}

impl Default for ZoneBuilder {
    fn default() -> Self {
        Self {
            names: HashMap::new(),
            wildcards: HashMap::new(),
            reverse: HashMap::new(),
            zones: HashSet::new(),
            // `internal` is nobody's, for ever (ICANN resolution 2024.07.29.06).
            primary: (*b"\x02ns\x04kiln\x08internal\0").into(),
            primary_addresses: Vec::new(),
            hostmaster: (*b"\x0ahostmaster\x04kiln\x08internal\0").into(),
            serial: 1,
            ttl: 60,
            negative_ttl: 60,
        }
    }
}

impl ZoneBuilder {
    /// Adds a unit's name, `*.example.org` included. Its addresses get it as their name (PTR), unless they have one.
    /// The first name given for an address is the one.
    pub fn name(&mut self, text: &str, name: Name) -> Result<&mut Self, ZoneError> {
        let key = parse(text)?;
        let [v4, v6] = Records::addresses(&OWNER_IS_QUESTION, name.ttl, &name.addresses);
        let node = Node {
            unit: Some(name.unit),
            v4,
            v6,
            ..Node::default()
        };
        let twice = || Err(ZoneError::Twice(text.into()));
        if let Some(parent) = name::below_star(&key) {
            no_star(text, parent)?;
            if self.wildcards.contains_key(parent) {
                return twice();
            }
            self.wildcards.insert(parent.into(), node);
            return Ok(self);
        }
        no_star(text, &key)?;
        if self.names.contains_key(&key) {
            return twice();
        }
        for address in name.addresses {
            self.reverse
                .entry(address)
                .or_insert_with(|| (key.clone(), name.ttl));
        }
        self.names.insert(key, node);
        Ok(self)
    }

    /// Gives an address its name (PTR), whatever names it has.
    pub fn reverse(
        &mut self,
        address: IpAddr,
        text: &str,
        ttl: u32,
    ) -> Result<&mut Self, ZoneError> {
        let key = parse(text)?;
        no_star(text, &key)?;
        self.reverse.insert(address, (key, ttl));
        Ok(self)
    }

    /// Nothing exists below this name but what is said here: NXDOMAIN instead of forwarding. Without any, each unit's
    /// name is a zone of its own, and nothing beside it is claimed.
    pub fn authoritative(&mut self, text: &str) -> Result<&mut Self, ZoneError> {
        let key = parse(text)?;
        no_star(text, &key)?;
        self.zones.insert(key);
        Ok(self)
    }

    /// This name server's own name, as SOA and NS give it, and its addresses. Default: `ns.kiln.internal`, none.
    pub fn primary(&mut self, text: &str, addresses: &[IpAddr]) -> Result<&mut Self, ZoneError> {
        let key = parse(text)?;
        no_star(text, &key)?;
        self.primary = key;
        self.primary_addresses = addresses.to_vec();
        Ok(self)
    }

    /// Who is responsible: a mail address with a dot for the `@`. Default: `hostmaster.kiln.internal`.
    pub fn hostmaster(&mut self, text: &str) -> Result<&mut Self, ZoneError> {
        let key = parse(text)?;
        no_star(text, &key)?;
        self.hostmaster = key;
        Ok(self)
    }

    /// The serial number in SOA: higher with each reload. Default: 1.
    pub fn serial(&mut self, serial: u32) -> &mut Self {
        self.serial = serial;
        self
    }

    /// How long SOA and NS may be kept, seconds. Default: 60.
    pub fn ttl(&mut self, ttl: u32) -> &mut Self {
        self.ttl = ttl.min(LONGEST_TTL);
        self
    }

    /// How long "there is no such name" may be kept (RFC 2308), seconds. Default: 60.
    pub fn negative_ttl(&mut self, ttl: u32) -> &mut Self {
        self.negative_ttl = ttl.min(LONGEST_TTL);
        self
    }

    /// The zone.
    pub fn build(self) -> Zone {
        let Self {
            mut names,
            wildcards,
            reverse,
            zones,
            primary,
            primary_addresses,
            hostmaster,
            serial,
            ttl,
            negative_ttl,
        } = self;

        for (address, (name, ttl)) in reverse {
            let node = names.entry(name::key(&Parsed::from(address))).or_default();
            node.pointer = Some(without_owner(RecordType::PTR, ttl, &name).into());
        }
        let at_primary = names.entry(primary.clone()).or_default();
        if at_primary.unit.is_none() {
            [at_primary.v4, at_primary.v6] =
                Records::addresses(&OWNER_IS_QUESTION, ttl, &primary_addresses);
        }
        for zone in &zones {
            names.entry(zone.clone()).or_default();
        }
        // Between a zone and the names in it there is something, too, though nothing is known of it (RFC 8020).
        let stars = wildcards
            .keys()
            .map(|parent| [b"\x01*", &parent[..]].concat());
        let inside: Vec<Key> = names
            .keys()
            .map(|key| key.to_vec())
            .chain(stars)
            .flat_map(|key| between(&zones, &key))
            .collect();
        for key in inside {
            names.entry(key).or_default();
        }
        for (key, node) in &mut names {
            node.apex =
                zones.contains(key) || !name::ancestors(key).any(|at| zones.contains(&key[at..]));
        }
        names.shrink_to_fit();

        let mut data = [&primary[..], &hostmaster[..]].concat();
        // Refresh, retry and expire are for secondary servers, of which there are none: RFC 1912's usual figures.
        for number in [serial, 3600, 600, 604_800, negative_ttl] {
            data.extend(number.to_be_bytes());
        }
        Zone {
            authority: without_owner(RecordType::SOA, ttl, &data).into(),
            negative: without_owner(RecordType::SOA, ttl.min(negative_ttl), &data).into(),
            server: without_owner(RecordType::NS, ttl, &primary).into(),
            glue: Records::addresses(&primary, ttl, &primary_addresses),
            names,
            wildcards,
            zones,
        }
    }
}

/// The names between one and the zone in which it is.
fn between(zones: &HashSet<Key>, key: &[u8]) -> Vec<Key> {
    let mut all = Vec::new();
    for at in name::ancestors(key) {
        let tail = &key[at..];
        if zones.contains(tail) {
            return all;
        }
        all.push(tail.into());
    }
    Vec::new()
}

fn parse(text: &str) -> Result<Key, ZoneError> {
    name::parse(text).ok_or_else(|| ZoneError::NotAName(text.into()))
}

fn no_star(text: &str, key: &[u8]) -> Result<(), ZoneError> {
    if key.contains(&b'*') {
        return Err(ZoneError::Star(text.into()));
    }
    Ok(())
}

//! Flags of the command line: single units in one line, and what replaces keys of the file.

use super::{
    problem::Fault,
    reader::UNIT_KEYS,
    text::nearest,
    value::{Entry, Mark, Node, Sources, Value},
};

/// Flags of `kiln summon` as they were written. What is there replaces what the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `--listen`, may be repeated.
    pub listen: Vec<String>,
    /// `--forward`, may be repeated.
    pub forward: Vec<String>,
    /// `--forward-for`, may be repeated.
    pub forward_for: Vec<String>,
    /// `--zone`, may be repeated.
    pub zones: Vec<String>,
    /// `--ttl`.
    pub ttl: Option<String>,
    /// `--pool`.
    pub pool: Option<String>,
    /// `--pool6`.
    pub pool6: Option<String>,
    /// `--interface`.
    pub interface: Option<String>,
    /// `--metrics`.
    pub metrics: Option<String>,
    /// `--max-running`.
    pub max_running: Option<String>,
    /// `--max-memory`.
    pub max_memory: Option<String>,
    /// `--unit`, may be repeated: whole units, see [`super::Configuration::parse_unit`]. They are added to those of the file.
    pub units: Vec<String>,
}

impl Overrides {
    /// As entries of a file.
    pub(super) fn entries(&self, sources: &mut Sources<'_>) -> Vec<Entry> {
        let lists = [
            ("listen", "--listen", &self.listen),
            ("forward", "--forward", &self.forward),
            ("forward_for", "--forward-for", &self.forward_for),
            ("zones", "--zone", &self.zones),
        ];
        let singles = [
            ("ttl", "--ttl", &self.ttl),
            ("pool", "--pool", &self.pool),
            ("pool6", "--pool6", &self.pool6),
            ("interface", "--interface", &self.interface),
            ("metrics", "--metrics", &self.metrics),
            ("max_running", "--max-running", &self.max_running),
            ("max_memory", "--max-memory", &self.max_memory),
        ];
        let mut all = Vec::new();
        for (name, flag, texts) in lists {
            if !texts.is_empty() {
                let mark = sources.add_named(flag);
                all.push(entry(name, mark, texts.clone()));
            }
        }
        for (name, flag, text) in singles {
            if let Some(text) = text {
                let mark = sources.add_named(flag);
                all.push(entry(name, mark, vec![text.clone()]));
            }
        }
        all
    }
}

/// A unit in one line, taken apart.
pub struct UnitFlag {
    /// Its name, as far as one is said or can be made from its first DNS name.
    pub name: Option<String>,
    /// The line as a place.
    pub mark: Mark,
    /// Its keys.
    pub entries: Vec<Entry>,
}

/// Names that a flag may use for keys of the file, beside the keys themselves.
const OTHER_NAMES: [(&str, &str); 6] = [
    ("port", "ports"),
    ("argument", "arguments"),
    ("env", "environment"),
    ("volume", "volumes"),
    ("name", "name"),
    ("fronts", "front"),
];

/// Takes apart `dns=www.example.org,image=site.kiln,port=80`: keys of a unit, repeated where several values are meant. `\,` is
/// a comma in a value, `\\` a backslash.
pub fn unit(text: &str, sources: &mut Sources<'_>) -> UnitFlag {
    let mark = sources.add_named(format!("--unit {text}"));
    let mut name = None;
    let mut grouped: Vec<(&'static str, Vec<String>)> = Vec::new();
    for part in split(text) {
        let (written, value) = match part.split_once('=') {
            Some((written, value)) => (written.trim(), value),
            // `always` says enough.
            None => (part.trim(), "true"),
        };
        let word = written.replace('-', "_");
        let key = OTHER_NAMES
            .iter()
            .find(|(other, _)| *other == word)
            .map(|(_, key)| *key)
            .or_else(|| UNIT_KEYS.iter().find(|key| **key == word).copied());
        let Some(key) = key else {
            let known = UNIT_KEYS.iter().copied().chain(["port", "name"]);
            let remedy = match nearest(&word, known) {
                Some(near) => format!("did you mean `{near}`?"),
                None => "write KEY=VALUE,KEY=VALUE, such as dns=www.example.org,image=site.kiln,port=80; a comma in a value is written \\,".to_owned(),
            };
            let fault = Fault::new("unknown key", remedy);
            sources.tell(mark, written, fault);
            continue;
        };
        if key == "name" {
            name = Some(value.to_owned());
            continue;
        }
        match grouped.iter_mut().find(|(other, _)| *other == key) {
            Some((_, values)) => values.push(value.to_owned()),
            None => grouped.push((key, vec![value.to_owned()])),
        }
    }
    if name.is_none() {
        let dns = grouped.iter().find(|(key, _)| *key == "dns");
        name = dns.and_then(|(_, names)| names.first()).map(|name| {
            let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
            name.strip_prefix("*.").map_or(name.clone(), str::to_owned)
        });
    }
    let entries = grouped
        .into_iter()
        .map(|(key, values)| entry(key, mark, values))
        .collect();
    UnitFlag {
        name,
        mark,
        entries,
    }
}

fn entry(name: &str, mark: Mark, values: Vec<String>) -> Entry {
    let mut nodes: Vec<Node> = values
        .into_iter()
        .map(|value| Node {
            mark,
            value: Value::Flag(value),
        })
        .collect();
    let node = if nodes.len() == 1 {
        nodes.remove(0)
    } else {
        Node {
            mark,
            value: Value::List(nodes),
        }
    };
    Entry {
        name: name.to_owned(),
        mark,
        node,
    }
}

fn split(text: &str) -> Vec<String> {
    let mut parts = vec![];
    let mut part = String::new();
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' => match letters.next() {
                Some(escaped @ (',' | '\\')) => part.push(escaped),
                Some(other) => part.extend(['\\', other]),
                None => part.push('\\'),
            },
            ',' => parts.push(std::mem::take(&mut part)),
            other => part.push(other),
        }
    }
    parts.push(part);
    parts.retain(|part| !part.trim().is_empty());
    parts
}

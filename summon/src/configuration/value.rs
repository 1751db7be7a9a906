//! The values of a file or of flags as a tree that remembers where each was written.
//!
//! Flags become the same tree as a file, so everything behind reads one form. Offsets become lines only when a problem
//! is told: most files have none.

use std::{path::Path, sync::Arc};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::problem::{Fault, Place, Problem, Problems};

/// Most problems that are told: who has more has another kind of file.
const MAX_PROBLEMS: usize = 100;

/// Where a value was written: in which source, and how many bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    source: usize,
    offset: usize,
}

/// A value and where it was written.
#[derive(Clone, Debug)]
pub struct Node {
    /// Where.
    pub mark: Mark,
    /// What.
    pub value: Value,
}

/// A value.
#[derive(Clone, Debug)]
pub enum Value {
    /// A string of a file.
    Text(String),
    /// What a flag says: a string that stands for any kind of value.
    Flag(String),
    /// A whole number.
    Integer(i128),
    /// True or false.
    Boolean(bool),
    /// Several values.
    List(Vec<Node>),
    /// Values with names.
    Table(Vec<Entry>),
    /// What no key takes.
    Other(&'static str),
}

impl Value {
    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) | Self::Flag(_) => "a string",
            Self::Integer(_) => "a number",
            Self::Boolean(_) => "true or false",
            Self::List(_) => "a list",
            Self::Table(_) => "a table",
            Self::Other(kind) => kind,
        }
    }
}

/// A key with its value.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The key.
    pub name: String,
    /// Where the key stands.
    pub mark: Mark,
    /// The value.
    pub node: Node,
}

/// A text that values come from.
enum Source<'a> {
    File { origin: Arc<str>, text: &'a str },
    Named { origin: Arc<str> },
}

/// All sources, and all problems found in them.
#[derive(Default)]
pub struct Sources<'a> {
    sources: Vec<Source<'a>>,
    problems: Problems,
    more: usize,
}

impl<'a> Sources<'a> {
    /// A source without lines: a flag.
    pub fn add_named(&mut self, origin: impl Into<Arc<str>>) -> Mark {
        self.sources.push(Source::Named {
            origin: origin.into(),
        });
        Mark {
            source: self.sources.len() - 1,
            offset: 0,
        }
    }

    /// The entries of a TOML file. Mistakes of syntax are noted; what could be read is returned all the same.
    pub fn add_file(&mut self, text: &'a str, path: &Path) -> Vec<Entry> {
        self.sources.push(Source::File {
            origin: path.display().to_string().into(),
            text,
        });
        let source = self.sources.len() - 1;
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            let offset = error.span().map_or(0, |span| span.start);
            let reason = error.message().trim().to_string();
            self.tell(Mark { source, offset }, "", reason.into());
        }
        entries(table.get_ref(), source)
    }

    /// Notes a problem.
    pub fn tell(&mut self, mark: Mark, key: &str, fault: Fault) {
        if self.problems.list.len() >= MAX_PROBLEMS {
            self.more += 1;
            return;
        }
        let place = self.place(mark);
        self.problems.list.push(Problem {
            place,
            key: key.to_owned(),
            reason: fault.reason,
            remedy: fault.remedy,
        });
    }

    /// Whether no more problems are taken.
    pub fn is_full(&self) -> bool {
        self.problems.list.len() >= MAX_PROBLEMS
    }

    /// Whether none was found.
    pub fn is_fine(&self) -> bool {
        self.problems.list.is_empty()
    }

    /// Where a mark is, for people.
    pub fn place(&self, mark: Mark) -> Place {
        match self.sources.get(mark.source) {
            Some(Source::Named { origin }) => Place::named(Arc::clone(origin)),
            Some(Source::File { origin, text }) => {
                let before = text.get(..mark.offset).unwrap_or(text);
                let line_start = before.rfind('\n').map_or(0, |at| at + 1);
                let column = before.get(line_start..).unwrap_or("").chars().count() + 1;
                Place {
                    origin: Arc::clone(origin),
                    position: Some((before.matches('\n').count() + 1, column)),
                }
            }
            None => Place::named("summoner"),
        }
    }

    /// All problems in order, or none.
    pub fn into_result(self) -> Result<(), Problems> {
        let mut problems = self.problems;
        if problems.list.is_empty() {
            return Ok(());
        }
        problems.sort();
        if self.more > 0
            && let Some(last) = problems.list.last()
        {
            let more = Problem {
                place: Place::named(Arc::clone(&last.place.origin)),
                key: String::new(),
                reason: format!("and {} more problems", self.more),
                remedy: None,
            };
            problems.list.push(more);
        }
        Err(problems)
    }
}

/// The parser limits how deep tables and lists lie in each other, so this ends.
fn entries(table: &DeTable<'_>, source: usize) -> Vec<Entry> {
    table
        .iter()
        .map(|(key, value)| Entry {
            name: key.get_ref().to_string(),
            mark: Mark {
                source,
                offset: key.span().start,
            },
            node: node(value, source),
        })
        .collect()
}

fn node(value: &Spanned<DeValue<'_>>, source: usize) -> Node {
    let mark = Mark {
        source,
        offset: value.span().start,
    };
    let value = match value.get_ref() {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(number) => match i128::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::Integer(number),
            Err(_) => Value::Other("a number that is too large"),
        },
        DeValue::Boolean(value) => Value::Boolean(*value),
        DeValue::Float(_) => Value::Other("a number with a fraction"),
        DeValue::Datetime(_) => Value::Other("a date"),
        DeValue::Array(items) => Value::List(items.iter().map(|item| node(item, source)).collect()),
        DeValue::Table(table) => Value::Table(entries(table, source)),
    };
    Node { mark, value }
}

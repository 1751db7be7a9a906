//! What is wrong with a configuration: all of it, each with its place, key and remedy.

use std::{error::Error, fmt, path::Path, sync::Arc};

/// Where something was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file as it was named, or the flag with its text, such as `--unit dns=x`.
    pub origin: Arc<str>,
    /// Line and column in the file, counted from 1 (columns in characters).
    pub position: Option<(usize, usize)>,
}

impl Place {
    /// A flag, or something else without lines.
    #[must_use]
    pub fn named(origin: impl Into<Arc<str>>) -> Self {
        Self {
            origin: origin.into(),
            position: None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.origin)?;
        match self.position {
            Some((line, column)) => write!(formatter, ":{line}:{column}"),
            None => Ok(()),
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub place: Place,
    /// The key, such as `unit.www.ports`; empty: none, as for a file that is no TOML.
    pub key: String,
    /// What is wrong.
    pub reason: String,
    /// What to do.
    pub remedy: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: ", self.place)?;
        if !self.key.is_empty() {
            write!(formatter, "`{}`: ", self.key)?;
        }
        formatter.write_str(&self.reason)?;
        match &self.remedy {
            Some(remedy) => write!(formatter, " (help: {remedy})"),
            None => Ok(()),
        }
    }
}

/// Everything that is wrong with a configuration, in the order of the file. Displayed with one line for each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems {
    /// Never empty in an error.
    pub list: Vec<Problem>,
}

impl Problems {
    /// Puts the problems into the order of the file; those without a line come last.
    pub(super) fn sort(&mut self) {
        self.list
            .sort_by_key(|problem| problem.place.position.unwrap_or((usize::MAX, 0)));
        self.list.dedup();
    }

    /// A single problem of a file as a whole.
    pub(super) fn of_file(path: &Path, reason: String, remedy: &str) -> Self {
        Self {
            list: vec![Problem {
                place: Place::named(path.display().to_string()),
                key: String::new(),
                reason,
                remedy: Some(remedy.to_owned()),
            }],
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.list.iter().enumerate() {
            if index > 0 {
                formatter.write_str("\n")?;
            }
            problem.fmt(formatter)?;
        }
        Ok(())
    }
}

impl Error for Problems {}

/// What is wrong with a value, before its place is known.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    /// What is wrong.
    pub reason: String,
    /// What to do.
    pub remedy: Option<String>,
}

impl Fault {
    /// With a remedy.
    pub fn new(reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            remedy: Some(remedy.into()),
        }
    }
}

impl From<String> for Fault {
    fn from(reason: String) -> Self {
        Self {
            reason,
            remedy: None,
        }
    }
}

impl From<kiln_monitor::Error> for Fault {
    fn from(error: kiln_monitor::Error) -> Self {
        Self {
            reason: error.to_string(),
            remedy: error.help(),
        }
    }
}

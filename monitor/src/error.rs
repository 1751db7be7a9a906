//! Why something about an instance failed, and what to do about it.

use std::io;

use serde::{Deserialize, Serialize};

use crate::engine::{StartError, Unavailable};

/// Whose turn it is to change something. Decides the command's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What the user asked for cannot be right: an argument, a name, a file.
    Input,
    /// The request is right, but this machine does not allow it now: a port in use, a program that is missing.
    Environment,
}

/// Errors of this crate. The message names the cause, [`Error::help`] the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something the user wrote cannot be understood.
    #[error("{what}")]
    Input {
        /// What is wrong.
        what: String,
        /// What would be right.
        help: String,
    },
    /// The machine refused something.
    #[error("{what}")]
    Environment {
        /// What is wrong.
        what: String,
        /// What to do.
        help: String,
    },
    /// A system call on a file of ours failed.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried, with the path.
        action: String,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// No engine, or not the wanted one.
    #[error(transparent)]
    Engine(#[from] Unavailable),
    /// The engine refused to start the image.
    #[error("cannot start the image: {}", with_cause(.0))]
    Start(StartError),
    /// A file of the state directory does not hold what it should.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The kernel broke the link's protocol.
    #[error("the kernel sent something that the link's protocol does not allow: {0}")]
    Protocol(String),
}

/// Why something cannot be, as one process tells it to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error("{message}")]
pub struct Refusal {
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub help: Option<String>,
    /// What was asked for cannot be right; else it fails here and now.
    pub input: bool,
}

impl From<&Error> for Refusal {
    fn from(error: &Error) -> Self {
        Self {
            message: error.to_string(),
            help: error.help(),
            input: error.kind() == Kind::Input,
        }
    }
}

fn with_cause(error: &StartError) -> String {
    match &error.source {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

impl From<StartError> for Error {
    fn from(error: StartError) -> Self {
        Error::Start(error)
    }
}

impl Error {
    /// For `map_err`: says what was tried when `error` came.
    pub fn io<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Error {
        let action = action.into();
        move |error| Error::Io {
            action,
            source: error.into(),
        }
    }

    /// A mistake in what the user wrote.
    pub fn input(what: impl Into<String>, help: impl Into<String>) -> Error {
        Error::Input {
            what: what.into(),
            help: help.into(),
        }
    }

    /// Something that this machine does not allow now.
    pub fn environment(what: impl Into<String>, help: impl Into<String>) -> Error {
        Error::Environment {
            what: what.into(),
            help: help.into(),
        }
    }

    /// Whose turn it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Error::Input { .. } => Kind::Input,
            _ => Kind::Environment,
        }
    }

    /// What to do, if something can be done.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        match self {
            Error::Input { help, .. } | Error::Environment { help, .. } => Some(help.clone()),
            Error::Engine(unavailable) => Some(unavailable.remedy.clone()),
            Error::Start(error) => error.remedy.clone(),
            Error::Damaged { path, .. } => Some(format!("remove {path}, or the instance it belongs to with 'kiln rm -f'")),
            Error::Protocol(_) => {
                Some("this is a fault in Kiln: please report it with the instance's log ('kiln logs')".to_owned())
            }
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    Some("set KILN_STATE to a directory that you may write to, or change the permissions".to_owned())
                }
                io::ErrorKind::StorageFull => Some("free some disk space".to_owned()),
                _ => None,
            },
        }
    }
}

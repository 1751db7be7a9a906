//! What can go wrong, with the remedy.
//!
//! The text of an error names the file, key or value concerned; [`Error::remedy`] says what to do.

use std::{io, path::PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose turn it is when something failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The input is wrong: the user changes it. Exit code 2.
    Input,
    /// The machine did not do what was asked of it. Exit code 1.
    System,
}

/// Why an image could not be built, stored or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {action} {}: {cause}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The source is not there.
    #[error("{} does not exist", path.display())]
    NoSource {
        /// As given.
        path: PathBuf,
    },
    /// The source is there, but nothing that an image can be made from.
    #[error("{}: {reason}", path.display())]
    BadSource {
        /// As given.
        path: PathBuf,
        /// What was looked for or found.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// `kiln.toml` is wrong.
    #[error("{}:{line}:{column}: {reason}", path.display())]
    Project {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What is wrong.
        reason: String,
        /// What to do.
        remedy: Option<String>,
    },
    /// A value on the command line is wrong.
    #[error("{what} `{value}`: {reason}")]
    Value {
        /// Which value.
        what: &'static str,
        /// As given.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A program or library cannot be used.
    #[error("{}: {reason}", path.display())]
    Program {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// A library that a program needs is nowhere.
    #[error("{} needs {library}, which is not in {}", needed_by.display(), searched.join(", "))]
    MissingLibrary {
        /// Its name.
        library: String,
        /// Who needs it.
        needed_by: PathBuf,
        /// Directories that were looked into.
        searched: Vec<String>,
    },
    /// Two things want the same path in the image.
    #[error("{path} in the image: {reason}")]
    Tree {
        /// Path in the image.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// A file changed while it was being packed.
    #[error("{} changed while it was being packed", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The image file is not one, or damaged.
    #[error("{}: {reason}", path.display())]
    BadImage {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No such image in the store.
    #[error("no image `{reference}`")]
    NoImage {
        /// As given: a name, or the start of a digest.
        reference: String,
    },
    /// The start of a digest fits several images.
    #[error("`{reference}` fits {count} images")]
    Ambiguous {
        /// As given.
        reference: String,
        /// How many.
        count: usize,
    },
    /// The image cannot be written where it should be.
    #[error("cannot write {}: {reason}", path.display())]
    Output {
        /// As given.
        path: PathBuf,
        /// Why not.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The kernel or the VM shim built into this command cannot be put into an image.
    #[error("the built-in {what}: {reason}")]
    Guest {
        /// Which of them.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// Shorthand for `map_err`.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |cause| Self::Io {
            action,
            path,
            cause,
        }
    }

    /// Whether the input or the machine is to blame.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Io { cause, .. } => match cause.kind() {
                io::ErrorKind::NotFound
                | io::ErrorKind::PermissionDenied
                | io::ErrorKind::IsADirectory
                | io::ErrorKind::NotADirectory => Kind::Input,
                _ => Kind::System,
            },
            Self::Changed { .. } | Self::Guest { .. } => Kind::System,
            _ => Kind::Input,
        }
    }

    /// What the user can do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::Io { cause, .. } => match cause.kind() {
                io::ErrorKind::PermissionDenied => {
                    "let your user read it (chmod, chown), or run the command as its owner".into()
                }
                io::ErrorKind::StorageFull => "free some space there".into(),
                _ => return None,
            },
            Self::NoSource { .. } => {
                "give a program, a directory with kiln.toml or index.html, an image file, or the name of a stored image".into()
            }
            Self::BadSource { remedy, .. } | Self::Program { remedy, .. } => remedy.clone(),
            Self::Project { remedy, .. } => return remedy.clone(),
            Self::MissingLibrary { library, .. } => {
                format!("install the package that has {library}, or add it with --include FILE:/usr/lib/{library}")
            }
            Self::Tree { .. } => "change the destinations of `include`".into(),
            Self::Changed { .. } => "build again when nothing writes to it".into(),
            Self::BadImage { .. } => "build the image again with `kiln build`".into(),
            Self::NoImage { .. } => "`kiln images` lists the stored images".into(),
            Self::Ambiguous { .. } => "give more digits of the digest".into(),
            Self::Guest { .. } => "build kiln again".into(),
            Self::Output { remedy, .. } => (*remedy).into(),
            Self::Value { .. } => return None,
        })
    }
}

//! What an image says about its program.
//!
//! An image holds it twice: as JSON for people and tools ([`Manifest`]), and, as far as the kernel needs it, in
//! postcard's encoding ([`Program`]), which takes a kernel that starts cold a tenth of the instructions to read.

use alloc::{collections::BTreeMap, string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// Version of the manifest's format that this crate writes.
pub const FORMAT: u32 = 2;

/// The manifest of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Name of the image, as `kiln images` shows it.
    pub name: String,
    /// Absolute path of the program in the root.
    pub program: String,
    /// Arguments after the program's name.
    #[serde(default)]
    pub arguments: Vec<String>,
    /// Environment, by name.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Working directory.
    pub working_directory: String,
    /// Who the program runs as.
    #[serde(default)]
    pub user: User,
    /// Memory in bytes when a run says nothing else.
    pub memory: u64,
    /// Ports that the program serves.
    #[serde(default)]
    pub ports: Vec<Port>,
    /// Directories meant to be volumes.
    #[serde(default)]
    pub volumes: Vec<String>,
    /// Where the contents come from.
    #[serde(default)]
    pub provenance: Vec<Provenance>,
}

/// What the kernel needs of a manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// [`Manifest::program`].
    pub path: String,
    /// [`Manifest::arguments`].
    pub arguments: Vec<String>,
    /// [`Manifest::environment`], in order of names.
    pub environment: Vec<(String, String)>,
    /// [`Manifest::working_directory`].
    pub working_directory: String,
    /// [`Manifest::user`].
    pub user: User,
}

impl Manifest {
    /// What the kernel needs of it.
    #[must_use]
    pub fn program(&self) -> Program {
        let environment = self.environment.iter();
        Program {
            path: self.program.clone(),
            arguments: self.arguments.clone(),
            environment: environment
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect(),
            working_directory: self.working_directory.clone(),
            user: self.user,
        }
    }
}

impl Program {
    /// The bytes as they lie in the image.
    ///
    /// # Errors
    ///
    /// None that is known: postcard's signature has one.
    pub fn to_bytes(&self) -> Result<Vec<u8>, postcard::Error> {
        postcard::to_allocvec(self)
    }

    /// Reads what [`Program::to_bytes`] wrote.
    ///
    /// # Errors
    ///
    /// The bytes are something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, postcard::Error> {
        postcard::from_bytes(bytes)
    }
}

/// Numeric identity of the program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A port of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// Number.
    pub number: u16,
    /// Transport.
    pub protocol: Protocol,
}

/// Transport protocol of a port.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// One source of an image's contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// What it is: a path, `deb:NAME=VERSION`, an OCI reference.
    pub source: String,
    /// SHA-256 of it, in lower-case hexadecimal.
    pub sha256: String,
}

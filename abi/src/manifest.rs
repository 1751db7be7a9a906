//! What an image says about its program.
//!
//! An image holds it twice: as JSON for people and tools ([`Manifest`]), and, as far as the kernel needs it, in the form that
//! a kernel reads when it boots ([`Program`], [`crate::encoding`]).

use alloc::{collections::BTreeMap, string::String, vec, vec::Vec};
use serde::{Deserialize, Serialize};

use crate::encoding::{Error, Reader, Writer};

/// Version of the manifest's format that this crate writes, and of what kernels of such images read when they boot.
pub const FORMAT: u32 = 3;

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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    /// [`Manifest::program`].
    pub path: String,
    /// All arguments: the program's name, which is its path, and [`Manifest::arguments`].
    pub arguments: Vec<String>,
    /// [`Manifest::environment`] as the program gets it: `NAME=value`, in order of names.
    pub environment: Vec<String>,
    /// [`Manifest::working_directory`].
    pub working_directory: String,
    /// [`Manifest::user`].
    pub user: User,
}

impl Manifest {
    /// What the kernel needs of it.
    #[must_use]
    pub fn program(&self) -> Program {
        let mut arguments = vec![self.program.clone()];
        arguments.extend_from_slice(&self.arguments);
        let environment = self.environment.iter();
        Program {
            path: self.program.clone(),
            arguments,
            environment: environment
                .map(|(name, value)| [name, "=", value].concat())
                .collect(),
            working_directory: self.working_directory.clone(),
            user: self.user,
        }
    }
}

impl Program {
    /// The bytes as they lie in the image.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.text(&self.path);
        writer.texts(&self.arguments);
        writer.texts(&self.environment);
        writer.text(&self.working_directory);
        self.user.write(&mut writer);
        writer.finish()
    }

    /// Reads what [`Program::to_bytes`] wrote.
    ///
    /// # Errors
    ///
    /// The bytes are something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(bytes);
        let program = Program {
            path: reader.text(),
            arguments: reader.texts(),
            environment: reader.texts(),
            working_directory: reader.text(),
            user: User::read(&mut reader),
        };
        reader.finish(program)
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

impl User {
    pub(crate) fn write(self, writer: &mut Writer) {
        writer.number(self.uid);
        writer.number(self.gid);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> User {
        User {
            uid: reader.word(),
            gid: reader.word(),
        }
    }
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

//! Engines: what runs an image.
//!
//! An engine takes a [`Launch`] and makes it a [`Running`] unikernel: a confined process, or a virtual machine.
//! It knows nothing of published ports, volumes, logs or state directories; those are the monitor's, which meets
//! the kernel at the other end of [`Launch::link`].
//!
//! What always holds: an engine that returns an error from [`Engine::start`] has left nothing running and nothing
//! in the file system, and a dropped [`Running`] has been killed and reaped.

mod kept;
pub mod process;
pub mod qemu;

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::process::{Signal, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// Something that can run images.
pub trait Engine {
    /// The name that `--engine` takes.
    fn name(&self) -> &'static str;

    /// Whether this machine can run images with this engine now. Cheap: called on every start.
    ///
    /// # Errors
    /// Says what is missing and what to do about it.
    fn available(&self) -> Result<(), Unavailable>;

    /// Starts an image. Returns once the host has started the process or virtual machine; the kernel's own start is
    /// told over the link.
    ///
    /// # Errors
    /// When the host refuses a resource (memory, descriptors, a program that is not installed).
    fn start(&self, launch: Launch) -> Result<Box<dyn Running>, StartError>;
}

/// Everything an engine needs for one start.
#[derive(Debug)]
pub struct Launch {
    /// Path of the image file, for engines that must name it.
    pub image_path: PathBuf,
    /// The image file, open for reading.
    pub image: File,
    /// Where the image's pieces lie in the file.
    pub pieces: Pieces,
    /// The run's configuration ([`kiln_abi::configuration::RunConfiguration::to_bytes`]).
    pub configuration: Vec<u8>,
    /// Memory of the instance in bytes.
    pub memory: u64,
    /// Where console output goes: the writing end of a pipe.
    pub console: OwnedFd,
    /// The kernel's end of the link: one end of a Unix stream socket pair. The engine passes it to the kernel
    /// (process: as a descriptor; QEMU: as the socket of the console's character device, `-chardev socket,fd=N`).
    pub link: OwnedFd,
    /// The kernel's end of the frame stream of `--net direct` (protocol of QEMU's `-netdev stream`), if there is one.
    pub frames: Option<OwnedFd>,
    /// The Ethernet address of the network card at the frame stream.
    pub mac: [u8; 6],
    /// The instance's own directory, where the engine may put files that the start needs (the monitor removes it).
    pub directory: PathBuf,
}

/// A piece of the image file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Where the pieces of an image lie in its file (see [`kiln_abi::image`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pieces {
    /// The kernel's ELF file.
    pub kernel: Piece,
    /// What the manifest says to the kernel. (`manifest` in the state of instances of images of format 1.)
    #[serde(alias = "manifest")]
    pub program: Piece,
    /// The root file system. Its offset is page-aligned.
    pub root: Piece,
}

/// A started unikernel.
pub trait Running {
    /// The host's process.
    fn pid(&self) -> u32;

    /// A descriptor that becomes readable when the process has ended (a pidfd).
    fn ended(&self) -> BorrowedFd<'_>;

    /// Waits for the end.
    ///
    /// # Errors
    /// Those of `waitid(2)`.
    fn wait(&mut self) -> std::io::Result<End>;

    /// Ends the unikernel at once. Nothing happens if it has ended already.
    ///
    /// # Errors
    /// Those of `kill(2)`.
    fn kill(&mut self) -> std::io::Result<()>;

    /// Stops all of the unikernel from using the processor. Its sockets stay as they are.
    ///
    /// # Errors
    /// Those of `pidfd_send_signal(2)`.
    fn suspend(&self) -> std::io::Result<()> {
        Ok(pidfd_send_signal(self.ended(), Signal::STOP)?)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// Those of `pidfd_send_signal(2)`.
    fn resume(&self) -> std::io::Result<()> {
        Ok(pidfd_send_signal(self.ended(), Signal::CONT)?)
    }

    /// Has the kernel look at the link soon, though the program computes without a pause: call it after sending what
    /// must not wait ([`kiln_abi::link::ToKernel::Signal`]). A virtual machine needs no such thing.
    ///
    /// # Errors
    /// Those of `kill(2)`.
    fn interrupt(&self) -> std::io::Result<()> {
        Ok(())
    }
}

/// How a unikernel ended, as the engine saw it. The kernel's own word
/// ([`kiln_abi::link::ToMonitor::Exited`]) goes before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// With this exit code (see [`kiln_abi::host::exit_code`] for those beyond the program's own).
    Exited(i32),
    /// The host's process was killed by this signal: by the monitor, the host's memory pressure, or its confinement.
    Signalled(i32),
}

/// Why an engine cannot be used here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("engine {engine} cannot be used here: {reason}")]
pub struct Unavailable {
    /// The engine's name.
    pub engine: &'static str,
    /// What is missing.
    pub reason: String,
    /// What to do.
    pub remedy: String,
}

/// Why a start failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct StartError {
    /// What failed, in words.
    pub what: String,
    /// What to do, if something can be done.
    pub remedy: Option<String>,
    /// The host's error.
    #[source]
    pub source: Option<std::io::Error>,
}

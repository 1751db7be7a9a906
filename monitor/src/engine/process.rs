//! The engine `process`: an image as a confined process of this host.
//!
//! It executes the process shim from a memory file, with a few descriptors at fixed numbers
//! ([`kiln_abi::process`]), namespaces of its own where the host allows them, an empty root, no privileges, and the
//! seccomp filter of [`filter`], which the shim puts in place before it calls the kernel.
//!
//! What always holds: the instance ends with the monitor, however that ends.

mod child;
mod filter;

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};

use kiln_abi::process::{Extent, Parameters, descriptor};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::kept::{self, Kept, Started};
use super::{Engine, Launch, Piece, Running, StartError, Unavailable};
use child::{Descriptors, Failure, Isolation, Step};

/// Length of the shared pool's file: address space, not memory; all that the kernel could ever map.
const POOL_LENGTH: u64 = 1 << 44;

/// What to do when memory files cannot be executed.
const ALLOW_EXECUTION: &str = "set the sysctl vm.memfd_noexec to 0 or 1, or use --engine qemu";

/// Bit of `AT_HWCAP2`: programs may use the FSGSBASE instructions.
const FSGSBASE: usize = 2;

/// The engine.
#[derive(Clone, Copy, Debug)]
pub struct ProcessEngine {
    shim: &'static [u8],
}

impl ProcessEngine {
    /// An engine that runs this shim, an ELF file.
    #[must_use]
    pub fn new(shim: &'static [u8]) -> Self {
        Self { shim }
    }
}

impl Engine for ProcessEngine {
    fn name(&self) -> &'static str {
        "process"
    }

    fn available(&self) -> Result<(), Unavailable> {
        let unavailable = |reason: &str, remedy: &str| {
            Err(Unavailable {
                engine: "process",
                reason: reason.into(),
                remedy: remedy.into(),
            })
        };
        if rustix::param::linux_hwcap().1 & FSGSBASE == 0 {
            return unavailable(
                "this processor or Linux has no FSGSBASE instructions",
                "use Linux 5.9 or later without `nofsgsbase`, or --engine qemu",
            );
        }
        if !child::has_user_dispatch() {
            return unavailable(
                "this Linux has no syscall user dispatch",
                "use Linux 5.11 or later, or --engine qemu",
            );
        }
        if !child::has_seccomp() {
            return unavailable(
                "this Linux has no seccomp filters",
                "use a Linux with CONFIG_SECCOMP_FILTER, or --engine qemu",
            );
        }
        Ok(())
    }

    fn start(&self, launch: Launch) -> Result<Box<dyn Running>, StartError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: io::Error| StartError {
                what,
                remedy: None,
                source: Some(error),
            }
        };
        let parameters =
            parameter_file(&launch).map_err(failed("cannot write the instance's parameters"))?;
        let pool = memfd_create(c"kiln-pool", MemfdFlags::CLOEXEC)
            .and_then(|file| ftruncate(&file, POOL_LENGTH).map(|()| file))
            .map_err(|error| failed("cannot make the instance's memory file")(error.into()))?;
        let shim = executable(self.shim).map_err(|error| StartError {
            remedy: Some(ALLOW_EXECUTION.into()),
            ..failed("cannot make the shim's memory file")(error)
        })?;
        let files = Files {
            parameters,
            pool,
            shim,
        };
        let child = kept::start(move || start(&launch, &files))?.map_err(explain)?;
        Ok(Box::new(Kept::unikernel(child)))
    }
}

/// Files made for one start.
struct Files {
    parameters: OwnedFd,
    pool: OwnedFd,
    shim: OwnedFd,
}

/// Starts the child with what it inherits.
fn start(launch: &Launch, files: &Files) -> Result<Started, Failure> {
    let mut places = vec![
        (descriptor::IMAGE, launch.image.as_fd()),
        (descriptor::CONSOLE, launch.console.as_fd()),
        (descriptor::POOL, files.pool.as_fd()),
        (descriptor::PARAMETERS, files.parameters.as_fd()),
        (descriptor::SHIM, files.shim.as_fd()),
        (descriptor::LINK, launch.link.as_fd()),
    ];
    if let Some(frames) = &launch.frames {
        places.push((descriptor::NETWORK, frames.as_fd()));
    }
    let name = launch
        .directory
        .file_name()
        .and_then(|name| CString::new(format!("kiln: {}", name.display())).ok())
        .unwrap_or_else(|| c"kiln: instance".to_owned());
    spawn(&places, &name)
}

/// Starts the child with the best isolation that the host allows.
fn spawn(descriptors: &Descriptors<'_>, name: &std::ffi::CStr) -> Result<Started, Failure> {
    let root = rustix::process::geteuid().is_root();
    let ways: &[Isolation] = if root {
        &[
            Isolation::Privileged,
            Isolation::Unprivileged,
            Isolation::None,
        ]
    } else {
        &[Isolation::Unprivileged, Isolation::None]
    };
    let mut failure = None;
    for isolation in ways {
        match child::spawn(descriptors, *isolation, name) {
            // No privilege, no support, or too many namespaces: that is the host's policy.
            Err(refused)
                if refused.step == Step::Clone
                    && matches!(
                        refused.error.raw_os_error(),
                        Some(libc::EPERM | libc::EINVAL | libc::ENOSPC | libc::EUSERS)
                    ) =>
            {
                failure = Some(refused);
            }
            result => return result,
        }
    }
    Err(failure.unwrap_or(Failure {
        step: Step::Clone,
        error: io::ErrorKind::Unsupported.into(),
    }))
}

fn explain(failure: Failure) -> StartError {
    let (what, remedy) = match failure.step {
        Step::Clone => ("Linux refuses another process", None),
        Step::Statm => ("cannot open /proc/self/statm", Some("mount /proc")),
        Step::Descriptors => (
            "Linux refuses another open file",
            Some("raise the limit on open files (ulimit -n) to 256 or more"),
        ),
        Step::Privileges => ("Linux refuses to give up privileges", None),
        Step::Limits => ("Linux refuses resource limits", None),
        Step::ParentDeath => ("the monitor ended while it started the instance", None),
        Step::Execute => (
            "Linux refuses to execute the shim from memory",
            Some(ALLOW_EXECUTION),
        ),
    };
    StartError {
        what: what.into(),
        remedy: remedy.map(Into::into),
        source: Some(failure.error),
    }
}

fn extent(piece: Piece) -> Extent {
    Extent {
        offset: piece.offset,
        length: piece.length,
    }
}

/// Writes parameters, filter and configuration to a new memory file.
fn parameter_file(launch: &Launch) -> io::Result<OwnedFd> {
    let filter = filter::filter().map_err(io::Error::other)?;
    let filter_length = filter.len() as u64;
    let parameters = Parameters {
        kernel: extent(launch.pieces.kernel),
        program: extent(launch.pieces.program),
        root: extent(launch.pieces.root),
        filter: Extent {
            offset: Parameters::SIZE as u64,
            length: filter_length,
        },
        configuration: Extent {
            offset: Parameters::SIZE as u64 + filter_length,
            length: launch.configuration.len() as u64,
        },
        memory_limit: launch.memory,
        pool_length: POOL_LENGTH,
        link: true,
        network: launch.frames.is_some(),
    };
    let mut bytes = parameters.to_bytes().to_vec();
    bytes.extend(filter);
    bytes.extend(&launch.configuration);
    memory_file(c"kiln-parameters", MemfdFlags::empty(), &bytes)
}

/// A memory file that may be executed.
fn executable(bytes: &[u8]) -> io::Result<OwnedFd> {
    match memory_file(c"kiln-shim", MemfdFlags::EXEC, bytes) {
        // Before Linux 6.3 there is no such flag, and every memory file may be executed.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            memory_file(c"kiln-shim", MemfdFlags::empty(), bytes)
        }
        result => result,
    }
}

fn memory_file(name: &std::ffi::CStr, flags: MemfdFlags, bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(name, flags | MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file.into())
}

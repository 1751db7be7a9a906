//! From the shim's call to the program's first instruction.

#![allow(unsafe_code)]

mod loader;
pub mod symbols;
mod vdso;

use alloc::{boxed::Box, format, string::String, sync::Arc};

use kiln_abi::{
    configuration::RunConfiguration,
    host::{BootInformation, Engine, MemoryRange, exit_code},
    link::{ToKernel, ToMonitor},
    manifest::Program,
};

use crate::{
    Kernel, Result,
    cpu::{Cpu, UserContext},
    fs::{
        self,
        vfs::{Resolve, View},
    },
    hash,
    host::Host,
    kernel::KernelParts,
    link::{HostDescriptor, Link, Receiver},
    memory::RootImage,
    net::Net,
    task::{
        Credentials, FileSystemContext, NAME_LENGTH, Process, ProcessStart, Signal, SignalInfo,
        SignalSet, ThreadControl, signal, thread,
    },
    trace,
};

/// Bytes of the first thread's stack.
pub const STACK_SIZE: usize = 8 << 20;

/// Starts everything; ends with the instance.
pub fn start(boot: &'static BootInformation) -> ! {
    // SAFETY: the table is part of the boot information, which the shim keeps for ever.
    let host = Host::new(&boot.host);
    match try_start(host, boot) {
        Ok(kernel) => kernel.run(),
        Err(message) => {
            trace::start(host, None);
            trace::error!("{message}");
            trace::finish();
            host.exit(exit_code::CANNOT_START)
        }
    }
}

/// The bytes of a range that the shim has mapped.
fn bytes(range: MemoryRange) -> &'static [u8] {
    if range.length == 0 {
        return &[];
    }
    // SAFETY: the shim maps the ranges of the boot information read-only for as long as the kernel runs.
    unsafe { core::slice::from_raw_parts(range.start as *const u8, range.length) }
}

fn try_start(host: Host, boot: &'static BootInformation) -> Result<Arc<Kernel>, String> {
    let mut program = Program::from_bytes(bytes(boot.program)).map_err(|error| {
        format!("the image's manifest is damaged ({error}); build the image again")
    })?;
    let mut configuration = match bytes(boot.configuration) {
        [] => RunConfiguration::default(),
        bytes => RunConfiguration::from_bytes(bytes).map_err(|error| {
            format!("the run's configuration cannot be read ({error}); build the image again with this version of Kiln")
        })?,
    };
    configuration.apply(&mut program);
    trace::start(host, configuration.log.as_deref());
    hash::start(host).map_err(|error| format!("there is nothing random: {error}"))?;
    let cpu = Cpu::start(&host, boot)
        .map_err(|error| format!("the engine refused the kernel: {error}"))?;
    let engine = if boot.engine == Engine::Process as u32 {
        Engine::Process
    } else {
        Engine::Vm
    };
    let kernel = Kernel::new(KernelParts {
        host,
        engine,
        cpu,
        configuration,
        root_image: RootImage {
            bytes: bytes(boot.root),
        },
        memory_limit: boot.memory_limit,
    });

    let link = connect(&kernel, boot)?;
    let root =
        fs::start(&kernel).map_err(|error| format!("the image's files cannot be used: {error}"))?;
    kernel.root.call_once(|| root);
    let device = crate::driver::network(&kernel, boot)?;
    kernel.net.call_once(|| {
        Net::new(
            host,
            &kernel.events,
            link.as_ref(),
            &kernel.configuration.network,
            kernel.memory_limit,
            device,
        )
    });
    start_program(&kernel, program)?;
    if let Some(link) = &link {
        link.set_receiver(Arc::new(Messages(Arc::clone(&kernel))));
        link.send(&ToMonitor::Started {
            uptime: u32::try_from(kernel.clock.uptime() / 1000).unwrap_or(u32::MAX),
        });
    }
    Ok(kernel)
}

fn connect(
    kernel: &Arc<Kernel>,
    boot: &'static BootInformation,
) -> Result<Option<Arc<Link>>, String> {
    if !kernel.configuration.link {
        trace::open(None);
        return Ok(None);
    }
    let stream = crate::driver::link(kernel, boot)?;
    let link = Link::new(stream, kernel.host, &kernel.events);
    kernel.link.call_once(|| Arc::clone(&link));
    trace::open(Some(&link));
    Ok(Some(link))
}

/// What the monitor says.
struct Messages(Arc<Kernel>);

impl Receiver for Messages {
    fn receive(&self, message: ToKernel, descriptor: Option<HostDescriptor>) {
        let kernel = &self.0;
        match message {
            ToKernel::Signal { signal } => {
                let Some(process) = kernel.process.get() else {
                    return;
                };
                match Signal::new(u64::from(signal)) {
                    Ok(signal) => deliver(process, signal),
                    Err(_) => {
                        trace::warn!("the monitor sent signal {signal}, which does not exist")
                    }
                }
            }
            ToKernel::Input(bytes) => fs::console_input(kernel, &bytes),
            message => kernel.net().receive(message, descriptor),
        }
    }

    fn disconnected(&self) {
        // Without a monitor nobody can stop this instance or hears of its end.
        trace::error!("the monitor has gone; ending");
        self.0
            .host
            .exit(exit_code::SIGNAL_BASE + i32::from(Signal::HUP.number()))
    }
}

/// A signal from outside. The first process of a Linux system ignores signals that it has no handler for; an instance's
/// program is the user's, who expects `stop` to stop it, so default actions hold.
fn deliver(process: &Process, signal: Signal) {
    signal::send_to_process(process, SignalInfo::from_user(signal, 0, 0, 0));
}

fn start_program(kernel: &Arc<Kernel>, program: Program) -> Result<(), String> {
    let credentials = Credentials::new(program.user.uid, program.user.gid);
    let view = View::superuser(kernel.root.get().ok_or("the file tree is missing")?);
    let directory = match program.working_directory.as_str() {
        "" => "/",
        directory => directory,
    };
    let working_directory = view
        .find(&view.root, directory, Resolve::FOLLOW)
        .map_err(|error| format!("the working directory {directory} cannot be entered: {error}"))?
        .location();
    let loaded = loader::load(kernel, &view, &program, &credentials)
        .map_err(|reason| format!("cannot start {}: {reason}", program.path))?;
    let process = Process::new(
        kernel,
        ProcessStart {
            memory: loaded.memory,
            file_system: FileSystemContext {
                root: view.root,
                working_directory,
                umask: 0o22,
            },
            credentials,
            program: program.path,
            arguments: program.arguments,
            environment: program.environment,
            auxiliary: loaded.auxiliary,
        },
    );
    fs::open_standard_streams(&process)
        .map_err(|error| format!("the console cannot be opened: {error}"))?;
    let path = process.program.as_bytes();
    let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or(path);
    let name = &name[..name.len().min(NAME_LENGTH)];
    let main = process.add_thread(name, SignalSet::default(), ThreadControl::default());
    let context: Box<UserContext> = UserContext::new(loaded.entry, loaded.stack);
    kernel.process.call_once(|| Arc::clone(&process));
    kernel.executor.spawn(thread::run(main, context));
    Ok(())
}

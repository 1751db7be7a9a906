//! The kernel as a value, and its main loop.

use alloc::{string::String, sync::Arc};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kiln_abi::{configuration::RunConfiguration, host::Engine, link::ToMonitor};
use spin::Once;

use crate::{
    cpu::Cpu,
    event::Events,
    fs::vfs::Location,
    host::Host,
    link::Link,
    memory::RootImage,
    net::Net,
    task::{Process, executor::Executor},
    time::{Clock, NEVER, Timers},
};

/// How long a program may run without the kernel looking at events, in nanoseconds.
const TICK: u64 = 10_000_000;
/// Tasks polled before events are looked at again.
const TASKS_PER_TURN: usize = 64;

/// The library operating system of one instance.
pub struct Kernel {
    /// The machine.
    pub host: Host,
    /// Process or virtual machine.
    pub engine: Engine,
    /// The CPU.
    pub cpu: Cpu,
    /// Tasks.
    pub executor: Executor,
    /// Clocks.
    pub clock: Clock,
    /// Sleepers.
    pub timers: Timers,
    /// Who hears of which event.
    pub events: Arc<Events>,
    /// What this run says.
    pub configuration: RunConfiguration,
    /// The image's root.
    pub root_image: RootImage,
    /// Bytes of memory that the instance may use.
    pub memory_limit: u64,
    /// Root of the file tree.
    pub root: Once<Location>,
    /// What belongs to the file tree beside its root.
    pub files: Once<crate::fs::tree::FileTree>,
    /// Sockets.
    pub net: Once<Net>,
    /// The line to the monitor, if there is one.
    pub link: Once<Arc<Link>>,
    /// The program, once started.
    pub process: Once<Arc<Process>>,
    /// When the armed timer fires; 0: none armed.
    tick: AtomicU64,
    events_requested: AtomicBool,
}

/// The parts that boot gives to [`Kernel::new`].
pub struct KernelParts {
    /// The machine.
    pub host: Host,
    /// Process or virtual machine.
    pub engine: Engine,
    /// The CPU.
    pub cpu: Cpu,
    /// What this run says.
    pub configuration: RunConfiguration,
    /// The image's root.
    pub root_image: RootImage,
    /// Bytes of memory that the instance may use.
    pub memory_limit: u64,
}

impl Kernel {
    /// A kernel without files, sockets or a program yet.
    #[must_use]
    pub fn new(parts: KernelParts) -> Arc<Kernel> {
        let clock = Clock::new(parts.host, parts.configuration.realtime);
        let events = Arc::new(Events::new());
        events.set_pending_flag(parts.cpu.pending_flag());
        Arc::new(Kernel {
            host: parts.host,
            engine: parts.engine,
            cpu: parts.cpu,
            executor: Executor::default(),
            clock,
            timers: Timers::default(),
            events,
            configuration: parts.configuration,
            root_image: parts.root_image,
            memory_limit: parts.memory_limit,
            root: Once::new(),
            files: Once::new(),
            net: Once::new(),
            link: Once::new(),
            process: Once::new(),
            tick: AtomicU64::new(0),
            events_requested: AtomicBool::new(true),
        })
    }

    /// The name of the machine.
    #[must_use]
    pub fn hostname(&self) -> String {
        self.configuration
            .hostname
            .clone()
            .unwrap_or_else(|| String::from("kiln"))
    }

    /// The sockets.
    ///
    /// # Panics
    /// Before boot has made them: a kernel bug.
    #[must_use]
    pub fn net(&self) -> &Net {
        self.net
            .get()
            .expect("boot makes the network before anything uses it")
    }

    /// Makes sure that a program which makes no system calls is interrupted in time: for the next timer, or after a
    /// tick. One host call for each, none for each system call, and nothing while nothing runs.
    #[inline]
    pub fn arm_tick(&self) {
        let armed = self.tick.load(Ordering::Relaxed);
        let due = self.timers.next_deadline();
        if armed == 0 || due < armed {
            let deadline = due.min(self.clock.monotonic() + TICK);
            self.tick.store(deadline, Ordering::Relaxed);
            self.host.set_timer(deadline);
        }
    }

    /// Asks the main loop to look for events before it runs the next task.
    #[inline]
    pub fn request_events(&self) {
        self.events_requested.store(true, Ordering::Relaxed);
    }

    /// Runs tasks and waits for events until the instance ends.
    pub fn run(self: &Arc<Kernel>) -> ! {
        loop {
            for _ in 0..TASKS_PER_TURN {
                if !self.executor.run_one() || self.events_requested.load(Ordering::Relaxed) {
                    break;
                }
            }
            self.turn();
        }
    }

    /// One look at the outside world; waits when no task is ready.
    fn turn(&self) {
        self.events_requested.store(false, Ordering::Relaxed);
        self.cpu.clear_pending();
        let now = self.clock.monotonic();
        let network_deadline = self
            .net
            .get()
            .and_then(|net| net.poll(now))
            .unwrap_or(NEVER);
        self.timers.expire(now);
        let deadline = if self.executor.has_ready() {
            0
        } else {
            self.timers.next_deadline().min(network_deadline)
        };
        if let Some(servers) = self.net.get().and_then(Net::changed_name_servers)
            && let Some(files) = self.files.get()
            && let Err(error) = files.set_name_servers(&servers)
        {
            crate::trace::warn!("the name servers cannot be written to /etc/resolv.conf: {error}");
        }
        let delivered = self.events.wait(&self.host, deadline);
        let now = self.clock.monotonic();
        if self.tick.load(Ordering::Relaxed) <= now {
            self.tick.store(0, Ordering::Relaxed);
        }
        if delivered > 0
            && let Some(net) = self.net.get()
        {
            net.poll(now);
        }
        self.timers.expire(now);
    }

    /// The program has ended: tells the monitor, and ends the instance.
    pub fn shut_down(self: &Arc<Kernel>, process: &Process, code: i32) -> ! {
        // Closing the files ends connections in order and gives what is buffered to the host.
        let files = core::mem::take(&mut *process.files.lock());
        drop(files);
        crate::fs::finish(self);
        if let Some(net) = self.net.get() {
            net.poll(self.clock.monotonic());
        }
        if let Some(link) = self.link.get() {
            link.send(&ToMonitor::Exited { code });
            link.drain();
        }
        self.host.exit(code)
    }
}

//! Processes and threads.
//!
//! A [`Process`] is a value: address space, descriptors, signal actions, credentials. There is one now. A [`Thread`] is
//! what its threads share with the rest of the kernel; the thread itself is a future ([`thread::run`]) that owns the
//! registers.

pub mod credentials;
pub mod exception;
pub mod executor;
pub mod futex;
pub mod signal;
pub mod thread;

use alloc::{collections::BTreeMap, string::String, sync::Arc, vec::Vec};
use core::{
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    task::Waker,
};

pub use credentials::Credentials;
pub use signal::{Signal, SignalInfo, SignalSet};

use crate::{
    Errno, Kernel, Result,
    file::{FileTable, OpenFile},
    fs::vfs::Location,
    memory::AddressSpace,
    sync::Mutex,
};

/// Where paths start, and the mask of new files.
pub struct FileSystemContext {
    /// `/` of the process.
    pub root: Location,
    /// The working directory.
    pub working_directory: Location,
    /// `umask(2)`.
    pub umask: u32,
}

/// A running program.
pub struct Process {
    /// The kernel it runs on.
    pub kernel: Arc<Kernel>,
    /// Process identifier.
    pub id: u32,
    /// Descriptors.
    pub files: Mutex<FileTable>,
    /// Memory.
    pub memory: Mutex<AddressSpace>,
    /// Paths.
    pub file_system: Mutex<FileSystemContext>,
    /// Who it runs as.
    pub credentials: Mutex<Credentials>,
    /// Signal actions, and signals for the process as a whole.
    pub signals: Mutex<signal::ProcessSignals>,
    /// Living threads by identifier.
    pub threads: Mutex<BTreeMap<u32, Arc<Thread>>>,
    /// Threads that wait on words of memory.
    pub futexes: futex::FutexTable,
    /// Resource limits by `RLIMIT_*`: soft and hard.
    pub limits: Mutex<[(u64, u64); 16]>,
    /// Timers of `timer_create(2)` and `setitimer(2)`.
    pub timers: Mutex<signal::ProcessTimers>,
    /// Absolute path of the program.
    pub program: String,
    /// Its arguments, the name included.
    pub arguments: Vec<String>,
    /// Its environment, `NAME=value`.
    pub environment: Vec<String>,
    /// The auxiliary vector, as bytes.
    pub auxiliary: Vec<u8>,
    /// What it says of itself by `prctl(2)`.
    pub control: Mutex<ProcessControl>,
    /// Nanoseconds of CPU time that its threads have used.
    pub cpu_time: AtomicU64,
    next_thread: AtomicU32,
    /// Set once the process is ending, with its exit code.
    exit: Mutex<Option<i32>>,
}

/// No limit (`RLIM_INFINITY`).
pub const UNLIMITED: u64 = u64::MAX;
/// Descriptors that a process may have by default (soft and hard).
pub const DESCRIPTOR_LIMIT: u64 = 1 << 20;

/// What a process starts with.
pub struct ProcessStart {
    /// Memory.
    pub memory: AddressSpace,
    /// Paths.
    pub file_system: FileSystemContext,
    /// Who it runs as.
    pub credentials: Credentials,
    /// Absolute path of the program.
    pub program: String,
    /// Arguments, the name included.
    pub arguments: Vec<String>,
    /// Environment.
    pub environment: Vec<String>,
    /// Auxiliary vector, as bytes.
    pub auxiliary: Vec<u8>,
}

impl Process {
    /// The first and only process.
    #[must_use]
    pub fn new(kernel: &Arc<Kernel>, start: ProcessStart) -> Arc<Process> {
        let mut limits = [(UNLIMITED, UNLIMITED); 16];
        use linux_raw_sys::general as linux;
        limits[linux::RLIMIT_NOFILE as usize] = (DESCRIPTOR_LIMIT, DESCRIPTOR_LIMIT);
        limits[linux::RLIMIT_STACK as usize] = (crate::boot::STACK_SIZE as u64, UNLIMITED);
        limits[linux::RLIMIT_CORE as usize] = (0, UNLIMITED);
        limits[linux::RLIMIT_MEMLOCK as usize] = (64 << 10, 64 << 10);
        limits[linux::RLIMIT_NICE as usize] = (0, 0);
        limits[linux::RLIMIT_RTPRIO as usize] = (0, 0);
        limits[linux::RLIMIT_SIGPENDING as usize] =
            (signal::MAX_QUEUED as u64, signal::MAX_QUEUED as u64);
        limits[linux::RLIMIT_MSGQUEUE as usize] = (819_200, 819_200);
        limits[linux::RLIMIT_NPROC as usize] = (1 << 15, 1 << 15);
        Arc::new(Process {
            kernel: Arc::clone(kernel),
            id: 1,
            files: Mutex::new(FileTable::new(DESCRIPTOR_LIMIT as usize)),
            memory: Mutex::new(start.memory),
            file_system: Mutex::new(start.file_system),
            credentials: Mutex::new(start.credentials),
            signals: Mutex::new(signal::ProcessSignals::default()),
            threads: Mutex::new(BTreeMap::new()),
            futexes: futex::FutexTable::default(),
            limits: Mutex::new(limits),
            timers: Mutex::new(signal::ProcessTimers::default()),
            program: start.program,
            arguments: start.arguments,
            environment: start.environment,
            auxiliary: start.auxiliary,
            control: Mutex::new(ProcessControl {
                dumpable: true,
                ..ProcessControl::default()
            }),
            cpu_time: AtomicU64::new(0),
            next_thread: AtomicU32::new(1),
            exit: Mutex::new(None),
        })
    }

    /// The open file of a descriptor.
    ///
    /// # Errors
    /// `EBADF`.
    pub fn file(&self, descriptor: i32) -> Result<Arc<OpenFile>> {
        self.files.lock().get(descriptor).cloned()
    }

    /// Gives an open file the lowest free descriptor.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn add_file(&self, file: Arc<OpenFile>, close_on_exec: bool) -> Result<i32> {
        self.files.lock().insert(file, close_on_exec)
    }

    /// A soft resource limit (`RLIMIT_*`).
    #[must_use]
    pub fn limit(&self, resource: u32) -> u64 {
        self.limits
            .lock()
            .get(resource as usize)
            .map_or(UNLIMITED, |limit| limit.0)
    }

    /// Makes a thread (not yet running) and counts it among the living.
    pub fn add_thread(
        self: &Arc<Process>,
        name: &[u8],
        mask: SignalSet,
        control: ThreadControl,
    ) -> Arc<Thread> {
        let id = self.next_thread.fetch_add(1, Ordering::Relaxed);
        let thread = Arc::new(Thread {
            id,
            process: Arc::clone(self),
            name: Mutex::new(name.to_vec()),
            control: Mutex::new(control),
            signals: Mutex::new(signal::ThreadSignals::new(mask)),
            attention: AtomicBool::new(false),
            waker: Mutex::new(None),
            clear_on_exit: AtomicU64::new(0),
            robust_list: AtomicU64::new(0),
            cpu_time: AtomicU64::new(0),
            running_since: AtomicU64::new(0),
        });
        self.threads.lock().insert(id, Arc::clone(&thread));
        thread
    }

    /// The thread with an identifier.
    ///
    /// # Errors
    /// `ESRCH`.
    pub fn thread(&self, id: u32) -> Result<Arc<Thread>> {
        self.threads.lock().get(&id).cloned().ok_or(Errno::ESRCH)
    }

    /// Starts the end of the process: its threads stop at their next look. The first code counts.
    pub fn exit(&self, code: i32) {
        self.exit.lock().get_or_insert(code);
        let threads: Vec<Arc<Thread>> = self.threads.lock().values().cloned().collect();
        for thread in threads {
            thread.wake();
        }
    }

    /// The exit code, once the process is ending.
    #[must_use]
    pub fn exiting(&self) -> Option<i32> {
        *self.exit.lock()
    }
}

/// Bytes of a thread's name.
pub const NAME_LENGTH: usize = 15;

/// What a process says of itself by `prctl(2)`. Kept and told; nothing here dumps a process, has children or uses huge pages.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessControl {
    /// `PR_SET_DUMPABLE`.
    pub dumpable: bool,
    /// `PR_SET_CHILD_SUBREAPER`.
    pub subreaper: bool,
    /// `PR_SET_THP_DISABLE`.
    pub no_huge_pages: bool,
    /// `setpriority(2)`, from -20 to 19.
    pub nice: i32,
}

/// What a thread says of itself by `prctl(2)`.
#[derive(Clone, Copy, Debug)]
pub struct ThreadControl {
    /// Nanoseconds by which its timers may be late (`PR_SET_TIMERSLACK`). They are never made late on purpose.
    pub timer_slack: u64,
    /// What 0 sets the slack to: what it was when the thread was made.
    pub default_slack: u64,
    /// `PR_SET_PDEATHSIG`; there is no parent to die.
    pub death_signal: u32,
    /// `PR_SET_NO_NEW_PRIVS`; there is no `execve` that could give any.
    pub no_new_privileges: bool,
}

impl Default for ThreadControl {
    fn default() -> ThreadControl {
        ThreadControl {
            timer_slack: 50_000,
            default_slack: 50_000,
            death_signal: 0,
            no_new_privileges: false,
        }
    }
}

impl ThreadControl {
    /// What a thread made by this one starts with.
    #[must_use]
    pub fn inherited(self) -> ThreadControl {
        ThreadControl {
            default_slack: self.timer_slack,
            death_signal: 0,
            ..self
        }
    }
}

/// A thread, as the rest of the kernel sees it.
pub struct Thread {
    /// Thread identifier; the first thread's is the process's.
    pub id: u32,
    /// Its process.
    pub process: Arc<Process>,
    /// Name (`PR_SET_NAME`), at most [`NAME_LENGTH`] bytes.
    pub name: Mutex<Vec<u8>>,
    /// What it says of itself by `prctl(2)`.
    pub control: Mutex<ThreadControl>,
    /// Mask, pending signals, alternate stack.
    pub signals: Mutex<signal::ThreadSignals>,
    /// Set when the thread has something to look at before it goes on: a signal, the end.
    attention: AtomicBool,
    /// Wakes the thread's future.
    waker: Mutex<Option<Waker>>,
    /// Address of a word to clear, and wake waiters on, at the end (`set_tid_address(2)`).
    pub clear_on_exit: AtomicU64,
    /// Head of the list of robust futexes (`set_robust_list(2)`).
    pub robust_list: AtomicU64,
    /// Nanoseconds of CPU time used in earlier turns.
    cpu_time: AtomicU64,
    /// Monotonic time at which its present turn began; 0 while it does not run.
    running_since: AtomicU64,
}

impl Thread {
    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> &Arc<Kernel> {
        &self.process.kernel
    }

    /// Its name as text.
    #[must_use]
    pub fn name(&self) -> String {
        String::from_utf8_lossy(&self.name.lock()).into_owned()
    }

    /// Who the thread acts as.
    #[must_use]
    pub fn credentials(&self) -> Credentials {
        self.process.credentials.lock().clone()
    }

    /// Nanoseconds of CPU time used so far, in the program and in the kernel for it.
    #[must_use]
    pub fn cpu_time(&self) -> u64 {
        let turn = match self.running_since.load(Ordering::Relaxed) {
            0 => 0,
            since => self.kernel().clock.monotonic().saturating_sub(since),
        };
        self.cpu_time.load(Ordering::Relaxed) + turn
    }

    /// Makes the thread look at its signals, also out of a wait.
    pub fn wake(&self) {
        self.attention.store(true, Ordering::Relaxed);
        let waker = self.waker.lock().clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Sends a signal to this thread.
    pub fn raise(&self, info: SignalInfo) {
        signal::send_to_thread(self, info);
    }

    /// Sends `SIGPIPE` to this thread, as a write to a broken pipe or connection does.
    pub fn raise_broken_pipe(&self) {
        self.raise(SignalInfo::from_kernel(Signal::PIPE));
    }

    /// Replaces the signal mask until the system call being made ends or a handler has run (`ppoll(2)`,
    /// `epoll_pwait(2)`, `sigsuspend(2)`).
    pub fn set_temporary_mask(&self, mask: SignalSet) {
        signal::set_temporary_mask(self, mask);
    }

    fn has_attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed)
    }
}

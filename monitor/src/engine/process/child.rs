//! The child process: from `clone` to `execveat`.
//!
//! The child shares the monitor's memory until it executes the shim (as `vfork` does, which is quick whatever the
//! monitor's size), so it makes system calls only: no allocation, no lock, no function of the C library that keeps
//! state (its `setresuid` would change all threads of the monitor). It runs on a stack of its own, while the thread
//! that made it is suspended.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_int, c_long, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use kiln_abi::process::descriptor;

use crate::engine::kept::Started;

/// Bytes of the stack that the child runs on until it executes the shim.
const STACK: usize = 64 << 10;

/// Limit on the shim's first stack, in bytes. It is left early.
const STACK_LIMIT: u64 = 1 << 20;

/// User and group of an instance that root starts: `nobody`.
const UNPRIVILEGED: c_long = 65534;

/// Descriptors are moved here first, so that none is overwritten before it has its place.
const PARKING: c_long = 64;

const NAMESPACES: c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS;

/// Which namespaces of its own a child gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// Mounts, processes, network, IPC and names, made with privileges.
    Privileged,
    /// The same and users, made without.
    Unprivileged,
    /// None: this host allows none. The seccomp filter holds alone.
    None,
}

impl Isolation {
    fn flags(self) -> c_int {
        match self {
            Self::Privileged => NAMESPACES,
            Self::Unprivileged => NAMESPACES | libc::CLONE_NEWUSER,
            Self::None => 0,
        }
    }
}

/// Whether Linux has syscall user dispatch. Asks for what is the case anyway: that it is off in this thread.
pub fn has_user_dispatch() -> bool {
    const PR_SET_SYSCALL_USER_DISPATCH: c_int = 59;
    // SAFETY: switches off what no thread of the monitor switches on.
    unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, 0, 0, 0, 0) == 0 }
}

/// Whether Linux has seccomp filters that can end a process.
pub fn has_seccomp() -> bool {
    const SECCOMP_GET_ACTION_AVAIL: c_long = 2;
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: reads the action.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        )
    };
    result == 0
}

/// Descriptors that a child is to find open, with the numbers they are to have. [`descriptor::SHIM`] is executed.
pub type Descriptors<'a> = [(i32, BorrowedFd<'a>)];

/// A step of the child that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `clone` itself.
    Clone,
    /// Opening `/proc/self/statm`.
    Statm,
    /// Moving descriptors.
    Descriptors,
    /// Giving up privileges.
    Privileges,
    /// Resource limits.
    Limits,
    /// Asking to end with the monitor.
    ParentDeath,
    /// Executing the shim.
    Execute,
}

/// Why there is no child.
#[derive(Debug)]
pub struct Failure {
    /// What failed.
    pub step: Step,
    /// Linux's error.
    pub error: io::Error,
}

/// Shared with the child; nothing in it needs the child to allocate.
struct Plan<'a> {
    descriptors: &'a Descriptors<'a>,
    isolation: Isolation,
    name: &'a CStr,
    drop_identity: bool,
    failure: Option<(Step, i32)>,
}

/// Starts the shim. The calling thread must live as long as the child shall: the child ends with it.
///
/// # Errors
/// See [`Failure`]; then there is no child.
pub fn spawn(
    descriptors: &Descriptors<'_>,
    isolation: Isolation,
    name: &CStr,
) -> Result<Started, Failure> {
    // Handlers of the monitor must not run in the child, which shares its memory. The thread is the instance's
    // alone and never needs a signal again.
    // SAFETY: fills and reads a set.
    unsafe {
        let mut signals = std::mem::zeroed();
        libc::sigfillset(&raw mut signals);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const signals, std::ptr::null_mut());
    }
    // SAFETY: no arguments.
    let root = unsafe { libc::geteuid() } == 0;
    let mut plan = Plan {
        descriptors,
        isolation,
        name,
        drop_identity: root && isolation != Isolation::Unprivileged,
        failure: None,
    };
    let mut stack = vec![0u128; STACK / size_of::<u128>()];
    let mut pidfd: RawFd = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: reads a setting; and it is put back below, since a change of identity in the child clears it for the
    // memory that we share.
    let dumpable = unsafe { libc::prctl(libc::PR_GET_DUMPABLE) };
    // SAFETY: the stack is the child's alone, and this thread goes on only when the child is done with it and the plan.
    let pid = unsafe {
        libc::clone(
            run,
            stack.as_mut_ptr_range().end.cast(),
            flags | isolation.flags(),
            (&raw mut plan).cast(),
            &raw mut pidfd,
        )
    };
    let clone_error = io::Error::last_os_error();
    if dumpable == 1 {
        // SAFETY: sets what was set.
        unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) };
    }
    if pid < 0 {
        return Err(Failure {
            step: Step::Clone,
            error: clone_error,
        });
    }
    // SAFETY: the kernel made the descriptor for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    // SAFETY: the child wrote it before it ended.
    let failure = unsafe { (&raw const plan.failure).read_volatile() };
    if let Some((step, error)) = failure {
        // SAFETY: reaps the child, which has ended; no result is wanted.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        return Err(Failure {
            step,
            error: io::Error::from_raw_os_error(error),
        });
    }
    Ok(Started {
        pid: pid.unsigned_abs(),
        pidfd,
    })
}

extern "C" fn run(plan: *mut c_void) -> c_int {
    // SAFETY: `spawn` gave us the plan and waits.
    let plan = unsafe { &mut *plan.cast::<Plan<'_>>() };
    let Err(failure) = prepare_and_execute(plan);
    // SAFETY: the field is plain data; volatile, since another process reads it.
    unsafe { (&raw mut plan.failure).write_volatile(Some(failure)) };
    126
}

/// A raw system call of the child.
fn call(step: Step, number: c_long, arguments: [c_long; 5]) -> Result<c_long, (Step, i32)> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: every use below gives what the call is documented to take.
    let result = unsafe { libc::syscall(number, a, b, c, d, e) };
    if result < 0 {
        // SAFETY: the address of this thread's error number.
        Err((step, unsafe { *libc::__errno_location() }))
    } else {
        Ok(result)
    }
}

fn text(text: &CStr) -> c_long {
    text.as_ptr() as c_long
}

fn prepare_and_execute(plan: &Plan<'_>) -> Result<std::convert::Infallible, (Step, i32)> {
    // A terminal's signals are for the monitor.
    let _ = call(Step::Limits, libc::SYS_setsid, [0; 5]);
    // Addresses at random and from the top, whatever the monitor was started with (setarch(8)).
    let _ = call(Step::Limits, libc::SYS_personality, [0; 5]);
    // `/proc/self` is this process for whoever reads the file later.
    let statm = call(
        Step::Statm,
        libc::SYS_openat,
        [
            c_long::from(libc::AT_FDCWD),
            text(c"/proc/self/statm"),
            c_long::from(libc::O_RDONLY | libc::O_CLOEXEC),
            0,
            0,
        ],
    )?;
    if plan.isolation != Isolation::None {
        // Further defence only: the filter allows no call that takes a path.
        let _ = enter_empty_root();
    }
    place_descriptors(plan.descriptors, statm)?;
    limit()?;
    give_up_privileges(plan.drop_identity)?;
    end_with_monitor()?;
    let arguments = [plan.name.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null::<u8>()];
    call(
        Step::Execute,
        libc::SYS_execveat,
        [
            descriptor::SHIM.into(),
            text(c""),
            arguments.as_ptr() as c_long,
            environment.as_ptr() as c_long,
            c_long::from(libc::AT_EMPTY_PATH),
        ],
    )?;
    Err((Step::Execute, libc::ENOEXEC))
}

/// Makes a file system with nothing in it, mounted nowhere, the root.
fn enter_empty_root() -> Result<(), (Step, i32)> {
    const FSOPEN_CLOEXEC: c_long = 1;
    const FSCONFIG_CMD_CREATE: c_long = 6;
    const FSMOUNT_CLOEXEC: c_long = 1;
    const ATTRIBUTES: c_long = 1 | 2 | 4 | 8; // MOUNT_ATTR_RDONLY, NOSUID, NODEV, NOEXEC
    let step = Step::Privileges;
    let context = call(
        step,
        libc::SYS_fsopen,
        [text(c"tmpfs"), FSOPEN_CLOEXEC, 0, 0, 0],
    )?;
    call(
        step,
        libc::SYS_fsconfig,
        [context, FSCONFIG_CMD_CREATE, 0, 0, 0],
    )?;
    let root = call(
        step,
        libc::SYS_fsmount,
        [context, FSMOUNT_CLOEXEC, ATTRIBUTES, 0, 0],
    )?;
    call(step, libc::SYS_fchdir, [root, 0, 0, 0, 0])?;
    call(step, libc::SYS_chroot, [text(c"."), 0, 0, 0, 0])?;
    Ok(())
}

/// Gives descriptors their numbers and has all others close when the shim is executed.
fn place_descriptors(descriptors: &Descriptors<'_>, statm: c_long) -> Result<(), (Step, i32)> {
    const PLACES: usize = descriptor::FIRST_FREE as usize;
    let step = Step::Descriptors;
    let park = |number: c_long| {
        let command = c_long::from(libc::F_DUPFD_CLOEXEC);
        call(step, libc::SYS_fcntl, [number, command, PARKING, 0, 0])
    };
    let mut parked = [None; PLACES];
    for (place, descriptor) in descriptors {
        let index = usize::try_from(*place).map_err(|_| (step, libc::EBADF))?;
        let slot = parked.get_mut(index).ok_or((step, libc::EBADF))?;
        *slot = Some(park(descriptor.as_raw_fd().into())?);
    }
    if let Some(slot) = parked.get_mut(descriptor::STATM as usize) {
        *slot = Some(park(statm)?);
    }
    for (place, source) in (0..).zip(parked) {
        match source {
            Some(source) => {
                call(step, libc::SYS_dup3, [source, place, 0, 0, 0])?;
            }
            None => {
                let _ = call(step, libc::SYS_close, [place, 0, 0, 0, 0]);
            }
        }
    }
    let (first, last) = (PLACES as c_long, c_long::from(u32::MAX));
    let cloexec = libc::CLOSE_RANGE_CLOEXEC as c_long;
    call(step, libc::SYS_close_range, [first, last, cloexec, 0, 0])?;
    Ok(())
}

fn limit() -> Result<(), (Step, i32)> {
    let step = Step::Limits;
    let set = |resource: u32, limit: libc::rlimit| {
        let limit = &raw const limit as c_long;
        call(step, libc::SYS_prlimit64, [0, resource.into(), limit, 0, 0])
    };
    let both = |value| libc::rlimit {
        rlim_cur: value,
        rlim_max: value,
    };
    set(libc::RLIMIT_CORE, both(0))?;
    set(libc::RLIMIT_MEMLOCK, both(0))?;
    // Unlimited stacks make Linux place mappings from the bottom, where the program's memory belongs.
    set(libc::RLIMIT_STACK, both(STACK_LIMIT))?;
    let mut files = both(0);
    let old = &raw mut files as c_long;
    call(
        step,
        libc::SYS_prlimit64,
        [0, libc::RLIMIT_NOFILE.into(), 0, old, 0],
    )?;
    files.rlim_cur = files.rlim_max;
    set(libc::RLIMIT_NOFILE, files)?;
    Ok(())
}

/// Leaves user, groups and capabilities behind.
fn give_up_privileges(identity: bool) -> Result<(), (Step, i32)> {
    const VERSION_3: u32 = 0x2008_0522;
    let step = Step::Privileges;
    if identity {
        // Root of a user namespace may have no other user to become; and is none outside it.
        let _ = call(step, libc::SYS_setgroups, [0; 5]);
        let groups = [UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED, 0, 0];
        let _ = call(step, libc::SYS_setresgid, groups);
        let _ = call(step, libc::SYS_setresuid, groups);
    }
    // Without this, executing a program as user 0 would give all capabilities back.
    call(
        step,
        libc::SYS_prctl,
        [libc::PR_SET_NO_NEW_PRIVS.into(), 1, 0, 0, 0],
    )?;
    // `struct __user_cap_header_struct`: version, this process; twice effective, permitted, inheritable.
    let (header, none) = ([VERSION_3, 0], [0u32; 6]);
    let (header, none) = (header.as_ptr() as c_long, none.as_ptr() as c_long);
    call(step, libc::SYS_capset, [header, none, 0, 0, 0])?;
    Ok(())
}

/// A dead monitor leaves no child. (Changes of identity undo this, so it comes after them.)
fn end_with_monitor() -> Result<(), (Step, i32)> {
    let step = Step::ParentDeath;
    let (option, signal) = (libc::PR_SET_PDEATHSIG.into(), libc::SIGKILL.into());
    call(step, libc::SYS_prctl, [option, signal, 0, 0, 0])?;
    // It may have died before: then nobody holds the other end of the link.
    let mut link = libc::pollfd {
        fd: descriptor::LINK,
        events: 0,
        revents: 0,
    };
    let polled = call(step, libc::SYS_poll, [&raw mut link as c_long, 1, 0, 0, 0])?;
    if polled == 1 && link.revents & libc::POLLHUP != 0 {
        return Err((step, libc::EPIPE));
    }
    Ok(())
}

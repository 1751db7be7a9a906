//! All supported calls, as data, and the dispatcher made from it.

use linux_raw_sys::general as linux;

use super::{
    Call, Entry, Outcome, event, file, memory, path, poll, process, signal, socket, thread, time,
};
use crate::{Errno, trace};

/// The tables of the families.
const FAMILIES: [&[Entry]; 10] = [
    event::CALLS,
    file::CALLS,
    memory::CALLS,
    path::CALLS,
    poll::CALLS,
    process::CALLS,
    signal::CALLS,
    socket::CALLS,
    thread::CALLS,
    time::CALLS,
];

/// Numbers beyond this are unknown to every Linux that this interface is modelled on.
const NUMBERS: usize = 512;

static TABLE: [Option<&Entry>; NUMBERS] = build();

const fn build() -> [Option<&'static Entry>; NUMBERS] {
    let mut table: [Option<&'static Entry>; NUMBERS] = [None; NUMBERS];
    let mut family = 0;
    while family < FAMILIES.len() {
        let entries = FAMILIES[family];
        let mut index = 0;
        while index < entries.len() {
            let number = entries[index].number as usize;
            assert!(table[number].is_none(), "a system call is listed twice");
            table[number] = Some(&entries[index]);
            index += 1;
        }
        family += 1;
    }
    table
}

/// The supported call with a number.
#[must_use]
pub fn entry(number: u64) -> Option<&'static Entry> {
    usize::try_from(number)
        .ok()
        .and_then(|number| TABLE.get(number))
        .copied()
        .flatten()
}

/// All supported calls, by number.
pub fn supported() -> impl Iterator<Item = &'static Entry> {
    TABLE.iter().filter_map(|entry| *entry)
}

/// Linux's name for a number.
#[must_use]
pub fn name(number: u64) -> &'static str {
    if let Some(entry) = entry(number) {
        return entry.name;
    }
    NAMES
        .iter()
        .find(|(candidate, _)| u64::from(*candidate) == number)
        .map_or("(unknown)", |(_, name)| name)
}

/// Makes a system call.
#[inline]
pub fn dispatch(call: &mut Call<'_>, number: u64) -> Outcome {
    match entry(number) {
        Some(entry) => (entry.handler)(call),
        None => unsupported(call, number),
    }
}

/// Calls that the C library tries first and does without, so that their absence is no news: restartable sequences,
/// `clone3` variants and the like.
const PROBED: &[u32] = &[linux::__NR_rseq];

#[cold]
fn unsupported(call: &Call<'_>, number: u64) -> Outcome {
    if !PROBED.iter().any(|probed| u64::from(*probed) == number) {
        let [a, b, c, d, e, f] = call.arguments;
        trace::unsupported(
            number,
            format_args!(
                "system call {number} {}({a:#x}, {b:#x}, {c:#x}, {d:#x}, {e:#x}, {f:#x})",
                name(number)
            ),
        );
    }
    Outcome::fail(Errno::ENOSYS)
}

/// All calls of Linux on x86-64, for messages and documentation.
pub const NAMES: &[(u32, &str)] = &[
    (linux::__NR_read, "read"),
    (linux::__NR_write, "write"),
    (linux::__NR_open, "open"),
    (linux::__NR_close, "close"),
    (linux::__NR_stat, "stat"),
    (linux::__NR_fstat, "fstat"),
    (linux::__NR_lstat, "lstat"),
    (linux::__NR_poll, "poll"),
    (linux::__NR_lseek, "lseek"),
    (linux::__NR_mmap, "mmap"),
    (linux::__NR_mprotect, "mprotect"),
    (linux::__NR_munmap, "munmap"),
    (linux::__NR_brk, "brk"),
    (linux::__NR_rt_sigaction, "rt_sigaction"),
    (linux::__NR_rt_sigprocmask, "rt_sigprocmask"),
    (linux::__NR_rt_sigreturn, "rt_sigreturn"),
    (linux::__NR_ioctl, "ioctl"),
    (linux::__NR_pread64, "pread64"),
    (linux::__NR_pwrite64, "pwrite64"),
    (linux::__NR_readv, "readv"),
    (linux::__NR_writev, "writev"),
    (linux::__NR_access, "access"),
    (linux::__NR_pipe, "pipe"),
    (linux::__NR_select, "select"),
    (linux::__NR_sched_yield, "sched_yield"),
    (linux::__NR_mremap, "mremap"),
    (linux::__NR_msync, "msync"),
    (linux::__NR_mincore, "mincore"),
    (linux::__NR_madvise, "madvise"),
    (linux::__NR_shmget, "shmget"),
    (linux::__NR_shmat, "shmat"),
    (linux::__NR_shmctl, "shmctl"),
    (linux::__NR_dup, "dup"),
    (linux::__NR_dup2, "dup2"),
    (linux::__NR_pause, "pause"),
    (linux::__NR_nanosleep, "nanosleep"),
    (linux::__NR_getitimer, "getitimer"),
    (linux::__NR_alarm, "alarm"),
    (linux::__NR_setitimer, "setitimer"),
    (linux::__NR_getpid, "getpid"),
    (linux::__NR_sendfile, "sendfile"),
    (linux::__NR_socket, "socket"),
    (linux::__NR_connect, "connect"),
    (linux::__NR_accept, "accept"),
    (linux::__NR_sendto, "sendto"),
    (linux::__NR_recvfrom, "recvfrom"),
    (linux::__NR_sendmsg, "sendmsg"),
    (linux::__NR_recvmsg, "recvmsg"),
    (linux::__NR_shutdown, "shutdown"),
    (linux::__NR_bind, "bind"),
    (linux::__NR_listen, "listen"),
    (linux::__NR_getsockname, "getsockname"),
    (linux::__NR_getpeername, "getpeername"),
    (linux::__NR_socketpair, "socketpair"),
    (linux::__NR_setsockopt, "setsockopt"),
    (linux::__NR_getsockopt, "getsockopt"),
    (linux::__NR_clone, "clone"),
    (linux::__NR_fork, "fork"),
    (linux::__NR_vfork, "vfork"),
    (linux::__NR_execve, "execve"),
    (linux::__NR_exit, "exit"),
    (linux::__NR_wait4, "wait4"),
    (linux::__NR_kill, "kill"),
    (linux::__NR_uname, "uname"),
    (linux::__NR_semget, "semget"),
    (linux::__NR_semop, "semop"),
    (linux::__NR_semctl, "semctl"),
    (linux::__NR_shmdt, "shmdt"),
    (linux::__NR_msgget, "msgget"),
    (linux::__NR_msgsnd, "msgsnd"),
    (linux::__NR_msgrcv, "msgrcv"),
    (linux::__NR_msgctl, "msgctl"),
    (linux::__NR_fcntl, "fcntl"),
    (linux::__NR_flock, "flock"),
    (linux::__NR_fsync, "fsync"),
    (linux::__NR_fdatasync, "fdatasync"),
    (linux::__NR_truncate, "truncate"),
    (linux::__NR_ftruncate, "ftruncate"),
    (linux::__NR_getdents, "getdents"),
    (linux::__NR_getcwd, "getcwd"),
    (linux::__NR_chdir, "chdir"),
    (linux::__NR_fchdir, "fchdir"),
    (linux::__NR_rename, "rename"),
    (linux::__NR_mkdir, "mkdir"),
    (linux::__NR_rmdir, "rmdir"),
    (linux::__NR_creat, "creat"),
    (linux::__NR_link, "link"),
    (linux::__NR_unlink, "unlink"),
    (linux::__NR_symlink, "symlink"),
    (linux::__NR_readlink, "readlink"),
    (linux::__NR_chmod, "chmod"),
    (linux::__NR_fchmod, "fchmod"),
    (linux::__NR_chown, "chown"),
    (linux::__NR_fchown, "fchown"),
    (linux::__NR_lchown, "lchown"),
    (linux::__NR_umask, "umask"),
    (linux::__NR_gettimeofday, "gettimeofday"),
    (linux::__NR_getrlimit, "getrlimit"),
    (linux::__NR_getrusage, "getrusage"),
    (linux::__NR_sysinfo, "sysinfo"),
    (linux::__NR_times, "times"),
    (linux::__NR_ptrace, "ptrace"),
    (linux::__NR_getuid, "getuid"),
    (linux::__NR_syslog, "syslog"),
    (linux::__NR_getgid, "getgid"),
    (linux::__NR_setuid, "setuid"),
    (linux::__NR_setgid, "setgid"),
    (linux::__NR_geteuid, "geteuid"),
    (linux::__NR_getegid, "getegid"),
    (linux::__NR_setpgid, "setpgid"),
    (linux::__NR_getppid, "getppid"),
    (linux::__NR_getpgrp, "getpgrp"),
    (linux::__NR_setsid, "setsid"),
    (linux::__NR_setreuid, "setreuid"),
    (linux::__NR_setregid, "setregid"),
    (linux::__NR_getgroups, "getgroups"),
    (linux::__NR_setgroups, "setgroups"),
    (linux::__NR_setresuid, "setresuid"),
    (linux::__NR_getresuid, "getresuid"),
    (linux::__NR_setresgid, "setresgid"),
    (linux::__NR_getresgid, "getresgid"),
    (linux::__NR_getpgid, "getpgid"),
    (linux::__NR_setfsuid, "setfsuid"),
    (linux::__NR_setfsgid, "setfsgid"),
    (linux::__NR_getsid, "getsid"),
    (linux::__NR_capget, "capget"),
    (linux::__NR_capset, "capset"),
    (linux::__NR_rt_sigpending, "rt_sigpending"),
    (linux::__NR_rt_sigtimedwait, "rt_sigtimedwait"),
    (linux::__NR_rt_sigqueueinfo, "rt_sigqueueinfo"),
    (linux::__NR_rt_sigsuspend, "rt_sigsuspend"),
    (linux::__NR_sigaltstack, "sigaltstack"),
    (linux::__NR_utime, "utime"),
    (linux::__NR_mknod, "mknod"),
    (linux::__NR_uselib, "uselib"),
    (linux::__NR_personality, "personality"),
    (linux::__NR_ustat, "ustat"),
    (linux::__NR_statfs, "statfs"),
    (linux::__NR_fstatfs, "fstatfs"),
    (linux::__NR_sysfs, "sysfs"),
    (linux::__NR_getpriority, "getpriority"),
    (linux::__NR_setpriority, "setpriority"),
    (linux::__NR_sched_setparam, "sched_setparam"),
    (linux::__NR_sched_getparam, "sched_getparam"),
    (linux::__NR_sched_setscheduler, "sched_setscheduler"),
    (linux::__NR_sched_getscheduler, "sched_getscheduler"),
    (linux::__NR_sched_get_priority_max, "sched_get_priority_max"),
    (linux::__NR_sched_get_priority_min, "sched_get_priority_min"),
    (linux::__NR_sched_rr_get_interval, "sched_rr_get_interval"),
    (linux::__NR_mlock, "mlock"),
    (linux::__NR_munlock, "munlock"),
    (linux::__NR_mlockall, "mlockall"),
    (linux::__NR_munlockall, "munlockall"),
    (linux::__NR_vhangup, "vhangup"),
    (linux::__NR_modify_ldt, "modify_ldt"),
    (linux::__NR_pivot_root, "pivot_root"),
    (linux::__NR__sysctl, "_sysctl"),
    (linux::__NR_prctl, "prctl"),
    (linux::__NR_arch_prctl, "arch_prctl"),
    (linux::__NR_adjtimex, "adjtimex"),
    (linux::__NR_setrlimit, "setrlimit"),
    (linux::__NR_chroot, "chroot"),
    (linux::__NR_sync, "sync"),
    (linux::__NR_acct, "acct"),
    (linux::__NR_settimeofday, "settimeofday"),
    (linux::__NR_mount, "mount"),
    (linux::__NR_umount2, "umount2"),
    (linux::__NR_swapon, "swapon"),
    (linux::__NR_swapoff, "swapoff"),
    (linux::__NR_reboot, "reboot"),
    (linux::__NR_sethostname, "sethostname"),
    (linux::__NR_setdomainname, "setdomainname"),
    (linux::__NR_iopl, "iopl"),
    (linux::__NR_ioperm, "ioperm"),
    (linux::__NR_create_module, "create_module"),
    (linux::__NR_init_module, "init_module"),
    (linux::__NR_delete_module, "delete_module"),
    (linux::__NR_get_kernel_syms, "get_kernel_syms"),
    (linux::__NR_query_module, "query_module"),
    (linux::__NR_quotactl, "quotactl"),
    (linux::__NR_nfsservctl, "nfsservctl"),
    (linux::__NR_getpmsg, "getpmsg"),
    (linux::__NR_putpmsg, "putpmsg"),
    (linux::__NR_afs_syscall, "afs_syscall"),
    (linux::__NR_tuxcall, "tuxcall"),
    (linux::__NR_security, "security"),
    (linux::__NR_gettid, "gettid"),
    (linux::__NR_readahead, "readahead"),
    (linux::__NR_setxattr, "setxattr"),
    (linux::__NR_lsetxattr, "lsetxattr"),
    (linux::__NR_fsetxattr, "fsetxattr"),
    (linux::__NR_getxattr, "getxattr"),
    (linux::__NR_lgetxattr, "lgetxattr"),
    (linux::__NR_fgetxattr, "fgetxattr"),
    (linux::__NR_listxattr, "listxattr"),
    (linux::__NR_llistxattr, "llistxattr"),
    (linux::__NR_flistxattr, "flistxattr"),
    (linux::__NR_removexattr, "removexattr"),
    (linux::__NR_lremovexattr, "lremovexattr"),
    (linux::__NR_fremovexattr, "fremovexattr"),
    (linux::__NR_tkill, "tkill"),
    (linux::__NR_time, "time"),
    (linux::__NR_futex, "futex"),
    (linux::__NR_sched_setaffinity, "sched_setaffinity"),
    (linux::__NR_sched_getaffinity, "sched_getaffinity"),
    (linux::__NR_set_thread_area, "set_thread_area"),
    (linux::__NR_io_setup, "io_setup"),
    (linux::__NR_io_destroy, "io_destroy"),
    (linux::__NR_io_getevents, "io_getevents"),
    (linux::__NR_io_submit, "io_submit"),
    (linux::__NR_io_cancel, "io_cancel"),
    (linux::__NR_get_thread_area, "get_thread_area"),
    (linux::__NR_lookup_dcookie, "lookup_dcookie"),
    (linux::__NR_epoll_create, "epoll_create"),
    (linux::__NR_epoll_ctl_old, "epoll_ctl_old"),
    (linux::__NR_epoll_wait_old, "epoll_wait_old"),
    (linux::__NR_remap_file_pages, "remap_file_pages"),
    (linux::__NR_getdents64, "getdents64"),
    (linux::__NR_set_tid_address, "set_tid_address"),
    (linux::__NR_restart_syscall, "restart_syscall"),
    (linux::__NR_semtimedop, "semtimedop"),
    (linux::__NR_fadvise64, "fadvise64"),
    (linux::__NR_timer_create, "timer_create"),
    (linux::__NR_timer_settime, "timer_settime"),
    (linux::__NR_timer_gettime, "timer_gettime"),
    (linux::__NR_timer_getoverrun, "timer_getoverrun"),
    (linux::__NR_timer_delete, "timer_delete"),
    (linux::__NR_clock_settime, "clock_settime"),
    (linux::__NR_clock_gettime, "clock_gettime"),
    (linux::__NR_clock_getres, "clock_getres"),
    (linux::__NR_clock_nanosleep, "clock_nanosleep"),
    (linux::__NR_exit_group, "exit_group"),
    (linux::__NR_epoll_wait, "epoll_wait"),
    (linux::__NR_epoll_ctl, "epoll_ctl"),
    (linux::__NR_tgkill, "tgkill"),
    (linux::__NR_utimes, "utimes"),
    (linux::__NR_vserver, "vserver"),
    (linux::__NR_mbind, "mbind"),
    (linux::__NR_set_mempolicy, "set_mempolicy"),
    (linux::__NR_get_mempolicy, "get_mempolicy"),
    (linux::__NR_mq_open, "mq_open"),
    (linux::__NR_mq_unlink, "mq_unlink"),
    (linux::__NR_mq_timedsend, "mq_timedsend"),
    (linux::__NR_mq_timedreceive, "mq_timedreceive"),
    (linux::__NR_mq_notify, "mq_notify"),
    (linux::__NR_mq_getsetattr, "mq_getsetattr"),
    (linux::__NR_kexec_load, "kexec_load"),
    (linux::__NR_waitid, "waitid"),
    (linux::__NR_add_key, "add_key"),
    (linux::__NR_request_key, "request_key"),
    (linux::__NR_keyctl, "keyctl"),
    (linux::__NR_ioprio_set, "ioprio_set"),
    (linux::__NR_ioprio_get, "ioprio_get"),
    (linux::__NR_inotify_init, "inotify_init"),
    (linux::__NR_inotify_add_watch, "inotify_add_watch"),
    (linux::__NR_inotify_rm_watch, "inotify_rm_watch"),
    (linux::__NR_migrate_pages, "migrate_pages"),
    (linux::__NR_openat, "openat"),
    (linux::__NR_mkdirat, "mkdirat"),
    (linux::__NR_mknodat, "mknodat"),
    (linux::__NR_fchownat, "fchownat"),
    (linux::__NR_futimesat, "futimesat"),
    (linux::__NR_newfstatat, "newfstatat"),
    (linux::__NR_unlinkat, "unlinkat"),
    (linux::__NR_renameat, "renameat"),
    (linux::__NR_linkat, "linkat"),
    (linux::__NR_symlinkat, "symlinkat"),
    (linux::__NR_readlinkat, "readlinkat"),
    (linux::__NR_fchmodat, "fchmodat"),
    (linux::__NR_faccessat, "faccessat"),
    (linux::__NR_pselect6, "pselect6"),
    (linux::__NR_ppoll, "ppoll"),
    (linux::__NR_unshare, "unshare"),
    (linux::__NR_set_robust_list, "set_robust_list"),
    (linux::__NR_get_robust_list, "get_robust_list"),
    (linux::__NR_splice, "splice"),
    (linux::__NR_tee, "tee"),
    (linux::__NR_sync_file_range, "sync_file_range"),
    (linux::__NR_vmsplice, "vmsplice"),
    (linux::__NR_move_pages, "move_pages"),
    (linux::__NR_utimensat, "utimensat"),
    (linux::__NR_epoll_pwait, "epoll_pwait"),
    (linux::__NR_signalfd, "signalfd"),
    (linux::__NR_timerfd_create, "timerfd_create"),
    (linux::__NR_eventfd, "eventfd"),
    (linux::__NR_fallocate, "fallocate"),
    (linux::__NR_timerfd_settime, "timerfd_settime"),
    (linux::__NR_timerfd_gettime, "timerfd_gettime"),
    (linux::__NR_accept4, "accept4"),
    (linux::__NR_signalfd4, "signalfd4"),
    (linux::__NR_eventfd2, "eventfd2"),
    (linux::__NR_epoll_create1, "epoll_create1"),
    (linux::__NR_dup3, "dup3"),
    (linux::__NR_pipe2, "pipe2"),
    (linux::__NR_inotify_init1, "inotify_init1"),
    (linux::__NR_preadv, "preadv"),
    (linux::__NR_pwritev, "pwritev"),
    (linux::__NR_rt_tgsigqueueinfo, "rt_tgsigqueueinfo"),
    (linux::__NR_perf_event_open, "perf_event_open"),
    (linux::__NR_recvmmsg, "recvmmsg"),
    (linux::__NR_fanotify_init, "fanotify_init"),
    (linux::__NR_fanotify_mark, "fanotify_mark"),
    (linux::__NR_prlimit64, "prlimit64"),
    (linux::__NR_name_to_handle_at, "name_to_handle_at"),
    (linux::__NR_open_by_handle_at, "open_by_handle_at"),
    (linux::__NR_clock_adjtime, "clock_adjtime"),
    (linux::__NR_syncfs, "syncfs"),
    (linux::__NR_sendmmsg, "sendmmsg"),
    (linux::__NR_setns, "setns"),
    (linux::__NR_getcpu, "getcpu"),
    (linux::__NR_process_vm_readv, "process_vm_readv"),
    (linux::__NR_process_vm_writev, "process_vm_writev"),
    (linux::__NR_kcmp, "kcmp"),
    (linux::__NR_finit_module, "finit_module"),
    (linux::__NR_sched_setattr, "sched_setattr"),
    (linux::__NR_sched_getattr, "sched_getattr"),
    (linux::__NR_renameat2, "renameat2"),
    (linux::__NR_seccomp, "seccomp"),
    (linux::__NR_getrandom, "getrandom"),
    (linux::__NR_memfd_create, "memfd_create"),
    (linux::__NR_kexec_file_load, "kexec_file_load"),
    (linux::__NR_bpf, "bpf"),
    (linux::__NR_execveat, "execveat"),
    (linux::__NR_userfaultfd, "userfaultfd"),
    (linux::__NR_membarrier, "membarrier"),
    (linux::__NR_mlock2, "mlock2"),
    (linux::__NR_copy_file_range, "copy_file_range"),
    (linux::__NR_preadv2, "preadv2"),
    (linux::__NR_pwritev2, "pwritev2"),
    (linux::__NR_pkey_mprotect, "pkey_mprotect"),
    (linux::__NR_pkey_alloc, "pkey_alloc"),
    (linux::__NR_pkey_free, "pkey_free"),
    (linux::__NR_statx, "statx"),
    (linux::__NR_io_pgetevents, "io_pgetevents"),
    (linux::__NR_rseq, "rseq"),
    (linux::__NR_uretprobe, "uretprobe"),
    (linux::__NR_pidfd_send_signal, "pidfd_send_signal"),
    (linux::__NR_io_uring_setup, "io_uring_setup"),
    (linux::__NR_io_uring_enter, "io_uring_enter"),
    (linux::__NR_io_uring_register, "io_uring_register"),
    (linux::__NR_open_tree, "open_tree"),
    (linux::__NR_move_mount, "move_mount"),
    (linux::__NR_fsopen, "fsopen"),
    (linux::__NR_fsconfig, "fsconfig"),
    (linux::__NR_fsmount, "fsmount"),
    (linux::__NR_fspick, "fspick"),
    (linux::__NR_pidfd_open, "pidfd_open"),
    (linux::__NR_clone3, "clone3"),
    (linux::__NR_close_range, "close_range"),
    (linux::__NR_openat2, "openat2"),
    (linux::__NR_pidfd_getfd, "pidfd_getfd"),
    (linux::__NR_faccessat2, "faccessat2"),
    (linux::__NR_process_madvise, "process_madvise"),
    (linux::__NR_epoll_pwait2, "epoll_pwait2"),
    (linux::__NR_mount_setattr, "mount_setattr"),
    (linux::__NR_quotactl_fd, "quotactl_fd"),
    (
        linux::__NR_landlock_create_ruleset,
        "landlock_create_ruleset",
    ),
    (linux::__NR_landlock_add_rule, "landlock_add_rule"),
    (linux::__NR_landlock_restrict_self, "landlock_restrict_self"),
    (linux::__NR_memfd_secret, "memfd_secret"),
    (linux::__NR_process_mrelease, "process_mrelease"),
    (linux::__NR_futex_waitv, "futex_waitv"),
    (
        linux::__NR_set_mempolicy_home_node,
        "set_mempolicy_home_node",
    ),
    (linux::__NR_cachestat, "cachestat"),
    (linux::__NR_fchmodat2, "fchmodat2"),
    (linux::__NR_map_shadow_stack, "map_shadow_stack"),
    (linux::__NR_futex_wake, "futex_wake"),
    (linux::__NR_futex_wait, "futex_wait"),
    (linux::__NR_futex_requeue, "futex_requeue"),
    (linux::__NR_statmount, "statmount"),
    (linux::__NR_listmount, "listmount"),
    (linux::__NR_lsm_get_self_attr, "lsm_get_self_attr"),
    (linux::__NR_lsm_set_self_attr, "lsm_set_self_attr"),
    (linux::__NR_lsm_list_modules, "lsm_list_modules"),
    (linux::__NR_mseal, "mseal"),
    (linux::__NR_setxattrat, "setxattrat"),
    (linux::__NR_getxattrat, "getxattrat"),
    (linux::__NR_listxattrat, "listxattrat"),
    (linux::__NR_removexattrat, "removexattrat"),
    (linux::__NR_open_tree_attr, "open_tree_attr"),
    (linux::__NR_file_getattr, "file_getattr"),
    (linux::__NR_file_setattr, "file_setattr"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_agree_with_linux() {
        for entry in supported() {
            let known = NAMES.iter().find(|(number, _)| *number == entry.number);
            assert_eq!(known.map(|(_, name)| *name), Some(entry.name));
        }
    }
}

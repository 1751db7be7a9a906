//! System calls about the process and the machine: identities, limits, names, randomness.

use alloc::vec::Vec;

use linux_raw_sys::general as linux;

use super::{Call, Entry, Outcome, time::process_cpu_time};
use crate::{
    Errno, Result,
    memory::user,
    task::{Credentials, NAME_LENGTH},
    time::to_timeval,
    trace,
};

/// The supported calls.
pub const CALLS: &[Entry] = &[
    Entry {
        number: linux::__NR_getpid,
        name: "getpid",
        handler: getpid,
        limits: "",
    },
    Entry {
        number: linux::__NR_getppid,
        name: "getppid",
        handler: getppid,
        limits: "0: there is no parent",
    },
    Entry {
        number: linux::__NR_getpgrp,
        name: "getpgrp",
        handler: getpid,
        limits: "",
    },
    Entry {
        number: linux::__NR_getpgid,
        name: "getpgid",
        handler: getpgid,
        limits: "",
    },
    Entry {
        number: linux::__NR_setpgid,
        name: "setpgid",
        handler: setpgid,
        limits: "EPERM: the first process leads its group",
    },
    Entry {
        number: linux::__NR_getsid,
        name: "getsid",
        handler: getpgid,
        limits: "",
    },
    Entry {
        number: linux::__NR_setsid,
        name: "setsid",
        handler: setsid,
        limits: "EPERM: the first process leads its session",
    },
    Entry {
        number: linux::__NR_getuid,
        name: "getuid",
        handler: getuid,
        limits: "",
    },
    Entry {
        number: linux::__NR_geteuid,
        name: "geteuid",
        handler: geteuid,
        limits: "",
    },
    Entry {
        number: linux::__NR_getgid,
        name: "getgid",
        handler: getgid,
        limits: "",
    },
    Entry {
        number: linux::__NR_getegid,
        name: "getegid",
        handler: getegid,
        limits: "",
    },
    Entry {
        number: linux::__NR_getresuid,
        name: "getresuid",
        handler: getresuid,
        limits: "",
    },
    Entry {
        number: linux::__NR_getresgid,
        name: "getresgid",
        handler: getresgid,
        limits: "",
    },
    Entry {
        number: linux::__NR_setuid,
        name: "setuid",
        handler: setuid,
        limits: "for all threads",
    },
    Entry {
        number: linux::__NR_setgid,
        name: "setgid",
        handler: setgid,
        limits: "for all threads",
    },
    Entry {
        number: linux::__NR_setreuid,
        name: "setreuid",
        handler: setreuid,
        limits: "for all threads",
    },
    Entry {
        number: linux::__NR_setregid,
        name: "setregid",
        handler: setregid,
        limits: "for all threads",
    },
    Entry {
        number: linux::__NR_setresuid,
        name: "setresuid",
        handler: setresuid,
        limits: "for all threads",
    },
    Entry {
        number: linux::__NR_setresgid,
        name: "setresgid",
        handler: setresgid,
        limits: "for all threads",
    },
    Entry {
        number: linux::__NR_getgroups,
        name: "getgroups",
        handler: getgroups,
        limits: "",
    },
    Entry {
        number: linux::__NR_setgroups,
        name: "setgroups",
        handler: setgroups,
        limits: "for all threads",
    },
    Entry {
        number: linux::__NR_uname,
        name: "uname",
        handler: uname,
        limits: "",
    },
    Entry {
        number: linux::__NR_sysinfo,
        name: "sysinfo",
        handler: sysinfo,
        limits: "no load averages",
    },
    Entry {
        number: linux::__NR_getrlimit,
        name: "getrlimit",
        handler: getrlimit,
        limits: "",
    },
    Entry {
        number: linux::__NR_setrlimit,
        name: "setrlimit",
        handler: setrlimit,
        limits: "RLIMIT_NOFILE is enforced; others are kept",
    },
    Entry {
        number: linux::__NR_prlimit64,
        name: "prlimit64",
        handler: prlimit64,
        limits: "RLIMIT_NOFILE is enforced; others are kept",
    },
    Entry {
        number: linux::__NR_getrusage,
        name: "getrusage",
        handler: getrusage,
        limits: "times and largest size only",
    },
    Entry {
        number: linux::__NR_prctl,
        name: "prctl",
        handler: prctl,
        limits: "names, dumpable, no-new-privileges, timer slack, parent-death signal, sub-reaper, huge pages: kept and told; keepcaps 1: EPERM; others: EINVAL",
    },
    Entry {
        number: linux::__NR_arch_prctl,
        name: "arch_prctl",
        handler: arch_prctl,
        limits: "FS only; GS belongs to the kernel: EINVAL",
    },
    Entry {
        number: linux::__NR_getrandom,
        name: "getrandom",
        handler: getrandom,
        limits: "",
    },
    Entry {
        number: linux::__NR_wait4,
        name: "wait4",
        handler: wait,
        limits: "ECHILD: there are no children",
    },
    Entry {
        number: linux::__NR_waitid,
        name: "waitid",
        handler: wait,
        limits: "ECHILD: there are no children",
    },
    Entry {
        number: linux::__NR_capget,
        name: "capget",
        handler: capget,
        limits: "",
    },
    Entry {
        number: linux::__NR_capset,
        name: "capset",
        handler: capset,
        limits: "only to what it has",
    },
    Entry {
        number: linux::__NR_personality,
        name: "personality",
        handler: personality,
        limits: "PER_LINUX only",
    },
];

fn done(value: u32) -> Outcome {
    Outcome::Done(Ok(u64::from(value)))
}

fn getpid(call: &mut Call<'_>) -> Outcome {
    done(call.process().id)
}

fn getppid(_: &mut Call<'_>) -> Outcome {
    done(0)
}

fn getpgid(call: &mut Call<'_>) -> Outcome {
    let own = call.process().id;
    match call.unsigned(0) {
        0 => done(own),
        id if id == own => done(own),
        _ => Outcome::fail(Errno::ESRCH),
    }
}

fn setpgid(_: &mut Call<'_>) -> Outcome {
    Outcome::fail(Errno::EPERM)
}

fn setsid(_: &mut Call<'_>) -> Outcome {
    Outcome::fail(Errno::EPERM)
}

fn getuid(call: &mut Call<'_>) -> Outcome {
    done(call.process().credentials.lock().uid[0])
}

fn geteuid(call: &mut Call<'_>) -> Outcome {
    done(call.process().credentials.lock().uid[1])
}

fn getgid(call: &mut Call<'_>) -> Outcome {
    done(call.process().credentials.lock().gid[0])
}

fn getegid(call: &mut Call<'_>) -> Outcome {
    done(call.process().credentials.lock().gid[1])
}

fn write_three(call: &Call<'_>, identities: [u32; 3]) -> Outcome {
    let result = identities
        .iter()
        .enumerate()
        .try_for_each(|(index, identity)| user::write(call.raw(index), identity));
    Outcome::from(result)
}

fn getresuid(call: &mut Call<'_>) -> Outcome {
    let identities = call.process().credentials.lock().uid;
    write_three(call, identities)
}

fn getresgid(call: &mut Call<'_>) -> Outcome {
    let identities = call.process().credentials.lock().gid;
    write_three(call, identities)
}

/// Which of the three identities.
enum Which {
    User,
    Group,
}

/// Sets real, effective and saved identity; `None` leaves one as it is. Without privilege only to one of the three.
fn set_three(call: &Call<'_>, which: &Which, new: [Option<u32>; 3]) -> Result<()> {
    let mut credentials = call.process().credentials.lock();
    let privileged = credentials.is_privileged();
    let current = match which {
        Which::User => &mut credentials.uid,
        Which::Group => &mut credentials.gid,
    };
    let old = *current;
    if !privileged && new.iter().flatten().any(|identity| !old.contains(identity)) {
        return Err(Errno::EPERM);
    }
    for (slot, identity) in current.iter_mut().zip(new) {
        if let Some(identity) = identity {
            *slot = identity;
        }
    }
    if current[1] != old[1] {
        // As Linux does for whoever acts as somebody else from now on (credentials(7), PR_SET_DUMPABLE(2const)).
        call.process().control.lock().dumpable = false;
        call.thread.control.lock().death_signal = 0;
    }
    Ok(())
}

fn wish(raw: u64) -> Option<u32> {
    (raw as u32 != u32::MAX).then_some(raw as u32)
}

fn set_one(call: &Call<'_>, which: &Which) -> Outcome {
    let identity = call.unsigned(0);
    if identity == u32::MAX {
        return Outcome::fail(Errno::EINVAL);
    }
    let privileged = call.process().credentials.lock().is_privileged();
    let new = if privileged {
        [Some(identity); 3]
    } else {
        [None, Some(identity), None]
    };
    set_three(call, which, new).into()
}

fn setuid(call: &mut Call<'_>) -> Outcome {
    set_one(call, &Which::User)
}

fn setgid(call: &mut Call<'_>) -> Outcome {
    set_one(call, &Which::Group)
}

fn set_two(call: &Call<'_>, which: &Which) -> Outcome {
    let (real, effective) = (wish(call.raw(0)), wish(call.raw(1)));
    // The saved identity follows the effective one when the real one is set (setreuid(2)).
    let saved = if real.is_some() || effective.is_some() {
        effective
    } else {
        None
    };
    set_three(call, which, [real, effective, saved]).into()
}

fn setreuid(call: &mut Call<'_>) -> Outcome {
    set_two(call, &Which::User)
}

fn setregid(call: &mut Call<'_>) -> Outcome {
    set_two(call, &Which::Group)
}

fn setresuid(call: &mut Call<'_>) -> Outcome {
    set_three(
        call,
        &Which::User,
        [wish(call.raw(0)), wish(call.raw(1)), wish(call.raw(2))],
    )
    .into()
}

fn setresgid(call: &mut Call<'_>) -> Outcome {
    set_three(
        call,
        &Which::Group,
        [wish(call.raw(0)), wish(call.raw(1)), wish(call.raw(2))],
    )
    .into()
}

fn getgroups(call: &mut Call<'_>) -> Outcome {
    let groups = call.process().credentials.lock().groups.clone();
    let result = (|| {
        let room = usize::try_from(call.int(0)).map_err(|_| Errno::EINVAL)?;
        if room == 0 {
            return Ok(groups.len());
        }
        if room < groups.len() {
            return Err(Errno::EINVAL);
        }
        for (index, group) in groups.iter().enumerate() {
            user::write(call.raw(1) + 4 * index as u64, group)?;
        }
        Ok(groups.len())
    })();
    Outcome::from(result)
}

fn setgroups(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        if !call.process().credentials.lock().is_privileged() {
            return Err(Errno::EPERM);
        }
        let count = usize::try_from(call.int(0))
            .ok()
            .filter(|&count| count <= 65536)
            .ok_or(Errno::EINVAL)?;
        let groups: Vec<u32> = user::read_many(call.raw(1), count)?;
        let mut credentials = call.process().credentials.lock();
        *credentials = Credentials {
            groups,
            ..credentials.clone()
        };
        Ok(())
    })();
    Outcome::from(result)
}

/// Release that programs are told: the Linux whose interface this is.
pub const RELEASE: &str = "6.1.0-kiln";
/// Version string of `uname(2)`.
pub const VERSION: &str = concat!("#1 Kiln ", env!("CARGO_PKG_VERSION"));

fn uname(call: &mut Call<'_>) -> Outcome {
    let hostname = call.kernel().hostname();
    let fields = [
        "Linux",
        hostname.as_str(),
        RELEASE,
        VERSION,
        "x86_64",
        "(none)",
    ];
    let mut bytes = [0u8; 6 * 65];
    for (slot, field) in bytes.chunks_exact_mut(65).zip(fields) {
        let length = field.len().min(64);
        slot[..length].copy_from_slice(&field.as_bytes()[..length]);
    }
    user::write_bytes(call.raw(0), &bytes).into()
}

fn sysinfo(call: &mut Call<'_>) -> Outcome {
    let kernel = call.kernel();
    // struct sysinfo: uptime, loads[3], totalram, freeram, sharedram, bufferram, totalswap, freeswap, procs (u16),
    // totalhigh, freehigh, mem_unit (u32).
    let free = kernel
        .memory_limit
        .saturating_sub(kernel.host.memory_used());
    let threads = call.process().threads.lock().len() as u64;
    let uptime = kernel.clock.uptime() / crate::time::SECOND;
    let words = [
        uptime,
        0,
        0,
        0,
        kernel.memory_limit,
        free,
        0,
        0,
        0,
        0,
        threads & 0xffff,
        0,
        0,
        1,
    ];
    let mut bytes = [0u8; 14 * 8];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    user::write_bytes(call.raw(0), &bytes).into()
}

fn limit_of(call: &Call<'_>, resource: u32) -> Result<(u64, u64)> {
    call.process()
        .limits
        .lock()
        .get(resource as usize)
        .copied()
        .ok_or(Errno::EINVAL)
}

fn set_limit(call: &Call<'_>, resource: u32, soft: u64, hard: u64) -> Result<()> {
    if soft > hard {
        return Err(Errno::EINVAL);
    }
    let privileged = call.process().credentials.lock().is_privileged();
    let (_, old_hard) = limit_of(call, resource)?;
    if hard > old_hard && !privileged {
        return Err(Errno::EPERM);
    }
    if resource == linux::RLIMIT_NOFILE {
        if hard > crate::task::DESCRIPTOR_LIMIT {
            return Err(Errno::EPERM);
        }
        call.process().files.lock().set_limit(soft as usize);
    }
    if let Some(slot) = call.process().limits.lock().get_mut(resource as usize) {
        *slot = (soft, hard);
    }
    Ok(())
}

fn write_limit(address: u64, limit: (u64, u64)) -> Result<()> {
    user::write(address, &limit.0)?;
    user::write(address + 8, &limit.1)
}

fn getrlimit(call: &mut Call<'_>) -> Outcome {
    limit_of(call, call.unsigned(0))
        .and_then(|limit| write_limit(call.raw(1), limit))
        .into()
}

fn setrlimit(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let (soft, hard) = (user::read(call.raw(1))?, user::read(call.raw(1) + 8)?);
        set_limit(call, call.unsigned(0), soft, hard)
    })();
    Outcome::from(result)
}

fn prlimit64(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        if call.unsigned(0) != 0 && call.unsigned(0) != call.process().id {
            return Err(Errno::ESRCH);
        }
        let old = limit_of(call, call.unsigned(1))?;
        if call.raw(2) != 0 {
            let (soft, hard) = (user::read(call.raw(2))?, user::read(call.raw(2) + 8)?);
            set_limit(call, call.unsigned(1), soft, hard)?;
        }
        if call.raw(3) != 0 {
            write_limit(call.raw(3), old)?;
        }
        Ok(())
    })();
    Outcome::from(result)
}

fn getrusage(call: &mut Call<'_>) -> Outcome {
    let used = match call.int(0) {
        0 => process_cpu_time(call.thread),
        1 => call.thread.cpu_time(),
        -1 => 0,
        _ => return Outcome::fail(Errno::EINVAL),
    };
    let mut usage: linux::rusage = user::zeroed();
    let time = to_timeval(used);
    usage.ru_utime.tv_sec = time.tv_sec as _;
    usage.ru_utime.tv_usec = time.tv_usec as _;
    usage.ru_maxrss = (call.kernel().host.memory_used() / 1024) as _;
    user::write(call.raw(1), &usage).into()
}

fn prctl(call: &mut Call<'_>) -> Outcome {
    use linux_raw_sys::prctl as options;
    let mut own = call.thread.control.lock();
    let mut common = call.process().control.lock();
    let value = call.raw(1);
    // Newer options insist on zeros in what they do not use.
    let rest = |from: usize| call.arguments[from..5].iter().all(|word| *word == 0);
    match call.unsigned(0) {
        options::PR_SET_NAME => {
            let result = user::read_c_prefix(value, NAME_LENGTH)
                .map(|(name, _)| *call.thread.name.lock() = name);
            return result.into();
        }
        options::PR_GET_NAME => {
            let mut bytes = call.thread.name.lock().clone();
            bytes.resize(NAME_LENGTH + 1, 0);
            return user::write_bytes(value, &bytes).into();
        }
        options::PR_GET_DUMPABLE => return done(common.dumpable.into()),
        options::PR_SET_DUMPABLE if value <= 1 => common.dumpable = value == 1,
        options::PR_GET_NO_NEW_PRIVS if rest(1) => return done(own.no_new_privileges.into()),
        options::PR_SET_NO_NEW_PRIVS if value == 1 && rest(2) => own.no_new_privileges = true,
        options::PR_GET_TIMERSLACK => return Outcome::Done(Ok(own.timer_slack)),
        options::PR_SET_TIMERSLACK if value == 0 => own.timer_slack = own.default_slack,
        options::PR_SET_TIMERSLACK => own.timer_slack = value,
        options::PR_GET_PDEATHSIG => return user::write(value, &own.death_signal).into(),
        options::PR_SET_PDEATHSIG if value <= 64 => own.death_signal = value as u32,
        options::PR_GET_CHILD_SUBREAPER => {
            return user::write(value, &u32::from(common.subreaper)).into();
        }
        options::PR_SET_CHILD_SUBREAPER => common.subreaper = value != 0,
        options::PR_GET_THP_DISABLE if rest(1) => return done(common.no_huge_pages.into()),
        options::PR_SET_THP_DISABLE if rest(2) => common.no_huge_pages = value != 0,
        // A change of identity always decides over privileges: they cannot be kept.
        options::PR_SET_KEEPCAPS if value == 1 => {
            refuse(options::PR_SET_KEEPCAPS, value);
            return Outcome::fail(Errno::EPERM);
        }
        options::PR_SET_KEEPCAPS if value == 0 => {}
        options::PR_GET_KEEPCAPS | options::PR_GET_SECUREBITS | options::PR_GET_SECCOMP => {}
        options::PR_CAPBSET_READ if value <= LAST_CAPABILITY => return done(1),
        // Wrong values of what is supported are no news.
        options::PR_SET_DUMPABLE
        | options::PR_GET_NO_NEW_PRIVS
        | options::PR_SET_NO_NEW_PRIVS
        | options::PR_SET_PDEATHSIG
        | options::PR_GET_THP_DISABLE
        | options::PR_SET_THP_DISABLE
        | options::PR_SET_KEEPCAPS
        | options::PR_CAPBSET_READ => return Outcome::fail(Errno::EINVAL),
        option => {
            refuse(option, value);
            return Outcome::fail(Errno::EINVAL);
        }
    }
    done(0)
}

/// Says that an option of `prctl` is not supported.
fn refuse(option: u32, value: u64) {
    trace::unsupported(
        u64::from(linux::__NR_prctl) << 32 | u64::from(option),
        format_args!("prctl option {option} ({value:#x})"),
    );
}

fn arch_prctl(call: &mut Call<'_>) -> Outcome {
    const ARCH_SET_FS: u64 = 0x1002;
    const ARCH_GET_FS: u64 = 0x1003;
    let cpu = &call.thread.process.kernel.cpu;
    match call.arguments[0] {
        ARCH_SET_FS => {
            if call.arguments[1] >= 1 << 47 {
                return Outcome::fail(Errno::EPERM);
            }
            cpu.set_fs_base(call.context, call.arguments[1]);
            Outcome::Done(Ok(0))
        }
        ARCH_GET_FS => {
            let base = cpu.fs_base(call.context);
            user::write(call.arguments[1], &base).into()
        }
        // Newer C libraries probe for shadow stacks and the like with further codes; EINVAL says no.
        _ => Outcome::fail(Errno::EINVAL),
    }
}

fn getrandom(call: &mut Call<'_>) -> Outcome {
    let flags = call.unsigned(2);
    if flags & !(linux::GRND_NONBLOCK | linux::GRND_RANDOM | linux::GRND_INSECURE) != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    let length = call.length(1).min(crate::file::io::MAX_TRANSFER);
    let mut done = 0;
    let mut chunk = [0u8; 256];
    while done < length {
        let step = chunk.len().min(length - done);
        let stored = call
            .kernel()
            .host
            .entropy(&mut chunk[..step])
            .and_then(|()| user::write_bytes(call.raw(0) + done as u64, &chunk[..step]));
        match stored {
            Ok(()) => done += step,
            Err(error) if done == 0 => return Outcome::fail(error),
            Err(_) => break,
        }
    }
    Outcome::Done(Ok(done as u64))
}

fn wait(_: &mut Call<'_>) -> Outcome {
    Outcome::fail(Errno::ECHILD)
}

/// `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// All capabilities of Linux 6.1.
const ALL_CAPABILITIES: u64 = (1 << (LAST_CAPABILITY + 1)) - 1;
/// `CAP_LAST_CAP` of Linux 6.1.
const LAST_CAPABILITY: u64 = 40;

fn capget(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let version = user::read::<u32>(call.raw(0))?;
        let id = user::read::<u32>(call.raw(0) + 4)?;
        if version != CAPABILITY_VERSION {
            user::write(call.raw(0), &CAPABILITY_VERSION)?;
            return if call.raw(1) == 0 {
                Ok(())
            } else {
                Err(Errno::EINVAL)
            };
        }
        if id != 0 {
            call.process().thread(id)?;
        }
        let set = if call.process().credentials.lock().is_privileged() {
            ALL_CAPABILITIES
        } else {
            0
        };
        for (index, word) in [set as u32, (set >> 32) as u32].into_iter().enumerate() {
            let address = call.raw(1) + 12 * index as u64;
            user::write(address, &word)?;
            user::write(address + 4, &word)?;
            user::write(address + 8, &0u32)?;
        }
        Ok(())
    })();
    Outcome::from(result)
}

fn capset(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        if user::read::<u32>(call.raw(0))? != CAPABILITY_VERSION {
            return Err(Errno::EINVAL);
        }
        let privileged = call.process().credentials.lock().is_privileged();
        let mut wanted = 0;
        for index in [0, 1] {
            let address = call.raw(1) + 12 * index;
            wanted |= u64::from(user::read::<u32>(address)? | user::read::<u32>(address + 4)?)
                << (32 * index);
        }
        let allowed = if privileged { ALL_CAPABILITIES } else { 0 };
        if wanted & !allowed != 0 {
            return Err(Errno::EPERM);
        }
        if wanted != allowed {
            trace::unsupported(
                u64::from(linux::__NR_capset) << 32,
                format_args!("capset to part of the capabilities ({wanted:#x})"),
            );
            return Err(Errno::EPERM);
        }
        Ok(())
    })();
    Outcome::from(result)
}

fn personality(call: &mut Call<'_>) -> Outcome {
    match call.unsigned(0) {
        0 | 0xffff_ffff => done(0),
        _ => Outcome::fail(Errno::EINVAL),
    }
}

//! System calls of threads: `clone(2)`, `futex(2)`, scheduling.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use linux_raw_sys::general as linux;

use super::{Call, Entry, Outcome, Restart, time::deadline_on};
use crate::{
    Errno, Result,
    memory::user,
    task::{executor::yield_now, futex, thread},
    time::{self, NEVER, from_timespec},
    trace,
};

/// The supported calls.
pub const CALLS: &[Entry] = &[
    Entry {
        number: linux::__NR_clone,
        name: "clone",
        handler: clone,
        limits: "threads only (CLONE_VM | CLONE_SIGHAND | CLONE_THREAD); a new process: ENOSYS",
    },
    Entry {
        number: linux::__NR_clone3,
        name: "clone3",
        handler: clone3,
        limits: "threads only, as clone",
    },
    Entry {
        number: linux::__NR_set_tid_address,
        name: "set_tid_address",
        handler: set_tid_address,
        limits: "",
    },
    Entry {
        number: linux::__NR_set_robust_list,
        name: "set_robust_list",
        handler: set_robust_list,
        limits: "",
    },
    Entry {
        number: linux::__NR_get_robust_list,
        name: "get_robust_list",
        handler: get_robust_list,
        limits: "",
    },
    Entry {
        number: linux::__NR_futex,
        name: "futex",
        handler: futex,
        limits: "no priority inheritance (FUTEX_*_PI): ENOSYS",
    },
    Entry {
        number: linux::__NR_gettid,
        name: "gettid",
        handler: gettid,
        limits: "",
    },
    Entry {
        number: linux::__NR_exit,
        name: "exit",
        handler: exit,
        limits: "",
    },
    Entry {
        number: linux::__NR_exit_group,
        name: "exit_group",
        handler: exit_group,
        limits: "",
    },
    Entry {
        number: linux::__NR_sched_yield,
        name: "sched_yield",
        handler: sched_yield,
        limits: "",
    },
    Entry {
        number: linux::__NR_sched_getaffinity,
        name: "sched_getaffinity",
        handler: sched_getaffinity,
        limits: "one CPU",
    },
    Entry {
        number: linux::__NR_sched_setaffinity,
        name: "sched_setaffinity",
        handler: sched_setaffinity,
        limits: "one CPU: a set without it is EINVAL",
    },
    Entry {
        number: linux::__NR_sched_getscheduler,
        name: "sched_getscheduler",
        handler: sched_getscheduler,
        limits: "SCHED_OTHER always",
    },
    Entry {
        number: linux::__NR_sched_setscheduler,
        name: "sched_setscheduler",
        handler: sched_setscheduler,
        limits: "SCHED_OTHER, SCHED_BATCH, SCHED_IDLE, all scheduled alike; others: EPERM",
    },
    Entry {
        number: linux::__NR_sched_getparam,
        name: "sched_getparam",
        handler: sched_getparam,
        limits: "priority 0 always",
    },
    Entry {
        number: linux::__NR_sched_get_priority_max,
        name: "sched_get_priority_max",
        handler: sched_get_priority_max,
        limits: "",
    },
    Entry {
        number: linux::__NR_sched_get_priority_min,
        name: "sched_get_priority_min",
        handler: sched_get_priority_min,
        limits: "",
    },
    Entry {
        number: linux::__NR_getcpu,
        name: "getcpu",
        handler: getcpu,
        limits: "one CPU",
    },
    Entry {
        number: linux::__NR_getpriority,
        name: "getpriority",
        handler: getpriority,
        limits: "",
    },
    Entry {
        number: linux::__NR_setpriority,
        name: "setpriority",
        handler: setpriority,
        limits: "for all threads; kept and told: there is one process",
    },
    Entry {
        number: linux::__NR_sched_setparam,
        name: "sched_setparam",
        handler: sched_setparam,
        limits: "priority 0 only",
    },
    Entry {
        number: linux::__NR_membarrier,
        name: "membarrier",
        handler: membarrier,
        limits: "one CPU: barriers hold by themselves",
    },
];

fn clone(call: &mut Call<'_>) -> Outcome {
    let flags = call.raw(0);
    // The low byte is the exit signal: of no use to a thread.
    spawn(
        call,
        flags & !0xff,
        call.raw(1),
        call.raw(2),
        call.raw(3),
        call.raw(4),
    )
    .into()
}

fn clone3(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        // struct clone_args, first version: 64 bytes.
        if call.raw(1) < 64 {
            return Err(Errno::EINVAL);
        }
        let words: [u64; 8] = user::read_many(call.raw(0), 8)?
            .try_into()
            .map_err(|_| Errno::EFAULT)?;
        let [flags, _, child_tid, parent_tid, _, stack, stack_size, tls] = words;
        let top = if stack == 0 {
            0
        } else {
            stack.checked_add(stack_size).ok_or(Errno::EINVAL)?
        };
        spawn(call, flags, top, parent_tid, child_tid, tls)
    })();
    Outcome::from(result)
}

fn spawn(
    call: &mut Call<'_>,
    flags: u64,
    stack: u64,
    parent_tid: u64,
    child_tid: u64,
    tls: u64,
) -> Result<u32> {
    let has = |flag: u32| flags & u64::from(flag) != 0;
    let needed = linux::CLONE_VM | linux::CLONE_SIGHAND | linux::CLONE_THREAD;
    if flags & u64::from(needed) != u64::from(needed) {
        trace::unsupported(
            u64::from(linux::__NR_clone) << 32,
            format_args!(
                "starting another process (fork, vfork, clone with flags {flags:#x}); only threads can be made"
            ),
        );
        return Err(Errno::ENOSYS);
    }
    let known = linux::CLONE_VM
        | linux::CLONE_FS
        | linux::CLONE_FILES
        | linux::CLONE_SIGHAND
        | linux::CLONE_THREAD
        | linux::CLONE_SYSVSEM
        | linux::CLONE_SETTLS
        | linux::CLONE_PARENT_SETTID
        | linux::CLONE_CHILD_CLEARTID
        | linux::CLONE_CHILD_SETTID
        | linux::CLONE_DETACHED
        | linux::CLONE_IO;
    if flags & !u64::from(known) != 0 {
        trace::unsupported(
            flags,
            format_args!("clone of a thread with flags {flags:#x}"),
        );
        return Err(Errno::EINVAL);
    }
    if !has(linux::CLONE_FS) || !has(linux::CLONE_FILES) {
        trace::unsupported(
            flags,
            format_args!("a thread with its own descriptors or working directory ({flags:#x})"),
        );
        return Err(Errno::EINVAL);
    }
    if has(linux::CLONE_SETTLS) && tls >= 1 << 47 {
        return Err(Errno::EPERM);
    }
    let kernel = Arc::clone(call.kernel());
    let mut context = kernel.cpu.duplicate(call.context);
    context.registers.rax = 0;
    if stack != 0 {
        context.registers.rsp = stack;
    }
    if has(linux::CLONE_SETTLS) {
        context.fs_base = tls;
    }
    let name = call.thread.name.lock().clone();
    let mask = call.thread.signals.lock().mask();
    let control = call.thread.control.lock().inherited();
    let new = call.process().add_thread(&name, mask, control);
    if has(linux::CLONE_CHILD_CLEARTID) {
        new.clear_on_exit.store(child_tid, Ordering::Relaxed);
    }
    // As in Linux, a bad address here does not undo the thread.
    if has(linux::CLONE_PARENT_SETTID) {
        let _ = user::write(parent_tid, &new.id);
    }
    if has(linux::CLONE_CHILD_SETTID) {
        let _ = user::write(child_tid, &new.id);
    }
    let id = new.id;
    kernel.executor.spawn(thread::run(new, context));
    Ok(id)
}

fn set_tid_address(call: &mut Call<'_>) -> Outcome {
    call.thread
        .clear_on_exit
        .store(call.raw(0), Ordering::Relaxed);
    Outcome::Done(Ok(u64::from(call.thread.id)))
}

/// Size of `struct robust_list_head`.
const ROBUST_HEAD: u64 = 24;

fn set_robust_list(call: &mut Call<'_>) -> Outcome {
    if call.raw(1) != ROBUST_HEAD {
        return Outcome::fail(Errno::EINVAL);
    }
    call.thread
        .robust_list
        .store(call.raw(0), Ordering::Relaxed);
    Outcome::Done(Ok(0))
}

fn get_robust_list(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let thread = match call.unsigned(0) {
            0 => Arc::clone(call.thread),
            id => call.process().thread(id)?,
        };
        user::write(call.raw(1), &thread.robust_list.load(Ordering::Relaxed))?;
        user::write(call.raw(2), &ROBUST_HEAD)
    })();
    Outcome::from(result)
}

fn futex(call: &mut Call<'_>) -> Outcome {
    let address = call.raw(0);
    let operation = call.unsigned(1);
    let value = call.unsigned(2);
    let clock = if operation & linux::FUTEX_CLOCK_REALTIME != 0 {
        linux::CLOCK_REALTIME
    } else {
        linux::CLOCK_MONOTONIC
    };
    let command = operation & !(linux::FUTEX_PRIVATE_FLAG | linux::FUTEX_CLOCK_REALTIME);
    let table = &call.process().futexes;
    // Counts are C ints: negative ones wake or move nobody, in Linux at least one.
    let count = |raw: u64| usize::try_from(raw as i32).unwrap_or(0);
    match command {
        linux::FUTEX_WAIT | linux::FUTEX_WAIT_BITSET => {
            let bits = if command == linux::FUTEX_WAIT {
                futex::ANY
            } else {
                call.unsigned(5)
            };
            let relative = command == linux::FUTEX_WAIT;
            futex_wait(call, address, value, bits, clock, relative)
        }
        linux::FUTEX_WAKE => Outcome::from(
            check_futex(address)
                .map(|()| table.wake(address, count(call.raw(2)).max(1), futex::ANY)),
        ),
        linux::FUTEX_WAKE_BITSET => {
            let bits = call.unsigned(5);
            if bits == 0 {
                return Outcome::fail(Errno::EINVAL);
            }
            Outcome::from(
                check_futex(address).map(|()| table.wake(address, count(call.raw(2)).max(1), bits)),
            )
        }
        linux::FUTEX_REQUEUE | linux::FUTEX_CMP_REQUEUE => {
            let result = (|| {
                check_futex(address)?;
                check_futex(call.raw(4))?;
                if call.int(2) < 0 || call.int(3) < 0 {
                    return Err(Errno::EINVAL);
                }
                if command == linux::FUTEX_CMP_REQUEUE
                    && user::read::<u32>(address)? != call.unsigned(5)
                {
                    return Err(Errno::EAGAIN);
                }
                Ok(table.requeue(address, count(call.raw(2)), call.raw(4), count(call.raw(3))))
            })();
            Outcome::from(result)
        }
        linux::FUTEX_WAKE_OP => {
            let result = (|| {
                check_futex(address)?;
                check_futex(call.raw(4))?;
                let wake_second = futex_operation(call.raw(4), call.unsigned(5))?;
                let mut woken = table.wake(address, count(call.raw(2)).max(1), futex::ANY);
                if wake_second {
                    woken += table.wake(call.raw(4), count(call.raw(3)).max(1), futex::ANY);
                }
                Ok(woken)
            })();
            Outcome::from(result)
        }
        _ => {
            trace::unsupported(
                u64::from(linux::__NR_futex) << 32 | u64::from(command),
                format_args!("futex operation {command} ({operation:#x})"),
            );
            Outcome::fail(Errno::ENOSYS)
        }
    }
}

fn check_futex(address: u64) -> Result<()> {
    if !address.is_multiple_of(4) {
        return Err(Errno::EINVAL);
    }
    user::UserRange::new(address, 4).map(drop)
}

fn futex_wait(
    call: &Call<'_>,
    address: u64,
    value: u32,
    bits: u32,
    clock: u32,
    relative: bool,
) -> Outcome {
    let prepared = (|| {
        let deadline = match call.raw(3) {
            0 => NEVER,
            pointer => {
                let time = from_timespec(&user::read(pointer)?)?;
                if relative {
                    call.kernel().clock.monotonic().saturating_add(time)
                } else {
                    deadline_on(call.kernel(), clock, time)?
                }
            }
        };
        Ok((deadline, call.process().futexes.wait(address, value, bits)?))
    })();
    match prepared {
        Err(error) => Outcome::fail(error),
        Ok((deadline, wait)) => {
            let kernel = Arc::clone(call.kernel());
            // Linux restarts a wait without a timeout; one with a relative timeout would start over, so it ends.
            let restart = if deadline == NEVER {
                Restart::WithFlag
            } else {
                Restart::Never
            };
            Outcome::wait(restart, async move {
                if deadline == NEVER {
                    wait.await;
                    return Ok(0);
                }
                time::timeout(&kernel, deadline, wait)
                    .await
                    .map(|()| 0)
                    .ok_or(Errno::ETIMEDOUT)
            })
        }
    }
}

/// Carries out the operation of `FUTEX_WAKE_OP`: changes the second word, compares its old value.
fn futex_operation(address: u64, encoded: u32) -> Result<bool> {
    let sign = |bits: u32| ((bits << 20) as i32 >> 20) as u32;
    let operand = sign(encoded >> 12 & 0xfff);
    let comparand = sign(encoded & 0xfff);
    let operand = if encoded >> 28 & 8 != 0 {
        1u32.wrapping_shl(operand & 31)
    } else {
        operand
    };
    let old = user::read::<u32>(address)?;
    let new = match encoded >> 28 & 7 {
        0 => operand,
        1 => old.wrapping_add(operand),
        2 => old | operand,
        3 => old & !operand,
        4 => old ^ operand,
        _ => return Err(Errno::ENOSYS),
    };
    user::write(address, &new)?;
    let (old, comparand) = (old as i32, comparand as i32);
    Ok(match encoded >> 24 & 0xf {
        0 => old == comparand,
        1 => old != comparand,
        2 => old < comparand,
        3 => old <= comparand,
        4 => old > comparand,
        5 => old >= comparand,
        _ => return Err(Errno::ENOSYS),
    })
}

fn gettid(call: &mut Call<'_>) -> Outcome {
    Outcome::Done(Ok(u64::from(call.thread.id)))
}

fn exit(call: &mut Call<'_>) -> Outcome {
    let code = call.int(0) & 0xff;
    if call.process().threads.lock().len() == 1 {
        call.process().exit(code);
    }
    Outcome::Exit
}

fn exit_group(call: &mut Call<'_>) -> Outcome {
    call.process().exit(call.int(0) & 0xff);
    Outcome::Exit
}

fn sched_yield(call: &mut Call<'_>) -> Outcome {
    call.kernel().request_events();
    Outcome::wait(Restart::WithFlag, async {
        yield_now().await;
        Ok(0)
    })
}

/// Whether a scheduling call's process argument names a thread that there is.
fn check_thread(call: &Call<'_>) -> Result<()> {
    match call.int(0) {
        0 => Ok(()),
        id => call.process().thread(id.cast_unsigned()).map(drop),
    }
}

fn sched_getaffinity(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        check_thread(call)?;
        if call.raw(1) < 8 || !call.raw(1).is_multiple_of(8) {
            return Err(Errno::EINVAL);
        }
        user::write(call.raw(2), &1u64)?;
        Ok(8usize)
    })();
    Outcome::from(result)
}

fn sched_setaffinity(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        check_thread(call)?;
        let bytes = user::read_bytes(call.raw(2), call.length(1).min(1024))?;
        if bytes.first().is_some_and(|byte| byte & 1 != 0) {
            Ok(())
        } else {
            Err(Errno::EINVAL)
        }
    })();
    Outcome::from(result)
}

fn sched_getscheduler(call: &mut Call<'_>) -> Outcome {
    check_thread(call).map(|()| linux::SCHED_NORMAL).into()
}

fn sched_setscheduler(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        check_thread(call)?;
        let priority = user::read::<i32>(call.raw(2))?;
        match call.unsigned(1) & !linux::SCHED_RESET_ON_FORK {
            linux::SCHED_NORMAL | linux::SCHED_BATCH | linux::SCHED_IDLE if priority == 0 => Ok(()),
            linux::SCHED_FIFO | linux::SCHED_RR | linux::SCHED_DEADLINE => Err(Errno::EPERM),
            _ => Err(Errno::EINVAL),
        }
    })();
    Outcome::from(result)
}

fn sched_getparam(call: &mut Call<'_>) -> Outcome {
    check_thread(call)
        .and_then(|()| user::write(call.raw(1), &0i32))
        .into()
}

fn sched_setparam(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        check_thread(call)?;
        match user::read::<i32>(call.raw(1))? {
            0 => Ok(()),
            _ => Err(Errno::EINVAL),
        }
    })();
    Outcome::from(result)
}

fn priority_range(policy: u32) -> Result<(u32, u32)> {
    match policy {
        linux::SCHED_FIFO | linux::SCHED_RR => Ok((1, 99)),
        linux::SCHED_NORMAL | linux::SCHED_BATCH | linux::SCHED_IDLE | linux::SCHED_DEADLINE => {
            Ok((0, 0))
        }
        _ => Err(Errno::EINVAL),
    }
}

fn sched_get_priority_max(call: &mut Call<'_>) -> Outcome {
    priority_range(call.unsigned(0)).map(|range| range.1).into()
}

fn sched_get_priority_min(call: &mut Call<'_>) -> Outcome {
    priority_range(call.unsigned(0)).map(|range| range.0).into()
}

fn getcpu(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        for index in [0, 1] {
            if call.raw(index) != 0 {
                user::write(call.raw(index), &0u32)?;
            }
        }
        Ok(())
    })();
    Outcome::from(result)
}

/// Checks whom a priority call means: the one process, by whatever names it.
fn check_priority_target(call: &Call<'_>) -> Result<()> {
    let who = call.unsigned(1);
    match call.unsigned(0) {
        linux::PRIO_PROCESS => match who {
            0 => Ok(()),
            id => call.process().thread(id).map(drop),
        },
        linux::PRIO_PGRP if who == 0 || who == call.process().id => Ok(()),
        linux::PRIO_USER if who == 0 || who == call.process().credentials.lock().uid[0] => Ok(()),
        linux::PRIO_PGRP | linux::PRIO_USER => Err(Errno::ESRCH),
        _ => Err(Errno::EINVAL),
    }
}

fn getpriority(call: &mut Call<'_>) -> Outcome {
    // The raw call gives 20 minus the nice value.
    check_priority_target(call)
        .map(|()| (20 - call.process().control.lock().nice).unsigned_abs())
        .into()
}

fn setpriority(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        check_priority_target(call)?;
        let nice = call.int(2).clamp(-20, 19);
        let privileged = call.process().credentials.lock().is_privileged();
        let mut control = call.process().control.lock();
        if nice < control.nice && !privileged {
            return Err(Errno::EACCES);
        }
        control.nice = nice;
        Ok(())
    })();
    Outcome::from(result)
}

fn membarrier(call: &mut Call<'_>) -> Outcome {
    const GLOBAL: u32 = 1;
    const GLOBAL_EXPEDITED: u32 = 2;
    const REGISTER_GLOBAL_EXPEDITED: u32 = 4;
    const PRIVATE_EXPEDITED: u32 = 8;
    const REGISTER_PRIVATE_EXPEDITED: u32 = 16;
    const ALL: u32 = GLOBAL
        | GLOBAL_EXPEDITED
        | REGISTER_GLOBAL_EXPEDITED
        | PRIVATE_EXPEDITED
        | REGISTER_PRIVATE_EXPEDITED;
    match call.unsigned(0) {
        0 => Outcome::Done(Ok(u64::from(ALL))),
        // Threads of one CPU see each other's stores in order.
        command if command.is_power_of_two() && command & ALL != 0 => Outcome::Done(Ok(0)),
        _ => Outcome::fail(Errno::EINVAL),
    }
}

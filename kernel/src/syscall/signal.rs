//! System calls of signals, and of timers that send them.

use alloc::sync::Arc;

use linux_raw_sys::general as linux;

use super::{Call, Entry, Outcome, Restart, time::deadline_on};
use crate::{
    Errno, Result,
    memory::user,
    task::{
        Process, Signal, SignalInfo, SignalSet, Thread,
        signal::{self, Action, INFO_SIZE, PosixTimer, PosixTimerState},
    },
    time::{self, NEVER, from_timespec, from_timeval, sleep_until, to_timespec, to_timeval},
};

/// The supported calls.
pub const CALLS: &[Entry] = &[
    Entry {
        number: linux::__NR_rt_sigaction,
        name: "rt_sigaction",
        handler: rt_sigaction,
        limits: "",
    },
    Entry {
        number: linux::__NR_rt_sigprocmask,
        name: "rt_sigprocmask",
        handler: rt_sigprocmask,
        limits: "",
    },
    Entry {
        number: linux::__NR_rt_sigreturn,
        name: "rt_sigreturn",
        handler: rt_sigreturn,
        limits: "",
    },
    Entry {
        number: linux::__NR_rt_sigpending,
        name: "rt_sigpending",
        handler: rt_sigpending,
        limits: "",
    },
    Entry {
        number: linux::__NR_rt_sigtimedwait,
        name: "rt_sigtimedwait",
        handler: rt_sigtimedwait,
        limits: "",
    },
    Entry {
        number: linux::__NR_rt_sigsuspend,
        name: "rt_sigsuspend",
        handler: rt_sigsuspend,
        limits: "",
    },
    Entry {
        number: linux::__NR_rt_sigqueueinfo,
        name: "rt_sigqueueinfo",
        handler: rt_sigqueueinfo,
        limits: "",
    },
    Entry {
        number: linux::__NR_rt_tgsigqueueinfo,
        name: "rt_tgsigqueueinfo",
        handler: rt_tgsigqueueinfo,
        limits: "",
    },
    Entry {
        number: linux::__NR_sigaltstack,
        name: "sigaltstack",
        handler: sigaltstack,
        limits: "",
    },
    Entry {
        number: linux::__NR_pause,
        name: "pause",
        handler: pause,
        limits: "",
    },
    Entry {
        number: linux::__NR_kill,
        name: "kill",
        handler: kill,
        limits: "one process: itself",
    },
    Entry {
        number: linux::__NR_tkill,
        name: "tkill",
        handler: tkill,
        limits: "",
    },
    Entry {
        number: linux::__NR_tgkill,
        name: "tgkill",
        handler: tgkill,
        limits: "",
    },
    Entry {
        number: linux::__NR_alarm,
        name: "alarm",
        handler: alarm,
        limits: "",
    },
    Entry {
        number: linux::__NR_setitimer,
        name: "setitimer",
        handler: setitimer,
        limits: "ITIMER_REAL only; others: EINVAL",
    },
    Entry {
        number: linux::__NR_getitimer,
        name: "getitimer",
        handler: getitimer,
        limits: "ITIMER_REAL only; others: EINVAL",
    },
    Entry {
        number: linux::__NR_timer_create,
        name: "timer_create",
        handler: timer_create,
        limits: "not for CPU-time clocks",
    },
    Entry {
        number: linux::__NR_timer_settime,
        name: "timer_settime",
        handler: timer_settime,
        limits: "",
    },
    Entry {
        number: linux::__NR_timer_gettime,
        name: "timer_gettime",
        handler: timer_gettime,
        limits: "",
    },
    Entry {
        number: linux::__NR_timer_getoverrun,
        name: "timer_getoverrun",
        handler: timer_getoverrun,
        limits: "",
    },
    Entry {
        number: linux::__NR_timer_delete,
        name: "timer_delete",
        handler: timer_delete,
        limits: "",
    },
];

/// `SI_USER`, `SI_QUEUE`, `SI_TIMER`, `SI_TKILL`.
const SI_USER: i32 = 0;
const SI_TIMER: i32 = -2;
const SI_TKILL: i32 = -6;

/// Reads a signal set argument of `size` bytes.
///
/// # Errors
/// `EINVAL` for another size than eight, `EFAULT`.
pub fn read_set(address: u64, size: u64) -> Result<SignalSet> {
    if size != 8 {
        return Err(Errno::EINVAL);
    }
    user::read::<u64>(address).map(SignalSet)
}

fn rt_sigaction(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        if call.raw(3) != 8 {
            return Err(Errno::EINVAL);
        }
        let number = Signal::new(call.raw(0))?;
        let new = match call.raw(1) {
            0 => None,
            address => {
                let [handler, flags, restorer, mask] = user::read::<[u64; 4]>(address)?;
                Some(Action {
                    handler,
                    flags,
                    restorer,
                    mask,
                })
            }
        };
        let old = signal::action(call.process(), number, new)?;
        if call.raw(2) != 0 {
            let words = [old.handler, old.flags, old.restorer, old.mask];
            user::write(call.raw(2), &words)?;
        }
        Ok(())
    })();
    Outcome::from(result)
}

fn rt_sigprocmask(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        if call.raw(3) != 8 {
            return Err(Errno::EINVAL);
        }
        let old = call.thread.signals.lock().mask();
        if call.raw(1) != 0 {
            let set = read_set(call.raw(1), 8)?;
            signal::change_mask(call.thread, call.unsigned(0), set)?;
        }
        if call.raw(2) != 0 {
            user::write(call.raw(2), &old.0)?;
        }
        Ok(())
    })();
    Outcome::from(result)
}

fn rt_sigreturn(call: &mut Call<'_>) -> Outcome {
    if signal::leave_handler(call.thread, call.context).is_err() {
        signal::force(call.thread, SignalInfo::from_kernel(Signal::SEGV));
    }
    Outcome::Registers
}

fn rt_sigpending(call: &mut Call<'_>) -> Outcome {
    if call.raw(1) > 8 {
        return Outcome::fail(Errno::EINVAL);
    }
    let mask = call.thread.signals.lock().mask();
    user::write(call.raw(0), &(signal::pending(call.thread).0 & mask.0)).into()
}

/// Ends the wait of `sigtimedwait` however it ends.
struct Awaiting(Arc<Thread>);

impl Drop for Awaiting {
    fn drop(&mut self) {
        signal::set_awaited(&self.0, SignalSet::default());
    }
}

fn rt_sigtimedwait(call: &mut Call<'_>) -> Outcome {
    let prepared = (|| {
        let set = read_set(call.raw(0), call.raw(3))?.as_mask();
        let deadline = match call.raw(2) {
            0 => NEVER,
            address => call
                .kernel()
                .clock
                .monotonic()
                .saturating_add(from_timespec(&user::read(address)?)?),
        };
        Ok((set, deadline))
    })();
    let (set, deadline) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return Outcome::fail(error),
    };
    let store = call.raw(1);
    let finish = move |info: SignalInfo| {
        if store != 0 {
            user::write_bytes(store, &info.to_bytes())?;
        }
        Ok(u64::from(info.signal.number()))
    };
    if let Some(info) = signal::take_from(call.thread, set) {
        return Outcome::Done(finish(info));
    }
    let thread = Arc::clone(call.thread);
    Outcome::wait(Restart::Never, async move {
        signal::set_awaited(&thread, set);
        let awaiting = Awaiting(Arc::clone(&thread));
        let kernel = Arc::clone(thread.kernel());
        let wait = core::future::poll_fn(|_| match signal::take_from(&thread, set) {
            Some(info) => core::task::Poll::Ready(info),
            None => core::task::Poll::Pending,
        });
        let taken = time::timeout(&kernel, deadline, wait).await;
        drop(awaiting);
        match taken {
            Some(info) => finish(info),
            None => Err(Errno::EAGAIN),
        }
    })
}

fn rt_sigsuspend(call: &mut Call<'_>) -> Outcome {
    match read_set(call.raw(0), call.raw(1)) {
        Ok(mask) => {
            call.thread.set_temporary_mask(mask);
            Outcome::wait(Restart::Never, core::future::pending())
        }
        Err(error) => Outcome::fail(error),
    }
}

fn pause(_: &mut Call<'_>) -> Outcome {
    Outcome::wait(Restart::Never, core::future::pending())
}

fn sender(call: &Call<'_>, signal: Signal, code: i32) -> SignalInfo {
    SignalInfo::from_user(
        signal,
        code,
        call.process().id,
        call.thread.credentials().uid[0],
    )
}

/// Whether a process argument of `kill(2)` means the one process that there is.
fn is_self(process: &Process, id: i32) -> bool {
    id == 0 || id.unsigned_abs() == process.id
}

fn kill(call: &mut Call<'_>) -> Outcome {
    let id = call.int(0);
    if id == -1 && call.process().id == 1 {
        // All processes but the caller and the first: there are none.
        return Outcome::fail(Errno::ESRCH);
    }
    if !is_self(call.process(), id) {
        return Outcome::fail(Errno::ESRCH);
    }
    if call.raw(1) as u32 == 0 {
        return Outcome::Done(Ok(0));
    }
    match Signal::new(u64::from(call.unsigned(1))) {
        Ok(signal) => {
            signal::send_to_process(call.process(), sender(call, signal, SI_USER));
            Outcome::Done(Ok(0))
        }
        Err(error) => Outcome::fail(error),
    }
}

fn send_to(call: &Call<'_>, id: u32, number: u32) -> Result<()> {
    let thread = call.process().thread(id)?;
    if number == 0 {
        return Ok(());
    }
    let signal = Signal::new(u64::from(number))?;
    thread.raise(sender(call, signal, SI_TKILL));
    Ok(())
}

fn tkill(call: &mut Call<'_>) -> Outcome {
    send_to(call, call.unsigned(0), call.unsigned(1)).into()
}

fn tgkill(call: &mut Call<'_>) -> Outcome {
    if call.unsigned(0) != call.process().id {
        return Outcome::fail(Errno::ESRCH);
    }
    send_to(call, call.unsigned(1), call.unsigned(2)).into()
}

fn read_info(number: u64, address: u64) -> Result<SignalInfo> {
    let signal = Signal::new(number)?;
    let bytes = user::read_bytes(address, INFO_SIZE)?;
    let bytes: &[u8; INFO_SIZE] = bytes.as_slice().try_into().map_err(|_| Errno::EFAULT)?;
    let info = SignalInfo::from_bytes(signal, bytes);
    // Only the kernel's own codes are positive, and SI_TKILL is tkill's.
    if info.code >= 0 || info.code == SI_TKILL {
        Err(Errno::EPERM)
    } else {
        Ok(info)
    }
}

fn rt_sigqueueinfo(call: &mut Call<'_>) -> Outcome {
    if !is_self(call.process(), call.int(0)) {
        return Outcome::fail(Errno::ESRCH);
    }
    let result = read_info(call.raw(1), call.raw(2))
        .map(|info| signal::send_to_process(call.process(), info));
    result.into()
}

fn rt_tgsigqueueinfo(call: &mut Call<'_>) -> Outcome {
    if call.unsigned(0) != call.process().id {
        return Outcome::fail(Errno::ESRCH);
    }
    let result = call
        .process()
        .thread(call.unsigned(1))
        .and_then(|thread| Ok((thread, read_info(call.raw(2), call.raw(3))?)))
        .map(|(thread, info)| thread.raise(info));
    result.into()
}

fn sigaltstack(call: &mut Call<'_>) -> Outcome {
    let stack_pointer = call.context.registers.rsp;
    let result = (|| {
        let new = match call.raw(0) {
            0 => None,
            address => Some((
                user::read::<u64>(address)?,
                user::read::<u64>(address + 16)?,
                user::read::<u32>(address + 8)?,
            )),
        };
        let old = signal::alternate_stack(call.thread, stack_pointer, new)?;
        if call.raw(1) != 0 {
            user::write(call.raw(1), &old.base)?;
            user::write(call.raw(1) + 8, &u64::from(old.state(stack_pointer)))?;
            user::write(call.raw(1) + 16, &old.size)?;
        }
        Ok(())
    })();
    Outcome::from(result)
}

// ---- ITIMER_REAL and POSIX timers ----

/// Sets a state to fire at `deadline` (0: never) and every `interval` after.
fn arm(process: &Arc<Process>, deadline: u64, interval: u64) -> PosixTimerState {
    let mut timers = process.timers.lock();
    timers.generation += 1;
    PosixTimerState {
        deadline,
        interval,
        generation: timers.generation,
    }
}

/// A task that calls `fire` at each expiration of the setting `state`, as long as `current` says that it holds.
fn start(
    process: &Arc<Process>,
    state: PosixTimerState,
    expire: impl Fn(&Process, u64) -> Option<u64> + Send + 'static,
) {
    if state.deadline == 0 {
        return;
    }
    let process = Arc::clone(process);
    let kernel = Arc::clone(&process.kernel);
    kernel.executor.spawn(async move {
        let mut deadline = state.deadline;
        loop {
            sleep_until(&process.kernel, deadline).await;
            match expire(&process, process.kernel.clock.monotonic()) {
                Some(next) => deadline = next,
                None => return,
            }
        }
    });
}

/// The next expiration after `now`, and how many were passed over.
fn advance(state: &mut PosixTimerState, now: u64) -> i32 {
    if state.interval == 0 {
        state.deadline = 0;
        return 0;
    }
    let passed = now.saturating_sub(state.deadline) / state.interval;
    state.deadline += state.interval * (passed + 1);
    i32::try_from(passed).unwrap_or(i32::MAX)
}

fn set_real(process: &Arc<Process>, value: u64, interval: u64) -> PosixTimerState {
    let deadline = if value == 0 {
        0
    } else {
        process.kernel.clock.monotonic().saturating_add(value)
    };
    let state = arm(process, deadline, interval);
    let old = core::mem::replace(&mut process.timers.lock().real, state);
    start(process, state, move |process, now| {
        let next = {
            let mut timers = process.timers.lock();
            if timers.real.generation != state.generation {
                return None;
            }
            advance(&mut timers.real, now);
            timers.real.deadline
        };
        signal::send_to_process(process, SignalInfo::from_kernel(Signal::ALRM));
        (next != 0).then_some(next)
    });
    old
}

fn remaining(call: &Call<'_>, state: &PosixTimerState) -> u64 {
    match state.deadline {
        0 => 0,
        // An armed timer never shows zero.
        deadline => deadline
            .saturating_sub(call.kernel().clock.monotonic())
            .max(1),
    }
}

fn alarm(call: &mut Call<'_>) -> Outcome {
    let seconds = u64::from(call.unsigned(0));
    let old = set_real(call.process(), seconds * time::SECOND, 0);
    Outcome::Done(Ok(remaining(call, &old).div_ceil(time::SECOND)))
}

fn write_itimerval(address: u64, interval: u64, value: u64) -> Result<()> {
    user::write(address, &to_timeval(interval))?;
    user::write(
        address + 16,
        &to_timeval(if value == 0 { 0 } else { value.max(1000) }),
    )
}

fn setitimer(call: &mut Call<'_>) -> Outcome {
    if call.unsigned(0) != linux::ITIMER_REAL {
        return Outcome::fail(Errno::EINVAL);
    }
    let result = (|| {
        let (interval, value) = match call.raw(1) {
            0 => (0, 0),
            address => (
                from_timeval(&user::read(address)?)?,
                from_timeval(&user::read(address + 16)?)?,
            ),
        };
        let old = set_real(call.process(), value, interval);
        if call.raw(2) != 0 {
            write_itimerval(call.raw(2), old.interval, remaining(call, &old))?;
        }
        Ok(())
    })();
    Outcome::from(result)
}

fn getitimer(call: &mut Call<'_>) -> Outcome {
    if call.unsigned(0) != linux::ITIMER_REAL {
        return Outcome::fail(Errno::EINVAL);
    }
    let state = call.process().timers.lock().real;
    write_itimerval(call.raw(1), state.interval, remaining(call, &state)).into()
}

fn timer_create(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let clock = call.unsigned(0);
        deadline_on(call.kernel(), clock, 0)?;
        // struct sigevent: value (8), signal (4), notify (4), thread (4).
        let (value, signal, notify, thread) = match call.raw(1) {
            0 => (None, linux::SIGALRM, linux::SIGEV_SIGNAL, 0),
            address => (
                Some(user::read::<u64>(address)?),
                user::read::<u32>(address + 8)?,
                user::read::<u32>(address + 12)?,
                user::read::<u32>(address + 16)?,
            ),
        };
        let (signal, thread) = match notify {
            linux::SIGEV_NONE => (None, None),
            linux::SIGEV_SIGNAL | linux::SIGEV_THREAD => {
                (Some(Signal::new(u64::from(signal))?), None)
            }
            linux::SIGEV_THREAD_ID => {
                call.process().thread(thread).map_err(|_| Errno::EINVAL)?;
                (Some(Signal::new(u64::from(signal))?), Some(thread))
            }
            _ => return Err(Errno::EINVAL),
        };
        let identifier = {
            let mut timers = call.process().timers.lock();
            let identifier = (0..)
                .find(|key| !timers.posix.contains_key(key))
                .ok_or(Errno::EAGAIN)?;
            let value = value.unwrap_or(u64::from(identifier.cast_unsigned()));
            let state = PosixTimerState::default();
            timers.posix.insert(
                identifier,
                PosixTimer {
                    clock,
                    signal,
                    thread,
                    value,
                    state,
                    overrun: 0,
                },
            );
            identifier
        };
        user::write(call.raw(2), &identifier)
    })();
    Outcome::from(result)
}

/// One expiration of a POSIX timer.
fn expire_posix(process: &Process, identifier: i32, generation: u64, now: u64) -> Option<u64> {
    let (timer, next) = {
        let mut timers = process.timers.lock();
        let timer = timers.posix.get_mut(&identifier)?;
        if timer.state.generation != generation {
            return None;
        }
        timer.overrun = advance(&mut timer.state, now);
        (timer.clone(), timer.state.deadline)
    };
    if let Some(number) = timer.signal {
        let info = SignalInfo {
            signal: number,
            code: SI_TIMER,
            errno: 0,
            fields: [
                u64::from(identifier.cast_unsigned())
                    | u64::from(timer.overrun.cast_unsigned()) << 32,
                timer.value,
            ],
        };
        match timer.thread.map(|id| process.thread(id)) {
            Some(Ok(thread)) => thread.raise(info),
            Some(Err(_)) => {}
            None => signal::send_to_process(process, info),
        }
    }
    (next != 0).then_some(next)
}

fn timer_settime(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let identifier = call.int(0);
        let absolute = call.unsigned(1) & linux::TIMER_ABSTIME != 0;
        let new: linux::itimerspec = user::read(call.raw(2))?;
        let (value, interval) = (
            from_timespec(&new.it_value)?,
            from_timespec(&new.it_interval)?,
        );
        let clock = call
            .process()
            .timers
            .lock()
            .posix
            .get(&identifier)
            .ok_or(Errno::EINVAL)?
            .clock;
        let deadline = match value {
            0 => 0,
            value if absolute => deadline_on(call.kernel(), clock, value)?.max(1),
            value => call.kernel().clock.monotonic().saturating_add(value),
        };
        let state = arm(call.process(), deadline, interval);
        let old = {
            let mut timers = call.process().timers.lock();
            let timer = timers.posix.get_mut(&identifier).ok_or(Errno::EINVAL)?;
            timer.overrun = 0;
            core::mem::replace(&mut timer.state, state)
        };
        start(call.process(), state, move |process, now| {
            expire_posix(process, identifier, state.generation, now)
        });
        if call.raw(3) != 0 {
            write_itimerspec(call, call.raw(3), &old)?;
        }
        Ok(())
    })();
    Outcome::from(result)
}

fn write_itimerspec(call: &Call<'_>, address: u64, state: &PosixTimerState) -> Result<()> {
    let value = linux::itimerspec {
        it_interval: to_timespec(state.interval),
        it_value: to_timespec(remaining(call, state)),
    };
    user::write(address, &value)
}

fn timer_gettime(call: &mut Call<'_>) -> Outcome {
    let state = call
        .process()
        .timers
        .lock()
        .posix
        .get(&call.int(0))
        .map(|timer| timer.state);
    let result = state
        .ok_or(Errno::EINVAL)
        .and_then(|state| write_itimerspec(call, call.raw(1), &state));
    Outcome::from(result)
}

fn timer_getoverrun(call: &mut Call<'_>) -> Outcome {
    let overrun = call
        .process()
        .timers
        .lock()
        .posix
        .get(&call.int(0))
        .map(|timer| timer.overrun);
    overrun.ok_or(Errno::EINVAL).into()
}

fn timer_delete(call: &mut Call<'_>) -> Outcome {
    let removed = call.process().timers.lock().posix.remove(&call.int(0));
    removed.map(drop).ok_or(Errno::EINVAL).into()
}

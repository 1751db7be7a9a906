//! System calls that make and control event sources: epoll, event counters, timers, signals as files.

use alloc::{sync::Arc, vec::Vec};

use linux_raw_sys::general as linux;

use super::{Call, Entry, Outcome, Restart, file::attempt, time::deadline_on};
use crate::{
    Errno, Kernel, Result,
    file::{
        File, OpenFile, OpenFlags, Readiness,
        epoll::{Epoll, EpollEvent},
        eventfd::EventCounter,
        signalfd::SignalFile,
        timerfd::{TimerFile, TimerValue},
        watch,
    },
    memory::user::{self, UserRange},
    task::SignalSet,
    time::{NEVER, from_timespec, timeout, to_timespec},
};

/// The supported calls.
pub const CALLS: &[Entry] = &[
    Entry {
        number: linux::__NR_epoll_create,
        name: "epoll_create",
        handler: epoll_create,
        limits: "",
    },
    Entry {
        number: linux::__NR_epoll_create1,
        name: "epoll_create1",
        handler: epoll_create1,
        limits: "",
    },
    Entry {
        number: linux::__NR_epoll_ctl,
        name: "epoll_ctl",
        handler: epoll_ctl,
        limits: "EPOLLEXCLUSIVE wakes all instances",
    },
    Entry {
        number: linux::__NR_epoll_wait,
        name: "epoll_wait",
        handler: epoll_wait,
        limits: "",
    },
    Entry {
        number: linux::__NR_epoll_pwait,
        name: "epoll_pwait",
        handler: epoll_pwait,
        limits: "",
    },
    Entry {
        number: linux::__NR_epoll_pwait2,
        name: "epoll_pwait2",
        handler: epoll_pwait2,
        limits: "",
    },
    Entry {
        number: linux::__NR_eventfd,
        name: "eventfd",
        handler: eventfd,
        limits: "",
    },
    Entry {
        number: linux::__NR_eventfd2,
        name: "eventfd2",
        handler: eventfd2,
        limits: "",
    },
    Entry {
        number: linux::__NR_timerfd_create,
        name: "timerfd_create",
        handler: timerfd_create,
        limits: "",
    },
    Entry {
        number: linux::__NR_timerfd_settime,
        name: "timerfd_settime",
        handler: timerfd_settime,
        limits: "the wall clock is never set, so TFD_TIMER_CANCEL_ON_SET never cancels",
    },
    Entry {
        number: linux::__NR_timerfd_gettime,
        name: "timerfd_gettime",
        handler: timerfd_gettime,
        limits: "",
    },
    Entry {
        number: linux::__NR_signalfd,
        name: "signalfd",
        handler: signalfd,
        limits: "signals for one thread are seen by files made by that thread",
    },
    Entry {
        number: linux::__NR_signalfd4,
        name: "signalfd4",
        handler: signalfd4,
        limits: "signals for one thread are seen by files made by that thread",
    },
];

const SIGNAL_SET: u64 = 8;

/// Gives a new file a descriptor; `flags` may have `O_CLOEXEC` and `O_NONBLOCK`, as all the creating calls do.
fn add(call: &Call<'_>, file: Arc<dyn File>, flags: u32) -> Result<i32> {
    let status = OpenFlags::READ_WRITE | OpenFlags::from_bits_truncate(flags & linux::O_NONBLOCK);
    call.process()
        .add_file(OpenFile::new(file, status), flags & linux::O_CLOEXEC != 0)
}

fn epoll_create(call: &mut Call<'_>) -> Outcome {
    if call.int(0) <= 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    add(call, Epoll::new(), 0).into()
}

fn epoll_create1(call: &mut Call<'_>) -> Outcome {
    let flags = call.unsigned(0);
    if flags & !linux::EPOLL_CLOEXEC != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    add(call, Epoll::new(), flags).into()
}

fn epoll_ctl(call: &mut Call<'_>) -> Outcome {
    let (number, operation, descriptor) = (call.int(0), call.unsigned(1), call.int(2));
    let (instance, file) = {
        let files = call.process().files.lock();
        (
            Arc::clone(attempt!(files.get(number))),
            Arc::clone(attempt!(files.get(descriptor))),
        )
    };
    let event = if operation == linux::EPOLL_CTL_DEL {
        EpollEvent { events: 0, data: 0 }
    } else {
        let event: linux::epoll_event = attempt!(user::read(call.raw(3)));
        EpollEvent {
            events: event.events,
            data: event.data,
        }
    };
    let epoll = attempt!(
        instance
            .file
            .as_any()
            .downcast_ref::<Epoll>()
            .ok_or(Errno::EINVAL)
    );
    match operation {
        linux::EPOLL_CTL_ADD => epoll.add(descriptor, &file, event),
        linux::EPOLL_CTL_MOD => epoll.modify(descriptor, &file, event),
        linux::EPOLL_CTL_DEL => epoll.remove(descriptor, &file),
        _ => Err(Errno::EINVAL),
    }
    .into()
}

/// Most events that one call gives.
const MAX_EVENTS: usize = i32::MAX as usize / core::mem::size_of::<linux::epoll_event>();

/// Collects events and writes them to the program.
fn collect(epoll: &Epoll, address: u64, limit: usize) -> Result<usize> {
    let mut events = Vec::new();
    epoll.collect(&mut events, limit);
    if events.is_empty() {
        return Ok(0);
    }
    user::write_many(address, &events)?;
    Ok(events.len())
}

/// `deadline`: 0 not to wait, [`NEVER`] to wait without limit.
fn wait(call: &Call<'_>, deadline: impl FnOnce(&Kernel) -> u64) -> Outcome {
    let file = attempt!(call.process().file(call.int(0)));
    let limit = attempt!(usize::try_from(call.int(2)).map_err(|_| Errno::EINVAL));
    if limit == 0 || limit > MAX_EVENTS {
        return Outcome::fail(Errno::EINVAL);
    }
    let epoll = attempt!(
        file.file
            .as_any()
            .downcast_ref::<Epoll>()
            .ok_or(Errno::EINVAL)
    );
    let address = call.raw(1);
    attempt!(UserRange::new(
        address,
        (limit * core::mem::size_of::<linux::epoll_event>()) as u64
    ));
    match collect(epoll, address, limit) {
        Ok(0) => {}
        result => return result.into(),
    }
    let deadline = deadline(call.kernel());
    if deadline == 0 {
        return Outcome::Done(Ok(0));
    }
    let kernel = Arc::clone(call.kernel());
    Outcome::wait(Restart::Never, async move {
        let waiting = Arc::clone(&file.file);
        let attempt = move || match file.file.as_any().downcast_ref::<Epoll>() {
            Some(epoll) => match collect(epoll, address, limit) {
                Ok(0) => Err(Errno::EAGAIN),
                result => result,
            },
            None => Err(Errno::EINVAL),
        };
        let retry = watch::retry(waiting, Readiness::READABLE, attempt);
        let result = if deadline == NEVER {
            retry.await
        } else {
            timeout(&kernel, deadline, retry).await.unwrap_or(Ok(0))
        };
        result.map(|count| count as u64)
    })
}

/// The deadline that a timeout in milliseconds means; negative for none.
pub(super) fn deadline_after_milliseconds(kernel: &Kernel, milliseconds: i32) -> u64 {
    match milliseconds {
        0 => 0,
        milliseconds => match u64::try_from(milliseconds) {
            Ok(milliseconds) => kernel
                .clock
                .monotonic()
                .saturating_add(milliseconds * 1_000_000),
            Err(_) => NEVER,
        },
    }
}

/// Sets the signal mask for the time of a call; no address means no change.
///
/// # Errors
/// `EINVAL` for a size that is not Linux's, `EFAULT`.
pub(super) fn set_mask(call: &Call<'_>, address: u64, size: u64) -> Result<()> {
    if address == 0 {
        return Ok(());
    }
    if size != SIGNAL_SET {
        return Err(Errno::EINVAL);
    }
    call.thread
        .set_temporary_mask(SignalSet(user::read(address)?));
    Ok(())
}

fn epoll_wait(call: &mut Call<'_>) -> Outcome {
    let milliseconds = call.int(3);
    wait(call, |kernel| {
        deadline_after_milliseconds(kernel, milliseconds)
    })
}

fn epoll_pwait(call: &mut Call<'_>) -> Outcome {
    attempt!(set_mask(call, call.raw(4), call.raw(5)));
    epoll_wait(call)
}

fn epoll_pwait2(call: &mut Call<'_>) -> Outcome {
    let duration = match call.raw(3) {
        0 => None,
        address => Some(attempt!(
            user::read::<linux::timespec>(address).and_then(|time| from_timespec(&time))
        )),
    };
    attempt!(set_mask(call, call.raw(4), call.raw(5)));
    wait(call, |kernel| match duration {
        None => NEVER,
        Some(0) => 0,
        Some(duration) => kernel.clock.monotonic().saturating_add(duration),
    })
}

fn make_counter(call: &Call<'_>, flags: u32) -> Outcome {
    if flags & !(linux::EFD_SEMAPHORE | linux::EFD_CLOEXEC | linux::EFD_NONBLOCK) != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    let counter = EventCounter::new(
        u64::from(call.unsigned(0)),
        flags & linux::EFD_SEMAPHORE != 0,
    );
    add(call, counter, flags).into()
}

fn eventfd(call: &mut Call<'_>) -> Outcome {
    make_counter(call, 0)
}

fn eventfd2(call: &mut Call<'_>) -> Outcome {
    make_counter(call, call.unsigned(1))
}

fn timerfd_create(call: &mut Call<'_>) -> Outcome {
    let (clock, flags) = (call.unsigned(0), call.unsigned(1));
    let realtime = match clock {
        linux::CLOCK_REALTIME | linux::CLOCK_REALTIME_ALARM => true,
        linux::CLOCK_MONOTONIC | linux::CLOCK_BOOTTIME | linux::CLOCK_BOOTTIME_ALARM => false,
        _ => return Outcome::fail(Errno::EINVAL),
    };
    if flags & !linux::TFD_CREATE_FLAGS != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    add(call, TimerFile::new(call.kernel(), realtime), flags).into()
}

fn write_value(address: u64, value: TimerValue) -> Result<()> {
    let mut answer: linux::itimerspec = user::zeroed();
    answer.it_interval = to_timespec(value.interval);
    answer.it_value = to_timespec(value.remaining);
    user::write(address, &answer)
}

fn timerfd_settime(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let file = call.process().file(call.int(0))?;
        let timer = file
            .file
            .as_any()
            .downcast_ref::<TimerFile>()
            .ok_or(Errno::EINVAL)?;
        let flags = call.unsigned(1);
        if flags & !(linux::TFD_TIMER_ABSTIME | linux::TFD_TIMER_CANCEL_ON_SET) != 0 {
            return Err(Errno::EINVAL);
        }
        let new: linux::itimerspec = user::read(call.raw(2))?;
        let (value, interval) = (
            from_timespec(&new.it_value)?,
            from_timespec(&new.it_interval)?,
        );
        let kernel = call.kernel();
        let clock = if timer.is_realtime() {
            linux::CLOCK_REALTIME
        } else {
            linux::CLOCK_MONOTONIC
        };
        let deadline = match value {
            0 => None,
            value if flags & linux::TFD_TIMER_ABSTIME != 0 => {
                Some(deadline_on(kernel, clock, value)?)
            }
            value => Some(kernel.clock.monotonic().saturating_add(value)),
        };
        let before = timer.set(deadline, interval);
        if call.raw(3) == 0 {
            Ok(())
        } else {
            write_value(call.raw(3), before)
        }
    })();
    result.into()
}

fn timerfd_gettime(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(call.process().file(call.int(0)));
    let timer = attempt!(
        file.file
            .as_any()
            .downcast_ref::<TimerFile>()
            .ok_or(Errno::EINVAL)
    );
    write_value(call.raw(1), timer.value()).into()
}

fn make_signal_file(call: &Call<'_>, flags: u32) -> Result<i32> {
    if call.raw(2) != SIGNAL_SET || flags & !(linux::O_CLOEXEC | linux::O_NONBLOCK) != 0 {
        return Err(Errno::EINVAL);
    }
    let set = SignalSet(user::read(call.raw(1))?).as_mask();
    if call.int(0) == -1 {
        return add(call, SignalFile::new(call.thread, set), flags);
    }
    let file = call.process().file(call.int(0))?;
    file.file
        .as_any()
        .downcast_ref::<SignalFile>()
        .ok_or(Errno::EINVAL)?
        .set(set);
    Ok(call.int(0))
}

fn signalfd(call: &mut Call<'_>) -> Outcome {
    make_signal_file(call, 0).into()
}

fn signalfd4(call: &mut Call<'_>) -> Outcome {
    make_signal_file(call, call.unsigned(3)).into()
}

//! System calls of clocks and sleeping; timers that send signals are in [`super::signal`].

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use linux_raw_sys::general as linux;

use super::{Call, Entry, Outcome, Restart};
use crate::{
    Errno, Kernel, Result,
    memory::user,
    task::Thread,
    time::{from_timespec, sleep_until, to_timespec, to_timeval},
};

/// The supported calls.
pub const CALLS: &[Entry] = &[
    Entry {
        number: linux::__NR_clock_gettime,
        name: "clock_gettime",
        handler: clock_gettime,
        limits: "",
    },
    Entry {
        number: linux::__NR_clock_getres,
        name: "clock_getres",
        handler: clock_getres,
        limits: "",
    },
    Entry {
        number: linux::__NR_gettimeofday,
        name: "gettimeofday",
        handler: gettimeofday,
        limits: "",
    },
    Entry {
        number: linux::__NR_time,
        name: "time",
        handler: time,
        limits: "",
    },
    Entry {
        number: linux::__NR_nanosleep,
        name: "nanosleep",
        handler: nanosleep,
        limits: "",
    },
    Entry {
        number: linux::__NR_clock_nanosleep,
        name: "clock_nanosleep",
        handler: clock_nanosleep,
        limits: "",
    },
    Entry {
        number: linux::__NR_times,
        name: "times",
        handler: times,
        limits: "system time counts as user time",
    },
];

/// What a clock shows, in nanoseconds.
///
/// # Errors
/// `EINVAL` for an unknown clock.
pub fn read_clock(thread: &Thread, clock: u32) -> Result<u64> {
    let kernel = thread.kernel();
    Ok(match clock {
        linux::CLOCK_REALTIME
        | linux::CLOCK_REALTIME_COARSE
        | linux::CLOCK_REALTIME_ALARM
        | linux::CLOCK_TAI => kernel.clock.realtime(),
        linux::CLOCK_MONOTONIC
        | linux::CLOCK_MONOTONIC_RAW
        | linux::CLOCK_MONOTONIC_COARSE
        | linux::CLOCK_BOOTTIME
        | linux::CLOCK_BOOTTIME_ALARM => kernel.clock.monotonic(),
        linux::CLOCK_PROCESS_CPUTIME_ID => process_cpu_time(thread),
        linux::CLOCK_THREAD_CPUTIME_ID => thread.cpu_time(),
        _ => return Err(Errno::EINVAL),
    })
}

/// Nanoseconds of CPU time of all threads, living and gone.
pub fn process_cpu_time(thread: &Thread) -> u64 {
    let process = &thread.process;
    let living: u64 = process
        .threads
        .lock()
        .values()
        .map(|thread| thread.cpu_time())
        .sum();
    process.cpu_time.load(Ordering::Relaxed) + living
}

/// The monotonic time that an absolute time of `clock` means.
///
/// # Errors
/// `EINVAL` for a clock that cannot be slept on.
pub fn deadline_on(kernel: &Kernel, clock: u32, time: u64) -> Result<u64> {
    match clock {
        linux::CLOCK_REALTIME | linux::CLOCK_TAI | linux::CLOCK_REALTIME_ALARM => {
            Ok(kernel.clock.monotonic_at(time))
        }
        linux::CLOCK_MONOTONIC | linux::CLOCK_BOOTTIME | linux::CLOCK_BOOTTIME_ALARM => Ok(time),
        _ => Err(Errno::EINVAL),
    }
}

fn clock_gettime(call: &mut Call<'_>) -> Outcome {
    read_clock(call.thread, call.unsigned(0))
        .and_then(|now| user::write(call.raw(1), &to_timespec(now)))
        .into()
}

fn clock_getres(call: &mut Call<'_>) -> Outcome {
    let coarse = matches!(
        call.unsigned(0),
        linux::CLOCK_REALTIME_COARSE | linux::CLOCK_MONOTONIC_COARSE
    );
    let result = read_clock(call.thread, call.unsigned(0)).and_then(|_| {
        if call.raw(1) == 0 {
            return Ok(());
        }
        user::write(
            call.raw(1),
            &to_timespec(if coarse { 4_000_000 } else { 1 }),
        )
    });
    result.into()
}

fn gettimeofday(call: &mut Call<'_>) -> Outcome {
    let now = call.kernel().clock.realtime();
    let result = (|| {
        if call.raw(0) != 0 {
            user::write(call.raw(0), &to_timeval(now))?;
        }
        if call.raw(1) != 0 {
            user::write(
                call.raw(1),
                &linux::timezone {
                    tz_minuteswest: 0,
                    tz_dsttime: 0,
                },
            )?;
        }
        Ok(())
    })();
    Outcome::from(result)
}

fn time(call: &mut Call<'_>) -> Outcome {
    let seconds = call.kernel().clock.realtime() / crate::time::SECOND;
    if call.raw(0) != 0
        && let Err(error) = user::write(call.raw(0), &seconds)
    {
        return Outcome::fail(error);
    }
    Outcome::Done(Ok(seconds))
}

fn nanosleep(call: &mut Call<'_>) -> Outcome {
    sleep(
        call,
        linux::CLOCK_MONOTONIC,
        false,
        call.raw(0),
        call.raw(1),
    )
}

fn clock_nanosleep(call: &mut Call<'_>) -> Outcome {
    let absolute = call.unsigned(1) & linux::TIMER_ABSTIME != 0;
    sleep(call, call.unsigned(0), absolute, call.raw(2), call.raw(3))
}

/// Writes what is left of a sleep when it is given up because of a signal.
struct Remaining {
    kernel: Arc<Kernel>,
    deadline: u64,
    address: u64,
}

impl Drop for Remaining {
    fn drop(&mut self) {
        if self.address != 0 {
            let left = self.deadline.saturating_sub(self.kernel.clock.monotonic());
            // A bad address for the rest of an interrupted sleep is not reported: the sleep's own result is EINTR.
            let _ = user::write(self.address, &to_timespec(left));
        }
    }
}

fn sleep(call: &Call<'_>, clock: u32, absolute: bool, request: u64, remaining: u64) -> Outcome {
    let kernel = Arc::clone(call.kernel());
    let deadline = user::read(request)
        .and_then(|time| from_timespec(&time))
        .and_then(|time| {
            if absolute {
                deadline_on(&kernel, clock, time)
            } else {
                deadline_on(&kernel, clock, 0)?;
                Ok(kernel.clock.monotonic().saturating_add(time))
            }
        });
    let deadline = match deadline {
        Ok(deadline) => deadline,
        Err(error) => return Outcome::fail(error),
    };
    let address = if absolute { 0 } else { remaining };
    Outcome::wait(Restart::Never, async move {
        let mut rest = Remaining {
            kernel: Arc::clone(&kernel),
            deadline,
            address,
        };
        sleep_until(&kernel, deadline).await;
        rest.address = 0;
        Ok(0)
    })
}

fn times(call: &mut Call<'_>) -> Outcome {
    // Clock ticks of USER_HZ: 100 a second.
    const TICK: u64 = 10_000_000;
    if call.raw(0) != 0 {
        let used = process_cpu_time(call.thread) / TICK;
        for (index, value) in [used, 0, 0, 0].into_iter().enumerate() {
            if let Err(error) = user::write(call.raw(0) + 8 * index as u64, &value) {
                return Outcome::fail(error);
            }
        }
    }
    Outcome::Done(Ok(call.kernel().clock.monotonic() / TICK))
}

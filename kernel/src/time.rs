//! Clocks and timers.
//!
//! Times are nanoseconds in `u64`: monotonic since some point before the start, or since 1970 for the wall clock.

use alloc::{collections::BTreeMap, sync::Arc};
use core::{
    future::Future,
    pin::Pin,
    sync::atomic::{AtomicI64, AtomicU64, Ordering},
    task::{Context, Poll, Waker},
};

use linux_raw_sys::general::{timespec, timeval};

use crate::{Errno, Kernel, Result, host::Host, sync::Mutex};

/// A deadline that never comes.
pub const NEVER: u64 = u64::MAX;

/// Nanoseconds in a second.
pub const SECOND: u64 = 1_000_000_000;

/// The clocks.
pub struct Clock {
    host: Host,
    /// Added to the host's wall clock.
    realtime_offset: AtomicI64,
    /// Monotonic time at the start.
    start: u64,
}

impl Clock {
    /// Clocks of a host; `realtime` is the wall clock now if the host has none of its own.
    #[must_use]
    pub fn new(host: Host, realtime: Option<u64>) -> Clock {
        let offset = realtime.map_or(0, |now| now.wrapping_sub(host.realtime()) as i64);
        Clock {
            host,
            realtime_offset: AtomicI64::new(offset),
            start: host.monotonic(),
        }
    }

    /// Monotonic time.
    #[inline]
    #[must_use]
    pub fn monotonic(&self) -> u64 {
        self.host.monotonic()
    }

    /// Wall clock.
    #[must_use]
    pub fn realtime(&self) -> u64 {
        self.host
            .realtime()
            .wrapping_add_signed(self.realtime_offset.load(Ordering::Relaxed))
    }

    /// Monotonic time since the kernel started.
    #[must_use]
    pub fn uptime(&self) -> u64 {
        self.monotonic().saturating_sub(self.start)
    }

    /// The monotonic time at which the wall clock shows `realtime`.
    #[must_use]
    pub fn monotonic_at(&self, realtime: u64) -> u64 {
        let now = self.realtime();
        if realtime >= now {
            self.monotonic().saturating_add(realtime - now)
        } else {
            self.monotonic().saturating_sub(now - realtime)
        }
    }
}

#[derive(Default)]
struct TimerQueue {
    next_key: u64,
    entries: BTreeMap<(u64, u64), Waker>,
}

/// Who sleeps until when.
pub struct Timers {
    queue: Mutex<TimerQueue>,
    /// The earliest deadline, to be looked at on each way into a program.
    earliest: AtomicU64,
}

impl Default for Timers {
    fn default() -> Timers {
        Timers {
            queue: Mutex::default(),
            earliest: AtomicU64::new(NEVER),
        }
    }
}

impl Timers {
    /// The earliest deadline, or [`NEVER`].
    #[inline]
    #[must_use]
    pub fn next_deadline(&self) -> u64 {
        self.earliest.load(Ordering::Relaxed)
    }

    fn note_earliest(&self, queue: &TimerQueue) {
        let earliest = queue
            .entries
            .first_key_value()
            .map_or(NEVER, |(&(deadline, _), _)| deadline);
        self.earliest.store(earliest, Ordering::Relaxed);
    }

    /// Wakes everybody whose deadline is `now` or earlier.
    pub fn expire(&self, now: u64) {
        loop {
            let waker = {
                let mut queue = self.queue.lock();
                let waker = match queue.entries.first_entry() {
                    Some(entry) if entry.key().0 <= now => entry.remove(),
                    _ => return,
                };
                self.note_earliest(&queue);
                waker
            };
            waker.wake();
        }
    }

    fn add(&self, deadline: u64, waker: Waker) -> (u64, u64) {
        let mut queue = self.queue.lock();
        let key = (deadline, queue.next_key);
        queue.next_key += 1;
        queue.entries.insert(key, waker);
        self.note_earliest(&queue);
        key
    }

    fn remove(&self, key: (u64, u64)) {
        let mut queue = self.queue.lock();
        let removed = queue.entries.remove(&key);
        self.note_earliest(&queue);
        drop(queue);
        drop(removed);
    }
}

/// Waits until a monotonic time; [`NEVER`] waits for ever.
#[must_use]
pub fn sleep_until(kernel: &Arc<Kernel>, deadline: u64) -> Sleep {
    Sleep {
        kernel: Arc::clone(kernel),
        deadline,
        key: None,
    }
}

/// Future of [`sleep_until`].
pub struct Sleep {
    kernel: Arc<Kernel>,
    deadline: u64,
    key: Option<(u64, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if let Some(key) = self.key.take() {
            self.kernel.timers.remove(key);
        }
        if self.kernel.clock.monotonic() >= self.deadline {
            return Poll::Ready(());
        }
        if self.deadline != NEVER {
            self.key = Some(
                self.kernel
                    .timers
                    .add(self.deadline, context.waker().clone()),
            );
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.kernel.timers.remove(key);
        }
    }
}

/// Waits for `future`, at most until `deadline`: then `None`.
pub async fn timeout<T>(
    kernel: &Arc<Kernel>,
    deadline: u64,
    future: impl Future<Output = T>,
) -> Option<T> {
    let mut future = core::pin::pin!(future);
    let mut sleep = core::pin::pin!(sleep_until(kernel, deadline));
    core::future::poll_fn(|context| {
        if let Poll::Ready(value) = future.as_mut().poll(context) {
            return Poll::Ready(Some(value));
        }
        sleep.as_mut().poll(context).map(|()| None)
    })
    .await
}

/// Nanoseconds of a `timespec`.
///
/// # Errors
/// `EINVAL` for negative or unnormalised values.
pub fn from_timespec(time: &timespec) -> Result<u64> {
    let seconds = u64::try_from(time.tv_sec).map_err(|_| Errno::EINVAL)?;
    let nanoseconds = u64::try_from(time.tv_nsec)
        .ok()
        .filter(|&nsec| nsec < SECOND)
        .ok_or(Errno::EINVAL)?;
    Ok(seconds.saturating_mul(SECOND).saturating_add(nanoseconds))
}

/// A `timespec` of nanoseconds.
#[must_use]
pub fn to_timespec(nanoseconds: u64) -> timespec {
    timespec {
        tv_sec: (nanoseconds / SECOND) as i64,
        tv_nsec: (nanoseconds % SECOND) as i64,
    }
}

/// Nanoseconds of a `timeval`.
///
/// # Errors
/// `EINVAL` for negative or unnormalised values.
pub fn from_timeval(time: &timeval) -> Result<u64> {
    let seconds = u64::try_from(time.tv_sec).map_err(|_| Errno::EINVAL)?;
    let micros = u64::try_from(time.tv_usec)
        .ok()
        .filter(|&usec| usec < 1_000_000)
        .ok_or(Errno::EINVAL)?;
    Ok(seconds.saturating_mul(SECOND).saturating_add(micros * 1000))
}

/// A `timeval` of nanoseconds.
#[must_use]
pub fn to_timeval(nanoseconds: u64) -> timeval {
    timeval {
        tv_sec: (nanoseconds / SECOND) as i64,
        tv_usec: (nanoseconds % SECOND / 1000) as i64,
    }
}

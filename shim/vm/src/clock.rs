//! Time: the time stamp counter, scaled by a page that ring 3 reads, and the local interrupt controller's timer, by which the counter's
//! frequency is measured where CPUID does not say it.
//!
//! The first measurement is short, since starting fast matters more; every window of the timer that is at least twice as long as the
//! best before gives a better one. A new scale continues from the time shown by the old one: the clock never goes back.

use core::num::NonZeroU64;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpu;
use crate::interrupts::{self, Timer};

const SECOND: u64 = 1_000_000_000;
/// Shortest first measurement in nanoseconds.
const FIRST_WINDOW: u64 = 500_000;
/// Longest window that still improves the clock.
const LONGEST_WINDOW: u64 = 20 * SECOND;

/// What the clocks in the stubs read; offsets are fixed. One page of its own.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct ClockPage {
    /// Offset 0: changes with every change of the rest.
    sequence: AtomicU64,
    /// Offset 8: counter at the base.
    counter: AtomicU64,
    /// Offset 16: nanoseconds for one count, times 2^32.
    scale: AtomicU64,
    /// Offset 24: monotonic time at the base.
    base: AtomicU64,
    /// Offset 32: wall clock less monotonic time.
    realtime: AtomicU64,
}

/// The page itself.
pub static CLOCK_PAGE: ClockPage = ClockPage {
    sequence: AtomicU64::new(0),
    counter: AtomicU64::new(0),
    scale: AtomicU64::new(0),
    base: AtomicU64::new(0),
    realtime: AtomicU64::new(0),
};

/// A moment on both clocks.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    counter: u64,
    /// The timer's count, which falls.
    ticks: u32,
}

/// The clock's own state.
#[derive(Debug, Default)]
pub struct Clock {
    timer: Timer,
    /// The start of the timer's present window.
    start: Sample,
    /// Length of the window that the scale comes from; `u64::MAX` if it needs no measuring.
    best: u64,
    /// Deadline that the timer is armed for; `u64::MAX`: it runs without an interrupt.
    armed: u64,
    /// Deadline of `set_timer`, or `u64::MAX`.
    pub deadline: u64,
}

/// Monotonic time in nanoseconds.
pub fn now() -> u64 {
    let page = &CLOCK_PAGE;
    page.base.load(Ordering::Relaxed)
        + scaled(cpu::counter().saturating_sub(page.counter.load(Ordering::Relaxed)))
}

/// Nanoseconds that a number of counts takes.
fn scaled(counts: u64) -> u64 {
    ((u128::from(counts) * u128::from(CLOCK_PAGE.scale.load(Ordering::Relaxed))) >> 32) as u64
}

/// Sets the wall clock: nanoseconds since 1970 now.
pub fn set_realtime(realtime: u64) {
    CLOCK_PAGE
        .realtime
        .store(realtime.wrapping_sub(now()), Ordering::Relaxed);
}

fn set_frequency(frequency: NonZeroU64) {
    let page = &CLOCK_PAGE;
    let (counter, base) = (cpu::counter(), now());
    page.base.store(base, Ordering::Relaxed);
    page.counter.store(counter, Ordering::Relaxed);
    page.scale
        .store((SECOND << 32) / frequency.get(), Ordering::Relaxed);
    page.sequence
        .store(page.sequence.load(Ordering::Relaxed) + 1, Ordering::Release);
}

impl Clock {
    /// Starts measuring, unless the counter's frequency is known.
    pub fn start(&mut self, frequency: Option<NonZeroU64>) {
        self.deadline = u64::MAX;
        self.armed = u64::MAX;
        CLOCK_PAGE.counter.store(cpu::counter(), Ordering::Relaxed);
        self.timer = Timer::for_nanoseconds(u64::MAX);
        self.timer.start(false);
        self.start = sample();
        if let Some(frequency) = frequency {
            set_frequency(frequency);
            self.best = u64::MAX;
        }
    }

    /// Ends the first measurement.
    pub fn finish_start(&mut self) {
        while self.best == 0 {
            self.measure(FIRST_WINDOW);
        }
    }

    /// Takes a new scale if the timer's window is long enough.
    fn measure(&mut self, at_least: u64) {
        let end = sample();
        let counts = end.counter - self.start.counter;
        let mut ticks = u64::from(self.start.ticks.wrapping_sub(end.ticks));
        if end.ticks > self.start.ticks {
            // The timer has wrapped around, as it does when it fires.
            ticks =
                u64::from(self.start.ticks) + u64::from(self.timer.ticks.saturating_sub(end.ticks));
        }
        let nanoseconds = self.timer.nanoseconds(ticks);
        if nanoseconds < at_least || nanoseconds == 0 {
            return;
        }
        let frequency = u128::from(counts) * u128::from(SECOND) / u128::from(nanoseconds);
        if self.best != 0 {
            // What is impossible (the timer wrapped more than once while the host was away) is no measurement.
            if scaled(counts).abs_diff(nanoseconds) > nanoseconds / 500 {
                return;
            }
        }
        if let Some(frequency) = NonZeroU64::new(frequency as u64) {
            set_frequency(frequency);
        }
        self.best = nanoseconds;
    }

    /// Measures anew if the timer's window is much longer than the best so far.
    pub fn improve(&mut self) {
        let window = self.best.saturating_mul(2);
        if window < LONGEST_WINDOW && scaled(cpu::counter() - self.start.counter) >= window {
            self.measure(window);
        }
    }

    /// Makes the timer interrupt at `deadline` or at the deadline of `set_timer`, whichever is first; a past one at once.
    pub fn arm(&mut self, deadline: u64) {
        let deadline = deadline.min(self.deadline);
        if deadline == self.armed && !interrupts::take_timer_fired() {
            return;
        }
        self.improve();
        self.armed = deadline;
        self.timer = Timer::for_nanoseconds(if deadline == u64::MAX {
            u64::MAX
        } else {
            deadline.saturating_sub(now())
        });
        self.timer.start(deadline != u64::MAX);
        self.start = Sample {
            counter: cpu::counter(),
            ticks: self.timer.ticks,
        };
    }
}

/// Reads both clocks as close together as a few tries give.
fn sample() -> Sample {
    let (mut best, mut result) = (u64::MAX, Sample::default());
    for _ in 0..4 {
        let before = cpu::counter();
        let ticks = interrupts::timer_count();
        let after = cpu::counter();
        if after - before < best {
            best = after - before;
            result = Sample {
                counter: before + best / 2,
                ticks,
            };
        }
    }
    result
}

/// The wall clock of a battery-backed clock (MC146818), if the machine has one: nanoseconds since 1970.
pub fn battery_clock() -> Option<u64> {
    let read = |register: u8| {
        // SAFETY: the clock's registers; reading them has no effect. Without a clock the answer is all ones.
        unsafe {
            cpu::write_port(0x70, register);
            cpu::read_port(0x71)
        }
    };
    let status = read(11);
    if status == 0xff {
        return None;
    }
    let all = || [0u8, 2, 4, 7, 8, 9].map(read);
    // Twice the same: no update came in between.
    let values = (0..16).find_map(|_| Some(all()).filter(|values| *values == all()))?;
    let decode = |value: u8| {
        u64::from(if status & 4 != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 15)
        })
    };
    let [second, minute, _, day, month, year] = values.map(decode);
    let hour = decode(values[2] & 0x7f);
    let hour = if status & 2 != 0 {
        hour
    } else {
        hour % 12 + if values[2] & 0x80 != 0 { 12 } else { 0 }
    };
    let year = 2000 + year;
    // Days from a civil date, counting years from March.
    let (shifted, month_from_march) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = shifted * 365 + shifted / 4 - shifted / 100
        + shifted / 400
        + (month_from_march * 153 + 2) / 5
        + day;
    let since_1970 = days.checked_sub(719_469)?;
    Some((((since_1970 * 24 + hour) * 60 + minute) * 60 + second) * SECOND)
}

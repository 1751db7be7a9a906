//! Interrupt controllers: the processor's own (with its timer) and those that devices' lines go to.
//!
//! Device lines are edge-triggered here, whatever the device thinks: a line interrupts when it is raised. So a driver must lower it (for
//! virtio: write to `InterruptACK`) *before* it looks at what the device has done; then nothing is missed, and a line that stays
//! raised makes no storm.

use core::num::NonZeroU64;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::boot::VIRTUAL_OFFSET;
use crate::cpu::{self, msr};
use crate::entry::{FIRST_INTERRUPT, INTERRUPTS};

/// Where the registers lie in physical memory, and in the first pages of the shim's own 2 MiB of virtual memory.
pub const PAGES: [(usize, u64); 3] = [(0, 0xfee0_0000), (1, 0xfec0_0000), (2, 0xfec1_0000)];
const LOCAL: usize = VIRTUAL_OFFSET;
const DISTRIBUTOR: usize = VIRTUAL_OFFSET + 0x1000;
const DISTRIBUTOR_SECOND: usize = VIRTUAL_OFFSET + 0x2000;
/// First line of the second distributor.
const SECOND_LINES: u32 = 24;
/// Lines that have a vector.
pub const LINES: u32 = 48;

/// Vector of the timer.
pub const TIMER_VECTOR: usize = FIRST_INTERRUPT;
/// Vector of line 0.
const LINE_VECTOR: usize = FIRST_INTERRUPT + 16;
/// Vector that the controller uses for interrupts that went away.
const SPURIOUS_VECTOR: usize = FIRST_INTERRUPT + 15;

const _: () = assert!(LINE_VECTOR + LINES as usize <= FIRST_INTERRUPT + INTERRUPTS);

/// Registers of the local controller.
mod local {
    pub const ID: usize = 0x20;
    pub const PRIORITY: usize = 0x80;
    pub const END_OF_INTERRUPT: usize = 0xb0;
    pub const SPURIOUS: usize = 0xf0;
    pub const TIMER: usize = 0x320;
    pub const LINE_0: usize = 0x350;
    pub const LINE_1: usize = 0x360;
    pub const INITIAL_COUNT: usize = 0x380;
    pub const CURRENT_COUNT: usize = 0x390;
    pub const DIVIDER: usize = 0x3e0;
    pub const MASKED: u32 = 1 << 16;
    pub const PERIODIC: u32 = 1 << 17;
}

const SECOND: u64 = 1_000_000_000;
/// The timer's clock in QEMU and KVM, where CPUID says nothing else: 1 GHz.
static TIMER_FREQUENCY: AtomicU64 = AtomicU64::new(SECOND);

/// Lines that were raised since they were last collected.
static RAISED: AtomicU64 = AtomicU64::new(0);
/// The timer has fired since that was last asked.
static TIMER_FIRED: AtomicBool = AtomicBool::new(false);

fn read(register: usize) -> u32 {
    // SAFETY: mapped uncached by `tables`, for the shim alone.
    unsafe { core::ptr::with_exposed_provenance::<u32>(LOCAL + register).read_volatile() }
}

fn write(register: usize, value: u32) {
    // SAFETY: as in `read`; the registers change no memory.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(LOCAL + register).write_volatile(value) }
}

/// Switches the local controller on and every other source of interrupts off. `timer` is the timer's frequency, if it is known.
pub fn start(timer: Option<NonZeroU64>) {
    // SAFETY: the old controllers' mask registers; without such controllers the bytes go nowhere.
    unsafe {
        cpu::write_port(0x21, 0xff);
        cpu::write_port(0xa1, 0xff);
        let base = cpu::read_msr(msr::APIC_BASE);
        cpu::write_msr(msr::APIC_BASE, base | 1 << 11);
    }
    write(local::LINE_0, local::MASKED);
    write(local::LINE_1, local::MASKED);
    write(local::PRIORITY, 0);
    write(local::SPURIOUS, 0x100 | SPURIOUS_VECTOR as u32);
    if let Some(frequency) = timer {
        TIMER_FREQUENCY.store(frequency.get(), Ordering::Relaxed);
    }
}

/// Takes an interrupt: notes what it says. This is all that happens when ring 0 is interrupted.
pub fn take(vector: usize) {
    match vector {
        TIMER_VECTOR => TIMER_FIRED.store(true, Ordering::Relaxed),
        SPURIOUS_VECTOR => return,
        _ => {
            let line = vector.wrapping_sub(LINE_VECTOR);
            if line < LINES as usize {
                RAISED.fetch_or(1 << line, Ordering::Relaxed);
            }
        }
    }
    write(local::END_OF_INTERRUPT, 0);
}

/// Whether the timer has fired since the last question.
pub fn take_timer_fired() -> bool {
    TIMER_FIRED.load(Ordering::Relaxed) && TIMER_FIRED.swap(false, Ordering::Relaxed)
}

/// A line that was raised, once.
pub fn take_line() -> Option<u32> {
    let raised = RAISED.load(Ordering::Relaxed);
    if raised == 0 {
        return None;
    }
    let line = raised.trailing_zeros();
    RAISED.fetch_and(!(1 << line), Ordering::Relaxed);
    Some(line)
}

/// Whether a line was raised that nobody has collected.
pub fn line_waits() -> bool {
    RAISED.load(Ordering::Relaxed) != 0
}

/// Lets a line interrupt.
pub fn enable_line(line: u32) {
    if line >= LINES {
        return;
    }
    let (base, entry) = if line < SECOND_LINES {
        (DISTRIBUTOR, line)
    } else {
        (DISTRIBUTOR_SECOND, line - SECOND_LINES)
    };
    let destination = read(local::ID) & 0xff00_0000;
    write_entry(base, 0x11 + 2 * entry, destination);
    write_entry(base, 0x10 + 2 * entry, LINE_VECTOR as u32 + line);
}

/// Writes a register of a distributor: half a redirection entry.
fn write_entry(base: usize, register: u32, value: u32) {
    // SAFETY: mapped uncached by `tables`, for the shim alone; selecting and writing a redirection entry changes no memory.
    unsafe {
        core::ptr::with_exposed_provenance_mut::<u32>(base).write_volatile(register);
        core::ptr::with_exposed_provenance_mut::<u32>(base + 0x10).write_volatile(value);
    }
}

/// The timer's count.
pub fn timer_count() -> u32 {
    read(local::CURRENT_COUNT)
}

/// A setting of the timer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timer {
    /// Where it counts down from.
    pub ticks: u32,
    /// The clock is divided by two to the power of this.
    shift: u32,
    /// Counts again from `ticks`, so that it can be measured when it has fired.
    periodic: bool,
}

impl Timer {
    /// The setting that fires as soon as possible after a time; as late as possible for what is too long.
    pub fn for_nanoseconds(nanoseconds: u64) -> Self {
        let wide = u128::from(nanoseconds) * u128::from(TIMER_FREQUENCY.load(Ordering::Relaxed))
            / u128::from(SECOND);
        let shift = if wide < u128::from(u32::MAX) { 0 } else { 7 };
        let ticks = u32::try_from((wide >> shift) + 1).unwrap_or(u32::MAX);
        Self {
            ticks,
            shift,
            periodic: nanoseconds > 1_000_000,
        }
    }

    /// How long a number of ticks takes.
    pub fn nanoseconds(&self, ticks: u64) -> u64 {
        (u128::from(ticks << self.shift) * u128::from(SECOND)
            / u128::from(TIMER_FREQUENCY.load(Ordering::Relaxed))) as u64
    }

    /// Starts the timer anew. Never is it periodic with a short count, not even between two writes: QEMU catches up with each period
    /// that went by, and hangs for good with one that is shorter than catching up takes.
    pub fn start(&self, interrupt: bool) {
        let mut mode = TIMER_VECTOR as u32;
        if !interrupt {
            mode |= local::MASKED;
        }
        write(
            local::DIVIDER,
            if self.shift == 7 { 0b1010 } else { 0b1011 },
        );
        if self.periodic {
            write(local::INITIAL_COUNT, self.ticks);
            write(local::TIMER, mode | local::PERIODIC);
        } else {
            write(local::TIMER, mode);
            write(local::INITIAL_COUNT, self.ticks);
        }
    }
}

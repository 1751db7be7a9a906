//! The upper half of the address space: the shim itself, the controllers' registers, and the window on physical memory. All of it
//! is closed to ring 3, and nothing of it is both writable and executable, not even by way of the window.

use core::ptr::addr_of;

use kiln_shim_vm::page::{ADDRESS, GLOBAL, LARGE, NO_EXECUTE, PRESENT, TOUCHED, UNCACHED, WRITE};
use kiln_shim_vm::physical::{FRAME, Physical};

use crate::boot::VIRTUAL_OFFSET;
use crate::cell::Global;
use crate::cpu::{self, Features};
use crate::interrupts;

/// Where physical address 0 lies in the window.
pub const WINDOW: usize = 0xffff_8000_0000_0000;
const GIBIBYTE: u64 = 1 << 30;
const LARGE_PAGE: u64 = 1 << 21;
/// Page of the shim's 2 MiB that looks at devices before the kernel does.
const PROBE_PAGE: usize = 3;
/// Tables below this one of the window, for machines without pages of 1 GiB.
const WINDOW_TABLES: usize = 4;

#[repr(C, align(4096))]
struct Table(Global<[u64; 512]>);

const fn empty() -> Table {
    Table(Global::new([0; 512]))
}

#[unsafe(no_mangle)]
static SHIM_TABLE_TOP: Table = empty();
#[unsafe(no_mangle)]
static SHIM_TABLE_HIGH: Table = empty();
#[unsafe(no_mangle)]
static SHIM_TABLE_HIGH_SECOND: Table = empty();
static HIGH_LAST: Table = empty();
static WINDOW_TOP: Table = empty();
static WINDOW_SECOND: [Table; WINDOW_TABLES] = [const { empty() }; WINDOW_TABLES];
static WINDOW_LAST: Table = empty();

unsafe extern "C" {
    static shim_text_end: u8;
    static shim_rodata_start: u8;
    static shim_rodata_end: u8;
    static shim_data_start: u8;
    static shim_end: u8;
    static shim_guard_1: u8;
    static shim_guard_2: u8;
    static shim_guard_3: u8;
}

impl Table {
    /// The entries.
    ///
    /// # Safety
    ///
    /// As [`Global::get`].
    #[expect(
        clippy::mut_from_ref,
        reason = "the caller promises that the reference is the only one"
    )]
    unsafe fn entries(&self) -> &mut [u64; 512] {
        // SAFETY: the caller's promise.
        unsafe { self.0.get() }
    }

    fn entry(&self) -> u64 {
        physical_of(addr_of!(*self).cast()) | PRESENT | WRITE
    }
}

/// Physical address of something in the shim's image.
pub fn physical_of(pointer: *const u8) -> u64 {
    (pointer as usize - VIRTUAL_OFFSET) as u64
}

/// First physical address after the shim.
pub fn shim_end_physical() -> u64 {
    physical_of(addr_of!(shim_end))
}

/// Physical address of the highest table.
pub fn top() -> u64 {
    physical_of(addr_of!(SHIM_TABLE_TOP).cast())
}

/// Replaces the entry code's tables by the final ones.
///
/// # Safety
///
/// To be called once, at the start.
pub unsafe fn set_up() {
    let number = |pointer: *const u8| (pointer as usize - VIRTUAL_OFFSET) / FRAME as usize;
    // SAFETY: called once, so nobody else has references.
    let (top, high, second, last, window, window_second, window_last) = unsafe {
        (
            SHIM_TABLE_TOP.entries(),
            SHIM_TABLE_HIGH.entries(),
            SHIM_TABLE_HIGH_SECOND.entries(),
            HIGH_LAST.entries(),
            WINDOW_TOP.entries(),
            WINDOW_SECOND[0].entries(),
            WINDOW_LAST.entries(),
        )
    };
    let text = number(addr_of!(crate::entry::shim_stubs_start))..number(addr_of!(shim_text_end));
    let constants = number(addr_of!(shim_rodata_start))..number(addr_of!(shim_rodata_end));
    let data = number(addr_of!(shim_data_start))..number(addr_of!(shim_end));
    let guards = [
        addr_of!(shim_guard_1),
        addr_of!(shim_guard_2),
        addr_of!(shim_guard_3),
    ]
    .map(number);
    for (index, slot) in last.iter_mut().enumerate().take(data.end).skip(text.start) {
        let access = match index {
            _ if guards.contains(&index) => continue,
            _ if text.contains(&index) => 0,
            _ if constants.contains(&index) => NO_EXECUTE,
            _ => WRITE | NO_EXECUTE,
        };
        *slot = (index as u64 * FRAME) | PRESENT | TOUCHED | GLOBAL | access;
    }
    for (index, physical) in interrupts::PAGES {
        last[index] = physical | PRESENT | WRITE | TOUCHED | GLOBAL | NO_EXECUTE | UNCACHED;
    }

    for (index, slot) in window_last.iter_mut().enumerate() {
        let write = if index >= text.start && index < data.start {
            0
        } else {
            WRITE
        };
        *slot = (index as u64 * FRAME) | PRESENT | TOUCHED | NO_EXECUTE | GLOBAL | write;
    }
    window_second[0] = WINDOW_LAST.entry();
    for (index, slot) in window_second.iter_mut().enumerate().skip(1) {
        *slot = large(index as u64 * LARGE_PAGE);
    }
    window[0] = WINDOW_SECOND[0].entry();
    top[256] = WINDOW_TOP.entry();
    second[0] = HIGH_LAST.entry();
    high[0] = 0;
    top[0] = 0;
    cpu::reload_tables();
}

fn large(physical: u64) -> u64 {
    physical | PRESENT | WRITE | TOUCHED | NO_EXECUTE | GLOBAL | LARGE
}

/// The window on the memory up to `end`, as far as the tables reach.
///
/// # Safety
///
/// To be called with `end` up to which there is memory, after [`set_up`].
pub unsafe fn window(features: &Features, end: u64) -> Physical {
    // SAFETY: no other reference is in use: all calls come from the start.
    let top = unsafe { WINDOW_TOP.entries() };
    let mut reached = GIBIBYTE;
    for (index, slot) in top.iter_mut().enumerate().skip(1) {
        if reached >= end {
            break;
        }
        if features.gigabyte_pages {
            *slot = large(reached);
        } else {
            let Some(table) = WINDOW_SECOND.get(index) else {
                break;
            };
            // SAFETY: as above.
            for (number, entry) in unsafe { table.entries() }.iter_mut().enumerate() {
                *entry = large(reached + number as u64 * LARGE_PAGE);
            }
            *slot = table.entry();
        }
        reached += GIBIBYTE;
    }
    // SAFETY: everything up to there is mapped in the window for good.
    unsafe { Physical::new(WINDOW, end.min(reached)) }
}

/// Reads a device's register, four bytes at a physical address.
pub fn probe(address: u64) -> u32 {
    // SAFETY: no other reference is in use: all calls come from the start.
    let last = unsafe { HIGH_LAST.entries() };
    last[PROBE_PAGE] = address & ADDRESS | PRESENT | WRITE | TOUCHED | NO_EXECUTE | UNCACHED;
    cpu::reload_tables();
    let pointer = VIRTUAL_OFFSET + PROBE_PAGE * FRAME as usize + (address % FRAME) as usize;
    // SAFETY: just mapped; reading the registers that callers name has no effect.
    unsafe { core::ptr::with_exposed_provenance::<u32>(pointer & !3).read_volatile() }
}

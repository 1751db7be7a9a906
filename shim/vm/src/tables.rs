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
    static shim_rodata_start: u8;
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
    let text = physical_of(addr_of!(crate::entry::shim_stubs_start));
    let constants = physical_of(addr_of!(shim_rodata_start));
    let data = physical_of(addr_of!(shim_data_start));
    fill(last, text, constants, 0);
    fill(last, constants, data, NO_EXECUTE);
    fill(last, data, shim_end_physical(), WRITE | NO_EXECUTE);
    for guard in [
        addr_of!(shim_guard_1),
        addr_of!(shim_guard_2),
        addr_of!(shim_guard_3),
    ] {
        last[(physical_of(guard) / FRAME) as usize] = 0;
    }
    for (index, physical) in interrupts::PAGES {
        last[index] = physical | PRESENT | WRITE | TOUCHED | GLOBAL | NO_EXECUTE | UNCACHED;
    }

    fill(window_last, 0, LARGE_PAGE, WRITE | NO_EXECUTE);
    fill(window_last, text, data, NO_EXECUTE);
    for (index, slot) in window_second.iter_mut().enumerate() {
        *slot = large(index as u64 * LARGE_PAGE);
    }
    window_second[0] = WINDOW_LAST.entry();
    window[0] = WINDOW_SECOND[0].entry();
    top[256] = WINDOW_TOP.entry();
    second[0] = HIGH_LAST.entry();
    high[0] = 0;
    top[0] = 0;
    cpu::reload_tables();
}

/// Fills the part of a table of the lowest 2 MiB that stands for the physical addresses from `start` to `end`.
fn fill(table: &mut [u64; 512], start: u64, end: u64, access: u64) {
    let mut physical = start;
    while physical < end {
        table[(physical / FRAME) as usize] = physical | PRESENT | TOUCHED | GLOBAL | access;
        physical += FRAME;
    }
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

/// Reads registers of a device, four bytes each, at offsets from a physical address; none lies on another page.
pub fn probe<const N: usize>(address: u64, offsets: [u64; N]) -> [u32; N] {
    // SAFETY: no other reference is in use: all calls come from the start.
    let last = unsafe { HIGH_LAST.entries() };
    last[PROBE_PAGE] = address & ADDRESS | PRESENT | WRITE | TOUCHED | NO_EXECUTE | UNCACHED;
    cpu::reload_tables();
    let page = VIRTUAL_OFFSET + PROBE_PAGE * FRAME as usize;
    offsets.map(|offset| {
        let pointer = page + ((address + offset) % FRAME) as usize;
        // SAFETY: just mapped; reading the registers that callers name has no effect.
        unsafe { core::ptr::with_exposed_provenance::<u32>(pointer & !3).read_volatile() }
    })
}

//! The vDSO: a small shared object in the program's memory through which the C library reads clocks as a plain function
//! call (`vdso(7)`). Its source is `kernel/vdso/vdso.S`.

use kiln_abi::host::{PAGE_SIZE, Protection};
use linux_raw_sys::general as linux;
use spin::Once;

use crate::{
    Kernel, Result,
    memory::{AddressSpace, AreaFlags, Placement, page_round_up, user},
};
use alloc::sync::Arc;

static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/vdso.so"));

/// The kernel whose clocks the function shows: set once, before the first program runs.
static KERNEL: Once<Arc<Kernel>> = Once::new();

/// Maps the vDSO; returns its address.
///
/// # Errors
/// `ENOMEM`.
pub fn map(kernel: &Arc<Kernel>, memory: &mut AddressSpace) -> Result<u64> {
    KERNEL.call_once(|| Arc::clone(kernel));
    kernel.cpu.set_clock_function(clock);
    let length = page_round_up(IMAGE.len()).unwrap_or(PAGE_SIZE);
    let access = Protection::READ | Protection::WRITE;
    let start = memory.map_zero(Placement::Anywhere(0), length, access, AreaFlags::empty())?;
    user::write_bytes(start as u64, IMAGE)?;
    memory.protect(start, length, Protection::READ | Protection::EXECUTE)?;
    Ok(start as u64)
}

/// What a clock shows in nanoseconds; all ones for a clock that only the system call knows. Called by programs.
extern "sysv64" fn clock(clock: u32) -> u64 {
    let Some(kernel) = KERNEL.get() else {
        return u64::MAX;
    };
    match clock {
        linux::CLOCK_REALTIME | linux::CLOCK_REALTIME_COARSE | linux::CLOCK_TAI => {
            kernel.clock.realtime()
        }
        linux::CLOCK_MONOTONIC
        | linux::CLOCK_MONOTONIC_RAW
        | linux::CLOCK_MONOTONIC_COARSE
        | linux::CLOCK_BOOTTIME => kernel.clock.monotonic(),
        _ => u64::MAX,
    }
}

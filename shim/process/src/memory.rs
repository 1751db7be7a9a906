//! Mappings for the kernel, and the memory limit.
//!
//! # The limit
//!
//! Zero pages are reserved without limit and provided by the host on first touch, so a limit on reservations would
//! refuse programs that reserve much and touch little, and Linux has no limit on touched pages but cgroups, which need
//! privileges. So the shim measures what is in use (private pages from `/proc/PID/statm`, the pool's from its file):
//!
//! * [`map`] refuses new zero pages while the limit is reached;
//! * a timer on *consumed CPU time* (none when idle) checks as often as a program could need to reach the limit,
//!   at [`TOUCH_RATE`] bytes a nanosecond. A little above the limit (room for a program to say that it has no
//!   memory) the program gets [`TrapKind::Exhausted`] in place of running on; [`SLACK`] above it, the instance ends.
//!
//! A program can so go beyond its limit by what it touches between two ticks of the host's clock (4 ms at 250 Hz).

#![allow(unsafe_code)]

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

#[cfg(doc)]
use kiln_abi::host::TrapKind;
use kiln_abi::host::{PAGE_SIZE, Protection, Source};
use kiln_abi::process::descriptor;
use kiln_shim_process::{elf::page_up, layout};
use linux_raw_sys::general as raw;

use crate::linux::{self, EACCES, EINVAL, ENOMEM, int};
use crate::{state, time};

/// Fastest first touch of new memory that the checks reckon with, in bytes per nanosecond of CPU time.
const TOUCH_RATE: u64 = 8;
/// Shortest and longest CPU time between two checks, in nanoseconds.
const CHECK_INTERVAL: (u64, u64) = (4_000_000, 200_000_000);
/// Bytes above the limit, besides an eighth of it, at which the instance ends.
const SLACK: u64 = 64 << 20;

/// Bytes above the limit, besides a sixteenth of it, at which the program is stopped.
const GRACE: u64 = 2 << 20;

/// Bytes that the instance may use.
static LIMIT: AtomicU64 = AtomicU64::new(u64::MAX);
/// Bytes in use when last measured.
static MEASURED: AtomicU64 = AtomicU64::new(0);
/// Bytes of zero pages mapped since then.
static GROWTH: AtomicU64 = AtomicU64::new(0);
/// True once a page of the pool has been mapped.
static POOL_USED: AtomicBool = AtomicBool::new(false);

/// How the memory in use stands to the limit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Below, or so little above that a program may end in order.
    Within,
    /// Above.
    Above,
    /// Far above: the program does not care.
    FarAbove,
}

/// Sets the limit and begins to watch it.
pub fn set_limit(bytes: u64) {
    LIMIT.store(bytes, Relaxed);
    check();
}

/// The limit in bytes.
pub fn limit() -> u64 {
    LIMIT.load(Relaxed)
}

/// Measures, and asks for the next check.
pub fn check() -> Standing {
    let limit = LIMIT.load(Relaxed);
    let used = measure();
    let above =
        |part: u64, fixed: u64| used >= limit.saturating_add(limit / part).saturating_add(fixed);
    let left = limit.saturating_sub(used);
    time::after_cpu_time((left / TOUCH_RATE).clamp(CHECK_INTERVAL.0, CHECK_INTERVAL.1));
    if above(8, SLACK) {
        Standing::FarAbove
    } else if above(16, GRACE) {
        Standing::Above
    } else {
        Standing::Within
    }
}

/// True when `length` more bytes of zero pages may be mapped.
fn grow(length: u64) -> bool {
    let limit = LIMIT.load(Relaxed);
    let growth = GROWTH.load(Relaxed).saturating_add(length);
    GROWTH.store(growth, Relaxed);
    // As long as all that has been mapped since would fit, there is nothing to measure.
    MEASURED.load(Relaxed).saturating_add(growth) <= limit || measure() < limit
}

fn measure() -> u64 {
    let used = memory_used();
    MEASURED.store(used, Relaxed);
    GROWTH.store(0, Relaxed);
    used
}

/// [`kiln_abi::host::HostInterface::memory_used`].
pub extern "C" fn memory_used() -> u64 {
    // "size resident shared text lib data dt", in pages (proc_pid_statm(5)). Shared pages are those of files: the
    // image's, which are the host's cache, and the pool's, counted by its file.
    let mut text = [0; 96];
    let length = linux::read_start(descriptor::STATM, &mut text);
    let text = usize::try_from(length)
        .ok()
        .and_then(|length| text.get(..length))
        .unwrap_or_default();
    let mut fields = text.split(|byte| *byte == b' ').skip(1).map(|digits| {
        digits.iter().fold(0u64, |value, digit| {
            value
                .wrapping_mul(10)
                .wrapping_add(u64::from(digit.wrapping_sub(b'0')))
        })
    });
    let (resident, shared) = (fields.next().unwrap_or(0), fields.next().unwrap_or(0));
    let private = resident
        .saturating_sub(shared)
        .saturating_mul(PAGE_SIZE as u64);
    let pool = if POOL_USED.load(Relaxed) {
        linux::file_size(descriptor::POOL).map_or(0, |(_, used)| used)
    } else {
        0
    };
    private.saturating_add(pool)
}

/// Linux's protection bits; the same as ours. Refuses writing and execution together.
fn protection_bits(protection: u32) -> Result<usize, isize> {
    let protection = Protection::from_bits(protection).ok_or(-EINVAL)?;
    if protection.contains(Protection::WRITE | Protection::EXECUTE) {
        return Err(-EACCES);
    }
    Ok(protection.bits() as usize)
}

/// True if `length` bytes from `offset` are whole pages of `total` bytes, the last page perhaps cut.
fn within(offset: u64, length: usize, total: usize) -> bool {
    let end = usize::try_from(offset)
        .ok()
        .and_then(|offset| offset.checked_add(length));
    offset.is_multiple_of(PAGE_SIZE as u64)
        && end.is_some_and(|end| page_up(total).is_some_and(|total| end <= total))
}

/// [`kiln_abi::host::HostInterface::map`].
pub extern "C" fn map(
    address: usize,
    length: usize,
    protection: u32,
    source: u32,
    offset: u64,
) -> isize {
    let protection = match protection_bits(protection) {
        Ok(protection) => protection,
        Err(error) => return error,
    };
    if !layout::allowed(address, length) {
        return -EINVAL;
    }
    let (flags, file, position) = if source == Source::Zero as u32 {
        if protection != 0 && !grow(length as u64) {
            return -ENOMEM;
        }
        (
            raw::MAP_PRIVATE | raw::MAP_ANONYMOUS | raw::MAP_NORESERVE,
            -1,
            0,
        )
    } else if source == Source::Root as u32 {
        if !within(offset, length, state::ROOT_LENGTH.load(Relaxed)) {
            return -EINVAL;
        }
        let position = state::ROOT_OFFSET
            .load(Relaxed)
            .wrapping_add(offset as usize);
        (
            raw::MAP_PRIVATE | raw::MAP_NORESERVE,
            descriptor::IMAGE,
            position,
        )
    } else if source == Source::Pool as u32 {
        if !within(offset, length, state::POOL_LENGTH.load(Relaxed)) {
            return -EINVAL;
        }
        POOL_USED.store(true, Relaxed);
        (raw::MAP_SHARED, descriptor::POOL, offset as usize)
    } else {
        return -EINVAL;
    };
    let flags = (flags | raw::MAP_FIXED) as usize;
    // SAFETY: the range is the kernel's to use; it holds nothing of the shim.
    let result = unsafe {
        let arguments = [address, length, protection, flags, int(file), position];
        linux::syscall(raw::__NR_mmap, arguments)
    };
    result.min(0)
}

/// [`kiln_abi::host::HostInterface::unmap`].
pub extern "C" fn unmap(address: usize, length: usize) -> isize {
    if !layout::allowed(address, length) {
        return -EINVAL;
    }
    // SAFETY: as in `map`.
    unsafe { linux::syscall(raw::__NR_munmap, [address, length, 0, 0, 0, 0]) }
}

/// [`kiln_abi::host::HostInterface::protect`]. The kernel's own data may become read-only, too: so it protects its
/// relocated constants.
pub extern "C" fn protect(address: usize, length: usize, protection: u32) -> isize {
    let protection = match protection_bits(protection) {
        Ok(protection) => protection,
        Err(error) => return error,
    };
    let own_constants = protection == Protection::READ.bits() as usize
        && layout::inside(address, length, state::KERNEL_DATA.get());
    if !own_constants && !layout::allowed(address, length) {
        return -EINVAL;
    }
    // SAFETY: as in `map`; and the kernel knows which of its data are constants.
    unsafe { linux::syscall(raw::__NR_mprotect, [address, length, protection, 0, 0, 0]) }
}

/// [`kiln_abi::host::HostInterface::discard`].
pub extern "C" fn discard(address: usize, length: usize) -> isize {
    if !layout::allowed(address, length) {
        return -EINVAL;
    }
    let advise = |advice: u32| {
        // SAFETY: as in `map`.
        unsafe {
            let arguments = [address, length, advice as usize, 0, 0, 0];
            linux::syscall(raw::__NR_madvise, arguments)
        }
    };
    // MADV_REMOVE frees the pages of a shared file mapping, and refuses any other.
    if POOL_USED.load(Relaxed) && advise(raw::MADV_REMOVE) == 0 {
        return 0;
    }
    advise(raw::MADV_DONTNEED)
}

//! Clocks and the timer.
//!
//! Time is read with the host's vDSO: no system call. Where the host's clock source cannot be read from user mode the
//! vDSO makes a system call itself; syscall user dispatch catches that one, the trap handler does it here and says so
//! ([`vdso_needs_kernel`]), and later readings go straight to the system call.
//!
//! The timer is one POSIX timer. Moving the deadline back costs nothing: the timer stays armed for the earlier one and
//! is armed anew when that comes.

#![allow(unsafe_code)]

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use linux_raw_sys::general::{
    self as raw, __kernel_itimerspec as TimerValue, __kernel_timespec as Timespec,
};

use crate::linux;

/// Identifier of the timer for deadlines.
const DEADLINE: usize = 0;
/// Identifier of the timer on consumed CPU time.
const CPU_TIME: usize = 1;

type ClockGettime = unsafe extern "C" fn(i32, *mut Timespec) -> i32;

/// `__vdso_clock_gettime`, or 0.
static CLOCK_GETTIME: AtomicUsize = AtomicUsize::new(0);
/// What the kernel asked for.
static WANTED: AtomicU64 = AtomicU64::new(u64::MAX);
/// What the timer is set to.
static ARMED: AtomicU64 = AtomicU64::new(u64::MAX);

/// Sets the function to read clocks with: the vDSO's `__vdso_clock_gettime`.
///
/// # Safety
/// The address is that of such a function and stays mapped.
pub unsafe fn set_clock(function: usize) {
    CLOCK_GETTIME.store(function, Relaxed);
}

/// The vDSO cannot read clocks on this host.
pub fn vdso_needs_kernel() {
    CLOCK_GETTIME.store(0, Relaxed);
}

/// Makes the two timers. The identifiers are known: Linux counts from zero in each process.
pub fn create_timers() -> Result<(), isize> {
    for (clock, signal, expected) in [
        (raw::CLOCK_MONOTONIC, raw::SIGALRM, DEADLINE),
        (raw::CLOCK_PROCESS_CPUTIME_ID, raw::SIGPROF, CPU_TIME),
    ] {
        // `struct sigevent`: value, signal number, SIGEV_SIGNAL, padding.
        let mut event = [0u32; 16];
        event[2] = signal;
        let mut identifier = -1i32;
        // SAFETY: both structures are as large as the call reads and writes.
        let result = unsafe {
            let arguments = [
                clock as usize,
                event.as_ptr() as usize,
                &raw mut identifier as usize,
                0,
                0,
                0,
            ];
            linux::syscall(raw::__NR_timer_create, arguments)
        };
        if result < 0 {
            return Err(result);
        }
        if usize::try_from(identifier) != Ok(expected) {
            return Err(-linux::EEXIST);
        }
    }
    Ok(())
}

fn arm(timer: usize, flags: u32, nanoseconds: u64) {
    let value = TimerValue {
        it_interval: Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        },
        it_value: timespec(nanoseconds.max(1)),
    };
    // SAFETY: reads the structure. It fails only for values that `timespec` does not make.
    unsafe {
        let arguments = [timer, flags as usize, &raw const value as usize, 0, 0, 0];
        linux::syscall(raw::__NR_timer_settime, arguments);
    }
}

/// Nanoseconds as Linux takes them.
pub fn timespec(nanoseconds: u64) -> Timespec {
    Timespec {
        tv_sec: (nanoseconds / 1_000_000_000).cast_signed(),
        tv_nsec: (nanoseconds % 1_000_000_000).cast_signed(),
    }
}

fn read(clock: u32) -> u64 {
    let mut value = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let function = CLOCK_GETTIME.load(Relaxed);
    if function == 0 {
        // SAFETY: writes the structure.
        unsafe {
            let arguments = [clock as usize, &raw mut value as usize, 0, 0, 0, 0];
            linux::syscall(raw::__NR_clock_gettime, arguments);
        }
    } else {
        // SAFETY: `set_clock`'s promise.
        unsafe {
            let function = core::mem::transmute::<usize, ClockGettime>(function);
            function(clock.cast_signed(), &raw mut value);
        }
    }
    value
        .tv_sec
        .cast_unsigned()
        .wrapping_mul(1_000_000_000)
        .wrapping_add(value.tv_nsec.cast_unsigned())
}

/// [`kiln_abi::host::HostInterface::monotonic`].
pub extern "C" fn monotonic() -> u64 {
    read(raw::CLOCK_MONOTONIC)
}

/// [`kiln_abi::host::HostInterface::realtime`].
pub extern "C" fn realtime() -> u64 {
    read(raw::CLOCK_REALTIME)
}

/// [`kiln_abi::host::HostInterface::set_timer`].
pub extern "C" fn set_timer(deadline: u64) {
    WANTED.store(deadline, Relaxed);
    // When the signal of an earlier deadline comes in between, it either leaves the timer armed for this one, or finds
    // it due, and arming once more just gives a signal that nobody wants.
    if deadline < ARMED.load(Relaxed) {
        ARMED.store(deadline, Relaxed);
        arm(DEADLINE, raw::TIMER_ABSTIME, deadline);
    }
}

/// The timer's signal came. True if the deadline has come, too.
pub fn timer_fired() -> bool {
    ARMED.store(u64::MAX, Relaxed);
    let wanted = WANTED.load(Relaxed);
    if wanted == u64::MAX {
        return false;
    }
    if monotonic() < wanted {
        ARMED.store(wanted, Relaxed);
        arm(DEADLINE, raw::TIMER_ABSTIME, wanted);
        return false;
    }
    WANTED.store(u64::MAX, Relaxed);
    true
}

/// Asks for `SIGPROF` after so many nanoseconds of CPU time.
pub fn after_cpu_time(nanoseconds: u64) {
    arm(CPU_TIME, 0, nanoseconds);
}

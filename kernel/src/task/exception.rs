//! The processor's exceptions in a program, as signals: which one, and what its handler is told.
//!
//! After `sigaction(2)` (`si_code`, `si_addr`) and `struct sigcontext` of Linux's `asm/sigcontext.h` (`trapno`, `err`,
//! `cr2`).

use alloc::sync::Arc;

use kiln_abi::host::{Trap, TrapKind, exception, exit_code, page_fault};

use super::{
    Thread,
    signal::{self, Signal, SignalInfo},
};
use crate::{cpu::UserContext, memory::Fault, trace};

/// `SEGV_MAPERR`: nothing is mapped at the address.
const SEGV_MAPERR: i32 = 1;
/// `SEGV_ACCERR`: what is mapped there does not allow the access.
const SEGV_ACCERR: i32 = 2;
/// `BUS_ADRALN`: the address is not aligned.
const BUS_ADRALN: i32 = 1;
/// `BUS_ADRERR`: a page of a file that does not exist.
const BUS_ADRERR: i32 = 2;
/// `ILL_ILLOPN`: an operand, or with it the instruction, is not allowed.
const ILL_ILLOPN: i32 = 2;
/// `TRAP_TRACE`: a single step.
const TRAP_TRACE: i32 = 2;
/// `FPE_INTDIV`: an integer was divided by zero, or the quotient has no room.
const FPE_INTDIV: i32 = 1;

/// Where the x87 control and status words and MXCSR lie in an FXSAVE image (Intel 64 manual, volume 1, table 10-2).
const X87_CONTROL: usize = 0;
const X87_STATUS: usize = 2;
const MXCSR: usize = 24;
/// Where in MXCSR the masks of the exceptions begin, whose flags are the lowest bits.
const MXCSR_MASKS: u32 = 7;

/// First address that programs never have.
const USER_END: u64 = 0x7fff_ffff_f000;

/// The latest exception of a thread that became a signal: handlers of later signals see it, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latest {
    /// Its number (`trapno`).
    pub number: u32,
    /// The processor's error code (`err`).
    pub error: u32,
    /// Address of the latest page fault (`cr2`).
    pub address: u64,
}

impl Latest {
    fn note(&mut self, trap: Trap) {
        self.number = trap.exception;
        self.error = trap.error;
        if trap.exception == exception::PAGE_FAULT {
            self.address = trap.address;
            if trap.address >= USER_END {
                // Linux does not tell programs what is there.
                self.error |= page_fault::PRESENT;
            }
        }
    }
}

/// Turns what stopped the program into a signal.
pub fn take(thread: &Arc<Thread>, context: &mut UserContext, kind: TrapKind, trap: Trap) {
    let rip = context.registers.rip;
    let info = match (kind, trap.exception) {
        (TrapKind::None | TrapKind::SystemCall | TrapKind::Event, _) => return,
        (TrapKind::Exhausted, _) => {
            // As Linux does when a memory limit is reached: no handler could run without memory.
            trace::error!(
                "the program has used up the instance's memory and is killed; give it more (-m)"
            );
            thread
                .process
                .exit(exit_code::SIGNAL_BASE + i32::from(Signal::KILL.number()));
            return;
        }
        (TrapKind::Unavailable, _) => SignalInfo::fault(Signal::BUS, BUS_ADRERR, trap.address),
        (TrapKind::Exception, exception::PAGE_FAULT) => {
            let fault = thread.process.memory.lock().fault(trap.address as usize);
            let (signal, code) = match fault {
                Ok(Fault::Mended) => return,
                Ok(Fault::Missing) => (Signal::SEGV, SEGV_MAPERR),
                Ok(Fault::Denied) => (Signal::SEGV, SEGV_ACCERR),
                Ok(Fault::BeyondFile) | Err(_) => (Signal::BUS, BUS_ADRERR),
            };
            SignalInfo::fault(signal, code, trap.address)
        }
        (TrapKind::Exception, exception::DIVIDE) => SignalInfo::fault(Signal::FPE, FPE_INTDIV, rip),
        (TrapKind::Exception, number @ (exception::X87 | exception::SIMD)) => {
            let image = thread.kernel().cpu.save_extended(context);
            match floating_point_code(number, &image) {
                Some(code) => SignalInfo::fault(Signal::FPE, code, rip),
                None => return,
            }
        }
        (TrapKind::Exception, exception::INVALID_INSTRUCTION) => {
            SignalInfo::fault(Signal::ILL, ILL_ILLOPN, rip)
        }
        (TrapKind::Exception, exception::DEBUG) => SignalInfo::fault(Signal::TRAP, TRAP_TRACE, rip),
        (TrapKind::Exception, exception::BREAKPOINT) => SignalInfo::from_kernel(Signal::TRAP),
        (TrapKind::Exception, exception::ALIGNMENT) => {
            SignalInfo::fault(Signal::BUS, BUS_ADRALN, 0)
        }
        (TrapKind::Exception, exception::STACK) => SignalInfo::from_kernel(Signal::BUS),
        (TrapKind::Exception, _) => SignalInfo::from_kernel(Signal::SEGV),
    };
    thread.signals.lock().exception.note(trap);
    signal::force(thread, info);
}

/// `si_code` of a floating point exception: of those that the program wants to hear of, the one that Linux names first.
/// `None`: there is none (any more).
fn floating_point_code(number: u32, image: &[u8]) -> Option<i32> {
    let half = |at: usize| {
        let bytes = image.get(at..at + 2)?;
        Some(u32::from(u16::from_le_bytes(bytes.try_into().ok()?)))
    };
    let raised = if number == exception::SIMD {
        let status = half(MXCSR)?;
        status & !(status >> MXCSR_MASKS)
    } else {
        half(X87_STATUS)? & !half(X87_CONTROL)?
    };
    // Invalid operation, division by zero, overflow, denormal operand or underflow, inexact result; FPE_FLTINV and so on.
    [(0x01, 7), (0x04, 3), (0x08, 4), (0x12, 5), (0x20, 6)]
        .into_iter()
        .find(|(bits, _)| raised & bits != 0)
        .map(|(_, code)| code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(control: u16, status: u16, mxcsr: u16) -> [u8; 64] {
        let mut image = [0; 64];
        image[X87_CONTROL..X87_CONTROL + 2].copy_from_slice(&control.to_le_bytes());
        image[X87_STATUS..X87_STATUS + 2].copy_from_slice(&status.to_le_bytes());
        image[MXCSR..MXCSR + 2].copy_from_slice(&mxcsr.to_le_bytes());
        image
    }

    #[test]
    fn floating_point_codes_are_those_of_unmasked_exceptions() {
        // Inexact and divided by zero, division unmasked.
        let simd = image(0, 0, 0x1f80 & !0x200 | 0x24);
        assert_eq!(floating_point_code(exception::SIMD, &simd), Some(3));
        let x87 = image(0x37f & !0x8, 0x28, 0);
        assert_eq!(floating_point_code(exception::X87, &x87), Some(4));
        let none = image(0x37f, 0x3f, 0x1f80 | 0x3f);
        assert_eq!(floating_point_code(exception::SIMD, &none), None);
        assert_eq!(floating_point_code(exception::X87, &none), None);
        assert_eq!(floating_point_code(exception::X87, &[]), None);
    }
}

//! The console: QEMU's debug port 0xe9 where there is one (it takes bytes without waiting), otherwise the first serial port
//! (16550), as set up by the machine: every hypervisor's default takes bytes without further ado.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU8, Ordering};

use crate::cpu;

const DEBUG_PORT: u16 = 0xe9;
const SERIAL_PORT: u16 = 0x3f8;
/// The serial port's line status, and its bit for "takes a byte".
const LINE_STATUS: u16 = SERIAL_PORT + 5;
const TAKES_BYTE: u8 = 0x20;
/// How often the status is read before a byte is given up.
const PATIENCE: u32 = 1_000_000;

const UNKNOWN: u8 = 0;
const DEBUG: u8 = 1;
const SERIAL: u8 = 2;
static KIND: AtomicU8 = AtomicU8::new(UNKNOWN);

/// Writes bytes.
pub fn write(bytes: &[u8]) {
    if KIND.load(Ordering::Relaxed) == UNKNOWN {
        // SAFETY: reading the port has no effect; QEMU's device answers its own number.
        let answer = unsafe { cpu::read_port(DEBUG_PORT) };
        KIND.store(
            if answer == DEBUG_PORT as u8 {
                DEBUG
            } else {
                SERIAL
            },
            Ordering::Relaxed,
        );
    }
    let debug = KIND.load(Ordering::Relaxed) == DEBUG;
    for &byte in bytes {
        if debug {
            // SAFETY: the port only takes bytes.
            unsafe { cpu::write_port(DEBUG_PORT, byte) };
            continue;
        }
        for _ in 0..PATIENCE {
            // SAFETY: reading the status has no effect. Without a port it reads as all ones, and bytes go nowhere.
            if unsafe { cpu::read_port(LINE_STATUS) } & TAKES_BYTE != 0 {
                break;
            }
        }
        // SAFETY: the port only takes bytes.
        unsafe { cpu::write_port(SERIAL_PORT, byte) };
    }
}

/// The console for `write!`.
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write(text.as_bytes());
        Ok(())
    }
}

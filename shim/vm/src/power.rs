//! Switching the machine off.
//!
//! QEMU's `isa-debug-exit` device at port [`EXIT_PORT`] (`-device isa-debug-exit,iobase=0xf4,iosize=0x04`) ends QEMU with the exit
//! code `2 * code + 1`, of which eight bits count; that is how a shell sees something of the program's own code. For code 0 it is not used, so
//! that success is 0 there too. A machine with ACPI's
//! registers in the usual place is switched off there, any other by a triple fault, which QEMU takes for a reset and `-no-reboot` makes
//! an end.

use core::arch::asm;

use crate::cpu;

/// Port of `isa-debug-exit`.
const EXIT_PORT: u16 = 0xf4;
/// ACPI's power management control of QEMU's q35 and pc machines, and the value for "off".
const POWER_CONTROL: u16 = 0x604;
const POWER_OFF: u16 = 0x2000;

/// Ends the machine.
pub fn off(code: i32) -> ! {
    let empty = [0u8; 10];
    // SAFETY: the devices end the machine, if they exist; with an empty table of gates, so does the first exception.
    unsafe {
        if code != 0 {
            cpu::write_port_long(EXIT_PORT, code as u32);
        }
        cpu::write_port_word(POWER_CONTROL, POWER_OFF);
        asm!("lidt [{}]", "ud2", in(reg) &empty, options(noreturn));
    }
}

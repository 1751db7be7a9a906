//! A kernel that tests the shim below it.
//!
//! It does what the configuration names, says on the console what it found, and ends with code 0 if that is what
//! the host interface promises. Programs are stretches of its own text that it copies to program memory.

#![no_std]
#![no_main]

#[path = "../src/support.rs"]
mod support;

mod machine;
mod tests;

use core::fmt::{LowerHex, Write};

use kiln_abi::host::BootInformation;

/// The console as text.
pub struct Console<'a>(&'a BootInformation);

impl Write for Console<'_> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        (self.0.host.console_write)(text.as_ptr(), text.len());
        Ok(())
    }
}

/// Says what is wrong and ends the instance if `condition` does not hold.
pub fn check(boot: &BootInformation, condition: bool, what: &str, values: &[u64]) {
    if !condition {
        let _ = writeln!(Console(boot), "WRONG: {what} {values:x?}");
        (boot.host.exit)(1)
    }
}

/// Says what is wrong and ends the instance if `condition` does not hold.
pub fn holds(boot: &BootInformation, condition: bool, what: &str) {
    check(boot, condition, what, &[]);
}

/// Says what is wrong and ends the instance if a value is not the wanted one.
pub fn same<T: PartialEq + LowerHex>(boot: &BootInformation, got: T, wanted: T, what: &str) {
    if got != wanted {
        let _ = writeln!(Console(boot), "WRONG: {what}: {got:x}, not {wanted:x}");
        (boot.host.exit)(1)
    }
}

extern "C" fn start(boot: &'static BootInformation) -> ! {
    // SAFETY: the shim mapped the configuration for as long as we live.
    let configuration = unsafe {
        core::slice::from_raw_parts(
            boot.configuration.start as *const u8,
            boot.configuration.length,
        )
    };
    tests::run(
        boot,
        core::str::from_utf8(configuration).unwrap_or_default(),
    );
    let _ = writeln!(Console(boot), "right");
    (boot.host.exit)(0)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    machine::stop()
}

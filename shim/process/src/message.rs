//! The shim's own words on the console.

use kiln_abi::process::{EXIT_SHIM, descriptor};

use crate::linux;

/// A line under construction. What does not fit is cut off.
pub struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl Line {
    /// A line that begins with the product's name.
    pub fn new() -> Self {
        let mut line = Self {
            bytes: [0; 512],
            length: 0,
        };
        line.text("kiln: ");
        line
    }

    /// Adds text.
    pub fn text(&mut self, text: &str) -> &mut Self {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
        self
    }

    /// Adds a number in hexadecimal.
    pub fn hexadecimal(&mut self, value: usize) -> &mut Self {
        let digits = (usize::BITS - value.leading_zeros()).div_ceil(4).max(1);
        self.text("0x").digits(value, 16, digits)
    }

    /// Adds a number in decimal.
    pub fn decimal(&mut self, value: usize) -> &mut Self {
        self.digits(value, 10, value.checked_ilog10().unwrap_or(0) + 1)
    }

    fn digits(&mut self, value: usize, base: usize, count: u32) -> &mut Self {
        for position in (0..count).rev() {
            let digit = value / base.pow(position) % base;
            let digit = u32::try_from(digit)
                .ok()
                .and_then(|digit| char::from_digit(digit, 16));
            self.text(digit.unwrap_or('?').encode_utf8(&mut [0; 4]));
        }
        self
    }

    /// Writes the line to the console. A console that nobody reads is no error.
    pub fn print(&mut self) {
        self.text("\n");
        if let Some(bytes) = self.bytes.get(..self.length) {
            linux::write(descriptor::CONSOLE, bytes);
        }
    }
}

/// Ends a shim that cannot start the kernel, saying why. `error` is a negated Linux error number.
pub fn fail(what: &str, error: Option<isize>) -> ! {
    let mut line = Line::new();
    line.text("engine process: ").text(what);
    if let Some(error) = error {
        line.text(" (Linux error ")
            .decimal(error.unsigned_abs())
            .text(")");
    }
    line.print();
    linux::exit(EXIT_SHIM)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    fail("the process shim has a bug: it panicked", None)
}

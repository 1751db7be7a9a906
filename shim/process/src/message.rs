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
        Self { bytes: [0; 512], length: 0 }.text("kiln: ")
    }

    /// Adds text.
    pub fn text(mut self, text: &str) -> Self {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
        self
    }

    /// Adds a number in hexadecimal.
    pub fn hexadecimal(self, value: usize) -> Self {
        let digits = (usize::BITS - value.leading_zeros()).div_ceil(4).max(1);
        self.digits(value, 16, digits, "0x")
    }

    /// Adds a number in decimal.
    pub fn decimal(self, value: usize) -> Self {
        self.digits(value, 10, value.checked_ilog10().unwrap_or(0) + 1, "")
    }

    fn digits(self, value: usize, base: usize, count: u32, prefix: &str) -> Self {
        let mut line = self.text(prefix);
        for position in (0..count).rev() {
            let digit = value / base.pow(position) % base;
            let digit = u32::try_from(digit).ok().and_then(|digit| char::from_digit(digit, 16));
            line = line.text(digit.unwrap_or('?').encode_utf8(&mut [0; 4]));
        }
        line
    }

    /// Writes the line to the console. A console that nobody reads is no error.
    pub fn print(self) {
        let line = self.text("\n");
        if let Some(bytes) = line.bytes.get(..line.length) {
            linux::write(descriptor::CONSOLE, bytes);
        }
    }
}

/// Ends a shim that cannot start the kernel, saying why. `error` is a negated Linux error number.
pub fn fail(what: &str, error: Option<isize>) -> ! {
    let mut line = Line::new().text("engine process: ").text(what);
    if let Some(error) = error {
        line = line.text(" (Linux error ").decimal(error.unsigned_abs()).text(")");
    }
    line.print();
    linux::exit(EXIT_SHIM)
}

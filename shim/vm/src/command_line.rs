//! The boot loader's command line: where it says the virtio devices are.
//!
//! The form is Linux's: `virtio_mmio.device=SIZE@ADDRESS:LINE[:ID]`, with `K`, `M` or `G` after a size. Everything else is
//! passed over.

/// A virtio device on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceArgument {
    /// Bytes of registers.
    pub size: u64,
    /// Physical address of the registers.
    pub address: u64,
    /// Interrupt line.
    pub line: u32,
}

/// The devices that a command line names; malformed ones are passed over.
pub fn devices(line: &[u8]) -> impl Iterator<Item = DeviceArgument> {
    line.split(u8::is_ascii_whitespace)
        .filter_map(|word| device(word.strip_prefix(b"virtio_mmio.device=")?))
}

fn device(text: &[u8]) -> Option<DeviceArgument> {
    let (size, rest) = number(text)?;
    let (&unit, after) = rest.split_first()?;
    let (factor, rest) = match unit {
        b'K' | b'k' => (1 << 10, after),
        b'M' | b'm' => (1 << 20, after),
        b'G' | b'g' => (1 << 30, after),
        _ => (1, rest),
    };
    let (address, rest) = number(rest.strip_prefix(b"@")?)?;
    let (line, rest) = number(rest.strip_prefix(b":")?)?;
    if !matches!(rest, [] | [b':', ..]) {
        return None;
    }
    Some(DeviceArgument {
        size: size.checked_mul(factor)?,
        address,
        line: u32::try_from(line).ok()?,
    })
}

/// The number that a text starts with, decimal or hexadecimal after `0x`, and the rest of the text.
fn number(text: &[u8]) -> Option<(u64, &[u8])> {
    let (base, mut rest) = match text {
        [b'0', b'x' | b'X', digits @ ..] => (16, digits),
        _ => (10, text),
    };
    let length = rest.len();
    let mut value = 0u64;
    while let [byte, after @ ..] = rest
        && let Some(digit) = char::from(*byte).to_digit(base)
    {
        value = value
            .checked_mul(u64::from(base))?
            .checked_add(u64::from(digit))?;
        rest = after;
    }
    (rest.len() < length).then_some((value, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_found_among_other_words() {
        let line = b"console=ttyS0  virtio_mmio.device=512@0xfeb00e00:12 quiet virtio_mmio.device=4K@0xfeb00c00:11:3";
        let found: Vec<_> = devices(line).collect();
        assert_eq!(
            found,
            [
                DeviceArgument {
                    size: 512,
                    address: 0xfeb0_0e00,
                    line: 12
                },
                DeviceArgument {
                    size: 4096,
                    address: 0xfeb0_0c00,
                    line: 11
                },
            ]
        );
    }

    #[test]
    fn malformed_devices_are_passed_over() {
        let line = b"virtio_mmio.device= virtio_mmio.device=512 virtio_mmio.device=512@:5 virtio_mmio.device=K@1:2 \
            virtio_mmio.device=512@0x10:99999999999 virtio_mmio.device=99999999999999999999G@1:2 \xff\xfe";
        assert_eq!(devices(line).count(), 0);
    }
}

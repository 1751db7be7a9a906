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
    line.split(|byte| byte.is_ascii_whitespace())
        .filter_map(|word| {
            let text = core::str::from_utf8(word.strip_prefix(b"virtio_mmio.device=")?).ok()?;
            let (size, rest) = text.split_once('@')?;
            let mut parts = rest.split(':');
            let address = number(parts.next()?)?;
            let line = u32::try_from(number(parts.next()?)?).ok()?;
            Some(DeviceArgument {
                size: size_of(size)?,
                address,
                line,
            })
        })
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn size_of(text: &str) -> Option<u64> {
    let (digits, factor) = match text.as_bytes().last()? {
        b'K' | b'k' => (text.get(..text.len() - 1)?, 1 << 10),
        b'M' | b'm' => (text.get(..text.len() - 1)?, 1 << 20),
        b'G' | b'g' => (text.get(..text.len() - 1)?, 1 << 30),
        _ => (text, 1),
    };
    number(digits)?.checked_mul(factor)
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

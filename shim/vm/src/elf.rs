//! The kernel's ELF file, as far as loading it needs: a static position-independent x86-64 executable.

use crate::physical::FRAME;

/// Most loadable segments that are looked at.
pub const MAX_SEGMENTS: usize = 8;
/// Largest address space that a kernel may ask for.
const MAX_SIZE: u64 = 1 << 30;

/// A loadable segment. All ranges lie within the file and within the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Where in the file it starts.
    pub offset: u64,
    /// Where it goes, relative to the image's base.
    pub address: u64,
    /// Bytes from the file.
    pub file_size: u64,
    /// Bytes in memory; what the file does not give is zero.
    pub memory_size: u64,
    /// Stores allowed.
    pub write: bool,
    /// Instruction fetches allowed.
    pub execute: bool,
}

/// A kernel, checked.
#[derive(Clone, Copy, Debug)]
pub struct Elf {
    /// Entry point, relative to the image's base.
    pub entry: u64,
    /// Bytes of address space from the base, in whole pages.
    pub size: u64,
    segments: [Segment; MAX_SEGMENTS],
    count: usize,
    entry_is_text: bool,
}

impl Elf {
    /// Reads the headers of `file`; the answer is what is wrong with it.
    ///
    /// # Errors
    ///
    /// A short text for the console.
    pub fn parse(file: &[u8]) -> Result<Self, &'static str> {
        let start = file.first_chunk::<64>();
        let (Some(start), Some(b"\x7fELF\x02\x01")) = (start, file.first_chunk::<6>()) else {
            return Err("the kernel is not an ELF file for x86-64");
        };
        let half = |offset: usize| u16::from_le_bytes(chunk(start, offset));
        if half(18) != 62 {
            return Err("the kernel is not an ELF file for x86-64");
        }
        if half(16) != 3 {
            return Err("the kernel is not position-independent");
        }
        let table = u64::from_le_bytes(chunk(start, 32));
        let (entry_size, entries) = (u64::from(half(54)), u64::from(half(56)));
        let mut elf = Self {
            entry: u64::from_le_bytes(chunk(start, 24)),
            size: 0,
            segments: [Segment::default(); MAX_SEGMENTS],
            count: 0,
            entry_is_text: false,
        };
        for index in 0..entries {
            let header = table
                .checked_add(index * entry_size)
                .and_then(|start| usize::try_from(start).ok())
                .and_then(|start| file.get(start..)?.first_chunk::<56>())
                .ok_or("the kernel's program headers lie outside of the file")?;
            if u32::from_le_bytes(chunk(header, 0)) != 1 {
                continue;
            }
            let flags = u32::from_le_bytes(chunk(header, 4));
            let word = |offset: usize| u64::from_le_bytes(chunk(header, offset));
            let segment = Segment {
                offset: word(8),
                address: word(16),
                file_size: word(32),
                memory_size: word(40),
                write: flags & 2 != 0,
                execute: flags & 1 != 0,
            };
            elf.add(segment, file.len() as u64)?;
        }
        if !elf.entry_is_text {
            return Err("the kernel's entry point is not in its text");
        }
        Ok(elf)
    }

    fn add(&mut self, segment: Segment, file_length: u64) -> Result<(), &'static str> {
        let file_end = segment.offset.checked_add(segment.file_size);
        if file_end.is_none_or(|end| end > file_length) || segment.file_size > segment.memory_size {
            return Err("a segment of the kernel lies outside of the file");
        }
        let end = segment
            .address
            .checked_add(segment.memory_size)
            .filter(|&end| end <= MAX_SIZE);
        let Some(end) = end else {
            return Err("the kernel is too large");
        };
        if segment.write && segment.execute {
            return Err("a segment of the kernel is both writable and executable");
        }
        if segment.address % FRAME != segment.offset % FRAME {
            return Err("a segment of the kernel is misaligned");
        }
        if segment.address & !(FRAME - 1) < self.size {
            return Err("segments of the kernel overlap or are out of order");
        }
        let slot = self
            .segments
            .get_mut(self.count)
            .ok_or("the kernel has too many segments")?;
        *slot = segment;
        self.entry_is_text |= segment.execute && (segment.address..end).contains(&self.entry);
        self.count += 1;
        self.size = end.next_multiple_of(FRAME);
        Ok(())
    }

    /// The segments, in rising order, with no page in common.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        self.segments.get(..self.count).unwrap_or_default()
    }
}

/// `N` bytes from `offset`; zeros beyond the end.
fn chunk<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(segments: &[(u32, u64, u64, u64, u64)], entry: u64) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[16] = 3;
        bytes[18] = 62;
        bytes[24..32].copy_from_slice(&entry.to_le_bytes());
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = segments.len() as u8;
        for &(flags, offset, address, file_size, memory_size) in segments {
            bytes.extend(1u32.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            for word in [offset, address, address, file_size, memory_size, FRAME] {
                bytes.extend(word.to_le_bytes());
            }
        }
        bytes.resize(0x4000, 0);
        bytes
    }

    #[test]
    fn a_good_kernel_is_taken() {
        let elf = Elf::parse(&file(
            &[
                (4, 0, 0, 0x800, 0x800),
                (5, 0x1000, 0x1000, 0x900, 0x900),
                (6, 0x2800, 0x3800, 16, 0x5000),
            ],
            0x1010,
        ))
        .expect("good");
        assert_eq!(elf.segments().len(), 3);
        assert_eq!(elf.size, 0x9000);
    }

    #[test]
    fn bad_kernels_are_refused() {
        let text = (5, 0x1000, 0x1000, 0x900, 0x900);
        for (segments, entry) in [
            (vec![], 0),
            (vec![text], 0x800),
            (vec![(7, 0x1000, 0x1000, 1, 1)], 0x1000),
            (vec![(5, 0x1000, 0x1000, 0x900, 0x800)], 0x1000),
            (vec![(5, 0x1000, 0x1000, 0x9000, 0x9000)], 0x1000),
            (vec![(5, u64::MAX - 4, 0x1000, 0x9, 0x9)], 0x1000),
            (vec![(5, 0x1000, u64::MAX - 0xfff, 0x900, 0x1900)], 0x1000),
            (vec![(5, 0x1008, 0x1000, 0x900, 0x900)], 0x1000),
            (vec![text, text], 0x1000),
            (vec![text, (6, 0x1900, 0x1900, 1, 1)], 0x1000),
        ] {
            assert!(
                Elf::parse(&file(&segments, entry)).is_err(),
                "{segments:x?}"
            );
        }
        assert!(Elf::parse(b"").is_err());
        assert!(Elf::parse(b"\x7fELF\x02\x01").is_err());
        let good = file(&[text], 0x1000);
        for length in 0..200 {
            assert!(Elf::parse(&good[..length]).is_err());
        }
    }
}

//! Reading the kernel's ELF file: just what it takes to map it.
//!
//! Not a general ELF reader: it accepts static PIE files for x86-64 whose segments never ask for writing and
//! execution together, and refuses all else. It trusts no byte: every range is checked against the file and the
//! segments' own span, so that a damaged image gives an error and not a fault.

use kiln_abi::host::PAGE_SIZE;

/// Most loadable segments that a kernel may have.
pub const MAX_SEGMENTS: usize = 8;

/// Most bytes of memory that a kernel's segments may span.
pub const MAX_SPAN: usize = 256 << 20;

/// A loadable segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Offset of its first byte in the ELF file.
    pub offset: usize,
    /// Address relative to the image's base. Congruent to `offset` modulo the page size.
    pub address: usize,
    /// Bytes that come from the file.
    pub file_length: usize,
    /// Bytes in memory; those beyond `file_length` are zero.
    pub memory_length: usize,
    /// Stores are allowed.
    pub write: bool,
    /// Instruction fetches are allowed.
    pub execute: bool,
}

/// What is to be mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Program {
    segments: [Segment; MAX_SEGMENTS],
    count: usize,
    /// Bytes from the base to the end of the last segment, a multiple of the page size.
    pub span: usize,
    /// Where to start, relative to the base. Lies in an executable segment.
    pub entry: usize,
}

impl Program {
    /// The segments by ascending address; no two share a page.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        self.segments.get(..self.count).unwrap_or_default()
    }
}

/// Why a file is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The file ends within a structure or segment.
    Truncated,
    /// No ELF file for x86-64 of the kind `ET_DYN`.
    Kind,
    /// Segments overlap, are not in order, not aligned, too many or too large.
    Segments,
    /// A segment asks for writing and execution.
    WriteAndExecute,
    /// The entry is not in an executable segment.
    Entry,
}

impl Error {
    /// The error in words.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Truncated => "its ELF file is truncated",
            Self::Kind => "it is no position-independent ELF file for x86-64",
            Self::Segments => "its segments overlap or are misplaced",
            Self::WriteAndExecute => "a segment asks for writing and execution together",
            Self::Entry => "its entry lies outside its text",
        }
    }
}

const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PF_X: u32 = 1;
const PF_W: u32 = 2;

fn bytes<const N: usize>(file: &[u8], offset: usize) -> Result<[u8; N], Error> {
    let end = offset.checked_add(N).ok_or(Error::Truncated)?;
    file.get(offset..end)
        .and_then(|slice| slice.try_into().ok())
        .ok_or(Error::Truncated)
}

fn half(file: &[u8], offset: usize) -> Result<u16, Error> {
    bytes(file, offset).map(u16::from_le_bytes)
}

fn word(file: &[u8], offset: usize) -> Result<u32, Error> {
    bytes(file, offset).map(u32::from_le_bytes)
}

fn size(file: &[u8], offset: usize) -> Result<usize, Error> {
    usize::try_from(bytes(file, offset).map(u64::from_le_bytes)?).map_err(|_| Error::Segments)
}

/// Rounds up to whole pages; `None` beyond the end of the address space.
#[must_use]
pub fn page_up(value: usize) -> Option<usize> {
    Some(value.checked_add(PAGE_SIZE - 1)? & !(PAGE_SIZE - 1))
}

/// Reads the headers of `file` (ELF-64 Object File Format, version 1.5).
///
/// # Errors
/// See [`Error`].
pub fn parse(file: &[u8]) -> Result<Program, Error> {
    let identity: [u8; 7] = bytes(file, 0)?;
    if identity != [0x7f, b'E', b'L', b'F', 2, 1, 1]
        || half(file, 16)? != ET_DYN
        || half(file, 18)? != EM_X86_64
    {
        return Err(Error::Kind);
    }
    let entry = size(file, 24)?;
    let headers = size(file, 32)?;
    if half(file, 54)? != 56 {
        return Err(Error::Kind);
    }
    let mut program = Program {
        entry,
        ..Program::default()
    };
    for index in 0..usize::from(half(file, 56)?) {
        let header = headers.checked_add(index * 56).ok_or(Error::Truncated)?;
        if word(file, header)? != PT_LOAD {
            continue;
        }
        let flags = word(file, header.checked_add(4).ok_or(Error::Truncated)?)?;
        let field = |position: usize| {
            header
                .checked_add(position)
                .ok_or(Error::Truncated)
                .and_then(|offset| size(file, offset))
        };
        let segment = Segment {
            offset: field(8)?,
            address: field(16)?,
            file_length: field(32)?,
            memory_length: field(40)?,
            write: flags & PF_W != 0,
            execute: flags & PF_X != 0,
        };
        if segment.memory_length == 0 {
            continue;
        }
        if segment.write && segment.execute {
            return Err(Error::WriteAndExecute);
        }
        let file_end = segment
            .offset
            .checked_add(segment.file_length)
            .ok_or(Error::Truncated)?;
        if file_end > file.len() {
            return Err(Error::Truncated);
        }
        let end = segment
            .address
            .checked_add(segment.memory_length)
            .and_then(page_up);
        let end = end.filter(|end| *end <= MAX_SPAN).ok_or(Error::Segments)?;
        if segment.file_length > segment.memory_length
            || segment.offset % PAGE_SIZE != segment.address % PAGE_SIZE
            || segment.address & !(PAGE_SIZE - 1) < program.span
        {
            return Err(Error::Segments);
        }
        *program
            .segments
            .get_mut(program.count)
            .ok_or(Error::Segments)? = segment;
        program.count += 1;
        program.span = end;
    }
    let inside = |segment: &Segment| {
        segment.execute && entry >= segment.address && entry - segment.address < segment.file_length
    };
    if program.segments().iter().any(inside) {
        Ok(program)
    } else {
        Err(Error::Entry)
    }
}

#[cfg(test)]
mod tests {
    use super::{Error, Program, Segment, parse};

    fn put(file: &mut [u8], offset: usize, bytes: &[u8]) {
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn header(file: &mut [u8], index: usize, flags: u32, words: [u64; 6]) {
        let start = 64 + index * 56;
        put(file, start, &1u32.to_le_bytes());
        put(file, start + 4, &flags.to_le_bytes());
        for (number, word) in words.iter().enumerate() {
            put(file, start + 8 + number * 8, &word.to_le_bytes());
        }
    }

    /// Text at 0x1000 and data at 0x2010, with zeros to 0x4000.
    fn file() -> Vec<u8> {
        let mut file = vec![0; 0x3000];
        put(&mut file, 0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
        put(&mut file, 16, &[3, 0, 62, 0]);
        put(&mut file, 24, &0x1008u64.to_le_bytes());
        put(&mut file, 32, &64u64.to_le_bytes());
        put(&mut file, 54, &56u16.to_le_bytes());
        put(&mut file, 56, &2u16.to_le_bytes());
        header(
            &mut file,
            0,
            5,
            [0x1000, 0x1000, 0x1000, 0x800, 0x800, 0x1000],
        );
        header(
            &mut file,
            1,
            6,
            [0x2010, 0x2010, 0x2010, 0x100, 0x1ff0, 0x1000],
        );
        file
    }

    #[test]
    fn segments_are_found() {
        let program = parse(&file()).unwrap();
        let text = Segment {
            offset: 0x1000,
            address: 0x1000,
            file_length: 0x800,
            memory_length: 0x800,
            write: false,
            execute: true,
        };
        let data = Segment {
            offset: 0x2010,
            address: 0x2010,
            file_length: 0x100,
            memory_length: 0x1ff0,
            write: true,
            execute: false,
        };
        assert_eq!(program.segments(), [text, data]);
        assert_eq!((program.span, program.entry), (0x4000, 0x1008));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let file = file();
        for length in 0..0x2110 {
            assert!(
                parse(&file[..length]).is_err(),
                "{length} bytes were accepted"
            );
        }
        assert!(parse(&file[..0x2110]).is_ok());
    }

    #[test]
    fn damage_is_named() {
        let with = |offset: usize, bytes: &[u8]| {
            let mut file = file();
            put(&mut file, offset, bytes);
            parse(&file)
        };
        assert_eq!(with(18, &[183]), Err(Error::Kind));
        assert_eq!(with(16, &[2]), Err(Error::Kind));
        assert_eq!(with(64 + 4, &[7]), Err(Error::WriteAndExecute));
        assert_eq!(with(24, &[0, 0x20]), Err(Error::Entry));
        assert_eq!(
            with(64 + 56 + 16, &[0x10, 0x18]),
            Err(Error::Segments),
            "overlap"
        );
        assert_eq!(
            with(64 + 56 + 16, &[0x11, 0x20]),
            Err(Error::Segments),
            "misaligned"
        );
        assert_eq!(
            with(64 + 56 + 16, &[0xff; 8]),
            Err(Error::Segments),
            "wraps"
        );
        assert_eq!(
            with(64 + 56 + 8, &[0xff; 8]),
            Err(Error::Truncated),
            "offset wraps"
        );
        assert_eq!(
            with(32, &[0xff; 8]),
            Err(Error::Truncated),
            "headers outside"
        );
        assert_eq!(
            with(64 + 40, &[0; 8]).map(|p: Program| p.entry),
            Err(Error::Entry),
            "no text"
        );
    }
}

//! The instructions of programs and libraries: where their functions are, where they make system calls, and which
//! calls those are.
//!
//! Functions are found through symbols, the entry point and the unwind tables (`.eh_frame_hdr` and `.eh_frame`, Linux
//! Standard Base core specification, section 10.6), which nearly every file for Linux has. Each is
//! decoded from its first instruction to its end; bytes outside functions are left alone, so data between functions is
//! never taken for code.

use std::collections::BTreeSet;

use iced_x86::{
    Code as Opcode, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory,
    OpAccess, OpKind, Register,
};

use crate::elf::{Elf, Segment};

/// Most functions that are looked at.
const MAX_FUNCTIONS: usize = 1 << 20;
/// The `syscall` instruction.
pub(crate) const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// A range of addresses that is one function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// Has landing pads for exceptions: control can come to places that no jump names.
    pub landing_pads: bool,
}

/// A `syscall` instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Its address, relative to the load base.
    pub address: u64,
    /// The call's number, where the code before it leaves no doubt.
    pub number: Option<u32>,
    /// The function it is in.
    pub function: Range,
}

/// An ELF file as instructions.
pub struct Code<'a> {
    bytes: &'a [u8],
    elf: &'a Elf,
    functions: Vec<Range>,
}

/// Checked reading from unwind tables.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let value = *self.bytes.get(self.at..)?.first_chunk()?;
        self.at += N;
        Some(value)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn word(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    /// An unsigned LEB128 number; signed ones have the same length.
    fn leb128(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..63).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn text(&mut self) -> Option<&'a [u8]> {
        let rest = self.bytes.get(self.at..)?;
        let length = rest.iter().position(|byte| *byte == 0)?;
        self.at += length + 1;
        rest.get(..length)
    }

    /// A pointer in one of the `DW_EH_PE_*` encodings; `address` is where it lies, for relative ones.
    fn pointer(&mut self, encoding: u8, address: u64) -> Option<u64> {
        let value = match encoding & 0x0f {
            0x00 | 0x04 | 0x0c => u64::from_le_bytes(self.take()?),
            0x02 => u16::from_le_bytes(self.take()?).into(),
            0x03 => self.word()?.into(),
            0x0a => i64::from(i16::from_le_bytes(self.take()?)) as u64,
            0x0b => i64::from(i32::from_le_bytes(self.take()?)) as u64,
            _ => return None,
        };
        match encoding & 0x70 {
            0x00 => Some(value),
            0x10 if value != 0 => Some(value.wrapping_add(address)),
            0x10 => Some(0),
            _ => None,
        }
    }
}

impl<'a> Code<'a> {
    /// Finds the functions of a file.
    #[must_use]
    pub fn new(bytes: &'a [u8], elf: &'a Elf) -> Self {
        let mut code = Self {
            bytes,
            elf,
            functions: Vec::new(),
        };
        let mut functions = code.unwound();
        for function in &elf.functions {
            let end = function.address.saturating_add(function.length);
            functions.push(Range {
                start: function.address,
                end,
                landing_pads: false,
            });
        }
        if elf.entry != 0 {
            functions.push(Range {
                start: elf.entry,
                end: elf.entry,
                landing_pads: false,
            });
        }
        // Only what lies in executable bytes of the file; one range for each start, the longest.
        functions.retain_mut(|range| {
            let segment = elf.segments.iter().find(|segment| {
                segment.is_executable()
                    && range.start >= segment.address
                    && range.start - segment.address < segment.file_length
            });
            if let Some(segment) = segment {
                range.end = range.end.min(segment.address + segment.file_length);
            }
            segment.is_some()
        });
        functions.sort_by_key(|range| {
            (
                range.start,
                std::cmp::Reverse(range.end),
                !range.landing_pads,
            )
        });
        let mut merged: Vec<Range> = Vec::new();
        for range in functions {
            match merged.last_mut() {
                Some(last) if last.start == range.start => last.landing_pads |= range.landing_pads,
                _ => merged.push(range),
            }
        }
        // A symbol without a length reaches to the next function.
        for index in 0..merged.len() {
            let next = merged.get(index + 1).map(|next| next.start);
            if let Some(range) = merged.get_mut(index)
                && range.end <= range.start
            {
                range.end = next.unwrap_or(range.start);
            }
        }
        code.functions = merged;
        code
    }

    /// The functions, by address.
    #[must_use]
    pub fn functions(&self) -> &[Range] {
        &self.functions
    }

    /// The file's bytes at an address, as many as there are up to `end`.
    pub(crate) fn bytes_at(&self, start: u64, end: u64) -> Option<&'a [u8]> {
        let offset = self.elf.offset_of(start)?;
        let length = end.checked_sub(start)?;
        let from = usize::try_from(offset).ok()?;
        self.bytes
            .get(from..from.checked_add(usize::try_from(length).ok()?)?)
    }

    /// All instructions of a function, in order.
    #[must_use]
    pub fn decode(&self, function: Range) -> Vec<Instruction> {
        let bytes = self
            .bytes_at(function.start, function.end)
            .unwrap_or_default();
        Decoder::with_ip(64, bytes, function.start, DecoderOptions::NONE)
            .into_iter()
            .collect()
    }

    /// Where the segment that holds an address ends in the file.
    fn file_end(&self, address: u64) -> Option<u64> {
        let segment = self.elf.segments.iter().find(|segment| {
            address >= segment.address && address - segment.address < segment.file_length
        })?;
        Some(segment.address + segment.file_length)
    }

    /// Ranges from the unwind tables.
    fn unwound(&self) -> Vec<Range> {
        let entries = self
            .indexed_entries()
            .or_else(|| self.entries_in_order())
            .unwrap_or_default();
        entries
            .into_iter()
            .filter_map(|entry| {
                let bytes = self.bytes_at(entry, self.file_end(entry)?)?;
                self.frame_description(bytes, entry)
            })
            .collect()
    }

    /// Addresses of frame description entries from the index that linkers make of them.
    fn indexed_entries(&self) -> Option<Vec<u64>> {
        let header = self.elf.unwind_header?;
        let bytes = self.bytes_at(header, self.file_end(header)?)?;
        let mut cursor = Cursor { bytes, at: 0 };
        let [version, frame_encoding, count_encoding, table_encoding] = cursor.take()?;
        // The only form that linkers write: a table of pairs, relative to the header.
        if version != 1 || table_encoding != 0x3b {
            return None;
        }
        cursor.pointer(frame_encoding, header + 4)?;
        let count = cursor.pointer(count_encoding, header + cursor.at as u64)?;
        let mut entries = Vec::new();
        for _ in 0..count.min(MAX_FUNCTIONS as u64) {
            cursor.word()?;
            let relative = i64::from(cursor.word()? as i32) as u64;
            entries.push(header.wrapping_add(relative));
        }
        Some(entries)
    }

    /// Addresses of frame description entries as they lie in the section `.eh_frame`: static programs often have
    /// no index.
    fn entries_in_order(&self) -> Option<Vec<u64>> {
        let (start, length) = self.elf.unwind_section?;
        let end = start.checked_add(length)?;
        let mut entries = Vec::new();
        let mut at = start;
        while at < end && entries.len() < MAX_FUNCTIONS {
            let mut cursor = Cursor {
                bytes: self.bytes_at(at, end)?,
                at: 0,
            };
            let length = cursor.word()?;
            // Entries of 4 GiB and more are no entries.
            if length == u32::MAX {
                break;
            }
            // A length of 0 ends what one linked file brought; others may follow.
            if length != 0 && cursor.word()? != 0 {
                entries.push(at);
            }
            at = at.checked_add(4 + u64::from(length))?;
        }
        Some(entries)
    }

    /// A function, from its frame description entry; `None` for returns from signal handlers, too: their entries begin a
    /// byte before the first instruction, so that unwinders find them by the return address less one, and decoding from
    /// there would read nonsense.
    fn frame_description(&self, bytes: &[u8], address: u64) -> Option<Range> {
        let mut cursor = Cursor { bytes, at: 0 };
        let length = cursor.word()?;
        if length == 0 || length == u32::MAX {
            return None;
        }
        let common = (address + 4).checked_sub(cursor.word()?.into())?;
        let mut entry = Cursor {
            bytes: self.bytes_at(common, self.file_end(common)?)?,
            at: 8,
        };
        let version = entry.byte()?;
        let augmentation = entry.text()?;
        entry.leb128()?;
        entry.leb128()?;
        if version == 1 {
            entry.byte()?;
        } else {
            entry.leb128()?;
        }
        let (mut pointer, mut language) = (0u8, None);
        if augmentation.first() == Some(&b'z') {
            entry.leb128()?;
            for letter in augmentation.iter().skip(1) {
                match letter {
                    b'R' => pointer = entry.byte()?,
                    b'L' => language = Some(entry.byte()?),
                    b'P' => {
                        let encoding = entry.byte()?;
                        entry.pointer(encoding & 0x0f, 0)?;
                    }
                    _ => {}
                }
            }
        }
        let start = cursor.pointer(pointer, address + cursor.at as u64)?;
        let length = cursor.pointer(pointer & 0x0f, 0)?;
        let mut landing_pads = false;
        if augmentation.first() == Some(&b'z') {
            cursor.leb128()?;
            if let Some(encoding) = language {
                landing_pads = cursor.pointer(encoding & 0x1f, address + cursor.at as u64)? != 0;
            }
        }
        (!augmentation.contains(&b'S')).then(|| Range {
            start,
            end: start.saturating_add(length),
            landing_pads,
        })
    }

    /// All `syscall` instructions.
    #[must_use]
    pub fn sites(&self) -> Vec<Site> {
        let mut sites = Vec::new();
        let mut found = BTreeSet::new();
        let mut information = InstructionInfoFactory::new();
        for function in &self.functions {
            let bytes = self
                .bytes_at(function.start, function.end)
                .unwrap_or_default();
            if !bytes.windows(2).any(|pair| pair == SYSCALL) {
                continue;
            }
            let instructions = self.decode(*function);
            let targets: BTreeSet<u64> = instructions.iter().filter_map(target).collect();
            for (index, instruction) in instructions.iter().enumerate() {
                if instruction.code() == Opcode::Syscall && found.insert(instruction.ip()) {
                    let before = instructions.get(..index).unwrap_or_default();
                    sites.push(Site {
                        address: instruction.ip(),
                        number: number(before, instruction.ip(), &targets, &mut information),
                        function: *function,
                    });
                }
            }
        }
        sites.sort_by_key(|site| site.address);
        sites
    }

    /// Every address that a direct jump or call leads to, and every start of a function. What lies between functions
    /// is decoded too, as well as it goes: an address too many does no harm.
    #[must_use]
    pub fn targets(&self) -> BTreeSet<u64> {
        let mut targets: Vec<u64> = self.functions.iter().map(|range| range.start).collect();
        let mut functions = self.functions.iter().peekable();
        let executable = |segment: &&Segment| segment.is_executable();
        let mut segments: Vec<&Segment> = self.elf.segments.iter().filter(executable).collect();
        segments.sort_by_key(|segment| segment.address);
        for segment in segments {
            let end = segment.address + segment.file_length;
            let mut done = segment.address;
            while done < end {
                // A function that begins here or has begun before; else what lies before the next one.
                while functions.next_if(|range| range.end <= done).is_some() {}
                let stop = match functions.peek() {
                    Some(range) if range.start <= done => range.end.min(end),
                    Some(range) => range.start.min(end),
                    None => end,
                };
                let range = Range {
                    start: done,
                    end: stop,
                    landing_pads: false,
                };
                targets.extend(self.decode(range).iter().filter_map(target));
                done = stop;
            }
        }
        targets.into_iter().collect()
    }
}

/// Where a direct jump or call leads.
pub(crate) fn target(instruction: &Instruction) -> Option<u64> {
    matches!(
        instruction.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    )
    .then(|| instruction.near_branch_target())
}

/// The value of EAX in front of a `syscall`, looked for backwards as far as control can come from nowhere else.
fn number(
    before: &[Instruction],
    site: u64,
    targets: &BTreeSet<u64>,
    information: &mut InstructionInfoFactory,
) -> Option<u32> {
    if targets.contains(&site) {
        return None;
    }
    for instruction in before.iter().rev() {
        match instruction.flow_control() {
            FlowControl::Next | FlowControl::ConditionalBranch => {}
            _ => return None,
        }
        let sets = information
            .info(instruction)
            .used_registers()
            .iter()
            .any(|used| {
                used.register().full_register() == Register::RAX
                    && !matches!(
                        used.access(),
                        OpAccess::Read
                            | OpAccess::CondRead
                            | OpAccess::None
                            | OpAccess::NoMemAccess
                    )
            });
        if sets {
            return match instruction.code() {
                Opcode::Mov_r32_imm32 => Some(instruction.immediate32()),
                Opcode::Mov_rm32_imm32 if instruction.op0_register() == Register::EAX => {
                    Some(instruction.immediate32())
                }
                Opcode::Mov_rm64_imm32 | Opcode::Mov_r64_imm64
                    if instruction.op0_register() == Register::RAX =>
                {
                    u32::try_from(instruction.immediate(1)).ok()
                }
                Opcode::Xor_r32_rm32 | Opcode::Xor_rm32_r32
                    if instruction.op0_register() == instruction.op1_register() =>
                {
                    Some(0)
                }
                _ => None,
            };
        }
        if targets.contains(&instruction.ip()) {
            return None;
        }
    }
    None
}

//! What Kiln wants to know of an ELF file of a program or library.
//!
//! Foreign bytes come in, checked facts go out. Only x86-64 files for Linux pass.

use object::{
    LittleEndian, SymbolIndex,
    elf::{self, FileHeader32, FileHeader64},
    read::elf::{Dyn, FileHeader, ProgramHeader, SectionHeader, Sym},
};

/// Most entries of a table that are looked at.
const MAX_ENTRIES: usize = 4096;

/// Kind of an ELF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElfKind {
    /// Runs at fixed addresses.
    Fixed,
    /// Runs at any address: a position-independent program, or a library.
    Relocatable,
}

/// A segment to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins in the file.
    pub offset: u64,
    /// Bytes in the file.
    pub file_length: u64,
    /// Address, relative to the load base.
    pub address: u64,
    /// Bytes in memory.
    pub memory_length: u64,
    /// `PF_*` bits.
    pub flags: u32,
}

impl Segment {
    /// Holds instructions.
    #[must_use]
    pub fn is_executable(&self) -> bool {
        self.flags & elf::PF_X.0 != 0
    }

    /// Can be written to.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.flags & elf::PF_W.0 != 0
    }
}

/// A function with a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Address, relative to the load base.
    pub address: u64,
    /// Length in bytes; 0 if unknown.
    pub length: u64,
}

/// Facts about an ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// Kind.
    pub kind: ElfKind,
    /// Address of the first instruction, relative to the load base; 0 for most libraries.
    pub entry: u64,
    /// The loader it asks for.
    pub interpreter: Option<String>,
    /// Libraries it needs.
    pub needed: Vec<String>,
    /// Where its libraries are looked for, before everything else, also for what its libraries need.
    pub rpath: Option<String>,
    /// Where its own libraries are looked for.
    pub runpath: Option<String>,
    /// Its name as a library.
    pub soname: Option<String>,
    /// Segments to load, as in the file.
    pub segments: Vec<Segment>,
    /// Names of functions and data it takes from others.
    pub imports: Vec<String>,
    /// Functions it has, from whichever symbol tables it has.
    pub functions: Vec<Function>,
    /// Its text must be changed while it is loaded.
    pub text_relocations: bool,
    /// Asks for an executable stack.
    pub executable_stack: bool,
    /// Offset and length in the file of Go's table of functions (`.gopclntab`), which a stripped program has as well.
    pub go_functions: Option<(u64, u64)>,
    /// Address and length of the section `.eh_frame`, if there is a section table.
    pub unwind_section: Option<(u64, u64)>,
    /// Address of the table that leads to unwind information (`PT_GNU_EH_FRAME`).
    pub unwind_header: Option<u64>,
}

/// Reads an ELF file.
///
/// # Errors
///
/// Says what is wrong with the file, as the second half of a sentence that begins with its name.
pub fn parse(bytes: &[u8]) -> Result<Elf, String> {
    let Some(ident) = bytes.get(..20) else {
        return Err("is too short for an ELF file".into());
    };
    if !ident.starts_with(b"\x7fELF") {
        return Err("is not an ELF file".into());
    }
    let machine = u16::from_le_bytes([ident[18], ident[19]]);
    match (ident[4], ident[5]) {
        (2, 1) => {}
        (1, 1) => {
            let known = FileHeader32::<LittleEndian>::parse(bytes).is_ok();
            let name = if known && machine == elf::EM_X86_64.0 {
                "x32"
            } else {
                machine_name(machine)
            };
            return Err(format!(
                "is a 32-bit program ({name}), and Kiln runs 64-bit x86-64 programs"
            ));
        }
        _ => return Err("is built for a big-endian machine, and Kiln runs x86-64 programs".into()),
    }
    if machine != elf::EM_X86_64.0 {
        return Err(format!(
            "is built for {}, and Kiln runs x86-64 programs",
            machine_name(machine)
        ));
    }
    let wrong = |error: object::Error| format!("is a damaged ELF file: {error}");
    let header = FileHeader64::<LittleEndian>::parse(bytes).map_err(wrong)?;
    let endian = header.endian().map_err(wrong)?;
    if !matches!(
        header.e_ident().os_abi,
        elf::ELFOSABI_SYSV | elf::ELFOSABI_GNU
    ) {
        return Err("is built for another system than Linux".into());
    }
    let kind = match header.e_type(endian) {
        elf::ET_EXEC => ElfKind::Fixed,
        elf::ET_DYN => ElfKind::Relocatable,
        elf::ET_REL => return Err("is an object file that has not been linked".into()),
        elf::ET_CORE => return Err("is a core dump".into()),
        _ => return Err("is an ELF file of an unknown kind".into()),
    };
    let mut elf = Elf {
        kind,
        entry: header.e_entry(endian),
        interpreter: None,
        needed: Vec::new(),
        rpath: None,
        runpath: None,
        soname: None,
        segments: Vec::new(),
        imports: Vec::new(),
        functions: Vec::new(),
        text_relocations: false,
        executable_stack: false,
        unwind_header: None,
        unwind_section: None,
        go_functions: None,
    };
    let mut dynamic: &[elf::Dyn64<LittleEndian>] = &[];
    let headers = header.program_headers(endian, bytes).map_err(wrong)?;
    for segment in headers.iter().take(MAX_ENTRIES) {
        match segment.p_type(endian) {
            elf::PT_LOAD => {
                let (offset, file_length) = segment.file_range(endian);
                let end = offset.checked_add(file_length);
                if end.is_none_or(|end| end > bytes.len() as u64) {
                    return Err(format!(
                        "is cut off: a segment ends at byte {}, and the file has {}",
                        offset.saturating_add(file_length),
                        bytes.len()
                    ));
                }
                let (address, memory_length) = (segment.p_vaddr(endian), segment.p_memsz(endian));
                if memory_length < file_length || address.checked_add(memory_length).is_none() {
                    return Err("is a damaged ELF file: a segment has an impossible size".into());
                }
                elf.segments.push(Segment {
                    offset,
                    file_length,
                    address,
                    memory_length,
                    flags: segment.p_flags(endian).0,
                });
            }
            elf::PT_INTERP => {
                let name = segment
                    .interpreter(endian, bytes)
                    .map_err(wrong)?
                    .unwrap_or_default();
                elf.interpreter = Some(text(name)?);
            }
            elf::PT_DYNAMIC => {
                dynamic = segment
                    .dynamic(endian, bytes)
                    .map_err(wrong)?
                    .unwrap_or_default();
            }
            elf::PT_GNU_EH_FRAME => elf.unwind_header = Some(segment.p_vaddr(endian)),
            elf::PT_GNU_STACK => {
                elf.executable_stack = segment.p_flags(endian).0 & elf::PF_X.0 != 0;
            }
            _ => {}
        }
    }
    if elf.segments.is_empty() {
        return Err("has nothing to load".into());
    }
    let table = u64::from(header.e_shnum(endian)) * u64::from(header.e_shentsize(endian));
    if header
        .e_shoff(endian)
        .checked_add(table)
        .is_none_or(|end| end > bytes.len() as u64)
    {
        // It might still run, but somebody has lost a part of it.
        return Err(format!(
            "is cut off: its section table lies beyond its {} bytes",
            bytes.len()
        ));
    }
    elf.read_dynamic(bytes, dynamic)?;
    elf.read_symbols(bytes, header);
    Ok(elf)
}

fn text(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| {
        format!(
            "names `{}`, which is not UTF-8",
            String::from_utf8_lossy(bytes)
        )
    })
}

fn machine_name(machine: u16) -> &'static str {
    match elf::Machine(machine) {
        elf::EM_386 => "i386",
        elf::EM_AARCH64 => "AArch64",
        elf::EM_ARM => "ARM",
        elf::EM_RISCV => "RISC-V",
        elf::EM_PPC64 => "PowerPC",
        elf::EM_S390 => "S/390",
        elf::EM_X86_64 => "x86-64",
        elf::EM_LOONGARCH => "LoongArch",
        _ => "another machine",
    }
}

impl Elf {
    /// Is meant to be started: has an interpreter, or is static.
    #[must_use]
    pub fn is_program(&self) -> bool {
        self.interpreter.is_some()
            || self.kind == ElfKind::Fixed
            || (self.entry != 0 && self.soname.is_none())
    }

    /// File offset of an address.
    #[must_use]
    pub fn offset_of(&self, address: u64) -> Option<u64> {
        self.segments.iter().find_map(|segment| {
            let inside = address.checked_sub(segment.address)?;
            (inside < segment.file_length).then(|| segment.offset + inside)
        })
    }

    fn read_dynamic(
        &mut self,
        bytes: &[u8],
        dynamic: &[elf::Dyn64<LittleEndian>],
    ) -> Result<(), String> {
        let endian = LittleEndian;
        let entries = || {
            dynamic
                .iter()
                .map(|entry| (entry.d_tag(endian), entry.d_val(endian)))
                .take_while(|(tag, _)| *tag != elf::DT_NULL)
                .take(MAX_ENTRIES)
        };
        let find = |wanted| {
            entries()
                .find(|(tag, _)| *tag == wanted)
                .map(|(_, value)| value)
        };
        let strings = find(elf::DT_STRTAB)
            .and_then(|address| self.offset_of(address))
            .and_then(|offset| bytes.get(usize::try_from(offset).ok()?..))
            .unwrap_or_default();
        let limit = find(elf::DT_STRSZ).and_then(|size| usize::try_from(size).ok());
        let strings = limit
            .and_then(|limit| strings.get(..limit))
            .unwrap_or(strings);
        let string = |offset: u64| -> Result<String, String> {
            let start = usize::try_from(offset)
                .ok()
                .and_then(|offset| strings.get(offset..));
            let name = start.and_then(|start| start.split(|byte| *byte == 0).next());
            text(name.ok_or("is a damaged ELF file: a name lies outside the string table")?)
        };
        for (tag, value) in entries() {
            match tag {
                elf::DT_NEEDED => self.needed.push(string(value)?),
                elf::DT_RPATH => self.rpath = Some(string(value)?),
                elf::DT_RUNPATH => self.runpath = Some(string(value)?),
                elf::DT_SONAME => self.soname = Some(string(value)?),
                elf::DT_TEXTREL => self.text_relocations = true,
                elf::DT_FLAGS if value & elf::DF_TEXTREL.0 != 0 => {
                    self.text_relocations = true;
                }
                _ => {}
            }
        }
        if self.runpath.is_some() {
            // The loader ignores the older entry then (ld.so(8)).
            self.rpath = None;
        }
        Ok(())
    }

    /// Symbols are a help, not a need: damaged tables count as none.
    fn read_symbols(&mut self, bytes: &[u8], header: &FileHeader64<LittleEndian>) {
        let endian = LittleEndian;
        let Ok(sections) = header.sections(endian, bytes) else {
            return;
        };
        if let Some((_, section)) = sections.section_by_name(endian, b".eh_frame") {
            self.unwind_section = Some((section.sh_addr(endian), section.sh_size(endian)));
        }
        self.go_functions = [&b".gopclntab"[..], b".data.rel.ro.gopclntab"]
            .iter()
            .find_map(|name| sections.section_by_name(endian, name))
            .map(|(_, section)| (section.sh_offset(endian), section.sh_size(endian)));
        for kind in [elf::SHT_DYNSYM, elf::SHT_SYMTAB] {
            let Ok(symbols) = sections.symbols(endian, bytes, kind) else {
                continue;
            };
            for index in 1..symbols.len() {
                let Ok(symbol) = symbols.symbol(SymbolIndex(index)) else {
                    break;
                };
                let Ok(name) = symbols.symbol_name(endian, symbol) else {
                    continue;
                };
                let name = String::from_utf8_lossy(name).into_owned();
                if symbol.is_undefined(endian) {
                    if kind == elf::SHT_DYNSYM && !name.is_empty() {
                        self.imports.push(name);
                    }
                } else if matches!(symbol.st_type(), elf::STT_FUNC | elf::STT_GNU_IFUNC) {
                    self.functions.push(Function {
                        name,
                        address: symbol.st_value(endian),
                        length: symbol.st_size(endian),
                    });
                }
            }
        }
        self.imports.sort();
        self.imports.dedup();
        self.functions
            .sort_by(|a, b| (a.address, &a.name).cmp(&(b.address, &b.name)));
        self.functions.dedup();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Vec<u8> {
        std::fs::read(std::env::current_exe().unwrap()).unwrap()
    }

    #[test]
    fn a_dynamic_program_says_what_it_needs() {
        let elf = parse(&own()).unwrap();
        assert_eq!(
            elf.interpreter.as_deref(),
            Some("/lib64/ld-linux-x86-64.so.2")
        );
        assert!(elf.needed.iter().any(|name| name == "libc.so.6"));
        assert!(elf.imports.iter().any(|name| name == "write"));
        assert!(elf.is_program() && !elf.text_relocations);
    }

    #[test]
    fn wrong_files_are_named_for_what_they_are() {
        let mut bytes = own();
        assert_eq!(
            parse(b"#!/bin/sh\n 0123456789").unwrap_err(),
            "is not an ELF file"
        );
        assert!(parse(&bytes[..10]).unwrap_err().contains("too short"));
        for length in [bytes.len() / 100, bytes.len() / 4, bytes.len() - 1] {
            let cut = parse(&bytes[..length]).unwrap_err();
            assert!(cut.contains("is cut off"), "{cut}");
        }
        bytes[18] = 183;
        assert!(parse(&bytes).unwrap_err().contains("built for AArch64"));
        bytes[4] = 1;
        assert!(parse(&bytes).unwrap_err().contains("32-bit"));
    }

    #[test]
    fn damaged_headers_never_panic() {
        let mut good = own();
        good.truncate(1 << 16);
        let mut state = 7u64;
        for _ in 0..20_000 {
            let mut bytes = good[..4096].to_vec();
            for _ in 0..4 {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                let at = (state >> 33) as usize % 1024;
                bytes[at] = (state >> 25) as u8;
            }
            let _ = parse(&bytes);
        }
    }
}

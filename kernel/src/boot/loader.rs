//! Loads the program: its ELF file and interpreter into memory, arguments and environment onto its stack
//! (System V ABI for x86-64, `ld.so(8)`, `getauxval(3)`).

use alloc::{format, string::String, sync::Arc, vec::Vec};

use kiln_abi::{
    host::{PAGE_SIZE, Protection},
    manifest::Program,
};
use linux_raw_sys::{auxvec, elf};

use super::STACK_SIZE;
use crate::{
    Errno, Kernel,
    file::Sink,
    fs::{
        Inode, Kind,
        vfs::{Resolve, View},
    },
    memory::{AddressSpace, AreaFile, AreaFlags, Placement, page_round_up, user},
    task::Credentials,
};

/// Where position-independent programs go: this plus something random.
const PROGRAM_BASE: usize = 0x2000_0000_0000;
/// Highest end of mappings; something random below it is the top.
const MAP_TOP: usize = 0x4fff_ffff_0000;
/// Bits of randomness in pages.
const RANDOM_BITS: u32 = 28;
/// Most bytes of arguments and environment.
const MAX_STRINGS: usize = 2 << 20;

const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

/// A program in memory, ready to run.
pub struct Loaded {
    /// Its memory.
    pub memory: AddressSpace,
    /// First instruction.
    pub entry: u64,
    /// Stack pointer at the first instruction.
    pub stack: u64,
    /// Auxiliary vector as bytes.
    pub auxiliary: Vec<u8>,
}

struct Segment {
    kind: u32,
    flags: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

struct Headers {
    position_independent: bool,
    entry: u64,
    table_offset: u64,
    segments: Vec<Segment>,
    interpreter: Option<String>,
}

fn word<const LENGTH: usize>(bytes: &[u8], at: usize) -> Option<[u8; LENGTH]> {
    bytes.get(at..at.checked_add(LENGTH)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    word(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    word(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    word(bytes, at).map(u64::from_le_bytes)
}

/// Reads `length` bytes at a position of a file, or fewer at its end.
fn read(inode: &dyn Inode, position: u64, length: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = alloc::vec![0; length];
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match inode.read_at(position + done as u64, &mut Sink::kernel(rest))? {
            0 => break,
            count => done += count,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

/// Parses the headers of an ELF file.
fn parse(inode: &dyn Inode) -> Result<Headers, String> {
    let fail = |error: Errno| format!("its headers cannot be read: {error}");
    let header = read(inode, 0, ELF_HEADER).map_err(fail)?;
    if header.get(..4) != Some(b"\x7fELF") {
        return Err(if header.starts_with(b"#!") {
            "it is a script; name its interpreter as the program and the script as an argument"
                .into()
        } else {
            "it is not an ELF file".into()
        });
    }
    let truncated = || String::from("it is truncated");
    if header.get(4..6) != Some(&[2, 1]) {
        return Err("it is not a 64-bit little-endian ELF file".into());
    }
    let machine = u16_at(&header, 18).ok_or_else(truncated)?;
    if machine != 62 {
        return Err(format!(
            "it is for another machine (ELF machine {machine}); x86-64 is 62"
        ));
    }
    let kind = u16_at(&header, 16).ok_or_else(truncated)?;
    let position_independent = match kind {
        2 => false,
        3 => true,
        _ => return Err(format!("ELF type {kind} is not a program")),
    };
    let entry = u64_at(&header, 24).ok_or_else(truncated)?;
    let table_offset = u64_at(&header, 32).ok_or_else(truncated)?;
    let size = u16_at(&header, 54).ok_or_else(truncated)?;
    let count = usize::from(u16_at(&header, 56).ok_or_else(truncated)?);
    if usize::from(size) != PROGRAM_HEADER || count == 0 {
        return Err("it has no program headers".into());
    }
    let table = read(inode, table_offset, count * PROGRAM_HEADER).map_err(fail)?;
    if table.len() < count * PROGRAM_HEADER {
        return Err(truncated());
    }
    let mut segments = Vec::with_capacity(count);
    let mut interpreter = None;
    for header in table.chunks_exact(PROGRAM_HEADER) {
        let segment = (|| {
            Some(Segment {
                kind: u32_at(header, 0)?,
                flags: u32_at(header, 4)?,
                offset: u64_at(header, 8)?,
                address: u64_at(header, 16)?,
                file_size: u64_at(header, 32)?,
                memory_size: u64_at(header, 40)?,
            })
        })()
        .ok_or_else(truncated)?;
        if segment.kind == elf::PT_INTERP {
            let length = usize::try_from(segment.file_size)
                .ok()
                .filter(|&length| length <= 4096);
            let bytes = read(inode, segment.offset, length.ok_or_else(truncated)?).map_err(fail)?;
            let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
            interpreter = Some(
                String::from_utf8(text.to_vec())
                    .map_err(|_| String::from("the path of its interpreter is not UTF-8"))?,
            );
        }
        segments.push(segment);
    }
    Ok(Headers {
        position_independent,
        entry,
        table_offset,
        segments,
        interpreter,
    })
}

/// Where an ELF file was mapped.
struct Mapped {
    /// Added to its addresses.
    bias: u64,
    entry: u64,
    /// Address of its program headers.
    table: u64,
    /// End of its highest segment.
    end: u64,
}

fn map(
    memory: &mut AddressSpace,
    inode: &Arc<dyn Inode>,
    path: &Arc<str>,
    headers: &Headers,
    wish: usize,
) -> Result<Mapped, String> {
    const PAGE: u64 = PAGE_SIZE as u64;
    let loads = || {
        headers
            .segments
            .iter()
            .filter(|segment| segment.kind == elf::PT_LOAD)
    };
    let bad = || String::from("its segments make no sense");
    let (mut low, mut high) = (u64::MAX, 0);
    for segment in loads() {
        let end = segment
            .address
            .checked_add(segment.memory_size)
            .filter(|&end| end < 1 << 46)
            .ok_or_else(bad)?;
        segment
            .offset
            .checked_add(segment.file_size)
            .ok_or_else(bad)?;
        if segment.file_size > segment.memory_size
            || segment.address % PAGE != segment.offset % PAGE
        {
            return Err(bad());
        }
        if segment.flags & (elf::PF_W | elf::PF_X) == elf::PF_W | elf::PF_X {
            return Err("it has a segment that is both writable and executable, which Kiln does not allow; \
                        link it without -z execstack, -N or text relocations"
                .into());
        }
        low = low.min(segment.address & !(PAGE - 1));
        high = high.max(end);
    }
    let span = high.checked_sub(low).ok_or_else(bad)?;
    let span = page_round_up(span as usize).ok_or_else(bad)?;
    let fail = |error: Errno| match error {
        Errno::ENOMEM => {
            String::from("there is not enough memory for it; give the instance more (-m)")
        }
        Errno::EPERM | Errno::EEXIST => {
            format!("it wants addresses ({low:#x}) that programs do not get")
        }
        error => format!("it cannot be mapped: {error}"),
    };
    // All of it is reserved first, so that nothing else comes between its segments.
    let placement = if headers.position_independent {
        Placement::Anywhere(wish)
    } else {
        Placement::FixedIfFree(low as usize)
    };
    let start = memory
        .map_zero(placement, span, Protection::empty(), AreaFlags::empty())
        .map_err(fail)?;
    let bias = (start as u64).wrapping_sub(low);
    for segment in loads() {
        let mut protection = Protection::empty();
        for (flag, access) in [
            (elf::PF_R, Protection::READ),
            (elf::PF_W, Protection::WRITE),
            (elf::PF_X, Protection::EXECUTE),
        ] {
            if segment.flags & flag != 0 {
                protection |= access;
            }
        }
        let address = segment.address.wrapping_add(bias);
        let page = address & !(PAGE - 1);
        let file_end = address + segment.file_size;
        let end = address + segment.memory_size;
        let file_pages = page_round_up((file_end - page) as usize).ok_or_else(bad)?;
        if segment.file_size > 0 {
            let file = AreaFile {
                inode: Arc::clone(inode),
                path: Arc::clone(path),
                offset: segment.offset - (address - page),
            };
            let fixed = Placement::Fixed(page as usize);
            memory
                .map_file(fixed, file_pages, protection, AreaFlags::empty(), file)
                .map_err(fail)?;
        }
        let zero_from = if segment.file_size > 0 {
            page + file_pages as u64
        } else {
            page
        };
        // All of the rest of the last file page becomes zeros, also beyond the segment's end: the dynamic linker's first
        // allocations lie there.
        if segment.memory_size > segment.file_size
            && segment.file_size > 0
            && protection.contains(Protection::WRITE)
        {
            let rest = (zero_from - file_end) as usize;
            user::write_bytes(file_end, &alloc::vec![0; rest]).map_err(fail)?;
        }
        if end > zero_from {
            let length = page_round_up((end - zero_from) as usize).ok_or_else(bad)?;
            let fixed = Placement::Fixed(zero_from as usize);
            memory
                .map_zero(fixed, length, protection, AreaFlags::empty())
                .map_err(fail)?;
        }
    }
    let table = loads()
        .find(|segment| {
            segment.offset <= headers.table_offset
                && headers.table_offset < segment.offset + segment.file_size
        })
        .map_or(0, |segment| {
            segment.address.wrapping_add(bias) + (headers.table_offset - segment.offset)
        });
    Ok(Mapped {
        bias,
        entry: headers.entry.wrapping_add(bias),
        table,
        end: high.wrapping_add(bias),
    })
}

/// The text of an error number.
fn text(error: Errno) -> String {
    format!("{error}")
}

/// Opens a file that is to be run.
fn open(view: &View, path: &str) -> Result<Arc<dyn Inode>, String> {
    let walk = view
        .find(&view.root, path, Resolve::FOLLOW)
        .map_err(|error| match error {
            Errno::ENOENT => "there is no such file in the image".into(),
            error => text(error),
        })?;
    let metadata = walk.metadata().map_err(text)?;
    if metadata.kind != Kind::Regular {
        return Err("it is not a regular file".into());
    }
    if metadata.permissions & 0o111 == 0 {
        return Err(
            "it is not executable; set its mode (chmod +x) before building the image".into(),
        );
    }
    Ok(Arc::clone(walk.inode()))
}

/// Brings an ELF file into memory; if it may be anywhere, then at `wish`, unless that is 0.
fn load_file(
    view: &View,
    memory: &mut AddressSpace,
    path: &str,
    wish: usize,
) -> Result<(Headers, Mapped), String> {
    let inode = open(view, path)?;
    let headers = parse(&*inode)?;
    let mapped = map(memory, &inode, &Arc::from(path), &headers, wish)?;
    Ok((headers, mapped))
}

/// Something random.
struct Randomness {
    /// Numbers of pages: below the top of mappings, above the base of programs, between program and heap.
    pages: [usize; 3],
    /// For the program (`AT_RANDOM`), and to move its stack.
    bytes: [u8; 24],
}

impl Randomness {
    fn draw(kernel: &Kernel) -> Result<Randomness, Errno> {
        let (mut pages, mut bytes) = ([0; 24], [0; 24]);
        kernel.host.entropy(&mut pages)?;
        kernel.host.entropy(&mut bytes)?;
        let page =
            |at| u64_at(&pages, at).map_or(0, |page| (page & ((1 << RANDOM_BITS) - 1)) as usize);
        Ok(Randomness {
            pages: [page(0), page(8), page(16)],
            bytes,
        })
    }
}

/// Loads a program; `view` is what paths mean to the superuser.
///
/// # Errors
/// What is wrong with it, in words.
pub fn load(
    kernel: &Arc<Kernel>,
    view: &View,
    program: &Program,
    credentials: &Credentials,
) -> Result<Loaded, String> {
    let random = Randomness::draw(kernel).map_err(text)?;
    let [top, base, gap] = random.pages;
    let mut memory = AddressSpace::new(kernel.host, MAP_TOP - top * PAGE_SIZE);

    let base = PROGRAM_BASE + base * PAGE_SIZE;
    let (headers, mapped) = load_file(view, &mut memory, &program.path, base)?;
    let (entry, interpreter_base) = match &headers.interpreter {
        None => (mapped.entry, 0),
        Some(path) => {
            let (_, interpreter) = load_file(view, &mut memory, path, 0)
                .map_err(|reason| format!("its interpreter {path} cannot be used: {reason}"))?;
            (interpreter.entry, interpreter.bias)
        }
    };

    // The heap begins after the program's data, with a random gap.
    let heap = page_round_up(mapped.end as usize)
        .unwrap_or(usize::MAX)
        .saturating_add(gap % 8192 * PAGE_SIZE);
    memory.set_heap(heap);

    let access = Protection::READ | Protection::WRITE;
    // One page below the stack stays free, so that running over its end is a fault.
    let low = memory
        .map_zero(
            Placement::Anywhere(0),
            PAGE_SIZE + STACK_SIZE,
            Protection::empty(),
            AreaFlags::GUARD,
        )
        .map_err(text)?;
    memory
        .map_zero(
            Placement::Fixed(low + PAGE_SIZE),
            STACK_SIZE,
            access,
            AreaFlags::STACK,
        )
        .map_err(text)?;
    let stack_top = (low + STACK_SIZE + PAGE_SIZE) as u64;

    let vdso = super::vdso::map(kernel, &mut memory).map_err(text)?;
    let [uid, effective_uid, _] = credentials.uid;
    let [gid, effective_gid, _] = credentials.gid;
    let hardware = core::arch::x86_64::__cpuid(1).edx;
    // Frame, XSAVE image, alignment.
    let signal_stack = kernel.cpu.extended_size() + 440 + 8 + 256;
    let auxiliary = [
        (auxvec::AT_SYSINFO_EHDR, vdso),
        (auxvec::AT_PHDR, mapped.table),
        (auxvec::AT_PHENT, PROGRAM_HEADER as u64),
        (auxvec::AT_PHNUM, headers.segments.len() as u64),
        (auxvec::AT_PAGESZ, PAGE_SIZE as u64),
        (auxvec::AT_BASE, interpreter_base),
        (auxvec::AT_FLAGS, 0),
        (auxvec::AT_ENTRY, mapped.entry),
        (auxvec::AT_UID, u64::from(uid)),
        (auxvec::AT_EUID, u64::from(effective_uid)),
        (auxvec::AT_GID, u64::from(gid)),
        (auxvec::AT_EGID, u64::from(effective_gid)),
        (auxvec::AT_SECURE, 0),
        (auxvec::AT_CLKTCK, 100),
        (auxvec::AT_HWCAP, u64::from(hardware)),
        // HWCAP2_FSGSBASE.
        (auxvec::AT_HWCAP2, 2),
        (auxvec::AT_MINSIGSTKSZ, signal_stack as u64),
    ];
    let stack = build_stack(stack_top, &random.bytes, program, &auxiliary)?;
    user::write_bytes(stack.pointer, &stack.bytes).map_err(text)?;
    Ok(Loaded {
        memory,
        entry,
        stack: stack.pointer,
        auxiliary: stack.auxiliary,
    })
}

struct Stack {
    pointer: u64,
    bytes: Vec<u8>,
    auxiliary: Vec<u8>,
}

/// Lays out what a program finds on its stack: words (the number of arguments, addresses of arguments and environment,
/// auxiliary vector), then the strings that they point to.
fn build_stack(
    top: u64,
    random: &[u8; 24],
    program: &Program,
    auxiliary: &[(u32, u64)],
) -> Result<Stack, String> {
    const PLATFORM: &[u8] = b"x86_64\0";
    /// Entries of the auxiliary vector that are added here.
    const ADDED: usize = 4;
    let lists = [&program.arguments, &program.environment];
    let mut strings = PLATFORM.len() + 16;
    // How many arguments, a zero after each list, and the auxiliary vector.
    let mut words = 3 + 2 * (auxiliary.len() + ADDED);
    for text in lists.into_iter().flatten() {
        if text.bytes().any(|byte| byte == 0) {
            return Err(format!(
                "the argument or environment entry {text:?} contains a zero byte"
            ));
        }
        strings += text.len() + 1;
        words += 1;
    }
    if strings > MAX_STRINGS {
        return Err(format!(
            "its arguments and environment are longer than {MAX_STRINGS} bytes"
        ));
    }
    // Something random, so that the stack's address says nothing about its neighbours'.
    let shift = u64::from(random[16]) * 16;
    let strings_at = (top - shift - strings as u64) & !15;
    let pointer = (strings_at - words as u64 * 8) & !15;
    let strings_from = (strings_at - pointer) as usize;

    let mut bytes = Vec::with_capacity(strings_from + strings);
    let mut put = |word: u64| bytes.extend_from_slice(&word.to_le_bytes());
    put(program.arguments.len() as u64);
    let mut next = strings_at;
    for list in lists {
        for text in list {
            put(next);
            next += text.len() as u64 + 1;
        }
        put(0);
    }
    // The first string is the program's path.
    let added: [_; ADDED] = [
        (auxvec::AT_EXECFN, strings_at),
        (auxvec::AT_PLATFORM, next),
        (auxvec::AT_RANDOM, next + PLATFORM.len() as u64),
        (auxvec::AT_NULL, 0),
    ];
    for &(kind, value) in auxiliary.iter().chain(&added) {
        put(u64::from(kind));
        put(value);
    }
    let auxiliary = bytes[bytes.len() - (auxiliary.len() + ADDED) * 16..].to_vec();
    bytes.resize(strings_from, 0);
    for text in lists.into_iter().flatten() {
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(0);
    }
    bytes.extend_from_slice(PLATFORM);
    bytes.extend_from_slice(&random[..16]);
    Ok(Stack {
        pointer,
        bytes,
        auxiliary,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(stack: &Stack, address: u64) -> u64 {
        u64_at(&stack.bytes, (address - stack.pointer) as usize).unwrap()
    }

    fn string(stack: &Stack, address: u64) -> String {
        let rest = &stack.bytes[(address - stack.pointer) as usize..];
        let text = rest.split(|&byte| byte == 0).next().unwrap();
        String::from_utf8(text.to_vec()).unwrap()
    }

    #[test]
    fn the_stack_is_laid_out_as_the_abi_says() {
        for name in ["/p", "/program"] {
            let program = Program {
                path: name.into(),
                arguments: alloc::vec![name.into(), String::new(), "two".into()],
                environment: alloc::vec!["A=1".into()],
                ..Program::default()
            };
            let top = 0x7000_0000;
            let random: [u8; 24] = core::array::from_fn(|index| index as u8 + 1);
            let given = [(auxvec::AT_PAGESZ, 4096), (auxvec::AT_UID, 7)];
            let stack = build_stack(top, &random, &program, &given).unwrap();
            assert_eq!(stack.pointer % 16, 0);
            assert!(stack.pointer + stack.bytes.len() as u64 <= top - 17 * 16);
            assert!(stack.pointer + stack.bytes.len() as u64 > top - 18 * 16);

            let mut at = stack.pointer;
            let mut next = || {
                at += 8;
                word(&stack, at - 8)
            };
            assert_eq!(next(), 3);
            let first = next();
            assert_eq!(string(&stack, first), name);
            for expected in ["", "two"] {
                assert_eq!(string(&stack, next()), expected);
            }
            assert_eq!(next(), 0);
            assert_eq!(string(&stack, next()), "A=1");
            assert_eq!(next(), 0);
            let auxiliary: Vec<(u64, u64)> = (0..6).map(|_| (next(), next())).collect();
            assert_eq!(stack.auxiliary, &stack.bytes[7 * 8..(7 + 6 * 2) * 8]);
            let value = |kind: u32| {
                let found = auxiliary.iter().find(|entry| entry.0 == u64::from(kind));
                found.unwrap().1
            };
            assert_eq!(value(auxvec::AT_PAGESZ), 4096);
            assert_eq!(value(auxvec::AT_UID), 7);
            assert_eq!(value(auxvec::AT_EXECFN), first);
            assert_eq!(string(&stack, value(auxvec::AT_PLATFORM)), "x86_64");
            let given = (value(auxvec::AT_RANDOM) - stack.pointer) as usize;
            assert_eq!(stack.bytes[given..given + 16], random[..16]);
            assert_eq!(auxiliary.last(), Some(&(u64::from(auxvec::AT_NULL), 0)));
        }
    }

    #[test]
    fn arguments_that_no_program_can_get_are_refused() {
        let program = |argument: String| Program {
            arguments: alloc::vec!["/p".into(), argument],
            ..Program::default()
        };
        let build = |program| build_stack(1 << 30, &[0; 24], &program, &[]).map(drop);
        assert!(build(program("a\0b".into())).unwrap_err().contains("zero"));
        assert!(
            build(program("a".repeat(MAX_STRINGS)))
                .unwrap_err()
                .contains("longer")
        );
        assert!(build(program("a".repeat(MAX_STRINGS - 100))).is_ok());
    }
}

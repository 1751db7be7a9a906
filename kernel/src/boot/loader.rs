//! Loads the program: its ELF file and interpreter into memory, arguments and environment onto its stack
//! (System V ABI for x86-64, `ld.so(8)`, `getauxval(3)`).

use alloc::{
    format,
    string::{String, ToString},
    sync::Arc,
    vec::Vec,
};

use kiln_abi::host::{PAGE_SIZE, Protection};
use linux_raw_sys::{auxvec, elf};

use super::STACK_SIZE;
use crate::{
    Errno, Kernel,
    file::Sink,
    fs::{Inode, Kind},
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

/// A program that cannot be started, and why.
#[derive(Debug)]
pub struct LoadError {
    /// The file concerned.
    pub path: String,
    /// What is wrong with it.
    pub reason: String,
}

impl core::fmt::Display for LoadError {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(formatter, "cannot start {}: {}", self.path, self.reason)
    }
}

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
    let low = loads()
        .map(|segment| segment.address & !(PAGE - 1))
        .min()
        .ok_or_else(bad)?;
    let mut high = 0u64;
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
        high = high.max(end);
    }
    let span = page_round_up((high - low) as usize).ok_or_else(bad)?;
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

fn random_pages(kernel: &Kernel) -> Result<usize, Errno> {
    let mut bytes = [0; 8];
    kernel.host.entropy(&mut bytes)?;
    Ok((u64::from_le_bytes(bytes) & ((1 << RANDOM_BITS) - 1)) as usize)
}

/// Loads a program.
///
/// # Errors
/// What is wrong with it, in words.
pub fn load(
    kernel: &Arc<Kernel>,
    path: &str,
    arguments: &[String],
    environment: &[String],
    credentials: &Credentials,
) -> Result<Loaded, LoadError> {
    let at = |path: &str| {
        let path = path.to_string();
        move |reason: String| LoadError { path, reason }
    };
    let open = |path: &str| -> Result<Arc<dyn Inode>, LoadError> {
        let fail = at(path);
        let inode = super::find_file(kernel, path).map_err(|error| {
            fail(match error {
                Errno::ENOENT => "there is no such file in the image".into(),
                error => format!("{error}"),
            })
        })?;
        match inode.metadata() {
            Ok(metadata) if metadata.kind != Kind::Regular => {
                Err(at(path)("it is not a regular file".into()))
            }
            Ok(metadata) if metadata.permissions & 0o111 == 0 => Err(at(path)(
                "it is not executable; set its mode (chmod +x) before building the image".into(),
            )),
            Ok(_) => Ok(inode),
            Err(error) => Err(at(path)(format!("{error}"))),
        }
    };
    let system = |error: Errno| LoadError {
        path: path.to_string(),
        reason: format!("{error}"),
    };

    let top = MAP_TOP - random_pages(kernel).map_err(system)? * PAGE_SIZE;
    let mut memory = AddressSpace::new(kernel.host, top);

    let inode = open(path)?;
    let headers = parse(&*inode).map_err(at(path))?;
    let base = PROGRAM_BASE + random_pages(kernel).map_err(system)? * PAGE_SIZE;
    let program = map(&mut memory, &inode, &Arc::from(path), &headers, base).map_err(at(path))?;
    let (entry, interpreter_base) = match &headers.interpreter {
        None => (program.entry, 0),
        Some(interpreter) => {
            let inode = open(interpreter).map_err(|error| LoadError {
                path: path.to_string(),
                reason: format!(
                    "its interpreter {} cannot be used: {}",
                    error.path, error.reason
                ),
            })?;
            let headers = parse(&*inode).map_err(at(interpreter))?;
            let mapped = map(
                &mut memory,
                &inode,
                &Arc::from(interpreter.as_str()),
                &headers,
                0,
            )
            .map_err(at(interpreter))?;
            (mapped.entry, mapped.bias)
        }
    };

    // The heap begins after the program's data, with a random gap.
    let gap = random_pages(kernel).map_err(system)? % 8192 * PAGE_SIZE;
    let heap = page_round_up(program.end as usize)
        .unwrap_or(usize::MAX)
        .saturating_add(gap);
    memory.set_heap(heap);

    let access = Protection::READ | Protection::WRITE;
    // One page below the stack stays without access, so that running over its end is a fault.
    let low = memory
        .map_zero(
            Placement::Anywhere(0),
            STACK_SIZE + PAGE_SIZE,
            access,
            AreaFlags::STACK,
        )
        .map_err(system)?;
    memory
        .protect(low, PAGE_SIZE, Protection::empty())
        .map_err(system)?;
    let stack_top = (low + STACK_SIZE + PAGE_SIZE) as u64;

    let vdso = super::vdso::map(kernel, &mut memory).map_err(system)?;

    let mut random = [0u8; 24];
    kernel.host.entropy(&mut random).map_err(system)?;
    let mut auxiliary = Vec::new();
    let mut add = |kind: u32, value: u64| {
        auxiliary.push(u64::from(kind));
        auxiliary.push(value);
    };
    add(auxvec::AT_SYSINFO_EHDR, vdso);
    add(auxvec::AT_PHDR, program.table);
    add(auxvec::AT_PHENT, PROGRAM_HEADER as u64);
    add(auxvec::AT_PHNUM, headers.segments.len() as u64);
    add(auxvec::AT_PAGESZ, PAGE_SIZE as u64);
    add(auxvec::AT_BASE, interpreter_base);
    add(auxvec::AT_FLAGS, 0);
    add(auxvec::AT_ENTRY, program.entry);
    add(auxvec::AT_UID, u64::from(credentials.uid[0]));
    add(auxvec::AT_EUID, u64::from(credentials.uid[1]));
    add(auxvec::AT_GID, u64::from(credentials.gid[0]));
    add(auxvec::AT_EGID, u64::from(credentials.gid[1]));
    add(auxvec::AT_SECURE, 0);
    add(auxvec::AT_CLKTCK, 100);
    add(
        auxvec::AT_HWCAP,
        u64::from(core::arch::x86_64::__cpuid(1).edx),
    );
    // HWCAP2_FSGSBASE.
    add(auxvec::AT_HWCAP2, 2);
    // Frame, XSAVE image, alignment.
    add(
        linux_raw_sys::auxvec::AT_MINSIGSTKSZ,
        (kernel.cpu.extended_size() + 440 + 8 + 256) as u64,
    );
    let built = build_stack(stack_top, &random, path, arguments, environment, auxiliary)
        .map_err(at(path))?;
    user::write_bytes(built.pointer, &built.bytes).map_err(system)?;
    Ok(Loaded {
        memory,
        entry,
        stack: built.pointer,
        auxiliary: built.auxiliary,
    })
}

struct Stack {
    pointer: u64,
    bytes: Vec<u8>,
    auxiliary: Vec<u8>,
}

/// Lays out what a program finds on its stack.
fn build_stack(
    top: u64,
    random: &[u8; 24],
    path: &str,
    arguments: &[String],
    environment: &[String],
    mut auxiliary: Vec<u64>,
) -> Result<Stack, String> {
    // Strings lie at the top; their addresses go into the vectors below.
    let mut strings = Vec::new();
    let mut offsets = Vec::new();
    let all = [path]
        .into_iter()
        .chain(arguments.iter().chain(environment).map(String::as_str));
    for text in all {
        if text.as_bytes().contains(&0) {
            return Err(format!(
                "the argument or environment entry {text:?} contains a zero byte"
            ));
        }
        offsets.push(strings.len() as u64);
        strings.extend_from_slice(text.as_bytes());
        strings.push(0);
    }
    let platform = strings.len() as u64;
    strings.extend_from_slice(b"x86_64\0");
    let random_at = strings.len() as u64;
    strings.extend_from_slice(&random[..16]);
    if strings.len() > MAX_STRINGS {
        return Err(format!(
            "its arguments and environment are longer than {MAX_STRINGS} bytes"
        ));
    }
    // Something random, so that the stack's address says nothing about its neighbours'.
    let shift = u64::from(random[16]) * 16;
    let strings_at = (top - shift - strings.len() as u64) & !15;
    auxiliary.extend([u64::from(auxvec::AT_PLATFORM), strings_at + platform]);
    auxiliary.extend([u64::from(auxvec::AT_RANDOM), strings_at + random_at]);
    auxiliary.extend([u64::from(auxvec::AT_EXECFN), strings_at]);
    auxiliary.extend([u64::from(auxvec::AT_NULL), 0]);

    let mut words = alloc::vec![arguments.len() as u64];
    let addresses: Vec<u64> = offsets
        .iter()
        .skip(1)
        .map(|offset| strings_at + offset)
        .collect();
    let (first, second) = addresses.split_at(arguments.len());
    words.extend_from_slice(first);
    words.push(0);
    words.extend_from_slice(second);
    words.push(0);
    words.extend_from_slice(&auxiliary);

    let pointer = (strings_at - words.len() as u64 * 8) & !15;
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.resize((strings_at - pointer) as usize, 0);
    bytes.extend_from_slice(&strings);
    let auxiliary = auxiliary
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    Ok(Stack {
        pointer,
        bytes,
        auxiliary,
    })
}

//! Names for addresses: symbols of ELF files, for the messages about crashes.

#![allow(unsafe_code)]

use alloc::{borrow::Cow, string::String};

use elf::{ElfBytes, endian::LittleEndian};
use kiln_abi::host::MemoryRange;

use crate::{
    Kernel,
    file::Sink,
    fs::{
        Inode, MapSource,
        vfs::{Resolve, View},
    },
};

/// Largest program file that is read for its symbols.
const LARGEST: u64 = 64 << 20;

/// The symbol that covers a virtual address of an ELF file, and the distance from its start.
fn find<'a>(
    bytes: &'a [u8],
    address: impl FnOnce(&ElfBytes<'a, LittleEndian>) -> Option<u64>,
) -> Option<(&'a str, u64)> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(bytes).ok()?;
    let address = address(&file)?;
    let mut best: Option<(&str, u64)> = None;
    for table in [file.symbol_table(), file.dynamic_symbol_table()] {
        let Ok(Some((symbols, strings))) = table else {
            continue;
        };
        for symbol in symbols.iter() {
            // Functions only (STT_FUNC).
            if symbol.st_info & 0xf != 2 || symbol.st_value == 0 || symbol.st_value > address {
                continue;
            }
            let distance = address - symbol.st_value;
            let covers = distance < symbol.st_size.max(1);
            if covers
                && best.is_none_or(|(_, nearest)| distance < nearest)
                && let Ok(name) = strings.get(symbol.st_name as usize)
            {
                best = Some((name, distance));
            }
        }
    }
    best
}

/// The kernel's own function at an offset from its base, and the distance from its start. The names are in a table at the
/// end of the kernel's file, which `guest/build.rs` writes and describes.
#[must_use]
pub fn kernel_symbol(file: MemoryRange, offset: u64) -> Option<(&'static str, u64)> {
    if file.length == 0 {
        return None;
    }
    // SAFETY: the shim maps the kernel's file read-only for as long as the kernel runs.
    let bytes: &'static [u8] =
        unsafe { core::slice::from_raw_parts(file.start as *const u8, file.length) };
    function(bytes, u32::try_from(offset).ok()?)
}

/// The function that an offset in the kernel's own file lies in, and the distance from its start. `file` is the whole file, with
/// the table at its end that `guest/build.rs` writes.
#[must_use]
pub fn function(file: &[u8], offset: u32) -> Option<(&str, u64)> {
    let (rest, magic) = file.split_at_checked(file.len().checked_sub(8)?)?;
    if magic != b"KilnSyms" {
        return None;
    }
    let word =
        |bytes: &[u8], at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let (rest, lengths) = rest.split_at_checked(rest.len().checked_sub(8)?)?;
    let (count, length) = (word(lengths, 0)? as usize, word(lengths, 4)? as usize);
    let (rest, names) = rest.split_at_checked(rest.len().checked_sub(length)?)?;
    let pairs = rest.get(rest.len().checked_sub(count.checked_mul(8)?)?..)?;
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        if word(pairs, middle * 8)? <= offset {
            low = middle + 1
        } else {
            high = middle
        }
    }
    let pair = low.checked_sub(1)? * 8;
    let name = names
        .get(word(pairs, pair + 4)? as usize..)?
        .split(|&byte| byte == 0)
        .next()?;
    Some((
        core::str::from_utf8(name).ok()?,
        u64::from(offset - word(pairs, pair)?),
    ))
}

/// The virtual address that an offset in an ELF file is loaded to, before the file as a whole is moved.
#[must_use]
pub fn address(file: &ElfBytes<'_, LittleEndian>, offset: u64) -> Option<u64> {
    /// A segment that is loaded.
    const PT_LOAD: u32 = 1;
    let segment = file.segments()?.iter().find(|segment| {
        segment.p_type == PT_LOAD
            && offset >= segment.p_offset
            && offset - segment.p_offset < segment.p_filesz
    })?;
    segment.p_vaddr.checked_add(offset - segment.p_offset)
}

/// The symbol at an offset in an ELF file, and the distance from its start.
#[must_use]
pub fn lookup(bytes: &[u8], offset: u64) -> Option<(String, u64)> {
    let (name, distance) = find(bytes, |file| address(file, offset))?;
    Some((
        alloc::format!("{:#}", rustc_demangle::demangle(name)),
        distance,
    ))
}

/// The bytes of a file in the program's file tree, for what has to be known about a crash. Those of the image are not copied.
#[must_use]
pub fn contents(kernel: &Kernel, path: &str) -> Option<Cow<'static, [u8]>> {
    let view = View::superuser(kernel.root.get()?);
    let walk = view.find(&view.root, path, Resolve::FOLLOW).ok()?;
    let inode: &dyn Inode = &**walk.inode();
    let size = inode.metadata().ok()?.size;
    if size > LARGEST {
        return None;
    }
    if let Ok(Some((MapSource::Root(start), available))) = inode.map_source(0)
        && available >= size
    {
        let start = usize::try_from(start).ok()?;
        return kernel
            .root_image
            .bytes
            .get(start..start.checked_add(usize::try_from(size).ok()?)?)
            .map(Cow::Borrowed);
    }
    let mut bytes = alloc::vec![0; size as usize];
    let count = inode.read_at(0, &mut Sink::kernel(&mut bytes)).ok()?;
    bytes.truncate(count);
    Some(Cow::Owned(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn table() -> Vec<u8> {
        let mut bytes = b"anything before".to_vec();
        for word in [16u32, 0, 64, 5] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(b"zero\0a::b\0");
        bytes.extend_from_slice(&2u32.to_le_bytes());
        bytes.extend_from_slice(&10u32.to_le_bytes());
        bytes.extend_from_slice(b"KilnSyms");
        bytes
    }

    #[test]
    fn finds_the_function_around_an_offset() {
        let table = table();
        assert_eq!(function(&table, 15), None);
        assert_eq!(function(&table, 16), Some(("zero", 0)));
        assert_eq!(function(&table, 63), Some(("zero", 47)));
        assert_eq!(function(&table, 70), Some(("a::b", 6)));
    }

    #[test]
    fn a_damaged_table_names_nothing() {
        let table = table();
        assert_eq!(function(b"", 1), None);
        assert_eq!(function(&table[..table.len() - 1], 20), None);
        let mut long = table.clone();
        let at = long.len() - 16;
        long[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(function(&long, 20), None);
    }
}

//! Names for addresses: symbols of ELF files, for the messages about crashes.

#![allow(unsafe_code)]

use alloc::{string::String, vec::Vec};

use elf::{ElfBytes, endian::LittleEndian};
use kiln_abi::host::MemoryRange;
use rustc_demangle::Demangle;

use crate::{
    Kernel,
    file::Sink,
    fs::{Inode, MapSource},
};

/// Largest program file that is read for its symbols.
const LARGEST: u64 = 64 << 20;

/// The symbol that covers a virtual address of an ELF file, and the distance from its start.
fn find<'a>(bytes: &'a [u8], address: impl FnOnce(&ElfBytes<'a, LittleEndian>) -> Option<u64>) -> Option<(&'a str, u64)> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(bytes).ok()?;
    let address = address(&file)?;
    let mut best: Option<(&str, u64)> = None;
    for table in [file.symbol_table(), file.dynamic_symbol_table()] {
        let Ok(Some((symbols, strings))) = table else { continue };
        for symbol in symbols.iter() {
            // Functions only (STT_FUNC).
            if symbol.st_info & 0xf != 2 || symbol.st_value == 0 || symbol.st_value > address {
                continue;
            }
            let distance = address - symbol.st_value;
            let covers = distance < symbol.st_size.max(1);
            if covers && best.is_none_or(|(_, nearest)| distance < nearest)
                && let Ok(name) = strings.get(symbol.st_name as usize)
            {
                best = Some((name, distance));
            }
        }
    }
    best
}

/// The kernel's own symbol at an offset from its base.
#[must_use]
pub fn kernel_symbol(file: MemoryRange, offset: u64) -> Option<(Demangle<'static>, u64)> {
    if file.length == 0 {
        return None;
    }
    // SAFETY: the shim maps the kernel's file read-only for as long as the kernel runs.
    let bytes: &'static [u8] = unsafe { core::slice::from_raw_parts(file.start as *const u8, file.length) };
    let (name, distance) = find(bytes, |_| Some(offset))?;
    Some((rustc_demangle::demangle(name), distance))
}

/// The symbol of a file in the program's file tree, at an offset in the file.
#[must_use]
pub fn lookup(kernel: &Kernel, path: &str, offset: u64) -> Option<(String, u64)> {
    let inode = super::find_file(kernel, path).ok()?;
    let bytes = contents(kernel, &*inode)?;
    let (name, distance) = find(&bytes, |file| {
        let segments = file.segments()?;
        segments
            .iter()
            .find(|segment| {
                segment.p_type == 1 && offset >= segment.p_offset && offset - segment.p_offset < segment.p_filesz
            })
            .map(|segment| segment.p_vaddr + (offset - segment.p_offset))
    })?;
    Some((alloc::format!("{:#}", rustc_demangle::demangle(name)), distance))
}

fn contents(kernel: &Kernel, inode: &dyn Inode) -> Option<Vec<u8>> {
    let size = inode.metadata().ok()?.size;
    if size > LARGEST {
        return None;
    }
    if let Ok(Some((MapSource::Root(start), available))) = inode.map_source(0)
        && available >= size
    {
        let start = usize::try_from(start).ok()?;
        return kernel.root_image.bytes.get(start..start + size as usize).map(<[u8]>::to_vec);
    }
    let mut bytes = alloc::vec![0; size as usize];
    let count = inode.read_at(0, &mut Sink::kernel(&mut bytes)).ok()?;
    bytes.truncate(count);
    Some(bytes)
}

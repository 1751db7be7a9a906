//! What a PVH boot loader hands over: `struct hvm_start_info` of Xen's public header `arch-x86/hvm/start_info.h`.

use crate::physical::Physical;

const MAGIC: u32 = 0x336e_c578;
/// Module and memory map entries that are looked at; more are a boot loader's error.
const MAX_ENTRIES: u32 = 128;
/// Longest command line looked at.
const MAX_COMMAND_LINE: u64 = 4096;

/// The boot loader's information, checked.
#[derive(Clone, Copy, Debug)]
pub struct StartInfo {
    /// Where the structure itself lies, to be kept while it is read.
    pub command_line: &'static [u8],
    /// The first module: physical address and length. Zero length if there is none.
    pub module: (u64, u64),
    memory_map: u64,
    memory_map_entries: u32,
}

/// Why the boot loader's information cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartInfoError {
    /// No such structure where the boot loader points.
    Missing,
    /// The version of the structure has no memory map.
    NoMemoryMap,
}

impl StartInfo {
    /// Reads the structure at physical address `address`.
    ///
    /// # Errors
    ///
    /// When it is not there or has no memory map.
    pub fn read(physical: Physical, address: u64) -> Result<Self, StartInfoError> {
        let words: [u8; 56] = physical.array(address).ok_or(StartInfoError::Missing)?;
        if u32_at(&words, 0) != MAGIC {
            return Err(StartInfoError::Missing);
        }
        let (version, module_count) = (u32_at(&words, 4), u32_at(&words, 12));
        let (modules, command_line) = (u64_at(&words, 16), u64_at(&words, 24));
        let (memory_map, memory_map_entries) = (u64_at(&words, 40), u32_at(&words, 48));
        if version < 1 || memory_map_entries == 0 {
            return Err(StartInfoError::NoMemoryMap);
        }
        let module = (module_count > 0)
            .then(|| physical.array::<32>(modules))
            .flatten()
            .map(|entry| (u64_at(&entry, 0), u64_at(&entry, 8)))
            .filter(|&(start, length)| physical.contains(start, length))
            .unwrap_or_default();
        Ok(Self {
            command_line: if command_line == 0 {
                b""
            } else {
                text(physical, command_line)
            },
            module,
            memory_map,
            memory_map_entries: memory_map_entries.min(MAX_ENTRIES),
        })
    }

    /// The memory map: start, length and whether it is ordinary memory.
    pub fn memory(&self, physical: Physical) -> impl Iterator<Item = (u64, u64, bool)> + use<> {
        let map = self.memory_map;
        (0..u64::from(self.memory_map_entries)).filter_map(move |index| {
            let entry: [u8; 24] = physical.array(map.checked_add(24 * index)?)?;
            let (start, length) = (u64_at(&entry, 0), u64_at(&entry, 8));
            start.checked_add(length)?;
            Some((start, length, u32_at(&entry, 16) == 1))
        })
    }

    /// Whether there is ordinary memory at an address.
    #[must_use]
    pub fn is_memory(&self, physical: Physical, address: u64) -> bool {
        self.memory(physical)
            .any(|(start, length, usable)| usable && (start..start + length).contains(&address))
    }
}

/// The bytes at `address` up to a zero, at most [`MAX_COMMAND_LINE`].
fn text(physical: Physical, address: u64) -> &'static [u8] {
    let room = physical.end().saturating_sub(address).min(MAX_COMMAND_LINE);
    let bytes = physical.bytes(address, room).unwrap_or_default();
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |chunk| u64::from_le_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::physical::testing::TestMemory;

    fn start_info(
        version: u32,
        modules: u64,
        command_line: u64,
        map: u64,
        entries: u32,
    ) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [MAGIC, version, 0, 1] {
            bytes.extend(word.to_le_bytes());
        }
        for word in [modules, command_line, 0, map, u64::from(entries)] {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn the_structure_is_read() {
        let memory = TestMemory::new(2);
        memory
            .physical
            .write(0x100, &start_info(1, 0x200, 0x300, 0x400, 2));
        memory.physical.write(
            0x200,
            &[0x1000u64.to_le_bytes(), 77u64.to_le_bytes(), [0; 8], [0; 8]].concat(),
        );
        memory.physical.write(0x300, b"one two\0three");
        for (index, (start, length, kind)) in [(0u64, 0x9000u64, 1u64), (0xa000, 0x1000, 2)]
            .into_iter()
            .enumerate()
        {
            let entry = [
                start.to_le_bytes(),
                length.to_le_bytes(),
                kind.to_le_bytes(),
            ]
            .concat();
            memory.physical.write(0x400 + 24 * index as u64, &entry);
        }
        let info = StartInfo::read(memory.physical, 0x100).expect("valid");
        assert_eq!(info.command_line, b"one two");
        assert_eq!(info.module, (0x1000, 77));
        let map: Vec<_> = info.memory(memory.physical).collect();
        assert_eq!(map, [(0, 0x9000, true), (0xa000, 0x1000, false)]);
    }

    #[test]
    fn pointers_out_of_memory_are_not_followed() {
        let memory = TestMemory::new(1);
        assert_eq!(
            StartInfo::read(memory.physical, 0).err(),
            Some(StartInfoError::Missing)
        );
        assert_eq!(
            StartInfo::read(memory.physical, u64::MAX - 3).err(),
            Some(StartInfoError::Missing)
        );
        memory.physical.write(
            0,
            &start_info(1, u64::MAX, u64::MAX - 1, u64::MAX - 40, 200),
        );
        let info = StartInfo::read(memory.physical, 0).expect("valid itself");
        assert_eq!(info.module, (0, 0));
        assert_eq!(info.command_line, b"");
        assert_eq!(info.memory(memory.physical).count(), 0);
        memory.physical.write(0, &start_info(0, 0, 0, 0, 0));
        assert_eq!(
            StartInfo::read(memory.physical, 0).err(),
            Some(StartInfoError::NoMemoryMap)
        );
    }
}

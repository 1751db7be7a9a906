//! The image's root: an EROFS file system, read in place.
//!
//! What is read: the uncompressed layouts `FLAT_PLAIN` and `FLAT_INLINE`, compact and extended inodes, blocks of 4096
//! bytes. Compressed and chunked files give `EIO` (`kiln build` writes none). Nothing here trusts the image: every offset
//! is checked, and damage becomes `EIO`.
//!
//! The format is that of Linux's `fs/erofs/erofs_fs.h` (documented in the kernel's `Documentation/filesystems/erofs.rst`).
//! Why not the crate `erofs-rs`: it looks files up by whole path only (validating every entry of every block on the
//! way), and does not tell where a file's data lies in the image, which mapping in place needs.

use alloc::{string::String, sync::Arc, vec::Vec};
use core::any::Any;

use linux_raw_sys::general as linux;

use super::{
    DirectoryEntry, FileSystemStatistics, Inode, Kind, MapSource, Metadata, Timestamp,
    regular::RegularFile,
};
use crate::{
    Errno, Result,
    file::{File, OpenFlags, Sink},
};

const SUPER_BLOCK: u64 = 1024;
const MAGIC: u32 = 0xE0F5_E1E2;
const BLOCK_BITS: u8 = 12;
const BLOCK: u64 = 1 << BLOCK_BITS;
/// Inode numbers ("nids") count slots of this size.
const SLOT: u64 = 32;
/// Incompatible features that do not matter to files this module reads; others (48-bit addresses, new inode forms) do.
const KNOWN_FEATURES: u32 = 0x7f;
const LAYOUT_PLAIN: u16 = 0;
const LAYOUT_INLINE: u16 = 2;
const DIRECTORY_ENTRY: usize = 12;
const NANOSECONDS: Timestamp = 1_000_000_000;

/// Number of the device in `st_dev`.
const DEVICE: u64 = super::device_number(0, 20);

fn little_u16(bytes: &[u8], offset: usize) -> Result<u16> {
    let part = bytes.get(offset..offset + 2).ok_or(Errno::EIO)?;
    part.try_into()
        .map(u16::from_le_bytes)
        .map_err(|_| Errno::EIO)
}

fn little_u32(bytes: &[u8], offset: usize) -> Result<u32> {
    let part = bytes.get(offset..offset + 4).ok_or(Errno::EIO)?;
    part.try_into()
        .map(u32::from_le_bytes)
        .map_err(|_| Errno::EIO)
}

fn little_u64(bytes: &[u8], offset: usize) -> Result<u64> {
    let part = bytes.get(offset..offset + 8).ok_or(Errno::EIO)?;
    part.try_into()
        .map(u64::from_le_bytes)
        .map_err(|_| Errno::EIO)
}

/// An EROFS file system in memory.
pub struct Erofs {
    image: &'static [u8],
    /// Byte offset of the area that inode numbers count in.
    metadata_start: u64,
    root: u64,
    blocks: u64,
    inodes: u64,
    /// Time of compact inodes, which have none of their own.
    build_time: Timestamp,
}

impl Erofs {
    /// Reads the superblock.
    ///
    /// # Errors
    /// `EINVAL` if this is no EROFS file system that this module reads, `EIO` if it is damaged.
    pub fn mount(image: &'static [u8]) -> Result<Arc<Erofs>> {
        let start = SUPER_BLOCK as usize;
        let block = image.get(start..start + 128).ok_or(Errno::EINVAL)?;
        let block_bits = *block.get(12).ok_or(Errno::EIO)?;
        let directory_block_bits = *block.get(90).ok_or(Errno::EIO)?;
        if little_u32(block, 0)? != MAGIC
            || block_bits != BLOCK_BITS
            || directory_block_bits != 0
            || little_u32(block, 80)? & !KNOWN_FEATURES != 0
        {
            return Err(Errno::EINVAL);
        }
        Ok(Arc::new(Erofs {
            image,
            metadata_start: u64::from(little_u32(block, 40)?) << BLOCK_BITS,
            root: u64::from(little_u16(block, 14)?),
            blocks: u64::from(little_u32(block, 36)?),
            inodes: little_u64(block, 16)?,
            build_time: Timestamp::from(little_u64(block, 24)?) * NANOSECONDS
                + Timestamp::from(little_u32(block, 32)?),
        }))
    }

    /// The root directory.
    ///
    /// # Errors
    /// `EIO` if it is damaged or not a directory.
    pub fn root(self: &Arc<Erofs>) -> Result<Arc<dyn Inode>> {
        let root = self.inode(self.root)?;
        if root.kind != Kind::Directory {
            return Err(Errno::EIO);
        }
        Ok(root)
    }

    fn bytes(&self, start: u64, length: u64) -> Result<&'static [u8]> {
        let end = start.checked_add(length).ok_or(Errno::EIO)?;
        let (start, end) = (usize::try_from(start), usize::try_from(end));
        let (Ok(start), Ok(end)) = (start, end) else {
            return Err(Errno::EIO);
        };
        self.image.get(start..end).ok_or(Errno::EIO)
    }

    fn inode(self: &Arc<Erofs>, number: u64) -> Result<Arc<ErofsInode>> {
        let offset = number
            .checked_mul(SLOT)
            .and_then(|offset| offset.checked_add(self.metadata_start))
            .ok_or(Errno::EIO)?;
        let compact = self.bytes(offset, 32)?;
        let format = little_u16(compact, 0)?;
        let extended = format & 1 == 1;
        let layout = (format >> 1) & 7;
        let attribute_count = u64::from(little_u16(compact, 2)?);
        let attribute_length = if attribute_count == 0 {
            0
        } else {
            12 + (attribute_count - 1) * 4
        };
        let mode = u32::from(little_u16(compact, 4)?);
        let kind = Kind::from_mode(mode).ok_or(Errno::EIO)?;
        let (size, links, uid, gid, time, header);
        if extended {
            let bytes = self.bytes(offset, 64)?;
            size = little_u64(bytes, 8)?;
            uid = little_u32(bytes, 24)?;
            gid = little_u32(bytes, 28)?;
            let seconds = little_u64(bytes, 32)?.cast_signed();
            time = Timestamp::from(seconds) * NANOSECONDS + Timestamp::from(little_u32(bytes, 40)?);
            links = little_u32(bytes, 44)?;
            header = 64;
        } else {
            size = u64::from(little_u32(compact, 8)?);
            links = u32::from(little_u16(compact, 6)?);
            uid = u32::from(little_u16(compact, 24)?);
            gid = u32::from(little_u16(compact, 26)?);
            time = self.build_time;
            header = 32;
        }
        let union = little_u32(compact, 16)?;
        let has_data = matches!(kind, Kind::Regular | Kind::Directory | Kind::SymbolicLink);
        if has_data
            && (!matches!(layout, LAYOUT_PLAIN | LAYOUT_INLINE) || size > self.image.len() as u64)
        {
            return Err(Errno::EIO);
        }
        let full = if layout == LAYOUT_INLINE {
            size & !(BLOCK - 1)
        } else {
            size
        };
        let inode = ErofsInode {
            file_system: Arc::clone(self),
            number,
            kind,
            permissions: mode & 0o7777,
            links,
            uid,
            gid,
            special_device: if has_data { 0 } else { u64::from(union) },
            size: if has_data { size } else { 0 },
            time,
            blocks_start: u64::from(union) << BLOCK_BITS,
            blocks_length: full,
            inline_start: offset + header + attribute_length,
        };
        if has_data && size > 0 {
            // Checked once here: so that a damaged file is noticed when it is opened, not in the middle of a mapping.
            if full > 0 {
                self.bytes(inode.blocks_start, full)?;
            }
            self.bytes(inode.inline_start, size - full)?;
        }
        Ok(Arc::new(inode))
    }
}

/// An inode of the image.
pub struct ErofsInode {
    file_system: Arc<Erofs>,
    number: u64,
    kind: Kind,
    permissions: u32,
    links: u32,
    uid: u32,
    gid: u32,
    special_device: u64,
    size: u64,
    time: Timestamp,
    /// Where the whole blocks lie, one after the other.
    blocks_start: u64,
    /// Bytes in them; what is beyond lies at `inline_start`.
    blocks_length: u64,
    inline_start: u64,
}

/// A block of a directory, as parsed.
struct Block {
    bytes: &'static [u8],
    count: usize,
}

impl Block {
    fn parse(bytes: &'static [u8]) -> Result<Block> {
        let first = usize::from(little_u16(bytes, 8)?);
        if first < DIRECTORY_ENTRY || first % DIRECTORY_ENTRY != 0 || first > bytes.len() {
            return Err(Errno::EIO);
        }
        Ok(Block {
            bytes,
            count: first / DIRECTORY_ENTRY,
        })
    }

    fn name(&self, index: usize) -> Result<&'static [u8]> {
        let start = usize::from(little_u16(self.bytes, index * DIRECTORY_ENTRY + 8)?);
        let last = index + 1 == self.count;
        let end = if last {
            self.bytes.len()
        } else {
            usize::from(little_u16(self.bytes, (index + 1) * DIRECTORY_ENTRY + 8)?)
        };
        let name = self.bytes.get(start..end).ok_or(Errno::EIO)?;
        if !last {
            return Ok(name);
        }
        // The last name of a block ends at a zero byte or with the block.
        Ok(name.split(|&byte| byte == 0).next().unwrap_or(name))
    }

    fn number(&self, index: usize) -> Result<u64> {
        little_u64(self.bytes, index * DIRECTORY_ENTRY)
    }

    fn kind(&self, index: usize) -> Result<Kind> {
        Ok(
            match self.bytes.get(index * DIRECTORY_ENTRY + 10).copied() {
                Some(1) => Kind::Regular,
                Some(2) => Kind::Directory,
                Some(3) => Kind::CharacterDevice,
                Some(4) => Kind::BlockDevice,
                Some(5) => Kind::Fifo,
                Some(6) => Kind::Socket,
                Some(7) => Kind::SymbolicLink,
                _ => return Err(Errno::EIO),
            },
        )
    }
}

impl ErofsInode {
    /// Contents from `position` that lie in one piece in the image, with their offset in it.
    fn piece(&self, position: u64) -> Result<(u64, u64)> {
        if position < self.blocks_length {
            Ok((self.blocks_start + position, self.blocks_length - position))
        } else if position < self.size {
            let offset = position - self.blocks_length;
            Ok((self.inline_start + offset, self.size - position))
        } else {
            Ok((0, 0))
        }
    }

    fn block_count(&self) -> u64 {
        self.size.div_ceil(BLOCK)
    }

    fn block(&self, index: u64) -> Result<Block> {
        let position = index * BLOCK;
        let (start, length) = self.piece(position)?;
        Block::parse(self.file_system.bytes(start, length.min(BLOCK))?)
    }

    /// Number of the inode with this name: blocks are sorted, and entries in them too, so both are searched by halving.
    fn find(&self, name: &[u8]) -> Result<Option<u64>> {
        let (mut low, mut high) = (0, self.block_count());
        // Last block whose first name is not greater.
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.block(middle)?.name(0)? <= name {
                low = middle;
            } else {
                high = middle;
            }
        }
        if low >= high {
            return Ok(None);
        }
        let block = self.block(low)?;
        let (mut low, mut high) = (0, block.count);
        while low < high {
            let middle = low + (high - low) / 2;
            match block.name(middle)?.cmp(name) {
                core::cmp::Ordering::Equal => return block.number(middle).map(Some),
                core::cmp::Ordering::Less => low = middle + 1,
                core::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }
}

impl Inode for ErofsInode {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(Metadata {
            device: DEVICE,
            inode: self.number,
            kind: self.kind,
            permissions: self.permissions,
            links: self.links,
            uid: self.uid,
            gid: self.gid,
            special_device: self.special_device,
            size: self.size,
            block_size: BLOCK as u32,
            blocks: self.size.div_ceil(BLOCK) * (BLOCK / 512),
            accessed: self.time,
            modified: self.time,
            changed: self.time,
        })
    }

    fn lookup(&self, name: &str) -> Result<Arc<dyn Inode>> {
        if self.kind != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        match self.find(name.as_bytes())? {
            Some(number) => Ok(self.file_system.inode(number)?),
            None => Err(Errno::ENOENT),
        }
    }

    fn entries(&self, position: u64, limit: usize) -> Result<Vec<DirectoryEntry>> {
        if self.kind != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        // A position is the block's number, and the entry's number in it.
        let mut entries = Vec::new();
        let (mut block_index, mut index) =
            (position >> BLOCK_BITS, (position & (BLOCK - 1)) as usize);
        while block_index < self.block_count() && entries.len() < limit {
            let block = self.block(block_index)?;
            while index < block.count && entries.len() < limit {
                let name = block.name(index)?;
                if name != b"." && name != b".." {
                    let next = if index + 1 < block.count {
                        (block_index << BLOCK_BITS) + index as u64 + 1
                    } else {
                        (block_index + 1) << BLOCK_BITS
                    };
                    // Names that are not UTF-8 cannot be opened, so they are not listed either.
                    if let Ok(name) = core::str::from_utf8(name) {
                        entries.push(DirectoryEntry {
                            name: String::from(name),
                            inode: block.number(index)?,
                            kind: block.kind(index)?,
                            next,
                        });
                    }
                }
                index += 1;
            }
            block_index += 1;
            index = 0;
        }
        Ok(entries)
    }

    fn is_symbolic_link(&self) -> bool {
        self.kind == Kind::SymbolicLink
    }

    fn target(&self) -> Result<String> {
        if self.kind != Kind::SymbolicLink {
            return Err(Errno::EINVAL);
        }
        let mut target = Vec::with_capacity(self.size as usize);
        while (target.len() as u64) < self.size {
            target.extend_from_slice(self.in_place(target.len() as u64).ok_or(Errno::EIO)?);
        }
        String::from_utf8(target).map_err(|_| Errno::EILSEQ)
    }

    fn open(self: Arc<Self>, _: OpenFlags) -> Result<Arc<dyn File>> {
        match self.kind {
            Kind::Regular | Kind::Directory => Ok(RegularFile::open(self)),
            Kind::SymbolicLink => Err(Errno::ELOOP),
            _ => Err(Errno::ENXIO),
        }
    }

    fn read_at(&self, position: u64, sink: &mut Sink<'_>) -> Result<usize> {
        if self.kind == Kind::Directory {
            return Err(Errno::EISDIR);
        }
        let mut done = 0;
        while sink.remaining() > 0 {
            let Some(bytes) = self.in_place(position + done as u64) else {
                break;
            };
            match sink.put(bytes) {
                Ok(count) => done += count,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn map_source(&self, position: u64) -> Result<Option<(MapSource, u64)>> {
        if self.kind != Kind::Regular {
            return Err(Errno::ENODEV);
        }
        // A last part of a block is mapped in place too, if the block belongs to the file alone (bytes beyond the end
        // are zeros then); what lies beside its inode must be copied.
        if position >= self.blocks_length {
            return Ok(None);
        }
        let end = self.blocks_length.next_multiple_of(BLOCK);
        self.file_system.bytes(self.blocks_start, end)?;
        Ok(Some((
            MapSource::Root(self.blocks_start + position),
            end - position,
        )))
    }

    fn in_place(&self, position: u64) -> Option<&'static [u8]> {
        if self.kind == Kind::Directory {
            return None;
        }
        let (start, length) = self.piece(position).ok()?;
        let bytes = self.file_system.bytes(start, length).ok()?;
        (!bytes.is_empty()).then_some(bytes)
    }

    fn statistics(&self) -> Result<FileSystemStatistics> {
        Ok(FileSystemStatistics {
            magic: u64::from(linux::EROFS_SUPER_MAGIC_V1),
            block_size: BLOCK,
            blocks: self.file_system.blocks,
            blocks_free: 0,
            files: self.file_system.inodes,
            files_free: 0,
            read_only: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink, path::PathBuf, process::Command};

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let path =
                std::env::temp_dir().join(std::format!("kiln-erofs-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(path.join("tree")).unwrap();
            Scratch(path)
        }

        /// The image of the tree, made by the format's own tool; `None` where that is not installed.
        fn image(&self, options: &[&str]) -> Option<&'static [u8]> {
            let image = self.0.join("image");
            let made = Command::new("mkfs.erofs")
                .args(options)
                .arg(&image)
                .arg(self.0.join("tree"))
                .output();
            match made {
                Ok(output) if output.status.success() => Some(alloc::boxed::Box::leak(
                    fs::read(image).unwrap().into_boxed_slice(),
                )),
                _ => {
                    std::eprintln!("mkfs.erofs (Debian: erofs-utils) is missing: not tested");
                    None
                }
            }
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn contents(inode: &Arc<dyn Inode>) -> Vec<u8> {
        let mut bytes = alloc::vec![0; inode.metadata().unwrap().size as usize + 1];
        let count = inode.read_at(0, &mut Sink::kernel(&mut bytes)).unwrap();
        bytes.truncate(count);
        bytes
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length)
            .map(|index| (index * 31 + index / 256) as u8)
            .collect()
    }

    #[test]
    fn reads_what_mkfs_wrote() {
        let scratch = Scratch::new("reads");
        let tree = scratch.0.join("tree");
        let sizes = [0, 1, 100, 4095, 4096, 4097, 8192, 100_000];
        for size in sizes {
            fs::write(tree.join(std::format!("f{size}")), pattern(size)).unwrap();
        }
        fs::create_dir(tree.join("many")).unwrap();
        for index in 0..2000 {
            fs::write(
                tree.join(std::format!("many/name-{index}")),
                std::format!("{index}"),
            )
            .unwrap();
        }
        symlink("f100", tree.join("link")).unwrap();
        for options in [
            &["-T0", "-Eforce-inode-compact"][..],
            &["-T7", "-Eforce-inode-extended"],
        ] {
            let Some(image) = scratch.image(options) else {
                return;
            };
            let root = Erofs::mount(image).unwrap().root().unwrap();
            for size in sizes {
                let file = root.lookup(&std::format!("f{size}")).unwrap();
                assert_eq!(file.metadata().unwrap().size, size as u64);
                assert!(contents(&file) == pattern(size), "{size}");
                if size >= 4096
                    && let Some((MapSource::Root(offset), length)) = file.map_source(0).unwrap()
                {
                    assert_eq!(offset % 4096, 0);
                    let length = (length as usize).min(size);
                    assert!(
                        image[offset as usize..offset as usize + length] == pattern(size)[..length]
                    );
                }
            }
            assert_eq!(root.lookup("link").unwrap().target().unwrap(), "f100");
            assert!(root.lookup("link").unwrap().is_symbolic_link());
            assert_eq!(root.lookup("missing").err(), Some(Errno::ENOENT));
            let many = root.lookup("many").unwrap();
            for index in 0..2000 {
                let file = many.lookup(&std::format!("name-{index}")).unwrap();
                assert_eq!(contents(&file), std::format!("{index}").into_bytes());
            }
            assert!(many.lookup("name-2000").is_err());
            assert!(many.lookup("").is_err());
            let mut names = Vec::new();
            let mut position = 0;
            loop {
                let entries = many.entries(position, 37).unwrap();
                let Some(last) = entries.last() else { break };
                position = last.next;
                names.extend(entries.into_iter().map(|entry| entry.name));
            }
            assert_eq!(names.len(), 2000);
        }
    }

    #[test]
    fn damage_is_an_error_and_never_a_panic() {
        let scratch = Scratch::new("damage");
        let tree = scratch.0.join("tree");
        fs::create_dir(tree.join("d")).unwrap();
        fs::write(tree.join("d/file"), pattern(5000)).unwrap();
        fs::write(tree.join("small"), "x").unwrap();
        symlink("d/file", tree.join("link")).unwrap();
        let Some(good) = scratch.image(&["-T0"]) else {
            return;
        };
        let mut state = 0x1234_5678_9abc_def1u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        fn visit(inode: &Arc<dyn Inode>, depth: u32) {
            let _ = inode.metadata();
            let _ = inode.target();
            let _ = inode.map_source(0);
            let mut bytes = [0; 8192];
            let _ = inode.read_at(0, &mut Sink::kernel(&mut bytes));
            let _ = inode.lookup("file");
            if depth < 3
                && let Ok(entries) = inode.entries(0, 100)
            {
                for entry in entries {
                    if let Ok(child) = inode.lookup(&entry.name) {
                        visit(&child, depth + 1);
                    }
                }
            }
        }
        for _ in 0..3000 {
            let mut image = good.to_vec();
            for _ in 0..1 + random() % 8 {
                // The superblock and the first metadata: where damage hurts.
                let at = 1024 + (random() % (image.len() as u64 - 1024)) as usize;
                image[at] = random() as u8;
            }
            if random() % 8 == 0 {
                image.truncate((random() % image.len() as u64) as usize);
            }
            let image: &'static [u8] = alloc::boxed::Box::leak(image.into_boxed_slice());
            if let Ok(file_system) = Erofs::mount(image)
                && let Ok(root) = file_system.root()
            {
                visit(&root, 0);
            }
        }
    }
}

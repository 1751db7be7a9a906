//! Writes a [`Tree`] as an EROFS file system.
//!
//! The format is that of Linux's `fs/erofs/erofs_fs.h` (5.4 and later), uncompressed: blocks of 4096 bytes;
//! compact and extended inodes; data either in whole blocks ("flat plain") or, for small things, right behind the
//! inode ("flat inline"). ELF files and whatever exceeds the room behind an inode lie in whole blocks, so that their
//! pages can be mapped.
//!
//! Layout: superblock and inodes from block 0 on, then data blocks. Sizes are known before the first byte is written,
//! so writing is one pass from front to back, and the contents of files pass through a small buffer only.
//!
//! Not here: compression, extended attributes, device files, reading.

use std::io::Write;

use crate::{
    Error, Result,
    tree::{Content, Directory, Metadata, Node, Tree},
};

/// Bytes in a block.
pub const BLOCK: u64 = 4096;
/// Where the superblock begins.
const SUPERBLOCK_OFFSET: usize = 1024;
const SUPERBLOCK_LENGTH: usize = 128;
const MAGIC: u32 = 0xE0F5_E1E2;
/// `EROFS_FEATURE_COMPAT_SB_CHKSUM | EROFS_FEATURE_COMPAT_MTIME`.
const FEATURES_COMPATIBLE: u32 = 0x3;
/// Inode numbers count slots of this many bytes.
const SLOT: u64 = 32;
const COMPACT: u64 = 32;
const EXTENDED: u64 = 64;
const DIRECTORY_ENTRY: u64 = 12;
const VOLUME_NAME: &[u8; 16] = b"kiln\0\0\0\0\0\0\0\0\0\0\0\0";

/// `EROFS_INODE_FLAT_PLAIN` and `EROFS_INODE_FLAT_INLINE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Plain = 0,
    Inline = 2,
}

enum Body<'a> {
    /// Entries: name and inode index.
    Directory(Vec<(&'a [u8], usize)>),
    File(&'a Content),
    Link(&'a [u8]),
}

struct Inode<'a> {
    body: Body<'a>,
    metadata: Metadata,
    time: (i64, u32),
    links: u32,
    size: u64,
    layout: Layout,
    extended: bool,
    /// Bytes behind the inode.
    inline: u64,
    /// Position of the inode in the file system.
    offset: u64,
    /// First data block.
    block: u64,
    /// How many data blocks.
    blocks: u64,
}

impl Inode<'_> {
    fn length(&self) -> u64 {
        if self.extended { EXTENDED } else { COMPACT }
    }

    fn number(&self) -> u64 {
        self.offset / SLOT
    }

    /// Mode with the type of file (`S_IFMT`), and the type in directory entries.
    fn kind(&self) -> (u16, u8) {
        let (format, kind) = match self.body {
            Body::Directory(_) => (0o040_000, 2),
            Body::File(_) => (0o100_000, 1),
            Body::Link(_) => (0o120_000, 7),
        };
        (format | self.metadata.mode, kind)
    }
}

/// How large a directory's data is: names and entries fill blocks, none crosses from one into the next.
struct DirectoryBlocks {
    /// For each block: index of its first entry, and one behind its last.
    blocks: Vec<(usize, usize)>,
    size: u64,
}

impl DirectoryBlocks {
    fn of(entries: &[(&[u8], usize)]) -> Self {
        let mut blocks = Vec::new();
        let (mut first, mut used) = (0, 0);
        for (index, (name, _)) in entries.iter().enumerate() {
            let need = DIRECTORY_ENTRY + name.len() as u64;
            if used + need > BLOCK {
                blocks.push((first, index));
                (first, used) = (index, 0);
            }
            used += need;
        }
        let size = blocks.len() as u64 * BLOCK + used;
        blocks.push((first, entries.len()));
        Self { blocks, size }
    }
}

/// The plan of a file system: every inode placed.
struct Plan<'a> {
    inodes: Vec<Inode<'a>>,
    blocks: u64,
    time: (i64, u32),
}

impl<'a> Plan<'a> {
    fn new(tree: &'a Tree, latest: Option<i64>) -> Result<Self> {
        let clamp = |time: (i64, u32)| match latest {
            Some(latest) if time >= (latest, 0) => (latest, 0),
            _ => time,
        };
        let mut time = (0, 0);
        tree.walk(&mut |_, node| {
            if let Node::File {
                metadata:
                    Metadata {
                        time: Some(of_file),
                        ..
                    },
                ..
            } = node
            {
                time = time.max(clamp(*of_file));
            }
            Ok(())
        })?;
        let mut plan = Self {
            inodes: Vec::new(),
            blocks: 0,
            time,
        };
        plan.add_directory(&tree.root, 0, &clamp)?;
        plan.place();
        Ok(plan)
    }

    fn add(&mut self, body: Body<'a>, metadata: Metadata, time: (i64, u32), size: u64) -> usize {
        self.inodes.push(Inode {
            body,
            metadata,
            time,
            links: 1,
            size,
            layout: Layout::Plain,
            extended: time != self.time
                || size > u32::MAX.into()
                || metadata.uid > u16::MAX.into()
                || metadata.gid > u16::MAX.into(),
            inline: 0,
            offset: 0,
            block: 0,
            blocks: 0,
        });
        self.inodes.len() - 1
    }

    fn add_directory(
        &mut self,
        directory: &'a Directory,
        parent: usize,
        clamp: &dyn Fn((i64, u32)) -> (i64, u32),
    ) -> Result<usize> {
        let own = self.add(
            Body::Directory(Vec::new()),
            directory.metadata,
            self.time,
            0,
        );
        let mut entries: Vec<(&[u8], usize)> = vec![(b".", own), (b"..", parent)];
        let mut links = 2;
        for (name, node) in &directory.entries {
            let index = match node {
                Node::Directory(child) => {
                    links += 1;
                    self.add_directory(child, own, clamp)?
                }
                Node::File { content, metadata } => {
                    let time = metadata.time.map_or(self.time, clamp);
                    let index = self.add(Body::File(content), *metadata, time, content.length());
                    self.choose_layout(index, content.start()?.starts_with(b"\x7fELF"));
                    index
                }
                Node::Link { target } => {
                    let metadata = Metadata::with_mode(0o777);
                    let index =
                        self.add(Body::Link(target), metadata, self.time, target.len() as u64);
                    self.choose_layout(index, false);
                    index
                }
            };
            entries.push((name, index));
        }
        entries.sort();
        let size = DirectoryBlocks::of(&entries).size;
        if let Some(inode) = self.inodes.get_mut(own) {
            inode.links = links;
            inode.size = size;
            inode.extended |= links > u16::MAX.into() || size > u32::MAX.into();
            inode.body = Body::Directory(entries);
        }
        self.choose_layout(own, false);
        Ok(own)
    }

    fn choose_layout(&mut self, index: usize, aligned: bool) {
        let Some(inode) = self.inodes.get_mut(index) else {
            return;
        };
        let tail = inode.size % BLOCK;
        let may_split = matches!(inode.body, Body::Directory(_));
        let fits = tail > 0 && tail <= BLOCK - inode.length();
        if fits && !aligned && (may_split || inode.size < BLOCK) {
            inode.layout = Layout::Inline;
            inode.inline = tail;
            inode.blocks = inode.size / BLOCK;
        } else {
            inode.blocks = inode.size.div_ceil(BLOCK);
        }
    }

    /// Gives every inode its position and every body its blocks.
    fn place(&mut self) {
        let mut end = (SUPERBLOCK_OFFSET + SUPERBLOCK_LENGTH) as u64;
        for inode in &mut self.inodes {
            let length = inode.length() + inode.inline;
            // What lies behind an inode must not cross into the next block.
            if end % BLOCK + length > BLOCK {
                end = end.next_multiple_of(BLOCK);
            }
            inode.offset = end;
            end = (end + length).next_multiple_of(SLOT);
        }
        let mut block = end.div_ceil(BLOCK);
        for inode in &mut self.inodes {
            if inode.blocks > 0 {
                inode.block = block;
                block += inode.blocks;
            }
        }
        self.blocks = block;
    }

    fn superblock(&self) -> Vec<u8> {
        let mut bytes = vec![0; SUPERBLOCK_OFFSET];
        let mut put = |value: &[u8]| bytes.extend_from_slice(value);
        put(&MAGIC.to_le_bytes());
        put(&[0; 4]); // Checksum, filled in later.
        put(&FEATURES_COMPATIBLE.to_le_bytes());
        put(&[12, 0]); // Logarithm of the block size; no further slots.
        let root = self.inodes.first().map_or(0, Inode::number);
        put(&(root as u16).to_le_bytes());
        put(&(self.inodes.len() as u64).to_le_bytes());
        put(&self.time.0.to_le_bytes());
        put(&self.time.1.to_le_bytes());
        put(&(self.blocks as u32).to_le_bytes());
        put(&[0; 8]); // Inodes from block 0 on; no shared attributes.
        put(&[0; 16]); // UUID: the image's digest is its identity.
        put(VOLUME_NAME);
        bytes.resize(SUPERBLOCK_OFFSET + SUPERBLOCK_LENGTH, 0);
        bytes
    }

    fn inode(&self, index: usize, inode: &Inode<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut put = |value: &[u8]| bytes.extend_from_slice(value);
        let format = u16::from(inode.extended) | (inode.layout as u16) << 1;
        let (mode, _) = inode.kind();
        let number = index as u32 + 1;
        let block = if inode.blocks > 0 {
            inode.block as u32
        } else {
            0
        };
        put(&format.to_le_bytes());
        put(&[0; 2]);
        put(&mode.to_le_bytes());
        if inode.extended {
            put(&[0; 2]);
            put(&inode.size.to_le_bytes());
            put(&block.to_le_bytes());
            put(&number.to_le_bytes());
            put(&inode.metadata.uid.to_le_bytes());
            put(&inode.metadata.gid.to_le_bytes());
            put(&inode.time.0.to_le_bytes());
            put(&inode.time.1.to_le_bytes());
            put(&inode.links.to_le_bytes());
            put(&[0; 16]);
        } else {
            put(&(inode.links as u16).to_le_bytes());
            put(&(inode.size as u32).to_le_bytes());
            put(&[0; 4]);
            put(&block.to_le_bytes());
            put(&number.to_le_bytes());
            put(&(inode.metadata.uid as u16).to_le_bytes());
            put(&(inode.metadata.gid as u16).to_le_bytes());
            put(&[0; 4]);
        }
        bytes
    }

    /// A directory's data, the last block not filled up.
    fn directory(&self, entries: &[(&[u8], usize)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let layout = DirectoryBlocks::of(entries);
        for (first, end) in layout.blocks {
            bytes.resize((bytes.len() as u64).next_multiple_of(BLOCK) as usize, 0);
            let here = entries.get(first..end).unwrap_or_default();
            let mut name_offset = here.len() as u64 * DIRECTORY_ENTRY;
            for (name, index) in here {
                let Some(inode) = self.inodes.get(*index) else {
                    continue;
                };
                bytes.extend_from_slice(&inode.number().to_le_bytes());
                bytes.extend_from_slice(&(name_offset as u16).to_le_bytes());
                bytes.extend_from_slice(&[inode.kind().1, 0]);
                name_offset += name.len() as u64;
            }
            for (name, _) in here {
                bytes.extend_from_slice(name);
            }
        }
        bytes
    }
}

/// Counts bytes, and holds the first block back until its checksum can be made.
struct Output<'a> {
    inner: &'a mut dyn Write,
    first: Vec<u8>,
    position: u64,
}

impl Output<'_> {
    fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.position += bytes.len() as u64;
        if self.first.len() < BLOCK as usize {
            let room = (BLOCK as usize - self.first.len()).min(bytes.len());
            let (now, later) = bytes.split_at(room);
            self.first.extend_from_slice(now);
            bytes = later;
            if self.first.len() < BLOCK as usize {
                return Ok(());
            }
            let checksum = crc32c(self.first.get(SUPERBLOCK_OFFSET..).unwrap_or_default());
            let at = SUPERBLOCK_OFFSET + 4;
            if let Some(field) = self.first.get_mut(at..at + 4) {
                field.copy_from_slice(&checksum.to_le_bytes());
            }
            self.inner
                .write_all(&self.first)
                .map_err(Error::io("write", "the image"))?;
        }
        self.inner
            .write_all(bytes)
            .map_err(Error::io("write", "the image"))
    }

    fn pad_to(&mut self, position: u64) -> Result<()> {
        const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];
        while self.position < position {
            let count = (position - self.position).min(BLOCK) as usize;
            self.put(ZEROS.get(..count).unwrap_or(&ZEROS))?;
        }
        Ok(())
    }

    fn content(&mut self, content: &Content) -> Result<()> {
        content.stream(&mut |bytes| self.put(bytes))
    }
}

/// Writes a tree as an EROFS file system, a whole number of blocks. No file gets a time later than `latest` (seconds
/// since 1970). Returns the length in bytes.
///
/// # Errors
///
/// A file of the host cannot be read or changes meanwhile; writing fails; the tree is too large for the format.
pub fn write(tree: &Tree, latest: Option<i64>, output: &mut dyn Write) -> Result<u64> {
    let plan = Plan::new(tree, latest)?;
    if plan.blocks > u64::from(u32::MAX) {
        return Err(Error::Tree {
            path: "/".into(),
            reason: "is larger than 16 TiB".into(),
        });
    }
    let mut output = Output {
        inner: output,
        first: Vec::new(),
        position: 0,
    };
    output.put(&plan.superblock())?;
    for (index, inode) in plan.inodes.iter().enumerate() {
        output.pad_to(inode.offset)?;
        output.put(&plan.inode(index, inode))?;
        if inode.inline == 0 {
            continue;
        }
        match &inode.body {
            Body::Directory(entries) => {
                let bytes = plan.directory(entries);
                let tail = (inode.blocks * BLOCK) as usize;
                output.put(bytes.get(tail..).unwrap_or_default())?;
            }
            Body::File(content) => output.content(content)?,
            Body::Link(target) => output.put(target)?,
        }
    }
    for inode in plan.inodes.iter().filter(|inode| inode.blocks > 0) {
        output.pad_to(inode.block * BLOCK)?;
        match &inode.body {
            Body::Directory(entries) => {
                let mut bytes = plan.directory(entries);
                bytes.truncate((inode.blocks * BLOCK) as usize);
                output.put(&bytes)?;
            }
            Body::File(content) => output.content(content)?,
            Body::Link(target) => output.put(target)?,
        }
    }
    output.pad_to(plan.blocks * BLOCK)?;
    Ok(output.position)
}

/// CRC-32C of each byte value (polynomial 0x1EDC6F41, reflected).
const CHECKSUMS: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < table.len() {
        let mut value = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 {
                (value >> 1) ^ 0x82F6_3B78
            } else {
                value >> 1
            };
            bit += 1;
        }
        table[byte] = value;
        byte += 1;
    }
    table
};

/// CRC-32C, begun with all ones and not inverted at the end, as EROFS wants it.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| {
        let index = (crc as u8 ^ byte) as usize;
        (crc >> 8) ^ CHECKSUMS.get(index).copied().unwrap_or(0)
    })
}

/// Whether the first block of a file system has a superblock that fits its checksum.
#[must_use]
pub fn is_intact(block: &[u8]) -> bool {
    let mut block = block.to_vec();
    let Some(superblock) = block.get_mut(SUPERBLOCK_OFFSET..BLOCK as usize) else {
        return false;
    };
    let found = superblock.get(4..8).map(<[u8]>::to_vec);
    if let Some(field) = superblock.get_mut(4..8) {
        field.fill(0);
    }
    superblock.starts_with(&MAGIC.to_le_bytes())
        && found.as_deref() == Some(&crc32c(superblock).to_le_bytes())
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Read, path::PathBuf, process::Command};

    use super::*;

    /// A file that is gone when the test ends.
    struct Temporary(PathBuf);

    impl Temporary {
        fn new(name: &str) -> Self {
            Self(std::env::temp_dir().join(format!("kiln-erofs-{name}-{}", std::process::id())))
        }
    }

    impl Drop for Temporary {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn file(bytes: &[u8], time: Option<(i64, u32)>) -> Node {
        let metadata = Metadata {
            mode: 0o640,
            uid: 33,
            gid: 70_000,
            time,
        };
        Node::File {
            content: Content::Bytes(bytes.into()),
            metadata,
        }
    }

    fn image(tree: &Tree) -> Vec<u8> {
        let mut bytes = Vec::new();
        let length = write(tree, None, &mut bytes).unwrap();
        assert_eq!(length, bytes.len() as u64);
        assert_eq!(length % BLOCK, 0);
        bytes
    }

    /// Sizes around every border, names that fill several blocks of a directory, links, empty things.
    fn awkward_tree() -> Tree {
        let mut tree = Tree::new();
        for size in [
            0, 1, 4031, 4032, 4033, 4064, 4065, 4095, 4096, 4097, 8192, 100_000,
        ] {
            let bytes: Vec<u8> = (0..size).map(|i| (i * 7 + size) as u8).collect();
            let path = format!("/sizes/{size}");
            tree.insert(path.as_bytes(), file(&bytes, Some((i64::from(size), 5))))
                .unwrap();
        }
        for index in 0..1000 {
            let path = format!("/many/{index:0width$}", width = 4 + index % 60);
            tree.insert(path.as_bytes(), file(path.as_bytes(), None))
                .unwrap();
        }
        tree.insert(b"/elf", file(b"\x7fELF and so on", None))
            .unwrap();
        tree.insert(
            b"/link",
            Node::Link {
                target: b"sizes/4096".to_vec(),
            },
        )
        .unwrap();
        tree.insert(
            b"/long",
            Node::Link {
                target: vec![b'x'; 4090],
            },
        )
        .unwrap();
        tree.directory(b"/empty/deep/er").unwrap();
        tree.insert(
            &[b"/".to_vec(), vec![b'n'; 255]].concat(),
            file(b"longest name", None),
        )
        .unwrap();
        tree
    }

    fn contents(tree: &Tree) -> BTreeMap<String, Vec<u8>> {
        let mut all = BTreeMap::new();
        tree.walk(&mut |path, node| {
            if let Node::File { content, .. } = node {
                let path = String::from_utf8_lossy(path).into_owned();
                all.insert(path, content.read()?.to_vec());
            }
            Ok(())
        })
        .unwrap();
        all
    }

    #[test]
    fn an_independent_reader_finds_every_byte() {
        let tree = awkward_tree();
        let bytes = image(&tree);
        let backend = erofs_rs::backend::SliceImage::new(&bytes);
        let system = erofs_rs::EroFS::new(backend).unwrap();
        let mut count = 0;
        for (path, expected) in contents(&tree) {
            let mut found = Vec::new();
            system.open(&path).unwrap().read_to_end(&mut found).unwrap();
            assert_eq!(found, expected, "{path}");
            count += 1;
        }
        assert_eq!(count, 1014);
        assert_eq!(system.read_dir("/many").unwrap().count(), 1000);
    }

    #[test]
    fn fsck_and_extraction_agree() {
        let tree = awkward_tree();
        let target = Temporary::new("fsck");
        std::fs::write(&target.0, image(&tree)).unwrap();
        let directory = Temporary::new("extracted");
        let output = match Command::new("fsck.erofs")
            .arg(format!("--extract={}", directory.0.display()))
            .arg(&target.0)
            .output()
        {
            Ok(output) => output,
            // erofs-utils is not on this machine; the independent reader has looked already.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => panic!("{error}"),
        };
        let said = String::from_utf8_lossy(&output.stderr).into_owned()
            + &String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !said.contains("rror"), "{said}");
        for (path, expected) in contents(&tree) {
            assert_eq!(
                std::fs::read(directory.0.join(&path[1..])).unwrap(),
                expected,
                "{path}"
            );
        }
        let link = std::fs::read_link(directory.0.join("link")).unwrap();
        assert_eq!(link, PathBuf::from("sizes/4096"));
    }

    #[test]
    fn linux_mounts_it() {
        let tree = awkward_tree();
        let target = Temporary::new("mount");
        std::fs::write(&target.0, image(&tree)).unwrap();
        let directory = Temporary::new("mounted");
        std::fs::create_dir_all(&directory.0).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "erofs", "-o", "loop,ro"])
            .args([&target.0, &directory.0])
            .output();
        // Only root may, and only where there is a loop device and the file system.
        if !mounted.is_ok_and(|output| output.status.success()) {
            return;
        }
        let found: BTreeMap<String, Vec<u8>> = contents(&tree)
            .into_keys()
            .map(|path| {
                let bytes = std::fs::read(directory.0.join(&path[1..])).unwrap_or_default();
                (path, bytes)
            })
            .collect();
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::metadata(directory.0.join("sizes/4096"));
        let names = std::fs::read_dir(directory.0.join("many")).map(|names| names.count());
        let unmounted = Command::new("umount").arg(&directory.0).status().unwrap();
        assert!(unmounted.success());
        assert_eq!(found, contents(&tree));
        let metadata = metadata.unwrap();
        assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (4096, 5));
        assert_eq!(
            (metadata.mode(), metadata.uid(), metadata.gid()),
            (0o100_640, 33, 70_000)
        );
        assert_eq!(names.unwrap(), 1000);
    }

    #[test]
    fn programs_lie_on_pages_and_small_files_behind_their_inodes() {
        let mut tree = Tree::new();
        tree.insert(b"/elf", file(b"\x7fELF tiny", None)).unwrap();
        let bytes = image(&tree);
        assert!(
            bytes
                .chunks(BLOCK as usize)
                .any(|block| block.starts_with(b"\x7fELF tiny"))
        );
        let mut tree = Tree::new();
        tree.insert(b"/text", file(b"tiny", None)).unwrap();
        assert_eq!(image(&tree).len() as u64, BLOCK);
    }

    #[test]
    fn the_same_tree_gives_the_same_bytes_and_times_are_clamped() {
        assert_eq!(image(&awkward_tree()), image(&awkward_tree()));
        let tree = |time| {
            let mut tree = Tree::new();
            tree.insert(b"/f", file(b"x", Some((time, 7)))).unwrap();
            let mut bytes = Vec::new();
            write(&tree, Some(1000), &mut bytes).unwrap();
            bytes
        };
        assert_eq!(tree(2000), tree(3000));
        assert_ne!(tree(2000), tree(500));
    }

    #[test]
    fn a_file_that_changes_is_noticed() {
        let host = Temporary::new("changed");
        std::fs::write(&host.0, [b'x'; 5000]).unwrap();
        let mut tree = Tree::new();
        let node = |length| Node::File {
            content: Content::Host {
                path: host.0.clone(),
                length,
            },
            metadata: Metadata::with_mode(0o644),
        };
        for length in [4999, 5001] {
            tree.insert(b"/f", node(length)).unwrap();
            let error = write(&tree, None, &mut Vec::new()).unwrap_err();
            assert!(matches!(error, Error::Changed { .. }), "{error}");
        }
        tree.insert(b"/f", node(5000)).unwrap();
        write(&tree, None, &mut Vec::new()).unwrap();
    }
}

//! Files in memory, with or without a read-only file system below.
//!
//! Without, this is Linux's tmpfs (`/tmp`, `/dev/shm`, memory files). With a file system below, it is the root: the
//! image's tree, on which everything can be changed. It differs from Linux's overlayfs in that a file below and its
//! changed form are one object ([`Node`]): inode numbers, open files and hard links stay what they are when a file is
//! changed, a file open from before sees later changes, and directories of the image can be renamed. Changes are kept by
//! the page ([`content`]) and by the name ([`directory`]).
//!
//! Nothing here outlives the instance.

pub mod content;
pub mod directory;
#[cfg(test)]
mod tests;

use alloc::{
    string::{String, ToString},
    sync::{Arc, Weak},
    vec::Vec,
};
use core::{
    any::Any,
    sync::atomic::{AtomicU64, Ordering},
};

use kiln_abi::host::PAGE_SIZE;
use linux_raw_sys::general as linux;

use super::{
    Clock, Creation, DirectoryEntry, FileSystemStatistics, Inode, Kind, MapSource, Metadata,
    MetadataChange, Timestamp, pool::Pool, regular::RegularFile,
};
use crate::{
    Errno, Result,
    file::{File, OpenFlags, Sink, Source, pipe::Fifo},
    hash::HashMap,
    sync::Mutex,
};
use content::Content;
use directory::{Directory, Found};

/// Inode numbers of files that are not in the image start here.
const FIRST_INODE: u64 = 1 << 32;

/// Opens device nodes.
pub trait Devices: Send + Sync {
    /// Opens the device with a number.
    ///
    /// # Errors
    /// `ENXIO` for unknown ones.
    fn open(&self, kind: Kind, device: u64, flags: OpenFlags) -> Result<Arc<dyn File>>;
}

/// A file system in memory.
pub struct Tmpfs {
    pool: Arc<Pool>,
    clock: Arc<dyn Clock>,
    devices: Option<Arc<dyn Devices>>,
    device: u64,
    /// What `statfs` says it is.
    magic: u64,
    next_inode: AtomicU64,
    /// Nodes for files below that have several names.
    linked: Mutex<HashMap<u64, Weak<Node>>>,
}

/// What a [`Tmpfs`] is made of.
#[derive(Clone)]
pub struct TmpfsParts {
    /// Where data is kept.
    pub pool: Arc<Pool>,
    /// Where times come from.
    pub clock: Arc<dyn Clock>,
    /// Opens device nodes; without, they give `ENXIO`.
    pub devices: Option<Arc<dyn Devices>>,
    /// Device number in `st_dev`.
    pub device: u64,
}

impl Tmpfs {
    fn new(parts: TmpfsParts, magic: u32) -> Arc<Tmpfs> {
        Arc::new(Tmpfs {
            pool: parts.pool,
            clock: parts.clock,
            devices: parts.devices,
            device: parts.device,
            magic: u64::from(magic),
            next_inode: AtomicU64::new(FIRST_INODE),
            linked: Mutex::new(HashMap::default()),
        })
    }

    /// An empty file system; `permissions` of its root directory.
    #[must_use]
    pub fn empty(parts: TmpfsParts, permissions: u32) -> Arc<dyn Inode> {
        let tmpfs = Tmpfs::new(parts, linux::TMPFS_MAGIC);
        let creation = Creation {
            kind: Kind::Directory,
            permissions,
            uid: 0,
            gid: 0,
            target: "",
            special_device: 0,
        };
        tmpfs.create(&creation)
    }

    /// A file system over `lower`, the root directory of a read-only one whose files can be read in place.
    ///
    /// # Errors
    /// What the file system below says.
    pub fn over(parts: TmpfsParts, lower: &Arc<dyn Inode>) -> Result<Arc<dyn Inode>> {
        Ok(Tmpfs::new(parts, linux::OVERLAYFS_SUPER_MAGIC).adopt(lower)?)
    }

    /// A file without a name in any directory (`memfd_create`).
    #[must_use]
    pub fn unnamed_file(
        root: &Arc<dyn Inode>,
        permissions: u32,
        uid: u32,
        gid: u32,
        sealable: bool,
    ) -> Option<Arc<Node>> {
        let root = root.as_any().downcast_ref::<Node>()?;
        let creation = Creation {
            kind: Kind::Regular,
            permissions,
            uid,
            gid,
            target: "",
            special_device: 0,
        };
        let node = root.file_system.create(&creation);
        node.attributes.lock().links = 0;
        if let Body::File(content) = &node.body {
            content.lock().seals = Some(if sealable { 0 } else { linux::F_SEAL_SEAL });
        }
        Some(node)
    }

    fn create(self: &Arc<Tmpfs>, creation: &Creation<'_>) -> Arc<Node> {
        let now = self.clock.now();
        let body = match creation.kind {
            Kind::Regular => Body::File(Mutex::new(Content::new(&self.pool))),
            Kind::Directory => Body::Directory(Mutex::new(Directory::new(None))),
            Kind::SymbolicLink => Body::Link(creation.target.to_string()),
            Kind::Fifo => Body::Fifo(Fifo::new()),
            Kind::CharacterDevice | Kind::BlockDevice | Kind::Socket => Body::Special,
        };
        Arc::new_cyclic(|this| Node {
            this: Weak::clone(this),
            file_system: Arc::clone(self),
            inode: self.next_inode.fetch_add(1, Ordering::Relaxed),
            kind: creation.kind,
            special_device: creation.special_device,
            attributes: Mutex::new(Attributes {
                permissions: if creation.kind == Kind::SymbolicLink {
                    0o777
                } else {
                    creation.permissions
                },
                uid: creation.uid,
                gid: creation.gid,
                links: if creation.kind == Kind::Directory {
                    2
                } else {
                    1
                },
                accessed: now,
                modified: now,
                changed: now,
            }),
            body,
        })
    }

    /// The node for a file below: always the same one while it is in use.
    fn adopt(self: &Arc<Tmpfs>, lower: &Arc<dyn Inode>) -> Result<Arc<Node>> {
        let metadata = lower.metadata()?;
        let several = metadata.links > 1 && metadata.kind != Kind::Directory;
        if several
            && let Some(node) = self
                .linked
                .lock()
                .get(&metadata.inode)
                .and_then(Weak::upgrade)
        {
            return Ok(node);
        }
        let body = match metadata.kind {
            Kind::Regular => Body::File(Mutex::new(Content::over(
                &self.pool,
                Arc::clone(lower),
                metadata.size,
            ))),
            Kind::Directory => Body::Directory(Mutex::new(Directory::new(Some(Arc::clone(lower))))),
            Kind::SymbolicLink => Body::Link(lower.target()?),
            Kind::Fifo => Body::Fifo(Fifo::new()),
            Kind::CharacterDevice | Kind::BlockDevice | Kind::Socket => Body::Special,
        };
        let node = Arc::new_cyclic(|this| Node {
            this: Weak::clone(this),
            file_system: Arc::clone(self),
            inode: metadata.inode,
            kind: metadata.kind,
            special_device: metadata.special_device,
            attributes: Mutex::new(Attributes {
                permissions: metadata.permissions,
                uid: metadata.uid,
                gid: metadata.gid,
                links: metadata.links,
                accessed: metadata.accessed,
                modified: metadata.modified,
                changed: metadata.changed,
            }),
            body,
        });
        if several {
            self.linked
                .lock()
                .insert(metadata.inode, Arc::downgrade(&node));
        }
        Ok(node)
    }
}

struct Attributes {
    permissions: u32,
    uid: u32,
    gid: u32,
    links: u32,
    accessed: Timestamp,
    modified: Timestamp,
    changed: Timestamp,
}

enum Body {
    File(Mutex<Content>),
    Directory(Mutex<Directory>),
    Link(String),
    Fifo(Arc<Fifo>),
    Special,
}

/// A file of a [`Tmpfs`].
pub struct Node {
    this: Weak<Node>,
    file_system: Arc<Tmpfs>,
    inode: u64,
    kind: Kind,
    special_device: u64,
    attributes: Mutex<Attributes>,
    body: Body,
}

impl Node {
    fn directory(&self) -> Result<&Mutex<Directory>> {
        match &self.body {
            Body::Directory(directory) => Ok(directory),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn content(&self) -> Result<&Mutex<Content>> {
        match &self.body {
            Body::File(content) => Ok(content),
            Body::Directory(_) => Err(Errno::EISDIR),
            _ => Err(Errno::EINVAL),
        }
    }

    fn touch_modified(&self) {
        let now = self.file_system.clock.now();
        let mut attributes = self.attributes.lock();
        attributes.modified = now;
        attributes.changed = now;
    }

    fn touch_changed(&self) {
        let now = self.file_system.clock.now();
        self.attributes.lock().changed = now;
    }

    fn change_links(&self, by: i32) {
        let now = self.file_system.clock.now();
        let mut attributes = self.attributes.lock();
        attributes.links = attributes.links.saturating_add_signed(by);
        attributes.changed = now;
    }

    /// A name of this node is gone.
    fn name_removed(&self) {
        if self.kind == Kind::Directory {
            let mut attributes = self.attributes.lock();
            attributes.links = 0;
            attributes.changed = self.file_system.clock.now();
        } else {
            self.change_links(-1);
        }
    }

    fn get(&self, name: &str) -> Result<Arc<Node>> {
        let directory = self.directory()?;
        let lower = match directory.lock().find(name) {
            Found::Node(node) => return Ok(node),
            Found::Nothing => return Err(Errno::ENOENT),
            Found::AskBelow(lower) => lower,
        };
        let node = self.file_system.adopt(&lower.lookup(name)?)?;
        directory.lock().remember(name, &node);
        Ok(node)
    }

    fn is_empty(&self) -> Result<bool> {
        Ok(self.entries(0, 1)?.is_empty())
    }

    /// Seals of a memory file (`F_GET_SEALS`).
    ///
    /// # Errors
    /// `EINVAL` for files that cannot have seals.
    pub fn seals(&self) -> Result<u32> {
        self.content()
            .map_err(|_| Errno::EINVAL)?
            .lock()
            .seals
            .ok_or(Errno::EINVAL)
    }

    /// Adds seals to a memory file (`F_ADD_SEALS`).
    ///
    /// # Errors
    /// `EPERM` when sealed against it, `EINVAL` for unknown seals or files that cannot have any.
    pub fn add_seals(&self, new: u32) -> Result<()> {
        const KNOWN: u32 = linux::F_SEAL_SEAL
            | linux::F_SEAL_SHRINK
            | linux::F_SEAL_GROW
            | linux::F_SEAL_WRITE
            | linux::F_SEAL_FUTURE_WRITE
            | linux::F_SEAL_EXEC;
        let mut content = self.content().map_err(|_| Errno::EINVAL)?.lock();
        let seals = content.seals.as_mut().ok_or(Errno::EINVAL)?;
        if new & !KNOWN != 0 {
            return Err(Errno::EINVAL);
        }
        if *seals & linux::F_SEAL_SEAL != 0 {
            return Err(Errno::EPERM);
        }
        *seals |= new;
        Ok(())
    }
}

fn sealed(content: &Content, seals: u32) -> bool {
    content.seals.is_some_and(|set| set & seals != 0)
}

const WRITE_SEALS: u32 = linux::F_SEAL_WRITE | linux::F_SEAL_FUTURE_WRITE;

impl Inode for Node {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn metadata(&self) -> Result<Metadata> {
        let (size, blocks) = match &self.body {
            Body::File(content) => {
                let content = content.lock();
                (content.size(), content.blocks())
            }
            Body::Directory(_) => (PAGE_SIZE as u64, 0),
            Body::Link(target) => (target.len() as u64, 0),
            Body::Fifo(_) | Body::Special => (0, 0),
        };
        let attributes = self.attributes.lock();
        Ok(Metadata {
            device: self.file_system.device,
            inode: self.inode,
            kind: self.kind,
            permissions: attributes.permissions,
            links: attributes.links,
            uid: attributes.uid,
            gid: attributes.gid,
            special_device: self.special_device,
            size,
            block_size: PAGE_SIZE as u32,
            blocks,
            accessed: attributes.accessed,
            modified: attributes.modified,
            changed: attributes.changed,
        })
    }

    fn change(&self, change: &MetadataChange) -> Result<()> {
        let mut resized = false;
        if let Some(size) = change.size {
            let mut content = self.content()?.lock();
            if (size < content.size() && sealed(&content, linux::F_SEAL_SHRINK))
                || (size > content.size() && sealed(&content, linux::F_SEAL_GROW))
            {
                return Err(Errno::EPERM);
            }
            content.resize(size)?;
            resized = true;
        }
        let now = self.file_system.clock.now();
        let mut attributes = self.attributes.lock();
        attributes.changed = now;
        if resized {
            attributes.modified = now;
        }
        if let Some(permissions) = change.permissions {
            attributes.permissions = permissions & 0o7777;
        }
        if let Some(uid) = change.uid {
            attributes.uid = uid;
        }
        if let Some(gid) = change.gid {
            attributes.gid = gid;
        }
        if let Some(accessed) = change.accessed {
            attributes.accessed = accessed;
        }
        if let Some(modified) = change.modified {
            attributes.modified = modified;
        }
        Ok(())
    }

    fn lookup(&self, name: &str) -> Result<Arc<dyn Inode>> {
        Ok(self.get(name)?)
    }

    fn entries(&self, position: u64, limit: usize) -> Result<Vec<DirectoryEntry>> {
        self.directory()?.lock().entries(position, limit)
    }

    fn create(&self, name: &str, creation: &Creation<'_>) -> Result<Arc<dyn Inode>> {
        let directory = self.directory()?;
        if self.get(name).is_ok() {
            return Err(Errno::EEXIST);
        }
        if self.attributes.lock().links == 0 {
            return Err(Errno::ENOENT);
        }
        let node = self.file_system.create(creation);
        directory.lock().put(name, Arc::clone(&node));
        if creation.kind == Kind::Directory {
            self.change_links(1);
        }
        self.touch_modified();
        Ok(node)
    }

    fn create_unnamed(&self, creation: &Creation<'_>) -> Result<Arc<dyn Inode>> {
        self.directory()?;
        let node = self.file_system.create(creation);
        node.attributes.lock().links = 0;
        Ok(node)
    }

    fn link(&self, name: &str, inode: &Arc<dyn Inode>) -> Result<()> {
        let directory = self.directory()?;
        let node = inode
            .as_any()
            .downcast_ref::<Node>()
            .and_then(|node| node.this.upgrade())
            .ok_or(Errno::EXDEV)?;
        if !Arc::ptr_eq(&node.file_system, &self.file_system) {
            return Err(Errno::EXDEV);
        }
        if node.kind == Kind::Directory {
            return Err(Errno::EPERM);
        }
        if self.get(name).is_ok() {
            return Err(Errno::EEXIST);
        }
        directory.lock().put(name, Arc::clone(&node));
        node.change_links(1);
        self.touch_modified();
        Ok(())
    }

    fn unlink(&self, name: &str, directory: bool) -> Result<()> {
        let node = self.get(name)?;
        match (node.kind == Kind::Directory, directory) {
            (true, false) => return Err(Errno::EISDIR),
            (false, true) => return Err(Errno::ENOTDIR),
            (true, true) if !node.is_empty()? => return Err(Errno::ENOTEMPTY),
            _ => {}
        }
        self.directory()?.lock().remove(name)?;
        node.name_removed();
        if directory {
            self.change_links(-1);
        }
        self.touch_modified();
        Ok(())
    }

    fn rename(
        &self,
        name: &str,
        new_parent: &Arc<dyn Inode>,
        new_name: &str,
        flags: u32,
    ) -> Result<()> {
        let parent = new_parent
            .as_any()
            .downcast_ref::<Node>()
            .ok_or(Errno::EXDEV)?;
        if !Arc::ptr_eq(&parent.file_system, &self.file_system) {
            return Err(Errno::EXDEV);
        }
        let node = self.get(name)?;
        let existing = match parent.get(new_name) {
            Ok(existing) => Some(existing),
            Err(Errno::ENOENT) => None,
            Err(error) => return Err(error),
        };
        if flags & linux::RENAME_NOREPLACE != 0 && existing.is_some() {
            return Err(Errno::EEXIST);
        }
        let is_directory = node.kind == Kind::Directory;
        let same_parent = core::ptr::eq(self, parent);
        if flags & linux::RENAME_EXCHANGE != 0 {
            let existing = existing.ok_or(Errno::ENOENT)?;
            self.directory()?.lock().put(name, Arc::clone(&existing));
            parent.directory()?.lock().put(new_name, Arc::clone(&node));
            if !same_parent {
                let moved = i32::from(is_directory) - i32::from(existing.kind == Kind::Directory);
                self.change_links(-moved);
                parent.change_links(moved);
            }
            existing.touch_changed();
        } else {
            if let Some(existing) = &existing {
                if Arc::ptr_eq(existing, &node) {
                    // Two names of one file: nothing happens, as POSIX wants it.
                    return Ok(());
                }
                match (is_directory, existing.kind == Kind::Directory) {
                    (true, false) => return Err(Errno::ENOTDIR),
                    (false, true) => return Err(Errno::EISDIR),
                    (true, true) if !existing.is_empty()? => return Err(Errno::ENOTEMPTY),
                    _ => {}
                }
            }
            if parent.attributes.lock().links == 0 {
                return Err(Errno::ENOENT);
            }
            self.directory()?.lock().remove(name)?;
            parent.directory()?.lock().put(new_name, Arc::clone(&node));
            if let Some(existing) = &existing {
                existing.name_removed();
                if existing.kind == Kind::Directory {
                    parent.change_links(-1);
                }
            }
            if is_directory && !same_parent {
                self.change_links(-1);
                parent.change_links(1);
            }
        }
        node.touch_changed();
        self.touch_modified();
        parent.touch_modified();
        Ok(())
    }

    fn is_symbolic_link(&self) -> bool {
        self.kind == Kind::SymbolicLink
    }

    fn target(&self) -> Result<String> {
        match &self.body {
            Body::Link(target) => Ok(target.clone()),
            _ => Err(Errno::EINVAL),
        }
    }

    fn open(self: Arc<Self>, flags: OpenFlags) -> Result<Arc<dyn File>> {
        match &self.body {
            Body::File(_) | Body::Directory(_) => Ok(RegularFile::open(self)),
            Body::Link(_) => Err(Errno::ELOOP),
            Body::Fifo(fifo) => {
                let fifo = Arc::clone(fifo);
                fifo.open(self, flags)
            }
            Body::Special => match &self.file_system.devices {
                Some(devices) if self.kind != Kind::Socket => {
                    let file = devices.open(self.kind, self.special_device, flags)?;
                    Ok(crate::file::device::DeviceNode::wrap(self, file))
                }
                _ => Err(Errno::ENXIO),
            },
        }
    }

    fn read_at(&self, position: u64, sink: &mut Sink<'_>) -> Result<usize> {
        self.content()?.lock().read(position, sink)
    }

    fn write_at(&self, position: u64, source: &mut Source<'_>) -> Result<usize> {
        let count = {
            let mut content = self.content()?.lock();
            if sealed(&content, WRITE_SEALS) {
                return Err(Errno::EPERM);
            }
            if sealed(&content, linux::F_SEAL_GROW)
                && position.saturating_add(source.remaining() as u64) > content.size()
            {
                return Err(Errno::EPERM);
            }
            content.write(position, source)?
        };
        if count > 0 {
            self.touch_modified();
        }
        Ok(count)
    }

    fn map_source(&self, position: u64) -> Result<Option<(MapSource, u64)>> {
        match &self.body {
            Body::File(content) => content.lock().map_source(position),
            _ => Err(Errno::ENODEV),
        }
    }

    fn prepare_shared(&self, position: u64, length: u64) -> Result<()> {
        match &self.body {
            Body::File(content) => {
                let mut content = content.lock();
                if sealed(&content, WRITE_SEALS) {
                    return Err(Errno::EPERM);
                }
                content.prepare_shared(position, length)
            }
            _ => Err(Errno::ENODEV),
        }
    }

    fn in_place(&self, position: u64) -> Option<&'static [u8]> {
        match &self.body {
            Body::File(content) => content.lock().in_place(position),
            _ => None,
        }
    }

    fn allocate(&self, mode: u32, position: u64, length: u64) -> Result<()> {
        let end = position
            .checked_add(length)
            .filter(|&end| end <= i64::MAX as u64)
            .ok_or(Errno::EFBIG)?;
        let keep_size = mode & linux::FALLOC_FL_KEEP_SIZE != 0;
        let mut content = self.content().map_err(|_| Errno::ENODEV)?.lock();
        match mode & !linux::FALLOC_FL_KEEP_SIZE {
            0 => {
                if end > content.size() && !keep_size && sealed(&content, linux::F_SEAL_GROW) {
                    return Err(Errno::EPERM);
                }
                content.reserve(position, length)?;
            }
            linux::FALLOC_FL_PUNCH_HOLE if keep_size => {
                if sealed(&content, WRITE_SEALS) {
                    return Err(Errno::EPERM);
                }
                content.punch(position, length)?;
            }
            linux::FALLOC_FL_ZERO_RANGE => {
                if sealed(&content, WRITE_SEALS) {
                    return Err(Errno::EPERM);
                }
                content.punch(position, length)?;
                content.reserve(position, length)?;
            }
            _ => return Err(Errno::EOPNOTSUPP),
        }
        if !keep_size && end > content.size() {
            content.resize(end)?;
        }
        drop(content);
        self.touch_modified();
        Ok(())
    }

    fn attribute(&self, name: &str) -> Result<Vec<u8>> {
        // None are kept; whoever asks for one of a kind that Linux's file systems have hears that it is not there.
        if name.starts_with("user.")
            || name.starts_with("security.")
            || name.starts_with("trusted.")
        {
            Err(Errno::ENODATA)
        } else {
            Err(Errno::EOPNOTSUPP)
        }
    }

    fn statistics(&self) -> Result<FileSystemStatistics> {
        let limit = u64::from(self.file_system.pool.limit());
        Ok(FileSystemStatistics {
            magic: self.file_system.magic,
            block_size: PAGE_SIZE as u64,
            blocks: limit,
            blocks_free: limit.saturating_sub(u64::from(self.file_system.pool.used())),
            files: limit,
            files_free: limit,
            read_only: false,
        })
    }
}

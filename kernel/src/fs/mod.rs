//! File systems.
//!
//! [`Inode`] is what every file system offers; [`vfs`] resolves paths over mounts. All operations are synchronous: a
//! file system never makes a thread wait in the executor.
//!
//! * [`erofs`] is the image's root, read in place.
//! * [`tmpfs`] has files in memory, with or without a read-only file system below (the root is a tmpfs over the EROFS).
//! * [`pool`] has the shared pages in which tmpfs keeps data.
//! * [`synthetic`] has files made up when they are read; [`proc`] and [`sys`] are made of them.
//! * [`fuse`] has volumes of the host, over the link.
//! * [`tree`] says what is mounted where.

pub mod erofs;
pub mod fuse;
pub mod pool;
pub mod proc;
pub mod regular;
pub mod synthetic;
pub mod sys;
pub mod tmpfs;
pub mod tree;
pub mod vfs;

use alloc::{string::String, sync::Arc, vec::Vec};
use core::any::Any;

use linux_raw_sys::general as linux;

pub use tree::{console_input, finish, open_standard_streams, start};

use crate::{
    Errno, Result,
    file::{File, OpenFlags, Sink, Source},
};

/// Kinds of inodes, with the values of `S_IF*` in `st_mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Regular file.
    Regular = linux::S_IFREG,
    /// Directory.
    Directory = linux::S_IFDIR,
    /// Symbolic link.
    SymbolicLink = linux::S_IFLNK,
    /// Character device.
    CharacterDevice = linux::S_IFCHR,
    /// Block device.
    BlockDevice = linux::S_IFBLK,
    /// Named pipe.
    Fifo = linux::S_IFIFO,
    /// Unix socket.
    Socket = linux::S_IFSOCK,
}

impl Kind {
    /// From the file type bits of a mode (`st_mode`).
    #[must_use]
    pub fn from_mode(mode: u32) -> Option<Kind> {
        Some(match mode & linux::S_IFMT {
            linux::S_IFREG => Kind::Regular,
            linux::S_IFDIR => Kind::Directory,
            linux::S_IFLNK => Kind::SymbolicLink,
            linux::S_IFCHR => Kind::CharacterDevice,
            linux::S_IFBLK => Kind::BlockDevice,
            linux::S_IFIFO => Kind::Fifo,
            linux::S_IFSOCK => Kind::Socket,
            _ => return None,
        })
    }

    /// The file type bits of a mode.
    #[must_use]
    pub fn mode(self) -> u32 {
        self as u32
    }

    /// The value of `d_type` in directory entries (`DT_*`): the mode's type bits, shifted.
    #[must_use]
    pub fn directory_type(self) -> u8 {
        (self as u32 >> 12) as u8
    }
}

/// A time of a file: nanoseconds since 1970 (UTC).
pub type Timestamp = i128;

/// Where file systems learn the time.
pub trait Clock: Send + Sync {
    /// Now.
    fn now(&self) -> Timestamp;
}

impl Clock for crate::host::Host {
    fn now(&self) -> Timestamp {
        Timestamp::from(self.realtime())
    }
}

/// Number of a device as `st_rdev` has it: Linux's `new_encode_dev` (the same as glibc's `makedev` for small numbers).
#[must_use]
pub const fn device_number(major: u32, minor: u32) -> u64 {
    ((minor & 0xff) | ((major & 0xfff) << 8)) as u64 | (((minor & 0xffff_ff00) as u64) << 12)
}

/// Major and minor part of a [`device_number`].
#[must_use]
pub const fn device_parts(device: u64) -> (u32, u32) {
    (
        ((device >> 8) & 0xfff) as u32,
        ((device & 0xff) | ((device >> 12) & 0xffff_ff00)) as u32,
    )
}

/// Attributes of a file, as `stat(2)` tells them.
#[derive(Clone, Copy, Debug)]
pub struct Metadata {
    /// Number of the file system's device.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Kind.
    pub kind: Kind,
    /// Permission bits (`07777`).
    pub permissions: u32,
    /// Hard links.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// For device nodes: the device.
    pub special_device: u64,
    /// Bytes.
    pub size: u64,
    /// Preferred block size in bytes.
    pub block_size: u32,
    /// Space used, in units of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub accessed: Timestamp,
    /// Last change of contents.
    pub modified: Timestamp,
    /// Last change of attributes.
    pub changed: Timestamp,
}

/// Attributes to change; what is `None` stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct MetadataChange {
    /// Permission bits.
    pub permissions: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Length: cuts, or extends by zeros.
    pub size: Option<u64>,
    /// Last access.
    pub accessed: Option<Timestamp>,
    /// Last change of contents.
    pub modified: Option<Timestamp>,
}

/// One entry of a directory.
#[derive(Clone, Debug)]
pub struct DirectoryEntry {
    /// Name.
    pub name: String,
    /// Inode number.
    pub inode: u64,
    /// Kind.
    pub kind: Kind,
    /// Position of the *next* entry, for `getdents64` and `lseek`.
    pub next: u64,
}

/// How a page range of a file can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapSource {
    /// Bytes of the image's root from this offset, page-aligned: mapped in place.
    Root(u64),
    /// Pages of the shared pool from this offset: mapped in place, shared with reads and writes of the file.
    Pool(u64),
}

/// What to create.
#[derive(Clone, Copy, Debug)]
pub struct Creation<'a> {
    /// Kind of inode.
    pub kind: Kind,
    /// Permission bits, the umask already applied.
    pub permissions: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Target, for symbolic links.
    pub target: &'a str,
    /// Device, for device nodes.
    pub special_device: u64,
}

/// Space of a file system, for `statfs(2)`.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileSystemStatistics {
    /// Magic number (`EROFS_SUPER_MAGIC_V1`, `TMPFS_MAGIC`).
    pub magic: u64,
    /// Block size in bytes.
    pub block_size: u64,
    /// Blocks in all, free, and free for the user.
    pub blocks: u64,
    /// Free blocks.
    pub blocks_free: u64,
    /// Inodes in all.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
    /// True if nothing can be changed.
    pub read_only: bool,
}

/// A file in a file system.
///
/// Methods that a kind or a file system does not have keep their default, which is the error Linux gives for it.
pub trait Inode: Send + Sync + Any {
    /// This inode as `Any`.
    fn as_any(&self) -> &dyn Any;

    /// Attributes.
    ///
    /// # Errors
    /// What the file system says.
    fn metadata(&self) -> Result<Metadata>;

    /// Changes attributes.
    ///
    /// # Errors
    /// `EROFS` where nothing can be changed.
    fn change(&self, change: &MetadataChange) -> Result<()> {
        let _ = change;
        Err(Errno::EROFS)
    }

    /// Directory: finds an entry (never `.` or `..`).
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`.
    fn lookup(&self, name: &str) -> Result<Arc<dyn Inode>> {
        let _ = name;
        Err(Errno::ENOTDIR)
    }

    /// Directory: up to `limit` entries from `position` (0 is the start); `.` and `..` are added by the caller.
    ///
    /// # Errors
    /// `ENOTDIR`.
    fn entries(&self, position: u64, limit: usize) -> Result<Vec<DirectoryEntry>> {
        let _ = (position, limit);
        Err(Errno::ENOTDIR)
    }

    /// Directory: makes a new inode.
    ///
    /// # Errors
    /// `EEXIST`, `EROFS`, `ENOSPC`.
    fn create(&self, name: &str, creation: &Creation<'_>) -> Result<Arc<dyn Inode>> {
        let _ = (name, creation);
        Err(Errno::EROFS)
    }

    /// Directory: makes another name for `inode` of the same file system.
    ///
    /// # Errors
    /// `EEXIST`, `EXDEV`, `EROFS`.
    fn link(&self, name: &str, inode: &Arc<dyn Inode>) -> Result<()> {
        let _ = (name, inode);
        Err(Errno::EROFS)
    }

    /// Directory: removes a name; `directory` says whether it must be an empty directory (`rmdir`) or must not be one.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTEMPTY`, `EISDIR`, `ENOTDIR`, `EROFS`.
    fn unlink(&self, name: &str, directory: bool) -> Result<()> {
        let _ = (name, directory);
        Err(Errno::EROFS)
    }

    /// Directory: moves an entry to `new_name` in `new_parent` of the same file system. `flags` are `RENAME_*`.
    ///
    /// # Errors
    /// As `renameat2(2)`.
    fn rename(
        &self,
        name: &str,
        new_parent: &Arc<dyn Inode>,
        new_name: &str,
        flags: u32,
    ) -> Result<()> {
        let _ = (name, new_parent, new_name, flags);
        Err(Errno::EROFS)
    }

    /// Whether this is a symbolic link: path resolution asks this of every name, so it must be cheap.
    fn is_symbolic_link(&self) -> bool {
        false
    }

    /// Symbolic link: its target.
    ///
    /// # Errors
    /// `EINVAL` for other kinds.
    fn target(&self) -> Result<String> {
        Err(Errno::EINVAL)
    }

    /// Opens it. The default suits regular files and directories: a file whose contents are read and written through
    /// this inode.
    ///
    /// # Errors
    /// `ENXIO` for a Unix socket, what the device says for a device.
    fn open(self: Arc<Self>, flags: OpenFlags) -> Result<Arc<dyn File>>;

    /// Regular file: reads at a position; 0 at and beyond the end.
    ///
    /// # Errors
    /// `EISDIR` for directories.
    fn read_at(&self, position: u64, sink: &mut Sink<'_>) -> Result<usize> {
        let _ = (position, sink);
        Err(Errno::EISDIR)
    }

    /// Regular file: writes at a position, extending it.
    ///
    /// # Errors
    /// `EROFS`, `ENOSPC`, `EFBIG`.
    fn write_at(&self, position: u64, source: &mut Source<'_>) -> Result<usize> {
        let _ = (position, source);
        Err(Errno::EROFS)
    }

    /// Regular file: where the pages from `position` (page-aligned) lie, and how many bytes from there are
    /// mappable in one piece. `None`: the caller must copy.
    ///
    /// # Errors
    /// `ENODEV` if it cannot be mapped at all.
    fn map_source(&self, position: u64) -> Result<Option<(MapSource, u64)>> {
        let _ = position;
        Ok(None)
    }

    /// Regular file: makes the pages of a range ones that can be shared between mappings and the file: a following
    /// [`Inode::map_source`] gives [`MapSource::Pool`] for them. To be called before a shared mapping of a file that is
    /// open for writing.
    ///
    /// # Errors
    /// `ENODEV` where shared mappings are not offered, `ENOSPC` when no pages are left.
    fn prepare_shared(&self, position: u64, length: u64) -> Result<()> {
        let _ = (position, length);
        Err(Errno::ENODEV)
    }

    /// Regular file: bytes from `position` that can be read in place and never change (at least one, not necessarily
    /// all up to the end).
    fn in_place(&self, position: u64) -> Option<&'static [u8]> {
        let _ = position;
        None
    }

    /// Directory: makes a regular file without a name (`O_TMPFILE`).
    ///
    /// # Errors
    /// `EOPNOTSUPP` where it is not offered.
    fn create_unnamed(&self, creation: &Creation<'_>) -> Result<Arc<dyn Inode>> {
        let _ = creation;
        Err(Errno::EOPNOTSUPP)
    }

    /// Magic link (`/proc/self/fd/3`): where it leads, whatever its text says.
    fn jump(&self) -> Option<Result<vfs::Location>> {
        None
    }

    /// `fsync(2)`.
    ///
    /// # Errors
    /// What the file system says.
    fn synchronize(&self, data_only: bool) -> Result<()> {
        let _ = data_only;
        Ok(())
    }

    /// `fallocate(2)`; `mode` is `FALLOC_FL_*`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where it is not offered.
    fn allocate(&self, mode: u32, position: u64, length: u64) -> Result<()> {
        let _ = (mode, position, length);
        Err(Errno::EOPNOTSUPP)
    }

    /// Space of the file system.
    ///
    /// # Errors
    /// What the file system says.
    fn statistics(&self) -> Result<FileSystemStatistics>;

    /// Extended attribute; `ENODATA` when missing.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where there are none.
    fn attribute(&self, name: &str) -> Result<Vec<u8>> {
        let _ = name;
        Err(Errno::EOPNOTSUPP)
    }
}

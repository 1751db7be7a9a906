//! System calls on paths.

use alloc::{string::String, sync::Arc, vec::Vec};

use linux_raw_sys::general as linux;

use super::{Call, Entry, Outcome, Restart, file::attempt};
use crate::{
    Errno, Result,
    file::{OpenFile, OpenFlags, Readiness, pipe::PipeEnd, watch},
    fs::{
        FileSystemStatistics, Inode, Kind, Metadata, MetadataChange, Timestamp, device_parts,
        vfs::{EXECUTE, Identity, Location, Mount, PATH_MAX, Place, READ, Resolve, View, WRITE},
    },
    memory::user,
    task::Process,
    time::SECOND,
};

const NO_MOUNTS: &str = "always EPERM: volumes are chosen when an instance is started";
const NO_ATTRIBUTES: &str = "file systems without extended attributes: EOPNOTSUPP, and empty lists";

/// The supported calls.
pub const CALLS: &[Entry] = &[
    Entry {
        number: linux::__NR_open,
        name: "open",
        handler: open,
        limits: "",
    },
    Entry {
        number: linux::__NR_openat,
        name: "openat",
        handler: openat,
        limits: "",
    },
    Entry {
        number: linux::__NR_openat2,
        name: "openat2",
        handler: openat2,
        limits: "",
    },
    Entry {
        number: linux::__NR_creat,
        name: "creat",
        handler: creat,
        limits: "",
    },
    Entry {
        number: linux::__NR_stat,
        name: "stat",
        handler: stat,
        limits: "",
    },
    Entry {
        number: linux::__NR_lstat,
        name: "lstat",
        handler: lstat,
        limits: "",
    },
    Entry {
        number: linux::__NR_fstat,
        name: "fstat",
        handler: fstat,
        limits: "",
    },
    Entry {
        number: linux::__NR_newfstatat,
        name: "newfstatat",
        handler: newfstatat,
        limits: "",
    },
    Entry {
        number: linux::__NR_statx,
        name: "statx",
        handler: statx,
        limits: "",
    },
    Entry {
        number: linux::__NR_statfs,
        name: "statfs",
        handler: statfs,
        limits: "",
    },
    Entry {
        number: linux::__NR_fstatfs,
        name: "fstatfs",
        handler: fstatfs,
        limits: "",
    },
    Entry {
        number: linux::__NR_access,
        name: "access",
        handler: access,
        limits: "",
    },
    Entry {
        number: linux::__NR_faccessat,
        name: "faccessat",
        handler: faccessat,
        limits: "",
    },
    Entry {
        number: linux::__NR_faccessat2,
        name: "faccessat2",
        handler: faccessat2,
        limits: "",
    },
    Entry {
        number: linux::__NR_getcwd,
        name: "getcwd",
        handler: getcwd,
        limits: "",
    },
    Entry {
        number: linux::__NR_chdir,
        name: "chdir",
        handler: chdir,
        limits: "",
    },
    Entry {
        number: linux::__NR_fchdir,
        name: "fchdir",
        handler: fchdir,
        limits: "",
    },
    Entry {
        number: linux::__NR_chroot,
        name: "chroot",
        handler: chroot,
        limits: "",
    },
    Entry {
        number: linux::__NR_mkdir,
        name: "mkdir",
        handler: mkdir,
        limits: "",
    },
    Entry {
        number: linux::__NR_mkdirat,
        name: "mkdirat",
        handler: mkdirat,
        limits: "",
    },
    Entry {
        number: linux::__NR_mknod,
        name: "mknod",
        handler: mknod,
        limits: "",
    },
    Entry {
        number: linux::__NR_mknodat,
        name: "mknodat",
        handler: mknodat,
        limits: "",
    },
    Entry {
        number: linux::__NR_rmdir,
        name: "rmdir",
        handler: rmdir,
        limits: "",
    },
    Entry {
        number: linux::__NR_unlink,
        name: "unlink",
        handler: unlink,
        limits: "",
    },
    Entry {
        number: linux::__NR_unlinkat,
        name: "unlinkat",
        handler: unlinkat,
        limits: "",
    },
    Entry {
        number: linux::__NR_rename,
        name: "rename",
        handler: rename,
        limits: "",
    },
    Entry {
        number: linux::__NR_renameat,
        name: "renameat",
        handler: renameat,
        limits: "",
    },
    Entry {
        number: linux::__NR_renameat2,
        name: "renameat2",
        handler: renameat2,
        limits: "no RENAME_WHITEOUT",
    },
    Entry {
        number: linux::__NR_link,
        name: "link",
        handler: link,
        limits: "",
    },
    Entry {
        number: linux::__NR_linkat,
        name: "linkat",
        handler: linkat,
        limits: "",
    },
    Entry {
        number: linux::__NR_symlink,
        name: "symlink",
        handler: symlink,
        limits: "",
    },
    Entry {
        number: linux::__NR_symlinkat,
        name: "symlinkat",
        handler: symlinkat,
        limits: "",
    },
    Entry {
        number: linux::__NR_readlink,
        name: "readlink",
        handler: readlink,
        limits: "",
    },
    Entry {
        number: linux::__NR_readlinkat,
        name: "readlinkat",
        handler: readlinkat,
        limits: "",
    },
    Entry {
        number: linux::__NR_chmod,
        name: "chmod",
        handler: chmod,
        limits: "",
    },
    Entry {
        number: linux::__NR_fchmod,
        name: "fchmod",
        handler: fchmod,
        limits: "",
    },
    Entry {
        number: linux::__NR_fchmodat,
        name: "fchmodat",
        handler: fchmodat,
        limits: "",
    },
    Entry {
        number: linux::__NR_fchmodat2,
        name: "fchmodat2",
        handler: fchmodat2,
        limits: "",
    },
    Entry {
        number: linux::__NR_chown,
        name: "chown",
        handler: chown,
        limits: "",
    },
    Entry {
        number: linux::__NR_fchown,
        name: "fchown",
        handler: fchown,
        limits: "",
    },
    Entry {
        number: linux::__NR_lchown,
        name: "lchown",
        handler: lchown,
        limits: "",
    },
    Entry {
        number: linux::__NR_fchownat,
        name: "fchownat",
        handler: fchownat,
        limits: "",
    },
    Entry {
        number: linux::__NR_utime,
        name: "utime",
        handler: utime,
        limits: "",
    },
    Entry {
        number: linux::__NR_utimes,
        name: "utimes",
        handler: utimes,
        limits: "",
    },
    Entry {
        number: linux::__NR_futimesat,
        name: "futimesat",
        handler: futimesat,
        limits: "",
    },
    Entry {
        number: linux::__NR_utimensat,
        name: "utimensat",
        handler: utimensat,
        limits: "",
    },
    Entry {
        number: linux::__NR_truncate,
        name: "truncate",
        handler: truncate,
        limits: "",
    },
    Entry {
        number: linux::__NR_umask,
        name: "umask",
        handler: umask,
        limits: "",
    },
    Entry {
        number: linux::__NR_mount,
        name: "mount",
        handler: not_permitted,
        limits: NO_MOUNTS,
    },
    Entry {
        number: linux::__NR_umount2,
        name: "umount2",
        handler: not_permitted,
        limits: NO_MOUNTS,
    },
    Entry {
        number: linux::__NR_getxattr,
        name: "getxattr",
        handler: getxattr,
        limits: NO_ATTRIBUTES,
    },
    Entry {
        number: linux::__NR_lgetxattr,
        name: "lgetxattr",
        handler: lgetxattr,
        limits: NO_ATTRIBUTES,
    },
    Entry {
        number: linux::__NR_fgetxattr,
        name: "fgetxattr",
        handler: fgetxattr,
        limits: NO_ATTRIBUTES,
    },
    Entry {
        number: linux::__NR_listxattr,
        name: "listxattr",
        handler: listxattr,
        limits: NO_ATTRIBUTES,
    },
    Entry {
        number: linux::__NR_llistxattr,
        name: "llistxattr",
        handler: llistxattr,
        limits: NO_ATTRIBUTES,
    },
    Entry {
        number: linux::__NR_flistxattr,
        name: "flistxattr",
        handler: flistxattr,
        limits: NO_ATTRIBUTES,
    },
    Entry {
        number: linux::__NR_setxattr,
        name: "setxattr",
        handler: setxattr,
        limits: NO_ATTRIBUTES,
    },
    Entry {
        number: linux::__NR_lsetxattr,
        name: "lsetxattr",
        handler: setxattr,
        limits: NO_ATTRIBUTES,
    },
    Entry {
        number: linux::__NR_fsetxattr,
        name: "fsetxattr",
        handler: fsetxattr,
        limits: NO_ATTRIBUTES,
    },
    Entry {
        number: linux::__NR_removexattr,
        name: "removexattr",
        handler: setxattr,
        limits: NO_ATTRIBUTES,
    },
    Entry {
        number: linux::__NR_lremovexattr,
        name: "lremovexattr",
        handler: setxattr,
        limits: NO_ATTRIBUTES,
    },
    Entry {
        number: linux::__NR_fremovexattr,
        name: "fremovexattr",
        handler: fsetxattr,
        limits: NO_ATTRIBUTES,
    },
];

/// What paths mean to the calling thread.
#[must_use]
pub fn view(call: &Call<'_>) -> View {
    let credentials = call.thread.credentials();
    let identity = Identity {
        uid: credentials.effective_uid(),
        gid: credentials.effective_gid(),
        groups: credentials.groups,
    };
    let context = call.process().file_system.lock();
    View {
        root: context.root.clone(),
        working_directory: context.working_directory.clone(),
        identity,
        umask: context.umask,
    }
}

fn place_of(process: &Process, descriptor: i32) -> Result<Location> {
    let file = process.file(descriptor)?;
    let place = file
        .file
        .as_any()
        .downcast_ref::<Place>()
        .ok_or(Errno::ENOTDIR)?;
    Ok(place.location().clone())
}

/// Where a relative path starts.
fn base(process: &Process, view: &View, directory: i32, path: &str) -> Result<Location> {
    if directory == linux::AT_FDCWD || path.starts_with('/') {
        return Ok(view.working_directory.clone());
    }
    let location = place_of(process, directory)?;
    if location.inode().metadata()?.kind == Kind::Directory {
        Ok(location)
    } else {
        Err(Errno::ENOTDIR)
    }
}

/// A file that a call names: by descriptor, or by path.
enum Named {
    File(Arc<OpenFile>),
    Found(Arc<dyn Inode>, Arc<Mount>),
}

impl Named {
    fn metadata(&self) -> Result<Metadata> {
        match self {
            Named::File(file) => file.file.metadata(),
            Named::Found(inode, _) => inode.metadata(),
        }
    }

    fn inode(&self) -> Option<&Arc<dyn Inode>> {
        match self {
            Named::File(file) => file.file.inode(),
            Named::Found(inode, _) => Some(inode),
        }
    }

    fn mount_identifier(&self) -> u64 {
        match self {
            Named::Found(_, mount) => mount.identifier,
            Named::File(_) => 0,
        }
    }
}

fn resolve_flag(flags: u32) -> Resolve {
    if flags & linux::AT_SYMLINK_NOFOLLOW != 0 {
        Resolve::empty()
    } else {
        Resolve::FOLLOW
    }
}

/// Finds the file that a directory, a path and `AT_*` flags name.
fn named(call: &Call<'_>, directory: i32, path: u64, flags: u32) -> Result<Named> {
    // An address of nothing with AT_EMPTY_PATH means the descriptor too (since Linux 6.11).
    let path = if path == 0 && flags & linux::AT_EMPTY_PATH != 0 {
        String::new()
    } else {
        user::read_path(path)?
    };
    if path.is_empty() && flags & linux::AT_EMPTY_PATH != 0 {
        if directory != linux::AT_FDCWD {
            return Ok(Named::File(call.process().file(directory)?));
        }
        let place = call.process().file_system.lock().working_directory.clone();
        return Ok(Named::Found(
            Arc::clone(place.inode()),
            Arc::clone(place.mount()),
        ));
    }
    let view = view(call);
    let base = base(call.process(), &view, directory, &path)?;
    let walk = view.find(&base, &path, resolve_flag(flags))?;
    Ok(Named::Found(
        Arc::clone(walk.inode()),
        Arc::clone(walk.mount()),
    ))
}

/// Changes attributes of a named file.
fn change(call: &Call<'_>, named: &Named, change: &MetadataChange) -> Result<()> {
    let view = view(call);
    match named {
        Named::Found(inode, mount) => view.change(inode, mount, change),
        Named::File(file) => {
            let Some(inode) = file.file.inode() else {
                // Pipes and sockets have attributes that nobody keeps; Linux allows changing them.
                return Ok(());
            };
            match file.file.as_any().downcast_ref::<Place>() {
                Some(place) => view.change(inode, place.location().mount(), change),
                None => view.change(inode, view.root.mount(), change),
            }
        }
    }
}

const OPEN_FLAGS: u32 = OpenFlags::all().bits();

fn open_path(
    call: &Call<'_>,
    directory: i32,
    path: u64,
    flags: u32,
    mode: u32,
    resolve: Resolve,
) -> Outcome {
    let flags = OpenFlags::from_bits_truncate(flags);
    let path = attempt!(user::read_path(path));
    let view = view(call);
    let base = if resolve.intersects(Resolve::BENEATH | Resolve::IN_ROOT)
        && directory != linux::AT_FDCWD
    {
        attempt!(place_of(call.process(), directory))
    } else {
        attempt!(base(call.process(), &view, directory, &path))
    };
    let file = attempt!(view.open(&base, &path, flags, mode, resolve));
    let close_on_exec = flags.contains(OpenFlags::CLOSE_ON_EXEC);
    if let Some(end) = file.file.as_any().downcast_ref::<PipeEnd>()
        && end.is_named()
        && !flags.contains(OpenFlags::NON_BLOCKING)
        && !end.peer_has_come()
    {
        return wait_for_peer(Arc::clone(call.process()), file, close_on_exec);
    }
    call.process().add_file(file, close_on_exec).into()
}

/// The opening of a named pipe ends when somebody opens its other side.
fn wait_for_peer(process: Arc<Process>, file: Arc<OpenFile>, close_on_exec: bool) -> Outcome {
    Outcome::wait(Restart::WithFlag, async move {
        let waiting = Arc::clone(&file);
        let come = move || match waiting.file.as_any().downcast_ref::<PipeEnd>() {
            Some(end) if !end.peer_has_come() => Err(Errno::EAGAIN),
            _ => Ok(()),
        };
        let interest = Readiness::READABLE | Readiness::WRITABLE;
        watch::retry(Arc::clone(&file.file), interest, come).await?;
        process
            .add_file(file, close_on_exec)
            .map(|number| number as u64)
    })
}

fn open(call: &mut Call<'_>) -> Outcome {
    open_path(
        call,
        linux::AT_FDCWD,
        call.raw(0),
        call.unsigned(1),
        call.unsigned(2),
        Resolve::empty(),
    )
}

fn openat(call: &mut Call<'_>) -> Outcome {
    open_path(
        call,
        call.int(0),
        call.raw(1),
        call.unsigned(2),
        call.unsigned(3),
        Resolve::empty(),
    )
}

fn creat(call: &mut Call<'_>) -> Outcome {
    let flags = linux::O_CREAT | linux::O_WRONLY | linux::O_TRUNC;
    open_path(
        call,
        linux::AT_FDCWD,
        call.raw(0),
        flags,
        call.unsigned(1),
        Resolve::empty(),
    )
}

fn openat2(call: &mut Call<'_>) -> Outcome {
    let size = call.length(3);
    if size < core::mem::size_of::<linux::open_how>() {
        return Outcome::fail(Errno::EINVAL);
    }
    if size > 4096 {
        return Outcome::fail(Errno::E2BIG);
    }
    let bytes = attempt!(user::read_bytes(call.raw(2), size));
    let how = attempt!(user::from_bytes::<linux::open_how>(&bytes).ok_or(Errno::EINVAL));
    if bytes
        .iter()
        .skip(core::mem::size_of::<linux::open_how>())
        .any(|&byte| byte != 0)
    {
        return Outcome::fail(Errno::E2BIG);
    }
    let flags = attempt!(u32::try_from(how.flags).map_err(|_| Errno::EINVAL));
    let creates = flags & (linux::O_CREAT | linux::__O_TMPFILE) != 0;
    if flags & !OPEN_FLAGS != 0 || (!creates && how.mode != 0) || how.mode & !0o7777 != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    let mut resolve = Resolve::empty();
    let mut rest = how.resolve as u32;
    for (bit, meaning) in [
        (linux::RESOLVE_NO_SYMLINKS, Resolve::NO_LINKS),
        (linux::RESOLVE_NO_MAGICLINKS, Resolve::NO_MAGIC_LINKS),
        (linux::RESOLVE_NO_XDEV, Resolve::ONE_MOUNT),
        (linux::RESOLVE_BENEATH, Resolve::BENEATH),
        (linux::RESOLVE_IN_ROOT, Resolve::IN_ROOT),
        (linux::RESOLVE_CACHED, Resolve::empty()),
    ] {
        if rest & bit != 0 {
            resolve |= meaning;
            rest &= !bit;
        }
    }
    if rest != 0 || how.resolve >> 32 != 0 || resolve.contains(Resolve::BENEATH | Resolve::IN_ROOT)
    {
        return Outcome::fail(Errno::EINVAL);
    }
    open_path(
        call,
        call.int(0),
        call.raw(1),
        flags,
        how.mode as u32,
        resolve,
    )
}

/// Seconds since 1970 and nanoseconds.
#[inline(never)]
fn seconds(time: Timestamp) -> (u64, u64) {
    // Until the year 2262 a short division will do.
    if let (Ok(time), Ok(second)) = (i64::try_from(time), i64::try_from(SECOND)) {
        return (
            time.div_euclid(second).cast_unsigned(),
            time.rem_euclid(second).cast_unsigned(),
        );
    }
    let second = Timestamp::from(SECOND);
    (
        time.div_euclid(second) as u64,
        time.rem_euclid(second) as u64,
    )
}

fn write_stat(address: u64, metadata: &Metadata) -> Result<()> {
    let mut stat: linux::stat = user::zeroed();
    stat.st_dev = metadata.device;
    stat.st_ino = metadata.inode;
    stat.st_nlink = u64::from(metadata.links);
    stat.st_mode = metadata.kind.mode() | metadata.permissions;
    stat.st_uid = metadata.uid;
    stat.st_gid = metadata.gid;
    stat.st_rdev = metadata.special_device;
    stat.st_size = metadata.size.cast_signed();
    stat.st_blksize = i64::from(metadata.block_size);
    stat.st_blocks = metadata.blocks.cast_signed();
    (stat.st_atime, stat.st_atime_nsec) = seconds(metadata.accessed);
    (stat.st_mtime, stat.st_mtime_nsec) = seconds(metadata.modified);
    (stat.st_ctime, stat.st_ctime_nsec) = seconds(metadata.changed);
    user::write(address, &stat)
}

fn stat_path(call: &Call<'_>, directory: i32, path: u64, flags: u32, address: u64) -> Result<()> {
    write_stat(address, &named(call, directory, path, flags)?.metadata()?)
}

fn stat(call: &mut Call<'_>) -> Outcome {
    stat_path(call, linux::AT_FDCWD, call.raw(0), 0, call.raw(1)).into()
}

fn lstat(call: &mut Call<'_>) -> Outcome {
    stat_path(
        call,
        linux::AT_FDCWD,
        call.raw(0),
        linux::AT_SYMLINK_NOFOLLOW,
        call.raw(1),
    )
    .into()
}

fn fstat(call: &mut Call<'_>) -> Outcome {
    let file = attempt!(call.process().file(call.int(0)));
    file.file
        .metadata()
        .and_then(|metadata| write_stat(call.raw(1), &metadata))
        .into()
}

const STAT_FLAGS: u32 = linux::AT_SYMLINK_NOFOLLOW | linux::AT_EMPTY_PATH | linux::AT_NO_AUTOMOUNT;

fn newfstatat(call: &mut Call<'_>) -> Outcome {
    let flags = call.unsigned(3);
    if flags & !STAT_FLAGS != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    stat_path(call, call.int(0), call.raw(1), flags, call.raw(2)).into()
}

fn statx(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let (flags, mask) = (call.unsigned(2), call.unsigned(3));
        if flags & !(STAT_FLAGS | linux::AT_STATX_SYNC_TYPE) != 0
            || mask & linux::STATX__RESERVED != 0
        {
            return Err(Errno::EINVAL);
        }
        let named = named(call, call.int(0), call.raw(1), flags)?;
        let metadata = named.metadata()?;
        let time = |time: Timestamp| {
            let (seconds, nanoseconds) = seconds(time);
            (seconds.cast_signed(), nanoseconds as u32)
        };
        let mut statx: linux::statx = user::zeroed();
        statx.stx_mask = linux::STATX_BASIC_STATS | linux::STATX_MNT_ID;
        statx.stx_blksize = metadata.block_size;
        statx.stx_nlink = metadata.links;
        statx.stx_uid = metadata.uid;
        statx.stx_gid = metadata.gid;
        statx.stx_mode = (metadata.kind.mode() | metadata.permissions) as u16;
        statx.stx_ino = metadata.inode;
        statx.stx_size = metadata.size;
        statx.stx_blocks = metadata.blocks;
        (statx.stx_atime.tv_sec, statx.stx_atime.tv_nsec) = time(metadata.accessed);
        (statx.stx_mtime.tv_sec, statx.stx_mtime.tv_nsec) = time(metadata.modified);
        (statx.stx_ctime.tv_sec, statx.stx_ctime.tv_nsec) = time(metadata.changed);
        (statx.stx_rdev_major, statx.stx_rdev_minor) = device_parts(metadata.special_device);
        (statx.stx_dev_major, statx.stx_dev_minor) = device_parts(metadata.device);
        statx.stx_mnt_id = named.mount_identifier();
        user::write(call.raw(4), &statx)
    })();
    result.into()
}

fn write_statistics(address: u64, statistics: &FileSystemStatistics) -> Result<()> {
    /// `ST_RDONLY`, `ST_VALID`, `ST_RELATIME`.
    const READ_ONLY: i64 = 1;
    const VALID: i64 = 0x20;
    const RELATIVE_TIME: i64 = 0x1000;
    let mut answer: linux::statfs = user::zeroed();
    answer.f_type = statistics.magic.cast_signed();
    answer.f_bsize = statistics.block_size.cast_signed();
    answer.f_frsize = answer.f_bsize;
    answer.f_blocks = statistics.blocks.cast_signed();
    answer.f_bfree = statistics.blocks_free.cast_signed();
    answer.f_bavail = answer.f_bfree;
    answer.f_files = statistics.files.cast_signed();
    answer.f_ffree = statistics.files_free.cast_signed();
    answer.f_namelen = crate::fs::vfs::NAME_MAX as i64;
    answer.f_flags = VALID | RELATIVE_TIME | if statistics.read_only { READ_ONLY } else { 0 };
    user::write(address, &answer)
}

fn statfs(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let named = named(call, linux::AT_FDCWD, call.raw(0), 0)?;
        let mut statistics = named.inode().ok_or(Errno::ENOSYS)?.statistics()?;
        if let Named::Found(_, mount) = &named {
            statistics.read_only |= mount.read_only;
        }
        write_statistics(call.raw(1), &statistics)
    })();
    result.into()
}

fn fstatfs(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let file = call.process().file(call.int(0))?;
        let statistics = match file.file.inode() {
            Some(inode) => inode.statistics()?,
            None => FileSystemStatistics {
                magic: u64::from(match file.file.metadata()?.kind {
                    Kind::Fifo => linux::PIPEFS_MAGIC,
                    _ => linux::ANON_INODE_FS_MAGIC,
                }),
                block_size: 4096,
                ..FileSystemStatistics::default()
            },
        };
        write_statistics(call.raw(1), &statistics)
    })();
    result.into()
}

fn check_access(call: &Call<'_>, directory: i32, path: u64, mode: u32, flags: u32) -> Result<()> {
    if mode & !(READ | WRITE | EXECUTE) != 0
        || flags & !(linux::AT_EACCESS | linux::AT_SYMLINK_NOFOLLOW | linux::AT_EMPTY_PATH) != 0
    {
        return Err(Errno::EINVAL);
    }
    let mut identity = view(call).identity;
    if flags & linux::AT_EACCESS == 0 {
        // access(2) asks for the real user, so that set-user-id programs can check on behalf of their caller.
        let credentials = call.thread.credentials();
        identity.uid = credentials.uid[0];
        identity.gid = credentials.gid[0];
    }
    let named = named(call, directory, path, flags)?;
    let metadata = named.metadata()?;
    if mode & WRITE != 0
        && let Named::Found(_, mount) = &named
        && mount.read_only
        && matches!(
            metadata.kind,
            Kind::Regular | Kind::Directory | Kind::SymbolicLink
        )
    {
        return Err(Errno::EROFS);
    }
    identity.check(&metadata, mode)
}

fn access(call: &mut Call<'_>) -> Outcome {
    check_access(call, linux::AT_FDCWD, call.raw(0), call.unsigned(1), 0).into()
}

fn faccessat(call: &mut Call<'_>) -> Outcome {
    check_access(call, call.int(0), call.raw(1), call.unsigned(2), 0).into()
}

fn faccessat2(call: &mut Call<'_>) -> Outcome {
    check_access(
        call,
        call.int(0),
        call.raw(1),
        call.unsigned(2),
        call.unsigned(3),
    )
    .into()
}

fn getcwd(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let (root, place) = {
            let context = call.process().file_system.lock();
            (context.root.clone(), context.working_directory.clone())
        };
        if place.inode().metadata()?.links == 0 {
            return Err(Errno::ENOENT);
        }
        let mut bytes = visible_path(&root, &place).into_bytes();
        bytes.push(0);
        if bytes.len() > call.length(1) {
            return Err(Errno::ERANGE);
        }
        user::write_bytes(call.raw(0), &bytes)?;
        Ok(bytes.len())
    })();
    result.into()
}

/// A place's path as it is seen from a root.
fn visible_path(root: &Location, place: &Location) -> String {
    let (root, path) = (root.path(), place.path());
    if root == "/" {
        return path;
    }
    match path.strip_prefix(root.as_str()) {
        Some("") => String::from("/"),
        Some(rest) if rest.starts_with('/') => String::from(rest),
        // Linux says so too.
        _ => alloc::format!("(unreachable){path}"),
    }
}

/// A directory that may be entered.
fn directory_at(call: &Call<'_>, path: u64) -> Result<Location> {
    let path = user::read_path(path)?;
    let view = view(call);
    let walk = view.find(&view.working_directory, &path, Resolve::FOLLOW)?;
    enterable(&view, &walk.metadata()?)?;
    Ok(walk.location())
}

fn enterable(view: &View, metadata: &Metadata) -> Result<()> {
    if metadata.kind != Kind::Directory {
        return Err(Errno::ENOTDIR);
    }
    view.identity.check(metadata, EXECUTE)
}

fn chdir(call: &mut Call<'_>) -> Outcome {
    let place = attempt!(directory_at(call, call.raw(0)));
    call.process().file_system.lock().working_directory = place;
    Outcome::Done(Ok(0))
}

fn fchdir(call: &mut Call<'_>) -> Outcome {
    let place = attempt!(place_of(call.process(), call.int(0)));
    attempt!(
        place
            .inode()
            .metadata()
            .and_then(|metadata| enterable(&view(call), &metadata))
    );
    call.process().file_system.lock().working_directory = place;
    Outcome::Done(Ok(0))
}

fn chroot(call: &mut Call<'_>) -> Outcome {
    let place = attempt!(directory_at(call, call.raw(0)));
    if !call.thread.credentials().is_privileged() {
        return Outcome::fail(Errno::EPERM);
    }
    call.process().file_system.lock().root = place;
    Outcome::Done(Ok(0))
}

fn make(
    call: &Call<'_>,
    directory: i32,
    path: u64,
    kind: Kind,
    mode: u32,
    target: &str,
    device: u64,
) -> Result<()> {
    let path = user::read_path(path)?;
    let view = view(call);
    let base = base(call.process(), &view, directory, &path)?;
    view.create(&base, &path, kind, mode, target, device)
        .map(drop)
}

fn mkdir(call: &mut Call<'_>) -> Outcome {
    make(
        call,
        linux::AT_FDCWD,
        call.raw(0),
        Kind::Directory,
        call.unsigned(1) & 0o1777,
        "",
        0,
    )
    .into()
}

fn mkdirat(call: &mut Call<'_>) -> Outcome {
    make(
        call,
        call.int(0),
        call.raw(1),
        Kind::Directory,
        call.unsigned(2) & 0o1777,
        "",
        0,
    )
    .into()
}

fn make_node(call: &Call<'_>, directory: i32, path: u64, mode: u32, device: u64) -> Result<()> {
    let kind = match mode & linux::S_IFMT {
        0 => Kind::Regular,
        _ => Kind::from_mode(mode).ok_or(Errno::EINVAL)?,
    };
    match kind {
        Kind::Directory => return Err(Errno::EPERM),
        Kind::SymbolicLink => return Err(Errno::EINVAL),
        Kind::CharacterDevice | Kind::BlockDevice if !call.thread.credentials().is_privileged() => {
            return Err(Errno::EPERM);
        }
        _ => {}
    }
    make(call, directory, path, kind, mode, "", device)
}

fn mknod(call: &mut Call<'_>) -> Outcome {
    make_node(
        call,
        linux::AT_FDCWD,
        call.raw(0),
        call.unsigned(1),
        u64::from(call.unsigned(2)),
    )
    .into()
}

fn mknodat(call: &mut Call<'_>) -> Outcome {
    make_node(
        call,
        call.int(0),
        call.raw(1),
        call.unsigned(2),
        u64::from(call.unsigned(3)),
    )
    .into()
}

fn make_link(call: &Call<'_>, target: u64, directory: i32, path: u64) -> Result<()> {
    let target = user::read_path(target)?;
    if target.is_empty() {
        return Err(Errno::ENOENT);
    }
    make(call, directory, path, Kind::SymbolicLink, 0o777, &target, 0)
}

fn symlink(call: &mut Call<'_>) -> Outcome {
    make_link(call, call.raw(0), linux::AT_FDCWD, call.raw(1)).into()
}

fn symlinkat(call: &mut Call<'_>) -> Outcome {
    make_link(call, call.raw(0), call.int(1), call.raw(2)).into()
}

fn remove(call: &Call<'_>, directory: i32, path: u64, is_directory: bool) -> Result<()> {
    let path = user::read_path(path)?;
    let view = view(call);
    let base = base(call.process(), &view, directory, &path)?;
    view.remove(&base, &path, is_directory)
}

fn rmdir(call: &mut Call<'_>) -> Outcome {
    remove(call, linux::AT_FDCWD, call.raw(0), true).into()
}

fn unlink(call: &mut Call<'_>) -> Outcome {
    remove(call, linux::AT_FDCWD, call.raw(0), false).into()
}

fn unlinkat(call: &mut Call<'_>) -> Outcome {
    let flags = call.unsigned(2);
    if flags & !linux::AT_REMOVEDIR != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    remove(call, call.int(0), call.raw(1), flags != 0).into()
}

fn move_name(call: &Call<'_>, old: (i32, u64), new: (i32, u64), flags: u32) -> Result<()> {
    let (old_path, new_path) = (user::read_path(old.1)?, user::read_path(new.1)?);
    let view = view(call);
    let old_base = base(call.process(), &view, old.0, &old_path)?;
    let new_base = base(call.process(), &view, new.0, &new_path)?;
    view.rename(&old_base, &old_path, &new_base, &new_path, flags)
}

fn rename(call: &mut Call<'_>) -> Outcome {
    move_name(
        call,
        (linux::AT_FDCWD, call.raw(0)),
        (linux::AT_FDCWD, call.raw(1)),
        0,
    )
    .into()
}

fn renameat(call: &mut Call<'_>) -> Outcome {
    move_name(
        call,
        (call.int(0), call.raw(1)),
        (call.int(2), call.raw(3)),
        0,
    )
    .into()
}

fn renameat2(call: &mut Call<'_>) -> Outcome {
    move_name(
        call,
        (call.int(0), call.raw(1)),
        (call.int(2), call.raw(3)),
        call.unsigned(4),
    )
    .into()
}

fn add_name(call: &Call<'_>, old: (i32, u64), new: (i32, u64), flags: u32) -> Result<()> {
    if flags & !(linux::AT_SYMLINK_FOLLOW | linux::AT_EMPTY_PATH) != 0 {
        return Err(Errno::EINVAL);
    }
    let (old_path, new_path) = (user::read_path(old.1)?, user::read_path(new.1)?);
    let view = view(call);
    let new_base = base(call.process(), &view, new.0, &new_path)?;
    let follow = if flags & linux::AT_SYMLINK_FOLLOW != 0 {
        Resolve::FOLLOW
    } else {
        Resolve::empty()
    };
    if old_path.is_empty() && flags & linux::AT_EMPTY_PATH != 0 {
        // A file without a name gets one: what O_TMPFILE is made for.
        let file = call.process().file(old.0)?;
        let inode = file.file.inode().ok_or(Errno::EXDEV)?;
        let place = match file.file.as_any().downcast_ref::<Place>() {
            Some(place) => place.location().clone(),
            None => Location::detached(Arc::clone(inode), &new_base, String::new()),
        };
        return view.link(&view.at(&place), &new_base, &new_path);
    }
    let old_base = base(call.process(), &view, old.0, &old_path)?;
    let walk = view.find(&old_base, &old_path, follow)?;
    view.link(&walk, &new_base, &new_path)
}

fn link(call: &mut Call<'_>) -> Outcome {
    add_name(
        call,
        (linux::AT_FDCWD, call.raw(0)),
        (linux::AT_FDCWD, call.raw(1)),
        0,
    )
    .into()
}

fn linkat(call: &mut Call<'_>) -> Outcome {
    add_name(
        call,
        (call.int(0), call.raw(1)),
        (call.int(2), call.raw(3)),
        call.unsigned(4),
    )
    .into()
}

fn read_link(call: &Call<'_>, directory: i32, path: u64, buffer: u64, size: i32) -> Result<usize> {
    let size = usize::try_from(size)
        .ok()
        .filter(|&size| size > 0)
        .ok_or(Errno::EINVAL)?;
    let path = user::read_path(path)?;
    let target = if path.is_empty() && directory != linux::AT_FDCWD {
        let file = call.process().file(directory)?;
        let inode = file
            .file
            .inode()
            .filter(|inode| inode.is_symbolic_link())
            .ok_or(Errno::ENOENT)?;
        inode.target()?
    } else {
        let view = view(call);
        let base = base(call.process(), &view, directory, &path)?;
        view.find(&base, &path, Resolve::empty())?
            .inode()
            .target()?
    };
    let bytes = target.as_bytes();
    let bytes = &bytes[..bytes.len().min(size)];
    user::write_bytes(buffer, bytes)?;
    Ok(bytes.len())
}

fn readlink(call: &mut Call<'_>) -> Outcome {
    read_link(call, linux::AT_FDCWD, call.raw(0), call.raw(1), call.int(2)).into()
}

fn readlinkat(call: &mut Call<'_>) -> Outcome {
    read_link(call, call.int(0), call.raw(1), call.raw(2), call.int(3)).into()
}

fn set_permissions(call: &Call<'_>, named: &Named, mode: u32) -> Result<()> {
    if named.inode().is_some_and(|inode| inode.is_symbolic_link()) {
        return Err(Errno::EOPNOTSUPP);
    }
    change(
        call,
        named,
        &MetadataChange {
            permissions: Some(mode & 0o7777),
            ..MetadataChange::default()
        },
    )
}

fn chmod(call: &mut Call<'_>) -> Outcome {
    named(call, linux::AT_FDCWD, call.raw(0), 0)
        .and_then(|named| set_permissions(call, &named, call.unsigned(1)))
        .into()
}

fn descriptor(call: &Call<'_>, number: i32) -> Result<Named> {
    let file = call.process().file(number)?;
    if file.flags().contains(OpenFlags::PATH) {
        Err(Errno::EBADF)
    } else {
        Ok(Named::File(file))
    }
}

fn fchmod(call: &mut Call<'_>) -> Outcome {
    descriptor(call, call.int(0))
        .and_then(|named| set_permissions(call, &named, call.unsigned(1)))
        .into()
}

fn fchmodat(call: &mut Call<'_>) -> Outcome {
    named(call, call.int(0), call.raw(1), 0)
        .and_then(|named| set_permissions(call, &named, call.unsigned(2)))
        .into()
}

fn fchmodat2(call: &mut Call<'_>) -> Outcome {
    let flags = call.unsigned(3);
    if flags & !(linux::AT_SYMLINK_NOFOLLOW | linux::AT_EMPTY_PATH) != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    named(call, call.int(0), call.raw(1), flags)
        .and_then(|named| set_permissions(call, &named, call.unsigned(2)))
        .into()
}

fn set_owner(call: &Call<'_>, named: &Named, uid: u32, gid: u32) -> Result<()> {
    let given = |id: u32| (id != u32::MAX).then_some(id);
    change(
        call,
        named,
        &MetadataChange {
            uid: given(uid),
            gid: given(gid),
            ..MetadataChange::default()
        },
    )
}

fn chown(call: &mut Call<'_>) -> Outcome {
    named(call, linux::AT_FDCWD, call.raw(0), 0)
        .and_then(|named| set_owner(call, &named, call.unsigned(1), call.unsigned(2)))
        .into()
}

fn lchown(call: &mut Call<'_>) -> Outcome {
    named(
        call,
        linux::AT_FDCWD,
        call.raw(0),
        linux::AT_SYMLINK_NOFOLLOW,
    )
    .and_then(|named| set_owner(call, &named, call.unsigned(1), call.unsigned(2)))
    .into()
}

fn fchown(call: &mut Call<'_>) -> Outcome {
    descriptor(call, call.int(0))
        .and_then(|named| set_owner(call, &named, call.unsigned(1), call.unsigned(2)))
        .into()
}

fn fchownat(call: &mut Call<'_>) -> Outcome {
    let flags = call.unsigned(4);
    if flags & !(linux::AT_SYMLINK_NOFOLLOW | linux::AT_EMPTY_PATH) != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    named(call, call.int(0), call.raw(1), flags)
        .and_then(|named| set_owner(call, &named, call.unsigned(2), call.unsigned(3)))
        .into()
}

/// A time to set.
#[derive(Clone, Copy, PartialEq, Eq)]
enum NewTime {
    Now,
    Keep,
    At(Timestamp),
}

fn set_times(call: &Call<'_>, named: &Named, accessed: NewTime, modified: NewTime) -> Result<()> {
    if accessed == NewTime::Keep && modified == NewTime::Keep {
        return Ok(());
    }
    let view = view(call);
    if !view.identity.is_root() {
        let metadata = named.metadata()?;
        let owner = metadata.uid == view.identity.uid;
        if accessed == NewTime::Now && modified == NewTime::Now {
            if !owner {
                view.identity.check(&metadata, WRITE)?;
            }
        } else if !owner {
            return Err(Errno::EPERM);
        }
    }
    let now = Timestamp::from(call.kernel().clock.realtime());
    let time = |new| match new {
        NewTime::Now => Some(now),
        NewTime::Keep => None,
        NewTime::At(time) => Some(time),
    };
    change(
        call,
        named,
        &MetadataChange {
            accessed: time(accessed),
            modified: time(modified),
            ..MetadataChange::default()
        },
    )
}

fn utime(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let named = named(call, linux::AT_FDCWD, call.raw(0), 0)?;
        if call.raw(1) == 0 {
            return set_times(call, &named, NewTime::Now, NewTime::Now);
        }
        let [accessed, modified]: [u64; 2] = user::read(call.raw(1))?;
        let at = |seconds: u64| {
            NewTime::At(Timestamp::from(seconds.cast_signed()) * Timestamp::from(SECOND))
        };
        set_times(call, &named, at(accessed), at(modified))
    })();
    result.into()
}

/// Two times of a `struct timeval` array; nothing means now.
fn read_timevals(address: u64) -> Result<(NewTime, NewTime)> {
    if address == 0 {
        return Ok((NewTime::Now, NewTime::Now));
    }
    let times: Vec<linux::timeval> = user::read_many(address, 2)?;
    let mut new = times.iter().map(|time| {
        if !(0..1_000_000).contains(&time.tv_usec) {
            return Err(Errno::EINVAL);
        }
        Ok(NewTime::At(
            Timestamp::from(time.tv_sec) * Timestamp::from(SECOND)
                + Timestamp::from(time.tv_usec) * 1000,
        ))
    });
    match (new.next(), new.next()) {
        (Some(accessed), Some(modified)) => Ok((accessed?, modified?)),
        _ => Err(Errno::EFAULT),
    }
}

fn utimes(call: &mut Call<'_>) -> Outcome {
    let (accessed, modified) = attempt!(read_timevals(call.raw(1)));
    named(call, linux::AT_FDCWD, call.raw(0), 0)
        .and_then(|named| set_times(call, &named, accessed, modified))
        .into()
}

fn futimesat(call: &mut Call<'_>) -> Outcome {
    let (accessed, modified) = attempt!(read_timevals(call.raw(2)));
    let named = if call.raw(1) == 0 {
        descriptor(call, call.int(0))
    } else {
        named(call, call.int(0), call.raw(1), 0)
    };
    named
        .and_then(|named| set_times(call, &named, accessed, modified))
        .into()
}

fn utimensat(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let flags = call.unsigned(3);
        if flags & !(linux::AT_SYMLINK_NOFOLLOW | linux::AT_EMPTY_PATH) != 0 {
            return Err(Errno::EINVAL);
        }
        let (mut accessed, mut modified) = (NewTime::Now, NewTime::Now);
        if call.raw(2) != 0 {
            let times: Vec<linux::timespec> = user::read_many(call.raw(2), 2)?;
            let new = |time: &linux::timespec| match time.tv_nsec as u64 {
                nanoseconds if nanoseconds == u64::from(linux::UTIME_NOW) => Ok(NewTime::Now),
                nanoseconds if nanoseconds == u64::from(linux::UTIME_OMIT) => Ok(NewTime::Keep),
                nanoseconds if nanoseconds < SECOND => Ok(NewTime::At(
                    Timestamp::from(time.tv_sec) * Timestamp::from(SECOND)
                        + Timestamp::from(nanoseconds),
                )),
                _ => Err(Errno::EINVAL),
            };
            if let [first, second] = times.as_slice() {
                (accessed, modified) = (new(first)?, new(second)?);
            }
        }
        // Without a path the descriptor is meant: what futimens(3) does.
        let named = if call.raw(1) == 0 && call.int(0) != linux::AT_FDCWD {
            descriptor(call, call.int(0))?
        } else {
            named(call, call.int(0), call.raw(1), flags)?
        };
        set_times(call, &named, accessed, modified)
    })();
    result.into()
}

fn truncate(call: &mut Call<'_>) -> Outcome {
    let result = (|| {
        let size = u64::try_from(call.raw(1).cast_signed()).map_err(|_| Errno::EINVAL)?;
        let named = named(call, linux::AT_FDCWD, call.raw(0), 0)?;
        let metadata = named.metadata()?;
        match metadata.kind {
            Kind::Regular => {}
            Kind::Directory => return Err(Errno::EISDIR),
            _ => return Err(Errno::EINVAL),
        }
        view(call).identity.check(&metadata, WRITE)?;
        change(
            call,
            &named,
            &MetadataChange {
                size: Some(size),
                ..MetadataChange::default()
            },
        )
    })();
    result.into()
}

fn umask(call: &mut Call<'_>) -> Outcome {
    let mut context = call.process().file_system.lock();
    let old = core::mem::replace(&mut context.umask, call.unsigned(0) & 0o777);
    drop(context);
    Ok(old).into()
}

fn not_permitted(_: &mut Call<'_>) -> Outcome {
    Outcome::fail(Errno::EPERM)
}

fn attribute(call: &Call<'_>, named: &Named) -> Result<usize> {
    let name = user::read_c_string(call.raw(1), 256).map_err(|error| match error {
        Errno::ENAMETOOLONG => Errno::ERANGE,
        error => error,
    })?;
    let name = core::str::from_utf8(&name).map_err(|_| Errno::EOPNOTSUPP)?;
    let value = named.inode().ok_or(Errno::EOPNOTSUPP)?.attribute(name)?;
    let room = call.length(3);
    if room == 0 {
        return Ok(value.len());
    }
    if value.len() > room {
        return Err(Errno::ERANGE);
    }
    user::write_bytes(call.raw(2), &value)?;
    Ok(value.len())
}

fn getxattr(call: &mut Call<'_>) -> Outcome {
    named(call, linux::AT_FDCWD, call.raw(0), 0)
        .and_then(|named| attribute(call, &named))
        .into()
}

fn lgetxattr(call: &mut Call<'_>) -> Outcome {
    named(
        call,
        linux::AT_FDCWD,
        call.raw(0),
        linux::AT_SYMLINK_NOFOLLOW,
    )
    .and_then(|named| attribute(call, &named))
    .into()
}

fn fgetxattr(call: &mut Call<'_>) -> Outcome {
    descriptor(call, call.int(0))
        .and_then(|named| attribute(call, &named))
        .into()
}

fn listxattr(call: &mut Call<'_>) -> Outcome {
    named(call, linux::AT_FDCWD, call.raw(0), 0)
        .map(drop)
        .into()
}

fn llistxattr(call: &mut Call<'_>) -> Outcome {
    named(
        call,
        linux::AT_FDCWD,
        call.raw(0),
        linux::AT_SYMLINK_NOFOLLOW,
    )
    .map(drop)
    .into()
}

fn flistxattr(call: &mut Call<'_>) -> Outcome {
    descriptor(call, call.int(0)).map(drop).into()
}

fn setxattr(call: &mut Call<'_>) -> Outcome {
    attempt!(user::read_c_string(call.raw(0), PATH_MAX));
    Outcome::fail(Errno::EOPNOTSUPP)
}

fn fsetxattr(call: &mut Call<'_>) -> Outcome {
    attempt!(descriptor(call, call.int(0)));
    Outcome::fail(Errno::EOPNOTSUPP)
}

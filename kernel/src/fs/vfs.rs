//! Mounts, path resolution and permissions: what lies between system calls and file systems.
//!
//! * [`Location`] is a place in the tree: an inode, the mount it belongs to, and the way up.
//! * [`Mount`] joins file systems.
//! * [`View`] is what a path means to one caller: its root, its working directory, who it is. Its methods are the path
//!   operations of Linux, with Linux's errors.
//!
//! A location's inode must be the same object whenever the same file is looked up while somebody holds it: mount points
//! are found by the inode's address. All file systems here keep to that.

use alloc::{
    boxed::Box,
    string::{String, ToString},
    sync::{Arc, Weak},
    vec::Vec,
};
use core::any::Any;

use bitflags::bitflags;
use linux_raw_sys::general as linux;

use super::{Creation, FileSystemStatistics, Inode, Kind, Metadata, MetadataChange};
use crate::{
    Errno, Result,
    file::{File, OpenFile, OpenFlags, console::Console, pipe::PipeEnd},
    sync::Mutex,
};

/// Most bytes in a name.
pub const NAME_MAX: usize = 255;
/// Most bytes in a path, the final zero included.
pub const PATH_MAX: usize = 4096;
/// Most symbolic links on the way to a file.
const LINK_LIMIT: u32 = 40;

/// Permission to search or execute.
pub const EXECUTE: u32 = linux::X_OK;
/// Permission to write.
pub const WRITE: u32 = linux::W_OK;
/// Permission to read.
pub const READ: u32 = linux::R_OK;

/// Who acts: the identity that file permissions are checked against.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// User; 0 may do everything.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

impl Identity {
    /// Whether this is the superuser, whom permissions do not stop.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.uid == 0
    }

    fn in_group(&self, gid: u32) -> bool {
        self.gid == gid || self.groups.contains(&gid)
    }

    /// Checks that all of `mask` ([`READ`], [`WRITE`], [`EXECUTE`]) is allowed.
    ///
    /// # Errors
    /// `EACCES`.
    pub fn check(&self, metadata: &Metadata, mask: u32) -> Result<()> {
        if self.is_root() {
            // Executing needs somebody's execute bit, but for directories.
            let executable = metadata.kind == Kind::Directory || metadata.permissions & 0o111 != 0;
            return if mask & EXECUTE == 0 || executable {
                Ok(())
            } else {
                Err(Errno::EACCES)
            };
        }
        let shift = if metadata.uid == self.uid {
            6
        } else if self.in_group(metadata.gid) {
            3
        } else {
            0
        };
        if (metadata.permissions >> shift) & mask == mask {
            Ok(())
        } else {
            Err(Errno::EACCES)
        }
    }
}

/// A covered directory, and what covers it.
type MountPoint = (Arc<dyn Inode>, Arc<Mount>);

/// A file system in the tree.
pub struct Mount {
    /// Number shown in `/proc/self/mountinfo` and by `statx`.
    pub identifier: u64,
    /// Kind: `tmpfs`, `proc`.
    pub kind: &'static str,
    /// What is mounted, as `/proc/mounts` shows it.
    pub source: &'static str,
    /// No changes allowed.
    pub read_only: bool,
    /// Where it is mounted, as an absolute path.
    pub path: String,
    root: Arc<dyn Inode>,
    /// Mounts on directories of this one.
    children: Mutex<Vec<MountPoint>>,
    /// Locations in this mount that somebody may still hold: a rename changes their paths.
    locations: Mutex<Vec<Weak<Entry>>>,
    /// Work put off.
    later: Mutex<Vec<Later>>,
}

/// What is done before somebody looks for one of some names for the first time.
struct Later {
    names: &'static [&'static str],
    work: Box<dyn FnOnce() + Send + Sync>,
}

/// What to mount.
pub struct MountSource {
    /// Kind: `tmpfs`, `proc`.
    pub kind: &'static str,
    /// What is mounted, as `/proc/mounts` shows it.
    pub source: &'static str,
    /// No changes allowed.
    pub read_only: bool,
    /// Its root directory.
    pub root: Arc<dyn Inode>,
}

fn same_inode(one: &Arc<dyn Inode>, other: &Arc<dyn Inode>) -> bool {
    Arc::as_ptr(one).cast::<()>() == Arc::as_ptr(other).cast::<()>()
}

impl Mount {
    /// Mounts the root of a tree.
    #[must_use]
    pub fn root(source: MountSource) -> Location {
        let mount = Mount::new(source, 1, String::from("/"));
        let inode = Arc::clone(&mount.root);
        Location::new(inode, mount, None, String::from("/"))
    }

    fn new(source: MountSource, identifier: u64, path: String) -> Arc<Mount> {
        Arc::new(Mount {
            identifier,
            kind: source.kind,
            source: source.source,
            read_only: source.read_only,
            path,
            root: source.root,
            children: Mutex::new(Vec::new()),
            locations: Mutex::new(Vec::new()),
            later: Mutex::new(Vec::new()),
        })
    }

    /// Puts work off until a path of this mount has one of `names` in it: what most programs never look at need not be there
    /// when they start.
    pub fn put_off(
        &self,
        names: &'static [&'static str],
        work: impl FnOnce() + Send + Sync + 'static,
    ) {
        let work = Box::new(work);
        self.later.lock().push(Later { names, work });
    }

    /// Does the work put off until somebody looks for `name`, or all of it, unless it is done. The work itself may walk
    /// everywhere.
    pub fn catch_up(&self, name: Option<&str>) {
        loop {
            let mut later = self.later.lock();
            let due = later
                .iter()
                .position(|later| name.is_none_or(|name| later.names.contains(&name)));
            let Some(index) = due else {
                return;
            };
            let due = later.remove(index);
            drop(later);
            (due.work)();
        }
    }

    fn mounted_on(&self, inode: &Arc<dyn Inode>) -> Option<Arc<Mount>> {
        let children = self.children.lock();
        // The last mount on a directory hides earlier ones.
        children
            .iter()
            .rev()
            .find(|(point, _)| same_inode(point, inode))
            .map(|(_, mount)| Arc::clone(mount))
    }

    /// This mount and all below it, in the order of mounting.
    #[must_use]
    pub fn all(self: &Arc<Mount>) -> Vec<Arc<Mount>> {
        let mut mounts = alloc::vec![Arc::clone(self)];
        let mut index = 0;
        while let Some(mount) = mounts.get(index).cloned() {
            mounts.extend(
                mount
                    .children
                    .lock()
                    .iter()
                    .map(|(_, child)| Arc::clone(child)),
            );
            index += 1;
        }
        mounts.sort_by_key(|mount| mount.identifier);
        mounts
    }

    /// The root directory of the file system.
    #[must_use]
    pub fn root_inode(&self) -> &Arc<dyn Inode> {
        &self.root
    }
}

struct Entry {
    inode: Arc<dyn Inode>,
    mount: Arc<Mount>,
    /// Directory above, and the absolute path.
    place: Mutex<(Option<Location>, String)>,
}

/// A place in the tree. Cheap to clone.
#[derive(Clone)]
pub struct Location(Arc<Entry>);

impl Location {
    fn new(
        inode: Arc<dyn Inode>,
        mount: Arc<Mount>,
        parent: Option<Location>,
        path: String,
    ) -> Location {
        let entry = Arc::new(Entry {
            inode,
            mount,
            place: Mutex::new((parent, path)),
        });
        let mut locations = entry.mount.locations.lock();
        if locations.len() == locations.capacity() {
            locations.retain(|location| location.strong_count() > 0);
        }
        locations.push(Arc::downgrade(&entry));
        drop(locations);
        Location(entry)
    }

    /// A place for a file that has none (what a magic link to a pipe leads to); `text` is what its path reads as.
    #[must_use]
    pub fn detached(inode: Arc<dyn Inode>, near: &Location, text: String) -> Location {
        Location(Arc::new(Entry {
            inode,
            mount: Arc::clone(near.mount()),
            place: Mutex::new((None, text)),
        }))
    }

    /// The file.
    #[must_use]
    pub fn inode(&self) -> &Arc<dyn Inode> {
        &self.0.inode
    }

    /// The mount it belongs to.
    #[must_use]
    pub fn mount(&self) -> &Arc<Mount> {
        &self.0.mount
    }

    /// Absolute path, as of the tree's root.
    #[must_use]
    pub fn path(&self) -> String {
        self.0.place.lock().1.clone()
    }

    /// The directory above; `None` at the root.
    #[must_use]
    pub fn parent(&self) -> Option<Location> {
        self.0.place.lock().0.clone()
    }

    /// Whether both are the same place.
    #[must_use]
    pub fn is(&self, other: &Location) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
            || (same_inode(&self.0.inode, &other.0.inode)
                && Arc::ptr_eq(&self.0.mount, &other.0.mount))
    }

    /// Mounts a file system on this directory.
    ///
    /// # Errors
    /// `ENOTDIR` if one of both is no directory.
    pub fn mount_here(&self, source: MountSource, identifier: u64) -> Result<Location> {
        if self.inode().metadata()?.kind != Kind::Directory
            || source.root.metadata()?.kind != Kind::Directory
        {
            return Err(Errno::ENOTDIR);
        }
        let path = self.path();
        let mount = Mount::new(source, identifier, path.clone());
        let inode = Arc::clone(&mount.root);
        self.mount()
            .children
            .lock()
            .push((Arc::clone(self.inode()), Arc::clone(&mount)));
        Ok(Location::new(inode, mount, self.parent(), path))
    }
}

bitflags! {
    /// How a path is resolved.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Resolve: u32 {
        /// A symbolic link at the end is followed.
        const FOLLOW = 1;
        /// No symbolic links at all (`RESOLVE_NO_SYMLINKS`).
        const NO_LINKS = 2;
        /// No magic links (`RESOLVE_NO_MAGICLINKS`).
        const NO_MAGIC_LINKS = 4;
        /// Stay in the mount of the start (`RESOLVE_NO_XDEV`).
        const ONE_MOUNT = 8;
        /// Never leave the directory of the start (`RESOLVE_BENEATH`).
        const BENEATH = 16;
        /// The directory of the start is the root (`RESOLVE_IN_ROOT`).
        const IN_ROOT = 32;
    }
}

/// What paths mean to one caller.
#[derive(Clone)]
pub struct View {
    /// Where absolute paths start.
    pub root: Location,
    /// Where relative paths start.
    pub working_directory: Location,
    /// Who asks.
    pub identity: Identity,
    /// Permission bits that new files do not get.
    pub umask: u32,
}

/// One name on the way from a walk's base.
struct Step {
    inode: Arc<dyn Inode>,
    /// Its mount, if that is not the one of the step before.
    mount: Option<Arc<Mount>>,
    /// Length of the path before this name was added.
    path_before: usize,
}

/// A place being reached.
pub struct Walk<'a> {
    view: &'a View,
    flags: Resolve,
    base: Location,
    trail: Vec<Step>,
    path: String,
    links: u32,
    /// Where `BENEATH` and `IN_ROOT` end.
    limit: Location,
}

/// Last name of a path, not yet looked up.
enum Last<'p> {
    /// An ordinary name; whether slashes follow.
    Name(&'p str, bool),
    /// The path led to a directory by `.`, `..` or `/`: it is there already.
    Arrived,
}

impl<'a> Walk<'a> {
    fn start(view: &'a View, base: &Location, flags: Resolve) -> Walk<'a> {
        let path = base.path();
        Walk {
            view,
            flags,
            base: base.clone(),
            trail: Vec::with_capacity(8),
            path,
            links: 0,
            limit: base.clone(),
        }
    }

    /// The inode reached.
    #[must_use]
    pub fn inode(&self) -> &Arc<dyn Inode> {
        self.trail
            .last()
            .map_or(self.base.inode(), |step| &step.inode)
    }

    /// The mount reached.
    #[must_use]
    pub fn mount(&self) -> &Arc<Mount> {
        self.trail
            .iter()
            .rev()
            .find_map(|step| step.mount.as_ref())
            .unwrap_or(self.base.mount())
    }

    /// Absolute path reached.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Attributes of what is reached.
    ///
    /// # Errors
    /// What the file system says.
    pub fn metadata(&self) -> Result<Metadata> {
        self.inode().metadata()
    }

    /// The place reached.
    #[must_use]
    pub fn location(&self) -> Location {
        let mut location = self.base.clone();
        let mut mount = Arc::clone(self.base.mount());
        for (index, step) in self.trail.iter().enumerate() {
            if let Some(crossed) = &step.mount {
                mount = Arc::clone(crossed);
            }
            let end = self
                .trail
                .get(index + 1)
                .map_or(self.path.len(), |next| next.path_before);
            let path = self.path.get(..end).unwrap_or("/").to_string();
            location = Location::new(
                Arc::clone(&step.inode),
                Arc::clone(&mount),
                Some(location),
                path,
            );
        }
        location
    }

    fn is_at(&self, place: &Location) -> bool {
        same_inode(self.inode(), place.inode()) && Arc::ptr_eq(self.mount(), place.mount())
    }

    fn restart(&mut self, base: Location) {
        self.path = base.path();
        self.base = base;
        self.trail.clear();
    }

    fn restart_at_root(&mut self) -> Result<()> {
        if self.flags.contains(Resolve::BENEATH) {
            return Err(Errno::EXDEV);
        }
        let root = if self.flags.contains(Resolve::IN_ROOT) {
            self.limit.clone()
        } else {
            self.view.root.clone()
        };
        if self.flags.contains(Resolve::ONE_MOUNT) && !Arc::ptr_eq(root.mount(), self.mount()) {
            return Err(Errno::EXDEV);
        }
        // A walk mostly starts there.
        if !self.trail.is_empty() || !Arc::ptr_eq(&root.0, &self.base.0) {
            self.restart(root);
        }
        Ok(())
    }

    fn up(&mut self) -> Result<()> {
        if self.flags.intersects(Resolve::BENEATH | Resolve::IN_ROOT) && self.is_at(&self.limit) {
            return if self.flags.contains(Resolve::BENEATH) {
                Err(Errno::EXDEV)
            } else {
                Ok(())
            };
        }
        if self.is_at(&self.view.root) {
            return Ok(());
        }
        if let Some(step) = self.trail.pop() {
            if step.mount.is_some() && self.flags.contains(Resolve::ONE_MOUNT) {
                return Err(Errno::EXDEV);
            }
            self.path.truncate(step.path_before);
        } else if let Some(parent) = self.base.parent() {
            if self.flags.contains(Resolve::ONE_MOUNT)
                && !Arc::ptr_eq(parent.mount(), self.base.mount())
            {
                return Err(Errno::EXDEV);
            }
            self.restart(parent);
        }
        Ok(())
    }

    fn push(&mut self, name: &str, inode: Arc<dyn Inode>) -> Result<()> {
        let (inode, mount) = match self.mount().mounted_on(&inode) {
            Some(mount) => {
                if self.flags.contains(Resolve::ONE_MOUNT) {
                    return Err(Errno::EXDEV);
                }
                (Arc::clone(&mount.root), Some(mount))
            }
            None => (inode, None),
        };
        let path_before = self.path.len();
        if !self.path.ends_with('/') {
            self.path.push('/');
        }
        self.path.push_str(name);
        self.trail.push(Step {
            inode,
            mount,
            path_before,
        });
        Ok(())
    }

    /// Checks that names may be looked up here.
    fn check_search(&self) -> Result<()> {
        if self.view.identity.is_root() {
            return Ok(());
        }
        let metadata = self.metadata()?;
        if metadata.kind != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        self.view.identity.check(&metadata, EXECUTE)
    }

    fn look_up(&self, name: &str) -> Result<Arc<dyn Inode>> {
        if name.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        self.check_search()?;
        self.mount().catch_up(Some(name));
        self.inode().lookup(name)
    }

    /// Follows the symbolic link `inode`, which lies in the directory reached.
    fn follow(&mut self, inode: &Arc<dyn Inode>) -> Result<()> {
        if let Some(jump) = self.magic(inode)? {
            self.restart(jump);
            return Ok(());
        }
        let target = self.link_target(inode)?;
        self.go(&target)
    }

    fn magic(&mut self, inode: &Arc<dyn Inode>) -> Result<Option<Location>> {
        let Some(jump) = inode.jump() else {
            return Ok(None);
        };
        if self
            .flags
            .intersects(Resolve::NO_LINKS | Resolve::NO_MAGIC_LINKS)
        {
            return Err(Errno::ELOOP);
        }
        if self
            .flags
            .intersects(Resolve::BENEATH | Resolve::IN_ROOT | Resolve::ONE_MOUNT)
        {
            return Err(Errno::EXDEV);
        }
        self.count_link()?;
        jump.map(Some)
    }

    fn count_link(&mut self) -> Result<()> {
        self.links += 1;
        if self.links > LINK_LIMIT {
            Err(Errno::ELOOP)
        } else {
            Ok(())
        }
    }

    fn link_target(&mut self, inode: &Arc<dyn Inode>) -> Result<String> {
        if self.flags.contains(Resolve::NO_LINKS) {
            return Err(Errno::ELOOP);
        }
        self.count_link()?;
        let target = inode.target()?;
        if target.is_empty() {
            Err(Errno::ENOENT)
        } else {
            Ok(target)
        }
    }

    /// Goes along a whole path, following every symbolic link.
    fn go(&mut self, path: &str) -> Result<()> {
        match self.go_to_last(path)? {
            Last::Arrived => Ok(()),
            Last::Name(name, slash) => self.enter(name, true, slash),
        }
    }

    /// Steps to a name in the directory reached.
    fn enter(&mut self, name: &str, follow: bool, must_be_directory: bool) -> Result<()> {
        let inode = self.look_up(name)?;
        // Only symbolic links have a target; asking is cheaper than reading all attributes.
        if is_link(&inode) && (follow || must_be_directory) {
            self.follow(&inode)?;
        } else {
            self.push(name, inode)?;
        }
        if must_be_directory && self.metadata()?.kind != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        Ok(())
    }

    /// Goes along all but the last name of a path.
    fn go_to_last<'p>(&mut self, path: &'p str) -> Result<Last<'p>> {
        if path.is_empty() {
            return Err(Errno::ENOENT);
        }
        if path.len() >= PATH_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        let mut rest = without_slashes(path);
        if rest.len() < path.len() {
            self.restart_at_root()?;
        }
        while !rest.is_empty() {
            let end = rest.bytes().position(|byte| byte == b'/');
            let (name, after) = rest.split_at(end.unwrap_or(rest.len()));
            rest = without_slashes(after);
            match name {
                "." | ".." => {
                    // Both need a directory that may be searched.
                    if self.metadata()?.kind != Kind::Directory {
                        return Err(Errno::ENOTDIR);
                    }
                    self.check_search()?;
                    if name == ".." {
                        self.up()?;
                    }
                }
                name if rest.is_empty() => {
                    return Ok(Last::Name(name, !after.is_empty()));
                }
                name => {
                    let inode = self.look_up(name)?;
                    if is_link(&inode) {
                        self.follow(&inode)?;
                    } else {
                        self.push(name, inode)?;
                    }
                }
            }
        }
        Ok(Last::Arrived)
    }
}

fn is_link(inode: &Arc<dyn Inode>) -> bool {
    inode.is_symbolic_link()
}

/// A path without the slashes that it begins with.
fn without_slashes(path: &str) -> &str {
    let start = path.bytes().position(|byte| byte != b'/');
    path.split_at(start.unwrap_or(path.len())).1
}

/// A name in a directory that is to be made or removed.
pub struct Target<'a> {
    /// The directory.
    pub directory: Walk<'a>,
    /// The name.
    pub name: &'a str,
    /// Slashes followed it.
    pub slash: bool,
}

impl View {
    /// How the superuser sees the tree below `root`.
    #[must_use]
    pub fn superuser(root: &Location) -> View {
        View {
            root: root.clone(),
            working_directory: root.clone(),
            identity: Identity::default(),
            umask: 0,
        }
    }

    /// Finds what a path leads to. `base` is where a relative path starts.
    ///
    /// # Errors
    /// As `path_resolution(7)`.
    pub fn find(&self, base: &Location, path: &str, flags: Resolve) -> Result<Walk<'_>> {
        let mut walk = Walk::start(self, base, flags);
        match walk.go_to_last(path)? {
            Last::Arrived => {}
            Last::Name(name, slash) => walk.enter(name, flags.contains(Resolve::FOLLOW), slash)?,
        }
        Ok(walk)
    }

    /// A place that is known already, as if a path had led there.
    #[must_use]
    pub fn at(&self, place: &Location) -> Walk<'_> {
        Walk::start(self, place, Resolve::empty())
    }

    /// Finds the directory and the last name of a path to something that is to be made or removed.
    ///
    /// # Errors
    /// As `path_resolution(7)`; `EEXIST` when the path ends in `.`, `..` or is `/`.
    pub fn target<'a>(&'a self, base: &Location, path: &'a str) -> Result<Target<'a>> {
        let mut walk = Walk::start(self, base, Resolve::empty());
        match walk.go_to_last(path)? {
            Last::Arrived => Err(Errno::EEXIST),
            Last::Name(name, _) if name.len() > NAME_MAX => Err(Errno::ENAMETOOLONG),
            Last::Name(name, slash) => {
                if walk.metadata()?.kind != Kind::Directory {
                    return Err(Errno::ENOTDIR);
                }
                walk.check_search()?;
                walk.mount().catch_up(Some(name));
                Ok(Target {
                    directory: walk,
                    name,
                    slash,
                })
            }
        }
    }

    /// Checks that names in this directory may be made and removed.
    fn check_change(&self, directory: &Walk<'_>) -> Result<()> {
        if directory.mount().read_only {
            return Err(Errno::EROFS);
        }
        if self.identity.is_root() {
            return Ok(());
        }
        self.identity.check(&directory.metadata()?, WRITE | EXECUTE)
    }

    /// Checks that this entry may be removed: in a sticky directory only by its owner or the directory's.
    fn check_removal(&self, directory: &Walk<'_>, inode: &Arc<dyn Inode>) -> Result<()> {
        self.check_change(directory)?;
        if self.identity.is_root() {
            return Ok(());
        }
        let parent = directory.metadata()?;
        let owned =
            || Ok(parent.uid == self.identity.uid || inode.metadata()?.uid == self.identity.uid);
        if parent.permissions & 0o1000 != 0 && !owned()? {
            Err(Errno::EPERM)
        } else {
            Ok(())
        }
    }

    fn creation<'b>(
        &self,
        directory: &Metadata,
        kind: Kind,
        permissions: u32,
        target: &'b str,
        device: u64,
    ) -> Creation<'b> {
        // In a set-group-id directory files get its group, and directories the bit too.
        let inherits = directory.permissions & 0o2000 != 0;
        let mut permissions = permissions & 0o7777;
        if kind != Kind::SymbolicLink {
            permissions &= !self.umask;
        }
        if inherits && kind == Kind::Directory {
            permissions |= 0o2000;
        }
        Creation {
            kind,
            permissions,
            uid: self.identity.uid,
            gid: if inherits {
                directory.gid
            } else {
                self.identity.gid
            },
            target,
            special_device: device,
        }
    }

    /// Makes something new.
    ///
    /// # Errors
    /// As `mkdir(2)`, `mknod(2)`, `symlink(2)`.
    pub fn create(
        &self,
        base: &Location,
        path: &str,
        kind: Kind,
        permissions: u32,
        link_target: &str,
        device: u64,
    ) -> Result<Arc<dyn Inode>> {
        let target = self.target(base, path)?;
        if target.directory.inode().lookup(target.name).is_ok() {
            return Err(Errno::EEXIST);
        }
        if target.slash && kind != Kind::Directory {
            return Err(Errno::ENOENT);
        }
        self.check_change(&target.directory)?;
        let creation = self.creation(
            &target.directory.metadata()?,
            kind,
            permissions,
            link_target,
            device,
        );
        target.directory.inode().create(target.name, &creation)
    }

    /// Opens, and makes the file if `flags` say so.
    ///
    /// # Errors
    /// As `open(2)`.
    pub fn open(
        &self,
        base: &Location,
        path: &str,
        flags: OpenFlags,
        mode: u32,
        resolve: Resolve,
    ) -> Result<Arc<OpenFile>> {
        let follow = !flags.contains(OpenFlags::NO_FOLLOW)
            && !flags.contains(OpenFlags::CREATE | OpenFlags::EXCLUSIVE);
        let resolve = if follow {
            resolve | Resolve::FOLLOW
        } else {
            resolve - Resolve::FOLLOW
        };
        if flags.contains(OpenFlags::PATH) {
            let walk = self.find(base, path, resolve)?;
            if flags.contains(OpenFlags::DIRECTORY) && walk.metadata()?.kind != Kind::Directory {
                return Err(Errno::ENOTDIR);
            }
            let path = String::from(walk.path());
            let kept = flags & (OpenFlags::PATH | OpenFlags::DIRECTORY | OpenFlags::NO_FOLLOW);
            return Ok(OpenFile::with_path(
                Arc::new(Place::new(walk.location())),
                kept,
                Some(path),
            ));
        }
        if flags.contains(OpenFlags::TEMPORARY) {
            return self.open_unnamed(base, path, flags, mode, resolve);
        }
        if flags.contains(OpenFlags::CREATE) {
            if flags.contains(OpenFlags::DIRECTORY) {
                return Err(Errno::EINVAL);
            }
            return self.open_or_create(base, path, flags, mode, resolve);
        }
        let walk = self.find(base, path, resolve)?;
        self.open_found(&walk, flags, false)
    }

    fn open_unnamed(
        &self,
        base: &Location,
        path: &str,
        flags: OpenFlags,
        mode: u32,
        resolve: Resolve,
    ) -> Result<Arc<OpenFile>> {
        if !flags.writable() || !flags.contains(OpenFlags::DIRECTORY) {
            return Err(Errno::EINVAL);
        }
        let walk = self.find(base, path, resolve)?;
        let metadata = walk.metadata()?;
        if metadata.kind != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        self.check_change(&walk)?;
        let inode =
            walk.inode()
                .create_unnamed(&self.creation(&metadata, Kind::Regular, mode, "", 0))?;
        let file = inode.open(flags)?;
        let path = alloc::format!("{}/#unnamed (deleted)", walk.path().trim_end_matches('/'));
        Ok(OpenFile::with_path(
            file,
            flags - OpenFlags::TEMPORARY - OpenFlags::DIRECTORY,
            Some(path),
        ))
    }

    fn open_or_create(
        &self,
        base: &Location,
        path: &str,
        flags: OpenFlags,
        mode: u32,
        resolve: Resolve,
    ) -> Result<Arc<OpenFile>> {
        let mut walk = Walk::start(self, base, resolve);
        let mut next = String::from(path);
        loop {
            let (name, slash) = match walk.go_to_last(&next)? {
                Last::Arrived if flags.contains(OpenFlags::EXCLUSIVE) => return Err(Errno::EEXIST),
                Last::Arrived => return Err(Errno::EISDIR),
                Last::Name(name, slash) => (name, slash),
            };
            match walk.look_up(name) {
                Ok(_) if flags.contains(OpenFlags::EXCLUSIVE) => return Err(Errno::EEXIST),
                Ok(inode) if is_link(&inode) && resolve.contains(Resolve::FOLLOW) => {
                    if let Some(place) = walk.magic(&inode)? {
                        walk.restart(place);
                        return self.open_found(&walk, flags, false);
                    }
                    // A link to nothing makes the file it names.
                    next = walk.link_target(&inode)?;
                    continue;
                }
                Ok(_) if slash => return Err(Errno::EISDIR),
                Ok(inode) => {
                    walk.push(name, inode)?;
                    return self.open_found(&walk, flags, false);
                }
                Err(Errno::ENOENT) => {}
                Err(error) => return Err(error),
            }
            if slash {
                return Err(Errno::EISDIR);
            }
            self.check_change(&walk)?;
            let creation = self.creation(&walk.metadata()?, Kind::Regular, mode, "", 0);
            let inode = walk.inode().create(name, &creation)?;
            walk.push(name, inode)?;
            return self.open_found(&walk, flags, true);
        }
    }

    /// Opens what was found; `created` files may be opened whatever their permissions are.
    fn open_found(
        &self,
        walk: &Walk<'_>,
        flags: OpenFlags,
        created: bool,
    ) -> Result<Arc<OpenFile>> {
        let inode = walk.inode();
        let metadata = inode.metadata()?;
        if flags.contains(OpenFlags::DIRECTORY) && metadata.kind != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        let changes = flags.writable() || flags.contains(OpenFlags::TRUNCATE);
        match metadata.kind {
            Kind::SymbolicLink => return Err(Errno::ELOOP),
            Kind::Socket => return Err(Errno::ENXIO),
            Kind::Directory if changes || flags.contains(OpenFlags::CREATE) => {
                return Err(Errno::EISDIR);
            }
            Kind::Regular if changes && walk.mount().read_only => return Err(Errno::EROFS),
            _ => {}
        }
        if !created && !self.identity.is_root() {
            let mut mask = 0;
            if flags.readable() {
                mask |= READ;
            }
            if changes {
                mask |= WRITE;
            }
            self.identity.check(&metadata, mask)?;
        }
        if metadata.kind == Kind::Directory {
            if same_inode(inode, &walk.mount().root) {
                // It may be listed.
                walk.mount().catch_up(None);
            }
            let place = walk.location();
            let path = place.path();
            return Ok(OpenFile::with_path(
                Arc::new(Place::new(place)),
                flags,
                Some(path),
            ));
        }
        let truncate =
            flags.contains(OpenFlags::TRUNCATE) && metadata.kind == Kind::Regular && !created;
        let file = Arc::clone(inode).open(flags)?;
        if truncate {
            inode.change(&MetadataChange {
                size: Some(0),
                ..MetadataChange::default()
            })?;
        }
        Ok(OpenFile::with_path(
            file,
            flags,
            Some(String::from(walk.path())),
        ))
    }

    /// Removes a name; `directory` for `rmdir`.
    ///
    /// # Errors
    /// As `unlink(2)`, `rmdir(2)`.
    pub fn remove(&self, base: &Location, path: &str, directory: bool) -> Result<()> {
        let target = match self.target(base, path) {
            // What `..`, `.` and `/` give.
            Err(Errno::EEXIST) if !directory => return Err(Errno::EISDIR),
            Err(Errno::EEXIST) => {
                let trimmed = path.trim_end_matches('/');
                return Err(if trimmed.is_empty() {
                    Errno::EBUSY
                } else if trimmed.ends_with("..") {
                    Errno::ENOTEMPTY
                } else {
                    Errno::EINVAL
                });
            }
            other => other?,
        };
        let inode = target.directory.inode().lookup(target.name)?;
        if target.slash && !directory {
            return Err(if inode.metadata()?.kind == Kind::Directory {
                Errno::EISDIR
            } else {
                Errno::ENOTDIR
            });
        }
        self.check_removal(&target.directory, &inode)?;
        if target.directory.mount().mounted_on(&inode).is_some() {
            return Err(Errno::EBUSY);
        }
        target.directory.inode().unlink(target.name, directory)
    }

    /// Makes another name for a file.
    ///
    /// # Errors
    /// As `link(2)`.
    pub fn link(&self, from: &Walk<'_>, base: &Location, path: &str) -> Result<()> {
        let target = self.target(base, path)?;
        if target.directory.inode().lookup(target.name).is_ok() {
            return Err(Errno::EEXIST);
        }
        if target.slash {
            return Err(Errno::ENOENT);
        }
        if !Arc::ptr_eq(from.mount(), target.directory.mount()) {
            return Err(Errno::EXDEV);
        }
        if from.metadata()?.kind == Kind::Directory {
            return Err(Errno::EPERM);
        }
        self.check_change(&target.directory)?;
        target.directory.inode().link(target.name, from.inode())
    }

    /// Renames; `flags` are `RENAME_*`.
    ///
    /// # Errors
    /// As `renameat2(2)`.
    pub fn rename(
        &self,
        old_base: &Location,
        old: &str,
        new_base: &Location,
        new: &str,
        flags: u32,
    ) -> Result<()> {
        if flags & !(linux::RENAME_NOREPLACE | linux::RENAME_EXCHANGE) != 0
            || flags == linux::RENAME_NOREPLACE | linux::RENAME_EXCHANGE
        {
            return Err(Errno::EINVAL);
        }
        let busy = |error| {
            if error == Errno::EEXIST {
                Errno::EBUSY
            } else {
                error
            }
        };
        let from = self.target(old_base, old).map_err(busy)?;
        let to = self.target(new_base, new).map_err(busy)?;
        if !Arc::ptr_eq(from.directory.mount(), to.directory.mount()) {
            return Err(Errno::EXDEV);
        }
        let inode = from.directory.inode().lookup(from.name)?;
        let metadata = inode.metadata()?;
        let exchange = flags & linux::RENAME_EXCHANGE != 0;
        if (from.slash || (to.slash && !exchange)) && metadata.kind != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        self.check_removal(&from.directory, &inode)?;
        let mount = Arc::clone(from.directory.mount());
        if mount.mounted_on(&inode).is_some() {
            return Err(Errno::EBUSY);
        }
        match to.directory.inode().lookup(to.name) {
            Ok(_) if flags & linux::RENAME_NOREPLACE != 0 => return Err(Errno::EEXIST),
            Ok(existing) => {
                if mount.mounted_on(&existing).is_some() {
                    return Err(Errno::EBUSY);
                }
                self.check_removal(&to.directory, &existing)?;
            }
            Err(Errno::ENOENT) if !exchange => self.check_change(&to.directory)?,
            Err(error) => return Err(error),
        }
        let old_path = join(from.directory.path(), from.name);
        if metadata.kind == Kind::Directory {
            // A directory cannot go below itself.
            let mut above = Some(to.directory.location());
            while let Some(place) = above {
                if same_inode(place.inode(), &inode) {
                    return Err(Errno::EINVAL);
                }
                above = place.parent();
            }
        }
        if exchange
            && let Ok(existing) = to.directory.inode().lookup(to.name)
            && existing.metadata()?.kind == Kind::Directory
        {
            let mut above = Some(from.directory.location());
            while let Some(place) = above {
                if same_inode(place.inode(), &existing) {
                    return Err(Errno::EINVAL);
                }
                above = place.parent();
            }
        }
        from.directory
            .inode()
            .rename(from.name, to.directory.inode(), to.name, flags)?;
        let new_path = join(to.directory.path(), to.name);
        if old_path != new_path {
            mount.moved(&old_path, &new_path, &inode, &to.directory.location());
        }
        Ok(())
    }

    /// Changes attributes, if the caller may.
    ///
    /// # Errors
    /// As `chmod(2)`, `chown(2)`, `utimensat(2)`, `truncate(2)`.
    pub fn change(
        &self,
        inode: &Arc<dyn Inode>,
        mount: &Mount,
        change: &MetadataChange,
    ) -> Result<()> {
        if mount.read_only {
            return Err(Errno::EROFS);
        }
        let mut change = *change;
        let metadata = inode.metadata()?;
        if !self.identity.is_root() {
            let owner = metadata.uid == self.identity.uid;
            if change.uid.is_some_and(|uid| !owner || uid != metadata.uid)
                || change.gid.is_some_and(|gid| {
                    !owner || (gid != metadata.gid && !self.identity.in_group(gid))
                })
                || (change.permissions.is_some() && !owner)
            {
                return Err(Errno::EPERM);
            }
            if let Some(permissions) = &mut change.permissions
                && !self.identity.in_group(change.gid.unwrap_or(metadata.gid))
            {
                *permissions &= !0o2000;
            }
        }
        // A new owner takes the right to run as the old one away.
        if (change.uid.is_some() || change.gid.is_some())
            && metadata.kind == Kind::Regular
            && change.permissions.is_none()
            && metadata.permissions & 0o6000 != 0
        {
            let group_execute = metadata.permissions & 0o010 != 0;
            change.permissions =
                Some(metadata.permissions & if group_execute { !0o6000 } else { !0o4000 });
        }
        inode.change(&change)
    }
}

fn join(directory: &str, name: &str) -> String {
    alloc::format!("{}/{name}", directory.trim_end_matches('/'))
}

impl Mount {
    /// Corrects the paths of locations after a rename.
    fn moved(&self, old: &str, new: &str, inode: &Arc<dyn Inode>, parent: &Location) {
        let live: Vec<Arc<Entry>> = self
            .locations
            .lock()
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        for entry in live {
            let mut place = entry.place.lock();
            let Some(rest) = place.1.strip_prefix(old) else {
                continue;
            };
            if !rest.is_empty() && !rest.starts_with('/') {
                continue;
            }
            let path = alloc::format!("{new}{rest}");
            if rest.is_empty() && same_inode(&entry.inode, inode) {
                place.0 = Some(parent.clone());
            }
            place.1 = path;
        }
    }
}

/// An open directory, or a file opened with `O_PATH`.
pub struct Place {
    location: Location,
}

impl Place {
    /// Opens a place.
    #[must_use]
    pub fn new(location: Location) -> Place {
        Place { location }
    }

    /// Where it is.
    #[must_use]
    pub fn location(&self) -> &Location {
        &self.location
    }
}

impl File for Place {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn is_seekable(&self) -> bool {
        true
    }

    fn read_at(&self, _: u64, _: &mut crate::file::Sink<'_>) -> Result<usize> {
        Err(Errno::EISDIR)
    }

    fn write_at(&self, _: u64, _: &mut crate::file::Source<'_>) -> Result<usize> {
        Err(Errno::EBADF)
    }

    fn metadata(&self) -> Result<Metadata> {
        self.location.inode().metadata()
    }

    fn inode(&self) -> Option<&Arc<dyn Inode>> {
        Some(self.location.inode())
    }

    fn synchronize(&self, data_only: bool) -> Result<()> {
        self.location.inode().synchronize(data_only)
    }

    fn describe(&self) -> String {
        self.location.path()
    }
}

/// An inode for an open file that has none (a pipe, a socket), so that magic links can lead to it.
pub struct OpenInode {
    file: Arc<dyn File>,
}

impl OpenInode {
    /// Wraps an open file.
    #[must_use]
    pub fn wrap(file: Arc<dyn File>) -> Arc<dyn Inode> {
        Arc::new(OpenInode { file })
    }
}

impl Inode for OpenInode {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn metadata(&self) -> Result<Metadata> {
        self.file.metadata()
    }

    fn open(self: Arc<Self>, flags: OpenFlags) -> Result<Arc<dyn File>> {
        if let Some(end) = self.file.as_any().downcast_ref::<PipeEnd>() {
            return Ok(end.reopen(flags));
        }
        // The console can be opened again; sockets cannot, and what else has no name neither (as in Linux).
        if self.file.as_any().is::<Console>() {
            Ok(Arc::clone(&self.file))
        } else {
            Err(Errno::ENXIO)
        }
    }

    fn statistics(&self) -> Result<FileSystemStatistics> {
        Ok(FileSystemStatistics {
            magic: u64::from(linux::ANON_INODE_FS_MAGIC),
            block_size: 4096,
            ..FileSystemStatistics::default()
        })
    }
}

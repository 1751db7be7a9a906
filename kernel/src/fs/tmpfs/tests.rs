//! The tmpfs over another file system behaves as a tree of plain values does.

use alloc::{collections::BTreeMap, string::String, sync::Arc, vec::Vec};

use super::*;
use crate::{
    file::{OpenFlags, Sink, Source},
    fs::{pool, vfs::Mount, vfs::MountSource, vfs::Resolve, vfs::View},
};

pub struct FixedClock;

impl Clock for FixedClock {
    fn now(&self) -> Timestamp {
        1_000_000_000
    }
}

pub fn parts(pages: u32) -> TmpfsParts {
    TmpfsParts {
        pool: pool::tests::pool(pages),
        clock: Arc::new(FixedClock),
        devices: None,
        device: 1,
    }
}

/// A read-only file system of fixed contents.
struct Below {
    inode: u64,
    kind: BelowKind,
}

enum BelowKind {
    Directory(BTreeMap<String, Arc<dyn Inode>>),
    File(&'static [u8]),
}

impl Inode for Below {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn metadata(&self) -> Result<Metadata> {
        let (kind, size) = match &self.kind {
            BelowKind::Directory(_) => (Kind::Directory, 0),
            BelowKind::File(bytes) => (Kind::Regular, bytes.len() as u64),
        };
        Ok(Metadata {
            device: 9,
            inode: self.inode,
            kind,
            permissions: 0o755,
            links: if kind == Kind::Directory { 2 } else { 1 },
            uid: 0,
            gid: 0,
            special_device: 0,
            size,
            block_size: 4096,
            blocks: 0,
            accessed: 0,
            modified: 0,
            changed: 0,
        })
    }

    fn lookup(&self, name: &str) -> Result<Arc<dyn Inode>> {
        match &self.kind {
            BelowKind::Directory(names) => names.get(name).cloned().ok_or(Errno::ENOENT),
            BelowKind::File(_) => Err(Errno::ENOTDIR),
        }
    }

    fn entries(&self, position: u64, limit: usize) -> Result<Vec<DirectoryEntry>> {
        let BelowKind::Directory(names) = &self.kind else {
            return Err(Errno::ENOTDIR);
        };
        let entries = names.iter().enumerate().skip(position as usize).take(limit);
        entries
            .map(|(index, (name, inode))| {
                let metadata = inode.metadata()?;
                let (name, next) = (name.clone(), index as u64 + 1);
                Ok(DirectoryEntry {
                    name,
                    inode: metadata.inode,
                    kind: metadata.kind,
                    next,
                })
            })
            .collect()
    }

    fn open(self: Arc<Self>, _: OpenFlags) -> Result<Arc<dyn File>> {
        Err(Errno::ENXIO)
    }

    fn in_place(&self, position: u64) -> Option<&'static [u8]> {
        match &self.kind {
            // In pieces, so that joining them is tested.
            BelowKind::File(bytes) => {
                let rest = bytes
                    .get(position as usize..)
                    .filter(|rest| !rest.is_empty())?;
                rest.get(..rest.len().min(1000))
            }
            BelowKind::Directory(_) => None,
        }
    }

    fn statistics(&self) -> Result<FileSystemStatistics> {
        Ok(FileSystemStatistics::default())
    }
}

/// What a tree should be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Model {
    Directory(BTreeMap<String, Model>),
    File(Vec<u8>),
}

/// Numbers that look random and are the same each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

fn below(random: &mut Random, depth: u32, next: &mut u64) -> (Arc<dyn Inode>, Model) {
    *next += 1;
    let inode = *next;
    if depth == 0 || random.below(3) == 0 {
        let bytes: Vec<u8> = (0..random.below(12000))
            .map(|index| (index * 7 + inode) as u8)
            .collect();
        let leaked: &'static [u8] = alloc::boxed::Box::leak(bytes.clone().into_boxed_slice());
        return (
            Arc::new(Below {
                inode,
                kind: BelowKind::File(leaked),
            }),
            Model::File(bytes),
        );
    }
    directory_below(random, depth, next, inode)
}

fn directory_below(
    random: &mut Random,
    depth: u32,
    next: &mut u64,
    inode: u64,
) -> (Arc<dyn Inode>, Model) {
    let mut names = BTreeMap::new();
    let mut model = BTreeMap::new();
    for name in NAMES
        .iter()
        .take(1 + random.below(NAMES.len() as u64) as usize)
    {
        let (child, child_model) = below(random, depth - 1, next);
        names.insert(String::from(*name), child);
        model.insert(String::from(*name), child_model);
    }
    (
        Arc::new(Below {
            inode,
            kind: BelowKind::Directory(names),
        }),
        Model::Directory(model),
    )
}

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

fn read(inode: &Arc<dyn Inode>) -> Vec<u8> {
    let size = inode.metadata().unwrap().size as usize;
    let mut bytes = alloc::vec![0xEE; size + 10];
    let count = inode.read_at(0, &mut Sink::kernel(&mut bytes)).unwrap();
    assert_eq!(count, size);
    bytes.truncate(count);
    bytes
}

fn list(inode: &Arc<dyn Inode>, batch: usize) -> Vec<String> {
    let mut names = Vec::new();
    let mut position = 0;
    loop {
        let entries = inode.entries(position, batch).unwrap();
        let Some(last) = entries.last() else { break };
        position = last.next;
        names.extend(entries.into_iter().map(|entry| entry.name));
    }
    names.sort();
    names
}

fn check(inode: &Arc<dyn Inode>, model: &Model, random: &mut Random) {
    match model {
        Model::File(bytes) => assert!(read(inode) == *bytes),
        Model::Directory(names) => {
            let listed = list(inode, 1 + random.below(4) as usize);
            assert_eq!(listed, names.keys().cloned().collect::<Vec<_>>());
            for (name, child) in names {
                check(&inode.lookup(name).unwrap(), child, random);
            }
            for name in NAMES {
                assert_eq!(inode.lookup(name).is_ok(), names.contains_key(name));
            }
        }
    }
}

/// A random directory of model and tree.
fn descend<'a>(
    root: &Arc<dyn Inode>,
    model: &'a mut Model,
    random: &mut Random,
) -> (Arc<dyn Inode>, &'a mut Model) {
    let Model::Directory(names) = model else {
        unreachable!()
    };
    let directories: Vec<String> = names
        .iter()
        .filter(|(_, child)| matches!(child, Model::Directory(_)))
        .map(|(name, _)| name.clone())
        .collect();
    if directories.is_empty() || random.below(2) == 0 {
        return (Arc::clone(root), model);
    }
    let name = &directories[random.below(directories.len() as u64) as usize];
    let Model::Directory(names) = model else {
        unreachable!()
    };
    descend(
        &root.lookup(name).unwrap(),
        names.get_mut(name).unwrap(),
        random,
    )
}

fn creation(kind: Kind) -> Creation<'static> {
    Creation {
        kind,
        permissions: 0o644,
        uid: 0,
        gid: 0,
        target: "",
        special_device: 0,
    }
}

fn step(root: &Arc<dyn Inode>, model: &mut Model, random: &mut Random) {
    let (directory, Model::Directory(names)) = descend(root, model, random) else {
        unreachable!()
    };
    let name = NAMES[random.below(5) as usize];
    match random.below(6) {
        0 => {
            let is_directory = random.below(2) == 0;
            let kind = if is_directory {
                Kind::Directory
            } else {
                Kind::Regular
            };
            let result = directory.create(name, &creation(kind)).map(drop);
            if names.contains_key(name) {
                assert_eq!(result, Err(Errno::EEXIST));
            } else {
                result.unwrap();
                let child = if is_directory {
                    Model::Directory(BTreeMap::new())
                } else {
                    Model::File(Vec::new())
                };
                names.insert(String::from(name), child);
            }
        }
        1 => {
            let as_directory = random.below(2) == 0;
            let expected = match (names.get(name), as_directory) {
                (None, _) => Err(Errno::ENOENT),
                (Some(Model::File(_)), true) => Err(Errno::ENOTDIR),
                (Some(Model::Directory(_)), false) => Err(Errno::EISDIR),
                (Some(Model::Directory(children)), true) if !children.is_empty() => {
                    Err(Errno::ENOTEMPTY)
                }
                _ => Ok(()),
            };
            assert_eq!(directory.unlink(name, as_directory), expected);
            if expected.is_ok() {
                names.remove(name);
            }
        }
        2 => {
            let new = NAMES[random.below(5) as usize];
            let result = directory.rename(name, &directory, new, 0);
            let expected = match (names.get(name), names.get(new)) {
                (None, _) => Err(Errno::ENOENT),
                _ if name == new => Ok(()),
                (Some(Model::Directory(_)), Some(Model::File(_))) => Err(Errno::ENOTDIR),
                (Some(Model::File(_)), Some(Model::Directory(_))) => Err(Errno::EISDIR),
                (_, Some(Model::Directory(children))) if !children.is_empty() => {
                    Err(Errno::ENOTEMPTY)
                }
                _ => Ok(()),
            };
            assert_eq!(result, expected);
            if expected.is_ok()
                && let Some(child) = names.remove(name)
            {
                names.insert(String::from(new), child);
            }
        }
        3 => {
            let new = NAMES[random.below(5) as usize];
            let result = directory.rename(name, &directory, new, linux::RENAME_EXCHANGE);
            if names.contains_key(name) && names.contains_key(new) {
                result.unwrap();
                if name != new {
                    let (one, other) = (names.remove(name).unwrap(), names.remove(new).unwrap());
                    names.insert(String::from(name), other);
                    names.insert(String::from(new), one);
                }
            } else {
                assert_eq!(result, Err(Errno::ENOENT));
            }
        }
        _ => {
            if let Some(Model::File(bytes)) = names.get_mut(name) {
                change_file(&directory.lookup(name).unwrap(), bytes, random);
            }
        }
    }
}

fn change_file(inode: &Arc<dyn Inode>, bytes: &mut Vec<u8>, random: &mut Random) {
    let position = random.below(14000);
    let length = random.below(6000);
    match random.below(4) {
        0 => {
            inode
                .change(&MetadataChange {
                    size: Some(position),
                    ..MetadataChange::default()
                })
                .unwrap();
            bytes.resize(position as usize, 0);
        }
        1 => {
            let mode = linux::FALLOC_FL_PUNCH_HOLE | linux::FALLOC_FL_KEEP_SIZE;
            inode.allocate(mode, position, length + 1).unwrap();
            let end = bytes.len().min((position + length + 1) as usize);
            if (position as usize) < end {
                bytes[position as usize..end].fill(0);
            }
        }
        _ => {
            let data: Vec<u8> = (0..length).map(|index| (index ^ position) as u8).collect();
            assert_eq!(
                inode.write_at(position, &mut Source::kernel(&data)),
                Ok(data.len())
            );
            let end = position as usize + data.len();
            if !data.is_empty() {
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[position as usize..end].copy_from_slice(&data);
            }
        }
    }
}

#[test]
fn tree_over_another_is_as_its_model() {
    for seed in 1..40 {
        let mut random = Random(seed * 0x9E37_79B9);
        let (lower, mut model) = directory_below(&mut random, 3, &mut 1, 1);
        let parts = parts(8192);
        let pool = Arc::clone(&parts.pool);
        let root = Tmpfs::over(parts, &lower).unwrap();
        for _ in 0..150 {
            step(&root, &mut model, &mut random);
        }
        check(&root, &model, &mut random);
        drop(root);
        assert_eq!(pool.used(), 0, "pages of removed files come back");
    }
}

#[test]
fn identity_stays_when_a_file_changes() {
    let mut names: BTreeMap<String, Arc<dyn Inode>> = BTreeMap::new();
    names.insert(
        String::from("file"),
        Arc::new(Below {
            inode: 7,
            kind: BelowKind::File(b"hello"),
        }),
    );
    let lower: Arc<dyn Inode> = Arc::new(Below {
        inode: 1,
        kind: BelowKind::Directory(names),
    });
    let root = Tmpfs::over(parts(16), &lower).unwrap();
    let before = root.lookup("file").unwrap();
    assert_eq!(before.metadata().unwrap().inode, 7);
    assert_eq!(before.in_place(1), Some(&b"ello"[..]));
    before.write_at(0, &mut Source::kernel(b"J")).unwrap();
    let after = root.lookup("file").unwrap();
    assert_eq!(after.metadata().unwrap().inode, 7);
    assert_eq!(read(&after), b"Jello");
    root.rename("file", &root, "other", 0).unwrap();
    root.link("third", &after).unwrap();
    assert_eq!(root.lookup("third").unwrap().metadata().unwrap().links, 2);
    assert_eq!(list(&root, 10), ["other", "third"]);
}

#[test]
fn shared_mapping_pages_stay_with_the_file() {
    let parts = parts(64);
    let pool = Arc::clone(&parts.pool);
    let root = Tmpfs::empty(parts, 0o755);
    let file = root.create("f", &creation(Kind::Regular)).unwrap();
    file.write_at(0, &mut Source::kernel(&[1; 10000])).unwrap();
    file.prepare_shared(0, 20000).unwrap();
    assert_eq!(pool.used(), 3);
    let Some((MapSource::Pool(first), length)) = file.map_source(0).unwrap() else {
        panic!("not in the pool")
    };
    assert_eq!(length, 12288);
    file.change(&MetadataChange {
        size: Some(0),
        ..MetadataChange::default()
    })
    .unwrap();
    assert_eq!(pool.used(), 3);
    file.change(&MetadataChange {
        size: Some(10000),
        ..MetadataChange::default()
    })
    .unwrap();
    assert_eq!(
        file.map_source(0).unwrap(),
        Some((MapSource::Pool(first), 12288))
    );
    assert_eq!(read(&file), [0; 10000]);
}

#[test]
fn space_runs_out_with_the_right_error() {
    let root = Tmpfs::empty(parts(4), 0o755);
    let file = root.create("f", &creation(Kind::Regular)).unwrap();
    assert_eq!(
        file.write_at(0, &mut Source::kernel(&[1; 5 * 4096])),
        Ok(4 * 4096)
    );
    assert_eq!(
        file.write_at(4 * 4096, &mut Source::kernel(&[1; 1])),
        Err(Errno::ENOSPC)
    );
    // Holes take no space.
    file.change(&MetadataChange {
        size: Some(0),
        ..MetadataChange::default()
    })
    .unwrap();
    assert_eq!(file.write_at(1 << 40, &mut Source::kernel(&[1; 1])), Ok(1));
    assert_eq!(file.metadata().unwrap().blocks, 8);
    assert_eq!(file.allocate(0, 0, 1 << 30), Err(Errno::ENOSPC));
}

#[test]
fn seals_hold() {
    let root = Tmpfs::empty(parts(16), 0o755);
    let node = Tmpfs::unnamed_file(&root, 0o777, 0, 0, true).unwrap();
    node.write_at(0, &mut Source::kernel(b"data")).unwrap();
    node.add_seals(linux::F_SEAL_SHRINK | linux::F_SEAL_GROW)
        .unwrap();
    let resize = |size| {
        node.change(&MetadataChange {
            size: Some(size),
            ..MetadataChange::default()
        })
    };
    assert_eq!(resize(3), Err(Errno::EPERM));
    assert_eq!(resize(5), Err(Errno::EPERM));
    assert_eq!(
        node.write_at(2, &mut Source::kernel(b"xxx")),
        Err(Errno::EPERM)
    );
    assert_eq!(node.write_at(2, &mut Source::kernel(b"xx")), Ok(2));
    node.add_seals(linux::F_SEAL_WRITE | linux::F_SEAL_SEAL)
        .unwrap();
    assert_eq!(
        node.write_at(2, &mut Source::kernel(b"xx")),
        Err(Errno::EPERM)
    );
    assert_eq!(node.add_seals(0), Err(Errno::EPERM));
    assert_eq!(
        Tmpfs::unnamed_file(&root, 0o777, 0, 0, false)
            .unwrap()
            .add_seals(1),
        Err(Errno::EPERM)
    );
}

fn view(root: Arc<dyn Inode>) -> View {
    let root = Mount::root(MountSource {
        kind: "tmpfs",
        source: "test",
        read_only: false,
        root,
    });
    View {
        working_directory: root.clone(),
        root,
        identity: crate::fs::vfs::Identity::default(),
        umask: 0o22,
    }
}

fn make(view: &View, path: &str, kind: Kind, target: &str) -> Result<()> {
    view.create(&view.root, path, kind, 0o777, target, 0)
        .map(drop)
}

fn find(view: &View, path: &str) -> Result<String> {
    Ok(String::from(
        view.find(&view.root, path, Resolve::FOLLOW)?.path(),
    ))
}

#[test]
fn work_put_off_is_done_once_and_before_anybody_sees_what_it_makes() {
    let view = view(Tmpfs::empty(parts(64), 0o755));
    make(&view, "/other", Kind::Directory, "").unwrap();
    let put_off = |names, paths: &'static [&'static str]| {
        let inside = view.clone();
        view.root.mount().put_off(names, move || {
            for path in paths {
                make(&inside, path, Kind::Directory, "").unwrap();
            }
        });
    };
    put_off(&["dev", "devices"], &["/dev", "/dev/shm"]);
    put_off(&["sys"], &["/sys"]);
    put_off(&["run"], &["/run"]);
    assert_eq!(find(&view, "/other").unwrap(), "/other");
    assert_eq!(view.root.inode().lookup("dev").err(), Some(Errno::ENOENT));
    assert_eq!(find(&view, "other/../dev/shm").unwrap(), "/dev/shm");
    view.remove(&view.root, "/dev/shm", true).unwrap();
    assert_eq!(find(&view, "/dev/shm"), Err(Errno::ENOENT));
    // Who makes one of the names finds it made, too.
    assert_eq!(make(&view, "/sys", Kind::Directory, ""), Err(Errno::EEXIST));
    // So does who lists the directory.
    assert_eq!(view.root.inode().lookup("run").err(), Some(Errno::ENOENT));
    let flags = OpenFlags::DIRECTORY;
    view.open(&view.root, "/", flags, 0, Resolve::FOLLOW)
        .unwrap();
    assert!(view.root.inode().lookup("run").is_ok());
    view.root.mount().catch_up(None);
    assert_eq!(find(&view, "/dev/shm"), Err(Errno::ENOENT));
}

#[test]
fn paths_resolve_as_in_linux() {
    let mut view = view(Tmpfs::empty(parts(64), 0o755));
    make(&view, "/a", Kind::Directory, "").unwrap();
    make(&view, "/a/b/", Kind::Directory, "").unwrap();
    make(&view, "/a/file", Kind::Regular, "").unwrap();
    make(&view, "/a/link", Kind::SymbolicLink, "b/../file").unwrap();
    make(&view, "/top", Kind::SymbolicLink, "/a").unwrap();
    make(&view, "/loop", Kind::SymbolicLink, "loop").unwrap();
    make(&view, "/nowhere", Kind::SymbolicLink, "/missing").unwrap();
    assert_eq!(find(&view, "/top/link").unwrap(), "/a/file");
    assert_eq!(find(&view, "//a/./b/..//b").unwrap(), "/a/b");
    assert_eq!(find(&view, "/../../a").unwrap(), "/a");
    assert_eq!(find(&view, "/top/").unwrap(), "/a");
    assert_eq!(find(&view, "/a/file/"), Err(Errno::ENOTDIR));
    assert_eq!(find(&view, "/a/file/.."), Err(Errno::ENOTDIR));
    assert_eq!(find(&view, "/loop"), Err(Errno::ELOOP));
    assert_eq!(find(&view, "/nowhere"), Err(Errno::ENOENT));
    assert_eq!(find(&view, ""), Err(Errno::ENOENT));
    assert_eq!(find(&view, &"x".repeat(256)), Err(Errno::ENAMETOOLONG));
    assert_eq!(find(&view, &"x/".repeat(3000)), Err(Errno::ENAMETOOLONG));
    assert_eq!(
        make(&view, "/a/new/", Kind::Regular, ""),
        Err(Errno::ENOENT)
    );
    assert_eq!(make(&view, "/a/b", Kind::Directory, ""), Err(Errno::EEXIST));
    assert_eq!(make(&view, "/", Kind::Directory, ""), Err(Errno::EEXIST));

    let open = |view: &View, path: &str, flags: OpenFlags| {
        view.open(&view.root, path, flags, 0o666, Resolve::empty())
    };
    let create = OpenFlags::CREATE | OpenFlags::READ_WRITE;
    assert_eq!(
        open(&view, "/loop", OpenFlags::NO_FOLLOW).err(),
        Some(Errno::ELOOP)
    );
    assert_eq!(open(&view, "/a", create).err(), Some(Errno::EISDIR));
    assert_eq!(
        open(&view, "/a", OpenFlags::WRITE_ONLY).err(),
        Some(Errno::EISDIR)
    );
    assert_eq!(
        open(&view, "/a/file", OpenFlags::DIRECTORY).err(),
        Some(Errno::ENOTDIR)
    );
    assert_eq!(
        open(&view, "/nowhere", create | OpenFlags::EXCLUSIVE).err(),
        Some(Errno::EEXIST)
    );
    let file = open(&view, "/nowhere", create).unwrap();
    assert_eq!(file.path.as_deref(), Some("/missing"));
    assert_eq!(file.file.metadata().unwrap().permissions, 0o644);

    // A working directory that is renamed keeps its way.
    view.working_directory = view
        .find(&view.root, "/a/b", Resolve::FOLLOW)
        .unwrap()
        .location();
    view.rename(&view.root, "/a", &view.root, "/z", 0).unwrap();
    assert_eq!(view.working_directory.path(), "/z/b");
    let up = view
        .find(&view.working_directory, "../file", Resolve::FOLLOW)
        .unwrap();
    assert_eq!(up.path(), "/z/file");
    assert_eq!(
        view.rename(&view.root, "/z", &view.root, "/z/b/c", 0),
        Err(Errno::EINVAL)
    );
    assert_eq!(view.remove(&view.root, "/z", true), Err(Errno::ENOTEMPTY));
    assert_eq!(view.remove(&view.root, "/z/b", false), Err(Errno::EISDIR));
    assert_eq!(view.remove(&view.root, "/z/.", true), Err(Errno::EINVAL));
    assert_eq!(view.remove(&view.root, "/", true), Err(Errno::EBUSY));
}

#[test]
fn mounts_hide_and_can_be_left() {
    let view = view(Tmpfs::empty(parts(64), 0o755));
    make(&view, "/m", Kind::Directory, "").unwrap();
    make(&view, "/m/hidden", Kind::Directory, "").unwrap();
    let place = view
        .find(&view.root, "/m", Resolve::FOLLOW)
        .unwrap()
        .location();
    let other = Tmpfs::empty(parts(64), 0o755);
    let source = MountSource {
        kind: "tmpfs",
        source: "other",
        read_only: true,
        root: other,
    };
    place.mount_here(source, 2).unwrap();
    assert_eq!(find(&view, "/m/hidden"), Err(Errno::ENOENT));
    assert_eq!(find(&view, "/m/..").unwrap(), "/");
    assert_eq!(make(&view, "/m/new", Kind::Regular, ""), Err(Errno::EROFS));
    assert_eq!(view.remove(&view.root, "/m", true), Err(Errno::EBUSY));
    let inside = view
        .find(&view.root, "/m", Resolve::FOLLOW)
        .unwrap()
        .location();
    assert_eq!(
        view.find(&inside, "..", Resolve::FOLLOW).unwrap().path(),
        "/"
    );
    assert_eq!(
        view.find(&inside, "..", Resolve::ONE_MOUNT).err(),
        Some(Errno::EXDEV)
    );
    assert_eq!(
        view.find(&inside, "..", Resolve::BENEATH).err(),
        Some(Errno::EXDEV)
    );
    assert_eq!(
        view.find(&inside, "../../..", Resolve::IN_ROOT)
            .unwrap()
            .path(),
        "/m"
    );
}

#[test]
fn permissions_hold_for_others_than_root() {
    let mut view = view(Tmpfs::empty(parts(64), 0o755));
    make(&view, "/private", Kind::Directory, "").unwrap();
    make(&view, "/private/f", Kind::Regular, "").unwrap();
    let walk = view.find(&view.root, "/private", Resolve::FOLLOW).unwrap();
    let change = MetadataChange {
        permissions: Some(0o700),
        ..MetadataChange::default()
    };
    view.change(walk.inode(), walk.mount(), &change).unwrap();
    view.identity.uid = 1000;
    view.identity.gid = 1000;
    assert_eq!(find(&view, "/private/f"), Err(Errno::EACCES));
    assert_eq!(make(&view, "/new", Kind::Regular, ""), Err(Errno::EACCES));
    let walk = view.find(&view.root, "/private", Resolve::FOLLOW).unwrap();
    let (inode, mount) = (Arc::clone(walk.inode()), Arc::clone(walk.mount()));
    let open = MetadataChange {
        permissions: Some(0o777),
        ..MetadataChange::default()
    };
    assert_eq!(view.change(&inode, &mount, &open), Err(Errno::EPERM));
}

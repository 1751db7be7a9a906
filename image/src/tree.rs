//! The file tree that goes into an image's root, and how files of the host get into it.
//!
//! A [`Tree`] is put together in memory; contents of host files stay on the host until the file system is
//! written. Paths are absolute and normal (no `.`, `..` or empty parts); links in the tree are followed when
//! something is put below them, as a file system would.
//!
//! What is taken from the host, so that the same input gives the same bytes for everybody:
//!
//! * permission bits of files and directories as they are;
//! * owners: system accounts (below [`FIRST_PERSON`]) are kept, everybody else's files become root's;
//! * times of regular files, but none later than `SOURCE_DATE_EPOCH` if that is set; everything else carries the
//!   time of the newest regular file.

use std::{
    collections::BTreeMap,
    fs::{self, Metadata as HostMetadata},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use crate::{Error, Result};

/// First user and group number of people on Linux distributions.
pub const FIRST_PERSON: u32 = 1000;
/// Links followed before a loop is assumed, as in Linux.
const MAX_LINKS: usize = 40;
/// Bytes that are read at once.
const PIECE: u64 = 1 << 18;
/// Deepest directories.
const MAX_DEPTH: usize = 256;

/// Where a file's bytes come from.
#[derive(Clone, Debug)]
pub enum Content {
    /// From memory.
    Bytes(Arc<[u8]>),
    /// From a file of the host, which must keep this length.
    Host {
        /// The file.
        path: PathBuf,
        /// Length in bytes.
        length: u64,
    },
}

impl Content {
    /// Length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Host { length, .. } => *length,
        }
    }

    /// All bytes.
    ///
    /// # Errors
    ///
    /// The host's file cannot be read or has changed its length.
    pub fn read(&self) -> Result<Arc<[u8]>> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.clone()),
            Self::Host { path, length } => {
                let bytes = fs::read(path).map_err(Error::io("read", path))?;
                if bytes.len() as u64 != *length {
                    return Err(Error::Changed { path: path.clone() });
                }
                Ok(bytes.into())
            }
        }
    }

    /// Hands all bytes over, piece by piece, so that large files never lie in memory.
    ///
    /// # Errors
    ///
    /// The host's file cannot be read or has changed its length; those of `take`.
    pub fn stream(&self, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        use std::io::Read;
        let (path, length) = match self {
            Self::Bytes(bytes) => return take(bytes),
            Self::Host { path, length } => (path, *length),
        };
        let mut file = fs::File::open(path).map_err(Error::io("read", path))?;
        // A byte more than the file should have: so that a longer one is noticed.
        let mut buffer = vec![0; length.min(PIECE) as usize + 1];
        let mut left = length;
        loop {
            let count = file.read(&mut buffer).map_err(Error::io("read", path))?;
            if count == 0 && left == 0 {
                return Ok(());
            }
            if count == 0 || count as u64 > left {
                return Err(Error::Changed { path: path.clone() });
            }
            left -= count as u64;
            take(buffer.get(..count).unwrap_or_default())?;
        }
    }

    /// The first bytes, up to four.
    pub(crate) fn start(&self) -> Result<Vec<u8>> {
        use std::io::Read;
        match self {
            Self::Bytes(bytes) => Ok(bytes.iter().take(4).copied().collect()),
            Self::Host { path, .. } => {
                let mut start = Vec::new();
                fs::File::open(path)
                    .and_then(|file| file.take(4).read_to_end(&mut start))
                    .map_err(Error::io("read", path))?;
                Ok(start)
            }
        }
    }
}

/// Owner, permissions and time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits (12 bits).
    pub mode: u16,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970 and nanoseconds; none: the time of the newest file.
    pub time: Option<(i64, u32)>,
}

impl Metadata {
    /// Root's, with these permission bits.
    #[must_use]
    pub const fn with_mode(mode: u16) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            time: None,
        }
    }

    fn of(host: &HostMetadata) -> Self {
        let person = |id: u32| if id < FIRST_PERSON { id } else { 0 };
        Self {
            mode: (host.mode() & 0o7777) as u16,
            uid: person(host.uid()),
            gid: person(host.gid()),
            time: host
                .is_file()
                .then(|| (host.mtime(), host.mtime_nsec() as u32)),
        }
    }
}

/// Something with a name.
#[derive(Clone, Debug)]
pub enum Node {
    /// A directory.
    Directory(Directory),
    /// A regular file.
    File {
        /// Its bytes.
        content: Content,
        /// Owner, permissions, time.
        metadata: Metadata,
    },
    /// A symbolic link.
    Link {
        /// Where it points.
        target: Vec<u8>,
    },
}

/// A directory.
#[derive(Clone, Debug, Default)]
pub struct Directory {
    /// What is in it, in the order of bytes.
    pub entries: BTreeMap<Vec<u8>, Node>,
    /// Owner and permissions.
    pub metadata: Metadata,
}

/// A file tree.
#[derive(Clone, Debug)]
pub struct Tree {
    /// The directory `/`.
    pub root: Directory,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

/// The parts of an absolute path, `.` and `..` resolved by their names.
#[must_use]
pub fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            _ => parts.push(part.to_vec()),
        }
    }
    parts
}

/// Parts as an absolute path.
#[must_use]
pub fn joined(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut path = Vec::new();
    for part in parts {
        path.push(b'/');
        path.extend_from_slice(part);
    }
    if path.is_empty() {
        path.push(b'/');
    }
    path
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

impl Tree {
    /// A tree with nothing but `/`.
    #[must_use]
    pub fn new() -> Self {
        Self {
            root: Directory {
                metadata: Metadata::with_mode(0o755),
                ..Directory::default()
            },
        }
    }

    /// What is at a path; the last part is not followed when it is a link.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Node> {
        let real = self.real_parts(parts(path.as_bytes()), false)?;
        self.node(&real)
    }

    /// What is at a path, all links followed.
    #[must_use]
    pub fn get_following(&self, path: &str) -> Option<&Node> {
        let real = self.real_parts(parts(path.as_bytes()), true)?;
        self.node(&real)
    }

    /// The path without links of something in the tree.
    #[must_use]
    pub fn real_path(&self, path: &[u8]) -> Option<Vec<u8>> {
        let real = self.real_parts(parts(path), true)?;
        (real.is_empty() || self.node(&real).is_some()).then(|| joined(&real))
    }

    /// The node at a path without links. None for `/` itself.
    fn node(&self, real: &[Vec<u8>]) -> Option<&Node> {
        let (last, parents) = real.split_last()?;
        let mut directory = &self.root;
        for part in parents {
            let Node::Directory(next) = directory.entries.get(part)? else {
                return None;
            };
            directory = next;
        }
        directory.entries.get(last)
    }

    /// Follows links. Parts that do not exist yet are kept. None: a loop.
    fn real_parts(&self, path: Vec<Vec<u8>>, follow_last: bool) -> Option<Vec<Vec<u8>>> {
        let mut left: Vec<Vec<u8>> = path.into_iter().rev().collect();
        let mut real: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        while let Some(part) = left.pop() {
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    real.pop();
                    continue;
                }
                _ => real.push(part),
            }
            if left.is_empty() && !follow_last {
                break;
            }
            if let Some(Node::Link { target }) = self.node(&real) {
                links += 1;
                if links > MAX_LINKS {
                    return None;
                }
                real.pop();
                if target.starts_with(b"/") {
                    real.clear();
                }
                left.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
            }
        }
        Some(real)
    }

    /// The directory at a path, made with its parents if missing.
    ///
    /// # Errors
    ///
    /// Something that is no directory is in the way.
    pub fn directory(&mut self, path: &[u8]) -> Result<&mut Directory> {
        let real = self
            .real_parts(parts(path), true)
            .ok_or_else(|| Error::Tree {
                path: shown(path),
                reason: "its links go round in circles".into(),
            })?;
        if real.len() > MAX_DEPTH {
            return Err(Error::Tree {
                path: shown(path),
                reason: "is nested too deeply".into(),
            });
        }
        let mut directory = &mut self.root;
        for part in real {
            let node = directory.entries.entry(part).or_insert_with(|| {
                Node::Directory(Directory {
                    metadata: Metadata::with_mode(0o755),
                    ..Directory::default()
                })
            });
            let Node::Directory(next) = node else {
                return Err(Error::Tree {
                    path: shown(path),
                    reason: "a part of it is a file, not a directory".into(),
                });
            };
            directory = next;
        }
        Ok(directory)
    }

    /// Puts something at a path, with the directories above. Files and links replace files and links.
    ///
    /// # Errors
    ///
    /// A directory would be replaced by a file, or the other way round.
    pub fn insert(&mut self, path: &[u8], node: Node) -> Result<()> {
        let mut all = parts(path);
        let Some(name) = all.pop() else {
            return Err(Error::Tree {
                path: "/".into(),
                reason: "is always a directory".into(),
            });
        };
        if name.len() > 255 || path.contains(&0) {
            return Err(Error::Tree {
                path: shown(path),
                reason: "has a name that is too long, or a zero byte".into(),
            });
        }
        let parent = self.directory(&joined(&all))?;
        match (parent.entries.get_mut(&name), node) {
            (Some(Node::Directory(old)), Node::Directory(new)) if new.entries.is_empty() => {
                old.metadata = new.metadata;
            }
            (Some(Node::Directory(_)), _) => {
                return Err(Error::Tree {
                    path: shown(path),
                    reason: "is a directory, and a file should go there".into(),
                });
            }
            (Some(_), Node::Directory(_)) => {
                return Err(Error::Tree {
                    path: shown(path),
                    reason: "is a file, and a directory should go there".into(),
                });
            }
            (_, node) => {
                parent.entries.insert(name, node);
            }
        }
        Ok(())
    }

    /// Puts a file made by Kiln at a path, unless something is there already.
    ///
    /// # Errors
    ///
    /// As [`Tree::insert`].
    pub fn provide(&mut self, path: &str, text: &str) -> Result<()> {
        if self.get(path).is_some() {
            return Ok(());
        }
        let node = Node::File {
            content: Content::Bytes(text.as_bytes().into()),
            metadata: Metadata::with_mode(0o644),
        };
        self.insert(path.as_bytes(), node)
    }

    /// Makes a directory with these permission bits, unless there is something.
    ///
    /// # Errors
    ///
    /// As [`Tree::directory`].
    pub fn provide_directory(&mut self, path: &str, mode: u16) -> Result<()> {
        if self.get_following(path).is_none() {
            self.directory(path.as_bytes())?.metadata.mode = mode;
        }
        Ok(())
    }

    /// Gives regular files new contents: what `change` returns, if it returns something.
    ///
    /// # Errors
    ///
    /// Those of `change`.
    pub fn change_contents(
        &mut self,
        change: &mut dyn FnMut(&Content) -> Result<Option<Content>>,
    ) -> Result<()> {
        fn descend(
            directory: &mut Directory,
            change: &mut dyn FnMut(&Content) -> Result<Option<Content>>,
        ) -> Result<()> {
            for node in directory.entries.values_mut() {
                match node {
                    Node::Directory(directory) => descend(directory, change)?,
                    Node::File { content, .. } => {
                        if let Some(new) = change(content)? {
                            *content = new;
                        }
                    }
                    Node::Link { .. } => {}
                }
            }
            Ok(())
        }
        descend(&mut self.root, change)
    }

    /// Calls `visit` for every node below `/` with its path, parents before children, names in the order of bytes.
    ///
    /// # Errors
    ///
    /// Those of `visit`.
    pub fn walk(&self, visit: &mut dyn FnMut(&[u8], &Node) -> Result<()>) -> Result<()> {
        fn descend(
            directory: &Directory,
            path: &mut Vec<u8>,
            visit: &mut dyn FnMut(&[u8], &Node) -> Result<()>,
        ) -> Result<()> {
            for (name, node) in &directory.entries {
                let length = path.len();
                path.push(b'/');
                path.extend_from_slice(name);
                visit(path, node)?;
                if let Node::Directory(directory) = node {
                    descend(directory, path, visit)?;
                }
                path.truncate(length);
            }
            Ok(())
        }
        descend(&self.root, &mut Vec::new(), visit)
    }
}

/// Takes files from the host into a tree.
#[derive(Debug)]
pub struct Packer<'a> {
    /// The tree that grows.
    pub tree: &'a mut Tree,
    /// What counts as `/` of the host.
    pub system_root: &'a Path,
    /// What was left out, and why, for the user.
    pub notes: Vec<String>,
}

/// Which names are left out of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hidden {
    /// None.
    Keep,
    /// Names with a dot in front (but `.well-known`), and `kiln.toml`: what is not part of a site.
    LeaveOut,
}

impl Hidden {
    fn leaves_out(self, name: &[u8]) -> bool {
        self == Self::LeaveOut
            && (name == crate::project::FILE_NAME.as_bytes()
                || (name.starts_with(b".") && name != b".well-known"))
    }
}

impl Packer<'_> {
    /// Where an absolute path of the packed system is on the host.
    #[must_use]
    pub fn on_host(&self, path: &[u8]) -> PathBuf {
        let relative: &Path = Path::new(std::ffi::OsStr::from_bytes(path));
        self.system_root
            .join(relative.strip_prefix("/").unwrap_or(relative))
    }

    /// Packs a system file at its own path, with every link on the way. Returns the path without links, or `None`
    /// if there is no such file.
    ///
    /// # Errors
    ///
    /// The host's file system cannot be read, or the tree has something else there.
    pub fn system_file(&mut self, path: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut left: Vec<Vec<u8>> = parts(path).into_iter().rev().collect();
        let mut real: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        while let Some(part) = left.pop() {
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    real.pop();
                    continue;
                }
                _ => real.push(part),
            }
            let here = joined(&real);
            let host = self.on_host(&here);
            let metadata = match fs::symlink_metadata(&host) {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(Error::io("look at", host)(error)),
            };
            if metadata.is_symlink() {
                links += 1;
                if links > MAX_LINKS {
                    return Ok(None);
                }
                let target = fs::read_link(&host).map_err(Error::io("read", host))?;
                let target = target.as_os_str().as_bytes().to_vec();
                if self.tree.node(&real).is_none() {
                    self.tree.insert(
                        &here,
                        Node::Link {
                            target: target.clone(),
                        },
                    )?;
                }
                real.pop();
                if target.starts_with(b"/") {
                    real.clear();
                }
                left.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
            } else if self.tree.node(&real).is_none() {
                let node = host_node(&host, &metadata);
                if let Some(node) = node {
                    self.tree.insert(&here, node)?;
                }
            }
        }
        Ok(Some(joined(&real)))
    }

    /// Packs a file or directory of the host, with all that is in it, at a path of the image. Links inside it are
    /// kept; what links outside point to is packed too: at its own path when the directory keeps its path, in
    /// place of the link otherwise.
    ///
    /// # Errors
    ///
    /// The host's files cannot be read, or the tree has something else there.
    pub fn everything(&mut self, from: &Path, to: &[u8], hidden: Hidden) -> Result<()> {
        let metadata = match fs::metadata(from) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::NoSource { path: from.into() });
            }
            Err(error) => return Err(Error::io("look at", from)(error)),
        };
        if !metadata.is_dir() {
            let node = host_node(from, &metadata).ok_or_else(|| Error::BadSource {
                path: from.into(),
                reason: "is neither a file nor a directory".into(),
                remedy: "leave it out".into(),
            })?;
            return self.tree.insert(to, node);
        }
        let top = fs::canonicalize(from).map_err(Error::io("look at", from))?;
        let keeps_path = self.on_host(to) == from;
        let walk = Walk {
            top,
            keeps_path,
            hidden,
        };
        if parts(to).is_empty() {
            self.tree.root.metadata = Metadata::of(&metadata);
        } else {
            self.tree.insert(
                to,
                Node::Directory(Directory {
                    metadata: Metadata::of(&metadata),
                    ..Directory::default()
                }),
            )?;
        }
        self.contents(&walk, from, &joined(&parts(to)), 0)
    }

    fn contents(&mut self, walk: &Walk, from: &Path, to: &[u8], depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(Error::BadSource {
                path: from.into(),
                reason: "is nested too deeply".into(),
                remedy: "look for a link that leads back up".into(),
            });
        }
        for entry in fs::read_dir(from).map_err(Error::io("list", from))? {
            let entry = entry.map_err(Error::io("list", from))?;
            let name = entry.file_name();
            if walk.hidden.leaves_out(name.as_bytes()) {
                continue;
            }
            let host = entry.path();
            let mut path = to.to_vec();
            if path != b"/" {
                path.push(b'/');
            }
            path.extend_from_slice(name.as_bytes());
            let mut metadata = fs::symlink_metadata(&host).map_err(Error::io("look at", &host))?;
            if metadata.is_symlink() {
                let target = fs::read_link(&host).map_err(Error::io("read", &host))?;
                let real = fs::canonicalize(&host);
                let inside = real.as_ref().is_ok_and(|real| {
                    real.starts_with(&walk.top) && (target.is_relative() || walk.keeps_path)
                });
                match real {
                    Ok(real) if !inside => {
                        if walk.keeps_path && self.system_root == Path::new("/") {
                            self.system_file(&path)?;
                            continue;
                        }
                        metadata = fs::metadata(&real).map_err(Error::io("look at", &real))?;
                        if metadata.is_dir() && walk.top.starts_with(&real) {
                            self.notes
                                .push(format!("{} is left out: it leads back up", host.display()));
                            continue;
                        }
                    }
                    _ => {
                        let target = target.as_os_str().as_bytes().to_vec();
                        self.tree.insert(&path, Node::Link { target })?;
                        continue;
                    }
                }
            }
            match host_node(&host, &metadata) {
                Some(node) => {
                    let directory = matches!(node, Node::Directory(_));
                    if !directory
                        && fs::File::open(&host)
                            .is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied)
                    {
                        self.notes.push(format!(
                            "{} is left out: you may not read it",
                            host.display()
                        ));
                        continue;
                    }
                    self.tree.insert(&path, node)?;
                    if directory {
                        self.contents(walk, &host, &path, depth + 1)?;
                    }
                }
                None => self.notes.push(format!(
                    "{} is left out: it is a socket, pipe or device",
                    host.display()
                )),
            }
        }
        Ok(())
    }
}

/// What holds for one call of [`Packer::everything`].
struct Walk {
    top: PathBuf,
    keeps_path: bool,
    hidden: Hidden,
}

/// A node without children for a file or directory of the host; none for what cannot be packed.
pub(crate) fn host_node(path: &Path, host: &HostMetadata) -> Option<Node> {
    let metadata = Metadata::of(host);
    if host.is_dir() {
        Some(Node::Directory(Directory {
            metadata,
            ..Directory::default()
        }))
    } else if host.is_file() {
        let content = Content::Host {
            path: path.into(),
            length: host.len(),
        };
        Some(Node::File { content, metadata })
    } else {
        None
    }
}

/// An absolute path of the host without `.` and `..`, links not followed.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).map_err(Error::io("look at", path))?;
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                clean.pop();
            }
            other => clean.push(other),
        }
    }
    Ok(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Node {
        Node::File {
            content: Content::Bytes(text.as_bytes().into()),
            metadata: Metadata::with_mode(0o644),
        }
    }

    #[test]
    fn links_in_the_tree_are_followed() {
        let mut tree = Tree::new();
        tree.insert(
            b"/lib",
            Node::Link {
                target: b"usr/lib".to_vec(),
            },
        )
        .unwrap();
        tree.insert(b"/lib/x/a", file("a")).unwrap();
        assert!(matches!(tree.get("/usr/lib/x/a"), Some(Node::File { .. })));
        assert!(matches!(tree.get("/lib"), Some(Node::Link { .. })));
        assert_eq!(tree.real_path(b"/lib/x/a").unwrap(), b"/usr/lib/x/a");
        assert_eq!(tree.real_path(b"/lib/x/b"), None);
    }

    #[test]
    fn circles_and_collisions_are_refused() {
        let mut tree = Tree::new();
        tree.insert(
            b"/a",
            Node::Link {
                target: b"b".to_vec(),
            },
        )
        .unwrap();
        tree.insert(
            b"/b",
            Node::Link {
                target: b"a".to_vec(),
            },
        )
        .unwrap();
        assert!(tree.insert(b"/a/x", file("")).is_err());
        tree.insert(b"/d/f", file("")).unwrap();
        assert!(tree.insert(b"/d", file("")).is_err());
        assert!(tree.insert(b"/d/f/g", file("")).is_err());
        assert!(tree.insert(b"/", file("")).is_err());
        tree.insert(b"/d/f", file("new")).unwrap();
    }
}

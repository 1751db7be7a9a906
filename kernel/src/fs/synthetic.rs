//! Files whose contents are made up when they are read: what `/proc` and `/sys` are made of.
//!
//! A file's text is made when it is read from its start, and stays the same while the rest of it is read.

use alloc::{
    boxed::Box,
    string::{String, ToString},
    sync::Arc,
    vec::Vec,
};
use core::{
    any::Any,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{DirectoryEntry, FileSystemStatistics, Inode, Kind, Metadata, vfs::Location};
use crate::{
    Errno, Result,
    file::{File, OpenFlags, Sink, Source},
    sync::Mutex,
};

static NEXT_INODE: AtomicU64 = AtomicU64::new(1);

fn next_inode() -> u64 {
    NEXT_INODE.fetch_add(1, Ordering::Relaxed)
}

/// Which file system a synthetic file says it belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// Device number in `st_dev`.
    pub device: u64,
    /// Magic number for `statfs`.
    pub magic: u32,
}

fn metadata(origin: Origin, inode: u64, kind: Kind, permissions: u32) -> Metadata {
    Metadata {
        device: origin.device,
        inode,
        kind,
        permissions,
        links: if kind == Kind::Directory { 2 } else { 1 },
        uid: 0,
        gid: 0,
        special_device: 0,
        size: 0,
        block_size: 4096,
        blocks: 0,
        accessed: 0,
        modified: 0,
        changed: 0,
    }
}

fn statistics(origin: Origin) -> FileSystemStatistics {
    FileSystemStatistics {
        magic: u64::from(origin.magic),
        block_size: 4096,
        ..FileSystemStatistics::default()
    }
}

/// Makes a file's contents.
pub type Generate = Box<dyn Fn() -> Result<Vec<u8>> + Send + Sync>;
/// Takes what was written.
pub type Store = Box<dyn Fn(&[u8]) -> Result<()> + Send + Sync>;

/// A file.
pub struct TextFile {
    origin: Origin,
    inode: u64,
    permissions: u32,
    generate: Generate,
    store: Option<Store>,
}

impl TextFile {
    /// A file that can be read.
    #[must_use]
    pub fn inode(
        origin: Origin,
        generate: impl Fn() -> Result<Vec<u8>> + Send + Sync + 'static,
    ) -> Arc<dyn Inode> {
        let generate = Box::new(generate);
        Arc::new(TextFile {
            origin,
            inode: next_inode(),
            permissions: 0o444,
            generate,
            store: None,
        })
    }

    /// A file with a text that never changes.
    #[must_use]
    pub fn fixed(origin: Origin, text: &'static str) -> Arc<dyn Inode> {
        TextFile::inode(origin, move || Ok(text.as_bytes().to_vec()))
    }

    /// A file that can be read and written.
    #[must_use]
    pub fn writable(
        origin: Origin,
        generate: impl Fn() -> Result<Vec<u8>> + Send + Sync + 'static,
        store: impl Fn(&[u8]) -> Result<()> + Send + Sync + 'static,
    ) -> Arc<dyn Inode> {
        let (generate, store) = (Box::new(generate), Some(Box::new(store) as Store));
        Arc::new(TextFile {
            origin,
            inode: next_inode(),
            permissions: 0o644,
            generate,
            store,
        })
    }

    /// A file that root can write, for what writing it does; reading it is `EIO`.
    #[must_use]
    pub fn trigger(
        origin: Origin,
        act: impl Fn(&[u8]) -> Result<()> + Send + Sync + 'static,
    ) -> Arc<dyn Inode> {
        Arc::new(TextFile {
            origin,
            inode: next_inode(),
            permissions: 0o200,
            generate: Box::new(|| Err(Errno::EIO)),
            store: Some(Box::new(act)),
        })
    }
}

impl Inode for TextFile {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(metadata(
            self.origin,
            self.inode,
            Kind::Regular,
            self.permissions,
        ))
    }

    fn change(&self, change: &super::MetadataChange) -> Result<()> {
        // Opening with O_TRUNC, as shells do, is allowed; attributes are not kept.
        if change.size == Some(0) && self.store.is_some() {
            Ok(())
        } else {
            Err(Errno::EPERM)
        }
    }

    fn open(self: Arc<Self>, flags: OpenFlags) -> Result<Arc<dyn File>> {
        if flags.writable() && self.store.is_none() {
            return Err(Errno::EACCES);
        }
        let inode: Arc<dyn Inode> = Arc::clone(&self) as Arc<dyn Inode>;
        Ok(Arc::new(OpenText {
            file: self,
            inode,
            text: Mutex::new(None),
        }))
    }

    fn statistics(&self) -> Result<FileSystemStatistics> {
        Ok(statistics(self.origin))
    }
}

struct OpenText {
    file: Arc<TextFile>,
    inode: Arc<dyn Inode>,
    text: Mutex<Option<Vec<u8>>>,
}

impl File for OpenText {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn is_seekable(&self) -> bool {
        true
    }

    fn read_at(&self, position: u64, sink: &mut Sink<'_>) -> Result<usize> {
        let mut text = self.text.lock();
        let bytes = match &mut *text {
            Some(bytes) if position > 0 => bytes,
            text => text.insert((self.file.generate)()?),
        };
        match usize::try_from(position)
            .ok()
            .and_then(|position| bytes.get(position..))
        {
            Some(rest) => sink.put(rest),
            None => Ok(0),
        }
    }

    fn write_at(&self, _: u64, source: &mut Source<'_>) -> Result<usize> {
        let store = self.file.store.as_ref().ok_or(Errno::EACCES)?;
        let bytes = source.take_vector(4096)?;
        store(&bytes)?;
        Ok(bytes.len())
    }

    fn metadata(&self) -> Result<Metadata> {
        self.file.metadata()
    }

    fn inode(&self) -> Option<&Arc<dyn Inode>> {
        Some(&self.inode)
    }

    fn describe(&self) -> String {
        String::from("file")
    }
}

/// Names that are not known beforehand.
pub trait Names: Send + Sync {
    /// The file with a name.
    ///
    /// # Errors
    /// `ENOENT`.
    fn lookup(&self, name: &str) -> Result<Arc<dyn Inode>>;

    /// All names there are now.
    fn list(&self) -> Vec<(String, Kind)>;
}

/// Stands for a directory until somebody looks into it.
struct Later<F> {
    make: F,
    made: spin::Once<Arc<dyn Inode>>,
}

impl<F: Fn() -> Arc<dyn Inode> + Send + Sync> Later<F> {
    fn directory(&self) -> &Arc<dyn Inode> {
        self.made.call_once(|| (self.make)())
    }
}

impl<F: Fn() -> Arc<dyn Inode> + Send + Sync> Names for Later<F> {
    fn lookup(&self, name: &str) -> Result<Arc<dyn Inode>> {
        self.directory().lookup(name)
    }

    fn list(&self) -> Vec<(String, Kind)> {
        let entries = self.directory().entries(0, usize::MAX);
        entries
            .unwrap_or_default()
            .into_iter()
            .map(|entry| (entry.name, entry.kind))
            .collect()
    }
}

/// A directory.
pub struct TextDirectory {
    origin: Origin,
    inode: u64,
    fixed: Vec<(&'static str, Arc<dyn Inode>)>,
    dynamic: Option<Box<dyn Names>>,
}

impl TextDirectory {
    /// A directory of known files.
    #[must_use]
    pub fn inode(origin: Origin, fixed: Vec<(&'static str, Arc<dyn Inode>)>) -> Arc<dyn Inode> {
        Arc::new(TextDirectory {
            origin,
            inode: next_inode(),
            fixed,
            dynamic: None,
        })
    }

    /// A directory of which most is made when somebody first asks for more than `first`: a program looks into few, and each
    /// start counts.
    #[must_use]
    pub fn later(
        origin: Origin,
        first: Vec<(&'static str, Arc<dyn Inode>)>,
        make: impl Fn() -> Arc<dyn Inode> + Send + Sync + 'static,
    ) -> Arc<dyn Inode> {
        TextDirectory::with_names(
            origin,
            first,
            Later {
                make,
                made: spin::Once::new(),
            },
        )
    }

    /// A directory of known files and of others.
    #[must_use]
    pub fn with_names(
        origin: Origin,
        fixed: Vec<(&'static str, Arc<dyn Inode>)>,
        names: impl Names + 'static,
    ) -> Arc<dyn Inode> {
        Arc::new(TextDirectory {
            origin,
            inode: next_inode(),
            fixed,
            dynamic: Some(Box::new(names)),
        })
    }
}

impl Inode for TextDirectory {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(metadata(self.origin, self.inode, Kind::Directory, 0o555))
    }

    fn change(&self, _: &super::MetadataChange) -> Result<()> {
        Err(Errno::EPERM)
    }

    fn lookup(&self, name: &str) -> Result<Arc<dyn Inode>> {
        if let Some((_, inode)) = self.fixed.iter().find(|(known, _)| *known == name) {
            return Ok(Arc::clone(inode));
        }
        self.dynamic.as_ref().ok_or(Errno::ENOENT)?.lookup(name)
    }

    fn entries(&self, position: u64, limit: usize) -> Result<Vec<DirectoryEntry>> {
        let mut names = Vec::with_capacity(self.fixed.len());
        for (name, inode) in &self.fixed {
            names.push((name.to_string(), inode.metadata()?.kind));
        }
        if let Some(dynamic) = &self.dynamic {
            names.extend(dynamic.list());
        }
        let start = usize::try_from(position).unwrap_or(usize::MAX);
        Ok(names
            .into_iter()
            .enumerate()
            .skip(start)
            .take(limit)
            .map(|(index, (name, kind))| DirectoryEntry {
                name,
                inode: self.inode + 1,
                kind,
                next: index as u64 + 1,
            })
            .collect())
    }

    fn create(&self, _: &str, _: &super::Creation<'_>) -> Result<Arc<dyn Inode>> {
        // What Linux's /proc says to everybody.
        Err(Errno::ENOENT)
    }

    fn unlink(&self, _: &str, _: bool) -> Result<()> {
        Err(Errno::EPERM)
    }

    fn open(self: Arc<Self>, _: OpenFlags) -> Result<Arc<dyn File>> {
        Err(Errno::EISDIR)
    }

    fn statistics(&self) -> Result<FileSystemStatistics> {
        Ok(statistics(self.origin))
    }
}

/// Finds where a magic link leads.
pub type Jump = Box<dyn Fn() -> Result<Location> + Send + Sync>;

/// A symbolic link, ordinary or magic.
pub struct TextLink {
    origin: Origin,
    inode: u64,
    target: Box<dyn Fn() -> Result<String> + Send + Sync>,
    jump: Option<Jump>,
}

impl TextLink {
    /// A link whose target is made up when it is read.
    #[must_use]
    pub fn inode(
        origin: Origin,
        target: impl Fn() -> Result<String> + Send + Sync + 'static,
    ) -> Arc<dyn Inode> {
        Arc::new(TextLink {
            origin,
            inode: next_inode(),
            target: Box::new(target),
            jump: None,
        })
    }

    /// A link that leads to a place whatever its text says.
    #[must_use]
    pub fn magic(
        origin: Origin,
        target: impl Fn() -> Result<String> + Send + Sync + 'static,
        jump: impl Fn() -> Result<Location> + Send + Sync + 'static,
    ) -> Arc<dyn Inode> {
        let (target, jump) = (Box::new(target), Some(Box::new(jump) as Jump));
        Arc::new(TextLink {
            origin,
            inode: next_inode(),
            target,
            jump,
        })
    }
}

impl Inode for TextLink {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(metadata(self.origin, self.inode, Kind::SymbolicLink, 0o777))
    }

    fn is_symbolic_link(&self) -> bool {
        true
    }

    fn target(&self) -> Result<String> {
        (self.target)()
    }

    fn jump(&self) -> Option<Result<Location>> {
        self.jump.as_ref().map(|jump| jump())
    }

    fn open(self: Arc<Self>, _: OpenFlags) -> Result<Arc<dyn File>> {
        Err(Errno::ELOOP)
    }

    fn statistics(&self) -> Result<FileSystemStatistics> {
        Ok(statistics(self.origin))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN: Origin = Origin {
        device: 1,
        magic: 2,
    };

    #[test]
    fn text_stays_while_it_is_read_and_is_new_from_the_start() {
        let count = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&count);
        let file = TextFile::inode(ORIGIN, move || {
            Ok(alloc::format!("{:04}", counter.fetch_add(1, Ordering::Relaxed)).into_bytes())
        });
        let open = file.open(OpenFlags::empty()).unwrap();
        let mut bytes = [0; 2];
        open.read_at(0, &mut Sink::kernel(&mut bytes)).unwrap();
        open.read_at(2, &mut Sink::kernel(&mut bytes)).unwrap();
        assert_eq!(&bytes, b"00");
        open.read_at(0, &mut Sink::kernel(&mut bytes)).unwrap();
        open.read_at(2, &mut Sink::kernel(&mut bytes)).unwrap();
        assert_eq!(&bytes, b"01");
        assert_eq!(open.read_at(4, &mut Sink::kernel(&mut bytes)), Ok(0));
    }

    #[test]
    fn directories_list_what_they_have() {
        let make = || {
            TextDirectory::inode(
                ORIGIN,
                alloc::vec![
                    ("one", TextFile::fixed(ORIGIN, "1")),
                    ("two", TextFile::fixed(ORIGIN, "2"))
                ],
            )
        };
        check_listing(&make());
        check_listing(&TextDirectory::later(ORIGIN, Vec::new(), make));
    }

    fn check_listing(directory: &Arc<dyn Inode>) {
        let first = directory.entries(0, 1).unwrap();
        assert_eq!(first[0].name, "one");
        let second = directory.entries(first[0].next, 10).unwrap();
        assert_eq!(second.len(), 1);
        assert_eq!(second[0].name, "two");
        assert!(directory.lookup("three").is_err());
    }
}

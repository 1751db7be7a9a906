//! Volumes: a FUSE client.
//!
//! Messages are those of Linux's `linux/fuse.h`, protocol 7.33; who carries them is a [`Transport`] (the link to the
//! monitor). Every operation is one synchronous round trip.
//!
//! What is kept: attributes and names for as long as the server says; and, while a file is read in order, some bytes
//! ahead. Writes go through at once, so `fsync` has only the server's disk to wait for.
//!
//! Shared mappings: the pages of a file that are mapped lie in the pool (`SharedPages`), where reads and writes of the
//! instance see them. What the program changed there goes to the server with `msync`, `fsync`, `sync`, when the file is
//! closed and at the instance's end, by the page. Changes by the host to such pages are not seen. Private mappings are
//! copies.
//!
//! Nothing here trusts the server: a short or senseless reply is `EIO`.

use alloc::{
    boxed::Box,
    collections::BTreeMap,
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
    MetadataChange, Timestamp, pool::Pool, tmpfs::content::Content, vfs::NAME_MAX,
};
use crate::{
    Errno, Result,
    file::{File, OpenFlags, Sink, Source},
    hash::HashMap,
    sync::Mutex,
};

/// Carries messages to a FUSE server.
pub trait Transport: Send + Sync {
    /// Sends a request (given in pieces) and waits for its reply.
    ///
    /// # Errors
    /// When the server cannot be reached any more.
    fn call(&self, request: &[&[u8]]) -> Result<Vec<u8>>;

    /// Sends a request that has no reply.
    ///
    /// # Errors
    /// As [`Transport::call`].
    fn post(&self, request: &[&[u8]]) -> Result<()>;
}

mod operation {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
}

const PAGE: u64 = PAGE_SIZE as u64;
const MAJOR: u32 = 7;
const MINOR: u32 = 33;
/// `FUSE_BIG_WRITES`, `FUSE_DO_READDIRPLUS`, `FUSE_MAX_PAGES`.
const FEATURES: u32 = 1 << 5 | 1 << 13 | 1 << 22;
const ROOT: u64 = 1;
const REQUEST_HEADER: usize = 40;
const REPLY_HEADER: usize = 16;
const ENTRY: usize = 128;
const ATTRIBUTES: usize = 88;
const DIRECTORY_ENTRY: usize = 24;
/// Bytes of data in one message, at most.
const MAX_DATA: usize = 1 << 20;
/// Bytes read ahead of a program that reads in order.
const READ_AHEAD: usize = 128 << 10;
/// Bytes asked for when listing a directory.
const LISTING: u32 = 64 << 10;
/// Names kept in a directory before stale ones are looked for.
const NAMES_KEPT: usize = 512;
const NANOSECONDS: u64 = 1_000_000_000;
/// `O_*` that are for opening only, or handled here.
const NOT_FOR_SERVER: OpenFlags = OpenFlags::CREATE
    .union(OpenFlags::EXCLUSIVE)
    .union(OpenFlags::TRUNCATE)
    .union(OpenFlags::APPEND)
    .union(OpenFlags::CLOSE_ON_EXEC)
    .union(OpenFlags::DIRECT)
    .union(OpenFlags::ASYNC)
    .union(OpenFlags::NO_CONTROLLING_TERMINAL);

/// Builds the body of a request.
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn word(mut self, value: u32) -> Body {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn long(mut self, value: u64) -> Body {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn name(mut self, name: &str) -> Body {
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(0);
        self
    }
}

/// Takes a reply apart.
struct Parser<'a>(&'a [u8]);

impl<'a> Parser<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let (first, rest) = self.0.split_at_checked(count).ok_or(Errno::EIO)?;
        self.0 = rest;
        Ok(first)
    }

    fn word(&mut self) -> Result<u32> {
        let bytes = self.bytes(4)?;
        bytes
            .try_into()
            .map(u32::from_le_bytes)
            .map_err(|_| Errno::EIO)
    }

    fn long(&mut self) -> Result<u64> {
        let bytes = self.bytes(8)?;
        bytes
            .try_into()
            .map(u64::from_le_bytes)
            .map_err(|_| Errno::EIO)
    }

    /// `struct fuse_attr`.
    fn attributes(&mut self, device: u64) -> Result<Metadata> {
        let mut part = Parser(self.bytes(ATTRIBUTES)?);
        let (inode, size, blocks) = (part.long()?, part.long()?, part.long()?);
        let seconds = [part.long()?, part.long()?, part.long()?];
        let nanoseconds = [part.word()?, part.word()?, part.word()?];
        let time = |index: usize| {
            Timestamp::from(seconds[index].cast_signed()) * Timestamp::from(NANOSECONDS)
                + Timestamp::from(nanoseconds[index])
        };
        let mode = part.word()?;
        let (links, uid, gid) = (part.word()?, part.word()?, part.word()?);
        let (special_device, block_size) = (part.word()?, part.word()?);
        Ok(Metadata {
            device,
            inode,
            kind: Kind::from_mode(mode).ok_or(Errno::EIO)?,
            permissions: mode & 0o7777,
            links,
            uid,
            gid,
            special_device: u64::from(special_device),
            size,
            block_size: if block_size == 0 { 4096 } else { block_size },
            blocks,
            accessed: time(0),
            modified: time(1),
            changed: time(2),
        })
    }
}

/// What a server says of a file it was asked for by name.
struct Entry {
    node: u64,
    /// How long the name holds, in nanoseconds.
    name_valid: u64,
    attributes_valid: u64,
    metadata: Option<Metadata>,
}

impl Parser<'_> {
    /// `struct fuse_entry_out`.
    fn entry(&mut self, device: u64) -> Result<Entry> {
        let mut part = Parser(self.bytes(ENTRY)?);
        let node = part.long()?;
        part.long()?;
        let (name_seconds, attribute_seconds) = (part.long()?, part.long()?);
        let (name_rest, attribute_rest) = (part.word()?, part.word()?);
        let valid = |seconds: u64, rest: u32| {
            seconds
                .saturating_mul(NANOSECONDS)
                .saturating_add(u64::from(rest))
        };
        Ok(Entry {
            node,
            name_valid: valid(name_seconds, name_rest),
            attributes_valid: valid(attribute_seconds, attribute_rest),
            metadata: if node == 0 {
                None
            } else {
                Some(part.attributes(device)?)
            },
        })
    }
}

/// A mounted FUSE file system.
pub struct Fuse {
    transport: Box<dyn Transport>,
    clock: Arc<dyn Clock>,
    device: u64,
    read_only: bool,
    next_request: AtomicU64,
    max_write: usize,
    nodes: Mutex<HashMap<u64, Weak<FuseNode>>>,
    /// Open files, for those who want everything on the disk.
    open: Mutex<Vec<Weak<FuseFile>>>,
    /// Where shared pages lie.
    pool: Arc<Pool>,
    /// Nodes that have shared pages.
    shared: Mutex<Vec<Weak<FuseNode>>>,
}

impl Fuse {
    /// Greets the server; returns the root directory.
    ///
    /// # Errors
    /// `EPROTO` when the server speaks another protocol; what the transport says.
    pub fn mount(
        transport: Box<dyn Transport>,
        clock: Arc<dyn Clock>,
        pool: Arc<Pool>,
        device: u64,
        read_only: bool,
    ) -> Result<Arc<dyn Inode>> {
        let mut fuse = Fuse {
            transport,
            clock,
            device,
            read_only,
            next_request: AtomicU64::new(1),
            max_write: 4096,
            nodes: Mutex::new(HashMap::default()),
            open: Mutex::new(Vec::new()),
            pool,
            shared: Mutex::new(Vec::new()),
        };
        let body = Body::default()
            .word(MAJOR)
            .word(MINOR)
            .word(MAX_DATA as u32)
            .word(FEATURES);
        let reply = fuse.request(operation::INIT, 0, &body, &[])?;
        let mut parser = Parser(&reply);
        let (major, minor) = (parser.word()?, parser.word()?);
        if major != MAJOR || minor < 23 {
            return Err(Errno::EPROTO);
        }
        parser.bytes(12)?;
        fuse.max_write = (parser.word()? as usize).clamp(4096, MAX_DATA);
        let fuse = Arc::new(fuse);
        let body = Body::default().word(0).word(0).long(0);
        let reply = fuse.request(operation::GETATTR, ROOT, &body, &[])?;
        let (metadata, valid) = parse_attributes(&reply, device)?;
        if metadata.kind != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        Ok(fuse.node(ROOT, metadata, valid, 0))
    }

    fn request(&self, operation: u32, node: u64, body: &Body, data: &[u8]) -> Result<Vec<u8>> {
        self.request_as(operation, node, body, data, 0, 0)
    }

    /// Makes a request in the name of a user; returns the reply's body.
    fn request_as(
        &self,
        operation: u32,
        node: u64,
        body: &Body,
        data: &[u8],
        uid: u32,
        gid: u32,
    ) -> Result<Vec<u8>> {
        let unique = self.next_request.fetch_add(1, Ordering::Relaxed);
        let header = request_header(operation, unique, node, body.0.len() + data.len(), uid, gid);
        let mut reply = self.transport.call(&[&header, &body.0, data])?;
        let mut parser = Parser(&reply);
        let (length, error, answered) = (
            parser.word()? as usize,
            parser.word()?.cast_signed(),
            parser.long()?,
        );
        if length != reply.len() || answered != unique {
            return Err(Errno::EIO);
        }
        if error != 0 {
            return Err(Errno::from_number(-i64::from(error)));
        }
        reply.drain(..REPLY_HEADER);
        Ok(reply)
    }

    /// The node with a number, counting `lookups` more for the server.
    fn node(
        self: &Arc<Fuse>,
        number: u64,
        metadata: Metadata,
        valid: u64,
        lookups: u64,
    ) -> Arc<FuseNode> {
        let expires = self.now().saturating_add(valid);
        let known = self.nodes.lock().get(&number).and_then(Weak::upgrade);
        if let Some(node) = known {
            node.lookups.fetch_add(lookups, Ordering::Relaxed);
            *node.attributes.lock() = (metadata, expires);
            return node;
        }
        let node = Arc::new_cyclic(|this| FuseNode {
            this: Weak::clone(this),
            shared: Mutex::new(None),
            fuse: Arc::clone(self),
            number,
            kind: metadata.kind,
            lookups: AtomicU64::new(lookups),
            attributes: Mutex::new((metadata, expires)),
            names: Mutex::new(HashMap::default()),
            created: Mutex::new(None),
            changes: AtomicU64::new(0),
        });
        self.nodes.lock().insert(number, Arc::downgrade(&node));
        node
    }

    fn now(&self) -> u64 {
        u64::try_from(self.clock.now()).unwrap_or(0)
    }
}

fn request_header(
    operation: u32,
    unique: u64,
    node: u64,
    length: usize,
    uid: u32,
    gid: u32,
) -> [u8; REQUEST_HEADER] {
    let total = u32::try_from(REQUEST_HEADER + length).unwrap_or(u32::MAX);
    let body = Body::default()
        .word(total)
        .word(operation)
        .long(unique)
        .long(node)
        .word(uid)
        .word(gid)
        .word(1)
        .word(0);
    let mut header = [0; REQUEST_HEADER];
    header.copy_from_slice(&body.0);
    header
}

/// `struct fuse_attr_out`: attributes, and how long they hold in nanoseconds.
fn parse_attributes(reply: &[u8], device: u64) -> Result<(Metadata, u64)> {
    let mut parser = Parser(reply);
    let (seconds, rest) = (parser.long()?, parser.word()?);
    parser.word()?;
    let valid = seconds
        .saturating_mul(NANOSECONDS)
        .saturating_add(u64::from(rest));
    Ok((parser.attributes(device)?, valid))
}

/// Pages of a file that are mapped shared.
struct SharedPages {
    content: Content,
    /// Pages that are there, with a digest of what the server has of each.
    digests: BTreeMap<u64, u64>,
}

/// FNV-1a by words: to notice that a page has changed.
fn digest(bytes: &[u8]) -> u64 {
    let mut digest = 0xcbf2_9ce4_8422_2325u64;
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        if let Some(start) = word.get_mut(..chunk.len()) {
            start.copy_from_slice(chunk);
        }
        digest = (digest ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3);
        digest ^= digest >> 29;
    }
    digest
}

impl SharedPages {
    fn new(pool: &Arc<Pool>) -> Result<SharedPages> {
        let mut content = Content::new(pool);
        // The file's own length is with its attributes; no page lies beyond this one.
        content.resize(i64::MAX as u64)?;
        Ok(SharedPages {
            content,
            digests: BTreeMap::new(),
        })
    }

    fn page(&self, index: u64) -> Result<Vec<u8>> {
        let mut bytes = alloc::vec![0; PAGE_SIZE];
        self.content
            .read(index * PAGE, &mut Sink::kernel(&mut bytes))?;
        Ok(bytes)
    }

    /// The part of `bytes`, which lie at `position`, that page `index` covers.
    fn part(index: u64, position: u64, length: usize) -> Option<(u64, core::ops::Range<usize>)> {
        let start = (index * PAGE).max(position);
        let end = ((index + 1) * PAGE).min(position.saturating_add(length as u64));
        (start < end).then(|| {
            (
                start,
                (start - position) as usize..(end - position) as usize,
            )
        })
    }

    fn indexes(&self, position: u64, length: usize) -> Vec<u64> {
        let end = position.saturating_add(length as u64).div_ceil(PAGE);
        self.digests
            .range(position / PAGE..end)
            .map(|(&index, _)| index)
            .collect()
    }

    /// Puts what the program's mappings show over bytes that the server gave.
    fn show(&self, position: u64, bytes: &mut [u8]) -> Result<()> {
        for index in self.indexes(position, bytes.len()) {
            if let Some((at, range)) = Self::part(index, position, bytes.len())
                && let Some(part) = bytes.get_mut(range)
            {
                self.content.read(at, &mut Sink::kernel(part))?;
            }
        }
        Ok(())
    }

    /// Puts bytes that the server has got into the pages that are there.
    fn take_over(&mut self, position: u64, bytes: &[u8]) -> Result<()> {
        for index in self.indexes(position, bytes.len()) {
            if let Some((at, range)) = Self::part(index, position, bytes.len())
                && let Some(part) = bytes.get(range)
            {
                self.content.write(at, &mut Source::kernel(part))?;
            }
        }
        Ok(())
    }
}

/// A file of a volume.
pub struct FuseNode {
    this: Weak<FuseNode>,
    /// Pages that are or were mapped shared.
    shared: Mutex<Option<SharedPages>>,
    fuse: Arc<Fuse>,
    number: u64,
    kind: Kind,
    /// How often the server has told of this node, for it to forget as often.
    lookups: AtomicU64,
    /// Attributes, and until when they hold.
    attributes: Mutex<(Metadata, u64)>,
    /// Names known in this directory, and until when they hold.
    names: Mutex<HashMap<String, (Arc<FuseNode>, u64)>>,
    /// The handle that came with making the file, for the opening that follows.
    created: Mutex<Option<u64>>,
    /// Counts changes of contents made here: what was read ahead before one is stale.
    changes: AtomicU64,
}

impl FuseNode {
    fn call(&self, operation: u32, body: &Body) -> Result<Vec<u8>> {
        self.fuse.request(operation, self.number, body, &[])
    }

    fn check_writable(&self) -> Result<()> {
        if self.fuse.read_only {
            Err(Errno::EROFS)
        } else {
            Ok(())
        }
    }

    fn expire(&self) {
        self.attributes.lock().1 = 0;
    }

    fn get(&self, name: &str) -> Result<Arc<FuseNode>> {
        if self.kind != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        let now = self.fuse.now();
        if let Some((node, expires)) = self.names.lock().get(name)
            && *expires > now
        {
            return Ok(Arc::clone(node));
        }
        let reply = self
            .call(operation::LOOKUP, &Body::default().name(name))
            .inspect_err(|_| self.forget(name))?;
        let entry = Parser(&reply).entry(self.fuse.device)?;
        self.adopt(name, entry)
    }

    /// Takes over what the server says of a name.
    fn adopt(&self, name: &str, entry: Entry) -> Result<Arc<FuseNode>> {
        let Some(metadata) = entry.metadata else {
            self.forget(name);
            return Err(Errno::ENOENT);
        };
        let node = self
            .fuse
            .node(entry.node, metadata, entry.attributes_valid, 1);
        let now = self.fuse.now();
        let mut stale = Vec::new();
        let mut names = self.names.lock();
        if names.len() >= NAMES_KEPT {
            names.retain(|_, (node, expires)| {
                let keep = *expires > now;
                if !keep {
                    stale.push(Arc::clone(node));
                }
                keep
            });
        }
        stale.extend(
            names
                .insert(
                    name.to_string(),
                    (Arc::clone(&node), now.saturating_add(entry.name_valid)),
                )
                .map(|(node, _)| node),
        );
        // Nodes that go tell the server, which takes locks: not under this one.
        drop(names);
        drop(stale);
        Ok(node)
    }

    fn forget(&self, name: &str) {
        let gone = self.names.lock().remove(name);
        drop(gone);
    }

    fn entry(
        &self,
        name: &str,
        operation: u32,
        body: &Body,
        creation: &Creation<'_>,
    ) -> Result<Arc<FuseNode>> {
        let reply = self.fuse.request_as(
            operation,
            self.number,
            body,
            &[],
            creation.uid,
            creation.gid,
        )?;
        self.expire();
        let entry = Parser(&reply).entry(self.fuse.device)?;
        self.adopt(name, entry)
    }

    fn open_handle(&self, operation: u32, flags: OpenFlags) -> Result<u64> {
        let body = Body::default()
            .word((flags - NOT_FOR_SERVER).bits())
            .word(0);
        Parser(&self.call(operation, &body)?).long()
    }

    fn release_handle(&self, operation: u32, handle: u64, flags: OpenFlags) {
        let body = Body::default()
            .long(handle)
            .word((flags - NOT_FOR_SERVER).bits())
            .word(0)
            .long(0);
        // Nobody is there to hear of an error any more; a server that has gone has released everything.
        let _ = self.call(operation, &body);
    }

    /// Does something with a handle that is open only meanwhile.
    fn with_handle<T>(&self, flags: OpenFlags, action: impl FnOnce(u64) -> Result<T>) -> Result<T> {
        let handle = self.open_handle(operation::OPEN, flags)?;
        let result = action(handle);
        self.release_handle(operation::RELEASE, handle, flags);
        result
    }

    fn read_handle(&self, handle: u64, position: u64, length: usize) -> Result<Vec<u8>> {
        let size = length.min(MAX_DATA);
        let body = Body::default()
            .long(handle)
            .long(position)
            .word(size as u32)
            .word(0)
            .long(0)
            .word(0)
            .word(0);
        let mut bytes = self.call(operation::READ, &body)?;
        bytes.truncate(size);
        Ok(bytes)
    }

    fn read_into(&self, handle: u64, position: u64, sink: &mut Sink<'_>) -> Result<usize> {
        let mut done = 0;
        while sink.remaining() > 0 {
            let wanted = sink.remaining().min(MAX_DATA);
            let step = self
                .read_handle(handle, position + done as u64, wanted)
                .and_then(|mut bytes| {
                    if let Some(shared) = &*self.shared.lock() {
                        shared.show(position + done as u64, &mut bytes)?;
                    }
                    let count = sink.put(&bytes)?;
                    Ok((count, bytes.len()))
                });
            match step {
                Ok((count, length)) => {
                    done += count;
                    if length < wanted || count < length {
                        break;
                    }
                }
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn write_from(&self, handle: u64, position: u64, source: &mut Source<'_>) -> Result<usize> {
        self.check_writable()?;
        if position.saturating_add(source.remaining() as u64) > i64::MAX as u64 {
            return Err(Errno::EFBIG);
        }
        let mut done = 0;
        let result = loop {
            if source.remaining() == 0 {
                break Ok(());
            }
            let at = position + done as u64;
            let step = source.take_vector(self.fuse.max_write).and_then(|data| {
                let body = Body::default()
                    .long(handle)
                    .long(at)
                    .word(data.len() as u32)
                    .word(0)
                    .long(0)
                    .word(0)
                    .word(0);
                let reply = self
                    .fuse
                    .request(operation::WRITE, self.number, &body, &data)?;
                let written = (Parser(&reply).word()? as usize).min(data.len());
                if let Some(shared) = &mut *self.shared.lock() {
                    shared.take_over(at, data.get(..written).unwrap_or_default())?;
                }
                Ok((written, data.len()))
            });
            match step {
                Ok((written, length)) => {
                    done += written;
                    if written < length {
                        break Ok(());
                    }
                }
                Err(error) => break Err(error),
            }
        };
        if done > 0 {
            self.changes.fetch_add(1, Ordering::Relaxed);
            let now = self.fuse.clock.now();
            let (metadata, _) = &mut *self.attributes.lock();
            metadata.size = metadata.size.max(position + done as u64);
            metadata.modified = now;
            metadata.changed = now;
            return Ok(done);
        }
        result.map(|()| 0)
    }

    fn allocate_with(&self, handle: u64, mode: u32, position: u64, length: u64) -> Result<()> {
        self.check_writable()?;
        let body = Body::default()
            .long(handle)
            .long(position)
            .long(length)
            .word(mode)
            .word(0);
        self.call(operation::FALLOCATE, &body)?;
        self.expire();
        self.changes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Takes the pages of a range into the pool.
    fn share(&self, handle: u64, position: u64, length: u64) -> Result<()> {
        let size = self.metadata()?.size;
        let end = position.saturating_add(length).min(size).div_ceil(PAGE);
        let missing: Vec<u64> = {
            let mut shared = self.shared.lock();
            if shared.is_none() {
                *shared = Some(SharedPages::new(&self.fuse.pool)?);
                self.fuse.shared.lock().push(Weak::clone(&self.this));
            }
            let shared = shared.as_ref().ok_or(Errno::EIO)?;
            (position / PAGE..end)
                .filter(|index| !shared.digests.contains_key(index))
                .collect()
        };
        for index in missing {
            let mut bytes = self.read_handle(handle, index * PAGE, PAGE_SIZE)?;
            bytes.resize(PAGE_SIZE, 0);
            let mut shared = self.shared.lock();
            let shared = shared.as_mut().ok_or(Errno::EIO)?;
            shared.content.prepare_shared(index * PAGE, PAGE)?;
            shared
                .content
                .write(index * PAGE, &mut Source::kernel(&bytes))?;
            shared.digests.insert(index, digest(&bytes));
        }
        Ok(())
    }

    /// Gives the server what the program changed in shared pages.
    fn write_back(&self) -> Result<()> {
        let changed: Vec<(u64, Vec<u8>, u64)> = {
            let shared = self.shared.lock();
            let Some(shared) = &*shared else {
                return Ok(());
            };
            let mut changed = Vec::new();
            for (&index, &known) in &shared.digests {
                let bytes = shared.page(index)?;
                let now = digest(&bytes);
                if now != known {
                    changed.push((index, bytes, now));
                }
            }
            changed
        };
        if changed.is_empty() {
            return Ok(());
        }
        let size = self.metadata()?.size;
        self.with_handle(OpenFlags::WRITE_ONLY, |handle| {
            for (index, bytes, now) in changed {
                let start = index * PAGE;
                let length = size.saturating_sub(start).min(PAGE) as usize;
                let data = bytes.get(..length).unwrap_or_default();
                let body = Body::default()
                    .long(handle)
                    .long(start)
                    .word(length as u32)
                    .word(0)
                    .long(0)
                    .word(0)
                    .word(0);
                if length > 0 {
                    self.fuse
                        .request(operation::WRITE, self.number, &body, data)?;
                }
                if let Some(shared) = &mut *self.shared.lock() {
                    shared.digests.insert(index, now);
                }
            }
            Ok(())
        })
    }

    /// As [`FuseNode::write_back`], for all files of the volume that this is the root of.
    ///
    /// # Errors
    /// The first that a file ran into.
    pub fn write_back_all(&self) -> Result<()> {
        let nodes: Vec<Arc<FuseNode>> = {
            let mut nodes = self.fuse.shared.lock();
            nodes.retain(|node| node.strong_count() > 0);
            nodes.iter().filter_map(Weak::upgrade).collect()
        };
        nodes.iter().try_for_each(|node| node.write_back())
    }

    fn synchronize_with(&self, handle: u64, data_only: bool) -> Result<()> {
        self.write_back()?;
        let body = Body::default()
            .long(handle)
            .word(u32::from(data_only))
            .word(0);
        self.call(operation::FSYNC, &body).map(drop)
    }
}

impl Drop for FuseNode {
    fn drop(&mut self) {
        // Nobody is there to hear of an error any more.
        let _ = self.write_back();
        if let Some(handle) = self.created.get_mut().take() {
            self.release_handle(operation::RELEASE, handle, OpenFlags::READ_WRITE);
        }
        {
            let mut nodes = self.fuse.nodes.lock();
            // A new node may have taken the number's place meanwhile.
            if nodes
                .get(&self.number)
                .is_some_and(|node| node.strong_count() == 0)
            {
                nodes.remove(&self.number);
            }
        }
        let lookups = self.lookups.load(Ordering::Relaxed);
        if self.number != ROOT && lookups > 0 {
            let body = Body::default().long(lookups);
            let unique = self.fuse.next_request.fetch_add(1, Ordering::Relaxed);
            let header = request_header(operation::FORGET, unique, self.number, body.0.len(), 0, 0);
            // A server that has gone has forgotten everything.
            let _ = self.fuse.transport.post(&[&header, &body.0]);
        }
    }
}

impl Inode for FuseNode {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn metadata(&self) -> Result<Metadata> {
        {
            let attributes = self.attributes.lock();
            if attributes.1 > self.fuse.now() {
                return Ok(attributes.0);
            }
        }
        let reply = self.call(operation::GETATTR, &Body::default().word(0).word(0).long(0))?;
        let (metadata, valid) = parse_attributes(&reply, self.fuse.device)?;
        if metadata.kind != self.kind {
            return Err(Errno::ESTALE);
        }
        *self.attributes.lock() = (metadata, self.fuse.now().saturating_add(valid));
        Ok(metadata)
    }

    fn change(&self, change: &MetadataChange) -> Result<()> {
        self.check_writable()?;
        // FATTR_MODE, _UID, _GID, _SIZE, _ATIME, _MTIME.
        let mut valid = 0;
        for (bit, given) in [
            (1, change.permissions.is_some()),
            (2, change.uid.is_some()),
            (4, change.gid.is_some()),
            (8, change.size.is_some()),
            (16, change.accessed.is_some()),
            (32, change.modified.is_some()),
        ] {
            if given {
                valid |= bit;
            }
        }
        let split = |time: Option<Timestamp>| {
            let (time, second) = (time.unwrap_or(0), Timestamp::from(NANOSECONDS));
            (
                time.div_euclid(second) as u64,
                time.rem_euclid(second) as u32,
            )
        };
        let (accessed, modified) = (split(change.accessed), split(change.modified));
        let mode = change
            .permissions
            .map_or(0, |permissions| permissions | self.kind.mode());
        let body = Body::default()
            .word(valid)
            .word(0)
            .long(0)
            .long(change.size.unwrap_or(0))
            .long(0);
        let body = body
            .long(accessed.0)
            .long(modified.0)
            .long(0)
            .word(accessed.1)
            .word(modified.1)
            .word(0);
        let body = body
            .word(mode)
            .word(0)
            .word(change.uid.unwrap_or(0))
            .word(change.gid.unwrap_or(0))
            .word(0);
        let reply = self.call(operation::SETATTR, &body)?;
        self.changes.fetch_add(1, Ordering::Relaxed);
        if let (Some(size), Some(shared)) = (change.size, &mut *self.shared.lock()) {
            shared.content.punch(size, i64::MAX as u64 - size)?;
        }
        let (metadata, valid) = parse_attributes(&reply, self.fuse.device)?;
        *self.attributes.lock() = (metadata, self.fuse.now().saturating_add(valid));
        Ok(())
    }

    fn lookup(&self, name: &str) -> Result<Arc<dyn Inode>> {
        Ok(self.get(name)?)
    }

    /// Gives all entries of one reply, which may be more than asked for: so each costs one round trip.
    fn entries(&self, position: u64, _: usize) -> Result<Vec<DirectoryEntry>> {
        if self.kind != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        let handle = self.open_handle(operation::OPENDIR, OpenFlags::DIRECTORY)?;
        let mut entries = Vec::new();
        let mut at = position;
        let result = loop {
            let body = Body::default()
                .long(handle)
                .long(at)
                .word(LISTING)
                .word(0)
                .long(0)
                .word(0)
                .word(0);
            let step = self.call(operation::READDIRPLUS, &body).and_then(|reply| {
                let before = at;
                self.parse_entries(&reply, &mut entries, &mut at)?;
                // A server that gives something and gets nowhere would be asked for ever.
                if !reply.is_empty() && entries.is_empty() && at == before {
                    Err(Errno::EIO)
                } else {
                    Ok(!reply.is_empty())
                }
            });
            match step {
                // A reply may have had nothing but names that are not shown.
                Ok(true) if entries.is_empty() => {}
                Ok(_) => break Ok(entries),
                Err(error) => break Err(error),
            }
        };
        self.release_handle(operation::RELEASEDIR, handle, OpenFlags::DIRECTORY);
        result
    }

    fn create(&self, name: &str, creation: &Creation<'_>) -> Result<Arc<dyn Inode>> {
        self.check_writable()?;
        let mode = creation.kind.mode() | creation.permissions;
        let node = match creation.kind {
            Kind::Directory => {
                let body = Body::default()
                    .word(creation.permissions)
                    .word(0)
                    .name(name);
                self.entry(name, operation::MKDIR, &body, creation)?
            }
            Kind::SymbolicLink => {
                let body = Body::default().name(name).name(creation.target);
                self.entry(name, operation::SYMLINK, &body, creation)?
            }
            Kind::Regular => {
                let flags = linux::O_RDWR | linux::O_CREAT | linux::O_EXCL;
                let body = Body::default()
                    .word(flags)
                    .word(mode)
                    .word(0)
                    .word(0)
                    .name(name);
                let reply = self.fuse.request_as(
                    operation::CREATE,
                    self.number,
                    &body,
                    &[],
                    creation.uid,
                    creation.gid,
                )?;
                self.expire();
                let mut parser = Parser(&reply);
                let entry = parser.entry(self.fuse.device)?;
                let handle = parser.long()?;
                let node = self.adopt(name, entry)?;
                let earlier = node.created.lock().replace(handle);
                if let Some(handle) = earlier {
                    node.release_handle(operation::RELEASE, handle, OpenFlags::READ_WRITE);
                }
                node
            }
            _ => {
                let device = creation.special_device as u32;
                let body = Body::default()
                    .word(mode)
                    .word(device)
                    .word(0)
                    .word(0)
                    .name(name);
                self.entry(name, operation::MKNOD, &body, creation)?
            }
        };
        Ok(node)
    }

    fn link(&self, name: &str, inode: &Arc<dyn Inode>) -> Result<()> {
        self.check_writable()?;
        let node = inode
            .as_any()
            .downcast_ref::<FuseNode>()
            .ok_or(Errno::EXDEV)?;
        if !Arc::ptr_eq(&node.fuse, &self.fuse) {
            return Err(Errno::EXDEV);
        }
        let reply = self.call(
            operation::LINK,
            &Body::default().long(node.number).name(name),
        )?;
        self.expire();
        let entry = Parser(&reply).entry(self.fuse.device)?;
        self.adopt(name, entry).map(drop)
    }

    fn unlink(&self, name: &str, directory: bool) -> Result<()> {
        self.check_writable()?;
        let operation = if directory {
            operation::RMDIR
        } else {
            operation::UNLINK
        };
        self.call(operation, &Body::default().name(name))?;
        self.expire();
        let gone = self.names.lock().remove(name);
        if let Some((node, _)) = gone {
            node.expire();
        }
        Ok(())
    }

    fn rename(
        &self,
        name: &str,
        new_parent: &Arc<dyn Inode>,
        new_name: &str,
        flags: u32,
    ) -> Result<()> {
        self.check_writable()?;
        let parent = new_parent
            .as_any()
            .downcast_ref::<FuseNode>()
            .ok_or(Errno::EXDEV)?;
        if !Arc::ptr_eq(&parent.fuse, &self.fuse) {
            return Err(Errno::EXDEV);
        }
        let body = Body::default()
            .long(parent.number)
            .word(flags)
            .word(0)
            .name(name)
            .name(new_name);
        self.call(operation::RENAME2, &body)?;
        self.expire();
        parent.expire();
        self.forget(name);
        parent.forget(new_name);
        Ok(())
    }

    fn is_symbolic_link(&self) -> bool {
        self.kind == Kind::SymbolicLink
    }

    fn target(&self) -> Result<String> {
        if self.kind != Kind::SymbolicLink {
            return Err(Errno::EINVAL);
        }
        String::from_utf8(self.call(operation::READLINK, &Body::default())?)
            .map_err(|_| Errno::EILSEQ)
    }

    fn open(self: Arc<Self>, flags: OpenFlags) -> Result<Arc<dyn File>> {
        match self.kind {
            Kind::Regular => {}
            Kind::SymbolicLink => return Err(Errno::ELOOP),
            Kind::Directory => return Err(Errno::EISDIR),
            // Pipes and sockets of the host's directory lead to nobody here.
            _ => return Err(Errno::ENXIO),
        }
        if flags.writable() {
            self.check_writable()?;
        }
        let created = self.created.lock().take();
        let handle = match created {
            Some(handle) => handle,
            None => self.open_handle(operation::OPEN, flags)?,
        };
        let inode: Arc<dyn Inode> = Arc::clone(&self) as Arc<dyn Inode>;
        let file = Arc::new(FuseFile {
            node: Arc::clone(&self),
            inode,
            handle,
            flags,
            ahead: Mutex::new(Ahead::default()),
        });
        let mut open = self.fuse.open.lock();
        if open.len() == open.capacity() {
            open.retain(|file| file.strong_count() > 0);
        }
        open.push(Arc::downgrade(&file));
        Ok(file)
    }

    fn read_at(&self, position: u64, sink: &mut Sink<'_>) -> Result<usize> {
        if self.kind == Kind::Directory {
            return Err(Errno::EISDIR);
        }
        self.with_handle(OpenFlags::empty(), |handle| {
            self.read_into(handle, position, sink)
        })
    }

    fn write_at(&self, position: u64, source: &mut Source<'_>) -> Result<usize> {
        self.with_handle(OpenFlags::WRITE_ONLY, |handle| {
            self.write_from(handle, position, source)
        })
    }

    fn map_source(&self, position: u64) -> Result<Option<(MapSource, u64)>> {
        if self.kind != Kind::Regular {
            return Err(Errno::ENODEV);
        }
        match &mut *self.shared.lock() {
            Some(shared) => shared.content.map_source(position),
            None => Ok(None),
        }
    }

    fn prepare_shared(&self, position: u64, length: u64) -> Result<()> {
        if self.kind != Kind::Regular {
            return Err(Errno::ENODEV);
        }
        self.with_handle(OpenFlags::empty(), |handle| {
            self.share(handle, position, length)
        })
    }

    fn synchronize(&self, data_only: bool) -> Result<()> {
        if self.number == ROOT {
            self.write_back_all()?;
            // sync(2): whatever is open. What was closed before is with the server.
            let open: Vec<Arc<FuseFile>> = self
                .fuse
                .open
                .lock()
                .iter()
                .filter_map(Weak::upgrade)
                .collect();
            for file in open.iter().filter(|file| file.flags.writable()) {
                file.synchronize(data_only)?;
            }
        }
        if self.kind != Kind::Directory {
            return self.with_handle(OpenFlags::empty(), |handle| {
                self.synchronize_with(handle, data_only)
            });
        }
        let handle = self.open_handle(operation::OPENDIR, OpenFlags::DIRECTORY)?;
        let body = Body::default()
            .long(handle)
            .word(u32::from(data_only))
            .word(0);
        let result = self.call(operation::FSYNCDIR, &body).map(drop);
        self.release_handle(operation::RELEASEDIR, handle, OpenFlags::DIRECTORY);
        match result {
            // Not every server has it; then there is nothing more to do.
            Err(Errno::ENOSYS) => Ok(()),
            result => result,
        }
    }

    fn allocate(&self, mode: u32, position: u64, length: u64) -> Result<()> {
        self.with_handle(OpenFlags::READ_WRITE, |handle| {
            self.allocate_with(handle, mode, position, length)
        })
    }

    fn statistics(&self) -> Result<FileSystemStatistics> {
        /// `FUSE_SUPER_MAGIC`.
        const MAGIC: u64 = 0x6573_5546;
        let reply = self.call(operation::STATFS, &Body::default())?;
        let mut parser = Parser(&reply);
        let (blocks, blocks_free, _available) = (parser.long()?, parser.long()?, parser.long()?);
        let (files, files_free) = (parser.long()?, parser.long()?);
        let (block_size, _name_length, fragment_size) =
            (parser.word()?, parser.word()?, parser.word()?);
        Ok(FileSystemStatistics {
            magic: MAGIC,
            // Blocks are counted in fragments.
            block_size: u64::from(if fragment_size == 0 {
                block_size
            } else {
                fragment_size
            }),
            blocks,
            blocks_free,
            files,
            files_free,
            read_only: self.fuse.read_only,
        })
    }
}

impl FuseNode {
    /// Parses `struct fuse_direntplus` records; what they tell of files is kept.
    fn parse_entries(
        &self,
        reply: &[u8],
        entries: &mut Vec<DirectoryEntry>,
        next: &mut u64,
    ) -> Result<()> {
        let mut parser = Parser(reply);
        while parser.0.len() >= ENTRY + DIRECTORY_ENTRY {
            let entry = parser.entry(self.fuse.device)?;
            let (inode, offset) = (parser.long()?, parser.long()?);
            let (length, kind) = (parser.word()? as usize, parser.word()?);
            if length == 0 || length > NAME_MAX {
                return Err(Errno::EIO);
            }
            let name = parser.bytes(length)?;
            let padding = (8 - (DIRECTORY_ENTRY + length) % 8) % 8;
            parser.bytes(padding.min(parser.0.len()))?;
            *next = offset;
            let Ok(name) = core::str::from_utf8(name) else {
                crate::trace::warn!(
                    "a file of a volume is left out: its name \"{}\" is not UTF-8",
                    name.escape_ascii()
                );
                self.forget_node(&entry);
                continue;
            };
            if matches!(name, "." | "..") {
                self.forget_node(&entry);
                continue;
            }
            let kind = match entry.metadata {
                Some(metadata) => metadata.kind,
                None => Kind::from_mode(kind << 12).unwrap_or(Kind::Regular),
            };
            if entry.metadata.is_some() {
                self.adopt(name, entry)?;
            }
            entries.push(DirectoryEntry {
                name: String::from(name),
                inode,
                kind,
                next: offset,
            });
        }
        Ok(())
    }

    /// Gives back a lookup that came with an entry nobody wants.
    fn forget_node(&self, entry: &Entry) {
        if let Some(metadata) = entry.metadata
            && entry.node != self.number
        {
            drop(
                self.fuse
                    .node(entry.node, metadata, entry.attributes_valid, 1),
            );
        }
    }
}

/// Bytes that were read before they were asked for.
#[derive(Default)]
struct Ahead {
    /// Where the next read is if the program reads in order.
    expected: u64,
    position: u64,
    bytes: Vec<u8>,
    /// [`FuseNode::changes`] when they were read.
    changes: u64,
    /// Until when they are shown.
    expires: u64,
}

/// An open file of a volume.
struct FuseFile {
    node: Arc<FuseNode>,
    inode: Arc<dyn Inode>,
    handle: u64,
    flags: OpenFlags,
    ahead: Mutex<Ahead>,
}

impl FuseFile {
    /// Serves a read from what was read ahead.
    fn take_ahead(&self, position: u64, sink: &mut Sink<'_>) -> Result<usize> {
        let mut ahead = self.ahead.lock();
        if ahead.changes != self.node.changes.load(Ordering::Relaxed)
            || ahead.expires <= self.node.fuse.now()
        {
            return Ok(0);
        }
        let Some(start) = position
            .checked_sub(ahead.position)
            .and_then(|start| usize::try_from(start).ok())
        else {
            return Ok(0);
        };
        let Some(bytes) = ahead.bytes.get(start..).filter(|bytes| !bytes.is_empty()) else {
            return Ok(0);
        };
        let count = sink.put(bytes)?;
        ahead.expected = position + count as u64;
        Ok(count)
    }
}

impl File for FuseFile {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn is_seekable(&self) -> bool {
        true
    }

    fn read_at(&self, position: u64, sink: &mut Sink<'_>) -> Result<usize> {
        if self.node.shared.lock().is_some() {
            // Mapped pages change without a word: nothing is kept.
            return self.node.read_into(self.handle, position, sink);
        }
        let kept = self.take_ahead(position, sink)?;
        if kept > 0 || sink.remaining() == 0 {
            return Ok(kept);
        }
        let in_order = self.ahead.lock().expected == position;
        if !in_order || sink.remaining() >= READ_AHEAD {
            let count = self.node.read_into(self.handle, position, sink)?;
            self.ahead.lock().expected = position + count as u64;
            return Ok(count);
        }
        let changes = self.node.changes.load(Ordering::Relaxed);
        let bytes = self.node.read_handle(self.handle, position, READ_AHEAD)?;
        let count = sink.put(&bytes)?;
        let expires = self.node.fuse.now().saturating_add(NANOSECONDS);
        *self.ahead.lock() = Ahead {
            expected: position + count as u64,
            position,
            bytes,
            changes,
            expires,
        };
        Ok(count)
    }

    fn write_at(&self, position: u64, source: &mut Source<'_>) -> Result<usize> {
        self.node.write_from(self.handle, position, source)
    }

    fn metadata(&self) -> Result<Metadata> {
        self.node.metadata()
    }

    fn inode(&self) -> Option<&Arc<dyn Inode>> {
        Some(&self.inode)
    }

    fn synchronize(&self, data_only: bool) -> Result<()> {
        self.node.synchronize_with(self.handle, data_only)
    }

    fn describe(&self) -> String {
        String::from("file")
    }

    fn flush(&self) -> Result<()> {
        if !self.flags.writable() {
            return Ok(());
        }
        self.node.write_back()?;
        let body = Body::default().long(self.handle).word(0).word(0).long(0);
        match self.node.call(operation::FLUSH, &body) {
            // Not every server has it.
            Ok(_) | Err(Errno::ENOSYS) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for FuseFile {
    fn drop(&mut self) {
        self.node
            .release_handle(operation::RELEASE, self.handle, self.flags);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed;

    impl Clock for Fixed {
        fn now(&self) -> Timestamp {
            5_000_000_000
        }
    }

    /// A server with one file, `f`, in its root.
    #[derive(Default)]
    struct Server {
        contents: Mutex<Vec<u8>>,
        /// Operations in the order they came.
        log: Arc<Mutex<Vec<u32>>>,
        /// Replies are cut to this length.
        cut: Option<usize>,
    }

    fn attributes(body: Body, inode: u64, mode: u32, size: u64) -> Body {
        let body = body
            .long(inode)
            .long(size)
            .long(0)
            .long(1)
            .long(2)
            .long(3)
            .word(4)
            .word(5)
            .word(6);
        body.word(mode)
            .word(1)
            .word(0)
            .word(0)
            .word(0)
            .word(4096)
            .word(0)
    }

    impl Server {
        fn entry(&self) -> Body {
            let body = Body::default()
                .long(2)
                .long(0)
                .long(1)
                .long(1)
                .word(0)
                .word(0);
            attributes(
                body,
                2,
                linux::S_IFREG | 0o644,
                self.contents.lock().len() as u64,
            )
        }
    }

    impl Transport for Server {
        fn call(&self, request: &[&[u8]]) -> Result<Vec<u8>> {
            let request = request.concat();
            let mut parser = Parser(&request);
            assert_eq!(parser.word().unwrap() as usize, request.len());
            let (operation, unique, node) = (
                parser.word().unwrap(),
                parser.long().unwrap(),
                parser.long().unwrap(),
            );
            parser.bytes(16).unwrap();
            self.log.lock().push(operation);
            let mut error = 0;
            let body = match operation {
                operation::INIT => Body::default()
                    .word(7)
                    .word(33)
                    .word(0)
                    .word(0)
                    .word(0)
                    .word(8192)
                    .word(0)
                    .long(0),
                operation::GETATTR if node == ROOT => attributes(
                    Body::default().long(1).word(0).word(0),
                    1,
                    linux::S_IFDIR | 0o755,
                    0,
                ),
                operation::GETATTR | operation::SETATTR => {
                    let mut contents = self.contents.lock();
                    if operation == operation::SETATTR && parser.word().unwrap() & 8 != 0 {
                        parser.bytes(12).unwrap();
                        contents.resize(parser.long().unwrap() as usize, 0);
                    }
                    let size = contents.len() as u64;
                    attributes(
                        Body::default().long(1).word(0).word(0),
                        2,
                        linux::S_IFREG | 0o644,
                        size,
                    )
                }
                operation::LOOKUP if parser.0 == b"f\0" => self.entry(),
                operation::LOOKUP => {
                    error = -2i32;
                    Body::default()
                }
                operation::OPEN | operation::OPENDIR => Body::default().long(77).long(0),
                operation::READ => {
                    let (_, position, size) = (
                        parser.long().unwrap(),
                        parser.long().unwrap(),
                        parser.word().unwrap() as usize,
                    );
                    let contents = self.contents.lock();
                    let rest = contents.get(position as usize..).unwrap_or_default();
                    Body(rest[..rest.len().min(size)].to_vec())
                }
                operation::WRITE => {
                    let (_, position, size) = (
                        parser.long().unwrap(),
                        parser.long().unwrap() as usize,
                        parser.word().unwrap() as usize,
                    );
                    parser.bytes(20).unwrap();
                    let mut contents = self.contents.lock();
                    let length = contents.len().max(position + size);
                    contents.resize(length, 0);
                    contents[position..position + size].copy_from_slice(parser.0);
                    Body::default().word(size as u32).word(0)
                }
                operation::READDIRPLUS => {
                    parser.long().unwrap();
                    if parser.long().unwrap() == 0 {
                        let mut body = Body::default();
                        for (offset, name) in [(1, "."), (2, "..")] {
                            body.0.extend([0; 128]);
                            body = body.long(1).long(offset).word(name.len() as u32).word(4);
                            body.0.extend(name.as_bytes());
                            body.0.resize(body.0.len().next_multiple_of(8), 0);
                        }
                        body.0.extend(self.entry().0);
                        body = body.long(2).long(3).word(1).word(8);
                        body.0.extend(b"f\0\0\0\0\0\0\0");
                        body
                    } else {
                        Body::default()
                    }
                }
                operation::RELEASE
                | operation::RELEASEDIR
                | operation::FSYNC
                | operation::FLUSH => Body::default(),
                _ => {
                    error = -38;
                    Body::default()
                }
            };
            let mut reply = Body::default()
                .word(16 + body.0.len() as u32)
                .word(error.cast_unsigned())
                .long(unique)
                .0;
            reply.extend(body.0);
            if let Some(cut) = self.cut {
                reply.truncate(cut);
                let length = (reply.len() as u32).to_le_bytes();
                if let Some(start) = reply.get_mut(..4) {
                    start.copy_from_slice(&length);
                }
            }
            Ok(reply)
        }

        fn post(&self, request: &[&[u8]]) -> Result<()> {
            let request = request.concat();
            let mut parser = Parser(&request);
            parser.word().unwrap();
            self.log.lock().push(parser.word().unwrap());
            Ok(())
        }
    }

    #[test]
    fn reads_and_writes_through_the_server() {
        let server = Server::default();
        let log = Arc::clone(&server.log);
        let root = Fuse::mount(
            Box::new(server),
            Arc::new(Fixed),
            crate::fs::pool::tests::pool(64),
            30,
            false,
        )
        .unwrap();
        assert_eq!(root.lookup("missing").err(), Some(Errno::ENOENT));
        let inode = root.lookup("f").unwrap();
        let file = Arc::clone(&inode).open(OpenFlags::READ_WRITE).unwrap();
        let data: Vec<u8> = (0..20000u32).map(|index| index as u8).collect();
        assert_eq!(file.write_at(0, &mut Source::kernel(&data)), Ok(20000));
        assert_eq!(file.metadata().unwrap().size, 20000);
        let mut bytes = alloc::vec![0; 1000];
        log.lock().clear();
        for step in 0..20usize {
            assert_eq!(
                file.read_at(step as u64 * 1000, &mut Sink::kernel(&mut bytes)),
                Ok(1000)
            );
            assert!(bytes == data[step * 1000..][..1000]);
        }
        assert_eq!(file.read_at(20000, &mut Sink::kernel(&mut bytes)), Ok(0));
        // In order, so one read gets everything, and one finds the end.
        assert_eq!(*log.lock(), [operation::READ, operation::READ]);
        inode
            .change(&MetadataChange {
                size: Some(10),
                ..MetadataChange::default()
            })
            .unwrap();
        assert_eq!(file.read_at(0, &mut Sink::kernel(&mut bytes)), Ok(10));
        file.synchronize(false).unwrap();
        file.flush().unwrap();
        drop(file);
        let entries = root.entries(0, 100).unwrap();
        assert_eq!(entries.len(), 1);
        assert_eq!((entries[0].name.as_str(), entries[0].next), ("f", 3));
        assert!(root.entries(3, 100).unwrap().is_empty());
        log.lock().clear();
        drop(inode);
        drop(root);
        assert_eq!(*log.lock(), [operation::FORGET]);
    }

    #[test]
    fn shared_pages_are_one_with_the_file_and_go_back_to_the_server() {
        let server = Server::default();
        *server.contents.lock() = alloc::vec![1; 5000];
        let log = Arc::clone(&server.log);
        let pool = crate::fs::pool::tests::pool(64);
        let root = Fuse::mount(
            Box::new(server),
            Arc::new(Fixed),
            Arc::clone(&pool),
            30,
            false,
        )
        .unwrap();
        let inode = root.lookup("f").unwrap();
        let file = Arc::clone(&inode).open(OpenFlags::READ_WRITE).unwrap();
        assert_eq!(inode.map_source(0).unwrap(), None);
        inode.prepare_shared(0, 1 << 20).unwrap();
        assert_eq!(pool.used(), 2);
        let Some((MapSource::Pool(_), 8192)) = inode.map_source(0).unwrap() else {
            panic!("not in the pool")
        };
        file.write_at(4090, &mut Source::kernel(&[2; 10])).unwrap();
        let mut bytes = [0; 12];
        file.read_at(4089, &mut Sink::kernel(&mut bytes)).unwrap();
        assert_eq!(bytes, [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]);
        // What the program does through its mapping.
        let node = inode.as_any().downcast_ref::<FuseNode>().unwrap();
        let store = |at: u64, byte: u8| {
            let mut shared = node.shared.lock();
            let content = &mut shared.as_mut().unwrap().content;
            content.write(at, &mut Source::kernel(&[byte])).unwrap();
        };
        store(4999, 7);
        store(6000, 8);
        file.read_at(4999, &mut Sink::kernel(&mut bytes[..1]))
            .unwrap();
        assert_eq!(bytes[0], 7);
        log.lock().clear();
        inode.synchronize(true).unwrap();
        assert!(log.lock().contains(&operation::WRITE));
        assert_eq!(inode.metadata().unwrap().size, 5000);
        log.lock().clear();
        inode.synchronize(true).unwrap();
        assert!(!log.lock().contains(&operation::WRITE));
        drop((file, inode));
        drop(root);
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn read_only_volumes_refuse_changes() {
        let root = Fuse::mount(
            Box::new(Server::default()),
            Arc::new(Fixed),
            crate::fs::pool::tests::pool(64),
            30,
            true,
        )
        .unwrap();
        let inode = root.lookup("f").unwrap();
        assert_eq!(inode.change(&MetadataChange::default()), Err(Errno::EROFS));
        assert_eq!(
            Arc::clone(&inode).open(OpenFlags::WRITE_ONLY).err(),
            Some(Errno::EROFS)
        );
        assert_eq!(root.unlink("f", false), Err(Errno::EROFS));
        assert!(inode.open(OpenFlags::empty()).is_ok());
    }

    #[test]
    fn short_replies_are_errors() {
        for cut in 0..150 {
            let server = Server {
                cut: Some(cut),
                ..Server::default()
            };
            if let Ok(root) = Fuse::mount(
                Box::new(server),
                Arc::new(Fixed),
                crate::fs::pool::tests::pool(64),
                30,
                false,
            ) {
                assert!(root.lookup("f").is_err() || cut >= 16 + ENTRY);
                let _ = root.entries(0, 10);
            }
        }
    }
}

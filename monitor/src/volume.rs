//! Volumes: a directory of the host for the program, as a FUSE file system over the link.
//!
//! The file system itself is fuse-backend-rs' passthrough; here are its transport (its replies are collected in a memory file, as
//! it can write to a descriptor only, and a frame needs its length first) and the guard before it: which requests are
//! answered at all, what a read-only volume refuses, and that nothing leads out of the directory. Names are single
//! components without `..`, symbolic links are returned to the program's kernel and never followed here, and devices
//! are neither made nor opened.
//!
//! `FSYNC` is `fsync(2)` on the host's file: it returns when the host's disk has the data.
//!
//! Not here: caching, which is the kernel's, by the times given in replies (one second).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use kiln_abi::link::{HEADER, MAX_PAYLOAD};
use rustix::fs::MemfdFlags;

use crate::error::Error;

/// How long the kernel may keep attributes and names. Long enough for one operation of a program, short enough that changes by
/// the host are seen.
const VALID: Duration = Duration::from_secs(1);

/// Bytes of FUSE's request and reply headers.
const REQUEST_HEADER: usize = 40;
const REPLY_HEADER: usize = 16;
/// Bytes of data in one `WRITE`: what fits into a frame of the link beside the headers, and into fuse-backend-rs' limit.
const MAX_WRITE_BYTES: u32 = 1 << 20;

/// FUSE's operation numbers (`linux/fuse.h`).
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
    pub const RENAME: u32 = 12;
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
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
}

/// Linux's error numbers that the guard gives.
mod errno {
    pub const PERM: i32 = 1;
    pub const NOENT: i32 = 2;
    pub const IO: i32 = 5;
    pub const INVAL: i32 = 22;
    pub const ROFS: i32 = 30;
    pub const NOSYS: i32 = 38;
}

/// `O_ACCMODE` and `O_TRUNC`.
const OPEN_ACCESS: u32 = 3;
const OPEN_TRUNCATE: u32 = 0o1000;
/// `S_IFMT` and the two kinds of devices.
const TYPE_MASK: u32 = 0o170_000;
const TYPE_CHARACTER: u32 = 0o020_000;
const TYPE_BLOCK: u32 = 0o060_000;

/// One volume, served.
pub struct VolumeServer {
    server: Server<PassthroughFs>,
    read_only: bool,
    /// Take the host's own identity for what the program makes, because this process may not take another.
    own_identity: bool,
    reply: File,
    buffer: Vec<u8>,
}

impl VolumeServer {
    /// Serves `directory` and what is below it.
    ///
    /// # Errors
    /// When it is not a directory that can be opened.
    pub fn new(directory: &Path, read_only: bool) -> Result<Self, Error> {
        let failed = |source| Error::Io {
            action: format!("use {} as a volume", directory.display()),
            source,
        };
        if !directory.is_dir() {
            return Err(Error::input(
                format!(
                    "cannot use {} as a volume: it is not a directory",
                    directory.display()
                ),
                format!("make it first: mkdir -p {}", directory.display()),
            ));
        }
        let root_dir = directory.to_str().ok_or_else(|| {
            Error::input(
                format!(
                    "cannot use {} as a volume: its path is not UTF-8",
                    directory.display()
                ),
                "rename it, or make a symbolic link to it",
            )
        })?;
        let config = Config {
            root_dir: root_dir.to_owned(),
            entry_timeout: VALID,
            attr_timeout: VALID,
            cache_policy: CachePolicy::Auto,
            allow_direct_io: false,
            ..Config::default()
        };
        let files = PassthroughFs::new(config).map_err(failed)?;
        files.import().map_err(failed)?;
        let reply = rustix::fs::memfd_create("kiln-volume-reply", MemfdFlags::CLOEXEC)
            .map_err(|e| failed(e.into()))?;
        Ok(Self {
            server: Server::new(files),
            read_only,
            own_identity: !rustix::process::geteuid().is_root(),
            reply: reply.into(),
            buffer: vec![0; usize::try_from(MAX_PAYLOAD).unwrap_or(0)],
        })
    }

    /// Answers one request. The reply has [`HEADER`] free bytes before it; `None`: the request has no answer.
    pub fn handle(&mut self, request: &mut [u8]) -> Option<Vec<u8>> {
        // Without a header there is nobody to answer.
        let (unique, code) = identify(request)?;
        if let Err(error) = guard(code, request, self.read_only) {
            return Some(failure(unique, error));
        }
        if self.own_identity {
            // Zero is the server's word for "as I am".
            if let Some(identity) = request.get_mut(24..32) {
                identity.fill(0);
            }
        }
        let silent = matches!(code, operation::FORGET | operation::BATCH_FORGET);
        match self.serve(request) {
            Ok(Some(mut reply)) => {
                if code == operation::INIT {
                    allow_large_writes(&mut reply);
                }
                Some(reply)
            }
            _ if silent => None,
            Ok(None) => Some(failure(unique, errno::IO)),
            Err(_) => Some(failure(unique, errno::INVAL)),
        }
    }

    /// Gives the request to the file system. `None` when it wrote no reply.
    fn serve(&mut self, request: &mut [u8]) -> io::Result<Option<Vec<u8>>> {
        self.reply.seek(SeekFrom::Start(0))?;
        let reader =
            Reader::<()>::from_fuse_buffer(FuseBuf::new(request)).map_err(io::Error::other)?;
        let writer = FuseDevWriter::<()>::new(self.reply.as_raw_fd(), &mut self.buffer)
            .map_err(io::Error::other)?;
        let outcome = self
            .server
            .handle_message(reader, Writer::FuseDev(writer), None, None);
        let length = self.reply.stream_position()?;
        if length == 0 {
            return match outcome {
                Ok(_) => Ok(None),
                Err(error) => Err(io::Error::other(error.to_string())),
            };
        }
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let mut bytes = vec![0; HEADER + length];
        if let Some(place) = bytes.get_mut(HEADER..) {
            self.reply.read_exact_at(place, 0)?;
        }
        Ok(Some(bytes))
    }
}

/// Corrects the answer to `INIT`: the passthrough says one page for a write, as it never asks for `FUSE_BIG_WRITES`; the
/// server takes as much as for a read.
fn allow_large_writes(reply: &mut [u8]) {
    /// `FUSE_BIG_WRITES`.
    const BIG_WRITES: u32 = 1 << 5;
    /// Offsets in `struct fuse_init_out` after both headers.
    const FLAGS: usize = HEADER + REPLY_HEADER + 12;
    const MAX_WRITE: usize = HEADER + REPLY_HEADER + 20;
    let Some(flags) = word(reply, FLAGS) else {
        return;
    };
    for (offset, value) in [(FLAGS, flags | BIG_WRITES), (MAX_WRITE, MAX_WRITE_BYTES)] {
        if let Some(place) = reply.get_mut(offset..offset + 4) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    }
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes
        .get(offset..)?
        .first_chunk()
        .map(|chunk| u32::from_le_bytes(*chunk))
}

/// The request's number and operation, if it has a header that tells its length right.
fn identify(request: &[u8]) -> Option<(u64, u32)> {
    let length = usize::try_from(word(request, 0)?).ok()?;
    if request.len() < REQUEST_HEADER || length != request.len() {
        return None;
    }
    let unique = request
        .get(8..)?
        .first_chunk()
        .map(|chunk| u64::from_le_bytes(*chunk))?;
    Some((unique, word(request, 4)?))
}

/// Whether a request is one that this volume answers.
fn guard(code: u32, request: &[u8], read_only: bool) -> Result<(), i32> {
    let body = |offset: usize| word(request, REQUEST_HEADER + offset).ok_or(errno::INVAL);
    match code {
        operation::GETATTR
        | operation::FORGET
        | operation::BATCH_FORGET
        | operation::READLINK
        | operation::READ
        | operation::STATFS
        | operation::RELEASE
        | operation::FSYNC
        | operation::FLUSH
        | operation::INIT
        | operation::OPENDIR
        | operation::READDIR
        | operation::READDIRPLUS
        | operation::RELEASEDIR
        | operation::FSYNCDIR
        | operation::ACCESS
        | operation::LSEEK => Ok(()),
        operation::LOOKUP => {
            let name = request.get(REQUEST_HEADER..).ok_or(errno::INVAL)?;
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            // A directory that somebody moves away on the host would have a parent outside.
            if name == b".." || name == b"." || name.is_empty() {
                return Err(errno::NOENT);
            }
            Ok(())
        }
        operation::OPEN => {
            let flags = body(0)?;
            if read_only && (flags & OPEN_ACCESS != 0 || flags & OPEN_TRUNCATE != 0) {
                return Err(errno::ROFS);
            }
            Ok(())
        }
        operation::MKNOD if matches!(body(0)? & TYPE_MASK, TYPE_CHARACTER | TYPE_BLOCK) => {
            Err(errno::PERM)
        }
        operation::SETATTR
        | operation::SYMLINK
        | operation::MKNOD
        | operation::MKDIR
        | operation::UNLINK
        | operation::RMDIR
        | operation::RENAME
        | operation::RENAME2
        | operation::LINK
        | operation::WRITE
        | operation::CREATE
        | operation::FALLOCATE
        | operation::COPY_FILE_RANGE => {
            if read_only {
                return Err(errno::ROFS);
            }
            Ok(())
        }
        _ => Err(errno::NOSYS),
    }
}

/// A reply that carries an error alone, with room for the frame's header.
fn failure(unique: u64, error: i32) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes.reserve(REPLY_HEADER);
    bytes.extend(16u32.to_le_bytes());
    bytes.extend((-error).to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes
}

/// Makes the directory of a volume with a name, if it is not there yet.
///
/// # Errors
/// Those of `mkdir(2)`.
pub fn ensure_named(volumes: &Path, name: &str) -> Result<std::path::PathBuf, Error> {
    let directory = volumes.join(name);
    std::fs::create_dir_all(&directory).map_err(Error::io(format!(
        "make the volume {}",
        directory.display()
    )))?;
    Ok(directory)
}

/// Reads a whole small file, such as `/etc/resolv.conf`, up to a limit.
pub(crate) fn read_small(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(64 << 10).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::Scratch;
    use std::fs;
    use std::os::unix::fs::symlink;

    struct Client {
        server: VolumeServer,
        next: u64,
    }

    /// The reply's body, or the error number.
    type Answer = Result<Vec<u8>, i32>;

    impl Client {
        fn new(directory: &Path, read_only: bool) -> Self {
            let mut client = Self {
                server: VolumeServer::new(directory, read_only).unwrap(),
                next: 1,
            };
            let mut init = Vec::new();
            for value in [7u32, 38, 1 << 17, 0] {
                init.extend(value.to_le_bytes());
            }
            let reply = client.call(operation::INIT, 0, &init).unwrap();
            assert_eq!(word(&reply, 0), Some(7));
            client
        }

        fn call(&mut self, code: u32, node: u64, body: &[u8]) -> Answer {
            let unique = self.next;
            self.next += 1;
            let mut request = Vec::new();
            request.extend(
                u32::try_from(REQUEST_HEADER + body.len())
                    .unwrap()
                    .to_le_bytes(),
            );
            request.extend(code.to_le_bytes());
            request.extend(unique.to_le_bytes());
            request.extend(node.to_le_bytes());
            request.extend([0; 16]);
            request.extend(body);
            let reply = self.server.handle(&mut request).expect("an answer");
            let reply = &reply[HEADER..];
            assert_eq!(word(reply, 0).unwrap() as usize, reply.len());
            assert_eq!(
                u64::from_le_bytes(*reply[8..].first_chunk().unwrap()),
                unique
            );
            match word(reply, 4).unwrap().cast_signed() {
                0 => Ok(reply[REPLY_HEADER..].to_vec()),
                error => Err(-error),
            }
        }

        fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
            let body = [name.as_bytes(), b"\0"].concat();
            let reply = self.call(operation::LOOKUP, parent, &body)?;
            Ok(u64::from_le_bytes(*reply.first_chunk().unwrap()))
        }

        fn open(&mut self, node: u64, flags: u32) -> Result<u64, i32> {
            let body = [flags.to_le_bytes(), [0; 4]].concat();
            let reply = self.call(operation::OPEN, node, &body)?;
            Ok(u64::from_le_bytes(*reply.first_chunk().unwrap()))
        }

        fn read(&mut self, node: u64, handle: u64, size: u32) -> Answer {
            let mut body = Vec::new();
            body.extend(handle.to_le_bytes());
            body.extend(0u64.to_le_bytes());
            body.extend(size.to_le_bytes());
            body.extend([0; 20]);
            self.call(operation::READ, node, &body)
        }

        fn write(&mut self, node: u64, handle: u64, data: &[u8]) -> Answer {
            let mut body = Vec::new();
            body.extend(handle.to_le_bytes());
            body.extend(0u64.to_le_bytes());
            body.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
            body.extend([0; 20]);
            body.extend(data);
            self.call(operation::WRITE, node, &body)
        }

        fn create(&mut self, parent: u64, name: &str) -> Result<(u64, u64), i32> {
            let mut body = Vec::new();
            for value in [0o102u32, 0o644, 0, 0] {
                body.extend(value.to_le_bytes());
            }
            body.extend(name.as_bytes());
            body.push(0);
            let reply = self.call(operation::CREATE, parent, &body)?;
            let number =
                |offset: usize| u64::from_le_bytes(*reply[offset..].first_chunk().unwrap());
            Ok((number(0), number(128)))
        }
    }

    fn directory() -> (Scratch, std::path::PathBuf) {
        let scratch = Scratch::new();
        let path = scratch.0.path().join("shared");
        fs::create_dir_all(path.join("inner")).unwrap();
        fs::write(scratch.0.path().join("secret"), "secret").unwrap();
        fs::write(path.join("file"), "content").unwrap();
        (scratch, path)
    }

    #[test]
    fn files_are_read_written_and_synchronised() {
        let (_scratch, path) = directory();
        let mut client = Client::new(&path, false);
        let node = client.lookup(1, "file").unwrap();
        let handle = client.open(node, 2).unwrap();
        assert_eq!(client.read(node, handle, 100).unwrap(), b"content");
        let (made, handle) = client.create(1, "new").unwrap();
        let large: Vec<u8> = (0..1_000_000u32).map(|n| n.to_le_bytes()[0]).collect();
        for (slice, data) in [(0, &large[..]), (0, b"short".as_slice())] {
            let _ = slice;
            let reply = client.write(made, handle, data).unwrap();
            assert_eq!(word(&reply, 0).unwrap() as usize, data.len());
        }
        let mut body = handle.to_le_bytes().to_vec();
        body.extend([0; 8]);
        client.call(operation::FSYNC, made, &body).unwrap();
        assert_eq!(
            &client.read(made, handle, 1 << 20).unwrap()[5..],
            &large[5..]
        );
        assert_eq!(fs::read(path.join("new")).unwrap().len(), large.len());
    }

    #[test]
    fn nothing_leads_out_of_the_directory() {
        let (_scratch, path) = directory();
        symlink("../secret", path.join("link")).unwrap();
        symlink("/etc", path.join("etc")).unwrap();
        let mut client = Client::new(&path, false);
        let inner = client.lookup(1, "inner").unwrap();
        for (parent, name) in [
            (1, ".."),
            (inner, ".."),
            (1, "."),
            (1, "../secret"),
            (1, "inner/../../secret"),
            (1, "/etc/passwd"),
            (1, ""),
        ] {
            assert!(client.lookup(parent, name).is_err(), "{name}");
        }
        for name in ["link", "etc"] {
            let node = client.lookup(1, name).unwrap();
            assert!(client.open(node, 0).is_err(), "a link must not be followed");
        }
        for code in [operation::UNLINK, operation::RMDIR] {
            assert!(client.call(code, 1, b"../secret\0").is_err());
            assert!(client.call(code, inner, b"..\0").is_err());
        }
        let mut rename = 1u64.to_le_bytes().to_vec();
        rename.extend(b"file\0../moved\0");
        assert!(client.call(operation::RENAME, 1, &rename).is_err());
        let mut device = (TYPE_CHARACTER | 0o666).to_le_bytes().to_vec();
        device.extend([0; 12]);
        device.extend(b"null\0");
        assert_eq!(client.call(operation::MKNOD, 1, &device), Err(errno::PERM));
    }

    #[test]
    fn a_read_only_volume_changes_nothing() {
        let (_scratch, path) = directory();
        let mut client = Client::new(&path, true);
        let node = client.lookup(1, "file").unwrap();
        for flags in [1, 2, OPEN_TRUNCATE] {
            assert_eq!(client.open(node, flags), Err(errno::ROFS));
        }
        let handle = client.open(node, 0).unwrap();
        assert_eq!(client.read(node, handle, 100).unwrap(), b"content");
        assert_eq!(client.write(node, handle, b"x"), Err(errno::ROFS));
        assert_eq!(client.create(1, "new"), Err(errno::ROFS));
        assert_eq!(
            client.call(operation::UNLINK, 1, b"file\0"),
            Err(errno::ROFS)
        );
        assert_eq!(fs::read(path.join("file")).unwrap(), b"content");
    }

    #[test]
    fn broken_requests_are_answered_or_dropped_never_obeyed() {
        let (_scratch, path) = directory();
        let mut client = Client::new(&path, false);
        let mut seed = 0x9876_5432_1234_5678u64;
        for _ in 0..20_000 {
            let mut next = || {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed
            };
            let length = (next() % 200) as usize;
            let mut request: Vec<u8> = (0..length).map(|_| next() as u8).collect();
            if length >= REQUEST_HEADER && next() % 4 != 0 {
                request[..4].copy_from_slice(&(length as u32).to_le_bytes());
                request[4..8].copy_from_slice(&((next() % 52) as u32).to_le_bytes());
                request[16..24].copy_from_slice(&(next() % 4).to_le_bytes());
                // Identities of nobody's would only change who fails.
                request[24..32].fill(0);
            }
            let _ = client.server.handle(&mut request);
        }
        assert!(client.lookup(1, "inner").is_ok(), "the server still works");
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = VolumeServer::new(Path::new("/nonexistent/data"), false)
            .err()
            .expect("there is no such directory");
        assert!(error.to_string().contains("/nonexistent/data"));
        assert!(error.help().unwrap().contains("mkdir"));
    }
}

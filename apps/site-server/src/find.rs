//! From the path of a URL to a file below the root.
//!
//! Opening resolves every symbolic link below the root, and one that leads outside is refused: by the system, which does the whole
//! of it in one call (`openat2` with `RESOLVE_BENEATH`, Linux 5.6).

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use percent_encoding::percent_decode;
use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

/// A directory of which nothing but what lies below it can be opened.
#[derive(Debug)]
pub struct Root(OwnedFd);

impl Root {
    /// Opens the directory.
    ///
    /// # Errors
    ///
    /// What the system says, which is `ENOSYS` where it lacks the call that all depends on.
    pub fn open(path: &Path) -> Result<Self, Errno> {
        rustix::fs::openat2(
            rustix::fs::CWD,
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::empty(),
        )
        .map(Self)
    }

    /// Opens a regular file.
    ///
    /// # Errors
    ///
    /// As [`FindError`] says; whatever is not a regular file is missing.
    pub fn open_file(&self, path: Vec<u8>) -> Result<Found, FindError> {
        // Without waiting: a named pipe in the root must not stop the server.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let mut tries = 0;
        let file = loop {
            match rustix::fs::openat2(&self.0, path.as_slice(), flags, Mode::empty(), resolve) {
                // Something was renamed meanwhile, and the system cannot tell whether the path has led outside.
                Err(Errno::AGAIN) if tries < RENAME_TRIES => tries += 1,
                other => break other?,
            }
        };
        let status = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
            return Err(FindError::Missing);
        }
        Ok(Found {
            path,
            file: file.into(),
            size: u64::try_from(status.st_size).unwrap_or_default(),
            modified: time(status.st_mtime, status.st_mtime_nsec),
        })
    }
}

/// How often opening is tried again while others rename files.
const RENAME_TRIES: u32 = 4;

/// A file's time; those before 1970 count as 1970.
fn time(seconds: i64, nanoseconds: u64) -> SystemTime {
    let seconds = u64::try_from(seconds).unwrap_or_default();
    let nanoseconds = u32::try_from(nanoseconds).unwrap_or_default();
    UNIX_EPOCH
        .checked_add(Duration::new(seconds, nanoseconds))
        .unwrap_or(UNIX_EPOCH)
}

/// A path below the root, from a URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SitePath {
    /// Without a slash at either end; empty for the root itself.
    path: Vec<u8>,
    /// Whether the URL ended with a slash.
    directory: bool,
}

/// Why there is no file for a URL.
#[derive(Debug)]
pub enum FindError {
    /// The URL's path cannot be one (400).
    BadPath,
    /// No such file, or none that is to be seen (404).
    Missing,
    /// The server may not read it (403).
    Forbidden,
    /// The system failed (500).
    System(io::Error),
}

impl From<Errno> for FindError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::ACCESS | Errno::PERM => Self::Forbidden,
            // XDEV is a path or a link that leads outside, NXIO a socket.
            Errno::NOENT
            | Errno::NOTDIR
            | Errno::NAMETOOLONG
            | Errno::LOOP
            | Errno::XDEV
            | Errno::NXIO => Self::Missing,
            _ => Self::System(error.into()),
        }
    }
}

/// An open regular file.
#[derive(Debug)]
pub struct Found {
    /// Its path below the root.
    pub path: Vec<u8>,
    /// The file.
    pub file: File,
    /// Its length in bytes.
    pub size: u64,
    /// When its content was last changed.
    pub modified: SystemTime,
}

impl SitePath {
    /// Decodes the path of a URL (without query).
    ///
    /// # Errors
    ///
    /// [`FindError::BadPath`] for one with a zero byte, [`FindError::Missing`] for one that
    /// leaves the root or asks for a hidden file. `/.well-known/` (RFC 8615) is not hidden.
    pub fn parse(url_path: &str) -> Result<Self, FindError> {
        let mut path = Vec::with_capacity(url_path.len());
        let segments = url_path.as_bytes().split(|byte| *byte == b'/');
        for segment in segments.filter(|segment| !segment.is_empty()) {
            // Decoded after the split: an encoded slash does not separate.
            let start = path.len();
            if start > 0 {
                path.push(b'/');
            }
            let name = path.len();
            path.extend(percent_decode(segment));
            let name = path.get(name..).unwrap_or_default();
            if name.contains(&0) {
                return Err(FindError::BadPath);
            }
            if name == b"." {
                path.truncate(start);
            } else if name.contains(&b'/') || (name.starts_with(b".") && name != b".well-known") {
                return Err(FindError::Missing);
            }
        }
        Ok(Self {
            path,
            directory: url_path.ends_with('/'),
        })
    }

    /// Finds and opens the file: the path itself, `index.html` in it, or the path with `.html`.
    ///
    /// # Errors
    ///
    /// As [`FindError`] says.
    pub fn open(&self, root: &Root) -> Result<Found, FindError> {
        let path = self.path.as_slice();
        if path.is_empty() {
            return root.open_file(b"index.html".to_vec());
        }
        let suffixes: &[&[u8]] = if self.directory {
            &[b"/index.html", b".html"]
        } else {
            &[b"", b"/index.html", b".html"]
        };
        for suffix in suffixes {
            match root.open_file([path, suffix].concat()) {
                Err(FindError::Missing) => {}
                other => return other,
            }
        }
        Err(FindError::Missing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(url: &str) -> String {
        let parsed = SitePath::parse(url).unwrap();
        String::from_utf8(parsed.path).unwrap() + if parsed.directory { "/" } else { "" }
    }

    #[test]
    fn paths_are_decoded() {
        assert_eq!(path("/"), "/");
        assert_eq!(path("/about"), "about");
        assert_eq!(path("/about/"), "about/");
        assert_eq!(path("//a///b"), "a/b");
        assert_eq!(path("/./a/./b"), "a/b");
        assert_eq!(path("/a%20b/%C3%A9"), "a b/é");
        assert_eq!(path("/100%"), "100%");
        assert_eq!(
            path("/.well-known/security.txt"),
            ".well-known/security.txt"
        );
    }

    #[test]
    fn nothing_outside_the_root_or_hidden() {
        for url in [
            "/..",
            "/../etc/passwd",
            "/a/../../b",
            "/%2e%2e/etc/passwd",
            "/.%2e/etc",
            "/..%2fetc",
            "/a%2fb",
            "/.git/config",
            "/a/.htaccess",
        ] {
            assert!(
                matches!(SitePath::parse(url), Err(FindError::Missing)),
                "{url}"
            );
        }
        assert!(matches!(SitePath::parse("/a%00b"), Err(FindError::BadPath)));
    }
}

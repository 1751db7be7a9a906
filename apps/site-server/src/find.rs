//! From the path of a URL to a file below the root.
//!
//! The root is a capability ([`cap_std::fs::Dir`]): opening resolves every symbolic link below it, and one that
//! leads outside is refused, by the kernel (`openat2`) or, where that call is missing, step by step.

use std::{
    ffi::OsString,
    fs::{File, Metadata},
    io,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
};

use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt as _};
use percent_encoding::percent_decode_str;

/// `O_NONBLOCK`: a named pipe in the root must not stop the server when it is opened.
const NONBLOCK: i32 = 0o4000;

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

impl From<io::Error> for FindError {
    fn from(error: io::Error) -> Self {
        // Numbers, since `cap_std` also uses `PermissionDenied` for a link that leads outside.
        const EACCES: i32 = 13;
        const ELOOP: i32 = 40;
        const ENXIO: i32 = 6;
        match (error.kind(), error.raw_os_error()) {
            (_, Some(EACCES)) => Self::Forbidden,
            (_, Some(ELOOP | ENXIO))
            | (
                io::ErrorKind::NotFound
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::InvalidFilename
                | io::ErrorKind::CrossesDevices
                | io::ErrorKind::PermissionDenied,
                _,
            ) => Self::Missing,
            _ => Self::System(error),
        }
    }
}

/// An open regular file.
#[derive(Debug)]
pub struct Found {
    /// Its path below the root.
    pub path: OsString,
    /// The file.
    pub file: File,
    /// Its size and times.
    pub metadata: Metadata,
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
        for segment in url_path.split('/').filter(|segment| !segment.is_empty()) {
            // Decoded after the split: an encoded slash does not separate.
            let start = path.len();
            if start > 0 {
                path.push(b'/');
            }
            let name = path.len();
            path.extend(percent_decode_str(segment));
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
    pub fn open(&self, root: &Dir) -> Result<Found, FindError> {
        let with = |suffix: &[u8]| OsString::from_vec([self.path.as_slice(), suffix].concat());
        let index = if self.path.is_empty() {
            OsString::from("index.html")
        } else {
            with(b"/index.html")
        };
        let candidates = [
            (!self.directory && !self.path.is_empty()).then(|| with(b"")),
            Some(index),
            (!self.path.is_empty()).then(|| with(b".html")),
        ];
        for candidate in candidates.into_iter().flatten() {
            match open_file(root, candidate) {
                Err(FindError::Missing) => {}
                other => return other,
            }
        }
        Err(FindError::Missing)
    }
}

/// Opens a regular file below the root.
///
/// # Errors
///
/// As [`FindError`] says; whatever is not a regular file is missing.
pub fn open_file(root: &Dir, path: OsString) -> Result<Found, FindError> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(NONBLOCK);
    let file = root.open_with(&path, &options)?.into_std();
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(FindError::Missing);
    }
    Ok(Found {
        path,
        file,
        metadata,
    })
}

/// The file's path with something added to its name.
#[must_use]
pub fn sibling(path: &OsString, suffix: &str) -> OsString {
    OsString::from_vec([path.as_bytes(), suffix.as_bytes()].concat())
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

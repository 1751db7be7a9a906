//! The image store: images by digest, and names for them.
//!
//! Below the store's directory:
//!
//! * `sha256/DIGEST.kiln`: images, read-only, named by the SHA-256 of their bytes;
//! * `names/NAME`: the digest that a name stands for;
//! * `incoming/`: files being written.
//!
//! All changes are renames, so a crash leaves nothing half done: at worst a file in `incoming`, which later
//! additions clear away. No lock is needed: who comes last gives the name its meaning.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use crate::{
    BuildOptions, Built, Error, Image, Progress, Result, Source, builder, file::digest_of,
    project::check_name,
};

/// Length of a digest in hexadecimal digits.
const DIGEST_LENGTH: usize = 64;
/// Shortest start of a digest that is taken as one.
const SHORTEST_PREFIX: usize = 4;
/// Age at which a file in `incoming` is nobody's any more.
const STALE: Duration = Duration::from_secs(24 * 3600);

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// A directory of images.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

/// An image in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// SHA-256 of the image in lower-case hexadecimal.
    pub digest: String,
    /// Names that stand for it, sorted.
    pub names: Vec<String>,
    /// The image file.
    pub path: PathBuf,
    /// Its length in bytes.
    pub length: u64,
    /// When it was stored.
    pub created: SystemTime,
}

impl Store {
    /// The store in `directory` (by convention `images` in the state directory), made if missing.
    ///
    /// # Errors
    ///
    /// The directory cannot be made.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self> {
        let store = Self {
            directory: directory.into(),
        };
        for part in ["sha256", "names", "incoming"] {
            let path = store.directory.join(part);
            fs::create_dir_all(&path).map_err(Error::io("create", path))?;
        }
        Ok(store)
    }

    /// Builds an image straight into the store, under the name of its manifest.
    ///
    /// # Errors
    ///
    /// As [`builder::build`]; storing fails.
    pub fn build(
        &self,
        source: &Source,
        options: &BuildOptions<'_>,
        progress: &mut dyn Progress,
    ) -> Result<(Stored, Built)> {
        let incoming = self.incoming();
        let outcome = builder::build(source, options, &incoming, progress).and_then(|mut built| {
            let stored = self.take(&incoming, &built.manifest.name)?;
            built.path.clone_from(&stored.path);
            Ok((stored, built))
        });
        if outcome.is_err() {
            let _ = fs::remove_file(&incoming);
        }
        outcome
    }

    /// Copies an image file into the store and gives it a name (`None`: the one in its manifest).
    ///
    /// # Errors
    ///
    /// The file is no image, the name is not allowed, or copying fails.
    pub fn add(&self, path: &Path, name: Option<&str>) -> Result<Stored> {
        let image = Image::open(path)?;
        let name = name.unwrap_or(&image.manifest().name);
        let incoming = self.incoming();
        let outcome = fs::copy(path, &incoming)
            .map_err(Error::io("copy", path))
            .and_then(|_| self.take(&incoming, name));
        if outcome.is_err() {
            let _ = fs::remove_file(&incoming);
        }
        outcome
    }

    /// Moves a complete image from `incoming` to its place.
    fn take(&self, incoming: &Path, name: &str) -> Result<Stored> {
        let mut file = File::open(incoming).map_err(Error::io("read", incoming))?;
        let digest = digest_of(&mut file).map_err(Error::io("read", incoming))?;
        let path = self.image_path(&digest);
        if !path.exists() {
            let mut permissions = file
                .metadata()
                .map_err(Error::io("read", incoming))?
                .permissions();
            permissions.set_readonly(true);
            fs::set_permissions(incoming, permissions).map_err(Error::io("protect", incoming))?;
            fs::rename(incoming, &path).map_err(Error::io("write", &path))?;
        } else {
            fs::remove_file(incoming).map_err(Error::io("remove", incoming))?;
        }
        self.tag(&digest, name)?;
        self.stored(digest, &self.names()?)
    }

    /// Lets a name stand for a stored image (given by digest), whatever it stood for before.
    ///
    /// # Errors
    ///
    /// The name is not allowed, there is no such image, or writing fails.
    pub fn tag(&self, digest: &str, name: &str) -> Result<()> {
        check_name(name).map_err(|reason| Error::Value {
            what: "name",
            value: name.into(),
            reason,
        })?;
        if !is_digest(digest) || !self.image_path(digest).is_file() {
            return Err(Error::NoImage {
                reference: digest.into(),
            });
        }
        let incoming = self.incoming();
        fs::write(&incoming, digest).map_err(Error::io("write", &incoming))?;
        let path = self.name_path(name);
        fs::rename(&incoming, &path).map_err(Error::io("write", path))
    }

    /// All images, by first name, then digest. Files that do not belong here are passed over.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub fn list(&self) -> Result<Vec<Stored>> {
        let names = self.names()?;
        let directory = self.directory.join("sha256");
        let mut images = Vec::new();
        for entry in fs::read_dir(&directory).map_err(Error::io("list", &directory))? {
            let entry = entry.map_err(Error::io("list", &directory))?;
            if let Some(digest) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.strip_suffix(".kiln"))
                && is_digest(digest)
            {
                match self.stored(digest.into(), &names) {
                    Ok(stored) => images.push(stored),
                    // Removed by another process since.
                    Err(Error::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        images.sort_by(|a, b| {
            (a.names.is_empty(), &a.names, &a.digest).cmp(&(
                b.names.is_empty(),
                &b.names,
                &b.digest,
            ))
        });
        Ok(images)
    }

    /// Finds an image by name, digest, `sha256:DIGEST`, or the start of a digest (four digits at least).
    ///
    /// # Errors
    ///
    /// There is none, or several fit.
    pub fn resolve(&self, reference: &str) -> Result<Stored> {
        let names = self.names()?;
        if let Some((_, digest)) = names.iter().find(|(name, _)| name == reference)
            && self.image_path(digest).is_file()
        {
            return self.stored(digest.clone(), &names);
        }
        let prefix = reference.strip_prefix("sha256:").unwrap_or(reference);
        let no_image = || Error::NoImage {
            reference: reference.into(),
        };
        if prefix.len() < SHORTEST_PREFIX || !prefix.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(no_image());
        }
        let mut found: Vec<Stored> = self
            .list()?
            .into_iter()
            .filter(|image| image.digest.starts_with(prefix))
            .collect();
        match (found.pop(), found.len()) {
            (Some(image), 0) => Ok(image),
            (None, _) => Err(no_image()),
            (_, others) => Err(Error::Ambiguous {
                reference: reference.into(),
                count: others + 1,
            }),
        }
    }

    /// Removes a name; the image goes with its last name. A digest removes the image with all its names. Running
    /// instances keep the file they have open. Returns the digest if the image itself is gone.
    ///
    /// # Errors
    ///
    /// There is no such image, or removing fails.
    pub fn remove(&self, reference: &str) -> Result<Option<String>> {
        let image = self.resolve(reference)?;
        let one_of_several = image.names.len() > 1 && image.names.iter().any(|n| n == reference);
        let names: Vec<&str> = if one_of_several {
            vec![reference]
        } else {
            image.names.iter().map(String::as_str).collect()
        };
        for name in names {
            remove_file(&self.name_path(name))?;
        }
        if one_of_several {
            return Ok(None);
        }
        remove_file(&image.path)?;
        Ok(Some(image.digest))
    }

    fn stored(&self, digest: String, names: &[(String, String)]) -> Result<Stored> {
        let path = self.image_path(&digest);
        let metadata = fs::metadata(&path).map_err(Error::io("look at", &path))?;
        Ok(Stored {
            names: names
                .iter()
                .filter(|(_, other)| *other == digest)
                .map(|(name, _)| name.clone())
                .collect(),
            length: metadata.len(),
            created: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            digest,
            path,
        })
    }

    /// Names with their digests, sorted.
    fn names(&self) -> Result<Vec<(String, String)>> {
        let directory = self.directory.join("names");
        let mut names = Vec::new();
        for entry in fs::read_dir(&directory).map_err(Error::io("list", &directory))? {
            let entry = entry.map_err(Error::io("list", &directory))?;
            let digest = fs::read_to_string(entry.path()).unwrap_or_default();
            if let Ok(name) = entry.file_name().into_string()
                && is_digest(digest.trim())
            {
                names.push((name, digest.trim().into()));
            }
        }
        names.sort();
        Ok(names)
    }

    fn image_path(&self, digest: &str) -> PathBuf {
        self.directory.join("sha256").join(format!("{digest}.kiln"))
    }

    fn name_path(&self, name: &str) -> PathBuf {
        self.directory.join("names").join(name)
    }

    /// A new path for a file being written. Clears away what crashed processes left.
    fn incoming(&self) -> PathBuf {
        let directory = self.directory.join("incoming");
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let age = entry
                .metadata()
                .and_then(|m| m.modified())
                .ok()
                .and_then(|t| t.elapsed().ok());
            if age.is_some_and(|age| age > STALE) {
                let _ = fs::remove_file(entry.path());
            }
        }
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        directory.join(format!("{}-{number}", process::id()))
    }
}

fn is_digest(text: &str) -> bool {
    text.len() == DIGEST_LENGTH
        && text
            .bytes()
            .all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BuildOptions, Guest, NoProgress, file::tests::shim};

    struct Temporary(PathBuf);

    impl Temporary {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("kiln-store-{name}-{}", process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Temporary {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn build(store: &Store, directory: &Path, name: &str) -> Result<Stored> {
        let shim = shim(kiln_abi::image::SHIM_PHYSICAL, None);
        let guest = Guest {
            kernel: b"\x7fELF kernel",
            vm_shim: &shim,
        };
        let mut options = BuildOptions::new(guest);
        options.name = Some(name.into());
        let server = fs::read("/bin/true").unwrap();
        options.site_server = Some(&server);
        let source = Source::detect(directory)?;
        store
            .build(&source, &options, &mut NoProgress)
            .map(|(stored, _)| stored)
    }

    fn site(temporary: &Temporary, text: &str) -> PathBuf {
        let directory = temporary.0.join("blog");
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("index.html"), text).unwrap();
        directory
    }

    #[test]
    fn images_are_found_by_name_digest_and_prefix() {
        let temporary = Temporary::new("found");
        let store = Store::open(temporary.0.join("images")).unwrap();
        let stored = build(&store, &site(&temporary, "hello"), "blog").unwrap();
        assert_eq!(
            Image::open(&stored.path).unwrap().digest().unwrap(),
            stored.digest
        );
        for reference in ["blog", &stored.digest, &stored.digest[..6]] {
            assert_eq!(store.resolve(reference).unwrap(), stored);
        }
        assert_eq!(
            store.resolve(&format!("sha256:{}", stored.digest)).unwrap(),
            stored
        );
        assert!(matches!(store.resolve("other"), Err(Error::NoImage { .. })));
        assert!(matches!(store.resolve("abc"), Err(Error::NoImage { .. })));
        assert_eq!(store.list().unwrap(), [stored]);
        assert_eq!(
            fs::read_dir(temporary.0.join("images/incoming"))
                .unwrap()
                .count(),
            0
        );
    }

    #[test]
    fn the_same_source_is_stored_once_and_names_move() {
        let temporary = Temporary::new("once");
        let store = Store::open(temporary.0.join("images")).unwrap();
        let directory = site(&temporary, "one");
        let first = build(&store, &directory, "blog").unwrap();
        assert_eq!(
            build(&store, &directory, "blog").unwrap().digest,
            first.digest
        );
        assert_eq!(store.list().unwrap().len(), 1);
        fs::write(directory.join("index.html"), "two").unwrap();
        let second = build(&store, &directory, "blog").unwrap();
        assert_ne!(second.digest, first.digest);
        assert_eq!(store.resolve("blog").unwrap().digest, second.digest);
        assert!(store.resolve(&first.digest).unwrap().names.is_empty());
        store.tag(&first.digest, "blog:old").unwrap();
        assert_eq!(
            store.remove("blog:old").unwrap(),
            Some(first.digest.clone())
        );
        assert!(store.resolve(&first.digest).is_err());
    }

    #[test]
    fn an_image_goes_with_its_last_name() {
        let temporary = Temporary::new("last");
        let store = Store::open(temporary.0.join("images")).unwrap();
        let image = build(&store, &site(&temporary, "x"), "a").unwrap();
        let copy = temporary.0.join("copy.kiln");
        fs::copy(&image.path, &copy).unwrap();
        assert_eq!(store.add(&copy, Some("b")).unwrap().names, ["a", "b"]);
        assert_eq!(store.remove("a").unwrap(), None);
        assert_eq!(store.remove("b").unwrap(), Some(image.digest));
        assert!(store.list().unwrap().is_empty());
        assert!(
            store
                .add(&temporary.0.join("blog/index.html"), None)
                .is_err()
        );
        assert!(store.add(&copy, Some("../x")).is_err());
        assert_eq!(
            fs::read_dir(temporary.0.join("images/incoming"))
                .unwrap()
                .count(),
            0
        );
    }
}

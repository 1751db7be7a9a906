//! What an image can be made from, and how it is recognised.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use crate::{
    Error, Result,
    project::{self, Project},
};

/// Directories that site generators write to, looked for to give a hint.
const GENERATED: [&str; 6] = ["_site", "public", "dist", "build", "site", "out"];

/// Something that an image can be made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An ELF file.
    Program {
        /// On the host.
        path: PathBuf,
    },
    /// A directory with a `kiln.toml`.
    Project {
        /// On the host.
        directory: PathBuf,
        /// What its `kiln.toml` says.
        project: Box<Project>,
    },
    /// A directory with an `index.html`.
    Site {
        /// On the host.
        directory: PathBuf,
    },
}

impl Source {
    /// Looks at a path of the host and says what it is.
    ///
    /// # Errors
    ///
    /// There is nothing, or nothing to make an image from: the error says what was looked for.
    pub fn detect(path: &Path) -> Result<Self> {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::NoSource { path: path.into() });
            }
            Err(error) => return Err(Error::io("look at", path)(error)),
        };
        if metadata.is_dir() {
            return Self::detect_directory(path);
        }
        if !metadata.is_file() {
            return Err(Error::BadSource {
                path: path.into(),
                reason: "is neither a file nor a directory".into(),
                remedy: "give an ELF program or a directory".into(),
            });
        }
        if path
            .file_name()
            .is_some_and(|name| name == project::FILE_NAME)
        {
            return Self::read_project(path.parent().unwrap_or(Path::new("")), path);
        }
        let mut start = Vec::new();
        fs::File::open(path)
            .and_then(|file| file.take(4).read_to_end(&mut start))
            .map_err(Error::io("read", path))?;
        if start.starts_with(b"\x7fELF") {
            return Ok(Self::Program { path: path.into() });
        }
        let (reason, remedy) = if start.starts_with(b"#!") {
            (
                "is a script, not an ELF program",
                "write a kiln.toml whose `program` is the interpreter and whose `include` has the script",
            )
        } else {
            (
                "is not an ELF program",
                "give an x86-64 Linux program, or a directory with kiln.toml or index.html",
            )
        };
        Err(Error::BadSource {
            path: path.into(),
            reason: reason.into(),
            remedy: remedy.into(),
        })
    }

    fn detect_directory(path: &Path) -> Result<Self> {
        let file = path.join(project::FILE_NAME);
        if file.is_file() {
            return Self::read_project(path, &file);
        }
        let index = path.join("index.html");
        let generator = ["_config.yml", "_config.toml"]
            .iter()
            .any(|name| path.join(name).is_file());
        if index.is_file() && !(generator && starts_with_front_matter(&index)) {
            return Ok(Self::Site {
                directory: path.into(),
            });
        }
        let generated = GENERATED
            .iter()
            .find(|name| path.join(name).join("index.html").is_file());
        let what = if generator {
            "has the sources of a site, but not the generated pages"
        } else {
            "has neither a kiln.toml nor an index.html"
        };
        Err(Error::BadSource {
            path: path.into(),
            reason: what.into(),
            remedy: match generated {
                Some(name) => format!(
                    "the generated site seems to be in {}: give that, or write `site = \"{name}\"` into {}",
                    path.join(name).display(),
                    file.display()
                ),
                None if generator => format!(
                    "generate the site first, and write `site = \"_site\"` into {}",
                    file.display()
                ),
                None => format!(
                    "give a directory with index.html to serve it, or write {} with `program = \"...\"` or `site = \"...\"`",
                    file.display()
                ),
            },
        })
    }

    fn read_project(directory: &Path, file: &Path) -> Result<Self> {
        let project = project::read(file)?;
        if project.program.is_none() && project.site.is_none() {
            return Err(Error::BadSource {
                path: file.into(),
                reason: "has neither `program` nor `site`".into(),
                remedy: "say what runs: `program = \"path of an ELF file\"`, or `site = \"directory with index.html\"`".into(),
            });
        }
        let directory = if directory.as_os_str().is_empty() {
            Path::new(".")
        } else {
            directory
        };
        Ok(Self::Project {
            directory: directory.into(),
            project: Box::new(project),
        })
    }

    /// The name an image gets when nobody says another.
    #[must_use]
    pub fn default_name(&self) -> String {
        let path = match self {
            Self::Program { path } => path,
            Self::Project { project, .. } if project.name.is_some() => {
                return project.name.clone().unwrap_or_default();
            }
            Self::Project { directory, .. } | Self::Site { directory } => directory,
        };
        let name = fs::canonicalize(path)
            .ok()
            .filter(|_| !matches!(self, Self::Program { .. }))
            .and_then(|path| {
                path.file_name()
                    .map(|name| name.to_string_lossy().into_owned())
            })
            .or_else(|| {
                path.file_name()
                    .map(|name| name.to_string_lossy().into_owned())
            })
            .unwrap_or_default();
        let name: String = name
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || "._-".contains(c) {
                    c
                } else {
                    '-'
                }
            })
            .take(100)
            .collect();
        let name = name.trim_start_matches(['.', '-', '_']);
        if name.is_empty() {
            "image".into()
        } else {
            name.into()
        }
    }
}

/// Jekyll and its like process an `index.html` that begins with a line `---`.
fn starts_with_front_matter(path: &Path) -> bool {
    let mut start = [0; 3];
    fs::File::open(path)
        .and_then(|mut file| file.read_exact(&mut start))
        .is_ok()
        && &start == b"---"
}

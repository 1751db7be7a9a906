//! Source in, image file out.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use kiln_abi::manifest::Manifest;

use crate::{
    Error, Result, Source, erofs, file, program,
    project::{Include, check_name},
};

pub use crate::file::Guest;

/// How to build.
#[derive(Clone, Debug)]
pub struct BuildOptions<'a> {
    /// The freestanding programs that go into the image.
    pub guest: Guest<'a>,
    /// ELF file of the site server, needed for sites.
    pub site_server: Option<PathBuf>,
    /// Name of the image; none: the project's, or the source's.
    pub name: Option<String>,
    /// Files and directories to add.
    pub include: Vec<Include>,
    /// Where libraries and system files are looked for; `/` but for tests.
    pub system_root: PathBuf,
    /// No file in the image is later (seconds since 1970). Default: `SOURCE_DATE_EPOCH`.
    pub latest_time: Option<i64>,
    /// Turn system call instructions into jumps .
    pub rewrite_system_calls: bool,
}

impl<'a> BuildOptions<'a> {
    /// Options as the command line has them when nothing is said.
    #[must_use]
    pub fn new(guest: Guest<'a>) -> Self {
        Self {
            guest,
            site_server: None,
            name: None,
            include: Vec::new(),
            system_root: "/".into(),
            latest_time: std::env::var("SOURCE_DATE_EPOCH")
                .ok()
                .and_then(|text| text.parse().ok()),
            rewrite_system_calls: false,
        }
    }
}

/// What a build is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Looking for what the program needs.
    Collecting,
    /// Turning system calls into jumps.
    Rewriting,
    /// Writing the image.
    Writing,
}

/// Follows a build.
pub trait Progress {
    /// A step begins. `total` is how much it will report to [`Progress::advance`], in bytes, if known.
    fn step(&mut self, step: Step, total: Option<u64>);
    /// So many bytes of the step are done since the last call.
    fn advance(&mut self, bytes: u64);
}

/// Nobody follows.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn step(&mut self, _: Step, _: Option<u64>) {}
    fn advance(&mut self, _: u64) {}
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Built {
    /// The image file.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// Bytes of the root file system.
    pub root_length: u64,
    /// What the user should know: files left out, libraries of plug-ins not found.
    pub notes: Vec<String>,
}

/// Builds an image file; replaces `output` only when all went well.
///
/// # Errors
///
/// The source is unusable, something it needs is missing, or writing fails. Nothing is left behind then.
pub fn build(
    source: &Source,
    options: &BuildOptions<'_>,
    output: &Path,
    progress: &mut dyn Progress,
) -> Result<Built> {
    progress.step(Step::Collecting, None);
    let name = options
        .name
        .clone()
        .unwrap_or_else(|| source.default_name());
    check_name(&name).map_err(|reason| Error::Value {
        what: "name",
        value: name.clone(),
        reason,
    })?;
    let packed = program::pack(source, options, name)?;
    if let Some(missing) = packed.missing.into_iter().next() {
        return Err(Error::MissingLibrary {
            library: missing.library,
            needed_by: missing.needed_by,
            searched: missing.searched,
        });
    }

    let mut total = 0;
    packed.tree.walk(&mut |_, node| {
        if let crate::tree::Node::File { content, .. } = node {
            total += content.length();
        }
        Ok(())
    })?;
    progress.step(Step::Writing, Some(total));
    let partial = partial_path(output)?;
    let outcome = (|| {
        let file = File::create(&partial).map_err(Error::io("create", &partial))?;
        let mut root_length = 0;
        file::write(
            file,
            &partial,
            &options.guest,
            &packed.manifest,
            &mut |out| {
                let mut counting = Counting {
                    inner: out,
                    progress: &mut *progress,
                };
                root_length = erofs::write(&packed.tree, options.latest_time, &mut counting)?;
                Ok(())
            },
        )?;
        fs::rename(&partial, output).map_err(Error::io("write", output))?;
        Ok(root_length)
    })();
    match outcome {
        Ok(root_length) => Ok(Built {
            path: output.into(),
            manifest: packed.manifest,
            root_length,
            notes: packed.notes,
        }),
        Err(error) => {
            let _ = fs::remove_file(&partial);
            Err(error)
        }
    }
}

/// A name beside the output, so that the last step is a rename.
fn partial_path(output: &Path) -> Result<PathBuf> {
    let Some(name) = output.file_name() else {
        return Err(Error::Value {
            what: "output",
            value: output.display().to_string(),
            reason: "is not the name of a file".into(),
        });
    };
    let mut partial = std::ffi::OsString::from(".");
    partial.push(name);
    partial.push(format!(".{}.part", std::process::id()));
    Ok(output.with_file_name(partial))
}

struct Counting<'a> {
    inner: &'a mut dyn std::io::Write,
    progress: &'a mut dyn Progress,
}

impl std::io::Write for Counting<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.progress.advance(count as u64);
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

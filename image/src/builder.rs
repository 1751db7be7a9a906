//! Source in, image file out.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use kiln_abi::manifest::Manifest;

use crate::{
    Error, Result, Source, erofs, file, program,
    project::{Include, check_name},
    rewrite,
    tree::{Content, Node},
};

pub use crate::file::Guest;

/// How to build.
#[derive(Clone, Debug)]
pub struct BuildOptions<'a> {
    /// The freestanding programs that go into the image.
    pub guest: Guest<'a>,
    /// The site server's ELF file, needed for sites.
    pub site_server: Option<&'a [u8]>,
    /// Name of the image; none: the project's, or the source's.
    pub name: Option<String>,
    /// Files and directories to add.
    pub include: Vec<Include>,
    /// Where libraries and system files are looked for; `/` but for tests.
    pub system_root: PathBuf,
    /// No file in the image is later (seconds since 1970). Default: `SOURCE_DATE_EPOCH`.
    pub latest_time: Option<i64>,
    /// Turn system call instructions into jumps (see [`crate::rewrite`]).
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
            rewrite_system_calls: true,
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
    check_output(output, source)?;
    let name = options
        .name
        .clone()
        .unwrap_or_else(|| source.default_name());
    check_name(&name).map_err(|reason| Error::Value {
        what: "name",
        value: name.clone(),
        reason,
    })?;
    let mut packed = program::pack(source, options, name)?;
    if let Some(missing) = packed.missing.drain(..).next() {
        return Err(Error::MissingLibrary {
            library: missing.library,
            needed_by: missing.needed_by,
            searched: missing.searched,
        });
    }

    if options.rewrite_system_calls {
        progress.step(Step::Rewriting, None);
        packed.tree.change_contents(&mut |content| {
            if content.length() < 64 || !content.start()?.starts_with(b"\x7fELF") {
                return Ok(None);
            }
            let rewritten = rewrite::rewrite(&content.read()?);
            Ok(rewritten.map(|(bytes, _)| Content::Bytes(bytes.into())))
        })?;
    }

    let mut total = 0;
    packed.tree.walk(&mut |_, node| {
        if let Node::File { content, .. } = node {
            total += content.length();
        }
        Ok(())
    })?;
    progress.step(Step::Writing, Some(total));
    let partial = partial_path(output)?;
    let outcome = (|| {
        let file = File::create(&partial).map_err(|cause| Error::Output {
            path: output.into(),
            reason: cause.to_string(),
            remedy: match cause.kind() {
                io::ErrorKind::StorageFull => "free some space there",
                _ => "name a file in a directory that you may write to",
            },
        })?;
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

/// Refuses an output that must not be replaced: what is no regular file (a device, a pipe, a directory), and the program itself.
/// A directory that is missing is named here, where the message can say which one.
fn check_output(output: &Path, source: &Source) -> Result<()> {
    let refuse = |reason: String, remedy: &'static str| {
        Err(Error::Output {
            path: output.into(),
            reason,
            remedy,
        })
    };
    let directory = match output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !directory.exists() {
        return refuse(
            format!("there is no directory {}", directory.display()),
            "make it first (mkdir -p), or name a file in another directory",
        );
    }
    let Ok(present) = fs::metadata(output) else {
        return Ok(());
    };
    if present.is_dir() {
        return refuse(
            "it is a directory".into(),
            "name a file in it, such as DIRECTORY/NAME.kiln",
        );
    }
    if !present.is_file() {
        return refuse(
            "it is no regular file, and would be replaced by one".into(),
            "name a file, such as NAME.kiln",
        );
    }
    let program = match source {
        Source::Program { path } => Some(path.clone()),
        Source::Project { directory, project } => {
            project.program.as_ref().map(|path| directory.join(path))
        }
        Source::Site { .. } => None,
    };
    let identity = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
    if program
        .and_then(|program| fs::metadata(program).ok())
        .is_some_and(|program| identity(&program) == identity(&present))
    {
        return refuse(
            "it is the program itself, which would be lost".into(),
            "name another file, such as NAME.kiln",
        );
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Image, file::tests::shim};

    struct Temporary(PathBuf);

    impl Temporary {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("kiln-builder-{name}-{}", std::process::id()));
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

    fn built(
        source: &Path,
        output: &Path,
        change: &dyn Fn(&mut BuildOptions<'_>),
    ) -> Result<Built> {
        let shim = shim(kiln_abi::image::SHIM_PHYSICAL, None);
        let guest = Guest {
            kernel: b"\x7fELF kernel",
            vm_shim: &shim,
        };
        let server = fs::read("/bin/true").unwrap();
        let mut options = BuildOptions::new(guest);
        options.site_server = Some(&server);
        change(&mut options);
        build(&Source::detect(source)?, &options, output, &mut NoProgress)
    }

    /// The root of an image, for an independent reader.
    fn root_of(path: &Path) -> Vec<u8> {
        let root = Image::open(path).unwrap().root();
        let bytes = fs::read(path).unwrap();
        bytes[root.offset as usize..][..root.length as usize].to_vec()
    }

    fn read(root: &[u8], path: &str) -> Vec<u8> {
        let system = erofs_rs::EroFS::new(erofs_rs::backend::SliceImage::new(root)).unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut system.open(path).unwrap(), &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_program_becomes_an_image_that_holds_it_and_its_loader() {
        let temporary = Temporary::new("program");
        let (source, output) = (PathBuf::from("/bin/true"), temporary.0.join("x.kiln"));
        let built = built(&source, &output, &|_| {}).unwrap();
        let image = Image::open(&output).unwrap();
        assert!(Image::is_image(&output));
        assert_eq!(image.manifest(), &built.manifest);
        assert_eq!(image.root().length, built.root_length);
        let root = root_of(&output);
        let program = fs::canonicalize(&built.manifest.program).unwrap();
        assert_eq!(
            read(&root, program.to_str().unwrap()),
            fs::read(&source).unwrap()
        );
        assert!(read(&root, "/etc/passwd").starts_with(b"root:x:0:0:"));
        assert!(read(&root, "/etc/ld.so.cache").starts_with(b"glibc-ld.so.cache1.1"));
        assert_eq!(fs::read_dir(&temporary.0).unwrap().count(), 1);
        let inspection = crate::inspect(&image).unwrap();
        assert!(
            serde_json::to_string(&inspection)
                .unwrap()
                .contains(&image.digest().unwrap())
        );
    }

    #[test]
    fn the_same_source_gives_the_same_image() {
        let temporary = Temporary::new("same");
        let mut images = Vec::new();
        for name in ["a", "b"] {
            // In another place, made in another order, at another time.
            let directory = temporary.0.join(name).join("blog");
            fs::create_dir_all(&directory).unwrap();
            let mut files = ["index.html", "x.css", "404.html"];
            if name == "b" {
                files.reverse();
            }
            for file in files {
                fs::write(directory.join(file), file).unwrap();
            }
            let output = temporary.0.join(name).join("x.kiln");
            built(&directory, &output, &|options| {
                options.latest_time = Some(1_000_000)
            })
            .unwrap();
            images.push(fs::read(output).unwrap());
        }
        assert!(images[0] == images[1]);
    }

    #[test]
    fn rewriting_keeps_the_rest_of_the_image() {
        let temporary = Temporary::new("rewriting");
        let (source, output) = (PathBuf::from("/bin/true"), temporary.0.join("x.kiln"));
        built(&source, &output, &|options| {
            options.rewrite_system_calls = true
        })
        .unwrap();
        let root = root_of(&output);
        let path = fs::canonicalize("/lib64/ld-linux-x86-64.so.2").unwrap();
        let loader = read(&root, path.to_str().unwrap());
        let original = fs::read(path).unwrap();
        assert!(loader.len() > original.len());
        assert_eq!(
            crate::elf::parse(&loader).unwrap().segments.len(),
            crate::elf::parse(&original).unwrap().segments.len() + 1
        );
    }

    #[test]
    fn nothing_is_left_behind_when_a_build_fails() {
        let temporary = Temporary::new("fails");
        let site = temporary.0.join("site");
        fs::create_dir_all(&site).unwrap();
        fs::write(site.join("index.html"), "x").unwrap();
        let output = temporary.0.join("x.kiln");
        let error = built(&site, &output, &|options| options.site_server = None).unwrap_err();
        assert!(error.to_string().contains("site server"));
        let error =
            built(&site, &output, &|options| options.name = Some("a b".into())).unwrap_err();
        assert!(error.to_string().starts_with("name `a b`:"));
        let error = built(&site, &output, &|options| options.guest.kernel = b"").unwrap_err();
        assert_eq!(error.to_string(), "the built-in kernel: is no ELF file");
        let error = built(&site, &temporary.0.join("no/x.kiln"), &|_| {}).unwrap_err();
        assert!(
            error.to_string().contains("there is no directory"),
            "{error}"
        );
        assert!(error.remedy().is_some());
        assert_eq!(fs::read_dir(&temporary.0).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_file_or_the_program_itself_is_not_replaced() {
        let temporary = Temporary::new("replaced");
        let program = temporary.0.join("program");
        fs::copy("/bin/true", &program).unwrap();
        let socket = temporary.0.join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let link = temporary.0.join("link");
        std::os::unix::fs::symlink(&program, &link).unwrap();
        for (output, word) in [
            (&program, "the program itself"),
            (&link, "the program itself"),
            (&socket, "no regular file"),
            (&temporary.0, "a directory"),
        ] {
            let error = built(&program, output, &|_| {}).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
            assert_eq!(error.kind(), crate::Kind::Input);
        }
        assert_eq!(fs::read(&program).unwrap(), fs::read("/bin/true").unwrap());
        assert_eq!(fs::read_dir(&temporary.0).unwrap().count(), 3);
        // An older image is what is meant to be replaced.
        let image = temporary.0.join("x.kiln");
        for _ in 0..2 {
            built(&program, &image, &|_| {}).unwrap();
        }
    }
}

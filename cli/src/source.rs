//! From what the user named to an open image: image files are opened, stored images found, everything else is built.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use kiln_image::builder::Step;
use kiln_image::{BuildOptions, Guest, Image, Include, Progress, Source, Store};
use kiln_monitor::arguments::format_memory;
use kiln_monitor::state::StateDirectory;

use crate::arguments::BuildArguments;
use crate::failure::{Failure, io};
use crate::text;

/// The image store of a state directory.
pub fn store(state: &StateDirectory) -> Result<Store, Failure> {
    Ok(Store::open(state.path().join("images"))?)
}

/// An open image and what to call it.
pub struct Resolved {
    /// The image.
    pub image: Image,
    /// Absolute path of its file.
    pub path: PathBuf,
}

/// Opens or builds what the user named.
pub fn resolve(
    state: &StateDirectory,
    source: &Path,
    include: &[String],
    rewrite: bool,
) -> Result<Resolved, Failure> {
    let exists = source.exists();
    if exists && Image::is_image(source) {
        if !include.is_empty() {
            return Err(Failure::input(
                format!(
                    "--include cannot change {}: it is an image already",
                    source.display()
                ),
                "give --include to the 'kiln build' that makes the image",
            ));
        }
        return open(source);
    }
    if !exists
        && let Some(name) = source.to_str()
        && !name.contains('/')
    {
        let stored = match store(state)?.resolve(name) {
            Ok(stored) => stored,
            Err(kiln_image::Error::NoImage { .. }) => {
                return Err(Failure::input(
                    format!("there is no file and no stored image named '{name}'"),
                    "give the path of a program, of a directory with kiln.toml or index.html, or of an image; 'kiln images' lists stored images",
                ));
            }
            Err(error) => return Err(error.into()),
        };
        return open(&stored.path);
    }
    let found = Source::detect(source)?;
    let (stored, built) = with_options(None, include, rewrite, |options| {
        let mut progress = Bar::new();
        Ok(store(state)?.build(&found, options, &mut progress)?)
    })?;
    notes(&built.notes);
    open(&stored.path)
}

fn open(path: &Path) -> Result<Resolved, Failure> {
    let image = Image::open(path)?;
    let path = std::path::absolute(path).map_err(io(&format!("use {}", path.display())))?;
    Ok(Resolved { image, path })
}

fn notes(notes: &[String]) {
    for note in notes {
        tell_line!("kiln: note: {note}");
    }
}

/// Calls `build` with what the command line says about building.
pub fn with_options<T>(
    name: Option<String>,
    include: &[String],
    rewrite: bool,
    build: impl FnOnce(&BuildOptions<'_>) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let mut options = BuildOptions::new(Guest {
        kernel: kiln_guest::KERNEL,
        vm_shim: kiln_guest::VM_SHIM,
    });
    options.name = name;
    options.include = include
        .iter()
        .map(|text| Include::parse(text))
        .collect::<Result<_, _>>()?;
    options.site_server = Some(kiln_guest::SITE_SERVER);
    options.rewrite_system_calls = rewrite;
    build(&options)
}

/// `kiln build`.
pub fn build_command(arguments: &BuildArguments) -> Result<ExitCode, Failure> {
    if Image::is_image(&arguments.source) {
        return Err(Failure::input(
            format!("{} is an image already", arguments.source.display()),
            format!("run it: kiln run {}", arguments.source.display()),
        ));
    }
    let source = Source::detect(&arguments.source)?;
    let name = arguments.name.clone();
    with_options(name, &arguments.include, !arguments.no_rewrite, |options| {
        let mut progress = Bar::new();
        let (built, shown) = match &arguments.output {
            Some(output) => {
                let built = kiln_image::build(&source, options, output, &mut progress)?;
                (built, output.display().to_string())
            }
            None => {
                let state = StateDirectory::from_environment()?;
                let (stored, built) = store(&state)?.build(&source, options, &mut progress)?;
                let shown = stored.names.first().cloned().unwrap_or(stored.digest);
                (built, shown)
            }
        };
        drop(progress);
        notes(&built.notes);
        let length = std::fs::metadata(&built.path)
            .map(|metadata| metadata.len())
            .unwrap_or(0);
        tell_line!(
            "kiln: built {} ({}, of which {} are the program's files)",
            built.manifest.name,
            format_memory(length),
            format_memory(built.root_length)
        );
        text::print(&format!("{shown}\n"))
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Progress of a build on a terminal, after it has taken a moment.
pub struct Bar {
    bar: ProgressBar,
}

impl Bar {
    /// Nothing is shown when standard error is no terminal.
    pub fn new() -> Self {
        let bar = if std::io::stderr().is_terminal() {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        Self { bar }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Progress for Bar {
    fn step(&mut self, step: Step, total: Option<u64>) {
        let message = match step {
            Step::Collecting => "collecting files",
            Step::Rewriting => "rewriting system calls",
            Step::Writing => "writing the image",
            _ => "building",
        };
        let template = if total.is_some() {
            "kiln: {msg} {wide_bar} {bytes}/{total_bytes}"
        } else {
            "kiln: {msg} {spinner}"
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        self.bar.set_position(0);
        match total {
            Some(total) => self.bar.set_length(total),
            None => self.bar.unset_length(),
        }
        self.bar.set_message(message);
        self.bar.tick();
    }

    fn advance(&mut self, bytes: u64) {
        self.bar.inc(bytes);
    }
}

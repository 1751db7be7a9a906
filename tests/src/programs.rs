//! The differential suite: the same program natively and as a unikernel must print the same and end the same way.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use crate::{Kiln, Outcome, RUN_DEADLINE, engines, run, workspace};

/// How a program is linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// With the system's shared libraries.
    Dynamic,
    /// In one piece at fixed addresses.
    Static,
    /// In one piece that can lie anywhere.
    StaticPie,
    /// With another C library, in one piece.
    Musl,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 4] = [Self::Dynamic, Self::Static, Self::StaticPie, Self::Musl];

    fn suffix(self) -> &'static str {
        match self {
            Self::Dynamic => "dynamic",
            Self::Static => "static",
            Self::StaticPie => "static-pie",
            Self::Musl => "musl",
        }
    }

    /// Whether programs of this kind are run on an engine. The two common kinds run on all; the others differ from
    /// them in what the kernel's loader does, which is the same on every engine.
    fn runs_on(self, engine: &str) -> bool {
        matches!(self, Self::Dynamic | Self::Static) || engine == "process"
    }
}

/// Names of the C programs, by their sources.
///
/// # Panics
///
/// When the folder cannot be read.
#[must_use]
pub fn names() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(sources())
        .expect("the folder of the programs")
        .filter_map(|entry| {
            Some(
                entry
                    .ok()?
                    .file_name()
                    .to_str()?
                    .strip_suffix(".c")?
                    .to_owned(),
            )
        })
        .collect();
    names.sort();
    names
}

fn sources() -> PathBuf {
    workspace().join("tests/programs")
}

/// Where the built C programs lie; builds what is not up to date.
///
/// # Panics
///
/// When they do not build.
pub fn built() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let test = std::env::current_exe().expect("a test has a path");
        let target = test
            .ancestors()
            .nth(3)
            .expect("a test lies in the target directory");
        let folder = target.join("programs");
        fs::create_dir_all(&folder).expect("a folder for the programs");
        // Tests may be processes of their own: one builds, the others wait.
        let lock = File::create(folder.join("lock")).expect("a lock");
        lock.lock().expect("a lock");
        let outcome = run(
            Command::new("make")
                .args(["--silent", "-j2", "-C"])
                .arg(sources())
                .arg(format!("OUT={}", folder.display()))
                .stdin(Stdio::null()),
            RUN_DEADLINE,
        );
        assert_eq!(outcome.code(), 0, "the programs do not build\n{outcome}");
        folder
    })
}

/// Path of a built C program; nothing for a kind that this machine cannot build.
#[must_use]
pub fn path(name: &str, kind: Kind) -> Option<PathBuf> {
    let path = built().join(format!("{name}-{}", kind.suffix()));
    path.exists().then_some(path)
}

/// Compiles a C program of a test's own, dynamically linked.
///
/// # Panics
///
/// When it does not compile.
#[must_use]
pub fn compile(folder: &Path, name: &str, source: &str) -> PathBuf {
    compile_with(folder, name, source, &["-O1", "-pthread"])
}

/// Compiles a C program of a test's own with these options for the compiler.
///
/// # Panics
///
/// When it does not compile.
#[must_use]
pub fn compile_with(folder: &Path, name: &str, source: &str, options: &[&str]) -> PathBuf {
    let text = folder.join(name).with_added_extension("c");
    let program = folder.join(name);
    fs::write(&text, source).expect("the source can be written");
    let outcome = run(
        Command::new("cc")
            .args(options)
            .arg("-o")
            .args([&program, &text]),
        RUN_DEADLINE,
    );
    assert_eq!(outcome.code(), 0, "{outcome}");
    program
}

/// Runs a C program of all kinds natively and on all engines, with arguments.
///
/// # Panics
///
/// When one run differs from the native one, after all have been made.
pub fn compare(name: &str, arguments: &[&str]) {
    compare_kinds(name, arguments, |_| true);
}

/// The same on one engine, for what another's processor cannot do.
///
/// # Panics
///
/// When one run differs from the native one, after all have been made.
pub fn compare_on(engine: &str, name: &str, arguments: &[&str]) {
    compare_kinds(name, arguments, |other| other == engine);
}

fn compare_kinds(name: &str, arguments: &[&str], on: impl Fn(&str) -> bool) {
    let mut differences = Vec::new();
    for kind in Kind::ALL {
        if let Some(program) = path(name, kind) {
            compare_program(
                &program,
                arguments,
                |engine| kind.runs_on(engine) && on(engine),
                &mut differences,
            );
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// Runs one program natively and on all engines.
///
/// # Panics
///
/// When one run differs from the native one, after all have been made.
pub fn compare_one(program: &Path, arguments: &[&str]) {
    let mut differences = Vec::new();
    compare_program(program, arguments, |_| true, &mut differences);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

fn compare_program(
    program: &Path,
    arguments: &[&str],
    runs_on: impl Fn(&str) -> bool,
    differences: &mut Vec<String>,
) {
    let native = run(
        Command::new(program)
            .args(arguments)
            // File systems differ in details, and the unikernel's is a tmpfs.
            .env("CHECK_DIRECTORY", "/dev/shm")
            .stdin(Stdio::null()),
        RUN_DEADLINE,
    );
    let name = program
        .file_name()
        .unwrap_or_default()
        .display()
        .to_string();
    if native.status.is_none() {
        differences.push(format!("{name}: hangs natively\n{native}"));
        return;
    }
    let kiln = Kiln::new();
    let image = kiln.build(program);
    for engine in engines().iter().filter(|engine| runs_on(engine)) {
        let mut words = vec![
            OsStr::new("run"),
            OsStr::new("--engine"),
            OsStr::new(engine),
            image.as_os_str(),
        ];
        if !arguments.is_empty() {
            words.push(OsStr::new("--"));
        }
        words.extend(arguments.iter().map(OsStr::new));
        let outcome = kiln.run(words);
        if let Some(difference) = difference(&native, &outcome) {
            differences.push(format!(
                "{name} {} on {engine}: {difference}",
                arguments.join(" ")
            ));
        }
    }
}

/// The first difference between two runs, with what led to it. Standard output is the program's alone.
fn difference(native: &Outcome, unikernel: &Outcome) -> Option<String> {
    let expected: Vec<&str> = native.output.lines().collect();
    let found: Vec<&str> = unikernel.output.lines().collect();
    let same = expected
        .iter()
        .zip(&found)
        .take_while(|(one, other)| one == other)
        .count();
    if same == expected.len() && same == found.len() && native.code() == unikernel.code() {
        return None;
    }
    let line = |lines: &[&str]| {
        lines
            .get(same)
            .map_or("(the end)".to_owned(), |line| (*line).to_owned())
    };
    let context = expected[same.saturating_sub(3)..same].join("\n  ");
    let errors: Vec<&str> = unikernel.errors.lines().collect();
    let errors = errors[errors.len().saturating_sub(15)..].join("\n  ");
    Some(format!(
        "line {} differs, exit code {} instead of {}\n  {context}\nLinux:\n  {}\nunikernel:\n  {}\nits standard error ends:\n  {errors}",
        same + 1,
        unikernel.code(),
        native.code(),
        line(&expected),
        line(&found),
    ))
}

//! What will not work, said before anything is started.
//!
//! Findings come from the files alone: kinds of ELF files, libraries that are nowhere, functions that programs
//! import and Kiln cannot offer (a unikernel has one process), and system call instructions of their own. The C
//! library contains nearly every system call there is; of it only what others import counts.
//!
//! A program that imports `fork` may live well without ever calling it, so such findings are warnings: only
//! what keeps a program from starting is an error.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    BuildOptions, Result, Source,
    code::Code,
    elf::{self, Elf},
    program,
    tree::Node,
};

/// How well the kernel knows a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// As Linux does.
    Full,
    /// With limits.
    Partial,
    /// Not at all: `ENOSYS`.
    Missing,
}

/// A system call as the kernel's support table has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its name.
    pub name: &'static str,
    /// How well the kernel knows it.
    pub support: Support,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The program will not start.
    Error,
    /// Something will not work if the program does it.
    Warning,
    /// Good to know.
    Note,
}

/// Something that will not work.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The file concerned: its path in the image, or on the host.
    pub subject: String,
    /// What is the matter.
    pub message: String,
    /// What to do.
    pub remedy: String,
}

/// Functions that need what a unikernel does not have: names in C libraries and in Go, what they do, what to do about it.
const FUNCTIONS: &[(&[&str], &str, &str)] = &[
    (
        &["fork", "vfork", "__libc_fork", "_Fork"],
        "makes processes",
        "have it run as one process (for example redis-server with `--save ''`, nginx with `daemon off; master_process off;`)",
    ),
    (
        &["daemon"],
        "puts itself into the background",
        "give it its option to stay in the foreground; `kiln run -d` does the rest",
    ),
    (
        &[
            "posix_spawn",
            "posix_spawnp",
            "system",
            "popen",
            "syscall.forkExec",
        ],
        "starts other programs",
        "switch off what needs them, or start them as unikernels of their own",
    ),
    (
        &[
            "execve",
            "execv",
            "execvp",
            "execvpe",
            "execl",
            "execle",
            "execlp",
            "fexecve",
            "execveat",
            "syscall.Exec",
        ],
        "replaces itself by another program",
        "make an image of that program instead",
    ),
    (
        &["ptrace", "process_vm_readv", "process_vm_writev"],
        "looks into other processes",
        "there are none in a unikernel; `kiln run --log syscall=trace` shows its system calls",
    ),
    (
        &["shmget", "shmat", "semget", "semop", "msgget"],
        "uses System V shared memory, semaphores or messages",
        "use threads, or files mapped into memory",
    ),
];

/// Calls that every C library tries and does well without.
const DISPENSABLE: [&str; 1] = ["rseq"];

/// Looks at a source as [`crate::build`] would pack it and says what will not work, the worst first.
///
/// `calls` is the kernel's support table: `None` for numbers that it does not know at all.
///
/// # Errors
///
/// The source is unusable as such: as for [`crate::build`], except that missing libraries are findings.
pub fn check(
    source: &Source,
    options: &BuildOptions<'_>,
    calls: &dyn Fn(u32) -> Option<Call>,
) -> Result<Vec<Finding>> {
    let packed = program::pack(source, options, source.default_name())?;
    let mut findings = Vec::new();
    for missing in &packed.missing {
        findings.push(Finding {
            severity: Severity::Error,
            subject: missing.needed_by.display().to_string(),
            message: format!(
                "needs {}, which is not in {}",
                missing.library,
                missing.searched.join(", ")
            ),
            remedy: format!(
                "install the package that has {0}, or add it with --include FILE:/usr/lib/{0}",
                missing.library
            ),
        });
    }
    for note in &packed.notes {
        findings.push(Finding {
            severity: Severity::Note,
            subject: packed.manifest.program.clone(),
            message: note.clone(),
            remedy: "nothing, unless the program uses it".into(),
        });
    }
    let program = packed.manifest.program.as_bytes();
    let program = packed
        .tree
        .real_path(program)
        .unwrap_or_else(|| program.to_vec());
    let program = String::from_utf8_lossy(&program).into_owned();
    let shown = match source {
        Source::Program { path } => path.display().to_string(),
        _ => packed.manifest.program.clone(),
    };
    let mut in_libraries: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    packed.tree.walk(&mut |path, node| {
        let Node::File { content, .. } = node else {
            return Ok(());
        };
        if content.length() < 64 || !content.start()?.starts_with(b"\x7fELF") {
            return Ok(());
        }
        let path = String::from_utf8_lossy(path).into_owned();
        let bytes = content.read()?;
        match elf::parse(&bytes) {
            Ok(elf) => {
                let libraries = (path != program).then_some(&mut in_libraries);
                let path = if path == program { shown.clone() } else { path };
                check_file(&path, libraries, &bytes, &elf, calls, &mut findings);
            }
            Err(reason) => findings.push(Finding {
                severity: Severity::Warning,
                subject: path,
                message: reason,
                remedy: "leave it out, or build it for x86-64 Linux".into(),
            }),
        }
        Ok(())
    })?;
    if !in_libraries.is_empty() {
        let list: Vec<String> = in_libraries
            .iter()
            .map(|(name, libraries)| format!("{name} ({})", libraries.join(", ")))
            .collect();
        findings.push(Finding {
            severity: Severity::Note,
            subject: shown,
            message: format!("its libraries can also call {}", list.join(", ")),
            remedy: "nothing, unless the program asks them to: a unikernel has one process".into(),
        });
    }
    findings.sort();
    findings.dedup();
    Ok(findings)
}

fn check_file(
    path: &str,
    mut in_libraries: Option<&mut BTreeMap<&'static str, Vec<String>>>,
    bytes: &[u8],
    elf: &Elf,
    calls: &dyn Fn(u32) -> Option<Call>,
    findings: &mut Vec<Finding>,
) {
    let mut add = |severity, message: String, remedy: &str| {
        findings.push(Finding {
            severity,
            subject: path.into(),
            message,
            remedy: remedy.into(),
        });
    };
    if elf
        .segments
        .iter()
        .any(|segment| segment.is_executable() && segment.is_writable())
    {
        add(
            Severity::Error,
            "has a segment that is both writable and executable".into(),
            "link it without -z execstack, -N or -omagic; memory is never both here",
        );
    }
    if elf.text_relocations {
        add(
            Severity::Error,
            "changes its own instructions while it is loaded (text relocations)".into(),
            "compile all of it with -fPIC (or -fPIE)",
        );
    }
    if elf.executable_stack {
        add(
            Severity::Warning,
            "asks for an executable stack, and gets one that is not".into(),
            "link it with -z noexecstack; only nested functions of C really need it",
        );
    }
    if is_c_library(elf) {
        return;
    }
    let severity = if in_libraries.is_none() {
        Severity::Warning
    } else {
        Severity::Note
    };
    let is_static = elf.interpreter.is_none() && elf.needed.is_empty();
    let mut has: BTreeSet<&[u8]> = elf.imports.iter().map(String::as_bytes).collect();
    if is_static {
        // Linkers take from libraries only what somebody calls.
        has.extend(
            elf.functions
                .iter()
                .map(|function| function.name.as_bytes()),
        );
    }
    has.extend(go_functions(bytes, elf));
    for (functions, what, remedy) in FUNCTIONS {
        let used: Vec<&str> = functions
            .iter()
            .copied()
            .filter(|name| has.contains(name.as_bytes()))
            .collect();
        match &mut in_libraries {
            // A program most likely has it for itself, a library for some of those who use it.
            None if !used.is_empty() => {
                add(severity, format!("{what} ({})", used.join(", ")), remedy);
            }
            None => {}
            Some(libraries) => {
                let name = path.rsplit('/').next().unwrap_or(path);
                for function in used {
                    libraries.entry(function).or_default().push(name.into());
                }
            }
        }
    }
    let mut lacking: BTreeMap<u32, (String, String)> = BTreeMap::new();
    for site in Code::new(bytes, elf).sites() {
        let Some(number) = site.number else { continue };
        let name = match calls(number) {
            Some(Call {
                support: Support::Missing,
                name,
            }) => name.to_string(),
            Some(_) => continue,
            None => format!("number {number}"),
        };
        if DISPENSABLE.contains(&name.as_str()) {
            continue;
        }
        lacking
            .entry(number)
            .or_insert_with(|| (name, place(elf, site.address)));
    }
    if lacking.is_empty() {
        return;
    }
    let remedy = "such a call fails with ENOSYS, and most programs then do without; the instance's log says when it happens";
    if is_static {
        let names: Vec<String> = lacking.into_values().map(|(name, _)| name).collect();
        add(
            Severity::Note,
            format!(
                "contains system calls that the kernel does not have ({}); it is static, so they may be its C library's",
                names.join(", ")
            ),
            remedy,
        );
        return;
    }
    for (name, place) in lacking.into_values() {
        add(
            severity,
            format!("makes the system call {name}, which the kernel does not have ({place})"),
            remedy,
        );
    }
}

/// Words of Go's table of functions, their names among them (`runtime/symtab.go`: the names end with a zero byte each). What the
/// linker found nobody to call is not there.
fn go_functions<'a>(bytes: &'a [u8], elf: &Elf) -> impl Iterator<Item = &'a [u8]> {
    elf.go_functions
        .and_then(|(offset, length)| {
            let start = usize::try_from(offset).ok()?;
            let end = start.checked_add(usize::try_from(length).ok()?)?;
            bytes.get(start..end)
        })
        .unwrap_or_default()
        .split(|byte| *byte == 0)
        .filter(|word| word.len() > 3)
}

/// An address as a human wants it.
fn place(elf: &Elf, address: u64) -> String {
    elf.functions
        .iter()
        .rev()
        .find(|function| function.address <= address)
        .filter(|function| address - function.address < function.length.max(1))
        .map_or_else(
            || format!("at {address:#x}"),
            |function| format!("in {}", function.name),
        )
}

/// The C library and its loader have every system call inside, whoever uses them.
fn is_c_library(elf: &Elf) -> bool {
    let names = [
        "libc.so.6",
        "libpthread.so.0",
        "ld-linux-x86-64.so.2",
        "libc.so",
        "ld-musl-x86_64.so.1",
    ];
    elf.soname
        .as_deref()
        .is_some_and(|name| names.contains(&name))
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
        process::Command,
    };

    use super::*;
    use crate::{Guest, code::Site};

    struct Temporary(PathBuf);

    impl Temporary {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("kiln-check-{name}-{}", std::process::id()));
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

    fn compile(temporary: &Temporary, text: &str, arguments: &[&str]) -> Option<PathBuf> {
        let (source, target) = (temporary.0.join("a.c"), temporary.0.join("a"));
        fs::write(&source, text).unwrap();
        let done = Command::new("cc")
            .arg("-o")
            .args([&target, &source])
            .args(arguments)
            .output()
            .ok()?;
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        Some(target)
    }

    fn table(number: u32) -> Option<Call> {
        match number {
            39 => Some(Call {
                name: "getpid",
                support: Support::Full,
            }),
            101 => Some(Call {
                name: "ptrace",
                support: Support::Missing,
            }),
            0..400 => Some(Call {
                name: "other",
                support: Support::Full,
            }),
            _ => None,
        }
    }

    fn findings(path: &Path) -> Vec<Finding> {
        let options = BuildOptions::new(Guest {
            kernel: b"",
            vm_shim: b"",
        });
        check(&Source::detect(path).unwrap(), &options, &table).unwrap()
    }

    const PROGRAM: &str = r#"
#include <unistd.h>
#include <stdlib.h>
static long call(long number) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number) : "rcx", "r11", "memory");
    return result;
}
__attribute__((noinline)) long known(void) { return call(39); }
__attribute__((noinline)) long lacking(void) { return call(101); }
__attribute__((noinline)) long reading(void) { return call(0); }
__attribute__((noinline)) long strange(void) { return call(4242); }
__attribute__((noinline)) long any(long number) { return call(number); }
int main(int count, char **words) {
    if (count == 100) { fork(); system(words[0]); }
    return known() + lacking() + reading() + strange() + any(count) == 1;
}
"#;

    #[test]
    fn system_call_instructions_and_their_numbers_are_found() {
        let temporary = Temporary::new("sites");
        let Some(path) = compile(&temporary, PROGRAM, &["-O2", "-s"]) else {
            return;
        };
        let bytes = fs::read(path).unwrap();
        let elf = elf::parse(&bytes).unwrap();
        let sites: Vec<Site> = Code::new(&bytes, &elf).sites();
        let mut numbers: Vec<Option<u32>> = sites.iter().map(|site| site.number).collect();
        numbers.sort();
        assert_eq!(numbers, [None, Some(0), Some(39), Some(101), Some(4242)]);
    }

    #[test]
    fn findings_name_the_call_the_place_and_the_remedy() {
        let temporary = Temporary::new("findings");
        let Some(path) = compile(&temporary, PROGRAM, &["-O2"]) else {
            return;
        };
        let found = findings(&path);
        let has = |severity, text: &str| {
            found.iter().any(|finding| {
                finding.severity == severity
                    && finding.message.contains(text)
                    && !finding.remedy.is_empty()
            })
        };
        assert!(
            has(Severity::Warning, "makes processes (fork)"),
            "{found:?}"
        );
        assert!(has(Severity::Warning, "starts other programs (system)"));
        assert!(has(
            Severity::Warning,
            "system call ptrace, which the kernel does not have (in lacking)"
        ));
        assert!(has(Severity::Warning, "number 4242"));
        assert!(!found.iter().any(
            |finding| finding.message.contains("getpid") || finding.subject.contains("libc.so")
        ));
        assert!(
            found
                .iter()
                .all(|finding| finding.severity != Severity::Error)
        );
    }

    #[test]
    fn functions_linked_into_a_static_program_are_found() {
        let temporary = Temporary::new("static");
        let Some(path) = compile(&temporary, PROGRAM, &["-O2", "-static"]) else {
            return;
        };
        let has = |path: &Path, text: &str| {
            findings(path)
                .iter()
                .any(|finding| finding.message.contains(text))
        };
        assert!(has(&path, "makes processes"));
        assert!(has(&path, "starts other programs"));
        let harmless = "int main(void) { return 0; }";
        let Some(path) = compile(&temporary, harmless, &["-static"]) else {
            return;
        };
        assert_eq!(findings(&path), []);
    }

    #[test]
    fn functions_of_a_stripped_go_program_are_found() {
        let temporary = Temporary::new("go");
        // A section as Go's linker makes it, in a program without symbols.
        let text = r#"
            __attribute__((section(".gopclntab"), used))
            static const char names[] = "\361\377\377\377\0\0runtime.main\0syscall.forkExec\0os.Getpid";
            int main(void) { return 0; }
        "#;
        let Some(path) = compile(&temporary, text, &["-s"]) else {
            return;
        };
        let found = findings(&path);
        assert!(
            found
                .iter()
                .any(|finding| finding.message == "starts other programs (syscall.forkExec)"),
            "{found:?}"
        );
    }

    #[test]
    fn what_keeps_a_program_from_starting_is_an_error() {
        let temporary = Temporary::new("errors");
        let arguments = ["-Wl,-N", "-static", "-nostdlib"];
        let text = "int value = 1; void _start(void) { for (;;) value++; }";
        let Some(path) = compile(&temporary, text, &arguments) else {
            return;
        };
        let found = findings(&path);
        let worst = found.first().unwrap();
        assert_eq!(worst.severity, Severity::Error);
        assert!(worst.message.contains("both writable and executable"));
    }
}

//! Builds the freestanding programs (kernel, shims) and the site server with a nested cargo: they need other code
//! generation options than the rest, which a workspace cannot say for single packages.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A program to build.
struct Program {
    package: &'static str,
    /// Folder in the workspace.
    folder: &'static str,
    profile: &'static str,
    features: &'static [&'static str],
    rustflags: &'static [&'static str],
    /// Folder of the nested target directory: one for each set of flags.
    target: &'static str,
}

const FREESTANDING: &[&str] = &[
    "-Cforce-frame-pointers=yes",
    "-Cforce-unwind-tables=no",
    "-Crelocation-model=pic",
    // The profile's size optimization calls even functions that are smaller than their call. Under QEMU's translation each
    // call ends a block, so a kernel that starts is a tenth slower for 2 % of its size.
    "-Cllvm-args=-inline-threshold=50",
];
const SITE_SERVER: &[&str] = &[
    "-Ctarget-feature=+crt-static",
    // Kiln asks for FSGSBASE, and no processor has that without what x86-64-v2 names. So the server need not ask the
    // processor what it can do, which traps in virtual machines.
    "-Ctarget-cpu=x86-64-v2",
];

const PROGRAMS: &[Program] = &[
    Program {
        package: "kiln-kernel",
        folder: "kernel",
        profile: "freestanding",
        features: &["freestanding"],
        rustflags: FREESTANDING,
        target: "kernel",
    },
    Program {
        package: "kiln-shim-process",
        folder: "shim/process",
        profile: "freestanding",
        features: &["freestanding"],
        rustflags: FREESTANDING,
        target: "kernel",
    },
    Program {
        package: "kiln-shim-vm",
        folder: "shim/vm",
        profile: "freestanding",
        features: &["freestanding"],
        rustflags: FREESTANDING,
        target: "kernel",
    },
    Program {
        package: "kiln-site-server",
        folder: "apps/site-server",
        profile: "site-server",
        features: &[],
        rustflags: SITE_SERVER,
        target: "static",
    },
];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let guest =
        PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let workspace = guest.parent().expect("guest is a folder of the workspace");
    // One nested target directory for all profiles of the outer build: <target>/guest.
    let target = out
        .ancestors()
        .find(|folder| folder.join("CACHEDIR.TAG").exists())
        .map_or_else(|| out.join("guest"), |folder| folder.join("guest"));
    println!("cargo::rerun-if-changed=build.rs");
    for folder in ["abi", "tcpip", "Cargo.lock", "Cargo.toml"] {
        println!(
            "cargo::rerun-if-changed={}",
            workspace.join(folder).display()
        );
    }
    for program in PROGRAMS {
        for part in ["src", "Cargo.toml", "build.rs", "shim.ld"] {
            let path = workspace.join(program.folder).join(part);
            if path.exists() {
                println!("cargo::rerun-if-changed={}", path.display());
            }
        }
        let built = build(program, workspace, &target.join(program.target));
        let copy = out.join(program.package);
        fs::copy(&built, &copy).unwrap_or_else(|error| {
            panic!(
                "{}: cannot be copied to {}: {error}",
                built.display(),
                copy.display()
            )
        });
        if program.profile == "freestanding" {
            shorten(&copy, program.package == "kiln-kernel");
        }
    }
}

/// Takes the symbols out of a freestanding program, which every image carries. The kernel keeps the names of its functions
/// for backtraces, in a table of its own at the end of the file, which is a third as long as ELF's
/// (`kernel/src/boot/symbols.rs` reads it).
fn shorten(program: &Path, keep_functions: bool) {
    let table = keep_functions.then(|| functions(program));
    let strip = env::var_os("STRIP").unwrap_or_else(|| "strip".into());
    let status = Command::new(&strip)
        .arg("--strip-all")
        .arg(program)
        .status();
    assert!(
        status.as_ref().is_ok_and(|status| status.success()),
        "{strip:?} (of the C compiler's binutils) cannot shorten {}: {status:?}",
        program.display()
    );
    if let Some(table) = table {
        let mut bytes = fs::read(program).expect("the program was just written");
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes.extend_from_slice(&table);
        fs::write(program, bytes).expect("the program can be written again");
    }
}

/// Pairs of `u32` (address, offset of the name) in order of addresses; the names, each ended by a zero byte; then the
/// count of pairs, the length of the names (`u32` both) and `KilnSyms`.
fn functions(program: &Path) -> Vec<u8> {
    let bytes = fs::read(program).expect("the program was just written");
    let file = elf::ElfBytes::<elf::endian::LittleEndian>::minimal_parse(&bytes)
        .expect("the linker writes good ELF");
    let (symbols, strings) = file
        .symbol_table()
        .expect("the linker writes good symbols")
        .expect("the kernel is linked with symbols");
    let mut functions: Vec<(u32, String)> = symbols
        .iter()
        .filter(|symbol| symbol.st_symtype() == elf::abi::STT_FUNC && symbol.st_value != 0)
        .filter_map(|symbol| {
            let name = strings.get(symbol.st_name as usize).ok()?;
            let name = short(&format!("{:#}", rustc_demangle::demangle(name)));
            Some((u32::try_from(symbol.st_value).ok()?, name))
        })
        .collect();
    functions.sort();
    functions.dedup_by_key(|function| function.0);
    let mut pairs = Vec::new();
    let mut names = Vec::new();
    let mut known = std::collections::HashMap::new();
    for (address, name) in &functions {
        let offset = *known.entry(name.clone()).or_insert_with(|| {
            let offset = names.len() as u32;
            names.extend_from_slice(name.as_bytes());
            names.push(0);
            offset
        });
        pairs.extend_from_slice(&address.to_le_bytes());
        pairs.extend_from_slice(&offset.to_le_bytes());
    }
    let lengths = [functions.len() as u32, names.len() as u32];
    pairs.extend_from_slice(&names);
    lengths
        .iter()
        .for_each(|length| pairs.extend_from_slice(&length.to_le_bytes()));
    pairs.extend_from_slice(b"KilnSyms");
    pairs
}

/// A function's name with the last two parts of its path, the last one of those in angle brackets, and not too long:
/// `<Stack as Network>::poll` for `<kiln_kernel::net::Stack as kiln_kernel::net::backend::Network>::poll`.
fn short(name: &str) -> String {
    const LONGEST: usize = 60;
    if name.starts_with("core::ptr::drop_in_place") {
        return "drop_in_place".into();
    }
    let mut result = String::new();
    let mut word = String::new();
    let mut depth = 0;
    for character in name.chars().chain([' ']) {
        if character.is_alphanumeric() || character == '_' || character == ':' {
            word.push(character);
            continue;
        }
        let parts: Vec<&str> = word.split("::").collect();
        let kept = if depth == 0 { 2 } else { 1 };
        result.push_str(&parts[parts.len().saturating_sub(kept)..].join("::"));
        word.clear();
        match character {
            '<' => depth += 1,
            '>' if !result.ends_with('-') => depth -= 1,
            _ => {}
        }
        result.push(character);
    }
    result.trim_end().chars().take(LONGEST).collect()
}

fn build(program: &Program, workspace: &Path, target: &Path) -> PathBuf {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(workspace)
        .args([
            "build",
            "--package",
            program.package,
            "--bin",
            program.package,
            "--profile",
            program.profile,
        ])
        .arg("--target-dir")
        .arg(target)
        .env("CARGO_ENCODED_RUSTFLAGS", program.rustflags.join("\x1f"))
        .env_remove("RUSTFLAGS")
        // Wrappers such as clippy's are for the outer build.
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER");
    if !program.features.is_empty() {
        command.args(["--features", &program.features.join(",")]);
    }
    for (name, _) in env::vars_os() {
        // What the outer cargo says to this script is not meant for the nested one.
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO_FEATURE_")
            || name.starts_with("CARGO_CFG_")
            || name.starts_with("CARGO_PKG_")
        {
            command.env_remove(name);
        }
    }
    let status = command
        .status()
        .unwrap_or_else(|error| panic!("cargo cannot be run: {error}"));
    assert!(
        status.success(),
        "{} did not build; the messages above say why",
        program.package
    );
    target.join(program.profile).join(program.package)
}

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

const FREESTANDING: &[&str] = &["-Cforce-frame-pointers=yes", "-Crelocation-model=pic"];
const SITE_SERVER: &[&str] = &["-Ctarget-feature=+crt-static"];

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
    let guest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let workspace = guest.parent().expect("guest is a folder of the workspace");
    // One nested target directory for all profiles of the outer build: <target>/guest.
    let target = out
        .ancestors()
        .find(|folder| folder.join("CACHEDIR.TAG").exists())
        .map_or_else(|| out.join("guest"), |folder| folder.join("guest"));
    println!("cargo::rerun-if-changed=build.rs");
    for folder in ["abi", "tcpip", "Cargo.lock", "Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", workspace.join(folder).display());
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
        fs::copy(&built, &copy)
            .unwrap_or_else(|error| panic!("{}: cannot be copied to {}: {error}", built.display(), copy.display()));
    }
}

fn build(program: &Program, workspace: &Path, target: &Path) -> PathBuf {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(workspace)
        .args(["build", "--package", program.package, "--bin", program.package, "--profile", program.profile])
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
        if name.starts_with("CARGO_FEATURE_") || name.starts_with("CARGO_CFG_") || name.starts_with("CARGO_PKG_") {
            command.env_remove(name);
        }
    }
    let status = command.status().unwrap_or_else(|error| panic!("cargo cannot be run: {error}"));
    assert!(status.success(), "{} did not build; the messages above say why", program.package);
    target.join(program.profile).join(program.package)
}

//! Builds the vDSO with the C compiler, and says how the freestanding kernel is linked.

use std::{env, path::PathBuf, process::Command};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=vdso");
    println!("cargo::rerun-if-changed=no-unwinding.ld");
    build_vdso();
    if env::var_os("CARGO_FEATURE_FREESTANDING").is_none() {
        return;
    }
    for argument in [
        "-nostdlib",
        "-nostartfiles",
        "-static-pie",
        "-Wl,-z,noexecstack",
        "-Wl,-z,separate-code",
        "-Wl,-z,relro,-z,now",
        // Relative relocations take two bits each instead of 24 bytes.
        "-Wl,-z,pack-relative-relocs",
        "-Wl,--no-dynamic-linker",
        "-Wl,--build-id=none",
        "-Wl,--hash-style=gnu",
        "-Wl,--no-eh-frame-hdr",
        // An addition to the linker's own script.
        concat!("-Wl,-T,", env!("CARGO_MANIFEST_DIR"), "/no-unwinding.ld"),
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}

/// `vdso/vdso.S` as a shared object in the output folder, for `src/boot/vdso.rs` to include.
fn build_vdso() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("vdso.so");
    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let status = Command::new(&compiler)
        .args([
            "-shared",
            "-nostdlib",
            "-fPIC",
            "-Wl,-T,vdso/vdso.ld",
            "-Wl,--eh-frame-hdr",
            "-Wl,-soname,linux-vdso.so.1",
        ])
        .args([
            "-Wl,--hash-style=both",
            "-Wl,--build-id=none",
            "-Wl,-Bsymbolic",
            "-s",
        ])
        .args(["vdso/vdso.S", "-o"])
        .arg(&out)
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{compiler:?} could not build vdso/vdso.S: {status}"),
        Err(error) => panic!(
            "a C compiler is needed to build the vDSO, but {compiler:?} cannot be run: {error}"
        ),
    }
}

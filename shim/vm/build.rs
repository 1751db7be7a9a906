//! Says how the freestanding programs are linked: with no start files and no libraries; the shim at fixed addresses, by the
//! linker script beside this file; the kernel that tests it like the real one, position-independent.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=shim.ld");
    if std::env::var_os("CARGO_FEATURE_TEST_KERNEL").is_some() {
        for argument in [
            "-nostdlib",
            "-nostartfiles",
            "-static-pie",
            "-Wl,--no-dynamic-linker",
            "-Wl,-z,noexecstack",
        ] {
            println!("cargo:rustc-link-arg-bin=kiln-shim-vm-test-kernel={argument}");
        }
    }
    if std::env::var_os("CARGO_FEATURE_FREESTANDING").is_none() {
        return;
    }
    let directory = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let script = format!("-Wl,-T,{directory}/shim.ld");
    for argument in [
        "-nostdlib",
        "-nostartfiles",
        "-static",
        "-no-pie",
        &script,
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-z,noexecstack",
        "-Wl,--no-dynamic-linker",
        "-Wl,--no-eh-frame-hdr",
    ] {
        println!("cargo:rustc-link-arg-bin=kiln-shim-vm={argument}");
    }
}

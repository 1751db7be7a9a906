//! Link arguments of the freestanding programs.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_FREESTANDING").is_none() {
        return;
    }
    for argument in [
        "-nostdlib",
        "-nostartfiles",
        "-static-pie",
        "-Wl,-z,noexecstack",
        "-Wl,-z,separate-code",
        "-Wl,-z,relro,-z,now",
        "-Wl,--no-dynamic-linker",
        "-Wl,--build-id=none",
        "-Wl,--hash-style=gnu",
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}

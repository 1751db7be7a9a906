//! `cargo +nightly fuzz run loader_cache --features libfuzzer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kiln_fuzz::program::loader_cache(bytes));

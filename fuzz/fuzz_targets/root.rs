//! `cargo +nightly fuzz run root --features libfuzzer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kiln_fuzz::program::root(bytes));

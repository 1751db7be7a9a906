//! `cargo +nightly fuzz run image --features libfuzzer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kiln_fuzz::program::image(bytes));

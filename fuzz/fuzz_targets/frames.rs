//! `cargo +nightly fuzz run frames --features libfuzzer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kiln_fuzz::network::frames(bytes));

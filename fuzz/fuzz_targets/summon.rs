//! `cargo +nightly fuzz run summon --features libfuzzer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kiln_fuzz::summon::summon(bytes));

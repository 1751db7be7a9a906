//! `cargo +nightly fuzz run link --features libfuzzer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kiln_fuzz::network::link(bytes));

//! `cargo +nightly fuzz run elf --features libfuzzer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kiln_fuzz::program::elf(bytes));

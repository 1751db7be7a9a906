//! `cargo +nightly fuzz run front --features libfuzzer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kiln_fuzz::front::front(bytes));

//! `cargo +nightly fuzz run name_server --features libfuzzer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kiln_fuzz::name_server::name_server(bytes));

//! The differential suite: see `kiln_tests::programs`.

use std::{path::Path, process::Command};

use kiln_tests::{RUN_DEADLINE, programs, run, workspace};

macro_rules! programs {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                programs::compare(stringify!($name), &[]);
            }
        )*

        /// Adding a program means adding its name here.
        #[test]
        fn every_program_is_compared() {
            let mut named = vec!["endings", "floating_point", $(stringify!($name)),*];
            named.sort_unstable();
            assert_eq!(programs::names(), named);
        }
    };
}

programs! {
    attributes directories epolls errors faults files futexes memory pipes process registers signals
    socket_options tcp threads timers udp unix_sockets
}

macro_rules! endings {
    ($($test:ident $how:literal)*) => {
        $(
            #[test]
            fn $test() {
                programs::compare("endings", &[$how]);
            }
        )*
    };
}

endings! {
    ends_by_return "return"
    ends_by_exit "exit"
    ends_immediately "immediately"
    ends_with_a_large_code "large-code"
    ends_by_another_thread "thread"
    ends_while_others_run "others-run"
    ends_after_its_main_thread "main-thread-first"
    ends_by_abort "abort"
    ends_by_a_fault "fault"
    ends_by_an_invalid_instruction "invalid"
    ends_by_sigterm "terminate"
    ends_by_sigkill "kill"
}

#[test]
fn x87_exceptions() {
    programs::compare("floating_point", &["x87"]);
}

/// QEMU's translator, in place of a processor, does not raise them.
#[test]
fn sse_exceptions() {
    programs::compare_on("process", "floating_point", &["sse"]);
}

#[test]
fn rust_standard_library() {
    programs::compare_one(Path::new(env!("CARGO_BIN_EXE_standard")), &[]);
}

#[test]
fn rust_standard_library_static() {
    let program = programs::built().join("standard-static");
    let outcome = run(
        Command::new("rustc")
            .args([
                "--edition",
                "2024",
                "-O",
                "-C",
                "target-feature=+crt-static",
                "-o",
            ])
            .arg(&program)
            .arg(workspace().join("tests/programs/rust/standard.rs")),
        RUN_DEADLINE,
    );
    assert_eq!(outcome.code(), 0, "{outcome}");
    programs::compare_one(&program, &[]);
}

#[test]
fn rust_tokio() {
    programs::compare_one(Path::new(env!("CARGO_BIN_EXE_asynchronous")), &[]);
}

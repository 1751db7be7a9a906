//! The `kiln` command: what users type, turned into calls of `kiln-image` and `kiln-monitor`, and their answers turned into
//! words, tables or JSON.
//!
//! What always holds: standard output carries what was asked for and nothing else; everything Kiln says about it goes to
//! standard error. Exit codes: that of the program for `run`; 2 when what the user asked for cannot be right; 1 when it is
//! right but failed here and now.

#![forbid(unsafe_code)]
#![deny(clippy::print_stderr, clippy::print_stdout)]

/// As `eprint!`, but a standard error that takes nothing (a terminal that was closed, a full disk) is no reason to panic: what
/// runs has to be ended in order all the same.
macro_rules! tell {
    ($($words:tt)+) => {{
        let _ = std::io::Write::write_fmt(&mut std::io::stderr().lock(), format_args!($($words)+));
    }};
}

/// As [`tell`], with the end of a line.
macro_rules! tell_line {
    ($($words:tt)+) => { tell!("{}\n", format_args!($($words)+)) };
}

mod arguments;
mod check;
mod failure;
mod images;
mod instances;
mod run;
mod source;
mod summon;
mod text;
mod volumes;

use std::process::ExitCode;

use clap::Parser;

use arguments::{Arguments, Command};
use failure::Failure;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match execute(arguments.command) {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

fn execute(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Build(arguments) => source::build_command(&arguments),
        Command::Ps(arguments) => instances::ps(&arguments),
        Command::Logs(arguments) => instances::logs(&arguments),
        Command::Stop(arguments) => instances::stop(&arguments),
        Command::Kill(arguments) => instances::kill(&arguments),
        Command::Rm(arguments) => instances::rm(&arguments),
        Command::Images(arguments) => images::images(&arguments),
        Command::Rmi(arguments) => images::rmi(&arguments),
        Command::Inspect(arguments) => images::inspect(&arguments),
        Command::Check(arguments) => check::check(&arguments),
        Command::Volume(arguments) => volumes::volume(&arguments),
        Command::Version(arguments) => images::version(&arguments),
        Command::Summon(arguments) => summon::summon(arguments.as_ref()),
        Command::Monitor(arguments) => run::monitor(&arguments),
    }
}

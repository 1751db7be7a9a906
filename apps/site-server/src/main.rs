//! `kiln-site-server`: serves a directory of static files over HTTP/1.1.
//!
//! It is an ordinary Linux program with nothing of Kiln in it; `kiln run DIRECTORY` packs it beside the
//! directory. One thread serves all connections; files are read where they are needed, so a small
//! site stays in the page cache (or, in a unikernel, is memory already).
//!
//! It is not for what changes between requests (no CGI, no uploads, no directory listings), and it does not speak
//! TLS or HTTP/2: a proxy in front does.
//!
//! Always: no byte from outside the root is served, whatever path or symbolic link asks for it.

#![forbid(unsafe_code)]

mod body;
mod condition;
mod encoding;
mod find;
mod log;
mod options;
mod range;
mod respond;
mod server;

use std::process::ExitCode;

use options::{Command, HELP};

fn main() -> ExitCode {
    let options = match options::parse(std::env::args_os()) {
        Ok(Command::Serve(options)) => options,
        Ok(Command::Help) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Ok(Command::Version) => {
            println!("kiln-site-server {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("kiln-site-server: {error}; see --help");
            return ExitCode::from(2);
        }
    };
    match server::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kiln-site-server: {error}");
            ExitCode::FAILURE
        }
    }
}

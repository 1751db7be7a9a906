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

#![deny(unsafe_code)]
#![cfg_attr(all(target_env = "gnu", not(test)), no_main)]

mod body;
mod clock;
mod condition;
mod connection;
mod encoding;
mod find;
mod log;
mod options;
mod range;
mod respond;
mod server;

use options::{Command, HELP};

/// Where the C library starts a program.
///
/// Rust's own start before `main` is left out: it prepares a message for stack overflows, for which it reads and parses
/// /proc/self/maps, installs handlers and maps a stack. That is half of the time until this server listens. The other thing it
/// does that matters here, ignoring SIGPIPE, `server::run` does. With glibc the arguments are known before `main`.
#[cfg(all(target_env = "gnu", not(test)))]
#[allow(unsafe_code, reason = "the name is C's, and nothing else here has it")]
#[unsafe(no_mangle)]
extern "C" fn main() -> std::ffi::c_int {
    start()
}

#[cfg(not(all(target_env = "gnu", not(test))))]
#[cfg_attr(test, allow(dead_code, reason = "the tests have a start of their own"))]
fn main() {
    std::process::exit(start());
}

/// Does what the command line says; the answer is the exit code.
fn start() -> i32 {
    let options = match options::parse(std::env::args_os()) {
        Ok(Command::Serve(options)) => options,
        Ok(Command::Help) => {
            print!("{HELP}");
            return 0;
        }
        Ok(Command::Version) => {
            println!("kiln-site-server {}", env!("CARGO_PKG_VERSION"));
            return 0;
        }
        Err(error) => {
            eprintln!("kiln-site-server: {error}; see --help");
            return 2;
        }
    };
    match server::run(&options) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("kiln-site-server: {error}");
            1
        }
    }
}

//! Engine process: from starting `kiln run` to the first HTTP byte.

use std::process::Command;

use kiln_tests::{Kiln, free_port};

use crate::{
    sample::Sample,
    server::{self, FRONT_PAGE, Server},
};

/// Starts the native server and the unikernel in turn, and prints both medians and what the specification asks.
pub fn measure(rounds: u32) {
    let kiln = Kiln::new();
    let image = server::site_image(&kiln);
    let native = server::native_site_server(kiln.folder());
    let (mut own, mut other, mut failures) = (Sample::default(), Sample::default(), 0);
    for _ in 0..rounds {
        let port = free_port();
        let mut command = Command::new(&native);
        command
            .arg("--root")
            .arg(server::site())
            .arg(format!("--listen=127.0.0.1:{port}"));
        match Server::start(&mut command, port).first_byte(FRONT_PAGE) {
            Some(time) => other.push(time.as_secs_f64() * 1e3),
            None => panic!("the native server does not answer"),
        }
        let port = free_port();
        let mut command = server::unikernel(&kiln, "process", &[], port, 80, &image);
        match Server::start(&mut command, port).first_byte(FRONT_PAGE) {
            Some(time) => own.push(time.as_secs_f64() * 1e3),
            None => failures += 1,
        }
    }
    println!(
        "native site server to its first byte:  {}",
        other.describe("ms")
    );
    println!(
        "kiln run to the first byte:            {}",
        own.describe("ms")
    );
    println!("failures:                              {failures} of {rounds}");
    println!(
        "ratio:                                 {:.2}",
        own.median() / other.median()
    );
    println!(
        "allowed (3 x native + 10 ms):          {:.1} ms",
        3.0 * other.median() + 10.0
    );
}

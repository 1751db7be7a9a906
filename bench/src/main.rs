//! Measurements, each a named command that prints ratios taken in one run: ours and the other in turn, medians.
//!
//! They use the command line and real clients, as the end-to-end tests do, and keep their traffic on the loopback interface.
//! SPECIFICATION.md says what the numbers are to be.

#![forbid(unsafe_code)]

mod boot;
mod dns;
mod idle;
mod memory;
mod profile;
mod sample;
mod server;
mod size;
mod start;
mod summon;
mod throughput;

use std::process::ExitCode;

const HELP: &str = "\
Usage: bench/measure NAME

  start [ROUNDS]    engine process: from `kiln run` to the first HTTP byte, against the native server   [200]
  boot [ROUNDS]     engine qemu (TCG): to the first HTTP byte, against a kernel that prints one byte    [21]
  redis [ROUNDS]    redis-benchmark, engine process, --net socket and direct, against native            [3]
  nginx [ROUNDS]    wrk, engine process, --net socket and direct, against native                        [3]
  profile [SECONDS] where redis and nginx spend their time; stacks for flame graphs in target/profiles      [5]
  dns [ROUNDS]      dnsperf, the summoner's name server with 1,000 warm names, against dnsmasq          [5]
  summon [ROUNDS]   kiln summon: cold, suspended and warm visits, held connections, 1,000 cold names    [30]
  idle [SECONDS]    CPU time of an idle site, both engines                                              [60]
  size              kernel, shim, and the site's image
  memory            least memory with which site, nginx and redis answer, both engines
";

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let name = words.next().unwrap_or_default();
    let count = match words.next().map(|word| word.parse::<u32>()) {
        None => None,
        Some(Ok(count @ 1..)) => Some(count),
        Some(_) => {
            eprintln!("the second word is a number of at least 1\n{HELP}");
            return ExitCode::from(2);
        }
    };
    match name.as_str() {
        // The measurement's own other half; the number is a port.
        "name-server" => {
            let port = count.and_then(|port| u16::try_from(port).ok());
            return dns::serve(port.unwrap_or_default());
        }
        "start" => start::measure(count.unwrap_or(200)),
        "boot" => boot::measure(count.unwrap_or(21)),
        "redis" => throughput::redis(count.unwrap_or(3)),
        "nginx" => throughput::nginx(count.unwrap_or(3)),
        "profile" => profile::measure(
            count.unwrap_or(5),
            &kiln_tests::workspace().join("target/profiles"),
        ),
        "dns" => dns::measure(count.unwrap_or(5)),
        "summon" => summon::measure(count.unwrap_or(30)),
        "idle" => idle::measure(count.unwrap_or(60)),
        "size" => size::measure(),
        "memory" => memory::measure(),
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

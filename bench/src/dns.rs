//! Warm answers of the summoner's name server, against dnsmasq with the same names.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use kiln_summon::dns::{Asked, Configuration, Forward, Name, Unit, Zone};
use kiln_tests::{free_port, need, run};

use crate::{
    sample::Sample,
    server::{PATIENCE, Server},
};

/// Names in the zone.
const NAMES: u32 = 1000;
/// Length of one run, seconds.
const SECONDS: &str = "4";
/// A client's run may take that long.
const LIMIT: Duration = Duration::from_secs(60);

fn name(number: u32) -> String {
    format!("unit{number}.example.org")
}

fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(127, 88, 0, 1).to_bits() + number)
}

/// Compares the two in turn.
pub fn measure(rounds: u32) {
    need("dnsperf");
    need("dnsmasq");
    let folder = tempfile::tempdir().expect("a folder");
    let file = |file_name: &str, line: &dyn Fn(u32) -> String| {
        let path = folder.path().join(file_name);
        fs::write(&path, (0..NAMES).map(line).collect::<String>()).expect("a file");
        path
    };
    let queries = file("queries", &|number| format!("{} A\n", name(number)));
    let hosts = file("hosts", &|number| {
        format!("{} {}\n", address(number), name(number))
    });
    let (mut ours, mut theirs, mut ratios) =
        (Sample::default(), Sample::default(), Sample::default());
    let mut memory = [Sample::default(), Sample::default()];
    for _ in 0..rounds {
        let port = free_port();
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["name-server", &port.to_string()]);
        let here = rate(&mut command, port, &queries, &mut memory[0]);
        ours.push(here);

        let port = free_port();
        let mut command = Command::new("/usr/sbin/dnsmasq");
        command
            .args([
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--pid-file=",
            ])
            .args(["--no-resolv", "--no-hosts", "--local-ttl=60", "--user=root"])
            .args(["--bind-interfaces", "--listen-address=127.0.0.1"])
            .arg(format!("--port={port}"))
            .arg(format!("--addn-hosts={}", hosts.display()));
        let there = rate(&mut command, port, &queries, &mut memory[1]);
        theirs.push(there);
        ratios.push(here / there);
    }
    println!("kiln     {}", ours.describe("answers a second"));
    println!("dnsmasq  {}", theirs.describe("answers a second"));
    println!("ratio    {:.2}", ratios.median());
    println!(
        "resident {:.0} KiB, dnsmasq {:.0} KiB, after {NAMES} names were asked",
        memory[0].median(),
        memory[1].median()
    );
}

/// Answers a second of a name server.
fn rate(command: &mut Command, port: u16, queries: &Path, memory: &mut Sample) -> f64 {
    let server = Server::start(command, port);
    wait_for(port);
    let outcome = run(
        Command::new("dnsperf")
            .args(["-s", "127.0.0.1", "-p", &port.to_string()])
            .args(["-l", SECONDS, "-c", "4", "-q", "100", "-d"])
            .arg(queries),
        LIMIT,
    );
    memory.push(resident(server.id()));
    let field = |name: &str| {
        outcome.output.lines().find_map(|line| {
            let value = line.trim().strip_prefix(name)?.trim_start_matches(':');
            value.split_whitespace().next()?.parse::<f64>().ok()
        })
    };
    let codes = outcome
        .output
        .lines()
        .find(|line| line.trim().starts_with("Response codes"))
        .unwrap_or_default();
    assert!(
        codes.contains("NOERROR") && !codes.contains(','),
        "wrong answers\n{}",
        outcome.output
    );
    field("Queries per second").unwrap_or(0.0)
}

/// Until something answers there.
fn wait_for(port: u16) {
    let start = Instant::now();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket
        .connect((Ipv4Addr::LOCALHOST, port))
        .and_then(|()| socket.set_read_timeout(Some(Duration::from_millis(50))))
        .expect("an address");
    let query = b"\0\x01\x01\0\0\x01\0\0\0\0\0\0\x05unit0\x07example\x03org\0\0\x01\0\x01";
    while start.elapsed() < PATIENCE {
        if socket.send(query).is_ok() && socket.recv(&mut [0; 512]).is_ok() {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
    panic!("the name server on port {port} does not answer");
}

/// Resident memory of a process, KiB.
fn resident(id: u32) -> f64 {
    fs::read_to_string(PathBuf::from(format!("/proc/{id}/status")))
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse().ok())
        .unwrap_or(f64::NAN)
}

/// A unit that always runs.
struct Warm;

impl Unit for Warm {
    fn asked(&self) -> Asked {
        Asked::Answer
    }
}

/// Is the name server that is measured: what `kiln summon` has in front, with units that are there.
pub fn serve(port: u16) -> ExitCode {
    let unit: Arc<dyn Unit> = Arc::new(Warm);
    let mut zone = Zone::builder();
    for number in 0..NAMES {
        let entry = Name {
            unit: Arc::clone(&unit),
            addresses: vec![IpAddr::V4(address(number))],
            ttl: 60,
        };
        zone.name(&name(number), entry).expect("a name");
    }
    let configuration = Configuration {
        listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, port))],
        forward: Forward::Refuse,
        ..Configuration::default()
    };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let served = runtime.block_on(async {
        let server = kiln_summon::dns::Server::bind(configuration, zone.build()).await?;
        server.run().await
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

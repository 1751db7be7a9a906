//! `kiln summon`: what a visitor waits for, cold, suspended and warm; what a held connection costs; what idle names cost.
//!
//! The visitor is this process: a DNS query over UDP, a connection to the address in the answer, a request. Real clients add
//! their own start on both sides of each ratio.

use std::{
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    path::Path,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use kiln_tests::{Kiln, eventually, free_port, wait};

use crate::{
    sample::Sample,
    server::{self, FRONT_PAGE, PATIENCE, Server},
};

/// Size of the file that is downloaded, in bytes.
const DOWNLOAD: u64 = 256 << 20;
/// Units that nobody asks for.
const COLD_NAMES: usize = 1000;
/// How long they are watched.
const IDLE: Duration = Duration::from_secs(20);

/// A summoner at work.
struct Summoner<'a> {
    kiln: &'a Kiln,
    process: Child,
    dns: u16,
}

impl<'a> Summoner<'a> {
    fn start(kiln: &'a Kiln, configuration: &str) -> Self {
        let dns = free_port();
        let path = kiln.folder().join("summon.toml");
        fs::write(&path, configuration).expect("the configuration can be written");
        let process = kiln
            .command(["summon", "--forward", "none", "--log-level", "error"])
            .arg(format!("--listen=127.0.0.1:{dns}"))
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("kiln can be started");
        let summoner = Self { kiln, process, dns };
        eventually("the summoner answers", || {
            let outcome = summoner.kiln.run(["summon", "ps"]);
            (outcome.code() == 0).then_some(())
        });
        summoner
    }

    /// Waits until a unit's state is told as `wanted`.
    fn settle(&self, unit: &str, wanted: &str) {
        eventually("the unit's state", || {
            let table = self.kiln.succeed(["summon", "ps"]);
            let row = table.lines().find(|line| line.starts_with(unit))?;
            row.split_whitespace()
                .any(|word| word == wanted)
                .then_some(())
        });
    }

    /// Asks for a name's address, as a stub resolver does (RFC 1035).
    fn look_up(&self, name: &str) -> Ipv4Addr {
        let mut query = vec![0x4b, 0x4c, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            query.push(label.len() as u8);
            query.extend_from_slice(label.as_bytes());
        }
        query.extend_from_slice(&[0, 0, 1, 0, 1]);
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a UDP socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut answer = [0; 512];
        socket
            .send_to(&query, (Ipv4Addr::LOCALHOST, self.dns))
            .expect("a query can be sent");
        let length = socket.recv(&mut answer).expect("an answer comes");
        let octets: [u8; 4] = answer[length - 4..length].try_into().expect("an address");
        Ipv4Addr::from(octets)
    }

    /// What a visitor waits for: name, connection, first byte.
    fn visit(&self, name: &str, port: u16) -> f64 {
        let begin = Instant::now();
        let address = self.look_up(name);
        first_byte((address, port).into());
        begin.elapsed().as_secs_f64() * 1e3
    }
}

impl Drop for Summoner<'_> {
    fn drop(&mut self) {
        let _ = self.kiln.run(["summon", "down"]);
        if wait(&mut self.process, PATIENCE).is_none() {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

fn first_byte(address: SocketAddr) {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.write_all(FRONT_PAGE).expect("a request");
    stream.read_exact(&mut [0]).expect("an answer");
}

/// Prints all.
pub fn measure(rounds: u32) {
    let kiln = Kiln::new();
    let image = server::site_image(&kiln);
    cold(&kiln, &image, rounds);
    suspended(&kiln, &image, rounds);
    held(&kiln, rounds.clamp(1, 5));
    idle(&kiln, &image);
}

fn unit(image: &Path, more: &str) -> String {
    format!(
        "ttl = 60\n[unit.www]\ndns = \"www.example.org\"\nsource = {:?}\nports = \"8080:80\"\nengine = \"process\"\n{more}\n",
        image.display().to_string()
    )
}

fn cold(kiln: &Kiln, image: &Path, rounds: u32) {
    let (mut own, mut other) = (Sample::default(), Sample::default());
    let summoner = Summoner::start(kiln, &unit(image, ""));
    for _ in 0..rounds {
        let port = free_port();
        let mut command = server::unikernel(kiln, "process", &[], port, 80, image);
        let time = Server::start(&mut command, port).first_byte(FRONT_PAGE);
        other.push(time.expect("kiln run answers").as_secs_f64() * 1e3);
        own.push(summoner.visit("www.example.org", 8080));
        kiln.succeed(["summon", "stop", "www"]);
        summoner.settle("www", "stopped");
    }
    println!(
        "kiln run to the first byte:            {}",
        other.describe("ms")
    );
    println!(
        "query to the first byte, cold:         {}",
        own.describe("ms")
    );
    println!(
        "ratio:                                 {:.2} (allowed: 2)",
        own.median() / other.median()
    );
}

fn suspended(kiln: &Kiln, image: &Path, rounds: u32) {
    let (mut own, mut other) = (Sample::default(), Sample::default());
    // The warm unit is visited as rarely as the other: what both touch has been left alone for as long.
    let mut configuration = unit(image, "stop = \"suspend\"\nidle = \"100ms\"");
    let _ = write!(
        configuration,
        "[unit.warm]\ndns = \"warm.example.org\"\nsource = {:?}\nports = \"8080:80\"\nengine = \"process\"\n",
        image.display().to_string()
    );
    let summoner = Summoner::start(kiln, &configuration);
    summoner.visit("www.example.org", 8080);
    summoner.visit("warm.example.org", 8080);
    for _ in 0..rounds {
        summoner.settle("www", "suspended");
        own.push(summoner.visit("www.example.org", 8080));
        other.push(summoner.visit("warm.example.org", 8080));
    }
    println!(
        "query to the first byte, warm:         {}",
        other.describe("ms")
    );
    println!(
        "query to the first byte, suspended:    {}",
        own.describe("ms")
    );
    println!(
        "ratio:                                 {:.2} (allowed: 3)",
        own.median() / other.median()
    );
}

/// Seconds for a download.
fn download(address: SocketAddr) -> f64 {
    let begin = Instant::now();
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
        .write_all(b"GET /big HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .expect("a request");
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer).expect("the file comes") {
            0 => break,
            length => total += length as u64,
        }
    }
    assert!(total > DOWNLOAD, "only {total} bytes of the file came");
    begin.elapsed().as_secs_f64()
}

fn held(kiln: &Kiln, rounds: u32) {
    let site = kiln.folder().join("big-site");
    fs::create_dir_all(&site).expect("a folder");
    fs::write(site.join("index.html"), "big").expect("a page");
    let file = fs::File::create(site.join("big")).expect("a file");
    file.set_len(DOWNLOAD).expect("a large file");
    let image = kiln.build(&site);
    let (mut own, mut other) = (Sample::default(), Sample::default());
    let summoner = Summoner::start(kiln, &unit(&image, ""));
    let address = summoner.look_up("www.example.org");
    let port = free_port();
    let mut command = server::unikernel(kiln, "process", &[], port, 80, &image);
    let mut plain = Server::start(&mut command, port);
    plain.first_byte(FRONT_PAGE).expect("kiln run answers");
    let gigabytes = DOWNLOAD as f64 / 1e9;
    for _ in 0..rounds {
        own.push(gigabytes / download((address, 8080).into()));
        other.push(gigabytes / download((Ipv4Addr::LOCALHOST, port).into()));
    }
    println!(
        "download from kiln run -p:             {}",
        other.describe("GB/s")
    );
    println!(
        "download from a summoned unit:         {}",
        own.describe("GB/s")
    );
    println!(
        "ratio:                                 {:.2}",
        own.median() / other.median()
    );
}

/// CPU seconds and resident bytes of a process.
fn used(id: u32) -> (f64, u64) {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    let fields: Vec<u64> = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest)
        .unwrap_or_default()
        .split(' ')
        .map(|field| field.parse().unwrap_or(0))
        .collect();
    let field = |index: usize| fields.get(index).copied().unwrap_or(0);
    ((field(11) + field(12)) as f64 / 100.0, field(21) * 4096)
}

fn idle(kiln: &Kiln, image: &Path) {
    let mut configuration = String::new();
    for number in 0..COLD_NAMES {
        let _ = write!(
            configuration,
            "[unit.u{number}]\ndns = \"u{number}.example.org\"\nsource = {:?}\nports = \"8080:80\"\n",
            image.display().to_string()
        );
    }
    let begin = Instant::now();
    let summoner = Summoner::start(kiln, &configuration);
    let started = begin.elapsed();
    let (before, _) = used(summoner.process.id());
    thread::sleep(IDLE);
    let (after, memory) = used(summoner.process.id());
    println!(
        "{COLD_NAMES} cold names: up after {:.1} s; {:.2} s of CPU in {} s, {:.1} MiB resident (allowed: 30)",
        started.as_secs_f64(),
        after - before,
        IDLE.as_secs(),
        memory as f64 / f64::from(1 << 20)
    );
}

//! `tests/soak SECONDS`: queries, connects and kills at random, and says what was lost.
//!
//! Clients ask for names and pages; meanwhile monitors of units and the summoner itself are killed (SIGKILL), units are
//! stopped by hand and the configuration is read again. A request may only fail if the instance that served it was killed
//! while it was under way, or, for what needs the summoner, while there was none. Ends with 1 if any other was lost,
//! or if anything is left in the end.

use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream, UdpSocket},
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use kiln_tests::{
    free_port,
    summon::{Summoner, question},
};

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(60);
const CLIENTS: u64 = 8;
/// The monitor of a unit is not killed again so soon.
const REST: Duration = Duration::from_secs(8);
/// Stop mode, idle time, answer.
const UNITS: &[(&str, &str, &str)] = &[
    ("shutdown", "100ms", "at-once"),
    ("shutdown", "1s", "ready"),
    ("destroy", "100ms", "ready"),
    ("destroy", "500ms", "at-once"),
    ("suspend", "100ms", "at-once"),
    ("suspend", "300ms", "ready"),
];

/// A time in which requests may fail: of one unit, or all.
struct Disturbance {
    unit: Option<usize>,
    end: Option<Instant>,
}

#[derive(Default)]
struct Shared {
    disturbances: Mutex<Vec<Disturbance>>,
    lost: Mutex<Vec<String>>,
    good: AtomicU64,
    excused: AtomicU64,
    over: AtomicBool,
}

impl Shared {
    fn disturb(&self, unit: Option<usize>) -> usize {
        let mut all = self.lock();
        all.push(Disturbance { unit, end: None });
        all.len() - 1
    }

    fn calm(&self, place: usize) {
        if let Some(one) = self.lock().get_mut(place) {
            one.end = Some(Instant::now());
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Disturbance>> {
        self.disturbances
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn disturbed(&self, unit: usize, begin: Instant) -> bool {
        self.lock().iter().any(|one| {
            one.unit.is_none_or(|other| other == unit) && one.end.is_none_or(|end| end >= begin)
        })
    }
}

/// Numbers that look random, the same for the same seed (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % limit
    }
}

fn query(port: u16, unit: usize, number: u16) -> Result<(), String> {
    let failed = |what: &str| format!("query: {what}");
    let socket = UdpSocket::bind("127.0.0.1:0").map_err(|error| failed(&error.to_string()))?;
    let talk = || -> std::io::Result<[u8; 4]> {
        socket.connect(("127.0.0.1", port))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send(&question(number, &format!("u{unit}.example.org")))?;
        let mut answer = [0; 600];
        loop {
            match socket.recv(&mut answer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                outcome => {
                    outcome?;
                    break;
                }
            }
        }
        Ok([answer[0], answer[1], answer[3], answer[7]])
    };
    let answer = talk().map_err(|error| failed(&error.to_string()))?;
    if answer[..2] != number.to_be_bytes() || answer[2] & 15 != 0 || answer[3] != 1 {
        return Err(failed(&format!("answered with code {}", answer[2] & 15)));
    }
    Ok(())
}

fn page(address: Ipv4Addr, port: u16, path: &str, end: &str) -> Result<(), String> {
    let talk = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect((address, port))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: kiln\r\n\r\n").as_bytes())?;
        let mut text = String::new();
        let mut buffer = [0; 4096];
        while !text.ends_with(end) {
            match stream.read(&mut buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(0) => break,
                Ok(length) => {
                    text.push_str(&String::from_utf8_lossy(
                        buffer.get(..length).unwrap_or(&[]),
                    ));
                }
            }
        }
        Ok(text)
    };
    match talk() {
        Ok(text) if text.starts_with("HTTP/1.1 200 ") && text.ends_with(end) => Ok(()),
        Ok(text) => Err(format!("{path}: cut after {} bytes", text.len())),
        Err(error) => Err(format!("{path}: {error}")),
    }
}

fn client(shared: &Shared, dns: u16, addresses: &[Ipv4Addr], port: u16, seed: u64) {
    let mut random = Random(seed * 7919 + 1);
    while !shared.over.load(Ordering::Relaxed) {
        let unit = usize::try_from(random.below(addresses.len() as u64)).unwrap_or(0);
        let Some(address) = addresses.get(unit).copied() else {
            continue;
        };
        let begin = Instant::now();
        let outcome = match random.below(10) {
            0..4 => query(dns, unit, random.below(65536) as u16),
            4..9 => page(address, port, "/", "\n"),
            _ => page(address, port, "/slow/20", "line 19\n"),
        };
        match outcome {
            Ok(()) => shared.good.fetch_add(1, Ordering::Relaxed),
            Err(_) if shared.disturbed(unit, begin) => {
                shared.excused.fetch_add(1, Ordering::Relaxed)
            }
            Err(error) => {
                let now = std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)
                    .unwrap_or_default();
                let line = format!(
                    "u{unit} after {:?}: {error}, at {:.3}",
                    begin.elapsed(),
                    now.as_secs_f64()
                );
                eprintln!("lost: {line}");
                shared
                    .lost
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(line);
                0
            }
        };
        thread::sleep(Duration::from_millis(random.below(300)));
    }
}

fn kill(process: u32) {
    if let Some(process) = i32::try_from(process)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
    {
        // It may have ended by itself a moment ago.
        let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
    }
}

fn main() -> ExitCode {
    let Some(seconds) = std::env::args().nth(1).and_then(|text| text.parse().ok()) else {
        eprintln!("usage: tests/soak SECONDS [SEED]");
        return ExitCode::from(2);
    };
    let seed = std::env::args()
        .nth(2)
        .and_then(|text| text.parse().ok())
        .unwrap_or(1);
    let port = free_port();
    let text: String = UNITS
        .iter()
        .enumerate()
        .map(|(number, (stop, idle, answer))| {
            format!(
                "[unit.u{number}]\ndns = [\"u{number}.example.org\"]\nsource = \"{{program}}\"\narguments = [\"listen=8000\"]\n\
                 ports = [\"{port}:8000\"]\nmemory = \"32M\"\nstop = \"{stop}\"\nidle = \"{idle}\"\nanswer = \"{answer}\"\n"
            )
        })
        .collect();
    let mut summoner = Summoner::with(&text);
    let addresses: Vec<Ipv4Addr> = (0..UNITS.len())
        .map(|number| summoner.known_address(&format!("u{number}")))
        .collect();
    let shared = Arc::new(Shared::default());
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (shared, addresses, dns) = (Arc::clone(&shared), addresses.clone(), summoner.port);
            thread::spawn(move || client(&shared, dns, &addresses, port, seed + number))
        })
        .collect();
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut random = Random(seed + 1000);
    let mut killed = [None::<Instant>; UNITS.len()];
    let mut done: HashMap<&str, u64> = HashMap::new();
    while Instant::now() < end {
        thread::sleep(Duration::from_millis(200 + random.below(2000)));
        let unit = usize::try_from(random.below(UNITS.len() as u64)).unwrap_or(0);
        let name = format!("u{unit}");
        let what = match random.below(10) {
            // A unit that crashes time and again, each time soon after its start, is let rest: that is not looked for here.
            0..5 if killed[unit].is_some_and(|at| at.elapsed() < REST) => continue,
            0..5 => {
                killed[unit] = Some(Instant::now());
                let inspected = summoner.kiln.run(["inspect", &name]);
                if let Some(monitor) = summoner.monitor_in(&inspected.output) {
                    let place = shared.disturb(Some(unit));
                    kill(monitor);
                    // What was accepted shortly before is lost with it.
                    thread::sleep(Duration::from_millis(100));
                    shared.calm(place);
                }
                "monitors killed"
            }
            5..7 => {
                let place = shared.disturb(Some(unit));
                summoner.say(&["stop", &name]);
                thread::sleep(Duration::from_millis(500));
                shared.calm(place);
                "units stopped by hand"
            }
            7 => {
                let place = shared.disturb(None);
                summoner.kill();
                summoner.start(&["--forward", "none"]);
                shared.calm(place);
                "summoners killed"
            }
            _ => {
                summoner.say(&["reload"]);
                "reloads"
            }
        };
        *done.entry(what).or_default() += 1;
    }
    shared.over.store(true, Ordering::Relaxed);
    for client in clients {
        let _ = client.join();
    }
    summoner.down();
    for (what, number) in done {
        println!("{number} {what}");
    }
    let lost = shared
        .lost
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .len();
    println!(
        "{} requests answered, {} cut by a kill, {lost} lost",
        shared.good.load(Ordering::Relaxed),
        shared.excused.load(Ordering::Relaxed),
    );
    if lost > 0 {
        eprintln!("{}", summoner.log());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

//! A summoner under test: its configuration, its name server asked with dig, its units.
//!
//! Every summoner has a state, a port and a range of loopback addresses of its own. It runs in the foreground as a child of
//! the test, so that it can be killed without looking for it, and it ends with its units when the test does, also when
//! the test fails.

use std::{
    fs::{self, File},
    hash::{BuildHasher as _, RandomState},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::{
    Kiln, Outcome, RUN_DEADLINE, eventually, free_port, need, programs, run, wait, workspace,
};

/// A program for units, told what to do by words like `listen=8000`:
///
/// * `listen=PORT`: an HTTP server. `/slow/N` is answered with N lines, one every 50 ms; all else with a line that counts
///   the requests since its start.
/// * `udp=PORT`: what comes is sent back.
/// * `after=MILLISECONDS`: a pause before it listens.
/// * `line=TEXT`: prints it when it listens.
/// * `healthy=MILLISECONDS`: `/health` is answered with 503 for so long, and then with 200.
/// * `end=CODE`: ends instead.
pub const PROGRAM: &str = r##"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <netinet/in.h>
#include <sys/socket.h>

static long started, healthy;
static int requests;

static long milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int bound(int type, int port) {
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
    int one = 1, fd = socket(AF_INET, type, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address)) { perror("bind"); exit(1); }
    return fd;
}

static void *serve(void *argument) {
    int fd = (int)(long)argument;
    char in[4096], out[4096];
    size_t have = 0;
    for (;;) {
        ssize_t got = read(fd, in + have, sizeof in - 1 - have);
        if (got <= 0) break;
        have += got;
        in[have] = 0;
        if (!strstr(in, "\r\n\r\n")) { if (have == sizeof in - 1) break; continue; }
        int number;
        if (sscanf(in, "GET /slow/%d ", &number) == 1) {
            const char *head = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
            if (write(fd, head, strlen(head)) < 0) break;
            for (int i = 0; i < number; i++) {
                usleep(50000);
                if (dprintf(fd, "line %d\n", i) < 0) break;
            }
            break;
        }
        int well = strncmp(in, "GET /health ", 12) || milliseconds() - started >= healthy;
        int length = sprintf(out + 2048, "request %d\n", __sync_add_and_fetch(&requests, 1));
        int head = sprintf(out, "HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n", well ? "200 OK" : "503 Wait", length);
        memmove(out + head, out + 2048, length);
        if (write(fd, out, head + length) < 0) break;
        have = 0;
    }
    close(fd);
    return NULL;
}

int main(int argc, char **argv) {
    int tcp = 0, udp = 0, after = 0;
    const char *line = NULL;
    started = milliseconds();
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int i = 1; i < argc; i++) {
        sscanf(argv[i], "listen=%d", &tcp);
        sscanf(argv[i], "udp=%d", &udp);
        sscanf(argv[i], "after=%d", &after);
        sscanf(argv[i], "healthy=%ld", &healthy);
        if (!strncmp(argv[i], "line=", 5)) line = argv[i] + 5;
        if (!strncmp(argv[i], "end=", 4)) { puts("the clay is too wet"); return atoi(argv[i] + 4); }
    }
    puts("warming up");
    if (after) usleep(after * 1000);
    if (udp) {
        int fd = bound(SOCK_DGRAM, udp);
        if (line) puts(line);
        for (;;) {
            struct sockaddr_storage peer;
            socklen_t size = sizeof peer;
            char data[2048];
            ssize_t got = recvfrom(fd, data, sizeof data, 0, (struct sockaddr *)&peer, &size);
            if (got >= 0) sendto(fd, data, got, 0, (struct sockaddr *)&peer, size);
        }
    }
    if (!tcp) for (;;) pause();
    int fd = bound(SOCK_STREAM, tcp);
    if (listen(fd, 1024)) { perror("listen"); return 1; }
    if (line) puts(line);
    for (;;) {
        int one = accept(fd, NULL, NULL);
        pthread_t thread;
        if (one < 0) continue;
        if (pthread_create(&thread, NULL, serve, (void *)(long)one)) close(one);
        else pthread_detach(thread);
    }
}
"##;

/// A summoner, and what it is to summon.
pub struct Summoner {
    /// The command, with the summoner's state.
    pub kiln: Kiln,
    /// The port of its name server.
    pub port: u16,
    /// The addresses of its units: 254 of them.
    pub pool: String,
    child: Option<Child>,
}

impl Default for Summoner {
    fn default() -> Self {
        Self::new()
    }
}

impl Summoner {
    /// One that does not run yet.
    #[must_use]
    pub fn new() -> Self {
        // Loopback addresses that no other test is likely to have, and nobody else.
        let random = RandomState::new().hash_one(std::process::id());
        let (second, third) = (100 + random % 100, random / 100 % 256);
        Self {
            kiln: Kiln::new(),
            port: free_port(),
            pool: format!("127.{second}.{third}.0/24"),
            child: None,
        }
    }

    /// Where its configuration lies.
    #[must_use]
    pub fn configuration(&self) -> PathBuf {
        self.kiln.folder().join("summon.toml")
    }

    /// Writes its configuration. `{site}` stands for the example site, `{program}` for [`PROGRAM`], `{folder}` for the
    /// test's folder.
    ///
    /// # Panics
    ///
    /// When that is not possible.
    pub fn configure(&self, text: &str) {
        let folder = self.kiln.folder();
        let mut text = text
            .replace(
                "{site}",
                workspace().join("examples/site").to_str().expect("text"),
            )
            .replace("{folder}", folder.to_str().expect("text"));
        if text.contains("{program}") {
            let program = self.program();
            text = text.replace("{program}", program.to_str().expect("text"));
        }
        // Never half of it: the summoner may read at any time.
        let new = folder.join("summon.toml.new");
        fs::write(&new, text).expect("the configuration");
        fs::rename(new, self.configuration()).expect("the configuration");
    }

    /// [`PROGRAM`], compiled.
    #[must_use]
    pub fn program(&self) -> PathBuf {
        let path = self.kiln.folder().join("unit");
        if path.exists() {
            return path;
        }
        programs::compile(self.kiln.folder(), "unit", PROGRAM)
    }

    /// One that summons what the text says.
    #[must_use]
    pub fn with(text: &str) -> Self {
        let mut summoner = Self::new();
        summoner.configure(text);
        summoner.start(&["--forward", "none"]);
        summoner
    }

    /// Starts it, and waits until it works.
    ///
    /// # Panics
    ///
    /// When it does not begin to work.
    pub fn start(&mut self, words: &[&str]) {
        assert!(self.child.is_none(), "it runs already");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("its log");
        let before = self.log().matches("name server at").count();
        let mut command = self.command();
        command.args(words).stdout(Stdio::null()).stderr(log);
        let mut child = command.spawn().expect("it can be started");
        eventually("the summoner", || {
            assert!(
                child.try_wait().expect("a child").is_none(),
                "the summoner ended\n{}",
                self.log()
            );
            (self.log().matches("name server at").count() > before).then_some(())
        });
        self.child = Some(child);
    }

    /// `kiln summon CONFIGURATION` with its own port and pool.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = self.kiln.command(["summon"]);
        command
            .arg(self.configuration())
            .args(["--listen", &format!("127.0.0.1:{}", self.port)])
            .args(["--pool", &self.pool, "--log-level", "debug"]);
        command
    }

    fn log_path(&self) -> PathBuf {
        self.kiln.folder().join("summoner.log")
    }

    /// What it has logged so far, in all its lives.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Its process.
    ///
    /// # Panics
    ///
    /// When it does not run.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// kill -9.
    ///
    /// # Panics
    ///
    /// When it does not run.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("a child can be killed");
        child.wait().expect("a child that was killed ends");
    }

    /// `kiln summon` with words, which must succeed.
    pub fn say(&self, words: &[&str]) -> String {
        self.kiln.succeed(["summon"].iter().chain(words))
    }

    /// It is ending: waits for that.
    ///
    /// # Panics
    ///
    /// When it does not end well.
    pub fn ended(&mut self) {
        let mut child = self.child.take().expect("it runs");
        let status = wait(&mut child, RUN_DEADLINE);
        if status.is_none() {
            let _ = child.kill();
            let _ = child.wait();
        }
        assert!(
            status.is_some_and(|status| status.success()),
            "the summoner ended with {status:?}\n{}",
            self.log()
        );
    }

    /// `kiln summon down`. Nothing of it may be left: no process, no instance, no socket.
    ///
    /// # Panics
    ///
    /// When anything is left.
    pub fn down(&mut self) {
        let monitors = self.processes();
        self.say(&["down"]);
        self.ended();
        self.no_instance_is_left();
        eventually("the end of the monitors", || {
            monitors
                .iter()
                .all(|process| !Path::new(&format!("/proc/{process}/exe")).exists())
                .then_some(())
        });
        assert!(!self.kiln.state().join("summon/control").exists());
    }

    /// Waits until the last folder of an instance is removed, which a monitor does when the instance is gone already.
    ///
    /// # Panics
    ///
    /// When one stays.
    pub fn no_instance_is_left(&self) {
        eventually("the removal of all instances", || {
            self.instances().is_empty().then_some(())
        });
    }

    /// The folders of instances.
    #[must_use]
    pub fn instances(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.kiln.state().join("instances"))
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// The processes whose environment names this state, but for the summoner and what the test itself runs.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let mark = format!("KILN_STATE={}", self.kiln.state().display());
        let own = self.child.as_ref().map(Child::id);
        fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|process| Some(*process) != own)
            .filter(|process| {
                fs::read(format!("/proc/{process}/environ")).is_ok_and(|environment| {
                    environment
                        .split(|byte| *byte == 0)
                        .any(|entry| entry == mark.as_bytes())
                })
            })
            .collect()
    }

    /// `kiln summon ps --json`.
    ///
    /// # Panics
    ///
    /// When that is not JSON.
    #[must_use]
    pub fn ps(&self) -> Vec<Value> {
        let text = self.say(&["ps", "--json"]);
        match serde_json::from_str(&text) {
            Ok(Value::Array(units)) => units,
            other => panic!("{other:?}: {text}"),
        }
    }

    /// What `kiln summon ps --json` says of a unit.
    ///
    /// # Panics
    ///
    /// When there is none of that name.
    #[must_use]
    pub fn unit(&self, name: &str) -> Value {
        self.ps()
            .into_iter()
            .find(|unit| unit["name"] == name)
            .unwrap_or_else(|| panic!("no unit {name}"))
    }

    /// The state of a unit.
    #[must_use]
    pub fn state(&self, name: &str) -> String {
        self.unit(name)["state"].as_str().unwrap_or("").to_owned()
    }

    /// How often a unit was started.
    #[must_use]
    pub fn starts(&self, name: &str) -> u64 {
        self.unit(name)["starts"].as_u64().unwrap_or(u64::MAX)
    }

    /// Waits for a unit to come into a state.
    pub fn until(&self, name: &str, state: &str) {
        let mut last = String::new();
        let reached = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually(&format!("{name} to be {state}"), || {
                last = self.state(name);
                (last == state).then_some(())
            });
        }));
        if let Err(panic) = reached {
            eprintln!("{name} is {last}\n{}", self.log());
            std::panic::resume_unwind(panic);
        }
    }

    /// dig.
    #[must_use]
    pub fn dig(&self, words: &[&str]) -> Outcome {
        need("dig");
        run(
            Command::new("dig")
                .args(["@127.0.0.1", "-p", &self.port.to_string()])
                .args(["+tries=1", "+time=30"])
                .args(words),
            RUN_DEADLINE,
        )
    }

    /// The answer section that dig shows, in short.
    ///
    /// # Panics
    ///
    /// When dig has no answer.
    #[must_use]
    pub fn short(&self, words: &[&str]) -> String {
        let outcome = self.dig(&[&["+short"], words].concat());
        assert_eq!(outcome.code(), 0, "dig {words:?}\n{outcome}");
        outcome.output.trim().to_owned()
    }

    /// The address of a name.
    ///
    /// # Panics
    ///
    /// When the answer is another.
    pub fn address(&self, name: &str) -> Ipv4Addr {
        let text = self.short(&[name]);
        text.parse().unwrap_or_else(|_| {
            panic!(
                "{name}: '{text}'\n{}\n{}",
                self.dig(&[name]).output,
                self.log()
            )
        })
    }

    /// The process that watches over an instance, from what `kiln inspect` says.
    #[must_use]
    pub fn monitor_in(&self, inspected: &str) -> Option<u32> {
        fn find(value: &Value) -> Option<u32> {
            match value {
                Value::Object(map) => map
                    .get("monitor")
                    .and_then(Value::as_u64)
                    .and_then(|number| u32::try_from(number).ok())
                    .or_else(|| map.values().find_map(find)),
                Value::Array(list) => list.iter().find_map(find),
                _ => None,
            }
        }
        find(&serde_json::from_str(inspected).ok()?)
    }

    /// The address of a unit as `ps` shows it: nothing is asked for.
    ///
    /// # Panics
    ///
    /// When it has none.
    #[must_use]
    pub fn known_address(&self, name: &str) -> Ipv4Addr {
        self.unit(name)["addresses"][0]
            .as_str()
            .and_then(|text| text.parse().ok())
            .expect("an address")
    }
}

impl Drop for Summoner {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("-- the summoner's log\n{}", self.log());
        }
        if self.child.is_none() && self.processes().is_empty() {
            return;
        }
        let _ = run(&mut self.kiln.command(["summon", "down"]), RUN_DEADLINE);
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Gets a page with curl, once: no second try.
///
/// # Panics
///
/// When curl fails.
pub fn curl(url: &str) -> String {
    need("curl");
    let outcome = run(
        Command::new("curl").args(["-sSf", "--max-time", "60", url]),
        RUN_DEADLINE,
    );
    assert_eq!(outcome.code(), 0, "curl {url}\n{outcome}");
    outcome.output
}

/// A question for an A record (RFC 1035, section 4.1).
///
/// # Panics
///
/// When a label is too long.
#[must_use]
pub fn question(number: u16, name: &str) -> Vec<u8> {
    let mut packet = number.to_be_bytes().to_vec();
    packet.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        packet.push(u8::try_from(label.len()).expect("a short label"));
        packet.extend(label.as_bytes());
    }
    packet.extend([0, 0, 1, 0, 1]);
    packet
}

/// A connection that speaks redis' protocol, as `redis-cli` does while it stays open.
pub struct Redis(TcpStream);

impl Redis {
    /// Connects.
    ///
    /// # Panics
    ///
    /// When nothing accepts.
    #[must_use]
    pub fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("a connection");
        stream
            .set_read_timeout(Some(RUN_DEADLINE))
            .expect("a time limit");
        Self(stream)
    }

    /// Sends a command and reads an answer of one line or one bulk string.
    ///
    /// # Panics
    ///
    /// When the connection ends.
    pub fn ask(&mut self, command: &str) -> String {
        self.0
            .write_all(format!("{command}\r\n").as_bytes())
            .expect("redis reads");
        let first = self.line();
        match first.strip_prefix('$') {
            Some("-1") => "(nil)".to_owned(),
            Some(_) => self.line(),
            None => match first.strip_prefix('*').and_then(|count| count.parse().ok()) {
                Some(count) => {
                    let parts: Vec<String> = (0..count)
                        .map(|_| {
                            self.line();
                            self.line()
                        })
                        .collect();
                    parts.join(" ")
                }
                None => first,
            },
        }
    }

    fn line(&mut self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        while !line.ends_with(b"\r\n") {
            self.0.read_exact(&mut byte).expect("an answer of redis");
            line.extend(byte);
        }
        line.truncate(line.len() - 2);
        String::from_utf8_lossy(&line).into_owned()
    }
}

/// Processor time that a process has used so far, in clock ticks (proc_pid_stat(5): utime and stime).
#[must_use]
pub fn processor_time(process: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// Memory that a process has for itself, in bytes, without what is in files (proc_pid_status(5), RssAnon).
#[must_use]
pub fn resident(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes << 10)
}

/// How long something is watched that must not happen.
pub const WATCH: Duration = Duration::from_secs(1);

//! `kiln summon` as a user has it: dig, curl and redis-cli find units that did not run a moment ago.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use kiln_tests::{
    Kiln, RUN_DEADLINE, engines, eventually, free_port, need, run,
    summon::{Redis, Summoner, WATCH, curl, processor_time, question, resident},
    wait, workspace,
};

/// The words "from a fresh clone", but for the ports, which others may have.
#[test]
fn the_example_as_a_user_types_it() {
    need("dig");
    need("curl");
    let folder = workspace().join("examples/summon");
    let kiln = Kiln::new();
    let port = free_port();
    let http = free_port();
    let redis = free_port();
    // The example itself, but for its ports.
    let text = fs::read_to_string(folder.join("summon.toml")).expect("the example");
    assert!(text.contains("\"8080:80\"") && text.contains("\"6379\"") && text.contains("ttl = 5"));
    let text = text
        .replace("\"8080:80\"", &format!("\"{http}:80\""))
        .replace("\"6379\"", &format!("\"{redis}:6379\""))
        .replace("ttl = 5", "ttl = 1")
        .replace("../site", folder.join("../site").to_str().expect("text"));
    let path = kiln.folder().join("summon.toml");
    fs::write(&path, text).expect("the copy");
    let path = path.to_str().expect("text");
    let pool = Summoner::new().pool.clone();
    let listen = format!("127.0.0.1:{port}");

    let outcome = kiln.run(["summon", path, "-d", "--listen", &listen, "--pool", &pool]);
    assert_eq!(outcome.code(), 0, "{outcome}");
    assert!(
        outcome.errors.contains(&format!("name server at {listen}"))
            && outcome.errors.contains("2 units, nothing runs"),
        "{outcome}"
    );
    assert_eq!(kiln.succeed(["ps", "-q"]), "");
    let address = run(
        Command::new("dig")
            .args(["+short", "@127.0.0.1", "-p", &port.to_string()])
            .arg("www.example.org"),
        RUN_DEADLINE,
    );
    let address: Ipv4Addr = address.output.trim().parse().expect("an address");
    let page = curl(&format!("http://{address}:{http}/"));
    assert!(page.starts_with("<!DOCTYPE html>"), "{page}");
    let line = |name: &str| -> String {
        kiln.succeed(["summon", "ps"])
            .lines()
            .find(|line| line.starts_with(name))
            .expect("a line")
            .to_owned()
    };
    assert!(line("www").contains(" ready "), "{}", line("www"));
    assert!(line("redis").contains(" stopped "), "{}", line("redis"));
    eventually("its end", || {
        line("www").contains(" stopped ").then_some(())
    });
    assert_eq!(kiln.succeed(["ps", "-q", "--running"]), "");
    // Once more, by its name.
    let resolve = format!("www.example.org:{http}:{address}");
    let again = run(
        Command::new("curl").args([
            "-sf",
            "--resolve",
            &resolve,
            &format!("http://www.example.org:{http}/"),
        ]),
        RUN_DEADLINE,
    );
    assert_eq!(again.output, page);
    kiln.succeed(["summon", "down"]);
    assert_eq!(kiln.succeed(["ps", "-q"]), "");
}

fn processor_time_of(summoner: &Summoner) -> u64 {
    summoner
        .processes()
        .into_iter()
        .filter_map(processor_time)
        .sum()
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970")
        .as_secs()
}

/// Nobody runs for a while: no clock tick of processor time is used.
fn sleeps(what: &str, time: impl Fn() -> u64) {
    eventually(what, || {
        let before = time();
        thread::sleep(WATCH);
        (time() == before).then_some(())
    });
}

fn suspended_redis(extra: &str) {
    need("redis-server");
    need("redis-cli");
    let port = free_port();
    let mut summoner = Summoner::with(&format!(
        "ttl = 1\n[unit.redis]\ndns = [\"redis.example.org\"]\nsource = \"/usr/bin/redis-server\"\n\
         arguments = [\"--save\", \"\", \"--appendonly\", \"no\", \"--protected-mode\", \"no\"]\n\
         ports = [\"{port}:6379\"]\nstop = \"suspend\"\nidle = \"700ms\"\n{extra}\n"
    ));
    let address = summoner.address("redis.example.org");
    let place = SocketAddr::from((address, port));
    let mut connection = Redis::connect(place);
    assert_eq!(connection.ask("SET pot glazed"), "+OK");
    let large = "x".repeat(10_000);
    assert_eq!(connection.ask(&format!("SET large {large}")), "+OK");
    summoner.until("redis", "suspended");
    let unit = summoner.unit("redis");
    assert_eq!(unit["connections"], 1, "{unit}");
    sleeps("no use of the processor while suspended", || {
        processor_time_of(&summoner)
    });
    assert_eq!(summoner.state("redis"), "suspended");
    // The same connection, and its memory; the clock is the world's.
    assert_eq!(connection.ask("GET pot"), "glazed");
    assert_eq!(connection.ask("GET large"), large);
    let time = connection.ask("TIME");
    let told: u64 = time
        .split(' ')
        .next()
        .and_then(|text| text.parse().ok())
        .expect("a time");
    assert!(told.abs_diff(now()) <= 2, "TIME {time}, now {}", now());
    // A query wakes it, with nobody speaking to it.
    summoner.until("redis", "suspended");
    assert_eq!(summoner.address("redis.example.org"), address);
    summoner.until("redis", "ready");
    // A new connection does too.
    summoner.until("redis", "suspended");
    let answer = run(
        Command::new("redis-cli").args([
            "-h",
            &address.to_string(),
            "-p",
            &port.to_string(),
            "get",
            "pot",
        ]),
        RUN_DEADLINE,
    );
    assert_eq!(answer.output, "glazed\n", "{answer}");
    assert_eq!(connection.ask("GET pot"), "glazed");
    assert_eq!(summoner.starts("redis"), 1, "{}", summoner.log());
    summoner.until("redis", "suspended");
    summoner.down();
}

#[test]
fn a_suspended_redis_keeps_memory_and_connections_and_uses_no_processor() {
    if engines().iter().any(|engine| engine == "process") {
        suspended_redis("engine = \"process\"");
    }
}

#[test]
fn a_suspended_redis_with_packets_keeps_memory_and_connections() {
    if engines().iter().any(|engine| engine == "process") {
        suspended_redis("engine = \"process\"\nnet = \"direct\"");
    }
}

#[test]
fn a_suspended_redis_on_qemu_keeps_memory_and_connections() {
    if engines().iter().any(|engine| engine == "qemu") {
        suspended_redis("engine = \"qemu\"");
    }
}

fn cold_site(extra: &str) {
    let port = free_port();
    let mut summoner = Summoner::with(&format!(
        "ttl = 1\n[unit.www]\ndns = [\"www.example.org\"]\nsource = \"{{site}}\"\nports = [\"{port}:80\"]\n\
         idle = \"500ms\"\n{extra}\n"
    ));
    assert_eq!(summoner.state("www"), "stopped");
    let address = summoner.address("www.example.org");
    let page = curl(&format!("http://{address}:{port}/"));
    assert!(page.starts_with("<!DOCTYPE html>"), "{page}");
    summoner.until("www", "stopped");
    // No query: the first connection.
    let page = curl(&format!("http://{address}:{port}/"));
    assert!(page.starts_with("<!DOCTYPE html>"), "{page}");
    assert_eq!(summoner.starts("www"), 2);
    summoner.down();
}

#[test]
fn a_site_on_qemu_comes_with_a_query_and_with_a_connection() {
    if engines().iter().any(|engine| engine == "qemu") {
        cold_site("engine = \"qemu\"");
    }
}

#[test]
fn a_site_with_packets_comes_with_a_query_and_with_a_connection() {
    if engines().iter().any(|engine| engine == "process") {
        cold_site("engine = \"process\"\nnet = \"direct\"");
    }
}

#[test]
fn a_first_connection_summons_without_any_query() {
    let port = free_port();
    let mut summoner = Summoner::with(&format!(
        "[unit.www]\ndns = [\"www.example.org\"]\nsource = \"{{program}}\"\narguments = [\"listen=8000\", \"after=300\"]\n\
         ports = [\"{port}:8000\"]\n"
    ));
    let address = summoner.known_address("www");
    assert_eq!(summoner.state("www"), "stopped");
    // However early they come: all of these wait in the socket's queue.
    let clients: Vec<_> = (0..20)
        .map(|_| {
            let url = format!("http://{address}:{port}/");
            thread::spawn(move || curl(&url))
        })
        .collect();
    for client in clients {
        assert!(client.join().expect("curl").starts_with("request "));
    }
    assert_eq!(summoner.starts("www"), 1);
    assert_eq!(summoner.unit("www")["last_query"], serde_json::Value::Null);
    summoner.down();
}

fn first_datagrams(extra: &str, rest: &str) {
    let port = free_port();
    let mut summoner = Summoner::with(&format!(
        "[unit.echo]\ndns = [\"echo.example.org\"]\nsource = \"{{program}}\"\narguments = [\"udp=7\", \"after=300\"]\n\
         ports = [\"{port}:7/udp\"]\nidle = \"500ms\"\n{extra}\n"
    ));
    let address = summoner.known_address("echo");
    for _ in 0..2 {
        let client = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        client
            .set_read_timeout(Some(RUN_DEADLINE))
            .expect("a limit");
        client.connect((address, port)).expect("a peer");
        for number in 0..20_u8 {
            client.send(&[number; 100]).expect("it leaves");
        }
        for number in 0..20_u8 {
            let mut buffer = [0; 2000];
            let length = client.recv(&mut buffer).expect("its answer");
            assert_eq!(buffer.get(..length), Some([number; 100].as_slice()));
        }
        summoner.until("echo", rest);
    }
    assert_eq!(
        summoner.starts("echo"),
        if rest == "stopped" { 2 } else { 1 }
    );
    summoner.down();
}

#[test]
fn the_first_datagrams_are_kept_and_answered() {
    first_datagrams("engine = \"process\"", "stopped");
}

#[test]
fn the_first_datagrams_are_kept_and_answered_with_packets() {
    first_datagrams("engine = \"process\"\nnet = \"direct\"", "stopped");
}

#[test]
fn the_first_datagrams_are_kept_and_answered_on_qemu() {
    if engines().iter().any(|engine| engine == "qemu") {
        first_datagrams("engine = \"qemu\"", "stopped");
    }
}

#[test]
fn a_datagram_wakes_a_suspended_unit() {
    first_datagrams("stop = \"suspend\"", "suspended");
}

#[test]
fn a_datagram_wakes_a_suspended_unit_with_packets() {
    first_datagrams(
        "stop = \"suspend\"\nengine = \"process\"\nnet = \"direct\"",
        "suspended",
    );
}

#[test]
fn a_thousand_simultaneous_queries_start_a_unit_once_and_are_all_answered() {
    let port = free_port();
    let mut summoner = Summoner::with(&format!(
        "[unit.www]\ndns = [\"www.example.org\"]\nsource = \"{{program}}\"\narguments = [\"listen=8000\", \"after=1000\"]\n\
         ports = [\"{port}:8000\"]\nanswer = \"ready\"\n"
    ));
    let sockets: Vec<UdpSocket> = (0..50)
        .map(|_| {
            let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
            socket
                .connect(("127.0.0.1", summoner.port))
                .expect("a peer");
            socket
                .set_read_timeout(Some(RUN_DEADLINE))
                .expect("a limit");
            socket
        })
        .collect();
    for number in 0..20 {
        for socket in &sockets {
            socket
                .send(&question(number, "www.example.org"))
                .expect("it leaves");
        }
    }
    for socket in &sockets {
        let mut seen = [false; 20];
        for _ in 0..20 {
            let mut buffer = [0; 600];
            let length = socket.recv(&mut buffer).expect("an answer");
            assert!(length > 40);
            assert_eq!(buffer[3] & 15, 0, "no error");
            assert_eq!(u16::from_be_bytes([buffer[6], buffer[7]]), 1, "an answer");
            seen[usize::from(u16::from_be_bytes([buffer[0], buffer[1]]))] = true;
        }
        assert_eq!(seen, [true; 20]);
    }
    assert_eq!(summoner.state("www"), "ready");
    assert_eq!(summoner.starts("www"), 1);
    summoner.down();
}

/// A download that takes its time, read to its end in the background.
fn download(address: Ipv4Addr, port: u16, lines: u32) -> thread::JoinHandle<()> {
    let mut stream = TcpStream::connect((address, port)).expect("a connection");
    stream
        .set_read_timeout(Some(RUN_DEADLINE))
        .expect("a limit");
    stream
        .write_all(format!("GET /slow/{lines} HTTP/1.1\r\nHost: kiln\r\n\r\n").as_bytes())
        .expect("it reads");
    let mut first = [0; 1];
    stream.read_exact(&mut first).expect("its first byte");
    thread::spawn(move || {
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("all of it");
        assert!(
            text.ends_with(&format!("line {}\n", lines - 1)),
            "cut: {} bytes",
            text.len()
        );
    })
}

fn unit(name: &str, port: u16, extra: &str) -> String {
    format!(
        "[unit.{name}]\ndns = [\"{name}.example.org\"]\nsource = \"{{program}}\"\nports = [\"{port}:8000\"]\n{}{extra}\n",
        if extra.contains("arguments") {
            ""
        } else {
            "arguments = [\"listen=8000\"]\n"
        }
    )
}

#[test]
fn a_killed_summoner_leaves_its_unit_serving_and_the_next_one_adopts_it() {
    let port = free_port();
    let mut summoner = Summoner::with(&unit("www", port, "idle = \"500ms\""));
    let address = summoner.address("www.example.org");
    let download = download(address, port, 60);
    summoner.until("www", "ready");
    summoner.kill();
    // Served although there is no summoner.
    assert_eq!(curl(&format!("http://{address}:{port}/")), "request 1\n");
    summoner.start(&["--forward", "none"]);
    assert!(summoner.log().contains("1 running"), "{}", summoner.log());
    assert_eq!(summoner.state("www"), "ready");
    assert_eq!(summoner.starts("www"), 1);
    assert_eq!(summoner.address("www.example.org"), address);
    assert_eq!(curl(&format!("http://{address}:{port}/")), "request 2\n");
    download.join().expect("the whole download");
    summoner.until("www", "stopped");
    assert_eq!(curl(&format!("http://{address}:{port}/")), "request 1\n");
    assert_eq!(summoner.starts("www"), 2);
    summoner.down();
}

#[test]
fn a_suspended_unit_is_adopted_and_resumed() {
    let port = free_port();
    let mut summoner = Summoner::with(&unit("www", port, "idle = \"300ms\"\nstop = \"suspend\""));
    let address = summoner.address("www.example.org");
    assert_eq!(curl(&format!("http://{address}:{port}/")), "request 1\n");
    summoner.until("www", "suspended");
    summoner.kill();
    summoner.start(&["--forward", "none"]);
    assert_eq!(summoner.state("www"), "suspended");
    assert_eq!(curl(&format!("http://{address}:{port}/")), "request 2\n");
    assert_eq!(summoner.starts("www"), 1);
    summoner.down();
}

#[test]
fn a_killed_monitor_is_noticed_and_the_next_query_starts_the_unit_afresh() {
    let port = free_port();
    let mut summoner = Summoner::with(&unit("www", port, ""));
    let address = summoner.address("www.example.org");
    assert_eq!(curl(&format!("http://{address}:{port}/")), "request 1\n");
    let processes = summoner.processes();
    assert!(!processes.is_empty());
    let monitor = monitor_of(&summoner, "www");
    kill(monitor);
    summoner.until("www", "stopped");
    eventually("the end of all its processes", || {
        processes
            .iter()
            .all(|process| !fs::exists(format!("/proc/{process}/exe")).unwrap_or(false))
            .then_some(())
    });
    assert_eq!(summoner.address("www.example.org"), address);
    assert_eq!(curl(&format!("http://{address}:{port}/")), "request 1\n");
    assert_eq!(summoner.starts("www"), 2);
    summoner.down();
}

/// The process that watches over a unit.
fn monitor_of(summoner: &Summoner, unit: &str) -> u32 {
    let text = summoner.kiln.succeed(["inspect", unit]);
    summoner
        .monitor_in(&text)
        .unwrap_or_else(|| panic!("no monitor in {text}"))
}

fn kill(process: u32) {
    signal(process, rustix::process::Signal::KILL);
}

fn signal(process: u32, signal: rustix::process::Signal) {
    let process = i32::try_from(process)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .expect("a process");
    rustix::process::kill_process(process, signal).expect("it is there");
}

/// A unit that answers queries when it is ready in a way of its own.
fn readiness(extra: &str) {
    let port = free_port();
    let mut summoner = Summoner::with(&unit("www", port, &format!("answer = \"ready\"\n{extra}")));
    let begin = Instant::now();
    let address = summoner.address("www.example.org");
    let took = begin.elapsed();
    assert!(
        took >= Duration::from_millis(400),
        "{extra}: after {took:?}"
    );
    assert_eq!(summoner.state("www"), "ready");
    let page = curl(&format!("http://{address}:{port}/"));
    assert!(page.starts_with("request "), "{page}");
    summoner.down();
}

#[test]
fn ready_when_it_listens() {
    readiness("arguments = [\"listen=8000\", \"after=500\"]");
}

#[test]
fn ready_when_a_path_is_answered_well() {
    readiness(
        "arguments = [\"listen=8000\", \"healthy=500\"]\nready = { http = \"/health\", port = 8000 }",
    );
}

#[test]
fn ready_when_it_prints_a_line() {
    readiness(
        "arguments = [\"listen=8000\", \"after=500\", \"line=the kiln is hot\"]\nready = { line = \"kiln is hot\" }",
    );
}

#[test]
fn ready_after_a_while() {
    readiness("arguments = [\"listen=8000\"]\nready = { delay = \"500ms\" }");
}

#[test]
fn a_unit_that_does_not_become_ready_fails_with_its_last_lines_and_is_tried_again_later() {
    let mut summoner = Summoner::with(&format!(
        "{}{}",
        unit(
            "slow",
            free_port(),
            "answer = \"ready\"\narguments = [\"after=100000\"]\nready_timeout = \"500ms\""
        ),
        unit(
            "broken",
            free_port(),
            "answer = \"ready\"\narguments = [\"end=3\"]"
        )
    ));
    for (name, words) in [
        ("slow", ["not ready within", "warming up"]),
        ("broken", ["ended with code 3", "the clay is too wet"]),
    ] {
        let name_asked = format!("{name}.example.org");
        let outcome = summoner.dig(&[&name_asked]);
        assert!(outcome.output.contains("status: SERVFAIL"), "{outcome}");
        let log = summoner.log();
        assert!(words.iter().all(|word| log.contains(word)), "{log}");
        let unit = summoner.unit(name);
        let trouble = unit["trouble"].as_str().unwrap_or("");
        assert!(words.iter().all(|word| trouble.contains(word)), "{unit}");
        let table = summoner.kiln.run(["summon", "ps"]);
        assert!(table.output.contains("failed, again in "), "{table}");
        assert!(table.errors.contains(words[1]), "{table}");
        // Not at once again.
        let begin = Instant::now();
        let outcome = summoner.dig(&[&name_asked]);
        assert!(outcome.output.contains("status: SERVFAIL"), "{outcome}");
        assert!(begin.elapsed() < Duration::from_millis(900) || summoner.starts(name) > 1);
        // Later, when somebody asks.
        eventually("another try", || {
            let _ = summoner.dig(&[&name_asked]);
            (summoner.starts(name) >= 2).then_some(())
        });
    }
    summoner.down();
}

#[test]
fn stop_modes_end_units_their_way() {
    need("redis-server");
    let ports = [free_port(), free_port()];
    let redis = |name: &str, port: u16, stop: &str| {
        format!(
            "[unit.{name}]\ndns = [\"{name}.example.org\"]\nsource = \"/usr/bin/redis-server\"\n\
             arguments = [\"--save\", \"\", \"--protected-mode\", \"no\"]\nports = [\"{port}:6379\"]\n\
             idle = \"500ms\"\nstop = \"{stop}\"\n"
        )
    };
    let mut summoner = Summoner::with(&format!(
        "{}{}",
        redis("polite", ports[0], "shutdown"),
        redis("rough", ports[1], "destroy")
    ));
    for (name, port) in ["polite", "rough"].into_iter().zip(ports) {
        let address = summoner.address(&format!("{name}.example.org"));
        let mut connection = Redis::connect((address, port).into());
        assert_eq!(connection.ask("PING"), "+PONG");
    }
    summoner.until("polite", "stopped");
    summoner.until("rough", "stopped");
    // What was told SIGTERM has said good-bye; of what was destroyed nothing stays.
    let log = summoner.kiln.succeed(["logs", "polite"]);
    assert!(log.contains("ready to exit"), "{log}");
    eventually("the removal", || {
        (summoner.instances() == ["polite"]).then_some(())
    });
    summoner.down();
}

#[test]
fn a_slow_long_download_is_never_cut() {
    let ports = [free_port(), free_port(), free_port()];
    let mut summoner = Summoner::with(&format!(
        "ttl = 1\n{}{}{}",
        unit("one", ports[0], "idle = \"200ms\"\nstop = \"shutdown\""),
        unit("two", ports[1], "idle = \"200ms\"\nstop = \"destroy\""),
        unit("three", ports[2], "idle = \"200ms\"\nstop = \"suspend\""),
    ));
    let downloads: Vec<_> = ["one", "two", "three"]
        .into_iter()
        .zip(ports)
        .map(|(name, port)| {
            let address = summoner.address(&format!("{name}.example.org"));
            download(address, port, 60)
        })
        .collect();
    for download in downloads {
        download.join().expect("the whole download");
    }
    summoner.until("one", "stopped");
    summoner.until("two", "stopped");
    summoner.until("three", "suspended");
    summoner.down();
}

#[test]
fn the_longest_idle_makes_room_when_too_many_run() {
    let names = ["one", "two", "three"];
    let text: String = names
        .iter()
        .map(|name| unit(name, free_port(), "idle = \"1h\"\nmemory = \"64M\""))
        .collect();
    for ceiling in ["max_running = 2", "max_memory = \"140M\""] {
        let mut summoner = Summoner::with(&format!("{ceiling}\n{text}"));
        for name in names {
            summoner.address(&format!("{name}.example.org"));
            summoner.until(name, "ready");
        }
        summoner.until("one", "stopped");
        assert_eq!(summoner.state("two"), "ready", "{ceiling}");
        assert_eq!(summoner.state("three"), "ready", "{ceiling}");
        // "two" is asked for again: now "three" has been idle for longest.
        summoner.address("two.example.org");
        summoner.address("one.example.org");
        summoner.until("one", "ready");
        summoner.until("three", "stopped");
        assert_eq!(summoner.state("two"), "ready", "{ceiling}");
        summoner.down();
    }
}

#[test]
fn what_is_to_be_kept_runs_without_being_asked_for_and_again_after_its_end() {
    let mut summoner = Summoner::with(&format!(
        "{}{}{}",
        unit("floor", free_port(), "min_running = 1\nidle = \"200ms\""),
        unit("always", free_port(), "always = true\nidle = \"200ms\""),
        unit("cold", free_port(), ""),
    ));
    summoner.until("floor", "ready");
    summoner.until("always", "ready");
    assert_eq!(summoner.state("cold"), "stopped");
    thread::sleep(WATCH);
    for name in ["floor", "always"] {
        assert_eq!(summoner.state(name), "ready");
        assert_eq!(summoner.starts(name), 1);
        kill(monitor_of(&summoner, name));
        eventually("its return", || {
            (summoner.starts(name) == 2 && summoner.state(name) == "ready").then_some(())
        });
    }
    summoner.down();
}

#[test]
fn units_are_started_and_stopped_by_hand() {
    let port = free_port();
    let mut summoner = Summoner::with(&unit("www", port, ""));
    summoner.say(&["start", "www"]);
    summoner.until("www", "ready");
    summoner.say(&["stop", "www"]);
    summoner.until("www", "stopped");
    summoner
        .kiln
        .run(["summon", "start", "nobody"])
        .errors
        .contains("there is no unit 'nobody'")
        .then_some(())
        .expect("a message");
    summoner.down();
    let nobody = summoner.kiln.run(["summon", "ps"]);
    assert_eq!(nobody.code(), 1, "{nobody}");
    assert!(nobody.errors.contains("no summoner is at work"), "{nobody}");
}

#[test]
fn a_reload_adds_removes_and_changes_units_and_cuts_nothing() {
    let ports = [free_port(), free_port(), free_port()];
    let kept = unit("kept", ports[0], "");
    let gone = unit("gone", ports[1], "");
    let mut summoner = Summoner::with(&format!("{kept}{gone}"));
    let address = summoner.address("kept.example.org");
    let one = download(address, ports[0], 160);
    let two = download(summoner.address("gone.example.org"), ports[1], 20);
    summoner.configure(&format!("{kept}{}", unit("new", ports[2], "")));
    signal(summoner.process(), rustix::process::Signal::HUP);
    eventually("the new unit", || {
        let names: Vec<String> = summoner
            .ps()
            .iter()
            .filter_map(|unit| unit["name"].as_str().map(str::to_owned))
            .collect();
        (names.contains(&"new".to_owned())).then_some(())
    });
    let new = summoner.address("new.example.org");
    assert_eq!(curl(&format!("http://{new}:{}/", ports[2])), "request 1\n");
    let gone = summoner.dig(&["gone.example.org"]);
    assert!(gone.output.contains("status: REFUSED"), "{gone}");
    two.join().expect("the download of what was removed");
    eventually("the end of what was removed", || {
        (!summoner.instances().contains(&"gone".to_owned())).then_some(())
    });
    // Changed: the old instance serves to the end of the download, the new one comes then.
    summoner.configure(&unit(
        "kept",
        ports[0],
        "ttl = 7\nenvironment = { GLAZE = \"blue\" }",
    ));
    summoner.say(&["reload"]);
    let answer = summoner.dig(&["+noall", "+answer", "kept.example.org"]);
    assert!(answer.output.contains("\t7\tIN\tA\t"), "{answer}");
    assert_eq!(summoner.starts("kept"), 1);
    one.join().expect("the download of what was changed");
    summoner.until("kept", "stopped");
    assert_eq!(
        curl(&format!("http://{address}:{}/", ports[0])),
        "request 1\n"
    );
    assert_eq!(summoner.starts("kept"), 2);
    // A wrong one changes nothing.
    let before = summoner.ps().len();
    summoner.configure("ttl = \"long\"\n[unit.other]\ndns = \"other.example.org\"\n");
    let outcome = summoner.kiln.run(["summon", "reload"]);
    assert_eq!(outcome.code(), 2, "{outcome}");
    assert!(outcome.errors.contains("summon.toml:1"), "{outcome}");
    assert_eq!(summoner.ps().len(), before);
    assert_eq!(
        curl(&format!("http://{address}:{}/", ports[0])),
        "request 2\n"
    );
    summoner.down();
}

#[test]
fn added_units_stay_until_they_are_removed() {
    let ports = [free_port(), free_port()];
    let mut summoner = Summoner::with(&unit("www", ports[0], ""));
    let program = summoner.program();
    let words = format!(
        "dns=added.example.org,image={},port={}:8000,argument=listen=8000,name=added",
        program.display(),
        ports[1]
    );
    summoner.say(&["add", &words]);
    let address = summoner.address("added.example.org");
    let url = format!("http://{address}:{}/", ports[1]);
    assert_eq!(curl(&url), "request 1\n");
    summoner.down();
    summoner.start(&["--forward", "none"]);
    assert_eq!(summoner.address("added.example.org"), address);
    assert_eq!(curl(&url), "request 1\n");
    summoner.say(&["rm", "added"]);
    let begin = Instant::now();
    eventually("its end", || (summoner.ps().len() == 1).then_some(()));
    assert!(begin.elapsed() < Duration::from_secs(5));
    summoner.no_instance_is_left();
    let refused = summoner.kiln.run(["summon", "rm", "www"]);
    assert_eq!(refused.code(), 2, "{refused}");
    summoner.down();
    summoner.start(&["--forward", "none"]);
    assert_eq!(summoner.ps().len(), 1);
    summoner.down();
}

/// A port that somebody else has.
fn taken_port() -> (TcpListener, u16) {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = taken.local_addr().expect("its address").port();
    (taken, port)
}

const KEPT_AND_TAKEN: &str = "[unit.kept]\ndns = \"kept.example.org\"\nsource = \"{site}\"\nports = [\"8080:80\"]\nalways = true\n\n[unit.taken]\ndns = \"taken.example.org\"\nsource = \"{site}\"\naddress = \"127.0.0.1\"\nports = [\"PORT:80\"]\n";

#[test]
fn a_start_that_meets_a_taken_port_leaves_nothing_running() {
    let (_taken, port) = taken_port();
    let summoner = Summoner::new();
    summoner.configure(&KEPT_AND_TAKEN.replace("PORT", &port.to_string()));
    let outcome = run(&mut summoner.command(), RUN_DEADLINE);
    assert_eq!(outcome.code(), 1, "{outcome}");
    assert!(outcome.errors.contains(&port.to_string()), "{outcome}");
    assert_eq!(summoner.processes(), Vec::<u32>::new());
    summoner.no_instance_is_left();
}

#[test]
fn a_reload_that_meets_a_taken_port_brings_no_new_unit_and_the_next_one_does() {
    let (taken, port) = taken_port();
    let mut summoner = Summoner::with(
        "[unit.www]\ndns = \"www.example.org\"\nsource = \"{site}\"\nports = [\"8080:80\"]\n",
    );
    let address = summoner.address("www.example.org");
    let www =
        "[unit.www]\ndns = \"www.example.org\"\nsource = \"{site}\"\nports = [\"8080:80\"]\n\n";
    let more = KEPT_AND_TAKEN.replace("PORT", &port.to_string());
    summoner.configure(&format!("{www}{more}"));
    let outcome = summoner.kiln.run(["summon", "reload"]);
    assert_eq!(outcome.code(), 1, "{outcome}");
    assert!(outcome.errors.contains(&port.to_string()), "{outcome}");
    let names = |summoner: &Summoner| -> Vec<String> {
        let units = summoner.ps();
        let name = |unit: &serde_json::Value| unit["name"].as_str().map(str::to_owned);
        units.iter().filter_map(name).collect()
    };
    assert_eq!(names(&summoner), ["www"]);
    assert!(summoner.short(&["kept.example.org"]).is_empty());
    assert!(curl(&format!("http://{address}:8080/")).contains("<html"));
    drop(taken);
    summoner.say(&["reload"]);
    assert_eq!(names(&summoner), ["kept", "taken", "www"]);
    summoner.until("kept", "ready");
    summoner.down();
}

#[test]
fn a_wrong_configuration_is_told_with_line_key_and_remedy() {
    let summoner = Summoner::new();
    summoner.configure(
        "ttl = 60\n\n[unit.www]\ndns = [\"www.example.org\"]\nsource = \"{site}\"\nports = [\"80:\"]\nstop = \"melt\"\nportz = 1\n",
    );
    let path = summoner.configuration();
    let path = path.to_str().expect("text");
    for words in [vec!["summon", path, "--check"], vec!["summon", path, "-d"]] {
        let outcome = summoner.kiln.run(&words);
        assert_eq!(outcome.code(), 2, "{outcome}");
        for word in [
            "summon.toml:6",
            "ports",
            "summon.toml:7",
            "stop",
            "destroy",
            "summon.toml:8",
            "portz",
        ] {
            assert!(outcome.errors.contains(word), "no {word}\n{outcome}");
        }
    }
    summoner.configure(
        "[unit.www]\ndns = \"www.example.org\"\nsource = \"{site}\"\nports = [\"8080:80\"]\n",
    );
    let outcome = summoner.kiln.run(["summon", path, "--check"]);
    assert_eq!(outcome.code(), 0, "{outcome}");
    assert_eq!(outcome.output, "1 unit, nothing wrong\n");
    summoner.configure("[unit.www]\ndns = \"www.example.org\"\nsource = \"{folder}/none\"\n");
    let outcome = summoner.kiln.run(["summon", path, "--check"]);
    assert_eq!(outcome.code(), 2, "{outcome}");
    assert!(outcome.errors.contains("none"), "{outcome}");
}

#[test]
fn names_that_are_not_ours_are_forwarded_or_refused() {
    need("dnsmasq");
    let mut summoner = Summoner::new();
    let upstream = free_port();
    let mut dnsmasq = Command::new("/usr/sbin/dnsmasq")
        .args([
            "--keep-in-foreground",
            "--no-resolv",
            "--no-hosts",
            "--pid-file=",
        ])
        .args([
            "--conf-file=/dev/null",
            "--bind-interfaces",
            "--listen-address=127.0.0.1",
            "--user=root",
        ])
        .arg(format!("--port={upstream}"))
        .arg("--address=/elsewhere.example.com/192.0.2.7")
        .stderr(Stdio::null())
        .spawn()
        .expect("dnsmasq");
    summoner.configure(&unit("www", free_port(), ""));
    summoner.start(&[
        "--forward",
        &format!("127.0.0.1:{upstream}"),
        "--zone",
        "example.org",
    ]);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        eventually("the other name server", || {
            (summoner.dig(&["+short", "elsewhere.example.com"]).output == "192.0.2.7\n")
                .then_some(())
        });
        assert_eq!(
            summoner.short(&["+tcp", "elsewhere.example.com"]),
            "192.0.2.7"
        );
        // Below our zone nobody else is asked.
        let none = summoner.dig(&["no.example.org"]);
        assert!(none.output.contains("status: NXDOMAIN"), "{none}");
    }));
    let _ = dnsmasq.kill();
    let _ = wait(&mut dnsmasq, RUN_DEADLINE);
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
    summoner.down();
    summoner.start(&["--forward", "none"]);
    let refused = summoner.dig(&["elsewhere.example.com"]);
    assert!(refused.output.contains("status: REFUSED"), "{refused}");
    summoner.down();
}

#[test]
fn every_kind_of_question_is_answered() {
    let port = free_port();
    let mut summoner = Summoner::new();
    summoner.configure(&unit("www", port, "ttl = 33"));
    summoner.start(&["--forward", "none", "--zone", "example.org"]);
    let address = summoner.known_address("www");
    let text = address.to_string();
    let full = |words: &[&str]| summoner.dig(words).output;
    assert_eq!(summoner.short(&["www.example.org"]), text);
    assert_eq!(summoner.short(&["+tcp", "WWW.Example.ORG"]), text);
    assert!(full(&["www.example.org", "AAAA"]).contains("status: NOERROR"));
    assert_eq!(summoner.short(&["www.example.org", "AAAA"]), "");
    assert_eq!(summoner.short(&["-x", &text]), "www.example.org.");
    let any = full(&["www.example.org", "ANY"]);
    assert!(
        any.contains("status: NOERROR") && any.contains("ANSWER: 1"),
        "{any}"
    );
    assert!(!summoner.short(&["example.org", "SOA"]).is_empty());
    assert!(!summoner.short(&["example.org", "NS"]).is_empty());
    let answer = full(&["www.example.org"]);
    assert!(answer.contains("\t33\tIN\tA\t"), "{answer}");
    assert!(
        answer.contains("flags: qr aa rd") && answer.contains("EDNS: version: 0"),
        "{answer}"
    );
    assert!(full(&["+noedns", "www.example.org"]).contains(&text));
    assert!(full(&["missing.example.org"]).contains("status: NXDOMAIN"));
    summoner.down();
}

#[test]
fn numbers_and_timelines_show_what_happened() {
    let port = free_port();
    let metrics = free_port();
    let mut summoner = Summoner::with(&format!(
        "metrics = \"127.0.0.1:{metrics}\"\n{}",
        unit("www", port, "idle = \"500ms\"")
    ));
    let address = summoner.address("www.example.org");
    curl(&format!("http://{address}:{port}/"));
    summoner.until("www", "ready");
    let numbers = curl(&format!("http://127.0.0.1:{metrics}/metrics"));
    for word in ["# TYPE ", "unit=\"www\"", "starts_total"] {
        assert!(numbers.contains(word), "no {word} in\n{numbers}");
    }
    let trace = summoner.say(&["trace", "www"]);
    for word in ["www", "ready", "listen"] {
        assert!(trace.to_lowercase().contains(word), "no {word} in\n{trace}");
    }
    let file = summoner.kiln.folder().join("trace.json");
    summoner.say(&["trace", "www", "-o", file.to_str().expect("text")]);
    let value: serde_json::Value =
        serde_json::from_slice(&fs::read(&file).expect("a file")).expect("JSON");
    let events = value["traceEvents"].as_array().or(value.as_array());
    assert!(events.is_some_and(|events| events.len() >= 4), "{value}");
    // It stays when the unit has gone, and when the summoner is another.
    summoner.until("www", "stopped");
    summoner.down();
    summoner.start(&["--forward", "none"]);
    assert!(
        summoner
            .say(&["trace", "www"])
            .to_lowercase()
            .contains("ready")
    );
    summoner.down();
}

#[test]
fn units_by_flags_need_no_file() {
    let kiln = Kiln::new();
    let (dns, port) = (free_port(), free_port());
    let pool = Summoner::new().pool.clone();
    let site = workspace().join("examples/site");
    let unit = format!(
        "dns=www.example.org,image={},port={port}:80,ttl=1",
        site.display()
    );
    kiln.succeed([
        "summon",
        "--unit",
        &unit,
        "-d",
        "--listen",
        &format!("127.0.0.1:{dns}"),
        "--pool",
        &pool,
        "--forward",
        "none",
    ]);
    let address = run(
        Command::new("dig").args([
            "+short",
            "@127.0.0.1",
            "-p",
            &dns.to_string(),
            "www.example.org",
        ]),
        RUN_DEADLINE,
    );
    let page = curl(&format!("http://{}:{port}/", address.output.trim()));
    assert!(page.starts_with("<!DOCTYPE html>"), "{page}");
    kiln.succeed(["summon", "down"]);
    assert_eq!(kiln.succeed(["ps", "-q"]), "");
}

#[test]
fn a_thousand_cold_names_cost_no_processor_and_little_memory() {
    let port = free_port();
    let text: String = (0..1000)
        .map(|number| unit(&format!("u{number}"), port, ""))
        .collect();
    let mut summoner = Summoner::new();
    summoner.pool = wide(&summoner.pool);
    summoner.configure(&text);
    let begin = Instant::now();
    summoner.start(&["--forward", "none"]);
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(20), "it starts in {took:?}");
    assert_eq!(summoner.processes(), Vec::<u32>::new());
    let process = summoner.process();
    sleeps("no use of the processor", || {
        processor_time(process).expect("it runs")
    });
    let memory = resident(process).expect("it runs");
    assert!(memory < 30 << 20, "{memory} bytes");
    let address = summoner.address("u777.example.org");
    assert_eq!(curl(&format!("http://{address}:{port}/")), "request 1\n");
    summoner.down();
}

/// A pool of 65,536 addresses around one of 256.
fn wide(pool: &str) -> String {
    let parts: Vec<&str> = pool.split('.').collect();
    format!("{}.{}.0.0/16", parts[0], parts[1])
}

#[test]
fn many_units_summoned_at_once_are_all_served() {
    let number = 200;
    let port = free_port();
    let text: String = (0..number)
        .map(|number| {
            unit(
                &format!("u{number}"),
                port,
                "memory = \"16M\"\nidle = \"1h\"",
            )
        })
        .collect();
    let mut summoner = Summoner::with(&text);
    let names: Vec<String> = (0..number)
        .map(|number| format!("u{number}.example.org"))
        .collect();
    // One dig asks for all.
    let words: Vec<&str> = names.iter().map(String::as_str).collect();
    let addresses = summoner.short(&words);
    let clients: Vec<_> = addresses
        .lines()
        .map(|address| {
            let place = SocketAddr::new(address.parse().expect("an address"), port);
            thread::spawn(move || {
                let mut stream = TcpStream::connect(place).expect("a connection");
                stream
                    .set_read_timeout(Some(RUN_DEADLINE))
                    .expect("a limit");
                stream
                    .write_all(b"GET / HTTP/1.1\r\nHost: kiln\r\n\r\n")
                    .expect("it reads");
                let mut line = [0; 15];
                stream.read_exact(&mut line).expect("an answer");
                assert_eq!(&line, b"HTTP/1.1 200 OK");
            })
        })
        .collect();
    assert_eq!(clients.len(), number);
    for client in clients {
        client.join().expect("served");
    }
    assert!(summoner.ps().iter().all(|unit| unit["starts"] == 1));
    summoner.down();
}

/// What a browser does: the system's resolver, port 80, no port in the address.
#[test]
fn a_browser_opens_the_site_by_its_name() {
    need("chromium");
    need("ip");
    need("unshare");
    let name = format!("kiln-{}", std::process::id());
    let summoner = Summoner::new();
    summoner.configure(
        "[unit.www]\ndns = [\"www.example.org\"]\nsource = \"{site}\"\nports = [\"80\"]\n",
    );
    let folder = summoner.kiln.folder();
    fs::write(folder.join("resolv.conf"), "nameserver 127.0.0.1\n").expect("a file");
    // In a network of its own there is no port that somebody else has.
    let script = format!(
        "ip link set lo up\n\
         mount --bind '{folder}/resolv.conf' /etc/resolv.conf\n\
         '{kiln}' summon '{folder}/summon.toml' -d --forward none --pool {pool} || exit 1\n\
         HOME='{folder}' timeout 100 chromium --headless --no-sandbox --disable-gpu --disable-dev-shm-usage \
           --user-data-dir='{folder}/{name}' --dump-dom http://www.example.org/\n\
         status=$?\n\
         '{kiln}' summon ps >&2\n\
         '{kiln}' summon down\n\
         exit $status\n",
        folder = folder.display(),
        kiln = kiln_tests::kiln().display(),
        pool = summoner.pool,
    );
    let outcome = run(
        Command::new("unshare")
            .args(["--net", "--mount", "sh", "-c", &script])
            .env("KILN_STATE", summoner.kiln.state()),
        RUN_DEADLINE,
    );
    assert_eq!(outcome.code(), 0, "{outcome}");
    assert!(
        outcome.output.contains("<title>Fired Clay</title>") && outcome.output.contains("</html>"),
        "{outcome}"
    );
    assert!(outcome.errors.contains(" ready "), "{outcome}");
}

#[test]
fn a_unit_that_was_starting_when_the_summoner_was_killed_is_served_by_the_next() {
    let port = free_port();
    let mut summoner = Summoner::with(&unit(
        "www",
        port,
        "arguments = [\"listen=8000\", \"after=1500\"]\nidle = \"1s\"",
    ));
    let address = summoner.address("www.example.org");
    eventually("its process", || {
        summoner
            .instances()
            .contains(&"www".to_owned())
            .then_some(())
    });
    let client = TcpStream::connect((address, port)).expect("a connection that waits");
    summoner.kill();
    summoner.start(&["--forward", "none"]);
    client
        .set_read_timeout(Some(RUN_DEADLINE))
        .expect("a limit");
    (&client)
        .write_all(b"GET / HTTP/1.1\r\nHost: kiln\r\n\r\n")
        .expect("it reads");
    let mut line = [0; 15];
    (&client).read_exact(&mut line).expect("an answer");
    assert_eq!(&line, b"HTTP/1.1 200 OK");
    drop(client);
    assert_eq!(curl(&format!("http://{address}:{port}/")), "request 2\n");
    summoner.until("www", "stopped");
    summoner.down();
}

#[test]
fn a_summoner_that_is_interrupted_ends_its_units() {
    let port = free_port();
    let mut summoner = Summoner::with(&unit("www", port, ""));
    summoner.address("www.example.org");
    summoner.until("www", "ready");
    let processes = summoner.processes();
    signal(summoner.process(), rustix::process::Signal::INT);
    summoner.ended();
    summoner.no_instance_is_left();
    assert!(
        processes
            .iter()
            .all(|process| !fs::exists(format!("/proc/{process}/exe")).unwrap_or(false))
    );
}

#[test]
fn units_can_be_kept_for_the_next_summoner() {
    let port = free_port();
    let mut summoner = Summoner::with(&unit("www", port, "idle = \"1h\""));
    let address = summoner.address("www.example.org");
    assert_eq!(curl(&format!("http://{address}:{port}/")), "request 1\n");
    summoner.say(&["down", "--keep"]);
    summoner.ended();
    assert_eq!(curl(&format!("http://{address}:{port}/")), "request 2\n");
    // A unit that is no longer wanted ends.
    summoner.configure(&unit("other", free_port(), ""));
    summoner.start(&["--forward", "none"]);
    summoner.no_instance_is_left();
    summoner.down();
}

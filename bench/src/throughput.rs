//! redis and nginx under load, the same binaries natively and as unikernels.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use kiln_tests::{Kiln, free_port, need, run};

use crate::{
    sample::Sample,
    server::{self, Server},
};

/// A client's run may take that long.
const LIMIT: Duration = Duration::from_secs(300);
/// The ways onto the network that are compared with native.
pub const WAYS: [&str; 2] = ["socket", "direct"];

/// What redis gets, natively and in an image.
pub const REDIS_ARGUMENTS: [&str; 6] =
    ["--save", "", "--appendonly", "no", "--protected-mode", "no"];

/// Compares redis, without and with pipelining.
pub fn redis(rounds: u32) {
    need("redis-benchmark");
    let kiln = Kiln::new();
    let image = redis_image(&kiln);
    let mut table = Table::default();
    for _ in 0..rounds {
        let port = free_port();
        let mut native = Command::new("/usr/bin/redis-server");
        native
            .args(REDIS_ARGUMENTS)
            .args(["--port", &port.to_string()]);
        let mut server = Server::start(&mut native, port);
        answered(&mut server, b"PING\r\n");
        redis_round(port, "native", &mut table);
        drop(server);
        for way in WAYS {
            let port = free_port();
            let mut command =
                server::unikernel(&kiln, "process", &["--net", way], port, 6379, &image);
            command.arg("--").args(REDIS_ARGUMENTS);
            let mut server = Server::start(&mut command, port);
            answered(&mut server, b"PING\r\n");
            redis_round(port, way, &mut table);
        }
    }
    table.print("requests a second");
}

fn redis_round(port: u16, way: &'static str, table: &mut Table) {
    for pipeline in ["1", "16"] {
        let outcome = run(
            Command::new("redis-benchmark").args([
                "-p",
                &port.to_string(),
                "-t",
                "get,set",
                "-c",
                "50",
                "-n",
                "200000",
                "-P",
                pipeline,
                "--csv",
            ]),
            LIMIT,
        );
        for line in outcome.output.lines() {
            let mut fields = line.split(',').map(|field| field.trim_matches('"'));
            if let (Some(test @ ("GET" | "SET")), Some(Ok(rate))) =
                (fields.next(), fields.next().map(str::parse::<f64>))
            {
                table.push(format!("{test} -P {pipeline}"), way, rate);
            }
        }
    }
}

/// An image of Debian's redis.
pub fn redis_image(kiln: &Kiln) -> PathBuf {
    need("redis-server");
    kiln.build(Path::new("/usr/bin/redis-server"))
}

/// Compares nginx with a small and a larger file.
pub fn nginx(rounds: u32) {
    need("wrk");
    let kiln = Kiln::new();
    let folder = nginx_folder(&kiln);
    let image = kiln.build(&folder);
    let mut table = Table::default();
    for _ in 0..rounds {
        let port = free_port();
        let configuration = kiln.folder().join("native.conf");
        fs::write(
            &configuration,
            nginx_configuration(port, &folder.join("www")),
        )
        .expect("a configuration");
        let mut native = Command::new("/usr/sbin/nginx");
        native.args(["-e", "stderr", "-c"]).arg(&configuration);
        let mut server = Server::start(&mut native, port);
        answered(&mut server, SMALL_FILE);
        nginx_round(port, "native", &mut table);
        drop(server);
        for way in WAYS {
            let port = free_port();
            let mut command =
                server::unikernel(&kiln, "process", &["--net", way], port, 80, &image);
            let mut server = Server::start(&mut command, port);
            answered(&mut server, SMALL_FILE);
            nginx_round(port, way, &mut table);
        }
    }
    table.print("requests a second");
}

/// A request for the small file.
pub const SMALL_FILE: &[u8] = b"GET /1k HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

fn nginx_round(port: u16, way: &'static str, table: &mut Table) {
    for file in ["1k", "100k"] {
        let outcome = run(
            Command::new("wrk").args([
                "-t1",
                "-c50",
                "-d5s",
                &format!("http://127.0.0.1:{port}/{file}"),
            ]),
            LIMIT,
        );
        if outcome.output.contains("Non-2xx") {
            eprintln!("{way} /{file}: wrong answers\n{}", outcome.output);
        }
        let rate = outcome.output.lines().find_map(|line| {
            line.strip_prefix("Requests/sec:")?
                .trim()
                .parse::<f64>()
                .ok()
        });
        table.push(format!("/{file}"), way, rate.unwrap_or(0.0));
    }
}

/// A project with Debian's nginx, its configuration and two files.
pub fn nginx_folder(kiln: &Kiln) -> PathBuf {
    need("nginx");
    let folder = kiln.folder().join("nginx");
    fs::create_dir_all(folder.join("www")).expect("a folder");
    fs::write(folder.join("www/1k"), [b'x'; 1 << 10]).expect("a file");
    fs::write(folder.join("www/100k"), [b'x'; 100 << 10]).expect("a file");
    fs::write(
        folder.join("nginx.conf"),
        nginx_configuration(80, Path::new("/srv/www")),
    )
    .expect("a configuration");
    let project = "name = \"nginx\"\nprogram = \"/usr/sbin/nginx\"\n\
        arguments = [\"-e\", \"stderr\", \"-c\", \"/etc/nginx.conf\"]\nports = [80]\n\
        include = [\"nginx.conf:/etc/nginx.conf\", \"www:/srv/www\"]\n";
    fs::write(folder.join("kiln.toml"), project).expect("a project");
    folder
}

fn nginx_configuration(port: u16, root: &Path) -> String {
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|name| format!("  {name}_temp_path /tmp/kiln-bench-{name};\n"))
        .collect();
    format!(
        "daemon off;\nmaster_process off;\nuser root;\npid /tmp/kiln-bench-nginx.pid;\nerror_log stderr;\n\
         events {{ worker_connections 1024; }}\nhttp {{\n  access_log off;\n  sendfile off;\n  keepalive_requests 1000000;\n\
         {temporary}  server {{ listen {port}; root {}; }}\n}}\n",
        root.display()
    )
}

fn answered(server: &mut Server, request: &[u8]) {
    assert!(
        server.first_byte(request).is_some(),
        "the server on port {} does not answer",
        server.port
    );
}

/// Values by what was measured and the way it ran.
#[derive(Default)]
struct Table(Vec<(String, &'static str, Sample)>);

impl Table {
    fn push(&mut self, what: String, way: &'static str, value: f64) {
        match self
            .0
            .iter_mut()
            .find(|(known, by, _)| *known == what && *by == way)
        {
            Some((_, _, sample)) => sample.push(value),
            None => {
                let mut sample = Sample::default();
                sample.push(value);
                self.0.push((what, way, sample));
            }
        }
    }

    fn print(&self, unit: &str) {
        let native = |what: &str| {
            self.0
                .iter()
                .find(|(known, way, _)| known == what && *way == "native")
                .map_or(f64::NAN, |(_, _, sample)| sample.median())
        };
        for (what, way, sample) in &self.0 {
            let ratio = sample.median() / native(what);
            println!(
                "{what:10} {way:7} ratio {ratio:.2}  {}",
                sample.describe(unit)
            );
        }
    }
}

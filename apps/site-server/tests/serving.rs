//! The site server as clients see it: driven with the real curl, and byte by byte where curl is too well-behaved.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::{fs::symlink, process::ExitStatusExt as _},
    path::Path,
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(20);

struct Server {
    process: Child,
    output: BufReader<ChildStdout>,
    address: SocketAddr,
    /// Parent of the root, so that there is something outside it.
    folder: TempDir,
}

impl Server {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fill(&root);
        fs::write(folder.path().join("secret.txt"), "secret").unwrap();
        symlink("../secret.txt", root.join("escape.txt")).unwrap();
        symlink("/etc", root.join("etc")).unwrap();
        symlink("style.css", root.join("linked.css")).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_kiln-site-server"))
            .args(["--listen", "127.0.0.1:0", "--root"])
            .arg(&root)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let address = line
            .trim()
            .strip_prefix("listening on http://")
            .unwrap_or_else(|| panic!("unexpected first line {line:?}"))
            .parse()
            .unwrap();
        Self {
            process,
            output,
            address,
            folder,
        }
    }

    /// Runs curl for a path. `--path-as-is` keeps it from tidying the path up.
    fn curl(&self, path: &str, options: &[&str]) -> Reply {
        let output = Command::new("curl")
            .args([
                "--silent",
                "--show-error",
                "--include",
                "--path-as-is",
                "--max-time",
                "20",
            ])
            .args(options)
            .arg(format!("http://{}{path}", self.address))
            .output()
            .expect("curl is needed: apt-get install curl");
        assert!(
            output.status.success(),
            "curl {path} {options:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let split = output
            .stdout
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .unwrap();
        let head = String::from_utf8(output.stdout[..split].to_vec()).unwrap();
        let (status, headers) = head.split_once("\r\n").unwrap();
        Reply {
            status: status.split(' ').nth(1).unwrap().parse().unwrap(),
            headers: headers.to_ascii_lowercase(),
            body: output.stdout[split + 4..].to_vec(),
        }
    }

    fn get(&self, path: &str) -> Reply {
        self.curl(path, &[])
    }

    fn root(&self) -> std::path::PathBuf {
        self.folder.path().join("root")
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args(["-s", name, &self.process.id().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

struct Reply {
    status: u16,
    /// In lower case.
    headers: String,
    body: Vec<u8>,
}

impl Reply {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .lines()
            .filter_map(|line| line.split_once(": "))
            .find_map(|(key, value)| (key == name).then_some(value))
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

fn fill(root: &Path) {
    let file = |path: &str, content: &[u8]| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    file("index.html", b"<h1>home</h1>");
    file("about/index.html", b"<h1>about</h1>");
    file("contact.html", b"<h1>contact</h1>");
    file("404.html", b"<h1>not here</h1>");
    file("style.css", b"body { color: black }");
    file("style.css.gz", b"pretend gzip");
    file("style.css.br", b"pretend brotli");
    file("picture.png", b"\x89PNG");
    file("with space é.txt", b"space");
    file("empty/other.txt", b"no index here");
    file(".hidden", b"hidden");
    let large: Vec<u8> = (0..3_000_000_u32)
        .map(|index| (index % 251) as u8)
        .collect();
    file("large.bin", &large);
}

#[test]
fn clean_urls() {
    let server = Server::start();
    for (path, body) in [
        ("/", "<h1>home</h1>"),
        ("/index.html", "<h1>home</h1>"),
        ("/about", "<h1>about</h1>"),
        ("/about/", "<h1>about</h1>"),
        ("/about?from=home", "<h1>about</h1>"),
        ("/contact", "<h1>contact</h1>"),
        ("/contact/", "<h1>contact</h1>"),
        ("/contact.html", "<h1>contact</h1>"),
        ("/with%20space%20%C3%A9.txt", "space"),
        ("/linked.css", "body { color: black }"),
    ] {
        let reply = server.get(path);
        assert_eq!((reply.status, reply.text()), (200, body), "{path}");
    }
}

#[test]
fn content_types() {
    let server = Server::start();
    for (path, kind) in [
        ("/about/", "text/html; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/picture.png", "image/png"),
        ("/large.bin", "application/octet-stream"),
    ] {
        assert_eq!(
            server.get(path).header("content-type"),
            Some(kind),
            "{path}"
        );
    }
}

#[test]
fn a_missing_page_gives_the_sites_own_page() {
    let server = Server::start();
    for path in [
        "/nothing",
        "/nothing/",
        "/empty",
        "/empty/",
        "/style.css/",
        "/.hidden",
    ] {
        let reply = server.get(path);
        assert_eq!(
            (reply.status, reply.text()),
            (404, "<h1>not here</h1>"),
            "{path}"
        );
    }
    fs::remove_file(server.root().join("404.html")).unwrap();
    let reply = server.get("/nothing");
    assert_eq!((reply.status, reply.text()), (404, "404 Not Found\n"));
}

#[test]
fn nothing_outside_the_root() {
    let server = Server::start();
    for path in [
        "/../secret.txt",
        "/about/../../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/escape.txt",
        "/etc/passwd",
        "/etc",
        "//etc/passwd",
    ] {
        let reply = server.get(path);
        assert_eq!(
            (reply.status, reply.text()),
            (404, "<h1>not here</h1>"),
            "{path}"
        );
    }
    assert_eq!(server.get("/a%00b").status, 400);
}

#[test]
fn a_named_pipe_does_not_stop_the_server() {
    let server = Server::start();
    let status = Command::new("mkfifo")
        .arg(server.root().join("pipe"))
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(server.get("/pipe").status, 404);
}

#[test]
fn conditional_requests() {
    let server = Server::start();
    let first = server.get("/style.css");
    let tag = first.header("etag").unwrap().to_owned();
    let modified = first.header("last-modified").unwrap().to_owned();
    let same = server.curl("/style.css", &["-H", &format!("If-None-Match: {tag}")]);
    assert_eq!((same.status, same.text()), (304, ""));
    assert_eq!(same.header("etag"), Some(tag.as_str()));
    // Lower-cased by the helper; the names of days and months must have their case.
    let modified = capitals(&modified);
    let same = server.curl(
        "/style.css",
        &["-H", &format!("If-Modified-Since: {modified}")],
    );
    assert_eq!(same.status, 304);
    fs::write(server.root().join("style.css"), "body { color: white }").unwrap();
    let changed = server.curl("/style.css", &["-H", &format!("If-None-Match: {tag}")]);
    assert_eq!(
        (changed.status, changed.text()),
        (200, "body { color: white }")
    );
    let changed = server.curl("/style.css", &["-H", &format!("If-Match: {tag}")]);
    assert_eq!(changed.status, 412);
}

fn capitals(date: &str) -> String {
    let words: Vec<String> = date
        .split(' ')
        .map(|word| {
            if word == "gmt" {
                return "GMT".to_owned();
            }
            let (first, rest) = word.split_at(1);
            first.to_ascii_uppercase() + rest
        })
        .collect();
    words.join(" ")
}

#[test]
fn ranges() {
    let server = Server::start();
    let large = fs::read(server.root().join("large.bin")).unwrap();
    let size = large.len();
    for (range, start, end) in [
        ("0-0", 0, 1),
        ("100000-2000000", 100_000, 2_000_001),
        ("2999990-", 2_999_990, size),
        ("-70000", size - 70_000, size),
        ("5-99999999", 5, size),
    ] {
        let reply = server.curl("/large.bin", &["--range", range]);
        assert_eq!(reply.status, 206, "{range}");
        assert!(reply.body == large[start..end], "{range}: other bytes");
        let expected = format!("bytes {start}-{}/{size}", end - 1);
        assert_eq!(reply.header("content-range"), Some(expected.as_str()));
    }
    let reply = server.curl("/large.bin", &["--range", "3000000-"]);
    assert_eq!(reply.status, 416);
    assert_eq!(reply.header("content-range"), Some("bytes */3000000"));
    let tag = server
        .curl("/large.bin", &["--head"])
        .header("etag")
        .unwrap()
        .to_owned();
    let with = |tag: &str| {
        server
            .curl(
                "/large.bin",
                &["--range", "0-9", "-H", &format!("If-Range: {tag}")],
            )
            .status
    };
    assert_eq!(with(&tag), 206);
    assert_eq!(with("\"other\""), 200);
}

#[test]
fn precompressed_files() {
    let server = Server::start();
    let reply = server.curl("/style.css", &["-H", "Accept-Encoding: gzip, br"]);
    assert_eq!(reply.text(), "pretend brotli");
    assert_eq!(reply.header("content-encoding"), Some("br"));
    assert_eq!(
        reply.header("content-type"),
        Some("text/css; charset=utf-8")
    );
    assert_eq!(reply.header("vary"), Some("accept-encoding"));
    let other = server.curl("/style.css", &["-H", "Accept-Encoding: gzip"]);
    assert_eq!(other.text(), "pretend gzip");
    assert_ne!(other.header("etag"), reply.header("etag"));
    let plain = server.get("/style.css");
    assert_eq!(plain.text(), "body { color: black }");
    assert_eq!(plain.header("content-encoding"), None);
    assert_eq!(plain.header("vary"), Some("accept-encoding"));
    assert_eq!(server.get("/picture.png").header("vary"), None);
}

#[test]
fn head_is_get_without_the_body() {
    let server = Server::start();
    for path in ["/", "/large.bin", "/nothing"] {
        let get = server.get(path);
        let head = server.curl(path, &["--head"]);
        assert_eq!(head.status, get.status);
        assert!(head.body.is_empty());
        for name in ["content-length", "content-type", "etag", "last-modified"] {
            assert_eq!(head.header(name), get.header(name), "{path}: {name}");
        }
    }
}

#[test]
fn other_methods_are_refused() {
    let server = Server::start();
    for method in ["POST", "PUT", "DELETE", "BREW"] {
        let reply = server.curl("/", &["-X", method, "--data", "x"]);
        assert_eq!(reply.status, 405, "{method}");
        assert_eq!(reply.header("allow"), Some("get, head"));
    }
}

#[test]
fn caching() {
    let server = Server::start();
    assert_eq!(server.get("/").header("cache-control"), Some("no-cache"));
    assert_eq!(
        server.get("/picture.png").header("cache-control"),
        Some("public, max-age=3600")
    );
}

#[test]
fn large_files_are_whole() {
    let server = Server::start();
    let large = fs::read(server.root().join("large.bin")).unwrap();
    let reply = server.get("/large.bin");
    assert_eq!(reply.status, 200);
    assert!(reply.body == large, "other bytes");
}

#[test]
fn one_connection_serves_many_requests() {
    let server = Server::start();
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    // Two at once, then the last, which asks to close.
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nHEAD /about HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    stream
        .write_all(b"GET /contact HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 3, "{text}");
    assert!(text.ends_with("<h1>contact</h1>"), "{text}");
}

#[test]
fn a_request_names_one_host() {
    let server = Server::start();
    for (request, status) in [
        ("GET / HTTP/1.1\r\nConnection: close\r\n\r\n", "400"),
        (
            "GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\nConnection: close\r\n\r\n",
            "400",
        ),
        (
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            "200",
        ),
        ("GET / HTTP/1.0\r\n\r\n", "200"),
    ] {
        let mut stream = TcpStream::connect(server.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text.split(' ').nth(1), Some(status), "{request}: {text}");
    }
}

#[test]
fn one_line_of_log_a_request() {
    let mut server = Server::start();
    server.get("/about?a=b");
    server.get("/nothing");
    server.signal("TERM");
    assert!(server.wait().success());
    let mut log = String::new();
    server.output.read_to_string(&mut log).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), 2, "{log}");
    assert!(lines[0].starts_with("127.0.0.1 - - ["), "{log}");
    assert!(
        lines[0].ends_with("] \"GET /about?a=b HTTP/1.1\" 200 14"),
        "{log}"
    );
    assert!(
        lines[1].ends_with("] \"GET /nothing HTTP/1.1\" 404 17"),
        "{log}"
    );
}

#[test]
fn sigterm_lets_requests_in_flight_finish() {
    let mut server = Server::start();
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
        .write_all(b"GET /large.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut start = [0; 1000];
    stream.read_exact(&mut start).unwrap();
    // Most of the file is still to come: it does not fit the socket's buffers.
    server.signal("TERM");
    let end = Instant::now() + DEADLINE;
    while TcpStream::connect(server.address).is_ok() {
        assert!(Instant::now() < end, "still accepts connections");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    let head = start
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .unwrap()
        + 4;
    assert_eq!(start.len() - head + rest.len(), 3_000_000);
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn sigterm_closes_idle_connections() {
    let mut server = Server::start();
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
        .write_all(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut first = [0; 12];
    stream.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    server.signal("TERM");
    let status = server.wait();
    assert_eq!((status.code(), status.signal()), (Some(0), None));
}

#[test]
fn wrong_starts_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_str().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().to_string();
    for (arguments, code, message) in [
        (
            vec!["--root", "/nowhere/at/all"],
            1,
            "cannot open /nowhere/at/all",
        ),
        (
            vec!["--root", root, "--listen", &taken],
            1,
            "cannot listen on",
        ),
        (vec!["--listen", "80"], 2, "--listen 80: not an address"),
        (vec!["--wrong"], 2, "--wrong"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_kiln-site-server"))
            .args(&arguments)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(message), "{arguments:?}: {text}");
    }
}

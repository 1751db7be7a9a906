//! Ports that several units share: told apart by Host header and TLS server name, with curl and openssl as clients.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use kiln_tests::{Kiln, Outcome, eventually, free_port, need, run, wait};

const LIMIT: Duration = Duration::from_secs(120);
/// Bytes of a download that takes a while.
const LARGE: u32 = 12_000_000;

/// A summoner in the background, which ends with the test.
struct Summoner<'k> {
    kiln: &'k Kiln,
}

impl<'k> Summoner<'k> {
    fn start(kiln: &'k Kiln, configuration: &str) -> Self {
        fs::write(Self::file(kiln), configuration).expect("a file");
        kiln.succeed(["summon", "-d", text(&Self::file(kiln))]);
        Self { kiln }
    }

    fn file(kiln: &Kiln) -> PathBuf {
        kiln.folder().join("summon.toml")
    }

    fn reload(&self, configuration: &str) {
        fs::write(Self::file(self.kiln), configuration).expect("a file");
        self.kiln.succeed(["summon", "reload"]);
    }
}

impl Drop for Summoner<'_> {
    fn drop(&mut self) {
        let outcome = run(&mut self.kiln.command(["summon", "down"]), LIMIT);
        if outcome.code() != 0 {
            eprintln!("cannot end the summoner: {outcome}");
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the path is text")
}

/// A folder with a page that says its name, and a large file.
fn site(kiln: &Kiln, name: &str) {
    let folder = kiln.folder().join(name);
    fs::create_dir_all(&folder).expect("a folder");
    fs::write(folder.join("index.html"), format!("this is {name}")).expect("a file");
    let large: Vec<u8> = (0..LARGE).map(|index| (index % 251) as u8).collect();
    fs::write(folder.join("large.bin"), large).expect("a file");
}

fn certificate(kiln: &Kiln, stem: &str, names: &[&str]) -> PathBuf {
    need("openssl");
    let file = |end: &str| kiln.folder().join(format!("{stem}.{end}"));
    let names: Vec<String> = names.iter().map(|name| format!("DNS:{name}")).collect();
    let outcome = run(
        Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "7"])
            .args([
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-subj",
                "/CN=kiln",
            ])
            .args(["-addext", &format!("subjectAltName={}", names.join(","))])
            .arg("-out")
            .arg(file("pem"))
            .arg("-keyout")
            .arg(file("key")),
        LIMIT,
    );
    assert_eq!(outcome.code(), 0, "{outcome}");
    file("pem")
}

/// nginx, which speaks TLS itself at port 443, and at both ports says who its client is.
fn nginx(kiln: &Kiln) {
    need("nginx");
    certificate(kiln, "nginx", &["n.test"]);
    let project = kiln.folder().join("nginx");
    fs::create_dir_all(&project).expect("a folder");
    for end in ["pem", "key"] {
        let name = format!("nginx.{end}");
        fs::copy(kiln.folder().join(&name), project.join(&name)).expect("a copy");
    }
    fs::write(
        project.join("nginx.conf"),
        "daemon off;\nmaster_process off;\nuser root;\npid /tmp/nginx.pid;\nerror_log stderr;\nevents { }\n\
         http {\n  access_log off;\n  client_body_temp_path /tmp/body;\n  proxy_temp_path /tmp/proxy;\n\
         \x20 fastcgi_temp_path /tmp/fastcgi;\n  uwsgi_temp_path /tmp/uwsgi;\n  scgi_temp_path /tmp/scgi;\n\
         \x20 server {\n    listen 80; listen 443 ssl;\n    ssl_certificate /etc/nginx.pem; ssl_certificate_key /etc/nginx.key;\n\
         \x20   location / { return 200 \"$server_port $remote_addr $ssl_server_name\"; }\n  }\n}\n",
    )
    .expect("a file");
    fs::write(
        project.join("kiln.toml"),
        "program = \"/usr/sbin/nginx\"\narguments = [\"-e\", \"stderr\", \"-c\", \"/etc/nginx.conf\"]\nports = [80, 443]\n\
         include = [\"nginx.conf:/etc/nginx.conf\", \"nginx.pem:/etc/nginx.pem\", \"nginx.key:/etc/nginx.key\"]\n",
    )
    .expect("a file");
}

/// curl for a name whose address is the front's.
fn curl(scheme: &str, name: &str, port: u16, path: &str) -> Command {
    need("curl");
    let mut command = Command::new("curl");
    command
        .args(["--silent", "--show-error", "--max-time", "60", "--resolve"])
        .arg(format!("{name}:{port}:127.0.0.1"))
        .arg(format!("{scheme}://{name}:{port}{path}"))
        .stdin(Stdio::null());
    command
}

fn body(command: &mut Command) -> String {
    let outcome = run(command, LIMIT);
    assert_eq!(outcome.code(), 0, "{command:?}\n{outcome}");
    outcome.output
}

fn status(command: &mut Command) -> String {
    body(command.args(["--output", "/dev/null", "--write-out", "%{http_code}"]))
}

fn running(kiln: &Kiln) -> Vec<String> {
    let mut names: Vec<String> = kiln
        .succeed(["ps", "-q"])
        .lines()
        .map(str::to_owned)
        .collect();
    names.sort();
    names
}

/// A download that has begun and takes some seconds.
struct Download {
    curl: Child,
    file: PathBuf,
}

impl Download {
    fn begin(mut curl: Command, file: PathBuf) -> Self {
        let child = curl
            .args(["--limit-rate", "4M", "--output"])
            .arg(&file)
            .spawn()
            .expect("curl starts");
        let download = Self { curl: child, file };
        eventually("the first bytes", || (download.length() > 0).then_some(()));
        assert!(download.length() < u64::from(LARGE));
        download
    }

    fn length(&self) -> u64 {
        fs::metadata(&self.file).map_or(0, |metadata| metadata.len())
    }

    fn finish(mut self, original: &Path) {
        let ended = wait(&mut self.curl, LIMIT).expect("the download ends");
        assert!(ended.success(), "{ended}");
        let (got, expected) = (fs::read(&self.file), fs::read(original));
        assert!(
            got.expect("a file") == expected.expect("a file"),
            "other bytes"
        );
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        let _ = self.curl.kill();
        let _ = self.curl.wait();
    }
}

fn openssl_client(port: u16, words: &[&str]) -> Outcome {
    run(
        Command::new("openssl")
            .args(["s_client", "-connect", &format!("127.0.0.1:{port}")])
            .args(words)
            .stdin(Stdio::null()),
        LIMIT,
    )
}

#[test]
fn units_share_a_port_by_host_header() {
    let kiln = Kiln::new();
    let (dns, web, other) = (free_port(), free_port(), free_port());
    site(&kiln, "a");
    site(&kiln, "b");
    let head = format!(
        "listen = \"127.0.0.1:{dns}\"\nforward = \"none\"\n\
         [front.web]\nlisten = [\"127.0.0.1:{web}\"]\nprotocol = \"http\"\n"
    );
    let a =
        "[unit.a]\ndns = [\"a.test\"]\nsource = \"a\"\nengine = \"process\"\nfront = [\"web\"]\n";
    let b = "[unit.b]\ndns = [\"b.test\", \"*.b.test\"]\nsource = \"b\"\nengine = \"process\"\nfront = [\"web\"]\n";
    let summoner = Summoner::start(&kiln, &format!("{head}{a}{b}"));
    assert!(running(&kiln).is_empty());

    // The client waits while its unit starts, and only that one does.
    assert_eq!(body(&mut curl("http", "a.test", web, "/")), "this is a");
    assert_eq!(running(&kiln), ["a"]);
    assert_eq!(body(&mut curl("http", "x.B.test", web, "/")), "this is b");
    assert_eq!(body(&mut curl("http", "b.test", web, "/")), "this is b");
    assert_eq!(running(&kiln), ["a", "b"]);
    // By the target, before the header (RFC 9112, section 3.2.2).
    let mut absolute = curl("http", "a.test", web, "/");
    absolute.args(["--request-target", "http://b.test/"]);
    assert_eq!(body(&mut absolute), "this is b");

    for (words, expected) in [
        (&["--header", "Host: c.test"][..], "404"),
        (&["--header", "Host: c.test", "--head"], "404"),
        (&["--http1.0", "--header", "Host:"], "400"),
        (&["--http2-prior-knowledge"], "000"),
    ] {
        let mut command = curl("http", "a.test", web, "/");
        command
            .args(words)
            .args(["--output", "/dev/null", "--write-out", "%{http_code}"]);
        assert_eq!(run(&mut command, LIMIT).output, expected, "{words:?}");
    }

    // A reload with other fronts and other units.
    let download = Download::begin(
        curl("http", "a.test", web, "/large.bin"),
        kiln.folder().join("download"),
    );
    let moved = head.replace(&format!(":{web}"), &format!(":{other}"));
    let c = b.replace("b.test", "c.test");
    summoner.reload(&format!("{moved}{a}{c}"));
    assert_eq!(body(&mut curl("http", "a.test", other, "/")), "this is a");
    assert_eq!(body(&mut curl("http", "c.test", other, "/")), "this is b");
    assert_eq!(status(&mut curl("http", "b.test", other, "/")), "404");
    // Nobody listens any more (curl's 7).
    assert_eq!(run(&mut curl("http", "a.test", web, "/"), LIMIT).code(), 7);
    download.finish(&kiln.folder().join("a/large.bin"));
    drop(summoner);
    assert!(running(&kiln).is_empty());
}

#[test]
fn units_share_a_port_by_server_name() {
    let kiln = Kiln::new();
    let (dns, pass, secure) = (free_port(), free_port(), free_port());
    site(&kiln, "a");
    nginx(&kiln);
    let shared = certificate(&kiln, "shared", &["n.test", "*.n.test"]);
    let own = certificate(&kiln, "own", &["a.test"]);
    let configuration = format!(
        "listen = \"127.0.0.1:{dns}\"\nforward = \"none\"\n\
         [front.pass]\nlisten = [\"127.0.0.1:{pass}\"]\nprotocol = \"tls\"\n\
         [front.secure]\nlisten = [\"127.0.0.1:{secure}\"]\nprotocol = \"https\"\n\
         certificate = \"shared.pem\"\nkey = \"shared.key\"\n\
         [unit.n]\ndns = [\"n.test\"]\nsource = \"nginx\"\nengine = \"process\"\nfront = [\"pass\", \"secure\"]\n\
         [unit.a]\ndns = [\"a.test\"]\nsource = \"a\"\nengine = \"process\"\nfront = [\"secure\"]\n\
         certificate = \"own.pem\"\nkey = \"own.key\"\n"
    );
    // The key of another certificate is found before anything is opened.
    fs::write(
        Summoner::file(&kiln),
        configuration.replace("\"own.key\"", "\"shared.key\""),
    )
    .expect("a file");
    let mut command = kiln.command(["summon", text(&Summoner::file(&kiln))]);
    let outcome = run(&mut command, LIMIT);
    assert_ne!(outcome.code(), 0);
    for word in ["unit 'a'", "shared.key", "own.pem", "does not belong"] {
        assert!(outcome.errors.contains(word), "{word}: {outcome}");
    }

    let summoner = Summoner::start(&kiln, &configuration);
    assert!(running(&kiln).is_empty());
    // Passed through: the unit's own certificate, and the client's address.
    let mut passed = curl("https", "n.test", pass, "/");
    passed.args(["--interface", "127.0.0.9", "--cacert"]);
    passed.arg(kiln.folder().join("nginx.pem"));
    assert_eq!(body(&mut passed), "443 127.0.0.9 n.test");
    assert_eq!(running(&kiln), ["n"]);
    // Ended here: the front's certificate, plain HTTP behind it, and still the client's address.
    let mut ended = curl("https", "n.test", secure, "/");
    ended
        .args(["--interface", "127.0.0.9", "--cacert"])
        .arg(&shared);
    assert_eq!(body(&mut ended), "80 127.0.0.9 ");
    assert_eq!(running(&kiln), ["n"]);
    // And with the unit's own, after a cold start.
    let secured = |path: &str| {
        let mut command = curl("https", "a.test", secure, path);
        command.arg("--cacert").arg(&own);
        command
    };
    let mut versioned = secured("/");
    versioned.args(["--write-out", " %{http_version}"]);
    assert_eq!(body(&mut versioned), "this is a 1.1");
    assert_eq!(running(&kiln), ["a", "n"]);

    for port in [pass, secure] {
        for words in [&["-servername", "none.test"][..], &["-noservername"]] {
            let outcome = openssl_client(port, words);
            assert_ne!(outcome.code(), 0);
            assert!(
                outcome.errors.contains("unrecognized name"),
                "{words:?}: {outcome}"
            );
        }
    }
    let old = openssl_client(secure, &["-servername", "a.test", "-tls1_2"]);
    assert!(old.output.contains("TLSv1.2"), "{old}");

    // A front that goes takes no connection with it.
    let download = Download::begin(secured("/large.bin"), kiln.folder().join("download"));
    let gone = free_port();
    summoner.reload(&configuration.replace(&format!(":{secure}"), &format!(":{gone}")));
    assert_eq!(run(&mut secured("/"), LIMIT).code(), 7);
    download.finish(&kiln.folder().join("a/large.bin"));
    drop(summoner);
    assert!(running(&kiln).is_empty());
}

use std::fs;

use proptest::prelude::*;

use super::*;

const PATH: &str = "/etc/kiln/summon.toml";

fn parsed(text: &str) -> Result<Configuration, Problems> {
    Configuration::parse(text, Path::new(PATH), &Machine::anything())
}

/// All problems without the file's directory.
fn problems_on(text: &str, machine: &Machine) -> Vec<String> {
    let problems = Configuration::parse(text, Path::new("summon.toml"), machine).expect_err(text);
    problems.list.iter().map(ToString::to_string).collect()
}

fn problems(text: &str) -> Vec<String> {
    problems_on(text, &Machine::anything())
}

/// The only problem.
fn problem(text: &str) -> String {
    let all = problems(text);
    assert_eq!(all.len(), 1, "{all:#?}");
    all.into_iter().next().unwrap_or_default()
}

/// A unit with more keys.
fn unit(keys: &str) -> String {
    format!("[unit.www]\ndns = \"www.example.org\"\nsource = \"site\"\nports = \"80\"\n{keys}")
}

const EVERYTHING: &str = r#"
listen = ["127.0.0.1:5353", "::1"]
forward = ["192.0.2.1", "[2001:db8::1]:5353"]
forward_for = ["127.0.0.0/8", "10.0.0.1"]
zones = ["Example.org."]
ttl = 30
pool = "127.80.0.0/16"
pool6 = "fd00:1::/64"
metrics = "127.0.0.1:9153"
max_running = 200
max_memory = "4G"

[front.web]
listen = ["127.0.0.9"]
protocol = "http"
[front.tls]
listen = "127.0.0.9"
protocol = "tls"
[front.secure]
listen = "127.0.0.10:8443"
protocol = "https"
certificate = "cert.pem"
key = "/keys/key.pem"

[unit.www]
dns = ["WWW.example.org", "www.example.org.", "*.example.org"]
source = "./site"
arguments = ["--save", "", "--save", ""]
ports = [80, "53/udp", "8080:81", "9000-9001"]
address = "127.0.0.5"
address6 = "fd00::5"
ttl = 5
stop = "suspend"
grace = "3s"
answer = "ready"
ready = { http = "/health" }
ready_timeout = 5
min_running = 1
always = true
idle = "90s"
memory = "64M"
engine = "process"
net = "socket"
environment = { A = "b", C = "" }
volumes = ["./data:/data", "cache:/cache:ro", "/srv:/srv"]
workdir = "/srv"
user = 33
hostname = "web"
log = "net=debug"
include = ["conf", "/etc/hosts", "x:/y"]
rewrite = false

[unit.shop]
dns = "shop.example.org"
image = "shop"
front = ["web", "tls"]
front_port = 8080

[unit.plain]
dns = "plain.example.org"
source = "../plain"
front = ["secure"]
"#;

#[test]
fn all_keys_are_read() {
    let configuration = parsed(EVERYTHING).unwrap();
    assert_eq!(configuration.listen[1].to_string(), "[::1]:53");
    let Forward::To(servers) = &configuration.forward else {
        panic!("{:?}", configuration.forward);
    };
    assert_eq!(servers[0].to_string(), "192.0.2.1:53");
    assert_eq!(configuration.forward_for[1].to_string(), "10.0.0.1/32");
    assert_eq!(configuration.zones, ["example.org"]);
    assert_eq!(configuration.pool.to_string(), "127.80.0.0/16");
    assert_eq!(configuration.max_memory, Some(4 << 30));
    assert_eq!(configuration.fronts["web"].listen[0].port(), 80);
    assert_eq!(configuration.fronts["tls"].listen[0].port(), 443);
    assert_eq!(
        configuration.fronts["secure"].certificate.as_deref(),
        Some(Path::new("/etc/kiln/cert.pem"))
    );

    let www = &configuration.units["www"];
    assert_eq!(www.dns, ["www.example.org", "*.example.org"]);
    assert_eq!(www.source, Path::new("/etc/kiln/site"));
    assert_eq!(
        www.arguments.as_deref().unwrap(),
        ["--save", "", "--save", ""]
    );
    let port = |host, guest, protocol| UnitPort {
        host,
        guest,
        protocol,
    };
    assert_eq!(
        www.ports,
        [
            port(80, 80, Protocol::Tcp),
            port(53, 53, Protocol::Udp),
            port(8080, 81, Protocol::Tcp),
            port(9000, 9000, Protocol::Tcp),
            port(9001, 9001, Protocol::Tcp),
        ]
    );
    assert_eq!(
        (www.ttl, www.stop, www.answer),
        (5, Stop::Suspend, Answer::Ready)
    );
    assert_eq!(
        www.ready,
        Readiness::Http {
            path: "/health".into(),
            port: 80
        }
    );
    assert_eq!(www.ready_timeout, Duration::from_secs(5));
    assert_eq!(www.idle, Duration::from_secs(90));
    assert_eq!((www.min_running, www.always, www.rewrite), (1, true, false));
    assert_eq!(www.memory, Some(64 << 20));
    assert_eq!(www.user, Some(User { uid: 33, gid: 33 }));
    assert_eq!(www.volumes[0].host, Path::new("/etc/kiln/data"));
    assert_eq!(www.volumes[1].host, Path::new("cache"));
    assert!(www.volumes[1].read_only);
    assert_eq!(www.include[0].from, Path::new("/etc/kiln/conf"));
    assert_eq!(www.include[0].to.as_deref(), Some("/app/conf"));
    assert_eq!(
        (www.include[1].to.as_deref(), www.include[2].to.as_deref()),
        (None, Some("/y"))
    );

    let shop = &configuration.units["shop"];
    assert_eq!(shop.source, Path::new("shop"));
    assert_eq!(shop.arguments, None);
    assert_eq!((shop.ttl, shop.idle), (30, Duration::from_secs(60)));
    assert_eq!(shop.fronts[0].port, 8080);
    assert_eq!(
        configuration.fixed_addresses(shop).0,
        Some(Ipv4Addr::new(127, 0, 0, 9))
    );
    assert!(!configuration.needs_lease(shop) && !configuration.needs_lease6(shop));
    assert_eq!(configuration.units["plain"].fronts[0].port, 80);
    assert_eq!(
        configuration.units["plain"].source,
        Path::new("/etc/kiln/../plain")
    );
    let reserved: Vec<String> = configuration
        .reserved_addresses()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        reserved,
        [
            "127.0.0.1",
            "127.0.0.5",
            "127.0.0.9",
            "127.0.0.10",
            "::1",
            "fd00::5"
        ]
    );
}

#[test]
fn an_empty_file_is_a_name_server_on_loopback_and_units_have_defaults() {
    let empty = parsed("").unwrap();
    assert_eq!(empty.listen[0].to_string(), "127.0.0.1:53");
    assert_eq!(empty.pool.to_string(), DEFAULT_POOL);
    assert_eq!(empty.forward, Forward::System);
    let configuration = parsed(&unit("")).unwrap();
    let www = &configuration.units["www"];
    assert_eq!((www.ttl, www.idle), (60, Duration::from_secs(120)));
    assert_eq!(
        (www.stop, www.grace),
        (Stop::Shutdown, Duration::from_secs(10))
    );
    assert_eq!((www.answer, &www.ready), (Answer::AtOnce, &Readiness::Port));
    assert!(configuration.needs_lease(www) && !configuration.needs_lease6(www));
    assert!(configuration.remarks().is_empty());
    // Even then it is not stopped while its first answer is on its way.
    assert_eq!(
        parsed(&unit("ttl = 0")).unwrap().units["www"].idle,
        Duration::from_secs(1)
    );
}

#[test]
fn problems_name_line_key_and_remedy() {
    assert_eq!(
        problem("forwrad = \"none\""),
        "summon.toml:1:1: `forwrad`: unknown key (help: did you mean `forward`?)"
    );
    assert_eq!(
        problem(&unit("prots = [\"80\"]")),
        "summon.toml:5:1: `unit.www.prots`: unknown key (help: did you mean `ports`?)"
    );
    assert_eq!(
        problem(
            &unit("max-memory = \"1G\"\nmax_memory = \"1G\"").replace("max-memory = \"1G\"\n", "")
        ),
        "summon.toml:5:1: `unit.www.max_memory`: unknown key (help: `max_memory` belongs above all [front...] and [unit...] lines)"
    );
    assert_eq!(
        problem("\n\nttl = \"long\""),
        "summon.toml:3:7: `ttl`: expected a number, found a string"
    );
    assert_eq!(
        problem(&unit("memory = 64")),
        "summon.toml:5:10: `unit.www.memory`: the unit is missing (help: write it as \"64M\" or \"1G\")"
    );
    assert_eq!(
        problem(&unit("stop = \"supend\"")),
        "summon.toml:5:8: `unit.www.stop`: \"supend\" is unknown here (help: did you mean \"suspend\"? There are \"destroy\", \"shutdown\", \"suspend\")"
    );
    assert_eq!(
        problem("[unit.\"a/b\"]"),
        "summon.toml:1:7: `unit.a/b`: 'a/b' cannot be a name (help: use 1 to 63 letters, digits, '-', '_' and '.', beginning with a letter or digit)"
    );
    assert!(problem("ttl = 2147483648").contains("from 0 to 2147483647"));
    assert!(problem("listen = [").starts_with("summon.toml:1:"));
    assert!(problem("unit = 3").contains("tables such as [unit.web]"));
    assert!(problem("listen = []").contains("the list is empty"));
    assert!(problem("pool = \"127.0.0.0/31\"").contains("too small"));
    assert!(problem("pool = \"fd00::/64\"").contains("not a prefix"));
    assert!(problem("forward = [\"system\", \"192.0.2.1\"]").contains("exclude each other"));
    assert!(problem("forward = \"sytem\"").contains("\"system\", \"none\" or addresses"));
}

#[test]
fn all_problems_are_told_together_in_the_order_of_the_file() {
    let all = problems(
        "ttl = -1\npool = 3\n[unit.b]\nsource = \"x\"\nports = [\"80/sctp\", \"0\"]\n[unit.a]\ndns = [\"a b\", \"ok\"]\nports = []\nalways = 1\n",
    );
    let lines: Vec<&str> = all
        .iter()
        .map(|text| text.split(' ').next().unwrap())
        .collect();
    assert_eq!(
        lines,
        [
            "summon.toml:1:7:",
            "summon.toml:2:8:",
            "summon.toml:3:7:",
            "summon.toml:5:10:",
            "summon.toml:5:21:",
            "summon.toml:6:7:",
            "summon.toml:7:8:",
            "summon.toml:8:9:",
            "summon.toml:9:10:",
        ],
        "{all:#?}"
    );
    let many = problems(
        &(0..300)
            .map(|index| format!("x{index} = 1\n"))
            .collect::<String>(),
    );
    assert_eq!(many.len(), 100);
    let many = problems(&"= 1\n".repeat(300));
    assert_eq!(many.len(), 101);
    assert!(many[100].ends_with("more problems"), "{}", many[100]);
}

#[test]
fn times_and_readiness() {
    let ready = |text: &str| {
        parsed(&unit(&format!("ready = {text}"))).map(|all| all.units["www"].ready.clone())
    };
    assert_eq!(ready("\"port\"").unwrap(), Readiness::Port);
    assert_eq!(
        ready("{ line = \"Ready to accept\" }").unwrap(),
        Readiness::Line("Ready to accept".into())
    );
    assert_eq!(
        ready("{ delay = \"500ms\" }").unwrap(),
        Readiness::Delay(Duration::from_millis(500))
    );
    assert_eq!(
        ready("{ http = \"/\", port = 8080 }").unwrap(),
        Readiness::Http {
            path: "/".into(),
            port: 8080
        }
    );
    assert_eq!(
        ready("\"http:/health\"").unwrap(),
        Readiness::Http {
            path: "/health".into(),
            port: 80
        }
    );
    for text in [
        "{}",
        "\"soon\"",
        "3",
        "{ http = \"x\" }",
        "{ http = \"/a b\" }",
        "{ line = \"\" }",
        "{ line = \"a\", delay = 1 }",
        "{ line = \"a\", port = 1 }",
        "{ delay = \"2h\" }",
        "{ htp = \"/\" }",
    ] {
        let problems = ready(text).expect_err(text);
        assert!(
            problems.list[0].key.starts_with("unit.www.ready"),
            "{problems}"
        );
    }
    for key in [
        "grace = \"2h\"",
        "idle = 0",
        "ready_timeout = \"0s\"",
        "idle = 1.5",
        "grace = true",
    ] {
        assert!(parsed(&unit(key)).is_err(), "{key}");
    }
}

#[test]
fn units_must_not_get_in_each_others_way() {
    let two = |first: &str, second: &str| {
        format!(
            "[unit.a]\ndns = \"a\"\nsource = \"x\"\n{first}\n[unit.b]\ndns = \"b\"\nsource = \"x\"\n{second}"
        )
    };
    // A shared address with different ports or transports is fine.
    let fine = two(
        "ports = \"53/udp\"\naddress = \"127.0.0.5\"",
        "ports = [\"53\", \"54/udp\"]\naddress = \"127.0.0.5\"",
    );
    parsed(&fine).unwrap();
    let clash = two(
        "ports = \"80\"\naddress = \"127.0.0.5\"",
        "ports = [\"81\", \"80\"]\naddress = \"127.0.0.5\"",
    );
    assert!(
        problem(&clash).starts_with(
            "summon.toml:9:16: `unit.b.ports`: 127.0.0.5:80/tcp is taken by unit \"a\" already"
        ),
        "{}",
        problem(&clash)
    );
    let same_name = two("ports = \"80\"", "ports = \"80\"").replace("\"b\"", "[\"c\", \"A.\"]");
    assert!(
        problem(&same_name)
            .starts_with("summon.toml:6:13: `unit.b.dns`: the name a is also that of unit \"a\""),
        "{}",
        problem(&same_name)
    );
    let server = format!("listen = \"127.0.0.5\"\n{fine}");
    assert_eq!(problems(&server).len(), 2);
    let everywhere = format!("metrics = \"0.0.0.0:80\"\n{}", unit(""));
    assert!(problem(&everywhere).contains("port 80/tcp of all addresses is taken by the metrics"));
    let six = format!("metrics = \"[::]:80\"\n{}", unit("address = \"127.0.0.5\""));
    assert!(
        problem(&six).contains("[::]:80/tcp is taken by the metrics"),
        "{}",
        problem(&six)
    );
    parsed("listen = [\"0.0.0.0\", \"::\"]\nforward = \"none\"").unwrap();
    let both = "listen = [\"127.0.0.1\", \"0.0.0.0\"]";
    assert!(
        problem(both).starts_with("summon.toml:1:11: `listen`: 0.0.0.0:53/udp"),
        "{}",
        problem(both)
    );
    let twice = "listen = [\"127.0.0.1\", \"127.0.0.1:53\"]\nmetrics = \"127.0.0.1:53\"\n";
    assert!(
        problem(twice).starts_with("summon.toml:2:11: `metrics`"),
        "{}",
        problem(twice)
    );
    assert!(
        problem(&unit("").replace("\"80\"", "[\"80:1\", \"80:2\"]"))
            .contains("leads to 1 and to 2")
    );
}

#[test]
fn fronts() {
    let front = "[front.web]\nlisten = \"127.0.0.9\"\nprotocol = \"http\"\n";
    let behind = |keys: &str| format!("{front}[unit.a]\ndns = \"a\"\nsource = \"x\"\n{keys}");
    parsed(&behind("front = \"web\"")).unwrap();
    assert!(problem(&behind("front = \"wep\"")).contains("did you mean \"web\"?"));
    assert!(problem(&behind("")).contains("nothing leads to it"));
    assert!(problem(&behind("ports = \"1\"\nfront_port = 80")).contains("there is no front"));
    assert!(
        problem(&behind("front = \"web\"\naddress = \"127.0.0.8\""))
            .contains("does not listen at the unit's address 127.0.0.8")
    );
    assert!(problem(&behind("front = \"web\"\nports = \"80\"")).contains("taken by front \"web\""));
    assert!(
        problem(&behind("front = \"web\"").replace("127.0.0.9", "0.0.0.0"))
            .contains("listens on all addresses")
    );
    parsed(&behind("front = \"web\"\naddress = \"127.0.0.8\"").replace("127.0.0.9", "0.0.0.0"))
        .unwrap();
    assert!(
        problem(&behind("front = \"web\"").replace("\"http\"", "\"https\""))
            .contains("needs a certificate")
    );
    let own = behind("front = \"web\"\ncertificate = \"c\"\nkey = \"k\"")
        .replace("\"http\"", "\"https\"");
    parsed(&own).unwrap();
    assert!(problem(&own.replace("key = \"k\"", "")).contains("`key` is missing"));
    assert!(
        problem(&behind("ports = \"1\"\ncertificate = \"c\"\nkey = \"k\""))
            .contains("only units behind a front")
    );
    assert!(problem("[front.x]\nlisten = \"127.0.0.9\"\nprotocol = \"tls\"\ncertificate = \"a\"\nkey = \"b\"").contains("uses no certificate"));
    let all = problems("[front.x]\n");
    assert_eq!(all.len(), 2, "{all:?}");
}

#[test]
fn machines_and_ceilings() {
    assert!(
        problem(&unit("engine = \"qemu\"\nnet = \"socket\""))
            .contains("takes no sockets of the host")
    );
    assert!(problem(&unit("memory = \"1M\"")).contains("at least \"4M\""));
    assert!(
        problem(&format!(
            "max_memory = \"64M\"\n{}",
            unit("memory = \"128M\"")
        ))
        .contains("more than `max_memory`")
    );
    let always = format!(
        "max_running = 1\n{}\n{}",
        unit("always = true"),
        unit("min_running = 1").replace("www", "w2")
    );
    assert!(problem(&always).starts_with("summon.toml:1:15: `max_running`: 2 units"));
    let small = format!(
        "pool = \"127.3.0.0/30\"\n{}",
        (0..3)
            .map(|index| unit("\n").replace("www", &format!("w{index}")))
            .collect::<String>()
    );
    assert!(problem(&small).contains("3 units need an address, and 127.3.0.0/30 has 2 to give"));
    assert!(
        problem(&format!("interface = \"br0\"\n{}", unit(""))).contains("are loopback addresses")
    );
    assert!(
        problem("listen = \"127.0.0.1:5353\"\nforward = \"127.0.0.1:5353\"")
            .contains("this name server itself")
    );
    let open = parsed("listen = \"192.0.2.1\"\nforward_for = \"0.0.0.0/0\"").unwrap();
    assert!(open.remarks()[0].contains("open resolver"));
}

#[test]
fn privileged_ports_are_told_to_those_who_may_not_use_them() {
    let user = Machine {
        first_port: 1024,
        may_add_addresses: false,
        look_for_files: false,
    };
    let all = problems_on(&format!("listen = \"127.0.0.1:5353\"\n{}", unit("")), &user);
    assert_eq!(
        all,
        [
            "summon.toml:5:9: `unit.www.ports`: port 80 cannot be used: below 1024 they are root's (help: use a HOST port above 1023, such as \"8080:80\", or run as root)"
        ]
    );
    assert!(problems_on("", &user)[0].contains("--listen"));
    let all = problems_on("listen = \"127.0.0.1:5353\"\ninterface = \"br0\"", &user);
    assert!(all[0].contains("needs root"), "{all:?}");
}

#[test]
fn files_must_be_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(FILE_NAME);
    let machine = Machine {
        look_for_files: true,
        ..Machine::anything()
    };
    let keys = "source = \"./site\"\nvolumes = \"./data:/data\"\ninclude = \"conf:/conf\"";
    let text = unit(keys).replace("source = \"site\"\n", "");
    fs::write(&path, &text).unwrap();
    let read = || Configuration::read(Some(&path), &Overrides::default(), &machine);
    let problems = read().unwrap_err();
    let all: Vec<String> = problems.list.iter().map(ToString::to_string).collect();
    assert_eq!(all.len(), 3, "{all:#?}");
    assert!(
        all[0].contains(&format!(
            "{}:4:10: `unit.www.source`: there is no",
            path.display()
        )),
        "{}",
        all[0]
    );
    assert!(all[1].contains("mkdir -p"));
    for name in ["site", "data", "conf"] {
        fs::create_dir(directory.path().join(name)).unwrap();
    }
    let configuration = read().unwrap();
    assert_eq!(configuration.path.as_deref(), Some(path.as_path()));
    // A word that is a file here is that file, as for `kiln run`.
    fs::write(&path, unit("")).unwrap();
    assert_eq!(
        read().unwrap().units["www"].source,
        directory.path().join("site")
    );

    let missing = Configuration::read(
        Some(Path::new("/nowhere.toml")),
        &Overrides::default(),
        &machine,
    );
    assert!(
        missing
            .unwrap_err()
            .to_string()
            .starts_with("/nowhere.toml: cannot be read")
    );
    fs::write(&path, b"\xff").unwrap();
    assert!(read().unwrap_err().to_string().contains("not UTF-8"));
}

#[test]
fn flags_replace_keys_and_add_units() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(FILE_NAME);
    fs::write(
        &path,
        format!("ttl = 5\nlisten = \"127.0.0.1\"\n{}", unit("")),
    )
    .unwrap();
    let overrides = Overrides {
        listen: vec!["127.0.0.1:5353".into(), "127.0.0.2:5353".into()],
        forward: vec!["none".into()],
        ttl: Some("7".into()),
        max_memory: Some("1G".into()),
        units: vec![
            "dns=Shop.example.org,image=shop,port=8080:80,port=53/udp,stop=suspend,env=A=b\\,c,always,ready=line:a=b,argument=-v,idle=5s".into(),
        ],
        ..Overrides::default()
    };
    let machine = Machine::anything();
    let read = |overrides: &Overrides| Configuration::read(Some(&path), overrides, &machine);
    let configuration = read(&overrides).unwrap();
    assert_eq!(configuration.listen.len(), 2);
    assert_eq!(configuration.forward, Forward::None);
    assert_eq!(configuration.units["www"].ttl, 7);
    let shop = &configuration.units["shop.example.org"];
    assert_eq!(shop.source, Path::new("shop"));
    assert_eq!(shop.ports.len(), 2);
    assert_eq!(shop.environment["A"], "b,c");
    assert!(shop.always);
    assert_eq!(shop.ready, Readiness::Line("a=b".into()));
    assert_eq!(shop.arguments.as_deref().unwrap(), ["-v"]);
    assert_eq!((shop.ttl, shop.idle), (7, Duration::from_secs(5)));

    let wrong = Overrides {
        ttl: Some("x".into()),
        units: vec![
            "dns=w,image=x,prot=80".into(),
            "image=y".into(),
            "name=www,dns=z,image=z,port=1".into(),
        ],
        ..Overrides::default()
    };
    let problems = read(&wrong).unwrap_err();
    let all: Vec<String> = problems.list.iter().map(ToString::to_string).collect();
    assert_eq!(all.len(), 5, "{all:#?}");
    assert!(all[0].starts_with("--ttl: `ttl`: expected a number"));
    assert!(
        all[1].starts_with(
            "--unit dns=w,image=x,prot=80: `prot`: unknown key (help: did you mean `port`?)"
        ),
        "{}",
        all[1]
    );
    assert!(all[4].contains("there is a unit of this name already"));

    let alone = Configuration::read(
        None,
        &Overrides {
            units: overrides.units,
            ..Overrides::default()
        },
        &machine,
    );
    assert_eq!(alone.unwrap().units.len(), 1);
}

#[test]
fn units_are_added_and_stored_as_json() {
    let configuration = parsed(EVERYTHING).unwrap();
    for unit in configuration.units.values() {
        let text = serde_json::to_string(unit).unwrap();
        assert_eq!(&serde_json::from_str::<Unit>(&text).unwrap(), unit);
    }
    let machine = Machine::anything();
    let added = configuration
        .parse_unit(
            "dns=new.example.org,source=./x,front=web",
            Path::new("/srv"),
        )
        .unwrap();
    assert_eq!(added.source, Path::new("/srv/x"));
    assert_eq!(added.name, "new.example.org");
    let more = configuration.with([added.clone()], &machine).unwrap();
    assert_eq!(more.units.len(), 4);
    let again = more.with([added.clone()], &machine).unwrap_err();
    assert!(again.to_string().contains("kiln summon rm"));
    let twin = Unit {
        name: "twin".into(),
        ..added
    };
    let clash = more.with([twin], &machine).unwrap_err();
    assert!(
        clash
            .to_string()
            .starts_with("added unit twin: `unit.twin.dns`: the name"),
        "{clash}"
    );
    let wrong = configuration
        .parse_unit("dns=x", Path::new("/"))
        .unwrap_err();
    assert_eq!(wrong.list.len(), 2, "{wrong}");
    assert!(configuration.parse_unit("", Path::new("/")).is_err());
}

#[test]
fn many_units_are_checked_quickly() {
    let text: String = (0..5000)
        .map(|index| unit("").replace("www", &format!("w{index}")) + "\n")
        .collect();
    let start = std::time::Instant::now();
    assert_eq!(parsed(&text).unwrap().units.len(), 5000);
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
}

fn no_panic(text: &str) {
    if let Err(problems) = parsed(text) {
        assert!(!problems.list.is_empty() && problems.list.len() <= 101);
        for problem in &problems.list {
            assert_eq!(&*problem.place.origin, PATH);
            assert!(!problem.reason.is_empty());
        }
    }
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "\\PC*") {
        no_panic(&text);
        let _ = Configuration::default().parse_unit(&text, Path::new("/"));
    }

    #[test]
    fn no_mixture_of_known_words_does(pieces in proptest::collection::vec(prop::sample::select(vec![
        "\n", "\n[unit.a]\n", "\n[unit.b]\n", "\n[front.a]\n", "=", "\"", "[", "]", "{", "}", ",", "\\", "ports", "80", "-1", "\"127.0.0.5\"", "\"80:80\"", "\"1-300\"",
        "dns = \"a\"", "source = \"x\"", "ports = [80]", "address = \"127.0.0.5\"", "address", "ready", "{ http = \"/\" }", "ttl", "listen", "front = \"a\"", "protocol = \"https\"", "é", "\u{0}", "99999999999999999999999999999999999999999", "environment", "volumes", "\"a:/b\"", "pool = \"127.0.0.0/30\"", "max_memory = \"1M\"",
    ]), 0..60)) {
        let text: String = pieces.concat();
        no_panic(&text);
    }
}

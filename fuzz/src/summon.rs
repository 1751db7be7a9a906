//! What the summoner reads from outside.

use std::path::Path;

use kiln_summon::configuration::{Configuration, Machine, Unit};

/// A `summon.toml`, and the same text as a unit in one line.
pub fn summon(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let machine = Machine::anything();
    match Configuration::parse(text, Path::new("/x/summon.toml"), &machine) {
        Ok(configuration) => {
            for unit in configuration.units.values() {
                let stored = serde_json::to_vec(unit).expect("what was read can be stored");
                let again: Unit = serde_json::from_slice(&stored).expect("and read again");
                assert_eq!(&again, unit);
            }
        }
        Err(problems) => {
            assert!(!problems.list.is_empty());
            assert!(problems.to_string().starts_with("/x/summon.toml"));
        }
    }
    let _ = Configuration::default().parse_unit(text, Path::new("/x"));
}

/// One with most keys, and a unit in one line.
pub fn summon_seeds() -> Vec<Vec<u8>> {
    let all = r#"
listen = ["127.0.0.1:5353"]
forward = ["192.0.2.1"]
forward_for = "127.0.0.0/8"
zones = ["example.org"]
ttl = 30
pool = "127.80.0.0/16"
pool6 = "fd00:1::/64"
metrics = "127.0.0.1:9153"
max_running = 200
max_memory = "4G"
[front.web]
listen = ["127.0.0.9"]
protocol = "http"
[unit.www]
dns = ["www.example.org", "*.example.org"]
source = "./site"
arguments = ["--save", ""]
ports = [81, "53/udp", "8080:81"]
front = ["web"]
ttl = 5
stop = "suspend"
ready = { http = "/health", port = 80 }
idle = "90s"
memory = "64M"
environment = { A = "b" }
volumes = ["./data:/data:ro"]
user = "33:33"
include = ["x:/y"]
[unit.b]
dns = "b"
image = "b"
ports = "80"
address = "127.0.0.5"
"#;
    let flag = "dns=www.example.org,image=site,port=8080:80,env=A=b\\,c,ready=line:x,always";
    vec![all.into(), flag.into()]
}

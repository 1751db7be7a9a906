//! What users write for ports, memory, environment, volumes and names, as types.
//!
//! Parsing happens here once; everything behind works with these types. No function here looks at the machine.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use kiln_abi::manifest::{Protocol, User};
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// A port of the host that leads to a port of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Publish {
    /// Address of the host; `None`: all addresses, IPv4 and IPv6.
    pub address: Option<IpAddr>,
    /// Port of the host; 0: a free one is chosen at the start.
    pub host: u16,
    /// Port of the program.
    pub guest: u16,
    /// Transport.
    pub protocol: Protocol,
}

impl fmt::Display for Publish {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => write!(formatter, "{}", SocketAddr::new(address, self.host))?,
            None => write!(formatter, "{}", self.host)?,
        }
        write!(
            formatter,
            "->{}/{}",
            self.guest,
            protocol_name(self.protocol)
        )
    }
}

/// `tcp` or `udp`.
#[must_use]
pub fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

/// Most ports that one range may publish.
const MAX_RANGE: u16 = 1024;

/// Parses `[ADDRESS:]HOST:GUEST[/tcp|/udp]`, where IPv6 addresses stand in brackets and both ports may be
/// ranges (`8000-8009:80-89`) of the same length. `HOST` 0 asks for a free port.
///
/// # Errors
/// Says which part is wrong.
pub fn parse_publish(text: &str) -> Result<Vec<Publish>, Error> {
    let wrong = |reason: &str| {
        Error::input(
            format!("cannot publish '{text}': {reason}"),
            "write [ADDRESS:]HOST:GUEST[/udp], such as 8080:80, 127.0.0.1:8080:80, [::1]:8080:80 or 5353:53/udp",
        )
    };
    let (ports, protocol) = match text.rsplit_once('/') {
        None => (text, Protocol::Tcp),
        Some((ports, "tcp")) => (ports, Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some((_, other)) => return Err(wrong(&format!("'{other}' is neither tcp nor udp"))),
    };
    let (rest, guest) = ports
        .rsplit_once(':')
        .ok_or_else(|| wrong("it has no ':' between the host's and the program's port"))?;
    let (address, host) = if let Some(bracketed) = rest.strip_prefix('[') {
        let (address, host) = bracketed
            .split_once("]:")
            .ok_or_else(|| wrong("the bracket is not closed, or no port follows it"))?;
        (Some(address), host)
    } else {
        match rest.rsplit_once(':') {
            Some((address, _)) if address.contains(':') => {
                return Err(wrong("an IPv6 address needs brackets"));
            }
            Some((address, host)) => (Some(address), host),
            None => (None, rest),
        }
    };
    let address = address
        .map(|address| {
            address
                .parse::<IpAddr>()
                .map_err(|_| wrong(&format!("'{address}' is not an IP address")))
        })
        .transpose()?;
    let range = |text: &str| -> Result<(u16, u16), Error> {
        let number = |text: &str| {
            text.parse::<u16>()
                .map_err(|_| wrong(&format!("'{text}' is not a port (0 to 65535)")))
        };
        match text.split_once('-') {
            None => number(text).map(|port| (port, port)),
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                if first == 0 || last < first || last - first >= MAX_RANGE {
                    return Err(wrong(&format!(
                        "'{text}' is not a range of 1 to {MAX_RANGE} ports"
                    )));
                }
                Ok((first, last))
            }
        }
    };
    let (host, guest) = (range(host)?, range(guest)?);
    if guest.0 == 0 {
        return Err(wrong("the program's port cannot be 0"));
    }
    if host.1 - host.0 != guest.1 - guest.0 {
        return Err(wrong("the two ranges differ in length"));
    }
    Ok((host.0..=host.1)
        .zip(guest.0..=guest.1)
        .map(|(host, guest)| Publish {
            address,
            host,
            guest,
            protocol,
        })
        .collect())
}

/// Parses an amount of memory: a number with an optional unit `B`, `K`, `M`, `G` (powers of 1024; `KiB` and
/// `KB` mean the same as `K`). A bare number is in MiB.
///
/// # Errors
/// Says what is wrong.
pub fn parse_memory(text: &str) -> Result<u64, Error> {
    let wrong = || {
        Error::input(
            format!("'{text}' is not an amount of memory"),
            "write a number with a unit, such as 64M or 1G",
        )
    };
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let unit = unit.trim().to_ascii_lowercase();
    let factor: u64 = match unit.as_str() {
        "" | "m" | "mb" | "mib" => 1 << 20,
        "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "g" | "gb" | "gib" => 1 << 30,
        _ => return Err(wrong()),
    };
    let bytes = number.checked_mul(factor).ok_or_else(wrong)?;
    if bytes == 0 || bytes > 1 << 44 {
        return Err(wrong());
    }
    Ok(bytes)
}

/// An amount of memory for people: the largest unit that keeps it short.
#[must_use]
pub fn format_memory(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    for (size, unit) in UNITS {
        if bytes >= size {
            let tenths = bytes.saturating_mul(10) / size;
            return if tenths >= 100 || tenths.is_multiple_of(10) {
                format!("{} {unit}", tenths / 10)
            } else {
                format!("{}.{} {unit}", tenths / 10, tenths % 10)
            };
        }
    }
    format!("{bytes} B")
}

/// Parses `NAME=VALUE`, or `NAME` alone for the value that `inherited` knows.
///
/// # Errors
/// When the name is empty, holds a NUL byte, or is not set.
pub fn parse_environment(
    text: &str,
    inherited: impl FnOnce(&str) -> Option<String>,
) -> Result<(String, String), Error> {
    let wrong = |reason: &str| {
        Error::input(
            format!("cannot set the environment variable '{text}': {reason}"),
            "write NAME=VALUE, or NAME alone to pass on your own value",
        )
    };
    if text.contains('\0') {
        return Err(wrong("it holds a NUL byte"));
    }
    match text.split_once('=') {
        Some(("", _)) => Err(wrong("the name is empty")),
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None if text.is_empty() => Err(wrong("the name is empty")),
        None => match inherited(text) {
            Some(value) => Ok((text.to_owned(), value)),
            None => Err(wrong("it has no value here")),
        },
    }
}

/// A directory of the host in the program's file tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeMount {
    /// Directory of the host, or name of a volume kept by Kiln (without a slash).
    pub host: PathBuf,
    /// Absolute path for the program.
    pub path: String,
    /// No changes allowed.
    pub read_only: bool,
}

/// The volumes as they are to be mounted: one below another's path comes after it, so that it is not covered, in
/// whatever order they were given.
#[must_use]
pub fn in_mount_order(volumes: &[VolumeMount]) -> Vec<&VolumeMount> {
    let mut mounts: Vec<&VolumeMount> = volumes.iter().collect();
    mounts.sort_by_key(|volume| volume.path.split('/').count());
    mounts
}

/// Parses `HOSTDIR:/path[:ro|:rw]`.
///
/// # Errors
/// Says which part is wrong.
pub fn parse_volume(text: &str) -> Result<VolumeMount, Error> {
    let wrong = |reason: &str| {
        Error::input(
            format!("cannot mount '{text}': {reason}"),
            "write HOSTDIR:/path or HOSTDIR:/path:ro, such as -v ./data:/data",
        )
    };
    let (text, read_only) = if let Some(rest) = text.strip_suffix(":ro") {
        (rest, true)
    } else {
        (text.strip_suffix(":rw").unwrap_or(text), false)
    };
    let (host, path) = text.rsplit_once(':').ok_or_else(|| {
        wrong("it has no ':' between the host's directory and the program's path")
    })?;
    if host.is_empty() {
        return Err(wrong("the host's directory is empty"));
    }
    if !path.starts_with('/') {
        return Err(match host.split_once(":/") {
            Some(_) => wrong(&format!("'{path}' is neither ro nor rw")),
            None => wrong("the program's path does not begin with '/'"),
        });
    }
    let components: Vec<&str> = path
        .split('/')
        .filter(|c| !c.is_empty() && *c != ".")
        .collect();
    if components.is_empty() {
        return Err(wrong("the root itself cannot be a volume"));
    }
    if components.contains(&"..") {
        return Err(wrong("the program's path goes through '..'"));
    }
    Ok(VolumeMount {
        host: PathBuf::from(host),
        path: format!("/{}", components.join("/")),
        read_only,
    })
}

/// Parses a host name: what `sethostname(2)` takes, of the characters that `/etc/hosts` can hold.
///
/// # Errors
/// When it is empty, too long, or has other characters.
pub fn parse_hostname(text: &str) -> Result<String, Error> {
    /// `__NEW_UTS_LEN` of Linux.
    const LONGEST: usize = 64;
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if (1..=LONGEST).contains(&text.len()) && text.chars().all(allowed) {
        return Ok(text.to_owned());
    }
    Err(Error::input(
        format!("'{text}' cannot be a host name"),
        "use 1 to 64 letters, digits, '-', '_' and '.'",
    ))
}

/// Parses `UID` or `UID:GID`, in numbers. Without a group, it is the same number as the user.
///
/// # Errors
/// When it is not numbers.
pub fn parse_user(text: &str) -> Result<User, Error> {
    let number = |part: &str| {
        part.parse::<u32>().map_err(|_| {
            Error::input(
                format!("'{text}' is not a user"),
                "write numbers: UID or UID:GID, such as 1000:1000 (a name can be given when the image is built, as `user` in kiln.toml)",
            )
        })
    };
    match text.split_once(':') {
        Some((uid, gid)) => Ok(User {
            uid: number(uid)?,
            gid: number(gid)?,
        }),
        None => number(text).map(|uid| User { uid, gid: uid }),
    }
}

/// Parses `ADDRESS/LENGTH`.
///
/// # Errors
/// When either part is wrong.
pub fn parse_network_address(text: &str) -> Result<(IpAddr, u8), Error> {
    let wrong = || {
        Error::input(
            format!("'{text}' is not an address with a prefix length"),
            "write it as 192.0.2.10/24 or 2001:db8::10/64",
        )
    };
    let (address, length) = text.split_once('/').ok_or_else(wrong)?;
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let length: u8 = length.parse().map_err(|_| wrong())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if length > longest {
        return Err(wrong());
    }
    Ok((address, length))
}

/// Checks a name for an instance or a volume: 1 to 63 letters, digits, `-`, `_` and `.`, beginning with a
/// letter or digit. It becomes the name of a directory.
///
/// # Errors
/// When it is another.
pub fn parse_name(text: &str) -> Result<String, Error> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let first = text
        .chars()
        .next()
        .is_some_and(|c| c.is_ascii_alphanumeric());
    if first && text.len() <= 63 && text.chars().all(fits) {
        Ok(text.to_owned())
    } else {
        Err(Error::input(
            format!("'{text}' cannot be a name"),
            "use 1 to 63 letters, digits, '-', '_' and '.', beginning with a letter or digit",
        ))
    }
}

/// Signals by name, with Linux's numbers for x86-64 (signal(7)).
const SIGNALS: [(&str, u8); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// Parses a signal: a number from 1 to 64, or a name with or without `SIG`, in any case.
///
/// # Errors
/// When there is no such signal.
pub fn parse_signal(text: &str) -> Result<u8, Error> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let found = match name.parse::<u8>() {
        Ok(number) if (1..=64).contains(&number) => Some(number),
        _ => SIGNALS
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, number)| *number),
    };
    found.ok_or_else(|| {
        Error::input(
            format!("'{text}' is not a signal"),
            "write a name such as TERM or HUP, or a number from 1 to 64",
        )
    })
}

/// A signal's name with `SIG`, or its number.
#[must_use]
pub fn signal_name(signal: i32) -> String {
    match SIGNALS
        .iter()
        .find(|(_, number)| i32::from(*number) == signal)
    {
        Some((name, _)) => format!("SIG{name}"),
        None => format!("signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Publish {
        let all = parse_publish(text).expect(text);
        assert_eq!(all.len(), 1, "{text}");
        all[0]
    }

    #[test]
    fn ports_with_and_without_address() {
        let plain = one("8080:80");
        assert_eq!(
            (plain.address, plain.host, plain.guest, plain.protocol),
            (None, 8080, 80, Protocol::Tcp)
        );
        let v4 = one("127.0.0.1:8080:80/tcp");
        assert_eq!(v4.address, Some("127.0.0.1".parse().unwrap()));
        let v6 = one("[::1]:8080:80/udp");
        assert_eq!(
            (v6.address, v6.protocol),
            (Some("::1".parse().unwrap()), Protocol::Udp)
        );
        assert_eq!(one("0:80").host, 0);
        assert_eq!(v6.to_string(), "[::1]:8080->80/udp");
    }

    #[test]
    fn port_ranges_pair_up() {
        let all = parse_publish("8000-8002:80-82").unwrap();
        assert_eq!(
            all.iter().map(|p| (p.host, p.guest)).collect::<Vec<_>>(),
            [(8000, 80), (8001, 81), (8002, 82)]
        );
    }

    #[test]
    fn wrong_ports_are_named() {
        for text in [
            "",
            "80",
            ":",
            "80:",
            ":80",
            "80:0",
            "a:80",
            "80:70000",
            "1.2.3:80:80",
            "::1:80:80",
            "[::1:80:80",
            "[::1]80:80",
            "80:80/sctp",
            "1-2:1-3",
            "2-1:2-1",
            "0-3:1-4",
            "1-5000:1-5000",
            "[]:1:1",
            "-:-",
        ] {
            let error = parse_publish(text).expect_err(text);
            assert_eq!(error.kind(), crate::error::Kind::Input);
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn memory_sizes() {
        for (text, bytes) in [
            ("64M", 64 << 20),
            ("64MiB", 64 << 20),
            ("64", 64 << 20),
            ("1g", 1 << 30),
            ("16384k", 16 << 20),
            ("1048576B", 1 << 20),
        ] {
            assert_eq!(parse_memory(text).unwrap(), bytes, "{text}");
        }
        for text in [
            "",
            "M",
            "-1",
            "0",
            "64X",
            "1.5G",
            "99999999999999999999",
            "18446744073709551615G",
            "1 M M",
        ] {
            assert!(parse_memory(text).is_err(), "{text}");
        }
        assert_eq!(format_memory(64 << 20), "64 MiB");
        assert_eq!(format_memory((1 << 30) + (512 << 20)), "1.5 GiB");
        assert_eq!(format_memory(17), "17 B");
    }

    #[test]
    fn environment() {
        let none = |_: &str| None;
        assert_eq!(
            parse_environment("A=b=c", none).unwrap(),
            ("A".into(), "b=c".into())
        );
        assert_eq!(
            parse_environment("A=", none).unwrap(),
            ("A".into(), String::new())
        );
        assert_eq!(
            parse_environment("A", |_| Some("x".into())).unwrap(),
            ("A".into(), "x".into())
        );
        for text in ["", "=x", "A\0=x", "UNSET"] {
            assert!(parse_environment(text, none).is_err());
        }
    }

    #[test]
    fn volumes() {
        let volume = parse_volume("./data:/var//lib/./x/:ro").unwrap();
        assert_eq!(
            (volume.host.to_str(), volume.path.as_str(), volume.read_only),
            (Some("./data"), "/var/lib/x", true)
        );
        assert!(!parse_volume("a:b:/c").unwrap().read_only);
        for text in [
            "",
            "/data",
            ":/data",
            "a:data",
            "a:/",
            "a:/../etc",
            "a:/x/..",
            "a:ro",
        ] {
            assert!(parse_volume(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_volume_below_another_is_mounted_after_it() {
        let volumes = ["a:/data/x/y", "b:/srv", "c:/data"].map(|text| parse_volume(text).unwrap());
        let order: Vec<&str> = in_mount_order(&volumes)
            .iter()
            .map(|volume| volume.path.as_str())
            .collect();
        assert_eq!(order, ["/srv", "/data", "/data/x/y"]);
    }

    #[test]
    fn users_addresses_names_signals() {
        assert_eq!(
            parse_user("1000").unwrap(),
            User {
                uid: 1000,
                gid: 1000
            }
        );
        assert_eq!(parse_user("1:2").unwrap(), User { uid: 1, gid: 2 });
        assert!(parse_user("root").is_err());
        assert_eq!(parse_network_address("10.0.0.2/24").unwrap().1, 24);
        for text in ["10.0.0.2", "10.0.0.2/33", "::1/129", "x/8"] {
            assert!(parse_network_address(text).is_err());
        }
        for text in ["a", "web-1", "9.x_y"] {
            assert!(parse_name(text).is_ok());
        }
        for text in ["", ".", "..", "-a", "a/b", "ä", &"x".repeat(64)] {
            assert!(parse_name(text).is_err());
        }
        for text in ["TERM", "sigterm", "15", "SigTerm"] {
            assert_eq!(parse_signal(text).unwrap(), 15);
        }
        for text in ["", "0", "65", "SIG", "FOO", "-1", "SIG0"] {
            assert!(parse_signal(text).is_err(), "{text}");
        }
        assert_eq!(signal_name(9), "SIGKILL");
    }
}

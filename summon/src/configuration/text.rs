//! Small texts of a configuration: times, names, addresses, ports.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use kiln_monitor::arguments::parse_publish;
use strsim::osa_distance;

use super::{UnitPort, problem::Fault};

/// Longest time that a configuration may hold: a year. Beyond it lie only mistakes.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// Reads a time: a number of seconds, or a whole number with `ms`, `s`, `m`, `h` or `d`. At most a year.
///
/// # Errors
/// Says what is wrong and what would be right.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || {
        format!(
            "`{text}` is not a time; write it as \"500ms\", \"2s\", \"5m\", \"1h\" or a number of seconds"
        )
    };
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let milliseconds = match unit.trim() {
        "ms" => Some(number),
        "s" | "" => number.checked_mul(1000),
        "m" | "min" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        "d" => number.checked_mul(86_400_000),
        _ => return Err(wrong()),
    };
    milliseconds
        .map(Duration::from_millis)
        .filter(|time| *time <= LONGEST)
        .ok_or_else(|| format!("`{text}` is longer than a year"))
}

/// A time as [`parse_duration`] reads it, in the largest unit that loses nothing (below a millisecond is lost).
#[must_use]
pub fn format_duration(time: Duration) -> String {
    let milliseconds = time.as_millis();
    for (size, unit) in [(3_600_000, "h"), (60_000, "m"), (1000, "s")] {
        if milliseconds >= size && milliseconds.is_multiple_of(size) {
            return format!("{}{unit}", milliseconds / size);
        }
    }
    format!("{milliseconds}ms")
}

/// Checks a DNS name (RFC 1035, section 2.3.4; RFC 2181, section 11) as a unit or zone may have it and returns it in lower
/// case without a final dot. Letters, digits, `-` and `_`; `wildcard` allows `*` as the first label (RFC 4592).
///
/// # Errors
/// Says what is wrong.
pub fn parse_dns_name(text: &str, wildcard: bool) -> Result<String, String> {
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if name.is_empty() {
        return Err("the name is empty".into());
    }
    if !name.is_ascii() {
        return Err(format!(
            "`{text}` is not in ASCII; write it in its form for DNS, which begins with xn--"
        ));
    }
    if name.parse::<IpAddr>().is_ok() {
        return Err(format!("`{text}` is an address, not a name"));
    }
    // On the wire each label costs a byte more, and the root one: 255 in all.
    if name.len() > 253 {
        return Err(format!("`{text}` is longer than 253 characters"));
    }
    for (index, label) in name.split('.').enumerate() {
        if label == "*" {
            if index == 0 && wildcard && name.len() > 1 {
                continue;
            }
            return Err(if wildcard {
                format!("`{text}`: `*` can only be the first of several parts, as in *.example.org")
            } else {
                format!("`{text}`: `*` cannot be here")
            });
        }
        if label.is_empty() || label.len() > 63 {
            return Err(format!(
                "`{text}`: the parts between the dots have 1 to 63 characters"
            ));
        }
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if let Some(wrong) = label.chars().find(|c| !fits(*c)) {
            return Err(format!(
                "`{text}`: {wrong:?} cannot be in a name; letters, digits, `-` and `_` can"
            ));
        }
        if label.starts_with('-') || label.ends_with('-') {
            return Err(format!("`{text}`: a part begins or ends with `-`"));
        }
    }
    Ok(name)
}

/// Reads an address with a port, or an address alone where there is a usual port.
pub fn parse_socket_address(text: &str, usual: Option<u16>) -> Result<SocketAddr, Fault> {
    let example = match usual {
        Some(port) => format!("write it as 127.0.0.1, 127.0.0.1:{port} or [::1]:{port}"),
        None => "write it as 127.0.0.1:8080 or [::1]:8080".to_owned(),
    };
    let bare = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
        .unwrap_or(text);
    let address = match (text.parse::<SocketAddr>(), bare.parse::<IpAddr>(), usual) {
        (Ok(address), _, _) => address,
        (_, Ok(address), Some(port)) => SocketAddr::new(address, port),
        (_, Ok(_), None) => return Err(Fault::new(format!("`{text}` has no port"), example)),
        _ => {
            return Err(Fault::new(
                format!("`{text}` is not an address with a port"),
                example,
            ));
        }
    };
    if address.port() == 0 {
        return Err(Fault::new(
            "port 0 is none",
            "choose a port from 1 to 65535",
        ));
    }
    if address.ip().is_multicast() {
        return Err(Fault::new(
            format!("`{}` is a multicast address", address.ip()),
            "choose an address of one machine",
        ));
    }
    Ok(address)
}

/// Reads `[HOST:]GUEST[/tcp|/udp]`, where both may be ranges of the same length.
pub fn parse_unit_ports(text: &str) -> Result<Vec<UnitPort>, Fault> {
    const FORM: &str = "write [HOST:]GUEST[/udp], such as 80, 53/udp or 8080:80";
    let (ports, protocol) = match text.split_once('/') {
        Some((ports, _)) => (ports, text.get(ports.len()..).unwrap_or_default()),
        None => (text, ""),
    };
    let whole = match ports.matches(':').count() {
        0 => format!("{ports}:{ports}{protocol}"),
        1 => text.to_owned(),
        _ => {
            return Err(Fault::new(
                format!("`{text}` names an address"),
                format!("{FORM}; the address goes to `address` or `address6`"),
            ));
        }
    };
    let published = parse_publish(&whole).map_err(|error| {
        // The message is about a publication; only its reason fits here.
        let error = error.to_string();
        let reason = error.rsplit_once("': ").map_or("", |(_, reason)| reason);
        Fault::new(format!("`{text}` is no port: {reason}"), FORM)
    })?;
    published
        .into_iter()
        .map(|one| {
            if one.host == 0 {
                return Err(Fault::new(
                    format!("`{text}`: clients must know the port"),
                    "choose one from 1 to 65535",
                ));
            }
            Ok(UnitPort {
                host: one.host,
                guest: one.guest,
                protocol: one.protocol,
            })
        })
        .collect()
}

/// The known word most like a wrong one, if any is like it.
pub fn nearest<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Longer words are no slips of the fingers, and comparing them would take time.
    if wrong.len() > 64 {
        return None;
    }
    let wrong = wrong.to_ascii_lowercase().replace('-', "_");
    known
        .into_iter()
        .map(|key| {
            let shortened = wrong.len() >= 3
                && key.len() >= 3
                && (key.starts_with(wrong.as_str()) || wrong.starts_with(key));
            let edits = osa_distance(&wrong, key);
            (if shortened { edits.min(1) } else { edits }, key)
        })
        .min()
        .filter(|(distance, key)| *distance <= key.len().max(wrong.len()) / 2)
        .map(|(_, key)| key)
}

#[cfg(test)]
mod tests {
    use kiln_abi::manifest::Protocol;

    use super::*;

    #[test]
    fn times() {
        for (text, milliseconds) in [
            ("500ms", 500),
            ("2s", 2000),
            ("2", 2000),
            ("5m", 300_000),
            ("1h", 3_600_000),
            ("0", 0),
            ("365d", 31_536_000_000),
        ] {
            let time = parse_duration(text).unwrap();
            assert_eq!(time, Duration::from_millis(milliseconds), "{text}");
            assert_eq!(parse_duration(&format_duration(time)), Ok(time));
        }
        for text in [
            "",
            "s",
            "-1s",
            "1.5s",
            "1x",
            "366d",
            "99999999999999999999",
            "18446744073709551615h",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert_eq!(format_duration(Duration::from_secs(90)), "90s");
        assert_eq!(format_duration(Duration::from_secs(120)), "2m");
    }

    #[test]
    fn names() {
        assert_eq!(
            parse_dns_name("WWW.Example.org.", false).unwrap(),
            "www.example.org"
        );
        assert_eq!(
            parse_dns_name("*.example.org", true).unwrap(),
            "*.example.org"
        );
        assert!(parse_dns_name("localhost", false).is_ok());
        assert!(parse_dns_name("_http._tcp.x", false).is_ok());
        let long = "a".repeat(64);
        for text in [
            "",
            ".",
            "..",
            "a..b",
            "-a.b",
            "a-.b",
            "a b",
            "a/b",
            "127.0.0.1",
            "::1",
            "ä.de",
            "*",
            "a.*.b",
            "x*.b",
            &long,
            &"a.".repeat(128),
        ] {
            assert!(parse_dns_name(text, true).is_err(), "{text}");
        }
        assert!(parse_dns_name("*.example.org", false).is_err());
    }

    #[test]
    fn addresses_with_and_without_port() {
        let parsed = |text| parse_socket_address(text, Some(53)).map(|address| address.to_string());
        assert_eq!(parsed("127.0.0.1").unwrap(), "127.0.0.1:53");
        assert_eq!(parsed("127.0.0.1:5353").unwrap(), "127.0.0.1:5353");
        assert_eq!(parsed("::1").unwrap(), "[::1]:53");
        assert_eq!(parsed("[::1]").unwrap(), "[::1]:53");
        assert_eq!(parsed("[::1]:5").unwrap(), "[::1]:5");
        for text in [
            "",
            "x",
            "127.0.0.1:0",
            "127.0.0.1:x",
            "localhost:53",
            "224.0.0.1",
        ] {
            assert!(parsed(text).is_err(), "{text}");
        }
        assert!(parse_socket_address("127.0.0.1", None).is_err());
    }

    #[test]
    fn ports() {
        let one = |text: &str| {
            let ports = parse_unit_ports(text).unwrap();
            assert_eq!(ports.len(), 1);
            (ports[0].host, ports[0].guest, ports[0].protocol)
        };
        assert_eq!(one("80"), (80, 80, Protocol::Tcp));
        assert_eq!(one("53/udp"), (53, 53, Protocol::Udp));
        assert_eq!(one("8080:80"), (8080, 80, Protocol::Tcp));
        assert_eq!(parse_unit_ports("8000-8002").unwrap().len(), 3);
        for text in [
            "",
            "x",
            "0",
            "0:80",
            "80:0",
            "70000",
            "80/sctp",
            "127.0.0.1:80:80",
            "[::1]:80:80",
            "/",
            "1-2:3",
        ] {
            let fault = parse_unit_ports(text).expect_err(text);
            assert!(fault.reason.contains(text), "{fault:?}");
        }
    }

    #[test]
    fn similar_words() {
        let known = ["forward", "forward_for", "ttl"];
        assert_eq!(nearest("forwrad", known), Some("forward"));
        assert_eq!(nearest("forward-for", known), Some("forward_for"));
        assert_eq!(nearest("TTL", known), Some("ttl"));
        assert_eq!(nearest("xxxxxxxx", known), None);
        assert_eq!(nearest(&"x".repeat(100_000), known), None);
    }
}

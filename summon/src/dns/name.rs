//! Domain names in the form in which they are compared: lower case, as on the wire (RFC 1035, 3.1).
//!
//! Always holds: the bytes are labels, each behind its length (1 to 63), ended by a zero; at most 255 in all. So every
//! ancestor of a name is a tail of its bytes.

use hickory_proto::rr::Name as Parsed;

/// Longest name on the wire, with its final zero (RFC 1035, 2.3.4).
pub const LONGEST: usize = 255;

/// A name as a key.
pub type Key = Box<[u8]>;

/// Reads a name as people write it, with or without the final dot; international names become their `xn--` form.
/// `None`: it is none, or it is the root.
pub fn parse(text: &str) -> Option<Key> {
    let mut name = Parsed::from_str_relaxed(text.trim_end_matches('.')).ok()?;
    name.set_fqdn(true);
    if name.is_root() || text.ends_with("..") {
        return None;
    }
    Some(key(&name))
}

/// A parsed name as a key.
pub fn key(name: &Parsed) -> Key {
    let mut bytes = Vec::with_capacity(name.len() + 1);
    for label in name {
        // The parser lets no label of more than 63 bytes through.
        bytes.push(label.len() as u8);
        bytes.extend(label.iter().map(u8::to_ascii_lowercase));
    }
    bytes.push(0);
    bytes.into()
}

/// Where each label but the first begins, and the root: the ancestors, nearest first.
pub fn ancestors(key: &[u8]) -> impl Iterator<Item = usize> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let length = usize::from(*key.get(at)?);
        if length == 0 {
            return None;
        }
        at += 1 + length;
        Some(at)
    })
}

/// What stands behind the `*` of a wildcard name.
pub fn below_star(key: &[u8]) -> Option<&[u8]> {
    key.strip_prefix(b"\x01*")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_keys() {
        assert_eq!(
            parse("WWW.Example.org").as_deref(),
            Some(&b"\x03www\x07example\x03org\0"[..])
        );
        assert_eq!(parse("www.example.org."), parse("www.example.org"));
        assert_eq!(
            parse("a_b.example"),
            Some(b"\x03a_b\x07example\0"[..].into())
        );
        assert!(parse("*.example.org").is_some());
        for wrong in [
            "",
            ".",
            "..",
            "a..b",
            "a.b..",
            &"a".repeat(64),
            &"a.".repeat(130),
        ] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
        assert_eq!(parse("bücher.example"), parse("xn--bcher-kva.example"));
    }

    #[test]
    fn ancestors_are_tails() {
        let key = parse("a.bc.d").expect("a name");
        let tails: Vec<_> = ancestors(&key).map(|at| &key[at..]).collect();
        assert_eq!(tails, [&b"\x02bc\x01d\0"[..], b"\x01d\0", b"\0"]);
    }
}

//! Which precompressed file a client may get: `Accept-Encoding`, RFC 9110, section 12.5.3.

use hyper::header::{ACCEPT_ENCODING, HeaderMap};

/// A content coding for which a file may lie ready beside the original.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Brotli, `.br`.
    Brotli,
    /// Zstandard, `.zst`.
    Zstandard,
    /// Gzip, `.gz`.
    Gzip,
}

impl Encoding {
    /// All, the one that is preferred among equals first (the one that makes text smallest).
    const ALL: [Self; 3] = [Self::Brotli, Self::Zstandard, Self::Gzip];

    /// Name in `Content-Encoding`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Brotli => "br",
            Self::Zstandard => "zstd",
            Self::Gzip => "gzip",
        }
    }

    /// What is added to the original's file name.
    #[must_use]
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Brotli => ".br",
            Self::Zstandard => ".zst",
            Self::Gzip => ".gz",
        }
    }
}

/// The codings that the client accepts, best first.
#[must_use]
pub fn accepted(headers: &HeaderMap) -> Vec<Encoding> {
    if !headers.contains_key(&ACCEPT_ENCODING) {
        return Vec::new();
    }
    let mut weights = [None; Encoding::ALL.len()];
    let mut wildcard = None;
    for value in headers.get_all(ACCEPT_ENCODING) {
        let Ok(value) = value.to_str() else { continue };
        for item in value.split(',') {
            let mut parts = item.split(';');
            let name = parts.next().unwrap_or_default().trim();
            let weight = parts.find_map(weight).unwrap_or(1000);
            if name == "*" {
                wildcard = Some(weight);
            }
            let name = if name.eq_ignore_ascii_case("x-gzip") {
                "gzip"
            } else {
                name
            };
            for (slot, encoding) in weights.iter_mut().zip(Encoding::ALL) {
                if name.eq_ignore_ascii_case(encoding.name()) {
                    *slot = Some(weight);
                }
            }
        }
    }
    let mut found: Vec<(u16, Encoding)> = weights
        .into_iter()
        .zip(Encoding::ALL)
        .filter_map(|(weight, encoding)| Some((weight.or(wildcard)?, encoding)))
        .filter(|(weight, _)| *weight > 0)
        .collect();
    found.sort_by_key(|(weight, _)| std::cmp::Reverse(*weight));
    found.into_iter().map(|(_, encoding)| encoding).collect()
}

/// A parameter `q=0.5` as thousandths; nothing when it is another one. What cannot be read counts as
/// not accepted.
fn weight(parameter: &str) -> Option<u16> {
    let (name, value) = parameter.split_once('=')?;
    if !name.trim().eq_ignore_ascii_case("q") {
        return None;
    }
    let value: f32 = value.trim().parse().unwrap_or(0.0);
    if !(0.0..=1.0).contains(&value) {
        return Some(0);
    }
    // In range after the test above, so the conversion neither wraps nor loses more than a fraction.
    Some((value * 1000.0) as u16)
}

#[cfg(test)]
mod tests {
    use super::{Encoding::*, *};

    fn of(value: &'static str) -> Vec<Encoding> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, value.parse().unwrap());
        accepted(&headers)
    }

    #[test]
    fn none_without_the_header() {
        assert_eq!(accepted(&HeaderMap::new()), []);
    }

    #[test]
    fn our_order_among_equals() {
        assert_eq!(of("gzip, deflate, br, zstd"), [Brotli, Zstandard, Gzip]);
        assert_eq!(of("*"), [Brotli, Zstandard, Gzip]);
    }

    #[test]
    fn the_clients_weights_first() {
        assert_eq!(of("br;q=0.2, gzip;q=0.9"), [Gzip, Brotli]);
        assert_eq!(of("gzip;q=1.0, br; q=0"), [Gzip]);
        assert_eq!(of("br;q=0, *;q=0.1"), [Zstandard, Gzip]);
    }

    #[test]
    fn odd_values_are_not_accepted() {
        assert_eq!(of("identity"), []);
        assert_eq!(of("gzip;q=high"), []);
        assert_eq!(of("gzip;q=7"), []);
        assert_eq!(of(""), []);
        assert_eq!(of("X-GZIP"), [Gzip]);
    }
}

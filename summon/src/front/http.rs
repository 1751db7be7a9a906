//! The head of an HTTP/1 request (RFC 9112): for whom it is. Parsed with httparse; names with hyper's `http`.
//!
//! What always holds: any bytes have an outcome, and more bytes behind a complete head do not change it.

use httparse::{EMPTY_HEADER, Request, Status};
use hyper::Uri;
use hyper::http::uri::Authority;

use super::HEAD_BYTES;

/// Most header fields of a request.
const MAX_FIELDS: usize = 128;

/// What the first bytes of a connection are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Head {
    /// Not all of the head is there yet.
    Incomplete,
    /// A request for this host: lower case, without port; not checked in any other way.
    Host(String),
    /// Not a request that can be served.
    Refused(Refusal),
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It does not follow the rules, or does not say for whom it is.
    Bad,
    /// Its head is too long.
    Long,
    /// Another version than HTTP/1.
    Version,
}

/// Reads the head of a request.
#[must_use]
pub fn head(bytes: &[u8]) -> Head {
    let mut fields = [EMPTY_HEADER; MAX_FIELDS];
    let mut request = Request::new(&mut fields);
    let bounded = bytes.get(..HEAD_BYTES).unwrap_or(bytes);
    match request.parse(bounded) {
        Ok(Status::Complete(_)) => match host(&request) {
            Some(host) => Head::Host(host),
            None => Head::Refused(Refusal::Bad),
        },
        Ok(Status::Partial) if bytes.len() >= HEAD_BYTES => Head::Refused(Refusal::Long),
        Ok(Status::Partial) => Head::Incomplete,
        Err(httparse::Error::TooManyHeaders) => Head::Refused(Refusal::Long),
        Err(httparse::Error::Version) => Head::Refused(Refusal::Version),
        Err(_) => Head::Refused(Refusal::Bad),
    }
}

/// Whether a head may end in these bytes, the first `known` of which were known not to: then it is worth while to read it.
#[must_use]
pub fn may_end(bytes: &[u8], known: usize) -> bool {
    if known == 0 || bytes.len() >= HEAD_BYTES {
        return true;
    }
    let new = bytes.get(known.saturating_sub(3)..).unwrap_or_default();
    let pairs = new.windows(2).any(|pair| pair == b"\n\n");
    pairs || new.windows(3).any(|three| three == b"\n\r\n")
}

/// For whom a request is (RFC 9112, sections 3.2 and 3.3): its target counts before the `Host` header, which must
/// be there once, and may be missing in HTTP/1.0 only.
fn host(request: &Request<'_, '_>) -> Option<String> {
    let mut fields = request
        .headers
        .iter()
        .filter(|field| field.name.eq_ignore_ascii_case("host"));
    let field = match (fields.next(), fields.next()) {
        (Some(field), None) => Some(authority(field.value)?),
        (None, _) if request.version == Some(0) => None,
        _ => return None,
    };
    let target = request.path?;
    if target.starts_with('/') || target == "*" {
        return field;
    }
    // Absolute form, or that of CONNECT.
    let target: Uri = target.parse().ok()?;
    authority(target.authority()?.as_str().as_bytes())
}

fn authority(value: &[u8]) -> Option<String> {
    let authority = Authority::try_from(value.trim_ascii()).ok()?;
    let text = authority.as_str();
    let host = authority.host();
    let port = text.strip_prefix(host)?;
    let digits = port.strip_prefix(':').unwrap_or(port);
    let plain = !host.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| host.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host(text: &str) -> Head {
        Head::Host(text.to_owned())
    }

    const BAD: Head = Head::Refused(Refusal::Bad);

    #[test]
    fn the_host_is_found() {
        for (bytes, expected) in [
            ("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n", host("a.test")),
            (
                "GET / HTTP/1.1\r\nhOST:\tWWW.A.Test:8080 \r\n\r\n",
                host("www.a.test"),
            ),
            (
                "\r\nGET / HTTP/1.1\nX: y\nHost: a.test.\n\nrest",
                host("a.test."),
            ),
            ("GET / HTTP/1.0\r\nHost: a.test\r\n\r\n", host("a.test")),
            (
                "GET http://b.test:81/x?y HTTP/1.1\r\nHost: a.test\r\n\r\n",
                host("b.test"),
            ),
            ("GET http://b.test HTTP/1.0\r\n\r\n", host("b.test")),
            ("OPTIONS * HTTP/1.1\r\nHost: a.test\r\n\r\n", host("a.test")),
            (
                "CONNECT b.test:443 HTTP/1.1\r\nHost: a.test\r\n\r\n",
                host("b.test"),
            ),
            ("GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", host("[::1]")),
            (
                "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
                host("127.0.0.1"),
            ),
            ("GET / HTTP/1.0\r\n\r\n", BAD),
            ("GET / HTTP/1.1\r\n\r\n", BAD),
            ("GET http://b.test/ HTTP/1.1\r\n\r\n", BAD),
            (
                "GET / HTTP/1.1\r\nHost: a.test\r\nHost: a.test\r\n\r\n",
                BAD,
            ),
            (
                "GET / HTTP/1.0\r\nHost: a.test\r\nHost: b.test\r\n\r\n",
                BAD,
            ),
            ("GET / HTTP/1.1\r\nHost:\r\n\r\n", BAD),
            ("GET / HTTP/1.1\r\nHost: me@a.test\r\n\r\n", BAD),
            ("GET / HTTP/1.1\r\nHost: a.test, b.test\r\n\r\n", BAD),
            ("GET / HTTP/1.1\r\nHost: a.test/x\r\n\r\n", BAD),
            ("GET / HTTP/1.1\r\nHost: :80\r\n\r\n", BAD),
            ("GET / HTTP/1.1\r\n Host: a.test\r\n\r\n", BAD),
            ("GET / HTTP/1.1\r\nHost : a.test\r\n\r\n", BAD),
            ("\x16\x03\x01\x02\0\x01\0", BAD),
            (
                "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                Head::Refused(Refusal::Version),
            ),
            ("GET / HTTP/1.1\r\nHost: a.test\r\n", Head::Incomplete),
            ("", Head::Incomplete),
        ] {
            assert_eq!(head(bytes.as_bytes()), expected, "{bytes}");
        }
    }

    #[test]
    fn long_heads_are_refused() {
        let long = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}", "x".repeat(HEAD_BYTES));
        assert_eq!(head(long.as_bytes()), Head::Refused(Refusal::Long));
        assert_eq!(head(&long.as_bytes()[..HEAD_BYTES - 1]), Head::Incomplete);
        let many = format!(
            "GET / HTTP/1.1\r\nHost: a\r\n{}\r\n",
            "X: y\r\n".repeat(200)
        );
        assert_eq!(head(many.as_bytes()), Head::Refused(Refusal::Long));
        // A body may be as long as it likes.
        let body = format!(
            "POST / HTTP/1.1\r\nHost: a\r\n\r\n{}",
            "x".repeat(HEAD_BYTES)
        );
        assert_eq!(head(body.as_bytes()), host("a"));
    }

    proptest! {
        #[test]
        fn any_bytes_have_an_outcome(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = head(&bytes);
        }

        #[test]
        fn cuts_do_not_matter(
            version in 0..2,
            name in "[a-zA-Z0-9.-]{1,30}",
            before in proptest::collection::vec("[A-Z][a-z]{0,5}: [ -~]{0,20}\r\n", 0..10),
            rest in proptest::collection::vec(any::<u8>(), 0..40),
            cuts in proptest::collection::vec(0usize..400, 0..10),
        ) {
            prop_assume!(!before.iter().any(|line| line.starts_with("Host:")));
            let whole = format!("GET / HTTP/1.{version}\r\n{}Host: {name}:80\r\n\r\n", before.concat());
            let end = whole.len();
            let mut bytes = whole.into_bytes();
            bytes.extend(rest);
            let expected = head(&bytes);
            prop_assert_eq!(&expected, &Head::Host(name.to_ascii_lowercase()));
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut % bytes.len()).collect();
            cuts.push(bytes.len());
            cuts.sort_unstable();
            let mut known = 0;
            let mut found = None;
            for cut in cuts {
                if may_end(&bytes[..cut], known) {
                    let now = head(&bytes[..cut]);
                    prop_assert_eq!(now == Head::Incomplete, cut < end);
                    if now != Head::Incomplete {
                        found = Some(now);
                        break;
                    }
                } else {
                    prop_assert!(cut < end);
                }
                known = cut;
            }
            prop_assert_eq!(found, Some(expected));
        }
    }
}

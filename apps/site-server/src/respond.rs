//! From a request to a response.

use std::{
    io,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use cap_std::fs::Dir;
use hyper::{
    Method, Request, Response, StatusCode,
    header::{
        ACCEPT_RANGES, ALLOW, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
        CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue, LAST_MODIFIED, RANGE, VARY,
        X_CONTENT_TYPE_OPTIONS,
    },
};
use twox_hash::XxHash3_64;

use crate::{
    body::{self, CHUNK, SiteBody},
    condition::{self, Validators, Verdict},
    encoding::{self, Encoding},
    find::{self, FindError, Found, SitePath},
    range::{self, Selection},
};

/// A directory, and how its files are to be cached by clients.
pub struct Site {
    root: Dir,
    asset_caching: HeaderValue,
}

impl Site {
    /// Serves `root`; what is not a page may be kept for `max_age` seconds.
    #[must_use]
    pub fn new(root: Dir, max_age: u32) -> Self {
        Self {
            root,
            asset_caching: HeaderValue::try_from(format!("public, max-age={max_age}"))
                .unwrap_or(HeaderValue::from_static("public")),
        }
    }

    /// The answer to a request. Never fails: what goes wrong becomes a status.
    pub fn answer<B>(&self, request: &Request<B>) -> Response<SiteBody> {
        let head = match *request.method() {
            Method::GET => false,
            Method::HEAD => true,
            _ => {
                let mut response = text(StatusCode::METHOD_NOT_ALLOWED, false);
                insert(&mut response, ALLOW, HeaderValue::from_static("GET, HEAD"));
                return response;
            }
        };
        let found = SitePath::parse(request.uri().path()).and_then(|path| path.open(&self.root));
        let result = match found {
            Ok(found) => self.file(request.headers(), head, found),
            Err(FindError::Missing) => self.missing(request.headers(), head),
            Err(FindError::BadPath) => Ok(text(StatusCode::BAD_REQUEST, head)),
            Err(FindError::Forbidden) => Ok(text(StatusCode::FORBIDDEN, head)),
            Err(FindError::System(error)) => Err(error),
        };
        result.unwrap_or_else(|error| {
            eprintln!("kiln-site-server: {}: {error}", request.uri().path());
            text(StatusCode::INTERNAL_SERVER_ERROR, head)
        })
    }

    fn file(
        &self,
        headers: &HeaderMap,
        head: bool,
        found: Found,
    ) -> io::Result<Response<SiteBody>> {
        let Chosen {
            found,
            kind,
            encoding,
            varies,
        } = self.choose(headers, found);
        let size = found.metadata.len();
        // A small file is read whole, once: for its tag and for its bytes.
        let small = match usize::try_from(size) {
            Ok(length) if length <= CHUNK => Some(body::read(&found.file, 0, length)?),
            _ => None,
        };
        let validators = Validators {
            tag: tag(&found, small.as_ref(), encoding)?,
            modified: found
                .metadata
                .modified()
                .ok()
                .and_then(condition::whole_seconds),
        };
        let verdict = condition::evaluate(headers, &validators);
        let mut response = empty(StatusCode::OK);
        insert_text(&mut response, ETAG, &validators.tag)?;
        if let Some(modified) = validators.modified {
            let date = httpdate::fmt_http_date(modified);
            insert_text(&mut response, LAST_MODIFIED, &date)?;
        }
        let caching = if matches!(subtype(kind), "html" | "xml") {
            // Pages and feeds change in place: ask each time, and mostly hear 304.
            HeaderValue::from_static("no-cache")
        } else {
            self.asset_caching.clone()
        };
        insert(&mut response, CACHE_CONTROL, caching);
        if varies {
            insert(
                &mut response,
                VARY,
                HeaderValue::from_static("Accept-Encoding"),
            );
        }
        match verdict {
            Verdict::Proceed => {}
            Verdict::NotModified => {
                *response.status_mut() = StatusCode::NOT_MODIFIED;
                return Ok(response);
            }
            Verdict::Failed => {
                *response.status_mut() = StatusCode::PRECONDITION_FAILED;
                return Ok(response);
            }
        }
        insert(
            &mut response,
            ACCEPT_RANGES,
            HeaderValue::from_static("bytes"),
        );
        describe(&mut response, kind, encoding)?;
        let selection = match headers.get(RANGE).map(HeaderValue::to_str) {
            Some(Ok(range)) if !head && condition::range_applies(headers, &validators) => {
                range::select(range, size)
            }
            _ => Selection::Whole,
        };
        let (start, length) = match selection {
            Selection::Whole => (0, size),
            Selection::Part { start, length } => {
                *response.status_mut() = StatusCode::PARTIAL_CONTENT;
                let range = format!("bytes {start}-{}/{size}", start + length - 1);
                insert_text(&mut response, CONTENT_RANGE, &range)?;
                (start, length)
            }
            Selection::Unsatisfiable => {
                let mut response = text(StatusCode::RANGE_NOT_SATISFIABLE, head);
                insert_text(&mut response, CONTENT_RANGE, &format!("bytes */{size}"))?;
                return Ok(response);
            }
        };
        insert(&mut response, CONTENT_LENGTH, HeaderValue::from(length));
        if !head {
            *response.body_mut() = content(found, small, start, length);
        }
        Ok(response)
    }

    /// The site's own page for what is not there, or a line of text.
    fn missing(&self, headers: &HeaderMap, head: bool) -> io::Result<Response<SiteBody>> {
        let Ok(found) = find::open_file(&self.root, "404.html".into()) else {
            return Ok(text(StatusCode::NOT_FOUND, head));
        };
        let chosen = self.choose(headers, found);
        let length = chosen.found.metadata.len();
        let mut response = empty(StatusCode::NOT_FOUND);
        if chosen.varies {
            insert(
                &mut response,
                VARY,
                HeaderValue::from_static("Accept-Encoding"),
            );
        }
        describe(&mut response, chosen.kind, chosen.encoding)?;
        insert(&mut response, CONTENT_LENGTH, HeaderValue::from(length));
        if !head {
            *response.body_mut() = content(chosen.found, None, 0, length);
        }
        Ok(response)
    }

    /// Takes a precompressed file in place of the original where the client accepts one.
    fn choose(&self, headers: &HeaderMap, found: Found) -> Chosen {
        let kind = kind(&found.path);
        let varies = is_compressible(kind);
        let mut chosen = Chosen {
            found,
            kind,
            encoding: None,
            varies,
        };
        if varies {
            for encoding in encoding::accepted(headers) {
                let path = find::sibling(&chosen.found.path, encoding.suffix());
                if let Ok(found) = find::open_file(&self.root, path) {
                    chosen.found = found;
                    chosen.encoding = Some(encoding);
                    break;
                }
            }
        }
        chosen
    }
}

/// The representation that a client gets.
struct Chosen {
    found: Found,
    /// Content type of the original.
    kind: &'static str,
    encoding: Option<Encoding>,
    /// Whether another client could get another one.
    varies: bool,
}

/// An entity tag: the file's size and a hash of its content. Of large files only the beginning and the end count, so that
/// the first byte does not wait for the last, and their time: size and time tell their versions apart.
fn tag(found: &Found, small: Option<&Bytes>, encoding: Option<Encoding>) -> io::Result<String> {
    let size = found.metadata.len();
    let hash = match small {
        Some(bytes) => XxHash3_64::oneshot(bytes),
        None => {
            let mut sample = body::read(&found.file, 0, CHUNK)?.to_vec();
            sample.extend_from_slice(&body::read(&found.file, size - CHUNK as u64, CHUNK)?);
            let modified = found.metadata.modified().unwrap_or(UNIX_EPOCH);
            sample.extend_from_slice(&nanoseconds(modified).to_le_bytes());
            XxHash3_64::oneshot(&sample)
        }
    };
    // The same content under another coding is another representation.
    let suffix = encoding.map_or("", Encoding::suffix);
    Ok(format!("\"{size:x}-{hash:016x}{suffix}\""))
}

fn nanoseconds(time: SystemTime) -> u128 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos())
}

fn content(found: Found, small: Option<Bytes>, start: u64, length: u64) -> SiteBody {
    if let Some(bytes) = small {
        let range = usize::try_from(start)
            .ok()
            .zip(usize::try_from(start + length).ok());
        if let Some((start, end)) = range
            && end <= bytes.len()
        {
            return SiteBody::Memory(bytes.slice(start..end));
        }
    }
    SiteBody::File {
        file: found.file,
        offset: start,
        remaining: length,
    }
}

/// Sets what says how to read the body.
fn describe(
    response: &mut Response<SiteBody>,
    kind: &'static str,
    encoding: Option<Encoding>,
) -> io::Result<()> {
    if is_text(kind) {
        insert_text(response, CONTENT_TYPE, &[kind, "; charset=utf-8"].concat())?;
    } else {
        insert(response, CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    insert(
        response,
        X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    if let Some(encoding) = encoding {
        insert(
            response,
            CONTENT_ENCODING,
            HeaderValue::from_static(encoding.name()),
        );
    }
    Ok(())
}

/// The content type of a file, by its name.
fn kind(path: impl AsRef<Path>) -> &'static str {
    mime_guess::from_path(path)
        .first_raw()
        .unwrap_or("application/octet-stream")
}

/// What stands behind the slash of a content type, without `+xml` and the like.
fn subtype(kind: &str) -> &str {
    let subtype = kind.split_once('/').map_or("", |(_, subtype)| subtype);
    subtype
        .split_once('+')
        .map_or(subtype, |(subtype, _)| subtype)
}

fn is_text(kind: &str) -> bool {
    kind.starts_with("text/")
        || kind.ends_with("+xml")
        || kind.ends_with("+json")
        || matches!(subtype(kind), "javascript" | "json" | "xml")
}

/// Whether compressing such files ahead of time is worth while; only then are siblings looked for.
fn is_compressible(kind: &str) -> bool {
    is_text(kind)
        || matches!(
            subtype(kind),
            "wasm" | "x-font-ttf" | "octet-stream" | "pdf"
        )
        || kind.starts_with("font/") && !subtype(kind).starts_with("woff")
}

/// A response with a line of text for its status.
fn text(status: StatusCode, head: bool) -> Response<SiteBody> {
    let line = format!("{status}\n");
    let mut response = empty(status);
    insert(
        &mut response,
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    insert(&mut response, CONTENT_LENGTH, HeaderValue::from(line.len()));
    if !head {
        *response.body_mut() = SiteBody::Memory(line.into());
    }
    response
}

/// A response without body or headers, but with room for all that there can be, hyper's own two among them.
fn empty(status: StatusCode) -> Response<SiteBody> {
    let mut response = Response::new(SiteBody::empty());
    *response.status_mut() = status;
    *response.headers_mut() = HeaderMap::with_capacity(12);
    response
}

fn insert(response: &mut Response<SiteBody>, name: HeaderName, value: HeaderValue) {
    response.headers_mut().insert(name, value);
}

/// Sets a header to a text. None of ours can be refused, but a refusal is no reason to end the server.
fn insert_text(response: &mut Response<SiteBody>, name: HeaderName, text: &str) -> io::Result<()> {
    let value = HeaderValue::from_str(text).map_err(io::Error::other)?;
    insert(response, name, value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_a_character_set() {
        for name in [
            "a.html", "a.css", "a.js", "a.json", "a.svg", "a.xml", "a.txt", "a.atom",
        ] {
            assert!(is_text(kind(name)), "{name} is {}", kind(name));
        }
        for name in ["a.png", "a.woff2", "a.pdf", "a"] {
            assert!(!is_text(kind(name)), "{name} is {}", kind(name));
        }
    }

    #[test]
    fn pictures_are_not_compressed_again() {
        for name in [
            "a.png", "a.jpg", "a.webp", "a.avif", "a.woff2", "a.mp4", "a.zip",
        ] {
            assert!(!is_compressible(kind(name)), "{name} is {}", kind(name));
        }
        for name in ["a.html", "a.svg", "a.wasm", "a.ttf"] {
            assert!(is_compressible(kind(name)), "{name} is {}", kind(name));
        }
    }
}

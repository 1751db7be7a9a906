//! From a request to a response.

use std::{
    cell::OnceCell,
    fmt::Write as _,
    io,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use hyper::{
    Method, Request, Response, StatusCode, Version,
    header::{
        ACCEPT_RANGES, ALLOW, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
        CONTENT_TYPE, ETAG, HOST, HeaderMap, HeaderName, HeaderValue, LAST_MODIFIED, RANGE, VARY,
        X_CONTENT_TYPE_OPTIONS,
    },
};
use twox_hash::XxHash64;

use crate::{
    body::{self, CHUNK, SiteBody},
    condition::{self, Validators, Verdict},
    encoding::{self, Encoding},
    find::{FindError, Found, Root, SitePath},
    range::{self, Selection},
};

/// A directory, and how its files are to be cached by clients.
pub struct Site {
    root: Root,
    max_age: u32,
    /// `Cache-Control` of what is not a page, once somebody asked for such a file.
    asset_caching: OnceCell<HeaderValue>,
}

impl Site {
    /// Serves `root`; what is not a page may be kept for `max_age` seconds.
    #[must_use]
    pub fn new(root: Root, max_age: u32) -> Self {
        Self {
            root,
            max_age,
            asset_caching: OnceCell::new(),
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
        // RFC 9112, section 3.2: one, and without one only an old client.
        let mut hosts = request.headers().get_all(HOST).into_iter();
        if hosts.next().is_none() && request.version() == Version::HTTP_11 || hosts.next().is_some()
        {
            return text(StatusCode::BAD_REQUEST, head);
        }
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
        let size = found.size;
        // A small file is read whole, once: for its tag and for its bytes.
        let small = match usize::try_from(size) {
            Ok(length) if length <= CHUNK => Some(body::read(&found.file, 0, length)?),
            _ => None,
        };
        let validators = Validators {
            tag: tag(&found, small.as_ref(), encoding)?,
            modified: condition::whole_seconds(found.modified),
        };
        let verdict = condition::evaluate(headers, &validators);
        let mut response = empty(StatusCode::OK);
        insert_text(&mut response, ETAG, &validators.tag)?;
        if let Some(modified) = validators.modified {
            let date = httpdate::fmt_http_date(modified);
            insert_text(&mut response, LAST_MODIFIED, &date)?;
        }
        let caching = if matches!(kind, "text/html" | "text/xml" | "application/xml") {
            // Pages and feeds change in place: ask each time, and mostly hear 304.
            HeaderValue::from_static("no-cache")
        } else {
            self.asset_caching
                .get_or_init(|| {
                    HeaderValue::try_from(format!("public, max-age={}", self.max_age))
                        .unwrap_or(HeaderValue::from_static("public"))
                })
                .clone()
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
        let Ok(found) = self.root.open_file(b"404.html".to_vec()) else {
            return Ok(text(StatusCode::NOT_FOUND, head));
        };
        let chosen = self.choose(headers, found);
        let length = chosen.found.size;
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
                let path = [&chosen.found.path, encoding.suffix().as_bytes()].concat();
                if let Ok(found) = self.root.open_file(path) {
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
    let size = found.size;
    let hash = match small {
        Some(bytes) => hash(bytes),
        None => {
            let mut sample = body::read(&found.file, 0, CHUNK)?.to_vec();
            sample.extend_from_slice(&body::read(&found.file, size - CHUNK as u64, CHUNK)?);
            sample.extend_from_slice(&nanoseconds(found.modified).to_le_bytes());
            hash(&sample)
        }
    };
    let mut tag = String::with_capacity(48);
    // The same content under another coding is another representation. Writing to a string cannot fail.
    let suffix = encoding.map_or("", Encoding::suffix);
    let _ = write!(tag, "\"{size:x}-{hash:016x}{suffix}\"");
    Ok(tag)
}

fn hash(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
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

/// The content type of a file, by the extension of its name.
fn kind(path: &[u8]) -> &'static str {
    path.iter()
        .rposition(|byte| matches!(byte, b'.' | b'/'))
        .filter(|&position| path.get(position) == Some(&b'.'))
        .and_then(|position| str::from_utf8(path.get(position + 1..)?).ok())
        .and_then(|extension| mime_guess::from_ext(extension).first_raw())
        .unwrap_or("application/octet-stream")
}

fn is_text(kind: &str) -> bool {
    kind.starts_with("text/")
        || kind.ends_with("+xml")
        || kind.ends_with("+json")
        || matches!(
            kind,
            "application/javascript" | "application/json" | "application/xml"
        )
}

/// Whether compressing such files ahead of time is worth while; only then are siblings looked for.
fn is_compressible(kind: &str) -> bool {
    is_text(kind)
        || matches!(
            kind,
            "application/octet-stream"
                | "application/pdf"
                | "application/wasm"
                | "application/x-font-ttf"
        )
        || kind.starts_with("font/") && !kind.starts_with("font/woff")
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
            assert!(
                is_text(kind(name.as_bytes())),
                "{name} is {}",
                kind(name.as_bytes())
            );
        }
        for name in ["a.png", "a.woff2", "a.pdf", "a"] {
            assert!(
                !is_text(kind(name.as_bytes())),
                "{name} is {}",
                kind(name.as_bytes())
            );
        }
    }

    #[test]
    fn pictures_are_not_compressed_again() {
        for name in [
            "a.png", "a.jpg", "a.webp", "a.avif", "a.woff2", "a.mp4", "a.zip",
        ] {
            assert!(
                !is_compressible(kind(name.as_bytes())),
                "{name} is {}",
                kind(name.as_bytes())
            );
        }
        for name in ["a.html", "a.svg", "a.wasm", "a.ttf"] {
            assert!(
                is_compressible(kind(name.as_bytes())),
                "{name} is {}",
                kind(name.as_bytes())
            );
        }
    }
}

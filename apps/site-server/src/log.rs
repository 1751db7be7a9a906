//! The access log: one line a request on standard output, in the Common Log Format that log
//! analysers read.

use std::{
    cell::RefCell,
    fmt::Write as _,
    io::Write as _,
    net::IpAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use hyper::{Method, Request, StatusCode, Uri, Version};

/// What the line for one request says. Made when the request is answered, written when the response is on its way, so
/// that no client waits for the log.
#[derive(Debug)]
pub struct Entry {
    client: IpAddr,
    method: Method,
    uri: Uri,
    version: Version,
    status: StatusCode,
    length: u64,
}

impl Entry {
    /// For a request and what it is answered with; `length` is the body's.
    #[must_use]
    pub fn new<B>(client: IpAddr, request: &Request<B>, status: StatusCode, length: u64) -> Self {
        Self {
            client,
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            status,
            length,
        }
    }

    /// Writes the line. A log that nobody reads any more must not end the service, so errors are passed over.
    pub fn write(&self) {
        write(self);
    }
}

fn write(entry: &Entry) {
    let target = entry
        .uri
        .path_and_query()
        .map_or("*", |target| target.as_str());
    // A request line has no spaces or control characters left, but it may have quotes.
    let target = target.replace('\\', "\\\\").replace('"', "\\\"");
    let mut line = format!("{} - - [", entry.client.to_canonical());
    push_date(&mut line, SystemTime::now());
    // Writing to a string cannot fail.
    let _ = writeln!(
        line,
        "] \"{} {target} {:?}\" {} {}",
        entry.method,
        entry.version,
        entry.status.as_u16(),
        entry.length
    );
    let _ = std::io::stdout().write_all(line.as_bytes());
}

thread_local! {
    /// The last second that was written, and its text.
    static LAST: RefCell<(u64, String)> = const { RefCell::new((u64::MAX, String::new())) };
}

/// Appends `06/Nov/1994:08:49:37 +0000`.
fn push_date(line: &mut String, now: SystemTime) {
    let second = now
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    LAST.with_borrow_mut(|(last, text)| {
        if *last != second {
            *last = second;
            *text = common_log_date(now);
        }
        line.push_str(text);
    });
}

fn common_log_date(now: SystemTime) -> String {
    // "Sun, 06 Nov 1994 08:49:37 GMT" has the same fields in another dress.
    let date = httpdate::fmt_http_date(now);
    let mut words = date.split(' ').skip(1);
    let mut word = || words.next().unwrap_or_default();
    format!("{}/{}/{}:{} +0000", word(), word(), word(), word())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_is_that_of_the_common_log_format() {
        let time = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        assert_eq!(common_log_date(time), "06/Nov/1994:08:49:37 +0000");
    }
}

//! The access log: one line a request on standard output, in the Common Log Format that log
//! analysers read.

use std::{
    cell::RefCell,
    fmt::Write as _,
    net::IpAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use hyper::{Request, StatusCode, Version, http::request::Parts};

/// Writes to standard output. What is written there nobody may read any more, which must not end the service: errors are passed
/// over.
pub fn print(text: &str) {
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        match rustix::io::write(rustix::stdio::stdout(), rest) {
            Ok(0) => return,
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// What the line for one request says.
#[derive(Debug)]
pub struct Entry {
    client: IpAddr,
    request: Parts,
    status: StatusCode,
    length: u64,
}

impl Entry {
    /// For a request and what it is answered with; `length` is the body's.
    #[must_use]
    pub fn new<B>(client: IpAddr, request: Request<B>, status: StatusCode, length: u64) -> Self {
        Self {
            client,
            request: request.into_parts().0,
            status,
            length,
        }
    }
}

/// Lines that are still to be written. A request is noted when it is answered and logged when the response is on its way, so that no
/// client waits for the log.
#[derive(Debug)]
pub struct Log {
    entries: RefCell<Vec<Entry>>,
    /// The last second that was written, and its text.
    date: RefCell<(u64, String)>,
}

impl Log {
    /// Nothing to write yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            entries: RefCell::new(Vec::with_capacity(8)),
            date: RefCell::new((u64::MAX, String::new())),
        }
    }

    /// Notes a request.
    pub fn add(&self, entry: Entry) {
        self.entries.borrow_mut().push(entry);
    }

    /// Writes the lines of all that was noted.
    pub fn write(&self) {
        let mut entries = self.entries.borrow_mut();
        if entries.is_empty() {
            return;
        }
        let mut lines = String::new();
        for entry in entries.drain(..) {
            self.push_line(&mut lines, &entry);
        }
        print(&lines);
    }

    fn push_line(&self, lines: &mut String, entry: &Entry) {
        let request = &entry.request;
        // A request line has no spaces or control characters left, but it may have quotes.
        let target = request
            .uri
            .path_and_query()
            .map_or("*", |target| target.as_str())
            .replace('\\', "\\\\")
            .replace('"', "\\\"");
        let version = if request.version == Version::HTTP_10 {
            "HTTP/1.0"
        } else {
            "HTTP/1.1"
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            lines,
            "{} - - [{}] \"{} {target} {version}\" {} {}",
            entry.client.to_canonical(),
            self.now(),
            request.method,
            entry.status.as_str(),
            entry.length
        );
    }

    /// The time as `06/Nov/1994:08:49:37 +0000`.
    fn now(&self) -> std::cell::Ref<'_, str> {
        let now = SystemTime::now();
        let second = now
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        if self.date.borrow().0 != second {
            *self.date.borrow_mut() = (second, common_log_date(now));
        }
        std::cell::Ref::map(self.date.borrow(), |(_, text)| text.as_str())
    }
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

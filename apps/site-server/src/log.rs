//! The access log: one line a request on standard output, in the Common Log Format that log
//! analysers read.

use std::{
    cell::RefCell,
    fmt::Write as _,
    io::Write as _,
    net::IpAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use hyper::{Request, StatusCode};

/// Writes the line for one request. A log that nobody reads any more must not end the service, so errors
/// are passed over.
pub fn request<B>(client: IpAddr, request: &Request<B>, status: StatusCode, length: u64) {
    let target = request
        .uri()
        .path_and_query()
        .map_or("*", |target| target.as_str());
    // A request line has no spaces or control characters left, but it may have quotes.
    let target = target.replace('\\', "\\\\").replace('"', "\\\"");
    let mut line = format!("{} - - [", client.to_canonical());
    push_date(&mut line, SystemTime::now());
    // Writing to a string cannot fail.
    let _ = writeln!(
        line,
        "] \"{} {target} {:?}\" {} {length}",
        request.method(),
        request.version(),
        status.as_u16()
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

//! Conditional requests: RFC 9110, section 13.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::header::{
    HeaderMap, HeaderName, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE,
    IF_UNMODIFIED_SINCE,
};

/// What tells one version of a file from another.
#[derive(Clone, Debug)]
pub struct Validators {
    /// The entity tag with its quotes; always a strong one.
    pub tag: String,
    /// Time of the last change in whole seconds, if the file has one.
    pub modified: Option<SystemTime>,
}

/// What the conditions of a request come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Answer as if there were none.
    Proceed,
    /// 304: the client has it already.
    NotModified,
    /// 412: the client wanted another version.
    Failed,
}

/// A file's time in the whole seconds that HTTP knows. Nothing for 1970 and earlier: images that
/// are built reproducibly carry no times, and zero must not count as an old version.
#[must_use]
pub fn whole_seconds(time: SystemTime) -> Option<SystemTime> {
    let seconds = time.duration_since(UNIX_EPOCH).ok()?.as_secs();
    (seconds > 0).then(|| UNIX_EPOCH + Duration::from_secs(seconds))
}

/// Weighs the conditions in the order of section 13.2.2.
#[must_use]
pub fn evaluate(headers: &HeaderMap, validators: &Validators) -> Verdict {
    if headers.contains_key(IF_MATCH) {
        if !any_tag(headers, &IF_MATCH, &validators.tag, false) {
            return Verdict::Failed;
        }
    } else if let (Some(limit), Some(modified)) =
        (date(headers, &IF_UNMODIFIED_SINCE), validators.modified)
        && modified > limit
    {
        return Verdict::Failed;
    }
    if headers.contains_key(IF_NONE_MATCH) {
        if any_tag(headers, &IF_NONE_MATCH, &validators.tag, true) {
            return Verdict::NotModified;
        }
    } else if let (Some(since), Some(modified)) =
        (date(headers, &IF_MODIFIED_SINCE), validators.modified)
        && modified <= since
    {
        return Verdict::NotModified;
    }
    Verdict::Proceed
}

/// Whether a range still applies: no `If-Range`, or one that names this very version.
#[must_use]
pub fn range_applies(headers: &HeaderMap, validators: &Validators) -> bool {
    let Some(value) = headers.get(IF_RANGE) else {
        return true;
    };
    let Ok(value) = value.to_str() else {
        return false;
    };
    let value = value.trim();
    if value.starts_with('"') || value.starts_with("W/") {
        value == validators.tag
    } else {
        httpdate::parse_http_date(value).is_ok_and(|date| Some(date) == validators.modified)
    }
}

fn date(headers: &HeaderMap, name: &HeaderName) -> Option<SystemTime> {
    httpdate::parse_http_date(headers.get(name)?.to_str().ok()?).ok()
}

/// Whether one of the listed tags, or `*`, is `tag`. A weak one counts only where `weak` is set.
fn any_tag(headers: &HeaderMap, name: &HeaderName, tag: &str, weak: bool) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|list| list.trim() == "*" || list_has(list, tag, weak))
}

fn list_has(mut list: &str, tag: &str, weak: bool) -> bool {
    loop {
        list = list.trim_start_matches([' ', '\t', ',']);
        let (is_weak, rest) = match list.strip_prefix("W/") {
            Some(rest) => (true, rest),
            None => (false, list),
        };
        // A tag may contain commas, so its quotes bound it.
        let Some(inner) = rest.strip_prefix('"') else {
            return false;
        };
        let Some((name, rest)) = inner.split_once('"') else {
            return false;
        };
        let same = tag
            .strip_prefix('"')
            .and_then(|tag| tag.strip_suffix('"'))
            .is_some_and(|tag| tag == name);
        if same && (weak || !is_weak) {
            return true;
        }
        list = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    const EARLIER: &str = "Sun, 06 Nov 1994 08:49:36 GMT";

    fn validators() -> Validators {
        Validators {
            tag: "\"a,b\"".to_owned(),
            modified: Some(httpdate::parse_http_date(DATE).unwrap()),
        }
    }

    fn headers(list: &[(HeaderName, &'static str)]) -> HeaderMap {
        list.iter()
            .map(|(name, value)| (name.clone(), value.parse().unwrap()))
            .collect()
    }

    fn verdict(list: &[(HeaderName, &'static str)]) -> Verdict {
        evaluate(&headers(list), &validators())
    }

    #[test]
    fn if_none_match() {
        assert_eq!(verdict(&[(IF_NONE_MATCH, "\"a,b\"")]), Verdict::NotModified);
        assert_eq!(
            verdict(&[(IF_NONE_MATCH, "\"x\", W/\"a,b\"")]),
            Verdict::NotModified
        );
        assert_eq!(verdict(&[(IF_NONE_MATCH, "*")]), Verdict::NotModified);
        assert_eq!(
            verdict(&[(IF_NONE_MATCH, "\"a\", \"b\"")]),
            Verdict::Proceed
        );
        assert_eq!(verdict(&[(IF_NONE_MATCH, "a,b")]), Verdict::Proceed);
    }

    #[test]
    fn if_none_match_outweighs_the_date() {
        assert_eq!(
            verdict(&[(IF_NONE_MATCH, "\"x\""), (IF_MODIFIED_SINCE, DATE)]),
            Verdict::Proceed
        );
    }

    #[test]
    fn dates() {
        assert_eq!(verdict(&[(IF_MODIFIED_SINCE, DATE)]), Verdict::NotModified);
        assert_eq!(verdict(&[(IF_MODIFIED_SINCE, EARLIER)]), Verdict::Proceed);
        assert_eq!(
            verdict(&[(IF_MODIFIED_SINCE, "yesterday")]),
            Verdict::Proceed
        );
        assert_eq!(verdict(&[(IF_UNMODIFIED_SINCE, DATE)]), Verdict::Proceed);
        assert_eq!(verdict(&[(IF_UNMODIFIED_SINCE, EARLIER)]), Verdict::Failed);
    }

    #[test]
    fn if_match_needs_a_strong_tag() {
        assert_eq!(verdict(&[(IF_MATCH, "\"a,b\"")]), Verdict::Proceed);
        assert_eq!(verdict(&[(IF_MATCH, "*")]), Verdict::Proceed);
        assert_eq!(verdict(&[(IF_MATCH, "W/\"a,b\"")]), Verdict::Failed);
        assert_eq!(verdict(&[(IF_MATCH, "\"x\"")]), Verdict::Failed);
    }

    #[test]
    fn if_range() {
        let applies = |value| range_applies(&headers(&[(IF_RANGE, value)]), &validators());
        assert!(applies("\"a,b\""));
        assert!(!applies("W/\"a,b\""));
        assert!(applies(DATE));
        assert!(!applies(EARLIER));
        assert!(range_applies(&HeaderMap::new(), &validators()));
    }

    #[test]
    fn no_time_for_files_without_one() {
        assert_eq!(whole_seconds(UNIX_EPOCH), None);
        assert_eq!(whole_seconds(UNIX_EPOCH - Duration::from_secs(5)), None);
        assert!(whole_seconds(UNIX_EPOCH + Duration::from_millis(1500)).is_some());
    }
}

//! The `Range` header: RFC 9110, section 14.
//!
//! One range is served; a request for several gets the whole file, which section 14.2 allows.

/// What part of a file to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// All of it: no range, or one that is to be ignored.
    Whole,
    /// These bytes.
    Part {
        /// First byte.
        start: u64,
        /// How many; at least one.
        length: u64,
    },
    /// A range that the file does not have.
    Unsatisfiable,
}

/// What a `Range` header's value selects from a file of `size` bytes.
#[must_use]
pub fn select(value: &str, size: u64) -> Selection {
    let Some((unit, set)) = value.split_once('=') else {
        return Selection::Whole;
    };
    if !unit.trim().eq_ignore_ascii_case("bytes") || set.contains(',') {
        return Selection::Whole;
    }
    let Some((first, last)) = set.trim().split_once('-') else {
        return Selection::Whole;
    };
    match (position(first), position(last)) {
        (Position::None, Position::At(suffix)) => {
            let length = suffix.min(size);
            if length == 0 {
                Selection::Unsatisfiable
            } else {
                Selection::Part {
                    start: size - length,
                    length,
                }
            }
        }
        (Position::At(start), Position::None) => part(start, u64::MAX, size),
        (Position::At(start), Position::At(last)) if start <= last => part(start, last, size),
        _ => Selection::Whole,
    }
}

fn part(start: u64, last: u64, size: u64) -> Selection {
    if start >= size {
        return Selection::Unsatisfiable;
    }
    let end = last.saturating_add(1).min(size);
    Selection::Part {
        start,
        length: end - start,
    }
}

enum Position {
    None,
    At(u64),
    Wrong,
}

fn position(text: &str) -> Position {
    if text.is_empty() {
        Position::None
    } else if text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit mean a place beyond any file.
        Position::At(text.parse().unwrap_or(u64::MAX))
    } else {
        Position::Wrong
    }
}

#[cfg(test)]
mod tests {
    use super::{Selection::*, select};

    #[test]
    fn the_three_forms() {
        assert_eq!(
            select("bytes=0-0", 10),
            Part {
                start: 0,
                length: 1
            }
        );
        assert_eq!(
            select("bytes=2-5", 10),
            Part {
                start: 2,
                length: 4
            }
        );
        assert_eq!(
            select("bytes=7-", 10),
            Part {
                start: 7,
                length: 3
            }
        );
        assert_eq!(
            select("bytes=-4", 10),
            Part {
                start: 6,
                length: 4
            }
        );
    }

    #[test]
    fn an_end_beyond_the_file_is_cut() {
        assert_eq!(
            select("bytes=5-99", 10),
            Part {
                start: 5,
                length: 5
            }
        );
        assert_eq!(
            select("bytes=-99", 10),
            Part {
                start: 0,
                length: 10
            }
        );
        assert_eq!(
            select("bytes=5-99999999999999999999999", 10),
            Part {
                start: 5,
                length: 5
            }
        );
    }

    #[test]
    fn a_start_beyond_the_file_is_unsatisfiable() {
        assert_eq!(select("bytes=10-", 10), Unsatisfiable);
        assert_eq!(select("bytes=-0", 10), Unsatisfiable);
        assert_eq!(select("bytes=0-", 0), Unsatisfiable);
        assert_eq!(select("bytes=-1", 0), Unsatisfiable);
    }

    #[test]
    fn what_is_not_understood_is_ignored() {
        for value in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=5-2",
            "bytes=a-b",
            "bytes=+1-2",
            "lines=1-2",
            "bytes=0-1,3-4",
            "bytes=0x1-2",
        ] {
            assert_eq!(select(value, 10), Whole, "{value}");
        }
    }
}

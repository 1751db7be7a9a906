//! What happened when in one summons: from the question or connection that asked for a unit to the first byte that it sent.
//!
//! A [`Timeline`] is filled while the unit starts, kept by the store when it is finished, shown by `kiln summon trace` as text
//! ([`Timeline::text`]) and as a file for <https://ui.perfetto.dev> or `chrome://tracing` ([`chrome_trace`]).
//!
//! Times are of the wall clock, in microseconds since 1970. They come from several processes of one machine (summoner,
//! monitor, kernel); an order that a clock got wrong is shown as it was told, and no phase is ever shorter than nothing.

use std::{
    fmt::Write,
    time::{Duration, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Most events of one timeline: what happens again and again is no part of a summons.
pub const MAX_EVENTS: usize = 32;

/// One summons of a unit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeline {
    /// The unit.
    pub unit: String,
    /// The instance that served it; empty until there is one.
    pub instance: String,
    /// Who asked for the unit.
    pub cause: Cause,
    /// What happened, in the order in which it was told: microseconds since 1970. An event is there at most once.
    pub events: Vec<(Event, u64)>,
    /// Why it failed, if it did.
    pub failure: Option<String>,
}

/// Why a unit was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cause {
    /// A DNS question for this name.
    Query(String),
    /// A connection to this port at its address (or its front's).
    Connection(u16),
    /// A datagram to this port at its address.
    Datagram(u16),
    /// `kiln summon start`.
    Command,
    /// `min_running` or `always`.
    Floor,
}

/// A moment of a summons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The question came in.
    Query,
    /// The connection came in.
    Connection,
    /// The datagram came in.
    Datagram,
    /// The command, or the floor, asked for it.
    Asked,
    /// The monitor's process was started.
    Started,
    /// A suspended unit was woken.
    Resumed,
    /// The kernel has told that it runs.
    KernelUp,
    /// The program's first instruction is next.
    ProgramStarted,
    /// The program listens.
    Listening,
    /// It counts as ready.
    Ready,
    /// The question was answered.
    Answered,
    /// The unit sent its first byte to a client.
    FirstByte,
    /// It did not become ready, or ended before.
    Failed,
    /// It was stopped, or ended by itself.
    Stopped,
    /// It was suspended.
    Suspended,
}

impl Event {
    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Connection => "connection",
            Self::Datagram => "datagram",
            Self::Asked => "asked",
            Self::Started => "started",
            Self::Resumed => "resumed",
            Self::KernelUp => "kernel up",
            Self::ProgramStarted => "program started",
            Self::Listening => "listening",
            Self::Ready => "ready",
            Self::Answered => "answered",
            Self::FirstByte => "first byte",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
            Self::Suspended => "suspended",
        }
    }

    /// The phase that ends with this event; none for events that stand beside the way.
    fn phase(self) -> Option<&'static str> {
        match self {
            Self::Started => Some("queue"),
            Self::Resumed => Some("resume"),
            Self::KernelUp => Some("monitor"),
            Self::ProgramStarted => Some("kernel boot"),
            Self::Listening => Some("program start"),
            Self::Ready => Some("ready"),
            Self::FirstByte => Some("first byte"),
            _ => None,
        }
    }

    /// The event that the cause of a summons is.
    fn of_cause(cause: &Cause) -> Self {
        match cause {
            Cause::Query(_) => Self::Query,
            Cause::Connection(_) => Self::Connection,
            Cause::Datagram(_) => Self::Datagram,
            Cause::Command | Cause::Floor => Self::Asked,
        }
    }
}

impl std::fmt::Display for Cause {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Query(name) => write!(formatter, "query for {name}"),
            Self::Connection(port) => write!(formatter, "connection to port {port}"),
            Self::Datagram(port) => write!(formatter, "datagram to port {port}"),
            Self::Command => formatter.write_str("kiln summon start"),
            Self::Floor => formatter.write_str("kept running"),
        }
    }
}

/// Part of a summons from one event to the next.
struct Phase {
    name: &'static str,
    start: u64,
    length: u64,
}

impl Timeline {
    /// A summons that begins: the cause is its first event, at `time`.
    #[must_use]
    pub fn new(unit: impl Into<String>, cause: Cause, time: u64) -> Self {
        let first = Event::of_cause(&cause);
        Self {
            unit: unit.into(),
            instance: String::new(),
            cause,
            events: vec![(first, time)],
            failure: None,
        }
    }

    /// Notes an event. Only the first of its kind counts; false: it was there, or there are too many.
    pub fn note(&mut self, event: Event, time: u64) -> bool {
        if self.time_of(event).is_some() || self.events.len() >= MAX_EVENTS {
            return false;
        }
        self.events.push((event, time));
        true
    }

    /// Notes that it failed, and why.
    pub fn fail(&mut self, reason: impl Into<String>, time: u64) {
        if self.note(Event::Failed, time) {
            self.failure = Some(reason.into());
        }
    }

    /// When an event happened.
    #[must_use]
    pub fn time_of(&self, event: Event) -> Option<u64> {
        let found = self.events.iter().find(|(one, _)| *one == event);
        found.map(|(_, time)| *time)
    }

    /// The earliest time in it; 0 if nothing happened.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.events.iter().map(|(_, time)| *time).min().unwrap_or(0)
    }

    /// Microseconds from the beginning to an event.
    #[must_use]
    pub fn offset_of(&self, event: Event) -> Option<u64> {
        Some(self.time_of(event)?.saturating_sub(self.start()))
    }

    /// Events by time; those of one moment as they were told.
    fn sorted(&self) -> Vec<(Event, u64)> {
        let mut all = self.events.clone();
        all.sort_by_key(|(_, time)| *time);
        all
    }

    /// The phases in the order of their ends.
    fn phases(&self) -> Vec<Phase> {
        let mut start = self.start();
        let mut all = Vec::new();
        for (event, time) in self.sorted() {
            if let Some(name) = event.phase() {
                all.push(Phase {
                    name,
                    start,
                    length: time.saturating_sub(start),
                });
                start = start.max(time);
            }
        }
        all
    }

    /// For people: a line that says what it is, then one for each event with its time since the first one, the time since the one
    /// before, and a bar, which begins where the event before ended.
    #[must_use]
    pub fn text(&self) -> String {
        const WIDTH: u64 = 40;
        let start = self.start();
        let events = self.sorted();
        // What happens after the first byte would make everything before it invisible.
        let last = events
            .iter()
            .filter(|(event, _)| !matches!(event, Event::Stopped | Event::Suspended))
            .map(|(_, time)| time.saturating_sub(start))
            .max()
            .unwrap_or(0)
            .max(1);
        let column = |offset: u64| {
            let column = u128::from(offset.min(last)) * u128::from(WIDTH) / u128::from(last);
            usize::try_from(column).unwrap_or(0)
        };
        let names = events.iter().map(|(event, _)| event.name().len());
        let width = names.max().unwrap_or(0).max("EVENT".len());
        let instance = if self.instance.is_empty() {
            "-"
        } else {
            &self.instance
        };
        let mut text = format!(
            "{}  instance {instance}  {}  {}\n{:width$}  {:>12}  {:>12}\n",
            self.unit,
            self.cause,
            date(start),
            "EVENT",
            "AT ms",
            "DELTA ms",
        );
        let mut before = 0;
        for (event, time) in events {
            let offset = time.saturating_sub(start);
            let (from, to) = (column(before), column(offset));
            let bar = "#".repeat((to - from).max(1));
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{:width$}  {:>12}  {:>12}  {}{bar}",
                event.name(),
                milliseconds(offset),
                milliseconds(offset.saturating_sub(before)),
                " ".repeat(from),
            );
            before = offset;
        }
        if let Some(reason) = &self.failure {
            for line in reason.lines() {
                let _ = writeln!(text, "  {line}");
            }
        }
        text
    }
}

/// A number of milliseconds with three places.
fn milliseconds(microseconds: u64) -> String {
    format!("{}.{:03}", microseconds / 1000, microseconds % 1000)
}

/// Date and time, in universal time, with microseconds.
fn date(microseconds: u64) -> String {
    let whole = Duration::from_secs(microseconds / 1_000_000);
    let longest = Duration::from_secs(253_402_300_799); // The year 9999, beyond which the format does not go.
    let text = httpdate::fmt_http_date(UNIX_EPOCH + whole.min(longest));
    let text = text.strip_suffix(" GMT").unwrap_or(&text);
    format!("{text}.{:06} UTC", microseconds % 1_000_000)
}

/// Timelines as a trace file: JSON of the Trace Event Format ("Trace Event Format", Google, 2016: JSON object format). Each
/// unit is a process, each of its summons a thread: the phases are complete events (`X`), the events instants (`i`), both
/// with times in microseconds since the earliest event of all.
#[must_use]
pub fn chrome_trace(timelines: &[Timeline]) -> String {
    let origin = timelines
        .iter()
        .filter(|timeline| !timeline.events.is_empty())
        .map(Timeline::start)
        .min()
        .unwrap_or(0);
    let mut units: Vec<&str> = timelines
        .iter()
        .map(|timeline| timeline.unit.as_str())
        .collect();
    units.sort_unstable();
    units.dedup();
    let mut events: Vec<Value> = Vec::new();
    for (index, unit) in units.iter().enumerate() {
        events.push(json!({
            "ph": "M", "name": "process_name", "pid": index + 1, "tid": 0,
            "args": { "name": format!("unit {unit}") },
        }));
    }
    for (index, timeline) in timelines.iter().enumerate() {
        let process = units
            .binary_search(&timeline.unit.as_str())
            .map_or(0, |index| index + 1);
        let thread = index + 1;
        let at = |time: u64| time.saturating_sub(origin);
        events.push(json!({
            "ph": "M", "name": "thread_name", "pid": process, "tid": thread,
            "args": { "name": format!("{} ({})", timeline.cause, date(timeline.start())) },
        }));
        for phase in timeline.phases() {
            events.push(json!({
                "ph": "X", "name": phase.name, "cat": "phase", "pid": process, "tid": thread,
                "ts": at(phase.start), "dur": phase.length,
                "args": { "instance": timeline.instance },
            }));
        }
        for (event, time) in timeline.sorted() {
            let mut arguments = json!({ "microseconds_since_1970": time });
            if let (Event::Failed, Some(reason), Some(map)) =
                (event, &timeline.failure, arguments.as_object_mut())
            {
                map.insert("reason".into(), Value::String(reason.clone()));
            }
            events.push(json!({
                "ph": "i", "name": event.name(), "cat": "event", "pid": process, "tid": thread,
                "ts": at(time), "s": "t", "args": arguments,
            }));
        }
    }
    json!({ "displayTimeUnit": "ms", "traceEvents": events }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 1_764_000_000_000_000;

    fn summons() -> Timeline {
        let mut timeline = Timeline::new("www", Cause::Query("www.example.org".into()), START);
        timeline.instance = "summon-www".into();
        for (event, offset) in [
            (Event::Answered, 90),
            (Event::Started, 800),
            (Event::ProgramStarted, 9_500),
            (Event::KernelUp, 4_000),
            (Event::Listening, 12_000),
            (Event::Ready, 12_100),
            (Event::FirstByte, 20_000),
            (Event::Stopped, 120_000_000),
        ] {
            assert!(timeline.note(event, START + offset));
        }
        timeline
    }

    #[test]
    fn events_count_once() {
        let mut timeline = summons();
        assert!(!timeline.note(Event::Ready, START + 1));
        assert_eq!(timeline.offset_of(Event::Ready), Some(12_100));
        assert_eq!(timeline.offset_of(Event::Failed), None);
        timeline.fail("no", 1);
        timeline.fail("again", 2);
        assert_eq!(timeline.failure.as_deref(), Some("no"));
        assert_eq!(timeline.start(), 1);
        let stored = serde_json::to_string(&timeline).unwrap();
        assert_eq!(serde_json::from_str::<Timeline>(&stored).unwrap(), timeline);
    }

    #[test]
    fn text_has_aligned_columns_and_bars_in_order() {
        let text = summons().text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[0],
            "www  instance summon-www  query for www.example.org  Mon, 24 Nov 2025 16:00:00.000000 UTC"
        );
        assert_eq!(lines[1], "EVENT                   AT ms      DELTA ms");
        assert_eq!(lines[2], "query                   0.000         0.000  #");
        assert_eq!(
            lines[5],
            "kernel up               4.000         3.200   #######"
        );
        assert_eq!(
            lines[9],
            "first byte             20.000         7.900                          ################"
        );
        assert!(lines[10].starts_with("stopped            120000.000    119980.000"));
        assert_eq!(lines.len(), 11);
        let mut failed = Timeline::new("a", Cause::Connection(80), 5);
        failed.fail("it ended\nlast line", 7);
        let text = failed.text();
        assert!(text.ends_with("  it ended\n  last line\n"), "{text}");
        assert!(text.contains(
            "a  instance -  connection to port 80  Thu, 01 Jan 1970 00:00:00.000005 UTC"
        ));
    }

    #[test]
    fn wrong_clocks_and_huge_times_do_no_harm() {
        let mut timeline = Timeline::new("a", Cause::Floor, u64::MAX);
        timeline.note(Event::Started, 0);
        timeline.note(Event::Ready, u64::MAX - 1);
        assert!(timeline.text().lines().count() > 3);
        assert!(timeline.phases().iter().all(|phase| phase.start < u64::MAX));
        let empty = Timeline {
            events: Vec::new(),
            ..timeline
        };
        assert!(empty.text().contains("EVENT"));
        assert!(chrome_trace(&[empty]).contains("traceEvents"));
    }

    #[test]
    fn the_trace_file_has_the_fields_of_the_format() {
        let mut second = Timeline::new("db", Cause::Connection(6379), START + 50);
        second.note(Event::Resumed, START + 60);
        second.fail("gone", START + 70);
        let text = chrome_trace(&[summons(), second]);
        let trace: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(trace["displayTimeUnit"], "ms");
        let events = trace["traceEvents"].as_array().unwrap();
        for event in events {
            for field in ["pid", "tid"] {
                assert!(event[field].is_u64(), "{event}");
            }
            assert!(
                event["name"].is_string() && event["args"].is_object(),
                "{event}"
            );
            match event["ph"].as_str().unwrap() {
                "X" => assert!(
                    event["ts"].is_u64() && event["dur"].is_u64() && event["cat"].is_string()
                ),
                "i" => {
                    assert!(event["ts"].is_u64());
                    assert_eq!(event["s"], "t");
                }
                "M" => {
                    assert!(
                        ["process_name", "thread_name"].contains(&event["name"].as_str().unwrap())
                    );
                    assert!(event["args"]["name"].is_string());
                }
                other => panic!("{other}"),
            }
        }
        let phases: Vec<(&str, u64, u64)> = events
            .iter()
            .filter(|event| event["ph"] == "X")
            .map(|event| {
                let number = |field: &str| event[field].as_u64().unwrap();
                (event["name"].as_str().unwrap(), number("ts"), number("dur"))
            })
            .collect();
        assert_eq!(
            phases,
            [
                ("queue", 0, 800),
                ("monitor", 800, 3_200),
                ("kernel boot", 4_000, 5_500),
                ("program start", 9_500, 2_500),
                ("ready", 12_000, 100),
                ("first byte", 12_100, 7_900),
                ("resume", 50, 10),
            ]
        );
        let failed = events
            .iter()
            .find(|event| event["name"] == "failed")
            .unwrap();
        assert_eq!(failed["args"]["reason"], "gone");
        assert_eq!(failed["pid"], 1);
    }
}

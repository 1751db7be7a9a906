//! Messages about the kernel's work.
//!
//! Lines go over the link to the monitor, which shows them apart from the program's output. Without a monitor they go to the
//! console, with a prefix that the program's own output does not have. What is shown is set for each
//! topic by the run's `log` option: `syscall=trace,net=debug,info`.

pub mod unwind;

use alloc::{string::String, sync::Arc, vec::Vec};
use core::{
    fmt::{self, Write},
    sync::atomic::{AtomicBool, Ordering},
};

use spin::Once;

use crate::{Result, host::Host, link::Link, sync::Mutex, syscall, task::Thread};

/// How important a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something failed.
    Error,
    /// Something is not as it should be.
    Warning,
    /// Worth knowing.
    Info,
    /// For those who look for a mistake.
    Debug,
    /// Every step.
    Trace,
}

impl Level {
    fn parse(text: &str) -> Option<Level> {
        Some(match text {
            "error" => Level::Error,
            "warning" | "warn" => Level::Warning,
            "info" => Level::Info,
            "debug" => Level::Debug,
            "trace" => Level::Trace,
            _ => return None,
        })
    }
}

/// Where messages go.
enum Output {
    /// The link is not up yet: they are kept until it is.
    Kept(Vec<String>),
    /// The monitor.
    Link(Arc<Link>),
    /// There is no monitor.
    Console,
}

/// What messages are shown, and where.
pub struct Log {
    host: Host,
    output: Mutex<Output>,
    default: Level,
    topics: Vec<(String, Level)>,
    trace_system_calls: AtomicBool,
    /// What has been said and is to be said only once.
    said: Mutex<Vec<u64>>,
}

impl Log {
    /// A log with a filter such as `syscall=trace,debug`; parts that make no sense are passed over with a warning.
    #[must_use]
    pub fn new(host: Host, filter: Option<&str>) -> Log {
        let mut log = Log {
            host,
            output: Mutex::new(Output::Kept(Vec::new())),
            default: Level::Warning,
            topics: Vec::new(),
            trace_system_calls: AtomicBool::new(false),
            said: Mutex::new(Vec::new()),
        };
        if let Some(filter) = filter {
            log.read_filter(filter);
        }
        let trace = log.enabled("syscall", Level::Trace);
        log.trace_system_calls.store(trace, Ordering::Relaxed);
        log
    }

    /// Takes over what a filter says.
    fn read_filter(&mut self, filter: &str) {
        for part in filter.split(',').filter(|part| !part.is_empty()) {
            let (topic, level) = part
                .split_once('=')
                .map_or((None, part), |(topic, level)| (Some(topic), level));
            match (topic, Level::parse(level)) {
                (None, Some(level)) => self.default = level,
                (Some(topic), Some(level)) => {
                    self.topics.retain(|known| known.0 != topic);
                    self.topics.push((topic.into(), level));
                }
                (_, None) => self.write(
                    Level::Warning,
                    format_args!("log filter `{part}` has no level; levels are error, warning, info, debug, trace"),
                ),
            }
        }
    }

    /// Whether messages of a topic and level are shown.
    #[must_use]
    pub fn enabled(&self, topic: &str, level: Level) -> bool {
        if level <= self.default {
            return true;
        }
        // A topic is a part of a module's path: `net` covers `kiln_kernel::net::stack`.
        self.topics
            .iter()
            .any(|(name, shown)| level <= *shown && topic.split("::").any(|part| part == name))
    }

    /// Writes a line, whatever the filter says.
    pub fn write(&self, level: Level, message: fmt::Arguments<'_>) {
        let mut line = String::new();
        let _ = match level {
            Level::Warning => write!(line, "warning: {message}"),
            _ => write!(line, "{message}"),
        };
        let link = match &mut *self.output.lock() {
            Output::Kept(lines) => return lines.push(line),
            Output::Link(link) => Some(Arc::clone(link)),
            Output::Console => None,
        };
        if !link.is_some_and(|link| link.log(&line)) {
            write_console(self.host, format_args!("{line}"));
        }
    }

    /// Sets where lines go from now on, and those that were kept.
    fn open(&self, output: Output) {
        let before = core::mem::replace(&mut *self.output.lock(), output);
        if let Output::Kept(lines) = before {
            for line in lines {
                self.write(Level::Info, format_args!("{line}"));
            }
        }
    }

    /// True the first time it is asked for `key`.
    pub fn first_time(&self, key: u64) -> bool {
        let mut said = self.said.lock();
        match said.binary_search(&key) {
            Ok(_) => false,
            Err(index) => {
                said.insert(index, key);
                true
            }
        }
    }
}

/// Writes a line to the console; what it does not take is lost.
fn write_console(host: Host, message: fmt::Arguments<'_>) {
    let mut line = String::new();
    let _ = writeln!(line, "kiln: {message}");
    let mut bytes = line.as_bytes();
    while !bytes.is_empty() {
        match host.console_write(bytes) {
            Ok(0) | Err(_) => break,
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
        }
    }
}

static LOG: Once<Log> = Once::new();

/// Sets the log up, once, at boot.
pub fn start(host: Host, filter: Option<&str>) {
    LOG.call_once(|| Log::new(host, filter));
}

/// Has messages go over the link from now on, or to the console when there is none; those from before as well.
pub fn open(link: Option<&Arc<Link>>) {
    if let Some(log) = LOG.get() {
        log.open(link.map_or(Output::Console, |link| Output::Link(Arc::clone(link))));
    }
}

/// Makes sure that no message is lost when the instance ends now.
pub fn finish() {
    let Some(log) = LOG.get() else { return };
    let link = match &*log.output.lock() {
        Output::Kept(_) => None,
        Output::Link(link) => Some(Arc::clone(link)),
        Output::Console => return,
    };
    match link {
        Some(link) => link.drain(),
        // The link never came up.
        None => log.open(Output::Console),
    }
}

/// Writes a line to the console, whatever the filter says: for what is wrong with the link itself.
pub fn console(message: fmt::Arguments<'_>) {
    if let Some(log) = LOG.get() {
        write_console(log.host, message);
    }
}

/// Writes a line if the log is up and its filter lets it through. Used by the macros.
pub fn message(topic: &str, level: Level, message: fmt::Arguments<'_>) {
    if let Some(log) = LOG.get()
        && log.enabled(topic, level)
    {
        log.write(level, message);
    }
}

/// Writes an error to the log; the topic for the filter is the module's path.
macro_rules! kernel_error {
    ($($message:tt)+) => {
        $crate::trace::message(module_path!(), $crate::trace::Level::Error, format_args!($($message)+))
    };
}
pub(crate) use kernel_error as error;

/// Writes a warning to the log; the topic for the filter is the module's path.
macro_rules! kernel_warn {
    ($($message:tt)+) => {
        $crate::trace::message(module_path!(), $crate::trace::Level::Warning, format_args!($($message)+))
    };
}
pub(crate) use kernel_warn as warn;

/// Writes something worth knowing to the log; the topic for the filter is the module's path.
macro_rules! kernel_info {
    ($($message:tt)+) => {
        $crate::trace::message(module_path!(), $crate::trace::Level::Info, format_args!($($message)+))
    };
}
pub(crate) use kernel_info as info;

/// Writes what helps to find a mistake to the log; the topic for the filter is the module's path.
macro_rules! kernel_debug {
    ($($message:tt)+) => {
        $crate::trace::message(module_path!(), $crate::trace::Level::Debug, format_args!($($message)+))
    };
}
pub(crate) use kernel_debug as debug;

/// Says once for each different `key` that something is not supported. `what` names the call and its arguments.
pub fn unsupported(key: u64, what: fmt::Arguments<'_>) {
    if let Some(log) = LOG.get()
        && log.first_time(key)
    {
        log.write(Level::Warning, format_args!("not supported: {what}"));
    }
}

/// Shows a system call, if that is wanted. `None`: interrupted by a signal.
#[inline]
pub fn system_call(
    thread: &Thread,
    number: u64,
    arguments: &[u64; 6],
    result: Option<Result<u64>>,
) {
    if let Some(log) = LOG.get()
        && log.trace_system_calls.load(Ordering::Relaxed)
    {
        show_system_call(log, thread, number, arguments, result);
    }
}

#[cold]
fn show_system_call(
    log: &Log,
    thread: &Thread,
    number: u64,
    arguments: &[u64; 6],
    result: Option<Result<u64>>,
) {
    let name = syscall::table::name(number);
    let [a, b, c, d, e, f] = arguments;
    match result {
        None => log.write(
            Level::Trace,
            format_args!("[{}] {name}({a:#x}, {b:#x}, {c:#x}) interrupted", thread.id),
        ),
        Some(Ok(value)) => log.write(
            Level::Trace,
            format_args!(
                "[{}] {name}({a:#x}, {b:#x}, {c:#x}, {d:#x}, {e:#x}, {f:#x}) = {value:#x}",
                thread.id
            ),
        ),
        Some(Err(error)) => log.write(
            Level::Trace,
            format_args!(
                "[{}] {name}({a:#x}, {b:#x}, {c:#x}, {d:#x}, {e:#x}, {f:#x}) = {error:?}",
                thread.id
            ),
        ),
    }
}

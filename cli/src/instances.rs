//! `kiln ps`, `logs`, `stop`, `kill` and `rm`: commands about instances that are there.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use kiln_monitor::arguments::{Publish, format_memory, parse_signal};
use kiln_monitor::console::{Begin, Reader, Watch};
use kiln_monitor::control::{Client, Request};
use kiln_monitor::state::{Instance, Phase, StateDirectory, now};
use serde::Serialize;

use crate::arguments::{KillArguments, LogsArguments, PsArguments, RmArguments, StopArguments};
use crate::failure::{self, Failure};
use crate::text;

/// How long an instance may take to end once its process has been killed.
const END: Duration = Duration::from_secs(10);
/// SIGTERM and SIGKILL.
const SIGTERM: u8 = 15;
const SIGKILL: u8 = 9;

/// One instance for `ps --json`.
#[derive(Debug, Serialize)]
struct Row<'a> {
    name: &'a str,
    image: &'a str,
    engine: &'a str,
    network: &'a str,
    state: Phase,
    exit_code: Option<i32>,
    reason: Option<&'a str>,
    ports: &'a [Publish],
    /// Milliseconds since 1970.
    created: u64,
    started: Option<u64>,
    ended: Option<u64>,
    /// Bytes.
    memory: u64,
    memory_used: Option<u64>,
    pid: Option<u32>,
}

/// `kiln ps`.
pub fn ps(arguments: &PsArguments) -> Result<ExitCode, Failure> {
    let state = StateDirectory::from_environment()?;
    let (mut instances, damaged) = state.list()?;
    for error in damaged {
        tell_line!("kiln: warning: {error}");
    }
    if arguments.running {
        instances.retain(Instance::alive);
    }
    if arguments.json {
        let rows: Vec<Row<'_>> = instances.iter().map(row).collect();
        text::json(&rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.quiet {
        let names: String = instances
            .iter()
            .map(|instance| format!("{}\n", instance.name()))
            .collect();
        text::print(&names)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<Vec<String>> = instances
        .iter()
        .map(|instance| {
            let row = row(instance);
            let limit = format_memory(row.memory);
            vec![
                row.name.to_owned(),
                row.image.to_owned(),
                row.engine.to_owned(),
                words(instance),
                row.ports
                    .iter()
                    .map(Publish::to_string)
                    .collect::<Vec<_>>()
                    .join(", "),
                match row.memory_used {
                    Some(used) => format!("{} / {limit}", format_memory(used)),
                    None => limit,
                },
            ]
        })
        .collect();
    text::table(
        &["NAME", "IMAGE", "ENGINE", "STATE", "PORTS", "MEMORY"],
        &rows,
    )?;
    Ok(ExitCode::SUCCESS)
}

fn row(instance: &Instance) -> Row<'_> {
    let (configuration, state) = (&instance.configuration, &instance.state);
    Row {
        name: &configuration.name,
        image: &configuration.image.name,
        engine: &configuration.engine,
        network: configuration.network.name(),
        state: state.phase,
        exit_code: state.exit_code,
        reason: state.reason.as_deref(),
        ports: &state.ports,
        created: state.created,
        started: state.started,
        ended: state.ended,
        memory: configuration.memory,
        memory_used: state.process.and_then(resident),
        pid: state.process,
    }
}

/// An instance's state in words.
fn words(instance: &Instance) -> String {
    let state = &instance.state;
    let since =
        |time: Option<u64>| text::duration(now().saturating_sub(time.unwrap_or(state.created)));
    let code = state
        .exit_code
        .map_or_else(String::new, |code| format!(" ({code})"));
    match state.phase {
        Phase::Starting => "starting".to_owned(),
        Phase::Running => format!("running for {}", since(state.started)),
        Phase::Suspended => "suspended".to_owned(),
        Phase::Exited => format!("exited{code} {} ago", since(state.ended)),
        Phase::Crashed => format!("crashed{code} {} ago", since(state.ended)),
    }
}

/// Memory of a process that lies in the host's memory now (`/proc/PID/status`).
fn resident(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// `kiln logs`.
pub fn logs(arguments: &LogsArguments) -> Result<ExitCode, Failure> {
    let state = StateDirectory::from_environment()?;
    let instance = state.open(&arguments.name)?;
    let begin = arguments.tail.map_or(Begin::Start, Begin::LastLines);
    match show(&state, &instance, begin, arguments.follow) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(failure::io(&format!(
            "show the log of '{}'",
            arguments.name
        ))(error)),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn show(state: &StateDirectory, instance: &Instance, begin: Begin, follow: bool) -> io::Result<()> {
    let watch = if follow {
        Some(Watch::new(instance.directory())?)
    } else {
        None
    };
    let mut reader = Reader::open(&instance.console_path(), begin)?;
    let mut output = io::stdout().lock();
    loop {
        // Asked before the copy: what an ended instance wrote is there in full.
        let alive = follow
            && state
                .open(instance.name())
                .is_ok_and(|instance| instance.alive());
        reader.copy(&mut output)?;
        output.flush()?;
        match &watch {
            Some(watch) if alive => watch.wait()?,
            _ => return Ok(()),
        }
    }
}

/// Does something for each name; says all failures, and fails as the first one did.
fn each(
    names: &[String],
    mut action: impl FnMut(&StateDirectory, &str) -> Result<(), Failure>,
) -> Result<ExitCode, Failure> {
    let state = StateDirectory::from_environment()?;
    let mut first: Option<Failure> = None;
    for name in names {
        match action(&state, name) {
            Ok(()) => text::print(&format!("{name}\n"))?,
            Err(failure) => {
                if let Some(earlier) = first.replace(failure) {
                    tell!("{}", earlier.text());
                }
            }
        }
    }
    match first {
        Some(failure) => Err(failure),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// `kiln stop`.
pub fn stop(arguments: &StopArguments) -> Result<ExitCode, Failure> {
    let grace = Duration::from_secs(u64::from(arguments.time));
    each(&arguments.names, |state, name| {
        let instance = state.open(name)?;
        if !instance.alive() {
            return Ok(());
        }
        let mut client = match connect(state, &instance) {
            Ok(Some(client)) => client,
            Ok(None) => return Ok(()),
            Err(_) => return end(state, &instance),
        };
        client.ask(Request::Signal(SIGTERM))?;
        let ended = client
            .wait_end(grace)
            .map_err(failure::io(&format!("wait for the end of '{name}'")))?;
        if ended {
            wait_unlocked(&instance)
        } else {
            tell_line!(
                "kiln: '{name}' did not stop within {} seconds: ending it",
                arguments.time
            );
            end(state, &instance)
        }
    })
}

/// `kiln kill`.
pub fn kill(arguments: &KillArguments) -> Result<ExitCode, Failure> {
    let signal = parse_signal(&arguments.signal)?;
    each(&arguments.names, |state, name| {
        let instance = state.open(name)?;
        if !instance.alive() {
            return Err(Failure::input(
                format!("the instance '{name}' does not run"),
                "'kiln ps' shows the state of all instances",
            ));
        }
        if signal == SIGKILL {
            return end(state, &instance);
        }
        match connect(state, &instance)? {
            Some(mut client) => Ok(client.ask(Request::Signal(signal))?),
            None => Ok(()),
        }
    })
}

/// `kiln rm`.
pub fn rm(arguments: &RmArguments) -> Result<ExitCode, Failure> {
    each(&arguments.names, |state, name| {
        let instance = match state.open(name) {
            Ok(instance) => instance,
            Err(kiln_monitor::Error::Damaged { .. }) if arguments.force => {
                state.remove_damaged(name)?;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        if instance.alive() {
            if !arguments.force {
                return Err(Failure::input(
                    format!("the instance '{name}' runs"),
                    format!(
                        "stop it first ('kiln stop {name}'), or end and remove it: kiln rm -f {name}"
                    ),
                ));
            }
            end(state, &instance)?;
        }
        Ok(instance.remove()?)
    })
}

/// Connects to an instance's monitor. `None`: it has ended meanwhile.
fn connect(state: &StateDirectory, instance: &Instance) -> Result<Option<Client>, Failure> {
    let limit = std::time::Instant::now() + Duration::from_secs(2);
    loop {
        let error = match Client::connect(instance) {
            Ok(client) => return Ok(Some(client)),
            Err(error) => error,
        };
        // A monitor that has just begun has no socket yet; one that is about to go has none any more.
        if !state
            .open(instance.name())
            .is_ok_and(|instance| instance.alive())
        {
            return Ok(None);
        }
        if std::time::Instant::now() >= limit {
            return Err(error.into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends an instance at once: by its monitor, and if that does not answer, by ending the monitor, with which its unikernel goes.
fn end(state: &StateDirectory, instance: &Instance) -> Result<(), Failure> {
    let asked = connect(state, instance).and_then(|client| match client {
        Some(mut client) => {
            client.ask(Request::Kill)?;
            client.wait_end(END).map_err(failure::io(&format!(
                "wait for the end of '{}'",
                instance.name()
            )))
        }
        None => Ok(true),
    });
    if matches!(asked, Ok(true)) {
        return wait_unlocked(instance);
    }
    let latest = state.open(instance.name())?;
    if let Some(process) = latest
        .state
        .monitor
        .filter(|_| latest.alive())
        .and_then(|number| i32::try_from(number).ok())
        .and_then(rustix::process::Pid::from_raw)
    {
        // The lock is held, so this is the monitor still.
        let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
        return wait_unlocked(instance);
    }
    asked.map(|_| ())
}

/// A command that ended an instance returns when its folder is free.
fn wait_unlocked(instance: &Instance) -> Result<(), Failure> {
    if instance.wait_unlocked(END)? {
        return Ok(());
    }
    Err(Failure::environment(
        format!("the monitor of '{}' does not end", instance.name()),
        Some(format!(
            "look at its own log, {}",
            instance.directory().join("monitor.log").display()
        )),
    ))
}

//! `kiln summon`: being a summoner, and speaking to one.

use std::collections::HashMap;
use std::fs::{DirBuilder, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_monitor::Refusal;
use kiln_monitor::state::{InstanceConfiguration, StateDirectory, now};
use kiln_monitor::volume::ensure_named;
use kiln_summon::configuration::{self, Configuration, Machine, Overrides};
use kiln_summon::control::{Answer, Request, ask};
use kiln_summon::front::Fronts;
use kiln_summon::summoner::{Summoner, directory};
use kiln_summon::timeline;
use kiln_summon::unit::Status;
use serde::{Deserialize, Serialize};

use crate::arguments::{
    EngineName, LogFormat, NetworkName, RunArguments, ServeArguments, SummonArguments,
    SummonCommand,
};
use crate::failure::{Failure, io};
use crate::run::{Packed, packed, prepare};
use crate::text;

/// The file that is read when none is named.
const DEFAULT_FILE: &str = "summon.toml";

/// `kiln summon`.
pub fn summon(arguments: &SummonArguments) -> Result<ExitCode, Failure> {
    match &arguments.command {
        Some(command) => speak(command),
        None if arguments.serve.detach => detach(&arguments.serve),
        None => serve(&arguments.serve),
    }
}

/// What the background process tells the command that waits.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Report {
    Ready { words: String },
    Failed(Refusal),
}

fn overrides(arguments: &ServeArguments) -> Overrides {
    Overrides {
        listen: arguments.listen.clone(),
        forward: arguments.forward.clone(),
        forward_for: arguments.forward_for.clone(),
        zones: arguments.zone.clone(),
        ttl: arguments.ttl.clone(),
        pool: arguments.pool.clone(),
        pool6: arguments.pool6.clone(),
        interface: arguments.interface.clone(),
        metrics: arguments.metrics.clone(),
        max_running: arguments.max_running.clone(),
        max_memory: arguments.max_memory.clone(),
        units: arguments.unit.clone(),
    }
}

/// The configuration's file, if there is one to read.
fn file(arguments: &ServeArguments) -> Result<Option<PathBuf>, Failure> {
    if let Some(path) = &arguments.configuration {
        return Ok(Some(path.clone()));
    }
    let default = PathBuf::from(DEFAULT_FILE);
    if default.exists() {
        return Ok(Some(default));
    }
    if arguments.unit.is_empty() {
        return Err(Failure::input(
            "there is nothing to summon: no configuration is named, and there is no ./summon.toml",
            "kiln summon CONFIG, or: kiln summon --unit dns=www.example.org,image=site.kiln,port=80",
        ));
    }
    Ok(None)
}

fn read(path: Option<&Path>, overrides: &Overrides) -> Result<Configuration, String> {
    Configuration::read(path, overrides, &Machine::current())
        .map_err(|problems| problems.to_string())
}

/// `kiln run`'s options of a unit.
fn run_arguments(unit: &configuration::Unit) -> RunArguments {
    RunArguments {
        detach: true,
        name: Some(unit.name.clone()),
        hostname: Some(unit.hostname.clone().unwrap_or_else(|| unit.name.clone())),
        memory: unit.memory.map(|bytes| format!("{bytes}B")),
        env: Vec::new(),
        workdir: unit.workdir.clone(),
        user: None,
        publish: Vec::new(),
        volume: Vec::new(),
        net: unit.net.map(|net| match net {
            configuration::Net::Socket => NetworkName::Socket,
            configuration::Net::Direct => NetworkName::Direct,
        }),
        ip: Vec::new(),
        gateway: Vec::new(),
        engine: unit.engine.as_deref().map(|engine| match engine {
            "qemu" => EngineName::Qemu,
            "kvm" => EngineName::Kvm,
            _ => EngineName::Process,
        }),
        rm: unit.stop == configuration::Stop::Destroy,
        interactive: false,
        log: unit.log.clone(),
        include: unit
            .include
            .iter()
            .map(|include| match &include.to {
                Some(to) => format!("{}:{to}", include.from.display()),
                None => include.from.display().to_string(),
            })
            .collect(),
        no_rewrite: !unit.rewrite,
        source: unit.source.clone(),
        arguments: unit.arguments.clone().unwrap_or_default(),
    }
}

/// Images that were found or built, by source, files to include, and whether system calls are rewritten.
type Images = HashMap<(PathBuf, Vec<String>, bool), Packed>;

/// The instance of a unit, but its ports.
fn instance(
    state: &StateDirectory,
    images: &mut Images,
    unit: &configuration::Unit,
) -> Result<InstanceConfiguration, Failure> {
    let arguments = run_arguments(unit);
    let mut pack = |source: &Path, include: &[String], rewrite: bool| {
        let key = (source.to_owned(), include.to_vec(), rewrite);
        if let Some(known) = images.get(&key) {
            return Ok(known.clone());
        }
        let made = packed(state, source, include, rewrite)?;
        images.insert(key, made.clone());
        Ok(made)
    };
    let mut configuration = prepare(&arguments, state, &mut pack)?.configuration;
    configuration.unit = Some(unit.name.clone());
    if unit.arguments.is_some() {
        configuration.run.arguments.clone_from(&unit.arguments);
    }
    configuration.run.user = unit.user;
    configuration
        .run
        .environment
        .extend(unit.environment.clone());
    for volume in &unit.volumes {
        let mut volume = volume.clone();
        let name = volume
            .host
            .to_str()
            .filter(|host| !host.contains('/'))
            .map(str::to_owned);
        if let Some(name) = name {
            volume.host = ensure_named(&state.volumes(), &name)?;
        } else if !volume.host.is_dir() {
            return Err(Failure::input(
                format!(
                    "cannot mount {}: it is not a directory",
                    volume.host.display()
                ),
                format!("make it first: mkdir -p {}", volume.host.display()),
            ));
        }
        configuration.volumes.push(volume);
    }
    Ok(configuration)
}

fn words(failure: &Failure) -> String {
    let message = failure.message.trim_end();
    match &failure.help {
        Some(help) => format!("{message} (help: {})", help.trim_end()),
        None => message.to_owned(),
    }
}

/// Does what a summoner does, in this process.
fn serve(arguments: &ServeArguments) -> Result<ExitCode, Failure> {
    let outcome = try_serve(arguments);
    match outcome {
        Err(failure) if arguments.detached => {
            report(&Report::Failed(failure.refusal()));
            Err(failure)
        }
        outcome => outcome,
    }
}

fn problems(message: String) -> Failure {
    Failure {
        message,
        help: None,
        input: true,
    }
}

fn try_serve(arguments: &ServeArguments) -> Result<ExitCode, Failure> {
    let state = StateDirectory::from_environment()?;
    let path = file(arguments)?
        .map(|path| std::path::absolute(&path).map_err(io(&format!("use {}", path.display()))))
        .transpose()?;
    let overrides = overrides(arguments);
    let configuration = read(path.as_deref(), &overrides).map_err(problems)?;
    let images = Arc::new(Mutex::new(Images::new()));
    if arguments.check {
        return check(&state, &configuration, &images);
    }
    start_log(arguments)?;
    if arguments.detached {
        // A session of its own: the terminal's signals and end are not for us.
        let _ = rustix::process::setsid();
    }
    // A thousand units have a socket each at least.
    kiln_monitor::raise_descriptor_limit();
    for remark in configuration.remarks() {
        tracing_remark(&remark);
    }
    let prepare = {
        let (state, images) = (state.clone(), Arc::clone(&images));
        Arc::new(move |unit: &configuration::Unit| {
            let mut images = images.lock().unwrap_or_else(PoisonError::into_inner);
            instance(&state, &mut images, unit).map_err(|failure| words(&failure))
        })
    };
    let read_again = {
        let images = Arc::clone(&images);
        Arc::new(move || {
            // What changed in a source is built again.
            images
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clear();
            read(path.as_deref(), &overrides)
        })
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(io("start the summoner's threads"))?;
    runtime.block_on(async {
        let summoner = Summoner::start(state, configuration, prepare, read_again).await?;
        let listening: Vec<String> = summoner
            .listening()
            .iter()
            .map(|at| at.to_string())
            .collect();
        let (units, running) = summoner.count();
        let plural = if units == 1 { "" } else { "s" };
        let runs = match running {
            0 => "nothing runs".to_owned(),
            number => format!("{number} running"),
        };
        let words = format!(
            "name server at {} (UDP and TCP), {units} unit{plural}, {runs}",
            listening.join(" and ")
        );
        if arguments.detached {
            report(&Report::Ready { words });
        } else {
            tell_line!("kiln: {words}");
        }
        summoner.run().await?;
        Ok(ExitCode::SUCCESS)
    })
}

fn tracing_remark(remark: &str) {
    tell_line!("kiln: warning: {remark}");
}

fn start_log(arguments: &ServeArguments) -> Result<(), Failure> {
    let level: tracing_subscriber::filter::LevelFilter =
        arguments.log_level.parse().map_err(|_| {
            Failure::input(
                format!("'{}' is not a log level", arguments.log_level),
                "use error, warn, info or debug",
            )
        })?;
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(false)
        .with_writer(std::io::stderr);
    match arguments.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    Ok(())
}

/// `kiln summon --check`.
fn check(
    state: &StateDirectory,
    configuration: &Configuration,
    images: &Mutex<Images>,
) -> Result<ExitCode, Failure> {
    let mut images = images.lock().unwrap_or_else(PoisonError::into_inner);
    let mut wrong = Vec::new();
    for unit in configuration.units.values() {
        if let Err(failure) = instance(state, &mut images, unit) {
            wrong.push(format!("unit '{}': {}", unit.name, words(&failure)));
        }
    }
    if let Err(reason) = Fronts::plan(configuration, configuration.units.values()) {
        wrong.push(reason);
    }
    for remark in configuration.remarks() {
        tracing_remark(&remark);
    }
    if !wrong.is_empty() {
        return Err(problems(wrong.join("\n")));
    }
    let units = configuration.units.len();
    let plural = if units == 1 { "" } else { "s" };
    text::print(&format!("{units} unit{plural}, nothing wrong\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// Tells the command that waits, and then nobody.
fn report(report: &Report) {
    if let Ok(mut line) = serde_json::to_vec(report) {
        line.push(b'\n');
        let mut output = std::io::stdout().lock();
        let _ = output.write_all(&line).and_then(|()| output.flush());
    }
    // The command's pipe closes; what is read from it ends here.
    if let Ok(null) = OpenOptions::new().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}

/// `kiln summon -d`.
fn detach(arguments: &ServeArguments) -> Result<ExitCode, Failure> {
    let state = StateDirectory::from_environment()?;
    // What is wrong in the configuration is said before anything else is done.
    read(file(arguments)?.as_deref(), &overrides(arguments)).map_err(problems)?;
    let directory = directory(&state);
    let failed = || io("start the summoner");
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&directory)
        .map_err(failed())?;
    let log_path = directory.join("summon.log");
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(failed())?;
    let line = std::env::args_os()
        .skip(1)
        .filter(|argument| argument != "-d" && argument != "--detach");
    let mut child = Command::new("/proc/self/exe")
        .arg0("kiln")
        .args(line)
        .arg("--detached")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::from(log))
        .spawn()
        .map_err(failed())?;
    let mut line = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output)
            .read_line(&mut line)
            .map_err(failed())?;
    }
    match serde_json::from_str(&line) {
        Ok(Report::Ready { words }) => {
            tell_line!("kiln: {words}");
            Ok(ExitCode::SUCCESS)
        }
        Ok(Report::Failed(refusal)) => Err(refusal.into()),
        Err(_) => Err(Failure::environment(
            "the summoner ended before it could report",
            Some(format!("see {}", log_path.display())),
        )),
    }
}

/// Asks the summoner at work.
fn request(request: &Request) -> Result<Answer, Failure> {
    let state = StateDirectory::from_environment()?;
    let answer = ask(&directory(&state), request).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
            Failure::environment(
                "no summoner is at work",
                Some("start one: kiln summon CONFIG -d".to_owned()),
            )
        }
        _ => io("speak to the summoner")(error),
    })?;
    match answer {
        Answer::Refused(refusal) => Err(refusal.into()),
        answer => Ok(answer),
    }
}

fn speak(command: &SummonCommand) -> Result<ExitCode, Failure> {
    match command {
        SummonCommand::Ps { json, watch } => return ps(*json, *watch),
        SummonCommand::Start { names } => request(&Request::Start(names.clone()))?,
        SummonCommand::Stop { names } => request(&Request::Stop(names.clone()))?,
        SummonCommand::Add { unit } => {
            let directory = std::env::current_dir().map_err(io("find the current directory"))?;
            let unit = unit.clone();
            request(&Request::Add { unit, directory })?
        }
        SummonCommand::Rm { names } => request(&Request::Rm(names.clone()))?,
        SummonCommand::Reload => request(&Request::Reload)?,
        SummonCommand::Trace {
            all,
            json,
            output,
            name,
        } => return trace(*all, *json, output.as_deref(), name),
        SummonCommand::Down { keep } => request(&Request::Down { keep: *keep })?,
    };
    Ok(ExitCode::SUCCESS)
}

fn units() -> Result<(Vec<Status>, Vec<SocketAddr>), Failure> {
    match request(&Request::Ps)? {
        Answer::Units { units, listen } => Ok((units, listen)),
        other => Err(Failure::environment(
            format!("the summoner answered something else: {other:?}"),
            Some("use the 'kiln' of the same version as the summoner".to_owned()),
        )),
    }
}

fn ps(json: bool, watch: bool) -> Result<ExitCode, Failure> {
    const CLEAR: &str = "\x1b[H\x1b[2J";
    loop {
        let (units, _) = units()?;
        if watch && !json {
            text::print(CLEAR)?;
        }
        if json {
            text::json(&units)?;
        } else {
            table(&units)?;
        }
        if !watch {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn table(units: &[Status]) -> Result<(), Failure> {
    let rows: Vec<Vec<String>> = units
        .iter()
        .map(|unit| {
            let ago =
                |time: u64| format!("{} ago", text::duration(now().saturating_sub(time / 1000)));
            let statistics = &unit.statistics;
            let state = match (&unit.state, unit.retry) {
                (state, Some(seconds)) => format!("{state}, again in {seconds} s"),
                (state, None) => state.clone(),
            };
            vec![
                unit.name.clone(),
                unit.dns.join(", "),
                unit.addresses
                    .iter()
                    .map(IpAddr::to_string)
                    .collect::<Vec<_>>()
                    .join(", "),
                unit.ports.join(", "),
                state,
                statistics
                    .last_query
                    .map_or_else(|| "never".to_owned(), ago),
                unit.connections.to_string(),
                statistics.starts.to_string(),
                statistics
                    .ready_microseconds
                    .map_or_else(String::new, |time| {
                        format!("{:.1} ms", Duration::from_micros(time).as_secs_f64() * 1e3)
                    }),
            ]
        })
        .collect();
    text::table(
        &[
            "UNIT",
            "NAMES",
            "ADDRESS",
            "PORTS",
            "STATE",
            "LAST QUERY",
            "CONNECTIONS",
            "STARTS",
            "READY IN",
        ],
        &rows,
    )?;
    for unit in units {
        if let Some(trouble) = &unit.trouble {
            tell_line!("kiln: {}: {}", unit.name, trouble.trim_end());
        }
    }
    Ok(())
}

fn trace(all: bool, json: bool, output: Option<&Path>, name: &str) -> Result<ExitCode, Failure> {
    let Answer::Timelines(mut timelines) = request(&Request::Trace(name.to_owned()))? else {
        return Err(Failure::environment(
            "the summoner answered something else",
            Some("use the 'kiln' of the same version as the summoner".to_owned()),
        ));
    };
    if !all {
        timelines = timelines.pop().into_iter().collect();
    }
    if timelines.is_empty() {
        return Err(Failure::environment(
            format!("'{name}' was not summoned yet"),
            Some(format!("ask for it, or: kiln summon start {name}")),
        ));
    }
    if let Some(path) = output {
        std::fs::write(path, timeline::chrome_trace(&timelines))
            .map_err(io(&format!("write {}", path.display())))?;
        tell_line!(
            "kiln: wrote {}; open it at https://ui.perfetto.dev",
            path.display()
        );
        return Ok(ExitCode::SUCCESS);
    }
    if json {
        text::json(&timelines)?;
    } else {
        let texts: Vec<String> = timelines.iter().map(timeline::Timeline::text).collect();
        text::print(&texts.join("\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

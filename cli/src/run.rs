//! `kiln run`, in the foreground and in the background.
//!
//! In the background, the command makes the instance's folder and hands it to a monitor (`kiln_monitor::launch`).

use std::path::Path;
use std::process::ExitCode;

use kiln_abi::configuration::RunConfiguration;
use kiln_abi::host::exit_code;
use kiln_abi::manifest::{Manifest, Protocol};
use kiln_monitor::arguments::{
    Publish, format_memory, parse_environment, parse_hostname, parse_memory, parse_name,
    parse_network_address, parse_publish, parse_user, parse_volume, protocol_name,
};
use kiln_monitor::choice::{self, Choice};
use kiln_monitor::engine::{Piece, Pieces};
use kiln_monitor::launch::{self, Outcome};
use kiln_monitor::monitor::{Observer, Setting};
use kiln_monitor::names;
use kiln_monitor::state::{
    ImageReference, Instance, InstanceConfiguration, NetworkMode, StateDirectory,
};
use kiln_monitor::volume::ensure_named;

use crate::arguments::{MonitorArguments, NetworkName, RunArguments};
use crate::failure::Failure;
use crate::source::{Resolved, resolve};
use crate::text;

/// Smallest memory of an instance in bytes: the kernel's own needs.
const SMALLEST_MEMORY: u64 = 4 << 20;
/// What a virtual machine needs beside the image, for whose memory the engine sees to.
const MACHINE_MEMORY: u64 = 8 << 20;

/// `kiln run`.
pub fn run(arguments: &RunArguments) -> Result<ExitCode, Failure> {
    let state = StateDirectory::from_environment()?;
    if let Some(name) = &arguments.name
        && state.exists(&parse_name(name)?)
    {
        return Err(state.name_taken(name).into());
    }
    let Prepared {
        mut configuration,
        choice,
        manifest,
    } = prepare(arguments, &state, &mut |source, include, rewrite| {
        packed(&state, source, include, rewrite)
    })?;
    if arguments.engine.is_none() {
        tell_line!("kiln: engine {} ({})", choice.engine.name(), choice.reason);
    }
    hint_at_ports(&manifest, &configuration);
    if configuration.name.is_empty() {
        configuration.name = names::choose(|name| state.exists(name));
    }
    if configuration.run.hostname.is_none() {
        configuration.run.hostname = Some(configuration.name.clone());
    }
    let instance = state.create(&configuration)?;
    if arguments.detach {
        detach(&state, instance)
    } else {
        foreground(instance, &choice, arguments)
    }
}

/// An image, ready to run.
#[derive(Clone)]
pub struct Packed {
    reference: ImageReference,
    manifest: Manifest,
}

/// Opens or builds the image of a source.
pub fn packed(
    state: &StateDirectory,
    source: &Path,
    include: &[String],
    rewrite: bool,
) -> Result<Packed, Failure> {
    let Resolved { image, path } = resolve(state, source, include, rewrite)?;
    let manifest = image.manifest().clone();
    let piece = |extent: kiln_image::file::Extent| Piece {
        offset: extent.offset,
        length: extent.length,
    };
    let reference = ImageReference {
        name: manifest.name.clone(),
        path,
        pieces: Pieces {
            kernel: piece(image.kernel()),
            program: piece(image.program_extent()),
            root: piece(image.root()),
        },
    };
    Ok(Packed {
        reference,
        manifest,
    })
}

/// Opens or builds the image of a source, with files to include, and system calls rewritten or not.
pub type Pack<'a> = dyn FnMut(&Path, &[String], bool) -> Result<Packed, Failure> + 'a;

/// What a run needs, but a name.
pub struct Prepared {
    /// The instance; its name and host name may be missing.
    pub configuration: InstanceConfiguration,
    /// The engine.
    pub choice: Choice,
    /// The image's manifest.
    pub manifest: Manifest,
}

/// Checks the options of a run and finds or builds its image with `pack`. Everything that can be wrong in the options is
/// said before anything is built.
pub fn prepare(
    arguments: &RunArguments,
    state: &StateDirectory,
    pack: &mut Pack<'_>,
) -> Result<Prepared, Failure> {
    let choice = choice::choose(arguments.engine.map(|engine| engine.as_str()))?;
    let mut configuration = configure(arguments, &choice, state)?;
    let Packed {
        reference,
        manifest,
    } = pack(&arguments.source, &arguments.include, !arguments.no_rewrite)?;
    configuration.image = reference;
    if arguments.memory.is_none() {
        configuration.memory = manifest.memory.max(SMALLEST_MEMORY);
    }
    check_memory(&configuration, &choice)?;
    Ok(Prepared {
        configuration,
        choice,
        manifest,
    })
}

/// The configuration as far as the options say it: image and default memory are filled in later.
fn configure(
    arguments: &RunArguments,
    choice: &Choice,
    state: &StateDirectory,
) -> Result<InstanceConfiguration, Failure> {
    let mut ports: Vec<Publish> = Vec::new();
    for text in &arguments.publish {
        ports.extend(parse_publish(text)?);
    }
    refuse_twice(&ports)?;
    let mut run = RunConfiguration {
        hostname: arguments
            .hostname
            .as_deref()
            .map(parse_hostname)
            .transpose()?,
        working_directory: arguments.workdir.clone(),
        log: arguments.log.clone(),
        user: arguments.user.as_deref().map(parse_user).transpose()?,
        arguments: (!arguments.arguments.is_empty()).then(|| arguments.arguments.clone()),
        ..RunConfiguration::default()
    };
    if let Some(directory) = &arguments.workdir
        && !directory.starts_with('/')
    {
        return Err(Failure::input(
            format!("the working directory '{directory}' is not an absolute path"),
            "give it as the program sees it, such as -w /srv",
        ));
    }
    for text in &arguments.env {
        let (name, value) = parse_environment(text, |name| std::env::var(name).ok())?;
        run.environment.insert(name, value);
    }
    let mut volumes = Vec::new();
    for text in &arguments.volume {
        let mut volume = parse_volume(text)?;
        let name = volume
            .host
            .to_str()
            .filter(|host| !host.contains('/') && !host.starts_with('.'));
        volume.host = match name {
            Some(name) => ensure_named(&state.volumes(), &parse_name(name)?)?,
            None => std::fs::canonicalize(&volume.host).map_err(|error| {
                Failure::input(
                    format!("cannot mount {}: {error}", volume.host.display()),
                    format!("make it first: mkdir -p {}", volume.host.display()),
                )
            })?,
        };
        if !volume.host.is_dir() {
            return Err(Failure::input(
                format!(
                    "cannot mount {}: it is not a directory",
                    volume.host.display()
                ),
                "mount the directory that it lies in",
            ));
        }
        if volumes
            .iter()
            .any(|other: &kiln_monitor::arguments::VolumeMount| other.path == volume.path)
        {
            return Err(Failure::input(
                format!("two volumes are to be mounted at {}", volume.path),
                "give each its own path",
            ));
        }
        volumes.push(volume);
    }
    let memory = match &arguments.memory {
        Some(text) => parse_memory(text)?,
        None => 0,
    };
    let name = match &arguments.name {
        Some(name) => parse_name(name)?,
        None => String::new(),
    };
    Ok(InstanceConfiguration {
        remove: arguments.rm || (!arguments.detach && arguments.name.is_none()),
        name,
        image: ImageReference {
            name: String::new(),
            path: arguments.source.clone(),
            pieces: Pieces::default(),
        },
        engine: choice.engine.name().to_owned(),
        memory,
        network: network(arguments, choice)?,
        ports,
        volumes,
        unit: None,
        input: arguments.interactive,
        run,
    })
}

/// Refuses the same port of the host for two: nobody else has it, as the error at the start would say.
fn refuse_twice(ports: &[Publish]) -> Result<(), Failure> {
    for (index, port) in ports.iter().enumerate() {
        let same = |other: &&Publish| {
            other.host != 0
                && (other.host, other.protocol) == (port.host, port.protocol)
                // One on all addresses takes it from the others as well.
                && (other.address == port.address
                    || other.address.is_none()
                    || port.address.is_none())
        };
        if let Some(other) = ports.iter().take(index).find(same) {
            return Err(Failure::input(
                format!("{other} and {port} publish the same port of this machine"),
                "give each a port of its own, or leave one out",
            ));
        }
    }
    Ok(())
}

fn network(arguments: &RunArguments, choice: &Choice) -> Result<NetworkMode, Failure> {
    let engine = choice.engine.name();
    let name = match arguments.net {
        Some(name) => name,
        None if !arguments.ip.is_empty() || choice.machine => NetworkName::Direct,
        None => NetworkName::Socket,
    };
    if name != NetworkName::Direct && !arguments.ip.is_empty() {
        return Err(Failure::input(
            "--ip needs --net direct",
            "add --net direct, or leave --ip out",
        ));
    }
    match name {
        NetworkName::None if !arguments.publish.is_empty() => Err(Failure::input(
            "ports cannot be published without a network",
            "leave --net none or -p out",
        )),
        NetworkName::None => Ok(NetworkMode::None),
        NetworkName::Socket if choice.machine => Err(Failure::input(
            format!(
                "--net socket is not possible on engine {engine}: a virtual machine takes no sockets of the host"
            ),
            "use --net direct there, or --engine process",
        )),
        NetworkName::Socket => Ok(NetworkMode::Socket),
        NetworkName::Direct => Ok(NetworkMode::Direct {
            addresses: arguments
                .ip
                .iter()
                .map(|text| parse_network_address(text))
                .collect::<Result<_, _>>()?,
            gateways: arguments.gateway.clone(),
        }),
    }
}

fn check_memory(configuration: &InstanceConfiguration, choice: &Choice) -> Result<(), Failure> {
    let (needed, why) = if choice.machine {
        (
            MACHINE_MEMORY,
            "a virtual machine needs some for its tables and devices",
        )
    } else {
        (SMALLEST_MEMORY, "the kernel needs that much itself")
    };
    if configuration.memory < needed {
        return Err(Failure::input(
            format!(
                "{} of memory are too little for {}: {why}",
                format_memory(configuration.memory),
                configuration.image.name
            ),
            format!("give at least -m {}M", needed.div_ceil(1 << 20)),
        ));
    }
    Ok(())
}

/// Says which ports the image serves when none is published.
fn hint_at_ports(manifest: &Manifest, configuration: &InstanceConfiguration) {
    if !configuration.ports.is_empty() || configuration.network == NetworkMode::None {
        return;
    }
    if let Some(port) = manifest.ports.first() {
        let suffix = if port.protocol == Protocol::Udp {
            "/udp"
        } else {
            ""
        };
        let host = if port.number < 1024 {
            port.number + 8000
        } else {
            port.number
        };
        tell_line!(
            "kiln: note: the program serves port {}/{}; publish it to reach it from here: -p {host}:{}{suffix}",
            port.number,
            protocol_name(port.protocol),
            port.number
        );
    }
}

/// Speaks on standard error while an instance runs in the foreground.
struct Speaker;

impl Observer for Speaker {
    fn started(&mut self, instance: &Instance) {
        // Without the host's sockets nobody tells when the program listens: its clients wait until it does.
        if matches!(instance.configuration.network, NetworkMode::Direct { .. }) {
            for port in &instance.state.ports {
                tell_line!("kiln: published {}", address(port));
            }
        }
    }

    fn listening(&mut self, ports: &[Publish]) {
        for port in ports {
            tell_line!("kiln: listening on {}", address(port));
        }
    }

    fn remark(&mut self, text: &str) {
        for line in text.lines() {
            tell_line!("kiln: {line}");
        }
    }

    fn stopping(&mut self) {
        tell_line!("kiln: stopping (Ctrl-C again ends it at once)");
    }
}

/// A published port as something to click or type.
fn address(port: &Publish) -> String {
    const WEB: [u16; 8] = [80, 3000, 5000, 8000, 8008, 8080, 8081, 8888];
    let host = match port.address {
        Some(std::net::IpAddr::V6(address)) if !address.is_unspecified() => format!("[{address}]"),
        Some(std::net::IpAddr::V4(address))
            if !address.is_unspecified() && !address.is_loopback() =>
        {
            address.to_string()
        }
        _ => "localhost".to_owned(),
    };
    match (port.protocol, port.guest) {
        (Protocol::Tcp, guest) if WEB.contains(&guest) => format!("http://{host}:{}/", port.host),
        (Protocol::Tcp, 443) => format!("https://{host}:{}/", port.host),
        (protocol, guest) => format!(
            "{host}:{} (port {guest}/{} of the program)",
            port.host,
            protocol_name(protocol)
        ),
    }
}

fn foreground(
    mut instance: Instance,
    choice: &Choice,
    arguments: &RunArguments,
) -> Result<ExitCode, Failure> {
    let setting = Setting {
        output: true,
        input: arguments.interactive,
        ..Setting::default()
    };
    let outcome = kiln_monitor::monitor::run(&mut instance, &*choice.engine, setting, &mut Speaker);
    let keep = matches!(&outcome, Ok(ended) if ended.started) && !instance.configuration.remove;
    if !keep {
        instance.remove()?;
    }
    let ended = outcome?;
    if !ended.started && ended.code != exit_code::KERNEL_PANIC {
        // A program that never began is Kiln's failure, with Kiln's exit codes.
        return Err(Failure {
            message: ended.not_started(""),
            help: None,
            input: ended.is_input(),
        });
    }
    if let Some(reason) = &ended.reason {
        tell_line!("kiln: error: {reason}");
    }
    Ok(passed_on(ended.code))
}

fn passed_on(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code & 0xff).unwrap_or(1))
}

fn detach(state: &StateDirectory, instance: Instance) -> Result<ExitCode, Failure> {
    let name = instance.name().to_owned();
    let launched = launch::launch(state, &instance, &[], None)
        .and_then(|launched| launched.wait_started(&instance));
    match launched {
        Ok(Outcome::Started(ports)) => {
            for port in ports.iter().filter(|port| {
                // Chosen just now: the user cannot know it.
                instance
                    .configuration
                    .ports
                    .iter()
                    .any(|asked| asked.host == 0 && asked.guest == port.guest)
            }) {
                tell_line!("kiln: published {}", address(port));
            }
            text::print(&format!("{name}\n"))?;
            Ok(ExitCode::SUCCESS)
        }
        // The monitor has removed the instance.
        Ok(Outcome::Failed(refusal)) => Err(refusal.into()),
        Err(error) => {
            instance.remove()?;
            Err(error.into())
        }
    }
}

/// `kiln instance-monitor`: what a start in the background becomes.
pub fn monitor(arguments: &MonitorArguments) -> Result<ExitCode, Failure> {
    let code = launch::become_monitor(arguments.state.clone(), &arguments.name)?;
    Ok(passed_on(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_ports_are_said_as_urls_where_that_helps() {
        let say = |text: &str| address(&parse_publish(text).unwrap()[0]);
        assert_eq!(say("8080:80"), "http://localhost:8080/");
        assert_eq!(say("[::1]:8080:80"), "http://[::1]:8080/");
        assert_eq!(say("127.0.0.1:8080:80"), "http://localhost:8080/");
        assert_eq!(say("192.0.2.1:8443:443"), "https://192.0.2.1:8443/");
        assert_eq!(
            say("6390:6379"),
            "localhost:6390 (port 6379/tcp of the program)"
        );
    }
}

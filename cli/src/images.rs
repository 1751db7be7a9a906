//! `kiln images`, `rmi`, `inspect` and `version`.

use std::path::Path;
use std::process::ExitCode;
use std::time::UNIX_EPOCH;

use kiln_abi::manifest::{Manifest, Protocol};
use kiln_image::Image;
use kiln_monitor::arguments::{format_memory, protocol_name};
use kiln_monitor::choice::candidates;
use kiln_monitor::state::{Instance, InstanceConfiguration, InstanceState, StateDirectory, now};
use serde::Serialize;

use crate::arguments::{InspectArguments, JsonArguments, RmiArguments};
use crate::failure::Failure;
use crate::source::store;
use crate::text;

/// Digits of a digest that people are shown.
const SHORT: usize = 12;

#[derive(Debug, Serialize)]
struct StoredImage<'a> {
    names: &'a [String],
    digest: &'a str,
    /// Bytes.
    size: u64,
    /// Milliseconds since 1970.
    created: u64,
    path: &'a Path,
}

/// `kiln images`.
pub fn images(arguments: &JsonArguments) -> Result<ExitCode, Failure> {
    let state = StateDirectory::from_environment()?;
    let stored = store(&state)?.list()?;
    let images: Vec<StoredImage<'_>> = stored
        .iter()
        .map(|image| StoredImage {
            names: &image.names,
            digest: &image.digest,
            size: image.length,
            created: image
                .created
                .duration_since(UNIX_EPOCH)
                .ok()
                .and_then(|time| u64::try_from(time.as_millis()).ok())
                .unwrap_or(0),
            path: &image.path,
        })
        .collect();
    if arguments.json {
        text::json(&images)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = Vec::new();
    for image in &images {
        let unnamed = ["-".to_owned()];
        let names = if image.names.is_empty() {
            &unnamed
        } else {
            image.names
        };
        for name in names {
            rows.push(vec![
                name.clone(),
                image.digest.chars().take(SHORT).collect(),
                format_memory(image.size),
                format!(
                    "{} ago",
                    text::duration(now().saturating_sub(image.created))
                ),
            ]);
        }
    }
    text::table(&["NAME", "DIGEST", "SIZE", "CREATED"], &rows)?;
    Ok(ExitCode::SUCCESS)
}

/// `kiln rmi`.
pub fn rmi(arguments: &RmiArguments) -> Result<ExitCode, Failure> {
    let state = StateDirectory::from_environment()?;
    let store = store(&state)?;
    for reference in &arguments.images {
        let image = store.resolve(reference)?;
        let (instances, _) = state.list()?;
        if let Some(user) = instances
            .iter()
            .find(|instance| instance.alive() && instance.configuration.image.path == image.path)
            && image.names.len() <= 1
        {
            return Err(Failure::input(
                format!(
                    "the image '{reference}' is in use by the instance '{}'",
                    user.name()
                ),
                format!("stop it first: kiln stop {}", user.name()),
            ));
        }
        store.remove(reference)?;
        text::print(&format!("{reference}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Serialize)]
struct InspectedInstance<'a> {
    configuration: &'a InstanceConfiguration,
    state: &'a InstanceState,
    directory: &'a Path,
}

#[derive(Debug, Serialize)]
struct InspectedImage<'a> {
    path: &'a Path,
    digest: String,
    /// Bytes.
    size: u64,
    kernel_size: u64,
    shim_size: u64,
    root_size: u64,
    manifest: &'a Manifest,
}

/// `kiln inspect`.
pub fn inspect(arguments: &InspectArguments) -> Result<ExitCode, Failure> {
    let state = StateDirectory::from_environment()?;
    let target = arguments.target.as_str();
    match state.open(target) {
        Ok(instance) => return inspect_instance(&instance),
        // Not an instance: an image, then.
        Err(kiln_monitor::Error::Input { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let path = Path::new(target);
    let image = if target.contains('/') && !path.exists() {
        return Err(kiln_image::Error::NoSource { path: path.into() }.into());
    } else if target.contains('/') || path.is_file() {
        Image::open(path)?
    } else {
        match store(&state)?.resolve(target) {
            Ok(stored) => Image::open(&stored.path)?,
            Err(kiln_image::Error::NoImage { .. }) => {
                return Err(Failure::input(
                    format!("there is neither an instance nor an image named '{target}'"),
                    "'kiln ps' lists instances, 'kiln images' stored images",
                ));
            }
            Err(error) => return Err(error.into()),
        }
    };
    let inspected = InspectedImage {
        path: image.path(),
        digest: image.digest()?,
        size: image.length(),
        kernel_size: image.kernel().length,
        shim_size: image.shim().length,
        root_size: image.root().length,
        manifest: image.manifest(),
    };
    if arguments.json {
        text::json(&inspected)?;
    } else {
        text::print(&describe(&inspected))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn inspect_instance(instance: &Instance) -> Result<ExitCode, Failure> {
    text::json(&InspectedInstance {
        configuration: &instance.configuration,
        state: &instance.state,
        directory: instance.directory(),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// An image for people.
fn describe(image: &InspectedImage<'_>) -> String {
    let manifest = image.manifest;
    let mut lines: Vec<(&str, String)> = vec![
        ("name", manifest.name.clone()),
        ("file", image.path.display().to_string()),
        ("digest", format!("sha256:{}", image.digest)),
        (
            "size",
            format!(
                "{} (files {}, kernel {}, shim {})",
                format_memory(image.size),
                format_memory(image.root_size),
                format_memory(image.kernel_size),
                format_memory(image.shim_size)
            ),
        ),
        ("program", manifest.program.clone()),
    ];
    if !manifest.arguments.is_empty() {
        lines.push(("arguments", manifest.arguments.join(" ")));
    }
    for (name, value) in &manifest.environment {
        lines.push(("environment", format!("{name}={value}")));
    }
    lines.push(("directory", manifest.working_directory.clone()));
    lines.push((
        "user",
        format!("{}:{}", manifest.user.uid, manifest.user.gid),
    ));
    lines.push(("memory", format_memory(manifest.memory)));
    for port in &manifest.ports {
        let protocol: Protocol = port.protocol;
        lines.push((
            "port",
            format!("{}/{}", port.number, protocol_name(protocol)),
        ));
    }
    for volume in &manifest.volumes {
        lines.push(("volume", volume.clone()));
    }
    for origin in &manifest.provenance {
        let digest: String = origin.sha256.chars().take(SHORT).collect();
        lines.push(("from", format!("{}  sha256:{digest}", origin.source)));
    }
    lines
        .into_iter()
        .map(|(key, value)| format!("{key:<12} {value}\n"))
        .collect()
}

#[derive(Debug, Serialize)]
struct EngineState {
    name: &'static str,
    description: &'static str,
    available: bool,
    reason: Option<String>,
    remedy: Option<String>,
}

#[derive(Debug, Serialize)]
struct Version {
    version: &'static str,
    host_interface: u32,
    manifest_format: u32,
    engines: Vec<EngineState>,
}

/// `kiln version`.
pub fn version(arguments: &JsonArguments) -> Result<ExitCode, Failure> {
    let version = Version {
        version: env!("CARGO_PKG_VERSION"),
        host_interface: kiln_abi::host::VERSION,
        manifest_format: kiln_abi::manifest::FORMAT,
        engines: candidates()
            .into_iter()
            .map(|candidate| {
                let refused = candidate.available.err();
                EngineState {
                    name: candidate.name,
                    description: candidate.description,
                    available: refused.is_none(),
                    remedy: refused.as_ref().map(|refused| refused.remedy.clone()),
                    reason: refused.map(|refused| refused.reason),
                }
            })
            .collect(),
    };
    if arguments.json {
        text::json(&version)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut words = format!("kiln {}\n", version.version);
    for engine in &version.engines {
        let state = match (&engine.reason, &engine.remedy) {
            (Some(reason), Some(remedy)) => format!("not here: {reason}; {remedy}"),
            _ => "ready".to_owned(),
        };
        words.push_str(&format!(
            "  {:<8} {:<34} {state}\n",
            engine.name, engine.description
        ));
    }
    text::print(&words)?;
    Ok(ExitCode::SUCCESS)
}

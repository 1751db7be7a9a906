//! `kiln volume`: directories with names, kept in the state directory for programs' data.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use kiln_monitor::arguments::parse_name;
use kiln_monitor::state::StateDirectory;
use kiln_monitor::volume::ensure_named;
use serde::Serialize;

use crate::arguments::{VolumeArguments, VolumeCommand};
use crate::failure::{Failure, io};
use crate::text;

#[derive(Debug, Serialize)]
struct Volume {
    name: String,
    path: PathBuf,
    /// Living instances that have it mounted.
    used_by: Vec<String>,
}

/// `kiln volume`.
pub fn volume(arguments: &VolumeArguments) -> Result<ExitCode, Failure> {
    let state = StateDirectory::from_environment()?;
    match &arguments.command {
        VolumeCommand::Ls(options) => {
            let volumes = list(&state)?;
            if options.json {
                text::json(&volumes)?;
            } else {
                let rows: Vec<Vec<String>> = volumes
                    .iter()
                    .map(|volume| {
                        vec![
                            volume.name.clone(),
                            volume.used_by.join(", "),
                            volume.path.display().to_string(),
                        ]
                    })
                    .collect();
                text::table(&["NAME", "USED BY", "DIRECTORY"], &rows)?;
            }
        }
        VolumeCommand::Create { name } => {
            ensure_named(&state.volumes(), &parse_name(name)?)?;
            text::print(&format!("{name}\n"))?;
        }
        VolumeCommand::Rm { names } => {
            let volumes = list(&state)?;
            for name in names {
                let Some(volume) = volumes.iter().find(|volume| volume.name == *name) else {
                    return Err(Failure::input(
                        format!("there is no volume named '{name}'"),
                        "'kiln volume ls' lists all volumes",
                    ));
                };
                if let Some(user) = volume.used_by.first() {
                    return Err(Failure::input(
                        format!("the volume '{name}' is in use by the instance '{user}'"),
                        format!("stop it first: kiln stop {user}"),
                    ));
                }
                fs::remove_dir_all(&volume.path)
                    .map_err(io(&format!("remove the volume '{name}'")))?;
                text::print(&format!("{name}\n"))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list(state: &StateDirectory) -> Result<Vec<Volume>, Failure> {
    let failed = || io("list the volumes");
    let entries = match fs::read_dir(state.volumes()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed()(error)),
    };
    let (instances, _) = state.list()?;
    let mut volumes = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed())?.path();
        let Some(name) = path
            .file_name()
            .and_then(|name| name.to_str())
            .map(str::to_owned)
        else {
            continue;
        };
        let used_by = instances
            .iter()
            .filter(|instance| instance.alive())
            .filter(|instance| {
                instance
                    .configuration
                    .volumes
                    .iter()
                    .any(|volume| volume.host == path)
            })
            .map(|instance| instance.name().to_owned())
            .collect();
        volumes.push(Volume {
            name,
            path,
            used_by,
        });
    }
    volumes.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(volumes)
}

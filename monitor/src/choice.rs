//! Which engine runs an image: the wanted one, or the best that this machine really has.

use std::fs::OpenOptions;

use crate::engine::process::ProcessEngine;
use crate::engine::qemu::QemuEngine;
use crate::engine::{Engine, Unavailable};
use crate::error::Error;

/// A chosen engine.
pub struct Choice {
    /// The engine.
    pub engine: Box<dyn Engine>,
    /// It runs images in virtual machines.
    pub machine: bool,
    /// Why it was chosen, for people.
    pub reason: String,
}

/// An engine and whether it can be used here.
pub struct Candidate {
    /// The name that `--engine` takes.
    pub name: &'static str,
    /// What it runs images as.
    pub description: &'static str,
    /// Whether it can be used here, and if not, why.
    pub available: Result<(), Unavailable>,
}

/// The engine's name for processors with virtualization.
const KVM: &str = "kvm";

/// All engines, the best first.
#[must_use]
pub fn candidates() -> Vec<Candidate> {
    let mut all = vec![Candidate {
        name: KVM,
        description: "virtual machine on this processor",
        available: kvm(),
    }];
    for (engine, machine) in engines() {
        all.push(Candidate {
            name: engine.name(),
            description: if machine {
                "virtual machine in QEMU"
            } else {
                "confined process of this machine"
            },
            available: engine.available(),
        });
    }
    all
}

fn engines() -> Vec<(Box<dyn Engine>, bool)> {
    vec![
        (
            Box::new(ProcessEngine::new(kiln_guest::PROCESS_SHIM)),
            false,
        ),
        (Box::new(QemuEngine), true),
    ]
}

/// The engine of a name, or the best one.
///
/// # Errors
/// When there is none of that name, or none that can be used here: says what is missing.
pub fn choose(wanted: Option<&str>) -> Result<Choice, Error> {
    if wanted == Some(KVM) {
        kvm()?;
    }
    let mut refused = Vec::new();
    for (engine, machine) in engines() {
        match wanted {
            Some(name) if name == engine.name() => {
                engine.available()?;
                let reason = "as asked".to_owned();
                return Ok(Choice {
                    engine,
                    machine,
                    reason,
                });
            }
            Some(_) => {}
            None => match engine.available() {
                Ok(()) => {
                    let reason = if refused.is_empty() {
                        format!("the best here; {}", no_kvm())
                    } else {
                        refused.join("; ")
                    };
                    return Ok(Choice {
                        engine,
                        machine,
                        reason,
                    });
                }
                Err(unavailable) => refused.push(unavailable.to_string()),
            },
        }
    }
    match wanted {
        Some(name) => Err(Error::input(
            format!("there is no engine named '{name}'"),
            "'kiln version' lists the engines",
        )),
        None => Err(Error::environment(
            format!("no engine can run here: {}", refused.join("; ")),
            "'kiln version' says what each engine needs",
        )),
    }
}

/// Whether virtual machines can run on this processor itself. A `/dev/kvm` is not enough: without vmx or svm in the
/// processor's flags, the host emulates guest kernels instruction by instruction.
fn kvm() -> Result<(), Unavailable> {
    let unavailable = |reason: &str, remedy: &str| {
        Err(Unavailable {
            engine: KVM,
            reason: reason.to_owned(),
            remedy: remedy.to_owned(),
        })
    };
    let flags =
        crate::volume::read_small(std::path::Path::new("/proc/cpuinfo")).unwrap_or_default();
    if !has_virtualization(&flags) {
        return unavailable(
            "the processor has neither vmx nor svm",
            "use --engine process or --engine qemu, or a machine with hardware virtualization",
        );
    }
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return unavailable(
            &format!("/dev/kvm cannot be opened: {error}"),
            "load the module kvm_intel or kvm_amd, or join the group kvm",
        );
    }
    unavailable(
        "this version of Kiln has no engine for it yet",
        "use --engine process, or --engine qemu",
    )
}

/// Whether the processor's flags (`/proc/cpuinfo`) have vmx or svm.
fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .any(|flag| flag == "vmx" || flag == "svm")
}

fn no_kvm() -> String {
    match kvm() {
        Ok(()) => String::new(),
        Err(unavailable) => format!("no kvm: {}", unavailable.reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_without_virtualization_is_seen() {
        assert!(has_virtualization(
            "processor : 0\nflags\t\t: fpu vmx sse\n"
        ));
        assert!(has_virtualization("flags : svm"));
        assert!(!has_virtualization(
            "flags : fpu svm_lock sse\nmodel name : svm\n"
        ));
        assert!(!has_virtualization(""));
    }

    #[test]
    fn an_unknown_engine_is_the_users_mistake() {
        let error = choose(Some("vmware")).err().expect("there is none");
        assert_eq!(error.kind(), crate::Kind::Input);
    }
}

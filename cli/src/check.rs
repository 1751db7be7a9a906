//! `kiln check`: what will not work, before anything runs.

use std::process::ExitCode;

use kiln_image::Source;
use kiln_image::check::{Call, Severity, Support, check as check_source};
use kiln_kernel::syscall::table;
use serde::Serialize;

use crate::arguments::CheckArguments;
use crate::failure::Failure;
use crate::source::with_options;
use crate::text;

#[derive(Debug, Serialize)]
struct Finding<'a> {
    severity: &'static str,
    subject: &'a str,
    message: &'a str,
    remedy: &'a str,
}

/// `kiln check`. Exit code 1 when something will keep the program from starting.
pub fn check(arguments: &CheckArguments) -> Result<ExitCode, Failure> {
    let source = Source::detect(&arguments.source)?;
    let found = with_options(None, &arguments.include, false, |options| {
        Ok(check_source(&source, options, &support)?)
    })?;
    let findings: Vec<Finding<'_>> = found
        .iter()
        .map(|finding| Finding {
            severity: match finding.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
                Severity::Note => "note",
            },
            subject: &finding.subject,
            message: &finding.message,
            remedy: &finding.remedy,
        })
        .collect();
    if arguments.json {
        text::json(&findings)?;
    } else if findings.is_empty() {
        text::print(&format!(
            "{}: nothing stands in the way\n",
            arguments.source.display()
        ))?;
    } else {
        let mut words = String::new();
        for finding in &findings {
            words.push_str(&format!(
                "{}: {}: {}\n  help: {}\n",
                finding.severity, finding.subject, finding.message, finding.remedy
            ));
        }
        text::print(&words)?;
    }
    let hopeless = found
        .iter()
        .any(|finding| finding.severity == Severity::Error);
    Ok(if hopeless {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// The kernel's support table.
fn support(number: u32) -> Option<Call> {
    let number = u64::from(number);
    match table::entry(number) {
        Some(entry) => Some(Call {
            name: entry.name,
            support: if entry.limits.is_empty() {
                Support::Full
            } else {
                Support::Partial
            },
        }),
        None => table::NAMES
            .iter()
            .find(|(known, _)| u64::from(*known) == number)
            .map(|(_, name)| Call {
                name,
                support: Support::Missing,
            }),
    }
}

//! What is said, and with which exit code, when a command fails.

use std::fmt::Write as _;
use std::process::ExitCode;

/// A failed command.
#[derive(Debug)]
pub struct Failure {
    /// What is wrong, naming the thing concerned.
    pub message: String,
    /// What to do.
    pub help: Option<String>,
    /// The user's input is wrong, not the machine's state.
    pub input: bool,
}

impl Failure {
    /// The user's input is wrong.
    pub fn input(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            help: Some(help.into()),
            input: true,
        }
    }

    /// The machine did not do what was right to ask for.
    pub fn environment(message: impl Into<String>, help: Option<String>) -> Self {
        Self {
            message: message.into(),
            help,
            input: false,
        }
    }

    /// As it is told to another process.
    pub fn refusal(&self) -> kiln_monitor::Refusal {
        kiln_monitor::Refusal {
            message: self.message.clone(),
            help: self.help.clone(),
            input: self.input,
        }
    }

    /// Exit code: 2 for wrong input, 1 for the rest.
    pub fn code(&self) -> u8 {
        if self.input { 2 } else { 1 }
    }

    /// The words for standard error.
    pub fn text(&self) -> String {
        let mut text = format!("kiln: error: {}\n", self.message.trim_end());
        if let Some(help) = &self.help {
            for (number, line) in help.trim_end().lines().enumerate() {
                let begin = if number == 0 { "  help: " } else { "        " };
                let _ = writeln!(text, "{begin}{line}");
            }
        }
        text
    }

    /// Says it and gives the exit code.
    pub fn report(&self) -> ExitCode {
        tell!("{}", self.text());
        ExitCode::from(self.code())
    }
}

impl From<kiln_monitor::Refusal> for Failure {
    fn from(refusal: kiln_monitor::Refusal) -> Self {
        Self {
            message: refusal.message,
            help: refusal.help,
            input: refusal.input,
        }
    }
}

impl From<kiln_summon::summoner::Error> for Failure {
    fn from(error: kiln_summon::summoner::Error) -> Self {
        error.0.into()
    }
}

impl From<kiln_monitor::Error> for Failure {
    fn from(error: kiln_monitor::Error) -> Self {
        kiln_monitor::Refusal::from(&error).into()
    }
}

impl From<kiln_image::Error> for Failure {
    fn from(error: kiln_image::Error) -> Self {
        Self {
            message: error.to_string(),
            help: error.remedy(),
            input: error.kind() == kiln_image::Kind::Input,
        }
    }
}

/// For `map_err`: a system call on something of ours failed.
pub fn io(action: &str) -> impl FnOnce(std::io::Error) -> Failure {
    let action = action.to_owned();
    move |error| Failure::environment(format!("cannot {action}: {error}"), None)
}

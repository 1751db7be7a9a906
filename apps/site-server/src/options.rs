//! The command line.

use std::{ffi::OsString, fmt, net::SocketAddr, path::PathBuf};

use lexopt::{
    Parser,
    prelude::{Long, Short, ValueExt as _},
};

/// What `--help` prints.
pub const HELP: &str = "\
Serves a directory of static files over HTTP/1.1.

Usage: kiln-site-server [OPTIONS]

  --root DIRECTORY        what to serve                      [/site]
  --listen ADDRESS:PORT   where; may be given several times  [[::]:80, or 0.0.0.0:80 without IPv6]
  --max-age SECONDS       how long browsers may keep what is not a page without asking again  [3600]
  --no-log                no line on standard output for each request
  -h, --help              this text
  -V, --version           the version

/about gives about, about/index.html or about.html, whichever is there first.
A missing page gives 404.html, if there is one. FILE.br, FILE.zst and FILE.gz are sent instead of
FILE to clients that accept them. SIGTERM and SIGINT finish the requests in flight and end it.
";

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// To serve.
    Serve(Options),
    /// The help text.
    Help,
    /// The version.
    Version,
}

/// How to serve.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// Directory with the files.
    pub root: PathBuf,
    /// Where to listen; empty: the default.
    pub listen: Vec<SocketAddr>,
    /// Seconds for `Cache-Control: max-age` on what is not a page.
    pub max_age: u32,
    /// Whether to write a line for each request.
    pub log: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            root: PathBuf::from("/site"),
            listen: Vec::new(),
            max_age: 3600,
            log: true,
        }
    }
}

/// A command line that makes no sense.
#[derive(Debug)]
pub struct OptionsError(String);

impl fmt::Display for OptionsError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl From<lexopt::Error> for OptionsError {
    fn from(error: lexopt::Error) -> Self {
        Self(error.to_string())
    }
}

/// Reads a command line, the program's name first.
///
/// # Errors
///
/// An unknown option, or a value that is missing or wrong.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, OptionsError> {
    let mut options = Options::default();
    let mut parser = Parser::from_iter(arguments);
    while let Some(argument) = parser.next()? {
        match argument {
            Long("root") => options.root = parser.value()?.into(),
            Long("listen") => {
                let text = parser.value()?.string()?;
                let address = text.parse().map_err(|_| {
                    OptionsError(format!(
                        "--listen {text}: not an address with a port, such as 127.0.0.1:8080 or [::]:80"
                    ))
                })?;
                options.listen.push(address);
            }
            Long("max-age") => {
                let text = parser.value()?.string()?;
                options.max_age = text.parse().map_err(|_| {
                    OptionsError(format!("--max-age {text}: not a number of seconds"))
                })?;
            }
            Long("no-log") => options.log = false,
            Short('h') | Long("help") => return Ok(Command::Help),
            Short('V') | Long("version") => return Ok(Command::Version),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Command::Serve(options))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &[&str]) -> Result<Command, OptionsError> {
        parse(
            std::iter::once("kiln-site-server")
                .chain(words.iter().copied())
                .map(OsString::from),
        )
    }

    #[test]
    fn no_options_give_the_defaults() {
        assert_eq!(
            parse_words(&[]).unwrap(),
            Command::Serve(Options::default())
        );
    }

    #[test]
    fn listen_may_be_given_several_times() {
        let Command::Serve(options) = parse_words(&[
            "--listen",
            "127.0.0.1:8080",
            "--listen=[::1]:81",
            "--no-log",
        ])
        .unwrap() else {
            panic!("not a request to serve");
        };
        assert_eq!(
            options.listen,
            [
                "127.0.0.1:8080".parse().unwrap(),
                "[::1]:81".parse().unwrap()
            ]
        );
        assert!(!options.log);
    }

    #[test]
    fn a_wrong_value_is_named() {
        let error = parse_words(&["--listen", "here"]).unwrap_err().to_string();
        assert!(error.contains("--listen here"), "{error}");
        let error = parse_words(&["--port", "80"]).unwrap_err().to_string();
        assert!(error.contains("--port"), "{error}");
    }
}

//! The file `kiln.toml`, which describes a program or a site to put into an image.
//!
//! All keys may be missing but one: `program` or `site` says what runs. Paths of the host are relative to the
//! directory of `kiln.toml`; paths in the image are absolute.
//!
//! | key | value | meaning |
//! |---|---|---|
//! | `name` | `"blog"` | name of the image; default: the directory's name |
//! | `program` | `"target/release/server"` | the ELF file that runs. Below `/usr`, `/opt`, `/bin`, `/sbin`, `/srv` or `/var` it keeps its path, others go to `/app/` |
//! | `site` | `"_site"` | a directory with `index.html`, served on port 80 by the built-in site server. Excludes `program` |
//! | `arguments` | `["--port", "80"]` | arguments of the program |
//! | `environment` | `{ LANG = "C.UTF-8" }` | environment of the program |
//! | `working-directory` | `"/"` | where the program starts |
//! | `user` | `"www-data"`, `33` or `"33:33"` | who the program runs as; default `0:0` |
//! | `memory` | `"64M"` or bytes | memory when a run says nothing else; units K, M, G (powers of 1024) |
//! | `ports` | `[80, "53/udp"]` | ports that the program serves |
//! | `volumes` | `["/data"]` | directories meant to be mounted from outside; made if missing |
//! | `include` | `["conf:/etc/app", { from = "x", to = "/y" }]` | files and directories to add; without a destination: absolute paths keep theirs, relative ones go to `/app/` |
//!
//! Values are checked here, once; [`Project`] holds only what makes sense.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use kiln_abi::manifest::{Port, Protocol};
use serde::Deserialize;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::{Error, Result};

/// Name of the file.
pub const FILE_NAME: &str = "kiln.toml";
/// Largest file that is read, in bytes.
const MAX_LENGTH: u64 = 1 << 20;
/// All keys.
pub const KEYS: &[&str] = &[
    "name",
    "program",
    "site",
    "arguments",
    "environment",
    "working-directory",
    "user",
    "memory",
    "ports",
    "volumes",
    "include",
];

/// A `kiln.toml`, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Project {
    /// Name of the image.
    pub name: Option<String>,
    /// What runs.
    pub program: Option<PathBuf>,
    /// What is served.
    pub site: Option<PathBuf>,
    /// Arguments after the program's name.
    pub arguments: Vec<String>,
    /// Environment, by name.
    pub environment: BTreeMap<String, String>,
    /// Where the program starts.
    pub working_directory: Option<String>,
    /// Who the program runs as.
    pub user: Option<UserName>,
    /// Memory in bytes.
    pub memory: Option<u64>,
    /// Ports that the program serves.
    pub ports: Vec<Port>,
    /// Directories meant to be volumes.
    pub volumes: Vec<String>,
    /// Files and directories to add.
    pub include: Vec<Include>,
}

/// A user as written: numbers, or a name to look up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserName {
    /// User and group number.
    Numbers(u32, u32),
    /// A name in the image's `/etc/passwd`, or the host's.
    Name(String),
}

impl UserName {
    /// Reads `name`, `uid` or `uid:gid`.
    ///
    /// # Errors
    ///
    /// Says what is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("is empty".into());
        }
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            let (user, group) = text.split_once(':').unwrap_or((text, text));
            let number = |part: &str| {
                part.parse::<u32>()
                    .map_err(|_| format!("`{part}` is no user or group number (0 to 4294967295)"))
            };
            return Ok(Self::Numbers(number(user)?, number(group)?));
        }
        if text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        {
            Ok(Self::Name(text.into()))
        } else {
            Err("a user is a name, UID or UID:GID".into())
        }
    }
}

/// A file or directory of the host to add to the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Include {
    /// On the host.
    pub from: PathBuf,
    /// Absolute path in the image; none: as on the host, or below `/app` if `from` was relative.
    pub to: Option<String>,
}

impl Include {
    /// Reads `PATH` or `PATH:DESTINATION`, as on the command line.
    ///
    /// # Errors
    ///
    /// The destination is not an absolute path, or the path is empty.
    pub fn parse(text: &str) -> Result<Self> {
        Self::parse_text(text).map_err(|reason| Error::Value {
            what: "include",
            value: text.into(),
            reason,
        })
    }

    fn parse_text(text: &str) -> Result<Self, String> {
        let (from, to) = match text.split_once(':') {
            Some((from, to)) => (from, Some(to)),
            None => (text, None),
        };
        Self::new(from, to)
    }

    fn new(from: &str, to: Option<&str>) -> Result<Self, String> {
        if from.is_empty() {
            return Err("the path is empty".into());
        }
        if let Some(to) = to {
            absolute(to)?;
        }
        Ok(Self {
            from: from.into(),
            to: to.map(Into::into),
        })
    }
}

/// Reads a size such as `64M`: bytes, or a number with K, M, G (powers of 1024; `KiB`, `MiB`, `GiB` too).
///
/// # Errors
///
/// Says what is wrong with the text.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => return Err(format!("unknown unit `{}`; use K, M or G", unit.trim())),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "a size is a number with K, M or G, such as 64M".to_string())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "is too large".to_string())
}

/// Reads a port such as `80` or `53/udp`.
///
/// # Errors
///
/// Says what is wrong with the text.
pub fn parse_port(text: &str) -> Result<Port, String> {
    let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        other => return Err(format!("unknown protocol `{other}`; use tcp or udp")),
    };
    match number.parse::<u16>() {
        Ok(number) if number > 0 => Ok(Port { number, protocol }),
        _ => Err(format!("`{number}` is no port (1 to 65535)")),
    }
}

fn absolute(path: &str) -> Result<(), String> {
    if !path.starts_with('/') {
        return Err(format!("`{path}` is not an absolute path (in the image)"));
    }
    if path.contains('\0') || path.split('/').any(|part| part == "..") {
        return Err(format!("`{path}` must not contain `..` or a zero byte"));
    }
    Ok(())
}

/// Checks the name of an image: letters, digits, `.`, `_`, `-`, and `:` before a tag.
///
/// # Errors
///
/// Says what is wrong with the name.
pub fn check_name(name: &str) -> Result<(), String> {
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let fits = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "._-:".contains(c));
    if !starts_well || !fits || name.len() > 128 || name.matches(':').count() > 1 {
        return Err("a name has up to 128 letters, digits, `.`, `_`, `-`, starts with a letter or digit, and may have one `:` before a tag".into());
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Raw {
    name: Option<Spanned<String>>,
    program: Option<Spanned<String>>,
    site: Option<Spanned<String>>,
    #[serde(default)]
    arguments: Vec<Spanned<String>>,
    #[serde(default)]
    environment: BTreeMap<String, Spanned<String>>,
    working_directory: Option<Spanned<String>>,
    user: Option<Spanned<NumberOrText>>,
    memory: Option<Spanned<NumberOrText>>,
    #[serde(default)]
    ports: Vec<Spanned<NumberOrText>>,
    #[serde(default)]
    volumes: Vec<Spanned<String>>,
    #[serde(default)]
    include: Vec<Spanned<RawInclude>>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number or a string")]
enum NumberOrText {
    Number(u64),
    Text(String),
}

impl NumberOrText {
    fn text(&self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text.clone(),
        }
    }
}

/// Keys of an `include` that is a table.
const INCLUDE_KEYS: [&str; 2] = ["from", "to"];

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected \"PATH\", \"PATH:DESTINATION\" or { from = \"PATH\", to = \"DESTINATION\" }"
)]
enum RawInclude {
    Text(String),
    Table { from: String, to: Option<String> },
}

/// Turns byte ranges of a text into errors with lines.
struct Context<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Context<'_> {
    fn error(&self, offset: usize, reason: String, remedy: Option<String>) -> Error {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        Error::Project {
            path: self.path.into(),
            line: before.matches('\n').count() + 1,
            column: before.get(line_start..).unwrap_or("").chars().count() + 1,
            reason,
            remedy,
        }
    }

    fn check<T, U>(
        &self,
        key: &str,
        value: &Spanned<T>,
        check: impl FnOnce(&T) -> Result<U, String>,
    ) -> Result<U> {
        check(value.get_ref())
            .map_err(|reason| self.error(value.span().start, format!("`{key}`: {reason}"), None))
    }

    /// Refuses a key that is not among `known`, and names the nearest that is.
    fn check_keys(&self, table: &DeTable<'_>, known: &[&'static str]) -> Result<()> {
        let Some(key) = table
            .keys()
            .find(|key| !known.contains(&key.get_ref().as_ref()))
        else {
            return Ok(());
        };
        let name = key.get_ref().as_ref();
        let remedy = match nearest(name, known) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("known keys: {}", known.join(", ")),
        };
        Err(self.error(
            key.span().start,
            format!("unknown key `{name}`"),
            Some(remedy),
        ))
    }

    fn syntax(&self, error: &toml::de::Error) -> Error {
        let offset = error.span().map_or(0, |span| span.start);
        self.error(offset, error.message().trim().to_string(), None)
    }
}

/// Reads and checks a `kiln.toml`.
///
/// # Errors
///
/// The file cannot be read, or something in it is wrong: the error names file, line, key and the nearest known key.
pub fn read(path: &Path) -> Result<Project> {
    let length = std::fs::metadata(path)
        .map_err(Error::io("read", path))?
        .len();
    if length > MAX_LENGTH {
        return Err(Error::BadSource {
            path: path.into(),
            reason: format!("is {length} bytes long"),
            remedy: "a kiln.toml has at most 1 MiB".into(),
        });
    }
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    let text = String::from_utf8(text).map_err(|_| Error::BadSource {
        path: path.into(),
        reason: "is not UTF-8 text".into(),
        remedy: "save it as UTF-8".into(),
    })?;
    parse(&text, path)
}

/// Checks the text of a `kiln.toml`; `path` is for messages.
///
/// # Errors
///
/// As [`read`].
pub fn parse(text: &str, path: &Path) -> Result<Project> {
    let context = Context { path, text };
    let table = DeTable::parse(text).map_err(|error| context.syntax(&error))?;
    context.check_keys(table.get_ref(), KEYS)?;
    if let Some(DeValue::Array(entries)) = table.get_ref().get("include").map(Spanned::get_ref) {
        for entry in entries {
            if let DeValue::Table(entry) = entry.get_ref() {
                context.check_keys(entry, &INCLUDE_KEYS)?;
            }
        }
    }
    let raw: Raw = toml::from_str(text).map_err(|error| context.syntax(&error))?;
    if let (Some(_), Some(site)) = (&raw.program, &raw.site) {
        return Err(context.error(
            site.span().start,
            "`site` and `program` exclude each other".into(),
            Some("a site is served by the built-in server; to use another, keep `program` and give the files with `include`".into()),
        ));
    }
    let not_empty = |text: &String| {
        if text.is_empty() || text.contains('\0') {
            Err("must not be empty or contain a zero byte".to_string())
        } else {
            Ok(text.clone())
        }
    };
    let mut project = Project::default();
    if let Some(name) = &raw.name {
        context.check("name", name, |name| check_name(name))?;
        project.name = Some(name.get_ref().clone());
    }
    if let Some(program) = &raw.program {
        project.program = Some(context.check("program", program, not_empty)?.into());
    }
    if let Some(site) = &raw.site {
        project.site = Some(context.check("site", site, not_empty)?.into());
    }
    let no_zero = |text: &String| {
        if text.contains('\0') {
            Err("must not contain a zero byte".to_string())
        } else {
            Ok(text.clone())
        }
    };
    for argument in &raw.arguments {
        project
            .arguments
            .push(context.check("arguments", argument, no_zero)?);
    }
    for (name, value) in &raw.environment {
        let value = context.check("environment", value, |value| {
            if name.is_empty() || name.contains(['=', '\0']) {
                return Err(format!("`{name}` is no name of a variable"));
            }
            no_zero(value)
        })?;
        project.environment.insert(name.clone(), value);
    }
    if let Some(directory) = &raw.working_directory {
        context.check("working-directory", directory, |path| absolute(path))?;
        project.working_directory = Some(directory.get_ref().clone());
    }
    if let Some(user) = &raw.user {
        project.user = Some(context.check("user", user, |user| UserName::parse(&user.text()))?);
    }
    if let Some(memory) = &raw.memory {
        project.memory =
            Some(context.check("memory", memory, |memory| parse_size(&memory.text()))?);
    }
    for port in &raw.ports {
        let port = context.check("ports", port, |port| parse_port(&port.text()))?;
        if !project.ports.contains(&port) {
            project.ports.push(port);
        }
    }
    for volume in &raw.volumes {
        context.check("volumes", volume, |path| absolute(path))?;
        project.volumes.push(volume.get_ref().clone());
    }
    for include in &raw.include {
        project
            .include
            .push(context.check("include", include, |include| match include {
                RawInclude::Text(text) => Include::parse_text(text),
                RawInclude::Table { from, to } => Include::new(from, to.as_deref()),
            })?);
    }
    Ok(project)
}

/// The known key most like a wrong one, if any is like it.
fn nearest(wrong: &str, known: &[&'static str]) -> Option<&'static str> {
    let wrong = wrong.to_ascii_lowercase().replace('_', "-");
    known
        .iter()
        .map(|key| {
            let shortened = key.len() >= 3 && wrong.len() >= 3 && key.starts_with(wrong.as_str());
            (if shortened { 0 } else { distance(&wrong, key) }, *key)
        })
        .min()
        .filter(|(distance, key)| *distance <= key.len().max(wrong.len()) / 2)
        .map(|(_, key)| key)
}

/// Edits that turn one word into the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        if let Some(first) = row.first_mut() {
            *first = left;
        }
        for (cell, y) in row.iter_mut().skip(1).zip(b.chars()) {
            let above = *cell;
            *cell = (diagonal + usize::from(x != y))
                .min(above + 1)
                .min(left + 1);
            diagonal = above;
            left = *cell;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Project> {
        parse(text, Path::new("kiln.toml"))
    }

    fn message(text: &str) -> String {
        let error = parsed(text).expect_err("must be refused");
        format!("{error} | {}", error.remedy().unwrap_or_default())
    }

    #[test]
    fn all_keys_are_read() {
        let project = parsed(
            r#"
name = "blog"
program = "server"
arguments = ["--port", "80"]
environment = { LANG = "C.UTF-8" }
working-directory = "/srv"
user = 33
memory = "64M"
ports = [80, "53/udp"]
volumes = ["/data"]
include = ["conf:/etc/app", { from = "x" }]
"#,
        )
        .unwrap();
        assert_eq!(project.memory, Some(64 << 20));
        assert_eq!(project.user, Some(UserName::Numbers(33, 33)));
        assert_eq!(
            project.ports[1],
            Port {
                number: 53,
                protocol: Protocol::Udp
            }
        );
        assert_eq!(project.include[0].to.as_deref(), Some("/etc/app"));
        assert_eq!(
            project.include[1],
            Include {
                from: "x".into(),
                to: None
            }
        );
    }

    #[test]
    fn an_unknown_key_names_line_and_nearest_key() {
        let text = message("name = \"x\"\nargumens = []\n");
        assert_eq!(
            text,
            "kiln.toml:2:1: unknown key `argumens` | did you mean `arguments`?"
        );
        assert!(message("working_dir = 1").ends_with("did you mean `working-directory`?"));
        assert!(message("qqqqqqqqqqqqqqqqqqqqqqqq = 1").contains("known keys: name"));
        assert_eq!(
            message("name = \"x\"\ninclude = [\"a\", { from = \"b\", too = \"/c\" }]"),
            "kiln.toml:2:31: unknown key `too` | did you mean `to`?"
        );
    }

    #[test]
    fn wrong_values_name_line_and_key() {
        assert!(
            message("\n\nports = [\"80/sctp\"]")
                .starts_with("kiln.toml:3:10: `ports`: unknown protocol")
        );
        assert!(message("memory = \"64X\"").contains("unknown unit `X`"));
        assert!(message("memory = -1").contains("expected a number or a string"));
        assert!(message("ports = [0]").contains("no port"));
        assert!(message("include = [\"a:b\"]").contains("not an absolute path"));
        assert!(message("name = \"../x\"").contains("`name`"));
        assert!(message("site = \"a\"\nprogram = \"b\"").starts_with("kiln.toml:1:8: `site` and"));
        assert!(message("name = ").starts_with("kiln.toml:1:"));
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert!(parse_size("99999999999999G").is_err());
        assert!(parse_size("").is_err());
        assert!(parse_size("M").is_err());
    }

    #[test]
    fn no_text_makes_the_parser_panic() {
        // Pieces of a valid file in random order, and cut anywhere.
        let pieces = [
            "name", "=", "\"", "[", "]", "{", "}", "\n", "ports", "80", "é", "#", ".", "include",
            ",", "\u{0}",
        ];
        let mut state = 1u64;
        for _ in 0..3000 {
            let mut text = String::new();
            for _ in 0..12 {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                text += pieces[(state >> 33) as usize % pieces.len()];
            }
            let _ = parsed(&text);
        }
    }
}

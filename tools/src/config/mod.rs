//! The configuration: `afterimage.toml` and `groups.d/*.toml` beside it.
//!
//! Owns reading, defaults and checks. A [`Config`] has been checked as a whole: names are valid and
//! unique, paths absolute, limits kept. Every error names file and line. Nothing is opened here but
//! the configuration files themselves.

pub mod check;
pub mod schema;
pub mod units;

#[cfg(test)]
mod reference_tests;
#[cfg(test)]
mod tests;

use afterimage_proxy::checkpoint::intent::AgentSpec;
use schema::{Ack, Checkpoint, ClientTls, Group, Listener, OnBackingError, OnLogError, Replica};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use units::Target;

/// Where the configuration is read from when nothing else is said.
pub const DEFAULT_PATH: &str = "/etc/afterimage/afterimage.toml";

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The main file; it may not exist when every default is used.
    pub file: PathBuf,
    /// Folder of the rings.
    pub ring_dir: PathBuf,
    /// Most bytes of all rings together.
    pub ring_budget: u64,
    /// Data path threads.
    pub workers: Option<usize>,
    /// Which messages are logged.
    pub log_level: String,
    /// NBD listeners.
    pub listeners: Vec<Listener>,
    /// Unix socket where images are exported.
    pub images_socket: PathBuf,
    /// Unix socket of the API.
    pub api_socket: PathBuf,
    /// Loopback address of the metrics.
    pub metrics: Option<SocketAddr>,
    /// Folder of the intents to freeze.
    pub guest_state: PathBuf,
    /// Groups in the order of the files.
    pub groups: Vec<GroupConfig>,
    /// Receiving end.
    pub replica: Option<Replica>,
}

/// One protected group, checked.
#[derive(Debug, Clone)]
pub struct GroupConfig {
    /// Name.
    pub name: String,
    /// Where it is written: file and line, for messages.
    pub place: Place,
    /// The log's path.
    pub log_path: PathBuf,
    /// Bytes of a new log.
    pub log_size: u64,
    /// Folder of the claims of backings that are block devices.
    pub claims: PathBuf,
    /// Bytes of the ring.
    pub ring_size: u64,
    /// Sinks.
    pub to: Vec<SinkConfig>,
    /// Longest time that a write waits for its segment.
    pub ship_interval: Duration,
    /// Longest time between two syncs of the log.
    pub commit_interval: Duration,
    /// When writes are answered, unless the listener says.
    pub ack: Option<Ack>,
    /// What a guest sees when the log fails.
    pub on_log_error: OnLogError,
    /// What a guest sees while a backing fails.
    pub on_backing_error: OnBackingError,
    /// Bytes per second of a pass.
    pub pass_rate: Option<u64>,
    /// Schedule of checkpoints.
    pub checkpoint: Option<Checkpoint>,
    /// How the guest is frozen.
    pub guest: Vec<AgentSpec>,
    /// No guest is frozen longer.
    pub freeze_limit: Duration,
    /// Disks in the order of the file.
    pub disks: Vec<DiskConfig>,
}

/// One disk, checked.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// Name within the group.
    pub name: String,
    /// The backing.
    pub path: PathBuf,
    /// Accept content that begins like qcow2.
    pub raw: bool,
}

/// One sink, checked.
#[derive(Debug, Clone)]
pub struct SinkConfig {
    /// Where to.
    pub url: Target,
    /// Certificates, for `afterimage://`.
    pub tls: Option<ClientTls>,
}

/// A line of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Which file.
    pub file: PathBuf,
    /// Line, from 1; 0 when the file as a whole is meant.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}", self.file.display()),
            line => write!(f, "{}:{line}", self.file.display()),
        }
    }
}

/// Why the configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file could not be read.
    #[error("{}: cannot read the configuration: {source}", file.display())]
    Read {
        /// Which file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key or a value of the wrong kind.
    #[error("{place}: {message}")]
    Parse {
        /// Where.
        place: Place,
        /// What the reader says.
        message: String,
    },
    /// A value that parses and cannot be.
    #[error("{place}: {problem}")]
    Value {
        /// Where.
        place: Place,
        /// What is wrong and what to do.
        problem: check::Problem,
    },
}

impl Config {
    /// Reads and checks the configuration at `path`, or at [`DEFAULT_PATH`], which may be missing:
    /// then every default holds.
    ///
    /// # Errors
    /// Names file and line.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let main = path.unwrap_or(Path::new(DEFAULT_PATH));
        let main = std::path::absolute(main).map_err(|source| ConfigError::Read {
            file: main.to_owned(),
            source,
        })?;
        let text = match std::fs::read_to_string(&main) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && path.is_none() => String::new(),
            Err(source) => return Err(ConfigError::Read { file: main, source }),
        };
        let parts = group_files(&main)?;
        check::assemble(&main, &text, &parts)
    }

    /// The group of that name.
    #[must_use]
    pub fn group(&self, name: &str) -> Option<&GroupConfig> {
        self.groups.iter().find(|group| group.name == name)
    }

    /// The repository that commands read when none is named: the replica's, else the only folder
    /// or bucket that groups write to.
    #[must_use]
    pub fn repository(&self) -> Option<Target> {
        if let Some(replica) = &self.replica {
            return Some(replica.repository.get_ref().clone());
        }
        let mut all = self
            .groups
            .iter()
            .flat_map(|group| &group.to)
            .map(|sink| &sink.url)
            .filter(|url| !matches!(url, Target::Replica { .. }));
        let first = all.next()?;
        all.all(|other| other == first).then(|| first.clone())
    }
}

/// `groups.d/*.toml` beside the main file, in the order of their names.
fn group_files(main: &Path) -> Result<Vec<(PathBuf, String)>, ConfigError> {
    let folder = main.parent().unwrap_or(Path::new("/")).join("groups.d");
    let failed = |source| ConfigError::Read {
        file: folder.clone(),
        source,
    };
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(failed(source)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|e| e == "toml") {
            files.push(path);
        }
    }
    files.sort();
    let read = |file: PathBuf| match std::fs::read_to_string(&file) {
        Ok(text) => Ok((file, text)),
        Err(source) => Err(ConfigError::Read { file, source }),
    };
    files.into_iter().map(read).collect()
}

/// Line, from 1, of a byte offset.
fn line_of(text: &str, offset: usize) -> usize {
    let end = offset.min(text.len());
    1 + text.as_bytes()[..end]
        .iter()
        .filter(|b| **b == b'\n')
        .count()
}

/// Parses one file; `T` refuses unknown keys.
fn parse<T: serde::de::DeserializeOwned>(file: &Path, text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(0, |span| line_of(text, span.start));
        ConfigError::Parse {
            place: Place {
                file: file.to_owned(),
                line,
            },
            message: error.message().trim_end().replace('\n', "; "),
        }
    })
}

/// A group as parsed, with the file it came from.
struct Sourced<'a> {
    file: &'a Path,
    text: &'a str,
    group: Group,
}

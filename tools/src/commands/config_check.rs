//! `afterimage config check`: says what the configuration means, and what will not work here.
//!
//! The configuration itself was read and checked before this runs; this looks at the machine.

use serde::Serialize;
use std::path::Path;

use crate::cli::output::{Output, bytes, table, table_text};
use crate::config::{Config, GroupConfig};

/// What the configuration means.
#[derive(Debug, Serialize)]
pub struct Checked {
    /// The main file.
    pub file: String,
    /// Addresses of the NBD listeners.
    pub listen: Vec<String>,
    /// Groups.
    pub groups: Vec<CheckedGroup>,
    /// Repository of the replica, if there is one.
    pub repository: Option<String>,
    /// What would keep `serve` from starting, or is odd.
    pub warnings: Vec<String>,
}

/// One group.
#[derive(Debug, Serialize)]
pub struct CheckedGroup {
    /// Name.
    pub name: String,
    /// File and line.
    pub place: String,
    /// Disks.
    pub disks: Vec<String>,
    /// Log.
    pub log: String,
    /// Bytes of a new log.
    pub log_bytes: u64,
    /// Bytes of the ring.
    pub ring_bytes: u64,
    /// Targets.
    pub to: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// When standard output cannot be written.
pub fn run(config: &Config, output: Output) -> anyhow::Result<()> {
    let checked = Checked {
        file: config.file.display().to_string(),
        listen: config
            .listeners
            .iter()
            .map(|l| l.address.to_string())
            .collect(),
        groups: config.groups.iter().map(describe).collect(),
        repository: config.repository().map(|r| r.to_string()),
        warnings: warnings(config),
    };
    output.result(&checked, text)?;
    Ok(())
}

fn describe(group: &GroupConfig) -> CheckedGroup {
    CheckedGroup {
        name: group.name.clone(),
        place: group.place.to_string(),
        disks: group
            .disks
            .iter()
            .map(|disk| format!("{}={}", disk.name, disk.path.display()))
            .collect(),
        log: group.log_path.display().to_string(),
        log_bytes: group.log_size,
        ring_bytes: group.ring_size,
        to: group.to.iter().map(|sink| sink.url.to_string()).collect(),
    }
}

/// What this machine lacks.
fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    if !is_tmpfs(&config.ring_dir) {
        warnings.push(format!(
            "ring_dir {} is not on a tmpfs: 'serve' will refuse it; use /dev/shm",
            config.ring_dir.display()
        ));
    }
    for group in &config.groups {
        for disk in group.disks.iter().filter(|disk| !disk.path.exists()) {
            warnings.push(format!(
                "{}: the backing of '{}/{}', {}, does not exist",
                group.place,
                group.name,
                disk.name,
                disk.path.display()
            ));
        }
        if group.to.is_empty() {
            warnings.push(format!(
                "{}: group '{}' goes nowhere: add a target in 'to'",
                group.place, group.name
            ));
        }
        let folder = group.log_path.parent().unwrap_or(Path::new("/"));
        if !group.log_path.exists() && !folder.is_dir() {
            warnings.push(format!(
                "{}: the folder of the log, {}, does not exist",
                group.place,
                folder.display()
            ));
        }
    }
    warnings
}

/// Whether a folder lies on a tmpfs.
#[must_use]
pub fn is_tmpfs(folder: &Path) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    rustix::fs::statfs(folder).is_ok_and(|stat| stat.f_type == TMPFS_MAGIC)
}

fn text(checked: &Checked) -> String {
    let mut text = format!("{}: ok\n", checked.file);
    for address in &checked.listen {
        text += &format!("NBD on {address}\n");
    }
    if let Some(repository) = &checked.repository {
        text += &format!("repository {repository}\n");
    }
    if !checked.groups.is_empty() {
        let mut rows = table(&["GROUP", "DISKS", "LOG", "SIZE", "RING", "TO"]);
        for group in &checked.groups {
            rows.add_row([
                group.name.clone(),
                group.disks.join(" "),
                group.log.clone(),
                bytes(group.log_bytes),
                bytes(group.ring_bytes),
                group.to.join(" "),
            ]);
        }
        text += &format!("\n{}", table_text(&rows));
    }
    for warning in &checked.warnings {
        text += &format!("warning: {warning}\n");
    }
    text
}

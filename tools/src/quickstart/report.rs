//! The end of the quickstart: a table, and what to do with it.

use serde::Serialize;
use std::path::PathBuf;

use super::daemon::{DISK, GROUP, Places, allocated};
use crate::api::types::ExportInfo;
use crate::cli::output::{Output, bytes, table, table_text};
use crate::commands::attach_help;
use crate::config::units::ListenAddress;

/// What the quickstart found; `--json` prints it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Duration of the whole.
    pub(super) seconds: f64,
    /// Size of the disk.
    pub(super) disk_bytes: u64,
    /// Files on it.
    pub(super) files: u64,
    /// Writes of the application that were answered.
    pub(super) writes: u64,
    /// Of these, before the kill.
    pub(super) writes_before_kill: u64,
    /// Answered writes that were gone after the kill.
    pub(super) writes_lost: u64,
    /// From the start after the kill to readiness.
    pub(super) recovered_ms: u64,
    /// Writes of the attack.
    pub(super) encrypting_writes: u64,
    /// Occupied part of the log at the end.
    pub(super) log_used_bytes: u64,
    /// Records in all.
    pub(super) last_lsn: u64,
    /// Segments shipped since the restart.
    pub(super) segments: u64,
    /// Their payload.
    pub(super) payload_bytes: u64,
    /// Their size.
    pub(super) shipped_bytes: u64,
    /// From the last write until the replica had it.
    pub(super) rpo_ms: u64,
    /// Checkpoints that can be restored, oldest first.
    pub(super) checkpoints: Vec<Checkpoint>,
    /// Bytes of data that were neither encrypted nor compared.
    pub(super) left_out_bytes: u64,
    /// Moment of the image.
    pub(super) image_lsn: u64,
    /// Time to open the image.
    pub(super) image_opened_us: u64,
    /// Files of the image that equal what was there.
    pub(super) files_identical: u64,
    /// Folder, when it was kept.
    pub(super) kept: Option<PathBuf>,
    /// The image.
    pub(super) image: ExportInfo,
}

/// A checkpoint of the story.
#[derive(Debug, Serialize)]
pub(super) struct Checkpoint {
    /// Label.
    pub(super) label: String,
    /// LSN.
    pub(super) lsn: u64,
}

impl Report {
    /// Prints it.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub(super) fn print(&self, output: Output, places: &Places, pid: u32) -> anyhow::Result<()> {
        let text = self.text(places, pid);
        output.result(self, |_| text)?;
        Ok(())
    }

    fn text(&self, places: &Places, pid: u32) -> String {
        let compressed = match self.shipped_bytes {
            0 => "-".to_owned(),
            shipped => format!("{:.1} : 1", self.payload_bytes as f64 / shipped as f64),
        };
        let checkpoint = |c: &Checkpoint| format!("{} (lsn:{})", c.label, c.lsn);
        let checkpoints: Vec<String> = self.checkpoints.iter().map(checkpoint).collect();
        let mut rows = table(&["", ""]);
        for (what, value) in [
            (
                "writes answered",
                format!(
                    "{} (kill -9 after {}), {} lost",
                    self.writes, self.writes_before_kill, self.writes_lost
                ),
            ),
            (
                "recovery after kill -9",
                format!("{} ms", self.recovered_ms),
            ),
            ("writes of the attack", self.encrypting_writes.to_string()),
            (
                "records in the log",
                format!("{} ({} in use)", self.last_lsn, bytes(self.log_used_bytes)),
            ),
            (
                "segments since restart",
                format!("{}, {}", self.segments, bytes(self.shipped_bytes)),
            ),
            ("compression", compressed),
            ("RPO reached", format!("{} ms", self.rpo_ms)),
            ("checkpoints", checkpoints.join(", ")),
            (
                "image opened in",
                format!("{:.1} ms", self.image_opened_us as f64 / 1e3),
            ),
            (
                "files as they were",
                match self.left_out_bytes {
                    0 => format!("{} of {}", self.files_identical, self.files),
                    left_out => format!(
                        "{} of {}; {} of data not looked at",
                        self.files_identical,
                        self.files,
                        bytes(left_out)
                    ),
                },
            ),
            ("time in all", format!("{:.1} s", self.seconds)),
        ] {
            rows.add_row([what, &value]);
        }
        let mut text = format!("\n{}\n", table_text(&rows).trim_start_matches('\n'));
        if self.kept.is_none() {
            text += "Everything is removed again. With --keep the daemon stays, and these attach to it:\n\n";
        } else {
            text += &format!(
                "Kept in {} ({} of disk). The daemon runs on as process {pid};\n\
                 end it with 'kill {pid}', then remove {} and {}.\n\n\
                 afterimage --config {config} status\n\
                 afterimage --config {config} points {GROUP}\n\
                 afterimage --config {config} restore {GROUP}@lsn:{} ./restored\n\
                 afterimage --config {config} restore {GROUP}@before-lunch ./lunch\n\n",
                places.folder.display(),
                bytes(allocated(&places.folder.join("vm1.raw"))),
                places.folder.display(),
                places.rings.display(),
                self.image_lsn,
                config = attach_help::quoted(&places.config().display().to_string()),
            );
        }
        let live = ListenAddress::Unix(places.nbd());
        text += "The disk as it is now (encrypted):\n\n";
        text += &attach_help::for_listener(&live, None, &format!("{GROUP}/{DISK}")).to_text();
        if let Some(disk) = self.image.disks.first() {
            let socket = ListenAddress::Unix(places.folder.join("images.sock"));
            let export = format!("{}/{}", self.image.name, disk.name);
            let image = attach_help::quoted(&attach_help::uri(&socket, false, &export));
            text += &format!(
                "\nThe image of one write before the attack, read-only:\n\nnbdinfo {image}\nqemu-img convert -f raw -O qcow2 {image} before-attack.qcow2\n"
            );
        }
        text
    }
}

//! `afterimage recover`: complete plain disks, or a new log in the place of a failed one, without
//! daemon or network.

use afterimage_proxy::engine::recovery::Accepted;
use afterimage_proxy::engine::recovery::replay::ReplayProgress;
use anyhow::Context as _;
use serde::Serialize;
use std::path::{Path, absolute};

use crate::cli::Accept;
use crate::cli::output::Output;
use crate::config::{Config, GroupConfig};
use crate::serve::group::{make_plain, move_failed_log};

/// What was done.
#[derive(Debug, Serialize)]
struct Recovered {
    /// Group.
    group: String,
    /// Plain disks.
    disks: Vec<String>,
    /// Frames that only the ring had.
    frames_from_ring: u64,
    /// Frames in the log.
    frames_in_log: u64,
    /// Whether the content should be verified against a replica.
    verify_due: bool,
}

/// A failed log moved.
#[derive(Debug, Serialize)]
struct Moved {
    /// Group.
    group: String,
    /// The new log.
    log: String,
    /// The failed log was durable up to here.
    durable_lsn: u64,
    /// Last record of the new log.
    last_lsn: u64,
}

/// `--to-plain`.
///
/// # Errors
/// When the group is not configured, or what recovery says.
pub fn to_plain(
    config: &Config,
    group: &str,
    accept: Accept,
    output: Output,
) -> anyhow::Result<()> {
    let group = configured(config, group)?;
    let bar = output.bytes_bar("recovering", 0);
    let mut progress = |at: ReplayProgress| {
        bar.set_length(at.bytes_total);
        bar.set_position(at.bytes_done);
    };
    let made = make_plain(config, group, accepted(accept), &mut progress);
    bar.finish_and_clear();
    let (report, paths) = made?;
    let recovered = Recovered {
        group: group.name.clone(),
        disks: paths
            .iter()
            .map(|path| path.display().to_string())
            .collect(),
        frames_from_ring: report.ring_frames,
        frames_in_log: report.log_frames,
        verify_due: report.verify_due,
    };
    output.result(&recovered, |recovered| {
        let mut text = format!(
            "{}: these are plain, complete and current:\n{}\n",
            recovered.group,
            recovered.disks.join("\n")
        );
        if recovered.verify_due {
            text += "The group was not stopped cleanly: as after a power cut, check the file systems.\n";
        }
        text + &format!(
            "To attach the group again, move its log away first: {}\n",
            group.log_path.display()
        )
    })?;
    Ok(())
}

/// `--new-log`.
///
/// # Errors
/// When the group is not configured, its log has not failed, or the new one cannot be written.
pub fn to_new_log(
    config: &Config,
    group: &str,
    log: &Path,
    accept: Accept,
    output: Output,
) -> anyhow::Result<()> {
    let group = configured(config, group)?;
    let log = absolute(log)?;
    let rewritten = move_failed_log(config, group, accepted(accept), &log)?;
    let moved = Moved {
        group: group.name.clone(),
        log: log.display().to_string(),
        durable_lsn: rewritten.durable.0,
        last_lsn: rewritten.last.0,
    };
    output.result(&moved, |moved| {
        format!(
            "{}: what the failed log lacked (records {} to {}) is in {}\nNow set log.path of the group to it and start. Every target gets a pass; have the group verified.\n",
            moved.group, moved.durable_lsn + 1, moved.last_lsn, moved.log
        )
    })?;
    Ok(())
}

fn configured<'a>(config: &'a Config, group: &str) -> anyhow::Result<&'a GroupConfig> {
    config.group(group).with_context(|| {
        format!(
            "group '{group}' is not configured in {}",
            config.file.display()
        )
    })
}

fn accepted(accept: Accept) -> Accepted {
    Accepted {
        ring_loss: accept.accept_ring_loss,
        edited_backing: accept.accept_edited,
    }
}

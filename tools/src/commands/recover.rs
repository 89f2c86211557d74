//! `afterimage recover --to-plain`: complete plain disks, without daemon or network.

use afterimage_proxy::engine::recovery::Accepted;
use anyhow::bail;
use serde::Serialize;

use crate::cli::Accept;
use crate::cli::output::Output;
use crate::config::Config;
use crate::serve::group::make_plain;

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

/// Runs the command.
///
/// # Errors
/// When the group is not configured, or what recovery says.
pub fn run(config: &Config, group: &str, accept: Accept, output: Output) -> anyhow::Result<()> {
    let Some(group) = config.group(group) else {
        bail!(
            "group '{group}' is not configured in {}",
            config.file.display()
        );
    };
    let accepted = Accepted {
        ring_loss: accept.accept_ring_loss,
        edited_backing: accept.accept_edited,
    };
    let (report, paths) = make_plain(config, group, accepted)?;
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

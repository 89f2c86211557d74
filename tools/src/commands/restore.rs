//! `afterimage restore`: the disks of a moment as files.

use afterimage_replica::repository::Repository;
use afterimage_replica::restore::{RestoreFormat, RestoreProgress, restore};
use anyhow::bail;
use serde::Serialize;
use std::path::Path;
use tokio::signal::unix::{SignalKind, signal};

use super::history;
use crate::cli::ImageFormat;
use crate::cli::output::{Output, bytes};
use crate::cli::values::GroupPoint;

/// What was restored.
#[derive(Debug, Serialize)]
struct Restored {
    /// Group.
    group: String,
    /// The moment, exactly.
    point: String,
    /// LSN of it.
    lsn: u64,
    /// What to know before trusting it.
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<String>,
    /// The files.
    disks: Vec<RestoredDisk>,
}

/// One restored disk.
#[derive(Debug, Serialize)]
struct RestoredDisk {
    /// Name.
    name: String,
    /// File.
    path: String,
    /// Size of the disk.
    bytes: u64,
    /// Bytes of data in the file.
    data_bytes: u64,
}

/// Runs the command.
///
/// # Errors
/// The moment does not exist, or a disk cannot be read or written; nothing half-done stays.
pub async fn run(
    repository: &Repository,
    wanted: &GroupPoint,
    target: &Path,
    format: ImageFormat,
    output: Output,
) -> anyhow::Result<()> {
    let (image, warning) = history::image(repository, wanted).await?;
    if let Some(warning) = &warning {
        output.warn(warning);
    }
    let bar = output.bytes_bar("restoring", 0);
    let format = match format {
        ImageFormat::Raw => RestoreFormat::Raw,
        ImageFormat::Qcow2 => RestoreFormat::Qcow2,
    };
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let restoring = restore(&image, target, format, |at: RestoreProgress| {
        bar.set_length(at.bytes_total);
        bar.set_position(at.bytes_done);
    });
    // What is dropped before its end removes the files that it began.
    let disks = tokio::select! {
        restored = restoring => restored?,
        _ = interrupt.recv() => bail!("interrupted: nothing was restored"),
        _ = terminate.recv() => bail!("ended by a signal: nothing was restored"),
    };
    bar.finish_and_clear();
    let restored = Restored {
        group: wanted.group.clone(),
        point: image.position().to_string(),
        lsn: image.position().lsn.0,
        warning,
        disks: disks
            .into_iter()
            .map(|disk| RestoredDisk {
                name: disk.name,
                path: disk.path.display().to_string(),
                bytes: disk.size_bytes,
                data_bytes: disk.data_bytes,
            })
            .collect(),
    };
    output.result(&restored, |restored| {
        let mut text = format!("{} as of {}\n", restored.group, restored.point);
        for disk in &restored.disks {
            let (data, size) = (bytes(disk.data_bytes), bytes(disk.bytes));
            text += &format!("{}  {data} of data in {size}\n", disk.path);
        }
        text
    })?;
    Ok(())
}

//! Puts a new log in the place of one that failed (design 3, invariant 5).
//!
//! Blocking. Owns the order of the steps around [`rewrite_failed_log`], whose table says what a kill
//! or a power cut between any two of them leaves. Always holds: the failed log keeps its name until
//! the new one is whole and durable; whatever goes wrong, log and ring stay as they are, and the
//! same can be tried again.

use afterimage_format::ids::{BLOCK_SIZE, LogId};
use afterimage_proxy::engine::log::LOG_AREA_OFFSET;
use afterimage_proxy::engine::log::create::{
    self, CreateError, NewLog, create_beside, making_path, publish,
};
use afterimage_proxy::engine::recovery::rewrite::{Rewritten, rewrite_failed_log};
use afterimage_proxy::engine::recovery::{RecoveryError, RecoveryInput};
use afterimage_proxy::io::storage::UringStorage;
use afterimage_proxy::io::{FileId, Storage as _};
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use uuid::Uuid;

use super::open::{OpenGroupError, read_superblock, wall_ns};
use crate::config::GroupConfig;

/// Why a failed log was not replaced. Nothing is lost: the ring holds what the log lacks.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// Nothing can be put beside a block device.
    #[error(
        "{}: the log failed earlier, and nothing can be put beside a block device. Its ring in memory holds what it lacks: do not reboot. Run `afterimage recover {group} --new-log FILE` with a file, or an empty device, on a healthy disk, set log.path to it and start again", path.display()
    )]
    Device {
        /// The log.
        path: PathBuf,
        /// The group.
        group: String,
    },
    /// No new log could be made.
    #[error(
        "{}: the log failed earlier, and a new one cannot be made: {cause}. Its ring in memory holds what it lacks: do not reboot. Make room or repair the file system and start again; or run `afterimage recover {group} --new-log FILE` with a place on another disk and set log.path to it", path.display()
    )]
    Create {
        /// The failed log.
        path: PathBuf,
        /// The group.
        group: String,
        /// What went wrong.
        cause: CreateError,
    },
    /// It could not be filled.
    #[error(
        "{}: the log failed earlier, and what it lacks cannot be written to a new one: {cause}. Its ring in memory holds it: do not reboot. Repair what is named here and start again; or run `afterimage recover {group} --new-log FILE` with a place on another disk and set log.path to it", path.display()
    )]
    Rewrite {
        /// The failed log.
        path: PathBuf,
        /// The group.
        group: String,
        /// What went wrong.
        cause: RecoveryError,
    },
    /// The failed log cannot be looked at.
    #[error(transparent)]
    Open(#[from] OpenGroupError),
    /// There is nothing to replace.
    #[error("{}: this log has not failed; nothing was changed", path.display())]
    NotFailed {
        /// The log.
        path: PathBuf,
    },
}

/// Makes a new log at `target` (the failed one's own path if there is none), writes to it what the
/// failed one lacks, and gives it its name, durably. It is the storage's [`FileId::LOG`] afterwards.
///
/// # Errors
/// See [`ReplaceError`].
pub fn replace_failed_log(
    storage: &mut UringStorage,
    input: &mut RecoveryInput,
    group: &GroupConfig,
    target: Option<&Path>,
) -> Result<Rewritten, ReplaceError> {
    let path = &group.log_path;
    let target = target.unwrap_or(path);
    if target == path && is_block_device(path) {
        return Err(ReplaceError::Device {
            path: path.clone(),
            group: group.name.clone(),
        });
    }
    let failed = |cause| ReplaceError::Create {
        path: path.clone(),
        group: group.name.clone(),
        cause,
    };
    let superblock = read_superblock(path)?;
    let area = superblock.area_blocks * BLOCK_SIZE as u64;
    let new = NewLog {
        group: superblock.group,
        log: LogId(Uuid::new_v4()),
        // The ring fits into it whatever the configuration says by now.
        size: group
            .log_size
            .max(area.max(storage.ring_len() as u64) + LOG_AREA_OFFSET),
        disks: superblock.disks,
        sinks: input.sinks.clone(),
        boot: input.boot,
        now_ns: wall_ns(),
    };
    tracing::warn!(group = %group.name, path = %target.display(), bytes = new.size, "the log failed in the last run: writing what it lacks to a new one");
    // Over the failed log only a finished one is put; elsewhere nothing may be in the way.
    let in_place = target != path && is_block_device(target);
    let making = match in_place {
        true => target.to_owned(),
        false => making_path(target),
    };
    let file = match (in_place, target != path && target.exists()) {
        (false, true) => Err(CreateError::Exists {
            path: target.to_owned(),
        }),
        (false, false) => create_beside(target, &new),
        (true, _) => create::create(target, &new),
    };
    storage.set_file(FileId::NEXT_LOG, file.map_err(failed)?);
    input.names.next_log.clone_from(&making);
    let discard = || {
        if !in_place {
            // What stays is removed by the next attempt.
            let _ = fs::remove_file(&making);
        }
    };
    let rewritten = match rewrite_failed_log(storage, input) {
        Ok(Some(rewritten)) => rewritten,
        Ok(None) => {
            discard();
            return Err(ReplaceError::NotFailed { path: path.clone() });
        }
        Err(cause) => {
            discard();
            return Err(ReplaceError::Rewrite {
                path: path.clone(),
                group: group.name.clone(),
                cause,
            });
        }
    };
    if !in_place {
        publish(&making, target).map_err(failed)?;
    }
    storage.move_file(FileId::NEXT_LOG, FileId::LOG);
    tracing::warn!(
        group = %group.name,
        durable = rewritten.durable.0,
        last = rewritten.last.0,
        "the failed log is replaced; every target gets a new epoch and a pass, a verify is due"
    );
    Ok(rewritten)
}

fn is_block_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

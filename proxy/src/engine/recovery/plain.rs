//! `recover --to-plain`: complete plain disks from log, ring and backings, without daemon or
//! network.
//!
//! The same steps as a start up to the clean superblock; then the claims say *detached*, and the
//! log is done. May be killed at any point and run again.

use super::claims::{Leaving, Purpose, leave_blocking};
use super::replay::ReplayProgress;
use super::{LastWrite, RecoveryError, RecoveryInput, RecoveryReport, Settled, settle};
use crate::engine::blocking::Blocking;
use crate::engine::log::superblock;
use crate::io::{FileId, Storage};
use afterimage_format::ids::DiskIndex;

/// Brings every backing to the log's last record, syncs it, marks it detached. The ring's memory
/// may be zeroes where there is no ring file. `last_write` as for [`super::claims::leave`]. `progress`
/// is told how much of the log is in the backings.
///
/// # Errors
/// As for [`super::recover`]. The step can be repeated.
pub fn recover_to_plain<S: Storage>(
    storage: &mut S,
    input: &RecoveryInput,
    last_write: &dyn Fn(DiskIndex) -> LastWrite,
    progress: &mut dyn FnMut(ReplayProgress),
) -> Result<RecoveryReport, RecoveryError> {
    let blocking = &mut Blocking::new(storage, &input.names);
    let Settled {
        mut superblock,
        report,
        ..
    } = settle(blocking, input, Purpose::ToPlain, progress)?;
    superblock.clean = true;
    superblock::store(blocking, FileId::LOG, &mut superblock)?;
    leave_blocking(blocking, input, &superblock, Leaving::Detached, last_write)?;
    Ok(report)
}

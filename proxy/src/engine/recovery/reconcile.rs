//! Bringing the superblock's tables in line with the configuration.

use super::{RecoveryError, RecoveryInput};
use crate::engine::log::create::without_base;
use afterimage_format::ids::{DISKS_MAX, Lsn};
use afterimage_format::superblock::{DiskState, SINKS_MAX, SinkState, Superblock};

/// Every backing is as long as the log says its disk is.
pub(super) fn check_sizes(
    superblock: &Superblock,
    input: &RecoveryInput,
) -> Result<(), RecoveryError> {
    for (index, disk) in superblock.disks.iter().enumerate() {
        let configured = input
            .disks
            .iter()
            .find(|configured| configured.id == disk.id);
        if let Some(configured) = configured.filter(|configured| configured.size != disk.size) {
            return Err(RecoveryError::DiskSize {
                path: input.names.backings.get(index).cloned().unwrap_or_default(),
                found: configured.size,
                wanted: disk.size,
            });
        }
    }
    Ok(())
}

/// Every disk of the group is configured: the log has records that it needs.
pub(super) fn check_configured(
    superblock: &Superblock,
    input: &RecoveryInput,
) -> Result<(), RecoveryError> {
    let configured = |disk: &DiskState| input.disks.iter().any(|known| known.id == disk.id);
    let gone = superblock
        .disks
        .iter()
        .find(|disk| !disk.removed && !configured(disk));
    gone.map_or(Ok(()), |disk| {
        Err(RecoveryError::DiskGone { disk: disk.id })
    })
}

/// Makes every sink need a base that begins after `last`. What it still lacks is added to the base
/// that it has, up to the first such moment.
pub(super) fn demand_base(superblock: &mut Superblock, last: Lsn) {
    for sink in &mut superblock.sinks {
        if sink.rebase_after == Lsn::ZERO {
            sink.good_until = last;
        }
        sink.rebase_after = sink.rebase_after.max(last);
    }
}

/// Adds what is new, takes out what is gone. What comes with a disk is in no record: every sink
/// then needs a base that begins after everything the log holds now. So does a new sink, which may
/// be one that was taken out before such a disk came.
pub(super) fn reconcile(
    superblock: &mut Superblock,
    input: &RecoveryInput,
) -> Result<(), RecoveryError> {
    let durable = superblock.durable;
    for configured in &input.disks {
        // One that comes back is taken for new: nobody knows what it went through meanwhile.
        let known = superblock
            .disks
            .iter()
            .position(|disk| disk.id == configured.id);
        match known {
            Some(index) if !superblock.disks[index].removed => continue,
            Some(index) => superblock.disks[index].removed = false,
            None if superblock.disks.len() == DISKS_MAX => {
                return Err(RecoveryError::TableFull { what: "disk" });
            }
            None => superblock.disks.push(DiskState {
                id: configured.id,
                size: configured.size,
                removed: false,
            }),
        }
        demand_base(superblock, durable);
    }
    for disk in &mut superblock.disks {
        disk.removed = !input.disks.iter().any(|known| known.id == disk.id);
    }
    superblock
        .sinks
        .retain(|sink| input.sinks.contains(&sink.id));
    for id in &input.sinks {
        if superblock.sinks.iter().any(|sink| sink.id == *id) {
            continue;
        }
        if superblock.sinks.len() == SINKS_MAX {
            return Err(RecoveryError::TableFull { what: "sink" });
        }
        superblock.sinks.push(SinkState {
            dirty: Some(durable),
            rebase_after: durable,
            good_until: Lsn::ZERO,
            ..without_base(*id)
        });
    }
    Ok(())
}

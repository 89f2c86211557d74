//! Bringing the superblock's tables in line with the configuration.

use super::{RecoveryError, RecoveryInput};
use crate::engine::log::create::without_base;
use afterimage_format::ids::DISKS_MAX;
use afterimage_format::superblock::{DiskState, SINKS_MAX, Superblock};

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

/// Adds what is new, takes out what is gone. A new sink, and with `resend` every sink, needs a pass
/// that begins after everything the log holds now.
pub(super) fn reconcile(
    superblock: &mut Superblock,
    input: &RecoveryInput,
    resend: bool,
) -> Result<(), RecoveryError> {
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
        for sink in &mut superblock.sinks {
            sink.dirty = Some(superblock.durable);
        }
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
        let mut sink = without_base(*id);
        sink.dirty = Some(superblock.durable);
        superblock.sinks.push(sink);
    }
    if resend {
        for sink in &mut superblock.sinks {
            sink.dirty = Some(superblock.durable);
        }
    }
    Ok(())
}

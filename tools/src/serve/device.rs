//! What the kernel knows of the block device that is a path, or that a file lies on.
//!
//! Reads `/sys` and nothing else. Where it does not answer nothing is known: a network file system,
//! an overlay, a kernel without the attribute.

use afterimage_format::claim::DeviceWrites;
use afterimage_format::ids::BootId;
use afterimage_proxy::io::mapping::boot_id;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// Whether the medium under a file or device rotates; false where that is not known.
#[must_use]
pub(super) fn rotates(path: &Path) -> bool {
    let device = fs::metadata(path).ok().and_then(|meta| {
        let is_device = meta.file_type().is_block_device();
        folder(if is_device { meta.rdev() } else { meta.dev() })
    });
    device.is_some_and(|device| {
        let rotational = fs::read_to_string(disk_of(&device).join("queue/rotational"));
        rotational.is_ok_and(|text| text.trim() == "1")
    })
}

/// What was written to a block device so far; `None` for a file, and where nothing is counted.
#[must_use]
pub(super) fn writes(path: &Path) -> Option<DeviceWrites> {
    let meta = fs::metadata(path).ok()?;
    if !meta.file_type().is_block_device() {
        return None;
    }
    let device = folder(meta.rdev())?;
    let sequence = fs::read_to_string(disk_of(&device).join("diskseq")).ok()?;
    let (writes, sectors) = counted(&fs::read_to_string(device.join("stat")).ok()?)?;
    Some(DeviceWrites {
        boot: BootId::from_bytes(boot_id().ok()?),
        sequence: sequence.trim().parse().ok()?,
        writes,
        sectors,
    })
}

/// Writes completed and sectors written: the fifth and seventh number of `stat`, as the kernel's
/// `Documentation/block/stat.rst` has it.
fn counted(stat: &str) -> Option<(u64, u64)> {
    let numbers: Vec<u64> = stat
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()
        .ok()?;
    Some((*numbers.get(4)?, *numbers.get(6)?))
}

fn folder(device: u64) -> Option<PathBuf> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()
}

/// The whole disk of a partition; a disk itself.
fn disk_of(device: &Path) -> &Path {
    match device.join("partition").exists() {
        true => device.parent().unwrap_or(device),
        false => device,
    }
}

#[cfg(test)]
mod tests {
    use super::counted;

    #[test]
    fn writes_and_sectors_are_found_among_the_numbers() {
        let stat = "     101        2     3003        4      505       66     7007        8        0        9        9\n";
        assert_eq!(counted(stat), Some((505, 7007)));
        assert_eq!(counted("1 2 3 4 5 6"), None);
        assert_eq!(counted("1 2 3 4 5 6 seven"), None);
    }
}

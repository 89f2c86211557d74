//! Making a log: a file that is whole, zero-written and durable before anybody can find it.

use super::LOG_AREA_OFFSET;
use crate::io::file::{OpenError, OpenOptions, StorageFile, sync_folder_of};
use afterimage_format::chain::RecordChain;
use afterimage_format::frame::AREA_BLOCKS_MIN;
use afterimage_format::ids::{BLOCK_SIZE, BootId, Epoch, GroupId, LogId, Lsn};
use afterimage_format::segment::SinkId;
use afterimage_format::superblock::{DiskState, SinkState, Superblock, Tail};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes at either end of a device that must be zero before it becomes a log.
const PROBED_BYTES: u64 = 1 << 20;

/// What a new log is for.
#[derive(Clone, Debug)]
pub struct NewLog {
    /// Its group.
    pub group: GroupId,
    /// Its identity, fresh.
    pub log: LogId,
    /// Size of the file in bytes; rounded down to whole blocks.
    pub size: u64,
    /// The group's disks.
    pub disks: Vec<DiskState>,
    /// The group's sinks. None of them has a base yet.
    pub sinks: Vec<SinkId>,
    /// The running boot.
    pub boot: BootId,
    /// Wall clock, nanoseconds since 1970.
    pub now_ns: u64,
}

/// Why a log was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The file could not be made; nothing stays behind.
    #[error("cannot create the log: {0}; give the log a smaller size or another place")]
    Open(#[from] OpenError),
    /// Too small to hold frames.
    #[error("{}: a log of {size} bytes is too small; at least {} are needed", path.display(), log_bytes_min())]
    TooSmall {
        /// The log.
        path: PathBuf,
        /// Bytes asked for or there.
        size: u64,
    },
    /// Something is there already.
    #[error("{}: exists already; a log is never overwritten", path.display())]
    Exists {
        /// The log.
        path: PathBuf,
    },
    /// A device that holds something.
    #[error("{}: the device is not empty: there is data at byte {offset}, perhaps of a file system, a partition table or an old log, and a log would overwrite it; look at it ('wipefs {device}', 'afterimage log inspect {device}'), and if nobody needs it zero the device ('blkdiscard -f -z {device}') and start again", path.display(), device = path.display())]
    NotEmpty {
        /// The device.
        path: PathBuf,
        /// Where the first data is.
        offset: u64,
    },
    /// A step failed; nothing stays behind under the log's name.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Smallest log file.
#[must_use]
pub const fn log_bytes_min() -> u64 {
    LOG_AREA_OFFSET + AREA_BLOCKS_MIN * BLOCK_SIZE as u64
}

/// The superblock of a log without frames. The first record has LSN 1 and the first frame number 1.
#[must_use]
pub fn initial_superblock(new: &NewLog) -> Superblock {
    Superblock {
        group: new.group,
        log: new.log,
        boot: new.boot,
        generation: 0,
        epoch: Epoch(0),
        area_blocks: (new.size / BLOCK_SIZE as u64)
            .saturating_sub(LOG_AREA_OFFSET / BLOCK_SIZE as u64),
        incarnation: 0,
        incarnation_frame: 1,
        ring_blocks: 0,
        clean: true,
        tail: Tail {
            position: 0,
            frame: 1,
            lsn: Lsn(1),
            lap: 0,
            previous_crc: 0,
        },
        destaged: Lsn::ZERO,
        durable: Lsn::ZERO,
        created_ns: new.now_ns,
        disks: new.disks.clone(),
        sinks: new.sinks.iter().copied().map(without_base).collect(),
    }
}

/// A sink that has nothing yet: everything is dirty for it.
#[must_use]
pub const fn without_base(id: SinkId) -> SinkState {
    SinkState {
        id,
        acked: Lsn::ZERO,
        chain: RecordChain::BASE,
        dirty: Some(Lsn::ZERO),
        rebase_after: Lsn::ZERO,
        good_until: Lsn::ZERO,
    }
}

/// Both copies of a fresh superblock, as the first bytes of the file. The second counts.
#[must_use]
pub fn superblock_bytes(superblock: &Superblock) -> Vec<u8> {
    let mut second = superblock.clone();
    second.generation = superblock.generation | 1;
    let mut first = superblock.clone();
    first.generation = second.generation - 1;
    [first.encode(), second.encode()].concat()
}

/// Creates the log file at `path` and returns it locked. It is preallocated and written with
/// zeroes under another name, gets its superblocks, is made durable, and only then renamed; the
/// directory is synced before this returns. A block device gets its superblocks in place.
///
/// # Errors
/// The path exists, there is no room, or a step fails. The path then holds what it held before.
pub fn create(path: &Path, new: &NewLog) -> Result<StorageFile, CreateError> {
    if path.exists() {
        return match StorageFile::open(path, &OpenOptions::log())? {
            device if device.is_block_device() => on_device(path, new, device),
            _ => Err(CreateError::Exists {
                path: path.to_owned(),
            }),
        };
    }
    let file = create_beside(path, new)?;
    match publish(&making_path(path), path) {
        Ok(()) => Ok(file),
        Err(error) => {
            // Its own error tells nothing more; a next creation removes what stays.
            let _ = std::fs::remove_file(making_path(path));
            Err(error)
        }
    }
}

/// Creates a log file as [`create`] does, but leaves it under [`making_path`], whatever has the
/// name `path` now: for [`publish`] when it holds what it must.
///
/// # Errors
/// There is no room, or a step fails; nothing stays behind.
pub fn create_beside(path: &Path, new: &NewLog) -> Result<StorageFile, CreateError> {
    refuse_small(path, new.size)?;
    let making = making_path(path);
    remove_leftover(&making)?;
    let file = StorageFile::create_zeroed(&making, new.size, &OpenOptions::log())?;
    match write_superblocks(&making, &initial_superblock(new)) {
        Ok(()) => Ok(file),
        Err(error) => {
            let _ = std::fs::remove_file(&making);
            Err(error)
        }
    }
}

/// Gives a finished log file its name, over whatever has it now, and makes that durable.
///
/// # Errors
/// The rename or the sync of the directory fails.
pub fn publish(from: &Path, to: &Path) -> Result<(), CreateError> {
    std::fs::rename(from, to).map_err(io_error(from, "rename it"))?;
    sync_folder_of(to).map_err(io_error(to, "make its directory entry durable"))
}

/// The name of a log while it is being made.
#[must_use]
pub fn making_path(path: &Path) -> PathBuf {
    let mut making = path.to_owned();
    making.as_mut_os_string().push(".creating");
    making
}

fn remove_leftover(making: &Path) -> Result<(), CreateError> {
    if !making.exists() {
        return Ok(());
    }
    // Its lock tells a leftover from another process that is creating right now.
    let leftover = StorageFile::open(making, &OpenOptions::log())?;
    std::fs::remove_file(making).map_err(io_error(making, "remove a half-made log"))?;
    drop(leftover);
    Ok(())
}

fn on_device(path: &Path, new: &NewLog, device: StorageFile) -> Result<StorageFile, CreateError> {
    let size = device.len().map_err(io_error(path, "find out its size"))?;
    let size = if new.size == 0 {
        size
    } else {
        size.min(new.size)
    };
    refuse_small(path, size)?;
    refuse_content(path)?;
    let new = NewLog {
        size,
        ..new.clone()
    };
    write_superblocks(path, &initial_superblock(&new))?;
    Ok(device)
}

/// Refuses a device with anything but zeroes in its first and last MiB, where file systems, volume
/// managers, RAIDs and partition tables have what tells of them.
fn refuse_content(path: &Path) -> Result<(), CreateError> {
    let file = File::open(path).map_err(io_error(path, "open it"))?;
    let size = (&file)
        .seek(SeekFrom::End(0))
        .map_err(io_error(path, "find out its size"))?;
    let length = PROBED_BYTES.min(size);
    let mut bytes = vec![0; length as usize];
    for start in [0, size - length] {
        file.read_exact_at(&mut bytes, start)
            .map_err(io_error(path, "read it"))?;
        if let Some(at) = bytes.iter().position(|byte| *byte != 0) {
            return Err(CreateError::NotEmpty {
                path: path.to_owned(),
                offset: start + at as u64,
            });
        }
    }
    Ok(())
}

fn refuse_small(path: &Path, size: u64) -> Result<(), CreateError> {
    if size >= log_bytes_min() {
        return Ok(());
    }
    Err(CreateError::TooSmall {
        path: path.to_owned(),
        size,
    })
}

fn write_superblocks(path: &Path, superblock: &Superblock) -> Result<(), CreateError> {
    let file = File::options()
        .write(true)
        .open(path)
        .map_err(io_error(path, "open it"))?;
    file.write_all_at(&superblock_bytes(superblock), 0)
        .map_err(io_error(path, "write its superblocks"))?;
    file.sync_all()
        .map_err(io_error(path, "make its superblocks durable"))
}

fn io_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> CreateError {
    let path = path.to_owned();
    move |source| CreateError::Io {
        path,
        action,
        source,
    }
}

//! The claim: a small file beside a backing (`<path>.afterimage`) that says which log belongs to
//! it, and whether the backing is complete without that log.
//!
//! Two blocks, copies A and B, as with the superblock: generation g stands in block g mod 2, so
//! that a torn update leaves the one before it. `docs/format.md`, section "Claim".

use crate::checksum::crc32c;
use crate::ids::{BLOCK_SIZE, BootId, DISKS_MAX, DiskId, DiskIndex, GroupId, LogId};
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[cfg(test)]
#[path = "claim_tests.rs"]
mod tests;

/// First bytes of a claim.
pub const CLAIM_MAGIC: [u8; 8] = *b"AFICLAIM";
/// Version of the layout that this code writes, and the only one it reads.
pub const CLAIM_VERSION: u16 = 1;
/// Bytes of the file: two copies.
pub const CLAIM_FILE_BYTES: usize = 2 * BLOCK_SIZE;
/// Longest path of a log that a claim can name, in bytes.
pub const CLAIM_PATH_BYTES_MAX: usize = 2048;
/// What is appended to the backing's path.
pub const CLAIM_SUFFIX: &str = ".afterimage";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U16,
    state: u8,
    reserved_a: u8,
    path_bytes: U16,
    disk_index: U16,
    group: [u8; 16],
    disk: [u8; 16],
    log: [u8; 16],
    next_log: [u8; 16],
    generation: U64,
    fingerprint_size: U64,
    fingerprint_mtime_ns: U64,
    fingerprint_hash: [u8; 32],
    device_boot: [u8; 16],
    device_sequence: U64,
    device_writes: U64,
    device_sectors: U64,
    reserved_b: [u8; 80],
    path: [u8; CLAIM_PATH_BYTES_MAX],
    reserved_c: [u8; 1788],
    crc: U32,
}

const CRC_OFFSET: usize = BLOCK_SIZE - 4;
const _: () = assert!(size_of::<Raw>() == BLOCK_SIZE);
const _: () = assert!(offset_of!(Raw, state) == 10);
const _: () = assert!(offset_of!(Raw, path_bytes) == 12);
const _: () = assert!(offset_of!(Raw, group) == 16);
const _: () = assert!(offset_of!(Raw, disk) == 32);
const _: () = assert!(offset_of!(Raw, log) == 48);
const _: () = assert!(offset_of!(Raw, next_log) == 64);
const _: () = assert!(offset_of!(Raw, generation) == 80);
const _: () = assert!(offset_of!(Raw, fingerprint_size) == 88);
const _: () = assert!(offset_of!(Raw, fingerprint_mtime_ns) == 96);
const _: () = assert!(offset_of!(Raw, fingerprint_hash) == 104);
const _: () = assert!(offset_of!(Raw, device_boot) == 136);
const _: () = assert!(offset_of!(Raw, device_sequence) == 152);
const _: () = assert!(offset_of!(Raw, device_writes) == 160);
const _: () = assert!(offset_of!(Raw, device_sectors) == 168);
const _: () = assert!(offset_of!(Raw, reserved_b) == 176);
const _: () = assert!(offset_of!(Raw, path) == 256);
const _: () = assert!(offset_of!(Raw, crc) == CRC_OFFSET);

/// What tells, without reading all of it, whether somebody wrote to a backing since it was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// Size in bytes.
    pub size: u64,
    /// Last modification, nanoseconds since 1970; 0 for a block device, which has none.
    pub mtime_ns: u64,
    /// BLAKE3 over sampled blocks.
    pub hash: [u8; 32],
    /// What the kernel counted of the writes to a block device.
    pub device: Option<DeviceWrites>,
}

/// The writes to a block device so far, as the kernel counts them. They say something about another
/// moment only within the same life of the device: the same boot, the same sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceWrites {
    /// The boot it was counted in; not zero.
    pub boot: BootId,
    /// Which device of that boot: names and numbers are used again, this is not.
    pub sequence: u64,
    /// Writes completed.
    pub writes: u64,
    /// Sectors of 512 bytes written.
    pub sectors: u64,
}

/// Whether the backing is complete without the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimState {
    /// No: the log may hold newer content.
    Attached,
    /// Yes, and the log may go on from here if nobody has written meanwhile.
    Clean(Fingerprint),
    /// Yes, and the log is done: it must not be replayed again.
    Detached(Fingerprint),
    /// The log failed and the disk went on without it: it must never be replayed; the disk has to
    /// be verified against the replica.
    Abandoned,
}

/// A claim on one backing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The group.
    pub group: GroupId,
    /// The disk.
    pub disk: DiskId,
    /// Its place in the group's table.
    pub disk_index: DiskIndex,
    /// The log that belongs to the backing.
    pub log: LogId,
    /// A log that is about to take its place; either may be found.
    pub next_log: Option<LogId>,
    /// +1 with each update.
    pub generation: u64,
    /// Whether the backing is complete.
    pub state: ClaimState,
    /// Where the log is (or was), for people; bytes of a path.
    pub log_path: Vec<u8>,
}

/// Why a claim was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// Not as long as a claim.
    #[error("{0} bytes cannot be a claim")]
    Length(usize),
    /// The first bytes are not those of a claim.
    #[error("not a claim (magic missing)")]
    Magic,
    /// Written by another version of the program.
    #[error("claim layout version {0}, this program reads version {CLAIM_VERSION}")]
    Version(u16),
    /// The claim does not match its checksum.
    #[error("checksum is {found:#010x}, computed {computed:#010x}")]
    Crc {
        /// In the claim.
        found: u32,
        /// Over it.
        computed: u32,
    },
    /// A reserved byte is not zero.
    #[error("reserved byte {0} is not zero")]
    Reserved(usize),
    /// Stands where the other copy belongs.
    #[error("generation {generation} does not belong into copy {copy}")]
    Misplaced {
        /// Its generation.
        generation: u64,
        /// Where it stands: 0 for A, 1 for B.
        copy: u64,
    },
    /// Unknown state.
    #[error("unknown state {0}")]
    State(u8),
    /// The path is longer than the layout allows.
    #[error("path of {0} bytes")]
    Path(u16),
    /// A disk number that no group has.
    #[error("disk index {0}")]
    DiskIndex(u16),
}

const ATTACHED: u8 = 1;
const CLEAN: u8 = 2;
const DETACHED: u8 = 3;
const ABANDONED: u8 = 4;

const NO_FINGERPRINT: Fingerprint = Fingerprint {
    size: 0,
    mtime_ns: 0,
    hash: [0; 32],
    device: None,
};

impl Claim {
    /// The bytes of one copy; it belongs into block `generation % 2`. A path that is too long is
    /// cut: it is for people.
    #[must_use]
    pub fn encode(&self) -> [u8; BLOCK_SIZE] {
        let (state, fingerprint) = match self.state {
            ClaimState::Attached => (ATTACHED, NO_FINGERPRINT),
            ClaimState::Clean(fingerprint) => (CLEAN, fingerprint),
            ClaimState::Detached(fingerprint) => (DETACHED, fingerprint),
            ClaimState::Abandoned => (ABANDONED, NO_FINGERPRINT),
        };
        let device = fingerprint.device;
        let path = &self.log_path[..self.log_path.len().min(CLAIM_PATH_BYTES_MAX)];
        let mut raw = Raw {
            magic: CLAIM_MAGIC,
            version: CLAIM_VERSION.into(),
            state,
            reserved_a: 0,
            path_bytes: (path.len() as u16).into(),
            disk_index: self.disk_index.0.into(),
            group: self.group.to_bytes(),
            disk: self.disk.to_bytes(),
            log: self.log.to_bytes(),
            next_log: self.next_log.map_or([0; 16], LogId::to_bytes),
            generation: self.generation.into(),
            fingerprint_size: fingerprint.size.into(),
            fingerprint_mtime_ns: fingerprint.mtime_ns.into(),
            fingerprint_hash: fingerprint.hash,
            device_boot: device.map_or([0; 16], |device| device.boot.to_bytes()),
            device_sequence: device.map_or(0, |device| device.sequence).into(),
            device_writes: device.map_or(0, |device| device.writes).into(),
            device_sectors: device.map_or(0, |device| device.sectors).into(),
            reserved_b: [0; 80],
            path: [0; CLAIM_PATH_BYTES_MAX],
            reserved_c: [0; 1788],
            crc: U32::ZERO,
        };
        raw.path[..path.len()].copy_from_slice(path);
        let mut block = [0; BLOCK_SIZE];
        block.copy_from_slice(raw.as_bytes());
        let crc = crc32c(&block[..CRC_OFFSET]);
        block[CRC_OFFSET..].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// Reads one copy: `copy` 0 is A, 1 is B.
    ///
    /// # Errors
    /// The first check that fails; magic, version and checksum come first, in this order.
    pub fn decode(block: &[u8], copy: u64) -> Result<Self, ClaimError> {
        let raw = Raw::ref_from_bytes(block).map_err(|_| ClaimError::Length(block.len()))?;
        if raw.magic != CLAIM_MAGIC {
            return Err(ClaimError::Magic);
        }
        if raw.version.get() != CLAIM_VERSION {
            return Err(ClaimError::Version(raw.version.get()));
        }
        let (found, computed) = (raw.crc.get(), crc32c(&block[..CRC_OFFSET]));
        if found != computed {
            return Err(ClaimError::Crc { found, computed });
        }
        let generation = raw.generation.get();
        if generation % 2 != copy {
            return Err(ClaimError::Misplaced { generation, copy });
        }
        let path_bytes = raw.path_bytes.get();
        let Some((path, rest)) = raw.path.split_at_checked(path_bytes as usize) else {
            return Err(ClaimError::Path(path_bytes));
        };
        let reserved = [
            (offset_of!(Raw, reserved_a), &[raw.reserved_a][..]),
            (offset_of!(Raw, reserved_b), &raw.reserved_b[..]),
            (offset_of!(Raw, path) + path.len(), rest),
            (offset_of!(Raw, reserved_c), &raw.reserved_c[..]),
        ];
        for (offset, bytes) in reserved {
            if let Some(at) = bytes.iter().position(|b| *b != 0) {
                return Err(ClaimError::Reserved(offset + at));
            }
        }
        if raw.disk_index.get() as usize >= DISKS_MAX {
            return Err(ClaimError::DiskIndex(raw.disk_index.get()));
        }
        Ok(Self {
            group: GroupId::from_bytes(raw.group),
            disk: DiskId::from_bytes(raw.disk),
            disk_index: DiskIndex(raw.disk_index.get()),
            log: LogId::from_bytes(raw.log),
            next_log: (raw.next_log != [0; 16]).then(|| LogId::from_bytes(raw.next_log)),
            generation,
            state: raw.state()?,
            log_path: path.to_vec(),
        })
    }

    /// The newer valid copy of a claim file.
    ///
    /// # Errors
    /// The file is not two blocks long, or neither copy is valid: the reason of the one that tells
    /// more (a newer version before damage, damage before nothing there).
    pub fn decode_file(file: &[u8]) -> Result<Self, ClaimError> {
        if file.len() != CLAIM_FILE_BYTES {
            return Err(ClaimError::Length(file.len()));
        }
        let a = Self::decode(&file[..BLOCK_SIZE], 0);
        let b = Self::decode(&file[BLOCK_SIZE..], 1);
        match (a, b) {
            (Ok(a), Ok(b)) => Ok(if a.generation > b.generation { a } else { b }),
            // A lower version is what a cut in the copy's first write leaves.
            (Err(ClaimError::Version(version)), _) | (_, Err(ClaimError::Version(version)))
                if version > CLAIM_VERSION =>
            {
                Err(ClaimError::Version(version))
            }
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
            (Err(ClaimError::Magic), Err(other)) | (Err(other), Err(_)) => Err(other),
        }
    }
}

impl Raw {
    fn device(&self) -> Result<Option<DeviceWrites>, ClaimError> {
        let device = DeviceWrites {
            boot: BootId::from_bytes(self.device_boot),
            sequence: self.device_sequence.get(),
            writes: self.device_writes.get(),
            sectors: self.device_sectors.get(),
        };
        if self.device_boot != [0; 16] {
            return Ok(Some(device));
        }
        match (device.sequence, device.writes, device.sectors) {
            (0, 0, 0) => Ok(None),
            _ => Err(ClaimError::Reserved(offset_of!(Raw, device_sequence))),
        }
    }

    fn state(&self) -> Result<ClaimState, ClaimError> {
        let fingerprint = Fingerprint {
            size: self.fingerprint_size.get(),
            mtime_ns: self.fingerprint_mtime_ns.get(),
            hash: self.fingerprint_hash,
            device: self.device()?,
        };
        let state = match self.state {
            ATTACHED => ClaimState::Attached,
            CLEAN => ClaimState::Clean(fingerprint),
            DETACHED => ClaimState::Detached(fingerprint),
            ABANDONED => ClaimState::Abandoned,
            other => return Err(ClaimError::State(other)),
        };
        if matches!(state, ClaimState::Attached | ClaimState::Abandoned)
            && fingerprint != NO_FINGERPRINT
        {
            return Err(ClaimError::Reserved(offset_of!(Raw, fingerprint_size)));
        }
        Ok(state)
    }
}

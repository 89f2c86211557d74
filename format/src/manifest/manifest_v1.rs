//! A group's manifest: what the repository knows of it. Numbered; creating the next number is the
//! only way to change anything.

use super::PEER_NAME_BYTES_MAX;
use super::envelope::{Kind, ObjectError};
use crate::cursor::{CursorError, Put, Reader};
use crate::frame::entry::BLOCKS_END;
use crate::ids::{BLOCK_SIZE, DISKS_MAX, DiskId, Epoch, GroupId, LogId, Lsn};
use crate::names::{self, NAME_BYTES_MAX};

/// Most bytes of a manifest.
pub const MANIFEST_BYTES_MAX: usize = 1024 * 1024;

/// Most epochs in a manifest.
pub const EPOCHS_MAX: usize = 4096;

const KIND: Kind = Kind {
    name: "manifest",
    magic: *b"AFTRMANI",
    version: 1,
    bytes_max: MANIFEST_BYTES_MAX,
};

const DISK_BYTES_MIN: usize = 16 + 8 + 2 + 1;
const EPOCH_BYTES: usize = 8 + 16 + 8 + 8 + 8;
const _: () = assert!(
    1024 + EPOCHS_MAX * EPOCH_BYTES + DISKS_MAX * (DISK_BYTES_MIN + NAME_BYTES_MAX)
        <= MANIFEST_BYTES_MAX
);

/// One disk of a group, at its place in the disk table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskEntry {
    /// Its identity.
    pub disk: DiskId,
    /// Its name within the group.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
}

impl DiskEntry {
    pub(crate) const BYTES_MIN: usize = DISK_BYTES_MIN;

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.put(&self.disk.to_bytes());
        out.put_u64(self.size_bytes);
        out.put_string(&self.name, NAME_BYTES_MAX);
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, CursorError> {
        let disk = DiskId::from_bytes(reader.array("disk UUID")?);
        let size_bytes = reader.u64("disk size")?;
        let name = reader.string(NAME_BYTES_MAX, "disk name")?;
        names::validate(&name).map_err(|_| CursorError::Invalid("disk name"))?;
        // As in a log: no record names a block behind it, and byte offsets can be counted.
        if size_bytes.div_ceil(BLOCK_SIZE as u64) > BLOCKS_END {
            return Err(CursorError::Invalid("disk size"));
        }
        Ok(Self {
            disk,
            name,
            size_bytes,
        })
    }
}

/// One reign in a group's history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EpochEntry {
    /// Its number; ascending in a manifest.
    pub epoch: Epoch,
    /// The log whose records it holds.
    pub log: LogId,
    /// Sequence number of its first segment.
    pub first_seq: u64,
    /// LSN of its first record; 0 while none has come.
    pub first_lsn: Lsn,
    /// Clock of the replica when it began, nanoseconds since 1970.
    pub begun_ns: u64,
}

/// A group's manifest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    /// Its number, from 1 up.
    pub number: u64,
    /// The group.
    pub group: GroupId,
    /// The group's name at this replica.
    pub name: String,
    /// SAN of the certificate that may write the group; empty for a repository that is written
    /// directly.
    pub peer: String,
    /// Clock of the replica when this manifest was written, nanoseconds since 1970.
    pub written_ns: u64,
    /// The disk table.
    pub disks: Vec<DiskEntry>,
    /// All epochs, oldest first.
    pub epochs: Vec<EpochEntry>,
}

impl Manifest {
    /// The manifest's bytes. Strings beyond their limits would be cut: names are checked where
    /// they come in.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.put_u64(self.number);
        body.put(&self.group.to_bytes());
        body.put_u64(self.written_ns);
        body.put_string(&self.name, NAME_BYTES_MAX);
        body.put_string(&self.peer, PEER_NAME_BYTES_MAX);
        body.put_count(self.disks.len());
        for disk in &self.disks {
            disk.encode(&mut body);
        }
        body.put_count(self.epochs.len());
        for entry in &self.epochs {
            body.put_u64(entry.epoch.0);
            body.put(&entry.log.to_bytes());
            body.put_u64(entry.first_seq);
            body.put_u64(entry.first_lsn.0);
            body.put_u64(entry.begun_ns);
        }
        // Pins and deleted segments: lists of later versions, empty in this one.
        body.put_count(0);
        body.put_count(0);
        KIND.seal(&body)
    }

    /// Decodes a manifest.
    ///
    /// # Errors
    /// Anything that `encode` would not have written.
    pub fn decode(bytes: &[u8]) -> Result<Self, ObjectError> {
        let body = KIND.open(bytes)?;
        Self::decode_body(body).map_err(|source| KIND.body_error(source))
    }

    fn decode_body(body: &[u8]) -> Result<Self, CursorError> {
        let mut reader = Reader::new(body);
        let number = reader.u64("manifest number")?;
        let group = GroupId::from_bytes(reader.array("group UUID")?);
        let written_ns = reader.u64("time")?;
        let name = reader.string(NAME_BYTES_MAX, "group name")?;
        names::validate(&name).map_err(|_| CursorError::Invalid("group name"))?;
        let peer = reader.string(PEER_NAME_BYTES_MAX, "peer name")?;
        let disks = decode_disks(&mut reader)?;
        let count = reader.count(EPOCHS_MAX, EPOCH_BYTES, "epoch count")?;
        let mut epochs: Vec<EpochEntry> = Vec::with_capacity(count);
        for _ in 0..count {
            let entry = EpochEntry {
                epoch: Epoch(reader.u64("epoch")?),
                log: LogId::from_bytes(reader.array("log UUID")?),
                first_seq: reader.u64("first sequence number")?,
                first_lsn: Lsn(reader.u64("first LSN")?),
                begun_ns: reader.u64("time")?,
            };
            let last = epochs.last().map_or(Epoch(0), |last| last.epoch);
            if entry.epoch <= last {
                return Err(CursorError::Invalid("order of epochs"));
            }
            if entry.epoch > Epoch::MAX {
                return Err(CursorError::Invalid("epoch"));
            }
            epochs.push(entry);
        }
        reader.zeroes(8, "reserved lists")?;
        reader.finish()?;
        if number == 0 {
            return Err(CursorError::Invalid("manifest number"));
        }
        Ok(Self {
            number,
            group,
            name,
            peer,
            written_ns,
            disks,
            epochs,
        })
    }
}

/// A disk table: count and entries.
pub(crate) fn decode_disks(reader: &mut Reader<'_>) -> Result<Vec<DiskEntry>, CursorError> {
    let count = reader.count(DISKS_MAX, DiskEntry::BYTES_MIN, "disk count")?;
    (0..count).map(|_| DiskEntry::decode(reader)).collect()
}

//! Opening of a session: who ships what, and from where it goes on.

use super::PROTOCOL_VERSION;
use super::message::WireError;
use crate::chain::RecordChain;
use crate::cursor::{CursorError, Put, Reader};
use crate::ids::{DiskIndex, Epoch, GroupId, LogId, Lsn};
use crate::manifest::{DiskEntry, decode_disks};
use crate::names::{self, NAME_BYTES_MAX};
use crate::segment::SinkId;

const MAGIC: [u8; 8] = *b"AFTRWIRE";
const FLAG_DEMANDS_EPOCH: u16 = 1;

/// A place in a group's order of records: everything up to `lsn` is there, and hashes to `chain`.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Cursor {
    /// LSN of the last record; 0 for none.
    pub lsn: Lsn,
    /// Record chain after it.
    pub chain: RecordChain,
}

impl Cursor {
    /// Encoded length.
    const BYTES: usize = 40;

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.lsn.0);
        out.put(&self.chain.0);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, CursorError> {
        let lsn = Lsn(reader.u64("cursor LSN")?);
        if lsn > Lsn::MAX {
            return Err(CursorError::Invalid("cursor LSN"));
        }
        Ok(Self {
            lsn,
            chain: RecordChain(reader.array("cursor chain")?),
        })
    }
}

const _: () = assert!(Cursor::BYTES == 8 + 32);

/// How far an unfinished pass is at the replica, durably.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ActivePass {
    /// LSN of its `PassBegin`.
    pub begin: Lsn,
    /// Disk at which it goes on.
    pub next_disk: DiskIndex,
    /// Block at which it goes on.
    pub next_block: u64,
    /// Blocks that have come.
    pub blocks: u64,
    /// Chain over the entries of its segments so far.
    pub chain: RecordChain,
}

/// Optional passes: a byte 0, or a byte 1 and the pass.
pub(super) fn encode_pass(pass: Option<&ActivePass>, out: &mut Vec<u8>) {
    let Some(pass) = pass else {
        out.put_u8(0);
        return;
    };
    out.put_u8(1);
    out.put_u64(pass.begin.0);
    out.put_u16(pass.next_disk.0);
    out.put_u64(pass.next_block);
    out.put_u64(pass.blocks);
    out.put(&pass.chain.0);
}

pub(super) fn decode_pass(reader: &mut Reader<'_>) -> Result<Option<ActivePass>, CursorError> {
    match reader.u8("pass flag")? {
        0 => Ok(None),
        1 => Ok(Some(ActivePass {
            begin: Lsn(reader.u64("pass LSN")?),
            next_disk: DiskIndex(reader.u16("pass disk")?),
            next_block: reader.u64("pass block")?,
            blocks: reader.u64("pass block count")?,
            chain: RecordChain(reader.array("pass chain")?),
        })),
        _ => Err(CursorError::Invalid("pass flag")),
    }
}

/// The primary's opening.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Whose records will come.
    pub group: GroupId,
    /// The group's name.
    pub name: String,
    /// The sink's identity within the group, as in the bodies of pass records.
    pub sink: SinkId,
    /// Epoch under which records are written; 0 if the log has none yet.
    pub epoch: Epoch,
    /// The log.
    pub log: LogId,
    /// The log's content does not continue what the replica has: it shall give a new epoch.
    pub demands_epoch: bool,
    /// What the primary last knew to be durable at this replica.
    pub acked: Cursor,
    /// The disk table.
    pub disks: Vec<DiskEntry>,
}

impl Hello {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put(&MAGIC);
        out.put_u16(PROTOCOL_VERSION);
        out.put_u16(if self.demands_epoch {
            FLAG_DEMANDS_EPOCH
        } else {
            0
        });
        out.put(&self.group.to_bytes());
        out.put(&self.log.to_bytes());
        out.put(&self.sink.0);
        out.put_u64(self.epoch.0);
        self.acked.encode(out);
        out.put_string(&self.name, NAME_BYTES_MAX);
        out.put_count(self.disks.len());
        for disk in &self.disks {
            disk.encode(out);
        }
    }

    pub(super) fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        if reader.array("magic")? != MAGIC {
            return Err(WireError::Magic);
        }
        let version = reader.u16("version")?;
        if version != PROTOCOL_VERSION {
            return Err(WireError::Version(version));
        }
        let flags = reader.u16("flags")?;
        if flags & !FLAG_DEMANDS_EPOCH != 0 {
            return Err(WireError::Reserved);
        }
        let group = GroupId::from_bytes(reader.array("group UUID")?);
        let log = LogId::from_bytes(reader.array("log UUID")?);
        let sink = SinkId(reader.array("sink")?);
        let epoch = Epoch(reader.u64("epoch")?);
        let acked = Cursor::decode(&mut reader)?;
        let name = reader.string(NAME_BYTES_MAX, "group name")?;
        names::validate(&name).map_err(|_| CursorError::Invalid("group name"))?;
        let disks = decode_disks(&mut reader)?;
        reader.finish()?;
        if epoch > Epoch::MAX {
            return Err(CursorError::Invalid("epoch").into());
        }
        Ok(Self {
            group,
            name,
            sink,
            epoch,
            log,
            demands_epoch: flags & FLAG_DEMANDS_EPOCH != 0,
            acked,
            disks,
        })
    }
}

/// Where a known log goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resume {
    /// The epoch; that of the hello.
    pub epoch: Epoch,
    /// Last durable record of it.
    pub cursor: Cursor,
    /// LSN of the `PassBegin` on which the records up to the cursor build, once its pass is
    /// complete; 0 while it is not.
    pub completed_pass: Lsn,
    /// The pass that is under way, if any.
    pub active_pass: Option<ActivePass>,
}

/// The replica's answer to a hello; a refusal is a
/// [`RemoteError`](super::RemoteError) instead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HelloReply {
    /// The log is known: go on here.
    Resume(Resume),
    /// The log is not known, or a new epoch was demanded: store this epoch durably, then say
    /// hello again with it.
    NewEpoch(Epoch),
}

impl HelloReply {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u16(PROTOCOL_VERSION);
        match self {
            Self::Resume(resume) => {
                out.put_u8(1);
                out.put_u64(resume.epoch.0);
                resume.cursor.encode(out);
                out.put_u64(resume.completed_pass.0);
                encode_pass(resume.active_pass.as_ref(), out);
            }
            Self::NewEpoch(epoch) => {
                out.put_u8(2);
                out.put_u64(epoch.0);
            }
        }
    }

    pub(super) fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let version = reader.u16("version")?;
        if version != PROTOCOL_VERSION {
            return Err(WireError::Version(version));
        }
        let kind = reader.u8("kind of reply")?;
        let epoch = Epoch(reader.u64("epoch")?);
        let reply = match kind {
            1 => Self::Resume(Resume {
                epoch,
                cursor: Cursor::decode(&mut reader)?,
                completed_pass: Lsn(reader.u64("completed pass")?),
                active_pass: decode_pass(&mut reader)?,
            }),
            2 => Self::NewEpoch(epoch),
            _ => return Err(CursorError::Invalid("kind of reply").into()),
        };
        reader.finish()?;
        if epoch.0 == 0 || epoch > Epoch::MAX {
            return Err(CursorError::Invalid("epoch").into());
        }
        Ok(reply)
    }
}

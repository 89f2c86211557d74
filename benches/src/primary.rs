//! A primary as a replica sees it: one disk, a stream of writes of one block each, cut into
//! segments. It has no disk and no log, so that a history of any length can be made quickly.

use afterimage_format::chain::{RecordChain, RecordMeta};
use afterimage_format::checksum::crc32c;
use afterimage_format::ids::{BLOCK_SIZE, DiskId, DiskIndex, Epoch, GroupId, LogId, Lsn};
use afterimage_format::manifest::DiskEntry;
use afterimage_format::op::Op;
use afterimage_format::segment::{
    ClockAnchor, PassBeginBody, PassEndBody, PushError, SEGMENT_PAYLOAD_TARGET, SegmentBuilder,
    SegmentFlags, SegmentKind, SegmentSpec, SinkId,
};
use afterimage_format::wire::{Cursor, Hello, HelloReply};
use afterimage_replica::receive::{IngestError, Peer, Receiver, Session, Verified};
use anyhow::{Context, bail};
use bytes::Bytes;

/// Name of the group that is written.
pub const GROUP: &str = "bench";
/// Writes of one block in a full segment.
pub const SEGMENT_WRITES: usize = SEGMENT_PAYLOAD_TARGET / BLOCK_SIZE;

const SINK: SinkId = SinkId([7; 16]);
/// Time between two records.
const RECORD_NS: u64 = 50_000;

/// The primary of one group with one disk.
#[derive(Debug)]
pub struct Primary {
    epoch: Epoch,
    disk_bytes: u64,
    last: Lsn,
    chain: RecordChain,
    wall_ns: u64,
}

impl Primary {
    /// A primary that has written nothing; its disk has `disk_bytes` bytes.
    #[must_use]
    pub const fn new(disk_bytes: u64) -> Self {
        Self {
            epoch: Epoch(1),
            disk_bytes,
            last: Lsn::ZERO,
            chain: RecordChain::BASE,
            wall_ns: 1_700_000_000_000_000_000,
        }
    }

    /// Blocks of the disk.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        self.disk_bytes / BLOCK_SIZE as u64
    }

    /// Epoch that it writes.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// LSN of its last record.
    #[must_use]
    pub const fn last(&self) -> Lsn {
        self.last
    }

    /// Creates the group in an empty repository and ships an empty base, behind which every LSN
    /// can be restored.
    ///
    /// # Errors
    /// The repository cannot be written, or holds the group.
    pub async fn connect(&mut self, receiver: &Receiver) -> anyhow::Result<Session> {
        let hello = Hello {
            group: GroupId::from_bytes([1; 16]),
            name: GROUP.to_owned(),
            sink: SINK,
            epoch: self.epoch,
            log: LogId::from_bytes([2; 16]),
            demands_epoch: false,
            acked: Cursor::default(),
            disks: vec![DiskEntry {
                disk: DiskId::from_bytes([3; 16]),
                name: "disk".to_owned(),
                size_bytes: self.disk_bytes,
            }],
        };
        let opened = receiver.hello(&hello, &Peer::Direct, self.wall_ns).await?;
        let (HelloReply::Resume(resume), Some(mut session)) = (&opened.reply, opened.session)
        else {
            bail!("the replica answered {:?}", opened.reply);
        };
        if resume.cursor.lsn != Lsn::ZERO {
            bail!("the repository holds a history: give an empty folder");
        }
        let begin = PassBeginBody {
            sink: SINK,
            rebases: true,
        };
        let begun = self.event(Op::PassBegin, &begin.encode())?;
        give(&mut session, begun, self.wall_ns).await?;
        let end = PassEndBody {
            sink: SINK,
            begin: self.last,
            blocks: 0,
            chain: RecordChain::BASE,
        };
        let ended = self.event(Op::PassEnd, &end.encode())?;
        give(&mut session, ended, self.wall_ns).await?;
        Ok(session)
    }

    /// A segment with these writes: (block, its 4 KiB).
    ///
    /// # Errors
    /// They are more than fit a segment, or a block is not 4 KiB.
    pub fn segment<'a>(
        &mut self,
        writes: impl IntoIterator<Item = (u64, &'a [u8])>,
    ) -> anyhow::Result<Bytes> {
        let mut builder = SegmentBuilder::new(self.spec());
        for (block, payload) in writes {
            self.push(&mut builder, Op::Write, (block, 1), payload)?;
        }
        self.seal(builder)
    }

    /// A segment of one event.
    fn event(&mut self, op: Op, body: &[u8]) -> anyhow::Result<Bytes> {
        let mut spec = self.spec();
        if op == Op::PassBegin {
            spec.pass = self.last.next();
            spec.flags.declares_gap = true;
        }
        let mut builder = SegmentBuilder::new(spec);
        self.push(&mut builder, op, (0, 0), body)?;
        self.seal(builder)
    }

    fn push(
        &mut self,
        builder: &mut SegmentBuilder,
        op: Op,
        (first_block, block_count): (u64, u32),
        payload: &[u8],
    ) -> Result<(), PushError> {
        let record = RecordMeta {
            lsn: self.last.next(),
            disk: DiskIndex(0),
            op,
            flags: 0,
            first_block,
            block_count,
            wall_ns: self.wall_ns,
            aux: 0,
            payload_crc: crc32c(payload),
        };
        builder.push(&record, payload)?;
        self.last = record.lsn;
        self.wall_ns += RECORD_NS;
        Ok(())
    }

    fn seal(&mut self, builder: SegmentBuilder) -> anyhow::Result<Bytes> {
        self.chain = builder.chain();
        let sealed = builder.seal().context("a segment needs a record")?;
        Ok(sealed.bytes)
    }

    const fn spec(&self) -> SegmentSpec {
        SegmentSpec {
            kind: SegmentKind::Log,
            flags: SegmentFlags {
                declares_gap: false,
            },
            group: GroupId::from_bytes([1; 16]),
            epoch: self.epoch,
            log: LogId::from_bytes([2; 16]),
            pass: Lsn::ZERO,
            chain_before: self.chain,
            anchor: ClockAnchor {
                wall_ns: self.wall_ns,
                boot_id: [1; 16],
                boottime_ns: self.wall_ns,
            },
        }
    }
}

/// Gives a segment to the replica as it came: checked byte by byte, committed, acknowledged.
///
/// # Errors
/// The replica refuses it or cannot store it.
pub async fn give(session: &mut Session, bytes: Bytes, now_ns: u64) -> Result<(), IngestError> {
    session.accept(Verified::check(bytes)?, now_ns).await?;
    Ok(())
}

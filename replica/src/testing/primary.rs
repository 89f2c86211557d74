//! A primary as the replica sees it: it keeps a log of records, what its disks held after each of
//! them, and cuts segments.

use std::collections::BTreeMap;

use afterimage_format::chain::{RecordChain, RecordMeta};
use afterimage_format::checkpoint::{CheckpointBody, CheckpointKind, CheckpointTrigger};
use afterimage_format::checkpoint_confirm::CheckpointConfirmBody;
use afterimage_format::checksum::crc32c;
use afterimage_format::ids::{BLOCK_SIZE, DiskId, DiskIndex, Epoch, GroupId, LogId, Lsn};
use afterimage_format::manifest::DiskEntry;
use afterimage_format::op::Op;
use afterimage_format::segment::{
    ClockAnchor, PassBeginBody, PassEndBody, SegmentBuilder, SegmentFlags, SegmentKind,
    SegmentSpec, SinkId,
};
use afterimage_format::wire::{ActivePass, Cursor, Hello, HelloReply, Resume};
use bytes::Bytes;

use crate::receive::{IngestError, Peer, Receiver, Session, Verified};

/// Blocks of each disk.
pub(crate) const BLOCKS: usize = 40;
/// Disks.
pub(crate) const DISKS: usize = 2;
/// Bytes of the last block that belong to the disk.
pub(crate) const LAST_BLOCK_BYTES: usize = 512;
/// Size of each disk.
pub(crate) const DISK_BYTES: usize = (BLOCKS - 1) * BLOCK_SIZE + LAST_BLOCK_BYTES;

/// What the disks hold: a tag for each block, 0 for zeroes.
pub(crate) type Content = Vec<[u64; BLOCKS]>;

/// One block of this tag.
pub(crate) fn block_of(tag: u64) -> Vec<u8> {
    let mut block: Vec<u8> = tag.to_le_bytes().repeat(BLOCK_SIZE / 8);
    if tag != 0 && tag.is_multiple_of(3) {
        // Some blocks do not compress.
        blake3::Hasher::new()
            .update(&tag.to_le_bytes())
            .finalize_xof()
            .fill(&mut block);
    }
    block
}

#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) meta: RecordMeta,
    pub(crate) payload: Vec<u8>,
}

#[derive(Clone, Debug)]
pub(crate) struct Primary {
    pub(crate) group: GroupId,
    pub(crate) name: String,
    pub(crate) log: LogId,
    pub(crate) epoch: Epoch,
    pub(crate) demands_epoch: bool,
    pub(crate) records: BTreeMap<u64, Record>,
    pub(crate) content: Content,
    /// What the disks held after each record.
    pub(crate) after: BTreeMap<u64, Content>,
    /// First record of the last base, if it declares a gap.
    pub(crate) gap_at: Option<u64>,
    pub(crate) wall_ns: u64,
    /// What it says to know of the replica.
    pub(crate) acked: Cursor,
    tag: u64,
}

impl Primary {
    pub(crate) fn new(seed: u8) -> Self {
        Self {
            group: GroupId::from_bytes([seed; 16]),
            name: format!("vm{seed}"),
            log: LogId::from_bytes([seed ^ 0x55; 16]),
            epoch: Epoch(0),
            demands_epoch: false,
            records: BTreeMap::new(),
            content: vec![[0; BLOCKS]; DISKS],
            after: BTreeMap::new(),
            gap_at: None,
            wall_ns: 1_000_000_000_000,
            acked: Cursor::default(),
            tag: u64::from(seed) << 32,
        }
    }

    pub(crate) fn disks(&self) -> Vec<DiskEntry> {
        (0..DISKS)
            .map(|at| DiskEntry {
                disk: DiskId::from_bytes([at as u8 + 1; 16]),
                name: format!("vd{}", (b'a' + at as u8) as char),
                size_bytes: DISK_BYTES as u64,
            })
            .collect()
    }

    pub(crate) fn hello(&self) -> Hello {
        Hello {
            group: self.group,
            name: self.name.clone(),
            sink: SinkId([7; 16]),
            epoch: self.epoch,
            log: self.log,
            demands_epoch: self.demands_epoch,
            acked: self.acked,
            disks: self.disks(),
        }
    }

    /// Says hello until there is a session.
    pub(crate) async fn connect(
        &mut self,
        receiver: &Receiver,
    ) -> Result<(Session, Resume), IngestError> {
        loop {
            let opened = receiver.hello(&self.hello(), &Peer::Direct, 1).await?;
            match (opened.reply, opened.session) {
                (HelloReply::NewEpoch(epoch), None) => {
                    self.epoch = epoch;
                    self.demands_epoch = false;
                }
                (HelloReply::Resume(resume), Some(session)) => return Ok((session, resume)),
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn last(&self) -> u64 {
        self.records.last_key_value().map_or(0, |(lsn, _)| *lsn)
    }

    pub(crate) fn new_tag(&mut self) -> u64 {
        self.tag += 1;
        self.tag
    }

    /// Appends a record.
    pub(crate) fn append(
        &mut self,
        disk: u16,
        op: Op,
        first: u64,
        count: u32,
        payload: Vec<u8>,
    ) -> u64 {
        let lsn = self.last() + 1;
        self.wall_ns += 1_000_000;
        let meta = RecordMeta {
            lsn: Lsn(lsn),
            disk: DiskIndex(disk),
            op,
            flags: 0,
            first_block: first,
            block_count: count,
            wall_ns: self.wall_ns,
            aux: 0,
            payload_crc: if payload.is_empty() {
                0
            } else {
                crc32c(&payload)
            },
        };
        self.records.insert(lsn, Record { meta, payload });
        self.after.insert(lsn, self.content.clone());
        lsn
    }

    pub(crate) fn write(&mut self, disk: u16, first: u64, count: u32) -> u64 {
        let mut payload = Vec::new();
        for block in first..first + u64::from(count) {
            let tag = self.new_tag();
            self.content[usize::from(disk)][block as usize] = tag;
            payload.extend(block_of(tag));
        }
        self.append(disk, Op::Write, first, count, payload)
    }

    pub(crate) fn clear(&mut self, disk: u16, first: u64, count: u32, op: Op) -> u64 {
        for block in first..first + u64::from(count) {
            self.content[usize::from(disk)][block as usize] = 0;
        }
        self.append(disk, op, first, count, Vec::new())
    }

    pub(crate) fn checkpoint(&mut self, label: &str) -> u64 {
        let body = CheckpointBody {
            kind: CheckpointKind::Crash,
            trigger: CheckpointTrigger::Request,
            label: label.to_owned(),
        };
        self.append(0, Op::Checkpoint, 0, 0, body.encode().expect("a label"))
    }

    /// A checkpoint that waits for its confirmation.
    pub(crate) fn application_checkpoint(&mut self, label: &str) -> u64 {
        let body = CheckpointBody {
            kind: CheckpointKind::Application,
            trigger: CheckpointTrigger::Request,
            label: label.to_owned(),
        };
        self.append(0, Op::Checkpoint, 0, 0, body.encode().expect("a label"))
    }

    /// What became of the checkpoint at `lsn`: confirmed, or not for this reason.
    pub(crate) fn confirm(&mut self, lsn: u64, reason: Option<&str>) -> u64 {
        let body = CheckpointConfirmBody {
            checkpoint: Lsn(lsn),
            confirmed: reason.is_none(),
            window_ns: 7,
            own_ns: 1,
            frozen: "/".to_owned(),
            skipped: String::new(),
            reason: reason.unwrap_or_default().to_owned(),
        };
        self.append(0, Op::CheckpointConfirm, 0, 0, body.encode())
    }

    pub(crate) fn pass_begin(&mut self, gap: bool) -> u64 {
        let body = PassBeginBody {
            sink: SinkId([7; 16]),
            rebases: gap,
        };
        let lsn = self.append(0, Op::PassBegin, 0, 0, body.encode());
        if gap {
            self.gap_at = Some(lsn);
        }
        lsn
    }

    pub(crate) fn pass_end(&mut self, begin: u64, blocks: u64, chain: RecordChain) -> u64 {
        let body = PassEndBody {
            sink: SinkId([7; 16]),
            begin: Lsn(begin),
            blocks,
            chain,
        };
        self.append(0, Op::PassEnd, 0, 0, body.encode())
    }

    /// Chain over the records up to `lsn`, from the last base on.
    pub(crate) fn chain_at(&self, lsn: u64) -> RecordChain {
        let from = self.gap_at.unwrap_or(1);
        let records = self
            .records
            .iter()
            .filter(|(at, _)| (from..=lsn).contains(*at));
        records.fold(RecordChain::BASE, |chain, (_, record)| {
            chain.extend(&record.meta)
        })
    }

    pub(crate) fn spec(&self, kind: SegmentKind) -> SegmentSpec {
        SegmentSpec {
            kind,
            flags: SegmentFlags::default(),
            group: self.group,
            epoch: self.epoch,
            log: self.log,
            pass: Lsn::ZERO,
            chain_before: RecordChain::BASE,
            anchor: ClockAnchor {
                wall_ns: self.wall_ns,
                boot_id: [1; 16],
                boottime_ns: self.wall_ns - 500_000_000_000,
            },
        }
    }

    /// The log's records `from..=to` as a segment. At most one of them begins a pass.
    pub(crate) fn segment(&self, from: u64, to: u64) -> Bytes {
        self.try_segment(from, to).expect("a segment")
    }

    /// The same, if the format allows it at all.
    pub(crate) fn try_segment(&self, from: u64, to: u64) -> Option<Bytes> {
        let mut spec = self.spec(SegmentKind::Log);
        spec.flags.declares_gap = self.gap_at == Some(from);
        spec.chain_before = match self.gap_at {
            Some(gap) if gap == from => RecordChain::BASE,
            _ => self.chain_at(from - 1),
        };
        let begins = |(_, record): &(&u64, &Record)| record.meta.op == Op::PassBegin;
        let begin = self.records.range(from..=to).find(begins);
        spec.pass = begin.map_or(Lsn::ZERO, |(lsn, _)| Lsn(*lsn));
        let mut builder = SegmentBuilder::new(spec);
        for (_, record) in self.records.range(from..=to) {
            builder
                .push(&record.meta, &record.payload)
                .expect("a record");
        }
        builder.seal().map(|sealed| sealed.bytes)
    }

    /// A pass segment with these blocks, each with the LSN it was read at.
    pub(crate) fn pass_segment(
        &self,
        pass: u64,
        before: RecordChain,
        blocks: &[(u16, u64, u64, u64)],
    ) -> (Bytes, RecordChain) {
        let mut spec = self.spec(SegmentKind::Pass);
        spec.pass = Lsn(pass);
        spec.chain_before = before;
        let mut builder = SegmentBuilder::new(spec);
        for (disk, block, tag, lsn) in blocks {
            builder
                .push_pass_blocks(DiskIndex(*disk), *block, Lsn(*lsn), &block_of(*tag))
                .expect("a block");
        }
        let sealed = builder.seal().expect("a segment");
        (sealed.bytes, sealed.header.chain_after)
    }

    /// Blocks that are not zero, from a place on, read now.
    pub(crate) fn blocks_from(
        &self,
        disk: u16,
        block: u64,
        max: usize,
    ) -> Vec<(u16, u64, u64, u64)> {
        let lsn = self.last();
        let all = (0..DISKS as u16).flat_map(|d| (0..BLOCKS as u64).map(move |b| (d, b)));
        all.filter(|at| *at >= (disk, block))
            .map(|(d, b)| (d, b, self.content[usize::from(d)][b as usize], lsn))
            .filter(|(_, _, tag, _)| *tag != 0)
            .take(max)
            .collect()
    }

    /// Sends everything after the cursor, and finishes the pass that is under way.
    pub(crate) async fn catch_up(
        &mut self,
        session: &mut Session,
        resume: Resume,
    ) -> Result<(), IngestError> {
        let mut cursor = resume.cursor.lsn.0;
        let mut pass = resume.active_pass;
        if cursor == 0 {
            let begin = self.pass_begin(true);
            session.give(self.segment(begin, begin)).await?;
            cursor = begin;
            pass = Some(ActivePass {
                begin: Lsn(begin),
                next_disk: DiskIndex(0),
                next_block: 0,
                blocks: 0,
                chain: RecordChain::BASE,
            });
        }
        if let Some(mut pass) = pass {
            loop {
                let blocks = self.blocks_from(pass.next_disk.0, pass.next_block, 7);
                let Some((disk, block, ..)) = blocks.last().copied() else {
                    break;
                };
                let (bytes, chain) = self.pass_segment(pass.begin.0, pass.chain, &blocks);
                session.give(bytes).await?;
                (pass.next_disk, pass.next_block, pass.chain) = (DiskIndex(disk), block + 1, chain);
                pass.blocks += blocks.len() as u64;
            }
            self.pass_end(pass.begin.0, pass.blocks, pass.chain);
        }
        while cursor < self.last() {
            let to = self.last().min(cursor + 3);
            let to = self
                .gap_at
                .filter(|gap| *gap > cursor + 1)
                .map_or(to, |gap| to.min(gap - 1));
            session.give(self.segment(cursor + 1, to)).await?;
            cursor = to;
        }
        Ok(())
    }
}

impl Session {
    /// Checks and accepts.
    pub(crate) async fn give(
        &mut self,
        bytes: Bytes,
    ) -> Result<afterimage_format::wire::Ack, IngestError> {
        self.accept(Verified::check(bytes)?, 1).await
    }
}

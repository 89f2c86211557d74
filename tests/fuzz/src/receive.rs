//! The replication session as a state machine: two logs of one group, hellos of any kind, segments
//! cut anywhere, repeated, re-ordered, damaged, of other histories, and a replica that restarts.
//!
//! What must hold: an acknowledgement names the end of what this very log has, by its chain; it
//! never goes back; what was acknowledged is in the repository when it is read anew; and the
//! repository verifies.

use crate::bytes_of::Script;
use afterimage_format::chain::{RecordChain, RecordMeta};
use afterimage_format::checksum::crc32c;
use afterimage_format::ids::{BLOCK_SIZE, DiskId, DiskIndex, Epoch, GroupId, LogId, Lsn};
use afterimage_format::manifest::DiskEntry;
use afterimage_format::op::Op;
use afterimage_format::segment::{
    ClockAnchor, PassBeginBody, PassEndBody, SegmentBuilder, SegmentFlags, SegmentKind,
    SegmentSpec, SinkId,
};
use afterimage_format::wire::{Cursor, Hello, HelloReply};
use afterimage_replica::group::Group;
use afterimage_replica::receive::{IngestError, Peer, Receiver, Session, Verified};
use afterimage_replica::repository::Repository;
use afterimage_replica::verify::verify;
use bytes::Bytes;
use futures::executor::block_on;

const BLOCKS: u64 = 16;
pub(crate) const NAME: &str = "vm1";
const STEPS_MAX: usize = 64;

pub(crate) fn group() -> GroupId {
    GroupId::from_bytes([1; 16])
}

fn disks() -> Vec<DiskEntry> {
    vec![DiskEntry {
        disk: DiskId::from_bytes([2; 16]),
        name: "vda".into(),
        size_bytes: BLOCKS * BLOCK_SIZE as u64,
    }]
}

/// One log of the group: its records, and the chain after each.
pub(crate) struct Log {
    id: LogId,
    pub(crate) epoch: Epoch,
    records: Vec<(RecordMeta, Vec<u8>)>,
    /// After each record, and before the first.
    pub(crate) chain: Vec<RecordChain>,
    session: Option<Session>,
    acked: Lsn,
}

impl Log {
    /// A log that begins with a base: everything reads zero.
    pub(crate) fn new(id: u8) -> Self {
        let mut log = Self {
            id: LogId::from_bytes([id; 16]),
            epoch: Epoch(0),
            records: Vec::new(),
            chain: vec![RecordChain::BASE],
            session: None,
            acked: Lsn::ZERO,
        };
        let sink = SinkId([7; 16]);
        let begin = PassBeginBody {
            sink,
            rebases: true,
        };
        log.append(Op::PassBegin, 0, 0, begin.encode());
        let end = PassEndBody {
            sink,
            begin: Lsn(1),
            blocks: 0,
            chain: RecordChain::BASE,
        };
        log.append(Op::PassEnd, 0, 0, end.encode());
        log
    }

    pub(crate) fn append(&mut self, op: Op, first_block: u64, block_count: u32, payload: Vec<u8>) {
        let lsn = self.records.len() as u64 + 1;
        let meta = RecordMeta {
            lsn: Lsn(lsn),
            disk: DiskIndex(0),
            op,
            flags: 0,
            first_block,
            block_count,
            wall_ns: 1_000_000 + lsn,
            aux: 0,
            payload_crc: if payload.is_empty() {
                0
            } else {
                crc32c(&payload)
            },
        };
        let before = self.chain[self.chain.len() - 1];
        self.chain.push(before.extend(&meta));
        self.records.push((meta, payload));
    }

    pub(crate) fn write(&mut self, script: &mut Script<'_>) {
        let block = script.below(BLOCKS as usize) as u64;
        self.append(Op::Write, block, 1, vec![script.byte(); BLOCK_SIZE]);
    }

    pub(crate) fn last(&self) -> usize {
        self.records.len()
    }

    /// Records `from..=to` as a segment under the epoch that this log believes in.
    pub(crate) fn segment(&self, from: usize, to: usize) -> Option<Bytes> {
        let spec = SegmentSpec {
            kind: SegmentKind::Log,
            flags: SegmentFlags {
                declares_gap: from == 1,
            },
            group: group(),
            epoch: self.epoch,
            log: self.id,
            pass: Lsn(u64::from(from == 1)),
            chain_before: self.chain[from - 1],
            anchor: ClockAnchor {
                wall_ns: 1_000_000,
                boot_id: [4; 16],
                boottime_ns: 1,
            },
        };
        let mut builder = SegmentBuilder::new(spec);
        for (meta, payload) in self.records.get(from - 1..to)? {
            builder.push(meta, payload).ok()?;
        }
        builder.seal().map(|sealed| sealed.bytes)
    }

    pub(crate) fn hello(&self, epoch: Epoch, demands_epoch: bool) -> Hello {
        Hello {
            group: group(),
            name: NAME.into(),
            sink: SinkId([7; 16]),
            epoch,
            log: self.id,
            demands_epoch,
            acked: Cursor::default(),
            disks: disks(),
        }
    }
}

pub(crate) fn run(data: &[u8]) {
    block_on(play(Script::new(data)));
}

async fn play(mut script: Script<'_>) {
    let repository = Repository::in_memory();
    let mut receiver = Receiver::new(repository.clone());
    let mut logs = [Log::new(0x11), Log::new(0x22)];
    for _ in 0..STEPS_MAX {
        if script.is_empty() {
            break;
        }
        let what = script.below(10);
        let log = &mut logs[script.below(2)];
        match what {
            0 | 1 => say_hello(&receiver, log, &mut script).await,
            2 => log.write(&mut script),
            3 => log.append(Op::Trim, script.below(8) as u64, 3, Vec::new()),
            // What comes next, or anything else of this log.
            4..=7 => {
                let next = usize::try_from(log.acked.0)
                    .unwrap_or(usize::MAX)
                    .min(log.last() - 1)
                    + 1;
                let from = match script.below(4) {
                    0 => 1 + script.below(log.last().min(256)),
                    _ => next,
                };
                let to = (from + script.below(4)).min(log.last());
                if let Some(bytes) = log.segment(from, to) {
                    give(log, bytes).await;
                }
            }
            8 => {
                if let Some(bytes) = log.segment(1, log.last().min(3)) {
                    let mut bytes = bytes.to_vec();
                    let at = script.below(256) * bytes.len() / 256;
                    bytes[at] ^= 1 << script.below(8);
                    assert!(
                        Verified::check(bytes.into()).is_err(),
                        "damage at byte {at}"
                    );
                }
            }
            // The replica starts anew.
            _ => receiver = Receiver::new(repository.clone()),
        }
    }
    let Ok(stored) = Group::load(&repository, group()).await else {
        assert!(logs.iter().all(|log| log.acked == Lsn::ZERO));
        return;
    };
    for log in &logs {
        let held = stored.history().epochs.iter().rev().any(|epoch| {
            let known = epoch.log == log.id && epoch.number == log.epoch;
            known && epoch.cursor.lsn >= log.acked
        });
        assert!(
            held || log.acked == Lsn::ZERO,
            "what was acknowledged is gone"
        );
    }
    let report = verify(&repository, NAME, |_| {}).await.expect("a report");
    assert_eq!(report.problems, []);
}

async fn say_hello(receiver: &Receiver, log: &mut Log, script: &mut Script<'_>) {
    let epoch = match script.below(4) {
        0 => Epoch(u64::from(script.byte() % 6)),
        _ => log.epoch,
    };
    let demands = script.below(8) == 0;
    let opened = receiver
        .hello(&log.hello(epoch, demands), &Peer::Direct, 1)
        .await;
    match opened.map(|opened| (opened.reply, opened.session)) {
        Ok((HelloReply::NewEpoch(new), session)) => {
            assert!(session.is_none() && new > Epoch(0));
            // A new epoch begins with nothing.
            if new != log.epoch {
                (log.epoch, log.acked, log.session) = (new, Lsn::ZERO, None);
            }
        }
        Ok((HelloReply::Resume(resume), Some(session))) => {
            if resume.epoch == log.epoch {
                assert!(resume.cursor.lsn >= log.acked, "the cursor went back");
            }
            check_cursor(log, &resume.cursor);
            (log.epoch, log.acked) = (resume.epoch, resume.cursor.lsn);
            log.session = Some(session);
        }
        Ok(other) => panic!("{other:?}"),
        Err(_) => log.session = None,
    }
}

async fn give(log: &mut Log, bytes: Bytes) {
    let Some(session) = &mut log.session else {
        return;
    };
    let verified = Verified::check(bytes).expect("whole");
    match session.accept(verified, 1).await {
        Ok(ack) => {
            assert!(ack.cursor.lsn >= log.acked, "the cursor went back");
            check_cursor(log, &ack.cursor);
            log.acked = ack.cursor.lsn;
        }
        // One log, one history: it never contradicts itself.
        Err(IngestError::Refused(afterimage_replica::history::Refusal::Diverged { .. })) => {
            panic!("a log was said to differ from itself")
        }
        Err(_) => log.session = None,
    }
}

/// A cursor is a place of this log.
fn check_cursor(log: &Log, cursor: &Cursor) {
    let at = usize::try_from(cursor.lsn.0).unwrap_or(usize::MAX);
    assert_eq!(log.chain.get(at), Some(&cursor.chain), "another history");
}

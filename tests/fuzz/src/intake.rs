//! A primary with a good certificate and bad intentions: segments whose checksums are right and
//! whose numbers are anything (`forged.rs`), under epochs of any number.
//!
//! What must hold: each is taken or refused; after that the group can be loaded anew and shows the
//! very same points; each point of a list opens, and every block of it can be read; what verify records
//! claim can be compared; the repository verifies.

use crate::bytes_of::Script;
use crate::forged::{self, Continues};
use afterimage_format::ids::{BLOCK_SIZE, DiskId, DiskIndex, Epoch, GroupId, LogId, Lsn};
use afterimage_format::manifest::DiskEntry;
use afterimage_format::segment::SinkId;
use afterimage_format::wire::{Cursor, Hello, HelloReply, Message, Resume};
use afterimage_replica::compare::follow;
use afterimage_replica::group::Group;
use afterimage_replica::history::Position;
use afterimage_replica::image::{ChunkCache, Image};
use afterimage_replica::points::PointList;
use afterimage_replica::receive::{Peer, Receiver, Session, Verified};
use afterimage_replica::repository::Repository;
use afterimage_replica::verify::verify;
use futures::executor::block_on;
use std::sync::Arc;
use std::task::{Context, Waker};

const DISK_BYTES: u64 = 16 * BLOCK_SIZE as u64;
const NAME: &str = "vm1";
const STEPS_MAX: usize = 12;
const GROUP: GroupId = GroupId::from_bytes([1; 16]);
/// Points of a range that are opened.
const POINTS_MAX: usize = 8;

pub(crate) fn run(data: &[u8]) {
    block_on(play(Script::new(data)));
}

struct Talk {
    receiver: Receiver,
    log: LogId,
    epoch: Epoch,
    session: Option<Session>,
    at: Resume,
    /// Size of the disk.
    bytes: u64,
}

async fn play(mut script: Script<'_>) {
    let repository = Repository::in_memory();
    let mut talk = Talk {
        receiver: Receiver::new(repository.clone()),
        log: LogId::from_bytes([2; 16]),
        epoch: Epoch(0),
        session: None,
        at: nothing(),
        bytes: DISK_BYTES,
    };
    for _ in 0..STEPS_MAX {
        if script.is_empty() {
            break;
        }
        match script.below(16) {
            0 => {
                talk.epoch = Epoch(forged::number(&mut script, talk.epoch.0));
                talk.log = LogId::from_bytes([2 + script.byte() % 3; 16]);
                talk.bytes = forged::number(&mut script, talk.bytes);
                talk.hello(script.below(4) == 1).await;
            }
            1 => talk.receiver = Receiver::new(repository.clone()),
            _ => talk.send(&mut script).await,
        }
    }
    let Ok(live) = talk.receiver.group(GROUP).await else {
        return;
    };
    let anew = Arc::new(Group::load(&repository, GROUP).await.expect("loads anew"));
    // What was begun by a restart of the replica is read by the next hello.
    live.refresh()
        .await
        .expect("what was committed can be read");
    let points = PointList::of(&anew.history());
    assert_eq!(points, PointList::of(&live.history()));
    look(&anew, &points).await;
    compare(&anew);
    let report = verify(&repository, NAME, |_| {}).await.expect("a report");
    assert_eq!(report.problems, []);
}

/// Whatever a verify record claims, looking at it comes to an end and to counts that make sense.
fn compare(group: &Arc<Group>) {
    let mut following = Box::pin(follow(group.clone(), Arc::new(|| 1)));
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..1_000 {
        let _never = following.as_mut().poll(&mut context);
    }
    let comparisons = group.comparison().now();
    for compared in [comparisons.finished, comparisons.current] {
        assert!(
            compared.mismatched_blocks <= compared.blocks,
            "{compared:?}"
        );
    }
}

fn nothing() -> Resume {
    Resume {
        epoch: Epoch(0),
        cursor: Cursor::default(),
        completed_pass: Lsn::ZERO,
        active_pass: None,
    }
}

impl Talk {
    async fn hello(&mut self, demands_epoch: bool) {
        let hello = Hello {
            group: GROUP,
            name: NAME.into(),
            sink: SinkId([7; 16]),
            epoch: self.epoch,
            log: self.log,
            demands_epoch,
            acked: Cursor::default(),
            disks: vec![DiskEntry {
                disk: DiskId::from_bytes([2; 16]),
                name: "vda".into(),
                size_bytes: self.bytes,
            }],
        };
        self.session = None;
        // Only what comes through the wire reaches a receiver.
        let (header, body) = Message::Hello(hello).encode();
        let Ok(Message::Hello(hello)) = Message::decode(header.kind, body) else {
            return;
        };
        let Ok(opened) = self.receiver.hello(&hello, &Peer::Direct, 1).await else {
            return;
        };
        match (opened.reply, opened.session) {
            (HelloReply::NewEpoch(epoch), None) => {
                assert!(
                    epoch > self.epoch || self.epoch == Epoch(0),
                    "{epoch} again"
                );
                self.epoch = epoch;
            }
            (HelloReply::Resume(resume), Some(session)) => {
                assert_eq!(resume.epoch, self.epoch);
                self.at = resume;
                self.session = Some(session);
            }
            other => panic!("{other:?}"),
        }
    }

    async fn send(&mut self, script: &mut Script<'_>) {
        for _ in 0..2 {
            if self.session.is_none() {
                self.hello(false).await;
            }
        }
        let at = self.at;
        let continues = Continues {
            group: GROUP,
            log: self.log,
            epoch: self.epoch.0,
            cursor: at.cursor,
            pass: at.active_pass.map(|pass| (pass.begin, pass.chain)),
        };
        let bytes = forged::segment(script, &continues);
        let Ok(verified) = Verified::check(bytes.into()) else {
            return;
        };
        let Some(session) = &mut self.session else {
            return;
        };
        match session.accept(verified, 1).await {
            Ok(ack) => {
                assert!(ack.cursor.lsn >= at.cursor.lsn, "the cursor went back");
                (self.at.cursor, self.at.active_pass) = (ack.cursor, ack.active_pass);
                self.at.completed_pass = ack.completed_pass;
            }
            Err(_) => self.session = None,
        }
    }
}

/// Opens what is listed and reads it.
async fn look(group: &Arc<Group>, points: &PointList) {
    let named = points.checkpoints.iter();
    let named = named.map(|point| (point.epoch, point.lsn));
    let ends = points.ranges.iter();
    let ends = ends.flat_map(|range| {
        assert!(range.first_lsn <= range.last_lsn, "{range:?}");
        [
            (range.epoch, range.first_lsn),
            (range.epoch, range.last_lsn),
        ]
    });
    let cache = Arc::new(ChunkCache::new(1 << 20));
    for (epoch, lsn) in named.chain(ends).take(POINTS_MAX) {
        let at = Position {
            epoch: Epoch(epoch),
            lsn: Lsn(lsn),
        };
        let image = Image::open(group.clone(), at, cache.clone()).expect("listed, so there");
        // From the start, and the last bytes.
        let size = image.size(DiskIndex(0)).expect("a disk");
        let mut content = vec![0; size.min(DISK_BYTES) as usize];
        for offset in [0, size - content.len() as u64] {
            let read = image.read(DiskIndex(0), offset, &mut content).await;
            read.expect("listed, so readable");
        }
    }
}

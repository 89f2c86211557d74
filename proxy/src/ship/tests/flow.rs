//! What happens when nothing goes wrong.

use super::group::{FakeGroup, block};
use super::replica::{Peer, Replica};
use super::{Rig, config};
use crate::ship::ShipConfig;
use crate::ship::status::SinkState;
use afterimage_format::ids::{BLOCK_SIZE, Epoch, Lsn};
use afterimage_format::op::Op;
use afterimage_format::segment::{SegmentIndex, SegmentKind};
use afterimage_format::wire::Message;
use std::time::Duration;

/// A group of two disks with some content, written to before anything is shipped.
pub(super) fn loaded_group() -> std::sync::Arc<FakeGroup> {
    let group = FakeGroup::new(&[4096, 64]);
    for at in 0..2500 {
        group.preload(0, 1000 + at, &block(at));
    }
    group.preload(1, 63, &block(9999));
    for at in 0..10 {
        group.write(0, at, &block(50_000 + at));
    }
    group
}

pub(super) fn assert_same(group: &FakeGroup, replica: &Replica) {
    for (disk, content) in group.lock().disks.iter().enumerate() {
        assert!(
            replica.image(disk as u16, content.len()) == *content,
            "disk {disk} differs"
        );
    }
}

/// A replica that has everything, with the connection still open.
pub(super) async fn in_sync(rig: &mut Rig) -> (Replica, Peer) {
    let mut replica = Replica::default();
    let mut peer = Peer::new(rig.accept().await);
    peer.greet(&mut replica).await;
    peer.serve(&mut replica, |r| r.completed != Lsn::ZERO).await;
    (replica, peer)
}

#[tokio::test(start_paused = true)]
async fn a_new_group_gets_an_epoch_a_pass_and_its_records() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let mut replica = Replica::default();
    let mut peer = Peer::new(rig.accept().await);
    peer.greet(&mut replica).await;
    assert_eq!(replica.epoch, Epoch(1));
    assert_eq!(replica.hellos[0].epoch, Epoch(0));
    // The guest goes on while the pass runs: over blocks before and behind the pass's place.
    let mut step = 0u64;
    peer.serve(&mut replica, |r| {
        step += 1;
        if step < 200 {
            group.write(0, step * 37 % 4096, &block(70_000 + step));
            group.trim(0, step * 53 % 4090, 5);
        }
        r.completed != Lsn::ZERO
    })
    .await;
    group.write(1, 3, &block(1));
    let last = group.last();
    peer.serve(&mut replica, |r| r.cursor.lsn == last).await;
    assert_same(&group, &replica);
    assert_eq!(replica.gaps.len(), 1, "one base");
    // Blocks that are zero did not travel.
    assert!(replica.blocks.len() < 4096);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let status = rig.status.get();
    assert_eq!(status.state, SinkState::Streaming);
    assert_eq!(status.acked, last);
    assert_eq!(status.pass, None);
    assert_eq!(
        group.lock().reports.last().unwrap(),
        &(replica.cursor, true)
    );
}

#[tokio::test(start_paused = true)]
async fn an_empty_disk_needs_no_pass_segments() {
    let group = FakeGroup::new(&[100]);
    let mut rig = Rig::start(group.clone(), config());
    let (replica, _peer) = in_sync(&mut rig).await;
    assert_eq!(replica.pass_segments, 0);
    assert_same(&group, &replica);
}

#[tokio::test(start_paused = true)]
async fn records_are_cut_by_time_and_at_checkpoints() {
    let group = FakeGroup::new(&[100]);
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, mut peer) = in_sync(&mut rig).await;
    let segments = replica.log_segments;
    group.write(0, 1, &block(1));
    group.write(0, 2, &block(2));
    group.event(Op::Checkpoint, vec![7; BLOCK_SIZE]);
    group.write(0, 3, &block(3));
    let last = group.last();
    peer.serve(&mut replica, |r| r.cursor.lsn == last).await;
    assert_eq!(replica.log_segments, segments + 2);
    assert_same(&group, &replica);
}

/// What the sink has is how things stood until the first record that it lacks, wherever that is: in the
/// segment under construction, or sent and not acknowledged.
#[tokio::test(start_paused = true)]
async fn the_moment_of_the_first_outstanding_record_is_told() {
    let group = FakeGroup::new(&[100]);
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, mut peer) = in_sync(&mut rig).await;
    let outstanding = |rig: &Rig| rig.status.get().outstanding_ns;
    // Ship whatever `in_sync` left.
    let last = group.last();
    peer.serve(&mut replica, |r| r.cursor.lsn == last).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(outstanding(&rig), 0);

    let first = group.write(0, 1, &block(1));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(outstanding(&rig), 1_000_000 + first.0, "not sent");
    let bytes = peer.segment().await;
    let second = group.write(0, 2, &block(2));
    let other = peer.segment().await;
    group.write(0, 3, &block(3));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(outstanding(&rig), 1_000_000 + first.0, "not acknowledged");
    replica.store(&bytes).expect("stored");
    let ack = replica.ack(peer.segments - 1);
    peer.send(Message::Ack(ack)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(outstanding(&rig), 1_000_000 + second.0);
    replica.store(&other).expect("stored");
    let last = group.last();
    peer.serve(&mut replica, |r| r.cursor.lsn == last).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(outstanding(&rig), 0);
}

#[tokio::test(start_paused = true)]
async fn nothing_leaves_before_the_log_is_durable() {
    let group = FakeGroup::new(&[100]);
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, mut peer) = in_sync(&mut rig).await;
    group.hold_syncs(true);
    let held = group.write(0, 1, &block(1));
    // MemorySource refuses to read above the bound; here nothing may even arrive.
    let quiet = tokio::time::timeout(Duration::from_secs(5), peer.receive()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    group.hold_syncs(false);
    peer.serve(&mut replica, |r| r.cursor.lsn == held).await;
}

#[tokio::test(start_paused = true)]
async fn blocks_of_a_pass_wait_for_the_log_too() {
    let group = FakeGroup::new(&[4096]);
    for at in 0..2048 {
        group.preload(0, at, &block(at));
    }
    // So slow that the write below comes before most of the pass's reads.
    let slow = ShipConfig {
        pass_bytes_per_second: Some(1 << 20),
        ..config()
    };
    let mut rig = Rig::start(group.clone(), slow);
    let mut replica = Replica::default();
    let mut peer = Peer::new(rig.accept().await);
    peer.greet(&mut replica).await;
    let base = peer.segment().await;
    group.hold_syncs(true);
    let held = group.write(0, 2000, &block(5000));
    replica.store(&base).unwrap();
    peer.acknowledge(&replica).await;
    // All blocks are read by now, some of them newer than what the log has durably.
    let quiet = tokio::time::timeout(Duration::from_secs(25), peer.receive()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    group.hold_syncs(false);
    let mut newest = Lsn::ZERO;
    while newest < held {
        let bytes = peer.segment().await;
        let header = SegmentIndex::of_segment(&bytes).unwrap().header;
        if header.kind == SegmentKind::Pass {
            newest = newest.max(header.last_lsn);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_pass_keeps_to_its_rate() {
    let group = FakeGroup::new(&[4096]);
    for at in 0..2048 {
        group.preload(0, at, &block(at));
    }
    let limited = ShipConfig {
        pass_bytes_per_second: Some(1 << 20),
        ..config()
    };
    let start = tokio::time::Instant::now();
    let mut rig = Rig::start(group.clone(), limited);
    let (replica, _peer) = in_sync(&mut rig).await;
    assert_same(&group, &replica);
    // Virtual time: 8 MiB at 1 MiB/s, the first quarter of a second ahead.
    assert!(start.elapsed().as_secs() >= 6, "{:?}", start.elapsed());
}

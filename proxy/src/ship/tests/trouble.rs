//! What happens when things go wrong: cuts, lost acknowledgements, trimmed logs, other histories.

use super::flow::{assert_same, in_sync, loaded_group};
use super::group::{FakeGroup, block};
use super::replica::{Peer, Replica};
use super::{Rig, config};
use crate::ship::ShipConfig;
use crate::ship::port::SinkRecord;
use crate::ship::status::SinkState;
use afterimage_format::chain::RecordChain;
use afterimage_format::ids::{Epoch, Lsn};
use afterimage_format::op::Op;
use afterimage_format::segment::{SegmentIndex, SegmentKind};
use afterimage_format::wire::{Cursor, ErrorCode, Message, RemoteError};
use std::time::Duration;

async fn reconnect(rig: &mut Rig, replica: &mut Replica) -> Peer {
    let mut peer = Peer::new(rig.accept().await);
    peer.greet(replica).await;
    peer
}

/// Serves until the replica has everything.
async fn catch_up(rig: &Rig, peer: &mut Peer, replica: &mut Replica) {
    peer.serve(replica, |r| {
        r.completed != Lsn::ZERO && r.cursor.lsn == rig.group.last()
    })
    .await;
    assert_same(&rig.group, replica);
}

#[tokio::test(start_paused = true)]
async fn a_new_connection_goes_on_without_a_pass() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, peer) = in_sync(&mut rig).await;
    drop(peer);
    group.write(0, 7, &block(1));
    let mut peer = reconnect(&mut rig, &mut replica).await;
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(replica.gaps.len(), 1);
    assert!(rig.status.get().reconnects_total >= 1);
}

#[tokio::test(start_paused = true)]
async fn a_lost_acknowledgement_is_made_up_for_by_the_hello() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, mut peer) = in_sync(&mut rig).await;
    group.write(0, 7, &block(1));
    let bytes = peer.segment().await;
    replica.store(&bytes).unwrap();
    // Stored, never acknowledged.
    drop(peer);
    for at in 0..5 {
        group.write(0, at, &block(100 + at));
    }
    let mut peer = reconnect(&mut rig, &mut replica).await;
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(
        (replica.gaps.len(), rig.status.get().divergences_total),
        (1, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn a_restarted_process_proves_the_chain_from_an_old_superblock() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, mut peer) = in_sync(&mut rig).await;
    for at in 0..300 {
        group.write(0, at, &block(at));
    }
    catch_up(&rig, &mut peer, &mut replica).await;
    let reports = group.lock().reports.clone();
    // Whatever report was the last to be stored: each leads on without a pass. The walk from the
    // empty superblock starts over at the base.
    for stored in reports.iter().map(|r| r.0).chain([Cursor::default()]) {
        drop(rig);
        group.set_sink(SinkRecord {
            acked: stored,
            ..SinkRecord::default()
        });
        rig = Rig::start(group.clone(), config());
        group.write(0, 9, &block(stored.lsn.0));
        let mut peer = reconnect(&mut rig, &mut replica).await;
        catch_up(&rig, &mut peer, &mut replica).await;
        assert_eq!(replica.gaps.len(), 1, "{stored:?}");
        assert_eq!(rig.status.get().divergences_total, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn what_came_past_the_log_is_sent_with_a_new_base_behind_the_history() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, peer) = in_sync(&mut rig).await;
    drop((peer, rig));
    group.write(0, 3, &block(1));
    let last = group.last();
    group.set_sink(SinkRecord {
        acked: replica.cursor,
        dirty: None,
        rebase_after: last,
        good_until: last,
    });
    // Somebody edits the disk while the group is down; it goes on with that.
    group.preload(0, 3000, &block(2));
    group.write(0, 4, &block(3));
    rig = Rig::start(group.clone(), config());
    let mut peer = reconnect(&mut rig, &mut replica).await;
    peer.serve(&mut replica, |_| false).await;
    assert_eq!((replica.cursor.lsn, replica.gaps.len()), (last, 1));
    let mut peer = reconnect(&mut rig, &mut replica).await;
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(replica.gaps.len(), 2);
    // Whether the superblock forgot it or not, once is enough.
    drop(peer);
    group.write(0, 5, &block(4));
    let mut peer = reconnect(&mut rig, &mut replica).await;
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(replica.gaps.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_cut_pass_goes_on_where_it_was() {
    let group = FakeGroup::new(&[8192]);
    for at in 0..6000 {
        group.preload(0, at, &block(at));
    }
    let mut rig = Rig::start(group.clone(), config());
    let mut replica = Replica::default();
    let mut peer = reconnect(&mut rig, &mut replica).await;
    peer.serve(&mut replica, |r| r.pass_segments == 1).await;
    drop(peer);
    let before = replica.active.unwrap();
    group.write(0, 10, &block(1));
    group.write(0, 5900, &block(2));
    let mut peer = reconnect(&mut rig, &mut replica).await;
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(replica.gaps.len(), 1, "the same pass went on");
    assert_eq!(replica.completed, before.begin);
    // Read once, but for what was on its way when the connection broke.
    assert!(
        group.lock().blocks_read < 6016 + 6016 - before.blocks,
        "{before:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_pass_may_be_on_its_way_when_the_connection_breaks() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let mut replica = Replica::default();
    let mut peer = reconnect(&mut rig, &mut replica).await;
    // Everything arrives but the segment with PassEnd.
    loop {
        let bytes = peer.segment().await;
        let index = SegmentIndex::of_segment(&bytes).unwrap();
        if index.entries.iter().any(|e| e.record.op == Op::PassEnd) {
            break;
        }
        replica.store(&bytes).unwrap();
        peer.acknowledge(&replica).await;
    }
    drop(peer);
    // A block behind the pass's place is allocated meanwhile: it must not be sent as part of it.
    group.write(1, 40, &block(1));
    let sent = replica.pass_segments;
    let mut peer = reconnect(&mut rig, &mut replica).await;
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!((replica.pass_segments, replica.gaps.len()), (sent, 1));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_pass_may_wait_for_room_while_the_connection_breaks() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let mut replica = Replica::default();
    let mut peer = reconnect(&mut rig, &mut replica).await;
    peer.serve(&mut replica, |r| r.active.is_some()).await;
    group.fill();
    // Less than what a silent sink is given.
    let while_idle = Duration::from_secs(5);
    let quiet = tokio::time::timeout(while_idle, peer.serve(&mut replica, |_| false)).await;
    assert!(quiet.is_err(), "the connection ended");
    // What is in the log still gets to the sink: nothing else makes room there.
    group.write(0, 3, &block(2));
    let quiet = tokio::time::timeout(while_idle, peer.serve(&mut replica, |_| false)).await;
    assert!(quiet.is_err(), "the connection ended");
    assert_eq!(replica.cursor.lsn, group.last());
    drop(peer);
    // A block behind the pass's place is allocated meanwhile: it must not be sent as part of it.
    group.write(1, 40, &block(1));
    let sent = replica.pass_segments;
    let mut peer = reconnect(&mut rig, &mut replica).await;
    let quiet = tokio::time::timeout(while_idle, peer.serve(&mut replica, |_| false)).await;
    assert!(quiet.is_err(), "the connection ended");
    assert_eq!(replica.cursor.lsn, group.last());
    assert_eq!(group.make_room(), 1);
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!((replica.pass_segments, replica.gaps.len()), (sent, 1));
}

#[tokio::test(start_paused = true)]
async fn a_pass_that_the_sink_has_dropped_is_done_again() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let mut replica = Replica {
        drops_pass: true,
        ..Replica::default()
    };
    let mut peer = reconnect(&mut rig, &mut replica).await;
    // The session ends by itself, and says why.
    peer.serve(&mut replica, |r| r.completed != Lsn::ZERO).await;
    assert_eq!(replica.completed, Lsn::ZERO);
    let mut peer = reconnect(&mut rig, &mut replica).await;
    let error = rig.status.get().last_error.unwrap();
    assert!(error.contains("has dropped pass"), "{error}");
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(replica.gaps.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_pass_that_does_not_add_up_is_done_again() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let mut replica = Replica {
        loses_pass_blocks: true,
        ..Replica::default()
    };
    let mut peer = reconnect(&mut rig, &mut replica).await;
    peer.serve(&mut replica, |r| r.completed != Lsn::ZERO).await;
    assert_eq!(replica.completed, Lsn::ZERO);
    drop(peer);
    let mut peer = reconnect(&mut rig, &mut replica).await;
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(replica.gaps.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_silent_replica_bounds_what_is_read_and_sent() {
    let group = loaded_group();
    let window_bytes = 1 << 20;
    let narrow = ShipConfig {
        window_bytes,
        ..config()
    };
    let mut rig = Rig::start(group.clone(), narrow);
    let (_replica, mut peer) = in_sync(&mut rig).await;
    for round in 0..8000u64 {
        group.write(0, round % 4096, &block(round));
    }
    // Takes everything, says nothing (but keep-alives).
    let mut received = 0;
    while let Ok(Ok(message)) = tokio::time::timeout(Duration::from_secs(2), peer.receive()).await {
        if let Message::Segment(bytes) = message {
            received += bytes.len();
        }
        peer.send(Message::KeepAlive).await;
    }
    // The window, and the one segment that overshoots it.
    assert!(
        received > window_bytes && received < window_bytes + (9 << 20),
        "{received}"
    );
    assert!(rig.status.get().unacked_bytes < (window_bytes + (18 << 20)) as u64);
}

#[tokio::test(start_paused = true)]
async fn a_dead_replica_is_given_up() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, silent) = in_sync(&mut rig).await;
    // Half-open: nothing comes, nothing is closed.
    let mut peer = reconnect(&mut rig, &mut replica).await;
    drop(silent);
    let error = rig.status.get().last_error.unwrap();
    assert!(error.contains("silent for 30 s"), "{error}");
    catch_up(&rig, &mut peer, &mut replica).await;
}

#[tokio::test(start_paused = true)]
async fn records_that_left_the_log_make_a_gap_and_a_pass() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, peer) = in_sync(&mut rig).await;
    drop(peer);
    for at in 0..100 {
        group.write(0, at, &block(at + 5));
    }
    group.trim_log(group.last().0 - 10);
    group.write(1, 1, &block(3));
    let mut peer = reconnect(&mut rig, &mut replica).await;
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(replica.gaps.len(), 2);
    assert_eq!(replica.epoch, Epoch(1), "history goes on in the same epoch");
    assert_eq!(rig.status.get().gaps_total, 1);
}

#[tokio::test(start_paused = true)]
async fn records_may_leave_the_log_in_the_middle_of_a_session() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, mut peer) = in_sync(&mut rig).await;
    // The window fills up, then the log is trimmed under the reader.
    for round in 0..12_000u64 {
        group.write(0, round % 4096, &block(round));
    }
    let first = peer.segment().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    group.trim_log(group.last().0);
    replica.store(&first).unwrap();
    peer.acknowledge(&replica).await;
    peer.serve(&mut replica, |_| false).await;
    let mut peer = reconnect(&mut rig, &mut replica).await;
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(replica.gaps.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_base_that_never_arrived_is_declared_again() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, peer) = in_sync(&mut rig).await;
    drop(peer);
    group.write(0, 1, &block(1));
    group.write(0, 2, &block(2));
    group.trim_log(group.last().0);
    // The group declares a base; the connection breaks before its segment arrives.
    let peer = reconnect(&mut rig, &mut replica).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    drop(peer);
    let mut peer = reconnect(&mut rig, &mut replica).await;
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(replica.gaps.len(), 2);
    assert_eq!(rig.status.get().divergences_total, 0);
}

#[tokio::test(start_paused = true)]
async fn another_history_gets_a_new_epoch() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, peer) = in_sync(&mut rig).await;
    drop(peer);
    replica.cursor.chain = RecordChain([9; 32]);
    let mut peer = reconnect(&mut rig, &mut replica).await;
    // The first answer is taken for what it is: a demand for an epoch follows.
    peer.serve(&mut replica, |r| {
        r.completed != Lsn::ZERO && r.epoch == Epoch(2)
    })
    .await;
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(rig.status.get().divergences_total, 1);
    assert!(replica.hellos.iter().any(|hello| hello.demands_epoch));
}

#[tokio::test(start_paused = true)]
async fn a_replica_ahead_of_the_log_gets_a_new_epoch() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, peer) = in_sync(&mut rig).await;
    drop(peer);
    replica.cursor.lsn = Lsn(replica.cursor.lsn.0 + 1000);
    let mut peer = reconnect(&mut rig, &mut replica).await;
    peer.serve(&mut replica, |r| {
        r.completed != Lsn::ZERO && r.epoch == Epoch(2)
    })
    .await;
    catch_up(&rig, &mut peer, &mut replica).await;
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_lost_what_it_acknowledged_gets_it_again() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, mut peer) = in_sync(&mut rig).await;
    let old = replica.cursor;
    group.write(0, 1, &block(77));
    catch_up(&rig, &mut peer, &mut replica).await;
    drop(peer);
    // Restored from a backup of its own, say.
    replica.cursor = old;
    let mut peer = reconnect(&mut rig, &mut replica).await;
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(replica.gaps.len(), 1);
    assert_eq!(rig.status.get().divergences_total, 1);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_shown_and_tried_again() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let mut peer = Peer::new(rig.accept().await);
    let _hello = peer.receive().await.unwrap();
    let refusal = RemoteError {
        code: ErrorCode::NotPermitted,
        text: "the certificate names vm2".to_owned(),
    };
    peer.send(Message::Error(refusal)).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let status = rig.status.get();
    assert_eq!(status.state, SinkState::Refused);
    assert!(
        status
            .last_error
            .unwrap()
            .contains("the certificate names vm2")
    );
    // The next attempt is under way and has no answer yet: what is known still holds.
    let mut peer = Peer::new(rig.accept().await);
    let _hello = peer.receive().await.unwrap();
    assert_eq!(rig.status.get().state, SinkState::Refused);
    drop(peer);
    let mut peer = Peer::new(rig.accept().await);
    let _hello = peer.receive().await.unwrap();
    assert_eq!(
        rig.status.get().state,
        SinkState::Waiting,
        "a cut connection is no refusal"
    );
    drop(peer);
    let mut replica = Replica::default();
    let mut peer = reconnect(&mut rig, &mut replica).await;
    catch_up(&rig, &mut peer, &mut replica).await;
}

#[tokio::test(start_paused = true)]
async fn a_false_acknowledgement_ends_the_session() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, mut peer) = in_sync(&mut rig).await;
    let cursor = replica.cursor;
    replica.cursor.lsn = Lsn(cursor.lsn.0 + 1);
    peer.acknowledge(&replica).await;
    replica.cursor = cursor;
    let _peer = reconnect(&mut rig, &mut replica).await;
    let error = rig.status.get().last_error.unwrap();
    assert!(error.contains("acknowledges up to record"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_epoch_raised_by_somebody_else_is_taken_up() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, _peer) = in_sync(&mut rig).await;
    group.set_epoch_now(5);
    let mut peer = reconnect(&mut rig, &mut replica).await;
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(replica.epoch, Epoch(5));
}

#[tokio::test(start_paused = true)]
async fn passes_towards_other_sinks_change_nothing() {
    let group = loaded_group();
    let mut rig = Rig::start(group.clone(), config());
    let (mut replica, mut peer) = in_sync(&mut rig).await;
    let other = afterimage_format::segment::PassBeginBody {
        sink: afterimage_format::segment::SinkId([1; 16]),
        rebases: true,
    };
    group.event(Op::PassBegin, other.encode());
    group.write(0, 3, &block(3));
    catch_up(&rig, &mut peer, &mut replica).await;
    assert_eq!(replica.gaps.len(), 1);
    drop(peer);
    let mut peer = reconnect(&mut rig, &mut replica).await;
    group.write(0, 4, &block(4));
    let bytes = peer.segment().await;
    let header = SegmentIndex::of_segment(&bytes).unwrap().header;
    assert_eq!((header.kind, header.pass), (SegmentKind::Log, Lsn::ZERO));
}

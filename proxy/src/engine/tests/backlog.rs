//! What a sink lacks, against what the log really holds behind its last record.

use super::rig::{BLOCK, Geometry, Rig, sink};
use crate::engine::{DirtyChange, Ticket};
use afterimage_format::chain::RecordChain;
use afterimage_format::ids::{BLOCK_SIZE, Lsn};

/// A group whose log keeps everything for a sink that has acknowledged nothing yet.
fn kept_for_a_sink(log_blocks: u64) -> Rig {
    let mut rig = Rig::new(
        3,
        Geometry {
            ring_blocks: 128,
            log_blocks,
            disks: vec![64 * BLOCK],
            sinks: 1,
            ..Geometry::default()
        },
    );
    let begin = rig.engine().progress().appended.next();
    rig.engine()
        .sink_dirty(Ticket(1), sink(0), DirtyChange::PassCommitted { begin });
    rig.turns(100);
    rig
}

/// Writes so many times so many blocks and flushes. Returns the last LSN and the log's use.
fn written(rig: &mut Rig, times: u64, blocks: u64) -> (Lsn, u64) {
    for _ in 0..times {
        let id = rig.write(0, 0, &vec![1; blocks as usize * BLOCK_SIZE], false);
        rig.wait(id).expect("alive").expect("written");
    }
    let flush = rig.flush();
    rig.wait(flush).expect("alive").expect("flushed");
    let status = rig.engine().status();
    (status.progress.appended, status.log_bytes_used)
}

fn trimmed(rig: &mut Rig, times: u64) -> (Lsn, u64) {
    for _ in 0..times {
        let id = rig.submit(
            0,
            crate::engine::request::Request::Trim {
                offset: 0,
                len: BLOCK,
                fua: false,
            },
        );
        rig.wait(id).expect("alive").expect("trimmed");
    }
    written(rig, 0, 0)
}

#[test]
fn records_without_payload_do_not_count_like_those_with_much() {
    let mut rig = kept_for_a_sink(900);
    let (large, after_large) = written(&mut rig, 25, 16);
    let (small, after_small) = trimmed(&mut rig, 600);
    let (last, after_last) = written(&mut rig, 10, 16);
    assert_eq!(rig.engine().progress().oldest, Lsn(1), "the log keeps all");
    // As many bytes as the log has taken since that record, whatever share of the records it is.
    let engine = rig.engine();
    assert_eq!(engine.log_bytes_behind(Lsn::ZERO), after_last);
    assert_eq!(engine.log_bytes_behind(large), after_last - after_large);
    assert_eq!(engine.log_bytes_behind(small), after_last - after_small);
    assert_eq!(engine.log_bytes_behind(last), 0);
    // The trims are nearly all of the records and hardly anything of the log.
    assert!(after_small - after_large < after_large / 10);
}

#[test]
fn what_has_left_the_log_is_lacked_by_nobody() {
    let mut rig = kept_for_a_sink(200);
    let (acked, _) = written(&mut rig, 6, 16);
    let (last, _) = written(&mut rig, 2, 4);
    rig.engine().sink_acked(sink(0), acked, RecordChain::BASE);
    rig.turns(30_000);
    assert_eq!(rig.engine().progress().oldest, acked.next());
    let used = rig.engine().status().log_bytes_used;
    let engine = rig.engine();
    assert_eq!(engine.log_bytes_behind(acked), used);
    assert_eq!(engine.log_bytes_behind(Lsn::ZERO), used);
    assert_eq!(engine.log_bytes_behind(last), 0);
}

#[test]
fn the_open_frame_counts_before_it_has_a_place_in_the_log() {
    let mut rig = kept_for_a_sink(200);
    let (flushed, used) = written(&mut rig, 1, 3);
    // No turn: it is in the ring alone.
    rig.write(0, 0, &[1; 5 * BLOCK_SIZE], false);
    let engine = rig.engine();
    assert_eq!(engine.status().log_bytes_used, used);
    assert_eq!(engine.log_bytes_behind(flushed), 6 * BLOCK);
    assert_eq!(engine.log_bytes_behind(Lsn::ZERO), used + 6 * BLOCK);
    assert_eq!(engine.log_bytes_behind(engine.progress().appended), 0);
}

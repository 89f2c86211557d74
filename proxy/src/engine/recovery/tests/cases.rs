//! The labelled cases: rings (R), ends of the log (E), claims (C), and what bad input gets.

use super::rig::{DISK_BYTES, Rig, sink};
use crate::engine::log::area_offset;
use crate::engine::log::error::{Evidence, LogError};
use crate::engine::log::scan::LogEnd;
use crate::engine::recovery::claims::{ClaimRefusal, Leaving, leave};
use crate::engine::recovery::ring::RingAbsence;
use crate::engine::recovery::{Accepted, LastWrite, RecoveryError};
use crate::engine::{DirtyChange, Ticket};
use crate::io::Storage;
use afterimage_format::claim::{ClaimState, DeviceWrites};
use afterimage_format::frame::{Descriptor, ENTRY_BYTES, HEADER_BYTES, RingDescriptor};
use afterimage_format::ids::{BLOCK_SIZE, BootId, GroupId, LogId, Lsn};
use afterimage_format::ring_header::{
    RING_APPENDED_WORD, RING_DURABLE_WORD, RING_HEADER_BYTES, RING_NEXT_WORD,
};
use afterimage_format::superblock::SuperblockError;

/// Started, ten writes, the first five flushed, nothing destaged.
fn ten_writes() -> Rig {
    let mut rig = Rig::new(3, 64, 48);
    rig.start(None).unwrap();
    for block in 0..5 {
        rig.write(block, 1, 10 + block as u8);
        rig.flush();
    }
    for block in 5..10 {
        rig.write(block, 1, 10 + block as u8);
    }
    rig
}

fn refused(rig: &mut Rig) -> RecoveryError {
    let before = (rig.superblock(), rig.disk_bytes());
    let error = rig.start(None).unwrap_err();
    assert_eq!(
        before,
        (rig.superblock(), rig.disk_bytes()),
        "nothing changed"
    );
    assert!(
        matches!(
            &error,
            RecoveryError::RingDamaged { .. } | RecoveryError::RecordBeyondDisk { .. }
        ) || error.to_string().contains("log: ")
            || error.to_string().contains("ring: ")
            || error.to_string().contains("afterimage: "),
        "names the file: {error}"
    );
    error
}

#[test]
fn r2_the_ring_of_a_killed_process_is_used() {
    let mut rig = ten_writes();
    rig.world.kill();
    let report = rig.start(None).unwrap();
    assert_eq!(report.ring_absence, None);
    assert!(report.ring_frames > 0);
    assert!(report.verify_due);
    rig.check(rig.answered, "killed");
}

#[test]
fn r3_a_missing_ring_is_refused_in_the_same_boot_unless_accepted() {
    let mut rig = ten_writes();
    rig.world.kill();
    rig.engine = None;
    rig.world.remove_ring("ring");
    let error = refused(&mut rig);
    assert!(matches!(
        error,
        RecoveryError::RingMissing {
            absence: RingAbsence::Missing(_),
            ..
        }
    ));
    rig.accepted = Accepted {
        ring_loss: true,
        ..Accepted::default()
    };
    rig.start(None).unwrap();
    rig.check(rig.flushed, "accepted");
}

#[test]
fn r4_a_reboot_takes_the_ring() {
    let mut rig = ten_writes();
    rig.world.power_cut();
    let report = rig.start(None).unwrap();
    assert_eq!(report.ring_absence, Some(RingAbsence::Rebooted));
    rig.check(rig.flushed, "rebooted");
}

#[test]
fn r5_a_log_put_back_from_a_copy_is_noticed() {
    let mut rig = Rig::new(3, 64, 48);
    rig.start(None).unwrap();
    rig.write(1, 1, 1);
    rig.flush();
    let copy = rig.world.read("log", 0, rig.log_bytes as usize);
    rig.world.kill();
    rig.start(None).unwrap();
    rig.write(2, 1, 2);
    rig.world.kill();
    rig.engine = None;
    rig.world.write("log", 0, &copy);
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::RingMissing {
            absence: RingAbsence::RolledBack { .. },
            ..
        }
    ));
}

#[test]
fn r6_the_ring_of_another_log_and_of_an_earlier_boot_are_refused() {
    let mut rig = ten_writes();
    rig.world.kill();
    let mut storage = rig.open();
    let mut header =
        afterimage_format::ring_header::RingHeader::decode(storage.ring(0, 128)).unwrap();
    header.log = LogId::from_bytes([8; 16]);
    storage.ring_write(0, &header.encode());
    drop(storage);
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::RingMissing {
            absence: RingAbsence::OtherLog(_),
            ..
        }
    ));
    let mut storage = rig.open();
    header.log = LogId::from_bytes([2; 16]);
    header.boot = afterimage_format::ids::BootId::from_bytes([8; 16]);
    storage.ring_write(0, &header.encode());
    drop(storage);
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::RingMissing {
            absence: RingAbsence::OtherBoot(_),
            ..
        }
    ));
}

#[test]
fn r7_a_ring_of_a_newer_version_is_refused() {
    let mut rig = ten_writes();
    rig.world.kill();
    let mut storage = rig.open();
    storage.ring_write(8, &[2]);
    drop(storage);
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::RingNewer { version: 2, .. }
    ));
}

#[test]
fn damage_in_the_ring_is_noticed_not_cut() {
    let mut rig = ten_writes();
    rig.world.kill();
    // The payload of the last write stands last in the ring.
    let mut storage = rig.open();
    let data: Vec<u8> = rig.snapshots[10][9 * BLOCK_SIZE..10 * BLOCK_SIZE].to_vec();
    let ring_len = storage.ring_len();
    let at = (0..ring_len / BLOCK_SIZE)
        .map(|block| block * BLOCK_SIZE)
        .find(|at| storage.ring(*at, BLOCK_SIZE) == data)
        .unwrap();
    let byte = storage.ring(at + 100, 1)[0];
    storage.ring_write(at + 100, &[byte ^ 4]);
    drop(storage);
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::RingDamaged { .. }
    ));
    rig.accepted.ring_loss = true;
    rig.start(None).unwrap();
    rig.check(rig.flushed, "accepted");
}

/// Whatever bit flips in what the ring tells of its records: nothing that was answered is silently
/// gone, and no content is made up.
#[test]
fn a_flipped_bit_in_the_rings_books_loses_nothing_silently() {
    let mut headers: Vec<usize> = vec![RING_DURABLE_WORD, RING_NEXT_WORD, RING_APPENDED_WORD]
        .into_iter()
        .flat_map(|word| word..word + 8)
        .collect();
    headers.extend(0..RING_HEADER_BYTES);
    let mut rig = ten_writes();
    rig.world.kill();
    let ring = rig.ring_bytes();
    drop(rig);
    let (mut refusals, mut starts) = (0, 0);
    for block in 1..ring.len() / BLOCK_SIZE {
        let at = block * BLOCK_SIZE;
        if RingDescriptor::decode(&ring[at..at + BLOCK_SIZE]).is_ok() {
            // Header and the first two entries.
            headers.extend(at..at + HEADER_BYTES + 2 * ENTRY_BYTES);
        }
    }
    assert!(headers.len() > 8 * HEADER_BYTES, "several frames");
    for (index, at) in headers.into_iter().enumerate() {
        let mut rig = ten_writes();
        rig.world.kill();
        rig.engine = None;
        rig.world.flip_ring_bit("ring", at, (index % 8) as u8);
        match rig.start(None) {
            Ok(_) => {
                starts += 1;
                rig.check(rig.answered, &format!("byte {at} of the ring"));
            }
            Err(_) => refusals += 1,
        }
    }
    assert!(refusals > 0 && starts > 0, "{refusals} {starts}");
}

/// Byte offsets of the frames in the log, in order.
fn frame_offsets(rig: &Rig) -> Vec<u64> {
    let blocks = rig.log_bytes / BLOCK_SIZE as u64 - 2;
    let is_frame = |block: &u64| {
        let bytes = rig.world.read("log", area_offset(*block), BLOCK_SIZE);
        Descriptor::decode_header(&bytes).is_ok()
    };
    (0..blocks).filter(is_frame).map(area_offset).collect()
}

#[test]
fn e2_a_damaged_frame_above_the_bound_is_cut() {
    let mut rig = ten_writes();
    rig.world.power_cut();
    let frames = frame_offsets(&rig);
    // Two flushed frames say by their successors that they were durable; the last says nothing.
    let last = *frames.last().unwrap();
    let (header, _) = Descriptor::decode_header(&rig.world.read("log", last, BLOCK_SIZE)).unwrap();
    assert!(header.start.first_lsn.0 > 1, "nothing stands before it");
    rig.world.flip_bit("log", last + 5000, 1);
    let report = rig.start(None).unwrap();
    assert!(matches!(report.log_end, LogEnd::Torn(_)));
    // Each operation is one record: all before the damaged frame, and nothing of it.
    let at = rig.check(0, "cut");
    assert_eq!(at as u64, header.start.first_lsn.0 - 1);
}

#[test]
fn e4_a_damaged_frame_that_a_later_one_calls_durable_is_corruption() {
    for (byte, bit) in [(5000, 1), (130, 0), (60, 2), (0, 3)] {
        let mut rig = ten_writes();
        rig.world.power_cut();
        let frames = frame_offsets(&rig);
        rig.world.flip_bit("log", frames[0] + byte, bit);
        match refused(&mut rig) {
            RecoveryError::Log(LogError::Corrupt {
                offset, evidence, ..
            }) => {
                assert_eq!(offset, frames[0]);
                assert!(matches!(evidence, Evidence::LaterFrame { .. }));
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn e3_a_damaged_frame_below_the_rings_bound_is_corruption() {
    let mut rig = ten_writes();
    let durable = {
        let storage = rig.engine().storage_mut();
        storage.ring_load(RING_DURABLE_WORD)
    };
    assert!(durable >= 5);
    rig.world.kill();
    let frames = frame_offsets(&rig);
    rig.world.flip_bit("log", frames[3] + 4096 + 9, 0);
    match refused(&mut rig) {
        RecoveryError::Log(LogError::Corrupt { evidence, .. }) => {
            assert!(matches!(evidence, Evidence::Ring(_)));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn e3_a_damaged_frame_below_the_superblocks_bound_is_corruption() {
    let mut rig = ten_writes();
    // Any reason to store a superblock: it says what is durable by now.
    rig.engine().sink_dirty(Ticket(7), sink(), DirtyChange::Set);
    for _ in 0..50 {
        rig.turn();
    }
    let superblock = rig.superblock();
    assert!(superblock.durable >= Lsn(5) && superblock.destaged < Lsn(5));
    assert_eq!(superblock.tail.lsn, Lsn(1));
    rig.world.power_cut();
    // The last frame of those, which no later one speaks of once they are cut off.
    let frames = frame_offsets(&rig);
    let durable = |at: &&u64| {
        let (header, _) =
            Descriptor::decode_header(&rig.world.read("log", **at, BLOCK_SIZE)).unwrap();
        header.last_lsn() <= superblock.durable
    };
    let last = *frames.iter().rfind(durable).unwrap();
    for later in frames.iter().filter(|at| **at > last) {
        rig.world.write("log", *later, &[0; BLOCK_SIZE]);
    }
    rig.world.flip_bit("log", last + 4097, 0);
    match refused(&mut rig) {
        RecoveryError::Log(LogError::Corrupt { evidence, .. }) => {
            assert!(matches!(evidence, Evidence::Superblock(_)));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_torn_superblock_leaves_the_other_copy() {
    for copy in 0..2u64 {
        let mut rig = ten_writes();
        rig.world.kill();
        rig.engine = None;
        // Without the newest only the one before counts, which says clean: the ring knows better.
        rig.world.flip_bit("log", copy * BLOCK_SIZE as u64 + 700, 0);
        let report = rig.start(None).unwrap();
        assert!(report.ring_frames > 0 && report.verify_due);
        rig.check(rig.answered, &format!("copy {copy} torn"));
    }
}

/// As above without the ring: what the log holds beyond a superblock that says clean is judged as
/// after any power cut.
#[test]
fn a_stale_clean_superblock_does_not_hide_corruption() {
    let mut rig = ten_writes();
    rig.world.power_cut();
    let newest = rig.superblock().generation % 2;
    rig.world
        .flip_bit("log", newest * BLOCK_SIZE as u64 + 700, 0);
    assert!(rig.superblock().clean);
    let frames = frame_offsets(&rig);
    rig.world.flip_bit("log", frames[1] + 5000, 1);
    match refused(&mut rig) {
        RecoveryError::Log(LogError::Corrupt { evidence, .. }) => {
            assert!(matches!(evidence, Evidence::LaterFrame { .. }));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn logs_that_are_not_ours_or_not_whole_are_refused() {
    let mut rig = ten_writes();
    rig.world.kill();
    rig.engine = None;
    let mut storage = rig.open();
    let mut input = rig.input();
    input.group = GroupId::from_bytes([7; 16]);
    let error = crate::engine::recovery::recover(&mut storage, &input).unwrap_err();
    assert!(matches!(
        error,
        RecoveryError::Log(LogError::OtherGroup { .. })
    ));
    drop(storage);

    let whole = rig.log_bytes;
    rig.world.set_len("log", whole - BLOCK_SIZE as u64);
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::Log(LogError::Truncated { .. })
    ));

    for copy in 0..2 {
        rig.world.write("log", copy * BLOCK_SIZE as u64 + 8, &[2]);
    }
    rig.engine = None;
    let error = rig.start(None).unwrap_err();
    assert!(matches!(
        error,
        RecoveryError::Log(LogError::Superblock {
            source: SuperblockError::Version(2),
            ..
        })
    ));
    rig.world.write("log", 0, &[0; 2 * BLOCK_SIZE]);
    let error = rig.start(None).unwrap_err();
    assert!(matches!(
        error,
        RecoveryError::Log(LogError::Superblock {
            source: SuperblockError::Magic,
            ..
        })
    ));
}

#[test]
fn c5_to_c7_an_edited_backing_is_refused_unless_accepted() {
    let mut rig = Rig::new(9, 64, 24);
    rig.start(None).unwrap();
    assert_eq!(rig.claim().state, ClaimState::Attached);
    rig.work(1, 20);
    rig.stop(Leaving::Clean);
    assert!(matches!(rig.claim().state, ClaimState::Clean(_)));
    rig.world.write("disk", 4096, b"somebody was here");
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::Claim(ClaimRefusal::Edited { .. })
    ));
    rig.accepted.edited_backing = true;
    let report = rig.start(None).unwrap();
    assert!(report.verify_due);
    let last = rig.superblock().durable;
    assert!(last > Lsn::ZERO);
    assert_eq!(rig.superblock().sinks[0].rebase_after, last);
    rig.accepted = Accepted::default();
    rig.go_on_from(0);
    rig.engine = None;

    let mut rig = Rig::new(9, 64, 24);
    rig.start(None).unwrap();
    rig.stop(Leaving::Clean);
    rig.last_write.mtime_ns += 1;
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::Claim(ClaimRefusal::Edited { .. })
    ));
}

/// No sampled block of the device changes: what the kernel counted decides.
#[test]
fn c7_and_c11_a_device_that_was_written_is_refused_and_one_that_cannot_tell_is_to_be_verified() {
    let counted = DeviceWrites {
        boot: BootId::from_bytes([7; 16]),
        sequence: 3,
        writes: 100,
        sectors: 800,
    };
    let seen = |device| LastWrite {
        mtime_ns: 0,
        device,
    };
    let written = DeviceWrites {
        writes: 101,
        sectors: 808,
        ..counted
    };
    let restarted = DeviceWrites {
        boot: BootId::from_bytes([8; 16]),
        ..counted
    };
    let attached_anew = DeviceWrites {
        sequence: 4,
        ..written
    };
    let begun_anew = DeviceWrites {
        writes: 5,
        ..written
    };
    // What is stored, what is there at the start; whether that is refused, or a verify due.
    let cases = [
        (Some(counted), Some(counted), Ok(false)),
        (Some(counted), Some(written), Err(())),
        (Some(counted), Some(restarted), Ok(true)),
        (Some(counted), Some(attached_anew), Ok(true)),
        (Some(written), Some(begun_anew), Ok(true)),
        (Some(counted), None, Ok(true)),
        (None, Some(counted), Ok(true)),
        (None, None, Ok(true)),
    ];
    for (stored, found, expected) in cases {
        let mut rig = Rig::new(9, 64, 24);
        rig.last_write = seen(stored);
        rig.start(None).unwrap();
        rig.work(1, 20);
        rig.stop(Leaving::Clean);
        rig.last_write = seen(found);
        match expected {
            Err(()) => assert!(matches!(
                refused(&mut rig),
                RecoveryError::Claim(ClaimRefusal::Edited { .. })
            )),
            Ok(verify_due) => {
                let report = rig.start(None).unwrap();
                assert_eq!(report.verify_due, verify_due, "{stored:?}, then {found:?}");
                rig.engine = None;
            }
        }
    }
}

#[test]
fn c2_to_c4_a_missing_or_foreign_claim_is_refused() {
    let mut rig = ten_writes();
    rig.world.kill();
    rig.engine = None;
    let ours = rig.claim();
    let store = |rig: &Rig, claim: &afterimage_format::claim::Claim| {
        let at = claim.generation % 2 * BLOCK_SIZE as u64;
        rig.world.write("claim", 0, &[0; 2 * BLOCK_SIZE]);
        rig.world.write("claim", at, &claim.encode());
    };
    rig.world.write("claim", 0, &[0; 2 * BLOCK_SIZE]);
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::Claim(ClaimRefusal::Gone { .. })
    ));
    let mut claim = ours.clone();
    claim.group = GroupId::from_bytes([8; 16]);
    store(&rig, &claim);
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::Claim(ClaimRefusal::Foreign { .. })
    ));
    let mut claim = ours.clone();
    claim.log = LogId::from_bytes([8; 16]);
    store(&rig, &claim);
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::Claim(ClaimRefusal::OtherLog { .. })
    ));
    let mut claim = ours.clone();
    claim.log = LogId::from_bytes([8; 16]);
    claim.next_log = Some(LogId::from_bytes([2; 16]));
    store(&rig, &claim);
    rig.start(None).unwrap();
    rig.check(rig.answered, "named as the next log");
    assert_eq!(rig.claim().log, LogId::from_bytes([2; 16]));
    assert_eq!(rig.claim().next_log, None);
    rig.engine = None;
    rig.world.write("claim", 0, b"nonsense");
    rig.world.write("claim", BLOCK_SIZE as u64, b"nonsense");
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::Claim(ClaimRefusal::Invalid { .. })
    ));
}

#[test]
fn c8_to_c10_a_detached_disk_needs_a_new_log() {
    let mut rig = ten_writes();
    rig.stop(Leaving::Detached);
    let plain = rig.disk_bytes();
    assert_eq!(plain, *rig.snapshots.last().unwrap(), "complete");
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::Claim(ClaimRefusal::Done { .. })
    ));
    // To make plain what is plain already does nothing, even if somebody uses the disk.
    rig.world.write("disk", 0, b"in use without us");
    let used = rig.disk_bytes();
    rig.recover_plain(None).unwrap();
    assert_eq!(rig.disk_bytes(), used);
    // A new log takes the disk as it is.
    rig.create_next();
    rig.world.rename_file("next", "log");
    rig.start(None).unwrap();
    assert_eq!(rig.claim().log, LogId::from_bytes([4; 16]));
    assert_eq!(rig.disk_bytes(), used);
    assert!(rig.superblock().sinks[0].dirty.is_some());
}

#[test]
fn an_abandoned_log_is_never_replayed() {
    let mut rig = ten_writes();
    rig.world.kill();
    rig.engine = None;
    rig.abandon(0);
    assert!(matches!(
        refused(&mut rig),
        RecoveryError::Claim(ClaimRefusal::Done { .. })
    ));
    assert!(matches!(
        rig.recover_plain(None),
        Err(RecoveryError::Claim(ClaimRefusal::Done { .. }))
    ));
}

#[test]
fn a_backing_of_another_size_is_refused() {
    let mut rig = ten_writes();
    rig.world.kill();
    let mut storage = rig.open();
    let mut input = rig.input();
    input.disks[0].size = DISK_BYTES + 512;
    let error = crate::engine::recovery::recover(&mut storage, &input).unwrap_err();
    assert!(matches!(error, RecoveryError::DiskSize { .. }));
}

/// The write that failed was that of the clean superblock, and it reached the disk all the same.
#[test]
fn r8_a_latch_in_front_of_a_clean_log_counts() {
    let mut rig = ten_writes();
    rig.stop(crate::engine::recovery::claims::Leaving::Clean);
    assert!(rig.superblock().clean);
    let mut storage = rig.open();
    let latch = afterimage_format::ring_header::LogLatch {
        errno: 5,
        operation: afterimage_format::ring_header::LatchedOperation::Write,
    };
    storage.ring_store(
        afterimage_format::ring_header::RING_LATCH_WORD,
        latch.word(),
    );
    drop(storage);
    assert!(matches!(refused(&mut rig), RecoveryError::LogFailed { .. }));
    rig.create_next();
    rig.rewrite(None).unwrap().expect("the log has failed");
    rig.world.rename_file("next", "log");
    rig.start(None).unwrap();
    rig.check(rig.answered, "rewritten");
}

#[test]
fn disks_are_left_clean_only_if_their_log_is() {
    let mut rig = ten_writes();
    rig.world.kill();
    let mut storage = rig.open();
    let input = rig.input();
    let left = leave(&mut storage, &input, Leaving::Clean, &|_| LastWrite::at(77));
    assert!(matches!(left, Err(RecoveryError::NotClean { .. })));
    drop(storage);
    assert_eq!(rig.claim().state, ClaimState::Attached);
    // Another log's run in between.
    rig.start(None).unwrap();
    rig.stop(Leaving::Clean);
    let clean = rig.claim();
    rig.create_next();
    rig.world.rename_file("next", "log");
    let mut storage = rig.open();
    let left = leave(&mut storage, &input, Leaving::Clean, &|_| LastWrite::at(77));
    assert!(matches!(
        left,
        Err(RecoveryError::Claim(ClaimRefusal::OtherLog { .. }))
    ));
    drop(storage);
    assert_eq!(rig.claim(), clean);
}

//! Round trips and refusals of repository objects.

use super::*;
use crate::checksum::crc32c;
use crate::ids::{DiskId, Epoch, GroupId, LogId, Lsn, RepositoryId};
use crate::wire::Compared;
use proptest::prelude::*;

pub(super) fn manifest() -> Manifest {
    let epoch = |number: u64| EpochEntry {
        epoch: Epoch(number),
        log: LogId::from_bytes([number as u8; 16]),
        first_seq: number * 10,
        first_lsn: Lsn(number * 100),
        begun_ns: 1_700_000_000_000_000_000 + number,
    };
    let disk = |name: &str, size_bytes| DiskEntry {
        disk: DiskId::from_bytes([0x77; 16]),
        name: name.to_owned(),
        size_bytes,
    };
    Manifest {
        number: 4,
        group: GroupId::from_bytes([0x11; 16]),
        name: "vm1".to_owned(),
        peer: "primary.example".to_owned(),
        written_ns: 1_700_000_000_000_000_000,
        disks: vec![disk("vda", 10 << 30), disk("vdb", 512)],
        epochs: vec![epoch(1), epoch(2), epoch(7)],
    }
}

pub(super) fn binding() -> NameBinding {
    NameBinding {
        group: GroupId::from_bytes([0x11; 16]),
        name: "vm1".to_owned(),
        peer: "primary.example".to_owned(),
        created_ns: 3,
    }
}

pub(super) fn terminator() -> Terminator {
    Terminator {
        group: GroupId::from_bytes([0x11; 16]),
        epoch: Epoch(2),
        seq: 99,
        next_epoch: Epoch(3),
        next_log: LogId::from_bytes([0x22; 16]),
        ended_ns: 5,
    }
}

pub(super) fn check_result() -> CheckResult {
    CheckResult {
        group: GroupId::from_bytes([0x11; 16]),
        number: 7,
        ended_ns: 9,
        whole_ns: 5,
        objects: 3,
        bytes: 4096,
        problems: 1,
    }
}

pub(super) fn comparison_result() -> ComparisonResult {
    ComparisonResult {
        group: GroupId::from_bytes([0x11; 16]),
        number: 7,
        ended_ns: 9,
        whole_ns: 5,
        epoch: Epoch(3),
        through: Lsn(0x0506),
        compared: Compared {
            run: 0x0102,
            ranges: 3,
            blocks: 700,
            mismatched_blocks: 2,
            skipped: 1,
            total: 4,
        },
    }
}

fn identity() -> RepositoryIdentity {
    RepositoryIdentity {
        repository: RepositoryId::from_bytes([0x33; 16]),
        created_ns: 11,
    }
}

/// Each kind: its bytes, and whether a decoder takes some bytes.
type Case = (Vec<u8>, fn(&[u8]) -> bool);

fn cases() -> Vec<Case> {
    vec![
        (manifest().encode(), |b| Manifest::decode(b).is_ok()),
        (binding().encode(), |b| NameBinding::decode(b).is_ok()),
        (terminator().encode(), |b| Terminator::decode(b).is_ok()),
        (check_result().encode(), |b| CheckResult::decode(b).is_ok()),
        (comparison_result().encode(), |b| {
            ComparisonResult::decode(b).is_ok()
        }),
        (identity().encode(), |b| {
            RepositoryIdentity::decode(b).is_ok()
        }),
    ]
}

fn with_crc(mut bytes: Vec<u8>) -> Vec<u8> {
    let at = bytes.len() - 4;
    let crc = crc32c(&bytes[..at]).to_le_bytes();
    bytes[at..].copy_from_slice(&crc);
    bytes
}

#[test]
fn objects_come_back() {
    assert_eq!(Manifest::decode(&manifest().encode()), Ok(manifest()));
    assert_eq!(NameBinding::decode(&binding().encode()), Ok(binding()));
    assert_eq!(Terminator::decode(&terminator().encode()), Ok(terminator()));
    assert!(is_terminator(&terminator().encode()));
    assert!(!is_terminator(&manifest().encode()) && !is_terminator(b"AFTR"));
}

#[test]
fn every_cut_flip_and_leftover_is_refused() {
    for (bytes, accepts) in cases() {
        assert!(accepts(&bytes));
        for len in 0..bytes.len() {
            assert!(!accepts(&bytes[..len]), "cut at {len}");
        }
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            assert!(!accepts(&flipped), "flip in byte {at}");
        }
        assert!(!accepts(&[bytes.as_slice(), &[0]].concat()));
        // A leftover within the envelope, everything consistent.
        let mut longer = bytes.clone();
        longer.extend_from_slice(&[0; 4]);
        let len = (longer.len() as u32).to_le_bytes();
        longer[12..16].copy_from_slice(&len);
        assert!(!accepts(&with_crc(longer)));
    }
}

#[test]
fn the_body_is_cut_at_every_length() {
    for (bytes, accepts) in cases() {
        for body in 0..bytes.len() - 20 {
            let mut cut = bytes[..16 + body].to_vec();
            cut.extend_from_slice(&[0; 4]);
            let len = (cut.len() as u32).to_le_bytes();
            cut[12..16].copy_from_slice(&len);
            assert!(!accepts(&with_crc(cut)), "body cut at {body}");
        }
    }
}

#[test]
fn versions_are_named() {
    let mut newer = manifest().encode();
    newer[8] = 2;
    let error = Manifest::decode(&with_crc(newer)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "manifest has format version 2, this program reads version 1"
    );
}

#[test]
fn names_that_leave_a_folder_are_refused() {
    for name in ["../x", "a/b", "a\0b", ""] {
        let mut evil = manifest();
        evil.name = name.to_owned();
        assert!(Manifest::decode(&evil.encode()).is_err(), "{name:?}");
        let mut evil = manifest();
        evil.disks[0].name = name.to_owned();
        assert!(Manifest::decode(&evil.encode()).is_err(), "{name:?}");
        let mut evil = binding();
        evil.name = name.to_owned();
        assert!(NameBinding::decode(&evil.encode()).is_err(), "{name:?}");
    }
}

/// Found by fuzzing: what reads the last blocks of such a disk counted past the end of all numbers.
#[test]
fn disks_that_no_log_can_name_are_refused() {
    let decoded = |size_bytes| {
        let mut manifest = manifest();
        manifest.disks[1].size_bytes = size_bytes;
        Manifest::decode(&manifest.encode()).is_ok()
    };
    assert!(decoded(1 << 63));
    assert!(!decoded((1 << 63) + 1));
    assert!(!decoded(u64::MAX));
}

#[test]
fn epochs_ascend() {
    let mut wrong = manifest();
    wrong.epochs.swap(0, 1);
    assert!(Manifest::decode(&wrong.encode()).is_err());
    let back = Terminator {
        next_epoch: Epoch(2),
        ..terminator()
    };
    assert!(Terminator::decode(&back.encode()).is_err());
}

proptest! {
    /// Decoders do not panic on anything, checksums right or not.
    #[test]
    fn forged_objects_do_no_harm(
        which in 0usize..5,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (mut bytes, accepts) = cases().swap_remove(which);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        accepts(&bytes);
        accepts(&with_crc(bytes));
    }
}

/// The bytes of format version 1: repositories hold them.
#[test]
fn golden_bytes() {
    let stored = |text: &str| crate::golden::golden(text);
    let bytes = stored(include_str!("../../golden/manifest-v1.hex"));
    assert_eq!(manifest().encode(), bytes);
    assert_eq!(Manifest::decode(&bytes), Ok(manifest()));
    let bytes = stored(include_str!("../../golden/name-binding-v1.hex"));
    assert_eq!(binding().encode(), bytes);
    assert_eq!(NameBinding::decode(&bytes), Ok(binding()));
    let bytes = stored(include_str!("../../golden/terminator-v1.hex"));
    assert_eq!(terminator().encode(), bytes);
    assert_eq!(Terminator::decode(&bytes), Ok(terminator()));
    let bytes = stored(include_str!("../../golden/check-result-v1.hex"));
    assert_eq!(check_result().encode(), bytes);
    assert_eq!(CheckResult::decode(&bytes), Ok(check_result()));
    let bytes = stored(include_str!("../../golden/comparison-result-v1.hex"));
    assert_eq!(comparison_result().encode(), bytes);
    assert_eq!(ComparisonResult::decode(&bytes), Ok(comparison_result()));
    let bytes = stored(include_str!("../../golden/repository-identity-v1.hex"));
    assert_eq!(identity().encode(), bytes);
    assert_eq!(RepositoryIdentity::decode(&bytes), Ok(identity()));
}

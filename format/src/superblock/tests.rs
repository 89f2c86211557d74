//! Superblocks: golden bytes, the choice between copies, every refusal, every cut.

use super::*;
use crate::checksum::crc32c;
use crate::ids::BLOCK_SIZE;
use proptest::prelude::*;

fn superblock() -> Superblock {
    Superblock {
        group: GroupId::from_bytes([0x11; 16]),
        log: LogId::from_bytes([0x22; 16]),
        boot: BootId::from_bytes([0x33; 16]),
        generation: 6,
        epoch: Epoch(7),
        area_blocks: 1000,
        incarnation: 8,
        incarnation_frame: 40,
        ring_blocks: 64,
        clean: true,
        tail: Tail {
            position: 9,
            frame: 10,
            lsn: Lsn(11),
            lap: 12,
            previous_crc: 0xaabb_ccdd,
        },
        destaged: Lsn(13),
        durable: Lsn(14),
        created_ns: 15,
        disks: vec![DiskState {
            id: DiskId::from_bytes([0x44; 16]),
            size: 0x1200,
            removed: true,
        }],
        sinks: vec![SinkState {
            id: SinkId([0x55; 16]),
            acked: Lsn(16),
            chain: RecordChain([0x66; 32]),
            dirty: Some(Lsn(17)),
            rebase_after: Lsn(19),
            good_until: Lsn(18),
        }],
    }
}

fn reseal(block: &mut [u8]) {
    let crc = crc32c(&block[..BLOCK_SIZE - 4]);
    block[BLOCK_SIZE - 4..].copy_from_slice(&crc.to_le_bytes());
}

/// Version 1, byte for byte. A change here is a change of the format.
#[test]
fn golden_version_1() {
    let mut golden = vec![0; BLOCK_SIZE];
    let parts: &[(usize, &[u8])] = &[
        (0, b"AFILOGSB"),                     // magic
        (8, &[1, 0]),                         // version
        (10, &[1, 0]),                        // disks
        (12, &[1, 0]),                        // sinks
        (14, &[1, 0]),                        // flags: clean
        (16, &[0x11; 16]),                    // group
        (32, &[0x22; 16]),                    // log
        (48, &[0x33; 16]),                    // boot
        (64, &[6, 0, 0, 0, 0, 0, 0, 0]),      // generation
        (72, &[7, 0, 0, 0, 0, 0, 0, 0]),      // epoch
        (80, &[0xe8, 3, 0, 0, 0, 0, 0, 0]),   // area blocks
        (88, &[8, 0, 0, 0]),                  // incarnation
        (92, &[64, 0, 0, 0]),                 // ring blocks
        (96, &[40, 0, 0, 0, 0, 0, 0, 0]),     // first frame of the incarnation
        (104, &[9, 0, 0, 0, 0, 0, 0, 0]),     // tail: position
        (112, &[10, 0, 0, 0, 0, 0, 0, 0]),    // tail: frame number
        (120, &[11, 0, 0, 0, 0, 0, 0, 0]),    // tail: LSN
        (128, &[12, 0, 0, 0]),                // tail: lap
        (132, &[0xdd, 0xcc, 0xbb, 0xaa]),     // tail: checksum of the frame before
        (136, &[13, 0, 0, 0, 0, 0, 0, 0]),    // destaged
        (144, &[14, 0, 0, 0, 0, 0, 0, 0]),    // durable
        (152, &[15, 0, 0, 0, 0, 0, 0, 0]),    // created
        (256, &[0x55; 16]),                   // sink 0: id
        (272, &[16, 0, 0, 0, 0, 0, 0, 0]),    // sink 0: acked
        (280, &[17, 0, 0, 0, 0, 0, 0, 0]),    // sink 0: dirty LSN
        (288, &[0x66; 32]),                   // sink 0: chain
        (320, &[1, 0, 0, 0]),                 // sink 0: flags: dirty
        (328, &[19, 0, 0, 0, 0, 0, 0, 0]),    // sink 0: rebase after
        (896, &[18, 0, 0, 0, 0, 0, 0, 0]),    // sink 0: good until
        (1024, &[0x44; 16]),                  // disk 0: id
        (1040, &[0, 0x12, 0, 0, 0, 0, 0, 0]), // disk 0: size
        (1048, &[1, 0, 0, 0]),                // disk 0: flags: removed
    ];
    for (at, bytes) in parts {
        golden[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    reseal(&mut golden);
    assert_eq!(superblock().encode()[..], golden[..]);
    assert_eq!(Superblock::decode(&golden, 0), Ok(superblock()));
}

#[test]
fn the_newer_valid_copy_counts() {
    let old = superblock();
    let new = Superblock {
        generation: 7,
        clean: false,
        ..superblock()
    };
    let (a, b) = (old.encode(), new.encode());
    assert_eq!(choose([&a, &b]).unwrap().generation, 7);
    let torn = {
        let mut torn = b;
        torn[512..1024].fill(7);
        torn
    };
    assert_eq!(choose([&a, &torn]).unwrap().generation, 6);
    // Its first write was cut short.
    for cut in 0..BLOCK_SIZE {
        let mut torn = [0; BLOCK_SIZE];
        torn[..cut].copy_from_slice(&b[..cut]);
        assert_eq!(choose([&a, &torn]).unwrap().generation, 6, "cut at {cut}");
    }
    let mut newer = b;
    newer[8] = 2;
    assert_eq!(choose([&a, &newer]), Err(SuperblockError::Version(2)));
    assert_eq!(
        choose([&[0; BLOCK_SIZE], &[0; BLOCK_SIZE]]),
        Err(SuperblockError::Magic)
    );
    assert!(matches!(
        choose([&[0; BLOCK_SIZE], &torn]),
        Err(SuperblockError::Crc { .. })
    ));
}

#[test]
fn a_copy_in_the_wrong_place_is_refused() {
    assert_eq!(
        Superblock::decode(&superblock().encode(), 1),
        Err(SuperblockError::Misplaced {
            generation: 6,
            copy: 1
        })
    );
}

#[test]
fn each_refusal_has_its_name() {
    type Change = fn(&mut [u8]);
    let cases: [(Change, SuperblockError); 15] = [
        (|b| b[0] = 0, SuperblockError::Magic),
        (|b| b[8] = 9, SuperblockError::Version(9)),
        (|b| b[160] = 1, SuperblockError::Reserved(160)),
        (|b| b[904] = 1, SuperblockError::Reserved(904)),
        (|b| b[960] = 1, SuperblockError::Reserved(960)),
        (|b| b[4091] = 1, SuperblockError::Reserved(4091)),
        (|b| b[1056] = 1, SuperblockError::Reserved(1056)),
        (|b| b[336] = 1, SuperblockError::Reserved(336)),
        (|b| b[15] = 1, SuperblockError::Flags(0x101)),
        (|b| b[10] = 65, SuperblockError::Disks(65)),
        (|b| b[12] = 9, SuperblockError::Sinks(9)),
        (|b| b[1040] = 1, SuperblockError::Disk(0)),
        (|b| b[320] = 2, SuperblockError::Sink(0)),
        (|b| b[896] = 20, SuperblockError::Sink(0)),
        (
            |b| b[136] = 3,
            SuperblockError::Inconsistent(Inconsistency::TailBeforeDestaged),
        ),
    ];
    for (change, expected) in cases {
        let mut block = superblock().encode();
        change(&mut block);
        reseal(&mut block);
        assert_eq!(Superblock::decode(&block, 0), Err(expected));
    }
}

#[test]
fn contradictions_are_refused() {
    type Change = fn(&mut Superblock);
    let cases: [(Change, Inconsistency); 5] = [
        (|s| s.area_blocks = 7, Inconsistency::Area(7)),
        (|s| s.tail.position = 1001, Inconsistency::Tail),
        (|s| s.tail.frame = 0, Inconsistency::TailNumber),
        (|s| s.tail.lsn = Lsn(0), Inconsistency::TailNumber),
        (
            |s| s.durable = Lsn(12),
            Inconsistency::DestagedBeforeDurable,
        ),
    ];
    for (change, expected) in cases {
        let mut superblock = superblock();
        change(&mut superblock);
        assert_eq!(
            Superblock::decode(&superblock.encode(), 0),
            Err(SuperblockError::Inconsistent(expected))
        );
    }
}

#[test]
fn every_cut_excess_and_flipped_bit_is_refused() {
    let block = superblock().encode();
    for len in 0..BLOCK_SIZE {
        assert_eq!(
            Superblock::decode(&block[..len], 0),
            Err(SuperblockError::Length(len))
        );
    }
    let mut longer = block.to_vec();
    longer.push(0);
    assert!(Superblock::decode(&longer, 0).is_err());
    for byte in 0..BLOCK_SIZE {
        let mut broken = block;
        broken[byte] ^= 1 << (byte % 8);
        assert!(Superblock::decode(&broken, 0).is_err(), "byte {byte}");
    }
}

proptest! {
    #[test]
    fn any_superblock_reads_back(
        generation: u64,
        epoch: u64,
        incarnation: u32,
        tail_lsn in 1..u64::MAX / 2,
        past in 0..1000u64,
        sizes in prop::collection::vec(1..1u64 << 40, 1..=DISKS_MAX),
        dirty in prop::collection::vec(prop::option::of(any::<u64>()), 0..=SINKS_MAX),
        clean: bool,
    ) {
        let superblock = Superblock {
            generation,
            epoch: Epoch(epoch),
            incarnation,
            clean,
            tail: Tail { lsn: Lsn(tail_lsn), ..superblock().tail },
            destaged: Lsn(tail_lsn + past),
            durable: Lsn(tail_lsn + past * 2),
            disks: sizes.iter().map(|size| DiskState {
                id: DiskId::from_bytes([*size as u8; 16]),
                size: size * 512,
                removed: size % 3 == 0,
            }).collect(),
            sinks: dirty.iter().map(|dirty| SinkState {
                dirty: dirty.map(Lsn),
                ..superblock().sinks[0]
            }).collect(),
            ..superblock()
        };
        prop_assert_eq!(Superblock::decode(&superblock.encode(), generation % 2), Ok(superblock));
    }
}

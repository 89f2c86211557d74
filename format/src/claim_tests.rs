//! Claims: golden bytes, the choice between copies, every refusal, every cut.

use super::*;

fn claim(state: ClaimState) -> Claim {
    Claim {
        group: GroupId::from_bytes([0x11; 16]),
        disk: DiskId::from_bytes([0x22; 16]),
        disk_index: DiskIndex(3),
        log: LogId::from_bytes([0x33; 16]),
        next_log: Some(LogId::from_bytes([0x44; 16])),
        generation: 6,
        state,
        log_path: b"/var/lib/vm1.log".to_vec(),
    }
}

const PRINT: Fingerprint = Fingerprint {
    size: 0x2000,
    mtime_ns: 0x0102,
    hash: [0x55; 32],
    device: Some(DeviceWrites {
        boot: BootId::from_bytes([0x66; 16]),
        sequence: 0x0307,
        writes: 0x0408,
        sectors: 0x0509,
    }),
};

const FILE_PRINT: Fingerprint = Fingerprint {
    device: None,
    ..PRINT
};

fn reseal(block: &mut [u8]) {
    let crc = crc32c(&block[..CRC_OFFSET]);
    block[CRC_OFFSET..].copy_from_slice(&crc.to_le_bytes());
}

/// Version 1, byte for byte. A change here is a change of the format.
#[test]
fn golden_version_1() {
    let mut golden = vec![0; BLOCK_SIZE];
    let parts: &[(usize, &[u8])] = &[
        (0, b"AFICLAIM"),           // magic
        (8, &[1, 0]),               // version
        (10, &[3]),                 // state: detached
        (12, &[16, 0]),             // bytes of the path
        (14, &[3, 0]),              // disk index
        (16, &[0x11; 16]),          // group
        (32, &[0x22; 16]),          // disk
        (48, &[0x33; 16]),          // log
        (64, &[0x44; 16]),          // next log
        (80, &[6, 0, 0, 0]),        // generation
        (88, &[0, 0x20, 0, 0]),     // fingerprint: size
        (96, &[2, 1, 0, 0]),        // fingerprint: modification time
        (104, &[0x55; 32]),         // fingerprint: hash
        (136, &[0x66; 16]),         // device: boot
        (152, &[7, 3, 0, 0]),       // device: sequence number
        (160, &[8, 4, 0, 0]),       // device: writes
        (168, &[9, 5, 0, 0]),       // device: sectors written
        (256, b"/var/lib/vm1.log"), // path
    ];
    for (at, bytes) in parts {
        golden[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    reseal(&mut golden);
    let detached = claim(ClaimState::Detached(PRINT));
    assert_eq!(detached.encode()[..], golden[..]);
    assert_eq!(Claim::decode(&golden, 0), Ok(detached));
}

#[test]
fn every_state_reads_back() {
    for state in [
        ClaimState::Attached,
        ClaimState::Clean(PRINT),
        ClaimState::Clean(FILE_PRINT),
        ClaimState::Detached(PRINT),
        ClaimState::Abandoned,
    ] {
        let claim = claim(state);
        assert_eq!(Claim::decode(&claim.encode(), 0), Ok(claim));
    }
}

#[test]
fn a_cut_in_a_copys_first_write_leaves_the_other() {
    let first = claim(ClaimState::Attached);
    let second = Claim {
        generation: first.generation + 1,
        ..claim(ClaimState::Abandoned)
    };
    let (old, new) = (first.encode(), second.encode());
    let at = second.generation as usize % 2 * BLOCK_SIZE;
    for cut in 0..BLOCK_SIZE {
        let mut file = [old, old].concat();
        file[at..at + BLOCK_SIZE].fill(0);
        file[at..at + cut].copy_from_slice(&new[..cut]);
        assert_eq!(
            Claim::decode_file(&file).as_ref(),
            Ok(&first),
            "cut at {cut}"
        );
    }
}

#[test]
fn the_newer_valid_copy_counts() {
    let old = claim(ClaimState::Attached);
    let new = Claim {
        generation: 7,
        next_log: None,
        ..claim(ClaimState::Abandoned)
    };
    let mut file = [old.encode(), new.encode()].concat();
    assert_eq!(Claim::decode_file(&file).unwrap(), new);
    file[BLOCK_SIZE + 300] ^= 1;
    assert_eq!(Claim::decode_file(&file).unwrap(), old);
    file[9] = 1;
    assert_eq!(Claim::decode_file(&file), Err(ClaimError::Version(257)));
    file[..BLOCK_SIZE].fill(0);
    assert!(matches!(
        Claim::decode_file(&file),
        Err(ClaimError::Crc { .. })
    ));
    assert_eq!(Claim::decode_file(&[]), Err(ClaimError::Length(0)));
}

#[test]
fn each_refusal_has_its_name() {
    type Change = fn(&mut [u8]);
    let cases: [(Change, ClaimError); 10] = [
        (|b| b[0] = 0, ClaimError::Magic),
        (|b| b[8] = 2, ClaimError::Version(2)),
        (|b| b[10] = 9, ClaimError::State(9)),
        (|b| b[11] = 1, ClaimError::Reserved(11)),
        (|b| b[136..152].fill(0), ClaimError::Reserved(152)),
        (|b| b[176] = 1, ClaimError::Reserved(176)),
        (|b| b[272] = 1, ClaimError::Reserved(272)),
        (|b| b[13] = 0xff, ClaimError::Path(0xff10)),
        (|b| b[14] = 64, ClaimError::DiskIndex(64)),
        (
            |b| b[80] = 7,
            ClaimError::Misplaced {
                generation: 7,
                copy: 0,
            },
        ),
    ];
    for (change, expected) in cases {
        let mut block = claim(ClaimState::Clean(PRINT)).encode();
        change(&mut block);
        reseal(&mut block);
        assert_eq!(Claim::decode(&block, 0), Err(expected));
    }
}

#[test]
fn every_cut_excess_and_flipped_bit_is_refused() {
    let block = claim(ClaimState::Attached).encode();
    for len in 0..BLOCK_SIZE {
        assert_eq!(
            Claim::decode(&block[..len], 0),
            Err(ClaimError::Length(len))
        );
    }
    assert!(Claim::decode(&[&block[..], &[0]].concat(), 0).is_err());
    for byte in 0..BLOCK_SIZE {
        let mut broken = block;
        broken[byte] ^= 1 << (byte % 8);
        assert!(Claim::decode(&broken, 0).is_err(), "byte {byte}");
    }
}

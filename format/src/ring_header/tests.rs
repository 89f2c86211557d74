//! Ring headers: golden bytes, refusals, the words that change.

use super::*;
use proptest::prelude::*;

fn header() -> RingHeader {
    RingHeader {
        group: GroupId::from_bytes([0x11; 16]),
        log: LogId::from_bytes([0x22; 16]),
        boot: BootId::from_bytes([0x33; 16]),
        incarnation: 4,
        area_blocks: 32,
    }
}

fn reseal(bytes: &mut [u8]) {
    let crc = crc32c(&bytes[..CRC_OFFSET]);
    bytes[CRC_OFFSET..].copy_from_slice(&crc.to_le_bytes());
}

/// Version 1, byte for byte. A change here is a change of the format.
#[test]
fn golden_version_1() {
    let mut golden = [0; RING_HEADER_BYTES];
    let parts: &[(usize, &[u8])] = &[
        (0, b"AFIRINGH"),     // magic
        (8, &[1, 0]),         // version
        (10, &[128, 0]),      // header bytes
        (12, &[4, 0, 0, 0]),  // incarnation
        (16, &[0x11; 16]),    // group
        (32, &[0x22; 16]),    // log
        (48, &[0x33; 16]),    // boot
        (64, &[32, 0, 0, 0]), // area blocks
    ];
    for (at, bytes) in parts {
        golden[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    reseal(&mut golden);
    assert_eq!(header().encode(), golden);
    assert_eq!(RingHeader::decode(&golden), Ok(header()));
}

#[test]
fn each_refusal_has_its_name() {
    type Change = fn(&mut [u8]);
    let cases: [(Change, RingHeaderError); 6] = [
        (|b| b[7] = 0, RingHeaderError::Magic),
        (|b| b[8] = 2, RingHeaderError::Version(2)),
        (|b| b[10] = 64, RingHeaderError::HeaderLength(64)),
        (|b| b[123] = 1, RingHeaderError::Reserved(123)),
        (|b| b[64] = 7, RingHeaderError::Area(7)),
        (|b| b[68] = 1, RingHeaderError::Area((1 << 32) + 32)),
    ];
    for (change, expected) in cases {
        let mut bytes = header().encode();
        change(&mut bytes);
        reseal(&mut bytes);
        assert_eq!(RingHeader::decode(&bytes), Err(expected));
    }
}

#[test]
fn every_cut_excess_and_flipped_bit_is_refused() {
    let bytes = header().encode();
    for len in 0..RING_HEADER_BYTES {
        assert_eq!(
            RingHeader::decode(&bytes[..len]),
            Err(RingHeaderError::Length(len))
        );
    }
    assert!(RingHeader::decode(&[&bytes[..], &[0]].concat()).is_err());
    for byte in 0..RING_HEADER_BYTES {
        let mut broken = bytes;
        broken[byte] ^= 1 << (byte % 8);
        assert!(RingHeader::decode(&broken).is_err(), "byte {byte}");
    }
}

#[test]
fn golden_words() {
    let next = NextToPersist::new(0x0102_0304, 0x99_0506_0708);
    assert_eq!(next.word(), 0x0102_0304_0506_0708);
    let latch = LogLatch {
        errno: 5,
        operation: LatchedOperation::Sync,
    };
    assert_eq!(latch.word(), 0x8000_0002_0000_0005);
    assert_eq!(LogLatch::from_word(0), None);
    let odd = LogLatch::from_word(77).unwrap();
    assert_eq!(odd.operation, LatchedOperation::Unknown);
}

proptest! {
    #[test]
    fn words_read_back(position: u32, frame: u64, errno: u32, away in -1_000_000i64..1_000_000) {
        let next = NextToPersist::new(position, frame);
        prop_assert_eq!(NextToPersist::from_word(next.word()), next);
        prop_assert_eq!(next.frame_near(frame.wrapping_add_signed(away)), frame);
        for operation in [LatchedOperation::Write, LatchedOperation::Sync] {
            let latch = LogLatch { errno, operation };
            prop_assert_eq!(LogLatch::from_word(latch.word()), Some(latch));
        }
    }
}

//! Generated input for the decoders of ring and log: valid structures with random damage whose
//! checksums are put right again, so that the checks behind them are reached; and plain noise. A
//! decoder may refuse or accept, never panic, and what it accepts it must write back the same.

use afterimage_format::checksum::crc32c;
use afterimage_format::claim::Claim;
use afterimage_format::frame::decode::encode_descriptor;
use afterimage_format::frame::{Descriptor, RingDescriptor};
use afterimage_format::ids::BLOCK_SIZE;
use afterimage_format::ring_header::{RING_HEADER_BYTES, RingHeader};
use afterimage_format::superblock::Superblock;

/// Inputs per target. Some seconds in a debug build.
const INPUTS: u64 = 60_000;

/// SplitMix64.
struct Generator(u64);

impl Generator {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// A few bytes changed, in the places where fields are, to values that tend to matter.
    fn damage(&mut self, bytes: &mut [u8], fields_end: usize) {
        for _ in 0..1 + self.below(4) {
            let at = self.below(fields_end.min(bytes.len()));
            bytes[at] = match self.below(5) {
                0 => 0,
                1 => 0xff,
                2 => bytes[at].wrapping_add(1),
                3 => bytes[at] ^ 1 << self.below(8),
                _ => self.next() as u8,
            };
        }
    }
}

fn seal(bytes: &mut [u8], crc_at: usize) {
    let crc = crc32c(&bytes[..crc_at]);
    bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Magic, version and header length in place, everything else generated small or wild.
fn skeleton(generator: &mut Generator, len: usize, magic: &[u8; 8], fields_end: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes[..8].copy_from_slice(magic);
    bytes[8] = 1;
    for at in (10..fields_end).step_by(2) {
        if generator.below(3) == 0 {
            bytes[at] = generator.below(70) as u8;
        }
    }
    bytes
}

#[test]
fn frames() {
    let mut generator = Generator(1);
    let mut accepted = 0;
    for round in 0..INPUTS {
        let mut bytes = skeleton(&mut generator, BLOCK_SIZE, b"AFIFRAME", 128);
        bytes[10] = 128;
        bytes[11] = 0;
        if round % 2 == 0 {
            bytes[88..128].fill(0);
            bytes[104..120].fill(0);
            let entries = 1 + generator.below(4);
            bytes[88] = entries as u8;
            let payload = generator.below(5) as u8;
            bytes[92] = payload;
            bytes[96] = payload + 1;
            bytes[56] |= 1;
            for entry in 0..entries {
                let at = 128 + entry * 48;
                let first_lsn = u64::from_le_bytes(bytes[56..64].try_into().unwrap());
                let lsn = first_lsn.wrapping_add(entry as u64);
                bytes[at..at + 8].copy_from_slice(&lsn.to_le_bytes());
                bytes[at + 24] = generator.below(3) as u8;
                bytes[at + 28] = generator.below(4) as u8;
                bytes[at + 38] = 1 + generator.below(11) as u8;
            }
        }
        if generator.below(2) == 0 {
            generator.damage(&mut bytes, 128 + 48 * 4);
        }
        let seed = crc32c(&[&bytes[16..32], &bytes[48..56], &bytes[12..16]].concat());
        for at in (128..128 + 48 * 6).step_by(48) {
            let used = usize::from(bytes[88]) * 48 + 128 > at;
            if used {
                let covered = [&seed.to_le_bytes()[..], &bytes[at..at + 44]].concat();
                bytes[at + 44..at + 48].copy_from_slice(&crc32c(&covered).to_le_bytes());
            }
        }
        seal(&mut bytes, 124);
        if let Ok(descriptor) = Descriptor::decode(&bytes) {
            accepted += 1;
            let (again, crc) = encode_descriptor(&descriptor.header, &descriptor.entries);
            assert_eq!(again[..], bytes[..]);
            assert_eq!(crc, descriptor.header_crc);
            let payload = vec![0; descriptor.header.payload_blocks as usize * BLOCK_SIZE];
            let _ = descriptor.verify_payloads(&payload);
        }
        bytes[96..100].fill(0);
        if let Ok(RingDescriptor::Open(open)) = RingDescriptor::decode(&bytes) {
            bytes.resize(8 * BLOCK_SIZE, 0);
            let _ = open.entries(&bytes);
        }
        let cut = generator.below(bytes.len());
        assert!(Descriptor::decode_frame(&bytes[..cut]).is_err());
    }
    assert!(
        accepted > 100,
        "{accepted} accepted: the generator is too wild"
    );
}

#[test]
fn superblocks() {
    let mut generator = Generator(2);
    let mut accepted = 0;
    for _ in 0..INPUTS {
        let mut bytes = skeleton(&mut generator, BLOCK_SIZE, b"AFILOGSB", 160);
        if generator.below(2) == 0 {
            bytes[10..16].fill(0);
            let disks = 1 + generator.below(3);
            bytes[10] = disks as u8;
            bytes[12] = generator.below(3) as u8;
            for disk in 0..disks {
                bytes[1024 + disk * 32 + 17] = 2;
            }
            bytes[80..88].copy_from_slice(&1000u64.to_le_bytes());
            bytes[104..112].copy_from_slice(&9u64.to_le_bytes());
            bytes[112] |= 1;
            bytes[120..128].copy_from_slice(&1u64.to_le_bytes());
            bytes[136..144].copy_from_slice(&5u64.to_le_bytes());
            bytes[144..152].copy_from_slice(&6u64.to_le_bytes());
        }
        if generator.below(2) == 0 {
            generator.damage(&mut bytes, 1200);
        }
        seal(&mut bytes, BLOCK_SIZE - 4);
        for copy in 0..2 {
            if let Ok(superblock) = Superblock::decode(&bytes, copy) {
                accepted += 1;
                assert_eq!(superblock.encode()[..], bytes[..]);
            }
        }
    }
    assert!(
        accepted > 100,
        "{accepted} accepted: the generator is too wild"
    );
}

#[test]
fn ring_headers() {
    let mut generator = Generator(3);
    let mut accepted = 0;
    for _ in 0..INPUTS {
        let mut bytes = skeleton(&mut generator, RING_HEADER_BYTES, b"AFIRINGH", 70);
        bytes[10] = 128;
        bytes[11] = 0;
        if generator.below(2) == 0 {
            generator.damage(&mut bytes, 124);
        }
        seal(&mut bytes, 124);
        if let Ok(header) = RingHeader::decode(&bytes) {
            accepted += 1;
            assert_eq!(header.encode()[..], bytes[..]);
        }
    }
    assert!(
        accepted > 100,
        "{accepted} accepted: the generator is too wild"
    );
}

#[test]
fn claims() {
    let mut generator = Generator(4);
    let mut accepted = 0;
    for _ in 0..INPUTS {
        let mut bytes = skeleton(&mut generator, BLOCK_SIZE, b"AFICLAIM", 136);
        bytes[10] = generator.below(6) as u8;
        bytes[12..16].fill(0);
        if generator.below(2) == 0 {
            generator.damage(&mut bytes, 300);
        }
        seal(&mut bytes, BLOCK_SIZE - 4);
        for copy in 0..2 {
            if let Ok(claim) = Claim::decode(&bytes, copy) {
                accepted += 1;
                assert_eq!(claim.encode()[..], bytes[..]);
            }
        }
    }
    assert!(
        accepted > 100,
        "{accepted} accepted: the generator is too wild"
    );
}

//! A frame of version 1, byte for byte. A change here is a change of the format.

use super::*;
use crate::checksum::crc32c;
use crate::ids::{BLOCK_SIZE, BootId, DiskIndex, LogId, Lsn};
use crate::op::Op;

#[test]
fn golden_version_1() {
    let payload = vec![0xab; BLOCK_SIZE];
    let start = FrameStart {
        log: LogId::from_bytes([0x11; 16]),
        incarnation: 2,
        number: 3,
        first_lsn: Lsn(4),
        wall_ns: 5,
        boottime_ns: 6,
        boot: BootId::from_bytes([0x22; 16]),
        previous_crc: 0x0708_090a,
    };
    let header = FrameHeader {
        start,
        entry_count: 2,
        payload_blocks: 1,
        durable_lsn: Lsn(1),
        lap: 9,
    };
    let write = Entry {
        lsn: Lsn(4),
        op: Op::Write,
        disk: DiskIndex(1),
        first_block: 0x0102,
        block_count: 1,
        payload_position: 1,
        payload_crc: crc32c(&payload),
        wall_ns: 0x30,
        aux: 0,
    };
    let trim = Entry {
        lsn: Lsn(5),
        op: Op::Trim,
        disk: DiskIndex(0),
        first_block: 7,
        block_count: 0x0102_0304,
        payload_position: 0,
        payload_crc: 0,
        wall_ns: 0x31,
        aux: 0,
    };
    let mut golden = vec![0; BLOCK_SIZE];
    let parts: &[(usize, &[u8])] = &[
        (0, b"AFIFRAME"),                    // magic
        (8, &[1, 0]),                        // version
        (10, &[128, 0]),                     // header bytes
        (12, &[2, 0, 0, 0]),                 // incarnation
        (16, &[0x11; 16]),                   // log
        (32, &[0x22; 16]),                   // boot
        (48, &[3, 0, 0, 0, 0, 0, 0, 0]),     // frame number
        (56, &[4, 0, 0, 0, 0, 0, 0, 0]),     // first LSN
        (64, &[5, 0, 0, 0, 0, 0, 0, 0]),     // wall clock
        (72, &[6, 0, 0, 0, 0, 0, 0, 0]),     // boot time
        (80, &[1, 0, 0, 0, 0, 0, 0, 0]),     // durable LSN
        (88, &[2, 0]),                       // entries
        (92, &[1, 0, 0, 0]),                 // payload blocks
        (96, &[2, 0, 0, 0]),                 // frame blocks
        (100, &[9, 0, 0, 0]),                // lap
        (120, &[0x0a, 9, 8, 7]),             // checksum of the frame before
        (128, &[4, 0, 0, 0, 0, 0, 0, 0]),    // entry 0: LSN
        (136, &[2, 1, 0, 0, 0, 0, 0, 0]),    // entry 0: first block
        (144, &[0x30, 0, 0, 0, 0, 0, 0, 0]), // entry 0: wall clock
        (152, &[1, 0, 0, 0]),                // entry 0: blocks
        (156, &[1, 0, 0, 0]),                // entry 0: payload position
        (164, &[1, 0]),                      // entry 0: disk
        (166, &[1]),                         // entry 0: operation: write
        (176, &[5, 0, 0, 0, 0, 0, 0, 0]),    // entry 1: LSN
        (184, &[7, 0, 0, 0, 0, 0, 0, 0]),    // entry 1: first block
        (192, &[0x31, 0, 0, 0, 0, 0, 0, 0]), // entry 1: wall clock
        (200, &[4, 3, 2, 1]),                // entry 1: blocks
        (214, &[3]),                         // entry 1: operation: trim
    ];
    for (at, bytes) in parts {
        golden[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    // Checksums, each computed here the way the format says, from the bytes above.
    golden[160..164].copy_from_slice(&crc32c(&payload).to_le_bytes());
    let seed = crc32c(&[&golden[16..32], &golden[48..56], &golden[12..16]].concat());
    for entry in [128, 176] {
        let covered = [&seed.to_le_bytes()[..], &golden[entry..entry + 44]].concat();
        golden[entry + 44..entry + 48].copy_from_slice(&crc32c(&covered).to_le_bytes());
    }
    let crc = crc32c(&golden[..124]);
    golden[124..128].copy_from_slice(&crc.to_le_bytes());

    let (block, header_crc) = decode::encode_descriptor(&header, &[write, trim]);
    assert_eq!(block[..], golden[..]);
    assert_eq!(header_crc, crc);
    golden.extend_from_slice(&payload);
    let descriptor = Descriptor::decode_frame(&golden).unwrap();
    assert_eq!(descriptor.entries, [write, trim]);
    assert_eq!(descriptor.header, header);
}

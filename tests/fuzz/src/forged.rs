//! Segments that no builder writes: any numbers in every field, under checksums, hashes and a chain
//! that are right. Laid out as `docs/format.md` says, with one raw chunk.

use crate::bytes_of::Script;
use afterimage_format::chain::{RecordChain, RecordMeta};
use afterimage_format::checksum::crc32c;
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, GroupId, LogId, Lsn};
use afterimage_format::op::Op;
use afterimage_format::segment::{ClockAnchor, SegmentHeader};
use afterimage_format::wire::Cursor;

const HEADER: usize = 256;
const FOOTER: usize = 128;
const RECORDS_MAX: usize = 6;
/// Longest payload of a record here, in blocks.
const PAYLOAD_BLOCKS_MAX: u64 = 3;

/// What a segment that continues a log would say.
#[derive(Clone, Copy)]
pub(crate) struct Continues {
    pub(crate) group: GroupId,
    pub(crate) log: LogId,
    pub(crate) epoch: u64,
    pub(crate) cursor: Cursor,
    /// The pass that is under way, and its chain.
    pub(crate) pass: Option<(Lsn, RecordChain)>,
}

/// A number that is `usual`, near it, or at one of the ends.
pub(crate) fn number(script: &mut Script<'_>, usual: u64) -> u64 {
    match script.byte() {
        0..=199 => usual,
        200..=209 => usual.wrapping_add(1),
        210..=219 => usual.wrapping_sub(1),
        220..=225 => 0,
        226..=235 => u64::from(script.byte()),
        236..=240 => u64::MAX,
        241..=245 => u64::MAX - u64::from(script.byte()),
        246..=250 => 1 << script.below(64),
        _ => u64::from_le_bytes(std::array::from_fn(|_| script.byte())),
    }
}

fn seal(bytes: &mut [u8]) {
    let at = bytes.len() - 4;
    let crc = crc32c(&bytes[..at]).to_le_bytes();
    bytes[at..].copy_from_slice(&crc);
}

/// A body that a record of this kind may carry; `pass` is the begin of one.
fn body(op: Op, script: &mut Script<'_>, pass: Lsn, chain: RecordChain) -> Vec<u8> {
    use afterimage_format::checkpoint::{CheckpointBody, CheckpointKind, CheckpointTrigger};
    use afterimage_format::checkpoint_confirm::CheckpointConfirmBody;
    use afterimage_format::epoch::EpochBody;
    use afterimage_format::ids::Epoch;
    use afterimage_format::segment::{PassBeginBody, PassEndBody, SinkId};
    use afterimage_format::verify::{BlockHashes, Content, VerifyBody};
    let sink = SinkId([7; 16]);
    let mut bytes = match op {
        Op::Epoch => EpochBody {
            epoch: Epoch(number(script, 1)),
        }
        .encode(),
        Op::PassBegin => PassBeginBody {
            sink,
            rebases: true,
        }
        .encode(),
        Op::PassEnd => PassEndBody {
            sink,
            begin: Lsn(number(script, pass.0)),
            blocks: number(script, 1),
            chain,
        }
        .encode(),
        Op::Checkpoint => {
            let kind = match script.below(2) {
                0 => CheckpointKind::Crash,
                _ => CheckpointKind::Application,
            };
            let body = CheckpointBody {
                kind,
                trigger: CheckpointTrigger::Request,
                label: ["", "a", "nightly"][script.below(3)].to_owned(),
            };
            body.encode().expect("a usable label")
        }
        Op::CheckpointConfirm => CheckpointConfirmBody {
            checkpoint: Lsn(number(script, pass.0 + 1)),
            confirmed: script.below(2) == 0,
            window_ns: number(script, 9),
            own_ns: number(script, 1),
            frozen: "/".to_owned(),
            skipped: String::new(),
            reason: ["", "no agent"][script.below(2)].to_owned(),
        }
        .encode(),
        Op::Verify => VerifyBody {
            run: number(script, 1).max(1),
            number: number(script, 0) as u32,
            last: script.below(2) == 0,
            at: Lsn(number(script, pass.0 + 2)),
            content: match script.below(3) {
                0 => Content::Zero,
                blocks => Content::Data(BlockHashes::of(&vec![script.byte(); blocks * BLOCK_SIZE])),
            },
        }
        .encode(),
        _ => Vec::new(),
    };
    if script.byte() > 240 {
        let at = script.below(bytes.len().clamp(1, 256));
        if let Some(byte) = bytes.get_mut(at) {
            *byte = script.byte();
        }
    }
    bytes
}

/// A segment.
pub(crate) fn segment(script: &mut Script<'_>, continues: &Continues) -> Vec<u8> {
    let is_pass = script.below(4) == 3;
    let begins = script.below(3) == 0 || continues.cursor.lsn == Lsn::ZERO;
    let (active, pass_chain) = continues.pass.unwrap_or_default();
    let first = number(script, continues.cursor.lsn.0.wrapping_add(1));
    let count = 1 + script.below(RECORDS_MAX);
    let mut chain = match (is_pass, begins) {
        (true, _) => pass_chain,
        (false, true) => RecordChain::BASE,
        (false, false) => continues.cursor.chain,
    };
    let before = chain;
    let mut entries = Vec::new();
    let mut chunk: Vec<u8> = Vec::new();
    let (mut lowest, mut highest) = (u64::MAX, 0);
    for at in 0..count as u64 {
        let op = match script.below(9) {
            _ if is_pass => Op::Write,
            _ if at == 0 && begins => Op::PassBegin,
            0 | 1 => Op::Write,
            2 => Op::Zero,
            3 => Op::Trim,
            4 => Op::Checkpoint,
            5 => Op::CheckpointConfirm,
            6 => Op::PassEnd,
            7 => Op::Verify,
            _ => Op::from_number(script.byte()).unwrap_or(Op::Epoch),
        };
        let lsn = if is_pass {
            number(script, continues.cursor.lsn.0)
        } else {
            number(script, first.wrapping_add(at))
        };
        (lowest, highest) = (lowest.min(lsn), highest.max(lsn));
        let blocks = match op {
            Op::Write => number(script, 1 + at % 2).min(PAYLOAD_BLOCKS_MAX) as usize,
            _ => 0,
        };
        let mut payload = vec![script.byte(); blocks * BLOCK_SIZE];
        if op != Op::Write {
            payload = body(op, script, active, pass_chain);
            payload.resize(payload.len().div_ceil(BLOCK_SIZE) * BLOCK_SIZE, 0);
        }
        let (first_block, block_count) = if op.changes_blocks() || op == Op::Verify {
            let block = number(script, u64::from(at as u8 * 2));
            let usual = match op {
                Op::Write => blocks as u64,
                _ => 2,
            };
            (block, number(script, usual) as u32)
        } else {
            (0, 0)
        };
        let record = RecordMeta {
            lsn: Lsn(lsn),
            disk: DiskIndex(number(script, 0) as u16),
            op,
            flags: number(script, 0) as u8,
            first_block,
            block_count,
            wall_ns: if is_pass { 0 } else { number(script, 1 << 60) },
            aux: number(script, 0) as u32,
            payload_crc: if payload.is_empty() {
                0
            } else {
                crc32c(&payload)
            },
        };
        chain = chain.extend(&record);
        let place = chunk.len() / BLOCK_SIZE;
        let blocks = payload.len() / BLOCK_SIZE;
        entries.extend_from_slice(&entry(&record, if blocks == 0 { 0 } else { place }, blocks));
        chunk.extend_from_slice(&payload);
    }
    let log_pass = if begins { first } else { 0 };
    let header = SegmentHeader {
        kind: if is_pass {
            afterimage_format::segment::SegmentKind::Pass
        } else {
            afterimage_format::segment::SegmentKind::Log
        },
        flags: afterimage_format::segment::SegmentFlags {
            declares_gap: !is_pass && begins,
        },
        group: continues.group,
        epoch: afterimage_format::ids::Epoch(number(script, continues.epoch)),
        log: continues.log,
        first_lsn: Lsn(number(script, lowest)),
        last_lsn: Lsn(number(script, highest)),
        pass: Lsn(number(script, if is_pass { active.0 } else { log_pass })),
        chain_before: before,
        chain_after: chain,
        anchor: ClockAnchor {
            wall_ns: number(script, 1 << 60),
            boot_id: [script.byte() & 3; 16],
            boottime_ns: number(script, 1 << 40),
        },
        record_count: count as u32,
        chunk_count: u32::from(!chunk.is_empty()),
        payload_bytes: number(script, chunk.len() as u64),
    };
    assemble(&header, &entries, &chunk)
}

fn entry(record: &RecordMeta, place: usize, blocks: usize) -> [u8; 48] {
    let mut out = [0; 48];
    out[0..8].copy_from_slice(&record.lsn.0.to_le_bytes());
    out[8..16].copy_from_slice(&record.wall_ns.to_le_bytes());
    out[16..24].copy_from_slice(&record.first_block.to_le_bytes());
    out[24..28].copy_from_slice(&record.block_count.to_le_bytes());
    out[28..32].copy_from_slice(&record.payload_crc.to_le_bytes());
    out[32..36].copy_from_slice(&record.aux.to_le_bytes());
    out[40..42].copy_from_slice(&(place as u16).to_le_bytes());
    out[42..44].copy_from_slice(&(blocks as u16).to_le_bytes());
    out[44..46].copy_from_slice(&record.disk.0.to_le_bytes());
    out[46] = record.op.number();
    out[47] = record.flags;
    out
}

fn assemble(header: &SegmentHeader, entries: &[u8], chunk: &[u8]) -> Vec<u8> {
    let head = header.encode();
    let mut bytes = [&head[..], chunk].concat();
    let index_offset = bytes.len();
    bytes.extend_from_slice(entries);
    let table_offset = bytes.len();
    if !chunk.is_empty() {
        bytes.extend_from_slice(&(HEADER as u64).to_le_bytes());
        bytes.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&crc32c(chunk).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
    }
    bytes.extend_from_slice(&head);
    let mut footer = [0; FOOTER];
    footer[..8].copy_from_slice(b"AFTRSEGF");
    footer[8..10].copy_from_slice(&1u16.to_le_bytes());
    footer[10..12].copy_from_slice(&(FOOTER as u16).to_le_bytes());
    footer[16..24].copy_from_slice(&(index_offset as u64).to_le_bytes());
    footer[24..32].copy_from_slice(&(table_offset as u64).to_le_bytes());
    footer[32..40].copy_from_slice(&((bytes.len() + FOOTER) as u64).to_le_bytes());
    footer[40..44].copy_from_slice(&header.record_count.to_le_bytes());
    footer[44..48].copy_from_slice(&header.chunk_count.to_le_bytes());
    footer[48..80].copy_from_slice(blake3::hash(&bytes[index_offset..]).as_bytes());
    footer[80..112].copy_from_slice(blake3::hash(&bytes).as_bytes());
    seal(&mut footer);
    bytes.extend_from_slice(&footer);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_are_whole_and_some_are_not() {
        let continues = Continues {
            group: GroupId::from_bytes([1; 16]),
            log: LogId::from_bytes([2; 16]),
            epoch: 1,
            cursor: Cursor::default(),
            pass: None,
        };
        let verifies = |seed: u8| {
            let mut noise = vec![0; 400];
            blake3::Hasher::new()
                .update(&[seed])
                .finalize_xof()
                .fill(&mut noise);
            let usual: Vec<u8> = noise.iter().map(|byte| byte % 202).collect();
            let segment = segment(&mut Script::new(&usual), &continues);
            afterimage_format::segment::verify(&segment).is_ok()
        };
        let whole = (0..200).filter(|seed| verifies(*seed)).count();
        assert!((50..200).contains(&whole), "{whole} of 200");
    }
}

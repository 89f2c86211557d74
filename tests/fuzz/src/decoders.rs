//! Decoders: what is accepted is canonical, that is, it is encoded to the very bytes it came from.

use crate::memory::within;
use afterimage_format::checkpoint::CheckpointBody;
use afterimage_format::checkpoint_confirm::CheckpointConfirmBody;
use afterimage_format::checksum::crc32c;
use afterimage_format::claim::Claim;
use afterimage_format::epoch::EpochBody;
use afterimage_format::frame::decode::encode_descriptor;
use afterimage_format::frame::{Descriptor, RingDescriptor};
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::layer::{LayerHead, PageEntry, PagePlace, decode_page, encode_page};
use afterimage_format::manifest::{
    CheckResult, ComparisonResult, Manifest, NameBinding, RepositoryIdentity, Terminator,
};
use afterimage_format::nbd::option::{InfoQuery, MetaQuery, OptionHeader, text};
use afterimage_format::nbd::reply::decode_header;
use afterimage_format::nbd::request::RequestHeader;
use afterimage_format::ring_header::{RING_HEADER_BYTES, RingHeader};
use afterimage_format::segment::{Footer, PassBeginBody, PassEndBody, SegmentIndex, verify};
use afterimage_format::superblock::{Superblock, choose};
use afterimage_format::verify::VerifyBody;
use afterimage_format::wire::{FrameHeader, Message};

/// What the check of a decoder may hold at a time, whatever its input announces.
const MEMORY: usize = 64 << 10;
/// And that for each byte of input.
const MEMORY_FACTOR: usize = 16;
/// A segment's payloads are decoded chunk by chunk.
const SEGMENT_MEMORY: usize = 3 << 20;

/// As many bytes as `len`: cut, or filled up with zeroes.
fn sized(data: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = data[..data.len().min(len)].to_vec();
    bytes.resize(len, 0);
    bytes
}

/// Puts the checksum of everything before `at` there.
fn seal(bytes: &mut [u8], at: usize) {
    let crc = crc32c(&bytes[..at]).to_le_bytes();
    bytes[at..at + 4].copy_from_slice(&crc);
}

const HEADER_BYTES: usize = 128;
const ENTRY_BYTES: usize = 48;

/// Makes the checksums of a frame right, as far as its fields make sense.
fn seal_frame(frame: &mut [u8]) {
    seal(frame, HEADER_BYTES - 4);
    let Ok((header, _)) = Descriptor::decode_header(&frame[..BLOCK_SIZE]) else {
        return;
    };
    for index in 0..usize::from(header.entry_count) {
        let at = HEADER_BYTES + index * ENTRY_BYTES;
        let word = |frame: &[u8], from: usize| {
            let bytes = frame[at + from..at + from + 4].try_into();
            u32::from_le_bytes(bytes.expect("four bytes")) as usize
        };
        let (blocks, position) = (word(frame, 24), word(frame, 28));
        let start = position.saturating_mul(BLOCK_SIZE);
        let end = start.saturating_add(blocks.saturating_mul(BLOCK_SIZE));
        if position > 0 && blocks > 0 && end <= frame.len() {
            let crc = crc32c(&frame[start..end]).to_le_bytes();
            frame[at + 32..at + 36].copy_from_slice(&crc);
        }
        let seed = header.start.entry_seed().to_le_bytes();
        let sealed = [&seed[..], &frame[at..at + ENTRY_BYTES - 4]].concat();
        let crc = crc32c(&sealed).to_le_bytes();
        frame[at + ENTRY_BYTES - 4..at + ENTRY_BYTES].copy_from_slice(&crc);
    }
}

pub(crate) fn frame(data: &[u8]) {
    within(MEMORY + MEMORY_FACTOR * data.len(), || check_frame(data));
}

fn check_frame(data: &[u8]) {
    let blocks = data.len().div_ceil(BLOCK_SIZE).clamp(1, 4);
    let mut bytes = sized(data, blocks * BLOCK_SIZE);
    for _ in 0..2 {
        let block = &bytes[..BLOCK_SIZE];
        if let Ok(descriptor) = Descriptor::decode(block) {
            let (again, crc) = encode_descriptor(&descriptor.header, &descriptor.entries);
            assert!(again[..] == *block, "not canonical");
            assert_eq!(crc, descriptor.header_crc);
        }
        if let Ok(descriptor) = Descriptor::decode_frame(&bytes) {
            for entry in &descriptor.entries {
                assert!(Descriptor::payload_of(entry, &bytes[BLOCK_SIZE..]).len() <= bytes.len());
            }
        }
        if let Ok(RingDescriptor::Open(open)) = RingDescriptor::decode(block) {
            let _ = open.entries(&bytes);
        }
        seal_frame(&mut bytes);
    }
    // An open frame has no header checksum, but entries.
    bytes[HEADER_BYTES - 4..HEADER_BYTES].fill(0);
    if let Ok(RingDescriptor::Open(open)) = RingDescriptor::decode(&bytes[..BLOCK_SIZE]) {
        let _ = open.entries(&bytes);
    }
}

pub(crate) fn superblock(data: &[u8]) {
    within(MEMORY + MEMORY_FACTOR * data.len(), || {
        check_superblock(data)
    });
}

fn check_superblock(data: &[u8]) {
    let mut bytes = sized(data, BLOCK_SIZE);
    for _ in 0..2 {
        for copy in 0..2 {
            if let Ok(superblock) = Superblock::decode(&bytes, copy) {
                assert!(superblock.encode()[..] == bytes[..], "not canonical");
            }
        }
        let _ = choose([&bytes, &bytes]);
        seal(&mut bytes, BLOCK_SIZE - 4);
    }
}

pub(crate) fn ring_header(data: &[u8]) {
    within(MEMORY + MEMORY_FACTOR * data.len(), || {
        check_ring_header(data)
    });
}

fn check_ring_header(data: &[u8]) {
    let mut bytes = sized(data, RING_HEADER_BYTES);
    for _ in 0..2 {
        if let Ok(header) = RingHeader::decode(&bytes) {
            let again = header.encode();
            // The words that change by single stores are not part of the header's value.
            assert_eq!(RingHeader::decode(&again), Ok(header));
        }
        seal(&mut bytes, RING_HEADER_BYTES - 4);
    }
}

pub(crate) fn claim(data: &[u8]) {
    within(MEMORY + MEMORY_FACTOR * data.len(), || check_claim(data));
}

fn check_claim(data: &[u8]) {
    let mut bytes = sized(data, 2 * BLOCK_SIZE);
    for _ in 0..2 {
        for copy in 0..2 {
            if let Ok(claim) = Claim::decode(&bytes[..BLOCK_SIZE], copy) {
                assert!(claim.encode()[..] == bytes[..BLOCK_SIZE], "not canonical");
            }
        }
        let _ = Claim::decode_file(&bytes);
        seal(&mut bytes[..BLOCK_SIZE], BLOCK_SIZE - 4);
        seal(&mut bytes[BLOCK_SIZE..], BLOCK_SIZE - 4);
    }
}

/// Puts the checksums of a segment's chunks into their table.
fn seal_chunks(bytes: &mut [u8], footer: usize) {
    const ENTRY: usize = 24;
    const CHUNKS_MAX: usize = 8;
    let number = |bytes: &[u8], at: usize, len: usize| {
        let digits = bytes[at..at + len].iter().rev();
        digits.fold(0, |number: usize, byte| {
            number.wrapping_shl(8) | usize::from(*byte)
        })
    };
    let table = number(bytes, footer + 24, 8);
    for entry in 0..number(bytes, footer + 44, 4).min(CHUNKS_MAX) {
        let at = table.saturating_add(entry * ENTRY);
        if at.saturating_add(ENTRY) > footer {
            return;
        }
        let start = number(bytes, at, 8);
        let end = start.saturating_add(number(bytes, at + 8, 4));
        if let Some(stored) = bytes.get(start..end) {
            let crc = crc32c(stored).to_le_bytes();
            bytes[at + 16..at + 20].copy_from_slice(&crc);
        }
    }
}

/// Makes hashes and checksums of a segment right, as far as its footer makes sense.
fn seal_segment(bytes: &mut [u8]) {
    const HEADER: usize = 256;
    const FOOTER: usize = 128;
    if bytes.len() < 2 * HEADER + FOOTER {
        return;
    }
    seal(&mut bytes[..HEADER], HEADER - 4);
    let footer = bytes.len() - FOOTER;
    bytes.copy_within(..HEADER, footer - HEADER);
    let offset = bytes[footer + 16..footer + 24]
        .try_into()
        .expect("eight bytes");
    let index = usize::try_from(u64::from_le_bytes(offset)).map_or(footer, |at| at.min(footer));
    seal_chunks(bytes, footer);
    let index_hash = *blake3::hash(&bytes[index..footer]).as_bytes();
    bytes[footer + 48..footer + 80].copy_from_slice(&index_hash);
    let content_hash = *blake3::hash(&bytes[..footer]).as_bytes();
    bytes[footer + 80..footer + 112].copy_from_slice(&content_hash);
    seal(&mut bytes[footer..], FOOTER - 4);
}

pub(crate) fn segment(data: &[u8]) {
    within(SEGMENT_MEMORY + MEMORY_FACTOR * data.len(), || {
        check_segment(data)
    });
}

fn check_segment(data: &[u8]) {
    let mut bytes = data.to_vec();
    for _ in 0..2 {
        let _ = Footer::decode(&bytes);
        if let Ok(index) = SegmentIndex::of_segment(&bytes) {
            for (number, info) in index.chunks.iter().enumerate() {
                let range = info.range();
                let stored = bytes.get(range.start as usize..range.end as usize);
                let stored = stored.expect("the index lies behind the chunks");
                if let Ok(raw) = info.decode(number as u32, stored) {
                    assert_eq!(raw.len(), info.raw_len as usize);
                }
            }
        }
        let _ = SegmentIndex::decode(&bytes);
        if let Ok(index) = verify(&bytes) {
            // What is verified can be read as well.
            for entry in &index.entries {
                let payload = index.payload(entry, |number, info| {
                    let range = info.range();
                    info.decode(number, &bytes[range.start as usize..range.end as usize])
                });
                assert!(payload.is_ok(), "{payload:?}");
            }
        }
        seal_segment(&mut bytes);
    }
}

pub(crate) fn manifest(data: &[u8]) {
    within(MEMORY + MEMORY_FACTOR * data.len(), || check_manifest(data));
}

fn check_manifest(data: &[u8]) {
    let mut bytes = data.to_vec();
    for _ in 0..2 {
        if let Ok(object) = Manifest::decode(&bytes) {
            assert!(object.encode() == bytes, "not canonical");
        }
        if let Ok(object) = Terminator::decode(&bytes) {
            assert!(object.encode() == bytes, "not canonical");
        }
        if let Ok(object) = NameBinding::decode(&bytes) {
            assert!(object.encode() == bytes, "not canonical");
        }
        if let Ok(object) = CheckResult::decode(&bytes) {
            assert!(object.encode() == bytes, "not canonical");
        }
        if let Ok(object) = ComparisonResult::decode(&bytes) {
            assert!(object.encode() == bytes, "not canonical");
        }
        if let Ok(object) = RepositoryIdentity::decode(&bytes) {
            assert!(object.encode() == bytes, "not canonical");
        }
        if let Some(end) = bytes.len().checked_sub(4) {
            seal(&mut bytes, end);
        }
    }
}

pub(crate) fn layer(data: &[u8]) {
    within(MEMORY + MEMORY_FACTOR * data.len(), || check_layer(data));
}

fn check_layer(data: &[u8]) {
    let mut bytes = data.to_vec();
    for _ in 0..2 {
        if let Ok(head) = LayerHead::decode(&bytes) {
            assert!(head.encode() == bytes, "not canonical");
        }
        if let Some(end) = bytes.len().checked_sub(4) {
            seal(&mut bytes, end);
        }
    }
    check_page(data);
}

/// What a page holds that the head announces with the first bytes.
fn check_page(data: &[u8]) {
    let Some((about, stored)) = data.split_first_chunk::<32>() else {
        return;
    };
    let word = |at: usize| u64::from_le_bytes(about[at..at + 8].try_into().expect("eight bytes"));
    let page = PageEntry {
        disk: DiskIndex(u16::from(about[0])),
        level: about[1],
        has_data: about[2] & 1 == 1,
        extents: u16::from_le_bytes([about[3], about[4] & 1]),
        first_block: word(8),
        first_lsn: Lsn(word(16)),
        last_block: word(24),
        place: PagePlace {
            file: 0,
            offset: 0,
            stored_len: stored.len() as u32,
            crc: crc32c(stored),
        },
    };
    if let Ok(extents) = decode_page(&page, stored) {
        let mut file = Vec::new();
        let again = encode_page(&extents, 0, &mut file).expect("it was a page");
        assert_eq!(decode_page(&again, &file), Ok(extents));
        let place = page.place;
        assert_eq!(PageEntry { place, ..again }, page);
    }
}

pub(crate) fn wire(data: &[u8]) {
    within(MEMORY + MEMORY_FACTOR * data.len(), || check_wire(data));
}

fn check_wire(data: &[u8]) {
    let Some((head, body)) = data.split_first_chunk::<8>() else {
        return;
    };
    let _ = FrameHeader::decode(*head);
    let Ok(header) = FrameHeader::decode([head[0], 0, 0, 0, 0, 0, 0, 0]) else {
        return;
    };
    if let Ok(message) = Message::decode(header.kind, body.to_vec().into()) {
        let (header, again) = message.encode();
        assert!(again == body, "not canonical");
        assert_eq!(Message::decode(header.kind, again), Ok(message));
    }
}

pub(crate) fn nbd(data: &[u8]) {
    within(MEMORY + MEMORY_FACTOR * data.len(), || check_nbd(data));
}

fn check_nbd(data: &[u8]) {
    for extended in [false, true] {
        if let Ok(header) = RequestHeader::decode(data, extended) {
            let mut again = Vec::new();
            header.encode(extended, &mut again);
            assert!(data.starts_with(&again), "not canonical");
        }
    }
    if let Some((head, _)) = data.split_first_chunk()
        && let Ok(header) = OptionHeader::decode(head)
    {
        let mut again = Vec::new();
        header.encode(&mut again);
        assert!(data.starts_with(&again), "not canonical");
    }
    if let Ok(query) = InfoQuery::decode(data) {
        let mut again = Vec::new();
        query.encode(&mut again);
        assert!(again == data, "not canonical");
    }
    if let Ok(query) = MetaQuery::decode(data) {
        let mut again = Vec::new();
        query.encode(&mut again);
        assert!(again == data, "not canonical");
    }
    let _ = text(data);
    let _ = decode_header(data);
}

pub(crate) fn bodies(data: &[u8]) {
    within(MEMORY + MEMORY_FACTOR * data.len(), || check_bodies(data));
}

fn check_bodies(data: &[u8]) {
    let block = sized(data, BLOCK_SIZE);
    for body in [data, &block] {
        if let Ok(checkpoint) = CheckpointBody::decode(body) {
            let again = checkpoint.encode();
            assert!(again.is_ok_and(|again| again == body), "not canonical");
        }
        if let Ok(confirm) = CheckpointConfirmBody::decode(body) {
            assert!(confirm.encode() == body, "not canonical");
        }
        if let Ok(verify) = VerifyBody::decode(body) {
            assert!(verify.encode() == body, "not canonical");
        }
        if let Ok(epoch) = EpochBody::decode(body) {
            assert!(epoch.encode() == body, "not canonical");
        }
        if let Ok(begin) = PassBeginBody::decode(body) {
            assert!(begin.encode() == body, "not canonical");
        }
        if let Ok(end) = PassEndBody::decode(body) {
            assert!(end.encode() == body, "not canonical");
        }
    }
}

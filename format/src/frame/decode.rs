//! Reading frames: closed ones from ring or log, and the open one of the ring.

use super::header::{RawHeader, entry_offset};
use super::{ENTRIES_MAX, ENTRY_BYTES, Entry, FRAME_PAYLOAD_BLOCKS_MAX, FrameError, FrameHeader};
use crate::checksum::crc32c;
use crate::ids::BLOCK_SIZE;

/// A descriptor block that passed its checks. Says nothing yet of the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its header.
    pub header: FrameHeader,
    /// Checksum of the header: what the next frame's `previous_crc` must say.
    pub header_crc: u32,
    /// Its records, in LSN order.
    pub entries: Vec<Entry>,
}

impl Descriptor {
    /// Reads the header alone, checksum and fields checked. Cheap: for walking along a chain.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn decode_header(block: &[u8]) -> Result<(FrameHeader, u32), FrameError> {
        let raw = RawHeader::of(block)?;
        raw.check_kind()?;
        let (found, computed) = (raw.crc.get(), raw.computed_crc());
        if found != computed {
            return Err(FrameError::HeaderCrc { found, computed });
        }
        raw.check_fields(1)?;
        raw.check_frame_blocks()?;
        Ok((raw.value(), found))
    }

    /// Reads the descriptor block of a closed frame.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn decode(block: &[u8]) -> Result<Self, FrameError> {
        let (header, header_crc) = Self::decode_header(block)?;
        let entries = decode_entries(block, &header)?;
        check_unused(block, entries.len())?;
        check_overlap(&entries)?;
        Ok(Self {
            header,
            header_crc,
            entries,
        })
    }

    /// Reads a whole closed frame: descriptor and payloads, nothing before or behind.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn decode_frame(frame: &[u8]) -> Result<Self, FrameError> {
        let Some((block, payload)) = frame.split_at_checked(BLOCK_SIZE) else {
            return Err(FrameError::Length {
                have: frame.len(),
                want: BLOCK_SIZE,
            });
        };
        let descriptor = Self::decode(block)?;
        descriptor.verify_payloads(payload)?;
        Ok(descriptor)
    }

    /// Checks every payload of the frame; `payload` is all that lies behind the descriptor.
    ///
    /// # Errors
    /// The first payload that does not match, or a wrong length.
    pub fn verify_payloads(&self, payload: &[u8]) -> Result<(), FrameError> {
        let want = self.header.payload_blocks as usize * BLOCK_SIZE;
        if payload.len() != want {
            return Err(FrameError::Length {
                have: payload.len(),
                want,
            });
        }
        for (index, entry) in self.entries.iter().enumerate() {
            verify_payload(index, entry, payload)?;
        }
        Ok(())
    }

    /// The payload of one entry; `payload` is all that lies behind the descriptor.
    #[must_use]
    pub fn payload_of<'a>(entry: &Entry, payload: &'a [u8]) -> &'a [u8] {
        match entry.payload_blocks() {
            0 => &[],
            blocks => {
                let start = (entry.payload_position as usize - 1) * BLOCK_SIZE;
                &payload[start..start + blocks as usize * BLOCK_SIZE]
            }
        }
    }
}

/// What stands at a place of the ring where a frame may begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RingDescriptor {
    /// A closed frame.
    Closed(Descriptor),
    /// A frame that was open, or being opened or closed, when the process ended.
    Open(OpenFrame),
}

impl RingDescriptor {
    /// Reads a descriptor in the ring. Whether it belongs to the chain is for the caller to
    /// compare: log, incarnation, frame number, first LSN and previous checksum.
    ///
    /// # Errors
    /// There is no descriptor of this layout here, or a closed one that is damaged.
    pub fn decode(block: &[u8]) -> Result<Self, FrameError> {
        let raw = RawHeader::of(block)?;
        raw.check_kind()?;
        if raw.frame_blocks.get() != 0 && raw.crc.get() == raw.computed_crc() {
            return Descriptor::decode(block).map(Self::Closed);
        }
        raw.check_fields(0)?;
        // Opening clears the counts first, then the checksum, and closing stores that last.
        let (found, computed) = (raw.crc.get(), raw.computed_crc());
        let damaged = raw.entry_count.get() != 0 && found != 0;
        Ok(Self::Open(OpenFrame {
            header: raw.value(),
            damage: damaged.then_some(FrameError::HeaderCrc { found, computed }),
        }))
    }
}

/// The header of a frame without a valid checksum. Nothing in it may be trusted that is not equal
/// to what the chain leads one to expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFrame {
    /// As it stands: counts as last published; length, lap and durable LSN without meaning.
    pub header: FrameHeader,
    /// It has entries and a checksum, so it was closed once, and the checksum does not match.
    damage: Option<FrameError>,
}

impl OpenFrame {
    /// Reads the entries and checks them and their payloads one by one. `frame` begins with the
    /// descriptor and holds at least the payload blocks that the header counts.
    ///
    /// # Errors
    /// Entries are published after their payload, so whatever the count covers must be whole: a
    /// failing check is damage, not a torn write. So is a checksum that does not match.
    pub fn entries(&self, frame: &[u8]) -> Result<Vec<Entry>, FrameError> {
        if let Some(damage) = self.damage {
            return Err(damage);
        }
        let want = self.header.frame_blocks() as usize * BLOCK_SIZE;
        let (Some(block), Some(payload)) = (frame.get(..BLOCK_SIZE), frame.get(BLOCK_SIZE..want))
        else {
            return Err(FrameError::Length {
                have: frame.len(),
                want,
            });
        };
        let entries = decode_entries(block, &self.header)?;
        check_overlap(&entries)?;
        for (index, entry) in entries.iter().enumerate() {
            verify_payload(index, entry, payload)?;
        }
        Ok(entries)
    }
}

/// Writes the descriptor block of a closed frame: header, entries, zeroes. Returns the header's
/// checksum. The header's counts must be those of `entries`.
pub fn encode_descriptor(header: &FrameHeader, entries: &[Entry]) -> ([u8; BLOCK_SIZE], u32) {
    assert_eq!(
        header.entry_count as usize,
        entries.len(),
        "the header counts its entries"
    );
    let mut block = [0; BLOCK_SIZE];
    let (bytes, crc) = header.encode();
    block[..bytes.len()].copy_from_slice(&bytes);
    let seed = header.start.entry_seed();
    for (index, entry) in entries.iter().enumerate() {
        let at = entry_offset(index);
        block[at..at + ENTRY_BYTES].copy_from_slice(&entry.encode(seed));
    }
    (block, crc)
}

fn decode_entries(block: &[u8], header: &FrameHeader) -> Result<Vec<Entry>, FrameError> {
    let seed = header.start.entry_seed();
    let count = usize::from(header.entry_count);
    let (slots, _) = block[entry_offset(0)..].as_chunks::<ENTRY_BYTES>();
    slots
        .iter()
        .take(count)
        .enumerate()
        .map(|(index, bytes)| {
            Entry::decode(
                bytes,
                seed,
                index,
                header.start.first_lsn,
                header.payload_blocks,
            )
        })
        .collect()
}

/// Everything behind the last entry is zero.
fn check_unused(block: &[u8], count: usize) -> Result<(), FrameError> {
    let start = entry_offset(count);
    match block[start..].iter().position(|b| *b != 0) {
        Some(at) => Err(FrameError::Reserved(start + at)),
        None => Ok(()),
    }
}

fn verify_payload(index: usize, entry: &Entry, payload: &[u8]) -> Result<(), FrameError> {
    let data = Descriptor::payload_of(entry, payload);
    if data.is_empty() {
        return Ok(());
    }
    let computed = crc32c(data);
    if computed == entry.payload_crc {
        return Ok(());
    }
    Err(FrameError::PayloadCrc {
        entry: index,
        found: entry.payload_crc,
        computed,
    })
}

/// No block of the frame is the payload of two entries.
fn check_overlap(entries: &[Entry]) -> Result<(), FrameError> {
    const WORDS: usize = (FRAME_PAYLOAD_BLOCKS_MAX as usize + 1).div_ceil(64);
    let mut taken = [0u64; WORDS];
    debug_assert!(entries.len() <= ENTRIES_MAX);
    for (index, entry) in entries.iter().enumerate() {
        let first = entry.payload_position as usize;
        for block in first..first + entry.payload_blocks() as usize {
            let bit = 1 << (block % 64);
            if taken[block / 64] & bit != 0 {
                return Err(FrameError::PayloadOverlap { entry: index });
            }
            taken[block / 64] |= bit;
        }
    }
    Ok(())
}

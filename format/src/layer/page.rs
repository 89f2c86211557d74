//! Pages: up to [`PAGE_EXTENTS_MAX`] extents of one disk and level, sorted, compressed on their own.

use super::extent::{Extent, LEVEL_MAX};
use crate::checksum::crc32c;
use crate::frame::entry::BLOCKS_END;
use crate::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use crate::segment::SEGMENT_PAYLOAD_MAX;
use std::cell::RefCell;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most extents in a page.
pub const PAGE_EXTENTS_MAX: usize = 256;

/// Blocks of a segment's payload.
const PAYLOAD_BLOCKS_MAX: u64 = (SEGMENT_PAYLOAD_MAX / BLOCK_SIZE) as u64;

/// Position of an extent without data.
const NO_DATA: u32 = u32::MAX;

/// An extent in a page; disk and level stand in the page's entry.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawExtent {
    block: U64,
    lsn: U64,
    segment: U32,
    position: U32,
}

const _: () = assert!(size_of::<RawExtent>() == 24);

/// What a head knows of a page, but for where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageEntry {
    /// Disk of all its extents.
    pub disk: DiskIndex,
    /// Level of all its extents.
    pub level: u8,
    /// Whether any of them has data.
    pub has_data: bool,
    /// How many there are.
    pub extents: u16,
    /// Block of the first.
    pub first_block: u64,
    /// LSN of the first.
    pub first_lsn: Lsn,
    /// Block of the last.
    pub last_block: u64,
    /// Where its bytes are.
    pub place: PagePlace,
}

/// Where the stored bytes of a page are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PagePlace {
    /// The layer's file, from 0.
    pub file: u32,
    /// Offset in the file.
    pub offset: u32,
    /// Stored length. That of the raw extents: they are stored as they are; else one zstd frame.
    pub stored_len: u32,
    /// CRC32C of the stored bytes.
    pub crc: u32,
}

/// Why a page was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// The stored bytes are not those that the head names.
    #[error("checksum mismatch, the page is damaged")]
    Checksum,
    /// The bytes do not give the extents that the head names.
    #[error("the page does not hold what the layer's head says")]
    Content,
}

thread_local! {
    /// Making one costs more than a page.
    static DECOMPRESSOR: RefCell<zstd::bulk::Decompressor<'static>> =
        RefCell::new(zstd::bulk::Decompressor::new().expect("zstd finds memory for a context"));
    static COMPRESSOR: RefCell<zstd::bulk::Compressor<'static>> =
        RefCell::new(zstd::bulk::Compressor::new(1).expect("level 1 is a level of zstd"));
}

/// Appends a page of these extents to a file's bytes and describes it. They are of one disk and
/// level, sorted by [`Extent::key`], 1 to [`PAGE_EXTENTS_MAX`].
///
/// # Errors
/// [`PageError::Content`] if they are not that, or the file would pass 4 GiB.
pub fn encode_page(
    extents: &[Extent],
    file: u32,
    bytes: &mut Vec<u8>,
) -> Result<PageEntry, PageError> {
    let (Some(first), Some(last)) = (extents.first(), extents.last()) else {
        return Err(PageError::Content);
    };
    let entry = PageEntry {
        disk: first.disk,
        level: first.level,
        has_data: extents.iter().any(|extent| extent.has_data),
        extents: u16::try_from(extents.len()).map_err(|_| PageError::Content)?,
        first_block: first.block,
        first_lsn: first.lsn,
        last_block: last.block,
        place: PagePlace::default(),
    };
    entry.check(extents)?;
    let raw: Vec<RawExtent> = extents.iter().map(to_raw).collect();
    let raw = raw.as_bytes();
    let offset = u32::try_from(bytes.len()).map_err(|_| PageError::Content)?;
    // A compression that fails is treated like one that does not pay: stored raw.
    match COMPRESSOR.with_borrow_mut(|compressor| compressor.compress(raw)) {
        Ok(packed) if packed.len() < raw.len() => bytes.extend_from_slice(&packed),
        _ => bytes.extend_from_slice(raw),
    }
    let stored = &bytes[offset as usize..];
    let place = PagePlace {
        file,
        offset,
        stored_len: stored.len() as u32,
        crc: crc32c(stored),
    };
    Ok(PageEntry { place, ..entry })
}

/// The extents of a page from its stored bytes. Never holds more than [`PAGE_EXTENTS_MAX`] of them.
///
/// # Errors
/// The bytes are damaged, or hold something else than the entry says.
pub fn decode_page(entry: &PageEntry, stored: &[u8]) -> Result<Vec<Extent>, PageError> {
    let place = &entry.place;
    if stored.len() != place.stored_len as usize || crc32c(stored) != place.crc {
        return Err(PageError::Checksum);
    }
    let want = entry.raw_len();
    let extents = if stored.len() == want {
        extents_of(entry, stored)?
    } else {
        let mut raw = Vec::with_capacity(want);
        let len = DECOMPRESSOR
            .with_borrow_mut(|decompressor| decompressor.decompress_to_buffer(stored, &mut raw));
        match len {
            Ok(len) if len == want => extents_of(entry, &raw)?,
            _ => return Err(PageError::Content),
        }
    };
    entry.check(&extents)?;
    Ok(extents)
}

impl PageEntry {
    /// Bytes of the file that hold the page.
    #[must_use]
    pub fn range(&self) -> std::ops::Range<u64> {
        let start = u64::from(self.place.offset);
        start..start + u64::from(self.place.stored_len)
    }

    /// Order of pages within a run.
    #[must_use]
    pub const fn key(&self) -> (u16, u8, u64, u64) {
        (self.disk.0, self.level, self.first_block, self.first_lsn.0)
    }

    pub(super) fn raw_len(&self) -> usize {
        usize::from(self.extents) * size_of::<RawExtent>()
    }

    /// Whether the extents are those of this page, in order, each where it may be.
    fn check(&self, extents: &[Extent]) -> Result<(), PageError> {
        let fits = |extent: &Extent| {
            (extent.disk, extent.level) == (self.disk, self.level)
                && extent.block.trailing_zeros() >= u32::from(self.level)
                && extent.block <= BLOCKS_END - (1 << self.level)
                && if extent.has_data {
                    u64::from(extent.position) + (1 << self.level) <= PAYLOAD_BLOCKS_MAX
                } else {
                    extent.position == 0
                }
        };
        let ends = extents.first().zip(extents.last());
        if self.level > LEVEL_MAX {
            return Err(PageError::Content);
        }
        let agrees = extents.len() == usize::from(self.extents)
            && extents.len() <= PAGE_EXTENTS_MAX
            && extents.iter().all(fits)
            && extents.is_sorted_by(|one, other| one.key() <= other.key())
            && self.has_data == extents.iter().any(|extent| extent.has_data)
            && ends.is_some_and(|(first, last)| {
                (first.block, first.lsn, last.block)
                    == (self.first_block, self.first_lsn, self.last_block)
            });
        agrees.then_some(()).ok_or(PageError::Content)
    }
}

fn to_raw(extent: &Extent) -> RawExtent {
    let position = if extent.has_data {
        extent.position
    } else {
        NO_DATA
    };
    RawExtent {
        block: extent.block.into(),
        lsn: extent.lsn.0.into(),
        segment: extent.segment.into(),
        position: position.into(),
    }
}

fn extents_of(entry: &PageEntry, raw: &[u8]) -> Result<Vec<Extent>, PageError> {
    let raw = <[RawExtent]>::ref_from_bytes(raw).map_err(|_| PageError::Content)?;
    let of = |raw: &RawExtent| {
        let position = raw.position.get();
        let has_data = position != NO_DATA;
        Extent {
            block: raw.block.get(),
            lsn: Lsn(raw.lsn.get()),
            segment: raw.segment.get(),
            position: if has_data { position } else { 0 },
            disk: entry.disk,
            level: entry.level,
            has_data,
        }
    };
    Ok(raw.iter().map(of).collect())
}

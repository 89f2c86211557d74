//! The head of a layer: what its segments add to the history, and where its pages are.

use super::entry::{BaseEntry, CheckpointEntry, ClockEra, SegmentEntry};
use super::extent::LEVEL_MAX;
use super::page::{PAGE_EXTENTS_MAX, PageEntry, PagePlace};
use crate::chain::RecordChain;
use crate::checkpoint_confirm::CheckpointConfirmBody;
use crate::cursor::{CursorError, Put, Reader};
use crate::ids::{BLOCK_SIZE, DISKS_MAX, DiskIndex, Epoch, GroupId, LogId, Lsn};
use crate::manifest::ObjectError;
use crate::manifest::envelope::Kind;
use crate::segment::ClockAnchor;
use crate::wire::Cursor;

/// Most bytes of a head: pages of some 10^9 extents.
pub const LAYER_HEAD_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Most items of a list; the bytes there are bound it before.
const ITEMS_MAX: usize = LAYER_HEAD_BYTES_MAX / 2;

const KIND: Kind = Kind {
    name: "layer",
    magic: *b"AFTRLAYR",
    version: 1,
    bytes_max: LAYER_HEAD_BYTES_MAX,
};

/// The extents of one base within a layer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerRun {
    /// The base's `PassBegin`.
    pub base: Lsn,
    /// Lowest LSN of an extent.
    pub lsn_min: Lsn,
    /// Extents in all pages.
    pub extents: u64,
    /// Its pages, sorted.
    pub pages: Vec<PageEntry>,
}

/// The head of a layer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerHead {
    /// The group.
    pub group: GroupId,
    /// The epoch.
    pub epoch: Epoch,
    /// The epoch's log.
    pub log: LogId,
    /// Sequence number of its first segment.
    pub first_seq: u64,
    /// Last record in front of it.
    pub before: Cursor,
    /// Last record in it.
    pub after: Cursor,
    /// Clock anchor of the last log segment so far.
    pub anchor: Option<ClockAnchor>,
    /// Its segments, at least one, numbered from `first_seq` without a hole.
    pub segments: Vec<SegmentEntry>,
    /// Clock eras from the one on that was open before the layer.
    pub eras: Vec<ClockEra>,
    /// Bases from the one on that was the newest before the layer, ascending.
    pub bases: Vec<BaseEntry>,
    /// Checkpoints in it, ascending.
    pub checkpoints: Vec<CheckpointEntry>,
    /// Confirmations in it, of its own checkpoints or earlier ones, in the order in which they came.
    pub confirms: Vec<CheckpointConfirmBody>,
    /// Extents by base, ascending.
    pub runs: Vec<LayerRun>,
    /// Number of files with pages.
    pub files: u32,
}

impl LayerHead {
    /// Sequence number of the last segment.
    #[must_use]
    pub fn last_seq(&self) -> u64 {
        self.segments
            .last()
            .map_or(self.first_seq, |segment| segment.sequence)
    }

    /// What it says of its segments, without where the pages are: it follows from the segments alone.
    #[must_use]
    pub fn without_pages(&self) -> Self {
        Self {
            runs: Vec::new(),
            files: 0,
            group: self.group,
            epoch: self.epoch,
            log: self.log,
            first_seq: self.first_seq,
            before: self.before,
            after: self.after,
            anchor: self.anchor,
            segments: self.segments.clone(),
            eras: self.eras.clone(),
            bases: self.bases.clone(),
            checkpoints: self.checkpoints.clone(),
            confirms: self.confirms.clone(),
        }
    }

    /// Extents of all bases.
    #[must_use]
    pub fn extents(&self) -> u64 {
        self.runs.iter().map(|run| run.extents).sum()
    }

    /// The object's bytes. Labels and texts are within their bounds where they come in.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.put(&self.group.to_bytes());
        out.put_u64(self.epoch.0);
        out.put(&self.log.to_bytes());
        out.put_u64(self.first_seq);
        for cursor in [&self.before, &self.after] {
            out.put_u64(cursor.lsn.0);
            out.put(&cursor.chain.0);
        }
        put_anchor(&mut out, self.anchor.as_ref());
        out.put_u32(self.files);
        out.put_count(self.segments.len());
        self.segments.iter().for_each(|item| item.encode(&mut out));
        out.put_count(self.eras.len());
        self.eras.iter().for_each(|item| item.encode(&mut out));
        out.put_count(self.bases.len());
        self.bases.iter().for_each(|item| item.encode(&mut out));
        out.put_count(self.checkpoints.len());
        self.checkpoints
            .iter()
            .for_each(|item| item.encode(&mut out));
        out.put_count(self.confirms.len());
        for body in &self.confirms {
            let block = body.encode();
            let len = block
                .iter()
                .rposition(|byte| *byte != 0)
                .map_or(0, |at| at + 1);
            out.put_u16(len as u16);
            out.put(&block[..len]);
        }
        out.put_count(self.runs.len());
        self.runs.iter().for_each(|run| run.encode(&mut out));
        KIND.seal(&out)
    }

    /// Decodes the object.
    ///
    /// # Errors
    /// Anything that `encode` would not have written for a layer.
    pub fn decode(bytes: &[u8]) -> Result<Self, ObjectError> {
        let body = KIND.open(bytes)?;
        let head = Self::decode_body(body).map_err(|source| KIND.body_error(source))?;
        let checked = head.check();
        checked.map_err(|field| KIND.body_error(CursorError::Invalid(field)))?;
        Ok(head)
    }

    fn decode_body(body: &[u8]) -> Result<Self, CursorError> {
        let mut reader = Reader::new(body);
        let group = GroupId::from_bytes(reader.array("group UUID")?);
        let epoch = Epoch(reader.u64("epoch")?);
        let log = LogId::from_bytes(reader.array("log UUID")?);
        let first_seq = reader.u64("first sequence number")?;
        let before = cursor(&mut reader)?;
        let after = cursor(&mut reader)?;
        let anchor = anchor(&mut reader)?;
        let files = reader.u32("number of files")?;
        let count = reader.count(ITEMS_MAX, SegmentEntry::BYTES, "segment count")?;
        // So that no sequence number wraps.
        if first_seq.checked_add(count as u64).is_none() {
            return Err(CursorError::Invalid("first sequence number"));
        }
        let segments = (first_seq..)
            .take(count)
            .map(|sequence| SegmentEntry::decode(&mut reader, sequence))
            .collect::<Result<_, _>>()?;
        let count = reader.count(ITEMS_MAX, ClockEra::BYTES, "era count")?;
        let eras = (0..count)
            .map(|_| ClockEra::decode(&mut reader))
            .collect::<Result<_, _>>()?;
        let count = reader.count(ITEMS_MAX, BaseEntry::BYTES_MIN, "base count")?;
        let bases = (0..count)
            .map(|_| BaseEntry::decode(&mut reader))
            .collect::<Result<_, _>>()?;
        let count = reader.count(ITEMS_MAX, CheckpointEntry::BYTES_MIN, "checkpoint count")?;
        let checkpoints = (0..count)
            .map(|_| CheckpointEntry::decode(&mut reader))
            .collect::<Result<_, _>>()?;
        let count = reader.count(ITEMS_MAX, 2, "confirmation count")?;
        let confirms = (0..count)
            .map(|_| confirm(&mut reader))
            .collect::<Result<_, _>>()?;
        let count = reader.count(ITEMS_MAX, LayerRun::BYTES_MIN, "run count")?;
        let runs = (0..count)
            .map(|_| LayerRun::decode(&mut reader))
            .collect::<Result<_, _>>()?;
        reader.finish()?;
        Ok(Self {
            group,
            epoch,
            log,
            first_seq,
            before,
            after,
            anchor,
            segments,
            eras,
            bases,
            checkpoints,
            confirms,
            runs,
            files,
        })
    }

    /// What must hold between the fields; the name of the first that does not.
    fn check(&self) -> Result<(), &'static str> {
        let holds = |holds: bool, field| if holds { Ok(()) } else { Err(field) };
        holds(self.epoch != Epoch(0) && self.epoch <= Epoch::MAX, "epoch")?;
        holds(!self.segments.is_empty(), "segment count")?;
        holds(
            self.eras.is_sorted_by(|a, b| a.last_lsn < b.first_lsn),
            "order of eras",
        )?;
        holds(
            self.bases.is_sorted_by(|a, b| a.begin < b.begin),
            "order of bases",
        )?;
        holds(
            self.checkpoints.is_sorted_by(|a, b| a.lsn < b.lsn),
            "order of checkpoints",
        )?;
        let known = |base| self.bases.iter().any(|entry| entry.begin == base);
        holds(
            self.checkpoints.iter().all(|point| known(point.base)),
            "base of checkpoint",
        )?;
        holds(
            self.runs.iter().all(|run| known(run.base))
                && self.runs.is_sorted_by(|a, b| a.base < b.base),
            "base of run",
        )?;
        self.runs.iter().try_for_each(|run| run.check(self.files))
    }
}

impl LayerRun {
    const BYTES_MIN: usize = 8 + 8 + 8 + 4;

    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.base.0);
        out.put_u64(self.lsn_min.0);
        out.put_u64(self.extents);
        out.put_count(self.pages.len());
        for page in &self.pages {
            out.put_u16(page.disk.0);
            out.put_u8(page.level);
            out.put_u8(page.has_data.into());
            out.put_u16(page.extents);
            out.put_u16(0);
            out.put_u64(page.first_block);
            out.put_u64(page.first_lsn.0);
            out.put_u64(page.last_block);
            out.put_u32(page.place.file);
            out.put_u32(page.place.offset);
            out.put_u32(page.place.stored_len);
            out.put_u32(page.place.crc);
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, CursorError> {
        let base = Lsn(reader.u64("base of run")?);
        let lsn_min = Lsn(reader.u64("lowest LSN of run")?);
        let extents = reader.u64("extents of run")?;
        let count = reader.count(ITEMS_MAX, PAGE_BYTES, "page count")?;
        let pages = (0..count)
            .map(|_| page(reader))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            base,
            lsn_min,
            extents,
            pages,
        })
    }

    fn check(&self, files: u32) -> Result<(), &'static str> {
        let fits = |page: &PageEntry| {
            let place = &page.place;
            (1..=PAGE_EXTENTS_MAX).contains(&usize::from(page.extents))
                && usize::from(page.disk.0) < DISKS_MAX
                && page.level <= LEVEL_MAX
                && page.first_block <= page.last_block
                && place.file < files
                && (1..=page.raw_len()).contains(&(place.stored_len as usize))
                && place.offset.checked_add(place.stored_len).is_some()
        };
        let extents: u64 = self.pages.iter().map(|page| u64::from(page.extents)).sum();
        let sorted = self.pages.is_sorted_by(|one, other| {
            let behind = (one.disk.0, one.level, one.last_block);
            one.key() <= other.key() && behind <= (other.disk.0, other.level, other.first_block)
        });
        if !sorted {
            return Err("order of pages");
        }
        if !self.pages.iter().all(fits) || extents != self.extents || extents == 0 {
            return Err("page");
        }
        Ok(())
    }
}

const PAGE_BYTES: usize = 2 + 1 + 1 + 2 + 2 + 8 + 8 + 8 + 4 * 4;

fn page(reader: &mut Reader<'_>) -> Result<PageEntry, CursorError> {
    let disk = DiskIndex(reader.u16("disk of page")?);
    let level = reader.u8("level of page")?;
    let has_data = match reader.u8("flags of page")? {
        0 => false,
        1 => true,
        _ => return Err(CursorError::Invalid("flags of page")),
    };
    let extents = reader.u16("extents of page")?;
    reader.zeroes(2, "reserved bytes of page")?;
    Ok(PageEntry {
        disk,
        level,
        has_data,
        extents,
        first_block: reader.u64("first block of page")?,
        first_lsn: Lsn(reader.u64("first LSN of page")?),
        last_block: reader.u64("last block of page")?,
        place: PagePlace {
            file: reader.u32("file of page")?,
            offset: reader.u32("offset of page")?,
            stored_len: reader.u32("stored length of page")?,
            crc: reader.u32("checksum of page")?,
        },
    })
}

fn cursor(reader: &mut Reader<'_>) -> Result<Cursor, CursorError> {
    Ok(Cursor {
        lsn: Lsn(reader.u64("LSN of cursor")?),
        chain: RecordChain(reader.array("chain of cursor")?),
    })
}

fn put_anchor(out: &mut Vec<u8>, anchor: Option<&ClockAnchor>) {
    out.put_u8(anchor.is_some().into());
    let none = ClockAnchor {
        wall_ns: 0,
        boot_id: [0; 16],
        boottime_ns: 0,
    };
    let anchor = anchor.unwrap_or(&none);
    out.put_u64(anchor.wall_ns);
    out.put(&anchor.boot_id);
    out.put_u64(anchor.boottime_ns);
}

fn anchor(reader: &mut Reader<'_>) -> Result<Option<ClockAnchor>, CursorError> {
    match reader.u8("clock anchor")? {
        0 => reader.zeroes(32, "clock anchor").map(|()| None),
        1 => Ok(Some(ClockAnchor {
            wall_ns: reader.u64("clock anchor")?,
            boot_id: reader.array("boot ID")?,
            boottime_ns: reader.u64("clock anchor")?,
        })),
        _ => Err(CursorError::Invalid("clock anchor")),
    }
}

/// A body without the zeroes at its end.
fn confirm(reader: &mut Reader<'_>) -> Result<CheckpointConfirmBody, CursorError> {
    let invalid = CursorError::Invalid("confirmation");
    let len = usize::from(reader.u16("confirmation")?);
    let bytes = reader.bytes(len, "confirmation")?;
    if len > BLOCK_SIZE || bytes.last() == Some(&0) {
        return Err(invalid);
    }
    let mut block = bytes.to_vec();
    block.resize(BLOCK_SIZE, 0);
    CheckpointConfirmBody::decode(&block).map_err(|_| invalid)
}

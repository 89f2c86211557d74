//! A simulated file: what readers see, what a power cut keeps, and the sectors in between.
//!
//! Always holds: `durable` is what is left of the file if no unsynced sector makes it; every
//! sector in which `visible` may be newer through a later sync is in `dirty` with all its versions
//! since.

use super::SimStats;
use super::rng::SimRng;
use std::collections::BTreeMap;
use std::ops::Range;

pub(super) const SECTOR: u64 = 512;
const PAGE: u64 = 4096;

/// What a write brings.
#[derive(Debug, Clone)]
pub(super) enum Extents {
    Data(Vec<u8>),
    /// Zeroes of this length; `punch` frees whole pages.
    Zero {
        len: u64,
        punch: bool,
    },
}

impl Extents {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Zero { len, .. } => *len,
        }
    }
}

/// Bytes in pages; what has no page is zero.
#[derive(Default, Clone)]
struct Sparse {
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
}

impl Sparse {
    fn read(&self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        let end = offset + into.len() as u64;
        for (page, bytes) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let start = (page * PAGE).max(offset);
            let stop = ((page + 1) * PAGE).min(end);
            let from = &bytes[(start - page * PAGE) as usize..(stop - page * PAGE) as usize];
            into[(start - offset) as usize..(stop - offset) as usize].copy_from_slice(from);
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let position = offset + at as u64;
            let within = (position % PAGE) as usize;
            let step = (PAGE as usize - within).min(bytes.len() - at);
            let page = self.pages.entry(position / PAGE);
            let page = page.or_insert_with(|| Box::new([0; PAGE as usize]));
            page[within..within + step].copy_from_slice(&bytes[at..at + step]);
            at += step;
        }
    }

    fn sector(&self, sector: u64) -> [u8; SECTOR as usize] {
        let mut bytes = [0; SECTOR as usize];
        self.read(sector * SECTOR, &mut bytes);
        bytes
    }
}

#[derive(Clone)]
struct Version {
    bytes: [u8; SECTOR as usize],
    /// Which write brought it.
    write: u64,
}

#[derive(Clone)]
pub(super) struct SimFile {
    len: u64,
    visible: Sparse,
    durable: Sparse,
    dirty: BTreeMap<u64, Vec<Version>>,
    writes: u64,
    /// Completion of each write since the last sync, by its number: at which tick.
    completed: BTreeMap<u64, u64>,
    ticks: u64,
}

impl SimFile {
    pub(super) fn new(len: u64) -> Self {
        Self {
            len,
            visible: Sparse::default(),
            durable: Sparse::default(),
            dirty: BTreeMap::new(),
            writes: 0,
            completed: BTreeMap::new(),
            ticks: 0,
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn set_len(&mut self, len: u64) {
        for bytes in [&mut self.visible, &mut self.durable] {
            bytes.pages.split_off(&len.div_ceil(PAGE));
            if !len.is_multiple_of(PAGE) && bytes.pages.contains_key(&(len / PAGE)) {
                let tail = vec![0; (PAGE - len % PAGE) as usize];
                bytes.write(len, &tail);
            }
        }
        self.dirty.split_off(&len.div_ceil(SECTOR));
        self.len = len;
    }

    /// Bytes read before the end of the file.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> usize {
        self.visible.read(offset, into);
        self.len.saturating_sub(offset).min(into.len() as u64) as usize
    }

    pub(super) fn read_durable(&self, offset: u64, into: &mut [u8]) {
        self.durable.read(offset, into);
    }

    pub(super) fn write_durable(&mut self, offset: u64, bytes: &[u8]) {
        self.len = self.len.max(offset + bytes.len() as u64);
        self.visible.write(offset, bytes);
        self.durable.write(offset, bytes);
        let sectors = offset / SECTOR..(offset + bytes.len() as u64).div_ceil(SECTOR);
        for sector in sectors {
            self.dirty.remove(&sector);
        }
    }

    /// Sectors that an operation changes. Zeroing looks only at sectors that may be other.
    fn sectors(&self, offset: u64, extents: &Extents) -> Vec<u64> {
        let all = offset / SECTOR..(offset + extents.len()).div_ceil(SECTOR);
        match extents {
            Extents::Data(_) => all.collect(),
            Extents::Zero { .. } => {
                let pages = all.start / 8..all.end.div_ceil(8);
                let mut touched: Vec<u64> = self
                    .visible
                    .pages
                    .range(pages.clone())
                    .chain(self.durable.pages.range(pages))
                    .flat_map(|(page, _)| page * 8..page * 8 + 8)
                    // A hole that is not durable yet hides what a sync would bring back.
                    .chain(self.dirty.range(all.clone()).map(|(sector, _)| *sector))
                    .filter(|sector| all.contains(sector))
                    .collect();
                touched.sort_unstable();
                touched.dedup();
                touched
            }
        }
    }

    /// The whole operation takes effect. Returns its number, for [`SimFile::completed`].
    pub(super) fn apply(&mut self, offset: u64, extents: &Extents) -> u64 {
        let sectors = self.sectors(offset, extents);
        self.apply_sectors(offset, extents, &sectors);
        if let Extents::Zero { len, punch: true } = extents {
            let pages = offset.div_ceil(PAGE)..(offset + len) / PAGE;
            for page in pages.start..pages.end.min(self.len.div_ceil(PAGE)).max(pages.start) {
                self.visible.pages.remove(&page);
                if pages.end - pages.start > 1 << 20 {
                    break;
                }
            }
            if pages.end.saturating_sub(pages.start) > 1 << 20 {
                self.visible.pages.retain(|page, _| !pages.contains(page));
            }
        }
        self.writes
    }

    /// Some sectors of the operation take effect, each on its own.
    pub(super) fn apply_some(&mut self, offset: u64, extents: &Extents, rng: &mut SimRng) {
        let mut sectors = self.sectors(offset, extents);
        sectors.retain(|_| rng.chance(5000));
        self.apply_sectors(offset, extents, &sectors);
    }

    fn apply_sectors(&mut self, offset: u64, extents: &Extents, sectors: &[u64]) {
        self.writes += 1;
        let end = offset + extents.len();
        self.len = self.len.max(match extents {
            Extents::Data(_) => end,
            Extents::Zero { .. } => 0,
        });
        for sector in sectors {
            let start = (sector * SECTOR).max(offset);
            let stop = ((sector + 1) * SECTOR).min(end);
            match extents {
                Extents::Data(bytes) => {
                    let part = &bytes[(start - offset) as usize..(stop - offset) as usize];
                    self.visible.write(start, part);
                }
                Extents::Zero { .. } => {
                    let zeroes = [0; SECTOR as usize];
                    self.visible
                        .write(start, &zeroes[..(stop - start) as usize]);
                }
            }
            let bytes = self.visible.sector(*sector);
            let write = self.writes;
            let versions = self.dirty.entry(*sector).or_default();
            versions.push(Version { bytes, write });
        }
    }

    /// The completion of a write was handed out.
    pub(super) fn completed(&mut self, write: u64) {
        self.ticks += 1;
        self.completed.insert(write, self.ticks);
    }

    /// The tick to give to [`SimFile::sync`] later: completions up to now are covered.
    pub(super) fn sync_point(&self) -> u64 {
        self.ticks
    }

    /// Durable from now on: writes that were completed at the point.
    pub(super) fn sync(&mut self, point: u64) {
        let completed = &self.completed;
        let durable = &mut self.durable;
        self.dirty.retain(|sector, versions| {
            let covered = versions.iter().rposition(|version| {
                completed
                    .get(&version.write)
                    .is_some_and(|tick| *tick <= point)
            });
            if let Some(last) = covered {
                durable.write(sector * SECTOR, &versions[last].bytes);
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
    }

    /// Durable from now on: this write alone.
    pub(super) fn sync_write(&mut self, write: u64) {
        let durable = &mut self.durable;
        self.dirty.retain(|sector, versions| {
            if let Some(at) = versions.iter().rposition(|version| version.write == write) {
                durable.write(sector * SECTOR, &versions[at].bytes);
                versions.drain(..=at);
            }
            !versions.is_empty()
        });
    }

    /// A sync failed: half of what was dirty no sync will ever write. Readers go on to see it, as from
    /// a page cache, or (half of the times) see what was there before, as from a device that lost it.
    pub(super) fn fail_sync(&mut self, rng: &mut SimRng) {
        if rng.chance(5000) {
            self.dirty.retain(|_, _| rng.chance(5000));
        } else {
            self.lose_dirty(rng);
        }
    }

    /// Half of what is dirty is gone, for readers as well; what was allocated for it alone is a hole
    /// again.
    pub(super) fn lose_dirty(&mut self, rng: &mut SimRng) {
        let (durable, visible) = (&self.durable, &mut self.visible);
        let mut lost = Vec::new();
        self.dirty.retain(|sector, _| {
            let kept = rng.chance(5000);
            if !kept {
                visible.write(sector * SECTOR, &durable.sector(*sector));
                lost.push(sector * SECTOR / PAGE);
            }
            kept
        });
        lost.dedup();
        for page in lost {
            let sectors = page * PAGE / SECTOR..(page + 1) * PAGE / SECTOR;
            let nothing_left = self.dirty.range(sectors).next().is_none();
            if nothing_left && !self.durable.pages.contains_key(&page) {
                self.visible.pages.remove(&page);
            }
        }
    }

    pub(super) fn power_cut(&mut self, rng: &mut SimRng, stats: &mut SimStats) {
        for (sector, versions) in std::mem::take(&mut self.dirty) {
            let old = self.durable.sector(sector);
            let at = rng.below(versions.len() as u64) as usize;
            let new = versions[at].bytes;
            match rng.below(8) {
                0..=2 => stats.sectors_lost += 1,
                3..=5 => {
                    stats.sectors_kept += 1;
                    self.durable.write(sector * SECTOR, &new);
                }
                _ => {
                    stats.sectors_torn += 1;
                    let cut = 1 + rng.below(SECTOR - 1) as usize;
                    let mut torn = old;
                    torn[..cut].copy_from_slice(&new[..cut]);
                    self.durable.write(sector * SECTOR, &torn);
                }
            }
        }
        self.completed.clear();
        self.visible = self.durable.clone();
    }

    /// Dirty sectors and how many versions each has.
    pub(super) fn unsynced(&self) -> impl Iterator<Item = (u64, usize)> {
        self.dirty
            .iter()
            .map(|(sector, versions)| (*sector, versions.len()))
    }

    /// A power cut whose outcome is chosen for each dirty sector: 0 is lost, n the n-th version.
    pub(super) fn power_cut_choosing(&mut self, choose: &mut dyn FnMut() -> usize) {
        for (sector, versions) in std::mem::take(&mut self.dirty) {
            if let Some(version) = choose().checked_sub(1).and_then(|at| versions.get(at)) {
                self.durable.write(sector * SECTOR, &version.bytes);
            }
        }
        self.completed.clear();
        self.visible = self.durable.clone();
    }

    /// A beginning of the operation takes effect: whole sectors, fewer than all.
    pub(super) fn apply_short(&mut self, offset: u64, extents: &Extents, rng: &mut SimRng) {
        let mut sectors = self.sectors(offset, extents);
        sectors.truncate(rng.below(sectors.len() as u64) as usize);
        self.apply_sectors(offset, extents, &sectors);
    }

    pub(super) fn flip(&mut self, offset: u64, bit: u8) {
        assert!(offset < self.len, "byte {offset} is past the end");
        let mut byte = [0];
        self.visible.read(offset, &mut byte);
        byte[0] ^= 1 << bit;
        self.visible.write(offset, &byte);
        self.durable.write(offset, &byte);
    }

    pub(super) fn allocated(&self, offset: u64, len: u64, runs_max: usize) -> Vec<Range<u64>> {
        let end = offset.saturating_add(len).min(self.len);
        let mut runs: Vec<Range<u64>> = Vec::new();
        for page in self.visible.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let run = (page.0 * PAGE).max(offset)..((page.0 + 1) * PAGE).min(end);
            if let Some(last) = runs.last_mut()
                && last.end == run.start
            {
                last.end = run.end;
                continue;
            }
            if runs.len() == runs_max {
                break;
            }
            runs.push(run);
        }
        runs
    }
}

//! Between an epoch and its layers: what a range of segments added, to be stored, and stored layers
//! taken in instead of the segments that they cover.
//!
//! What always holds: an epoch that took layers in and then the segments behind them is the same as
//! one that took in all segments.

use std::collections::BTreeMap;
use std::sync::Arc;

use afterimage_format::checkpoint_confirm::CheckpointConfirmBody;
use afterimage_format::ids::{GroupId, Lsn};
use afterimage_format::layer::{
    BaseEntry, CheckpointEntry, LayerHead, LayerRun, PassState, SegmentEntry,
};
use afterimage_format::wire::Cursor;

use super::base::{Base, Checkpoint, State};
use super::epoch::Epoch;
use super::error::Warning;
use crate::index::{LayerRange, Run, StoredRun};

/// Layers of about the same size that are joined into one.
const JOIN_WIDTH: usize = 8;

/// Bytes that the head of a joined layer may have: layers of more stay as they are.
const JOINED_HEAD_BYTES_MAX: u64 = 64 << 20;

/// Where the last seal was.
#[derive(Debug, Clone, Default)]
pub(super) struct Mark {
    /// Segments in front of it.
    segments: usize,
    /// The clock era that was open there.
    era: usize,
    /// The base that was the newest there.
    base: usize,
    /// Last record in front of it.
    before: Cursor,
    /// Confirmations since.
    pub(super) confirms: Vec<CheckpointConfirmBody>,
}

/// What a range of segments added to an epoch, on its way into a layer.
#[derive(Debug)]
pub struct Sealed {
    /// The layer's head, without runs and files.
    pub head: LayerHead,
    /// The extents, by the base's `PassBegin`.
    pub runs: Vec<(Lsn, Arc<Run>)>,
}

/// A layer that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// The segments that it covers.
    pub range: LayerRange,
    /// Extents in it.
    pub extents: u64,
}

impl Layer {
    /// What it takes in a head: its segments and pages, about.
    const fn head_bytes(&self) -> u64 {
        (self.range.last - self.range.first + 1) * 98 + self.extents / 256 * 48
    }
}

/// What is to be done next about an epoch's layers.
#[derive(Debug, Clone)]
pub enum LayerWork {
    /// Store this.
    Store(Arc<Sealed>),
    /// Join these into one.
    Join(Vec<LayerRange>),
}

/// Why a stored layer is not taken in. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the layer does not continue what is in front of it")]
pub struct LayerMisfit;

impl Sealed {
    /// The segments that it covers.
    #[must_use]
    pub fn range(&self) -> LayerRange {
        range_of(&self.head)
    }
}

/// The segments that a layer covers.
#[must_use]
pub fn range_of(head: &LayerHead) -> LayerRange {
    LayerRange {
        first: head.first_seq,
        last: head.last_seq(),
    }
}

impl Epoch {
    /// Extents that are in no layer, and not on their way into one.
    #[must_use]
    pub fn growing_extents(&self) -> usize {
        self.bases.iter().map(|base| base.index.growing()).sum()
    }

    /// Seals what came since the last seal: it is ready to be stored as a layer. None if no segment
    /// came.
    pub fn seal(&mut self, group: GroupId) -> Option<Arc<Sealed>> {
        let segments = self.segments[self.mark.segments..].to_vec();
        let (first, last) = (segments.first()?.sequence, segments.last()?.sequence);
        let mut runs = Vec::new();
        for base in &mut self.bases[self.mark.base..] {
            runs.extend(base.index.seal(last).map(|run| (base.begin, run)));
        }
        let bases = &self.bases[self.mark.base..];
        let new = |point: &&Checkpoint| point.lsn > self.mark.before.lsn;
        let checkpoints = bases.iter().flat_map(|base| {
            let points = base.checkpoints.iter().filter(new);
            points.map(|point| point_entry(base.begin, point))
        });
        let head = LayerHead {
            group,
            epoch: self.number,
            log: self.log,
            first_seq: first,
            before: self.mark.before,
            after: self.cursor,
            anchor: self.clock.last_anchor(),
            eras: self.clock.eras[self.mark.era..].to_vec(),
            bases: bases.iter().map(base_entry).collect(),
            checkpoints: checkpoints.collect(),
            confirms: std::mem::take(&mut self.mark.confirms),
            segments,
            runs: Vec::new(),
            files: 0,
        };
        self.set_mark();
        let sealed = Arc::new(Sealed { head, runs });
        self.sealed.push(sealed.clone());
        Some(sealed)
    }

    /// Whether nothing of it is in memory or on its way into a layer.
    #[must_use]
    pub const fn is_fresh(&self) -> bool {
        self.segments.len() == self.mark.segments && self.sealed.is_empty()
    }

    fn set_mark(&mut self) {
        self.mark = Mark {
            segments: self.segments.len(),
            era: self.clock.eras.len().saturating_sub(1),
            base: self.bases.len().saturating_sub(1),
            before: self.cursor,
            confirms: Vec::new(),
        };
    }

    /// Whether anything is to be done about the layers. Asked with every segment.
    #[must_use]
    pub fn has_layer_work(&self) -> bool {
        if self.sealed.is_empty() {
            return self.to_join().is_some();
        }
        self.sealed.len() > self.widened
    }

    /// What is to be done next about the layers.
    #[must_use]
    pub fn layer_work(&self) -> Option<LayerWork> {
        if !self.sealed.is_empty() {
            let parts = self.sealed.get(..=self.widened)?;
            return Some(LayerWork::Store(match parts {
                [part] => part.clone(),
                parts => Arc::new(joined(parts)?),
            }));
        }
        let ranges = self.to_join()?.iter().map(|layer| layer.range);
        Some(LayerWork::Join(ranges.collect()))
    }

    /// The newest layers, where they are to be joined.
    fn to_join(&self) -> Option<&[Layer]> {
        let from = self.layers.len().checked_sub(JOIN_WIDTH)?;
        let newest = &self.layers[from..];
        // The oldest of them must be no larger than all the others would become together.
        let others: u64 = newest[1..].iter().map(|layer| layer.extents).sum();
        let bytes: u64 = newest.iter().map(Layer::head_bytes).sum();
        (newest[0].extents <= others && bytes <= JOINED_HEAD_BYTES_MAX).then_some(newest)
    }

    /// Takes a stored layer in, in place of the segments that it covers.
    ///
    /// # Errors
    /// It does not continue what is here.
    pub fn take_layer(&mut self, head: LayerHead) -> Result<(), LayerMisfit> {
        let continues = self.is_fresh()
            && (head.epoch, head.log) == (self.number, self.log)
            && head.first_seq == self.next_sequence()
            && head.before == self.cursor
            && head.after.lsn >= head.before.lsn;
        let newest = self.bases.last().map(|base| base.begin);
        let first = head.bases.first().map(|base| base.begin);
        // The newest base is always the first of the layer, so that nothing of it is missed.
        if !continues || (newest.is_some() && newest != first) {
            return Err(LayerMisfit);
        }
        let open = self.clock.eras.last().map(|era| era.first_lsn);
        if open.is_some() && open != head.eras.first().map(|era| era.first_lsn) {
            return Err(LayerMisfit);
        }
        self.add_segments(&head.segments);
        self.cursor = head.after;
        self.clock
            .eras
            .truncate(self.clock.eras.len().saturating_sub(1));
        self.clock.eras.extend_from_slice(&head.eras);
        self.clock.set_anchor(head.anchor);
        for entry in &head.bases {
            match self.bases.last_mut() {
                Some(base) if base.begin == entry.begin => set_base(base, entry),
                _ => self.bases.push(new_base(entry)),
            }
        }
        for point in &head.checkpoints {
            let base = self
                .bases
                .iter_mut()
                .rev()
                .find(|base| base.begin == point.base);
            if let Some(base) = base {
                base.checkpoints.push(checkpoint(point));
            }
        }
        for body in &head.confirms {
            self.confirm(body);
        }
        self.store_layer(head);
        self.set_mark();
        Ok(())
    }

    /// A layer is stored: what is in memory of it goes.
    pub fn store_layer(&mut self, head: LayerHead) {
        let (range, extents) = (range_of(&head), head.extents());
        self.widened = 0;
        self.sealed.retain(|sealed| !range.covers(sealed.range()));
        let mut runs: Vec<LayerRun> = head.runs;
        for base in &mut self.bases {
            let at = runs.iter().position(|run| run.base == base.begin);
            let run = at.map(|at| StoredRun::new(range, runs.swap_remove(at)));
            base.index.store(range, run);
        }
        self.layers.retain(|layer| !range.covers(layer.range));
        self.layers.push(Layer { range, extents });
    }

    /// What is sealed first cannot be stored under its name: it goes together with what comes next.
    pub(crate) fn widen_sealed(&mut self) {
        if !self.sealed.is_empty() {
            self.widened += 1;
        }
    }

    /// Lets go of what was sealed and is not to be stored.
    pub(crate) fn drop_sealed(&mut self) {
        let sealed = std::mem::take(&mut self.sealed);
        for base in &mut self.bases {
            for part in &sealed {
                base.index.store(part.range(), None);
            }
        }
    }

    /// Layers that are stored, oldest first.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    fn add_segments(&mut self, segments: &[SegmentEntry]) {
        self.segments.extend_from_slice(segments);
        if let Some(last) = segments.last() {
            self.set_next_sequence(last.sequence + 1);
        }
    }
}

/// Parts that follow each other as one.
fn joined(parts: &[Arc<Sealed>]) -> Option<Sealed> {
    let head = joined_head(parts.iter().map(|part| &part.head)).ok()?;
    let mut by_base: BTreeMap<Lsn, Vec<Arc<Run>>> = BTreeMap::new();
    for (base, run) in parts.iter().flat_map(|part| &part.runs) {
        by_base.entry(*base).or_default().push(run.clone());
    }
    let runs = by_base.into_iter();
    Some(Sealed {
        head,
        runs: runs
            .map(|(base, runs)| (base, Arc::new(Run::merged(&runs))))
            .collect(),
    })
}

/// The head of the layer that covers what these cover, without runs and files.
///
/// # Errors
/// They do not continue each other, or there is none.
pub fn joined_head<'a>(
    heads: impl IntoIterator<Item = &'a LayerHead>,
) -> Result<LayerHead, LayerMisfit> {
    let mut heads = heads.into_iter();
    let mut joined = heads.next().ok_or(LayerMisfit)?.without_pages();
    for next in heads {
        let continues = (next.group, next.epoch, next.log)
            == (joined.group, joined.epoch, joined.log)
            && joined.last_seq() + 1 == next.first_seq
            && joined.after == next.before;
        if !continues {
            return Err(LayerMisfit);
        }
        joined.after = next.after;
        joined.anchor = next.anchor;
        joined.segments.extend_from_slice(&next.segments);
        // The one that was open goes on in the next layer.
        if let (Some(open), Some(first)) = (joined.eras.last(), next.eras.first())
            && open.first_lsn == first.first_lsn
        {
            joined.eras.pop();
        }
        joined.eras.extend_from_slice(&next.eras);
        if let (Some(newest), Some(first)) = (joined.bases.last(), next.bases.first())
            && newest.begin == first.begin
        {
            joined.bases.pop();
        }
        joined.bases.extend_from_slice(&next.bases);
        joined.checkpoints.extend_from_slice(&next.checkpoints);
        joined.confirms.extend_from_slice(&next.confirms);
    }
    Ok(joined)
}

fn base_entry(base: &Base) -> BaseEntry {
    let pass = match &base.state {
        State::Active(progress) => PassState::Active(*progress),
        State::Complete(at) => PassState::Complete(*at),
        State::Dropped(Warning::PassMismatch { came, promised, .. }) => PassState::Dropped {
            came: *came,
            promised: *promised,
        },
        State::Abandoned => PassState::Abandoned,
    };
    BaseEntry {
        begin: base.begin,
        begin_wall_ns: base.begin_wall_ns,
        after_gap: base.after_gap,
        last: base.last,
        readable_wall_ns: base.readable_wall_ns,
        last_wall_ns: base.last_wall_ns,
        changed_bytes: base.changed_bytes,
        pass,
    }
}

fn new_base(entry: &BaseEntry) -> Base {
    let mut base = Base::new(entry.begin, entry.begin_wall_ns, entry.after_gap);
    set_base(&mut base, entry);
    base
}

fn set_base(base: &mut Base, entry: &BaseEntry) {
    base.last = entry.last;
    base.readable_wall_ns = entry.readable_wall_ns;
    base.last_wall_ns = entry.last_wall_ns;
    base.changed_bytes = entry.changed_bytes;
    base.state = match entry.pass {
        PassState::Active(progress) => State::Active(progress),
        PassState::Complete(at) => State::Complete(at),
        PassState::Dropped { came, promised } => State::Dropped(Warning::PassMismatch {
            pass: entry.begin,
            came,
            promised,
        }),
        PassState::Abandoned => State::Abandoned,
    };
}

fn point_entry(base: Lsn, point: &Checkpoint) -> CheckpointEntry {
    CheckpointEntry {
        lsn: point.lsn,
        base,
        wall_ns: point.wall_ns,
        kind: point.kind,
        trigger: point.trigger,
        changed_bytes: point.changed_bytes,
        label: point.label.clone(),
    }
}

fn checkpoint(entry: &CheckpointEntry) -> Checkpoint {
    Checkpoint {
        lsn: entry.lsn,
        wall_ns: entry.wall_ns,
        kind: entry.kind,
        confirm: None,
        trigger: entry.trigger,
        label: entry.label.clone(),
        changed_bytes: entry.changed_bytes,
    }
}

#[cfg(test)]
mod tests {
    use afterimage_format::ids::{Epoch as EpochNumber, LogId};
    use afterimage_format::manifest::EpochEntry;

    use super::*;

    /// An epoch with eight layers of so many segments and extents each.
    fn with_layers(segments: u64, extents: u64) -> Epoch {
        let entry = EpochEntry {
            epoch: EpochNumber(1),
            log: LogId::from_bytes([1; 16]),
            first_seq: 1,
            first_lsn: Lsn::ZERO,
            begun_ns: 0,
        };
        let mut epoch = Epoch::new(&entry, &[]);
        epoch.layers = (0..JOIN_WIDTH as u64)
            .map(|at| Layer {
                range: LayerRange {
                    first: 1 + at * segments,
                    last: (at + 1) * segments,
                },
                extents,
            })
            .collect();
        epoch
    }

    #[test]
    fn layers_are_joined_while_their_head_has_room() {
        let joins = |segments, extents| with_layers(segments, extents).has_layer_work();
        assert!(joins(10, 65_536));
        assert!(joins(80_000, 1 << 20));
        assert!(!joins(100_000, 65_536), "too many segments");
        assert!(!joins(10, 1 << 26), "too many pages");
        let mut epoch = with_layers(10, 65_536);
        epoch.layers.pop();
        assert!(!epoch.has_layer_work(), "too few");
        let mut epoch = with_layers(10, 65_536);
        epoch.layers[0].extents *= 8;
        assert!(!epoch.has_layer_work(), "one that is as large as all");
    }
}

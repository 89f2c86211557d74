//! Checking layers against the segments that they repeat.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use afterimage_format::ids::{Epoch as EpochNumber, GroupId, Lsn};
use afterimage_format::layer::{Extent, LayerHead};

use super::{Check, Problem, VerifyProgress};
use crate::group::GroupError;
use crate::history::{Epoch, Sealed, joined_head, range_of};
use crate::index::LayerRange;
use crate::layers::{LayerError, PageReader, SEAL_EXTENTS, ranges, read_head};
use crate::repository::{Repository, keys};

/// The layers of an epoch, and what its segments say in their place.
pub(super) struct Layers {
    stored: Vec<LayerRange>,
    /// Segments behind which a layer ends.
    ends: BTreeSet<u64>,
    parts: Vec<Part>,
}

/// What the segments between two ends say.
struct Part {
    head: LayerHead,
    extents: Digests,
}

/// Number of extents and sum of their hashes, by base: the same whatever their order.
type Digests = BTreeMap<Lsn, (u64, u64)>;

impl Layers {
    /// Those that there are. To be called before the segments are listed, which come first.
    pub(super) async fn list(
        repository: &Repository,
        group: GroupId,
        epoch: EpochNumber,
    ) -> Result<Self, GroupError> {
        let stored = ranges(repository, group, epoch).await?;
        Ok(Self {
            ends: stored.iter().map(|range| range.last).collect(),
            stored,
            parts: Vec::new(),
        })
    }

    /// The history has taken this segment. Keeps what it says, and lets its index go.
    pub(super) fn after(&mut self, epoch: &mut Epoch, sequence: u64, group: GroupId) {
        if !self.ends.contains(&sequence) && epoch.growing_extents() < SEAL_EXTENTS {
            return;
        }
        self.parts
            .extend(epoch.seal(group).map(|part| Part::of(&part)));
        epoch.drop_sealed();
    }

    /// What the segments say of this range, if all of them could be taken.
    fn expected(&self, range: LayerRange) -> Option<(LayerHead, Digests)> {
        let covered = |part: &&Part| range.covers(range_of(&part.head));
        let parts: Vec<&Part> = self.parts.iter().filter(covered).collect();
        let head = joined_head(parts.iter().map(|part| &part.head)).ok()?;
        let mut extents = Digests::new();
        for (base, (count, sum)) in parts.iter().flat_map(|part| &part.extents) {
            let of = extents.entry(*base).or_default();
            *of = (of.0 + count, of.1.wrapping_add(*sum));
        }
        (range_of(&head) == range).then_some((head, extents))
    }
}

impl Part {
    fn of(sealed: &Arc<Sealed>) -> Self {
        let runs = sealed.runs.iter();
        Self {
            head: sealed.head.clone(),
            extents: runs
                .map(|(base, run)| (*base, digest(run.extents(), (0, 0))))
                .collect(),
        }
    }
}

fn digest(extents: &[Extent], so_far: (u64, u64)) -> (u64, u64) {
    extents.iter().fold(so_far, |(count, sum), extent| {
        let place = u64::from(extent.segment) << 32 | u64::from(extent.position);
        let kind = u64::from(extent.disk.0) << 16
            | u64::from(extent.level) << 8
            | u64::from(extent.has_data);
        let words = [extent.block, extent.lsn.0, place, kind];
        (
            count + 1,
            sum.wrapping_add(words.into_iter().fold(1, mixed)),
        )
    })
}

/// One step of SplitMix64 (Steele, Lea and Flood, 2014), over a state and one more word.
const fn mixed(state: u64, word: u64) -> u64 {
    let mut z = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl<P: FnMut(VerifyProgress)> Check<'_, P> {
    /// Every layer of an epoch: whole, and what its segments say.
    pub(super) async fn layers(
        &mut self,
        id: GroupId,
        epoch: EpochNumber,
        layers: &Layers,
        is_whole: bool,
    ) -> Result<(), GroupError> {
        for range in &layers.stored {
            let key = keys::layer(id, epoch, *range);
            match self.layer(id, epoch, *range, layers, is_whole).await {
                Ok(None) => {}
                Ok(Some(what)) => self.problems.push(Problem::layer(&key, None, what)),
                Err(LayerError::Repository(error)) if !error.is_not_found() => {
                    return Err(error.into());
                }
                Err(error) => self.problems.push(Problem::of_layer(&key, &error)),
            }
        }
        Ok(())
    }

    /// What is wrong with a layer that can be read.
    async fn layer(
        &mut self,
        id: GroupId,
        epoch: EpochNumber,
        range: LayerRange,
        layers: &Layers,
        is_whole: bool,
    ) -> Result<Option<&'static str>, LayerError> {
        let Some(head) = read_head(self.repository, id, epoch, range).await? else {
            return Ok(None);
        };
        let head = Arc::new(head);
        self.count(0);
        let mut found = Digests::new();
        for (number, run) in head.runs.iter().enumerate() {
            let repository = self.repository.clone();
            let mut pages = PageReader::new(repository, id, epoch, head.clone(), number);
            let mut of = (0, 0);
            let (mut lsn_min, mut last) = (Lsn::MAX, None);
            while let Some(extents) = pages.next().await? {
                of = digest(&extents, of);
                for extent in &extents {
                    lsn_min = lsn_min.min(extent.lsn);
                    let before = last.replace(extent.key());
                    if before.is_some_and(|before| before > extent.key()) {
                        return Ok(Some("has extents that are not in order"));
                    }
                }
            }
            if lsn_min != run.lsn_min {
                return Ok(Some("does not say what its pages say"));
            }
            let stored = run.pages.iter().map(|page| page.place.stored_len as usize);
            self.count(stored.sum());
            found.insert(run.base, of);
        }
        let same = |(expected, extents): (LayerHead, Digests)| {
            head.without_pages() == expected && extents == found
        };
        let agrees = match layers.expected(range) {
            Some(expected) => same(expected),
            // Behind a damaged segment nobody knows.
            None => !is_whole,
        };
        Ok((!agrees).then_some("does not say what its segments say"))
    }
}

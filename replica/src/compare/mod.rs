//! Comparing what the primary says its disks held with what the repository gives back for that very
//! moment: verify records are looked at in the order of the log, each against the image at its LSN.
//!
//! What always holds: every record is looked at once, and again after a restart within a run; a
//! difference is real, since both sides speak of the same LSN. What cannot be compared is counted and
//! said, never taken for equal. Nothing waits for it: segments are stored and acknowledged first.
//! Memory: one range, and a small [`ChunkCache`]. A repository that does not answer is asked again.

pub mod kept;
mod range;

#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use afterimage_format::chain::RecordMeta;
use afterimage_format::ids::{BLOCK_SIZE, Epoch, Lsn};
use afterimage_format::op::Op;
use afterimage_format::verify::VerifyBody;
use afterimage_format::wire::Compared;

use crate::group::{ComparisonPlace, Group, GroupError, read_index_checked, read_payload};
use crate::history::SegmentEntry;
use crate::image::ChunkCache;
use crate::receive::NowNs;
use crate::repository::{RepositoryError, keys};
use range::Outcome;

/// Chunks that are kept for the next range.
const CACHE_BYTES: usize = 4 << 20;
/// Pause after the repository failed.
const PAUSE: Duration = Duration::from_secs(1);

/// Compares what has come and what will come. Ends never; may be dropped at any time.
pub async fn follow(group: Arc<Group>, now: NowNs) -> Infallible {
    let mut comparer = Comparer {
        cache: Arc::new(ChunkCache::new(CACHE_BYTES)),
        buffer: Vec::new(),
        group,
        now,
    };
    loop {
        match comparer.next().await {
            Ok(true) => {}
            Ok(false) => comparer.group.comparison().told().await,
            Err(error) => {
                let group = comparer.group.id();
                tracing::debug!(%group, %error, "comparing waits for the repository");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

struct Comparer {
    group: Arc<Group>,
    cache: Arc<ChunkCache>,
    buffer: Vec<u8>,
    now: NowNs,
}

impl Comparer {
    /// Looks at the next segment that has verify records; whether there was one.
    async fn next(&mut self) -> Result<bool, RepositoryError> {
        let place = self.place().await?;
        let found = {
            let history = self.group.history();
            let epochs = history.epochs.iter();
            let mut later = epochs
                .filter(|epoch| epoch.number >= place.epoch)
                .flat_map(|epoch| {
                    let here = epoch.number == place.epoch;
                    let from = if here { place.sequence } else { 0 };
                    let from = epoch.segments.partition_point(|s| s.sequence < from);
                    let segments = epoch.segments[from..].iter();
                    segments.map(|segment| (epoch.number, *segment))
                });
            later.find(|(epoch, segment)| {
                segment.has_verify && (*epoch > place.epoch || segment.last_lsn > place.lsn)
            })
        };
        let Some((epoch, segment)) = found else {
            return Ok(false);
        };
        let from = if epoch == place.epoch {
            place.lsn
        } else {
            Lsn::ZERO
        };
        match self.segment(epoch, &segment, from).await {
            Ok(()) => {}
            Err(GroupError::Repository(error)) if !error.is_not_found() => return Err(error),
            Err(error) => {
                // Its records cannot be read: they are missing in what the run adds up to.
                self.alarm(format!("verify records cannot be read: {error}"));
            }
        }
        let compared = *self.group.comparison().watch().borrow();
        let place = ComparisonPlace {
            epoch,
            lsn: segment.last_lsn.max(from),
            sequence: segment.sequence + 1,
        };
        self.group.comparison().advance(place, compared);
        Ok(true)
    }

    /// Where it goes on: at first, behind the last run whose result was kept.
    async fn place(&self) -> Result<ComparisonPlace, RepositoryError> {
        if let Some(place) = self.group.comparison().place() {
            return Ok(place);
        }
        let (place, compared) = match kept::last(self.group.repository(), self.group.id()).await {
            Ok(Some(last)) => {
                let place = ComparisonPlace {
                    epoch: last.epoch,
                    lsn: last.through,
                    sequence: 0,
                };
                (place, last.compared)
            }
            Ok(None) => Default::default(),
            Err(GroupError::Repository(error)) => return Err(error),
            Err(error) => {
                self.alarm(format!("the last comparison's result is lost: {error}"));
                Default::default()
            }
        };
        self.group.comparison().advance(place, compared);
        Ok(place)
    }

    async fn segment(
        &mut self,
        epoch: Epoch,
        segment: &SegmentEntry,
        from: Lsn,
    ) -> Result<(), GroupError> {
        let group = self.group.clone();
        let key = keys::segment(group.id(), epoch, segment.sequence);
        let index = read_index_checked(group.repository(), &key, segment).await?;
        for entry in &index.entries {
            let record = &entry.record;
            if record.op != Op::Verify || record.lsn <= from || entry.payload.is_none() {
                continue;
            }
            let body = read_payload(group.repository(), &key, &index, entry).await?;
            match VerifyBody::decode(&body) {
                Ok(body) => self.record(epoch, record, &body, segment.sequence).await?,
                Err(error) => self.alarm(format!("verify record {}: {error}", record.lsn)),
            }
        }
        Ok(())
    }

    async fn record(
        &mut self,
        epoch: Epoch,
        record: &RecordMeta,
        body: &VerifyBody,
        sequence: u64,
    ) -> Result<(), GroupError> {
        let outcome = range::compare(
            &self.group,
            &self.cache,
            &mut self.buffer,
            epoch,
            record,
            body,
        )
        .await?;
        let comparison = self.group.comparison();
        let mut compared = *comparison.watch().borrow();
        if compared.run != body.run || compared.is_over() {
            compared = Compared {
                run: body.run,
                ..Compared::default()
            };
        }
        match outcome {
            Outcome::Compared { differing, first } => {
                compared.ranges += 1;
                compared.blocks += u64::from(record.block_count);
                compared.mismatched_blocks += differing;
                if let Some(first) = first {
                    self.differs(epoch, record, body.at, differing, first);
                }
            }
            Outcome::Skipped(why) => {
                compared.skipped += 1;
                tracing::warn!(group = %self.group.id(), lsn = %record.lsn, %why, "not compared");
            }
        }
        if body.last {
            compared.total = u64::from(body.number) + 1;
            self.over(epoch, record.lsn, compared).await;
        }
        let place = ComparisonPlace {
            epoch,
            lsn: record.lsn,
            sequence,
        };
        self.group.comparison().advance(place, compared);
        Ok(())
    }

    fn differs(&self, epoch: Epoch, record: &RecordMeta, at: Lsn, differing: u64, first: u64) {
        let disk = {
            let history = self.group.history();
            let disks = history.epoch(epoch).map(|epoch| epoch.disks.as_slice());
            let disk = disks.and_then(|disks| disks.get(usize::from(record.disk.0)));
            disk.map_or_else(|| record.disk.0.to_string(), |disk| disk.name.clone())
        };
        self.group
            .note(|status| status.mismatched_blocks += differing);
        self.alarm(format!(
            "disk {disk}: {differing} blocks from byte {} on differ from what the primary's disk held at \
             lsn:{epoch}/{at}: images are wrong there; see \"When a comparison finds differences\" in \
             docs/operating.md",
            first * BLOCK_SIZE as u64
        ));
    }

    async fn over(&self, epoch: Epoch, through: Lsn, compared: Compared) {
        let (repository, group) = (self.group.repository(), self.group.id());
        tracing::info!(%group, ?compared, "a comparison with the primary's disks ended");
        let kept = kept::keep(repository, group, (epoch, through), compared, (self.now)()).await;
        if let Err(error) = kept {
            tracing::warn!(%group, %error, "the result of a comparison cannot be kept");
        }
    }

    fn alarm(&self, text: String) {
        tracing::error!(group = %self.group.id(), %text, "comparison");
        self.group.note(|status| status.alarm = Some(text));
    }
}

//! Comparing what the primary says its disks held with what the repository gives back for that very
//! moment: verify records are looked at in the order of the log, each against the image at its LSN.
//!
//! What always holds: one at a time compares a group, and looks at every record once, and again after
//! a restart within a run; a difference is real, since both sides speak of the same LSN. What cannot
//! be compared is counted and said, never taken for equal. Nothing waits for it: segments are stored
//! and acknowledged first. Memory: one range, one chunk of records, and a small [`ChunkCache`]. A
//! repository that does not answer is asked again.

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
use afterimage_format::wire::{Compared, Comparisons};

use crate::group::{ComparisonPlace, Group, GroupError, Payloads, read_index_checked};
use crate::history::SegmentEntry;
use crate::image::ChunkCache;
use crate::receive::NowNs;
use crate::repository::{RepositoryError, keys};
use range::Outcome;

/// Chunks that are kept for the next range.
const CACHE_BYTES: usize = 4 << 20;
/// Pause after the repository failed.
const PAUSE: Duration = Duration::from_secs(1);
/// Differences and skipped ranges of a run that are told one by one.
const TOLD_MAX: u32 = 16;

/// Compares what has come and what will come. Ends never; may be dropped at any time.
pub async fn follow(group: Arc<Group>, now: NowNs) -> Infallible {
    let _turn = group.comparison().turn().await;
    let mut comparer = Comparer {
        cache: Arc::new(ChunkCache::new(CACHE_BYTES)),
        buffer: Vec::new(),
        told: 0,
        first: None,
        group: group.clone(),
        now,
    };
    loop {
        match comparer.next().await {
            Ok(true) => {}
            Ok(false) => group.comparison().told().await,
            Err(error) => {
                tracing::debug!(group = %group.id(), %error, "comparing waits for the repository");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

struct Comparer {
    group: Arc<Group>,
    cache: Arc<ChunkCache>,
    buffer: Vec<u8>,
    told: u32,
    /// Where the run that goes on found the first difference.
    first: Option<String>,
    now: NowNs,
}

/// What of a segment is to be looked at.
struct Part {
    epoch: Epoch,
    segment: SegmentEntry,
    /// The records behind this one.
    from: Lsn,
}

/// A run that ended.
struct Ended {
    /// Its last record.
    through: Lsn,
    compared: Compared,
    /// When that was looked at.
    now_ns: u64,
}

impl Comparer {
    /// Looks at the next segment that has verify records; whether there was one.
    async fn next(&mut self) -> Result<bool, RepositoryError> {
        let place = self.place().await?;
        let Some(part) = self.next_part(place) else {
            return Ok(false);
        };
        let mut finished = None;
        match self.part(&part, &mut finished).await {
            Ok(()) => {}
            Err(GroupError::Repository(error)) if !error.is_not_found() => return Err(error),
            Err(error) => {
                // Its records cannot be read: they are missing in what the run adds up to.
                self.tell(&format!("verify records cannot be read: {error}"));
            }
        }
        if let Some(ended) = finished {
            self.keep(part.epoch, ended).await;
        }
        let place = ComparisonPlace {
            epoch: part.epoch,
            lsn: part.segment.last_lsn.max(part.from),
            sequence: part.segment.sequence + 1,
        };
        let comparisons = Comparisons {
            looked: place.lsn,
            ..self.group.comparison().now()
        };
        self.group.comparison().advance(place, comparisons, true);
        Ok(true)
    }

    /// The next segment with verify records. If there is none, all that has come was looked at.
    fn next_part(&self, place: ComparisonPlace) -> Option<Part> {
        let history = self.group.history();
        for epoch in history.epochs.iter().filter(|e| e.number >= place.epoch) {
            let (sequence, from) = match epoch.number == place.epoch {
                true => (place.sequence, place.lsn),
                false => (0, Lsn::ZERO),
            };
            let at = epoch.segments.partition_point(|s| s.sequence < sequence);
            let mut later = epoch.segments[at..].iter();
            if let Some(segment) = later.find(|s| s.has_verify && s.last_lsn > from) {
                return Some(Part {
                    epoch: epoch.number,
                    segment: *segment,
                    from,
                });
            }
        }
        let newest = history.newest()?;
        let place = ComparisonPlace {
            epoch: newest.number,
            lsn: newest.cursor.lsn,
            sequence: newest.next_sequence(),
        };
        drop(history);
        let comparisons = Comparisons {
            looked: place.lsn,
            ..self.group.comparison().now()
        };
        self.group.comparison().advance(place, comparisons, false);
        None
    }

    /// Where it goes on: at first, behind the last run whose result was kept.
    async fn place(&self) -> Result<ComparisonPlace, RepositoryError> {
        if let Some(place) = self.group.comparison().place() {
            return Ok(place);
        }
        let comparison = self.group.comparison();
        let (place, finished) = match kept::last(self.group.repository(), self.group.id()).await {
            Ok(Some(last)) => {
                let place = ComparisonPlace {
                    epoch: last.epoch,
                    lsn: last.through,
                    sequence: 0,
                };
                comparison.begin(place, last.whole_ns);
                (place, last.compared)
            }
            Ok(None) => {
                comparison.begin(ComparisonPlace::default(), 0);
                Default::default()
            }
            Err(GroupError::Repository(error)) => return Err(error),
            Err(error) => {
                self.tell(&format!("the last comparison's result is lost: {error}"));
                comparison.begin(ComparisonPlace::default(), 0);
                Default::default()
            }
        };
        if finished.mismatched_blocks > 0 {
            comparison.set_alarm(Some(format!(
                "{} blocks are not what the primary's disks held when they were compared last: {ADVICE}",
                finished.mismatched_blocks
            )));
        }
        let comparisons = Comparisons {
            finished,
            ..Comparisons::default()
        };
        comparison.advance(place, comparisons, false);
        Ok(place)
    }

    /// Looks at the verify records of a segment; the newest run that ended within it.
    async fn part(&mut self, part: &Part, finished: &mut Option<Ended>) -> Result<(), GroupError> {
        let group = self.group.clone();
        let key = keys::segment(group.id(), part.epoch, part.segment.sequence);
        let index = read_index_checked(group.repository(), &key, &part.segment).await?;
        let mut payloads = Payloads::new(group.repository(), &key, &index);
        for entry in &index.entries {
            let record = &entry.record;
            if record.op != Op::Verify || record.lsn <= part.from || entry.payload.is_none() {
                continue;
            }
            let body = payloads.read(entry).await?;
            match VerifyBody::decode(&body) {
                Ok(body) => {
                    if let Some(ended) = self.record(part, record, &body).await? {
                        *finished = Some(ended);
                    }
                }
                Err(error) => self.tell(&format!("verify record {}: {error}", record.lsn)),
            }
        }
        Ok(())
    }

    /// Looks at one record; what its run has come to, if it was the last.
    async fn record(
        &mut self,
        part: &Part,
        record: &RecordMeta,
        body: &VerifyBody,
    ) -> Result<Option<Ended>, GroupError> {
        let outcome = range::compare(
            &self.group,
            &self.cache,
            &mut self.buffer,
            part.epoch,
            record,
            body,
        )
        .await?;
        let mut comparisons = self.group.comparison().now();
        let current = &mut comparisons.current;
        if current.run != body.run {
            *current = Compared {
                run: body.run,
                ..Compared::default()
            };
            self.told = 0;
            self.first = None;
        }
        match outcome {
            Outcome::Compared { differing, first } => {
                current.ranges += 1;
                current.blocks = current.blocks.saturating_add(record.block_count.into());
                current.mismatched_blocks = current.mismatched_blocks.saturating_add(differing);
                if let Some(first) = first {
                    let all = current.mismatched_blocks;
                    self.differs(part.epoch, record, body.at, (differing, all), first);
                }
            }
            Outcome::Skipped(why) => {
                current.skipped += 1;
                self.tell_once(&format!("record {} was not compared: {why}", record.lsn));
            }
        }
        let mut ended = None;
        if body.last {
            current.total = u64::from(body.number) + 1;
            let finished = std::mem::take(current);
            comparisons.finished = finished;
            let now_ns = (self.now)();
            ended = Some(Ended {
                through: record.lsn,
                compared: finished,
                now_ns,
            });
            tracing::info!(group = %self.group.id(), ?finished, "a comparison with the primary's disks ended");
            if finished.is_whole() {
                self.group.comparison().set_alarm(None);
                self.group.comparison().set_whole(now_ns);
            }
        }
        comparisons.looked = record.lsn;
        let place = ComparisonPlace {
            epoch: part.epoch,
            lsn: record.lsn,
            sequence: part.segment.sequence,
        };
        self.group.comparison().advance(place, comparisons, false);
        Ok(ended)
    }

    /// `differing` blocks of this range, and of the run so far.
    fn differs(
        &mut self,
        epoch: Epoch,
        record: &RecordMeta,
        at: Lsn,
        (differing, all): (u64, u64),
        first: u64,
    ) {
        let disk = {
            let history = self.group.history();
            let disks = history.epoch(epoch).map(|epoch| epoch.disks.as_slice());
            let disk = disks.and_then(|disks| disks.get(usize::from(record.disk.0)));
            disk.map_or_else(|| record.disk.0.to_string(), |disk| disk.name.clone())
        };
        let byte = first * BLOCK_SIZE as u64;
        let place = format!("byte {byte} of disk {disk}, compared at lsn:{epoch}/{at}");
        self.group
            .note(|status| status.mismatched_blocks += differing);
        self.tell_once(&format!(
            "{differing} blocks are not what the primary's disk held, the first at {place}: {ADVICE}"
        ));
        let first = self.first.get_or_insert(place);
        self.group.comparison().set_alarm(Some(format!(
            "{all} blocks are not what the primary's disks held, the first at {first}: {ADVICE}"
        )));
    }

    async fn keep(&self, epoch: Epoch, ended: Ended) {
        let (repository, group) = (self.group.repository(), self.group.id());
        let Ended {
            through,
            compared,
            now_ns,
        } = ended;
        let kept = kept::keep(repository, group, (epoch, through), compared, now_ns).await;
        if let Err(error) = kept {
            tracing::warn!(%group, %error, "the result of a comparison cannot be kept");
        }
    }

    fn tell(&self, text: &str) {
        tracing::error!(group = %self.group.id(), %text, "comparison");
    }

    /// Tells the first of a run; the numbers tell of the others.
    fn tell_once(&mut self, text: &str) {
        self.told += 1;
        if self.told <= TOLD_MAX {
            self.tell(text);
        }
        if self.told == TOLD_MAX {
            self.tell("there may be more of this run, which is not told one by one");
        }
    }
}

const ADVICE: &str =
    "images are wrong there; see \"When a comparison finds differences\" in docs/operating.md";

//! What is allocated and what reads as zero: the backing's own word, under what the ring knows. What
//! may differ from what the sinks have: all of a group's disks, or nothing.

use super::Engine;
use super::block_map::BlockKey;
use super::event::{EngineEvent, Ticket};
use super::request::{Allocated, Extent, ReplyBody, RequestError, RequestId};
use crate::io::{FileId, Storage};
use afterimage_format::ids::{BLOCK_SHIFT, BLOCK_SIZE, DiskIndex};
use rangemap::{RangeMap, RangeSet};
use std::iter;
use std::ops::Range;

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Most bytes that one answer describes: bounds the work of a request. NBD lets an answer be short.
const SPAN_MAX: u64 = 1 << 30;

/// Somebody wants to know what is allocated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    ticket: Ticket,
    disk: DiskIndex,
    from_block: u64,
    ranges_max: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct State {
    hole: bool,
    zero: bool,
}

const HOLE: State = State {
    hole: true,
    zero: true,
};
const DATA: State = State {
    hole: false,
    zero: false,
};

impl<S: Storage> Engine<S> {
    pub(super) fn submit_block_status(
        &mut self,
        id: RequestId,
        disk: DiskIndex,
        offset: u64,
        len: u64,
        extents_max: u32,
    ) {
        let result = self
            .block_status(disk, offset, len.min(SPAN_MAX), extents_max.max(1) as usize)
            .map(ReplyBody::Extents)
            .map_err(|error| {
                tracing::error!(disk = disk.0, offset, %error, "allocation of the backing cannot be read");
                RequestError::Io
            });
        self.reply(id, result);
    }

    /// Runs of blocks at or behind `from_block` that may hold something other than zeroes, in the
    /// backing or in the ring, at most `ranges_max`. None when there are none up to the disk's end, or
    /// when the disk was taken out of the group. Answered with [`EngineEvent::Allocated`], as of then:
    /// not during a sync of the backings, for one that fails may have lost blocks that would look like
    /// holes. While a backing is brought up to date after that it is not asked, and everything may.
    pub fn allocated_ranges(
        &mut self,
        ticket: Ticket,
        disk: DiskIndex,
        from_block: u64,
        ranges_max: usize,
    ) {
        let question = Question {
            ticket,
            disk,
            from_block,
            ranges_max,
        };
        if self.destage.syncing() {
            self.questions.push(question);
        } else {
            self.answer_question(question);
        }
    }

    /// A sync of the backings has ended.
    pub(super) fn answer_questions(&mut self) {
        for question in std::mem::take(&mut self.questions) {
            self.answer_question(question);
        }
    }

    fn answer_question(&mut self, question: Question) {
        let Question {
            ticket,
            disk,
            from_block,
            ranges_max,
        } = question;
        let result = self.allocated_now(disk, from_block, ranges_max);
        self.events.push(EngineEvent::Allocated { ticket, result });
    }

    fn allocated_now(
        &mut self,
        disk: DiskIndex,
        from_block: u64,
        ranges_max: usize,
    ) -> std::io::Result<Allocated> {
        let size = self.disk_sizes[usize::from(disk.0)];
        let disk_end = size.div_ceil(BLOCK);
        let lsn = self.ring.appended();
        let exact = self.one_content_at(lsn);
        let from = from_block << BLOCK_SHIFT;
        if from >= size || ranges_max == 0 || self.disks_removed[usize::from(disk.0)] {
            return Ok(Allocated {
                lsn,
                exact,
                ranges: Vec::new(),
                end_block: from_block,
            });
        }
        if self.redo.is_some() {
            // What a failed sync lost may look like a hole; all of it is there again afterwards.
            return Ok(Allocated {
                lsn,
                exact,
                ranges: iter::once(from_block..disk_end).collect(),
                end_block: disk_end,
            });
        }
        let file = FileId::backing(disk);
        let runs = self
            .storage
            .allocated(file, from, size - from, ranges_max)?;
        // Behind the last run that was asked for nothing is known.
        let known_end = match runs.last() {
            Some(last) if runs.len() >= ranges_max => last.end.div_ceil(BLOCK),
            _ => disk_end,
        };
        let mut blocks: RangeSet<u64> = runs
            .into_iter()
            .map(|run| run.start >> BLOCK_SHIFT..run.end.div_ceil(BLOCK))
            .collect();
        for (key, _) in self.map.iter() {
            let block = key.block();
            if key.disk() == disk && (from_block..known_end).contains(&block) {
                blocks.insert(block..block + 1);
            }
        }
        let mut ranges: Vec<Range<u64>> = blocks.iter().take(ranges_max + 1).cloned().collect();
        let end_block = match ranges.get(ranges_max) {
            Some(_) => ranges[ranges_max - 1].end,
            None => known_end,
        };
        ranges.truncate(ranges_max);
        Ok(Allocated {
            lsn,
            exact,
            ranges,
            end_block,
        })
    }

    fn block_status(
        &mut self,
        disk: DiskIndex,
        offset: u64,
        len: u64,
        extents_max: usize,
    ) -> std::io::Result<Vec<Extent>> {
        let runs = self
            .storage
            .allocated(FileId::backing(disk), offset, len, extents_max)?;
        // Behind the last run that was asked for nothing is known.
        let end = match runs.last() {
            Some(last) if runs.len() >= extents_max => last.end,
            _ => offset + len,
        };
        let mut states: RangeMap<u64, State> = RangeMap::new();
        states.insert(offset..end, HOLE);
        for run in runs {
            states.insert(run, DATA);
        }
        let blocks = offset >> BLOCK_SHIFT..end.div_ceil(BLOCK);
        for (range, zeroing) in self.zeroes.overlapping(disk, blocks.clone()) {
            let bytes =
                (range.start << BLOCK_SHIFT).max(offset)..(range.end << BLOCK_SHIFT).min(end);
            if bytes.start < bytes.end {
                let hole = zeroing.hole;
                states.insert(bytes, State { hole, zero: true });
            }
        }
        let mut in_ring = |block: u64, lsn| {
            if self
                .zeroes
                .get(disk, block)
                .is_none_or(|zeroed| zeroed < lsn)
            {
                let start = block << BLOCK_SHIFT;
                let bytes = start.max(offset)..(start + BLOCK).min(end);
                if bytes.start < bytes.end {
                    states.insert(bytes, DATA);
                }
            }
        };
        if (self.map.len() as u64) < blocks.end - blocks.start {
            for (key, version) in self.map.iter() {
                if key.disk() == disk && blocks.contains(&key.block()) {
                    in_ring(key.block(), version.lsn);
                }
            }
        } else {
            for block in blocks {
                if let Some(version) = self.map.get(BlockKey::new(disk, block)) {
                    in_ring(block, version.lsn);
                }
            }
        }
        let dirty = self.trim.some_sink_lacks(self.ring.appended());
        Ok(states
            .iter()
            .take(extents_max)
            .map(|(range, state)| Extent {
                len: range.end - range.start,
                hole: state.hole,
                zero: state.zero,
                dirty,
            })
            .collect())
    }
}

//! The record source that reads the log's file with a read-only descriptor of its own, beside the
//! engine that appends to it; and, of frames that are still there, their copy in the ring.
//!
//! Nothing is shared with the engine but the files and the durable bound: frames up to the bound do
//! not change until the tail has passed them, and the superblock with the new tail is durable
//! before their space is written again. So a frame that is not where the chain demands it has left
//! the log if the superblock's tail is past it, and is damaged if not. Blocking reads run on the
//! runtime's threads for that.

use super::BoxFuture;
use super::ring_frames::{RingFrames, RingSource};
use super::source::{Batch, Record, RecordSource, SourceError};
use crate::engine::log::LogHead;
use crate::engine::log::directory::Directory;
use crate::engine::log::reader::{ChainRules, LogReader, LogSource, READAHEAD_FOLLOW, ReadError};
use crate::engine::log::superblock::peek;
use crate::io::file::{OpenOptions, StorageFile};
use afterimage_format::frame::Descriptor;
use afterimage_format::ids::Lsn;
use afterimage_format::segment::ClockAnchor;
use bytes::Bytes;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Reads one log file, and the ring in front of it.
pub struct LogFileSource {
    path: PathBuf,
    ring: PathBuf,
    /// The record that comes next.
    next: Lsn,
    /// Open file and position. `None` before the first read, and after a read that was dropped
    /// half-way or failed: then the file is opened anew.
    open: Option<Box<FollowedLog<StorageFile>>>,
    /// What was read and not handed out, `next` first.
    ready: VecDeque<Batch>,
}

/// Payload that is read at once, or a frame: a guest that syncs often makes many small ones.
const GATHER_BYTES: usize = 256 * 1024;

/// A log that is followed step by step, wherever its bytes come from. Reads block.
pub struct FollowedLog<F> {
    file: F,
    ring: Option<RingFrames>,
    reader: LogReader,
    rules: ChainRules,
    /// Places of frames that were passed; trimmed once for each lap.
    directory: Directory,
    /// Frames before this record are in the directory.
    noted: Lsn,
    lap: u32,
}

impl LogFileSource {
    /// A source over the log at `path`, which must exist when records are first read, with the ring
    /// at `ring`; without that file everything is read from the log.
    #[must_use]
    pub fn new(path: &Path, ring: &Path) -> Self {
        Self {
            path: path.to_owned(),
            ring: ring.to_owned(),
            next: Lsn(1),
            open: None,
            ready: VecDeque::new(),
        }
    }

    async fn read_batch(&mut self, durable: Lsn) -> Result<Batch, SourceError> {
        if self.ready.is_empty() && self.next <= durable {
            self.gather(durable).await?;
        }
        let batch = self.ready.pop_front().unwrap_or_default();
        if let Some(last) = batch.records.last() {
            self.next = last.meta.lsn.next();
        }
        Ok(batch)
    }

    async fn gather(&mut self, durable: Lsn) -> Result<(), SourceError> {
        let (path, ring) = (self.path.clone(), self.ring.clone());
        let (open, next) = (self.open.take(), self.next);
        let read = move || {
            let mut open = match open {
                Some(open) => open,
                None => {
                    let file = StorageFile::open(&path, &OpenOptions::reader());
                    let mut log = FollowedLog::open(file.map_err(io::Error::other)?)?;
                    if let Ok(ring) = File::open(&ring) {
                        log.follow_ring(Box::new(ring));
                    }
                    Box::new(log)
                }
            };
            let (batches, error) = open.read_some(next, durable)?;
            // What failed is tried again from the log's tail, when what came before it is used.
            Ok::<_, SourceError>((error.is_none().then_some(open), batches))
        };
        let (open, batches) = tokio::task::spawn_blocking(read)
            .await
            .map_err(|error| SourceError::Io(io::Error::other(error)))??;
        self.open = open;
        self.ready = batches;
        Ok(())
    }
}

impl RecordSource for LogFileSource {
    fn seek(&mut self, next: Lsn) -> BoxFuture<'_, Result<(), SourceError>> {
        // Whether the log holds it shows when it is read.
        self.next = next;
        self.ready.clear();
        Box::pin(std::future::ready(Ok(())))
    }

    fn read(&mut self, durable: Lsn) -> BoxFuture<'_, Result<Batch, SourceError>> {
        Box::pin(self.read_batch(durable))
    }
}

impl<F: LogSource> FollowedLog<F> {
    /// Begins at the tail that the log's superblock names.
    ///
    /// # Errors
    /// The superblock cannot be read.
    pub fn open(mut file: F) -> Result<Self, SourceError> {
        let superblock = peek(&mut file).map_err(io::Error::other)?;
        let rules = ChainRules {
            log: superblock.log,
            area_blocks: superblock.area_blocks,
            incarnation: None,
        };
        let head = LogHead::at_tail(&superblock.tail);
        Ok(Self {
            file,
            ring: None,
            reader: LogReader::new(rules, head, READAHEAD_FOLLOW),
            rules,
            directory: Directory::new(head),
            noted: head.lsn,
            lap: head.lap,
        })
    }

    /// From now on frames are taken from this ring where it has them, if it is the log's.
    pub fn follow_ring(&mut self, ring: Box<dyn RingSource>) {
        self.ring = RingFrames::open(ring, self.rules.log);
    }

    /// As [`FollowedLog::read`], of as many frames as it takes for [`GATHER_BYTES`], and why there
    /// are no more if that is an error.
    fn read_some(
        &mut self,
        mut next: Lsn,
        durable: Lsn,
    ) -> Result<(VecDeque<Batch>, Option<SourceError>), SourceError> {
        let (mut batches, mut bytes) = (VecDeque::new(), 0);
        while next <= durable && bytes < GATHER_BYTES {
            let batch = match self.read(next, durable) {
                Ok(batch) => batch,
                Err(error) if batches.is_empty() => return Err(error),
                Err(error) => return Ok((batches, Some(error))),
            };
            let Some(last) = batch.records.last() else {
                break;
            };
            next = last.meta.lsn.next();
            let payloads = batch.records.iter().map(|record| record.payload.len());
            bytes += payloads.sum::<usize>();
            batches.push_back(batch);
        }
        Ok((batches, None))
    }

    /// Records from `next` on, of one frame; none when the log has no more up to `durable`.
    ///
    /// # Errors
    /// The log does not hold them, is damaged, or cannot be read.
    pub fn read(&mut self, next: Lsn, durable: Lsn) -> Result<Batch, SourceError> {
        self.go_to(next)?;
        loop {
            let before = self.reader.head();
            let in_ring = self.ring.as_mut();
            if let Some(frame) = in_ring.and_then(|ring| ring.next(&before, durable)) {
                let passed = self.reader.pass(&frame.descriptor);
                self.note(before, passed.blocks_taken, passed.lap)?;
                let batch = batch_of(&frame.descriptor, &frame.payload, next);
                if batch.records.is_empty() {
                    continue;
                }
                return Ok(batch);
            }
            match self.reader.pass_before(&mut self.file, next, durable) {
                Ok(Some(passed)) => {
                    self.note(before, passed.blocks_taken, passed.lap)?;
                    continue;
                }
                Ok(None) => {}
                Err(error) => return Err(self.explain(error, next)),
            }
            let frame = match self.reader.next(&mut self.file, durable) {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(Batch::default()),
                Err(error) => return Err(self.explain(error, next)),
            };
            let (lap, taken) = (frame.placement.lap, frame.placement.blocks_taken);
            let payload = Bytes::copy_from_slice(frame.payload);
            let batch = batch_of(&frame.descriptor, &payload, next);
            self.note(before, taken, lap)?;
            if !batch.records.is_empty() {
                return Ok(batch);
            }
        }
    }

    fn note(&mut self, before: LogHead, blocks: u64, lap: u32) -> Result<(), SourceError> {
        if before.lsn >= self.noted {
            self.directory.note(before, blocks);
            self.noted = self.reader.head().lsn;
        }
        if lap > self.lap {
            self.lap = lap;
            let superblock = peek(&mut self.file).map_err(io::Error::other)?;
            let tail = LogHead::at_tail(&superblock.tail);
            if tail.lsn <= self.noted {
                self.directory.trim(tail);
            }
        }
        Ok(())
    }

    /// Puts the reader at or before the frame that holds `next`.
    fn go_to(&mut self, next: Lsn) -> Result<(), SourceError> {
        let head = self.reader.head();
        if head.lsn == next {
            return Ok(());
        }
        let known = self.directory.locate(next).ok_or(SourceError::Gone(next))?;
        // Ahead: on from the last known place, or from here, whichever is nearer.
        let start = if head.lsn < next && head.lsn > known.lsn {
            head
        } else {
            known
        };
        self.reader = LogReader::new(self.rules, start, READAHEAD_FOLLOW);
        Ok(())
    }

    fn explain(&mut self, error: ReadError, next: Lsn) -> SourceError {
        let ReadError::NotThere { .. } = &error else {
            return SourceError::Io(io::Error::other(error));
        };
        match peek(&mut self.file) {
            Ok(superblock) if superblock.tail.lsn > self.reader.head().lsn => {
                // The frames on the way are gone; the record itself may still be there, and is
                // found from the new tail when the file is opened anew.
                if superblock.tail.lsn > next {
                    SourceError::Gone(next)
                } else {
                    SourceError::Io(io::Error::other(error))
                }
            }
            Ok(_) => SourceError::Damaged {
                lsn: self.reader.head().lsn.max(next),
                what: error.to_string(),
            },
            Err(error) => SourceError::Io(io::Error::other(error)),
        }
    }
}

fn batch_of(descriptor: &Descriptor, payload: &Bytes, next: Lsn) -> Batch {
    let start = &descriptor.header.start;
    let entries = descriptor.entries.iter();
    let records = entries
        .filter(|entry| entry.lsn >= next)
        .map(|entry| Record {
            meta: entry.meta(),
            payload: payload.slice_ref(Descriptor::payload_of(entry, payload)),
        })
        .collect();
    Batch {
        anchor: ClockAnchor {
            wall_ns: start.wall_ns,
            boot_id: start.boot.0.into_bytes(),
            boottime_ns: start.boottime_ns,
        },
        records,
    }
}

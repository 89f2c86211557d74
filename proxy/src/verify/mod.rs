//! Describing what the disks hold, for every replica to compare: verify records in the log.
//!
//! Owns one run over all disks of a group: how far it is, and the pace. [`cover`] says which blocks
//! come next. Always holds: a record says what a range held at exactly the LSN in it, however much is
//! written meanwhile: a range that changed while it was read is read again, in ever smaller parts.
//! Nothing here holds the guest: the reads are those of a pass, and no more records are under way
//! than a window. Nothing is kept: a run that is dropped has described what it has.
#![deny(clippy::disallowed_methods)]

mod cover;

#[cfg(test)]
mod tests;

use crate::engine::event::EventRecord;
use crate::engine::request::PassRead;
use crate::ship::port::{GroupPort, PortError};
use crate::ship::rate::RateLimit;
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::op::Op;
use afterimage_format::verify::{BlockHashes, Content, VerifyBody};
use cover::{Cover, Step};
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Ranges of a disk asked for at a time.
const RANGES_MAX: usize = 1024;
/// Records that no sink in step has acknowledged: beyond that the run waits.
const WINDOW_RECORDS: usize = 256;
/// Attempts to read a range whole, before it is halved.
const ATTEMPTS: u32 = 3;
/// How often it is looked whether a sink has come on.
const SINK_POLL: Duration = Duration::from_millis(10);

/// How far a run is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct VerifyProgress {
    /// Its identity; see [`VerifyBody::run`].
    pub run: u64,
    /// Blocks described.
    pub blocks_done: u64,
    /// Blocks of all disks.
    pub blocks_total: u64,
    /// Records in the log.
    pub records: u64,
    /// The newest of them.
    pub last: Lsn,
    /// Reads that were overtaken by a write.
    pub retries: u64,
    /// No sink is in step, or one that is not would lose its place in the log: the run waits.
    pub waiting: bool,
    /// The last record is in the log.
    pub over: bool,
}

/// What a run needs besides the group.
pub struct Surroundings<'a> {
    /// Identity of the run, drawn at random; not 0.
    pub run: u64,
    /// The lowest LSN that is acknowledged by all sinks in step; `None` while the run has to wait.
    pub acked: &'a (dyn Fn() -> Option<Lsn> + Send + Sync),
    /// Most bytes per second that are read; as that of passes, `None` for no limit.
    pub bytes_per_second: &'a (dyn Fn() -> Option<u64> + Send + Sync),
    /// Where to show how far it is.
    pub progress: &'a watch::Sender<VerifyProgress>,
}

/// Why a run ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The group.
    #[error(transparent)]
    Port(#[from] PortError),
    /// No disk of the group is there.
    #[error("no disk of the group is there to be verified")]
    NoDisks,
}

/// Describes every block of every disk of the group once.
///
/// # Errors
/// The group ends or its log fails, or a disk cannot be read.
pub async fn run(port: &dyn GroupPort, around: &Surroundings<'_>) -> Result<(), VerifyError> {
    let sizes: Vec<u64> = port
        .identity()
        .disks
        .iter()
        .map(|disk| disk.size_bytes)
        .collect();
    let mut cover = Cover::new(&sizes);
    let mut run = Run {
        port,
        around,
        began: Instant::now(),
        rate: RateLimit::new((around.bytes_per_second)()),
        bytes_per_second: (around.bytes_per_second)(),
        outstanding: VecDeque::new(),
        held: None,
        shown: VerifyProgress {
            run: around.run,
            blocks_total: cover.blocks_total(),
            ..VerifyProgress::default()
        },
    };
    run.show();
    loop {
        // Before anything is read: a sink in step has nothing outstanding from before the log.
        run.wait_for_sinks().await?;
        match cover.next_step() {
            Step::Ranges(disk, from) => {
                let allocated = port.allocated_ranges(disk, from, RANGES_MAX).await?;
                cover.take_ranges(allocated);
            }
            Step::Zero {
                disk,
                first,
                blocks,
                at,
            } => {
                let described = Described {
                    disk,
                    first,
                    blocks,
                    at,
                    content: Content::Zero,
                };
                run.describe(described).await?;
                cover.advance(u64::from(blocks));
            }
            Step::Read(disk, first, blocks) => {
                let read = run.read_exactly(disk, first, blocks).await?;
                let blocks = (read.data.len() / BLOCK_SIZE) as u32;
                let content = if read.data.iter().all(|byte| *byte == 0) {
                    Content::Zero
                } else {
                    Content::Data(BlockHashes::of(&read.data))
                };
                let described = Described {
                    disk,
                    first,
                    blocks,
                    at: read.lsn,
                    content,
                };
                run.describe(described).await?;
                cover.advance(u64::from(blocks));
            }
            Step::Done => break,
        }
        run.shown.blocks_done = cover.blocks_done();
    }
    run.finish().await
}

/// A range, as a record will say it.
struct Described {
    disk: DiskIndex,
    first: u64,
    blocks: u32,
    at: Lsn,
    content: Content,
}

struct Run<'a> {
    port: &'a dyn GroupPort,
    around: &'a Surroundings<'a>,
    began: Instant,
    rate: RateLimit,
    bytes_per_second: Option<u64>,
    /// Records in the log that have to be acknowledged.
    outstanding: VecDeque<Lsn>,
    /// The newest range: its record is appended when it is known whether it is the last.
    held: Option<Described>,
    shown: VerifyProgress,
}

impl Run<'_> {
    fn show(&self) {
        self.around.progress.send_replace(self.shown);
    }

    /// Reads a range, or if it changes all the time a part of it, as it is at one LSN.
    async fn read_exactly(
        &mut self,
        disk: DiskIndex,
        first: u64,
        blocks: u32,
    ) -> Result<PassRead, PortError> {
        let mut blocks = blocks;
        let mut attempts = 0;
        loop {
            self.keep_to_the_rate().await;
            let read = self.port.pass_read(disk, first, blocks).await?;
            self.rate.take(self.now_ns(), read.data.len() as u64);
            if !read.overtaken {
                return Ok(read);
            }
            self.shown.retries += 1;
            attempts += 1;
            if attempts % ATTEMPTS == 0 {
                if blocks == 1 {
                    // Not by a write: that would be in the ring by now.
                    tokio::time::sleep_until(Instant::now() + SINK_POLL).await;
                }
                blocks = (blocks / 2).max(1);
            }
        }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    async fn keep_to_the_rate(&mut self) {
        let wanted = (self.around.bytes_per_second)();
        if wanted != self.bytes_per_second {
            self.bytes_per_second = wanted;
            self.rate.set(wanted);
        }
        let ready = self.began + Duration::from_nanos(self.rate.ready_at_ns());
        if ready > Instant::now() {
            tokio::time::sleep_until(ready).await;
        }
    }

    async fn describe(&mut self, described: Described) -> Result<(), VerifyError> {
        if let Some(before) = self.held.replace(described) {
            self.append(before, false).await?;
        }
        Ok(())
    }

    async fn append(&mut self, described: Described, last: bool) -> Result<(), VerifyError> {
        let body = VerifyBody {
            run: self.shown.run,
            number: self.shown.records as u32,
            last,
            at: described.at,
            content: described.content,
        };
        let event = EventRecord {
            op: Op::Verify,
            disk: described.disk,
            first_block: described.first,
            block_count: described.blocks,
            aux: 0,
            body: body.encode(),
        };
        let lsn = self.port.append(event).await?;
        self.outstanding.push_back(lsn);
        self.shown.records += 1;
        self.shown.last = lsn;
        self.shown.over = last;
        self.show();
        Ok(())
    }

    /// Waits until the window has room, so that a sink that is slow does not get its log filled with
    /// hashes.
    async fn wait_for_sinks(&mut self) -> Result<(), VerifyError> {
        loop {
            let acked = (self.around.acked)();
            while self
                .outstanding
                .front()
                .is_some_and(|lsn| Some(*lsn) <= acked)
            {
                self.outstanding.pop_front();
            }
            let waits = acked.is_none() || self.outstanding.len() >= WINDOW_RECORDS;
            if self.shown.waiting != acked.is_none() {
                self.shown.waiting = acked.is_none();
                self.show();
            }
            if !waits {
                return Ok(());
            }
            let mut progress = self.port.progress();
            let ended = async { while progress.changed().await.is_ok() {} };
            if tokio::time::timeout(SINK_POLL, ended).await.is_ok() {
                return Err(PortError::Gone.into());
            }
        }
    }

    async fn finish(mut self) -> Result<(), VerifyError> {
        let last = self.held.take().ok_or(VerifyError::NoDisks)?;
        self.append(last, true).await
    }
}

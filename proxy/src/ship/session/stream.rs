//! The flow of a session: log segments and pass segments out, acknowledgements in.

use super::follow::Follow;
use super::open::Opened;
use super::{Context, Memory, SessionError};
use crate::engine::event::EventRecord;
use crate::engine::request::LogProgress;
use crate::ship::cutter::{CutSegment, Cutter};
use crate::ship::pass::{PASS_RANGES_MAX, Pass, PassSegment, Step};
use crate::ship::port::{GroupPort, PortError};
use crate::ship::rate::RateLimit;
use crate::ship::sink::SinkConnection;
use crate::ship::source::{Record, RecordSource};
use crate::ship::status::SinkState;
use crate::ship::window::{LogPart, Sent, Window};
use crate::ship::{BoxFuture, Tuning};
use afterimage_format::ids::{DiskIndex, Epoch, Lsn};
use afterimage_format::op::Op;
use afterimage_format::segment::PassEndBody;
use afterimage_format::wire::{Ack, ActivePass, Cursor};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Where a pass stands.
enum Phase {
    /// Its end may be in the log already: nothing is read until the log was read up to here.
    Held(Lsn),
    /// Blocks are read and sent.
    Sending,
    /// All blocks were sent; their acknowledgement is awaited.
    Sent,
    /// `PassEnd` is in the log, or waits for room there, and travels like any record.
    Ending,
}

struct Driven {
    pass: Pass,
    phase: Phase,
    /// A segment whose blocks the log is not durable up to yet.
    ready: Option<PassSegment>,
}

pub(super) struct Streaming<'a> {
    context: &'a Context,
    memory: &'a mut Memory,
    connection: &'a mut dyn SinkConnection,
    source: &'a mut dyn RecordSource,
    progress: watch::Receiver<LogProgress>,
    started: Instant,
    epoch: Epoch,
    cutter: Cutter,
    follow: Follow,
    window: Window,
    cut: VecDeque<CutSegment>,
    pass: Option<Driven>,
    /// `PassEnd` on its way into the log, which may be full for long: the log can only be trimmed if
    /// records and acknowledgements go on meanwhile.
    appending: Option<BoxFuture<'a, Result<Lsn, PortError>>>,
    /// As in [`Opened`].
    base_due_behind: Option<Lsn>,
    active_at_sink: Option<ActivePass>,
    rate: RateLimit,
    tuning: watch::Receiver<Tuning>,
}

impl<'a> Streaming<'a> {
    pub(super) fn new(
        context: &'a Context,
        memory: &'a mut Memory,
        connection: &'a mut dyn SinkConnection,
        source: &'a mut dyn RecordSource,
        opened: Opened,
    ) -> Self {
        let state = if opened.pass.is_some() {
            SinkState::Pass
        } else {
            SinkState::Streaming
        };
        context.status.update(|s| {
            s.state = state;
            s.epoch = opened.stream.epoch;
            s.acked = opened.cursor.lsn;
        });
        Self {
            context,
            memory,
            connection,
            source,
            progress: context.port.progress(),
            started: Instant::now(),
            epoch: opened.stream.epoch,
            cutter: opened.cutter,
            follow: Follow::new(interval_ns(&context.tuning.borrow())),
            window: Window::new(context.config.window_bytes, opened.cursor),
            cut: VecDeque::new(),
            pass: opened.pass.map(|pass| Driven {
                pass,
                phase: if opened.pass_ends {
                    Phase::Ending
                } else {
                    Phase::Held(opened.pass_held_until)
                },
                ready: None,
            }),
            appending: None,
            base_due_behind: opened.base_due_behind,
            active_at_sink: opened.resume.active_pass,
            rate: RateLimit::new(context.tuning.borrow().pass_bytes_per_second),
            tuning: context.tuning.clone(),
        }
    }

    pub(super) async fn run(mut self) -> Result<Infallible, SessionError> {
        let complete = self.pass.is_none() && self.base_due_behind.is_none();
        self.report(self.acked_at_open(), complete).await?;
        loop {
            self.check_epoch()?;
            self.retune();
            self.take_acks().await?;
            self.check_base()?;
            self.append_on().await?;
            let mut moved = self.send_cut().await?;
            if self.may_read() {
                moved |= self.read_log().await?;
            }
            // Sent before the pass goes on, so that a base is with the sink before its blocks.
            moved |= self.send_cut().await?;
            if self.may_read() {
                moved |= self.drive_pass().await?;
            }
            let now = self.now_ns();
            self.cutter.tick(now, &mut self.cut);
            moved |= self.send_cut().await?;
            self.show();
            if !moved {
                self.wait().await?;
            }
        }
    }

    fn acked_at_open(&self) -> Option<Cursor> {
        // A base that was just declared is what counts, not the sink's older cursor.
        let cursor = self.window.acked();
        (cursor.lsn.next() == self.cutter.next()).then_some(cursor)
    }

    async fn report(&mut self, acked: Option<Cursor>, complete: bool) -> Result<(), SessionError> {
        let Some(acked) = acked else { return Ok(()) };
        self.memory.acked = Some(acked);
        let port = &self.context.port;
        port.report_acked(self.context.sink, acked, complete)
            .await?;
        Ok(())
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn check_epoch(&self) -> Result<(), SessionError> {
        let epoch = self.progress.borrow().epoch;
        if epoch == self.epoch {
            Ok(())
        } else {
            Err(SessionError::EpochChanged(epoch))
        }
    }

    fn check_base(&self) -> Result<(), SessionError> {
        match self.base_due_behind {
            Some(last) if self.window.acked().lsn >= last => Err(SessionError::BaseDue(last)),
            _ => Ok(()),
        }
    }

    /// Takes over settings that have changed.
    fn retune(&mut self) {
        if !self.tuning.has_changed().unwrap_or(false) {
            return;
        }
        let tuning = *self.tuning.borrow_and_update();
        self.cutter.set_interval(interval_ns(&tuning));
        self.follow.set_interval(interval_ns(&tuning));
        self.rate.set(tuning.pass_bytes_per_second);
    }

    fn may_read(&self) -> bool {
        self.cut.is_empty() && self.window.has_room()
    }

    /// Sends what is cut, as far as the window allows.
    async fn send_cut(&mut self) -> Result<bool, SessionError> {
        let mut moved = false;
        while self.window.has_room()
            && let Some(segment) = self.cut.pop_front()
        {
            let header = &segment.sealed.header;
            let part = LogPart {
                end: Cursor {
                    lsn: header.last_lsn,
                    chain: header.chain_after,
                },
                first_wall_ns: segment.first_wall_ns,
                last_wall_ns: segment.last_wall_ns,
            };
            let payload = header.payload_bytes;
            self.send(segment.sealed.bytes, payload, Some(part)).await?;
            moved = true;
        }
        Ok(moved)
    }

    async fn send(
        &mut self,
        bytes: bytes::Bytes,
        payload: u64,
        log: Option<LogPart>,
    ) -> Result<(), SessionError> {
        let len = bytes.len();
        self.window.push(Sent { bytes: len, log });
        self.connection.send(bytes).await?;
        self.context.status.update(|s| {
            s.sent_segments_total += 1;
            s.sent_bytes_total += len as u64;
            s.sent_payload_bytes_total += payload;
        });
        Ok(())
    }

    /// Reads one batch of durable records into the cutter.
    async fn read_log(&mut self) -> Result<bool, SessionError> {
        let durable = self.progress.borrow().durable;
        let durable = durable.min(self.base_due_behind.unwrap_or(durable));
        if self.cutter.next() > durable {
            return Ok(false);
        }
        // A pass waits for what is durable, block by block.
        let hurry = self.pass.is_some();
        let Some(since) = self.follow.read_since(self.now_ns(), hurry) else {
            return Ok(false);
        };
        let batch = self.source.read(durable).await?;
        for record in &batch.records {
            self.note_pass_end(record);
            self.cutter
                .push(batch.anchor, record, since, &mut self.cut)?;
        }
        self.follow.done(self.cutter.next() > durable);
        Ok(!batch.records.is_empty())
    }

    fn note_pass_end(&mut self, record: &Record) {
        if record.meta.op != Op::PassEnd {
            return;
        }
        if let (Some(driven), Ok(body)) = (&mut self.pass, PassEndBody::decode(&record.payload))
            && (body.sink, body.begin) == (self.context.sink, driven.pass.begin())
        {
            driven.phase = Phase::Ending;
        }
    }

    /// Takes the pass one step further.
    async fn drive_pass(&mut self) -> Result<bool, SessionError> {
        let Some(mut driven) = self.pass.take() else {
            return Ok(false);
        };
        let result = self.drive(&mut driven).await;
        self.pass = Some(driven);
        result
    }

    async fn drive(&mut self, driven: &mut Driven) -> Result<bool, SessionError> {
        match driven.phase {
            Phase::Held(until) if self.cutter.next() > until => {
                count_allocated(self.context.port.as_ref(), &mut driven.pass).await?;
                driven.phase = Phase::Sending;
                Ok(true)
            }
            Phase::Sending => match driven.ready.take() {
                Some(ready) if ready.durable_after > self.progress.borrow().durable => {
                    driven.ready = Some(ready);
                    Ok(false)
                }
                Some(ready) => {
                    let payload = ready.sealed.header.payload_bytes;
                    self.send(ready.sealed.bytes, payload, None).await?;
                    Ok(true)
                }
                None => self.read_pass(driven).await,
            },
            Phase::Sent if self.window.pass_segments() == 0 => self.end_pass(driven).await,
            Phase::Held(_) | Phase::Sent | Phase::Ending => Ok(false),
        }
    }

    async fn read_pass(&mut self, driven: &mut Driven) -> Result<bool, SessionError> {
        if self.rate.ready_at_ns() > self.now_ns() {
            return Ok(false);
        }
        let port = &self.context.port;
        match driven.pass.next_step() {
            Step::Ranges(disk, from) => {
                let ranges = port.allocated_ranges(disk, from, PASS_RANGES_MAX).await?;
                driven.ready = driven.pass.take_ranges(ranges.ranges);
            }
            Step::Read(disk, first, count) => {
                let read = port.pass_read(disk, first, count).await?;
                self.rate.take(self.now_ns(), read.data.len() as u64);
                driven.ready = driven.pass.take_read(&read)?;
            }
            Step::Done => driven.phase = Phase::Sent,
        }
        Ok(true)
    }

    /// Every block is durable at the sink: says so in the log, if the sink counts the same.
    async fn end_pass(&mut self, driven: &mut Driven) -> Result<bool, SessionError> {
        let begin = driven.pass.begin();
        let Some(at_sink) = self.active_at_sink.filter(|at| at.begin == begin) else {
            return Ok(false);
        };
        let (blocks, chain) = driven.pass.totals();
        if (at_sink.blocks, at_sink.chain) != (blocks, chain) {
            return Err(SessionError::PassNumbers(begin));
        }
        let body = PassEndBody {
            sink: self.context.sink,
            begin,
            blocks,
            chain,
        };
        // From here on it comes into the log, whatever becomes of this session.
        self.memory.ending = begin;
        self.appending = Some(self.context.port.append(EventRecord {
            op: Op::PassEnd,
            disk: DiskIndex(0),
            first_block: 0,
            block_count: 0,
            aux: 0,
            body: body.encode(),
        }));
        driven.phase = Phase::Ending;
        // It is on its way once it was polled.
        self.append_on().await?;
        Ok(true)
    }

    /// Takes the append one step further, without waiting for it.
    async fn append_on(&mut self) -> Result<(), SessionError> {
        tokio::select! {
            biased;
            appended = appended(&mut self.appending) => appended,
            () = std::future::ready(()) => Ok(()),
        }
    }

    /// Takes an acknowledgement if one is there.
    async fn take_acks(&mut self) -> Result<(), SessionError> {
        let ack = tokio::select! {
            biased;
            ack = self.connection.ack() => ack?,
            () = std::future::ready(()) => return Ok(()),
        };
        self.handle_ack(&ack).await
    }

    async fn handle_ack(&mut self, ack: &Ack) -> Result<(), SessionError> {
        let before = self.window.acked_segments();
        let wall_ns = self.window.ack(ack)?;
        self.active_at_sink = ack.active_pass;
        // One that only tells of a comparison is no progress of shipping.
        self.memory.progressed |= self.window.acked_segments() > before;
        self.context.status.compared(ack.comparisons);
        let complete = ack.completed_pass != Lsn::ZERO && self.base_due_behind.is_none();
        if let Some(driven) = &self.pass
            && driven.pass.begin() == ack.completed_pass
        {
            tracing::info!(sink = %self.context.status.get().url, pass = %ack.completed_pass, "pass complete");
            self.pass = None;
            self.context
                .status
                .update(|s| s.state = SinkState::Streaming);
        }
        if let Some(driven) = &self.pass {
            let begin = driven.pass.begin();
            let is_there = ack.active_pass.is_some_and(|at| at.begin == begin);
            if ack.cursor.lsn >= begin && !is_there {
                return Err(SessionError::PassDropped(begin));
            }
        }
        if let Some(wall_ns) = wall_ns {
            self.context.status.update(|s| {
                s.acked = ack.cursor.lsn;
                s.acked_record_ns = wall_ns;
                if complete {
                    s.restorable_ns = wall_ns;
                }
            });
            self.report(Some(ack.cursor), complete).await?;
        }
        Ok(())
    }

    /// Sleeps until there may be something to do.
    async fn wait(&mut self) -> Result<(), SessionError> {
        let rate = self.waits_for_rate().then(|| self.rate.ready_at_ns());
        let pause = self.follow.pauses_until_ns().filter(|_| self.may_read());
        let deadline = [self.cutter.deadline_ns(), rate, pause]
            .into_iter()
            .flatten()
            .min();
        let at = self.started + Duration::from_nanos(deadline.unwrap_or(0));
        tokio::select! {
            biased;
            ack = self.connection.ack() => {
                let ack = ack?;
                self.handle_ack(&ack).await
            }
            changed = self.progress.changed(), if pause.is_none() => changed.map_err(|_| PortError::Gone.into()),
            () = changes(&mut self.tuning) => Ok(()),
            appended = appended(&mut self.appending) => appended,
            () = tokio::time::sleep_until(at), if deadline.is_some() => Ok(()),
        }
    }

    fn waits_for_rate(&self) -> bool {
        let reading =
            |driven: &Driven| matches!(driven.phase, Phase::Sending) && driven.ready.is_none();
        self.may_read() && self.pass.as_ref().is_some_and(reading)
    }

    fn show(&self) {
        let durable = self.progress.borrow().durable;
        let unacked = self.window.bytes() + self.cutter.open_bytes();
        let pass = self.pass.as_ref().map(|driven| driven.pass.progress());
        let cut = || self.cut.front().map(|segment| segment.first_wall_ns);
        let on_its_way = self.window.first_wall_ns().or_else(cut);
        let outstanding = on_its_way.or_else(|| self.cutter.first_wall_ns());
        self.context.status.update(|s| {
            s.durable = durable;
            s.outstanding_ns = outstanding.unwrap_or(0);
            s.unacked_bytes = unacked as u64;
            s.pass = pass;
        });
    }
}

fn interval_ns(tuning: &Tuning) -> u64 {
    u64::try_from(tuning.ship_interval.as_nanos()).unwrap_or(u64::MAX)
}

/// Waits until what is being appended has its LSN; for ever when nothing is.
async fn appended(
    appending: &mut Option<BoxFuture<'_, Result<Lsn, PortError>>>,
) -> Result<(), SessionError> {
    let Some(append) = appending else {
        return std::future::pending().await;
    };
    let result = append.await;
    *appending = None;
    result?;
    Ok(())
}

/// Waits for other settings; for ever when nobody is left to give them.
async fn changes(tuning: &mut watch::Receiver<Tuning>) {
    if tuning.changed().await.is_err() {
        std::future::pending().await
    }
    // Still to be seen by who asked.
    tuning.mark_changed();
}

/// Adds up what is allocated from the pass's place on, so that its progress can be shown.
async fn count_allocated(port: &dyn GroupPort, pass: &mut Pass) -> Result<(), SessionError> {
    let mut blocks = 0;
    let (first, mut from) = pass.position();
    for disk in first.0..port.identity().disks.len() as u16 {
        loop {
            let allocated = port
                .allocated_ranges(DiskIndex(disk), from, PASS_RANGES_MAX)
                .await?;
            let ranges = allocated.ranges;
            blocks += ranges.iter().map(|r| r.end - r.start).sum::<u64>();
            match ranges.last() {
                Some(last) if last.end > from => from = last.end,
                _ => break,
            }
        }
        from = 0;
    }
    pass.expect_blocks(blocks);
    Ok(())
}

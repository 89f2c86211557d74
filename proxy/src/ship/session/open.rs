//! The opening of a session: hello, the plan that follows from the answer, and its execution up
//! to the point where records flow.

use super::{Context, Memory, SessionError};
use crate::engine::event::EventRecord;
use crate::ship::cutter::{Cutter, Stream};
use crate::ship::pass::Pass;
use crate::ship::port::{GroupIdentity, SinkRecord};
use crate::ship::resume::{
    BaseDue, BaseReason, ChainWalk, Plan, Situation, Verdict, base_due, plan,
};
use crate::ship::sink::{SinkConnection, SinkError};
use crate::ship::source::RecordSource;
use crate::ship::status::SinkState;
use afterimage_format::chain::RecordChain;
use afterimage_format::ids::{DiskIndex, Epoch, Lsn};
use afterimage_format::op::Op;
use afterimage_format::segment::PassBeginBody;
use afterimage_format::wire::{Cursor, ErrorCode, Hello, HelloReply, Resume};

/// Hellos in one session: the first, one that demands an epoch, one with it, and one to spare for
/// a log that went on meanwhile.
const HELLOS_MAX: usize = 4;

/// A session about to stream. The source stands at the cutter's next record.
pub(super) struct Opened {
    pub(super) stream: Stream,
    pub(super) cutter: Cutter,
    /// The sink's cursor.
    pub(super) cursor: Cursor,
    /// The last record that its base is good for, if a new base is due behind it.
    pub(super) base_due_behind: Option<Lsn>,
    pub(super) pass: Option<Pass>,
    /// Before this record was read, the pass must not go on: its end may be in the log already.
    pub(super) pass_held_until: Lsn,
    /// All of the pass was sent; its end is on its way into the log, or in it.
    pub(super) pass_ends: bool,
    /// As in the sink's answer.
    pub(super) resume: Resume,
}

pub(super) async fn open(
    context: &Context,
    memory: &mut Memory,
    connection: &mut dyn SinkConnection,
    source: &mut dyn RecordSource,
) -> Result<Opened, SessionError> {
    let identity = context.port.identity();
    let record = context.port.sink_record(context.sink).await?;
    let mut stored = memory.acked.unwrap_or(record.acked);
    let mut epoch = context.port.progress().borrow().epoch;
    let mut demands_epoch = memory.demands_epoch;
    let first_contact = record.acked.lsn == Lsn::ZERO && stored.lsn == Lsn::ZERO;
    for _ in 0..HELLOS_MAX {
        let hello = Hello {
            group: identity.group,
            name: identity.name.clone(),
            sink: context.sink,
            epoch,
            log: identity.log,
            demands_epoch,
            // A new epoch from another sink does not make this one new.
            acked: if stored.lsn == Lsn::ZERO {
                record.acked
            } else {
                stored
            },
            disks: identity.disks.clone(),
        };
        let reply = connection.hello(hello).await;
        if let Err(SinkError::Refused { cause, .. }) = &reply
            && cause.code == ErrorCode::Fenced
        {
            // A log that this sink has never had: its epoch comes from another sink, whose history
            // has had fewer. It begins a new epoch here, as a log without any would.
            memory.demands_epoch = first_contact && !demands_epoch;
        }
        let reply = reply?;
        // It has answered, whatever it was before.
        context.status.update(|s| s.state = SinkState::Connecting);
        let resume = match reply {
            HelloReply::NewEpoch(new) => {
                if new <= epoch {
                    return Err(SessionError::Answer("a new epoch that is not higher"));
                }
                tracing::info!(group = %identity.name, sink = %context.status.get().url, epoch = %new,
                    "the sink gives a new epoch");
                context.port.set_epoch(new).await?;
                (epoch, stored, demands_epoch) = (new, Cursor::default(), false);
                memory.acked = None;
                memory.demands_epoch = false;
                continue;
            }
            HelloReply::Resume(resume) => resume,
        };
        if resume.epoch != epoch || demands_epoch {
            return Err(SessionError::Answer("another epoch than was said"));
        }
        let opening = Opening {
            context,
            identity: &identity,
            epoch,
            resume,
            record,
        };
        match opening.follow_plan(memory, stored, source).await? {
            Some(opened) => return Ok(opened),
            None => demands_epoch = true,
        }
    }
    Err(SessionError::Answer("no agreement after several hellos"))
}

struct Opening<'a> {
    context: &'a Context,
    identity: &'a GroupIdentity,
    epoch: Epoch,
    resume: Resume,
    /// As the log's superblock says.
    record: SinkRecord,
}

impl Opening<'_> {
    /// `None`: the sink's history is not ours, a new epoch must be demanded.
    async fn follow_plan(
        &self,
        memory: &mut Memory,
        stored: Cursor,
        source: &mut dyn RecordSource,
    ) -> Result<Option<Opened>, SessionError> {
        let progress = *self.context.port.progress().borrow();
        let situation = Situation {
            stored,
            oldest: progress.oldest.max(memory.readable_from),
            durable: progress.durable,
            resume: self.resume,
        };
        if self.resume.cursor.lsn < stored.lsn && stored.chain != RecordChain::BASE {
            self.note_divergence("the sink no longer has records that it had acknowledged");
        }
        let reason = match plan(&situation, self.context.sink) {
            Plan::Continue => return self.go_on(memory, source).await.map(Some),
            Plan::Diverged => return Ok(self.diverged()),
            Plan::NewBase(reason) => reason,
            Plan::Walk(walk) => match self.walk(walk, source).await? {
                Verdict::Same => return self.go_on(memory, source).await.map(Some),
                Verdict::Different => return Ok(self.diverged()),
                Verdict::Unproven => BaseReason::Unproven,
            },
        };
        self.new_base(reason, memory, source).await.map(Some)
    }

    fn diverged(&self) -> Option<Opened> {
        self.note_divergence("the sink has other records than this log");
        None
    }

    fn note_divergence(&self, what: &'static str) {
        tracing::error!(group = %self.identity.name, sink = %self.context.status.get().url,
            ours = %self.context.port.progress().borrow().durable,
            theirs = %self.resume.cursor.lsn, "{what}");
        self.context.status.update(|s| s.divergences_total += 1);
    }

    fn stream(&self) -> Stream {
        Stream {
            group: self.identity.group,
            log: self.identity.log,
            epoch: self.epoch,
        }
    }

    fn disk_bytes(&self) -> Vec<u64> {
        self.identity.disks.iter().map(|d| d.size_bytes).collect()
    }

    fn cutter(&self) -> Cutter {
        let interval = self.context.tuning.borrow().ship_interval.as_nanos();
        let interval = u64::try_from(interval).unwrap_or(u64::MAX);
        Cutter::new(self.stream(), self.resume.cursor, interval)
    }

    async fn walk(
        &self,
        mut walk: ChainWalk,
        source: &mut dyn RecordSource,
    ) -> Result<Verdict, SessionError> {
        if let Some(first) = walk.next() {
            source.seek(first).await?;
        }
        while let Some(next) = walk.next() {
            // Up to the durable bound, not to the walk's end: that may lie within a frame.
            let durable = self.context.port.progress().borrow().durable;
            let batch = source.read(durable).await?;
            batch.records.iter().for_each(|record| walk.step(record));
            if walk.next() == Some(next) {
                return Err(SessionError::Source(
                    crate::ship::source::SourceError::Gone(next),
                ));
            }
        }
        Ok(walk.verdict())
    }

    async fn go_on(
        &self,
        memory: &mut Memory,
        source: &mut dyn RecordSource,
    ) -> Result<Opened, SessionError> {
        let base_due_behind = match base_due(
            &self.resume,
            self.record.rebase_after,
            self.record.good_until,
        ) {
            BaseDue::No => None,
            BaseDue::Behind(last) => Some(last),
            BaseDue::Now => return self.new_base(BaseReason::PastTheLog, memory, source).await,
        };
        let cutter = self.cutter();
        source.seek(cutter.next()).await?;
        let active = self.resume.active_pass.as_ref();
        Ok(Opened {
            stream: self.stream(),
            cutter,
            cursor: self.resume.cursor,
            base_due_behind,
            pass: active.map(|at| Pass::new(self.stream(), &self.disk_bytes(), at)),
            pass_held_until: self.context.port.progress().borrow().appended,
            pass_ends: active.is_some_and(|at| at.begin == memory.ending),
            resume: self.resume,
        })
    }

    async fn new_base(
        &self,
        reason: BaseReason,
        memory: &mut Memory,
        source: &mut dyn RecordSource,
    ) -> Result<Opened, SessionError> {
        let sink = self.context.sink;
        let body = PassBeginBody {
            sink,
            rebases: true,
        };
        let begin = self
            .context
            .port
            .append(EventRecord {
                op: Op::PassBegin,
                disk: DiskIndex(0),
                first_block: 0,
                block_count: 0,
                aux: 0,
                body: body.encode(),
            })
            .await?;
        let url = self.context.status.get().url;
        if reason == BaseReason::Empty {
            tracing::info!(group = %self.identity.name, sink = %url, pass = %begin, "initial pass begins");
        } else {
            tracing::warn!(group = %self.identity.name, sink = %url, pass = %begin, ?reason,
                last = %self.resume.cursor.lsn, "history at the sink gets a gap; a new pass begins");
            self.context.status.update(|s| s.gaps_total += 1);
        }
        let declared = Cursor {
            lsn: Lsn(begin.0.saturating_sub(1)),
            chain: RecordChain::BASE,
        };
        memory.acked = Some(declared);
        self.context
            .port
            .report_acked(sink, declared, false)
            .await?;
        let mut cutter = self.cutter();
        cutter.begin_base(begin);
        source.seek(begin).await?;
        Ok(Opened {
            stream: self.stream(),
            cutter,
            cursor: self.resume.cursor,
            base_due_behind: None,
            pass: Some(Pass::new(
                self.stream(),
                &self.disk_bytes(),
                &Pass::start(begin),
            )),
            pass_held_until: begin,
            pass_ends: false,
            resume: self.resume,
        })
    }
}

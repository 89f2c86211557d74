//! Application-consistent checkpoints of a running group.
//!
//! Owns the wiring of a sequence to the group's log, and what is remembered of freezes. Always
//! holds: a run goes on to its end although nobody waits for its result any more; the result is
//! known before the guest is certainly thawed, but the next run begins only after that.

use afterimage_format::checkpoint::{CheckpointBody, CheckpointKind, CheckpointTrigger};
use afterimage_format::checkpoint_confirm::CheckpointConfirmBody;
use afterimage_format::ids::{DiskIndex, Lsn};
use afterimage_format::names;
use afterimage_format::op::Op;
use afterimage_proxy::checkpoint::intent::IntentFolder;
use afterimage_proxy::checkpoint::run::{Host, Step, run};
use afterimage_proxy::checkpoint::schedule::{Schedule, runs_to_skip};
use afterimage_proxy::checkpoint::sequence::{self, Reason, Report};
use afterimage_proxy::checkpoint::watchdog;
use afterimage_proxy::engine::event::EventRecord;
use afterimage_proxy::worker::GroupHandle;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{oneshot, watch};

use super::group::{CheckpointError, Running};
use super::open::wall_ns;
use super::report;
use crate::api::types::{CheckpointDone, FreezeInfo, NoPoint, StepInfo};
use crate::config::Config;
use crate::freezer::{self, Freezer};
use crate::metrics::FreezeNumbers;
use crate::metrics::families::Buckets;

/// Upper bounds of the histograms, seconds.
const WINDOW_BOUNDS: [f64; 9] = [0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 8.0];
const OWN_BOUNDS: [f64; 8] = [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.05, 0.5];
/// Nobody is frozen when more of the log is occupied: a freeze flushes into it.
const LOG_USED_PERCENT_MAX: u64 = 85;
/// So many failures in a row are an alarm.
const ALARM_FROM: u32 = 3;

/// What is remembered of a group's freezes.
#[derive(Debug, Default)]
pub struct GuestNotes {
    /// Whether there is anything to freeze.
    pub configured: bool,
    /// Confirmed since the start.
    pub confirmed: u64,
    /// Not confirmed since the start.
    pub failed: u64,
    /// Not confirmed since the last that was.
    pub failures_in_a_row: u32,
    /// Why, the last time.
    pub last_reason: Option<String>,
    /// A run has not ended: a guest may be frozen.
    pub maybe_frozen: bool,
    /// Its result is not known yet: all goes its way.
    pub under_way: bool,
    /// Last one that was confirmed, perhaps by an earlier process.
    pub last: Option<CheckpointDone>,
    window: Samples<{ WINDOW_BOUNDS.len() }>,
    own: Samples<{ OWN_BOUNDS.len() }>,
}

#[derive(Debug)]
struct Samples<const N: usize> {
    counts: [u64; N],
    count: u64,
    sum: f64,
}

impl<const N: usize> Default for Samples<N> {
    fn default() -> Self {
        Self {
            counts: [0; N],
            count: 0,
            sum: 0.0,
        }
    }
}

impl<const N: usize> Samples<N> {
    fn add(&mut self, bounds: &[f64; N], value: Option<Duration>) {
        let Some(seconds) = value.map(|value| value.as_secs_f64()) else {
            return;
        };
        if let Some(at) = bounds.iter().position(|bound| seconds <= *bound) {
            self.counts[at] += 1;
        }
        self.count += 1;
        self.sum += seconds;
    }

    fn buckets(&self, bounds: &[f64; N]) -> Buckets {
        Buckets {
            buckets: bounds.iter().copied().zip(self.counts).collect(),
            count: self.count,
            sum: self.sum,
        }
    }
}

impl GuestNotes {
    /// Nothing is known yet but the last one that a process before this one confirmed.
    #[must_use]
    pub fn new(configured: bool, last: Option<CheckpointDone>) -> Self {
        Self {
            configured,
            last,
            ..Self::default()
        }
    }

    fn take(&mut self, report: &Report, done: &CheckpointDone) {
        self.window.add(&WINDOW_BOUNDS, report.times.window());
        self.own.add(&OWN_BOUNDS, report.times.own());
        if report.confirmed {
            self.confirmed += 1;
            self.failures_in_a_row = 0;
            self.last = Some(done.clone());
        } else {
            self.failed += 1;
            self.failures_in_a_row += 1;
            self.last_reason = done.freeze.as_ref().and_then(|f| f.reason.clone());
        }
    }

    /// What an administrator has to look at.
    #[must_use]
    pub fn alarm(&self) -> Option<String> {
        let last = self.last_reason.as_deref().unwrap_or_default();
        if self.maybe_frozen && !self.under_way {
            return Some(format!(
                "the guest may be frozen, thawing it is tried again and again ({last})"
            ));
        }
        let failed = self.failures_in_a_row;
        (failed >= ALARM_FROM)
            .then(|| format!("{failed} application-consistent checkpoints in a row failed: {last}"))
    }

    /// For the metrics.
    #[must_use]
    pub fn numbers(&self) -> Option<FreezeNumbers> {
        self.configured.then(|| FreezeNumbers {
            window: self.window.buckets(&WINDOW_BOUNDS),
            own: self.own.buckets(&OWN_BOUNDS),
            failures_in_a_row: self.failures_in_a_row,
            maybe_frozen: self.maybe_frozen,
        })
    }
}

/// Thaws what a process before this one may have left frozen, beside everything else: the guest may
/// need its disks to answer.
pub(super) fn thaw_left_frozen(config: &Config) {
    let needed = config.groups.iter().any(|group| !group.guest.is_empty());
    if !needed && !config.guest_state.exists() {
        return;
    }
    let listed = IntentFolder::open(&config.guest_state).and_then(|folder| {
        let intents = folder.list()?;
        Ok((folder, intents))
    });
    match listed {
        Ok((folder, intents)) => {
            for intent in intents {
                let folder = folder.clone();
                tokio::spawn(async move { watchdog::thaw(&folder, &intent).await });
            }
        }
        Err(error) => tracing::error!(
            folder = %config.guest_state.display(), %error,
            "whether a guest was left frozen cannot be read"
        ),
    }
}

/// The group's log and host behind a sequence.
struct GroupHost {
    running: Arc<Running>,
    freezer: Freezer,
    body: CheckpointBody,
    wall_ns: Mutex<u64>,
    no_point_at: Vec<NoPoint>,
    /// Whoever wants to see the steps as they happen.
    steps: Option<UnboundedSender<StepInfo>>,
    result: Mutex<Option<oneshot::Sender<CheckpointDone>>>,
}

async fn append(handle: GroupHandle, op: Op, body: Vec<u8>, durable: bool) -> Result<Lsn, String> {
    let record = EventRecord {
        op,
        disk: DiskIndex(0),
        first_block: 0,
        block_count: 0,
        aux: 0,
        body,
    };
    let appended = handle.append_event(record, durable).await;
    appended.map_err(|error| error.to_string())
}

impl Host for GroupHost {
    fn write_intent(&self) -> Step<()> {
        let freezer = self.freezer.clone();
        Box::pin(async move {
            let stored = tokio::task::spawn_blocking(move || freezer.store()).await;
            stored.unwrap_or_else(|error| Err(error.to_string()))
        })
    }

    fn arm_watchdog(&self) -> Step<()> {
        let freezer = self.freezer.clone();
        Box::pin(async move { freezer.arm(Stdio::inherit).await })
    }

    fn freezing(&self) {
        self.freezer.freezing();
    }

    fn alive(&self) {
        self.freezer.alive();
    }

    fn mark(&self) -> Step<Lsn> {
        *self.wall_ns.lock().unwrap_or_else(PoisonError::into_inner) = wall_ns();
        let handle = self.running.handle.clone();
        let body = self.body.encode().map_err(|error| error.to_string());
        Box::pin(async move { append(handle, Op::Checkpoint, body?, false).await })
    }

    fn store(&self, body: CheckpointConfirmBody) -> Step<()> {
        let handle = self.running.handle.clone();
        Box::pin(async move {
            let stored = append(handle, Op::CheckpointConfirm, body.encode(), true).await;
            stored.map(|_| ())
        })
    }

    fn remove_intent(&self) {
        self.freezer.release();
        self.running.notes().guest.maybe_frozen = false;
    }

    fn stepped(&self, step: &sequence::Step) {
        if let Some(steps) = &self.steps {
            // Nobody may look any more.
            steps.send(step_info(step)).ok();
        }
    }

    fn settled(&self, report: Report) {
        let wall_ns = *self.wall_ns.lock().unwrap_or_else(PoisonError::into_inner);
        let done = self.done(&report, wall_ns);
        {
            let mut notes = self.running.notes();
            notes.guest.under_way = false;
            notes.guest.take(&report, &done);
            if done.lsn > 0 {
                notes.note_checkpoint(&done);
                self.running.remember(&done);
            }
        }
        let group = &self.running.config.name;
        match done.freeze.as_ref().and_then(|f| f.reason.as_deref()) {
            None => tracing::info!(%group, lsn = done.lsn, "application-consistent checkpoint"),
            Some(why) => tracing::warn!(%group, lsn = done.lsn, why, "crash-consistent only"),
        }
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(result) = result.take() {
            // Nobody may wait any more.
            result.send(done).ok();
        }
    }
}

impl GroupHost {
    fn done(&self, report: &Report, wall_ns: u64) -> CheckpointDone {
        let ns = |time: Option<Duration>| time.map_or(0, |time| time.as_nanos() as u64);
        let froze = report.times.frozen.is_some();
        let reason = report.reason.as_ref().map(ToString::to_string);
        let unstored = || "its confirmation could not be stored in the log".to_owned();
        CheckpointDone {
            group: self.running.config.name.clone(),
            lsn: report.lsn.map_or(0, |lsn| lsn.0),
            wall_ns,
            label: (!self.body.label.is_empty()).then(|| self.body.label.clone()),
            kind: if report.confirmed {
                "application"
            } else {
                "crash"
            }
            .to_owned(),
            freeze: Some(FreezeInfo {
                frozen: if froze {
                    report.frozen.join(" ")
                } else {
                    String::new()
                },
                skipped: report.skipped.join(" "),
                window_ns: ns(report.times.window()),
                own_ns: ns(report.times.own()),
                reason: (!report.confirmed).then(|| reason.unwrap_or_else(unstored)),
            }),
            no_point_at: self.no_point_at.clone(),
            steps: report.steps.iter().map(step_info).collect(),
        }
    }
}

fn step_info(step: &sequence::Step) -> StepInfo {
    StepInfo {
        at_us: step.at.as_micros() as u64,
        what: step.what.clone(),
    }
}

impl Running {
    /// Freezes the guest, appends a checkpoint, thaws. Returns when it is durable what became of
    /// it; a guest that does not thaw is seen to beyond that.
    ///
    /// # Errors
    /// Nothing was done. Whatever goes wrong later is in the result: the point is there, and says
    /// why it is crash-consistent only.
    pub async fn app_checkpoint(
        self: &Arc<Self>,
        label: Option<&str>,
        trigger: CheckpointTrigger,
        steps: Option<UnboundedSender<StepInfo>>,
    ) -> Result<CheckpointDone, CheckpointError> {
        if self.config.guest.is_empty() {
            return Err(CheckpointError::NoGuest);
        }
        if let Some(label) = label {
            names::validate(label)?;
        }
        let freezer = Freezer::take(&self.guest_state, &self.config);
        let freezer = freezer.map_err(|source| CheckpointError::State {
            path: self.guest_state.clone(),
            source,
        })?;
        let freezer = freezer.ok_or(CheckpointError::Busy)?;
        let mut sequence = freezer::sequence(&self.config);
        if let Ok(snapshot) = self.handle.snapshot().await {
            let engine = snapshot.engine;
            let used_percent = engine.log_bytes_used * 100 / engine.log_bytes.max(1);
            if used_percent > LOG_USED_PERCENT_MAX {
                sequence = sequence.refusing(Reason::LogNearlyFull { used_percent });
            }
        }
        let (result, settled) = oneshot::channel();
        let providers = freezer.providers();
        let host = GroupHost {
            running: Arc::clone(self),
            freezer,
            body: CheckpointBody {
                kind: CheckpointKind::Application,
                trigger,
                label: label.unwrap_or_default().to_owned(),
            },
            wall_ns: Mutex::new(wall_ns()),
            no_point_at: report::no_point_at(self).await,
            steps,
            result: Mutex::new(Some(result)),
        };
        {
            let mut notes = self.notes();
            notes.guest.maybe_frozen = true;
            notes.guest.under_way = true;
        }
        // Not one of the group's tasks: it has to see the thaw through when the group ends.
        tokio::spawn(run(sequence, providers, Arc::new(host)));
        settled.await.map_err(|_| CheckpointError::Broken)
    }

    /// Takes application-consistent checkpoints as the schedule says, until the group ends; less
    /// often while the guest cannot be frozen. A schedule that comes later replaces the one before.
    pub async fn keep_app_schedule(
        self: Arc<Self>,
        mut schedule: watch::Receiver<Option<Schedule>>,
    ) {
        let mut skip = 0;
        loop {
            let due = schedule.borrow_and_update().clone();
            let wait = due.and_then(|due| due.wait_from(&jiff::Zoned::now()));
            let sleep = tokio::time::sleep(wait.unwrap_or_default());
            tokio::select! {
                changed = schedule.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
                () = sleep, if wait.is_some() => {}
            }
            if skip > 0 {
                skip -= 1;
                continue;
            }
            let taken = self
                .app_checkpoint(None, CheckpointTrigger::Schedule, None)
                .await;
            if let Err(error) = taken {
                tracing::warn!(group = %self.config.name, %error, "an application-consistent checkpoint was left out");
            }
            skip = runs_to_skip(self.notes().guest.failures_in_a_row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freeze_that_goes_its_way_is_no_alarm() {
        let mut notes = GuestNotes::new(true, None);
        (notes.maybe_frozen, notes.under_way) = (true, true);
        assert_eq!(notes.alarm(), None);
        notes.under_way = false;
        assert!(notes.alarm().expect("one").contains("may be frozen"));
        notes.maybe_frozen = false;
        notes.failures_in_a_row = ALARM_FROM;
        notes.last_reason = Some("no".into());
        assert!(notes.alarm().expect("one").contains("failed: no"));
    }
}

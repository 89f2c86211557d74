//! One protected group while it runs: recovery, shipping, checkpoints, its end.
//!
//! Owns the group's handle and tasks. Always holds: nothing of a group is served before its log was
//! recovered; a group that was drained leaves its disks marked clean or detached, one that was not
//! leaves them marked attached, and the next start recovers it.

use afterimage_format::checkpoint::{CheckpointBody, CheckpointKind, CheckpointTrigger};
use afterimage_format::ids::{DiskIndex, Lsn};
use afterimage_format::manifest::DiskEntry;
use afterimage_format::names::NameError;
use afterimage_format::op::Op;
use afterimage_format::segment::SinkId;
use afterimage_proxy::checkpoint::schedule::Schedule;
use afterimage_proxy::engine::event::{EngineError, EventRecord};
use afterimage_proxy::engine::recovery::claims::{Leaving, Left, leave};
use afterimage_proxy::engine::recovery::plain::recover_to_plain;
use afterimage_proxy::engine::recovery::replay::ReplayProgress;
use afterimage_proxy::engine::recovery::rewrite::Rewritten;
use afterimage_proxy::engine::recovery::{
    Accepted, LastWrite, RecoveryError, RecoveryInput, RecoveryReport, recover,
};
use afterimage_proxy::engine::{Ack, EngineConfig, OnBackingError, OnLogError};
use afterimage_proxy::io::storage::{StorageParts, UringStorage};
use afterimage_proxy::io::uring::{Uring, UringError};
use afterimage_proxy::ship::Tuning;
use afterimage_proxy::ship::port::GroupIdentity;
use afterimage_proxy::ship::status::{SinkState, StatusCell};
use afterimage_proxy::worker::{GroupEvent, GroupHandle, ProxyHandle, RecoveredGroup, WorkerError};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use super::abandon::abandon_claims;
use super::guest::GuestNotes;
use super::open::{self, Made, OpenDisk, OpenGroup, OpenGroupError, Purpose, wall_ns};
use super::remembered::Remembered;
use super::replace::{ReplaceError, replace_failed_log};
use super::report;
use super::verify::VerifyRun;
use crate::api::types::CheckpointDone;
use crate::config::{Config, GroupConfig, schema};

/// Memory for payloads that are larger than a receive buffer, per group.
const PAYLOAD_BUDGET_BYTES: usize = 128 << 20;

/// Why a group does not run.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// Its files.
    #[error(transparent)]
    Open(#[from] OpenGroupError),
    /// Its recovery.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    /// Its log failed in the last run and could not be replaced.
    #[error(transparent)]
    Replace(#[from] ReplaceError),
    /// No io_uring.
    #[error(transparent)]
    Uring(#[from] UringError),
    /// Its worker.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// Its log.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The thread that recovered it broke.
    #[error("recovery broke off: {0}")]
    Broken(#[from] tokio::task::JoinError),
}

/// Why there is no checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Its label.
    #[error("label: {0}")]
    Label(#[from] NameError),
    /// The group.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Nobody knows how to freeze the guest.
    #[error("how the guest is frozen is not configured: add a [[group.guest]]")]
    NoGuest,
    /// Another freeze or thaw of this group is under way.
    #[error("the guest is being frozen or thawed already; 'status' shows when that is over")]
    Busy,
    /// The folder of intents.
    #[error("guest_state {}: {source}", path.display())]
    State {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The task that took it broke.
    #[error("the checkpoint broke off")]
    Broken,
}

/// A target of a group.
#[derive(Debug, Clone)]
pub struct TargetTask {
    /// Its URL.
    pub url: String,
    /// What shipping says.
    pub status: StatusCell,
    /// Its identity in the superblock.
    pub sink: SinkId,
    /// Settings of shipping that change while it runs.
    pub tuning: watch::Sender<Tuning>,
}

impl TargetTask {
    /// Nothing waits to be joined by more any longer: the group ends.
    pub fn hurry(&self) {
        self.tuning
            .send_modify(|tuning| tuning.ship_interval = Duration::ZERO);
    }
}

/// Something that is known beside what the engine counts.
#[derive(Debug, Default)]
pub struct Notes {
    /// Last checkpoint.
    pub last_checkpoint: Option<CheckpointDone>,
    /// Last crash-consistent one.
    pub last_crash: Option<CheckpointDone>,
    /// Checkpoints by result.
    pub checkpoints_ok: u64,
    /// Checkpoints that failed.
    pub checkpoints_failed: u64,
    /// What is known about the guest's freezes.
    pub guest: GuestNotes,
    /// Errors by kind.
    pub errors: ErrorCounts,
    /// The log failed with this errno.
    pub log_failed: Option<i32>,
    /// A backing fails with this errno.
    pub backing_failing: Option<(String, i32)>,
    /// The group runs without a log.
    pub detached: bool,
    /// A verify is due, and why.
    pub verify_due: Option<&'static str>,
    /// What is missing at each target, in their order.
    pub gaps: Vec<GapClock>,
    /// How each target keeps up, in their order.
    pub paces: Vec<Pace>,
    /// Targets whose gap was told.
    pub gaps_told: HashSet<SinkId>,
    /// Times that records left the log before a target had them.
    pub gap_events: u64,
    /// Bytes per second written lately.
    pub write_rate: u64,
    /// Bytes written at the last look.
    pub written_before: u64,
    /// Bytes per second that came into the log lately: headers and blocks that were written in part
    /// count whole.
    pub log_rate: u64,
    /// Bytes that had come into the log at the last look.
    pub logged_before: u64,
    /// Newest and oldest record of the log at the last look.
    looked_at: Option<(Lsn, Lsn)>,
}

impl Notes {
    /// A checkpoint was taken.
    pub fn note_checkpoint(&mut self, done: &CheckpointDone) {
        self.last_checkpoint = Some(done.clone());
        if done.kind == "crash" {
            self.last_crash = Some(done.clone());
        }
    }
}

/// Errors since the start.
#[derive(Debug, Clone, Copy, Default)]
pub struct ErrorCounts {
    /// The log failed.
    pub log: u64,
    /// A backing began to fail.
    pub backing: u64,
    /// Gaps: records left the log before a target had them. One that grows is one.
    pub history_gap: u64,
}

/// How long a target may take for a record beyond the interval at which it is shipped: longer than
/// a session that begins anew, or a burst.
const KEEPS_UP_WITHIN: Duration = Duration::from_secs(10);

/// Whether a connected target keeps up with what is written.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pace {
    /// The newest record at some moment, until the target has it.
    mark: Option<(Lsn, Instant)>,
    /// It takes too long for a record.
    pub behind: bool,
    /// Wall clock when it was last seen to have everything, nanoseconds since 1970.
    pub had_all_ns: u64,
    /// Bytes of the log that it lacked at the last look.
    backlog: u64,
    /// Bytes per second by which that has grown lately.
    pub growth: u64,
}

impl Pace {
    /// The target takes records if `connected`, and has them up to `acked`; `appended` is the newest
    /// and `interval` the one at which they are shipped.
    pub fn look(
        &mut self,
        connected: bool,
        acked: Lsn,
        appended: Lsn,
        interval: Duration,
        now: Instant,
    ) {
        if !connected || acked >= appended {
            (self.mark, self.behind) = (None, false);
            return;
        }
        let (lsn, since) = *self.mark.get_or_insert((appended, now));
        let late = now.saturating_duration_since(since) > interval * 2 + KEEPS_UP_WITHIN;
        if acked >= lsn {
            (self.mark, self.behind) = (Some((appended, now)), late);
        } else {
            self.behind |= late;
        }
    }

    /// At this moment, or later, the target has records up to `acked`; `appended` was the newest then.
    fn vouch(&mut self, state: SinkState, acked: Lsn, appended: Lsn, seen_ns: u64) {
        if state == SinkState::Streaming && acked >= appended {
            self.had_all_ns = seen_ns;
        }
    }

    /// What the target lacks of the log after so many more seconds.
    pub fn count(&mut self, backlog: u64, seconds: u64) {
        let now = backlog.saturating_sub(self.backlog) / seconds;
        self.growth = u64::midpoint(self.growth, now);
        self.backlog = backlog;
    }
}

/// How much time of a group's history a target lacks.
#[derive(Debug, Clone, Copy, Default)]
pub struct GapClock {
    /// In gaps that are closed.
    closed_ns: u64,
    /// When the open one began.
    since_ns: Option<u64>,
}

impl GapClock {
    /// Whether there is a gap now; the last moment that the target could restore before it. Gives
    /// the time in all gaps so far.
    pub fn look(&mut self, gap: bool, restorable_ns: Option<u64>, now_ns: u64) -> u64 {
        match (gap, self.since_ns) {
            (true, None) => self.since_ns = Some(restorable_ns.unwrap_or(now_ns).min(now_ns)),
            (false, Some(since)) => {
                self.closed_ns += now_ns.saturating_sub(since);
                self.since_ns = None;
            }
            _ => {}
        }
        let open = self
            .since_ns
            .map_or(0, |since| now_ns.saturating_sub(since));
        self.closed_ns + open
    }
}

/// A running group.
#[derive(Debug)]
pub struct Running {
    /// As configured.
    pub config: GroupConfig,
    /// Its worker's end.
    pub handle: GroupHandle,
    /// Its disks.
    pub disks: Vec<OpenDisk>,
    /// Its targets.
    pub targets: Vec<TargetTask>,
    /// Its ring file.
    pub ring_path: PathBuf,
    /// Folder of the intents to freeze.
    pub guest_state: PathBuf,
    /// The newest comparison of its disks with its targets.
    pub verify: VerifyRun,
    /// Recovery's words.
    pub report: RecoveryReport,
    /// What recovery was told.
    input: RecoveryInput,
    schedule: watch::Sender<Option<Schedule>>,
    app_schedule: watch::Sender<Option<Schedule>>,
    notes: Mutex<Notes>,
    remembered: Arc<Remembered>,
    tasks: Mutex<JoinSet<()>>,
}

/// Opens and recovers a group and gives it to a worker.
///
/// # Errors
/// Why it does not run; its files are as recovery says.
pub async fn start(
    config: &Arc<Config>,
    group: &GroupConfig,
    accepted: Accepted,
    workers: &ProxyHandle,
) -> Result<Running, GroupError> {
    let (shared, own) = (Arc::clone(config), group.clone());
    let recovering = tokio::task::spawn_blocking(move || recover_group(&shared, &own, accepted));
    let Recovered {
        group: recovered,
        disks,
        report,
        input,
    } = recovering.await??;
    tracing::info!(
        group = %group.name,
        log_end = ?report.log_end,
        frames_from_ring = report.ring_frames,
        frames_in_log = report.log_frames,
        verify_due = report.verify_due,
        "recovered"
    );
    let ring_path = open::ring_path(config, &group.name, recovered.identity.group);
    let remembered = Remembered::of(group, recovered.identity.group);
    let last = remembered.last();
    let handle = workers.add_group(recovered).await?;
    Ok(Running {
        config: group.clone(),
        handle,
        disks,
        targets: Vec::new(),
        ring_path,
        guest_state: config.guest_state.clone(),
        verify: VerifyRun::default(),
        report,
        input,
        schedule: watch::Sender::new(None),
        app_schedule: watch::Sender::new(None),
        notes: Mutex::new(Notes {
            guest: GuestNotes::new(!group.guest.is_empty(), last.application.clone()),
            last_checkpoint: last.newest().cloned(),
            last_crash: last.crash,
            verify_due: report
                .verify_due
                .then_some("the group was not stopped cleanly before this start, or nobody can tell whether a disk was written while it was stopped"),
            ..Notes::default()
        }),
        remembered,
        tasks: Mutex::new(JoinSet::new()),
    })
}

/// A group ready for a worker, and what is kept of its recovery.
struct Recovered {
    group: RecoveredGroup,
    disks: Vec<OpenDisk>,
    report: RecoveryReport,
    input: RecoveryInput,
}

/// Blocking: opens, recovers.
fn recover_group(
    config: &Config,
    group: &GroupConfig,
    accepted: Accepted,
) -> Result<Recovered, GroupError> {
    let uring = Uring::new()?;
    let OpenGroup {
        parts,
        mut input,
        ring,
        made,
        disks,
        ..
    } = open::open(config, group, accepted, Purpose::Serve)?;
    let mut storage = UringStorage::new(&uring, parts);
    let recovered = match recover(&mut storage, &input) {
        Err(RecoveryError::LogFailed { .. }) => {
            replace_failed_log(&mut storage, &mut input, group, None)
                .map_err(GroupError::from)
                .and_then(|_| Ok(recover(&mut storage, &input)?))
        }
        other => other.map_err(GroupError::from),
    };
    let recovered = match recovered {
        Ok(recovered) => recovered,
        Err(error) => {
            refused(storage.into_parts(), ring.1, &made);
            return Err(error);
        }
    };
    let report = *recovered.report();
    let start = recovered.into_start();
    let parts = storage.into_parts().ok_or(WorkerError::Gone)?;
    let mut table: Vec<DiskEntry> = Vec::new();
    for state in &start.superblock.disks {
        let open = disks.iter().find(|disk| disk.id == state.id);
        table.push(DiskEntry {
            disk: state.id,
            name: open.map_or_else(|| format!("removed-{}", table.len()), |d| d.name.clone()),
            size_bytes: state.size,
        });
    }
    let claims: Vec<PathBuf> = open::claim_paths(group);
    let recovered = RecoveredGroup {
        identity: GroupIdentity {
            group: start.superblock.group,
            name: group.name.clone(),
            log: start.superblock.log,
            disks: table,
        },
        parts,
        start,
        config: engine_config(group),
        payload_budget_bytes: PAYLOAD_BUDGET_BYTES,
        detach_marker: Arc::new(move || abandon_claims(&claims)),
    };
    Ok(Recovered {
        group: recovered,
        disks,
        report,
        input,
    })
}

/// Takes back what was made for a group that is not served after all.
fn refused(parts: Option<StorageParts>, ring_is_new: bool, made: &Made) {
    // With its parts, a storage gives up its locks: none of them is free before this is done.
    let Some(mut parts) = parts else { return };
    made.take_back();
    if let Some(ring) = parts.ring.take_if(|_| ring_is_new) {
        // Ours and empty: it must not be taken for one that was lost and found.
        let _ = ring.remove();
    }
}

fn engine_config(group: &GroupConfig) -> EngineConfig {
    EngineConfig {
        ack: match group.ack {
            Some(schema::Ack::Durable) => Ack::Durable,
            Some(schema::Ack::Ring) | None => Ack::Ring,
        },
        on_log_error: match group.on_log_error {
            schema::OnLogError::Fail => OnLogError::Fail,
            schema::OnLogError::Detach => OnLogError::Detach,
        },
        on_backing_error: match group.on_backing_error {
            schema::OnBackingError::Retry => OnBackingError::Retry,
            schema::OnBackingError::Fail => OnBackingError::Fail,
        },
        commit_interval_ns: group.commit_interval.as_nanos() as u64,
        ..EngineConfig::default()
    }
}

impl Running {
    /// What is known beside the engine's numbers.
    pub fn notes(&self) -> std::sync::MutexGuard<'_, Notes> {
        // Counters and words: nothing is half-done when somebody panics.
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing can have changed since the last call that counting its writes or timing its
    /// gaps would show: no record came or left, no rate falls, no gap is open. Wakes nobody.
    pub fn rests(&self) -> bool {
        let log = *self.handle.progress().borrow();
        let log = (log.appended, log.oldest);
        let mut notes = self.notes();
        let still = notes.looked_at.replace(log) == Some(log);
        let without_log = notes.detached || notes.log_failed.is_some();
        let open = notes.gaps.iter().any(|gap| gap.since_ns.is_some());
        still && notes.write_rate == 0 && notes.log_rate == 0 && !open && !without_log
    }

    /// Runs beside the group and ends with it.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that have ended leave no trace.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task)
    }

    /// Ends shipping and schedules.
    pub fn stop_tasks(&self) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.abort_all();
    }

    /// The disk of this name.
    #[must_use]
    pub fn disk(&self, name: &str) -> Option<&OpenDisk> {
        self.disks.iter().find(|disk| disk.name == name)
    }

    /// The disk at this place of the table.
    #[must_use]
    pub fn disk_at(&self, index: DiskIndex) -> Option<&OpenDisk> {
        self.disks.iter().find(|disk| disk.index == index)
    }

    /// Appends a crash-consistent checkpoint; durable in the log when this returns.
    ///
    /// # Errors
    /// The log has failed, or the group ends.
    pub async fn checkpoint(
        &self,
        label: Option<&str>,
        trigger: CheckpointTrigger,
    ) -> Result<CheckpointDone, CheckpointError> {
        let body = CheckpointBody {
            kind: CheckpointKind::Crash,
            trigger,
            label: label.unwrap_or_default().to_owned(),
        };
        let record = EventRecord {
            op: Op::Checkpoint,
            disk: DiskIndex(0),
            first_block: 0,
            block_count: 0,
            aux: 0,
            body: body.encode()?,
        };
        let wall_ns = open::wall_ns();
        let appended = self.handle.append_event(record, true).await;
        let no_point_at = report::no_point_at(self).await;
        let mut notes = self.notes();
        match appended {
            Ok(lsn) => {
                let done = CheckpointDone {
                    group: self.config.name.clone(),
                    lsn: lsn.0,
                    wall_ns,
                    label: label.map(str::to_owned),
                    kind: "crash".to_owned(),
                    no_point_at,
                    ..CheckpointDone::default()
                };
                notes.checkpoints_ok += 1;
                notes.note_checkpoint(&done);
                self.remembered.note(&done);
                Ok(done)
            }
            Err(error) => {
                notes.checkpoints_failed += 1;
                Err(error.into())
            }
        }
    }

    /// Keeps a checkpoint of a frozen guest for the next process.
    pub(super) fn remember(&self, done: &CheckpointDone) {
        self.remembered.note(done);
    }

    /// What the target with this URL could restore last, if it ever had a complete copy (0: not
    /// known).
    #[must_use]
    pub fn restorable(&self, target: &TargetTask) -> Option<u64> {
        match target.status.get().restorable_ns {
            0 => self.remembered.restorable(&target.url),
            known => Some(known),
        }
    }

    /// Wall clock when the target was last seen to have everything; 0 if it never was.
    pub fn had_all_ns(&self, target: &TargetTask) -> u64 {
        let notes = self.notes();
        let mut paces = self.targets.iter().zip(&notes.paces);
        let pace = paces.find(|(of, _)| of.sink == target.sink);
        pace.map_or(0, |(_, pace)| pace.had_all_ns)
    }

    /// The target has a complete copy; the moment it can restore, if that is known, is kept for the
    /// next process.
    pub(super) fn note_restorable(&self, target: &TargetTask) {
        let moment = target.status.get().restorable_ns;
        self.remembered.note_restorable(&target.url, moment);
    }

    /// How the targets keep up, and what they can restore. Wakes nobody.
    pub fn look_at_targets(&self) {
        // Before: what is written meanwhile came later.
        let seen_ns = wall_ns();
        let appended = self.handle.progress().borrow().appended;
        let now = Instant::now();
        let mut notes = self.notes();
        notes.paces.resize_with(self.targets.len(), Pace::default);
        for (pace, target) in notes.paces.iter_mut().zip(&self.targets) {
            let ship = target.status.get();
            let connected = matches!(ship.state, SinkState::Streaming | SinkState::Pass);
            let interval = target.tuning.borrow().ship_interval;
            pace.look(connected, ship.acked, appended, interval, now);
            pace.vouch(ship.state, ship.acked, appended, seen_ns);
            if ship.restorable_ns > 0 {
                self.note_restorable(target);
            }
        }
    }

    /// Takes notes of what happens to the group, until it ends.
    pub async fn watch_events(self: Arc<Self>) {
        let Some(mut events) = self.handle.take_events() else {
            return;
        };
        while let Some(event) = events.recv().await {
            self.note_event(event);
        }
    }

    fn note_event(&self, event: GroupEvent) {
        let group = &self.config.name;
        let mut notes = self.notes();
        match event {
            GroupEvent::LogFailed { errno } => {
                tracing::error!(%group, errno, "the log failed: nothing more becomes durable in it");
                notes.log_failed = Some(errno);
                notes.errors.log += 1;
            }
            GroupEvent::Detached => {
                tracing::error!(%group, "the group runs without a log from now on");
                notes.detached = true;
            }
            GroupEvent::BackingFailing { disk, errno } => {
                let disk = self.disks.iter().find(|of| of.index == disk);
                let disk = disk.map_or_else(String::new, |of| {
                    format!("{} ({})", of.name, of.path.display())
                });
                let error = std::io::Error::from_raw_os_error(errno);
                tracing::error!(%group, disk, %error, "a backing fails; it is tried again");
                notes.backing_failing = Some((disk, errno));
                notes.errors.backing += 1;
            }
            GroupEvent::BackingRecovered => {
                tracing::info!(%group, "all backings work again");
                notes.backing_failing = None;
            }
            GroupEvent::HistoryGap { sink, lsn } => {
                notes.gap_events += 1;
                if !notes.gaps_told.insert(sink) {
                    return;
                }
                let target = self.targets.iter().find(|target| target.sink == sink);
                let had_copy = target.is_some_and(|target| self.restorable(target).is_some());
                let target = target.map_or("?", |target| target.url.as_str());
                if !had_copy {
                    tracing::warn!(%group, target, %lsn, "unshipped records left the log before the first copy was complete: it begins anew");
                    return;
                }
                tracing::warn!(%group, target, %lsn, "unshipped records left the log: history has a gap, a new pass is due");
                notes.errors.history_gap += 1;
            }
        }
    }

    /// Takes checkpoints as the schedule says, and as another one says that comes later, until the
    /// group ends.
    pub async fn keep_schedule(self: Arc<Self>, mut schedule: watch::Receiver<Option<Schedule>>) {
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
            if let Err(error) = self.checkpoint(None, CheckpointTrigger::Schedule).await {
                tracing::warn!(group = %self.config.name, %error, "a scheduled checkpoint failed");
            }
        }
    }

    /// From now on checkpoints are taken as these schedules say: crash-consistent ones, and
    /// application-consistent ones.
    pub fn set_schedules(&self, plain: Option<Schedule>, app: Option<Schedule>) {
        self.schedule.send_replace(plain);
        self.app_schedule.send_replace(app);
    }

    /// Whoever is to keep the schedule of crash-consistent checkpoints.
    #[must_use]
    pub fn schedule(&self) -> watch::Receiver<Option<Schedule>> {
        self.schedule.subscribe()
    }

    /// Whoever is to keep the other one.
    #[must_use]
    pub fn app_schedule(&self) -> watch::Receiver<Option<Schedule>> {
        self.app_schedule.subscribe()
    }

    /// Everything into the backings, connections closed, files closed and unlocked. Whether it was
    /// drained.
    pub async fn end(&self) -> Result<(), EngineError> {
        let drained = self.handle.drain().await;
        drop(self.close().await);
        drained
    }

    /// Connections closed; the ring and the files, drained or not, open and locked until they are
    /// dropped.
    pub async fn close(&self) -> Option<StorageParts> {
        self.stop_tasks();
        self.handle.remove().await
    }

    /// Marks the disks as left clean; for a group that was drained and closed. Blocking. Nobody else
    /// had the files since the group had them: `left` are still locked.
    ///
    /// # Errors
    /// The marks could not be made: the next start finds the disks attached and says a verify is
    /// due.
    pub fn leave_clean(&self, left: StorageParts) -> Result<Left, GroupError> {
        let paths = backing_paths(&self.disks);
        let uring = Uring::new()?;
        let mut storage = UringStorage::new(&uring, left);
        let last_write = |disk: DiskIndex| last_write_to(&paths, disk);
        for target in &self.targets {
            if target.status.get().restorable_ns > 0 {
                self.note_restorable(target);
            }
        }
        self.remembered.store_at_the_end();
        Ok(leave(
            &mut storage,
            &self.input,
            Leaving::Clean,
            &last_write,
        )?)
    }
}

/// Brings the disks of a group that does not run up to its log and lets go of them. `progress` is told
/// how far that is.
///
/// # Errors
/// What recovery says; can be repeated.
pub fn make_plain(
    config: &Config,
    group: &GroupConfig,
    accepted: Accepted,
    progress: &mut dyn FnMut(ReplayProgress),
) -> Result<(RecoveryReport, Vec<PathBuf>), GroupError> {
    let uring = Uring::new()?;
    let mut open = open::open(config, group, accepted, Purpose::Leave)?;
    let paths = backing_paths(&open.disks);
    let mut storage = UringStorage::new(&uring, open.parts);
    let last_write = |disk: DiskIndex| last_write_to(&paths, disk);
    let report = match recover_to_plain(&mut storage, &open.input, &last_write, progress) {
        Err(RecoveryError::LogFailed { .. }) => {
            let replaced = replace_failed_log(&mut storage, &mut open.input, group, None);
            let again = |_| {
                Ok(recover_to_plain(
                    &mut storage,
                    &open.input,
                    &last_write,
                    progress,
                )?)
            };
            replaced.map_err(GroupError::from).and_then(again)
        }
        other => other.map_err(GroupError::from),
    };
    let parts = storage.into_parts();
    match report {
        Ok(report) => {
            // The ring is of no more use to anybody.
            if let Some(ring) = parts.and_then(|parts| parts.ring) {
                let _ = ring.remove();
            }
            Ok((report, paths.into_values().collect()))
        }
        Err(error) => {
            refused(parts, open.ring.1, &open.made);
            Err(error)
        }
    }
}

/// Writes what a group's failed log lacks to a new one at `target`, for when it cannot have the old
/// one's place. The group must not run; afterwards its `log.path` is to name the new log.
///
/// # Errors
/// What [`replace_failed_log`] says; can be repeated.
pub fn move_failed_log(
    config: &Config,
    group: &GroupConfig,
    accepted: Accepted,
    target: &Path,
) -> Result<Rewritten, GroupError> {
    let uring = Uring::new()?;
    let mut open = open::open(config, group, accepted, Purpose::Leave)?;
    let mut storage = UringStorage::new(&uring, open.parts);
    let moved = replace_failed_log(&mut storage, &mut open.input, group, Some(target));
    refused(storage.into_parts(), open.ring.1, &open.made);
    Ok(moved?)
}

fn backing_paths(disks: &[OpenDisk]) -> HashMap<u16, PathBuf> {
    let pair = |disk: &OpenDisk| (disk.index.0, disk.path.clone());
    disks.iter().map(pair).collect()
}

fn last_write_to(paths: &HashMap<u16, PathBuf>, disk: DiskIndex) -> LastWrite {
    let path = paths.get(&disk.0);
    path.map_or(LastWrite::default(), |path| open::last_write(path))
}

#[cfg(test)]
mod tests {
    use super::{GapClock, KEEPS_UP_WITHIN, Pace, SinkState, engine_config};
    use crate::config::Config;
    use afterimage_format::ids::Lsn;
    use afterimage_proxy::engine::Ack;
    use std::time::{Duration, Instant};

    #[test]
    fn a_group_answers_from_its_ring_unless_told_otherwise() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("afterimage.toml");
        for (line, wanted) in [
            ("", Ack::Ring),
            ("ack = \"ring\"", Ack::Ring),
            ("ack = \"durable\"", Ack::Durable),
        ] {
            let disk = "[[group.disk]]\nname = \"vda\"\npath = \"/a\"\n";
            let text = format!("[[group]]\nname = \"vm1\"\n{line}\n{disk}");
            std::fs::write(&file, text).expect("written");
            let config = Config::load(Some(&file)).expect("valid");
            assert_eq!(engine_config(&config.groups[0]).ack, wanted, "{line}");
        }
    }

    #[test]
    fn a_target_is_known_to_have_all_only_while_it_takes_records() {
        let mut pace = Pace::default();
        let mut vouched = |state, acked, appended, now| {
            pace.vouch(state, Lsn(acked), Lsn(appended), now);
            pace.had_all_ns
        };
        assert_eq!(vouched(SinkState::Streaming, 4, 5, 10), 0, "it lacks one");
        assert_eq!(vouched(SinkState::Streaming, 5, 5, 20), 20);
        assert_eq!(
            vouched(SinkState::Streaming, 5, 6, 30),
            20,
            "it lacks one again"
        );
        assert_eq!(
            vouched(SinkState::Waiting, 6, 6, 40),
            20,
            "who knows what it has"
        );
        assert_eq!(
            vouched(SinkState::Pass, 6, 6, 50),
            20,
            "its copy is not whole"
        );
    }

    #[test]
    fn a_target_is_behind_while_it_takes_long_for_a_record() {
        let start = Instant::now();
        let mut pace = Pace::default();
        let mut look = |connected, acked, appended, seconds| {
            let now = start + Duration::from_secs(seconds);
            pace.look(connected, Lsn(acked), Lsn(appended), Duration::ZERO, now);
            pace.behind
        };
        let long = KEEPS_UP_WITHIN.as_secs() + 1;
        for tick in 0..100 {
            let newest = 100 * (tick + 1);
            assert!(!look(true, newest - 99, newest, 2 * tick), "a bit late");
        }
        assert!(!look(true, 10_000, 10_000, 199), "a rest");
        assert!(!look(true, 9_901, 10_000, 300), "after it");
        assert!(!look(true, 9_901, 20_000, 301), "it stands still");
        assert!(look(true, 9_901, 20_000, 301 + long), "for long");
        assert!(look(true, 10_000, 30_000, 302 + long), "it crawls on");
        assert!(look(true, 15_000, 30_000, 303 + long), "not there yet");
        assert!(!look(true, 30_000, 30_000, 304 + long), "all is there");
        assert!(!look(true, 30_000, 30_001, 305 + long), "more came");
        assert!(look(true, 30_000, 30_001, 306 + 2 * long), "and stays");
        assert!(!look(false, 30_000, 30_001, 307 + 2 * long), "away");
    }

    #[test]
    fn a_backlog_that_shrinks_does_not_grow() {
        let mut pace = Pace::default();
        pace.count(4000, 2);
        assert_eq!(pace.growth, 1000);
        pace.count(3000, 2);
        pace.count(2000, 2);
        assert_eq!(pace.growth, 250);
    }

    #[test]
    fn gaps_add_up_and_never_shrink() {
        let mut clock = GapClock::default();
        assert_eq!(clock.look(false, Some(50), 100), 0);
        assert_eq!(clock.look(true, Some(90), 100), 10, "from the last moment");
        assert_eq!(clock.look(true, Some(90), 150), 60);
        assert_eq!(clock.look(false, Some(155), 160), 70, "closed");
        assert_eq!(clock.look(false, None, 900), 70);
        assert_eq!(clock.look(true, None, 1000), 70, "nothing known: from now");
        assert_eq!(clock.look(true, None, 1005), 75);
    }
}

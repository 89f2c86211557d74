//! Comparing a group's disks with what its targets hold, while it runs.
//!
//! Owns the newest run of a group: its records on their way into the log, then the wait for what the
//! targets say of them. One at a time. Dies with the group; the next start knows nothing of it.

use afterimage_format::ids::Lsn;
use afterimage_format::wire::Compared;
use afterimage_proxy::ship::status::{SinkState, SinkStatus};
use afterimage_proxy::verify::{Surroundings, VerifyProgress, run};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::group::Running;
use crate::api::types::{ComparedStatus, VerifyStatus};

const BLOCK: u64 = 4096;
/// How often it is looked what the targets say.
const LOOK: Duration = Duration::from_millis(200);
/// While a target is not in step a run waits when the log is fuller than this.
const LOG_FILL_PERCENT_MAX: u8 = 50;

/// The newest run of a group.
#[derive(Debug, Default)]
pub struct VerifyRun(Mutex<Option<Newest>>);

#[derive(Debug)]
struct Newest {
    progress: watch::Receiver<VerifyProgress>,
    failed: watch::Receiver<Option<String>>,
    task: AbortHandle,
}

/// Why no run begins.
#[derive(Debug, thiserror::Error)]
pub(super) enum VerifyError {
    /// One at a time.
    #[error(
        "its disks are being read for a comparison already; 'afterimage status' shows how far that is"
    )]
    Busy,
    /// Nobody to compare with.
    #[error("it has no target: there is nothing to compare its disks with")]
    NoTarget,
    /// A log that failed takes no records.
    #[error(
        "its log has failed, and what is to be compared goes through the log: see docs/operating.md, \"The log failed\""
    )]
    LogFailed,
}

impl VerifyRun {
    fn newest(&self) -> std::sync::MutexGuard<'_, Option<Newest>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far the newest run is.
    pub(super) fn status(&self) -> Option<VerifyStatus> {
        let newest = self.newest();
        let newest = newest.as_ref()?;
        let progress = *newest.progress.borrow();
        Some(VerifyStatus {
            run: progress.run,
            done_bytes: progress.blocks_done * BLOCK,
            total_bytes: progress.blocks_total * BLOCK,
            ranges: progress.records,
            waiting: progress.waiting,
            over: progress.over,
            failed: newest.failed.borrow().clone(),
        })
    }
}

/// Begins a run.
///
/// # Errors
/// Another is under way, or it can come to nothing.
pub(super) async fn begin(group: &Arc<Running>) -> Result<VerifyStatus, VerifyError> {
    if group.targets.is_empty() {
        return Err(VerifyError::NoTarget);
    }
    {
        let notes = group.notes();
        if notes.detached || notes.log_failed.is_some() {
            return Err(VerifyError::LogFailed);
        }
    }
    let run = {
        let mut newest = group.verify.newest();
        if let Some(before) = newest.as_ref() {
            let over = before.progress.borrow().over
                || before.failed.borrow().is_some()
                || before.task.is_finished();
            if !over {
                return Err(VerifyError::Busy);
            }
            before.task.abort();
        }
        let (progress, shown) = watch::channel(VerifyProgress::default());
        let (failed, said) = watch::channel(None);
        let working = Arc::clone(group);
        let task = group.spawn(async move {
            if let Err(error) = describe(&working, draw(), &progress).await {
                tracing::error!(group = %working.config.name, %error, "a comparison broke off");
                failed.send_replace(Some(error.to_string()));
                return;
            }
            let VerifyProgress { run, last, .. } = *progress.borrow();
            answers(&working, run, last).await;
        });
        *newest = Some(Newest {
            progress: shown.clone(),
            failed: said,
            task,
        });
        shown
    };
    // The run has a number as soon as it has begun.
    let mut run = run;
    let _ = run.wait_for(|progress| progress.blocks_total > 0).await;
    tracing::info!(group = %group.config.name, run = %run.borrow().run, "comparing the disks with the targets");
    Ok(group.verify.status().unwrap_or_default())
}

/// Identity of a run: random, and small enough for every reader of JSON.
fn draw() -> u64 {
    (uuid::Uuid::new_v4().as_u64_pair().0 >> 11).max(1)
}

async fn describe(
    group: &Running,
    run_id: u64,
    progress: &watch::Sender<VerifyProgress>,
) -> Result<(), afterimage_proxy::verify::VerifyError> {
    let log = group.handle.progress();
    let acked = || {
        // One that is away must not lose its place in the log by what is only to be compared.
        let all_in_step = in_step(group).count() == group.targets.len();
        let room = all_in_step || log.borrow().log_fill_percent < LOG_FILL_PERCENT_MAX;
        room.then(|| in_step(group).map(|status| status.acked).min())?
    };
    let rate = || {
        let target = group.targets.first()?;
        target.tuning.borrow().pass_bytes_per_second
    };
    let around = Surroundings {
        run: run_id,
        acked: &acked,
        bytes_per_second: &rate,
        progress,
    };
    run(&group.handle, &around).await
}

/// Targets that have a complete copy and take records.
fn in_step(group: &Running) -> impl Iterator<Item = SinkStatus> + '_ {
    let all = group.targets.iter().map(|target| target.status.get());
    all.filter(|status| status.state == SinkState::Streaming)
}

/// Waits until every target has said what it found; then a verify that was due is done, if none of
/// them found a difference. One that is away is waited for.
async fn answers(group: &Running, run: u64, last: Lsn) {
    loop {
        tokio::time::sleep(LOOK).await;
        let said = group
            .targets
            .iter()
            .map(|target| target.status.get().of_run(run, last));
        let Some(said) = said.collect::<Option<Vec<_>>>() else {
            continue;
        };
        let whole = said.iter().all(Compared::is_whole);
        tracing::info!(group = %group.config.name, run, whole, "the targets have compared");
        if whole {
            group.notes().verify_due = None;
        }
        return;
    }
}

impl VerifyRun {
    /// What a target says of the newest run of this process, else of the last that it knows.
    pub(super) fn at(&self, target: &SinkStatus) -> Option<ComparedStatus> {
        let newest = self.newest();
        let newest = newest.as_ref().map(|newest| *newest.progress.borrow());
        let said = match newest {
            None => Some(target.comparisons.finished).filter(|finished| finished.run > 0),
            Some(newest) if newest.over => target.of_run(newest.run, newest.last),
            Some(_) => None,
        };
        let over = said.is_some();
        let current = target.comparisons.current;
        let compared = match (said, newest) {
            (Some(said), _) => said,
            (None, Some(newest)) if current.run == newest.run => current,
            (None, Some(newest)) => Compared {
                run: newest.run,
                ..Compared::default()
            },
            (None, None) => return None,
        };
        Some(ComparedStatus {
            run: compared.run,
            ranges: compared.ranges,
            bytes: compared.blocks.saturating_mul(BLOCK),
            mismatched_blocks: compared.mismatched_blocks,
            skipped: compared.skipped,
            total: compared.is_over().then_some(compared.total),
            over,
            whole: compared.is_whole(),
        })
    }
}

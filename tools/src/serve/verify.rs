//! Comparing a group's disks with what its targets hold, while it runs.
//!
//! Owns the newest run of a group: its records on their way into the log, then the wait for what the
//! targets say of them. One at a time. Dies with the group; the next start knows nothing of it.

use afterimage_format::ids::Lsn;
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
            run: progress.run.0,
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
            let over = before.progress.borrow().over || before.failed.borrow().is_some();
            if !over {
                return Err(VerifyError::Busy);
            }
            before.task.abort();
        }
        let (progress, shown) = watch::channel(VerifyProgress::default());
        let (failed, said) = watch::channel(None);
        let working = Arc::clone(group);
        let task = group.spawn(async move {
            if let Err(error) = describe(&working, &progress).await {
                tracing::error!(group = %working.config.name, %error, "a comparison broke off");
                failed.send_replace(Some(error.to_string()));
                return;
            }
            let run = progress.borrow().run;
            answers(&working, run).await;
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

async fn describe(
    group: &Running,
    progress: &watch::Sender<VerifyProgress>,
) -> Result<(), afterimage_proxy::verify::VerifyError> {
    let acked = || in_step(group).map(|status| status.acked).min();
    let rate = || {
        let target = group.targets.first()?;
        target.tuning.borrow().pass_bytes_per_second
    };
    let around = Surroundings {
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

/// Waits until every target in step has said what it found; then a verify that was due is done, if
/// all of them found no difference.
async fn answers(group: &Running, run: Lsn) {
    loop {
        tokio::time::sleep(LOOK).await;
        let said: Vec<_> = in_step(group).map(|status| status.compared).collect();
        let all_said = said
            .iter()
            .all(|compared| compared.run == run && compared.is_over());
        if said.is_empty() || !all_said {
            continue;
        }
        let whole = said.iter().all(|compared| compared.is_whole());
        tracing::info!(group = %group.config.name, %run, whole, "the targets have compared");
        if whole {
            group.notes().verify_due = None;
        }
        return;
    }
}

/// What a target says, for people.
pub(super) fn compared(status: &SinkStatus) -> Option<ComparedStatus> {
    let compared = status.compared;
    (compared.run > Lsn::ZERO || compared.ranges > 0).then(|| ComparedStatus {
        run: compared.run.0,
        ranges: compared.ranges,
        bytes: compared.blocks * BLOCK,
        mismatched_blocks: compared.mismatched_blocks,
        skipped: compared.skipped,
        total: compared.is_over().then_some(compared.total),
        whole: compared.is_whole(),
    })
}

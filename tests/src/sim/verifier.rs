//! Somebody has the disks compared with the replica, again and again, whatever else happens. A
//! difference is an error of the product at any time: both sides speak of the same record.

use super::port::Port;
use afterimage_format::ids::Lsn;
use afterimage_format::wire::Compared;
use afterimage_proxy::ship::status::StatusCell;
use afterimage_proxy::verify::{Surroundings, VerifyProgress, run};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// No life has so many runs.
const RUNS_MAX: u64 = 1 << 16;

/// Whoever lets a life's disks be compared.
pub struct Verifier {
    task: JoinHandle<()>,
    port: Arc<Port>,
    status: StatusCell,
    progress: watch::Sender<VerifyProgress>,
    /// Identities of this life's runs begin here.
    first: u64,
    counted: u64,
}

impl Verifier {
    /// For the one life of the primary that begins in this turn: a run, a pause, a run.
    #[must_use]
    pub fn begin(port: Arc<Port>, status: StatusCell, pause: Duration, turn: u64) -> Self {
        let first = (turn + 1) * RUNS_MAX;
        let (progress, _) = watch::channel(VerifyProgress::default());
        let (again, shown) = (port.clone(), progress.clone());
        let task = tokio::spawn(async move {
            for number in 1..RUNS_MAX {
                tokio::time::sleep(pause).await;
                once(&again, first + number, &shown).await;
            }
        });
        Self {
            task,
            port,
            status,
            progress,
            first,
            counted: 0,
        }
    }

    /// No further run but one more, from now on.
    pub fn one_more(&mut self) {
        self.task.abort();
        self.progress.send_replace(VerifyProgress::default());
        let (port, run, shown) = (self.port.clone(), self.first, self.progress.clone());
        self.task = tokio::spawn(async move { once(&port, run, &shown).await });
    }

    /// What the one more run has come to, once it is over.
    #[must_use]
    pub fn outcome(&self) -> Option<Compared> {
        let VerifyProgress { over, last, .. } = *self.progress.borrow();
        let said = self.status.get().of_run(self.first, last);
        said.filter(|_| over)
    }

    /// No further run.
    pub fn stop(&self) {
        self.task.abort();
    }

    /// What the replica says of the last run that ended; whether every block of it is the same, and it
    /// was not counted yet.
    ///
    /// # Errors
    /// A block differs.
    pub fn judge(&mut self) -> Result<(Compared, bool), String> {
        let status = self.status.get();
        if status.mismatched_blocks() > 0 {
            return Err(format!(
                "a comparison finds a difference: {:?}",
                status.comparisons
            ));
        }
        let finished = status.comparisons.finished;
        let whole = finished.is_whole() && finished.run != self.counted;
        if whole {
            self.counted = finished.run;
        }
        Ok((finished, whole))
    }
}

impl Drop for Verifier {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits for nobody: what comes while the replica is away, or has no copy yet, is to be skipped.
async fn once(port: &Port, number: u64, progress: &watch::Sender<VerifyProgress>) {
    let acked = || Some(Lsn::MAX);
    let around = Surroundings {
        run: number,
        acked: &acked,
        bytes_per_second: &|| None,
        progress,
    };
    // It ends early with the life, or when a disk cannot be read.
    let _ = run(port, &around).await;
}

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

/// Whoever lets a life's disks be compared.
pub struct Verifier {
    task: JoinHandle<()>,
    port: Arc<Port>,
    status: StatusCell,
    counted: Lsn,
}

impl Verifier {
    /// For one life of the primary: a run, a pause, a run.
    #[must_use]
    pub fn begin(port: Arc<Port>, status: StatusCell, pause: Duration) -> Self {
        let again = port.clone();
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(pause).await;
                once(&again).await;
            }
        });
        Self {
            task,
            port,
            status,
            counted: Lsn::ZERO,
        }
    }

    /// No further run but one more, from now on.
    pub fn one_more(&mut self) {
        self.task.abort();
        let port = self.port.clone();
        self.task = tokio::spawn(async move { once(&port).await });
    }

    /// No further run.
    pub fn stop(&self) {
        self.task.abort();
    }

    /// What the replica says; whether it has come to the end of a run in which every block is the
    /// same that was not counted yet.
    ///
    /// # Errors
    /// A block differs.
    pub fn judge(&mut self) -> Result<(Compared, bool), String> {
        let status = self.status.get();
        if status.mismatched_blocks_total > 0 {
            return Err(format!(
                "a comparison finds a difference: {:?}",
                status.compared
            ));
        }
        let whole = status.compared.is_whole() && status.compared.run != self.counted;
        if whole {
            self.counted = status.compared.run;
        }
        Ok((status.compared, whole))
    }
}

impl Drop for Verifier {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits for nobody: what comes while the replica is away, or has no copy yet, is to be skipped.
async fn once(port: &Port) {
    let (progress, _) = watch::channel(VerifyProgress::default());
    let acked = || Some(Lsn::MAX);
    let around = Surroundings {
        acked: &acked,
        bytes_per_second: &|| None,
        progress: &progress,
    };
    // It ends early with the life, or when a disk cannot be read.
    let _ = run(port, &around).await;
}

//! `afterimage detach`: a group becomes plain disks, as a task of the daemon.
//!
//! Owns which groups are on the way to that, have come there, or could not. Always holds: a detach
//! that was begun goes on, whether anybody still waits for it or not; a group counts as detached
//! only when its disks are complete, synced and marked as plain; until then nobody can open them
//! here, and the state says that they are not complete. After an error log and ring keep what the
//! disks lack: it can be asked for again.

use afterimage_proxy::engine::recovery::Accepted;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::exports::Served;
use super::group::{self, Running};
use crate::api::types::Detached;
use crate::config::{Config, GroupConfig};

/// How far a detach is.
#[derive(Clone, Debug)]
pub(super) enum Progress {
    /// Log and ring are being written to the disks.
    Running,
    /// The disks are plain.
    Done(Detached),
    /// They are not; why, and what to do.
    Failed(String),
}

/// The detaches since the start of the daemon.
#[derive(Debug, Default)]
pub(super) struct Detaches {
    groups: Mutex<BTreeMap<String, watch::Receiver<Progress>>>,
    /// No further step is begun.
    stop: CancellationToken,
}

impl Detaches {
    /// How far the group is, if its detach was ever begun.
    pub(super) fn progress(&self, name: &str) -> Option<Progress> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.get(name).map(|progress| progress.borrow().clone())
    }

    /// Whether the group is on the way.
    pub(super) fn is_running(&self, name: &str) -> bool {
        matches!(self.progress(name), Some(Progress::Running))
    }

    /// Returns when none is on the way.
    pub(super) async fn settled(&self) {
        let all: Vec<_> = {
            let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
            groups.values().cloned().collect()
        };
        for mut progress in all {
            ended(&mut progress).await;
        }
    }

    /// The daemon ends now: what is on the way stays undone, and is recovered by the next start.
    pub(super) fn give_up(&self) {
        self.stop.cancel();
    }
}

async fn ended(progress: &mut watch::Receiver<Progress>) -> Progress {
    let over = |progress: &Progress| !matches!(progress, Progress::Running);
    match progress.wait_for(over).await {
        Ok(progress) => progress.clone(),
        Err(_) => Progress::Failed("the detach broke off".to_owned()),
    }
}

/// Makes the disks of a group plain, or waits for whoever is at it already. `running` is the group
/// as it is served; `None` if an earlier detach has stopped it.
///
/// # Errors
/// Why they are not plain, and what to do.
pub(super) async fn detach(
    config: &Arc<Config>,
    served: &Arc<Served>,
    group: &GroupConfig,
    running: Option<Arc<Running>>,
) -> Result<Detached, String> {
    let mut progress = {
        let groups = &served.detaches.groups;
        let mut groups = groups.lock().unwrap_or_else(PoisonError::into_inner);
        let known = groups.get(&group.name).filter(|progress| {
            // One that failed is begun again.
            !matches!(*progress.borrow(), Progress::Failed(_))
        });
        match known {
            Some(progress) => progress.clone(),
            None => {
                let (sender, progress) = watch::channel(Progress::Running);
                groups.insert(group.name.clone(), progress.clone());
                let (config, served) = (Arc::clone(config), Arc::clone(served));
                let group = group.clone();
                tokio::spawn(async move {
                    let end = run(&config, &served, group, running).await;
                    sender.send_replace(end);
                });
                progress
            }
        }
    };
    match ended(&mut progress).await {
        Progress::Done(detached) => Ok(detached),
        Progress::Failed(why) => Err(why),
        Progress::Running => Err("the detach broke off".to_owned()),
    }
}

async fn run(
    config: &Arc<Config>,
    served: &Served,
    group: GroupConfig,
    running: Option<Arc<Running>>,
) -> Progress {
    let name = group.name.clone();
    tracing::info!(
        group = name,
        "detaching: its log is written back to its disks"
    );
    if let Some(running) = running {
        if let Err(error) = running.end().await {
            tracing::warn!(group = name, %error, "not drained; its disks are completed from log and ring");
        }
        served.remove(&name);
    }
    let stop = &served.detaches.stop;
    let result = if stop.is_cancelled() {
        Err("the daemon ends".to_owned())
    } else {
        let config = Arc::clone(config);
        let plain = tokio::task::spawn_blocking(move || {
            group::make_plain(&config, &group, Accepted::default(), &mut |_| {})
        });
        match plain.await {
            Ok(plain) => plain.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    };
    match result {
        Ok((_, paths)) => {
            tracing::info!(group = name, "detached");
            Progress::Done(Detached {
                group: name,
                disks: paths
                    .iter()
                    .map(|path| path.display().to_string())
                    .collect(),
            })
        }
        Err(error) => {
            let why = format!(
                "the detach did not come to its end: {error}; its disks are NOT complete without log and ring: do not use them; mend that and run 'afterimage detach {name}' again, or stop the service and run 'afterimage recover {name} --to-plain'"
            );
            tracing::error!(group = name, "{why}");
            Progress::Failed(why)
        }
    }
}

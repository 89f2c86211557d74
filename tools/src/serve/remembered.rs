//! The last checkpoints of a group, beyond the life of the process.
//!
//! Owns a small file, `LOG.checkpoints.json` beside the log; for a log on a block device it is
//! `GROUP.checkpoints.json` in the folder of the claims, as what lies in `/dev` is gone after a
//! restart of the host. It is for people and alarms: no promise
//! rests on it, and one that is missing, damaged or another group's counts as empty. Always holds:
//! the file is replaced whole, and whoever notes a checkpoint never waits for it, since the disk it
//! is on may be frozen just then.

use afterimage_format::ids::GroupId;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::api::types::CheckpointDone;
use crate::config::GroupConfig;

const VERSION: u32 = 1;

/// What the file says.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct LastCheckpoints {
    version: u32,
    /// UUID of the group.
    group: String,
    /// Last crash-consistent one.
    pub(super) crash: Option<CheckpointDone>,
    /// Last application-consistent one.
    pub(super) application: Option<CheckpointDone>,
}

impl LastCheckpoints {
    /// The newer of them.
    pub(super) fn newest(&self) -> Option<&CheckpointDone> {
        let all = self.crash.iter().chain(&self.application);
        all.max_by_key(|done| done.wall_ns)
    }
}

/// A group's file.
#[derive(Debug)]
pub(super) struct Remembered {
    path: PathBuf,
    last: Mutex<LastCheckpoints>,
    writing: Mutex<()>,
}

impl Remembered {
    /// Reads what is known of this group.
    pub(super) fn of(config: &GroupConfig, group: GroupId) -> Arc<Self> {
        let log = &config.log_path;
        let is_device = fs::metadata(log).is_ok_and(|m| m.file_type().is_block_device());
        let mut path = if is_device {
            config.claims.join(&config.name).into_os_string()
        } else {
            log.as_os_str().to_owned()
        };
        path.push(".checkpoints.json");
        Self::open(path.into(), group)
    }

    fn open(path: PathBuf, group: GroupId) -> Arc<Self> {
        let group = group.to_string();
        let read = fs::read(&path).ok();
        let read = read.and_then(|bytes| serde_json::from_slice::<LastCheckpoints>(&bytes).ok());
        let ours = read.filter(|last| last.version == VERSION && last.group == group);
        let last = ours.unwrap_or_else(|| LastCheckpoints {
            version: VERSION,
            group,
            ..LastCheckpoints::default()
        });
        Arc::new(Self {
            path,
            last: Mutex::new(last),
            writing: Mutex::default(),
        })
    }

    /// What is known.
    pub(super) fn last(&self) -> LastCheckpoints {
        self.last
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// A checkpoint was taken. It is stored behind the caller's back.
    pub(super) fn note(self: &Arc<Self>, done: &CheckpointDone) {
        let mut done = done.clone();
        done.steps.clear();
        {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            match done.kind.as_str() {
                "application" => last.application = Some(done),
                _ => last.crash = Some(done),
            }
        }
        let own = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let _one = own.writing.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = own.store() {
                tracing::warn!(
                    file = %own.path.display(), %error,
                    "'status' will not know the last checkpoints after a restart"
                );
            }
        });
    }

    fn store(&self) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(&self.last())?;
        if let Some(folder) = self.path.parent() {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o700).create(folder)?;
        }
        let draft = self.path.with_extension("draft");
        let mut file = File::create(&draft)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&draft, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(kind: &str, lsn: u64) -> CheckpointDone {
        CheckpointDone {
            kind: kind.to_owned(),
            lsn,
            wall_ns: lsn,
            ..CheckpointDone::default()
        }
    }

    #[tokio::test]
    async fn the_last_of_each_kind_outlives_the_process_and_no_other_groups_is_taken() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("vm1.log.checkpoints.json");
        let group = GroupId::from_bytes([7; 16]);
        let first = Remembered::open(file.clone(), group);
        assert!(first.last().newest().is_none());
        for done in [done("crash", 5), done("application", 7), done("crash", 6)] {
            first.note(&done);
        }
        while Arc::strong_count(&first) > 1 {
            tokio::task::yield_now().await;
        }
        let again = Remembered::open(file.clone(), group).last();
        assert_eq!(again.crash.as_ref().map(|done| done.lsn), Some(6));
        assert_eq!(again.newest().map(|done| done.lsn), Some(7));
        let other = Remembered::open(file.clone(), GroupId::from_bytes([8; 16]));
        assert!(other.last().newest().is_none(), "another group's");
        fs::write(&file, "{half").expect("written");
        assert!(
            Remembered::open(file.clone(), group)
                .last()
                .newest()
                .is_none()
        );
    }
}

//! The last checkpoints of a group, and what its targets can restore, beyond the life of the process.
//!
//! Owns a small file, `LOG.checkpoints.json` beside the log; for a log on a block device it is
//! `GROUP.checkpoints.json` in the folder of the claims, as what lies in `/dev` is gone after a
//! restart of the host. It is for people and alarms: no promise
//! rests on it, and one that is missing, damaged or another group's counts as empty. Always holds:
//! the file is replaced whole, and whoever notes a checkpoint never waits for it, since the disk it
//! is on may be frozen just then.

use afterimage_format::ids::GroupId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::api::types::CheckpointDone;
use crate::config::GroupConfig;

const VERSION: u32 = 1;
/// How often the file is written, at most, because a target got on.
const RESTORABLE_EVERY: Duration = Duration::from_secs(10);

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
    /// Targets, by URL, that have had a complete copy, and the last moment that could be restored
    /// there (0: not known).
    #[serde(default)]
    restorable: BTreeMap<String, u64>,
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
    /// Whether somebody waits to write what is newest by then.
    waiting: AtomicBool,
    /// Whether the last attempt failed.
    writing: Mutex<bool>,
    pace: Mutex<Pace>,
}

/// When targets' moments come to the file.
#[derive(Debug, Default)]
struct Pace {
    /// Some have changed since.
    due: bool,
    stored_at: Option<Instant>,
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
            waiting: AtomicBool::new(false),
            writing: Mutex::default(),
            pace: Mutex::default(),
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
        self.store_soon();
    }

    /// The last moment that could be restored at the target, if it ever had a complete copy (0: not
    /// known).
    pub(super) fn restorable(&self, target: &str) -> Option<u64> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.restorable.get(target).copied()
    }

    /// The target has a complete copy, and could restore this moment (0: not known). What it says
    /// comes to the file now and then.
    pub(super) fn note_restorable(self: &Arc<Self>, target: &str, moment_ns: u64) {
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        let mut is_new = false;
        {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            let before = last.restorable.get(target).copied();
            if before.is_none() || (moment_ns != 0 && before != Some(moment_ns)) {
                last.restorable.insert(target.to_owned(), moment_ns);
                is_new = before.is_none_or(|before| before == 0);
                pace.due = true;
            }
        }
        let long_ago = |at: Instant| at.elapsed() >= RESTORABLE_EVERY;
        if pace.due && (is_new || pace.stored_at.is_none_or(long_ago)) {
            *pace = Pace {
                due: false,
                stored_at: Some(Instant::now()),
            };
            drop(pace);
            self.store_soon();
        }
    }

    /// Stores what is known, at the end. Blocking.
    pub(super) fn store_at_the_end(&self) {
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody was told already if it cannot be.
        self.store().ok();
    }

    fn store_soon(self: &Arc<Self>) {
        if self.waiting.swap(true, Ordering::AcqRel) {
            return;
        }
        let own = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let mut failing = own.writing.lock().unwrap_or_else(PoisonError::into_inner);
            own.waiting.store(false, Ordering::Release);
            let stored = own.store();
            if let Err(error) = &stored
                && !*failing
            {
                tracing::warn!(
                    file = %own.path.display(), %error,
                    "'status' will not know the last checkpoints after a restart"
                );
            }
            *failing = stored.is_err();
        });
    }

    fn store(&self) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(&self.last())?;
        if let Some(folder) = self.path.parent() {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o700).create(folder)?;
        }
        // A run that outlives its group may write beside the next one.
        let draft = self
            .path
            .with_extension(format!("{}.draft", uuid::Uuid::new_v4().simple()));
        let written = write(&draft, &text).and_then(|()| fs::rename(&draft, &self.path));
        if written.is_err() {
            fs::remove_file(&draft).ok();
        }
        written
    }
}

fn write(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(text)?;
    file.sync_all()
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
        assert_eq!(first.restorable("file:///srv"), None);
        first.note_restorable("file:///srv", 0);
        first.note_restorable("file:///srv", 9);
        first.note_restorable("file:///srv", 0);
        assert_eq!(first.restorable("file:///srv"), Some(9));
        first.store_at_the_end();
        while Arc::strong_count(&first) > 1 {
            tokio::task::yield_now().await;
        }
        let again = Remembered::open(file.clone(), group);
        assert_eq!(again.restorable("file:///srv"), Some(9));
        assert_eq!(again.restorable("file:///dr"), None);
        assert_eq!(again.last().newest().map(|done| done.lsn), Some(7));
        fs::write(&file, "{half").expect("written");
        assert!(
            Remembered::open(file.clone(), group)
                .last()
                .newest()
                .is_none()
        );
    }
}

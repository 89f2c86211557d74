//! Durability of directory entries in a repository that is a folder.
//!
//! [`object_store`] syncs a file and its folder when it creates it, and new folders up to the first
//! that existed. What it cannot know is whether an *earlier* process, killed in between, left a
//! folder or a link that was never synced. So each folder on the way to a key is synced once by
//! every process that acknowledges something in it, and again whenever an object is found instead
//! of created.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::RepositoryError;
use crate::aside;

/// Makes a folder's entries durable.
pub(super) type SyncFolder = dyn Fn(&Path) -> io::Result<()> + Send + Sync;

/// The folders of one repository and which of them this process has synced.
pub(super) struct Directories {
    root: PathBuf,
    synced: Mutex<HashSet<PathBuf>>,
    sync_folder: Arc<SyncFolder>,
}

impl fmt::Debug for Directories {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Directories").field(&self.root).finish()
    }
}

impl Directories {
    pub(super) fn new(root: PathBuf, sync_folder: Arc<SyncFolder>) -> Self {
        Self {
            root,
            synced: Mutex::default(),
            sync_folder,
        }
    }

    /// Syncs each folder from the repository's own to that of `key` which this process has not
    /// synced yet.
    pub(super) async fn sync_once(&self, key: &str) -> Result<(), RepositoryError> {
        let wanted: Vec<PathBuf> = {
            let synced = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
            folders(&self.root, key)
                .into_iter()
                .filter(|folder| !synced.contains(folder))
                .collect()
        };
        self.sync(wanted).await
    }

    /// Syncs each folder from the repository's own to that of `key`, in any case.
    pub(super) async fn sync_to(&self, key: &str) -> Result<(), RepositoryError> {
        self.sync(folders(&self.root, key)).await
    }

    /// Nothing counts as synced any longer.
    pub(super) fn forget(&self) {
        self.synced
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    async fn sync(&self, wanted: Vec<PathBuf>) -> Result<(), RepositoryError> {
        if wanted.is_empty() {
            return Ok(());
        }
        let sync_folder = Arc::clone(&self.sync_folder);
        let work = move || -> Result<Vec<PathBuf>, RepositoryError> {
            let mut done = Vec::with_capacity(wanted.len());
            for folder in wanted {
                match sync_folder(&folder) {
                    Ok(()) => done.push(folder),
                    // Nothing was ever stored below a folder that does not exist.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                    Err(source) => return Err(RepositoryError::Sync { folder, source }),
                }
            }
            Ok(done)
        };
        let done = aside::wait(work)
            .await
            .map_err(|source| RepositoryError::Sync {
                folder: self.root.clone(),
                source,
            })??;
        self.synced
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(done);
        Ok(())
    }
}

/// The repository's folder and those below it on the way to `key`, from the top.
fn folders(root: &Path, key: &str) -> Vec<PathBuf> {
    let mut folder = root.to_path_buf();
    let mut folders = vec![folder.clone()];
    let mut parts: Vec<&str> = key.split('/').collect();
    parts.pop();
    for part in parts {
        folder.push(part);
        folders.push(folder.clone());
    }
    folders
}

/// Makes a folder's entries durable.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

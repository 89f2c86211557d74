//! The folder of a repository on a file system: it may be unmounted, renamed or exchanged at any
//! time, and come back.
//!
//! Owns the folder's store and the identity of what lies there. What always holds: nothing is made
//! before the first object is stored, and from then on only where the same identity is found: a
//! folder that is gone is never made anew below the place where it was mounted. To look costs one
//! `stat` of the identity's file; only when that is another file it is read. What comes back as
//! another file with the same identity may be a copy, so [`Root::turn`] changes: histories that
//! were read before do not count any longer. Blocking, but for the awaits of the callers.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use afterimage_format::ids::RepositoryId;
use afterimage_format::manifest::RepositoryIdentity;
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;

use super::direct_io::DirectWriter;
use super::directories::{Directories, SyncFolder, sync_folder};
use super::{RepositoryError, keys};

/// A repository's folder.
pub(super) struct Root {
    folder: PathBuf,
    sync_folder: Arc<SyncFolder>,
    opened: OnceLock<Opened>,
    known: Mutex<Option<Known>>,
    turn: AtomicU64,
}

/// What there is once the folder is.
pub(super) struct Opened {
    /// Links resolved: the store and the look at the identity mean the same place.
    pub(super) folder: PathBuf,
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) direct: Arc<DirectWriter>,
    pub(super) directories: Directories,
}

#[derive(Clone, Copy)]
struct Known {
    id: RepositoryId,
    file: FileStamp,
}

/// Tells one file from another without reading it. An inode's number alone may be given out again.
#[derive(Clone, Copy, PartialEq, Eq)]
struct FileStamp {
    device: u64,
    inode: u64,
    changed: (i64, i64),
}

/// What a look at the folder shows.
enum Seen {
    /// The file that was there before.
    Same,
    /// Another file: known before with the same identity, or not known at all.
    Another(Known),
    /// No identity, and none is known.
    Nothing,
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Root").field(&self.folder).finish()
    }
}

impl Root {
    /// A folder that need not exist.
    pub(super) fn new(folder: PathBuf) -> Self {
        Self::syncing(folder, Arc::new(sync_folder))
    }

    fn syncing(folder: PathBuf, sync_folder: Arc<SyncFolder>) -> Self {
        Self {
            folder,
            sync_folder,
            opened: OnceLock::new(),
            known: Mutex::default(),
            turn: AtomicU64::new(0),
        }
    }

    /// A folder with a store and a way to sync of the tests' own.
    #[cfg(test)]
    pub(super) fn for_tests(
        folder: PathBuf,
        store: Arc<dyn ObjectStore>,
        sync_folder: Arc<SyncFolder>,
    ) -> Self {
        let root = Self::syncing(folder.clone(), sync_folder);
        let directories = Directories::new(folder.clone(), Arc::clone(&root.sync_folder));
        let direct = DirectWriter::new(Arc::clone(&root.sync_folder));
        let opened = Opened {
            folder,
            store,
            direct: Arc::new(direct),
            directories,
        };
        assert!(root.opened.set(opened).is_ok());
        root
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Changes when a copy came in the place of what was there.
    pub(super) fn turn(&self) -> u64 {
        self.turn.load(Ordering::Acquire)
    }

    /// Whether it is known which repository lies here.
    pub(super) fn is_known(&self) -> bool {
        self.known().is_some()
    }

    /// The store, as soon as there is a folder.
    ///
    /// # Errors
    /// There is something that is no folder.
    pub(super) fn opened(&self) -> Result<Option<&Opened>, RepositoryError> {
        if let Some(opened) = self.opened.get() {
            return Ok(Some(opened));
        }
        let wrong = |source| RepositoryError::Folder {
            folder: self.folder.clone(),
            source,
        };
        match fs::metadata(&self.folder) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(wrong(io::ErrorKind::NotADirectory.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(wrong(error)),
        }
        let folder = fs::canonicalize(&self.folder).map_err(wrong)?;
        let store = LocalFileSystem::new_with_prefix(&folder)
            .map_err(|source| RepositoryError::Store {
                url: self.folder.display().to_string(),
                key: String::new(),
                action: "open",
                source,
            })?
            .with_fsync(true);
        let directories = Directories::new(folder.clone(), Arc::clone(&self.sync_folder));
        let direct = DirectWriter::new(Arc::clone(&self.sync_folder));
        Ok(Some(self.opened.get_or_init(|| Opened {
            folder,
            store: Arc::new(store),
            direct: Arc::new(direct),
            directories,
        })))
    }

    /// Looks before anything is built on what lies here: takes note of an identity that was not
    /// known, or that has come back. `false`: there is none yet.
    ///
    /// # Errors
    /// What was here is gone, or is another one.
    pub(super) fn attend(&self) -> Result<bool, RepositoryError> {
        match self.look()? {
            Seen::Same => Ok(true),
            Seen::Another(found) => {
                self.take_note(found);
                Ok(true)
            }
            Seen::Nothing => Ok(false),
        }
    }

    /// Looks whether it is still what it was when a history was read. `false`: there is none yet.
    ///
    /// # Errors
    /// What was here is gone, is another one, or has to be read again.
    pub(super) fn check(&self) -> Result<bool, RepositoryError> {
        match self.look()? {
            Seen::Same => Ok(true),
            Seen::Another(_) if self.is_known() => Err(RepositoryError::Returned {
                folder: self.folder.clone(),
            }),
            Seen::Another(found) => {
                self.take_note(found);
                Ok(true)
            }
            Seen::Nothing => Ok(false),
        }
    }

    /// Makes the folder and its parents, each durable before the next.
    pub(super) fn make(&self) -> Result<&Opened, RepositoryError> {
        let wrong = |source| RepositoryError::Folder {
            folder: self.folder.clone(),
            source,
        };
        create_durably(&self.folder).map_err(wrong)?;
        let gone = || wrong(io::ErrorKind::NotFound.into());
        self.opened()?.ok_or_else(gone)
    }

    fn look(&self) -> Result<Seen, RepositoryError> {
        let known = *self.known();
        let gone = |source| RepositoryError::Gone {
            folder: self.folder.clone(),
            source,
        };
        let Some(opened) = self.opened()? else {
            return Ok(Seen::Nothing);
        };
        let file = opened.folder.join(keys::IDENTITY);
        let found = match (fs::metadata(&file), known) {
            (Ok(found), _) => found,
            (Err(error), None) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Seen::Nothing);
            }
            (Err(error), _) => return Err(gone(error)),
        };
        let stamp = FileStamp {
            device: found.dev(),
            inode: found.ino(),
            changed: (found.mtime(), found.mtime_nsec()),
        };
        if known.is_some_and(|known| known.file == stamp) {
            return Ok(Seen::Same);
        }
        let bytes = fs::read(&file).map_err(gone)?;
        let identity =
            RepositoryIdentity::decode(&bytes).map_err(|source| RepositoryError::Identity {
                file: file.clone(),
                source,
            })?;
        let id = identity.repository;
        match known {
            Some(known) if known.id != id => Err(RepositoryError::Another {
                folder: self.folder.clone(),
                known: known.id,
                found: id,
            }),
            _ => Ok(Seen::Another(Known { id, file: stamp })),
        }
    }

    fn take_note(&self, found: Known) {
        let before = self.known().replace(found);
        if before.is_some() {
            self.turn.fetch_add(1, Ordering::AcqRel);
            if let Some(opened) = self.opened.get() {
                opened.directories.forget();
            }
            tracing::warn!(folder = %self.folder.display(), "the repository is back; its history is read again");
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Option<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a folder is there or could be made: the nearest thing above it that exists is one.
pub(super) fn could_be_made(folder: &Path) -> io::Result<()> {
    for above in folder.ancestors() {
        match fs::metadata(above) {
            Ok(found) if found.is_dir() => return Ok(()),
            Ok(_) => return Err(io::ErrorKind::NotADirectory.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

fn create_durably(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return sync_folder(folder);
    }
    if let Some(parent) = folder.parent() {
        create_durably(parent)?;
        // Whoever may read a repository may read every disk in it.
        match fs::DirBuilder::new().mode(0o700).create(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        sync_folder(parent)?;
    }
    if !folder.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    sync_folder(folder)
}

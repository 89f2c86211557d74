//! When an object counts as durable in a repository that is a folder.

use std::io;
use std::path::{Path as FsPath, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use object_store::local::LocalFileSystem;
use object_store::{ObjectStore, PutMode};

use super::directories::sync_folder;
use super::root::Root;
use super::{Created, Kept, Repository, RepositoryError};
use crate::receive::{IngestError, Receiver};
use crate::testing::primary::Primary;
use crate::testing::puts::{After, Puts};

const KEY: &str = "groups/g/segments/0000000001/1";

/// A folder with a disk that may fail to sync, and what was synced.
struct Rig {
    folder: tempfile::TempDir,
    synced: Arc<Mutex<Vec<PathBuf>>>,
    fails: Arc<AtomicBool>,
    puts: Arc<Puts>,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = LocalFileSystem::new_with_prefix(folder.path()).expect("a store");
        Self {
            folder,
            synced: Arc::default(),
            fails: Arc::default(),
            puts: Arc::new(Puts::new(store)),
        }
    }

    /// As a process finds it that starts now.
    fn process(&self) -> Repository {
        let (synced, fails) = (Arc::clone(&self.synced), Arc::clone(&self.fails));
        let sync = move |folder: &FsPath| {
            if fails.load(Ordering::Relaxed) {
                return Err(io::Error::from_raw_os_error(5));
            }
            sync_folder(folder)?;
            synced.lock().expect("not poisoned").push(folder.to_owned());
            Ok(())
        };
        let store = Arc::clone(&self.puts) as Arc<dyn ObjectStore>;
        let root = Root::for_tests(self.folder.path().to_owned(), store, Arc::new(sync));
        Repository {
            kept: Kept::Folder(Arc::new(root)),
            url: "file:///rig".into(),
        }
    }

    /// Leaves behind what the first object of all needs.
    async fn begin(&self) {
        self.process().create("first", one()).await.expect("begun");
        self.puts.take();
        self.synced();
    }

    /// What was synced since the last call, relative to the repository.
    fn synced(&self) -> Vec<String> {
        let synced = std::mem::take(&mut *self.synced.lock().expect("not poisoned"));
        let relative = |folder: PathBuf| {
            let inner = folder.strip_prefix(self.folder.path()).expect("inside");
            inner.display().to_string()
        };
        synced.into_iter().map(relative).collect()
    }
}

const WAY: [&str; 5] = [
    "",
    "groups",
    "groups/g",
    "groups/g/segments",
    "groups/g/segments/0000000001",
];

fn one() -> Bytes {
    Bytes::from_static(b"one")
}

#[tokio::test]
async fn an_object_that_was_there_counts_only_with_its_folders() {
    let rig = Rig::new();
    let dead = rig.process();
    dead.create(KEY, one()).await.expect("created");
    assert_eq!(rig.synced(), WAY, "the first object of a process");
    dead.create("groups/g/segments/0000000001/2", one())
        .await
        .expect("created");
    assert!(rig.synced().is_empty(), "each folder once");

    // The process before may have died between link and sync.
    let alive = rig.process();
    let again = alive.create(KEY, one()).await.expect("found");
    assert_eq!(again, Created::Ours);
    assert_eq!(rig.synced(), WAY, "ours, found");
    let taken = alive.create(KEY, Bytes::from_static(b"two")).await;
    assert_eq!(taken.expect("found"), Created::Taken(one()));
    assert_eq!(rig.synced(), WAY, "taken: somebody builds upon it");
}

#[tokio::test]
async fn nothing_counts_while_its_folder_cannot_be_synced() {
    let rig = Rig::new();
    rig.begin().await;
    let repository = rig.process();
    rig.fails.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        let created = repository.create(KEY, one()).await;
        assert!(
            matches!(&created, Err(RepositoryError::Sync { folder, .. }) if folder == rig.folder.path()),
            "{created:?}"
        );
    }
    assert!(rig.folder.path().join(KEY).exists());
    rig.fails.store(false, Ordering::Relaxed);
    let created = repository.create(KEY, one()).await;
    assert_eq!(created.expect("created"), Created::Ours);
    assert_eq!(rig.synced(), WAY);
}

#[tokio::test]
async fn what_could_not_be_synced_is_written_anew() {
    let rig = Rig::new();
    rig.begin().await;
    let repository = rig.process();
    rig.puts.fail_after_the_effect();
    let created = repository.create(KEY, one()).await;
    assert_eq!(created.expect("created"), Created::Ours);
    // The pages of the first file may be lost though they are read back: a failed sync marks them
    // clean.
    let modes = rig.puts.take();
    assert!(
        matches!(
            modes.as_slice(),
            [
                (PutMode::Create, After::Fails),
                (PutMode::Overwrite, After::Succeeds)
            ]
        ),
        "{modes:?}"
    );
    assert_eq!(rig.synced(), WAY);
}

/// What a replica that starts finds in its folders was perhaps never synced by the process before:
/// nothing of it is said to a primary, as cursor or as epoch, before it is.
#[tokio::test]
async fn a_start_syncs_what_it_tells_a_primary() {
    let rig = Rig::new();
    let mut primary = Primary::new(1);
    let dead = Receiver::new(rig.process());
    let (mut session, resume) = primary.connect(&dead).await.expect("connected");
    primary.write(0, 1, 2);
    let caught_up = primary.catch_up(&mut session, resume).await;
    caught_up.expect("shipped");
    rig.synced();

    let alive = Receiver::new(rig.process());
    rig.fails.store(true, Ordering::Relaxed);
    let refused = primary.connect(&alive).await.map(|_| ());
    assert!(
        matches!(
            refused,
            Err(IngestError::Repository(RepositoryError::Sync { .. }))
        ),
        "{refused:?}"
    );
    rig.fails.store(false, Ordering::Relaxed);
    let (_, resume) = primary.connect(&alive).await.expect("connected");
    assert_eq!(resume.cursor.lsn.0, primary.last());
    let synced = rig.synced();
    let group = format!("groups/{}", primary.group);
    for folder in [
        "names".to_owned(),
        format!("{group}/manifests"),
        format!("{group}/segments/0000000001"),
    ] {
        assert!(synced.contains(&folder), "{folder} of {synced:?}");
    }
}

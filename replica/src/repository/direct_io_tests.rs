//! Large objects on a real file system.

use std::path::Path as FsPath;
use std::sync::atomic::AtomicUsize;

use object_store::ObjectStoreExt;

use super::super::directories::sync_folder;
use super::*;

const KEY: &str = "segments/1";

fn content(len: usize) -> Bytes {
    (0..len)
        .map(|at| (at / 512 + at) as u8)
        .collect::<Vec<u8>>()
        .into()
}

/// A folder on a disk, with the one for the key.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    fs::create_dir(folder.path().join("segments")).expect("made");
    folder
}

fn inner(folder: &tempfile::TempDir) -> LocalFileSystem {
    LocalFileSystem::new_with_prefix(folder.path())
        .expect("a store")
        .with_fsync(true)
}

async fn create(store: &DirectFolder, payload: PutPayload) -> Result<PutResult> {
    let options = PutOptions {
        mode: PutMode::Create,
        ..PutOptions::default()
    };
    store.put_opts(&Path::from(KEY), payload, options).await
}

fn names(folder: &tempfile::TempDir) -> Vec<String> {
    let entries = fs::read_dir(folder.path().join("segments")).expect("read");
    let names = entries.map(|entry| entry.expect("read").file_name());
    names.map(|name| name.to_string_lossy().into()).collect()
}

#[tokio::test]
async fn what_is_written_past_the_cache_is_what_was_given() {
    let steps = [
        DIRECT_BYTES_MIN,
        DIRECT_BYTES_MIN + 1,
        STEP_BYTES - 1,
        STEP_BYTES,
        STEP_BYTES + 4096,
        2 * STEP_BYTES + 77,
    ];
    for len in steps {
        let folder = folder();
        let synced: Arc<AtomicUsize> = Arc::default();
        let count = Arc::clone(&synced);
        let sync_file = move |file: &File| {
            count.fetch_add(1, Ordering::Relaxed);
            file.sync_all()
        };
        let store =
            DirectFolder::syncing(inner(&folder), Box::new(sync_file), Arc::new(sync_folder));
        let whole = content(len);
        let parts = [whole.slice(..len / 3), whole.slice(len / 3..)];
        create(&store, parts.into_iter().collect())
            .await
            .expect("stored");
        assert_eq!(synced.load(Ordering::Relaxed), 1, "written directly");
        let read = store.get(&Path::from(KEY)).await.expect("there");
        assert!(read.bytes().await.expect("read") == whole, "{len} bytes");
        assert_eq!(names(&folder), ["1"]);

        let again = create(&store, content(len + 1).into()).await;
        assert!(
            matches!(again, Err(Error::AlreadyExists { .. })),
            "{again:?}"
        );
        let read = store.get(&Path::from(KEY)).await.expect("there");
        assert!(read.bytes().await.expect("read") == whole);
        assert_eq!(names(&folder), ["1"], "nothing is left behind");
    }
}

/// Whoever sees the key sees all of it, whenever the power fails.
#[tokio::test]
async fn a_key_exists_only_with_its_content_synced() {
    let folder = folder();
    let steps: Arc<Mutex<Vec<String>>> = Arc::default();
    let key = folder.path().join(KEY);
    let note = |what: &'static str| {
        let (steps, key) = (Arc::clone(&steps), key.clone());
        move |length: u64| {
            let seen = format!("{what} {length}, key {}", key.exists());
            steps.lock().expect("not poisoned").push(seen);
        }
    };
    let (file_synced, folder_synced) = (note("file"), note("folder"));
    let sync_file = move |file: &File| {
        file_synced(file.metadata()?.len());
        Ok(())
    };
    let sync = move |_: &FsPath| {
        folder_synced(0);
        Ok(())
    };
    let store = DirectFolder::syncing(inner(&folder), Box::new(sync_file), Arc::new(sync));
    create(&store, content(DIRECT_BYTES_MIN + 7).into())
        .await
        .expect("stored");
    let steps = steps.lock().expect("not poisoned");
    let whole = DIRECT_BYTES_MIN + 7;
    assert_eq!(
        *steps,
        [
            format!("file {whole}, key false"),
            "folder 0, key true".into()
        ]
    );
}

#[tokio::test]
async fn what_cannot_be_synced_is_not_there() {
    let folder = folder();
    let fails = |_: &File| Err(io::Error::from_raw_os_error(5));
    let store = DirectFolder::syncing(inner(&folder), Box::new(fails), Arc::new(sync_folder));
    let created = create(&store, content(DIRECT_BYTES_MIN).into()).await;
    assert!(matches!(created, Err(Error::Generic { .. })), "{created:?}");
    assert!(names(&folder).is_empty());
}

/// What a killed process left under a staging name is in nobody's way.
#[tokio::test]
async fn a_staging_name_that_is_taken_is_passed_over() {
    let folder = folder();
    fs::write(folder.path().join("segments/1#1"), "half").expect("written");
    let store = DirectFolder::new(inner(&folder), Arc::new(sync_folder));
    create(&store, content(DIRECT_BYTES_MIN).into())
        .await
        .expect("stored");
    let read = store.get(&Path::from(KEY)).await.expect("there");
    assert_eq!(read.bytes().await.expect("read").len(), DIRECT_BYTES_MIN);
}

/// The folder is made by the first object, and a file system may know nothing of O_DIRECT.
#[tokio::test]
async fn where_it_cannot_be_written_directly_it_is_written_all_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = DirectFolder::new(inner(&folder), Arc::new(sync_folder));
    create(&store, content(DIRECT_BYTES_MIN).into())
        .await
        .expect("stored");
    assert!(store.writer.direct.load(Ordering::Relaxed));
    assert_eq!(names(&folder), ["1"]);
}

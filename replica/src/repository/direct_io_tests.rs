//! Large objects on a real file system.

use std::os::unix::fs::MetadataExt as _;

use super::super::directories::sync_folder;
use super::*;

fn content(len: usize) -> Bytes {
    (0..len)
        .map(|at| (at / 512 + at) as u8)
        .collect::<Vec<u8>>()
        .into()
}

/// A folder with a writer, and the file that is to be created in it.
struct Rig {
    folder: tempfile::TempDir,
    writer: Arc<DirectWriter>,
    file: PathBuf,
}

impl Rig {
    fn new() -> Self {
        Self::syncing(File::sync_all, sync_folder)
    }

    fn syncing(
        sync_file: impl Fn(&File) -> io::Result<()> + Send + Sync + 'static,
        sync_folder: impl Fn(&Path) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let writer = DirectWriter::syncing(Box::new(sync_file), Arc::new(sync_folder));
        Self {
            file: folder.path().join("1"),
            writer: Arc::new(writer),
            folder,
        }
    }

    async fn create(&self, content: Bytes) -> Option<object_store::Result<()>> {
        self.writer.create(self.file.clone(), content).await
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).expect("read");
        let names = entries.map(|entry| entry.expect("read").file_name());
        names.map(|name| name.to_string_lossy().into()).collect()
    }
}

#[tokio::test]
async fn what_is_written_past_the_cache_is_what_was_given() {
    let lengths = [
        DIRECT_BYTES_MIN,
        DIRECT_BYTES_MIN + 1,
        STEP_BYTES - 1,
        STEP_BYTES,
        STEP_BYTES + 4096,
        2 * STEP_BYTES + 77,
    ];
    for length in lengths {
        let rig = Rig::new();
        let created = rig.create(content(length)).await;
        created.expect("written directly").expect("created");
        assert!(
            fs::read(&rig.file).expect("read") == content(length),
            "{length} bytes"
        );
        assert_eq!(rig.names(), ["1"]);

        let again = rig.create(content(length + 1)).await;
        assert!(
            matches!(again, Some(Err(Error::AlreadyExists { .. }))),
            "{again:?}"
        );
        assert!(fs::read(&rig.file).expect("read") == content(length));
        assert_eq!(rig.names(), ["1"], "nothing is left behind");
    }
}

/// Whoever sees the key sees all of it, whenever the power fails.
#[tokio::test]
async fn a_key_exists_only_with_its_content_synced() {
    let steps: Arc<Mutex<Vec<String>>> = Arc::default();
    let seen = Arc::clone(&steps);
    let sync_file = move |file: &File| {
        let length = file.metadata()?.len();
        // Its staging name, and no other yet.
        let links = file.metadata()?.nlink();
        let step = format!("file of {length} bytes, {links} link");
        seen.lock().expect("not poisoned").push(step);
        Ok(())
    };
    let seen = Arc::clone(&steps);
    let sync_folder = move |folder: &Path| {
        let step = format!("folder, key there: {}", folder.join("1").exists());
        seen.lock().expect("not poisoned").push(step);
        Ok(())
    };
    let rig = Rig::syncing(sync_file, sync_folder);
    let length = DIRECT_BYTES_MIN + 7;
    let created = rig.create(content(length)).await;
    created.expect("written directly").expect("created");
    let wanted = [
        format!("file of {length} bytes, 1 link"),
        "folder, key there: true".to_owned(),
    ];
    assert_eq!(*steps.lock().expect("not poisoned"), wanted);
}

#[tokio::test]
async fn what_cannot_be_synced_is_not_there() {
    let rig = Rig::syncing(|_| Err(io::Error::from_raw_os_error(5)), sync_folder);
    let created = rig.create(content(DIRECT_BYTES_MIN)).await;
    assert!(
        matches!(created, Some(Err(Error::Generic { .. }))),
        "{created:?}"
    );
    assert!(rig.names().is_empty());
}

/// What a killed process left under a staging name is in nobody's way.
#[tokio::test]
async fn a_staging_name_that_is_taken_is_passed_over() {
    let rig = Rig::new();
    fs::write(rig.folder.path().join("1#1"), "half").expect("written");
    let created = rig.create(content(DIRECT_BYTES_MIN)).await;
    created.expect("written directly").expect("created");
    assert_eq!(
        fs::read(&rig.file).expect("read"),
        content(DIRECT_BYTES_MIN)
    );
}

#[tokio::test]
async fn what_is_small_or_has_no_folder_is_left_to_others() {
    let rig = Rig::new();
    let created = rig.create(content(DIRECT_BYTES_MIN - 1)).await;
    assert!(created.is_none(), "{created:?}");
    let elsewhere = rig.folder.path().join("segments/1");
    let created = rig
        .writer
        .create(elsewhere, content(DIRECT_BYTES_MIN))
        .await;
    assert!(created.is_none(), "{created:?}");
    assert!(rig.names().is_empty());
    assert!(rig.create(content(DIRECT_BYTES_MIN)).await.is_some());
}

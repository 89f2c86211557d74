//! Restored files against the model.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use super::{RestoreError, RestoreFormat, restore};
use crate::image::{ChunkCache, Image, ImageError};
use crate::receive::{Receiver, Session};
use crate::repository::{Repository, keys};
use crate::testing::primary::{DISK_BYTES, DISKS, Primary, block_of};

async fn group(repository: &Repository) -> (Primary, Session) {
    let receiver = Receiver::new(repository.clone());
    let mut primary = Primary::new(1);
    primary.write(0, 1, 9);
    primary.write(1, 30, 10);
    primary.clear(0, 3, 2, afterimage_format::op::Op::Trim);
    let (mut session, resume) = primary.connect(&receiver).await.expect("a session");
    primary.catch_up(&mut session, resume).await.expect("all");
    (primary, session)
}

fn image(session: &Session) -> Image {
    let at = session.group().history().latest().expect("a point");
    let cache = Arc::new(ChunkCache::new(1 << 20));
    Image::open(session.group().clone(), at, cache).expect("an image")
}

fn expected(primary: &Primary, disk: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = primary.content[disk]
        .iter()
        .flat_map(|tag| block_of(*tag))
        .collect();
    bytes.truncate(DISK_BYTES);
    bytes
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<String> = entries
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn raw_files_hold_the_disks() {
    use std::os::unix::fs::MetadataExt;
    let (primary, session) = group(&Repository::in_memory()).await;
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("new/folder");
    let mut last = super::RestoreProgress::default();
    let disks = restore(&image(&session), &target, RestoreFormat::Raw, |progress| {
        assert!(progress.bytes_done >= last.bytes_done);
        last = progress;
    })
    .await
    .expect("restored");
    assert_eq!(last.bytes_done, (DISK_BYTES * DISKS) as u64);
    assert_eq!(names(&target), ["vda.raw", "vdb.raw"]);
    for (place, disk) in disks.iter().enumerate() {
        assert_eq!(disk.path, target.join(format!("{}.raw", disk.name)));
        assert!(std::fs::read(&disk.path).expect("read") == expected(&primary, place));
        let allocated = std::fs::metadata(&disk.path).expect("a file").blocks() * 512;
        assert!(allocated < DISK_BYTES as u64, "sparse");
    }
    let again = restore(&image(&session), &target, RestoreFormat::Raw, |_| {}).await;
    assert!(matches!(again, Err(RestoreError::Exists(_))), "{again:?}");
    assert_eq!(names(&target), ["vda.raw", "vdb.raw"]);
}

#[tokio::test]
async fn qcow2_files_hold_the_disks() {
    let (primary, session) = group(&Repository::in_memory()).await;
    let folder = tempfile::tempdir().expect("a folder");
    restore(
        &image(&session),
        folder.path(),
        RestoreFormat::Qcow2,
        |_| {},
    )
    .await
    .expect("restored");
    assert_eq!(names(folder.path()), ["vda.qcow2", "vdb.qcow2"]);
    for (place, name) in ["vda.qcow2", "vdb.qcow2"].iter().enumerate() {
        let raw = folder.path().join("model.raw");
        std::fs::write(&raw, expected(&primary, place)).expect("written");
        let compared = Command::new("qemu-img")
            .args(["compare", "-f", "raw", "-F", "qcow2"])
            .args([&raw, &folder.path().join(name)])
            .output();
        match compared {
            Ok(output) => assert!(output.status.success(), "{name}: {output:?}"),
            Err(error) => eprintln!("qemu-img is not here, {name} was not compared: {error}"),
        }
    }
}

#[tokio::test]
async fn a_damaged_chunk_leaves_no_file() {
    let repository = Repository::in_memory();
    let (primary, session) = group(&repository).await;
    let next = session.group().history().epochs[0].next_sequence();
    for sequence in 1..next {
        let key = keys::segment(primary.group, primary.epoch, sequence);
        let mut bytes = repository.get(&key).await.expect("an object").to_vec();
        bytes[256] ^= 1;
        repository
            .overwrite_for_tests(&key, bytes.into())
            .await
            .expect("written");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let failed = restore(&image(&session), folder.path(), RestoreFormat::Raw, |_| {}).await;
    assert!(
        matches!(failed, Err(RestoreError::Image(ImageError::Chunk { .. }))),
        "{failed:?}"
    );
    assert_eq!(names(folder.path()), Vec::<String>::new());
}

#[tokio::test]
async fn what_is_restored_is_for_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let (_, session) = group(&Repository::in_memory()).await;
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("new");
    for (place, format) in [RestoreFormat::Raw, RestoreFormat::Qcow2]
        .into_iter()
        .enumerate()
    {
        let target = target.join(place.to_string());
        let restored = restore(&image(&session), &target, format, |_| {}).await;
        let mode = |path: &Path| path.metadata().expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(&target), 0o700);
        for disk in restored.expect("restored") {
            assert_eq!(mode(&disk.path), 0o600, "{:?}", disk.path);
        }
    }
}

#[tokio::test]
async fn all_disks_get_their_names_or_none() {
    let (_, session) = group(&Repository::in_memory()).await;
    let image = image(&session);
    let folder = tempfile::tempdir().expect("a folder");
    let last = image.disks().last().expect("a disk").name.clone();
    let last = format!("{last}.raw");
    // Somebody makes a file of the last one's name meanwhile.
    let path = folder.path().join(&last);
    let failed = restore(&image, folder.path(), RestoreFormat::Raw, |_| {
        std::fs::write(&path, "theirs").expect("written");
    })
    .await;
    assert!(matches!(failed, Err(RestoreError::Exists(_))), "{failed:?}");
    assert_eq!(names(folder.path()), [last]);
    assert_eq!(std::fs::read(&path).expect("there"), b"theirs");

    // One that is given up leaves nothing.
    let folder = tempfile::tempdir().expect("a folder");
    {
        let restoring = restore(&image, folder.path(), RestoreFormat::Raw, |_| {});
        let mut restoring = std::pin::pin!(restoring);
        let begun = futures::poll!(restoring.as_mut());
        assert!(begun.is_pending(), "{begun:?}");
        assert_eq!(names(folder.path()).len(), 1);
    }
    assert_eq!(names(folder.path()), Vec::<String>::new());
}

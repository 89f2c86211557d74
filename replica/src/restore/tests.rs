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
    let target = folder.path().join("target");
    {
        let restoring = restore(&image, &target, RestoreFormat::Raw, |_| {});
        let mut restoring = std::pin::pin!(restoring);
        let begun = futures::poll!(restoring.as_mut());
        assert!(begun.is_pending(), "{begun:?}");
        assert_eq!(names(folder.path()).len(), 1);
        assert!(!target.exists(), "it appears as a whole");
    }
    assert_eq!(names(folder.path()), Vec::<String>::new());
}

/// What is in a folder whenever the restore tells of its progress.
async fn seen_meanwhile(image: &Image, target: &Path, watched: &Path) -> Vec<Vec<String>> {
    let mut seen = Vec::new();
    let restored = restore(image, target, RestoreFormat::Raw, |_| {
        seen.push(if watched.exists() {
            names(watched)
        } else {
            Vec::new()
        });
    });
    restored.await.expect("restored");
    assert_eq!(names(target), ["vda.raw", "vdb.raw"]);
    seen
}

#[tokio::test]
async fn a_new_or_empty_target_gets_all_disks_at_once() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    let (_, session) = group(&Repository::in_memory()).await;
    let image = image(&session);
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("target");
    let mut hidden = 0;
    let restored = restore(&image, &target, RestoreFormat::Raw, |_| {
        let [name] = &names(folder.path())[..] else {
            panic!("not one folder: {:?}", names(folder.path()));
        };
        assert!(!target.exists());
        hidden = folder.path().join(name).metadata().expect("there").ino();
    });
    restored.await.expect("restored");
    assert_eq!(names(&target), ["vda.raw", "vdb.raw"]);
    let now = target.metadata().expect("there").ino();
    assert_eq!(now, hidden, "one rename names all");
    assert_eq!(names(folder.path()), ["target"]);

    // An empty one: the folder is another, and like it.
    let empty = folder.path().join("empty");
    std::fs::create_dir(&empty).expect("made");
    let mode = std::fs::Permissions::from_mode(0o751);
    std::fs::set_permissions(&empty, mode).expect("set");
    let before = empty.metadata().expect("there");
    // Over a link, which stays one.
    let link = folder.path().join("link");
    std::os::unix::fs::symlink("empty", &link).expect("a link");
    let seen = seen_meanwhile(&image, &link, &empty).await;
    assert!(seen.iter().all(Vec::is_empty), "{seen:?}");
    let after = empty.metadata().expect("there");
    assert_ne!(after.ino(), before.ino(), "replaced as a whole");
    assert_eq!(after.mode(), before.mode());
    assert!(link.symlink_metadata().expect("there").is_symlink());
    assert_eq!(names(folder.path()), ["empty", "link", "target"]);
}

#[tokio::test]
async fn a_target_with_other_files_stays_the_folder_that_it_is() {
    use std::os::unix::fs::MetadataExt as _;
    let (_, session) = group(&Repository::in_memory()).await;
    let image = image(&session);
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("target");
    std::fs::create_dir(&target).expect("made");
    std::fs::write(target.join("other"), "theirs").expect("written");
    let before = target.metadata().expect("there").ino();
    let restored = restore(&image, &target, RestoreFormat::Raw, |_| {}).await;
    restored.expect("restored");
    assert_eq!(names(&target), ["other", "vda.raw", "vdb.raw"]);
    assert_eq!(target.metadata().expect("there").ino(), before);
    // So does one that something is put into meanwhile.
    let target = folder.path().join("busy");
    std::fs::create_dir(&target).expect("made");
    let restored = restore(&image, &target, RestoreFormat::Raw, |_| {
        std::fs::write(target.join("other"), "theirs").expect("written");
    })
    .await;
    restored.expect("restored");
    assert_eq!(names(&target), ["other", "vda.raw", "vdb.raw"]);
    assert_eq!(names(folder.path()), ["busy", "target"]);
    // And one that has attributes of its own.
    let target = folder.path().join("kept");
    std::fs::create_dir(&target).expect("made");
    let flags = rustix::fs::XattrFlags::empty();
    match rustix::fs::setxattr(&target, "user.kept", b"yes", flags) {
        Err(error) => eprintln!("no attributes here, that was not tried: {error}"),
        Ok(()) => {
            let before = target.metadata().expect("there").ino();
            let restored = restore(&image, &target, RestoreFormat::Raw, |_| {}).await;
            restored.expect("restored");
            assert_eq!(names(&target), ["vda.raw", "vdb.raw"]);
            assert_eq!(target.metadata().expect("there").ino(), before);
        }
    }
}

/// A hidden folder as a killed restore leaves it.
fn leftover(parent: &Path, target: &Path) -> std::path::PathBuf {
    let target = target.file_name().expect("a name").to_string_lossy();
    let left = parent.join(format!(".{target}.{}.partial", uuid::Uuid::new_v4()));
    std::fs::create_dir(&left).expect("made");
    for disk in ["vda.raw", "vdb.raw"] {
        std::fs::write(left.join(disk), "theirs").expect("written");
    }
    left
}

#[tokio::test]
async fn what_a_killed_restore_left_is_removed_by_the_next() {
    let (primary, session) = group(&Repository::in_memory()).await;
    let image = image(&session);
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("target");
    leftover(folder.path(), &target);
    let of_another = leftover(folder.path(), Path::new("other"));
    let restored = restore(&image, &target, RestoreFormat::Raw, |_| {
        // This one is at work.
        assert_eq!(names(folder.path()).len(), 2);
    });
    restored.await.expect("restored");
    let vda = std::fs::read(target.join("vda.raw")).expect("read");
    assert!(vda == expected(&primary, 0));
    let other = of_another.file_name().expect("a name").to_string_lossy();
    assert_eq!(names(folder.path()), [&*other, "target"]);

    // In a target that stays, too.
    let target = folder.path().join("full");
    std::fs::create_dir(&target).expect("made");
    leftover(&target, &target);
    let restored = restore(&image, &target, RestoreFormat::Raw, |_| {}).await;
    restored.expect("restored");
    assert_eq!(names(&target), ["vda.raw", "vdb.raw"]);
}

#[tokio::test]
async fn a_restore_that_runs_keeps_its_hidden_folder() {
    let (_, session) = group(&Repository::in_memory()).await;
    let image = image(&session);
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("target");
    let first = restore(&image, &target, RestoreFormat::Raw, |_| {});
    let mut first = std::pin::pin!(first);
    assert!(futures::poll!(first.as_mut()).is_pending());
    let second = restore(&image, &target, RestoreFormat::Raw, |_| {}).await;
    second.expect("restored");
    // It finds the place taken, and takes nothing of the other one.
    let failed = first.await;
    assert!(matches!(failed, Err(RestoreError::Exists(_))), "{failed:?}");
    assert_eq!(names(&target), ["vda.raw", "vdb.raw"]);
    assert_eq!(names(folder.path()), ["target"]);
}

#[tokio::test]
async fn a_kill_between_two_names_is_told_by_the_next_restore() {
    let (_, session) = group(&Repository::in_memory()).await;
    let image = image(&session);
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("target");
    std::fs::create_dir(&target).expect("made");
    // Beside the target where it was empty when that restore began, in it where it was not.
    for parent in [folder.path(), &target] {
        let left = leftover(parent, &target);
        let half = target.join("vda.raw");
        std::fs::hard_link(left.join("vda.raw"), &half).expect("linked");
        let failed = restore(&image, &target, RestoreFormat::Raw, |_| {}).await;
        let told = failed.expect_err("half-done");
        assert!(
            matches!(&told, RestoreError::HalfNamed(named) if named[..] == [half.clone()]),
            "{told:?}"
        );
        assert!(told.to_string().contains(&half.display().to_string()));
        assert!(left.exists() && half.exists(), "nothing is removed unasked");
        // As it says.
        std::fs::remove_file(&half).expect("removed");
        let restored = restore(&image, &target, RestoreFormat::Raw, |_| {}).await;
        restored.expect("restored");
        assert_eq!(names(&target), ["vda.raw", "vdb.raw"]);
        assert!(!left.exists());
        std::fs::remove_dir_all(&target).expect("removed");
        std::fs::create_dir(&target).expect("made");
    }
    // All had their names: it is whole, only the hidden folder is too much.
    let left = leftover(&target, &target);
    for disk in ["vda.raw", "vdb.raw"] {
        std::fs::hard_link(left.join(disk), target.join(disk)).expect("linked");
    }
    let again = restore(&image, &target, RestoreFormat::Raw, |_| {}).await;
    assert!(matches!(again, Err(RestoreError::Exists(_))), "{again:?}");
    assert_eq!(names(&target), ["vda.raw", "vdb.raw"]);
}

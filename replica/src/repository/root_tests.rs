//! A repository's folder goes, is exchanged, and comes back.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::{Created, Repository, RepositoryError, keys};
use crate::receive::{IngestError, Receiver};
use crate::testing::primary::Primary;

const KEY: &str = "names/vm1";

/// A place for a repository, and one to take it to.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a folder"),
        }
    }

    fn here(&self) -> PathBuf {
        self.folder.path().join("mnt/repo")
    }

    fn aside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn open(&self) -> Repository {
        let url = format!("file://{}", self.here().display());
        Repository::open(&url).await.expect("opened")
    }

    fn take_away(&self, to: &str) {
        fs::rename(self.here(), self.aside(to)).expect("taken away");
    }

    fn put_back(&self, from: &str) {
        fs::rename(self.aside(from), self.here()).expect("put back");
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).expect("copied");
        }
    }
}

fn one() -> Bytes {
    Bytes::from_static(b"one")
}

#[tokio::test]
async fn nothing_is_made_before_the_first_object() {
    let place = Place::new();
    let repository = place.open().await;
    repository
        .attend()
        .await
        .expect("nothing known, nothing lost");
    let missing = repository.get(KEY).await;
    assert!(missing.is_err_and(|error| error.is_not_found()));
    assert!(
        repository
            .names_below("names")
            .await
            .expect("none")
            .is_empty()
    );
    assert!(!place.here().parent().expect("above").exists());
    let created = repository.create(KEY, one()).await;
    assert_eq!(created.expect("created"), Created::Ours);
    assert!(place.here().join(keys::IDENTITY).exists());
}

#[tokio::test]
async fn a_folder_that_is_gone_is_not_made_anew() {
    let place = Place::new();
    let repository = place.open().await;
    repository.create(KEY, one()).await.expect("created");
    place.take_away("away");
    for _ in 0..2 {
        let created = repository.create("names/vm2", one()).await;
        assert!(
            matches!(&created, Err(error @ RepositoryError::Gone { .. }) if !error.is_lasting()),
            "{created:?}"
        );
        let attended = repository.attend().await;
        assert!(matches!(attended, Err(RepositoryError::Gone { .. })));
    }
    assert!(!place.here().exists(), "made anew");
    place.put_back("away");
    repository.attend().await.expect("back");
    repository
        .create("names/vm2", one())
        .await
        .expect("created");
    assert_eq!(repository.turn(), 0, "the same files");
}

#[tokio::test]
async fn what_stands_in_its_place_is_left_alone() {
    let place = Place::new();
    let repository = place.open().await;
    repository.create(KEY, one()).await.expect("created");
    place.take_away("away");
    // A mount point without its mount.
    fs::create_dir(place.here()).expect("a folder");
    let created = repository.create("names/vm2", one()).await;
    assert!(
        matches!(created, Err(RepositoryError::Gone { .. })),
        "{created:?}"
    );
    assert_eq!(fs::read_dir(place.here()).expect("a folder").count(), 0);
    // Another repository.
    let other = place.open().await;
    other.create("names/other", one()).await.expect("created");
    let created = repository.create("names/vm2", one()).await;
    assert!(
        matches!(created, Err(RepositoryError::Another { .. })),
        "{created:?}"
    );
    assert!(matches!(
        repository.attend().await,
        Err(RepositoryError::Another { .. })
    ));
    assert!(!place.here().join("names/vm2").exists());
    place.take_away("other");
    place.put_back("away");
    repository.attend().await.expect("back");
    repository
        .create("names/vm2", one())
        .await
        .expect("created");
}

#[tokio::test]
async fn a_repository_from_before_gets_its_identity_when_it_is_opened() {
    let place = Place::new();
    place
        .open()
        .await
        .create(KEY, one())
        .await
        .expect("created");
    let file = place.here().join(keys::IDENTITY);
    fs::remove_file(&file).expect("removed");
    let repository = place.open().await;
    assert!(file.exists());
    place.take_away("away");
    let created = repository.create("names/vm2", one()).await;
    assert!(matches!(created, Err(RepositoryError::Gone { .. })));
}

#[tokio::test]
async fn an_identity_that_is_damaged_is_not_replaced() {
    let place = Place::new();
    place
        .open()
        .await
        .create(KEY, one())
        .await
        .expect("created");
    fs::write(place.here().join(keys::IDENTITY), b"something").expect("written");
    let url = format!("file://{}", place.here().display());
    let opened = Repository::open(&url).await;
    assert!(
        matches!(opened, Err(RepositoryError::Identity { .. })),
        "{opened:?}"
    );
}

/// An older copy under the same identity: what was read before does not count any longer, of no
/// group.
#[tokio::test]
async fn the_history_of_a_copy_is_read_again() {
    let place = Place::new();
    let receiver = Receiver::new(place.open().await);
    let mut primaries = [Primary::new(1), Primary::new(2)];
    let mut sessions = Vec::new();
    for primary in &mut primaries {
        let (mut session, resume) = primary.connect(&receiver).await.expect("connected");
        primary.write(0, 1, 2);
        let caught_up = primary.catch_up(&mut session, resume).await;
        caught_up.expect("shipped");
        sessions.push(session);
    }
    let copied = primaries.each_ref().map(Primary::last);
    copy(&place.here(), &place.aside("copy"));
    for (primary, session) in primaries.iter_mut().zip(&mut sessions) {
        let at = primary.write(0, 3, 1);
        session.give(primary.segment(at, at)).await.expect("stored");
    }
    place.take_away("away");
    place.put_back("copy");

    let at = primaries[0].write(0, 4, 1);
    let refused = sessions[0].give(primaries[0].segment(at, at)).await;
    assert!(
        matches!(
            refused,
            Err(IngestError::Repository(RepositoryError::Returned { .. }))
        ),
        "{refused:?}"
    );
    let (_, resume) = primaries[0].connect(&receiver).await.expect("connected");
    assert_eq!(resume.cursor.lsn.0, copied[0]);
    // The other group's session knows more than the copy has.
    let at = primaries[1].write(0, 4, 1);
    let refused = sessions[1].give(primaries[1].segment(at, at)).await;
    assert!(
        matches!(refused, Err(IngestError::Superseded { .. })),
        "{refused:?}"
    );
    let (_, resume) = primaries[1].connect(&receiver).await.expect("connected");
    assert_eq!(resume.cursor.lsn.0, copied[1]);
}

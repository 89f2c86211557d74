//! The repository layer against a folder, memory, and stores that fail.

use std::sync::Arc;

use bytes::Bytes;
use futures::executor::block_on;
use object_store::memory::InMemory;

use super::{Created, Repository, RepositoryError, keys};
use crate::testing::faults::{Fault, FaultyStore};

use std::os::unix::fs::PermissionsExt as _;

const KEY: &str = "names/vm1";

#[test]
fn a_key_is_created_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let url = format!("file://{}/deep/er", folder.path().display());
    block_on(async {
        let repository = Repository::open(&url).await.expect("opened");
        let one = Bytes::from_static(b"one");
        assert_eq!(
            repository.create(KEY, one.clone()).await.expect("created"),
            Created::Ours
        );
        assert_eq!(
            repository.create(KEY, one.clone()).await.expect("same"),
            Created::Ours
        );
        let two = repository
            .create(KEY, Bytes::from_static(b"two"))
            .await
            .expect("taken");
        assert_eq!(two, Created::Taken(one.clone()));
        let top = folder.path().join("deep").metadata().expect("made");
        assert_eq!(top.permissions().mode() & 0o777, 0o700, "for its owner");
        let again = Repository::open_existing(&url).await.expect("opened");
        assert_eq!(again.get(KEY).await.expect("read"), one);
        assert_eq!(
            again.get_suffix(KEY, 2).await.expect("read"),
            (one.slice(1..), 3)
        );
        assert_eq!(again.names_below("names").await.expect("listed"), ["vm1"]);
        assert!(
            again
                .get("names/none")
                .await
                .is_err_and(|error| error.is_not_found())
        );
    });
}

#[test]
fn a_lost_answer_is_read_back() {
    let memory = Arc::new(InMemory::new());
    let store = Arc::new(FaultyStore::new(memory, 0, Fault::After));
    let repository = Repository::on(store.clone(), "faulty:");
    block_on(async {
        // Down: it stays unknown whether the object is there.
        let failed = repository.create(KEY, Bytes::from_static(b"one")).await;
        assert!(
            matches!(failed, Err(RepositoryError::Store { .. })),
            "{failed:?}"
        );
        store.heal();
        let again = repository.create(KEY, Bytes::from_static(b"one")).await;
        assert_eq!(again.expect("ours"), Created::Ours);
    });
}

#[test]
fn a_repository_of_another_version_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let url = format!("file://{}", folder.path().display());
    block_on(async {
        let ours = Repository::open(&url).await.expect("opened");
        ours.create("names/vm1", Bytes::from_static(b"x"))
            .await
            .expect("stored");
        Repository::open(&url).await.expect("of our version");
        Repository::open_existing(&url)
            .await
            .expect("of our version");
        let marker = folder.path().join("afterimage-repository");
        for text in [
            "afterimage repository 2\n",
            "afterimage rep\u{1}sitory 1\n",
            "",
        ] {
            std::fs::write(&marker, text).expect("written");
            for opened in [
                Repository::open(&url).await,
                Repository::open_existing(&url).await,
            ] {
                let refused = opened.expect_err("another version");
                assert!(
                    matches!(refused, RepositoryError::Marker { .. }),
                    "{refused:?}"
                );
                assert!(refused.to_string().contains("afterimage-repository"));
            }
            assert_eq!(std::fs::read_to_string(&marker).expect("there"), text);
        }
    });
}

#[test]
fn what_is_no_repository_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    std::fs::write(&file, b"x").expect("written");
    block_on(async {
        for url in [
            // None of them is even tried: no credentials, no server, no folder is looked for.
            "/srv/repo",
            "http://x/y",
            "file:relative",
            "s3://",
            "file://x\0y",
            "file:///srv/../etc",
            "s3://bucket/../other",
            "s3://../bucket",
            "s3://bucket/a\0b",
            "s3://bucket/a//b",
            "s3://bucket/.hidden",
            "",
        ] {
            let opened = Repository::open(url).await;
            assert!(
                matches!(opened, Err(RepositoryError::BadUrl { .. })),
                "{url:?}: {opened:?}"
            );
        }
        let url = format!("file://{}", file.display());
        assert!(matches!(
            Repository::open(&url).await,
            Err(RepositoryError::Folder { .. })
        ));
        let url = format!("file://{}/none", folder.path().display());
        let opened = Repository::open_existing(&url).await;
        assert!(
            matches!(opened, Err(RepositoryError::Folder { .. })),
            "{opened:?}"
        );
        assert!(!folder.path().join("none").exists());
        // A folder that is something else.
        let url = format!("file://{}", folder.path().display());
        assert!(
            Repository::open_existing(&url)
                .await
                .is_err_and(|error| error.is_not_found())
        );
    });
}

#[test]
fn keys_are_made_of_plain_parts() {
    for key in [
        "../x", "a/../b", "a//b", "/a", "a/", "a\0", "a b", "a/.b", "a/-b", "ä", "a#1",
    ] {
        assert!(keys::check(key).is_err(), "{key:?}");
    }
    let group = afterimage_format::ids::GroupId::from_bytes([0xab; 16]);
    let key = keys::segment(group, afterimage_format::ids::Epoch(3), 7);
    let uuid = "abababab-abab-abab-abab-abababababab";
    assert_eq!(
        key,
        format!("groups/{uuid}/segments/0000000003/00000000000000000007")
    );
    keys::check(&key).expect("a key");
}

//! A flipped bit in every kind of object is found and named.

use futures::FutureExt as _;
use futures::executor::block_on;

use super::{VerifyReport, verify};
use crate::group::GroupError;
use crate::receive::Receiver;
use crate::repository::{Repository, keys};
use crate::testing::primary::Primary;
use afterimage_format::ids::Epoch;

/// A group with two epochs, so that there is every kind of object.
fn group() -> (Repository, Primary, Vec<String>) {
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone());
    let mut primary = Primary::new(1);
    block_on(async {
        for _ in 0..2 {
            primary.write(0, 1, 9);
            primary.checkpoint("");
            primary.gap_at = None;
            let (mut session, resume) = primary.connect(&receiver).await.expect("a session");
            primary.catch_up(&mut session, resume).await.expect("all");
            primary.demands_epoch = true;
        }
    });
    let mut keys = vec![keys::name(&primary.name).expect("a key")];
    keys.extend((1..=2).map(|number| keys::manifest(primary.group, number)));
    let group = block_on(receiver.group(primary.group)).expect("a group");
    for epoch in &group.history().epochs {
        let end = epoch.next_sequence() + u64::from(epoch.number.0 == 1);
        keys.extend((1..end).map(|seq| keys::segment(primary.group, epoch.number, seq)));
    }
    assert!(keys.len() > 8, "{keys:?}");
    (repository, primary, keys)
}

fn check(repository: &Repository, name: &str) -> Result<VerifyReport, GroupError> {
    block_on(verify(repository, name, |_| {}))
}

#[test]
fn a_whole_group_has_no_problems() {
    let (repository, primary, keys) = group();
    let mut last = 0;
    let report = block_on(verify(&repository, &primary.name, |progress| {
        assert!(progress.objects > last);
        last = progress.objects;
    }))
    .expect("a report");
    assert_eq!(report.problems, []);
    assert_eq!(report.read.objects as usize, keys.len());
    assert!(matches!(
        check(&repository, "none"),
        Err(GroupError::Unknown { .. })
    ));
}

#[test]
fn an_epoch_that_begins_meanwhile_is_no_damage() {
    let (repository, primary, keys) = group();
    let second = keys::manifest(primary.group, 2);
    let folder = keys::segment(primary.group, Epoch(2), 1);
    let folder = folder.rsplit_once('/').expect("a folder").0;
    let mut newer = Vec::new();
    for key in keys
        .iter()
        .filter(|key| **key == second || key.starts_with(folder))
    {
        newer.push((key, block_on(repository.get(key)).expect("an object")));
        block_on(repository.delete_for_tests(key)).expect("deleted");
    }
    let without = check(&repository, &primary.name).expect("a report");
    assert_eq!(without.problems, []);
    let report = block_on(verify(&repository, &primary.name, |progress| {
        // The name, the manifest, the first segment.
        if progress.objects == 3 {
            for (key, bytes) in newer.drain(..) {
                let stored = repository.overwrite_for_tests(key, bytes).now_or_never();
                stored.expect("in memory").expect("stored");
            }
        }
    }));
    assert_eq!(report.expect("a report").problems, []);
    assert!(newer.is_empty());
}

#[test]
fn a_flipped_bit_in_any_object_is_found() {
    let (repository, primary, keys) = group();
    for key in &keys {
        let good = block_on(repository.get(key)).expect("an object");
        let places = [
            0,
            9,
            good.len() / 3,
            good.len() / 2,
            good.len().saturating_sub(130),
            good.len() - 1,
        ];
        for at in places.into_iter().filter(|at| *at < good.len()) {
            let mut bad = good.to_vec();
            bad[at] ^= 1;
            block_on(repository.overwrite_for_tests(key, bad.into())).expect("written");
            let report = check(&repository, &primary.name).expect("a report");
            let named = report.problems.iter().find(|problem| problem.key == *key);
            let problem = named.unwrap_or_else(|| panic!("{key}, byte {at}: {report:?}"));
            assert!(
                problem.offset.is_some_and(|offset| offset <= at as u64),
                "{at}: {problem:?}"
            );
            assert!(!problem.advice.is_empty());
        }
        block_on(repository.overwrite_for_tests(key, good)).expect("written");
    }
    assert_eq!(
        check(&repository, &primary.name)
            .expect("a report")
            .problems,
        []
    );
}

#[test]
fn a_missing_or_misplaced_object_is_found() {
    let (repository, primary, keys) = group();
    // The last object has nothing behind it that proves it existed.
    for pair in keys[1..].windows(2) {
        let good = block_on(repository.get(&pair[0])).expect("an object");
        block_on(repository.delete_for_tests(&pair[0])).expect("deleted");
        let report = check(&repository, &primary.name).expect("a report");
        assert!(
            report.problems.iter().any(|p| p.key == pair[0]),
            "{}: {report:?}",
            pair[0]
        );
        let other = block_on(repository.get(&pair[1])).expect("an object");
        block_on(repository.overwrite_for_tests(&pair[0], other)).expect("written");
        let report = check(&repository, &primary.name).expect("a report");
        // Another's content may fit there by itself; then its own place shows it.
        assert!(!report.problems.is_empty(), "{}", pair[0]);
        block_on(repository.overwrite_for_tests(&pair[0], good)).expect("written");
    }
}

//! Epochs in doubt: a takeover that broke off, clones of a log, sinks with different histories.

use std::sync::Arc;

use afterimage_format::ids::{Epoch, LogId, Lsn};
use afterimage_format::manifest::is_terminator;
use futures::executor::block_on;
use object_store::memory::InMemory;

use super::super::{IngestError, Peer, Receiver};
use super::{base, compare};
use crate::group::Group;
use crate::repository::{Repository, keys};
use crate::testing::faults::{Fault, FaultyStore};
use crate::testing::primary::Primary;

/// The same group on another log that has no epoch yet. Its LSNs go on, as those of a log do that
/// was rewritten after a failed sync.
fn on_another_log(old: &Primary, seed: u8) -> Primary {
    let mut new = old.clone();
    new.log = LogId::from_bytes([seed; 16]);
    new.epoch = Epoch(0);
    new.gap_at = None;
    new
}

#[test]
fn a_log_that_goes_on_under_a_new_uuid_begins_an_epoch_with_a_pass() {
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone());
    let (old, new) = block_on(async {
        let (old, _) = base(&receiver, 1).await;
        let mut new = on_another_log(&old, 0x99);
        new.write(0, 3, 2);
        let (mut session, resume) = new.connect(&receiver).await.expect("a session");
        assert_eq!((new.epoch, resume.cursor.lsn), (Epoch(2), Lsn::ZERO));
        // Not without a pass: nothing says what the disks held before.
        let first = old.last() + 1;
        let bare = session.give(new.segment(first, first)).await;
        assert!(matches!(bare, Err(IngestError::Refused(_))), "{bare:?}");
        let (mut session, resume) = new.connect(&receiver).await.expect("a session");
        new.catch_up(&mut session, resume).await.expect("all");
        new.write(1, 3, 2);
        let resume = session.resume();
        new.catch_up(&mut session, resume).await.expect("all");
        (old, new)
    });
    let group = block_on(Group::load(&repository, old.group)).expect("a group");
    let epochs: Vec<(u64, u64)> = {
        let history = group.history();
        let all = history.readable();
        all.map(|(epoch, _, _, last)| (epoch.number.0, last.0))
            .collect()
    };
    assert_eq!(epochs, [(1, old.last()), (2, new.last())]);
    assert!(compare(&repository, &new) > 10, "points of both epochs");
}

/// Found by fuzzing: the number after the highest was counted, and nothing counts beyond ten digits.
#[test]
fn an_epoch_behind_the_highest_is_refused() {
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone());
    let mut primary = Primary::new(1);
    primary.epoch = Epoch(u64::MAX);
    let refused = |outcome| matches!(outcome, Err(IngestError::EpochsUsedUp { .. }));
    assert!(refused(block_on(primary.connect(&receiver))));
    primary.epoch = Epoch::MAX;
    block_on(primary.connect(&receiver)).expect("a session");
    primary.demands_epoch = true;
    assert!(refused(block_on(primary.connect(&receiver))));
    let mut another = on_another_log(&primary, 0x99);
    assert!(refused(block_on(another.connect(&receiver))));
    block_on(Group::load(&repository, primary.group)).expect("still readable");
}

/// A takeover that meets a fault at the `n`th call to the store; `None` when it has fewer calls.
/// Then `next` comes to a replica that starts anew.
fn takeover_broken_at(n: i64, fault: Fault, next: impl Fn(&Primary) -> Primary) -> Option<bool> {
    let memory = Arc::new(InMemory::new());
    let repository = Repository::on(memory.clone(), "memory:");
    block_on(async {
        let (mut old, _) = base(&Receiver::new(repository.clone()), 1).await;
        let points = compare(&repository, &old);
        let last = old.last();
        let mut first = on_another_log(&old, 0x99);
        let faulty = Arc::new(FaultyStore::new(memory.clone(), n, fault));
        let dying = Receiver::new(Repository::on(faulty.clone(), "faulty:"));
        let broken = first.connect(&dying).await;
        if broken.is_ok() && i64::try_from(faulty.calls()).is_ok_and(|calls| calls <= n) {
            return None;
        }
        // Was the old epoch ended, and nothing begun in its place?
        let (ends, manifests) = {
            let group = Group::load(&repository, old.group).await.expect("a group");
            let history = group.history();
            (history.epochs[0].next_sequence(), history.manifest.number)
        };
        let end = keys::segment(old.group, Epoch(1), ends);
        let ended = repository.get(&end).await.is_ok_and(|b| is_terminator(&b));
        let between = ended && manifests == 1;

        let alive = Receiver::new(repository.clone());
        if ended {
            // Whatever became of the rest, the old epoch takes nothing any more.
            let fenced = alive.hello(&old.hello(), &Peer::Direct, 1).await;
            assert!(
                matches!(fenced, Err(IngestError::Fenced { .. })),
                "call {n}: {fenced:?}"
            );
        }
        let mut next = next(&first);
        let (mut session, resume) = next.connect(&alive).await.expect("a session");
        assert!(next.epoch > Epoch(1), "call {n}");
        next.write(0, 2, 2);
        next.catch_up(&mut session, resume).await.expect("all");
        next.write(1, 2, 2);
        let resume = session.resume();
        next.catch_up(&mut session, resume).await.expect("all");
        assert!(compare(&repository, &next) > points, "earlier points stay");
        // The old one comes back and finds itself fenced.
        old.write(0, 0, 1);
        let zombie = alive.hello(&old.hello(), &Peer::Direct, 1).await;
        assert!(
            matches!(zombie, Err(IngestError::Fenced { .. })),
            "call {n}: {zombie:?}"
        );
        assert_eq!(old.last(), last + 1);
        let checked = crate::verify::verify(&repository, &old.name, |_| {}).await;
        assert_eq!(checked.expect("a report").problems, [], "call {n}");
        Some(between)
    })
}

#[test]
fn a_takeover_that_breaks_off_anywhere_can_be_repeated() {
    let same = |first: &Primary| first.clone();
    let another = |first: &Primary| on_another_log(first, 0x9a);
    for fault in [Fault::Before, Fault::After] {
        for (who, next) in [
            ("the same log", &same as &dyn Fn(&Primary) -> Primary),
            ("another log", &another),
        ] {
            let (mut n, mut between) = (0, 0);
            while let Some(was_between) = takeover_broken_at(n, fault, next) {
                between += u32::from(was_between);
                n += 1;
            }
            assert!(n > 5, "{who}: only {n} calls");
            assert!(between > 0, "{who}: never between terminator and manifest");
        }
    }
}

/// Two copies of a primary, log and all: both go on from the same record, each with writes of its
/// own.
#[test]
fn clones_of_a_log_never_mix() {
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone());
    block_on(async {
        let (mut one, mut session) = base(&receiver, 1).await;
        let mut two = one.clone();
        for _ in 0..20 {
            two.new_tag(); // other content from here on
        }
        one.write(0, 5, 3);
        two.write(0, 5, 3);
        let resume = session.resume();
        one.catch_up(&mut session, resume).await.expect("all");
        let points = compare(&repository, &one);

        // The clone finds records that are not its own under its LSNs, and demands an epoch.
        let (_, resume) = two.connect(&receiver).await.expect("a session");
        assert_ne!(resume.cursor.chain, two.chain_at(resume.cursor.lsn.0));
        two.demands_epoch = true;
        let (mut of_two, resume) = two.connect(&receiver).await.expect("a session");
        assert_eq!((two.epoch, resume.cursor.lsn), (Epoch(2), Lsn::ZERO));
        // The other demands one as well before a record of it is there: they are told apart by
        // nothing yet, and get the same one.
        one.demands_epoch = true;
        let (mut of_one, resume_one) = one.connect(&receiver).await.expect("a session");
        assert_eq!((one.epoch, resume_one.cursor.lsn), (Epoch(2), Lsn::ZERO));
        // One session counts at a time; what the first said is refused.
        two.gap_at = None;
        let late = two.catch_up(&mut of_two, resume).await;
        assert!(
            matches!(late, Err(IngestError::Superseded { .. })),
            "{late:?}"
        );
        one.gap_at = None;
        one.catch_up(&mut of_one, resume_one).await.expect("all");
        assert!(compare(&repository, &one) > points);

        // The one that comes second in that epoch sees that, and demands another; then the first is
        // fenced for good: an epoch with records in it is given to nobody twice.
        let (_, resume) = two.connect(&receiver).await.expect("a session");
        assert_ne!(resume.cursor.chain, two.chain_at(resume.cursor.lsn.0));
        two.demands_epoch = true;
        two.gap_at = None;
        let (mut of_two, resume) = two.connect(&receiver).await.expect("a session");
        assert_eq!(two.epoch, Epoch(3));
        two.catch_up(&mut of_two, resume).await.expect("all");
        for demands in [false, true] {
            one.demands_epoch = demands;
            let fenced = receiver.hello(&one.hello(), &Peer::Direct, 1).await;
            assert!(
                matches!(fenced, Err(IngestError::Fenced { .. })),
                "{fenced:?}"
            );
        }
        let checked = crate::verify::verify(&repository, &one.name, |_| {}).await;
        assert_eq!(checked.expect("a report").problems, []);
    });
    // Each epoch holds what its own clone wrote and nothing else.
    let group = block_on(Group::load(&repository, Primary::new(1).group)).expect("a group");
    assert_eq!(group.history().epochs.len(), 3);
}

/// A log gets its epoch from one sink; another has seen more epochs of the group and does not know
/// the log.
#[test]
fn a_sink_with_more_epochs_gives_another_at_first_contact() {
    let (less, more) = (Repository::in_memory(), Repository::in_memory());
    let (a, b) = (Receiver::new(less.clone()), Receiver::new(more.clone()));
    block_on(async {
        let (first, _) = base(&b, 1).await;
        let mut last = first.clone();
        for seed in [0x91, 0x92, 0x93] {
            last = on_another_log(&last, seed);
            let (mut session, resume) = last.connect(&b).await.expect("a session");
            last.write(0, 1, 1);
            last.catch_up(&mut session, resume).await.expect("all");
        }
        assert_eq!(last.epoch, Epoch(4));

        let mut new = on_another_log(&last, 0x99);
        let (mut at_a, resume) = new.connect(&a).await.expect("a session");
        assert_eq!(new.epoch, Epoch(1));
        new.catch_up(&mut at_a, resume).await.expect("all");
        // As it stands it could be a primary of long ago.
        let fenced = b.hello(&new.hello(), &Peer::Direct, 1).await;
        assert!(
            matches!(fenced, Err(IngestError::Fenced { .. })),
            "{fenced:?}"
        );
        new.demands_epoch = true;
        new.gap_at = None;
        let (mut at_b, resume) = new.connect(&b).await.expect("a session");
        assert_eq!(new.epoch, Epoch(5));
        new.catch_up(&mut at_b, resume).await.expect("all");
        // The first sink follows.
        new.gap_at = None;
        let (mut at_a, resume) = new.connect(&a).await.expect("a session");
        assert_eq!((new.epoch, resume.cursor.lsn), (Epoch(5), Lsn::ZERO));
        new.catch_up(&mut at_a, resume).await.expect("all");
        assert!(compare(&less, &new) > 0 && compare(&more, &new) > 0);
        // A log that the sink has known is no first contact: demanding does not help a zombie.
        let mut zombie = last.clone();
        zombie.demands_epoch = true;
        let fenced = b.hello(&zombie.hello(), &Peer::Direct, 1).await;
        assert!(
            matches!(fenced, Err(IngestError::Fenced { .. })),
            "{fenced:?}"
        );
    });
}

/// The repository is not mounted, or is another one: history does not silently begin anew there.
#[test]
fn a_group_that_was_stored_here_does_not_begin_anew_in_an_empty_repository() {
    block_on(async {
        let receiver = Receiver::new(Repository::in_memory());
        let (mut primary, mut session) = base(&receiver, 1).await;
        primary.acked = session.resume().cursor;
        let at = primary.write(0, 1, 1);
        session.give(primary.segment(at, at)).await.expect("stored");

        let empty = Repository::in_memory();
        let refused = primary.connect(&Receiver::new(empty.clone())).await;
        let refused = refused.map(|_| ()).expect_err("lost");
        assert!(matches!(refused, IngestError::Lost { .. }), "{refused}");
        assert!(refused.to_string().contains("--accept-new-repository"));
        assert_eq!(Group::names(&empty).await.expect("listed").len(), 0);

        let accepting = Receiver::new(empty.clone()).accepting_loss(true);
        let (_, resume) = primary.connect(&accepting).await.expect("a session");
        assert_eq!(resume.cursor.lsn, Lsn::ZERO);
        // Where it is found it goes on.
        let (_, resume) = primary.connect(&receiver).await.expect("a session");
        assert_eq!(resume.cursor.lsn, Lsn(at));
    });
}

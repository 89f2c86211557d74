//! Receiving: crashes between any two steps, two primaries, fencing, bad input.

mod epochs;
mod refusals;
mod server;
mod tls;

use std::sync::Arc;

use afterimage_format::ids::{DiskIndex, Epoch, Lsn};
use futures::executor::block_on;
use object_store::memory::InMemory;

use super::{IngestError, Peer, Receiver};
use crate::group::{Group, Intake};
use crate::history::Position;
use crate::image::{ChunkCache, Image};
use crate::repository::Repository;
use crate::testing::faults::{Fault, FaultyStore};
use crate::testing::primary::{DISK_BYTES, Primary, block_of};

fn script(primary: &mut Primary) {
    for round in 0..4u64 {
        primary.write(0, round * 3, 5);
        primary.write(1, 20 - round, 3);
        primary.checkpoint(&format!("round-{round}"));
        primary.clear(0, round, 2, afterimage_format::op::Op::Trim);
    }
}

/// Every readable point equals the model; how many there are.
fn compare(repository: &Repository, primary: &Primary) -> usize {
    // On a thread of its own: the caller may be within an executor.
    std::thread::scope(|scope| {
        scope
            .spawn(|| compare_here(repository, primary))
            .join()
            .expect("compared")
    })
}

fn compare_here(repository: &Repository, primary: &Primary) -> usize {
    let group = Arc::new(block_on(Group::load(repository, primary.group)).expect("a group"));
    let cache = Arc::new(ChunkCache::new(1 << 22));
    let ranges: Vec<_> = {
        let history = group.history();
        history
            .readable()
            .map(|(epoch, _, first, last)| (epoch.number, first, last))
            .collect()
    };
    let mut points = 0;
    for (epoch, first, last) in ranges {
        for lsn in first.0..=last.0 {
            let at = Position {
                epoch,
                lsn: Lsn(lsn),
            };
            let image = Image::open(group.clone(), at, cache.clone()).expect("an image");
            for (disk, blocks) in primary.after[&lsn].iter().enumerate() {
                let mut expected: Vec<u8> = blocks.iter().flat_map(|tag| block_of(*tag)).collect();
                expected.truncate(DISK_BYTES);
                let mut read = vec![0; DISK_BYTES];
                block_on(image.read(DiskIndex(disk as u16), 0, &mut read)).expect("read");
                assert!(read == expected, "disk {disk} at {at}");
            }
            points += 1;
        }
    }
    points
}

/// One whole life of a replica process: everything is sent until something fails.
fn live(store: Arc<FaultyStore>, primary: &mut Primary) -> Result<(), IngestError> {
    let receiver = Receiver::new(Repository::on(store, "faulty:"));
    block_on(async {
        let (mut session, resume) = primary.connect(&receiver).await?;
        primary.catch_up(&mut session, resume).await?;
        script(primary);
        let resume = session.resume();
        primary.catch_up(&mut session, resume).await
    })
}

/// Runs the script with a fault at call `n`, then again without; `None` when there are fewer
/// calls.
fn crash_at(n: i64, fault: Fault) -> Option<()> {
    let memory = Arc::new(InMemory::new());
    let mut primary = Primary::new(1);
    script(&mut primary);
    let faulty = Arc::new(FaultyStore::new(memory.clone(), n, fault));
    let first = live(faulty.clone(), &mut primary);
    let reached = i64::try_from(faulty.calls()).is_ok_and(|calls| calls > n);
    if !reached {
        first.expect("no fault came");
        return None;
    }
    // The replica starts anew on what the store kept; more is written meanwhile.
    script(&mut primary);
    let healthy = Arc::new(FaultyStore::new(memory.clone(), i64::MAX, Fault::Before));
    live(healthy, &mut primary).expect("goes on");
    let repository = Repository::on(memory, "memory:");
    let points = compare(&repository, &primary);
    assert!(points > 10, "{points} points after a fault at call {n}");
    let group = block_on(Group::load(&repository, primary.group)).expect("a group");
    assert_eq!(
        group.history().newest().expect("an epoch").cursor.lsn.0,
        primary.last()
    );
    Some(())
}

#[test]
fn a_crash_between_any_two_steps_costs_nothing() {
    for fault in [Fault::Before, Fault::After] {
        let mut n = 0;
        while crash_at(n, fault).is_some() {
            n += 1;
        }
        assert!(n > 20, "only {n} calls");
    }
}

#[test]
fn a_full_repository_stops_the_intake_and_lets_go_when_there_is_room() {
    let memory = Arc::new(InMemory::new());
    let mut primary = Primary::new(1);
    script(&mut primary);
    let store = Arc::new(FaultyStore::new(memory.clone(), 4, Fault::Full));
    let receiver = Receiver::new(Repository::on(store.clone(), "faulty:"));
    let first = block_on(async {
        let (mut session, resume) = primary.connect(&receiver).await?;
        primary.catch_up(&mut session, resume).await
    });
    let error = first.expect_err("full");
    assert!(
        error
            .repository()
            .is_some_and(crate::repository::RepositoryError::is_full),
        "{error}"
    );
    let group = block_on(receiver.group(primary.group)).expect("a group");
    assert!(matches!(
        group.status().intake,
        Intake::RepositoryFull { .. }
    ));
    assert!(error.to_string().contains("free space"), "{error}");
    store.heal();
    block_on(async {
        let (mut session, resume) = primary.connect(&receiver).await.expect("a session");
        primary.catch_up(&mut session, resume).await.expect("all");
        script(&mut primary);
        let resume = session.resume();
        primary.catch_up(&mut session, resume).await.expect("all");
    });
    assert!(matches!(group.status().intake, Intake::Running));
    assert!(compare(&Repository::on(memory, "memory:"), &primary) > 10);
}

/// A receiver with a group that has a complete base.
async fn base(receiver: &Receiver, seed: u8) -> (Primary, super::Session) {
    let mut primary = Primary::new(seed);
    script(&mut primary);
    let (mut session, resume) = primary.connect(receiver).await.expect("a session");
    primary.catch_up(&mut session, resume).await.expect("all");
    script(&mut primary);
    let resume = session.resume();
    primary.catch_up(&mut session, resume).await.expect("all");
    (primary, session)
}

#[test]
fn two_primaries_at_once() {
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone());
    let (mut a, mut b) = block_on(async {
        let (mut a, mut session_a) = base(&receiver, 1).await;
        let (mut b, mut session_b) = base(&receiver, 2).await;
        for _ in 0..5 {
            let (from_a, from_b) = (a.last() + 1, b.last() + 1);
            a.write(0, 1, 2);
            b.write(1, 7, 4);
            let segments = (a.segment(from_a, a.last()), b.segment(from_b, b.last()));
            let (one, two) = futures::join!(session_a.give(segments.0), session_b.give(segments.1));
            assert_eq!(one.expect("stored").cursor.lsn.0, a.last());
            assert_eq!(two.expect("stored").cursor.lsn.0, b.last());
        }
        (a, b)
    });
    assert!(compare(&repository, &a) > 5 && compare(&repository, &b) > 5);
    a.epoch = Epoch(0);
    b.epoch = Epoch(0);
}

#[test]
fn a_newer_session_ends_the_older() {
    let receiver = Receiver::new(Repository::in_memory());
    block_on(async {
        let (mut primary, mut old) = base(&receiver, 1).await;
        let before = primary.last();
        primary.write(0, 0, 1);
        let segment = primary.segment(before + 1, before + 1);
        let (mut new, resume) = primary.connect(&receiver).await.expect("a session");
        assert_eq!(resume.cursor.lsn.0, before);
        old.superseded().await;
        let late = old.give(segment.clone()).await;
        assert!(
            matches!(late, Err(IngestError::Superseded { .. })),
            "{late:?}"
        );
        new.give(segment).await.expect("stored");
    });
}

#[test]
fn another_process_on_the_same_repository_is_noticed() {
    let repository = Repository::in_memory();
    let (here, there) = (
        Receiver::new(repository.clone()),
        Receiver::new(repository.clone()),
    );
    block_on(async {
        let (mut primary, mut old) = base(&here, 1).await;
        let before = primary.last();
        primary.write(0, 0, 1);
        primary.write(0, 1, 1);
        let (mut new, _) = primary.connect(&there).await.expect("a session");
        new.give(primary.segment(before + 1, before + 1))
            .await
            .expect("stored");
        // The same key with other content: the old one has not seen what is there.
        let late = old.give(primary.segment(before + 1, before + 2)).await;
        assert!(
            matches!(late, Err(IngestError::Superseded { .. })),
            "{late:?}"
        );
        let (mut again, resume) = primary.connect(&here).await.expect("a session");
        assert_eq!(resume.cursor.lsn.0, before + 1);
        again
            .give(primary.segment(before + 2, before + 2))
            .await
            .expect("stored");
    });
}

#[test]
fn a_recut_is_adopted_from_where_it_goes_on() {
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone());
    let primary = block_on(async {
        let (mut primary, mut session) = base(&receiver, 1).await;
        let before = primary.last();
        for block in 0..6 {
            primary.write(0, block, 2);
        }
        session
            .give(primary.segment(before + 1, before + 3))
            .await
            .expect("stored");
        let key_count = session.group().history().epochs[0].segments.len();
        // All of it is known, cut in other places too.
        for (from, to) in [(1, 3), (1, 2), (2, 3), (2, 2)] {
            let ack = session
                .give(primary.segment(before + from, before + to))
                .await;
            assert_eq!(ack.expect("known").cursor.lsn.0, before + 3);
        }
        assert_eq!(
            session.group().history().epochs[0].segments.len(),
            key_count
        );
        // Begins with what is known and goes on.
        let ack = session
            .give(primary.segment(before + 2, before + 6))
            .await
            .expect("adopted");
        assert_eq!(ack.cursor.lsn.0, before + 6);
        primary
    });
    compare(&repository, &primary);
}

#[test]
fn epochs_fence() {
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone());
    block_on(async {
        let (mut old, mut zombie) = base(&receiver, 1).await;
        let points = compare(&repository, &old);
        // The same group on a new log.
        let mut new = old.clone();
        new.log = afterimage_format::ids::LogId::from_bytes([0x99; 16]);
        new.epoch = Epoch(0);
        new.gap_at = None;
        let other = Receiver::new(repository.clone());
        let (mut session, resume) = new.connect(&other).await.expect("a session");
        assert_eq!((new.epoch, resume.cursor.lsn), (Epoch(2), Lsn::ZERO));
        // In another process: the zombie finds its next key taken.
        let before = old.last();
        old.write(0, 0, 1);
        let late = zombie.give(old.segment(before + 1, before + 1)).await;
        assert!(matches!(late, Err(IngestError::Fenced { .. })), "{late:?}");
        for receiver in [&receiver, &other] {
            let back = receiver.hello(&old.hello(), &Peer::Direct, 1).await;
            assert!(matches!(back, Err(IngestError::Fenced { .. })), "{back:?}");
        }
        new.catch_up(&mut session, resume).await.expect("all");
        assert!(compare(&repository, &new) > points, "earlier points stay");
        // A lost answer is repeated; it does not make yet another epoch.
        let mut third = new.clone();
        third.log = afterimage_format::ids::LogId::from_bytes([0x9a; 16]);
        third.epoch = Epoch(0);
        for _ in 0..2 {
            let opened = other
                .hello(&third.hello(), &Peer::Direct, 1)
                .await
                .expect("opened");
            let three = afterimage_format::wire::HelloReply::NewEpoch(Epoch(3));
            assert_eq!(opened.reply, three);
        }
        // A log that was set back asks for a new epoch.
        third.epoch = Epoch(3);
        third.gap_at = None;
        let (mut session, resume) = third.connect(&other).await.expect("a session");
        third.catch_up(&mut session, resume).await.expect("all");
        third.demands_epoch = true;
        let (_, resume) = third.connect(&other).await.expect("a session");
        assert_eq!((third.epoch, resume.cursor.lsn), (Epoch(4), Lsn::ZERO));
    });
}

#[test]
fn a_pass_goes_on_where_it_was() {
    let repository = Repository::in_memory();
    let mut primary = Primary::new(1);
    script(&mut primary);
    block_on(async {
        let receiver = Receiver::new(repository.clone());
        let (mut session, _) = primary.connect(&receiver).await.expect("a session");
        let begin = primary.pass_begin(true);
        session
            .give(primary.segment(begin, begin))
            .await
            .expect("stored");
        let blocks = primary.blocks_from(0, 0, 5);
        let none = afterimage_format::chain::RecordChain::BASE;
        let (bytes, chain) = primary.pass_segment(begin, none, &blocks);
        let ack = session.give(bytes.clone()).await.expect("stored");
        let active = ack.active_pass.expect("a pass");
        assert_eq!(
            (active.begin.0, active.blocks, active.chain),
            (begin, 5, chain)
        );
        // The acknowledgement got lost: sent again, known.
        assert_eq!(
            session.give(bytes).await.expect("known").active_pass,
            Some(active)
        );
        // A new process knows how far it was.
        let receiver = Receiver::new(repository.clone());
        let (mut session, resume) = primary.connect(&receiver).await.expect("a session");
        assert_eq!(resume.active_pass, Some(active));
        primary.catch_up(&mut session, resume).await.expect("all");
        assert_eq!(session.resume().completed_pass.0, begin);
        assert!(compare(&repository, &primary) >= 1);
    });
}

fn alarm_of(status: &crate::group::Status) -> &str {
    status.alarm.as_deref().expect("an alarm")
}

#[test]
fn a_pass_that_does_not_add_up_gives_no_base() {
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone());
    block_on(async {
        let mut primary = Primary::new(1);
        script(&mut primary);
        let (mut session, _) = primary.connect(&receiver).await.expect("a session");
        let begin = primary.pass_begin(true);
        let blocks = primary.blocks_from(0, 0, 5);
        let none = afterimage_format::chain::RecordChain::BASE;
        let (bytes, chain) = primary.pass_segment(begin, none, &blocks);
        let end = primary.pass_end(begin, 6, chain);
        session
            .give(primary.segment(begin, begin))
            .await
            .expect("stored");
        session.give(bytes).await.expect("stored");
        let ack = session
            .give(primary.segment(end, end))
            .await
            .expect("stored");
        assert_eq!((ack.completed_pass, ack.active_pass), (Lsn::ZERO, None));
        let status = session.group().status();
        let told = (status.passes_dropped, status.alarm.clone());
        assert!(alarm_of(&status).contains("6 blocks were promised, 5 came"));
        assert_eq!(session.group().history().latest(), None);
        // A restart does not forget it.
        let restarted = Group::load(&repository, primary.group)
            .await
            .expect("loads");
        let status = restarted.status();
        assert_eq!((status.passes_dropped, status.alarm), told);
        assert_eq!(told.0, 1);

        // Also when an older base is whole: what comes behind the gap does not build on it.
        for (promised, completed) in [(3, true), (4, false)] {
            let begin = primary.pass_begin(true);
            let blocks = primary.blocks_from(0, 0, 3);
            let (bytes, chain) = primary.pass_segment(begin, none, &blocks);
            let end = primary.pass_end(begin, promised, chain);
            let segments = [
                primary.segment(begin, begin),
                bytes,
                primary.segment(end, end),
            ];
            for bytes in segments {
                let ack = session.give(bytes).await.expect("stored");
                assert!(ack.completed_pass == Lsn::ZERO || ack.completed_pass.0 == begin);
            }
            let resume = session.resume();
            let wanted = if completed { Lsn(begin) } else { Lsn::ZERO };
            assert_eq!((resume.completed_pass, resume.active_pass), (wanted, None));
            // A complete pass ends the alarm; what was counted stays so. Whoever has the group open
            // already sees it as well.
            restarted.refresh().await.expect("read");
            let loaded = Group::load(&repository, primary.group)
                .await
                .expect("loads");
            for group in [session.group(), &restarted, &loaded] {
                let status = group.status();
                assert_eq!(status.passes_dropped, if completed { 1 } else { 2 });
                assert_eq!(status.alarm.is_none(), completed, "{:?}", status.alarm);
                if !completed {
                    let pass = format!("began at record {begin} ");
                    assert!(alarm_of(&status).contains(&pass), "{:?}", status.alarm);
                    let points = group.history().latest();
                    assert!(
                        points.is_some_and(|at| at.lsn.0 < begin),
                        "earlier ones stay"
                    );
                }
            }
        }
    });
}

//! Verify records against images: of what is the same, of what differs, over restarts.

use std::sync::Arc;
use std::task::{Context, Waker};

use afterimage_format::ids::{BLOCK_SIZE, Epoch, Lsn};
use afterimage_format::op::Op;
use afterimage_format::verify::{BlockHashes, Content, VerifyBody};
use afterimage_format::wire::Compared;
use futures::executor::block_on;

use super::{follow, kept};
use crate::group::Group;
use crate::receive::{NowNs, Receiver, Session};
use crate::repository::{Repository, keys};
use crate::testing::primary::{BLOCKS, Primary, block_of};

fn now() -> NowNs {
    Arc::new(|| 77)
}

/// Looks at everything that is there.
/// The run that is under way, or the newest that ended.
fn compare(group: &Arc<Group>) -> Compared {
    let mut following = Box::pin(follow(group.clone(), now()));
    let mut context = Context::from_waker(Waker::noop());
    // In memory nothing ever waits for long.
    for _ in 0..100 {
        let _never = following.as_mut().poll(&mut context);
    }
    let comparisons = group.comparison().now();
    match comparisons.current.run {
        0 => comparisons.finished,
        _ => comparisons.current,
    }
}

/// A range as the primary's disk held it after the record `at`.
fn content(primary: &Primary, disk: u16, first: u64, count: u64, at: u64) -> Vec<u8> {
    let tags = &primary.after[&at][usize::from(disk)];
    let tags = &tags[first as usize..(first + count) as usize];
    let mut content: Vec<u8> = tags.iter().flat_map(|tag| block_of(*tag)).collect();
    if first + count == BLOCKS as u64 {
        // The disk ends within its last block.
        let end = content.len() - BLOCK_SIZE + 512;
        content[end..].fill(0);
    }
    content
}

/// Appends a record about a range.
#[derive(Clone, Copy)]
struct Run {
    run: u64,
    number: u32,
}

impl Run {
    fn begin(primary: &Primary) -> Self {
        Self {
            run: primary.last() + 7,
            number: 0,
        }
    }

    fn say(
        &mut self,
        primary: &mut Primary,
        (disk, first, count): (u16, u64, u64),
        at: u64,
        last: bool,
        content: Content,
    ) {
        let body = VerifyBody {
            run: self.run,
            number: self.number,
            last,
            at: Lsn(at),
            content,
        };
        self.number += 1;
        primary.append(disk, Op::Verify, first, count as u32, body.encode());
    }

    fn data(&mut self, primary: &mut Primary, range: (u16, u64, u64), at: u64, last: bool) {
        let (disk, first, count) = range;
        let hashes = BlockHashes::of(&content(primary, disk, first, count, at));
        self.say(primary, range, at, last, Content::Data(hashes));
    }
}

struct Site {
    repository: Repository,
    receiver: Receiver,
    primary: Primary,
    session: Session,
}

impl Site {
    fn new() -> Self {
        let repository = Repository::in_memory();
        let receiver = Receiver::new(repository.clone());
        let mut primary = Primary::new(3);
        for round in 0..3 {
            primary.write(0, 4 * round, 6);
            primary.write(1, 30 - round, 3);
        }
        let session = block_on(async {
            let (mut session, resume) = primary.connect(&receiver).await.expect("a session");
            primary.catch_up(&mut session, resume).await.expect("all");
            session
        });
        Self {
            repository,
            receiver,
            primary,
            session,
        }
    }

    fn ship(&mut self) {
        let resume = self.session.resume();
        let shipped = self.primary.catch_up(&mut self.session, resume);
        block_on(shipped).expect("shipped");
    }

    fn group(&self) -> Arc<Group> {
        block_on(self.receiver.group(self.primary.group)).expect("a group")
    }

    /// The group as a process sees it that starts now.
    fn restarted(&self) -> Arc<Group> {
        Arc::new(block_on(Group::load(&self.repository, self.primary.group)).expect("a group"))
    }
}

/// A run over both disks, with writes in between, everything described as it was.
fn whole_run(primary: &mut Primary) -> u64 {
    let mut run = Run::begin(primary);
    let at = primary.last();
    // What comes after the moment that a record speaks of is not looked at.
    primary.write(0, 2, 9);
    run.data(primary, (0, 0, 20), at, false);
    run.say(primary, (0, 20, 10), at, false, Content::Zero);
    primary.clear(0, 0, 12, Op::Trim);
    primary.write(1, 10, 5);
    let at = primary.last();
    run.data(primary, (0, 20, 20), at, false);
    primary.write(1, 39, 1);
    let end = primary.last();
    run.data(primary, (1, 0, 40), end, true);
    run.run
}

#[test]
fn what_is_the_same_is_found_to_be() {
    let mut site = Site::new();
    let run = whole_run(&mut site.primary);
    site.ship();
    let group = site.group();
    let found = compare(&group);
    let expected = Compared {
        run,
        ranges: 4,
        blocks: 90,
        total: 4,
        ..Compared::default()
    };
    assert_eq!(found, expected);
    assert!(found.is_whole());
    assert_eq!(group.status().mismatched_blocks, 0);
    assert_eq!(group.status().alarm, None);
    // The primary is told with the next acknowledgement.
    site.primary.write(0, 1, 1);
    let last = site.primary.last();
    let ack = block_on(site.session.give(site.primary.segment(last, last))).expect("taken");
    assert_eq!(ack.comparisons.finished, expected);
    assert_eq!(ack.comparisons.current, Compared::default());
}

#[test]
fn a_block_that_differs_is_found_counted_and_named() {
    let mut site = Site::new();
    let at = site.primary.last();
    let mut run = Run::begin(&site.primary);
    let mut other = content(&site.primary, 0, 0, 20, at);
    // Two blocks of the primary's disk are not what was shipped, by a single bit.
    other[3 * BLOCK_SIZE] ^= 1;
    other[7 * BLOCK_SIZE + 4095] ^= 0x80;
    let hashes = BlockHashes::of(&other);
    let range = (0, 0, 20);
    run.say(&mut site.primary, range, at, false, Content::Data(hashes));
    // Said to be empty, and one block of three is not.
    let busy = site.primary.after[&at][1]
        .iter()
        .filter(|tag| **tag != 0)
        .count() as u64;
    run.say(&mut site.primary, (1, 0, 40), at, true, Content::Zero);
    site.ship();
    let group = site.group();
    let found = compare(&group);
    assert_eq!((found.mismatched_blocks, found.blocks), (2 + busy, 60));
    assert!(found.is_over() && !found.is_whole());
    assert_eq!(group.status().mismatched_blocks, 2 + busy);
    let alarm = group.status().alarm.expect("an alarm");
    // One word of the whole run: how much, and where it begins.
    let words = format!(
        "{} blocks are not what the primary's disks held, the first at byte {} of disk vda, compared at lsn:1/{at}",
        2 + busy,
        3 * BLOCK_SIZE
    );
    assert!(alarm.contains(&words), "{alarm}");
    let kept = block_on(kept::last(&site.repository, site.primary.group)).expect("read");
    let kept = kept.expect("kept");
    assert_eq!(
        (kept.compared, kept.whole_ns, kept.ended_ns),
        (found, 0, 77)
    );
}

#[test]
fn what_cannot_be_compared_is_not_taken_for_equal() {
    let mut site = Site::new();
    let at = site.primary.last();
    let mut run = Run::begin(&site.primary);
    // Before the copy was complete, beyond the disk, about the future, with too few hashes.
    run.data(&mut site.primary, (0, 0, 4), 2, false);
    run.say(&mut site.primary, (0, 30, 11), at, false, Content::Zero);
    let future = at + 100;
    run.say(&mut site.primary, (0, 30, 1), future, false, Content::Zero);
    let hashes = BlockHashes::of(&content(&site.primary, 0, 0, 4, at));
    run.say(
        &mut site.primary,
        (0, 0, 5),
        at,
        false,
        Content::Data(hashes),
    );
    // No such disk.
    run.say(&mut site.primary, (7, 0, 1), at, false, Content::Zero);
    run.data(&mut site.primary, (0, 0, 4), at, true);
    site.ship();
    let found = compare(&site.group());
    assert_eq!((found.skipped, found.ranges, found.total), (5, 1, 6));
    assert!(found.is_over() && !found.is_whole());
}

#[test]
fn records_that_never_came_are_missed() {
    let mut site = Site::new();
    let at = site.primary.last();
    let mut run = Run::begin(&site.primary);
    run.data(&mut site.primary, (0, 0, 4), at, false);
    run.number += 1;
    run.data(&mut site.primary, (0, 8, 4), at, true);
    site.ship();
    let found = compare(&site.group());
    assert_eq!((found.ranges, found.skipped, found.total), (2, 0, 3));
    assert!(found.is_over() && !found.is_whole());
}

#[test]
fn a_run_whose_result_was_kept_is_not_compared_again() {
    let mut site = Site::new();
    whole_run(&mut site.primary);
    site.ship();
    let found = compare(&site.restarted());
    assert!(found.is_whole());
    let count = || {
        let names = block_on(
            site.repository
                .names_below(&keys::comparisons(site.primary.group)),
        );
        names.expect("listed").len()
    };
    assert_eq!(count(), 1);
    // It is known at once, and nothing is looked at anew.
    let group = site.restarted();
    assert_eq!(compare(&group), found);
    assert_eq!(count(), 1);
    let kept = block_on(kept::last(&site.repository, site.primary.group)).expect("read");
    assert_eq!(kept.expect("kept").whole_ns, 77);
    // The next run is a new one, here and in a process that has seen the first.
    let run = whole_run(&mut site.primary);
    site.ship();
    for group in [group, site.restarted()] {
        block_on(group.refresh()).expect("read");
        group.comparison().tell();
        let found = compare(&group);
        assert_eq!((found.run, found.ranges, found.is_whole()), (run, 4, true));
    }
}

/// A process that ends within a run: the next looks at all of it.
#[test]
fn a_run_that_was_interrupted_is_compared_from_its_beginning() {
    let mut site = Site::new();
    let at = site.primary.last();
    let mut run = Run::begin(&site.primary);
    run.data(&mut site.primary, (0, 0, 20), at, false);
    site.ship();
    let found = compare(&site.restarted());
    assert_eq!((found.ranges, found.is_over()), (1, false));
    run.data(&mut site.primary, (1, 0, 40), at, true);
    site.ship();
    let found = compare(&site.restarted());
    assert_eq!((found.ranges, found.is_whole()), (2, true));
}

/// What of the history cannot be read any more, be it damaged or gone, is skipped once and for all.
fn with_one_segment(spoil: impl AsyncFn(&Repository, &str)) {
    let mut site = Site::new();
    let at = site.primary.last();
    let mut run = Run::begin(&site.primary);
    site.primary.write(0, 0, 30);
    let later = site.primary.last();
    site.ship();
    run.data(&mut site.primary, (0, 0, 30), later, false);
    run.data(&mut site.primary, (1, 0, 40), at, true);
    site.ship();
    let group = site.group();
    let sequence = {
        let history = group.history();
        let segments = &history.epochs[0].segments;
        let holds = segments
            .iter()
            .find(|s| s.last_lsn >= Lsn(later) && s.first_lsn <= Lsn(later));
        holds.expect("a segment").sequence
    };
    let key = keys::segment(site.primary.group, Epoch(1), sequence);
    block_on(spoil(&site.repository, &key));
    let found = compare(&group);
    assert_eq!((found.skipped, found.ranges, found.total), (1, 1, 2));
    assert!(!found.is_whole());
}

#[test]
fn what_is_damaged_or_gone_is_skipped() {
    with_one_segment(async |repository, key| {
        let mut bytes = repository.get(key).await.expect("read").to_vec();
        bytes[300] ^= 1;
        let stored = repository.overwrite_for_tests(key, bytes.into());
        stored.await.expect("stored");
    });
    with_one_segment(async |repository, key| {
        let deleted = repository.delete_for_tests(key);
        deleted.await.expect("deleted");
    });
}

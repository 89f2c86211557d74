//! Layers stand for the segments that they cover, and whatever becomes of them loses nothing.

use std::sync::Arc;

use afterimage_format::chain::RecordChain;
use afterimage_format::ids::{DiskIndex, Lsn};
use afterimage_format::layer::LayerHead;
use afterimage_format::op::Op;
use bytes::Bytes;
use futures::FutureExt as _;
use futures::executor::block_on;
use object_store::memory::InMemory;

use super::{ranges, read_head};
use crate::group::{Group, GroupError};
use crate::history::range_of;
use crate::image::{ChunkCache, Image, ImageError};
use crate::index::LayerRange;
use crate::points::PointList;
use crate::receive::{Receiver, Session};
use crate::repository::{Repository, keys};
use crate::testing::faults::{Fault, FaultyStore};
use crate::testing::primary::{Content, DISK_BYTES, Primary, block_of};
use crate::verify::{VerifyReport, verify};

/// Extents of a layer.
const SEAL: usize = 4;

/// A group with a first copy, some writes, a copy made anew, a pass that is of no use, and another
/// behind a gap, with checkpoints of every kind.
struct Site {
    repository: Repository,
    primary: Primary,
    group: Arc<Group>,
}

impl Site {
    fn new() -> Self {
        Self::with(Repository::in_memory(), SEAL)
    }

    fn with(repository: Repository, seal: usize) -> Self {
        let receiver = Receiver::new(repository.clone()).sealing(seal);
        let mut primary = Primary::new(1);
        let group = block_on(async {
            primary.write(0, 1, 9);
            primary.checkpoint("first");
            let (mut session, resume) = primary.connect(&receiver).await.expect("a session");
            primary.catch_up(&mut session, resume).await.expect("all");
            let point = primary.application_checkpoint("quiet");
            writes(&mut primary, &mut session, 20).await;
            primary.confirm(point, None);
            ship(&mut primary, &mut session).await;
            pass(&mut primary, &mut session, false, 0).await;
            writes(&mut primary, &mut session, 12).await;
            pass(&mut primary, &mut session, false, 1).await;
            primary.wall_ns -= 10_000_000_000;
            writes(&mut primary, &mut session, 3).await;
            primary.write(1, 3, 3);
            pass(&mut primary, &mut session, true, 0).await;
            primary.checkpoint("last");
            writes(&mut primary, &mut session, 9).await;
            session.group().clone()
        });
        Self {
            repository,
            primary,
            group,
        }
    }

    /// Its primary comes back to a new process, and writes so many times.
    fn goes_on(self, count: u64) -> Self {
        let Self {
            repository,
            mut primary,
            ..
        } = self;
        let receiver = Receiver::new(repository.clone()).sealing(SEAL);
        let group = block_on(async {
            let (mut session, resume) = primary.connect(&receiver).await.expect("a session");
            primary.catch_up(&mut session, resume).await.expect("all");
            writes(&mut primary, &mut session, count).await;
            session.group().clone()
        });
        Self {
            repository,
            primary,
            group,
        }
    }

    fn load(&self) -> Group {
        block_on(Group::load(&self.repository, self.primary.group)).expect("a group")
    }

    fn ranges(&self) -> Vec<LayerRange> {
        block_on(ranges(
            &self.repository,
            self.primary.group,
            self.primary.epoch,
        ))
        .expect("a list")
    }

    /// Keys of the heads and of the files of pages.
    fn objects(&self) -> (Vec<String>, Vec<String>) {
        let folder = keys::layers(self.primary.group, self.primary.epoch);
        let names = block_on(self.repository.names_below(&folder)).expect("a list");
        let keys = names.iter().map(|name| format!("{folder}/{name}"));
        keys.partition(|key| !key.contains('.'))
    }

    fn verify(&self) -> VerifyReport {
        block_on(verify(&self.repository, &self.primary.name, |_| {})).expect("a report")
    }

    fn read_newest(&self, group: impl Into<Arc<Group>>) -> Result<Content, ImageError> {
        let group: Arc<Group> = group.into();
        let at = group.history().latest().expect("a point");
        let cache = Arc::new(ChunkCache::new(0));
        let image = Image::open(group, at, cache)?;
        let mut content = self.primary.content.clone();
        for (disk, blocks) in content.iter_mut().enumerate() {
            let mut read = vec![0; DISK_BYTES];
            block_on(image.read(DiskIndex(disk as u16), 0, &mut read))?;
            let expected: Vec<u8> = blocks.iter().flat_map(|tag| block_of(*tag)).collect();
            assert!(read[..] == expected[..DISK_BYTES], "disk {disk} differs");
        }
        Ok(content)
    }

    fn change(&self, key: &str, change: impl FnOnce(&mut Vec<u8>)) -> Bytes {
        let good = block_on(self.repository.get(key)).expect("an object");
        let mut bad = good.to_vec();
        change(&mut bad);
        self.put(key, bad.into());
        good
    }

    fn put(&self, key: &str, bytes: Bytes) {
        block_on(self.repository.overwrite_for_tests(key, bytes)).expect("written");
    }
}

async fn ship(primary: &mut Primary, session: &mut Session) {
    let resume = session.resume();
    primary.catch_up(session, resume).await.expect("all");
}

/// So many writes, each in a segment of its own.
async fn writes(primary: &mut Primary, session: &mut Session, count: u64) {
    for number in 0..count {
        let block = number % 30;
        match number % 5 {
            4 => primary.clear(1, block, 4, Op::Trim),
            _ => primary.write((number % 2) as u16, block, 2),
        };
        ship(primary, session).await;
    }
}

/// A pass that is complete if it miscounts by 0 blocks.
async fn pass(primary: &mut Primary, session: &mut Session, gap: bool, miscounts: u64) {
    let begin = primary.pass_begin(gap);
    session
        .give(primary.segment(begin, begin))
        .await
        .expect("stored");
    let blocks = primary.blocks_from(0, 0, 100);
    let (bytes, chain) = primary.pass_segment(begin, RecordChain::BASE, &blocks);
    session.give(bytes).await.expect("stored");
    let end = primary.pass_end(begin, blocks.len() as u64 + miscounts, chain);
    session
        .give(primary.segment(end, end))
        .await
        .expect("stored");
}

/// Everything that a history says but for where its index is.
fn told(group: &Group) -> String {
    let history = group.history();
    let epochs = history.epochs.iter().map(|epoch| {
        let bases = epoch.bases.iter().map(|base| {
            let about = (base.begin, base.begin_wall_ns, base.after_gap, base.last);
            let times = (base.readable_wall_ns, base.last_wall_ns);
            let pass = (base.active_pass(), base.completed_at(), base.dropped());
            format!("{about:?} {times:?} {pass:?} {:?}", base.checkpoints)
        });
        let bases: Vec<String> = bases.collect();
        let (eras, resume) = (epoch.eras(), epoch.resume());
        format!("{bases:#?} {eras:?} {resume:?} {:?}", epoch.segments)
    });
    let epochs: Vec<String> = epochs.collect();
    format!("{epochs:?} {:?}", PointList::of(&history))
}

#[test]
fn a_group_opens_from_its_layers_without_the_segments() {
    let site = Site::new();
    let told_before = told(&site.group);
    let (next, layers) = {
        let history = site.group.history();
        let epoch = &history.epochs[0];
        (epoch.next_sequence(), epoch.layers().to_vec())
    };
    let covered = layers.last().expect("layers").range.last;
    assert!(next - covered < 6 && layers.len() > 1, "{layers:?}");
    // What is in layers is not asked of the segments, but for whether the last of each is there.
    let ends: Vec<u64> = layers.iter().map(|layer| layer.range.last).collect();
    for sequence in (1..=covered).filter(|sequence| !ends.contains(sequence)) {
        let key = keys::segment(site.primary.group, site.primary.epoch, sequence);
        block_on(site.repository.delete_for_tests(&key)).expect("deleted");
    }
    let loaded = site.load();
    assert_eq!(told(&loaded), told_before);
    assert_eq!(loaded.history().epochs[0].layers(), &layers[..]);
}

#[test]
fn sealed_extents_leave_memory_and_layers_are_joined() {
    let site = Site::new();
    let history = site.group.history();
    let epoch = &history.epochs[0];
    let in_memory: usize = epoch.bases.iter().map(|b| b.index().extents()).sum();
    assert!(in_memory < SEAL, "{in_memory}");
    let stored: u64 = epoch.layers().iter().map(|layer| layer.extents).sum();
    assert!(stored > 60, "{stored}");
    // Without a hole, and fewer than were sealed.
    let mut next = 1;
    for layer in epoch.layers() {
        assert_eq!(layer.range.first, next);
        next = layer.range.last + 1;
    }
    drop(history);
    let (now, ever) = (
        site.group.history().epochs[0].layers().len(),
        site.ranges().len(),
    );
    assert!(now < 10 && ever > now, "{now} of {ever}");
    let report = site.verify();
    assert_eq!(report.problems, []);
}

#[test]
fn a_group_that_never_sealed_says_the_same() {
    let plain = Site::with(Repository::in_memory(), usize::MAX);
    let layered = Site::new();
    assert!(plain.ranges().is_empty());
    assert_eq!(told(&plain.group), told(&layered.group));
    assert_eq!(told(&plain.load()), told(&layered.load()));
}

#[test]
fn an_older_repository_gets_its_layers_with_the_next_segment() {
    let Site {
        repository,
        mut primary,
        ..
    } = Site::with(Repository::in_memory(), usize::MAX);
    let receiver = Receiver::new(repository.clone()).sealing(SEAL);
    let group = block_on(async {
        let (mut session, _) = primary.connect(&receiver).await.expect("a session");
        writes(&mut primary, &mut session, 1).await;
        session.group().clone()
    });
    let history = group.history();
    let last = history.epochs[0]
        .layers()
        .last()
        .expect("layers")
        .range
        .last;
    assert!(history.epochs[0].next_sequence() - last < 6);
    drop(history);
    let site = Site {
        repository,
        primary,
        group,
    };
    site.read_newest(site.load()).expect("read");
    assert_eq!(site.verify().problems, []);
}

#[test]
fn damaged_heads_are_named_and_the_segments_are_read() {
    let site = Site::new();
    let (heads, _) = site.objects();
    let told_before = told(&site.group);
    for key in &heads {
        let good = site.change(key, |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        });
        let loaded = site.load();
        assert_eq!(told(&loaded), told_before);
        site.read_newest(loaded).expect("read");
        let problems = site.verify().problems;
        let [problem] = &problems[..] else {
            panic!("{problems:?}");
        };
        assert_eq!(&problem.key, key);
        assert!(problem.advice.contains("nothing is lost"), "{problem:?}");
        site.put(key, good);
    }
    // And when none is of use.
    for key in &heads {
        site.change(key, |bytes| bytes.truncate(20));
    }
    let loaded = site.load();
    assert_eq!(told(&loaded), told_before);
    assert!(loaded.history().epochs[0].layers().is_empty());
    assert_eq!(site.verify().problems.len(), heads.len());
}

#[test]
fn a_damaged_page_is_never_used_and_is_named() {
    let site = Site::new();
    let (_, files) = site.objects();
    let mut noticed = 0;
    for key in &files {
        let good = site.change(key, |bytes| bytes[5] ^= 1);
        match site.read_newest(site.load()) {
            // Its layer is part of a larger one, or of an older base.
            Ok(_) => {}
            Err(ImageError::Layer(error)) => {
                noticed += 1;
                let text = error.to_string();
                assert!(text.starts_with(key.as_str()), "{text}");
                assert!(text.contains("checksum"), "{text}");
                let folder = keys::layers(site.primary.group, site.primary.epoch);
                assert!(
                    text.contains(&format!("remove the folder {folder} ")),
                    "{text}"
                );
            }
            Err(other) => panic!("{other}"),
        }
        let problems = site.verify().problems;
        let [problem] = &problems[..] else {
            panic!("{problems:?}");
        };
        assert_eq!((&problem.key, problem.offset), (key, Some(0)));
        site.put(key, good);
    }
    assert!(noticed > 0);
    // As the advice says.
    let (heads, files) = site.objects();
    site.change(&files[0], |bytes| bytes.truncate(3));
    for key in heads.iter().chain(&files) {
        block_on(site.repository.delete_for_tests(key)).expect("deleted");
    }
    site.read_newest(site.load()).expect("read");
    assert_eq!(site.verify().problems, []);
}

#[test]
fn verify_finds_a_layer_that_says_something_else() {
    type Change = fn(&mut LayerHead);
    let changes: [(&str, Change); 6] = [
        ("another lowest LSN", |head| {
            head.runs[0].lsn_min = Lsn(9_999)
        }),
        ("a checkpoint less", |head| drop(head.checkpoints.pop())),
        ("another time", |head| head.segments[0].wall_min_ns ^= 1),
        ("another chain", |head| {
            head.after.chain = RecordChain([7; 32])
        }),
        ("an extent less", |head| {
            let page = head.runs[0].pages.remove(0);
            head.runs[0].extents -= u64::from(page.extents);
        }),
        ("a base less", |head| {
            head.runs.remove(0);
        }),
    ];
    let site = Site::new();
    let longest = |range: &LayerRange| range.last - range.first;
    let range = site
        .ranges()
        .into_iter()
        .max_by_key(longest)
        .expect("layers");
    let key = keys::layer(site.primary.group, site.primary.epoch, range);
    for (what, change) in changes {
        let good = site.change(&key, |bytes| {
            let mut head = LayerHead::decode(bytes).expect("a head");
            assert!(!head.checkpoints.is_empty() && head.runs[0].pages.len() > 1);
            change(&mut head);
            *bytes = head.encode();
        });
        let problems = site.verify().problems;
        let [problem] = &problems[..] else {
            panic!("{what}: {problems:?}");
        };
        assert_eq!(problem.key, key, "{what}");
        site.put(&key, good);
    }
    assert_eq!(site.verify().problems, []);
}

#[test]
fn a_layer_of_another_group_is_not_taken() {
    let (site, other) = (Site::new(), Site::with(Repository::in_memory(), SEAL));
    // The one that is taken first.
    let range = site.group.history().epochs[0].layers()[0].range;
    let key = keys::layer(site.primary.group, site.primary.epoch, range);
    let foreign = site.change(&key, |bytes| {
        let mut head = LayerHead::decode(bytes).expect("a head");
        head.group = afterimage_format::ids::GroupId::from_bytes([9; 16]);
        *bytes = head.encode();
    });
    let head = read_head(
        &site.repository,
        site.primary.group,
        site.primary.epoch,
        range,
    );
    assert!(head.now_or_never().expect("in memory").is_err());
    assert_eq!(told(&site.load()), told(&other.group));
    // A whole layer, but of other segments: it does not continue what is in front of it.
    let mut head = LayerHead::decode(&foreign).expect("a head");
    head.before.chain = RecordChain([9; 32]);
    head.segments[0].wall_min_ns ^= 1;
    site.put(&key, head.encode().into());
    assert_eq!(told(&site.load()), told(&other.group));
    assert_eq!(site.verify().problems.len(), 1);
}

/// A process that died between a file and the head left the file; the next one may write others.
#[test]
fn a_file_that_is_taken_is_passed_over() {
    let expected = Site::new();
    let first = expected
        .ranges()
        .into_iter()
        .min_by_key(|range| (range.first, range.last))
        .expect("layers");
    let repository = Repository::in_memory();
    let taken = keys::layer_file(expected.primary.group, expected.primary.epoch, first, 0);
    block_on(repository.create(&taken, Bytes::from_static(b"something"))).expect("created");
    let site = Site::with(repository, SEAL);
    let head = block_on(read_head(
        &site.repository,
        site.primary.group,
        site.primary.epoch,
        first,
    ));
    let head = head.expect("readable").expect("a head");
    assert_eq!((head.files, range_of(&head)), (2, first));
    assert_eq!(told(&site.load()), told(&expected.group));
    site.read_newest(site.load()).expect("read");
    assert_eq!(site.verify().problems, []);
}

#[test]
fn a_group_goes_on_where_its_layers_end() {
    let Site {
        repository,
        mut primary,
        group: before,
    } = Site::new();
    let receiver = Receiver::new(repository.clone()).sealing(SEAL);
    let group = block_on(async {
        let (mut session, resume) = primary.connect(&receiver).await.expect("a session");
        assert_eq!(resume, before.history().epochs[0].resume());
        let point = primary.application_checkpoint("later");
        writes(&mut primary, &mut session, 7).await;
        primary.confirm(point, Some("slow"));
        writes(&mut primary, &mut session, 40).await;
        session.group().clone()
    });
    let site = Site {
        repository,
        primary,
        group,
    };
    assert_eq!(told(&site.load()), told(&site.group));
    site.read_newest(site.load()).expect("read");
    assert_eq!(site.verify().problems, []);
}

/// A group whose repository is gone is not there, whatever its layers were.
#[test]
fn layers_alone_are_no_group() {
    let site = Site::new();
    let key = keys::manifest(site.primary.group, keys::FIRST);
    block_on(site.repository.delete_for_tests(&key)).expect("deleted");
    let loaded = block_on(Group::load(&site.repository, site.primary.group));
    assert!(matches!(loaded, Err(GroupError::Unknown { .. })));
}

/// A block whose versions fill many pages, and one beside it.
#[test]
fn every_version_of_a_hot_block_is_found() {
    const WRITES: u64 = 700;
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone()).sealing(WRITES as usize);
    let mut primary = Primary::new(1);
    let session = block_on(async {
        let (mut session, resume) = primary.connect(&receiver).await.expect("a session");
        primary.catch_up(&mut session, resume).await.expect("all");
        for number in 0..WRITES {
            primary.write(0, if number == 300 { 8 } else { 7 }, 1);
        }
        ship(&mut primary, &mut session).await;
        session
    });
    let group = session.group().clone();
    let stored = group.history().epochs[0].layers()[0].extents;
    assert!(stored >= WRITES, "{stored}");
    let newest = group.history().latest().expect("a point");
    for lsn in [
        3,
        4,
        250,
        256,
        257,
        258,
        259,
        300,
        400,
        512,
        513,
        515,
        600,
        newest.lsn.0,
    ] {
        let at = crate::history::Position {
            lsn: Lsn(lsn),
            ..newest
        };
        let cache = Arc::new(ChunkCache::new(0));
        let image = Image::open(group.clone(), at, cache).expect("a point");
        let mut read = vec![0; 16 * 4096];
        block_on(image.read(DiskIndex(0), 0, &mut read)).expect("read");
        let expected: Vec<u8> = primary.after[&lsn][0][..16]
            .iter()
            .flat_map(|tag| block_of(*tag))
            .collect();
        assert!(read == expected, "at {lsn}");
    }
}

/// Layers are beside the intake: a repository without room for them takes segments all the same.
#[test]
fn layers_that_cannot_be_stored_hold_nothing_up() {
    let store = FaultyStore::new(Arc::new(InMemory::new()), 0, Fault::FullFor("/layers/"));
    let store = Arc::new(store);
    let repository = Repository::on(store.clone(), "faulty:");
    let mut site = Site::with(repository.clone(), SEAL);
    assert!(site.ranges().is_empty());
    assert_eq!(told(&site.group), told(&Site::new().group));
    let segments = site.group.history().epochs[0].segments.len() as u64;
    assert!(
        (1..segments / 2).contains(&store.calls()),
        "{}",
        store.calls()
    );
    // Once there is room, the next seal brings all of them.
    store.heal();
    let receiver = Receiver::new(repository).sealing(SEAL);
    site.group = block_on(async {
        let (mut session, _) = site.primary.connect(&receiver).await.expect("a session");
        writes(&mut site.primary, &mut session, 4).await;
        session.group().clone()
    });
    let history = site.group.history();
    let in_memory: usize = history.epochs[0]
        .bases
        .iter()
        .map(|b| b.index().extents())
        .sum();
    assert!(in_memory < SEAL, "{in_memory}");
    drop(history);
    site.read_newest(site.load()).expect("read");
    assert_eq!(site.verify().problems, []);
}

/// The process dies at each call of the store in turn, also while it stores and joins layers.
#[test]
fn whatever_call_is_the_last_the_next_process_goes_on() {
    for fault in [Fault::Before, Fault::After] {
        let mut calls = 0;
        while dies_at(calls, fault) {
            calls += 1;
        }
        assert!(calls > 90, "{calls}");
    }
}

/// Whether a process that writes layers makes so many calls.
fn dies_at(calls: i64, fault: Fault) -> bool {
    const SEAL: usize = 2;
    let memory = Arc::new(InMemory::new());
    let repository = Repository::on(memory.clone(), "memory:");
    let mut primary = Primary::new(1);
    let dying = Arc::new(FaultyStore::new(memory, calls, fault));
    let dead = block_on(async {
        let receiver = Receiver::new(Repository::on(dying, "faulty:")).sealing(SEAL);
        let Ok((mut session, resume)) = primary.connect(&receiver).await else {
            return true;
        };
        if primary.catch_up(&mut session, resume).await.is_err() {
            return true;
        }
        for number in 0..30 {
            primary.write(0, number, 2);
            let resume = session.resume();
            if primary.catch_up(&mut session, resume).await.is_err() {
                return true;
            }
        }
        false
    });
    let receiver = Receiver::new(repository.clone()).sealing(SEAL);
    let group = block_on(async {
        let (mut session, resume) = primary.connect(&receiver).await.expect("a session");
        if resume.cursor.lsn == Lsn::ZERO {
            primary.gap_at = None;
        }
        primary.catch_up(&mut session, resume).await.expect("all");
        writes(&mut primary, &mut session, 20).await;
        session.group().clone()
    });
    let site = Site {
        repository,
        primary,
        group,
    };
    assert_eq!(told(&site.load()), told(&site.group), "call {calls}");
    site.read_newest(site.load()).expect("read");
    assert_eq!(site.verify().problems, [], "call {calls}");
    dead
}

/// A copy of a repository that lost its last segments does not go on behind them.
#[test]
fn a_layer_does_not_stand_in_for_segments_that_are_lost() {
    let site = Site::new();
    let last = site.group.history().epochs[0]
        .layers()
        .last()
        .expect("layers")
        .range;
    let next = site.group.history().epochs[0].next_sequence();
    for sequence in last.last..next {
        let key = keys::segment(site.primary.group, site.primary.epoch, sequence);
        block_on(site.repository.delete_for_tests(&key)).expect("deleted");
    }
    let loaded = site.load();
    assert_eq!(loaded.history().epochs[0].next_sequence(), last.last);
    // The primary sends them again, and all is as it was.
    let site = site.goes_on(30);
    assert_eq!(told(&site.load()), told(&site.group));
    site.read_newest(site.load()).expect("read");
}

/// A head that cannot be used takes its name for ever: what it should have said is stored with what
/// comes next.
#[test]
fn a_damaged_head_does_not_keep_later_layers_out() {
    let site = Site::new();
    for key in site.objects().0 {
        site.change(&key, |bytes| bytes.truncate(20));
    }
    let site = site.goes_on(60);
    let history = site.group.history();
    let in_memory: usize = history.epochs[0]
        .bases
        .iter()
        .map(|b| b.index().extents())
        .sum();
    assert!(in_memory < 2 * SEAL, "{in_memory}");
    drop(history);
    assert_eq!(told(&site.load()), told(&site.group));
    site.read_newest(site.load()).expect("read");
}

/// A head that says something else under the right name is not taken for what was sealed.
#[test]
fn another_head_under_its_name_is_not_adopted() {
    let site = Site::new();
    for key in site.objects().0 {
        site.change(&key, |bytes| {
            let mut head = LayerHead::decode(bytes).expect("a head");
            head.before.chain = RecordChain([9; 32]);
            head.runs.clear();
            *bytes = head.encode();
        });
    }
    let site = site.goes_on(30);
    site.read_newest(site.group.clone()).expect("read");
}

/// A confirmation stands behind its checkpoint. One that comes first says nothing, wherever the history
/// is read from.
#[test]
fn a_confirmation_of_a_checkpoint_to_come_says_nothing() {
    let mut site = Site::new();
    let next = site.primary.confirm(site.primary.last() + 2, None);
    assert_eq!(site.primary.application_checkpoint("early"), next + 1);
    let site = site.goes_on(9);
    let last = site.group.history().epochs[0]
        .layers()
        .last()
        .expect("layers")
        .range
        .last;
    assert!(site.group.history().epochs[0].next_sequence() - last < 6);
    assert_eq!(told(&site.load()), told(&site.group));
    assert_eq!(site.verify().problems, []);
}

//! Images against a byte model: random records, passes and gaps; at every LSN the image equals
//! the disks, or there is no image.

use std::sync::Arc;

use afterimage_format::chain::RecordChain;
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::op::Op;
use futures::executor::block_on;
use proptest::prelude::*;

use super::{ChunkCache, Image, ImageError};
use crate::group::Group;
use crate::history::Position;
use crate::receive::{Receiver, Session};
use crate::repository::Repository;
use crate::testing::primary::{BLOCKS, Content, DISK_BYTES, DISKS, Primary, block_of};
use crate::verify::verify;

/// One step of a random history.
#[derive(Clone, Debug)]
enum Step {
    Write(u16, u64, u32),
    Clear(u16, u64, u32, bool),
    Checkpoint,
    /// Ship up to this many records.
    Ship(u64),
    /// Begin a pass; with a gap, what was not shipped is lost.
    Begin(bool),
    /// Send this many blocks of the pass; a write may race with the read of the first.
    Blocks(usize, bool),
    /// Finish the pass.
    End,
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..DISKS as u16, 0..BLOCKS as u64, 1..12u32)
        .prop_map(|(disk, first, count)| (disk, first, count.min((BLOCKS as u64 - first) as u32)));
    prop_oneof![
        6 => range.clone().prop_map(|(d, f, c)| Step::Write(d, f, c)),
        2 => (range, any::<bool>()).prop_map(|((d, f, c), zero)| Step::Clear(d, f, c, zero)),
        1 => Just(Step::Checkpoint),
        4 => (1..9u64).prop_map(Step::Ship),
        1 => any::<bool>().prop_map(Step::Begin),
        3 => (1..30usize, any::<bool>()).prop_map(|(n, race)| Step::Blocks(n, race)),
        2 => Just(Step::End),
    ]
}

struct Pass {
    begin: u64,
    next: (u16, u64),
    blocks: u64,
    chain: RecordChain,
    /// Last block was looked at.
    whole: bool,
}

/// A history under way, with what must be readable.
struct Run {
    primary: Primary,
    session: Session,
    shipped: u64,
    pass: Option<Pass>,
    /// (begin, end of pass) of complete bases, and all begins.
    complete: Vec<(u64, u64)>,
    begins: Vec<u64>,
    /// What gaps swallowed.
    lost: Vec<std::ops::Range<u64>>,
}

impl Run {
    fn new(receiver: &Receiver) -> Self {
        let mut primary = Primary::new(1);
        let (session, resume) = block_on(primary.connect(receiver)).expect("a session");
        assert_eq!(resume.cursor.lsn, Lsn::ZERO);
        let mut run = Self {
            primary,
            session,
            shipped: 0,
            pass: None,
            complete: Vec::new(),
            begins: Vec::new(),
            lost: Vec::new(),
        };
        run.begin(true);
        run
    }

    fn ship_to(&mut self, to: u64) {
        if self.shipped < to {
            let bytes = self.primary.segment(self.shipped + 1, to);
            block_on(self.session.give(bytes)).expect("stored");
            self.shipped = to;
        }
    }

    fn begin(&mut self, gap: bool) {
        if !gap {
            self.ship_to(self.primary.last());
        }
        let begin = self.primary.pass_begin(gap);
        let from = if gap { begin } else { self.shipped + 1 };
        self.lost.push(self.shipped + 1..from);
        block_on(self.session.give(self.primary.segment(from, begin))).expect("stored");
        self.shipped = begin;
        self.begins.push(begin);
        let chain = RecordChain::BASE;
        self.pass = Some(Pass {
            begin,
            next: (0, 0),
            blocks: 0,
            chain,
            whole: false,
        });
    }

    fn blocks(&mut self, max: usize, race: bool) {
        let Some(mut pass) = self.pass.take() else {
            return;
        };
        let lsn = self.primary.last();
        let mut blocks = self.primary.blocks_from(pass.next.0, pass.next.1, max);
        pass.whole = blocks.len() < max;
        if race && let Some((disk, block, ..)) = blocks.first().copied() {
            // The read was submitted at `lsn`; the write comes before its completion.
            self.primary.write(disk, block, 1);
            for (d, b, tag, _) in &mut blocks {
                *tag = self.primary.content[usize::from(*d)][*b as usize];
            }
        }
        if let Some((disk, block, _, read_at)) = blocks.last().copied() {
            assert_eq!(read_at, lsn);
            let (bytes, chain) = self.primary.pass_segment(pass.begin, pass.chain, &blocks);
            block_on(self.session.give(bytes)).expect("stored");
            pass.next = (disk, block + 1);
            pass.blocks += blocks.len() as u64;
            pass.chain = chain;
        }
        self.pass = Some(pass);
    }

    fn end(&mut self) {
        while self.pass.as_ref().is_some_and(|pass| !pass.whole) {
            self.blocks(20, false);
        }
        if let Some(pass) = self.pass.take() {
            let end = self.primary.pass_end(pass.begin, pass.blocks, pass.chain);
            self.complete.push((pass.begin, end));
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write(disk, first, count) => {
                self.primary.write(disk, first, count);
            }
            Step::Clear(disk, first, count, zero) => {
                let op = if zero { Op::Zero } else { Op::Trim };
                self.primary.clear(disk, first, count, op);
            }
            Step::Checkpoint => {
                self.primary.checkpoint("");
            }
            Step::Ship(max) => self.ship_to(self.primary.last().min(self.shipped + max)),
            Step::Begin(gap) => {
                // A pass whose end is lost in the gap was never complete.
                if gap {
                    self.complete.retain(|(_, end)| *end <= self.shipped);
                }
                self.begin(gap);
            }
            Step::Blocks(max, race) => self.blocks(max, race),
            Step::End => self.end(),
        }
    }

    /// Whether a record is a recovery point: it was received, and its base is complete below it.
    fn is_point(&self, lsn: u64) -> bool {
        let begin = self.begins.iter().rev().find(|begin| **begin <= lsn);
        let end = self.complete.iter().find(|(of, _)| Some(of) == begin);
        let lost = self.lost.iter().any(|lost| lost.contains(&lsn));
        end.is_some_and(|(_, end)| *end <= lsn) && lsn <= self.shipped && !lost
    }
}

/// Every LSN of a group: image or none, and equal to the model.
fn compare(group: &Arc<Group>, run: &Run, cache: &Arc<ChunkCache>) -> usize {
    let mut points = 0;
    for lsn in 0..=run.primary.last() {
        let at = Position {
            epoch: run.primary.epoch,
            lsn: Lsn(lsn),
        };
        let image = Image::open(group.clone(), at, cache.clone());
        if !run.is_point(lsn) {
            assert!(
                matches!(image, Err(ImageError::NoSuchPoint { .. })),
                "{at} must not exist"
            );
            continue;
        }
        points += 1;
        compare_image(&image.expect("a point"), &run.primary.after[&lsn]);
    }
    points
}

fn compare_image(image: &Image, content: &Content) {
    for (disk, blocks) in content.iter().enumerate() {
        let mut expected: Vec<u8> = blocks.iter().flat_map(|tag| block_of(*tag)).collect();
        expected.truncate(DISK_BYTES);
        let mut read = vec![0xee; DISK_BYTES];
        block_on(image.read(DiskIndex(disk as u16), 0, &mut read)).expect("read");
        assert!(
            read == expected,
            "disk {disk} at {} differs",
            image.position()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_point_is_exact_or_absent(
        steps in prop::collection::vec(step(), 1..120),
        seal_extents in prop_oneof![Just(usize::MAX), 1..4usize, 4..40usize],
        cache_bytes in prop_oneof![Just(0usize), Just(1 << 20)],
    ) {
        let repository = Repository::in_memory();
        let receiver = Receiver::new(repository.clone()).sealing(seal_extents);
        let cache = Arc::new(ChunkCache::new(cache_bytes));
        let mut run = Run::new(&receiver);
        for step in steps {
            run.step(step);
        }
        let group = run.session.group().clone();
        compare(&group, &run, &cache);
        // The same from the objects alone.
        let loaded = block_on(Group::load(&repository, run.primary.group)).expect("a group");
        prop_assert_eq!(loaded.history().latest(), group.history().latest());
        compare(&Arc::new(loaded), &run, &cache);
        // And when all is shipped.
        run.end();
        run.ship_to(run.primary.last());
        let points = compare(&group, &run, &cache);
        prop_assert!(points > 0);
        prop_assert!(cache.bytes() <= 1 << 20);
        // And from what layers say, as far as they reach.
        let loaded = block_on(Group::load(&repository, run.primary.group)).expect("a group");
        prop_assert_eq!(compare(&Arc::new(loaded), &run, &cache), points);
        let report = block_on(verify(&repository, &run.primary.name, |_| {})).expect("a report");
        prop_assert_eq!(report.problems, []);
    }
}

/// A group with one complete base and some writes.
fn simple() -> (Repository, Run) {
    let repository = Repository::in_memory();
    let receiver = Receiver::new(repository.clone());
    let mut run = Run::new(&receiver);
    run.step(Step::Write(0, 3, 5));
    run.step(Step::Write(1, 30, 10));
    run.end();
    run.step(Step::Write(0, 4, 2));
    run.step(Step::Clear(1, 31, 2, false));
    run.ship_to(run.primary.last());
    (repository, run)
}

#[test]
fn parts_of_blocks_can_be_read_and_nothing_beyond_the_end() {
    let (_, run) = simple();
    let at = run.session.group().history().latest().expect("a point");
    let cache = Arc::new(ChunkCache::new(0));
    let image = Image::open(run.session.group().clone(), at, cache).expect("an image");
    let mut whole = vec![0; DISK_BYTES];
    block_on(image.read(DiskIndex(0), 0, &mut whole)).expect("read");
    for (offset, len) in [
        (0, 1),
        (4095, 2),
        (3 * 4096 + 17, 9000),
        (DISK_BYTES - 5, 5),
    ] {
        let mut part = vec![0xee; len];
        block_on(image.read(DiskIndex(0), offset as u64, &mut part)).expect("read");
        assert!(part == whole[offset..offset + len], "{offset}+{len}");
    }
    let mut buffer = [0; 2];
    let beyond = block_on(image.read(DiskIndex(0), DISK_BYTES as u64 - 1, &mut buffer));
    assert!(matches!(beyond, Err(ImageError::OutOfRange { .. })));
    let overflow = block_on(image.read(DiskIndex(0), u64::MAX, &mut buffer));
    assert!(matches!(overflow, Err(ImageError::OutOfRange { .. })));
    let no_disk = block_on(image.read(DiskIndex(9), 0, &mut buffer));
    assert!(matches!(no_disk, Err(ImageError::NoSuchDisk { disk: 9 })));
}

#[test]
fn block_status_tells_holes() {
    use afterimage_proxy::nbd::device::Device;
    let (_, run) = simple();
    let at = run.session.group().history().latest().expect("a point");
    let cache = Arc::new(ChunkCache::new(1 << 20));
    let image = Image::open(run.session.group().clone(), at, cache).expect("an image");
    let device = super::ImageDevice::new(image, DiskIndex(1)).expect("a disk");
    let extents = block_on(device.block_status(0, DISK_BYTES as u64, 100)).expect("extents");
    let found: Vec<(u64, bool)> = extents.iter().map(|e| (e.len, e.hole)).collect();
    let block = BLOCK_SIZE as u64;
    let last = DISK_BYTES as u64 - 33 * block;
    assert_eq!(
        found,
        [
            (30 * block, true),
            (block, false),
            (2 * block, true),
            (last, false)
        ]
    );
    let one = block_on(device.block_status(100, 10, 1)).expect("extents");
    assert_eq!((one.len(), one[0].len, one[0].hole), (1, 10, true));
}

#[test]
fn a_damaged_chunk_is_never_served() {
    let (repository, run) = simple();
    let group = run.session.group().clone();
    let at = group.history().latest().expect("a point");
    let mut damaged = 0;
    for sequence in 1..group.history().epochs[0].next_sequence() {
        let key = crate::repository::keys::segment(group.id(), run.primary.epoch, sequence);
        let good = block_on(repository.get(&key)).expect("an object");
        let mut bad = good.to_vec();
        // A byte of the first chunk, if there is one.
        bad[256] ^= 1;
        block_on(repository.overwrite_for_tests(&key, bad.into())).expect("written");
        let cache = Arc::new(ChunkCache::new(1 << 20));
        let image = Image::open(group.clone(), at, cache).expect("an image");
        for (disk, blocks) in run.primary.content.iter().enumerate() {
            let mut expected: Vec<u8> = blocks.iter().flat_map(|tag| block_of(*tag)).collect();
            expected.truncate(DISK_BYTES);
            let mut read = vec![0; DISK_BYTES];
            match block_on(image.read(DiskIndex(disk as u16), 0, &mut read)) {
                Ok(()) => assert!(read == expected),
                Err(ImageError::Chunk {
                    key: named,
                    offset: 256,
                    ..
                }) if named == key => {
                    damaged += 1;
                }
                Err(other) => panic!("{other}"),
            }
        }
        block_on(repository.overwrite_for_tests(&key, good)).expect("written");
    }
    assert!(damaged >= 2);
}

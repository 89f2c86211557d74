//! Every target over its corpus, and over bytes that a seeded generator makes from it.

use super::TARGETS;
use std::fs;
use std::path::{Path, PathBuf};

/// Inputs made for each target.
const MADE: u64 = 2000;

fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    let entries = fs::read_dir(&folder).expect("each target has a corpus");
    let paths = entries.map(|entry| entry.expect("readable").path());
    let mut all: Vec<_> = paths
        .map(|path| (path.clone(), fs::read(path).expect("readable")))
        .collect();
    all.sort();
    all
}

/// SplitMix64.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// A few changes: bytes, lengths, parts of another input.
fn change(bytes: &mut Vec<u8>, other: &[u8], numbers: &mut Numbers) {
    for _ in 0..=numbers.below(4) {
        let at = numbers.below(bytes.len().max(1));
        match numbers.below(6) {
            0 | 1 if !bytes.is_empty() => bytes[at] = numbers.next() as u8,
            2 if !bytes.is_empty() => bytes[at] ^= 1 << numbers.below(8),
            3 => bytes.truncate(at),
            4 => {
                let noise = numbers.next().to_le_bytes();
                bytes.splice(at..at, noise);
            }
            _ if !other.is_empty() => {
                let from = numbers.below(other.len());
                let len = numbers.below((other.len() - from).min(64) + 1);
                bytes.splice(
                    at.min(bytes.len())..at.min(bytes.len()),
                    other[from..from + len].to_vec(),
                );
            }
            _ => {}
        }
    }
}

/// Says which input it was, if the target panics.
struct Input(String);

impl Drop for Input {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", self.0);
        }
    }
}

fn smoke(name: &str) {
    let target = TARGETS
        .iter()
        .find(|target| target.name == name)
        .expect("known");
    let corpus = corpus(name);
    assert!(!corpus.is_empty(), "{name} has no corpus");
    for (path, bytes) in &corpus {
        let _input = Input(path.display().to_string());
        (target.run)(bytes);
    }
    for seed in 0..MADE {
        let mut numbers = Numbers(seed);
        let mut bytes = corpus[numbers.below(corpus.len())].1.clone();
        let other = &corpus[numbers.below(corpus.len())].1;
        change(&mut bytes, other, &mut numbers);
        let _input = Input(format!("{name}, made from seed {seed}"));
        (target.run)(&bytes);
    }
}

macro_rules! smokes {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                smoke(stringify!($name));
            }
        )*

        #[test]
        fn every_target_is_here() {
            let here = [$(stringify!($name)),*];
            assert!(TARGETS.iter().map(|target| target.name).eq(here));
        }
    };
}

smokes! {
    frame superblock ring_header claim segment manifest layer wire nbd bodies nbd_session nbd_handshake
    receive intake conversation agent_wire intent point
}

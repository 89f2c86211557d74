//! What the data path looks up for each block of a request.

use std::hint::black_box;

use afterimage_benches::payload::Numbers;
use afterimage_format::ids::{DiskIndex, Lsn};
use afterimage_proxy::engine::block_map::{BlockKey, BlockMap};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

criterion_group!(engine, block_map);
criterion_main!(engine);

/// The map of block to newest version, with room for all of its entries as the engine makes it:
/// every entry inserted, found, and removed when its version has been destaged.
fn block_map(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("block map");
    group.sample_size(20);
    for entries in [10_000, 100_000, 1_000_000] {
        let keys = keys(entries);
        let full = filled(&keys);
        let mut in_other_order = keys.clone();
        in_other_order.sort_unstable_by_key(|key| key.block().wrapping_mul(0x9e37_79b9_7f4a_7c15));
        group.throughput(Throughput::Elements(entries as u64));
        group.bench_function(BenchmarkId::new("insert", entries), |bencher| {
            bencher.iter_batched(
                || BlockMap::with_capacity(entries),
                |mut map| {
                    insert_all(&mut map, &keys);
                    map
                },
                BatchSize::LargeInput,
            );
        });
        group.bench_function(BenchmarkId::new("lookup", entries), |bencher| {
            bencher.iter(|| {
                let found = in_other_order.iter().filter_map(|key| full.get(*key));
                found
                    .map(|version| u64::from(version.ring_block))
                    .sum::<u64>()
            });
        });
        group.bench_function(BenchmarkId::new("remove", entries), |bencher| {
            bencher.iter_batched(
                || filled(&keys),
                |mut map| {
                    for (lsn, key) in (1..).zip(&keys) {
                        black_box(map.end_destage(*key, Lsn(lsn)));
                    }
                    map
                },
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

/// Blocks all over a disk of 1 TiB, each once.
fn keys(count: usize) -> Vec<BlockKey> {
    let mut numbers = Numbers::new(1);
    let mut seen = std::collections::HashSet::new();
    std::iter::repeat_with(|| numbers.below(1 << 28))
        .filter(|block| seen.insert(*block))
        .take(count)
        .map(|block| BlockKey::new(DiskIndex(0), block))
        .collect()
}

fn filled(keys: &[BlockKey]) -> BlockMap {
    let mut map = BlockMap::with_capacity(keys.len());
    insert_all(&mut map, keys);
    map
}

fn insert_all(map: &mut BlockMap, keys: &[BlockKey]) {
    for (at, key) in keys.iter().enumerate() {
        map.insert(*key, Lsn(at as u64 + 1), at as u32);
    }
}

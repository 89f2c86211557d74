//! Chunks and chunk tables that were read lately, shared by all images of a process.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use afterimage_format::ids::{BLOCK_SIZE, Epoch, GroupId};
use afterimage_format::layer::Extent;
use afterimage_format::segment::{ChunkInfo, SegmentIndex};
use bytes::Bytes;

use crate::index::LayerRange;

/// A segment of a repository.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct SegmentId {
    pub(super) group: GroupId,
    pub(super) epoch: Epoch,
    pub(super) sequence: u64,
}

/// A page of a layer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct PageId {
    pub(super) group: GroupId,
    pub(super) epoch: Epoch,
    pub(super) layer: LayerRange,
    pub(super) file: u32,
    pub(super) offset: u32,
    pub(super) crc: u32,
}

/// Where a segment's chunks are, and which blocks of its payload each holds.
#[derive(Debug)]
pub(super) struct ChunkTable {
    pub(super) chunks: Vec<ChunkInfo>,
    /// First payload block of each chunk.
    starts: Vec<u32>,
}

impl ChunkTable {
    pub(super) fn of(index: &SegmentIndex) -> Self {
        let mut next = 0;
        let starts = index.chunks.iter().map(|chunk| {
            let start = next;
            next += chunk.raw_len / BLOCK_SIZE as u32;
            start
        });
        Self {
            starts: starts.collect(),
            chunks: index.chunks.clone(),
        }
    }

    /// The chunk that holds a payload block, the block within it, and how many follow in it.
    pub(super) fn locate(&self, position: u32) -> Option<(u32, usize, usize)> {
        let chunk = self
            .starts
            .partition_point(|start| *start <= position)
            .checked_sub(1)?;
        let within = (position - self.starts[chunk]) as usize;
        let blocks = self.chunks[chunk].raw_len as usize / BLOCK_SIZE;
        let left = blocks.checked_sub(within).filter(|left| *left > 0)?;
        Some((chunk as u32, within, left))
    }

    fn bytes(&self) -> usize {
        self.chunks.len() * (size_of::<ChunkInfo>() + 4) + 64
    }
}

/// Keeps the most lately used chunks up to a number of bytes.
#[derive(Debug)]
pub struct ChunkCache {
    chunks: Mutex<Lru<(SegmentId, u32), Bytes>>,
    tables: Mutex<Lru<SegmentId, Arc<ChunkTable>>>,
    pages: Mutex<Lru<PageId, Arc<[Extent]>>>,
}

impl ChunkCache {
    /// A cache of at most this many bytes of raw data; a sixteenth more for tables, and a quarter for
    /// pages of layers.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self {
            chunks: Mutex::new(Lru::new(bytes_max)),
            tables: Mutex::new(Lru::new(bytes_max / 16)),
            pages: Mutex::new(Lru::new(bytes_max / 4)),
        }
    }

    /// Bytes of raw data held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.chunks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .bytes
    }

    pub(super) fn chunk(&self, segment: SegmentId, number: u32) -> Option<Bytes> {
        self.chunks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&(segment, number))
    }

    pub(super) fn put_chunk(&self, segment: SegmentId, number: u32, raw: Bytes) {
        let size = raw.len();
        let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        chunks.put((segment, number), raw, size);
    }

    pub(super) fn table(&self, segment: SegmentId) -> Option<Arc<ChunkTable>> {
        self.tables
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&segment)
    }

    pub(super) fn put_table(&self, segment: SegmentId, table: Arc<ChunkTable>) {
        let size = table.bytes();
        self.tables
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .put(segment, table, size);
    }
}

impl ChunkCache {
    pub(super) fn page(&self, page: PageId) -> Option<Arc<[Extent]>> {
        self.pages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&page)
    }

    pub(super) fn put_page(&self, page: PageId, extents: Arc<[Extent]>) {
        let size = size_of_val(&*extents) + 128;
        self.pages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .put(page, extents, size);
    }
}

#[derive(Debug)]
struct Lru<K, V> {
    held: HashMap<K, (V, u64, usize)>,
    by_use: BTreeMap<u64, K>,
    clock: u64,
    bytes: usize,
    bytes_max: usize,
}

impl<K: Copy + Eq + Hash, V: Clone> Lru<K, V> {
    fn new(bytes_max: usize) -> Self {
        Self {
            held: HashMap::new(),
            by_use: BTreeMap::new(),
            clock: 0,
            bytes: 0,
            bytes_max,
        }
    }

    fn get(&mut self, key: &K) -> Option<V> {
        let (value, used, _) = self.held.get_mut(key)?;
        self.clock += 1;
        self.by_use.remove(used);
        *used = self.clock;
        self.by_use.insert(self.clock, *key);
        Some(value.clone())
    }

    fn put(&mut self, key: K, value: V, size: usize) {
        if size > self.bytes_max {
            return;
        }
        self.clock += 1;
        self.bytes += size;
        self.by_use.insert(self.clock, key);
        if let Some((_, used, size)) = self.held.insert(key, (value, self.clock, size)) {
            self.by_use.remove(&used);
            self.bytes -= size;
        }
        while self.bytes > self.bytes_max
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            if let Some((_, _, size)) = self.held.remove(&oldest) {
                self.bytes -= size;
            }
        }
    }
}

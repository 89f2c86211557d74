//! Ragged edges: what a write that covers a block in part is merged with.
//!
//! Always holds: the merge takes the version that is newest at the moment the record's LSN is
//! given. Content read from the backing serves only as long as no newer version of the block has
//! come to the ring and gone to the backing since the read was submitted; then it is read again.
//! What was read while a backing was being synced waits for the sync's outcome: a sync that fails
//! may have lost what was read over.

use super::Engine;
use super::block_map::BlockKey;
use super::read::Newest;
use super::request::RequestError;
use super::ring::byte_offset;
use super::token::Purpose;
use crate::io::buffer::AlignedBuffer;
use crate::io::{FileId, Operation, Storage};
use afterimage_format::ids::{BLOCK_SHIFT, BLOCK_SIZE, DiskIndex};
use hashbrown::HashMap;
use slab::Slab;
use std::io;
use std::ops::Range;

/// Blocks whose backing content some part waits for or uses.
#[derive(Debug, Default)]
pub(super) struct Edges {
    slots: Slab<Edge>,
    by_block: HashMap<BlockKey, usize>,
    /// Reads that wait until the backing is whole again (`redo.rs`).
    held: Vec<usize>,
    /// Reads that have ended during a sync of the backings, with the number of bytes.
    unsure: Vec<(usize, usize, AlignedBuffer)>,
}

#[derive(Debug)]
struct Edge {
    key: BlockKey,
    /// Parts that wait for it or count on it.
    users: Vec<usize>,
    /// Users that have not been told that it is there.
    awaiting: Vec<usize>,
    content: Option<AlignedBuffer>,
    reading: bool,
    /// What is being read may be older than the backing.
    stale: bool,
}

impl Edges {
    pub(super) fn reads_in_flight(&self) -> bool {
        self.slots.iter().any(|(_, edge)| edge.reading)
    }

    /// A version of this block went from the ring to the backing.
    pub(super) fn block_left_ring(&mut self, key: BlockKey) {
        if self.by_block.is_empty() {
            return;
        }
        if let Some(slot) = self.by_block.get(&key) {
            self.slots[*slot].invalidate();
        }
    }

    /// A zeroing went to the backing.
    pub(super) fn range_left_ring(&mut self, disk: DiskIndex, blocks: &Range<u64>) {
        for (_, edge) in &mut self.slots {
            if edge.key.disk() == disk && blocks.contains(&edge.key.block()) {
                edge.invalidate();
            }
        }
    }

    /// Nothing read so far from any backing may be believed.
    pub(super) fn all_left_ring(&mut self) {
        for (_, edge) in &mut self.slots {
            edge.invalidate();
        }
    }
}

impl Edge {
    fn invalidate(&mut self) {
        self.content = None;
        self.stale = self.reading;
    }
}

impl<S: Storage> Engine<S> {
    /// Whether the newest version of the block can be had without a read.
    pub(super) fn edge_known(&self, disk: DiskIndex, block: u64) -> bool {
        if self.newest(disk, block) != Newest::Backing {
            return true;
        }
        self.edges
            .by_block
            .get(&BlockKey::new(disk, block))
            .is_some_and(|slot| self.edges.slots[*slot].content.is_some())
    }

    /// Copies bytes `within` of the newest version of a block to the same place of the block at
    /// ring offset `to`. Only after [`Engine::edge_known`], with nothing in between.
    pub(super) fn copy_edge(
        &mut self,
        disk: DiskIndex,
        block: u64,
        to: usize,
        within: Range<usize>,
    ) {
        let len = within.len();
        match self.newest(disk, block) {
            Newest::Ring(from) => {
                let bytes = self.storage.ring(byte_offset(from) + within.start, len);
                self.scratch[..len].copy_from_slice(bytes);
            }
            Newest::Zero => self.scratch[..len].fill(0),
            Newest::Backing => {
                let content = self
                    .edges
                    .by_block
                    .get(&BlockKey::new(disk, block))
                    .and_then(|slot| self.edges.slots[*slot].content.as_ref())
                    .expect("the edge was known just before");
                self.scratch[..len].copy_from_slice(&content[within.clone()]);
            }
        }
        self.storage
            .ring_write(to + within.start, &self.scratch[..len]);
    }

    /// Lets a part wait for the backing content of these blocks.
    pub(super) fn await_edges(&mut self, part: usize, blocks: [Option<(DiskIndex, u64)>; 2]) {
        for (disk, block) in blocks.into_iter().flatten() {
            let key = BlockKey::new(disk, block);
            let slot = match self.edges.by_block.get(&key) {
                Some(slot) => *slot,
                None => {
                    let slot = self.edges.slots.insert(Edge {
                        key,
                        users: Vec::new(),
                        awaiting: Vec::new(),
                        content: None,
                        reading: false,
                        stale: false,
                    });
                    self.edges.by_block.insert(key, slot);
                    slot
                }
            };
            let edge = &mut self.edges.slots[slot];
            let entry = &mut self.writes.parts[part];
            // A part that waits again for the same block uses it already.
            if !entry.edges.contains(&Some((disk, block))) {
                edge.users.push(part);
                let free = usize::from(entry.edges[0].is_some());
                entry.edges[free] = Some((disk, block));
            }
            edge.awaiting.push(part);
            entry.edges_awaited += 1;
            if !edge.reading {
                self.read_edge(slot);
            }
        }
    }

    fn read_edge(&mut self, slot: usize) {
        let edge = &mut self.edges.slots[slot];
        edge.reading = true;
        edge.stale = false;
        if self.redo.is_some() {
            self.edges.held.push(slot);
            return;
        }
        self.submit_edge_read(slot);
    }

    fn submit_edge_read(&mut self, slot: usize) {
        let key = self.edges.slots[slot].key;
        self.edges.slots[slot].stale = false;
        let buffer = self.pool.take(BLOCK_SIZE);
        self.storage.submit(
            Purpose::Edge(slot).token(),
            Operation::Read {
                file: FileId::backing(key.disk()),
                offset: key.block() << BLOCK_SHIFT,
                buffer,
            },
        );
    }

    /// The backing is whole again: what was held back is read.
    pub(super) fn release_held_edges(&mut self) {
        for slot in std::mem::take(&mut self.edges.held) {
            if self.edges.slots.contains(slot) {
                self.submit_edge_read(slot);
            }
        }
    }

    /// The backing cannot be made whole for now.
    pub(super) fn fail_held_edges(&mut self, error: RequestError) {
        for slot in std::mem::take(&mut self.edges.held) {
            let Some(edge) = self.edges.slots.get_mut(slot) else {
                continue;
            };
            edge.reading = false;
            let key = edge.key;
            for part in std::mem::take(&mut edge.awaiting) {
                self.fail_part(part, error);
            }
            if self
                .edges
                .slots
                .get(slot)
                .is_some_and(|edge| edge.users.is_empty())
            {
                self.edges.slots.remove(slot);
                self.edges.by_block.remove(&key);
            }
        }
    }

    pub(super) fn edge_read_done(
        &mut self,
        slot: usize,
        result: io::Result<usize>,
        buffer: Option<AlignedBuffer>,
    ) {
        match (result, buffer) {
            (Ok(bytes), Some(buffer)) if self.destage.syncing() => {
                self.edges.unsure.push((slot, bytes, buffer));
            }
            (result, buffer) => self.edge_read_counts(slot, result, buffer),
        }
    }

    /// The sync has ended, and if it failed everything read so far is stale.
    pub(super) fn settle_unsure_edges(&mut self) {
        for (slot, bytes, buffer) in std::mem::take(&mut self.edges.unsure) {
            self.edge_read_counts(slot, Ok(bytes), Some(buffer));
        }
    }

    fn edge_read_counts(
        &mut self,
        slot: usize,
        result: io::Result<usize>,
        buffer: Option<AlignedBuffer>,
    ) {
        let (Some(edge), Some(mut buffer)) = (self.edges.slots.get_mut(slot), buffer) else {
            return;
        };
        edge.reading = false;
        let key = edge.key;
        if edge.users.is_empty() {
            self.edges.by_block.remove(&key);
            self.edges.slots.remove(slot);
            self.pool.give(buffer);
            return;
        }
        let valid = self.valid_bytes(key.disk(), key.block());
        let edge = &mut self.edges.slots[slot];
        match result {
            Ok(bytes) if bytes >= valid => {
                if edge.stale {
                    self.pool.give(buffer);
                    if self.newest(key.disk(), key.block()) == Newest::Backing {
                        self.read_edge(slot);
                        return;
                    }
                } else {
                    buffer[valid..].fill(0);
                    edge.content = Some(buffer);
                }
                let edge = &mut self.edges.slots[slot];
                for part in std::mem::take(&mut edge.awaiting) {
                    let entry = &mut self.writes.parts[part];
                    entry.edges_awaited -= 1;
                    if entry.edges_awaited == 0 {
                        self.writes.requeue(part);
                    }
                }
            }
            _ => {
                self.pool.give(buffer);
                self.status.backing_errors += 1;
                let edge = &mut self.edges.slots[slot];
                for part in std::mem::take(&mut edge.awaiting) {
                    self.fail_part(part, RequestError::Io);
                }
            }
        }
    }

    /// A part needs these blocks no longer.
    pub(super) fn leave_edges(&mut self, part: usize, edges: [Option<(DiskIndex, u64)>; 2]) {
        for (disk, block) in edges.into_iter().flatten() {
            let key = BlockKey::new(disk, block);
            let Some(&slot) = self.edges.by_block.get(&key) else {
                continue;
            };
            let edge = &mut self.edges.slots[slot];
            if let Some(index) = edge.users.iter().position(|user| *user == part) {
                edge.users.swap_remove(index);
            }
            if !edge.users.contains(&part) {
                edge.awaiting.retain(|user| *user != part);
            }
            if edge.users.is_empty() && !edge.reading {
                let edge = self.edges.slots.remove(slot);
                self.edges.by_block.remove(&key);
                if let Some(content) = edge.content {
                    self.pool.give(content);
                }
            }
        }
    }
}

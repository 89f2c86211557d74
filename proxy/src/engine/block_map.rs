//! Where in the ring the newest version of a block lies.
//!
//! Always holds: an entry's ring block belongs to a frame that has not been released; an entry goes
//! only if its LSN is the one that was destaged or that a newer zeroing makes void. In memory only.

use afterimage_format::ids::{DiskIndex, Lsn};
use hashbrown::HashMap;
use hashbrown::hash_map::Entry;

/// A block of a disk, in one word: disk numbers stay below 64 and block numbers below 2^51.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BlockKey(u64);

impl BlockKey {
    /// The key of a block.
    #[must_use]
    pub const fn new(disk: DiskIndex, block: u64) -> Self {
        Self((disk.0 as u64) << 52 | block)
    }

    /// The disk.
    #[must_use]
    pub const fn disk(self) -> DiskIndex {
        DiskIndex((self.0 >> 52) as u16)
    }

    /// Block number within the disk.
    #[must_use]
    pub const fn block(self) -> u64 {
        self.0 & ((1 << 52) - 1)
    }
}

/// The newest version of a block that lies in the ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Version {
    /// The record that wrote it.
    pub lsn: Lsn,
    /// Block of the ring's frame area.
    pub ring_block: u32,
    /// Some version of this block, not necessarily this one, is on its way to the backing.
    pub destaging: bool,
}

/// The newest versions of all blocks in the ring.
#[derive(Debug, Default)]
pub struct BlockMap {
    versions: HashMap<BlockKey, Version>,
}

impl BlockMap {
    /// A map that takes as many blocks as the ring holds without a new allocation.
    #[must_use]
    pub fn with_capacity(blocks: usize) -> Self {
        Self {
            versions: HashMap::with_capacity(blocks),
        }
    }

    /// Blocks in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.versions.len()
    }

    /// Whether it holds no block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.versions.is_empty()
    }

    /// The newest version of a block, if it lies in the ring.
    #[must_use]
    pub fn get(&self, key: BlockKey) -> Option<Version> {
        if self.versions.is_empty() {
            return None;
        }
        self.versions.get(&key).copied()
    }

    /// A new newest version; gives the ring block of the one before it. What is on its way to the
    /// backing stays so.
    pub fn insert(&mut self, key: BlockKey, lsn: Lsn, ring_block: u32) -> Option<u32> {
        match self.versions.entry(key) {
            Entry::Occupied(mut entry) => {
                let version = entry.get_mut();
                let before = version.ring_block;
                debug_assert!(
                    version.lsn < lsn,
                    "versions come in the order of their LSNs"
                );
                version.lsn = lsn;
                version.ring_block = ring_block;
                Some(before)
            }
            Entry::Vacant(entry) => {
                entry.insert(Version {
                    lsn,
                    ring_block,
                    destaging: false,
                });
                None
            }
        }
    }

    /// A version of this block is being written to the backing.
    pub fn begin_destage(&mut self, key: BlockKey) {
        if let Some(version) = self.versions.get_mut(&key) {
            version.destaging = true;
        }
    }

    /// The version with this LSN is in the backing. Returns whether the entry went.
    pub fn end_destage(&mut self, key: BlockKey, lsn: Lsn) -> bool {
        let Some(version) = self.versions.get_mut(&key) else {
            return false;
        };
        version.destaging = false;
        if version.lsn != lsn {
            return false;
        }
        self.versions.remove(&key);
        true
    }

    /// Drops the entry if its version is this one (a newer zeroing made it void).
    pub fn remove_version(&mut self, key: BlockKey, lsn: Lsn) {
        if self.get(key).is_some_and(|version| version.lsn == lsn) {
            self.versions.remove(&key);
        }
    }

    /// All blocks with their newest versions, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (BlockKey, Version)> + '_ {
        self.versions.iter().map(|(key, version)| (*key, *version))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: BlockKey = BlockKey::new(DiskIndex(63), (1 << 51) - 1);

    #[test]
    fn a_key_keeps_disk_and_block() {
        assert_eq!(KEY.disk(), DiskIndex(63));
        assert_eq!(KEY.block(), (1 << 51) - 1);
    }

    #[test]
    fn an_entry_goes_only_with_its_own_version() {
        let mut map = BlockMap::with_capacity(4);
        assert_eq!(map.insert(KEY, Lsn(1), 10), None);
        map.begin_destage(KEY);
        assert_eq!(map.insert(KEY, Lsn(2), 11), Some(10));
        let version = map.get(KEY).expect("present");
        assert_eq!((version.lsn, version.ring_block), (Lsn(2), 11));
        assert!(version.destaging, "the older version is still on its way");
        assert!(!map.end_destage(KEY, Lsn(1)));
        assert!(!map.get(KEY).expect("still present").destaging);
        assert!(map.end_destage(KEY, Lsn(2)));
        assert_eq!(map.get(KEY), None);
    }
}

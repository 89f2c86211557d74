//! The bytes of a superblock: one block, all numbers little-endian.

use super::{
    DiskState, Inconsistency, SINKS_MAX, SUPERBLOCK_MAGIC, SUPERBLOCK_VERSION, SinkState,
    Superblock, SuperblockError, Tail,
};
use crate::chain::RecordChain;
use crate::checksum::crc32c;
use crate::frame::AREA_BLOCKS_MIN;
use crate::frame::entry::BLOCKS_END;
use crate::ids::{BLOCK_SIZE, BootId, DISKS_MAX, DiskId, Epoch, GroupId, LogId, Lsn};
use crate::segment::SinkId;
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawSink {
    id: [u8; 16],
    acked: U64,
    dirty_lsn: U64,
    chain: [u8; 32],
    flags: U32,
    reserved: [u8; 4],
    rebase_after: U64,
}

const SINK_DIRTY: u32 = 1;
const SINK_ZERO: RawSink = RawSink {
    id: [0; 16],
    acked: U64::ZERO,
    dirty_lsn: U64::ZERO,
    chain: [0; 32],
    flags: U32::ZERO,
    reserved: [0; 4],
    rebase_after: U64::ZERO,
};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawDisk {
    id: [u8; 16],
    size: U64,
    flags: U32,
    reserved: [u8; 4],
}

const DISK_REMOVED: u32 = 1;
const DISK_ZERO: RawDisk = RawDisk {
    id: [0; 16],
    size: U64::ZERO,
    flags: U32::ZERO,
    reserved: [0; 4],
};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U16,
    disk_count: U16,
    sink_count: U16,
    flags: U16,
    group: [u8; 16],
    log: [u8; 16],
    boot: [u8; 16],
    generation: U64,
    epoch: U64,
    area_blocks: U64,
    incarnation: U32,
    ring_blocks: U32,
    incarnation_frame: U64,
    tail_position: U64,
    tail_frame: U64,
    tail_lsn: U64,
    tail_lap: U32,
    tail_previous_crc: U32,
    destaged: U64,
    durable: U64,
    created_ns: U64,
    reserved_a: [u8; 96],
    sinks: [RawSink; SINKS_MAX],
    sinks_good_until: [U64; SINKS_MAX],
    reserved_b: [u8; 64],
    disks: [RawDisk; DISKS_MAX],
    reserved_c: [u8; 1020],
    crc: U32,
}

const FLAG_CLEAN: u16 = 1;
/// Offset of the checksum, which covers everything before it.
const CRC_OFFSET: usize = BLOCK_SIZE - 4;

const _: () = assert!(size_of::<RawSink>() == 80);
const _: () = assert!(size_of::<RawDisk>() == 32);
const _: () = assert!(size_of::<Raw>() == BLOCK_SIZE);
const _: () = assert!(offset_of!(Raw, version) == 8);
const _: () = assert!(offset_of!(Raw, group) == 16);
const _: () = assert!(offset_of!(Raw, log) == 32);
const _: () = assert!(offset_of!(Raw, boot) == 48);
const _: () = assert!(offset_of!(Raw, generation) == 64);
const _: () = assert!(offset_of!(Raw, epoch) == 72);
const _: () = assert!(offset_of!(Raw, area_blocks) == 80);
const _: () = assert!(offset_of!(Raw, incarnation) == 88);
const _: () = assert!(offset_of!(Raw, ring_blocks) == 92);
const _: () = assert!(offset_of!(Raw, incarnation_frame) == 96);
const _: () = assert!(offset_of!(Raw, tail_position) == 104);
const _: () = assert!(offset_of!(Raw, tail_frame) == 112);
const _: () = assert!(offset_of!(Raw, tail_lsn) == 120);
const _: () = assert!(offset_of!(Raw, tail_lap) == 128);
const _: () = assert!(offset_of!(Raw, tail_previous_crc) == 132);
const _: () = assert!(offset_of!(Raw, destaged) == 136);
const _: () = assert!(offset_of!(Raw, durable) == 144);
const _: () = assert!(offset_of!(Raw, created_ns) == 152);
const _: () = assert!(offset_of!(Raw, sinks) == 256);
const _: () = assert!(offset_of!(Raw, sinks_good_until) == 896);
const _: () = assert!(offset_of!(Raw, disks) == 1024);
const _: () = assert!(offset_of!(Raw, crc) == CRC_OFFSET);

impl Superblock {
    /// The block's bytes. It belongs into copy `generation % 2`.
    ///
    /// Panics if a table is longer than the layout allows; whoever adds a disk or a sink checks.
    #[must_use]
    pub fn encode(&self) -> [u8; BLOCK_SIZE] {
        assert!(self.disks.len() <= DISKS_MAX && self.sinks.len() <= SINKS_MAX);
        let mut raw = Raw {
            magic: SUPERBLOCK_MAGIC,
            version: SUPERBLOCK_VERSION.into(),
            disk_count: (self.disks.len() as u16).into(),
            sink_count: (self.sinks.len() as u16).into(),
            flags: (if self.clean { FLAG_CLEAN } else { 0 }).into(),
            group: self.group.to_bytes(),
            log: self.log.to_bytes(),
            boot: self.boot.to_bytes(),
            generation: self.generation.into(),
            epoch: self.epoch.0.into(),
            area_blocks: self.area_blocks.into(),
            incarnation: self.incarnation.into(),
            ring_blocks: self.ring_blocks.into(),
            incarnation_frame: self.incarnation_frame.into(),
            tail_position: self.tail.position.into(),
            tail_frame: self.tail.frame.into(),
            tail_lsn: self.tail.lsn.0.into(),
            tail_lap: self.tail.lap.into(),
            tail_previous_crc: self.tail.previous_crc.into(),
            destaged: self.destaged.0.into(),
            durable: self.durable.0.into(),
            created_ns: self.created_ns.into(),
            reserved_a: [0; 96],
            sinks: [SINK_ZERO; SINKS_MAX],
            sinks_good_until: [U64::ZERO; SINKS_MAX],
            reserved_b: [0; 64],
            disks: [DISK_ZERO; DISKS_MAX],
            reserved_c: [0; 1020],
            crc: U32::ZERO,
        };
        for (slot, sink) in raw.sinks.iter_mut().zip(&self.sinks) {
            *slot = RawSink {
                id: sink.id.0,
                acked: sink.acked.0.into(),
                dirty_lsn: sink.dirty.unwrap_or(Lsn::ZERO).0.into(),
                chain: sink.chain.0,
                flags: (if sink.dirty.is_some() { SINK_DIRTY } else { 0 }).into(),
                reserved: [0; 4],
                rebase_after: sink.rebase_after.0.into(),
            };
        }
        for (slot, sink) in raw.sinks_good_until.iter_mut().zip(&self.sinks) {
            *slot = sink.good_until.0.into();
        }
        for (slot, disk) in raw.disks.iter_mut().zip(&self.disks) {
            *slot = RawDisk {
                id: disk.id.to_bytes(),
                size: disk.size.into(),
                flags: (if disk.removed { DISK_REMOVED } else { 0 }).into(),
                reserved: [0; 4],
            };
        }
        let mut block = [0; BLOCK_SIZE];
        block.copy_from_slice(raw.as_bytes());
        let crc = crc32c(&block[..CRC_OFFSET]);
        block[CRC_OFFSET..].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// Reads a copy: `copy` 0 is A, 1 is B.
    ///
    /// # Errors
    /// The first check that fails; magic, version and checksum come first, in this order.
    pub fn decode(block: &[u8], copy: u64) -> Result<Self, SuperblockError> {
        let raw = Raw::ref_from_bytes(block).map_err(|_| SuperblockError::Length(block.len()))?;
        if raw.magic != SUPERBLOCK_MAGIC {
            return Err(SuperblockError::Magic);
        }
        if raw.version.get() != SUPERBLOCK_VERSION {
            return Err(SuperblockError::Version(raw.version.get()));
        }
        let (found, computed) = (raw.crc.get(), crc32c(&block[..CRC_OFFSET]));
        if found != computed {
            return Err(SuperblockError::Crc { found, computed });
        }
        raw.check_reserved()?;
        let generation = raw.generation.get();
        if generation % super::SUPERBLOCK_COPIES != copy {
            return Err(SuperblockError::Misplaced { generation, copy });
        }
        let superblock = raw.value()?;
        superblock
            .check_consistency()
            .map_err(SuperblockError::Inconsistent)?;
        Ok(superblock)
    }

    fn check_consistency(&self) -> Result<(), Inconsistency> {
        if !(AREA_BLOCKS_MIN..BLOCKS_END).contains(&self.area_blocks) {
            return Err(Inconsistency::Area(self.area_blocks));
        }
        if self.tail.position > self.area_blocks {
            return Err(Inconsistency::Tail);
        }
        if self.tail.frame == 0 || self.tail.lsn == Lsn::ZERO {
            return Err(Inconsistency::TailNumber);
        }
        // The record before the tail is destaged: tail LSN ≤ destaged + 1.
        if self.tail.lsn.0 - 1 > self.destaged.0 {
            return Err(Inconsistency::TailBeforeDestaged);
        }
        if self.destaged > self.durable {
            return Err(Inconsistency::DestagedBeforeDurable);
        }
        Ok(())
    }
}

impl Raw {
    fn check_reserved(&self) -> Result<(), SuperblockError> {
        let nonzero = |offset: usize, bytes: &[u8]| match bytes.iter().position(|b| *b != 0) {
            Some(at) => Err(SuperblockError::Reserved(offset + at)),
            None => Ok(()),
        };
        nonzero(offset_of!(Raw, reserved_a), &self.reserved_a)?;
        nonzero(offset_of!(Raw, reserved_b), &self.reserved_b)?;
        nonzero(offset_of!(Raw, reserved_c), &self.reserved_c)?;
        if self.flags.get() & !FLAG_CLEAN != 0 {
            return Err(SuperblockError::Flags(self.flags.get()));
        }
        if self.disk_count.get() == 0 || self.disk_count.get() as usize > DISKS_MAX {
            return Err(SuperblockError::Disks(self.disk_count.get()));
        }
        if self.sink_count.get() as usize > SINKS_MAX {
            return Err(SuperblockError::Sinks(self.sink_count.get()));
        }
        let disks_at =
            offset_of!(Raw, disks) + self.disk_count.get() as usize * size_of::<RawDisk>();
        let unused_disks = &self.disks[self.disk_count.get() as usize..];
        nonzero(disks_at, unused_disks.as_bytes())?;
        let sinks_at =
            offset_of!(Raw, sinks) + self.sink_count.get() as usize * size_of::<RawSink>();
        let unused_sinks = &self.sinks[self.sink_count.get() as usize..];
        nonzero(sinks_at, unused_sinks.as_bytes())?;
        let good_until_at =
            offset_of!(Raw, sinks_good_until) + self.sink_count.get() as usize * size_of::<U64>();
        let unused_good_until = &self.sinks_good_until[self.sink_count.get() as usize..];
        nonzero(good_until_at, unused_good_until.as_bytes())
    }

    fn value(&self) -> Result<Superblock, SuperblockError> {
        let disks = self.disks[..self.disk_count.get() as usize]
            .iter()
            .enumerate()
            .map(|(index, disk)| disk.value().ok_or(SuperblockError::Disk(index)))
            .collect::<Result<_, _>>()?;
        let sinks = self.sinks[..self.sink_count.get() as usize]
            .iter()
            .enumerate()
            .map(|(index, sink)| {
                let good_until = Lsn(self.sinks_good_until[index].get());
                sink.value(good_until).ok_or(SuperblockError::Sink(index))
            })
            .collect::<Result<_, _>>()?;
        Ok(Superblock {
            group: GroupId::from_bytes(self.group),
            log: LogId::from_bytes(self.log),
            boot: BootId::from_bytes(self.boot),
            generation: self.generation.get(),
            epoch: Epoch(self.epoch.get()),
            area_blocks: self.area_blocks.get(),
            incarnation: self.incarnation.get(),
            incarnation_frame: self.incarnation_frame.get(),
            ring_blocks: self.ring_blocks.get(),
            clean: self.flags.get() & FLAG_CLEAN != 0,
            tail: Tail {
                position: self.tail_position.get(),
                frame: self.tail_frame.get(),
                lsn: Lsn(self.tail_lsn.get()),
                lap: self.tail_lap.get(),
                previous_crc: self.tail_previous_crc.get(),
            },
            destaged: Lsn(self.destaged.get()),
            durable: Lsn(self.durable.get()),
            created_ns: self.created_ns.get(),
            disks,
            sinks,
        })
    }
}

impl RawDisk {
    /// None if its bytes cannot be.
    fn value(&self) -> Option<DiskState> {
        let size = self.size.get();
        let flags = self.flags.get();
        let valid = size > 0
            && size.is_multiple_of(512)
            && size.div_ceil(BLOCK_SIZE as u64) <= BLOCKS_END
            && flags & !DISK_REMOVED == 0
            && self.reserved == [0; 4];
        valid.then_some(DiskState {
            id: DiskId::from_bytes(self.id),
            size,
            removed: flags & DISK_REMOVED != 0,
        })
    }
}

impl RawSink {
    /// None if its bytes cannot be.
    fn value(&self, good_until: Lsn) -> Option<SinkState> {
        let flags = self.flags.get();
        let dirty = flags & SINK_DIRTY != 0;
        let valid = flags & !SINK_DIRTY == 0
            && self.reserved == [0; 4]
            && good_until.0 <= self.rebase_after.get()
            && (dirty || self.dirty_lsn.get() == 0);
        valid.then_some(SinkState {
            id: SinkId(self.id),
            acked: Lsn(self.acked.get()),
            chain: RecordChain(self.chain),
            dirty: dirty.then_some(Lsn(self.dirty_lsn.get())),
            rebase_after: Lsn(self.rebase_after.get()),
            good_until,
        })
    }
}

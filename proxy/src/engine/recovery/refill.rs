//! Writing the ring's missing frames into the log: the first thing that recovery changes.
//!
//! Frames go exactly where the engine would have put them; closed ones byte for byte as they stand
//! in the ring, the open one closed. A kill in between leaves the ring as it was, and the next
//! recovery writes the same bytes to the same places. Durable when [`Refill::write`] has returned.

use super::RecoveryError;
use super::replay::{ReplayProgress, Replayed, replay};
use super::ring::RingFrame;
use crate::engine::blocking::Blocking;
use crate::engine::log::directory::Directory;
use crate::engine::log::reader::ChainRules;
use crate::engine::log::scan::frame_in_log;
use crate::engine::log::{LogHead, area_offset, superblock};
use crate::engine::start::FrameInLog;
use crate::io::{FileId, RingSpan, Source, Storage};
use afterimage_format::frame::decode::encode_descriptor;
use afterimage_format::frame::{Entry, FrameHeader};
use afterimage_format::ids::{BLOCK_SIZE, Lsn};
use afterimage_format::superblock::Superblock;

/// A log that is being brought up to its ring.
pub(super) struct Refill<'s> {
    pub(super) superblock: &'s mut Superblock,
    pub(super) rules: ChainRules,
    pub(super) head: LogHead,
    pub(super) directory: Directory,
    pub(super) frames: Vec<FrameInLog>,
    pub(super) replayed: Replayed,
    /// Told how far a replay is.
    pub(super) progress: &'s mut dyn FnMut(ReplayProgress),
}

impl Refill<'_> {
    /// Writes the frames and makes the log durable to its end. Where the log has no room, what it
    /// holds is brought into the backings first: all of that is durable in the log by then.
    pub(super) fn write<S: Storage>(
        &mut self,
        blocking: &mut Blocking<'_, S>,
        frames: &[RingFrame],
        durable: Lsn,
    ) -> Result<(), RecoveryError> {
        // As with the frames: that it can be read does not make it durable, and the next store
        // overwrites the copy before it.
        let offset = superblock::copy_offset(self.superblock.generation);
        blocking.write_bytes(FileId::LOG, offset, &self.superblock.encode())?;
        blocking.sync(FileId::LOG)?;
        for frame in frames {
            let header = FrameHeader {
                entry_count: frame.entries.len() as u16,
                durable_lsn: durable,
                ..frame.header
            };
            let area = self.rules.area_blocks;
            let placement = self.head.place(area, header.frame_blocks());
            let used = self.head.blocks_since(&self.superblock.tail, area);
            if used + placement.blocks_taken > area {
                self.make_room(blocking, placement.blocks_taken)?;
            }
            let offset = area_offset(placement.position);
            let (header, crc) = match frame.closed {
                Some(crc) => {
                    if frame.header.lap != placement.lap {
                        return Err(RecoveryError::RingDamaged {
                            damage: super::ring::RingDamage::Fork {
                                frame: frame.header.start.number,
                            },
                        });
                    }
                    let span = RingSpan {
                        offset: frame.offset() as u64,
                        len: frame.len() as u32,
                    };
                    blocking.write(FileId::LOG, offset, Source::Ring(span))?;
                    (frame.header, crc)
                }
                None => {
                    let header = FrameHeader {
                        lap: placement.lap,
                        ..header
                    };
                    let (bytes, crc) = close(blocking, frame, &header);
                    blocking.write_bytes(FileId::LOG, offset, &bytes)?;
                    (header, crc)
                }
            };
            self.directory.note(self.head, placement.blocks_taken);
            self.frames.push(frame_in_log(placement, &header));
            self.head = self.head.after(area, placement, &header, crc);
        }
        blocking.sync(FileId::LOG)?;
        Ok(())
    }

    fn last(&self) -> Lsn {
        Lsn(self.head.lsn.0 - 1)
    }

    /// Replays what the log holds, then moves the tail as far as needed. Sinks that lack what
    /// leaves are marked dirty in the same durable superblock.
    fn make_room<S: Storage>(
        &mut self,
        blocking: &mut Blocking<'_, S>,
        blocks: u64,
    ) -> Result<(), RecoveryError> {
        blocking.sync(FileId::LOG)?;
        self.replay(blocking)?;
        let area = self.rules.area_blocks;
        let used = self.head.blocks_since(&self.superblock.tail, area);
        let missing = used + blocks - area;
        let tail = self.directory.after_blocks(missing, area);
        // A frame of the ring is at most a quarter of the area; without an entry all of it goes.
        let tail = tail.unwrap_or(self.head);
        self.superblock.tail = tail.as_tail();
        self.directory.trim(tail);
        self.frames.retain(|frame| frame.number >= tail.frame);
        let gone = Lsn(tail.lsn.0 - 1);
        for sink in &mut self.superblock.sinks {
            if sink.acked < gone {
                sink.dirty = Some(gone);
            }
        }
        superblock::store(blocking, FileId::LOG, self.superblock)?;
        Ok(())
    }

    /// Brings the backings up to the log's end, which is durable, and syncs them. The superblock
    /// in memory says so afterwards; the caller stores it.
    pub(super) fn replay<S: Storage>(
        &mut self,
        blocking: &mut Blocking<'_, S>,
    ) -> Result<(), RecoveryError> {
        let from = self.superblock.destaged.next();
        let until = self.last();
        if from <= until {
            let start = self
                .directory
                .locate(from)
                .unwrap_or_else(|| LogHead::at_tail(&self.superblock.tail));
            let disks = &self.superblock.disks;
            let area = self.rules.area_blocks;
            let bytes_to = |head: LogHead| {
                let blocks = head.blocks_since(&start.as_tail(), area);
                blocks * BLOCK_SIZE as u64
            };
            let bytes_total = bytes_to(self.head);
            let mut reached = |head| {
                (self.progress)(ReplayProgress {
                    bytes_done: bytes_to(head),
                    bytes_total,
                });
            };
            reached(start);
            let (rules, records) = (self.rules, from..=until);
            let log = FileId::LOG;
            let part = replay(blocking, rules, log, start, records, disks, &mut reached)?;
            self.replayed.records += part.records;
            self.replayed.blocks += part.blocks;
            self.replayed.zeroings += part.zeroings;
            sync_backings(blocking, self.superblock)?;
        }
        self.superblock.destaged = until;
        self.superblock.durable = until;
        Ok(())
    }
}

/// Syncs every backing of the group.
pub(super) fn sync_backings<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    superblock: &Superblock,
) -> Result<(), RecoveryError> {
    for (index, disk) in superblock.disks.iter().enumerate() {
        if !disk.removed {
            let disk = afterimage_format::ids::DiskIndex(index as u16);
            blocking.sync(FileId::backing(disk))?;
        }
    }
    Ok(())
}

/// The bytes of an open frame, closed.
pub(super) fn close<S: Storage>(
    blocking: &Blocking<'_, S>,
    frame: &RingFrame,
    header: &FrameHeader,
) -> (Vec<u8>, u32) {
    let entries: &[Entry] = &frame.entries;
    let (descriptor, crc) = encode_descriptor(header, entries);
    let mut bytes = descriptor.to_vec();
    let payload = frame.len() - BLOCK_SIZE;
    bytes.extend_from_slice(blocking.ring(frame.offset() + BLOCK_SIZE, payload));
    (bytes, crc)
}

//! Where a log's valid frames end, and whether it may end there.
//!
//! # The end of the log
//!
//! The chain is followed from the tail until a frame is missing or damaged at both places where it
//! may stand. `bound` is the highest LSN that superblock or ring say was durable; a *claim* is a
//! frame of the same incarnation behind the end that says the log was durable past it.
//!
//! | case | at the end | last LSN ≥ bound | claim | judgement |
//! | --- | --- | --- | --- | --- |
//! | E1 end | nothing of the chain | yes | no | the log ends here |
//! | E2 torn | a damaged frame of the chain | yes | no | a write that a power cut tore: cut here |
//! | E3 lost | anything | no | – | corrupt: refuse, keep the file |
//! | E4 claimed | anything | yes | yes | corrupt: refuse, keep the file |
//! | E5 closed | anything, clean superblock | = the superblock's | not looked for | the log ends here |
//!
//! Frames that are durably in the backings are followed by their headers alone.
//!
//! What cannot be noticed: damage of the very last durable frames when no later frame, no
//! superblock and no ring says that they were durable.

use super::directory::Directory;
use super::error::{Absence, Evidence, LogError};
use super::reader::{ChainRules, IncarnationRule, Probe, READAHEAD_SCAN, StorageSource, Window};
use super::{LOG_AREA_OFFSET, LogHead, Placement, area_offset};
use crate::engine::blocking::Blocking;
use crate::engine::start::FrameInLog;
use crate::io::{FileId, Storage};
use afterimage_format::frame::{Descriptor, FRAME_BLOCKS_MAX, FrameHeader};
use afterimage_format::ids::{BLOCK_SIZE, GroupId, Lsn};
use afterimage_format::superblock::Superblock;

/// A log with a valid superblock of the right group. Its frames were not looked at: it accepts
/// none.
#[derive(Debug)]
pub struct UnverifiedLog {
    superblock: Superblock,
    file: FileId,
}

/// How the end of a log was judged. The labels are those of the module's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogEnd {
    /// E1: nothing of the chain stands behind the last frame.
    End(Absence),
    /// E2: a torn frame was cut.
    Torn(Absence),
    /// E5: the log was closed here.
    Closed,
}

/// What a scan found.
#[derive(Debug)]
pub struct Scan {
    /// Where the next frame goes.
    pub head: LogHead,
    /// Where LSNs are.
    pub directory: Directory,
    /// Why the log ends there.
    pub end: LogEnd,
    /// Frames from tail to head.
    pub frames: Vec<FrameInLog>,
}

impl Scan {
    /// Where the frame with this number begins, if the log holds it.
    pub(crate) fn head_at(&self, frame: u64) -> Option<LogHead> {
        let first = self.frames.iter().find(|known| known.number == frame)?;
        Some(LogHead {
            position: first.position,
            lap: first.lap,
            frame,
            lsn: first.first_lsn,
            previous_crc: first.previous_crc,
        })
    }

    /// Takes the frames from this head on off the end: whoever calls writes them again.
    pub(crate) fn cut_to(&mut self, head: LogHead) {
        self.frames.retain(|known| known.number < head.frame);
        self.head = head;
        self.directory.cut(head);
    }

    /// The last LSN in the log, or the one before its tail.
    #[must_use]
    pub fn last_lsn(&self) -> Lsn {
        Lsn(self.head.lsn.0 - 1)
    }
}

/// A frame at its place, as the engine's books need it.
pub(crate) fn frame_in_log(placement: Placement, header: &FrameHeader) -> FrameInLog {
    FrameInLog {
        position: placement.position,
        lap: placement.lap,
        blocks: header.frame_blocks(),
        number: header.start.number,
        first_lsn: header.start.first_lsn,
        last_lsn: header.last_lsn(),
        previous_crc: header.start.previous_crc,
    }
}

impl UnverifiedLog {
    /// Reads the superblocks of an open log file and checks that it is this group's and whole.
    ///
    /// # Errors
    /// Not a log, of a newer version, another group's, truncated, or not readable.
    pub fn open<S: Storage>(
        blocking: &mut Blocking<'_, S>,
        file: FileId,
        group: GroupId,
    ) -> Result<Self, LogError> {
        let path = blocking.names().of(file);
        let superblock = super::superblock::read(blocking, file)?.map_err(|source| {
            let path = path.clone();
            LogError::Superblock { path, source }
        })?;
        if superblock.group != group {
            return Err(LogError::OtherGroup {
                path,
                found: superblock.group,
                wanted: group,
            });
        }
        let len = blocking.file_len(file)?;
        let wanted = LOG_AREA_OFFSET + superblock.area_blocks * BLOCK_SIZE as u64;
        if len < wanted {
            return Err(LogError::Truncated { path, len, wanted });
        }
        Ok(Self { superblock, file })
    }

    /// What the superblock says.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Which file it is.
    #[must_use]
    pub fn file(&self) -> FileId {
        self.file
    }

    /// The superblock, to be changed by recovery.
    pub(crate) fn into_superblock(self) -> Superblock {
        self.superblock
    }

    /// Which frames may stand in it.
    #[must_use]
    pub fn rules(&self) -> ChainRules {
        ChainRules {
            log: self.superblock.log,
            area_blocks: self.superblock.area_blocks,
            incarnation: Some(IncarnationRule {
                current: self.superblock.incarnation,
                first_frame: self.superblock.incarnation_frame,
            }),
        }
    }

    /// Follows the chain to its end and judges it. `ring_durable` is the ring's durable LSN, if
    /// there is a ring.
    ///
    /// # Errors
    /// Corrupt (cases E3 and E4), or not readable.
    pub fn scan<S: Storage>(
        &self,
        blocking: &mut Blocking<'_, S>,
        ring_durable: Option<Lsn>,
    ) -> Result<Scan, LogError> {
        let rules = self.rules();
        let tail = self.superblock.tail;
        let mut head = LogHead::at_tail(&tail);
        let mut directory = Directory::new(head);
        let mut window = Window::new(rules.area_blocks, READAHEAD_SCAN);
        let mut frames = Vec::new();
        // Recovery has no use for what is durably in the backings: whoever has (shipping) checks it.
        let needless = self.superblock.destaged.min(self.superblock.durable);
        let passes = |header: &FrameHeader| header.last_lsn() <= needless;
        let (absence, position) = loop {
            let used = head.blocks_since(&tail, rules.area_blocks);
            if used >= rules.area_blocks {
                break (Absence::Full, head.position);
            }
            let mut source = StorageSource {
                blocking,
                file: self.file,
            };
            let (found, position) = window.probe_both(&mut source, &rules, &head, &passes)?;
            let (header, crc, placement) = match found {
                Probe::Frame(descriptor, placement) => {
                    (descriptor.header, descriptor.header_crc, placement)
                }
                Probe::Passed(header, crc, placement) => (header, crc, placement),
                Probe::Absent(absence) => break (absence, position),
            };
            if used + placement.blocks_taken > rules.area_blocks {
                break (Absence::Full, position);
            }
            directory.note(head, placement.blocks_taken);
            frames.push(frame_in_log(placement, &header));
            head = head.after(rules.area_blocks, placement, &header, crc);
        };
        let last = Lsn(head.lsn.0 - 1);
        let corrupt = |evidence| LogError::Corrupt {
            path: blocking.names().of(self.file),
            offset: area_offset(position),
            frame: head.frame,
            lsn: head.lsn,
            found: absence,
            evidence,
        };
        if last < self.superblock.durable {
            return Err(corrupt(Evidence::Superblock(self.superblock.durable)));
        }
        if let Some(bound) = ring_durable.filter(|bound| last < *bound) {
            return Err(corrupt(Evidence::Ring(bound)));
        }
        // One that says clean and knows less than the log holds is not the newest: that is damaged.
        let end = if self.superblock.clean && last == self.superblock.durable {
            LogEnd::Closed
        } else {
            if let Some(claim) = self.find_claim(blocking, &mut window, &head)? {
                return Err(LogError::Corrupt {
                    path: blocking.names().of(self.file),
                    offset: area_offset(position),
                    frame: head.frame,
                    lsn: head.lsn,
                    found: absence,
                    evidence: claim,
                });
            }
            match absence {
                Absence::Damaged(_) => LogEnd::Torn(absence),
                _ => LogEnd::End(absence),
            }
        };
        Ok(Scan {
            head,
            directory,
            end,
            frames,
        })
    }

    /// A frame of this incarnation behind `head` that says the log was durable at `head.lsn`. What
    /// is not durable is still in the ring, so no such frame stands farther away than the ring is
    /// long, give or take a frame at each end.
    fn find_claim<S: Storage>(
        &self,
        blocking: &mut Blocking<'_, S>,
        window: &mut Window,
        head: &LogHead,
    ) -> Result<Option<Evidence>, LogError> {
        let area = self.superblock.area_blocks;
        let used = head.blocks_since(&self.superblock.tail, area);
        let reach = u64::from(self.superblock.ring_blocks) + 3 * u64::from(FRAME_BLOCKS_MAX);
        for step in 0..reach.min(area.saturating_sub(used)) {
            let block = (head.position + step) % area;
            let mut source = StorageSource {
                blocking,
                file: self.file,
            };
            window.load(&mut source, block, 1)?;
            let Ok((header, _)) = Descriptor::decode_header(window.bytes(block, 1)) else {
                continue;
            };
            let ours = header.start.log == self.superblock.log
                && header.start.incarnation == self.superblock.incarnation
                && header.start.number > head.frame;
            if ours && header.durable_lsn >= head.lsn {
                return Ok(Some(Evidence::LaterFrame {
                    offset: area_offset(block),
                    durable: header.durable_lsn,
                }));
            }
        }
        Ok(None)
    }
}

//! Records of a segment that carry a body the history needs to read.

use afterimage_format::checkpoint::CheckpointBody;
use afterimage_format::checkpoint_confirm::CheckpointConfirmBody;
use afterimage_format::op::Op;
use afterimage_format::segment::{IndexEntry, PassEndBody, SegmentIndex};

use super::error::Refusal;

/// What an event says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A recovery point is named.
    Checkpoint(CheckpointBody),
    /// What became of an application-consistent checkpoint.
    Confirm(CheckpointConfirmBody),
    /// A pass has sent its last block.
    PassEnd(PassEndBody),
}

/// The decoded events of a segment, by position of their record.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Events(Vec<(usize, Event)>);

impl Events {
    /// Records of the segment whose bodies are needed by [`Events::decode`].
    pub fn wanted(segment: &SegmentIndex) -> impl Iterator<Item = (usize, &IndexEntry)> {
        segment.entries.iter().enumerate().filter(|(_, entry)| {
            let op = entry.record.op;
            matches!(op, Op::Checkpoint | Op::CheckpointConfirm | Op::PassEnd)
                && entry.payload.is_some()
        })
    }

    /// Decodes the bodies of the wanted records, in order.
    ///
    /// # Errors
    /// A body that cannot be read.
    pub fn decode(
        segment: &SegmentIndex,
        bodies: impl IntoIterator<Item = Vec<u8>>,
    ) -> Result<Self, Refusal> {
        let mut events = Vec::new();
        for ((at, entry), body) in Self::wanted(segment).zip(bodies) {
            let event = match entry.record.op {
                Op::PassEnd => {
                    Event::PassEnd(PassEndBody::decode(&body).map_err(|source| Refusal::Body {
                        lsn: entry.record.lsn,
                        source,
                    })?)
                }
                Op::CheckpointConfirm => {
                    Event::Confirm(CheckpointConfirmBody::decode(&body).map_err(|source| {
                        Refusal::Confirm {
                            lsn: entry.record.lsn,
                            source,
                        }
                    })?)
                }
                _ => Event::Checkpoint(CheckpointBody::decode(&body).map_err(|source| {
                    Refusal::Checkpoint {
                        lsn: entry.record.lsn,
                        source,
                    }
                })?),
            };
            events.push((at, event));
        }
        Ok(Self(events))
    }

    pub(super) fn at(&self, position: usize) -> Option<&Event> {
        self.0
            .iter()
            .find(|(at, _)| *at == position)
            .map(|(_, event)| event)
    }
}

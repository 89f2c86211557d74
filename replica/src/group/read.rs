//! Reading what stands under a segment key without its data.

use afterimage_format::manifest::{Terminator, is_terminator};
use afterimage_format::segment::{FOOTER_BYTES, Footer, IndexEntry, SegmentError, SegmentIndex};
use bytes::Bytes;

use super::error::GroupError;
use crate::aside;
use crate::history::{Events, SegmentEntry};
use crate::repository::{Repository, RepositoryError};

/// Bytes of a segment's end that usually hold its whole index.
const TAIL_BYTES: u64 = 128 * 1024;

/// What a segment key holds.
pub(super) enum Object {
    Absent,
    Terminator(Terminator),
    Segment(Box<(SegmentIndex, Events)>),
}

/// Reads and checks the end of an object, and the bodies of its events.
pub(super) async fn read_object(
    repository: &Repository,
    key: String,
) -> Result<Object, GroupError> {
    let (tail, size) = match repository.get_suffix(&key, TAIL_BYTES).await {
        Err(RepositoryError::NotFound { .. }) => return Ok(Object::Absent),
        read => read?,
    };
    if tail.len() as u64 == size && is_terminator(&tail) {
        return match Terminator::decode(&tail) {
            Ok(terminator) => Ok(Object::Terminator(terminator)),
            Err(source) => Err(GroupError::Object { key, source }),
        };
    }
    let index = decode_tail(repository, &key, tail, size).await?;
    let mut bodies = Vec::new();
    let mut payloads = Payloads::new(repository, &key, &index);
    for (_, entry) in Events::wanted(&index) {
        bodies.push(payloads.read(entry).await?);
    }
    let events = Events::decode(&index, bodies).map_err(|source| GroupError::Refused {
        key: key.clone(),
        source,
    })?;
    Ok(Object::Segment(Box::new((index, events))))
}

/// Reads payloads of a stored segment, one behind the other. A chunk that holds several is fetched
/// once.
pub struct Payloads<'a> {
    repository: &'a Repository,
    key: &'a str,
    index: &'a SegmentIndex,
    held: Option<(u32, Vec<u8>)>,
}

impl<'a> Payloads<'a> {
    /// Of the segment under this key, with this index.
    #[must_use]
    pub const fn new(repository: &'a Repository, key: &'a str, index: &'a SegmentIndex) -> Self {
        Self {
            repository,
            key,
            index,
            held: None,
        }
    }

    /// The payload of one record.
    ///
    /// # Errors
    /// It cannot be read or is damaged, or the record has none.
    pub async fn read(&mut self, entry: &IndexEntry) -> Result<Vec<u8>, GroupError> {
        let wrap = |source| GroupError::Segment {
            key: self.key.to_owned(),
            source,
        };
        let mut chunks = Vec::new();
        for number in entry
            .payload
            .map_or(0..0, |place| self.index.chunks_of(place))
        {
            if let Some((held, raw)) = &self.held
                && *held == number
            {
                chunks.push(raw.clone());
                continue;
            }
            let Some(info) = self.index.chunks.get(number as usize) else {
                continue;
            };
            let stored = self.repository.get_range(self.key, info.range()).await?;
            let raw = info.decode(number, &stored).map_err(wrap)?;
            chunks.push(raw.clone());
            self.held = Some((number, raw));
        }
        let mut chunks = chunks.into_iter();
        let payload = self.index.payload(entry, |number, _| {
            chunks.next().ok_or(SegmentError::NoSuch {
                what: "chunk",
                number: number.into(),
            })
        });
        payload.map_err(wrap)
    }
}

/// Reads the index of a stored segment.
///
/// # Errors
/// It cannot be read or is damaged.
pub async fn read_index(repository: &Repository, key: &str) -> Result<SegmentIndex, GroupError> {
    let (tail, size) = repository.get_suffix(key, TAIL_BYTES).await?;
    decode_tail(repository, key, tail, size).await
}

/// Reads the index of a stored segment and checks that it is the one the history was built from.
///
/// # Errors
/// It cannot be read, is damaged, or is another segment's.
pub async fn read_index_checked(
    repository: &Repository,
    key: &str,
    expected: &SegmentEntry,
) -> Result<SegmentIndex, GroupError> {
    let index = read_index(repository, key).await?;
    if index.footer.index_hash != expected.index_hash {
        return Err(GroupError::Contradiction {
            key: key.to_owned(),
        });
    }
    Ok(index)
}

async fn decode_tail(
    repository: &Repository,
    key: &str,
    mut tail: Bytes,
    size: u64,
) -> Result<SegmentIndex, GroupError> {
    let wrap = |source| GroupError::Segment {
        key: key.to_owned(),
        source,
    };
    if tail.len() < FOOTER_BYTES {
        let (have, need) = (tail.len(), FOOTER_BYTES);
        return Err(wrap(SegmentError::TooShort {
            part: "segment",
            have,
            need,
        }));
    }
    let footer = Footer::decode(&tail).map_err(wrap)?;
    if footer.total_len != size {
        let field = "segment length";
        return Err(wrap(SegmentError::Invalid {
            part: "segment footer",
            field,
        }));
    }
    let need = footer.tail_range().end - footer.tail_range().start;
    if (tail.len() as u64) < need {
        tail = repository.get_suffix(key, need).await?.0;
    }
    // A long history has many.
    let decoded = aside::compute(move || SegmentIndex::decode(&tail)).await;
    decoded.map_err(wrap)
}

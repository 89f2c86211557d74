//! What a check reports: the object, where in it, what is wrong, what to do.

use afterimage_format::segment::{FOOTER_BYTES, Footer, SegmentError, SegmentHeader, SegmentIndex};

use crate::group::GroupError;
use crate::layers::LayerError;

const RESTORE_IT: &str = "put the object back from a copy of the repository; until then points that need it cannot be restored";
const REMAKE_IT: &str = "nothing is lost: remove the folder of the layers while nobody uses the repository, and they are made anew from the segments";
const REMOVE_IT: &str = "nothing refers to it; look at where it came from before removing it";

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// Key of the object.
    pub key: String,
    /// First byte of the damaged part, where that is known.
    pub offset: Option<u64>,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub advice: String,
}

impl Problem {
    pub(super) fn missing(key: &str) -> Self {
        Self {
            key: key.to_owned(),
            offset: None,
            what: "is missing although later objects exist".to_owned(),
            advice: RESTORE_IT.to_owned(),
        }
    }

    pub(super) fn stray(key: &str) -> Self {
        Self {
            key: key.to_owned(),
            offset: None,
            what: "does not belong there".to_owned(),
            advice: REMOVE_IT.to_owned(),
        }
    }

    pub(super) fn other(key: &str, what: &str) -> Self {
        Self {
            key: key.to_owned(),
            offset: None,
            what: what.to_owned(),
            advice: RESTORE_IT.to_owned(),
        }
    }

    pub(super) fn of(error: &GroupError) -> Self {
        let key = match error {
            GroupError::Object { key, .. }
            | GroupError::Segment { key, .. }
            | GroupError::Refused { key, .. }
            | GroupError::Contradiction { key }
            | GroupError::Missing { key } => key.as_str(),
            GroupError::Repository(_)
            | GroupError::Unknown { .. }
            | GroupError::NotBegun { .. }
            | GroupError::Name { .. } => "",
        };
        // The key stands before it, and the advice behind it.
        let what = match error {
            GroupError::Object { source, .. } => source.to_string(),
            GroupError::Segment { source, .. } => source.to_string(),
            _ => error.to_string(),
        };
        let mut problem = Self::other(key, &what);
        problem.offset = Some(0);
        problem
    }

    /// A layer that cannot be used.
    pub(super) fn layer(key: &str, offset: Option<u64>, what: &str) -> Self {
        Self {
            key: key.to_owned(),
            offset,
            what: what.to_owned(),
            advice: REMAKE_IT.to_owned(),
        }
    }

    /// The layer with this head cannot be read.
    pub(super) fn of_layer(head: &str, error: &LayerError) -> Self {
        match error {
            LayerError::Head { key, source } => Self::layer(key, Some(0), &source.to_string()),
            LayerError::Page {
                key,
                offset,
                source,
            } => Self::layer(key, Some(*offset), &source.to_string()),
            LayerError::Elsewhere { key } | LayerError::Taken { key } => {
                Self::layer(key, Some(0), "holds the layer of other segments")
            }
            LayerError::Segment { layer, source } => Self::layer(layer, None, &source.to_string()),
            LayerError::Repository(error) => Self::layer(head, None, &error.to_string()),
        }
    }

    /// A damaged segment: the offset of the part that does not match its checksum.
    pub(super) fn segment(key: &str, bytes: &[u8], error: &SegmentError) -> Self {
        let mut problem = Self::other(key, &error.to_string());
        problem.offset = Some(damage_offset(bytes));
        problem
    }
}

/// Where the first part of a damaged segment begins that does not match its checksum.
#[must_use]
pub fn damage_offset(bytes: &[u8]) -> u64 {
    if SegmentHeader::decode(bytes).is_err() {
        return 0;
    }
    let footer = (bytes.len() as u64).saturating_sub(FOOTER_BYTES as u64);
    let Ok(index) = SegmentIndex::of_segment(bytes) else {
        return Footer::decode(bytes).map_or(footer, |footer| footer.index_offset);
    };
    // The index is whole, so the damage is in the data: the first chunk that shows it.
    let mut chunks = index.chunks.iter().zip(0u32..);
    let damaged = chunks.find(|(chunk, number)| {
        let range = chunk.range();
        let stored = bytes.get(range.start as usize..range.end as usize);
        stored.is_none_or(|stored| chunk.decode(*number, stored).is_err())
    });
    damaged.map_or(index.footer.index_offset, |(chunk, _)| chunk.offset)
}

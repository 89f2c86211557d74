//! What can be wrong with a group's objects.

use afterimage_format::manifest::ObjectError;
use afterimage_format::names::NameError;
use afterimage_format::segment::SegmentError;

use crate::history::Refusal;
use crate::repository::RepositoryError;

/// Why a group could not be read.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// No group of this name or UUID.
    #[error("the repository has no group {group:?}; 'points' without a group lists them")]
    Unknown {
        /// As asked for.
        group: String,
    },
    /// The name is bound, and no manifest is there: its primary is about to write the first one, or
    /// could not.
    #[error(
        "group {group:?} is announced here and has no history yet; look again in a moment, and if it \
         stays so at 'afterimage status' on its primary"
    )]
    NotBegun {
        /// Its name.
        group: String,
    },
    /// Not a name.
    #[error("{name:?}: {source}")]
    Name {
        /// As asked for.
        name: String,
        /// What is wrong.
        source: NameError,
    },
    /// A manifest, binding or terminator that cannot be read.
    #[error(
        "{key}: {source}; restore the object from a copy of the repository, nothing behind it can be trusted without it"
    )]
    Object {
        /// The key.
        key: String,
        /// What is wrong.
        source: ObjectError,
    },
    /// A segment that cannot be read.
    #[error("{key}: {source}; points that need it are lost unless a copy of the repository has it")]
    Segment {
        /// The key.
        key: String,
        /// What is wrong.
        source: SegmentError,
    },
    /// A segment that does not follow those before it.
    #[error("{key} does not follow the objects before it: {source}")]
    Refused {
        /// The key.
        key: String,
        /// What is wrong.
        source: Refusal,
    },
    /// An object that is whole but belongs elsewhere.
    #[error(
        "{key} holds an object that does not belong there: misplaced or written by another program"
    )]
    Contradiction {
        /// The key.
        key: String,
    },
    /// An object that others prove to have existed.
    #[error("{key} is missing although later objects exist: it was removed or lost")]
    Missing {
        /// The key.
        key: String,
    },
}

impl GroupError {
    /// What it means that a group was not found whose name is bound.
    pub(crate) fn of_bound(self, name: &str) -> Self {
        match self {
            Self::Unknown { .. } => Self::NotBegun {
                group: name.to_owned(),
            },
            other => other,
        }
    }
}

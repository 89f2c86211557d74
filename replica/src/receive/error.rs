//! Why a session ends.

use afterimage_format::ids::{Epoch, GroupId, Lsn};
use afterimage_format::manifest::ObjectError;
use afterimage_format::segment::SegmentError;
use afterimage_format::wire::{ErrorCode, RemoteError};

use crate::group::GroupError;
use crate::history::Refusal;
use crate::repository::RepositoryError;

/// Why a hello or a segment was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// The certificate does not allow this group.
    #[error(
        "the certificate of {peer} does not allow group {group:?}: its SANs are {sans}; make one with 'afterimage cert' for this group"
    )]
    NotPermitted {
        /// The peer.
        peer: String,
        /// The group it wants.
        group: String,
        /// What its certificate says.
        sans: String,
    },
    /// Name, UUID and certificate do not belong together.
    #[error(
        "group {name:?} is bound to UUID {bound} and {bound_peer:?} here, the peer says {said} and {said_peer:?}: show a certificate with the SAN it is bound to, use another name, or remove the group from the repository"
    )]
    Identity {
        /// The name.
        name: String,
        /// UUID it is bound to.
        bound: GroupId,
        /// SAN it is bound to.
        bound_peer: String,
        /// UUID that was said.
        said: GroupId,
        /// SAN that was shown.
        said_peer: String,
    },
    /// The UUID has another name here.
    #[error(
        "UUID {group} is the group {bound:?} here, the peer calls it {said:?}: rename it back, or give the new group a UUID of its own"
    )]
    Renamed {
        /// The UUID.
        group: GroupId,
        /// Its name here.
        bound: String,
        /// The name that was said.
        said: String,
    },
    /// There should be something of this group here, and there is nothing.
    #[error(
        "{url} has nothing of group {name:?}, which had stored records up to LSN {acked} there: the repository is not mounted, or is another one; mount it or put it back, it then goes on by itself. If it is lost, begin anew there with 'afterimage serve --accept-new-repository'"
    )]
    Lost {
        /// The repository.
        url: String,
        /// The group.
        name: String,
        /// What the primary knows to have been acknowledged.
        acked: Lsn,
    },
    /// A newer epoch exists.
    #[error(
        "epoch {said} of group {group} has ended, epoch {newest} has begun: this primary is fenced; what it has not shipped stays in its log"
    )]
    Fenced {
        /// The group.
        group: GroupId,
        /// Epoch that was said.
        said: Epoch,
        /// The newest epoch.
        newest: Epoch,
    },
    /// The disk table cannot replace the one here.
    #[error(
        "the disk table of group {group} changed at place {place}: disks keep their UUID and place and never shrink; give the group a new log"
    )]
    Disks {
        /// The group.
        group: GroupId,
        /// First place that differs.
        place: usize,
    },
    /// A newer session took over.
    #[error("a newer session of group {group} took over")]
    Superseded {
        /// The group.
        group: GroupId,
    },
    /// A segment that is damaged or breaks the format.
    #[error("refused a segment: {0}")]
    Segment(#[from] SegmentError),
    /// A segment that does not belong into the history.
    #[error("refused a segment: {0}")]
    Refused(#[from] Refusal),
    /// An object that stands where ours should be cannot be read.
    #[error("{key}: {source}")]
    Object {
        /// The key.
        key: String,
        /// What is wrong.
        source: ObjectError,
    },
    /// The history cannot be read.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// A limit of the format is reached.
    #[error(
        "group {group} has had {epochs} epochs, which is the limit: start it anew under another name"
    )]
    TooManyEpochs {
        /// The group.
        group: GroupId,
        /// How many.
        epochs: usize,
    },
    /// No epoch has a higher number.
    #[error(
        "group {group}: the highest number of an epoch is {max}: start it anew under another name",
        max = Epoch::MAX
    )]
    EpochsUsedUp {
        /// The group.
        group: GroupId,
    },
}

impl IngestError {
    /// The code that the peer gets.
    #[must_use]
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::NotPermitted { .. } => ErrorCode::NotPermitted,
            Self::Identity { .. } | Self::Renamed { .. } => ErrorCode::Identity,
            Self::Fenced { .. } => ErrorCode::Fenced,
            Self::Disks { .. } => ErrorCode::Disks,
            Self::Superseded { .. } => ErrorCode::Superseded,
            Self::Segment(_) => ErrorCode::BadSegment,
            Self::Refused(refusal) => refusal.code(),
            Self::Object { .. }
            | Self::Group(_)
            | Self::Repository(_)
            | Self::Lost { .. }
            | Self::TooManyEpochs { .. }
            | Self::EpochsUsedUp { .. } => ErrorCode::Storage,
        }
    }

    /// What is said to the peer.
    #[must_use]
    pub fn to_remote(&self) -> RemoteError {
        let mut text = self.to_string();
        let end = (0..=text.len().min(1024))
            .rev()
            .find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
        RemoteError {
            code: self.code(),
            text,
        }
    }

    /// The repository's failure behind it, if that is what it was.
    #[must_use]
    pub const fn repository(&self) -> Option<&RepositoryError> {
        match self {
            Self::Repository(error) | Self::Group(GroupError::Repository(error)) => Some(error),
            _ => None,
        }
    }
}

//! Why a layer cannot be read or written.

use afterimage_format::layer::PageError;
use afterimage_format::manifest::ObjectError;

use crate::group::GroupError;
use crate::repository::RepositoryError;

/// Why a layer cannot be read or written. Segments are not concerned.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// A head that cannot be read.
    #[error("{key}: {source}; {}", Advice(.key))]
    Head {
        /// The key.
        key: String,
        /// What is wrong.
        source: ObjectError,
    },
    /// A head that belongs elsewhere.
    #[error("{key} holds the layer of other segments; {}", Advice(.key))]
    Elsewhere {
        /// The key.
        key: String,
    },
    /// A page that cannot be read.
    #[error("{key}, offset {offset}: {source}; {}", Advice(.key))]
    Page {
        /// The key of the file.
        key: String,
        /// Offset of the page.
        offset: u64,
        /// What is wrong.
        source: PageError,
    },
    /// The last segment that it covers is not there, or another.
    #[error("{layer} is not used: {source}")]
    Segment {
        /// The key of the layer.
        layer: String,
        /// What is wrong with the segment.
        source: Box<GroupError>,
    },
    /// The key of a file is taken, and so are those after it.
    #[error("{key} holds something else; {}", Advice(.key))]
    Taken {
        /// The key.
        key: String,
    },
}

impl LayerError {
    /// Whether the same under another name may succeed.
    pub(crate) const fn is_of_the_name(&self) -> bool {
        matches!(
            self,
            Self::Head { .. } | Self::Elsewhere { .. } | Self::Taken { .. }
        )
    }
}

/// What to do about an object of a layer.
struct Advice<'a>(&'a str);

impl std::fmt::Display for Advice<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let folder = self.0.rsplit_once('/').map_or(self.0, |(folder, _)| folder);
        write!(
            f,
            "nothing is lost: remove the folder {folder} while nobody uses the repository, and it is \
             made anew from the segments"
        )
    }
}

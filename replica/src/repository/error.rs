//! Errors of the repository: kind, key, what to do.

use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;

use afterimage_format::ids::RepositoryId;
use afterimage_format::manifest::ObjectError;

use super::Repository;

/// What can go wrong between this process and its repository.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// The URL is of no known kind.
    #[error("repository URL {url:?} is not understood: use file:///folder or s3://bucket/prefix")]
    BadUrl {
        /// The URL as given.
        url: String,
    },
    /// The folder cannot be used.
    #[error("repository folder {}: {source}; it must exist or be creatable, and be writable", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What was there is there no longer.
    #[error("the repository at {} is gone ({source}): mount it or put it back, it then goes on by itself; nothing is begun in its place", folder.display())]
    Gone {
        /// Its folder.
        folder: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another repository stands there.
    #[error("the repository at {} is another one ({found}, it was {known}): mount or put back the right one, it then goes on by itself; if this is the right one, restart the service", folder.display())]
    Another {
        /// The folder.
        folder: PathBuf,
        /// What was there.
        known: RepositoryId,
        /// What is there.
        found: RepositoryId,
    },
    /// It was away, or is a copy of what was there.
    #[error("the repository at {} was away or exchanged for a copy: its history is read again", folder.display())]
    Returned {
        /// The folder.
        folder: PathBuf,
    },
    /// The identity cannot be understood.
    #[error("{}: {source}; put back the repository's own file 'identity', nothing is stored without it", file.display())]
    Identity {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        source: ObjectError,
    },
    /// The marker names another scheme of keys, or is damaged.
    #[error(
        "{url}: its file 'afterimage-repository' says {found:?}, this program knows {known:?}: use the version of Afterimage that wrote it, or, if the file is damaged, put it back from a copy of the repository; nothing is read or stored until then"
    )]
    Marker {
        /// The repository.
        url: String,
        /// What it holds.
        found: String,
        /// What it should.
        known: &'static str,
    },
    /// A key that no code of ours may build.
    #[error("{key:?} is not a key of a repository")]
    BadKey {
        /// The key.
        key: String,
    },
    /// The key does not exist.
    #[error("{url}: there is no object {key}")]
    NotFound {
        /// The repository.
        url: String,
        /// The key.
        key: String,
    },
    /// The repository has no room.
    #[error(
        "{url} is full: {key} could not be stored; free space there, replication then resumes by itself ({source})"
    )]
    Full {
        /// The repository.
        url: String,
        /// The key.
        key: String,
        /// What the store said.
        source: object_store::Error,
    },
    /// Any other failure of the store.
    #[error("{url}: cannot {action} {key}: {source}")]
    Store {
        /// The repository.
        url: String,
        /// The key.
        key: String,
        /// What was tried.
        action: &'static str,
        /// What the store said.
        source: object_store::Error,
    },
    /// Directory entries could not be made durable.
    #[error("cannot sync the repository folder {}: {source}; nothing in it counts as stored until that works", folder.display())]
    Sync {
        /// The folder.
        folder: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The bucket does not exist, or these credentials do not reach it.
    #[error(
        "{url}: there is no such bucket, or it cannot be seen with these credentials; create it, or mend the URL or AWS_… variables"
    )]
    NoBucket {
        /// The repository.
        url: String,
    },
    /// The bucket does not create atomically.
    #[error(
        "{url} lets two writers create the same key (If-None-Match is not honoured): use a store that does"
    )]
    NoCreateIfAbsent {
        /// The repository.
        url: String,
    },
}

impl RepositoryError {
    pub(super) fn store(
        repository: &Repository,
        key: &str,
        action: &'static str,
        source: object_store::Error,
    ) -> Self {
        let (url, key) = (repository.url().to_owned(), key.to_owned());
        match source {
            object_store::Error::NotFound { .. } => Self::NotFound { url, key },
            source if is_full(&source) => Self::Full { url, key, source },
            source => Self::Store {
                url,
                key,
                action,
                source,
            },
        }
    }

    /// Whether the cause is a lack of space, which ends when somebody makes room.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }

    /// Whether the repository cannot be used until somebody changes URL, folder or store. All else
    /// may end by itself.
    #[must_use]
    pub const fn is_lasting(&self) -> bool {
        matches!(
            self,
            Self::BadUrl { .. }
                | Self::Folder { .. }
                | Self::BadKey { .. }
                | Self::NoBucket { .. }
                | Self::NoCreateIfAbsent { .. }
        )
    }

    /// Whether the key does not exist.
    #[must_use]
    pub const fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}

/// Looks for "no space" along the chain of causes.
fn is_full(error: &object_store::Error) -> bool {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && matches!(
                io.kind(),
                io::ErrorKind::StorageFull
                    | io::ErrorKind::QuotaExceeded
                    | io::ErrorKind::FileTooLarge
            )
        {
            return true;
        }
        cause = error.source();
    }
    false
}

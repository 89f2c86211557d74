//! Small objects under dense numbers that are only shown, never decided by: results of what somebody
//! did. The newest is found by listing, which is good enough for that.

use bytes::Bytes;

use super::{Created, Repository, RepositoryError};

/// Number of the newest object below a folder.
///
/// # Errors
/// The repository cannot be listed.
pub(crate) async fn newest(
    repository: &Repository,
    folder: &str,
) -> Result<Option<u64>, RepositoryError> {
    let names = repository.names_below(folder).await?;
    Ok(names.iter().filter_map(|name| name.parse().ok()).max())
}

/// Creates the object under the first free number behind `last`; `object` gives key and bytes for a
/// number. Durable when this returns.
///
/// # Errors
/// The repository does not take it.
pub(crate) async fn append(
    repository: &Repository,
    last: u64,
    mut object: impl FnMut(u64) -> (String, Bytes),
) -> Result<(), RepositoryError> {
    let mut number = last;
    loop {
        number += 1;
        let (key, bytes) = object(number);
        // Somebody else does the same at the same time: the next number is as good.
        if repository.create(&key, bytes).await? == Created::Ours {
            return Ok(());
        }
    }
}

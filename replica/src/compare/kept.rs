//! Results of comparisons, kept in the repository: what was found survives whoever compared, and no
//! run is compared twice from its beginning because a process ended after it.

use afterimage_format::ids::{Epoch, GroupId, Lsn};
use afterimage_format::manifest::ComparisonResult;
use afterimage_format::wire::Compared;

use crate::group::GroupError;
use crate::repository::{Repository, keys, numbered};

/// The newest kept result of a group.
///
/// # Errors
/// The repository does not answer, or the object is damaged.
pub async fn last(
    repository: &Repository,
    group: GroupId,
) -> Result<Option<ComparisonResult>, GroupError> {
    let Some(number) = numbered::newest(repository, &keys::comparisons(group)).await? else {
        return Ok(None);
    };
    let key = keys::comparison_result(group, number);
    let bytes = repository.get(&key).await?;
    match ComparisonResult::decode(&bytes) {
        Ok(result) if (result.group, result.number) == (group, number) => Ok(Some(result)),
        Ok(_) => Err(GroupError::Contradiction { key }),
        Err(source) => Err(GroupError::Object { key, source }),
    }
}

/// Keeps the result of a run whose last record is this one; durable when this returns.
pub(super) async fn keep(
    repository: &Repository,
    group: GroupId,
    (epoch, through): (Epoch, Lsn),
    compared: Compared,
    now_ns: u64,
) -> Result<(), GroupError> {
    // One that cannot be read must not keep later ones from being kept.
    let before = match last(repository, group).await {
        Err(GroupError::Repository(error)) => return Err(error.into()),
        before => before.ok().flatten(),
    };
    let newest = numbered::newest(repository, &keys::comparisons(group)).await?;
    let result = ComparisonResult {
        group,
        number: 0,
        ended_ns: now_ns,
        whole_ns: if compared.is_whole() {
            now_ns
        } else {
            before.map_or(0, |before| before.whole_ns)
        },
        epoch,
        through,
        compared,
    };
    let object = |number| {
        let result = ComparisonResult { number, ..result };
        (
            keys::comparison_result(group, number),
            result.encode().into(),
        )
    };
    Ok(numbered::append(repository, newest.unwrap_or(0), object).await?)
}

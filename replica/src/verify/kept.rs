//! Results of checks, kept in the repository: when a group was last found whole survives whoever
//! checked it.
//!
//! Each is an object of its own under the next free number; nothing is ever decided by them. Found
//! by listing, which is good enough for what is only shown.

use afterimage_format::ids::GroupId;
use afterimage_format::manifest::CheckResult;

use super::VerifyReport;
use crate::group::GroupError;
use crate::repository::{Repository, keys, numbered};

/// The newest kept result of a group.
///
/// # Errors
/// The repository does not answer, or the object is damaged.
pub async fn last(
    repository: &Repository,
    group: GroupId,
) -> Result<Option<CheckResult>, GroupError> {
    let Some(number) = numbered::newest(repository, &keys::checks(group)).await? else {
        return Ok(None);
    };
    let key = keys::check_result(group, number);
    let bytes = repository.get(&key).await?;
    match CheckResult::decode(&bytes) {
        Ok(result) if (result.group, result.number) == (group, number) => Ok(Some(result)),
        Ok(_) => Err(GroupError::Contradiction { key }),
        Err(source) => Err(GroupError::Object { key, source }),
    }
}

/// Keeps the result of a check that ended now; durable when this returns.
///
/// # Errors
/// The repository does not take it.
pub async fn keep(
    repository: &Repository,
    report: &VerifyReport,
    now_ns: u64,
) -> Result<CheckResult, GroupError> {
    let last = last(repository, report.id).await?;
    let whole = report.problems.is_empty();
    let mut result = CheckResult {
        group: report.id,
        number: last.map_or(0, |last| last.number),
        ended_ns: now_ns,
        whole_ns: match (whole, last) {
            (true, _) => now_ns,
            (false, Some(last)) => last.whole_ns,
            (false, None) => 0,
        },
        objects: report.read.objects,
        bytes: report.read.bytes,
        problems: report.problems.len() as u64,
    };
    numbered::append(repository, result.number, |number| {
        result.number = number;
        let key = keys::check_result(report.id, number);
        (key, result.encode().into())
    })
    .await?;
    Ok(result)
}

//! Results of checks, kept in the repository: when a group was last found whole survives whoever
//! checked it.
//!
//! Each is an object of its own under the next free number; nothing is ever decided by them. Found
//! by listing, which is good enough for what is only shown.

use afterimage_format::ids::GroupId;
use afterimage_format::manifest::CheckResult;

use super::VerifyReport;
use crate::group::GroupError;
use crate::repository::{Created, Repository, keys};

/// The newest kept result of a group.
///
/// # Errors
/// The repository does not answer, or the object is damaged.
pub async fn last(
    repository: &Repository,
    group: GroupId,
) -> Result<Option<CheckResult>, GroupError> {
    let names = repository.names_below(&keys::checks(group)).await?;
    let newest = names.iter().filter_map(|name| name.parse().ok()).max();
    let Some(number) = newest else {
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
    loop {
        result.number += 1;
        let key = keys::check_result(report.id, result.number);
        let created = repository.create(&key, result.encode().into()).await?;
        // Somebody else checks at the same time: the next number is as good.
        if created == Created::Ours {
            return Ok(result);
        }
    }
}

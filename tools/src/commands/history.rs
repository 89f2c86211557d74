//! What the commands that read a repository share: opening it, finding groups and moments.

use afterimage_replica::group::Group;
use afterimage_replica::history::Position;
use afterimage_replica::image::{ChunkCache, Image};
use afterimage_replica::points::{Beyond, PointList as Listed, resolve};
use afterimage_replica::repository::Repository;
use anyhow::bail;
use std::sync::Arc;

use crate::api::types::{FreezeInfo, GapInfo, PointInfo, PointList, SpanInfo};
use crate::cli::RepositoryArgs;
use crate::cli::values::GroupPoint;
use crate::config::Config;

/// Chunks that a command keeps in memory.
const CACHE_BYTES: usize = 128 << 20;

/// The repository that was named, or else the configured one.
///
/// # Errors
/// There is none, or it cannot be read.
pub async fn repository(
    args: &RepositoryArgs,
    config: impl FnOnce() -> anyhow::Result<Config>,
) -> anyhow::Result<Repository> {
    let url = match &args.repository {
        Some(url) => url.clone(),
        None => {
            let config = config()?;
            let Some(url) = config.repository() else {
                bail!(
                    "{} names no repository of this machine: run this at the replica, or name one with --repository",
                    config.file.display()
                );
            };
            url
        }
    };
    Ok(Repository::open_existing(&url.to_string()).await?)
}

/// The moment of a group that was asked for.
///
/// # Errors
/// The group or the moment does not exist.
pub async fn find(
    repository: &Repository,
    wanted: &GroupPoint,
) -> anyhow::Result<(Arc<Group>, Position)> {
    let group = Arc::new(Group::find(repository, &wanted.group).await?);
    let at = resolve(&group, &wanted.point.0).await?;
    Ok((group, at))
}

/// The image of a moment, and what to know before trusting it.
///
/// # Errors
/// As [`find`].
pub async fn image(
    repository: &Repository,
    wanted: &GroupPoint,
) -> anyhow::Result<(Image, Option<String>)> {
    let (group, at) = find(repository, wanted).await?;
    let warning = Beyond::of(&group.history(), &wanted.point.0).map(|beyond| beyond.to_string());
    let image = Image::open(group, at, Arc::new(ChunkCache::new(CACHE_BYTES)))?;
    Ok((image, warning))
}

/// All points of a group.
#[must_use]
pub fn list(group: &Group) -> PointList {
    let listed = Listed::of(&group.history());
    let span = |range: &afterimage_replica::points::Range| SpanInfo {
        epoch: range.epoch,
        first_lsn: range.first_lsn,
        last_lsn: range.last_lsn,
        first_wall_ns: range.first_ns,
        last_wall_ns: range.last_ns,
    };
    let point = |point: &afterimage_replica::points::Point| PointInfo {
        point: point.point.clone(),
        lsn: point.lsn,
        epoch: point.epoch,
        wall_ns: point.time_ns,
        kind: point.kind.to_owned(),
        freeze: point.freeze.as_ref().map(|freeze| FreezeInfo {
            frozen: freeze.frozen.clone(),
            skipped: freeze.skipped.clone(),
            window_ns: freeze.window_ns,
            own_ns: freeze.own_ns,
            reason: freeze.reason.clone(),
        }),
        trigger: point.trigger.to_owned(),
        label: (!point.label.is_empty()).then(|| point.label.clone()),
        changed_bytes: point.changed_bytes,
    };
    let gap = |gap: &afterimage_replica::points::Gap| GapInfo {
        after_wall_ns: gap.after_ns,
        before_wall_ns: gap.before_ns,
        cause: gap.cause.name().to_owned(),
    };
    PointList {
        gaps: listed.gaps.iter().map(gap).collect(),
        group: listed.group,
        uuid: listed.uuid,
        latest: listed.latest,
        spans: listed.ranges.iter().map(span).collect(),
        points: listed.checkpoints.iter().map(point).collect(),
        pass_since_wall_ns: listed.pending_pass.map(|pass| pass.begin_ns),
    }
}

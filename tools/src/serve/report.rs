//! From what the parts know to what `status` and the metrics show.

use afterimage_format::ids::{DiskIndex, Lsn};
use afterimage_proxy::engine::request::{EngineStatus, LOG_SYNC_BOUNDS_NS};
use afterimage_proxy::ship::port::GroupPort as _;
use afterimage_proxy::ship::status::{SinkState, SinkStatus};
use afterimage_proxy::worker::{DURATION_BOUNDS_NS, DURATION_OPS, DurationHistogram};
use afterimage_replica::compare;
use afterimage_replica::group::{Group, Intake};
use afterimage_replica::verify::kept;
use std::time::Duration;

use super::group::{GapClock, Notes, Running, TargetTask};
use super::open::wall_ns;
use crate::api::types::{
    ClientStatus, DiskStatus, GroupStatus, NoPoint, PassStatus, ReceivedStatus, TargetStatus,
};
use crate::cli::output::bytes;
use crate::metrics::families::Buckets;
use crate::metrics::{GroupNumbers, HistoryNumbers};

/// A primary that was heard of within this time counts as connected.
const CONNECTED_WITHIN: Duration = Duration::from_secs(60);
const BLOCK: u64 = 4096;

/// A group without an engine.
#[must_use]
pub(super) fn stopped(name: &str, state: &str, reason: Option<String>) -> GroupStatus {
    GroupStatus {
        name: name.to_owned(),
        state: state.to_owned(),
        reason,
        ..GroupStatus::default()
    }
}

/// A running group.
pub(super) async fn status(group: &Running) -> (GroupStatus, GroupNumbers) {
    let Ok(snapshot) = group.handle.snapshot().await else {
        let gone = stopped(
            &group.config.name,
            "failed",
            Some("its worker has ended".into()),
        );
        return (gone, GroupNumbers::default());
    };
    let engine = snapshot.engine;
    let mut targets = Vec::new();
    for target in &group.targets {
        let gap = has_gap(group, target).await;
        let known = snapshot.sinks.iter().find(|sink| sink.sink == target.sink);
        // One that the superblock does not know has nothing.
        let backlog = known.map_or(engine.log_bytes_used, |sink| sink.log_bytes);
        let restorable = group.restorable(target);
        let had_all_ns = group.had_all_ns(target);
        let mut status = target_status(group, target, &engine, gap, restorable, had_all_ns);
        status.backlog_bytes = backlog;
        targets.push(status);
    }
    let gap_seconds = gap_seconds(group).await;
    let notes = group.notes();
    for (status, pace) in targets.iter_mut().zip(&notes.paces) {
        status.behind = pace.behind && is_connected(status);
    }
    let (state, reason) = state(&notes, &engine, &targets);
    // What is not in the log yet, in the open frame, is no part of it.
    let unshipped = targets.iter().map(|t| t.backlog_bytes).max().unwrap_or(0);
    let left = engine
        .log_bytes_gap_from
        .saturating_sub(engine.log_bytes_used);
    let identity = group.handle.identity();
    let status = GroupStatus {
        name: group.config.name.clone(),
        uuid: identity.group.to_string(),
        state: state.to_owned(),
        reason,
        verify_due: notes.verify_due.map(str::to_owned),
        epoch: engine.progress.epoch.0,
        appended_lsn: engine.progress.appended.0,
        durable_lsn: engine.progress.durable.0,
        destaged_lsn: engine.destaged.0,
        log_bytes: engine.log_bytes,
        log_used_bytes: engine.log_bytes_used,
        log_unshipped_bytes: unshipped.min(engine.log_bytes_used),
        log_undestaged_bytes: engine.log_bytes_undestaged,
        ring_bytes: engine.ring_bytes,
        ring_used_bytes: engine.ring_bytes_used,
        written_bytes: engine.written_bytes,
        write_rate: notes.write_rate,
        gap_in_seconds: gap_in(left, &notes, &targets),
        connections: snapshot.connections.len() as u32,
        clients: clients(group, &snapshot.connections),
        disks: group
            .disks
            .iter()
            .map(|disk| DiskStatus {
                name: disk.name.clone(),
                path: disk.path.display().to_string(),
                bytes: disk.size,
            })
            .collect(),
        targets,
        last_checkpoint: notes.last_checkpoint.clone(),
        last_crash: notes.last_crash.clone(),
        last_application: notes.guest.last.clone(),
        guest_alarm: notes.guest.alarm(),
        verify: group.verify.status(),
        ..GroupStatus::default()
    };
    let mut numbers = numbers(&notes, &engine, &snapshot.durations);
    numbers.gap_seconds = gap_seconds;
    (status, numbers)
}

/// The open connections by disk and peer.
fn clients(group: &Running, connections: &[(DiskIndex, String)]) -> Vec<ClientStatus> {
    let named = connections.iter().map(|(disk, peer)| ClientStatus {
        disk: match group.disks.iter().find(|known| known.index == *disk) {
            Some(disk) => disk.name.clone(),
            None => disk.0.to_string(),
        },
        peer: peer.clone(),
    });
    let mut clients: Vec<_> = named.collect();
    clients.sort_unstable();
    clients
}

fn is_connected(target: &TargetStatus) -> bool {
    target.state == "shipping" || target.state == "copying"
}

/// The target has had a complete copy and has none now.
fn lacks_history(target: &TargetStatus) -> bool {
    target.gap && target.had_copy
}

/// Seconds until history at some target gets a gap, with so many bytes left in the log.
fn gap_in(left: u64, notes: &Notes, targets: &[TargetStatus]) -> Option<u64> {
    let growth = |at: usize| notes.paces.get(at).map_or(0, |pace| pace.growth);
    let all = targets.iter().enumerate().filter_map(|(at, target)| {
        let rate = match (is_connected(target), target.behind) {
            (false, _) => notes.log_rate,
            // What it takes in counts.
            (true, true) => growth(at).min(notes.log_rate),
            (true, false) => return None,
        };
        match lacks_history(target) {
            true => (notes.log_rate > 0).then_some(0),
            false => left.checked_div(rate),
        }
    });
    all.min()
}

/// Whether unshipped records had to leave the log, so that the target needs a pass, or it never had
/// one.
async fn has_gap(group: &Running, target: &TargetTask) -> bool {
    let Ok(record) = group.handle.sink_record(target.sink).await else {
        return false;
    };
    if !record.needs_pass() && record.acked.lsn != Lsn::ZERO {
        group.note_restorable(target);
    }
    record.needs_pass()
}

/// Notes the gaps there are at the start.
pub(super) async fn know_gaps(group: &Running) {
    for target in &group.targets {
        if has_gap(group, target).await && group.restorable(target).is_some() {
            group.notes().gaps_told.insert(target.sink);
        }
    }
}

/// Seconds of history that each target lacks, since the start.
pub(super) async fn gap_seconds(group: &Running) -> Vec<f64> {
    let mut seen = Vec::new();
    let events_before = group.notes().gap_events;
    for target in &group.targets {
        let gap = has_gap(group, target).await;
        let restorable = group.restorable(target).filter(|at| *at > 0);
        seen.push((gap, restorable));
    }
    let now = wall_ns();
    let mut notes = group.notes();
    // Who has all again may get another gap, unless that has just happened.
    if notes.gap_events == events_before {
        for (target, (gap, _)) in group.targets.iter().zip(&seen) {
            if !gap {
                notes.gaps_told.remove(&target.sink);
            }
        }
    }
    notes.gaps.resize_with(seen.len(), GapClock::default);
    let clocks = notes.gaps.iter_mut().zip(seen);
    clocks
        .map(|(clock, (gap, restorable))| clock.look(gap, restorable, now) as f64 / 1e9)
        .collect()
}

/// Targets at which a record that is appended now does not become a recovery point, or may not.
pub(super) async fn no_point_at(group: &Running) -> Vec<NoPoint> {
    let mut all = Vec::new();
    for target in &group.targets {
        let ship = target.status.get();
        let gap = has_gap(group, target).await;
        let (certain, reason) = match ship.state {
            SinkState::Pass => (true, COPYING),
            SinkState::Streaming if !gap => continue,
            // What it says when it is back is not known yet.
            _ if ship.pass.is_some() => (true, COPYING),
            _ if gap => (true, GAP),
            _ if ship.acked_record_ns > 0 => continue,
            _ => (false, AWAY),
        };
        all.push(NoPoint {
            target: target.url.clone(),
            certain,
            reason: reason.to_owned(),
        });
    }
    all
}

const COPYING: &str = "it is being copied; recovery points begin when the copy is complete";
const GAP: &str = "it lacks what has left the log or came past it, or was never copied; recovery points begin with a complete copy";
const AWAY: &str =
    "it has not been reached since the start; the checkpoint counts if its copy is complete there";

/// Why a guest waits whose log has failed and that is to go on without it.
fn detaching(engine: &EngineStatus) -> String {
    let said = |errno| std::io::Error::from_raw_os_error(errno);
    let log = said(engine.log_errno);
    let waits = match (engine.marker_errno, engine.backing_errno) {
        (0, 0) => "the disks are brought up to it".to_owned(),
        (0, errno) => format!(
            "the disks cannot be brought up to it ({}), which is tried again",
            said(errno)
        ),
        (errno, _) => format!(
            "the markers beside the disks that forbid its replay cannot be stored ({}), which is tried again: make room for them or repair their file system, or restart the service, which then makes a new log",
            said(errno)
        ),
    };
    format!("the log failed ({log}) and the guest is to go on without it; it waits: {waits}")
}

const NEEDS_COPY: &str = "history has a gap, it needs a new copy: unshipped writes had to leave the log, or a disk changed past it";

fn state(
    notes: &Notes,
    engine: &EngineStatus,
    targets: &[TargetStatus],
) -> (&'static str, Option<String>) {
    if notes.detached || engine.detached {
        let mut why =
            "the log failed and the guest goes on without it; nothing is replicated".to_owned();
        if engine.backing_errno != 0 {
            let error = std::io::Error::from_raw_os_error(engine.backing_errno);
            why += &format!("; a disk fails ({error}), its writes and flushes wait");
        }
        return ("degraded", Some(why));
    }
    if engine.detaching {
        return ("failed", Some(detaching(engine)));
    }
    if let Some(errno) = notes
        .log_failed
        .or((engine.log_errno != 0).then_some(engine.log_errno))
    {
        let error = std::io::Error::from_raw_os_error(errno);
        let why = format!(
            "the log failed ({error}): writes are refused; keep the host up (the ring holds what the log lacks) and see docs/operating.md"
        );
        return ("failed", Some(why));
    }
    if let Some((disk, errno)) = &notes.backing_failing {
        let error = std::io::Error::from_raw_os_error(*errno);
        let why = format!(
            "the backing of disk {disk} fails ({error}); it is tried again, the log keeps what it lacks"
        );
        return ("degraded", Some(why));
    }
    if let Some(target) = targets
        .iter()
        .find(|t| t.state == "away" || t.state == "refused")
    {
        let error = target.error.clone().unwrap_or_default();
        let mut why = format!("{} is {}: {error}", target.url, target.state);
        if lacks_history(target) {
            why += "; ";
            why += NEEDS_COPY;
        }
        return ("degraded", Some(why));
    }
    if let Some(target) = targets.iter().find(|target| lacks_history(target)) {
        return ("degraded", Some(format!("{}: {NEEDS_COPY}", target.url)));
    }
    let late = |t: &&TargetStatus| t.behind && t.state == "shipping";
    if let Some(target) = targets.iter().find(late) {
        let why = format!(
            "{} does not keep up with what is written, {} behind",
            target.url,
            bytes(target.backlog_bytes)
        );
        return ("degraded", Some(why));
    }
    if let Some(target) = targets.iter().find(|target| target.differing_blocks > 0) {
        let why = format!(
            "{} blocks at {} are not what the disks hold: images from there are wrong; see docs/operating.md, \"When a comparison finds differences\"",
            target.differing_blocks, target.url
        );
        return ("degraded", Some(why));
    }
    ("running", None)
}

fn target_status(
    group: &Running,
    target: &TargetTask,
    engine: &EngineStatus,
    gap: bool,
    restorable: Option<u64>,
    had_all_ns: u64,
) -> TargetStatus {
    let ship: SinkStatus = target.status.get();
    let appended = engine.progress.appended.0;
    let acked = ship.acked.0;
    let up_to_date = ship.state == SinkState::Streaming && acked >= appended;
    TargetStatus {
        url: target.url.clone(),
        state: match ship.state {
            SinkState::Idle | SinkState::Connecting => "connecting",
            SinkState::Pass => "copying",
            SinkState::Streaming => "shipping",
            SinkState::Waiting => "away",
            SinkState::Refused => "refused",
            SinkState::Stopped => "stopped",
        }
        .to_owned(),
        error: match ship.state {
            SinkState::Streaming | SinkState::Pass => None,
            _ => ship.last_error.clone(),
        },
        acked_lsn: acked,
        recoverable_wall_ns: if up_to_date && !gap {
            Some(wall_ns())
        } else {
            let until = ship.outstanding_ns.max(had_all_ns);
            recoverable(restorable.filter(|at| *at > 0), until, gap, wall_ns())
        },
        shipped_bytes: ship.sent_bytes_total,
        payload_bytes: ship.sent_payload_bytes_total,
        segments: ship.sent_segments_total,
        sessions_ended: ship.reconnects_total,
        diverged: ship.divergences_total,
        gap,
        compared: group.verify.at(&ship),
        differing_blocks: ship.mismatched_blocks(),
        had_copy: restorable.is_some(),
        mismatched_blocks: ship.mismatched_blocks_total,
        pass: ship.pass.map(|pass| PassStatus {
            done_bytes: pass.blocks_done * BLOCK,
            total_bytes: (pass.blocks_done + pass.blocks_left) * BLOCK,
        }),
        ..TargetStatus::default()
    }
}

/// The moment that a target can restore which lacks something: that of its last record, or, while it
/// has a whole copy, any until the first record that it lacks.
fn recoverable(restorable: Option<u64>, lacks_from_ns: u64, gap: bool, now_ns: u64) -> Option<u64> {
    match restorable {
        Some(last) if !gap => Some(last.max(lacks_from_ns.min(now_ns))),
        restorable => restorable,
    }
}

fn buckets(histogram: &DurationHistogram) -> Buckets {
    let bounds = DURATION_BOUNDS_NS.iter().map(|ns| *ns as f64 / 1e9);
    Buckets {
        buckets: bounds.zip(histogram.buckets).collect(),
        count: histogram.count,
        sum: histogram.sum_ns as f64 / 1e9,
    }
}

fn numbers(notes: &Notes, engine: &EngineStatus, durations: &[DurationHistogram]) -> GroupNumbers {
    GroupNumbers {
        write_stall_seconds: engine.stall_ns as f64 / 1e9,
        requests: DURATION_OPS
            .into_iter()
            .zip(durations.iter().map(buckets))
            .collect(),
        log_sync: Buckets {
            buckets: LOG_SYNC_BOUNDS_NS
                .iter()
                .map(|ns| *ns as f64 / 1e9)
                .zip(engine.log_sync_buckets)
                .collect(),
            count: engine.log_syncs,
            sum: engine.log_sync_ns as f64 / 1e9,
        },
        checkpoints: vec![
            ("crash", "ok", notes.checkpoints_ok),
            ("crash", "failed", notes.checkpoints_failed),
            ("application", "ok", notes.guest.confirmed),
            ("application", "failed", notes.guest.failed),
        ],
        freeze: notes.guest.numbers(),
        errors: vec![
            ("backing", notes.errors.backing),
            ("history_gap", notes.errors.history_gap),
            ("log", notes.errors.log),
        ],
        ..GroupNumbers::default()
    }
}

/// What the repository has of a group: at its oldest, and when it was last checked.
pub(super) async fn history(group: &Group) -> HistoryNumbers {
    let oldest = {
        let history = group.history();
        let mut readable = history.readable();
        readable.next().map(|(_, base, _, _)| base.readable_wall_ns)
    };
    let last = kept::last(group.repository(), group.id()).await;
    let last = last.unwrap_or_else(|error| {
        tracing::warn!(group = %group.id(), %error, "the result of the last check cannot be read");
        None
    });
    let compared_ns = match group.comparison().whole_ns() {
        Some(whole_ns) => whole_ns,
        // Nobody compares it in this process.
        None => kept_whole_ns(group).await,
    };
    HistoryNumbers {
        group: String::new(),
        oldest_point_ns: oldest,
        last_verified_ns: last.map(|last| last.whole_ns).filter(|at| *at > 0),
        last_compared_ns: Some(compared_ns).filter(|at| *at > 0),
        damaged_objects: last.map(|last| last.problems),
    }
}

async fn kept_whole_ns(group: &Group) -> u64 {
    let last = compare::kept::last(group.repository(), group.id()).await;
    let last = last.unwrap_or_else(|error| {
        tracing::warn!(group = %group.id(), %error, "the result of the last comparison cannot be read");
        None
    });
    last.map_or(0, |last| last.whole_ns)
}

/// A received group.
#[must_use]
pub(super) fn received(name: &str, group: &Group) -> ReceivedStatus {
    let status = group.status();
    let (epoch, lsn) = {
        let history = group.history();
        let newest = history.newest();
        newest.map_or((0, 0), |epoch| (epoch.number.0, epoch.cursor.lsn.0))
    };
    let heard = Duration::from_nanos(wall_ns().saturating_sub(status.last_received_ns));
    ReceivedStatus {
        name: name.to_owned(),
        uuid: group.id().to_string(),
        epoch,
        last_lsn: lsn,
        last_wall_ns: (status.newest_record_ns > 0).then_some(status.newest_record_ns),
        connected: heard < CONNECTED_WITHIN,
        refused_diverged: status.diverged,
        refused_fenced: status.fenced,
        passes_dropped: status.passes_dropped,
        oldest_point_wall_ns: None,
        last_verified_wall_ns: None,
        last_compared_wall_ns: None,
        mismatched_blocks: status.mismatched_blocks,
        alarm: status.alarm.clone().or(match status.intake {
            Intake::RepositoryFull { text } | Intake::Failed { text } => Some(text),
            Intake::Idle | Intake::Running => None,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::group::Pace;

    fn target(state: &str, gap: bool, had_copy: bool, behind: bool) -> TargetStatus {
        TargetStatus {
            url: "file:///srv".into(),
            state: state.into(),
            gap,
            had_copy,
            behind,
            ..TargetStatus::default()
        }
    }

    #[test]
    fn what_a_target_has_is_how_things_stood_until_the_first_record_that_it_lacks() {
        assert_eq!(recoverable(Some(10), 0, false, 100), Some(10));
        assert_eq!(recoverable(Some(10), 50, false, 100), Some(50));
        assert_eq!(recoverable(Some(60), 50, false, 100), Some(60));
        assert_eq!(recoverable(Some(10), 500, false, 100), Some(100), "not yet");
        assert_eq!(recoverable(Some(10), 50, true, 100), Some(10), "a gap");
        assert_eq!(recoverable(None, 50, false, 100), None, "no whole copy");
    }

    #[test]
    fn a_gap_is_one_whatever_the_target_does_and_a_first_copy_is_none() {
        for at in ["shipping", "copying", "connecting", "away", "refused"] {
            for had_copy in [true, false] {
                let targets = [target(at, true, had_copy, false)];
                let (state, why) = state(&Notes::default(), &EngineStatus::default(), &targets);
                let told = why.is_some_and(|why| why.contains("history has a gap"));
                assert_eq!(told, had_copy, "{at}");
                let away = at == "away" || at == "refused";
                assert_eq!(state == "degraded", had_copy || away, "{at}");
            }
        }
        let late = [target("shipping", false, true, true)];
        let (state, why) = state(&Notes::default(), &EngineStatus::default(), &late);
        assert_eq!(state, "degraded");
        assert!(why.is_some_and(|why| why.contains("does not keep up")));
    }

    #[test]
    fn the_time_to_a_gap_is_told_while_a_target_does_not_keep_up() {
        let mut notes = Notes::default();
        notes.log_rate = 100;
        notes.paces = vec![Pace::default()];
        notes.paces[0].count(80, 1);
        let left = |notes: &Notes, target: TargetStatus| gap_in(1000, notes, &[target]);
        assert_eq!(left(&notes, target("shipping", false, true, false)), None);
        assert_eq!(left(&notes, target("copying", true, true, false)), None);
        assert_eq!(left(&notes, target("away", false, true, false)), Some(10));
        let late = target("shipping", false, true, true);
        assert_eq!(left(&notes, late.clone()), Some(25), "what it takes counts");
        assert_eq!(left(&notes, target("away", true, true, false)), Some(0));
        assert_eq!(left(&notes, target("copying", true, true, true)), Some(0));
        assert_eq!(left(&notes, target("away", true, false, false)), Some(10));
        notes.log_rate = 0;
        assert_eq!(left(&notes, late), None, "nothing is written");
        assert_eq!(left(&notes, target("away", true, true, false)), None);
    }
}

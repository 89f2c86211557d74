//! Prometheus metrics, computed at scrape from a snapshot of the daemon.
//!
//! Nothing is counted here: the data path keeps its own numbers and this module names them. Base
//! units, `_total` for counters, timestamps rather than ages.

pub mod families;

#[cfg(test)]
mod tests;

use families::{Buckets, Families};

use crate::api::types::{GroupStatus, StatusReport, TargetStatus};

/// States that a group can be in, as `group_state` shows them.
pub const STATES: [&str; 6] = [
    "starting",
    "running",
    "degraded",
    "failed",
    "detaching",
    "detached",
];

/// All that a scrape shows.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// What `status` shows.
    pub status: StatusReport,
    /// What goes beyond it, by group in the same order.
    pub groups: Vec<GroupNumbers>,
    /// What repositories of this machine hold.
    pub histories: Vec<HistoryNumbers>,
    /// Certificates: use, file and end of validity in seconds since 1970.
    pub certificates: Vec<(&'static str, String, i64)>,
}

/// Numbers of a group that `status` does not show.
#[derive(Debug, Clone, Default)]
pub struct GroupNumbers {
    /// Time that requests waited for space in ring or log.
    pub write_stall_seconds: f64,
    /// Durations of requests by operation.
    pub requests: Vec<(&'static str, Buckets)>,
    /// Durations of log syncs.
    pub log_sync: Buckets,
    /// Checkpoints by kind and result.
    pub checkpoints: Vec<(&'static str, &'static str, u64)>,
    /// The guest's freezes, if it can be frozen.
    pub freeze: Option<FreezeNumbers>,
    /// Errors by kind.
    pub errors: Vec<(&'static str, u64)>,
    /// Seconds of history that the targets lack, in the order of the status.
    pub gap_seconds: Vec<f64>,
}

/// What is known of a group's history in a repository of this machine.
#[derive(Debug, Clone, Default)]
pub struct HistoryNumbers {
    /// The group.
    pub group: String,
    /// Oldest moment that can be restored, nanoseconds since 1970.
    pub oldest_point_ns: Option<u64>,
    /// When it was last read and found whole, nanoseconds since 1970.
    pub last_verified_ns: Option<u64>,
    /// When the disks were last compared with it and no block differed, nanoseconds since 1970.
    pub last_compared_ns: Option<u64>,
    /// Damaged or missing objects that the last check found.
    pub damaged_objects: Option<u64>,
}

/// Freezes of a group's guest.
#[derive(Debug, Clone, Default)]
pub struct FreezeNumbers {
    /// From the freeze asked to the thaw answered.
    pub window: Buckets,
    /// Our share: from the freeze answered to the thaw sent.
    pub own: Buckets,
    /// Attempts in a row that were not confirmed.
    pub failures_in_a_row: u32,
    /// A freeze is not known to be over.
    pub maybe_frozen: bool,
}

/// The text of a scrape.
///
/// # Errors
/// When a family breaks the format's rules.
pub fn render(snapshot: &Snapshot) -> Result<String, prometheus::Error> {
    let mut f = Families::default();
    let status = &snapshot.status;
    f.gauge(
        "build_info",
        "Version of the daemon; the value is always 1.",
        &[("version", &status.version)],
        1.0,
    );
    for group in &status.groups {
        group_gauges(&mut f, group);
    }
    for group in &status.groups {
        for target in &group.targets {
            target_metrics(&mut f, group, target);
        }
    }
    for (group, numbers) in status.groups.iter().zip(&snapshot.groups) {
        group_numbers(&mut f, &group.name, numbers);
        for (target, seconds) in group.targets.iter().zip(&numbers.gap_seconds) {
            f.counter(
                "history_gap_seconds_total",
                "Time of which the target holds no history, because unshipped records left the log.",
                &[("group", &group.name), ("target", &target.url)],
                *seconds,
            );
        }
    }
    for history in &snapshot.histories {
        history_numbers(&mut f, history);
    }
    for group in &status.received {
        let labels = [("group", group.name.as_str())];
        f.gauge(
            "received_lsn",
            "Last LSN that this replica committed.",
            &labels,
            group.last_lsn as f64,
        );
        if let Some(time) = group.last_wall_ns {
            f.gauge(
                "received_timestamp_seconds",
                "Time of the last record that this replica committed.",
                &labels,
                seconds(time),
            );
        }
        let connected = f64::from(u8::from(group.connected));
        f.gauge(
            "received_connected",
            "Whether a primary is connected.",
            &labels,
            connected,
        );
        f.gauge(
            "received_alarm",
            "Whether there is something about the group that an administrator has to look at; status says what.",
            &labels,
            f64::from(u8::from(group.alarm.is_some())),
        );
        f.counter(
            "received_mismatched_blocks_total",
            "Blocks that this replica holds with other content than the primary's disks.",
            &labels,
            group.mismatched_blocks as f64,
        );
        for (kind, count) in [
            ("diverged", group.refused_diverged),
            ("fenced", group.refused_fenced),
            ("pass_dropped", group.passes_dropped),
        ] {
            f.counter(
                "received_errors_total",
                "Refused or dropped by this replica, by kind.",
                &[("group", &group.name), ("kind", kind)],
                count as f64,
            );
        }
    }
    f.gauge(
        "image_exports",
        "Images that are exported.",
        &[],
        status.exports.len() as f64,
    );
    for (name, file, end) in &snapshot.certificates {
        f.gauge(
            "certificate_expiry_timestamp_seconds",
            "End of a certificate's validity.",
            &[("certificate", name), ("file", file)],
            *end as f64,
        );
    }
    f.text()
}

fn group_gauges(f: &mut Families, group: &GroupStatus) {
    let name = group.name.as_str();
    let labels = [("group", name)];
    for state in STATES {
        let is = f64::from(u8::from(group.state == state));
        f.gauge(
            "group_state",
            "1 for the state that the group is in.",
            &[("group", name), ("state", state)],
            is,
        );
    }
    for (metric, help, value) in [
        (
            "log_size_bytes",
            "Size of the log's frame area.",
            group.log_bytes,
        ),
        (
            "log_used_bytes",
            "Occupied part of the log.",
            group.log_used_bytes,
        ),
        (
            "log_unshipped_bytes",
            "Part of the log that some target has not acknowledged.",
            group.log_unshipped_bytes,
        ),
        (
            "log_undestaged_bytes",
            "Part of the log that the backing does not have.",
            group.log_undestaged_bytes,
        ),
        ("ring_size_bytes", "Size of the ring.", group.ring_bytes),
        (
            "ring_used_bytes",
            "Occupied part of the ring.",
            group.ring_used_bytes,
        ),
        ("appended_lsn", "Last LSN given.", group.appended_lsn),
        (
            "durable_lsn",
            "Last LSN durable in the log.",
            group.durable_lsn,
        ),
        (
            "nbd_connections",
            "Open client connections.",
            u64::from(group.connections),
        ),
    ] {
        f.gauge(metric, help, &labels, value as f64);
    }
    f.counter(
        "written_bytes_total",
        "Bytes written by clients.",
        &labels,
        group.written_bytes as f64,
    );
    f.gauge(
        "verify_due",
        "Whether the disks should be compared with a replica once.",
        &labels,
        f64::from(u8::from(group.verify_due.is_some())),
    );
    for disk in &group.disks {
        f.gauge(
            "disk_size_bytes",
            "Size of a disk.",
            &[("group", name), ("disk", &disk.name)],
            disk.bytes as f64,
        );
    }
    for point in group.last_crash.iter().chain(&group.last_application) {
        f.gauge(
            "last_checkpoint_timestamp_seconds",
            "Time of the last checkpoint, also before a restart of the daemon.",
            &[("group", name), ("kind", &point.kind)],
            seconds(point.wall_ns),
        );
    }
}

fn history_numbers(f: &mut Families, history: &HistoryNumbers) {
    let labels = [("group", history.group.as_str())];
    if let Some(time) = history.oldest_point_ns {
        f.gauge(
            "oldest_point_timestamp_seconds",
            "Oldest moment that can be restored.",
            &labels,
            seconds(time),
        );
    }
    if let Some(time) = history.last_verified_ns {
        f.gauge(
            "last_verified_timestamp_seconds",
            "When the history was last read and found whole.",
            &labels,
            seconds(time),
        );
    }
    if let Some(time) = history.last_compared_ns {
        f.gauge(
            "last_compared_timestamp_seconds",
            "When the disks were last compared with the history and no block differed.",
            &labels,
            seconds(time),
        );
    }
    if let Some(count) = history.damaged_objects {
        f.gauge(
            "verify_damaged_objects",
            "Damaged or missing objects that the last check of the history found.",
            &labels,
            count as f64,
        );
    }
}

fn target_metrics(f: &mut Families, group: &GroupStatus, target: &TargetStatus) {
    let labels = [
        ("group", group.name.as_str()),
        ("target", target.url.as_str()),
    ];
    if let Some(time) = target.recoverable_wall_ns {
        f.gauge(
            "recoverable_timestamp_seconds",
            "Newest moment that can be restored from the target; now, when it lacks nothing; in a gap the last one before it.",
            &labels,
            seconds(time),
        );
    }
    f.gauge(
        "replication_backlog_bytes",
        "Bytes of the log behind what the target has acknowledged, to less than 4 MiB.",
        &labels,
        target.backlog_bytes as f64,
    );
    f.gauge(
        "replication_connected",
        "Whether the target takes records.",
        &labels,
        f64::from(u8::from(matches!(
            target.state.as_str(),
            "shipping" | "copying"
        ))),
    );
    f.gauge(
        "history_gap",
        "Whether the target has no complete copy: unshipped records left the log, or there never was one.",
        &labels,
        f64::from(u8::from(target.gap)),
    );
    f.counter(
        "shipped_bytes_total",
        "Bytes sent to the target, compressed.",
        &labels,
        target.shipped_bytes as f64,
    );
    f.counter(
        "segment_payload_bytes_total",
        "Payload of what was sent, before compression.",
        &labels,
        target.payload_bytes as f64,
    );
    f.counter(
        "segments_total",
        "Segments that the target acknowledged.",
        &labels,
        target.segments as f64,
    );
    for (kind, count) in [
        ("diverged", target.diverged),
        ("session", target.sessions_ended),
    ] {
        f.counter(
            "replication_errors_total",
            "Errors of shipping: sessions that ended, and content at the target that is not ours.",
            &[labels[0], labels[1], ("kind", kind)],
            count as f64,
        );
    }
    f.counter(
        "verify_mismatched_blocks_total",
        "Blocks of the disks that the target was found to hold with other content.",
        &labels,
        target.mismatched_blocks as f64,
    );
    let remaining = target
        .pass
        .map_or(0, |pass| pass.total_bytes.saturating_sub(pass.done_bytes));
    f.gauge(
        "pass_remaining_bytes",
        "What a running pass has still to send.",
        &labels,
        remaining as f64,
    );
}

fn group_numbers(f: &mut Families, name: &str, numbers: &GroupNumbers) {
    let labels = [("group", name)];
    f.counter(
        "write_stall_seconds_total",
        "Time that requests waited for space in the ring.",
        &labels,
        numbers.write_stall_seconds,
    );
    for (op, samples) in &numbers.requests {
        f.histogram(
            "nbd_request_duration_seconds",
            "From a request's last byte to its answer.",
            &[("group", name), ("op", op)],
            samples,
        );
    }
    f.histogram(
        "log_sync_duration_seconds",
        "Duration of the log's syncs.",
        &labels,
        &numbers.log_sync,
    );
    for (kind, result, count) in &numbers.checkpoints {
        f.counter(
            "checkpoints_total",
            "Checkpoints by kind and result.",
            &[("group", name), ("kind", kind), ("result", result)],
            *count as f64,
        );
    }
    if let Some(freeze) = &numbers.freeze {
        freeze_numbers(f, &labels, freeze);
    }
    for (kind, count) in &numbers.errors {
        f.counter(
            "errors_total",
            "Errors by kind.",
            &[("group", name), ("kind", kind)],
            *count as f64,
        );
    }
}

fn freeze_numbers(f: &mut Families, labels: families::Labels<'_>, freeze: &FreezeNumbers) {
    f.histogram(
        "freeze_window_seconds",
        "From asking the guest to freeze to its answer to the thaw.",
        labels,
        &freeze.window,
    );
    f.histogram(
        "freeze_own_seconds",
        "Our share of it: from the answer to the freeze to sending the thaw.",
        labels,
        &freeze.own,
    );
    f.gauge(
        "application_checkpoint_failures",
        "Application-consistent checkpoints in a row that the guest did not confirm.",
        labels,
        f64::from(freeze.failures_in_a_row),
    );
    f.gauge(
        "guest_maybe_frozen",
        "Whether the guest was asked to freeze and is not known to be thawed.",
        labels,
        f64::from(u8::from(freeze.maybe_frozen)),
    );
}

fn seconds(wall_ns: u64) -> f64 {
    wall_ns as f64 / 1e9
}

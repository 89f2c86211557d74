//! What the API answers and `--json` prints. Fields are added, never renamed.
//!
//! Times are nanoseconds since 1970 by the primary's clock (`…_wall_ns`); sizes are bytes.

use serde::{Deserialize, Serialize};

/// `GET /v1/status`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StatusReport {
    /// Version of the daemon.
    pub version: String,
    /// When this was taken.
    pub now_wall_ns: u64,
    /// Groups that this site protects.
    pub groups: Vec<GroupStatus>,
    /// Groups that this site receives.
    pub received: Vec<ReceivedStatus>,
    /// Images that are exported.
    pub exports: Vec<ExportInfo>,
}

/// One protected group.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Name.
    pub name: String,
    /// UUID.
    pub uuid: String,
    /// `running`, `degraded`, `failed`, `detaching`, `detached`.
    pub state: String,
    /// Why it is not `running`.
    pub reason: Option<String>,
    /// Why the disks should be compared with a replica once, if they should.
    pub verify_due: Option<String>,
    /// Epoch of the log; 0 until a replica assigned one.
    pub epoch: u64,
    /// Last LSN given.
    pub appended_lsn: u64,
    /// Last LSN durable in the log.
    pub durable_lsn: u64,
    /// Last LSN that the backing has.
    pub destaged_lsn: u64,
    /// Size of the log's frame area.
    pub log_bytes: u64,
    /// Occupied part of it.
    pub log_used_bytes: u64,
    /// Part of it that some target has not acknowledged.
    pub log_unshipped_bytes: u64,
    /// Part of it that the backing does not have.
    pub log_undestaged_bytes: u64,
    /// Size of the ring.
    pub ring_bytes: u64,
    /// Occupied part of it.
    pub ring_used_bytes: u64,
    /// Bytes written by clients since the start.
    pub written_bytes: u64,
    /// Bytes per second written lately.
    pub write_rate: u64,
    /// Seconds until unshipped history must leave the log at the rate at which it fills, 0 while
    /// more is lost of a history that has a gap; none while nothing is written or the targets keep
    /// up.
    pub gap_in_seconds: Option<u64>,
    /// Open client connections.
    pub connections: u32,
    /// Who they are, sorted.
    #[serde(default)]
    pub clients: Vec<ClientStatus>,
    /// Disks.
    pub disks: Vec<DiskStatus>,
    /// Targets.
    pub targets: Vec<TargetStatus>,
    /// Last checkpoint; restarts of the daemon do not forget it, nor the two kinds below.
    pub last_checkpoint: Option<CheckpointDone>,
    /// Oldest moment that can be restored, if a repository of this machine has the history.
    pub oldest_point_wall_ns: Option<u64>,
    /// When that history was last read and found whole.
    pub last_verified_wall_ns: Option<u64>,
    /// When the disks were last compared with that history and no block differed.
    #[serde(default)]
    pub last_compared_wall_ns: Option<u64>,
    /// The newest comparison of the disks with the targets since the start.
    #[serde(default)]
    pub verify: Option<VerifyStatus>,
    /// Last crash-consistent one.
    #[serde(default)]
    pub last_crash: Option<CheckpointDone>,
    /// Last application-consistent one.
    #[serde(default)]
    pub last_application: Option<CheckpointDone>,
    /// Something about the guest's freezes that an administrator has to look at.
    #[serde(default)]
    pub guest_alarm: Option<String>,
}

/// One open connection of a client.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ClientStatus {
    /// Name of the disk within the group.
    pub disk: String,
    /// The process and user, or the address and what the certificate says.
    pub peer: String,
}

/// One disk.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Name within the group.
    pub name: String,
    /// The backing.
    pub path: String,
    /// Its size.
    pub bytes: u64,
}

/// One target of a group.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct TargetStatus {
    /// URL.
    pub url: String,
    /// `connecting`, `shipping`, `copying` (a pass runs), `away`, `refused`.
    pub state: String,
    /// Last error.
    pub error: Option<String>,
    /// Last LSN that the target made durable.
    pub acked_lsn: u64,
    /// Bytes of the log behind what it has acknowledged: exact to less than 4 MiB.
    pub backlog_bytes: u64,
    /// Newest moment that can be restored there; now, when it lacks nothing. In a gap the last one
    /// before it.
    pub recoverable_wall_ns: Option<u64>,
    /// Bytes sent since the start, compressed.
    pub shipped_bytes: u64,
    /// Bytes of their payload.
    pub payload_bytes: u64,
    /// Segments acknowledged since the start.
    pub segments: u64,
    /// Sessions that ended with an error since the start.
    #[serde(default)]
    pub sessions_ended: u64,
    /// Times that the target was found with other content than ours, or without what it had
    /// acknowledged, since the start.
    #[serde(default)]
    pub diverged: u64,
    /// It has no complete copy: unshipped records left the log, or there never was one. A pass is
    /// due.
    pub gap: bool,
    /// It has had a complete copy, so that a gap is one in its history.
    #[serde(default)]
    pub had_copy: bool,
    /// It is connected and takes long for what is written.
    #[serde(default)]
    pub behind: bool,
    /// Pass that runs.
    pub pass: Option<PassStatus>,
    /// What the target found when it last compared what it holds with the disks.
    #[serde(default)]
    pub compared: Option<ComparedStatus>,
    /// Blocks known to differ there: those of the last comparison, until one finds none.
    #[serde(default)]
    pub differing_blocks: u64,
    /// Blocks that it found to differ since the start, in all comparisons.
    #[serde(default)]
    pub mismatched_blocks: u64,
}

/// `POST /v1/groups/GROUP/verify`: what the disks hold, on its way to the targets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyStatus {
    /// Identity of the comparison.
    pub run: u64,
    /// Bytes of the disks that were read, or known to be empty.
    pub done_bytes: u64,
    /// Bytes of all disks.
    pub total_bytes: u64,
    /// Ranges described so far.
    pub ranges: u64,
    /// It waits for a target that takes records and has a complete copy.
    pub waiting: bool,
    /// Everything was described; the targets say what they find.
    pub over: bool,
    /// Why it broke off.
    pub failed: Option<String>,
}

/// What a target found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComparedStatus {
    /// Identity of the comparison.
    pub run: u64,
    /// Ranges compared so far.
    pub ranges: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Blocks that the target holds with other content.
    pub mismatched_blocks: u64,
    /// Ranges that could not be compared.
    pub skipped: u64,
    /// Ranges of the comparison, once its last has been compared there.
    pub total: Option<u64>,
    /// It is over there, or can come no further.
    #[serde(default)]
    pub over: bool,
    /// It is over, and no block differs.
    pub whole: bool,
}

/// Progress of a pass.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct PassStatus {
    /// Bytes sent so far.
    pub done_bytes: u64,
    /// Bytes in all, as far as known.
    pub total_bytes: u64,
}

/// One group at the replica.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ReceivedStatus {
    /// Name.
    pub name: String,
    /// UUID.
    pub uuid: String,
    /// Epoch.
    pub epoch: u64,
    /// Last LSN committed.
    pub last_lsn: u64,
    /// Its time.
    pub last_wall_ns: Option<u64>,
    /// Whether a primary was heard of lately.
    pub connected: bool,
    /// Segments refused since the start, because their records are here with other content.
    #[serde(default)]
    pub refused_diverged: u64,
    /// Primaries and segments refused since the start, because a newer primary has taken over.
    #[serde(default)]
    pub refused_fenced: u64,
    /// Passes in its history that are of no use, because their end did not match.
    #[serde(default)]
    pub passes_dropped: u64,
    /// Oldest moment that can be restored.
    pub oldest_point_wall_ns: Option<u64>,
    /// When its history was last read and found whole.
    pub last_verified_wall_ns: Option<u64>,
    /// When it was last compared with the primary's disks and no block differed.
    #[serde(default)]
    pub last_compared_wall_ns: Option<u64>,
    /// Blocks found to differ from the primary's disks since the start.
    #[serde(default)]
    pub mismatched_blocks: u64,
    /// Something that an administrator has to look at.
    pub alarm: Option<String>,
}

/// `POST /v1/groups/GROUP/checkpoints`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CheckpointDone {
    /// Group.
    pub group: String,
    /// LSN of the checkpoint.
    pub lsn: u64,
    /// Time of the checkpoint.
    pub wall_ns: u64,
    /// Label.
    pub label: Option<String>,
    /// `crash` or `application`.
    pub kind: String,
    /// Targets at which it becomes no recovery point, or may not, with the reason. Empty: it is one
    /// at every target as soon as it has been shipped.
    pub no_point_at: Vec<NoPoint>,
    /// How the guest's freeze went, if one was wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<FreezeInfo>,
    /// What was done when, if the guest was to be frozen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepInfo>,
}

/// Why a checkpoint is no recovery point at a target.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct NoPoint {
    /// The target's URL.
    pub target: String,
    /// Whether that is certain, or depends on what the target says when it is back.
    pub certain: bool,
    /// Why.
    pub reason: String,
}

/// A step of an application-consistent checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepInfo {
    /// Microseconds since it began.
    pub at_us: u64,
    /// What happened.
    pub what: String,
}

/// Body of `POST /v1/groups/GROUP/checkpoints`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequest {
    /// Label.
    pub label: Option<String>,
    /// Freeze the guest for it.
    #[serde(default)]
    pub app: bool,
    /// Answer with a line of JSON for each step as it happens, then one with the result:
    /// [`CheckpointLine`]. Else with the result alone.
    #[serde(default)]
    pub steps: bool,
}

/// A line of the answer to a [`CheckpointRequest`] that asks for the steps.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointLine {
    /// It happened just now.
    Step(StepInfo),
    /// The result; nothing follows.
    Done(CheckpointDone),
    /// It failed; nothing follows.
    Failed(String),
}

/// `GET /v1/groups/GROUP/points`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PointList {
    /// Group.
    pub group: String,
    /// UUID.
    pub uuid: String,
    /// The newest point.
    pub latest: Option<String>,
    /// Spans within which every LSN can be restored, oldest first; between two of them is a gap.
    pub spans: Vec<SpanInfo>,
    /// Named points, oldest first.
    pub points: Vec<PointInfo>,
    /// The holes between and behind the spans, oldest first.
    pub gaps: Vec<GapInfo>,
    /// A pass has been under way since then; points from its begin on exist once it is complete.
    pub pass_since_wall_ns: Option<u64>,
}

/// A run of LSNs that can all be restored.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SpanInfo {
    /// Epoch.
    pub epoch: u64,
    /// First LSN.
    pub first_lsn: u64,
    /// Last LSN.
    pub last_lsn: u64,
    /// Time of the first.
    pub first_wall_ns: u64,
    /// Time of the last.
    pub last_wall_ns: u64,
}

/// How the guest's freeze went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeInfo {
    /// What was frozen, separated by spaces.
    pub frozen: String,
    /// What could not be frozen, separated by spaces.
    pub skipped: String,
    /// From the freeze asked to the thaw answered; 0 if it did not come to that.
    pub window_ns: u64,
    /// Our share of it.
    pub own_ns: u64,
    /// Why the point stayed crash-consistent.
    pub reason: Option<String>,
}

/// Where nothing can be restored.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct GapInfo {
    /// Time of the last moment before it.
    pub after_wall_ns: u64,
    /// Time of the first moment behind it; none while it is open.
    pub before_wall_ns: Option<u64>,
    /// `records-missing` (the log overflowed), `resync` (copied anew, no record is missing) or
    /// `new-epoch` (another log took over).
    pub cause: String,
}

/// One named point.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PointInfo {
    /// What to write for it.
    pub point: String,
    /// LSN.
    pub lsn: u64,
    /// Epoch.
    pub epoch: u64,
    /// Time.
    pub wall_ns: u64,
    /// `crash` or `application`.
    pub kind: String,
    /// How the guest's freeze went, if one was wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<FreezeInfo>,
    /// `request` or `schedule`.
    pub trigger: String,
    /// Label.
    pub label: Option<String>,
    /// Bytes changed since the point before.
    pub changed_bytes: u64,
}

/// Body of `POST /v1/exports`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportRequest {
    /// Group.
    pub group: String,
    /// Moment, as on the command line.
    pub point: String,
}

/// An exported image.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ExportInfo {
    /// Its name: the NBD exports are `NAME/DISK`.
    pub name: String,
    /// Group.
    pub group: String,
    /// LSN shown.
    pub lsn: u64,
    /// Time of that LSN.
    pub wall_ns: u64,
    /// What to know before trusting it: the time asked for lies past all that was received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// Microseconds that opening took.
    pub opened_in_us: u64,
    /// Disks.
    pub disks: Vec<ExportedDisk>,
}

/// One disk of an exported image.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ExportedDisk {
    /// Name.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// NBD URI.
    pub uri: String,
}

/// `POST /v1/groups/GROUP/detach`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Detached {
    /// Group.
    pub group: String,
    /// Plain disks.
    pub disks: Vec<String>,
}

/// Body of every failure.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Failure {
    /// What went wrong and what to do.
    pub error: String,
}

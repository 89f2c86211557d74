//! What shipping needs of a group. The group's worker implements it over its command channel;
//! tests and the simulator implement it directly.

use super::BoxFuture;
use crate::engine::event::EventRecord;
use crate::engine::request::{Allocated, LogProgress, PassRead};
use afterimage_format::ids::{DiskIndex, Epoch, GroupId, LogId, Lsn};
use afterimage_format::manifest::DiskEntry;
use afterimage_format::segment::SinkId;
use afterimage_format::wire::Cursor;
use tokio::sync::watch;

/// Who a group is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupIdentity {
    /// Its UUID.
    pub group: GroupId,
    /// Its name.
    pub name: String,
    /// Its present log.
    pub log: LogId,
    /// Its disk table.
    pub disks: Vec<DiskEntry>,
}

/// What the log's superblock says of a sink.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SinkRecord {
    /// What the sink has acknowledged. May be older than what it really has.
    pub acked: Cursor,
    /// Set when records may have left the log that this sink has not: the highest such LSN.
    pub dirty: Option<Lsn>,
    /// A base that began at or before this LSN lacks what came onto a disk past the log.
    pub rebase_after: Lsn,
    /// The last record that such a base is good for.
    pub good_until: Lsn,
}

impl SinkRecord {
    /// Whether the sink needs a pass.
    #[must_use]
    pub fn needs_pass(&self) -> bool {
        self.dirty.is_some() || self.rebase_after != Lsn::ZERO
    }
}

/// Why the group could not do it.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The group's worker has ended or is ending.
    #[error("the group is shutting down")]
    Gone,
    /// The group's log has failed: it makes nothing durable any more.
    #[error("the group's log has failed")]
    LogFailed,
    /// A disk could not be read for a pass.
    #[error("disk {}: reading blocks for a pass failed: {source}", disk.0)]
    Read {
        /// Which disk.
        disk: DiskIndex,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// The superblock has no such sink.
    #[error("the log's superblock has no place for this sink")]
    UnknownSink,
}

/// A group as shipping sees it. Calls may be dropped before they are answered: what was asked for
/// then happens or not.
pub trait GroupPort: Send + Sync {
    /// Who the group is. Does not change while the group runs.
    fn identity(&self) -> GroupIdentity;

    /// How far the log is. Closed when the group ends.
    fn progress(&self) -> watch::Receiver<LogProgress>;

    /// What the superblock says of a sink (nothing acknowledged for one it does not know yet).
    fn sink_record(&self, sink: SinkId) -> BoxFuture<'_, Result<SinkRecord, PortError>>;

    /// Tells the group what the sink has durably: the log may be trimmed up to there. Stored in
    /// the superblock some time later, in any case before the log is trimmed because of it.
    ///
    /// `complete`: the sink's records build on a complete base. If so, and if `acked` is at or
    /// past the sink's dirty LSN, the dirty flag goes with it. `acked` may lie before what was
    /// reported earlier when a new base begins.
    fn report_acked(
        &self,
        sink: SinkId,
        acked: Cursor,
        complete: bool,
    ) -> BoxFuture<'_, Result<(), PortError>>;

    /// Stores a new epoch durably in the superblock and appends an `Epoch` record. Returns once
    /// both are durable.
    fn set_epoch(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), PortError>>;

    /// Appends a record that changes no blocks (`PassBegin`, `PassEnd`). Returns its LSN once it
    /// has one; it becomes durable like any other.
    fn append(&self, event: EventRecord) -> BoxFuture<'_, Result<Lsn, PortError>>;

    /// Reads blocks of a disk at the newest LSN. At most 256 blocks, within the disk.
    fn pass_read(
        &self,
        disk: DiskIndex,
        first_block: u64,
        block_count: u32,
    ) -> BoxFuture<'_, Result<PassRead, PortError>>;

    /// Runs of blocks at or behind `from_block` that may hold something other than zeroes, both in
    /// the backing and in records not yet destaged, at most `ranges_max`. None when there are none up
    /// to the disk's end. May hold more than is needed, never less.
    fn allocated_ranges(
        &self,
        disk: DiskIndex,
        from_block: u64,
        ranges_max: usize,
    ) -> BoxFuture<'_, Result<Allocated, PortError>>;
}

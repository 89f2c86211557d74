//! What an engine is told at its start.

/// When a write is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Ack {
    /// When it is in the ring: survives a kill of the process.
    #[default]
    Ring,
    /// When it is durable in the log: survives a power cut.
    Durable,
}

/// What the guest sees after the first failed write or sync of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnLogError {
    /// Writes and flushes fail; reads go on.
    #[default]
    Fail,
    /// Replication ends, the disk goes on without a log, once a durable marker forbids the old
    /// log's replay.
    Detach,
}

/// What the guest sees while a backing fails. It is tried again in any case, and what was answered
/// stays in the log until it works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnBackingError {
    /// Nothing, while ring and log have room; then errors.
    #[default]
    Retry,
    /// Writes, trims and zeroings fail at once; flushes and reads go on.
    Fail,
}

/// Limits and times of one engine. Times are nanoseconds of the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// When a write is answered.
    pub ack: Ack,
    /// What happens after the first error of the log.
    pub on_log_error: OnLogError,
    /// What happens while a backing fails.
    pub on_backing_error: OnBackingError,
    /// Longest time between two syncs of the log while it lacks something durably: so long, and as long as
    /// its last write and sync take, an answered write may not be durable. A log that cannot keep up
    /// takes longer.
    pub commit_interval_ns: u64,
    /// How long a record waits for company before it is written to the log.
    pub log_delay_ns: u64,
    /// Bytes of waiting frames that are written to the log without waiting for more.
    pub log_batch_bytes: u32,
    /// A log write takes frames until it has so many bytes.
    pub log_write_bytes: u32,
    /// Destage writes in flight.
    pub destage_depth: usize,
    /// Records older than this are destaged even when ring and log have room.
    pub destage_age_ns: u64,
    /// First wait after a failed operation on a backing; doubles up to `backing_retry_max_ns`.
    pub backing_retry_ns: u64,
    /// Longest wait between two attempts on a failing backing.
    pub backing_retry_max_ns: u64,
    /// A backing that fails for longer makes writes that find no room fail too.
    pub backing_patience_ns: u64,
    /// Bytes of payload that may wait for room or for a merge before `Engine::congested` asks the
    /// caller to take no more writes.
    pub waiting_bytes_max: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        const MS: u64 = 1_000_000;
        Self {
            ack: Ack::Ring,
            on_log_error: OnLogError::Fail,
            on_backing_error: OnBackingError::Retry,
            commit_interval_ns: 20 * MS,
            log_delay_ns: MS,
            log_batch_bytes: 128 << 10,
            log_write_bytes: 4 << 20,
            destage_depth: 64,
            destage_age_ns: 2_000 * MS,
            backing_retry_ns: 100 * MS,
            backing_retry_max_ns: 5_000 * MS,
            backing_patience_ns: 30_000 * MS,
            waiting_bytes_max: 4 << 20,
        }
    }
}

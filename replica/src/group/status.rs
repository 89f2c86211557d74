//! How a group's intake goes, for status pages and metrics.

/// State of the intake.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Intake {
    /// Nothing has come since the start.
    #[default]
    Idle,
    /// The last segment was stored.
    Running,
    /// The repository has no room: nothing is taken until it has. Points stay readable.
    RepositoryFull {
        /// What the repository said.
        text: String,
    },
    /// The last attempt failed otherwise.
    Failed {
        /// What was said.
        text: String,
    },
}

/// What is known of a group's intake in this process, and what its history says of trouble.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    /// How it goes.
    pub intake: Intake,
    /// Replica's clock when the last segment was stored, nanoseconds since 1970; 0 for never.
    pub last_received_ns: u64,
    /// Primary's clock of the newest record that was stored, nanoseconds since 1970.
    pub newest_record_ns: u64,
    /// Segments stored by this process.
    pub segments: u64,
    /// Raw payload bytes stored by this process.
    pub payload_bytes: u64,
    /// Stored bytes of the segments of this process.
    pub stored_bytes: u64,
    /// Segments refused because their identity is taken by other content.
    pub diverged: u64,
    /// Hellos and segments refused because of an older epoch.
    pub fenced: u64,
    /// Passes in the history that are of no use because their end did not match, whoever stored them.
    pub passes_dropped: u64,
    /// Blocks that comparisons by this process found to differ from the primary's disks.
    pub mismatched_blocks: u64,
    /// Something an administrator has to look at: the last that this process met, a dropped pass until
    /// another is complete, and what a comparison found to differ until one finds nothing.
    pub alarm: Option<String>,
}

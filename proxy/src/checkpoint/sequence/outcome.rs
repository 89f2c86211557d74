//! How a checkpoint came out, for records and for people.

use super::{Request, Trouble};
use afterimage_format::ids::Lsn;
use std::time::Duration;

/// Why a point stayed crash-consistent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The log has too little room for what a freeze flushes into it.
    #[error("not frozen: the log is nearly full ({used_percent} % used)")]
    LogNearlyFull {
        /// Occupied part.
        used_percent: u64,
    },
    /// The intent could not be made durable.
    #[error("not frozen: the intent could not be stored: {0}")]
    Intent(String),
    /// No watchdog took the intent.
    #[error("not frozen: the watchdog is not there: {0}")]
    Watchdog(String),
    /// Somebody else froze the guest.
    #[error("not frozen by us: {agent} says that it is frozen already")]
    AlreadyFrozen {
        /// Which agent.
        agent: String,
    },
    /// What the configuration wants frozen is not there.
    #[error("not frozen: nothing is mounted in {agent} at {} (`mounts`)", mounts.join(" "))]
    NotMounted {
        /// Which agent.
        agent: String,
        /// Mount points.
        mounts: Vec<String>,
    },
    /// A freeze that froze nothing.
    #[error("{agent} froze nothing")]
    NothingFrozen {
        /// Which agent.
        agent: String,
    },
    /// The guest was thawed by somebody else, or not all of it was.
    #[error("{agent} froze {frozen} file systems and thawed {thawed}")]
    OtherThawed {
        /// Which agent.
        agent: String,
        /// Said at the freeze.
        frozen: u32,
        /// Said at the thaw.
        thawed: u32,
    },
    /// The thaw was answered too late.
    #[error("frozen for {:.1} s, longer than allowed", window.as_secs_f64())]
    TooLong {
        /// From the first freeze asked to the last thaw answered.
        window: Duration,
    },
    /// An agent did not do as asked.
    #[error("{}: {agent} {trouble}", request.step())]
    Agent {
        /// Which agent.
        agent: String,
        /// What was asked.
        request: Request,
        /// What came.
        trouble: Trouble,
    },
    /// The checkpoint's record.
    #[error("the log: {0}")]
    Log(String),
    /// The process that began the checkpoint ended before its end.
    #[error("the process ended before the guest confirmed the thaw")]
    Interrupted,
}

impl Request {
    const fn step(self) -> &'static str {
        match self {
            Self::Sync => "getting in step",
            Self::Status => "asking for the status",
            Self::Survey => "asking for the file systems",
            Self::Freeze => "freezing",
            Self::Thaw | Self::SyncThaw => "thawing",
        }
    }
}

/// One step, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Since the run began.
    pub at: Duration,
    /// What happened.
    pub what: String,
}

/// Moments of the frozen window, since the run began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Times {
    /// The first freeze was asked.
    pub freeze_asked: Option<Duration>,
    /// The last freeze was answered.
    pub frozen: Option<Duration>,
    /// The last thaw has left.
    pub thaw_sent: Option<Duration>,
    /// The last thaw was answered.
    pub thawed: Option<Duration>,
}

impl Times {
    /// From the first freeze asked to the last thaw answered: an upper bound of the time that any
    /// guest was frozen.
    #[must_use]
    pub fn window(&self) -> Option<Duration> {
        Some(self.thawed?.saturating_sub(self.freeze_asked?))
    }

    /// Our own share of it: from the last freeze answered to the last thaw sent.
    #[must_use]
    pub fn own(&self) -> Option<Duration> {
        Some(self.thaw_sent?.saturating_sub(self.frozen?))
    }
}

/// What became of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// LSN of the checkpoint, if it got one.
    pub lsn: Option<Lsn>,
    /// Whether it is application-consistent, durably.
    pub confirmed: bool,
    /// Why not.
    pub reason: Option<Reason>,
    /// The window.
    pub times: Times,
    /// What a freeze reached.
    pub frozen: Vec<String>,
    /// What it did not.
    pub skipped: Vec<String>,
    /// All steps.
    pub steps: Vec<Step>,
}

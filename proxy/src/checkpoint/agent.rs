//! What can be asked of a guest's agent, whichever way it is reached, and how it answers.

use std::time::Duration;

/// One exchange with an agent. How long it may take is decided by whoever asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Bring requests and answers in step: whatever was under way before is over afterwards.
    Sync,
    /// Is the guest frozen?
    Status,
    /// Which file systems are there to be frozen? May fail without harm.
    Survey,
    /// Freeze.
    Freeze,
    /// Thaw, once, right behind an answered freeze.
    Thaw,
    /// After trouble: bring in step and thaw, in one go, so that a freeze that waits in a hung
    /// agent is followed by a thaw without a pause.
    SyncThaw,
}

/// An agent's answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// To [`Request::Sync`], and to [`Request::SyncThaw`] once both were answered, the thaw
    /// perhaps with an error.
    InStep,
    /// To [`Request::Status`].
    Status {
        /// Whether anything is frozen.
        frozen: bool,
    },
    /// To [`Request::Survey`].
    Survey(Survey),
    /// To [`Request::Freeze`].
    Frozen {
        /// File systems that are frozen now.
        count: u32,
    },
    /// To [`Request::Thaw`].
    Thawed {
        /// File systems that were thawed.
        count: u32,
    },
}

/// What a freeze would reach, for people.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Survey {
    /// What can be frozen.
    pub freezable: Vec<String>,
    /// What cannot.
    pub skipped: Vec<String>,
    /// What was to be frozen and is not mounted. The agent would leave it out without a word.
    pub missing: Vec<String>,
}

/// Why there was no answer that could be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Trouble {
    /// Nobody could be asked.
    #[error("cannot be reached: {0}")]
    Unreachable(String),
    /// The connection ended.
    #[error("closed the connection")]
    Disconnected,
    /// It answered with an error.
    #[error("says: {0}")]
    Refused(String),
    /// Its answer makes no sense.
    #[error("answered something else than was asked: {0}")]
    Garbled(String),
    /// It did not answer in time.
    #[error("did not answer within {:.1} s", .0.as_secs_f64())]
    Timeout(Duration),
}

//! The HTTP API on the unix socket, and metrics on loopback TCP.
//!
//! Whatever changes or exports something is on the unix socket (mode 0600) only. The TCP port
//! answers `/metrics` and `/healthz` and nothing else. [`Control`] is what the daemon offers;
//! [`client::Client`] is what the commands use.

pub mod client;
pub mod server;
pub mod types;

#[cfg(test)]
mod tests;

use std::future::Future;
use std::pin::Pin;
use tokio::sync::mpsc::UnboundedSender;
use types::{
    CheckpointDone, Detached, ExportInfo, PointList, StatusReport, StepInfo, VerifyStatus,
};

/// The future of an answer.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, ApiError>> + Send + 'a>>;

/// What a daemon can be asked.
pub trait Control: Send + Sync + 'static {
    /// How all groups are, or one.
    fn status<'a>(&'a self, group: Option<&'a str>) -> Answer<'a, StatusReport>;
    /// Appends a checkpoint to the log and waits until it is durable there; with `app`, the guest is
    /// frozen for it, and each step is told as it happens.
    fn checkpoint<'a>(
        &'a self,
        group: &'a str,
        label: Option<&'a str>,
        app: bool,
        steps: Option<UnboundedSender<StepInfo>>,
    ) -> Answer<'a, CheckpointDone>;
    /// Begins to compare the group's disks with what its targets hold.
    fn verify<'a>(&'a self, group: &'a str) -> Answer<'a, VerifyStatus>;
    /// Recovery points of a group at the embedded replica.
    fn points<'a>(&'a self, group: &'a str) -> Answer<'a, PointList>;
    /// Exports an image of a group.
    fn export<'a>(&'a self, group: &'a str, point: &'a str) -> Answer<'a, ExportInfo>;
    /// What is exported.
    fn exports(&self) -> Answer<'_, Vec<ExportInfo>>;
    /// Stops an export.
    fn close_export<'a>(&'a self, name: &'a str) -> Answer<'a, ()>;
    /// Makes the group's disks plain and lets go of them.
    fn detach<'a>(&'a self, group: &'a str) -> Answer<'a, Detached>;
    /// Metrics in Prometheus' text format.
    fn metrics(&self) -> Answer<'_, String>;
}

/// Why an answer failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// No such group, point or export.
    #[error("{0}")]
    NotFound(String),
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// Not in the present state.
    #[error("{0}")]
    Conflict(String),
    /// It was tried and failed.
    #[error("{0}")]
    Failed(String),
}

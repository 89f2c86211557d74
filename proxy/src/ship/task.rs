//! The task that keeps one sink supplied: session after session, with pauses that grow while
//! nothing comes of it.

use super::port::{GroupPort, PortError};
use super::session::{self, Context, Memory, SessionError};
use super::sink::{Sink, SinkError};
use super::source::RecordSource;
use super::status::{SinkState, StatusCell};
use super::{ShipConfig, Tuning};
use afterimage_format::wire::ErrorCode;
use backon::BackoffBuilder;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Ships one group's records to one sink until the group ends.
pub struct ShipTask {
    /// The group.
    pub port: Arc<dyn GroupPort>,
    /// Where to.
    pub sink: Arc<dyn Sink>,
    /// Reads the group's log.
    pub source: Box<dyn RecordSource>,
    /// Settings.
    pub config: ShipConfig,
    /// Where to show what happens; made with the sink's URL.
    pub status: StatusCell,
    /// Spreads the pauses of many tasks.
    pub jitter_seed: u64,
}

impl ShipTask {
    /// Runs until the group ends, with the settings that it was made with.
    pub async fn run(self) {
        let (_fixed, tuning) = watch::channel(self.config.tuning());
        self.run_tuned(tuning).await;
    }

    /// Runs until the group ends; `tuning` counts instead of the settings that it holds. Dropping the future stops it at any point; nothing is lost by
    /// that, since the sink and the log know how far it came.
    pub async fn run_tuned(mut self, tuning: watch::Receiver<Tuning>) {
        let context = Context {
            port: self.port.clone(),
            sink: self.sink.id(),
            config: self.config,
            tuning,
            status: self.status.clone(),
        };
        let group = self.port.identity().name;
        let mut memory = Memory::default();
        let mut pauses = self.pauses();
        loop {
            memory.progressed = false;
            let Err(error) = self.session(&context, &mut memory).await;
            if error.is_end_of_group() || self.port.progress().has_changed().is_err() {
                break;
            }
            if memory.progressed {
                pauses = self.pauses();
            }
            let pause = if error.is_benign() {
                self.config.retry_min
            } else {
                pauses.next().unwrap_or(self.config.retry_max)
            };
            tracing::warn!(%group, sink = %self.sink.url(), %error, pause_ms = pause.as_millis() as u64,
                "session with the sink ended");
            self.status.update(|s| {
                s.state = state_after(&error);
                s.last_error = Some(error.to_string());
                s.unacked_bytes = 0;
                s.reconnects_total += 1;
            });
            if group_ends_within(self.port.as_ref(), pause).await {
                break;
            }
        }
        self.status.update(|s| s.state = SinkState::Stopped);
    }

    async fn session(
        &mut self,
        context: &Context,
        memory: &mut Memory,
    ) -> Result<Infallible, SessionError> {
        self.status.attempt();
        let mut connection = self.sink.connect().await?;
        session::run(context, memory, connection.as_mut(), self.source.as_mut()).await
    }

    fn pauses(&self) -> backon::ExponentialBackoff {
        backon::ExponentialBuilder::default()
            .with_min_delay(self.config.retry_min)
            .with_max_delay(self.config.retry_max)
            .with_factor(2.0)
            .with_jitter()
            .with_jitter_seed(self.jitter_seed)
            .without_max_times()
            .build()
    }
}

/// Waits, unless the group ends meanwhile.
async fn group_ends_within(port: &dyn GroupPort, pause: Duration) -> bool {
    let mut progress = port.progress();
    let ended = async { while progress.changed().await.is_ok() {} };
    tokio::time::timeout(pause, ended).await.is_ok()
}

fn state_after(error: &SessionError) -> SinkState {
    match error {
        SessionError::Sink(SinkError::Refused { cause, .. })
            if matches!(
                cause.code,
                ErrorCode::Version
                    | ErrorCode::NotPermitted
                    | ErrorCode::Identity
                    | ErrorCode::Fenced
                    | ErrorCode::Diverged
                    | ErrorCode::Disks
            ) =>
        {
            SinkState::Refused
        }
        SessionError::Port(PortError::Gone) => SinkState::Stopped,
        error if error.is_benign() => SinkState::Connecting,
        _ => SinkState::Waiting,
    }
}

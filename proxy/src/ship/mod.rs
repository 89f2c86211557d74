//! Shipping: durable records out of the log, cut into segments, sent to a sink, acknowledged.
//!
//! One task per (group, sink). Follow a record: [`source`] reads it once the log is durable
//! past it, out of the ring while it is there and out of the log after that, [`cutter`] puts it into a segment, [`session`] sends the segment within a window of
//! unacknowledged bytes through a [`sink`], and reports what came back durable to the group
//! through its [`port`]. A sink that lacks records the log no longer has gets a [`pass`].
//!
//! Always holds: nothing leaves this site before the log is durable up to it; what is reported as
//! acknowledged has been acknowledged as durable; memory is bounded by the window, one segment
//! under construction of each kind, and one read. Nothing here ever makes the guest wait. Every
//! error ends the session, is shown in [`status`], and is followed by a new one after a pause.

pub mod codec;
pub mod cutter;
pub mod log_source;
pub mod pass;
pub mod port;
pub mod rate;
pub mod remote;
pub mod resume;
pub mod ring_frames;
pub mod session;
pub mod sink;
pub mod source;
pub mod status;
pub mod task;
mod window;

#[cfg(test)]
mod tests;

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

/// A future behind a pointer, for traits that are used as `dyn`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Settings of shipping towards one sink.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShipConfig {
    /// A segment is closed when its first record is this old.
    pub ship_interval: Duration,
    /// Most bytes sent and not acknowledged; one segment more may be on its way.
    pub window_bytes: usize,
    /// Most bytes per second that a pass reads; `None` for no limit.
    pub pass_bytes_per_second: Option<u64>,
    /// First pause after a failed session; doubles up to `retry_max`.
    pub retry_min: Duration,
    /// Longest pause after a failed session.
    pub retry_max: Duration,
}

/// What may change while a task runs; it holds from the next turn on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuning {
    /// As [`ShipConfig::ship_interval`]. Zero: what is durable is sent at once.
    pub ship_interval: Duration,
    /// As [`ShipConfig::pass_bytes_per_second`].
    pub pass_bytes_per_second: Option<u64>,
}

impl ShipConfig {
    /// The part of it that may change.
    #[must_use]
    pub const fn tuning(&self) -> Tuning {
        Tuning {
            ship_interval: self.ship_interval,
            pass_bytes_per_second: self.pass_bytes_per_second,
        }
    }
}

impl Default for ShipConfig {
    fn default() -> Self {
        Self {
            ship_interval: Duration::from_millis(500),
            window_bytes: 32 * 1024 * 1024,
            pass_bytes_per_second: None,
            retry_min: Duration::from_millis(200),
            retry_max: Duration::from_secs(30),
        }
    }
}

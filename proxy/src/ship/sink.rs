//! Where segments go: a replica over the network, or a repository directly.

use super::BoxFuture;
use afterimage_format::segment::SinkId;
use afterimage_format::wire::{Ack, Hello, HelloReply, RemoteError, WireError};
use bytes::Bytes;
use std::time::Duration;

/// Why a session with a sink ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SinkError {
    /// No connection came about.
    #[error("cannot connect to {peer}: {cause}")]
    Connect {
        /// The sink's address.
        peer: String,
        /// The error of the operating system.
        cause: std::sync::Arc<std::io::Error>,
    },
    /// TLS failed: certificates, names, versions.
    #[error("TLS with {peer} failed: {cause}; check both certificates, their CA and the name")]
    Tls {
        /// The sink's address.
        peer: String,
        /// The error of the TLS library.
        cause: std::sync::Arc<std::io::Error>,
    },
    /// The connection broke.
    #[error("connection to {peer} lost: {cause}")]
    Lost {
        /// The sink's address.
        peer: String,
        /// The error of the operating system.
        cause: std::sync::Arc<std::io::Error>,
    },
    /// Nothing came, or nothing could be sent, for this long: the peer is gone.
    #[error("{peer} is silent for {} s ({during})", silence.as_secs())]
    Silent {
        /// The sink's address.
        peer: String,
        /// For how long.
        silence: Duration,
        /// What was waited for.
        during: &'static str,
    },
    /// The peer sent something that it must not.
    #[error("{peer}: {cause}")]
    Wire {
        /// The sink's address.
        peer: String,
        /// What is wrong with it.
        cause: WireError,
    },
    /// A message that does not belong here.
    #[error("{peer} sent {message} out of turn")]
    OutOfTurn {
        /// The sink's address.
        peer: String,
        /// Which message.
        message: &'static str,
    },
    /// The sink refused, and said why.
    #[error("{peer} refuses: {cause}")]
    Refused {
        /// The sink's address.
        peer: String,
        /// What it said.
        cause: RemoteError,
    },
}

/// A place that segments go to. Cheap to keep; connections are made anew for each session.
pub trait Sink: Send + Sync {
    /// Its canonical URL, as configured; also for messages.
    fn url(&self) -> &str;

    /// Its identity in superblock and pass records.
    fn id(&self) -> SinkId {
        SinkId::of_url(self.url())
    }

    /// Opens a connection. Has its own deadline.
    fn connect(&self) -> BoxFuture<'_, Result<Box<dyn SinkConnection>, SinkError>>;
}

/// One connection. After an error it is of no more use; dropping it closes it.
pub trait SinkConnection: Send {
    /// Says hello and waits for the answer. Called first; once more after
    /// [`HelloReply::NewEpoch`]. Has its own deadline.
    fn hello(&mut self, hello: Hello) -> BoxFuture<'_, Result<HelloReply, SinkError>>;

    /// Takes one sealed segment to be sent behind those before it. May wait for room; returns
    /// long before it is durable. May be dropped only when the connection is given up.
    fn send(&mut self, segment: Bytes) -> BoxFuture<'_, Result<(), SinkError>>;

    /// Waits for an acknowledgement newer than the last one returned; if several came meanwhile,
    /// the newest. May be dropped while it waits. Fails when the connection has ended.
    fn ack(&mut self) -> BoxFuture<'_, Result<Ack, SinkError>>;
}

//! Shipping against a scripted peer that speaks the real codec, and against replicas behind TLS.

mod flow;
mod group;
mod log_file;
mod replica;
mod ring_frames;
mod tls;
mod trouble;

use super::port::GroupPort;
use super::remote::{Connection, RemoteTimes};
use super::sink::{Sink, SinkConnection, SinkError};
use super::status::StatusCell;
use super::task::ShipTask;
use super::{BoxFuture, ShipConfig};
use group::{FakeGroup, MemorySource};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::DuplexStream;
use tokio::sync::mpsc;

const URL: &str = "afterimage://replica.test:9471";

/// A sink whose connections end at the test.
struct PipeSink {
    peers: mpsc::UnboundedSender<DuplexStream>,
}

impl Sink for PipeSink {
    fn url(&self) -> &str {
        URL
    }

    fn connect(&self) -> BoxFuture<'_, Result<Box<dyn SinkConnection>, SinkError>> {
        Box::pin(async {
            let (ours, theirs) = tokio::io::duplex(256 * 1024);
            // A test that has seen enough no longer takes connections: hang like a dead network.
            if self.peers.send(theirs).is_err() {
                std::future::pending::<()>().await;
            }
            let connection = Connection::start(URL.to_owned(), ours, RemoteTimes::default());
            Ok(Box::new(connection) as Box<dyn SinkConnection>)
        })
    }
}

/// A group that ships, and the far ends of its connections.
struct Rig {
    group: Arc<FakeGroup>,
    peers: mpsc::UnboundedReceiver<DuplexStream>,
    status: StatusCell,
    task: tokio::task::JoinHandle<()>,
}

impl Rig {
    fn start(group: Arc<FakeGroup>, config: ShipConfig) -> Self {
        let (sender, peers) = mpsc::unbounded_channel();
        let status = StatusCell::new(URL);
        let task = ShipTask {
            port: group.clone() as Arc<dyn GroupPort>,
            sink: Arc::new(PipeSink { peers: sender }),
            source: Box::new(MemorySource::new(group.clone())),
            config,
            status: status.clone(),
            jitter_seed: 7,
        };
        Self {
            group,
            peers,
            status,
            task: tokio::spawn(task.run()),
        }
    }

    async fn accept(&mut self) -> DuplexStream {
        self.peers.recv().await.expect("the task connects")
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn config() -> ShipConfig {
    ShipConfig {
        ship_interval: Duration::from_millis(50),
        ..ShipConfig::default()
    }
}

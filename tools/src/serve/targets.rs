//! Where history goes and comes from: repositories of this machine, replicas, the listening end.
//!
//! Owns one receiver per repository, shared by everything in this process that writes or reads it:
//! groups that ship into it directly, primaries that connect, images.

use afterimage_proxy::checkpoint::schedule::{Schedule, ScheduleError};
use afterimage_proxy::ship::ShipConfig;
use afterimage_proxy::ship::log_source::LogFileSource;
use afterimage_proxy::ship::port::GroupPort;
use afterimage_proxy::ship::remote::{RemoteSink, RemoteTimes, RemoteUrlError};
use afterimage_proxy::ship::sink::Sink;
use afterimage_proxy::ship::status::StatusCell;
use afterimage_proxy::ship::task::ShipTask;
use afterimage_proxy::tls::{EndpointFiles, TlsError, client_config, server_config};
use afterimage_replica::receive::{DirectSink, NowNs, Receiver, Server, ServerLimits};
use afterimage_replica::repository::{Repository, RepositoryError};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::group::{Running, TargetTask};
use super::listeners::endpoint;
use super::open::wall_ns;
use crate::config::schema::Replica;
use crate::config::units::Target;
use crate::config::{Config, GroupConfig, SinkConfig};

/// Why a target or the replica cannot be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum TargetError {
    /// A repository.
    #[error("repository {url}: {source}")]
    Repository {
        /// Its URL.
        url: String,
        /// Why.
        source: RepositoryError,
    },
    /// Certificates.
    #[error("TLS of {url}: {source}")]
    Tls {
        /// Whose.
        url: String,
        /// Why.
        source: TlsError,
    },
    /// A URL.
    #[error(transparent)]
    Url(#[from] RemoteUrlError),
    /// The replica's address.
    #[error("the replica cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// A schedule.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
}

/// The receivers of this process, by URL.
#[derive(Debug, Default)]
pub(super) struct Receivers(HashMap<String, Receiver>);

impl Receivers {
    /// Opens every repository that the configuration names.
    ///
    /// # Errors
    /// Names the repository.
    pub(super) async fn open(config: &Config) -> Result<Self, TargetError> {
        let mut receivers = HashMap::new();
        let sinks = config.groups.iter().flat_map(|group| &group.to);
        let replica = config.replica.as_ref().map(|r| r.repository.get_ref());
        for url in sinks.map(|sink| &sink.url).chain(replica) {
            let name = url.to_string();
            if matches!(url, Target::Replica { .. }) || receivers.contains_key(&name) {
                continue;
            }
            let opened = Repository::open(&name).await;
            let repository = opened.map_err(|source| TargetError::Repository {
                url: name.clone(),
                source,
            })?;
            receivers.insert(name, Receiver::new(repository));
        }
        Ok(Self(receivers))
    }

    /// The receiver of the repository that images come from.
    #[must_use]
    pub(super) fn for_images(&self, config: &Config, group: &str) -> Option<&Receiver> {
        // A group of this site: its own repository. Else what others ship here.
        let own = config.group(group).into_iter().flat_map(|group| &group.to);
        let own = own.map(|sink| &sink.url);
        let replica = config.replica.as_ref().map(|r| r.repository.get_ref());
        own.chain(replica)
            .find_map(|url| self.0.get(&url.to_string()))
    }

    /// The receiver of the replica's repository.
    #[must_use]
    pub(super) fn of_replica(&self, config: &Config) -> Option<&Receiver> {
        let url = config.replica.as_ref()?.repository.get_ref().to_string();
        self.0.get(&url)
    }

    fn sink(&self, sink: &SinkConfig) -> Result<Arc<dyn Sink>, TargetError> {
        let url = sink.url.to_string();
        if let Some(receiver) = self.0.get(&url) {
            return Ok(Arc::new(DirectSink::new(&url, receiver.clone(), clock())));
        }
        let tls = sink
            .tls
            .as_ref()
            .ok_or_else(|| RemoteUrlError::Form(url.clone()))?;
        let files = EndpointFiles {
            cert: tls.cert.clone(),
            key: tls.key.clone(),
        };
        let tls = client_config(&files, &tls.ca).map_err(|source| TargetError::Tls {
            url: url.clone(),
            source,
        })?;
        Ok(Arc::new(RemoteSink::new(
            &url,
            tls,
            RemoteTimes::default(),
        )?))
    }
}

/// The sinks of a group.
///
/// # Errors
/// Names the one that cannot be.
pub(super) fn sinks(
    receivers: &Receivers,
    group: &GroupConfig,
) -> Result<Vec<Arc<dyn Sink>>, TargetError> {
    group.to.iter().map(|sink| receivers.sink(sink)).collect()
}

/// The schedule of a group's checkpoints.
///
/// # Errors
/// It cannot be one.
pub(super) fn schedule(group: &Running) -> Result<Option<Schedule>, TargetError> {
    let Some(wanted) = &group.config.checkpoint else {
        return Ok(None);
    };
    let schedule = match (&wanted.every, &wanted.cron) {
        (Some(every), _) => Schedule::every(every.0, group.handle.identity().group)?,
        (None, Some(cron)) => Schedule::cron(cron.get_ref())?,
        (None, None) => return Ok(None),
    };
    Ok(Some(schedule))
}

/// Begins shipping: one task for each sink.
pub(super) fn ship(group: &mut Running, sinks: Vec<Arc<dyn Sink>>) {
    for (number, sink) in sinks.into_iter().enumerate() {
        let status = StatusCell::new(sink.url());
        group.targets.push(TargetTask {
            url: sink.url().to_owned(),
            sink: sink.id(),
            status: status.clone(),
        });
        let task = ShipTask {
            port: Arc::new(group.handle.clone()) as Arc<dyn GroupPort>,
            sink,
            source: Box::new(LogFileSource::new(&group.config.log_path)),
            config: ShipConfig {
                ship_interval: group.config.ship_interval,
                pass_bytes_per_second: group.config.pass_rate,
                ..ShipConfig::default()
            },
            status,
            jitter_seed: wall_ns() ^ number as u64,
        };
        group.spawn(task.run());
    }
}

/// Listens for primaries until `stop`. None when the replica does not listen.
///
/// # Errors
/// Names the address or the file.
pub(super) async fn listen(
    replica: &Replica,
    receiver: Receiver,
    stop: CancellationToken,
) -> Result<Option<tokio::task::JoinHandle<()>>, TargetError> {
    let (Some(address), Some(tls)) = (replica.listen, &replica.tls) else {
        return Ok(None);
    };
    let tls = tls.get_ref();
    let tls = server_config(&endpoint(tls), tls.client_ca.as_deref());
    let tls = tls.map_err(|source| TargetError::Tls {
        url: format!("[replica] listen = {address}"),
        source,
    })?;
    let listener = TcpListener::bind(address).await;
    let listener = listener.map_err(|source| TargetError::Listen { address, source })?;
    let server = Server::new(receiver, tls, ServerLimits::default(), clock());
    tracing::info!(%address, "listening for primaries");
    Ok(Some(tokio::spawn(server.run(listener, stop))))
}

fn clock() -> NowNs {
    Arc::new(wall_ns)
}

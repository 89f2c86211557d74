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
use afterimage_replica::receive::{DirectSink, NowNs, Place, Receiver, Server, ServerLimits};
use afterimage_replica::repository::RepositoryError;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use toml::Spanned;

use super::group::{Running, TargetTask};
use super::listeners::endpoint;
use super::open::wall_ns;
use crate::config::schema::Replica;
use crate::config::units::{Interval, Target};
use crate::config::{Config, GroupConfig, SinkConfig};

/// A start waits so long for a repository to answer.
const OPENING: Duration = Duration::from_secs(10);
/// Pause between attempts to open the repository that primaries ship to.
const OPENING_PAUSE: Duration = Duration::from_secs(5);

/// Why a target or the replica cannot be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum TargetError {
    /// A repository.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
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

/// The repositories of this process, by URL.
#[derive(Debug, Default)]
pub(super) struct Receivers(HashMap<String, Arc<Place>>);

impl Receivers {
    /// Opens every repository that the configuration names. One that is away is opened later, by
    /// who needs it: guests do not wait for it.
    ///
    /// # Errors
    /// Names a repository that cannot be used as it is configured.
    pub(super) async fn open(config: &Config, accepts_loss: bool) -> Result<Self, TargetError> {
        let sinks = config.groups.iter().flat_map(|group| &group.to);
        let replica = config.replica.as_ref().map(|r| r.repository.get_ref());
        let urls = sinks.map(|sink| &sink.url).chain(replica);
        let names = urls.filter(|url| !matches!(url, Target::Replica { .. }));
        let names: HashSet<String> = names.map(ToString::to_string).collect();
        let places = names.into_iter().map(|url| {
            let place = Arc::new(Place::new(&url, accepts_loss));
            (url, place)
        });
        let places: HashMap<String, Arc<Place>> = places.collect();
        futures::future::try_join_all(places.values().map(try_open)).await?;
        Ok(Self(places))
    }

    /// The repository that images come from.
    #[must_use]
    pub(super) fn for_images(&self, config: &Config, group: &str) -> Option<&Arc<Place>> {
        // A group of this site: its own repository. Else what others ship here.
        let own = config.group(group).into_iter().flat_map(|group| &group.to);
        let own = own.map(|sink| &sink.url);
        let replica = config.replica.as_ref().map(|r| r.repository.get_ref());
        own.chain(replica)
            .find_map(|url| self.0.get(&url.to_string()))
    }

    /// The replica's repository.
    #[must_use]
    pub(super) fn of_replica(&self, config: &Config) -> Option<&Arc<Place>> {
        let url = config.replica.as_ref()?.repository.get_ref().to_string();
        self.0.get(&url)
    }

    fn sink(&self, sink: &SinkConfig) -> Result<Arc<dyn Sink>, TargetError> {
        let url = sink.url.to_string();
        if let Some(place) = self.0.get(&url) {
            return Ok(Arc::new(DirectSink::new(Arc::clone(place), clock())));
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

/// One attempt to open a repository at the start.
async fn try_open(place: &Arc<Place>) -> Result<(), TargetError> {
    let own = Arc::clone(place);
    // It goes on when nobody waits for it any longer.
    let attempt = tokio::spawn(async move { own.receiver().await.map(|_| ()) });
    let why = match tokio::time::timeout(OPENING, attempt).await {
        Ok(Ok(Ok(()))) => return Ok(()),
        Ok(Ok(Err(error))) if error.is_lasting() => return Err(error.into()),
        Ok(Ok(Err(error))) => error.to_string(),
        Ok(Err(broken)) => broken.to_string(),
        Err(_) => format!("no answer within {} s", OPENING.as_secs()),
    };
    tracing::warn!(repository = %place.url(), %why, "the repository is away; it is tried again");
    Ok(())
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

/// The schedule of a group's crash-consistent checkpoints.
///
/// # Errors
/// It cannot be one.
pub(super) fn schedule(
    group: &Running,
    config: &GroupConfig,
) -> Result<Option<Schedule>, TargetError> {
    let Some(wanted) = &config.checkpoint else {
        return Ok(None);
    };
    one_schedule(group, wanted.every.as_ref(), wanted.cron.as_ref())
}

/// The schedule of a group's application-consistent checkpoints.
///
/// # Errors
/// It cannot be one.
pub(super) fn app_schedule(
    group: &Running,
    config: &GroupConfig,
) -> Result<Option<Schedule>, TargetError> {
    let wanted = config.checkpoint.as_ref();
    let Some(app) = wanted.and_then(|wanted| wanted.app.as_ref()) else {
        return Ok(None);
    };
    one_schedule(group, app.every.as_ref(), app.cron.as_ref())
}

fn one_schedule(
    group: &Running,
    every: Option<&Interval>,
    cron: Option<&Spanned<String>>,
) -> Result<Option<Schedule>, TargetError> {
    Ok(match (every, cron) {
        (Some(every), _) => Some(Schedule::every(every.0, group.handle.identity().group)?),
        (None, Some(cron)) => Some(Schedule::cron(
            cron.get_ref(),
            group.handle.identity().group,
        )?),
        (None, None) => None,
    })
}

/// Begins shipping: one task for each sink.
pub(super) fn ship(group: &mut Running, sinks: Vec<Arc<dyn Sink>>) {
    for (number, sink) in sinks.into_iter().enumerate() {
        let status = StatusCell::new(sink.url());
        let config = ship_config(&group.config);
        let tuning = watch::Sender::new(config.tuning());
        group.targets.push(TargetTask {
            url: sink.url().to_owned(),
            sink: sink.id(),
            status: status.clone(),
            tuning: tuning.clone(),
        });
        let task = ShipTask {
            port: Arc::new(group.handle.clone()) as Arc<dyn GroupPort>,
            sink,
            source: Box::new(LogFileSource::new(&group.config.log_path, &group.ring_path)),
            config,
            status,
            jitter_seed: wall_ns() ^ number as u64,
        };
        group.spawn(task.run_tuned(tuning.subscribe()));
    }
}

/// How a group is shipped.
pub(super) fn ship_config(group: &GroupConfig) -> ShipConfig {
    ShipConfig {
        ship_interval: group.ship_interval,
        pass_bytes_per_second: group.pass_rate,
        ..ShipConfig::default()
    }
}

/// Listens for primaries until `stop`, once the repository is open. None when the replica does not
/// listen.
///
/// # Errors
/// Names the address or the file.
pub(super) async fn listen(
    replica: &Replica,
    place: Arc<Place>,
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
    tracing::info!(%address, "listening for primaries");
    Ok(Some(tokio::spawn(async move {
        let Some(receiver) = stop.run_until_cancelled(wait_for(&place)).await else {
            return;
        };
        let server = Server::new(receiver, tls, ServerLimits::default(), clock());
        server.run(listener, stop).await;
    })))
}

/// The receiver, however long that takes.
async fn wait_for(place: &Place) -> Receiver {
    loop {
        match place.receiver().await {
            Ok(receiver) => return receiver.clone(),
            Err(error) => {
                tracing::warn!(%error, "primaries have to wait for the repository");
                tokio::time::sleep(OPENING_PAUSE).await;
            }
        }
    }
}

fn clock() -> NowNs {
    Arc::new(wall_ns)
}

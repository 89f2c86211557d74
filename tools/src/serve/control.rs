//! What the API can ask of the daemon.

use afterimage_format::checkpoint::CheckpointTrigger;
use afterimage_proxy::tls::identity_in;
use afterimage_replica::group::GroupError as HistoryError;
use afterimage_replica::image::{ChunkCache, Image};
use afterimage_replica::points::{Beyond, resolve};
use afterimage_replica::receive::Receiver;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

use super::detach::{self, Progress};
use super::exports::Served;
use super::group::{self, CheckpointError};
use super::open::wall_ns;
use super::report;
use super::targets::Receivers;
use super::verify;
use crate::api::types::{
    CheckpointDone, Detached, ExportInfo, GroupStatus, PointList, ReceivedStatus, StatusReport,
    StepInfo, VerifyStatus,
};
use crate::api::{Answer, ApiError, Control};
use crate::cli::values::Point;
use crate::commands::{export, history};
use crate::config::Config;
use crate::config::units::ListenAddress;
use crate::metrics::{self, HistoryNumbers, Snapshot};

/// Chunks that all images together keep in memory.
const IMAGE_CACHE_BYTES: usize = 256 << 20;

/// What a repository has to say for a status is waited for so long.
const HISTORY_PATIENCE: Duration = Duration::from_secs(2);

/// State and reason while a detach is under way.
const DETACHING: (&str, &str) = (
    "detaching",
    "its log is being written back to its disks, which are not complete before that is over",
);

/// The daemon behind the API.
pub(super) struct Daemon {
    config: Arc<Config>,
    served: Arc<Served>,
    receivers: Receivers,
    cache: Arc<ChunkCache>,
    /// Groups that do not run, and why.
    failed: Vec<(String, String)>,
}

impl Daemon {
    /// A daemon over these parts.
    #[must_use]
    pub(super) fn new(
        config: Arc<Config>,
        served: Arc<Served>,
        receivers: Receivers,
        failed: Vec<(String, String)>,
    ) -> Self {
        Self {
            config,
            served,
            receivers,
            cache: Arc::new(ChunkCache::new(IMAGE_CACHE_BYTES)),
            failed,
        }
    }

    fn running(&self, name: &str) -> Result<Arc<group::Running>, ApiError> {
        match self.served.detaches.progress(name) {
            Some(Progress::Running) => {
                return Err(ApiError::Conflict(format!(
                    "group '{name}' is being detached; 'afterimage status {name}' shows how that goes"
                )));
            }
            Some(Progress::Done(_)) => {
                let log = self
                    .config
                    .group(name)
                    .map(|group| group.log_path.display());
                let log = log.map_or_else(String::new, |log| format!(" {log}"));
                return Err(ApiError::Conflict(format!(
                    "group '{name}' is detached: its disks are plain and its log is done; to attach it again stop the service, move the log{log} away and start: a new log begins, and its targets get a new copy"
                )));
            }
            Some(Progress::Failed(why)) => {
                return Err(ApiError::Conflict(format!("group '{name}': {why}")));
            }
            None => {}
        }
        if let Some(group) = self.served.group(name) {
            return Ok(group);
        }
        if let Some((_, why)) = self.failed.iter().find(|(failed, _)| failed == name) {
            return Err(ApiError::Conflict(format!(
                "group '{name}' does not run: {why}"
            )));
        }
        Err(unknown(name))
    }

    async fn status_of_group(&self, name: &str) -> GroupStatus {
        let running = self.served.group(name);
        let failed = self.failed.iter().find(|(failed, _)| failed == name);
        match (self.served.detaches.progress(name), running, failed) {
            (Some(Progress::Running), Some(running), _) => {
                let mut status = report::status(&running).await.0;
                let trouble = status.reason.take();
                status.state = DETACHING.0.to_owned();
                status.reason = Some(match trouble {
                    Some(trouble) => format!("{}; {trouble}", DETACHING.1),
                    None => DETACHING.1.to_owned(),
                });
                status
            }
            (Some(Progress::Running), None, _) => {
                report::stopped(name, DETACHING.0, Some(DETACHING.1.to_owned()))
            }
            (Some(Progress::Done(_)), ..) => report::stopped(name, "detached", None),
            (Some(Progress::Failed(why)), ..) => report::stopped(name, "failed", Some(why)),
            (None, Some(running), _) => report::status(&running).await.0,
            (None, None, why) => report::stopped(name, "failed", why.map(|(_, why)| why.clone())),
        }
    }

    async fn receiver(&self, group: &str) -> Result<&Receiver, ApiError> {
        let found = self.receivers.for_images(&self.config, group);
        let found = found.ok_or_else(|| {
            ApiError::NotFound(format!(
                "no repository of this machine has the history of '{group}'; ask the replica"
            ))
        })?;
        let receiver = found.receiver().await;
        receiver.map_err(|error| ApiError::Failed(error.to_string()))
    }

    async fn status_with_histories(
        &self,
        wanted: Option<&str>,
    ) -> Result<(StatusReport, Vec<HistoryNumbers>), ApiError> {
        let mut status = self.status_of(wanted).await?;
        let histories = self.histories(&mut status).await;
        Ok((status, histories))
    }

    async fn status_of(&self, wanted: Option<&str>) -> Result<StatusReport, ApiError> {
        let mut report = StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            now_wall_ns: wall_ns(),
            exports: self.served.images.infos(),
            ..StatusReport::default()
        };
        let is_wanted = |name: &str| wanted.is_none_or(|wanted| wanted == name);
        for group in &self.config.groups {
            if !is_wanted(&group.name) {
                continue;
            }
            report.groups.push(self.status_of_group(&group.name).await);
        }
        report.received = self.received().await;
        report.received.retain(|received| is_wanted(&received.name));
        if let Some(name) = wanted
            && report.groups.is_empty()
            && report.received.is_empty()
        {
            return Err(ApiError::NotFound(format!(
                "group '{name}' is not known here"
            )));
        }
        Ok(report)
    }

    /// Groups of the replica's repository. Trouble with one is told in the log, not hidden in a
    /// failure of all.
    async fn received(&self) -> Vec<ReceivedStatus> {
        // Nobody waits here for one that is away.
        let place = self.receivers.of_replica(&self.config);
        let Some(receiver) = place.and_then(|place| place.opened()) else {
            return Vec::new();
        };
        let names = afterimage_replica::group::Group::names(receiver.repository()).await;
        let names = names.unwrap_or_else(|error| {
            tracing::warn!(%error, "the repository cannot be listed");
            Vec::new()
        });
        let mut all = Vec::new();
        for name in names {
            match receiver.group_by_name(&name).await {
                Ok(group) => all.push(report::received(&name, &group)),
                Err(error) => {
                    tracing::warn!(group = %name, %error, "a received group cannot be read")
                }
            }
        }
        all
    }

    /// What repositories of this machine have of the groups in a status, which takes over what it
    /// shows of it. One that does not answer in time shows nothing.
    async fn histories(&self, report: &mut StatusReport) -> Vec<HistoryNumbers> {
        let mut all: Vec<HistoryNumbers> = Vec::new();
        for status in &mut report.groups {
            if let Some(numbers) = self.history(&status.name).await {
                status.oldest_point_wall_ns = numbers.oldest_point_ns;
                status.last_verified_wall_ns = numbers.last_verified_ns;
                status.last_compared_wall_ns = numbers.last_compared_ns;
                all.push(numbers);
            }
        }
        for received in &mut report.received {
            let known = all.iter().find(|known| known.group == received.name);
            let (numbers, is_new) = match known {
                Some(known) => (Some(known.clone()), false),
                None => (self.history(&received.name).await, true),
            };
            if let Some(numbers) = numbers {
                received.oldest_point_wall_ns = numbers.oldest_point_ns;
                received.last_verified_wall_ns = numbers.last_verified_ns;
                received.last_compared_wall_ns = numbers.last_compared_ns;
                if is_new {
                    all.push(numbers);
                }
            }
        }
        all
    }

    async fn history(&self, name: &str) -> Option<HistoryNumbers> {
        let receiver = self.receivers.for_images(&self.config, name)?.opened()?;
        let numbers = async {
            let group = receiver.group_by_name(name).await.ok()?;
            let mut numbers = report::history(&group).await;
            numbers.group = name.to_owned();
            Some(numbers)
        };
        tokio::time::timeout(HISTORY_PATIENCE, numbers).await.ok()?
    }

    async fn open_image(&self, group: &str, point: &str) -> Result<ExportInfo, ApiError> {
        let begun = Instant::now();
        let spec: Point = point
            .parse()
            .map_err(|e| ApiError::Invalid(format!("{e}")))?;
        let history = self.receiver(group).await?.group_by_name(group).await;
        let history = history.map_err(not_found_or_failed)?;
        let at = resolve(&history, &spec.0).await;
        let at = at.map_err(|error| ApiError::NotFound(error.to_string()))?;
        let warning = Beyond::of(&history.history(), &spec.0).map(|beyond| beyond.to_string());
        let image = Image::open(Arc::clone(&history), at, Arc::clone(&self.cache));
        let image = image.map_err(|error| ApiError::NotFound(error.to_string()))?;
        let opened_in_us = begun.elapsed().as_micros() as u64;
        let wall_ns = export::time_of(&image).await;
        let images = &self.served.images;
        let address = ListenAddress::Unix(self.config.images_socket.clone());
        let told = (wall_ns, warning);
        Ok(images.add(group, image, told, opened_in_us, &address))
    }

    async fn detach_group(&self, name: &str) -> Result<Detached, ApiError> {
        let known = self.served.detaches.progress(name);
        let running = match known {
            None => Some(self.running(name)?),
            Some(_) => self.served.group(name),
        };
        let group = self.config.group(name).ok_or_else(|| unknown(name))?;
        let detached = detach::detach(&self.config, &self.served, group, running).await;
        detached.map_err(ApiError::Failed)
    }

    async fn scrape(&self) -> Result<String, ApiError> {
        let (status, histories) = self.status_with_histories(None).await?;
        let mut snapshot = Snapshot {
            status,
            histories,
            ..Snapshot::default()
        };
        for status in &snapshot.status.groups {
            snapshot.groups.push(match self.served.group(&status.name) {
                Some(running) => report::status(&running).await.1,
                None => metrics::GroupNumbers::default(),
            });
        }
        snapshot.certificates = self.certificates();
        metrics::render(&snapshot).map_err(|error| ApiError::Failed(error.to_string()))
    }

    /// Every certificate in use, and those that vouch for peers, each file once per use.
    fn certificates(&self) -> Vec<(&'static str, String, i64)> {
        let replica = self.config.replica.as_ref().and_then(|r| r.tls.as_ref());
        let replica = replica.map(|tls| {
            let tls = tls.get_ref();
            ("replica", &tls.cert, tls.client_ca.as_ref())
        });
        let sinks = self.config.groups.iter().flat_map(|group| &group.to);
        let ship = sinks.filter_map(|sink| {
            let tls = sink.tls.as_ref()?;
            Some(("ship", &tls.cert, Some(&tls.ca)))
        });
        let nbd = self.config.listeners.iter();
        let nbd = nbd.filter_map(|listener| {
            let tls = listener.tls.as_ref()?;
            Some(("nbd", &tls.cert, tls.client_ca.as_ref()))
        });
        let files: BTreeSet<(&'static str, &Path)> = replica
            .into_iter()
            .chain(ship)
            .chain(nbd)
            .flat_map(|(name, cert, ca)| {
                let files = [Some(cert), ca].into_iter().flatten();
                files.map(move |file| (name, file.as_path()))
            })
            .collect();
        files
            .into_iter()
            .filter_map(|(name, path)| {
                let end = identity_in(path).ok()?.not_after();
                Some((name, path.display().to_string(), end))
            })
            .collect()
    }
}

fn unknown(name: &str) -> ApiError {
    ApiError::NotFound(format!("group '{name}' is not configured here"))
}

fn not_found_or_failed(error: HistoryError) -> ApiError {
    match error {
        HistoryError::Unknown { .. } => ApiError::NotFound(error.to_string()),
        other => ApiError::Failed(other.to_string()),
    }
}

impl Control for Daemon {
    fn status<'a>(&'a self, group: Option<&'a str>) -> Answer<'a, StatusReport> {
        Box::pin(async move { Ok(self.status_with_histories(group).await?.0) })
    }

    fn checkpoint<'a>(
        &'a self,
        group: &'a str,
        label: Option<&'a str>,
        app: bool,
        steps: Option<UnboundedSender<StepInfo>>,
    ) -> Answer<'a, CheckpointDone> {
        Box::pin(async move {
            let running = self.running(group)?;
            let trigger = CheckpointTrigger::Request;
            let done = if app {
                running.app_checkpoint(label, trigger, steps).await
            } else {
                running.checkpoint(label, trigger).await
            };
            done.map_err(|error| match error {
                CheckpointError::NoGuest | CheckpointError::Busy => {
                    ApiError::Conflict(error.to_string())
                }
                other => ApiError::Failed(other.to_string()),
            })
        })
    }

    fn verify<'a>(&'a self, group: &'a str) -> Answer<'a, VerifyStatus> {
        Box::pin(async move {
            let running = self.running(group)?;
            let begun = verify::begin(&running).await;
            begun.map_err(|error| ApiError::Conflict(format!("group '{group}': {error}")))
        })
    }

    fn points<'a>(&'a self, group: &'a str) -> Answer<'a, PointList> {
        Box::pin(async move {
            let found = self.receiver(group).await?.group_by_name(group).await;
            let found = found.map_err(not_found_or_failed)?;
            Ok(history::list(&found))
        })
    }

    fn export<'a>(&'a self, group: &'a str, point: &'a str) -> Answer<'a, ExportInfo> {
        Box::pin(self.open_image(group, point))
    }

    fn exports(&self) -> Answer<'_, Vec<ExportInfo>> {
        Box::pin(async { Ok(self.served.images.infos()) })
    }

    fn close_export<'a>(&'a self, name: &'a str) -> Answer<'a, ()> {
        Box::pin(async move {
            if self.served.images.remove(name) {
                return Ok(());
            }
            Err(ApiError::NotFound(format!("no image '{name}' is exported")))
        })
    }

    fn detach<'a>(&'a self, group: &'a str) -> Answer<'a, Detached> {
        Box::pin(self.detach_group(group))
    }

    fn metrics(&self) -> Answer<'_, String> {
        Box::pin(self.scrape())
    }
}

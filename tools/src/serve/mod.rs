//! `afterimage serve`: recovers the groups, then serves, ships, receives and answers.
//!
//! The order of a start: sockets (clients queue from then on), repositories, the replica's end,
//! worker threads, recovery of each group, shipping, listeners, API, ready. The order of an end, on
//! SIGTERM: no more clients, every group drained into its disks, a last chance for shipping, disks
//! marked clean. A second signal, or [`DRAIN_MAX`], ends it undrained. A kill needs none of that: the
//! next start recovers.

mod abandon;
mod control;
mod detach;
mod device;
mod exports;
pub mod group;
pub mod guest;
mod http;
pub mod images;
mod listeners;
pub mod open;
mod reload;
mod remembered;
pub mod replace;
mod report;
mod targets;
mod verify;

use afterimage_proxy::engine::recovery::Accepted;
use afterimage_proxy::engine::recovery::claims::Left;
use afterimage_proxy::nbd::export::Exports;
use afterimage_proxy::nbd::listener::Attach;
use afterimage_proxy::worker::ProxyHandle;
use anyhow::{Context as _, bail};
use rustix::process::{Signal, set_parent_process_death_signal};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::api::Control;
use crate::cli::Accept;
use crate::cli::output::reason;
use crate::config::{Config, GroupConfig};
use control::Daemon;
use detach::Progress;
use exports::Served;
use group::{Running, TargetTask};
use listeners::Passed;
use reload::{Live, LogFilter};
use targets::Receivers;

/// At an end, shipping goes on with what is left until no acknowledgement comes for so long.
const LAST_SHIPPING: Duration = Duration::from_secs(3);
/// And for so long at most: service managers lose patience.
const LAST_SHIPPING_MAX: Duration = Duration::from_secs(30);
/// Logs that are not in their disks so long after the signal stay as they are: before a service
/// manager kills us (`TimeoutStopSec` of the unit is more than this and [`LAST_SHIPPING_MAX`]).
const DRAIN_MAX: Duration = Duration::from_secs(480);
/// Disks that do not answer are waited for so long at an undrained end.
const LET_GO_MAX: Duration = Duration::from_secs(5);
/// How often rates are measured.
const RATE_EVERY: Duration = Duration::from_secs(2);

/// Runs the daemon until it is told to end.
///
/// # Errors
/// Nothing could be started, or a clean end failed.
pub fn run(
    config: Config,
    accept: Accept,
    accept_new_repository: bool,
    with_parent: bool,
) -> anyhow::Result<()> {
    if with_parent {
        set_parent_process_death_signal(Some(Signal::TERM))?;
    }
    let filter = init_tracing(&config.log_level);
    let passed = Passed::take()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let ended = runtime.block_on(serve(
        Arc::new(config),
        accept,
        accept_new_repository,
        passed,
        filter,
    ));
    // Whoever still waits for a disk that does not answer is not waited for.
    runtime.shutdown_background();
    ended
}

/// Lets messages of a process beside the daemon out.
pub(crate) fn tell() {
    init_tracing("info");
}

/// Lets messages out; `log_level` counts unless the environment says otherwise.
fn init_tracing(log_level: &str) -> LogFilter {
    use std::io::IsTerminal as _;
    use tracing_subscriber::layer::SubscriberExt as _;
    use tracing_subscriber::util::SubscriberInitExt as _;
    let (filter, handle) = LogFilter::new(log_level);
    // The journal has times of its own.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let format = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    let registry = tracing_subscriber::registry().with(filter);
    let set = if journal {
        registry.with(format.without_time()).try_init()
    } else {
        registry.with(format).try_init()
    };
    if set.is_err() {
        tracing::debug!("messages already go somewhere");
    }
    handle
}

async fn serve(
    config: Arc<Config>,
    accept: Accept,
    accept_new_repository: bool,
    passed: Passed,
    filter: LogFilter,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;

    // Before anything else: a guest that the process before left frozen waits for this.
    guest::thaw_left_frozen(&config);
    http::make_folders(&config)?;
    // Before any group has begun: an address that is taken is no reason to begin one.
    let listeners = listeners::bind(&config, passed)?;
    let metrics = http::bind_metrics(&config).await?;
    let receivers = Receivers::open(&config, accept_new_repository).await?;
    let stop = CancellationToken::new();
    let replica = match (&config.replica, receivers.of_replica(&config)) {
        (Some(replica), Some(place)) => {
            targets::listen(replica, Arc::clone(place), stop.clone()).await?
        }
        _ => None,
    };
    let workers = ProxyHandle::start(config.workers)?;
    let accepted = Accepted {
        ring_loss: accept.accept_ring_loss,
        edited_backing: accept.accept_edited,
    };
    let served = Arc::new(Served::default());
    let failed = start_groups(&config, accepted, &workers, &receivers, &served).await?;
    if !failed.is_empty() && served.groups().is_empty() && replica.is_none() {
        bail!("no group could be started; the reasons are above");
    }
    let exports: Arc<dyn Exports> = Arc::clone(&served) as _;
    let attach: Arc<dyn Attach> = Arc::clone(&served) as _;
    let mut tasks = JoinSet::new();
    for listener in listeners {
        tasks.spawn(listener.run(Arc::clone(&exports), Arc::clone(&attach), stop.clone()));
    }
    let daemon: Arc<dyn Control> = Arc::new(Daemon::new(
        Arc::clone(&config),
        Arc::clone(&served),
        receivers,
        failed,
    ));
    let http = http::start(&config, metrics, &daemon).await?;
    let rates = tokio::spawn(measure_rates(Arc::clone(&served)));
    tracing::info!(groups = served.groups().len(), "ready");
    notify(&[sd_notify::NotifyState::Ready]);

    let mut live = Live::new(&config, filter);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => live.reload(&served.groups()),
        }
    }
    tracing::info!("ending: writing logs back to their disks");
    notify(&[sd_notify::NotifyState::Stopping]);
    served.stop();
    stop.cancel();
    rates.abort();
    let give_up = CancellationToken::new();
    let patience = tokio::spawn(lose_patience(terminate, interrupt, give_up.clone()));
    let clean = end_groups(&served, &give_up).await;
    patience.abort();
    drop(http);
    // A next daemon replaces it anyway; nobody should find a dead one meanwhile.
    std::fs::remove_file(&config.api_socket).ok();
    tasks.shutdown().await;
    if let Some(replica) = replica {
        replica.await?;
    }
    let stopped = tokio::task::spawn_blocking(move || workers.stop());
    if give_up.is_cancelled() {
        tokio::time::timeout(LET_GO_MAX, stopped).await.ok();
        bail!(
            "ended before every log was written back; nothing is lost: logs and rings keep it, and the next start writes it"
        );
    }
    stopped.await?;
    if !clean {
        bail!("not every group could be stopped cleanly; the reasons are above");
    }
    Ok(())
}

fn notify(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager could not be told");
    }
}

/// Recovers all groups at once. One that fails does not hold up the others: its reason is kept.
async fn start_groups(
    config: &Arc<Config>,
    accepted: Accepted,
    workers: &ProxyHandle,
    receivers: &Receivers,
    served: &Served,
) -> anyhow::Result<Vec<(String, String)>> {
    let starts = config.groups.iter().map(|group| async move {
        (
            group,
            start_group(config, group, accepted, workers, receivers).await,
        )
    });
    let mut failed = Vec::new();
    for (group, started) in futures::future::join_all(starts).await {
        match started {
            Ok(running) => served.add(running),
            Err(error) => {
                let why = reason(&error);
                tracing::error!(group = %group.name, place = %group.place, "not started: {why}");
                failed.push((group.name.clone(), why));
            }
        }
    }
    Ok(failed)
}

async fn start_group(
    config: &Arc<Config>,
    group: &GroupConfig,
    accepted: Accepted,
    workers: &ProxyHandle,
    receivers: &Receivers,
) -> anyhow::Result<Arc<Running>> {
    let sinks = targets::sinks(receivers, group)?;
    let mut running = group::start(config, group, accepted, workers).await?;
    targets::ship(&mut running, sinks);
    // A gap that is there already was told when it came.
    report::know_gaps(&running).await;
    let running = Arc::new(running);
    running.spawn(Arc::clone(&running).watch_events());
    let plain = targets::schedule(&running, group)?;
    running.set_schedules(plain, targets::app_schedule(&running, group)?);
    running.spawn(Arc::clone(&running).keep_schedule(running.schedule()));
    running.spawn(Arc::clone(&running).keep_app_schedule(running.app_schedule()));
    Ok(running)
}

/// Gives up when another signal comes or the time is over.
async fn lose_patience(mut terminate: Signals, mut interrupt: Signals, give_up: CancellationToken) {
    let why = tokio::select! {
        _ = terminate.recv() => "told again to end",
        _ = interrupt.recv() => "told again to end",
        () = tokio::time::sleep(DRAIN_MAX) => "the logs are not written back in time",
    };
    tracing::warn!("{why}: ending without that");
    give_up.cancel();
}

/// Drains every group; false if one could not be left clean.
async fn end_groups(served: &Arc<Served>, give_up: &CancellationToken) -> bool {
    let ends = served
        .groups()
        .into_iter()
        .map(|running| end_group(served, running, give_up));
    let ends = futures::future::join_all(ends);
    let detached = async {
        // Those on the way to plain disks that are not served any more.
        tokio::select! {
            () = served.detaches.settled() => true,
            () = give_up.cancelled() => false,
        }
    };
    let (ends, detached) = tokio::join!(ends, detached);
    detached && ends.into_iter().all(|clean| clean)
}

async fn end_group(served: &Served, running: Arc<Running>, give_up: &CancellationToken) -> bool {
    let name = running.config.name.clone();
    running.targets.iter().for_each(TargetTask::hurry);
    let detaching = served.detaches.is_running(&name);
    let drained = async {
        match detaching {
            // It is drained there, and marked.
            true => {
                served.detaches.settled().await;
                Ok(())
            }
            false => running.handle.drain().await,
        }
    };
    let drained = tokio::select! {
        drained = drained => drained,
        () = give_up.cancelled() => {
            tracing::error!(
                group = %name,
                "ended without writing its log back; nothing is lost: log and ring keep what its disks lack, and the next start writes it; until then its disks are not complete without them"
            );
            served.detaches.give_up();
            running.stop_tasks();
            tokio::time::timeout(LET_GO_MAX, running.handle.remove()).await.ok();
            return false;
        }
    };
    if detaching {
        return matches!(served.detaches.progress(&name), Some(Progress::Done(_)));
    }
    if let Err(error) = drained {
        tracing::error!(group = %name, %error, "not drained; the next start recovers it");
        drop(running.close().await);
        return false;
    }
    // What the replica lacks stays in the log; a moment more often spares the gap.
    let shipped = tokio::select! {
        shipped = tokio::time::timeout(LAST_SHIPPING_MAX, all_shipped(&running)) => shipped.is_ok_and(|all| all),
        () = give_up.cancelled() => false,
    };
    if !shipped {
        tracing::info!(group = %name, "ends with unshipped records in the log");
    }
    let Some(files) = running.close().await else {
        tracing::error!(group = %name, "ended, but its disks could not be marked as clean: its worker was gone");
        return false;
    };
    let left = tokio::task::spawn_blocking(move || running.leave_clean(files)).await;
    match left {
        Ok(Ok(Left::AsMeant)) => {
            tracing::info!(group = %name, "ended clean");
            true
        }
        Ok(Ok(Left::Abandoned)) => {
            tracing::warn!(group = %name, "ended without its log, which failed: the disks are complete; move the log away, the next start makes a new one");
            true
        }
        Ok(Err(error)) => {
            tracing::error!(group = %name, %error, "ended, but its disks could not be marked as clean");
            false
        }
        Err(error) => {
            tracing::error!(group = %name, %error, "ended, but its disks could not be marked as clean");
            false
        }
    }
}

/// Waits for every target to have everything; false when nothing comes of it any longer.
async fn all_shipped(running: &Running) -> bool {
    let progress = running.handle.progress();
    let appended = progress.borrow().appended;
    let acked = || {
        let acked = running.targets.iter().map(|t| t.status.get().acked);
        acked.collect::<Vec<_>>()
    };
    let (mut last, mut since) = (acked(), Instant::now());
    loop {
        let now = acked();
        if now.iter().all(|acked| *acked >= appended) {
            return true;
        }
        if now != last {
            (last, since) = (now, Instant::now());
        }
        if since.elapsed() > LAST_SHIPPING {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Keeps the rate at which each group is written. A group that rests is not woken for it.
async fn measure_rates(served: Arc<Served>) {
    loop {
        tokio::time::sleep(RATE_EVERY).await;
        for group in served.groups() {
            group.look_at_targets();
            if group.rests() {
                continue;
            }
            let Ok(snapshot) = group.handle.snapshot().await else {
                continue;
            };
            // Gaps are timed here, whether anybody looks or not.
            report::gap_seconds(&group).await;
            let mut notes = group.notes();
            let written = snapshot.engine.written_bytes;
            let now = written.saturating_sub(notes.written_before) / RATE_EVERY.as_secs();
            // Half of what was: short pauses do not hide a busy guest.
            notes.write_rate = u64::midpoint(notes.write_rate, now);
            notes.written_before = written;
            let logged = snapshot.engine.log_written_bytes;
            let now = logged.saturating_sub(notes.logged_before) / RATE_EVERY.as_secs();
            notes.log_rate = u64::midpoint(notes.log_rate, now);
            notes.logged_before = logged;
            for (pace, target) in notes.paces.iter_mut().zip(&group.targets) {
                let lacks = snapshot.sinks.iter().find(|of| of.sink == target.sink);
                let lacks = lacks.map_or(0, |sink| sink.log_bytes);
                pace.count(lacks, RATE_EVERY.as_secs());
            }
        }
    }
}

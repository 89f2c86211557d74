//! Checks a configuration as a whole.
//!
//! Takes what was parsed, gives a [`Config`] that later code can trust, or the first problem with
//! its place. Looks at nothing outside the files: that a backing exists is `serve`'s to find out.

use super::schema::{
    Checkpoint, File, GroupFile, GuestAgent, Listener, Sink, default_freeze_limit,
};
use super::units::{Interval, ListenAddress, Size, Target};
use super::{
    Config, ConfigError, DiskConfig, GroupConfig, Place, SinkConfig, Sourced, line_of, parse,
};
use afterimage_format::ids::DISKS_MAX;
use afterimage_format::names::{self, NameError};
use afterimage_proxy::checkpoint::intent::{AgentSpec, Way};
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use toml::Spanned;
use tracing_subscriber::EnvFilter;

/// Smallest log, in bytes.
pub const LOG_BYTES_MIN: u64 = 16 << 20;
/// Smallest ring, in bytes.
pub const RING_BYTES_MIN: u64 = 4 << 20;
/// Shortest and longest freeze limit.
const FREEZE_LIMIT_MIN: std::time::Duration = std::time::Duration::from_secs(1);
const FREEZE_LIMIT_MAX: std::time::Duration = std::time::Duration::from_secs(60);
/// Most sinks of a group: the superblock has room for so many.
pub const SINKS_MAX: usize = 8;

/// A value that parses and cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A name that could not be part of a path or an export.
    #[error("the name '{name}' is refused: {reason}")]
    Name {
        /// As written.
        name: String,
        /// The rule it breaks.
        reason: NameError,
    },
    /// Two groups with one name.
    #[error("a group named '{name}' already stands at {first}; give one of them another name")]
    GroupTwice {
        /// The name.
        name: String,
        /// Where the other is.
        first: Place,
    },
    /// Two disks with one name.
    #[error("group '{group}' already has a disk '{disk}'; give one of them another name")]
    DiskTwice {
        /// The group.
        group: String,
        /// The disk.
        disk: String,
    },
    /// One file as two things.
    #[error("'{}' is already used as {first}; each backing and each log needs a file of its own", path.display())]
    PathTwice {
        /// The path.
        path: PathBuf,
        /// Its first use.
        first: String,
    },
    /// No disks.
    #[error("group '{0}' has no disk; add a [[group.disk]] with name and path")]
    NoDisks(String),
    /// Too many disks.
    #[error("group '{0}' has more than {DISKS_MAX} disks")]
    DisksTooMany(String),
    /// A log that is too small.
    #[error("a log of {0} is too small; the smallest is {min}", min = Size(LOG_BYTES_MIN))]
    LogTooSmall(Size),
    /// A ring that is too small.
    #[error("a ring of {0} is too small; the smallest is {min}", min = Size(RING_BYTES_MIN))]
    RingTooSmall(Size),
    /// The rings exceed their budget.
    #[error(
        "the rings of all groups together take {total}, more than ring_budget = {budget}; raise the budget or make a ring smaller"
    )]
    RingBudget {
        /// All rings.
        total: Size,
        /// What is allowed.
        budget: Size,
    },
    /// Too many sinks.
    #[error("group '{0}' has more than {SINKS_MAX} targets in 'to'")]
    SinksTooMany(String),
    /// The same sink twice.
    #[error("group '{group}' already goes to '{url}'; name each target once")]
    SinkTwice {
        /// The group.
        group: String,
        /// The target.
        url: String,
    },
    /// A network sink without certificates.
    #[error(
        "'{0}' needs certificates; set [ship] tls = {{ cert, key, ca }} (make some with 'afterimage cert')"
    )]
    SinkWithoutTls(String),
    /// A listener for a group that does not exist.
    #[error("this listener is for group '{0}', which is not configured")]
    ListenerGroup(String),
    /// A listener for no group: whoever wrote it did not mean all of them.
    #[error(
        "{0} has groups = [], which lets nobody in; name its groups, or leave the key away to serve all of them"
    )]
    ListenerNoGroups(ListenAddress),
    /// A listener for other hosts without TLS.
    #[error(
        "{0} can be reached from other hosts without TLS; add tls = {{ cert, key, client_ca }}, or plaintext = true if the network is trusted"
    )]
    ListenerPlaintext(ListenAddress),
    /// TLS on a unix socket.
    #[error("TLS is for tcp:// listeners; {0} is protected by its owner and mode")]
    ListenerUnixTls(ListenAddress),
    /// The same address twice.
    #[error("{0} is already listened on")]
    ListenerTwice(ListenAddress),
    /// The API on anything but a unix socket.
    #[error("the API listens on a unix socket only, not on {0}; write \"unix:/path/to.sock\"")]
    ApiNotUnix(ListenAddress),
    /// Metrics for other hosts.
    #[error(
        "metrics listen on the loopback interface only, not on {0}; put a reverse proxy in front for other hosts"
    )]
    MetricsNotLoopback(SocketAddr),
    /// A replica that listens without certificates.
    #[error(
        "a replica that listens needs tls = {{ cert, key, client_ca }} (make some with 'afterimage cert')"
    )]
    ReplicaWithoutTls,
    /// A replica whose repository is another replica.
    #[error("a repository is a folder or a bucket, not '{0}'")]
    RepositoryRemote(Target),
    /// A schedule that is none.
    #[error("'{0}' is not a cron schedule; write five fields like \"0 * * * *\"")]
    Cron(String),
    /// A guest's agent with both or neither of its ways.
    #[error(
        "a [[group.guest]] has either qga = \"/path/of/the/agent.sock\" or both freeze and thaw = [\"program\", …]"
    )]
    GuestWay,
    /// Application-consistent checkpoints of a guest that nobody can freeze.
    #[error("checkpoint.app needs to know how the guest is frozen: add a [[group.guest]]")]
    AppWithoutGuest,
    /// A limit that leaves no time, or more than Windows allows.
    #[error(
        "freeze_limit = {0:?} is not possible; choose from 1 s to 60 s (Windows: at most 10 s)"
    )]
    FreezeLimit(std::time::Duration),
    /// A schedule with both or neither of its keys.
    #[error("a checkpoint schedule has either 'every' or 'cron'")]
    Schedule,
    /// A filter of messages that is none.
    #[error(
        "'{0}' is not a log level: write error, warn, info, debug, trace, or a filter like \"info,afterimage_proxy=debug\""
    )]
    LogLevel(String),
    /// Nobody to do the work.
    #[error("no worker can run with workers = 0; leave the key away for one per core")]
    NoWorkers,
}

/// Puts the files together and checks them.
///
/// # Errors
/// The first problem, with file and line.
pub fn assemble(
    main: &Path,
    text: &str,
    parts: &[(PathBuf, String)],
) -> Result<Config, ConfigError> {
    let mut file: File = parse(main, text)?;
    let base = main.parent().unwrap_or(Path::new("/"));
    file.place_at(base);
    let in_main = |offset: usize, problem| problem_at(main, text, offset, problem);
    if file.workers == Some(0) {
        return Err(in_main(0, Problem::NoWorkers));
    }

    let level = file.log_level.get_ref();
    if EnvFilter::try_new(level).is_err() {
        let at = file.log_level.span().start;
        return Err(in_main(at, Problem::LogLevel(level.clone())));
    }

    let mut sourced: Vec<Sourced<'_>> = Vec::new();
    for group in file.group {
        sourced.push(Sourced {
            file: main,
            text,
            group,
        });
    }
    for (path, part) in parts {
        let mut groups: GroupFile = parse(path, part)?;
        groups
            .group
            .iter_mut()
            .for_each(|group| group.place_at(base));
        for group in groups.group {
            sourced.push(Sourced {
                file: path,
                text: part,
                group,
            });
        }
    }
    let claims = base.join(file.claims);
    let groups = check_groups(
        base,
        &claims,
        &sourced,
        file.ship.tls.as_ref(),
        file.ring_budget,
    )?;

    let listeners = check_listeners(&file.nbd.listen, &groups)
        .map_err(|(offset, problem)| in_main(offset, problem))?;
    let api_socket = match file.http.api.get_ref() {
        ListenAddress::Unix(path) => path.clone(),
        other => {
            let at = file.http.api.span().start;
            return Err(in_main(at, Problem::ApiNotUnix(other.clone())));
        }
    };
    let metrics = file.http.metrics.get_ref().0;
    if let Some(address) = metrics.filter(|address| !address.ip().is_loopback()) {
        let at = file.http.metrics.span().start;
        return Err(in_main(at, Problem::MetricsNotLoopback(address)));
    }
    if let Some(replica) = &file.replica {
        let at = replica.repository.span().start;
        if let remote @ Target::Replica { .. } = replica.repository.get_ref() {
            return Err(in_main(at, Problem::RepositoryRemote(remote.clone())));
        }
        let has_tls = replica
            .tls
            .as_ref()
            .is_some_and(|tls| tls.get_ref().client_ca.is_some());
        if replica.listen.is_some() && !has_tls {
            return Err(in_main(at, Problem::ReplicaWithoutTls));
        }
    }
    Ok(Config {
        file: main.to_owned(),
        ring_dir: base.join(file.ring_dir),
        ring_budget: file.ring_budget.0,
        workers: file.workers,
        log_level: file.log_level.into_inner(),
        listeners,
        images_socket: base.join(file.nbd.images),
        api_socket,
        metrics,
        guest_state: base.join(file.guest_state),
        groups,
        replica: file.replica,
    })
}

fn problem_at(file: &Path, text: &str, offset: usize, problem: Problem) -> ConfigError {
    ConfigError::Value {
        place: place(file, text, offset),
        problem,
    }
}

fn place(file: &Path, text: &str, offset: usize) -> Place {
    Place {
        file: file.to_owned(),
        line: line_of(text, offset),
    }
}

fn check_groups(
    base: &Path,
    claims: &Path,
    sourced: &[Sourced<'_>],
    ship_tls: Option<&super::ClientTls>,
    budget: Size,
) -> Result<Vec<GroupConfig>, ConfigError> {
    let mut named: HashMap<String, Place> = HashMap::new();
    let mut paths: HashMap<PathBuf, String> = HashMap::new();
    let mut rings: u64 = 0;
    let mut groups = Vec::with_capacity(sourced.len());
    for Sourced { file, text, group } in sourced {
        let at = |offset: usize, problem| problem_at(file, text, offset, problem);
        let name = check_name(&group.name).map_err(|(offset, problem)| at(offset, problem))?;
        let start = group.name.span().start;
        let here = place(file, text, start);
        if let Some(first) = named.insert(name.clone(), here.clone()) {
            return Err(at(start, Problem::GroupTwice { name, first }));
        }
        if group.disk.is_empty() {
            return Err(at(start, Problem::NoDisks(name)));
        }
        if group.disk.len() > DISKS_MAX {
            return Err(at(start, Problem::DisksTooMany(name)));
        }
        let log_path = match &group.log.path {
            Some(path) => base.join(path),
            None => Path::new("/var/lib/afterimage").join(format!("{name}.log")),
        };
        let log_size = *group.log.size.get_ref();
        if log_size.0 < LOG_BYTES_MIN {
            let offset = group.log.size.span().start;
            return Err(at(offset, Problem::LogTooSmall(log_size)));
        }
        let ring = *group.ring.get_ref();
        let ring_at = group.ring.span().start.max(start);
        if ring.0 < RING_BYTES_MIN {
            return Err(at(ring_at, Problem::RingTooSmall(ring)));
        }
        rings = rings.saturating_add(ring.0);
        if rings > budget.0 {
            let total = Size(rings);
            return Err(at(ring_at, Problem::RingBudget { total, budget }));
        }
        claim(&mut paths, &log_path, format!("the log of '{name}'"))
            .map_err(|problem| at(start, problem))?;
        let mut disks: Vec<DiskConfig> = Vec::new();
        for disk in &group.disk {
            let disk_name =
                check_name(&disk.name).map_err(|(offset, problem)| at(offset, problem))?;
            if disks.iter().any(|other| other.name == disk_name) {
                let problem = Problem::DiskTwice {
                    group: name.clone(),
                    disk: disk_name,
                };
                return Err(at(disk.name.span().start, problem));
            }
            let path = base.join(disk.path.get_ref());
            claim(
                &mut paths,
                &path,
                format!("the backing of '{name}/{disk_name}'"),
            )
            .map_err(|problem| at(disk.path.span().start, problem))?;
            disks.push(DiskConfig {
                name: disk_name,
                path,
                raw: disk.raw,
            });
        }
        if let Some(schedule) = &group.checkpoint {
            check_checkpoint(schedule, !group.guest.is_empty())
                .map_err(|problem| at(start, problem))?;
        }
        let guest = check_guest(base, &name, &group.guest)
            .map_err(|(offset, problem)| at(offset, problem))?;
        let to = check_sinks(&name, &group.to, ship_tls)
            .map_err(|(offset, problem)| at(offset, problem))?;
        groups.push(GroupConfig {
            name,
            place: here,
            log_path,
            log_size: log_size.0,
            claims: claims.to_owned(),
            ring_size: ring.0,
            to,
            ship_interval: group.ship_interval.0,
            commit_interval: group.commit_interval.0,
            ack: group.ack,
            on_log_error: group.on_log_error,
            on_backing_error: group.on_backing_error,
            pass_rate: group.pass_rate.map(|rate| rate.0),
            checkpoint: group.checkpoint.clone(),
            guest,
            freeze_limit: group
                .checkpoint
                .as_ref()
                .and_then(|checkpoint| checkpoint.freeze_limit)
                .unwrap_or_else(default_freeze_limit)
                .0,
            disks,
        });
    }
    Ok(groups)
}

fn check_name(name: &Spanned<String>) -> Result<String, (usize, Problem)> {
    match names::validate(name.get_ref()) {
        Ok(()) => Ok(name.get_ref().clone()),
        Err(reason) => Err((
            name.span().start,
            Problem::Name {
                name: name.get_ref().escape_debug().to_string(),
                reason,
            },
        )),
    }
}

fn claim(paths: &mut HashMap<PathBuf, String>, path: &Path, as_: String) -> Result<(), Problem> {
    match paths.insert(path.to_owned(), as_) {
        None => Ok(()),
        Some(first) => Err(Problem::PathTwice {
            path: path.to_owned(),
            first,
        }),
    }
}

fn check_checkpoint(wanted: &Checkpoint, has_guest: bool) -> Result<(), Problem> {
    let nothing_else = wanted.app.is_none() && wanted.freeze_limit.is_none();
    if wanted.every.is_some() || wanted.cron.is_some() || nothing_else {
        check_schedule(wanted.every.as_ref(), wanted.cron.as_ref())?;
    }
    if let Some(app) = &wanted.app {
        check_schedule(app.every.as_ref(), app.cron.as_ref())?;
        if !has_guest {
            return Err(Problem::AppWithoutGuest);
        }
    }
    let limit = wanted.freeze_limit.unwrap_or_else(default_freeze_limit).0;
    if !(FREEZE_LIMIT_MIN..=FREEZE_LIMIT_MAX).contains(&limit) {
        return Err(Problem::FreezeLimit(limit));
    }
    Ok(())
}

/// `{group}` in paths and commands becomes the group's name, which is safe in a path.
fn check_guest(
    base: &Path,
    group: &str,
    guest: &[Spanned<GuestAgent>],
) -> Result<Vec<AgentSpec>, (usize, Problem)> {
    let named = |text: &str| text.replace("{group}", group);
    let all = |texts: &[String]| texts.iter().map(|text| named(text)).collect::<Vec<_>>();
    let mut agents = Vec::new();
    for (number, spanned) in guest.iter().enumerate() {
        let agent = spanned.get_ref();
        let commands = !agent.freeze.is_empty() && !agent.thaw.is_empty();
        let either = !agent.freeze.is_empty() || !agent.thaw.is_empty();
        let way = match &agent.qga {
            Some(socket) if !either => Way::Qga {
                socket: base.join(named(&socket.to_string_lossy())),
                mounts: agent.mounts.clone(),
            },
            None if commands && agent.mounts.is_empty() => Way::Exec {
                freeze: all(&agent.freeze),
                thaw: all(&agent.thaw),
                timeout: agent.timeout.0,
            },
            _ => return Err((spanned.span().start, Problem::GuestWay)),
        };
        let name = agent.name.clone().unwrap_or_else(|| match number {
            0 => "guest".to_owned(),
            _ => format!("guest{}", number + 1),
        });
        agents.push(AgentSpec { name, way });
    }
    Ok(agents)
}

fn check_schedule(every: Option<&Interval>, cron: Option<&Spanned<String>>) -> Result<(), Problem> {
    match (every, cron) {
        (Some(every), None) if !every.0.is_zero() => Ok(()),
        (None, Some(cron)) => match cron.get_ref().parse::<croner::Cron>() {
            Ok(_) => Ok(()),
            Err(_) => Err(Problem::Cron(cron.get_ref().clone())),
        },
        _ => Err(Problem::Schedule),
    }
}

fn check_sinks(
    group: &str,
    to: &[Spanned<Sink>],
    ship_tls: Option<&super::ClientTls>,
) -> Result<Vec<SinkConfig>, (usize, Problem)> {
    let mut seen = HashSet::new();
    let mut sinks = Vec::new();
    for sink in to {
        let at = sink.span().start;
        let Sink { url, tls } = sink.get_ref();
        if sinks.len() == SINKS_MAX {
            return Err((at, Problem::SinksTooMany(group.to_owned())));
        }
        if !seen.insert(url.clone()) {
            let problem = Problem::SinkTwice {
                group: group.to_owned(),
                url: url.to_string(),
            };
            return Err((at, problem));
        }
        let tls = tls.as_ref().or(ship_tls).cloned();
        if matches!(url, Target::Replica { .. }) && tls.is_none() {
            return Err((at, Problem::SinkWithoutTls(url.to_string())));
        }
        sinks.push(SinkConfig {
            url: url.clone(),
            tls,
        });
    }
    Ok(sinks)
}

fn check_listeners(
    listen: &[Spanned<Listener>],
    groups: &[GroupConfig],
) -> Result<Vec<Listener>, (usize, Problem)> {
    let mut listeners: Vec<Listener> = Vec::new();
    for spanned in listen {
        let at = spanned.span().start;
        let listener = spanned.get_ref();
        let address = &listener.address;
        if listeners.iter().any(|other| other.address == *address) {
            return Err((at, Problem::ListenerTwice(address.clone())));
        }
        if listener.groups.as_ref().is_some_and(Vec::is_empty) {
            return Err((at, Problem::ListenerNoGroups(address.clone())));
        }
        if let Some(unknown) = listener
            .groups
            .iter()
            .flatten()
            .find(|name| !groups.iter().any(|group| group.name == *name.get_ref()))
        {
            let name = unknown.get_ref().escape_debug().to_string();
            return Err((unknown.span().start, Problem::ListenerGroup(name)));
        }
        if address.is_remote() && listener.tls.is_none() && !listener.plaintext {
            return Err((at, Problem::ListenerPlaintext(address.clone())));
        }
        if matches!(address, ListenAddress::Unix(_)) && listener.tls.is_some() {
            return Err((at, Problem::ListenerUnixTls(address.clone())));
        }
        listeners.push(listener.clone());
    }
    Ok(listeners)
}

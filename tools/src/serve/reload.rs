//! SIGHUP: reads the configuration again, applies what can change while guests run, and says what
//! the rest needs.
//!
//! Live are: `log_level`, and of a group `ship_interval`, `pass_rate` and `checkpoint`. A group's
//! disks, log and ring are what they were at the start. Every difference is named, so that nobody
//! takes a changed file for a changed daemon. A file with an error changes nothing.

use std::sync::Arc;

use toml::Spanned;
use tracing_subscriber::registry::Registry;
use tracing_subscriber::{EnvFilter, reload};

use super::group::Running;
use super::targets;
use crate::config::units::Interval;
use crate::config::{Config, GroupConfig};

/// Environment variable that goes before `log_level`.
const LOG_VARIABLE: &str = "AFTERIMAGE_LOG";

/// Which messages are let out, changeable.
pub(super) struct LogFilter(reload::Handle<EnvFilter, Registry>);

impl LogFilter {
    /// A filter as the environment says, or else the configuration.
    pub(super) fn new(log_level: &str) -> (reload::Layer<EnvFilter, Registry>, Self) {
        let filter = EnvFilter::try_from_env(LOG_VARIABLE)
            .or_else(|_| EnvFilter::try_new(log_level))
            .unwrap_or_else(|_| EnvFilter::new("info"));
        let (layer, handle) = reload::Layer::new(filter);
        (layer, Self(handle))
    }

    /// Whether it could be set; if not, why.
    fn set(&self, log_level: &str) -> Result<(), LogFilterError> {
        if std::env::var_os(LOG_VARIABLE).is_some() {
            return Err(LogFilterError::Environment);
        }
        self.0.reload(EnvFilter::try_new(log_level)?)?;
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
enum LogFilterError {
    #[error("the environment's {LOG_VARIABLE} goes before it")]
    Environment,
    #[error(transparent)]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    #[error(transparent)]
    Reload(#[from] reload::Error),
}

/// What is in force: the configuration of the start, with what was applied since.
pub(super) struct Live {
    config: Config,
    filter: LogFilter,
}

impl Live {
    /// As it was started.
    pub(super) fn new(config: &Config, filter: LogFilter) -> Self {
        Self {
            config: config.clone(),
            filter,
        }
    }

    /// Applies what can be, and logs what is different.
    pub(super) fn reload(&mut self, groups: &[Arc<Running>]) {
        let read = match Config::load(Some(&self.config.file)) {
            Ok(read) => read,
            Err(error) => {
                tracing::error!(%error, "the configuration has an error; everything goes on as before");
                return;
            }
        };
        let mut applied = Vec::new();
        if read.log_level != self.config.log_level {
            match self.filter.set(&read.log_level) {
                Ok(()) => applied.push(format!("log_level is {}", read.log_level)),
                Err(why) => tracing::warn!("log_level stays as it is: {why}"),
            }
            self.config.log_level.clone_from(&read.log_level);
        }
        for group in groups {
            let known = &mut self.config.groups;
            let known = known
                .iter_mut()
                .find(|known| known.name == group.config.name);
            if let (Some(known), Some(read)) = (known, read.group(&group.config.name)) {
                applied.extend(apply(group, known, read));
            }
        }
        for change in &applied {
            tracing::info!("configuration applied: {change}");
        }
        let differences = differences(&self.config, &read);
        if differences.is_empty() && applied.is_empty() {
            tracing::info!("the configuration is what runs already");
        }
        for difference in differences {
            tracing::warn!("configuration changed: {difference}");
        }
    }
}

/// Applies what can change of a running group; says what.
fn apply(running: &Running, known: &mut GroupConfig, read: &GroupConfig) -> Vec<String> {
    let mut applied = Vec::new();
    let name = &known.name;
    if (known.ship_interval, known.pass_rate) != (read.ship_interval, read.pass_rate) {
        let tuning = targets::ship_config(read).tuning();
        for target in &running.targets {
            target.tuning.send_replace(tuning);
        }
        applied.push(format!(
            "group '{name}' ships every {:?}, a pass reads {} bytes per second",
            read.ship_interval,
            read.pass_rate
                .map_or("any number of".to_owned(), |rate| format!("at most {rate}")),
        ));
    }
    if schedule_text(known) != schedule_text(read) {
        let plain = targets::schedule(running, read);
        match plain.and_then(|plain| Ok((plain, targets::app_schedule(running, read)?))) {
            Ok((plain, app)) => {
                running.set_schedules(plain, app);
                applied.push(format!(
                    "group '{name}' takes checkpoints {}",
                    schedule_text(read)
                ));
            }
            Err(error) => tracing::error!(group = %name, %error, "the schedule stays as it is"),
        }
    }
    take_live(known, read);
    applied
}

/// Makes the parts equal that can change live.
fn take_live(known: &mut GroupConfig, read: &GroupConfig) {
    known.ship_interval = read.ship_interval;
    known.pass_rate = read.pass_rate;
    known.checkpoint.clone_from(&read.checkpoint);
}

/// A group's schedules in words, the same for the same schedules.
fn schedule_text(group: &GroupConfig) -> String {
    let one = |every: Option<&Interval>, cron: Option<&Spanned<String>>| match (every, cron) {
        (Some(every), _) => format!("every {:?}", every.0),
        (None, Some(cron)) => format!("at cron times \"{}\"", cron.get_ref()),
        (None, None) => "on demand only".to_owned(),
    };
    let wanted = group.checkpoint.as_ref();
    let plain = wanted.map_or((None, None), |w| (w.every.as_ref(), w.cron.as_ref()));
    let app = wanted.and_then(|wanted| wanted.app.as_ref());
    let plain = one(plain.0, plain.1);
    app.map_or(plain.clone(), |app| {
        let app = one(app.every.as_ref(), app.cron.as_ref());
        format!("{plain}, application-consistent ones {app}")
    })
}

/// Each difference and what makes it live.
fn differences(running: &Config, read: &Config) -> Vec<String> {
    let mut all = Vec::new();
    let text = |value: &dyn std::fmt::Debug| format!("{value:?}");
    for (what, old, new) in [
        (
            "[nbd] listen",
            text(&running.listeners),
            text(&read.listeners),
        ),
        (
            "[nbd] images",
            text(&running.images_socket),
            text(&read.images_socket),
        ),
        (
            "[http]",
            text(&(&running.api_socket, running.metrics)),
            text(&(&read.api_socket, read.metrics)),
        ),
        ("ring_dir", text(&running.ring_dir), text(&read.ring_dir)),
        (
            "ring_budget",
            text(&running.ring_budget),
            text(&read.ring_budget),
        ),
        (
            "guest_state",
            text(&running.guest_state),
            text(&read.guest_state),
        ),
        ("workers", text(&running.workers), text(&read.workers)),
        ("[replica]", replica(running), replica(read)),
    ] {
        if old != new {
            all.push(format!("{what}: live after a restart"));
        }
    }
    for group in &read.groups {
        match running.group(&group.name) {
            None => all.push(format!(
                "group '{}' is new: live after a restart",
                group.name
            )),
            Some(old) if summary(old) != summary(group) => {
                all.push(format!(
                    "group '{}': live after a restart; its clients reconnect",
                    group.name
                ));
            }
            Some(_) => {}
        }
    }
    for group in &running.groups {
        if read.group(&group.name).is_none() {
            all.push(format!(
                "group '{}' is gone from the configuration and runs on; run 'afterimage detach {}' before the next restart",
                group.name, group.name
            ));
        }
    }
    all
}

fn replica(config: &Config) -> String {
    let replica = config.replica.as_ref();
    format!(
        "{:?}",
        replica.map(|r| (
            r.listen,
            r.repository.get_ref(),
            r.tls.as_ref().map(|tls| tls.get_ref())
        ))
    )
}

/// All but the places in the file.
fn summary(group: &GroupConfig) -> String {
    let schedule = schedule_text(group);
    let mut group = group.clone();
    group.place.line = 0;
    group.checkpoint = None;
    format!("{group:?} {schedule}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check::assemble;
    use std::path::Path;

    fn config(text: &str) -> Config {
        assemble(Path::new("/a.toml"), text, &[]).expect("valid")
    }

    #[test]
    fn a_moved_line_is_no_change() {
        let group = "[[group]]\nname = \"a\"\n[[group.disk]]\nname = \"b\"\npath = \"/c\"\n";
        let old = config(group);
        assert!(differences(&old, &config(&format!("# more\n\n{group}"))).is_empty());
        let new = config(&group.replace("name = \"a\"", "name = \"a\"\nring = \"64MiB\""));
        assert_eq!(differences(&old, &new).len(), 1);
        let tuned = config(&group.replace(
            "name = \"a\"",
            "name = \"a\"\nship_interval = \"2s\"\npass_rate = \"1MiB\"\ncheckpoint = { cron = \"0 * * * *\" }",
        ));
        assert_eq!(differences(&old, &tuned).len(), 1);
        let app = |hours: u32| {
            let every = format!("every = \"1h\", app = {{ every = \"{hours}h\" }}");
            let guest = "\n[[group.guest]]\nqga = \"/a.sock\"\n";
            config(
                &(group.replace(
                    "name = \"a\"",
                    &format!("name = \"a\"\ncheckpoint = {{ {every} }}"),
                ) + guest),
            )
        };
        assert_eq!(differences(&app(4), &app(5)).len(), 1);
        let mut applied = old.clone();
        take_live(&mut applied.groups[0], &tuned.groups[0]);
        assert!(
            differences(&applied, &tuned).is_empty(),
            "all of it is live"
        );
        let renamed = differences(&old, &config(&group.replace("\"a\"", "\"z\"")));
        assert!(renamed[0].contains("'z' is new") && renamed[1].contains("detach a"));
    }
}

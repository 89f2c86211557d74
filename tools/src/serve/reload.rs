//! SIGHUP: reads the configuration again and says what a restart would change.
//!
//! Nothing is changed while guests run: a group's disks, log and ring are what they were at the
//! start. The report names each difference, so that nobody takes a changed file for a changed
//! daemon.

use crate::config::{Config, GroupConfig};

/// Logs what is different.
pub(super) fn report(running: &Config) {
    let read = match Config::load(Some(&running.file)) {
        Ok(read) => read,
        Err(error) => {
            tracing::error!(%error, "the configuration has an error; everything goes on as before");
            return;
        }
    };
    let differences = differences(running, &read);
    if differences.is_empty() {
        tracing::info!("the configuration is what runs already");
    }
    for difference in differences {
        tracing::warn!("configuration changed: {difference}");
    }
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

/// All but the place in the file.
fn summary(group: &GroupConfig) -> String {
    let mut group = group.clone();
    group.place.line = 0;
    format!("{group:?}")
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
        let renamed = differences(&old, &config(&group.replace("\"a\"", "\"z\"")));
        assert!(renamed[0].contains("'z' is new") && renamed[1].contains("detach a"));
    }
}

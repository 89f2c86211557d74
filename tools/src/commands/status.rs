//! `afterimage status`: how the groups are, at a glance.

use jiff::Timestamp;
use std::time::Duration;

use super::checkpoint::no_point_text;
use crate::api::client::Client;
use crate::api::types::{CheckpointDone, ClientStatus, GroupStatus, StatusReport, TargetStatus};
use crate::cli::output::{Output, age, bytes, duration, table, table_text};

/// Runs the command.
///
/// # Errors
/// When the daemon does not answer or does not know the group.
pub async fn run(client: &Client, group: Option<&str>, output: Output) -> anyhow::Result<()> {
    let report = client.status(group).await?;
    let now = Timestamp::now();
    output.result(&report, |report| text(report, now))?;
    Ok(())
}

/// The report for people.
fn text(report: &StatusReport, now: Timestamp) -> String {
    let mut text = String::new();
    if report.groups.is_empty() && report.received.is_empty() {
        text += "no groups: add a [[group]] to the configuration\n";
    }
    if !report.groups.is_empty() {
        let mut rows = table(&[
            "GROUP",
            "STATE",
            "RPO",
            "LOG",
            "GAP IN",
            "CLIENTS",
            "CHECKPOINT",
            "APP POINT",
        ]);
        for group in &report.groups {
            rows.add_row([
                group.name.clone(),
                group.state.clone(),
                rpo(group, now),
                format!("{}%", percent(group.log_used_bytes, group.log_bytes)),
                match group.gap_in_seconds {
                    Some(seconds) => duration(Duration::from_secs(seconds)),
                    None => "-".to_owned(),
                },
                group.connections.to_string(),
                since(group.last_checkpoint.as_ref(), now),
                since(group.last_application.as_ref(), now),
            ]);
        }
        text += &table_text(&rows);
        for group in &report.groups {
            text += &details(group, now);
        }
    }
    if !report.received.is_empty() {
        let mut rows = table(&[
            "RECEIVED", "EPOCH", "LAST LSN", "AGE", "PRIMARY", "VERIFIED", "COMPARED", "ALARM",
        ]);
        let ago = |time: Option<u64>| time.map_or("-".to_owned(), |t| age(t, now) + " ago");
        for group in &report.received {
            rows.add_row([
                group.name.clone(),
                group.epoch.to_string(),
                group.last_lsn.to_string(),
                group.last_wall_ns.map_or("-".to_owned(), |t| age(t, now)),
                if group.connected { "connected" } else { "away" }.to_owned(),
                ago(group.last_verified_wall_ns),
                ago(group.last_compared_wall_ns),
                if group.alarm.is_some() { "YES" } else { "-" }.to_owned(),
            ]);
        }
        text += &format!("\n{}", table_text(&rows));
        for group in &report.received {
            if let Some(alarm) = &group.alarm {
                text += &format!("\n{}: {alarm}\n", group.name);
            }
        }
    }
    if !report.exports.is_empty() {
        text += "\n";
        for export in &report.exports {
            for disk in &export.disks {
                text += &format!("image {}: {}\n", export.name, disk.uri);
            }
        }
    }
    text
}

fn since(point: Option<&CheckpointDone>, now: Timestamp) -> String {
    point.map_or("-".to_owned(), |point| {
        format!("{} ago", age(point.wall_ns, now))
    })
}

fn details(group: &GroupStatus, now: Timestamp) -> String {
    let mut text = String::new();
    if let Some(reason) = &group.reason {
        text += &format!("\n{}: {reason}\n", group.name);
    }
    let last = group.last_checkpoint.iter().flat_map(|p| &p.no_point_at);
    for no_point in last {
        let why = no_point_text(no_point);
        text += &format!("\n{}: last checkpoint: {why}", group.name);
    }
    if let Some(alarm) = &group.guest_alarm {
        text += &format!("\n{}: {alarm}\n", group.name);
    }
    for target in &group.targets {
        let mut line = format!("\n{} → {}: {}", group.name, target.url, target.state);
        if let Some(pass) = target.pass {
            let done = percent(pass.done_bytes, pass.total_bytes);
            line += &format!(", copied {done}% of {}", bytes(pass.total_bytes));
        }
        if target.backlog_bytes > 0 {
            line += &format!(", {} behind", bytes(target.backlog_bytes));
        }
        if let Some(time) = target.recoverable_wall_ns {
            line += &format!(", restorable up to {} ago", age(time, now));
        }
        if let Some(compared) = &target.compared {
            line += &match compared.over {
                true if compared.whole => ", the same as the disks".to_owned(),
                true if compared.mismatched_blocks == 0 => {
                    ", compared with the disks in part only".to_owned()
                }
                true => String::new(),
                false => format!(", {} ranges compared with the disks", compared.ranges),
            };
        }
        if target.differing_blocks > 0 {
            line += &format!(", {} blocks DIFFER from the disks", target.differing_blocks);
        }
        if target.behind {
            line += ", does not keep up";
        }
        line += match (target.gap, target.had_copy) {
            (true, true) => {
                "; history has a gap: unshipped writes had to leave the log, a new pass closes it"
            }
            (true, false) if target.pass.is_none() => "; it has no complete copy yet",
            _ => "",
        };
        if let Some(error) = &target.error {
            line += &format!("\n    {error}");
        }
        text += &line;
    }
    for (client, connections) in counted(&group.clients) {
        let ClientStatus { disk, peer } = client;
        text += &format!("\n{}/{disk} ← {peer}", group.name);
        if connections > 1 {
            text += &format!(", {connections} connections");
        }
    }
    if let Some(time) = group.last_verified_wall_ns {
        text += &format!("\n{}: history verified {} ago", group.name, age(time, now));
    }
    if let Some(time) = group.last_compared_wall_ns {
        let age = age(time, now);
        text += &format!("\n{}: compared with the disks {age} ago", group.name);
    }
    if let Some(verify) = group.verify.as_ref().filter(|verify| !verify.over) {
        let done = percent(verify.done_bytes, verify.total_bytes);
        text += &match &verify.failed {
            Some(why) => format!(
                "\n{}: a comparison of the disks broke off: {why}",
                group.name
            ),
            None if verify.waiting => {
                format!(
                    "\n{}: a comparison of the disks waits for a target",
                    group.name
                )
            }
            None => format!(
                "\n{}: the disks are being compared, {done}% read",
                group.name
            ),
        };
    }
    if let Some(why) = &group.verify_due {
        text += &format!("\n{}: a verify is due: {why}", group.name);
    }
    if !text.is_empty() {
        text += "\n";
    }
    text
}

/// Each client once, with the number of its connections.
fn counted(sorted: &[ClientStatus]) -> impl Iterator<Item = (&ClientStatus, usize)> {
    sorted
        .chunk_by(|a, b| a == b)
        .map(|same| (&same[0], same.len()))
}

/// The worst recovery point objective over the targets.
fn rpo(group: &GroupStatus, now: Timestamp) -> String {
    let targets = &group.targets;
    let oldest = targets.iter().map(|target| target.recoverable_wall_ns);
    let never = |t: &TargetStatus| t.recoverable_wall_ns.is_none() && !t.had_copy;
    match oldest.min() {
        None => "no target".to_owned(),
        Some(None) if targets.iter().any(never) => "not yet".to_owned(),
        Some(None) => "?".to_owned(),
        Some(Some(time)) => age(time, now),
    }
}

fn percent(part: u64, whole: u64) -> u64 {
    match whole {
        0 => 0,
        whole => (u128::from(part) * 100 / u128::from(whole)) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::ReceivedStatus;

    #[test]
    fn trouble_is_visible_at_a_glance() {
        let now = Timestamp::from_second(1000).expect("a time");
        let target = TargetStatus {
            url: "afterimage://dr:9471".into(),
            state: "away".into(),
            error: Some("connection refused".into()),
            recoverable_wall_ns: Some(940_000_000_000),
            backlog_bytes: 5 << 20,
            gap: true,
            had_copy: true,
            ..TargetStatus::default()
        };
        let client = ClientStatus {
            disk: "vda".into(),
            peer: "process 7 of user 64055".into(),
        };
        let group = GroupStatus {
            name: "vm1".into(),
            clients: vec![client.clone(), client],
            last_application: Some(CheckpointDone {
                wall_ns: 700_000_000_000,
                ..CheckpointDone::default()
            }),
            state: "degraded".into(),
            log_bytes: 100,
            log_used_bytes: 42,
            gap_in_seconds: Some(3700),
            targets: vec![target],
            ..GroupStatus::default()
        };
        let received = ReceivedStatus {
            name: "vm2".into(),
            alarm: Some("a pass does not add up".into()),
            last_verified_wall_ns: Some(580_000_000_000),
            last_compared_wall_ns: Some(280_000_000_000),
            ..ReceivedStatus::default()
        };
        let report = StatusReport {
            groups: vec![group],
            received: vec![received],
            ..StatusReport::default()
        };
        let text = text(&report, now);
        for part in [
            "degraded",
            "1 min 0 s",
            "42%",
            "1 h 1 min",
            "away",
            "history has a gap",
            "connection refused",
            "5.0 MiB behind",
            "vm1/vda ← process 7 of user 64055, 2 connections",
            "5 min 0 s ago",
            "vm2: a pass does not add up",
            "7 min 0 s ago",
            "12 min 0 s ago",
            "YES",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[test]
    fn a_first_copy_is_no_gap_and_a_copy_that_was_is_not_awaited() {
        let now = Timestamp::from_second(1000).expect("a time");
        let shown = |state: &str, had_copy, recoverable_wall_ns| {
            let target = TargetStatus {
                state: state.into(),
                gap: true,
                had_copy,
                recoverable_wall_ns,
                pass: (state == "copying").then(Default::default),
                ..TargetStatus::default()
            };
            let group = GroupStatus {
                targets: vec![target],
                ..GroupStatus::default()
            };
            text(
                &StatusReport {
                    groups: vec![group],
                    ..StatusReport::default()
                },
                now,
            )
        };
        for state in ["away", "connecting", "copying"] {
            let first = shown(state, false, None);
            assert!(!first.contains("gap:") && !first.contains("has a gap"));
            assert!(first.contains("not yet"), "{first}");
            let again = shown(state, true, Some(940_000_000_000));
            assert!(again.contains("history has a gap"), "{again}");
            assert!(again.contains("1 min 0 s"), "{again}");
            assert!(!shown(state, true, None).contains("not yet"));
        }
        assert!(shown("away", false, None).contains("no complete copy yet"));
    }

    #[test]
    fn a_new_daemon_says_what_to_do() {
        let now = Timestamp::UNIX_EPOCH;
        assert!(text(&StatusReport::default(), now).contains("add a [[group]]"));
    }
}

//! Processes of a freeze command that may still freeze.
//!
//! They are told by their environment, which names the checkpoint: so they are found by another
//! process than the one that began them, also in a session of their own, and a process that has
//! their number by now is not taken for one of them.

use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::time::Duration;

const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Those that live, but for zombies; `group` is a process group that holds nothing else.
fn living(checkpoint: &str, group: Option<Pid>) -> Vec<Pid> {
    let marks = [
        format!("AFTERIMAGE_CHECKPOINT={checkpoint}").into_bytes(),
        b"AFTERIMAGE_STEP=freeze".to_vec(),
    ];
    let Ok(all) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let numbers = all.flatten().filter_map(|entry| {
        let number: i32 = entry.file_name().to_str()?.parse().ok()?;
        Pid::from_raw(number)
    });
    let ours = numbers.filter(|pid| {
        let folder = format!("/proc/{}", pid.as_raw_nonzero());
        // Behind the name, which may hold anything: state, parent, group, session, ...
        let stat = fs::read_to_string(format!("{folder}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split(' ');
        let state = fields.nth(1).unwrap_or("X");
        let in_group = fields.nth(1).and_then(|text| text.parse().ok());
        // The leader of a process that has ended while other threads of it go on is a zombie, too.
        let threads = fields.nth(14).unwrap_or("1");
        if matches!(state, "X" | "x") || (state == "Z" && matches!(threads, "0" | "1")) {
            return false;
        }
        if group.is_some_and(|group| in_group == Some(group.as_raw_nonzero().get())) {
            return true;
        }
        let environment = fs::read(format!("{folder}/environ")).unwrap_or_default();
        let entries = || environment.split(|byte| *byte == 0);
        marks
            .iter()
            .all(|mark| entries().any(|entry| entry == mark))
    });
    ours.collect()
}

/// Kills them, again and again, until none lives or so long has passed. Those that live; none if that
/// cannot be told: what such a process waits for may hold up whoever looks at it, too.
pub(super) async fn end(
    checkpoint: &str,
    group: Option<Pid>,
    within: Duration,
) -> Option<Vec<Pid>> {
    let begun = tokio::time::Instant::now();
    loop {
        let own = checkpoint.to_owned();
        let look = tokio::task::spawn_blocking(move || living(&own, group));
        let rest = within.saturating_sub(begun.elapsed());
        let left = tokio::time::timeout(rest.max(LOOK_EVERY), look).await;
        let left = left.ok()?.ok()?;
        if left.is_empty() || begun.elapsed() >= within {
            return Some(left);
        }
        for pid in left {
            // Gone already: fine.
            kill_process(pid, Signal::KILL).ok();
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

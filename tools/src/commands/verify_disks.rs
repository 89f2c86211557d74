//! `afterimage verify GROUP --disks`: has every target compare what it holds with the disks.

use anyhow::bail;
use serde::Serialize;
use std::time::Duration;

use crate::api::client::Client;
use crate::api::types::{ComparedStatus, GroupStatus, TargetStatus, VerifyStatus};
use crate::cli::output::{Output, bytes};

/// How often the daemon is asked how far it is.
const LOOK: Duration = Duration::from_millis(200);

/// What came of it, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Compared {
    group: String,
    run: u64,
    disk_bytes: u64,
    targets: Vec<AtTarget>,
}

/// At one target.
#[derive(Debug, Serialize)]
struct AtTarget {
    url: String,
    /// None if the target was not in step, or went away.
    compared: Option<ComparedStatus>,
}

/// Runs the command.
///
/// # Errors
/// The daemon does not answer or refuses, a target was not compared, or a block differs.
pub async fn run(client: &Client, group: &str, output: Output) -> anyhow::Result<()> {
    let begun = client.verify(group).await?;
    output.aside(&format!(
        "{group}: the disks are being read; interrupting this command does not stop it, 'afterimage status {group}' shows it"
    ));
    let reading = output.bytes_bar("read", begun.total_bytes);
    let comparing = loop {
        tokio::time::sleep(LOOK).await;
        let status = of_group(client, group).await?;
        let verify = same_run(&status, &begun)?;
        reading.set_position(verify.done_bytes);
        reading.set_message(if verify.waiting {
            "waits for a target"
        } else {
            "read"
        });
        if verify.over {
            reading.finish_and_clear();
            break output.count_bar("ranges compared", verify.ranges);
        }
    };
    let targets = loop {
        let status = of_group(client, group).await?;
        same_run(&status, &begun)?;
        let in_step: Vec<&TargetStatus> = status
            .targets
            .iter()
            .filter(|t| t.state == "shipping")
            .collect();
        let said = |target: &TargetStatus| target.compared.clone().filter(|c| c.run == begun.run);
        let far = in_step
            .iter()
            .map(|t| said(t).map_or(0, |c| c.ranges.saturating_add(c.skipped)))
            .min();
        comparing.set_position(far.unwrap_or(0));
        let over = |target: &&TargetStatus| said(target).is_some_and(|c| c.over);
        if !in_step.is_empty() && in_step.iter().all(over) {
            break status
                .targets
                .iter()
                .map(|target| AtTarget {
                    url: target.url.clone(),
                    compared: said(target).filter(|c| c.over),
                })
                .collect::<Vec<_>>();
        }
        tokio::time::sleep(LOOK).await;
    };
    comparing.finish_and_clear();
    let compared = Compared {
        group: group.to_owned(),
        run: begun.run,
        disk_bytes: begun.total_bytes,
        targets,
    };
    output.result(&compared, text)?;
    let not_whole = |target: &&AtTarget| !target.compared.as_ref().is_some_and(|c| c.whole);
    match compared.targets.iter().filter(not_whole).count() {
        0 => Ok(()),
        count => bail!(
            "{count} of {} targets are not known to hold what the disks do",
            compared.targets.len()
        ),
    }
}

async fn of_group(client: &Client, group: &str) -> anyhow::Result<GroupStatus> {
    let report = client.status(Some(group)).await?;
    let found = report
        .groups
        .into_iter()
        .find(|status| status.name == group);
    found.ok_or_else(|| anyhow::anyhow!("group '{group}' is not served here any more"))
}

fn same_run<'a>(status: &'a GroupStatus, begun: &VerifyStatus) -> anyhow::Result<&'a VerifyStatus> {
    let group = &status.name;
    match &status.verify {
        Some(verify) if verify.run == begun.run => match &verify.failed {
            Some(why) => bail!("'{group}': the comparison broke off: {why}"),
            None => Ok(verify),
        },
        _ => bail!("'{group}': the comparison was ended by a restart or by another one; ask again"),
    }
}

fn text(compared: &Compared) -> String {
    let mut text = String::new();
    for target in &compared.targets {
        let said = match &target.compared {
            None => "not compared: it is away, or its copy is not complete".to_owned(),
            Some(said) => words(said),
        };
        text += &format!("{} at {}: {said}\n", compared.group, target.url);
    }
    text
}

fn words(said: &ComparedStatus) -> String {
    if said.whole {
        return format!(
            "all {} are the same ({} ranges)",
            bytes(said.bytes),
            said.ranges
        );
    }
    let total = said.total.unwrap_or(0);
    let missing = total.saturating_sub(said.ranges + said.skipped);
    let mut parts = Vec::new();
    if said.mismatched_blocks > 0 {
        parts.push(format!("{} blocks DIFFER", said.mismatched_blocks));
    }
    if said.skipped > 0 {
        parts.push(format!("{} ranges could NOT be compared", said.skipped));
    }
    if missing > 0 {
        parts.push(format!("{missing} ranges never came"));
    }
    if said.total.is_none() {
        parts.push("its end never came: the history got a gap".to_owned());
    }
    format!(
        "{}; {} ranges compared; see \"When a comparison finds differences\" in docs/operating.md",
        parts.join(", "),
        said.ranges
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(ranges: u64, mismatched_blocks: u64, skipped: u64) -> ComparedStatus {
        ComparedStatus {
            run: 1,
            ranges,
            bytes: ranges << 20,
            mismatched_blocks,
            skipped,
            total: Some(10),
            over: true,
            whole: (ranges, mismatched_blocks) == (10, 0),
        }
    }

    #[test]
    fn nothing_that_is_not_equal_reads_as_if_it_were() {
        assert!(words(&said(10, 0, 0)).starts_with("all 10.0 MiB are the same"));
        assert!(words(&said(10, 3, 0)).starts_with("3 blocks DIFFER;"));
        assert!(words(&said(8, 0, 2)).starts_with("2 ranges could NOT be compared;"));
        assert!(words(&said(9, 0, 0)).starts_with("1 ranges never came;"));
        let cut_short = ComparedStatus {
            total: None,
            ..said(9, 0, 0)
        };
        assert!(words(&cut_short).starts_with("its end never came"));
    }

    #[test]
    fn another_run_is_not_taken_for_ours() {
        let begun = VerifyStatus {
            run: 5,
            ..VerifyStatus::default()
        };
        let mut status = GroupStatus {
            verify: Some(begun.clone()),
            ..GroupStatus::default()
        };
        assert!(same_run(&status, &begun).is_ok());
        status.verify = Some(VerifyStatus {
            run: 6,
            ..VerifyStatus::default()
        });
        assert!(same_run(&status, &begun).is_err());
        status.verify = Some(VerifyStatus {
            failed: Some("the log failed".into()),
            ..begun.clone()
        });
        let error = same_run(&status, &begun).expect_err("failed");
        assert!(error.to_string().contains("the log failed"));
        status.verify = None;
        assert!(same_run(&status, &begun).is_err());
    }
}

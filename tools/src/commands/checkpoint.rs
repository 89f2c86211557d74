//! `afterimage checkpoint`: asks the daemon for a checkpoint and prints what came of it.

use crate::api::client::Client;
use crate::api::types::{NoPoint, StepInfo};
use crate::cli::output::{Output, local_time};

/// Runs the command.
///
/// # Errors
/// When the daemon does not answer or refuses.
pub async fn run(
    client: &Client,
    group: &str,
    label: Option<&str>,
    app: bool,
    output: Output,
) -> anyhow::Result<()> {
    let mut told = 0;
    let done = if app {
        let step = |step: &StepInfo| {
            told += 1;
            output.note(&step_text(step));
        };
        client.app_checkpoint(group, label, step).await?
    } else {
        client.checkpoint(group, label).await?
    };
    output.result(&done, |done| {
        // Those that were told as they happened stand there already.
        let steps = done.steps.iter().skip(told);
        let steps: String = steps.map(|step| step_text(step) + "\n").collect();
        let label = done.label.as_deref().map(|l| format!(" '{l}'"));
        let mut text = format!(
            "{steps}checkpoint{} of {} at lsn:{}, {} ({}-consistent)",
            label.unwrap_or_default(),
            done.group,
            done.lsn,
            local_time(done.wall_ns),
            done.kind
        );
        for no_point in &done.no_point_at {
            text += &format!("\n{}", no_point_text(no_point));
        }
        text
    })?;
    let freeze = done.freeze.as_ref();
    if let Some(why) = freeze.and_then(|freeze| freeze.reason.as_ref()) {
        anyhow::bail!("the point is crash-consistent only: {why}");
    }
    Ok(())
}

fn step_text(step: &StepInfo) -> String {
    format!("{:>10.3} ms  {}", step.at_us as f64 / 1e3, step.what)
}

/// Why a checkpoint cannot be restored from a target, for people.
#[must_use]
pub fn no_point_text(no_point: &NoPoint) -> String {
    let verdict = match no_point.certain {
        true => "is NO recovery point",
        false => "may be no recovery point",
    };
    format!("it {verdict} at {}: {}", no_point.target, no_point.reason)
}

//! Commands that ask the daemon one thing and print its answer: `checkpoint`, `detach`.

use crate::api::client::Client;
use crate::cli::output::{Output, local_time};

/// `afterimage checkpoint`.
///
/// # Errors
/// When the daemon does not answer or refuses.
pub async fn checkpoint(
    client: &Client,
    group: &str,
    label: Option<&str>,
    output: Output,
) -> anyhow::Result<()> {
    let done = client.checkpoint(group, label).await?;
    output.result(&done, |done| {
        let label = done.label.as_deref().map(|l| format!(" '{l}'"));
        format!(
            "checkpoint{} of {} at lsn:{}, {} ({}-consistent)",
            label.unwrap_or_default(),
            done.group,
            done.lsn,
            local_time(done.wall_ns),
            done.kind
        )
    })?;
    Ok(())
}

/// `afterimage detach`.
///
/// # Errors
/// When the daemon does not answer or refuses.
pub async fn detach(client: &Client, group: &str, output: Output) -> anyhow::Result<()> {
    let done = client.detach(group).await?;
    output.result(&done, |done| {
        format!(
            "{} is detached; these are plain, complete and current:\n{}",
            done.group,
            done.disks.join("\n")
        )
    })?;
    Ok(())
}

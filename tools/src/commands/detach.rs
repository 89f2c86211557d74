//! `afterimage detach`: has the daemon make a group's disks plain, and shows how far that is.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use crate::api::client::Client;
use crate::cli::output::Output;

/// Between two looks at how much is left.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Runs the command.
///
/// # Errors
/// When the daemon does not answer or refuses.
pub async fn run(client: &Client, group: &str, output: Output) -> anyhow::Result<()> {
    let bar = output.bytes_bar("detaching", 0);
    let detaching = client.detach(group);
    let done = if bar.is_hidden() {
        detaching.await
    } else {
        let mut pause = Duration::ZERO;
        let left = async || {
            tokio::time::sleep(std::mem::replace(&mut pause, LOOK_EVERY)).await;
            let report = client.status(Some(group)).await.ok()?;
            Some(report.groups.first()?.log_undestaged_bytes)
        };
        let tell = |done, all| {
            bar.set_length(all);
            bar.set_position(done);
        };
        watched(detaching, left, tell).await
    };
    bar.finish_and_clear();
    output.result(&done?, |done| {
        format!(
            "{} is detached; these are plain, complete and current:\n{}",
            done.group,
            done.disks.join("\n")
        )
    })?;
    Ok(())
}

/// What the work brings. Until then `left` is asked again and again how many bytes it has before it,
/// and `tell` is told how many are done, of how many.
async fn watched<T>(
    work: impl Future<Output = T>,
    mut left: impl AsyncFnMut() -> Option<u64>,
    mut tell: impl FnMut(u64, u64),
) -> T {
    let mut work = pin!(work);
    let mut all = 0;
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            left = left() => {
                // It fails when the daemon has other things to do; the work tells what is wrong.
                if let Some(left) = left {
                    all = left.max(all);
                    tell(all - left, all);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::watched;

    #[tokio::test]
    async fn what_is_done_is_told_until_the_work_ends() {
        let (end, work) = tokio::sync::oneshot::channel();
        let mut end = Some(end);
        let mut lefts = [Some(100), Some(120), None, Some(50), Some(0)].into_iter();
        let left = async || {
            let left = lefts.next().expect("asked after the end");
            if left == Some(0) {
                let end = end.take().expect("once");
                end.send("plain").expect("waited for");
            }
            left
        };
        let mut told = Vec::new();
        let done = watched(work, left, |done, all| told.push((done, all))).await;
        assert_eq!(done, Ok("plain"));
        assert_eq!(told, [(0, 100), (0, 120), (70, 120), (120, 120)]);
    }
}

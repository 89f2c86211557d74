//! `afterimage verify`: reads back and checks everything that a replica has.

use afterimage_replica::group::Group;
use afterimage_replica::repository::Repository;
use afterimage_replica::verify::{VerifyReport, kept, verify};
use anyhow::bail;

use crate::cli::output::{Output, bytes};
use crate::serve::open::wall_ns;

/// Runs the command.
///
/// # Errors
/// The repository cannot be read, or something in it is damaged.
pub async fn run(
    repository: &Repository,
    group: Option<&str>,
    output: Output,
) -> anyhow::Result<()> {
    let names = match group {
        Some(group) => vec![group.to_owned()],
        None => Group::names(repository).await?,
    };
    let bar = output.counter("objects read");
    let mut reports: Vec<VerifyReport> = Vec::new();
    for name in &names {
        let before: u64 = reports.iter().map(|report| report.read.objects).sum();
        let report = verify(repository, name, |at| bar.set_position(before + at.objects)).await?;
        // A copy that cannot be written can be checked all the same.
        if let Err(error) = kept::keep(repository, &report, wall_ns()).await {
            eprintln!("the result for {name} could not be kept: {error}");
        }
        reports.push(report);
    }
    bar.finish_and_clear();
    output.result(&reports, |reports| {
        let mut text = String::new();
        for report in reports {
            let state = match report.problems.len() {
                0 => "whole".to_owned(),
                count => format!("DAMAGED, {count} problems"),
            };
            text += &format!(
                "{}: {state}; {} objects, {}, {} checkpoints\n",
                report.group,
                report.read.objects,
                bytes(report.read.bytes),
                report.checkpoints
            );
            for problem in &report.problems {
                let at = problem.offset.map(|at| format!(" at byte {at}"));
                let at = at.unwrap_or_default();
                text += &format!(
                    "  {}{at}: {}; {}\n",
                    problem.key, problem.what, problem.advice
                );
            }
        }
        if reports.is_empty() {
            text += "the repository holds no groups\n";
        }
        text
    })?;
    let problems: usize = reports.iter().map(|report| report.problems.len()).sum();
    if problems > 0 {
        bail!("{problems} problems found");
    }
    Ok(())
}

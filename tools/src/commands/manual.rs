//! `afterimage completions` and `afterimage man`: generated from the command line itself.

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_complete::Shell;
use std::path::Path;

use crate::cli::Cli;
use crate::cli::output::Output;

/// Prints the completion script of a shell.
///
/// # Errors
/// When standard output cannot be written.
pub fn completions(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "afterimage", &mut script);
    Output::write(&String::from_utf8_lossy(&script))?;
    Ok(())
}

/// Writes the manual pages into a folder.
///
/// # Errors
/// When a page cannot be written.
pub fn pages(folder: &Path) -> anyhow::Result<()> {
    clap_mangen::generate_to(Cli::command(), folder)
        .with_context(|| format!("cannot write the manual pages to {}", folder.display()))
}

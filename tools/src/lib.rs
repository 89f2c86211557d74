//! The administrator's side of Afterimage: configuration, command line, API, metrics, and the
//! wiring of proxy and replica into one daemon.
#![forbid(unsafe_code)]

pub mod api;
pub mod cli;
pub mod commands;
pub mod config;
pub mod freezer;
pub mod metrics;
pub mod quickstart;
pub mod serve;

use anyhow::Context as _;
use api::client::Client;
use cli::output::{Output, reason};
use cli::{Cli, Command, ConfigCommand, GuestCommand, LogCommand, SegmentCommand};
use commands::history;
use config::{Config, ConfigError};
use std::process::ExitCode;

/// Exit code of a failure.
pub const EXIT_FAILED: u8 = 1;
/// Exit code of wrong usage, a wrong configuration included.
pub const EXIT_USAGE: u8 = 2;

/// Runs one command line and says how the process ends.
#[must_use]
pub fn run(cli: Cli) -> ExitCode {
    let output = Output::new(&cli.global);
    match dispatch(cli, output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("afterimage: {}", reason(&error));
            let usage = error.chain().any(|cause| cause.is::<ConfigError>());
            ExitCode::from(if usage { EXIT_USAGE } else { EXIT_FAILED })
        }
    }
}

fn dispatch(cli: Cli, output: Output) -> anyhow::Result<()> {
    let load = || Config::load(cli.global.config.as_deref());
    let client = || load().map(|config| Client::new(&config.api_socket));
    match cli.command {
        Command::Config(ConfigCommand::Check) => commands::config_check::run(&load()?, output),
        Command::Status { group } => {
            let group = group.as_ref().map(|group| group.as_str());
            wait_for(commands::status::run(&client()?, group, output))
        }
        Command::Checkpoint { group, label, app } => {
            let label = label.as_ref().map(|label| label.as_str());
            wait_for(commands::checkpoint::run(
                &client()?,
                group.as_str(),
                label,
                app,
                output,
            ))
        }
        Command::Guest(GuestCommand::Check { group, freeze }) => {
            commands::guest::check(&load()?, group.as_str(), freeze, output)
        }
        Command::GuestWatchdog { state, stay } => {
            let state = state.map_or_else(|| load().map(|config| config.guest_state), Ok)?;
            commands::guest::watchdog(&state, stay)
        }
        Command::Detach { group } => {
            wait_for(commands::detach::run(&client()?, group.as_str(), output))
        }
        Command::AttachHelp {
            disk,
            tls_certificates,
        } => commands::attach_help::run(&load()?, &disk, &tls_certificates, output),
        Command::Points { group, repository } => wait_for(async {
            let repository = history::repository(&repository, || Ok(load()?)).await?;
            commands::points::run(&repository, group.as_str(), output).await
        }),
        Command::Restore(args) => wait_for(async {
            let repository = history::repository(&args.repository, || Ok(load()?)).await?;
            let restored =
                commands::restore::run(&repository, &args.group, &args.target, args.format, output);
            restored.await
        }),
        Command::Verify {
            group: Some(group),
            disks: true,
            ..
        } => {
            let group = group.as_str();
            wait_for(commands::verify_disks::run(&client()?, group, output))
        }
        Command::Verify {
            group, repository, ..
        } => wait_for(async {
            let repository = history::repository(&repository, || Ok(load()?)).await?;
            let group = group.as_ref().map(|group| group.as_str());
            commands::verify::run(&repository, group, output).await
        }),
        Command::Cert(command) => commands::cert::run(&command, output),
        Command::Completions { shell } => commands::manual::completions(shell),
        Command::Man { folder } => commands::manual::pages(&folder),
        Command::Quickstart(args) => wait_for(quickstart::run(&args, output)),
        Command::Serve {
            with_parent,
            accept_new_repository,
            accept,
        } => serve::run(load()?, accept, accept_new_repository, with_parent),
        Command::Recover {
            group,
            accept,
            new_log,
            ..
        } => match new_log {
            Some(path) => {
                commands::recover::to_new_log(&load()?, group.as_str(), &path, accept, output)
            }
            None => commands::recover::to_plain(&load()?, group.as_str(), accept, output),
        },
        Command::Export(args) => wait_for(commands::export::run(args, load, output)),
        Command::Log(LogCommand::Inspect {
            log,
            records,
            limit,
        }) => commands::log_inspect::run(load, &log, records, limit, output),
        Command::Segment(SegmentCommand::Inspect {
            file,
            records,
            check,
        }) => commands::segment_inspect::run(&file, records, check, output),
    }
}

/// Runs one future to its end on a small runtime.
fn wait_for(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(work)
}

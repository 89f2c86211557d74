//! The afterimage command.
#![forbid(unsafe_code)]

use afterimage_tools::cli::Cli;
use clap::Parser as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    afterimage_tools::run(Cli::parse())
}

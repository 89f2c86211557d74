//! The command line: every command, its arguments and its help.
//!
//! Arguments that reach paths or the network are parsed into checked types here, so that a command
//! never sees a bad name. Wrong usage ends with exit code 2, a failure with 1.

pub mod output;
pub mod values;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use std::path::PathBuf;
use values::{DiskRef, GroupName, GroupPoint, Label};

use crate::commands::attach_help;
use crate::config::units::{ListenAddress, Target};

/// Replicates virtual machine disks continuously and gives back every moment of them.
///
/// A hypervisor attaches a disk over NBD; each write goes to a log first, then to the disk and,
/// compressed, to the replica, which can show the disk as it was after any single write.
#[derive(Debug, Parser)]
#[command(name = "afterimage", version, propagate_version = true)]
#[command(
    after_help = "Exit code: 0 done, 1 failed, 2 wrong usage or configuration.\n\
                        New here? Run 'afterimage quickstart'."
)]
pub struct Cli {
    /// What everything understands.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Configuration file [default: /etc/afterimage/afterimage.toml].
    #[arg(long, global = true, value_name = "FILE", env = "AFTERIMAGE_CONFIG")]
    pub config: Option<PathBuf>,
    /// Print one JSON document instead of text; its fields are stable.
    #[arg(long, global = true)]
    pub json: bool,
    /// Show no progress.
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

/// Every command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the whole thing at work on this machine in half a minute: no root, no configuration
    Quickstart(Quickstart),
    /// Run the daemon: NBD server, logs, shipping, replica
    Serve {
        /// End when the process that started this one ends.
        #[arg(long, hide = true)]
        with_parent: bool,
        /// Begin anew where a repository is lost for good: groups that were stored there are
        /// copied again.
        #[arg(long)]
        accept_new_repository: bool,
        /// What the operator accepts, for all groups.
        #[command(flatten)]
        accept: Accept,
    },
    /// Work with the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Show how the groups are
    Status {
        /// Only this group.
        group: Option<GroupName>,
    },
    /// Name the present moment, so that it can be found again
    Checkpoint {
        /// Which group.
        group: GroupName,
        /// Name of the checkpoint; without one it is found by time or LSN.
        #[arg(long)]
        label: Option<Label>,
        /// Freeze the guest for a moment, so that its databases open without recovery surprises;
        /// shows each step. Fails if the guest did not confirm; the point is there all the same.
        #[arg(long)]
        app: bool,
    },
    /// Work with the guest of a group
    #[command(subcommand)]
    Guest(GuestCommand),
    /// Thaw guests whose checkpoint nobody sees through; runs beside the daemon
    #[command(hide = true)]
    GuestWatchdog {
        /// Folder of the intents [default: guest_state of the configuration].
        #[arg(long, value_name = "FOLDER")]
        state: Option<PathBuf>,
        /// Never end.
        #[arg(long)]
        stay: bool,
    },
    /// List the recovery points of a group, gaps included
    Points {
        /// Which group.
        group: GroupName,
        /// Where the history is kept.
        #[command(flatten)]
        repository: RepositoryArgs,
    },
    /// Serve the disks of a moment over NBD, read-only, at once
    Export(Export),
    /// Write the disks of a moment to files
    Restore(Restore),
    /// Read back and check everything that the replica has of a group, or compare it with the disks
    Verify {
        /// Which group; all groups when left away.
        group: Option<GroupName>,
        /// At the primary: read the group's disks while the guest goes on, and have every target
        /// compare each block with what it holds for the same moment. Reads no faster than pass_rate.
        #[arg(long, requires = "group", conflicts_with = "repository")]
        disks: bool,
        /// Where the history is kept.
        #[command(flatten)]
        repository: RepositoryArgs,
    },
    /// Make a group's backing disks plain, complete and current, and let go of them
    ///
    /// The daemon does it, and goes on when this command is interrupted; asked again it is waited for.
    Detach {
        /// Which group.
        group: GroupName,
    },
    /// Bring a group's backing disks up to date from its log, without the daemon
    #[command(group = clap::ArgGroup::new("recover_to").required(true))]
    Recover {
        /// Which group.
        group: GroupName,
        /// Leave plain disks that any program can use.
        #[arg(long, group = "recover_to")]
        to_plain: bool,
        /// Write what a failed log lacks to a new log here, on another disk than the failed one;
        /// log.path is to name it afterwards.
        #[arg(long, group = "recover_to", value_name = "FILE")]
        new_log: Option<PathBuf>,
        /// What the operator accepts.
        #[command(flatten)]
        accept: Accept,
    },
    /// Print how to attach a disk to QEMU, libvirt, Proxmox, nbd-client and libnbd
    AttachHelp {
        /// Which disk, as GROUP/DISK.
        disk: DiskRef,
        /// Where the client has its certificates, for a listener with TLS.
        #[arg(long, value_name = "FOLDER", default_value = attach_help::CERTIFICATES)]
        tls_certificates: PathBuf,
    },
    /// Look into a log
    #[command(subcommand)]
    Log(LogCommand),
    /// Look into a segment
    #[command(subcommand)]
    Segment(SegmentCommand),
    /// Make certificates for trying things out: an authority, servers, clients
    #[command(subcommand)]
    Cert(CertCommand),
    /// Print a completion script for a shell
    Completions {
        /// Which shell.
        shell: Shell,
    },
    /// Write the manual pages
    Man {
        /// Folder for the pages; it must exist.
        #[arg(value_name = "FOLDER")]
        folder: PathBuf,
    },
}

/// `guest …`
#[derive(Debug, Subcommand)]
pub enum GuestCommand {
    /// Say whether the guest's agent answers, what it is, and what a freeze would reach
    Check {
        /// Which group.
        group: GroupName,
        /// Also freeze and thaw once, without a checkpoint.
        #[arg(long)]
        freeze: bool,
    },
}

/// `quickstart`
#[derive(Debug, Clone, Args)]
pub struct Quickstart {
    /// A raw disk image to protect (a copy of it is used) instead of a small new file system.
    #[arg(long, value_name = "FILE")]
    pub disk: Option<PathBuf>,
    /// Leave the folder and the daemon in place, to look around.
    #[arg(long)]
    pub keep: bool,
    /// Work in this folder, which must not exist yet.
    #[arg(long, value_name = "FOLDER")]
    pub folder: Option<PathBuf>,
}

/// What only a person can decide.
#[derive(Debug, Clone, Copy, Args)]
pub struct Accept {
    /// Go on although the ring is lost, and with it perhaps writes that were answered.
    #[arg(long)]
    pub accept_ring_loss: bool,
    /// Go on although a disk was changed behind our back; everything is shipped anew.
    #[arg(long)]
    pub accept_edited: bool,
}

/// `config …`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Read the configuration, say what is wrong with it and what it means
    Check,
}

/// Where a command reads history from.
#[derive(Debug, Clone, Args)]
pub struct RepositoryArgs {
    /// Read this repository (file:///… or s3://…) instead of the configured one.
    #[arg(long, value_name = "URL")]
    pub repository: Option<Target>,
}

/// `export`
#[derive(Debug, Clone, Args)]
// The daemon reads its own repository.
#[command(group = ArgGroup::new("read_here").args(["repository"]).requires("foreground"))]
pub struct Export {
    /// Which group, and optionally @ and the moment: latest, lsn:123, a time (2026-01-31T14:03:07Z,
    /// 14:03:07 or -90s) or a checkpoint's label.
    #[arg(value_name = "GROUP[@POINT]", required_unless_present_any = ["list", "close"])]
    pub group: Option<GroupPoint>,
    /// Serve it from this process, until it is interrupted, instead of from the daemon.
    #[arg(long)]
    pub foreground: bool,
    /// With --foreground: where to listen (unix:/… or tcp://…).
    #[arg(long, value_name = "ADDRESS", requires = "foreground")]
    pub listen: Option<ListenAddress>,
    /// List what the daemon exports.
    #[arg(long, conflicts_with_all = ["group", "foreground"])]
    pub list: bool,
    /// Stop exporting this image.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["group", "foreground", "list"])]
    pub close: Option<String>,
    /// Where the history is kept.
    #[command(flatten)]
    pub repository: RepositoryArgs,
}

/// `restore`
#[derive(Debug, Clone, Args)]
pub struct Restore {
    /// Which group, and optionally @ and the moment: latest, lsn:123, a time (2026-01-31T14:03:07Z,
    /// 14:03:07 or -90s) or a checkpoint's label.
    #[arg(value_name = "GROUP[@POINT]")]
    pub group: GroupPoint,
    /// Folder for the disks, one file each (DISK.raw); made if it is not there.
    pub target: PathBuf,
    /// Format of the files.
    #[arg(long, value_enum, default_value_t = ImageFormat::Raw)]
    pub format: ImageFormat,
    /// Where the history is kept.
    #[command(flatten)]
    pub repository: RepositoryArgs,
}

/// Format of restored disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// Sparse raw file.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// `log …`
#[derive(Debug, Subcommand)]
pub enum LogCommand {
    /// Show the superblock and the frames of a log, for people
    Inspect {
        /// Path of a log, or name of a configured group.
        log: String,
        /// Show every record.
        #[arg(long)]
        records: bool,
        /// Show at most so many frames, from the oldest.
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
    },
}

/// `segment …`
#[derive(Debug, Subcommand)]
pub enum SegmentCommand {
    /// Show the header and the index of a segment, for people
    Inspect {
        /// Path of a segment.
        file: PathBuf,
        /// Show every record.
        #[arg(long)]
        records: bool,
        /// Also check every chunk.
        #[arg(long)]
        check: bool,
    },
}

/// `cert …`
#[derive(Debug, Subcommand)]
pub enum CertCommand {
    /// Make an authority: ca.pem and ca.key
    Ca {
        /// Folder for the files; made if it is not there.
        #[arg(long, default_value = ".", value_name = "FOLDER")]
        out: PathBuf,
    },
    /// Make a server's certificate: server.pem and server.key
    Server {
        /// Names and addresses under which clients reach the server.
        #[arg(required = true, value_name = "HOST")]
        hosts: Vec<String>,
        /// Files of the certificate.
        #[command(flatten)]
        files: CertFiles,
    },
    /// Make a primary's certificate: client.pem and client.key
    Client {
        /// Groups that the holder may write; each becomes a SAN.
        #[arg(required = true, value_name = "GROUP")]
        groups: Vec<GroupName>,
        /// Files of the certificate.
        #[command(flatten)]
        files: CertFiles,
    },
}

/// Where certificates are read and written.
#[derive(Debug, Clone, Args)]
pub struct CertFiles {
    /// Folder that holds ca.pem and ca.key.
    #[arg(long, default_value = ".", value_name = "FOLDER")]
    pub ca: PathBuf,
    /// Folder for the files; made if it is not there.
    #[arg(long, default_value = ".", value_name = "FOLDER")]
    pub out: PathBuf,
    /// Name of the files without their ending [default: server or client].
    #[arg(long, value_name = "NAME")]
    pub name: Option<Label>,
    /// Days that the certificate is valid; a negative number makes one that has expired.
    #[arg(long, default_value_t = 825, allow_negative_numbers = true)]
    pub days: i64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_in_order() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_repository_is_exported_by_this_process_or_not_at_all() {
        let words = ["afterimage", "export", "vm1", "--repository", "file:///r"];
        let refused = Cli::try_parse_from(words).expect_err("the daemon reads its own");
        assert!(refused.to_string().contains("--foreground"), "{refused}");
        let foreground = ["--foreground", "--listen", "unix:/s"];
        assert!(Cli::try_parse_from(words.into_iter().chain(foreground)).is_ok());
    }
}

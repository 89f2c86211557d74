//! The daemon under test: a child process with a configuration of its own.
//!
//! It is ended by its process ID alone. Its messages go to `serve.log` in the quickstart's folder.

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::api::client::Client;
use crate::api::types::StatusReport;
use crate::commands::config_check::is_tmpfs;

/// The group of the quickstart.
pub(super) const GROUP: &str = "vm1";
/// Its disk.
pub(super) const DISK: &str = "vda";
const START_TIME_MAX: Duration = Duration::from_secs(40);
const STOP_TIME_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

/// Paths of one quickstart.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// Everything but the rings.
    pub(super) folder: PathBuf,
    /// Rings, on a tmpfs.
    pub(super) rings: PathBuf,
}

impl Places {
    /// The configuration file.
    #[must_use]
    pub(super) fn config(&self) -> PathBuf {
        self.folder.join("afterimage.toml")
    }

    /// The NBD socket.
    #[must_use]
    pub(super) fn nbd(&self) -> PathBuf {
        self.folder.join("nbd.sock")
    }

    /// The repository.
    #[must_use]
    pub(super) fn repository(&self) -> PathBuf {
        self.folder.join("replica")
    }

    fn api(&self) -> PathBuf {
        self.folder.join("api.sock")
    }

    fn log(&self) -> PathBuf {
        self.folder.join("serve.log")
    }

    /// Makes the folders.
    ///
    /// # Errors
    /// When a folder is already there, or there is no tmpfs for the ring.
    pub(super) fn create(folder: Option<&Path>) -> anyhow::Result<Self> {
        let own = format!("afterimage-quickstart-{}", std::process::id());
        let folder = match folder {
            Some(folder) => std::path::absolute(folder)?,
            None => std::env::temp_dir().join(&own),
        };
        // A unix socket's path has at most 107 bytes.
        if folder.as_os_str().len() > 90 {
            bail!(
                "{} is too long for sockets in it; choose a shorter --folder",
                folder.display()
            );
        }
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let tmpfs = [Some(PathBuf::from("/dev/shm")), runtime]
            .into_iter()
            .flatten()
            .find(|folder| {
                is_tmpfs(folder) && rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_ok()
            });
        let Some(tmpfs) = tmpfs else {
            bail!("neither /dev/shm nor XDG_RUNTIME_DIR is a writable tmpfs: the ring needs one");
        };
        let rings = tmpfs.join(own);
        for made in [&folder, &rings] {
            fs::DirBuilder::new()
                .mode(0o700)
                .create(made)
                .with_context(|| format!("cannot make the folder {}", made.display()))?;
        }
        Ok(Self { folder, rings })
    }

    /// Writes the configuration for a disk.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn configure(&self, disk: &Path) -> anyhow::Result<()> {
        let at = |path: &Path| path.display().to_string();
        let text = format!(
            "# Written by 'afterimage quickstart'. Primary and replica share this machine here.\n\
             ring_dir = {rings:?}\n\
             [nbd]\n\
             listen = [{nbd:?}]\n\
             images = {images:?}\n\
             [http]\n\
             api = {api:?}\n\
             metrics = \"\"\n\
             [[group]]\n\
             name = \"{GROUP}\"\n\
             log = {{ path = {log:?}, size = \"512MiB\" }}\n\
             ring = \"64MiB\"\n\
             to = [{repository:?}]\n\
             \x20 [[group.disk]]\n\
             \x20 name = \"{DISK}\"\n\
             \x20 path = {disk:?}\n\
             [replica]\n\
             repository = {repository:?}\n",
            rings = at(&self.rings),
            nbd = format!("unix:{}", at(&self.nbd())),
            images = at(&self.folder.join("images.sock")),
            api = format!("unix:{}", at(&self.api())),
            log = at(&self.folder.join("vm1.log")),
            repository = format!("file://{}", at(&self.repository())),
            disk = at(disk),
        );
        super::disk::write_new(&self.config(), text.as_bytes())
            .context("cannot write the configuration")
    }

    /// Removes everything.
    pub(super) fn remove(&self) {
        for folder in [&self.folder, &self.rings] {
            if let Err(error) = fs::remove_dir_all(folder) {
                eprintln!("afterimage: cannot remove {}: {error}", folder.display());
            }
        }
    }

    /// A client of the daemon's API.
    #[must_use]
    pub(super) fn client(&self) -> Client {
        Client::new(&self.api())
    }
}

/// A running `afterimage serve`.
#[derive(Debug)]
pub(super) struct Daemon {
    places: Places,
    child: Child,
}

impl Daemon {
    /// Starts it and waits until it serves.
    ///
    /// # Errors
    /// When it ends or is not ready in time; the end of its messages is part of the error.
    pub(super) async fn start(places: &Places, keep: bool) -> anyhow::Result<Self> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(places.log())?;
        let errors = log.try_clone()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve").arg("--config").arg(places.config());
        if !keep {
            command.arg("--with-parent");
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .context("cannot start the daemon")?;
        let mut daemon = Self {
            places: places.clone(),
            child,
        };
        let started = Instant::now();
        loop {
            if let Ok(report) = daemon.status().await
                && report.groups.iter().any(|g| g.state != "starting")
            {
                return Ok(daemon);
            }
            if let Some(status) = daemon.child.try_wait()? {
                bail!("the daemon ended ({status}):\n{}", daemon.last_words());
            }
            if started.elapsed() > START_TIME_MAX {
                bail!("the daemon does not get ready:\n{}", daemon.last_words());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Process ID.
    #[must_use]
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// When it does not answer.
    pub(super) async fn status(&self) -> anyhow::Result<StatusReport> {
        Ok(self.places.client().status(None).await?)
    }

    /// `kill -9`, by process ID.
    ///
    /// # Errors
    /// When it is gone already.
    pub(super) fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill().context("cannot kill the daemon")?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// When it does not end in time (it is killed then), or ends with a failure.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            kill_process(pid, Signal::TERM)?;
        }
        let started = Instant::now();
        loop {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("the daemon ended with {status}:\n{}", self.last_words()),
                None if started.elapsed() > STOP_TIME_MAX => {
                    self.child.kill()?;
                    bail!("the daemon does not end:\n{}", self.last_words());
                }
                None => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// Leaves it running.
    pub(super) fn leave(self) {}

    /// Kills it, whatever its state: for a story that ended early.
    pub(super) fn abandon(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn last_words(&self) -> String {
        let text = fs::read_to_string(self.places.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(12).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

/// Bytes that a file really takes.
#[must_use]
pub(super) fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    File::open(path)
        .and_then(|file| file.metadata())
        .map_or(0, |meta| meta.blocks() * 512)
}

//! A guest that is frozen and thawed by commands: a database's own hooks, another hypervisor, ssh.
//!
//! Owns the commands while they run, each in a process group of its own. Always holds: a freeze
//! that is given up is killed with all its children before a thaw begins, so that it cannot freeze
//! later; a thaw is given its own time and is run again until it succeeds.

use super::agent::{Answer, Request, Survey, Trouble};
use rustix::process::{Pid, Signal, kill_process_group};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};

/// What is kept of a command's messages.
const MESSAGE_BYTES_MAX: u64 = 4096;

/// Two commands.
#[derive(Debug)]
pub struct Exec {
    freeze: Vec<String>,
    thaw: Vec<String>,
    /// For a thaw, whoever waits for it.
    timeout: Duration,
    group: String,
    checkpoint: String,
    freezing: Option<Running>,
    thawing: Option<Running>,
    /// Whether the last thaw succeeded and nothing was frozen since.
    thawed: bool,
}

/// A command and its children; killed when it is dropped before its end.
#[derive(Debug)]
struct Running {
    child: Child,
    group: Option<Pid>,
    begun: tokio::time::Instant,
    message: Vec<u8>,
    ended: bool,
}

impl Running {
    fn start(exec: &Exec, step: &str, command: &[String]) -> Result<Self, Trouble> {
        let Some((program, arguments)) = command.split_first() else {
            return Err(Trouble::Unreachable("no command".to_owned()));
        };
        let child = Command::new(program)
            .args(arguments)
            .env("AFTERIMAGE_GROUP", &exec.group)
            .env("AFTERIMAGE_CHECKPOINT", &exec.checkpoint)
            .env("AFTERIMAGE_STEP", step)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|error| Trouble::Unreachable(format!("{program}: {error}")))?;
        let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        Ok(Self {
            child,
            group,
            begun: tokio::time::Instant::now(),
            message: Vec::new(),
            ended: false,
        })
    }

    /// Waits for its end. May be dropped and called again.
    async fn end(&mut self) -> Result<(), Trouble> {
        let status = self.child.wait().await;
        self.ended = true;
        let status = status.map_err(|error| Trouble::Refused(error.to_string()))?;
        if status.success() {
            return Ok(());
        }
        if let Some(stderr) = self.child.stderr.take() {
            // What its children still hold open is not waited for.
            let mut limited = stderr.take(MESSAGE_BYTES_MAX);
            let read = limited.read_to_end(&mut self.message);
            tokio::time::timeout(Duration::from_millis(100), read)
                .await
                .ok();
        }
        let message = String::from_utf8_lossy(&self.message);
        Err(Trouble::Refused(format!("{status} {}", message.trim())))
    }

    async fn kill(mut self) {
        self.kill_group();
        self.child.wait().await.ok();
        self.ended = true;
    }

    fn kill_group(&self) {
        if let Some(group) = self.group {
            // Gone already: fine.
            kill_process_group(group, Signal::KILL).ok();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.kill_group();
        }
    }
}

impl Exec {
    /// Commands for a checkpoint of this group.
    #[must_use]
    pub fn new(
        freeze: &[String],
        thaw: &[String],
        timeout: Duration,
        group: &str,
        checkpoint: &str,
    ) -> Self {
        Self {
            freeze: freeze.to_owned(),
            thaw: thaw.to_owned(),
            timeout,
            group: group.to_owned(),
            checkpoint: checkpoint.to_owned(),
            freezing: None,
            thawing: None,
            thawed: false,
        }
    }

    /// One exchange; `sent` is called when a command runs.
    ///
    /// # Errors
    /// The command cannot be run, or failed.
    pub async fn ask(&mut self, request: Request, sent: impl FnOnce()) -> Result<Answer, Trouble> {
        match request {
            Request::Sync => {
                self.thawed = true;
                Ok(Answer::InStep)
            }
            Request::Status => Ok(Answer::Status {
                frozen: !self.thawed,
            }),
            Request::Survey => Ok(Answer::Survey(Survey {
                freezable: vec![format!("what '{}' freezes", self.freeze.join(" "))],
                skipped: Vec::new(),
            })),
            Request::Freeze => {
                self.thawed = false;
                let command = self.freeze.clone();
                self.freezing = Some(Running::start(self, "freeze", &command)?);
                sent();
                if let Some(running) = &mut self.freezing {
                    running.end().await?;
                }
                self.freezing = None;
                Ok(Answer::Frozen { count: 1 })
            }
            Request::Thaw => {
                self.thaw(sent).await?;
                Ok(Answer::Thawed { count: 1 })
            }
            Request::SyncThaw => {
                if let Some(freeze) = self.freezing.take() {
                    freeze.kill().await;
                }
                self.thaw(sent).await?;
                Ok(Answer::InStep)
            }
        }
    }

    async fn thaw(&mut self, sent: impl FnOnce()) -> Result<(), Trouble> {
        if let Some(running) = self.thawing.take_if(|running| {
            let age = running.begun.elapsed();
            age >= self.timeout
        }) {
            running.kill().await;
        }
        if self.thawing.is_none() {
            let command = self.thaw.clone();
            self.thawing = Some(Running::start(self, "thaw", &command)?);
        }
        sent();
        if let Some(running) = &mut self.thawing {
            let ended = running.end().await;
            self.thawing = None;
            ended?;
        }
        self.thawed = true;
        Ok(())
    }
}

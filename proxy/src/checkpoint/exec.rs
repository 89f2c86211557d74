//! A guest that is frozen and thawed by commands: a database's own hooks, another hypervisor, ssh.
//!
//! Owns the commands while they run, each in a process group of its own. Always holds: after a
//! freeze that did not succeed, and after one that another process began, a thaw counts only if it
//! began when no process of the freeze lived any more, so that none can freeze later; a thaw is
//! given its own time and is run again until it succeeds.

use super::agent::{Answer, Request, Survey, Trouble};
use super::leftover;
use rustix::process::{Pid, Signal, kill_process_group};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, ChildStderr, Command};
use tokio::task::JoinHandle;

/// What is kept of a command's messages.
const MESSAGE_BYTES_MAX: usize = 4096;
/// How long the end of a killed freeze is waited for before a first thaw, and before a next one.
const END_WITHIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(1));

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
    /// Whether no freeze of this checkpoint can act any more, whoever began it.
    over: bool,
}

/// A command and its children; killed when it is dropped before its end.
#[derive(Debug)]
struct Running {
    child: Child,
    group: Option<Pid>,
    begun: tokio::time::Instant,
    message: Message,
    ended: bool,
    /// Of a thaw: whether the freeze was over when it began.
    counts: bool,
}

/// The beginning of what a command says; the rest is read, so that it never waits for us.
#[derive(Debug)]
struct Message {
    kept: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Message {
    fn read(stderr: Option<ChildStderr>) -> Self {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let reader = stderr.map(|stderr| tokio::spawn(drain(stderr, Arc::clone(&kept))));
        Self { kept, reader }
    }

    async fn complete(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            // What its children still hold open is not waited for.
            let within = Duration::from_millis(100);
            tokio::time::timeout(within, reader).await.ok();
        }
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).trim().to_owned()
    }
}

async fn drain(mut stderr: ChildStderr, kept: Arc<Mutex<Vec<u8>>>) {
    let mut buffer = [0; MESSAGE_BYTES_MAX];
    while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        let room = MESSAGE_BYTES_MAX.saturating_sub(kept.len());
        kept.extend_from_slice(&buffer[..count.min(room)]);
    }
}

impl Running {
    fn start(exec: &Exec, step: &str, command: &[String]) -> Result<Self, Trouble> {
        let Some((program, arguments)) = command.split_first() else {
            return Err(Trouble::Unreachable("no command".to_owned()));
        };
        let mut child = Command::new(program)
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
        let message = Message::read(child.stderr.take());
        Ok(Self {
            child,
            group,
            begun: tokio::time::Instant::now(),
            message,
            ended: false,
            counts: exec.over,
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
        let message = self.message.complete().await;
        Err(Trouble::Refused(format!("{status} {message}")))
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
            over: false,
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
                ..Survey::default()
            })),
            Request::Freeze => {
                self.thawed = false;
                self.over = false;
                let command = self.freeze.clone();
                self.freezing = Some(Running::start(self, "freeze", &command)?);
                sent();
                if let Some(running) = &mut self.freezing {
                    running.end().await?;
                }
                self.freezing = None;
                self.over = true;
                Ok(Answer::Frozen { count: 1 })
            }
            Request::Thaw => {
                self.thawed = self.thaw(sent).await?;
                Ok(Answer::Thawed { count: 1 })
            }
            Request::SyncThaw => {
                self.thaw_for_certain(sent).await?;
                Ok(Answer::InStep)
            }
        }
    }

    /// Ends the freeze and thaws. A freeze that does not end, perhaps since it waits for what it
    /// froze, is thawed all the same, and once more when it has ended.
    async fn thaw_for_certain(&mut self, sent: impl FnOnce()) -> Result<(), Trouble> {
        self.end_freeze(END_WITHIN.0).await;
        let mut ended = self.thaw(sent).await;
        while !matches!(ended, Ok(true)) {
            let left = self.end_freeze(END_WITHIN.1).await;
            if !left.is_empty() {
                return Err(Trouble::Refused(format!(
                    "the freeze command does not end, processes {}: it may freeze yet; see what \
                     they wait for",
                    left.join(" ")
                )));
            }
            if ended? {
                break;
            }
            ended = self.thaw(|| ()).await;
        }
        self.thawed = true;
        Ok(())
    }

    /// Kills what is left of the freeze; what still lives after so long.
    async fn end_freeze(&mut self, within: Duration) -> Vec<String> {
        if self.over {
            return Vec::new();
        }
        // A leader that ended may have passed its number on, if none of its group is left either.
        let unended = self.freezing.as_ref().filter(|running| !running.ended);
        let group = unended.and_then(|running| running.group);
        let Some(left) = leftover::end(&self.checkpoint, group, within).await else {
            return vec!["that cannot be listed".to_owned()];
        };
        self.over = left.is_empty();
        if self.over {
            self.freezing = None;
        }
        let number = |pid: &Pid| pid.as_raw_nonzero().to_string();
        left.iter().map(number).collect()
    }

    /// One run of the thaw; whether it counts.
    async fn thaw(&mut self, sent: impl FnOnce()) -> Result<bool, Trouble> {
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
        let mut counts = false;
        if let Some(running) = &mut self.thawing {
            counts = running.counts;
            let ended = running.end().await;
            self.thawing = None;
            ended?;
        }
        Ok(counts)
    }
}

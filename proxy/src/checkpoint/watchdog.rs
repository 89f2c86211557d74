//! Thaws guests whose checkpoint nobody sees through.
//!
//! [`serve`] is the watchdog, a process of its own that survives the daemon. It knows what to do
//! from the intents alone. A daemon that is about to freeze connects and names its intent; the
//! watchdog answers when it has read it, and watches the connection: when that ends and the intent
//! is still there, it thaws at once. It also thaws when the intent's deadline has passed, and every
//! intent that nobody holds. [`thaw`] does the work, here and in a daemon that starts.
//!
//! From the first freeze on the daemon's run gives signs of life. One that is silent when its guest
//! has to be thawed hangs, and holds the agent's connection, of which QEMU serves only one: it is
//! killed, as systemd does it with a service that does not report (`WatchdogSec=`), and then thawed.

use super::intent::{Intent, IntentFolder, boottime};
use super::run::{Host, Step, run};
use super::sequence::{Report, Sequence};
use afterimage_format::checkpoint_confirm::CheckpointConfirmBody;
use afterimage_format::ids::Lsn;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::HashMap;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};

/// How often intents that nobody announced are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often a lock or the end of an intent is looked for.
const POLL_EVERY: Duration = Duration::from_millis(50);
/// How often a run shows that it goes on.
pub(super) const SIGN_EVERY: Duration = Duration::from_millis(250);
/// So many looks without a sign are silence. They are counted, not timed: where the whole machine
/// stood still, nobody was silent.
const SILENT_LOOKS: u32 = 12;
/// Part of the freeze limit after which a silent daemon is killed; the rest is for the thaw.
const HANGING_PERCENT: u32 = 95;
const FREEZING: &str = "freezing ";
/// A watchdog that a daemon started ends when nothing was to do for so long.
const IDLE_MAX: Duration = Duration::from_secs(10);
const SOCKET: &str = "watchdog.sock";
/// No group has a name that begins with a dot.
const LOCK: &str = ".watchdog";

/// Held while guests are frozen: when it goes, the watchdog looks whether the intent went before.
#[derive(Debug)]
pub struct Guard(UnixStream);

impl Guard {
    /// A guest is asked to freeze now, for so long at most.
    pub fn freezing(&self, limit: Duration) {
        self.say(&format!("{FREEZING}{}\n", limit.as_millis()));
    }

    /// The run goes on.
    pub fn alive(&self) {
        self.say("alive\n");
    }

    fn say(&self, line: &str) {
        // A watchdog that does not listen has gone, or has lines enough to read.
        self.0.try_write(line.as_bytes()).ok();
    }
}

/// Returns when a watchdog has read the intent; `start` starts one if none answers.
///
/// # Errors
/// None can be started.
pub async fn arm(
    folder: &IntentFolder,
    intent: &Intent,
    start: impl Fn() -> io::Result<()>,
) -> Result<Guard, String> {
    if let Ok(guard) = announce(folder, intent).await {
        return Ok(guard);
    }
    loop {
        start().map_err(|error| format!("it cannot be started: {error}"))?;
        for _ in 0..40 {
            tokio::time::sleep(POLL_EVERY / 2).await;
            if let Ok(guard) = announce(folder, intent).await {
                return Ok(guard);
            }
        }
    }
}

async fn announce(folder: &IntentFolder, intent: &Intent) -> io::Result<Guard> {
    let mut stream = UnixStream::connect(folder.path().join(SOCKET)).await?;
    let line = format!("{}\n", intent.checkpoint);
    stream.write_all(line.as_bytes()).await?;
    let mut answer = String::new();
    BufReader::new(&mut stream).read_line(&mut answer).await?;
    if answer == line {
        return Ok(Guard(stream));
    }
    Err(io::ErrorKind::InvalidData.into())
}

/// The watchdog. With `stay` it never ends, and waits for its turn while another one serves the
/// folder; else it ends at once then, and when nothing was to do for a while.
///
/// # Errors
/// The folder or the socket.
pub async fn serve(folder: IntentFolder, stay: bool) -> io::Result<()> {
    let _lock = loop {
        match folder.lock(LOCK)? {
            Some(lock) => break lock,
            None if stay => tokio::time::sleep(LOOK_EVERY).await,
            None => return Ok(()),
        }
    };
    let path = folder.path().join(SOCKET);
    // Whoever made it held the lock.
    std::fs::remove_file(&path).ok();
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    let guarded = Guarded::default();
    let (wake, mut woken) = mpsc::unbounded_channel();
    let mut thawing: HashMap<String, JoinHandle<()>> = HashMap::new();
    let mut idle = Duration::ZERO;
    loop {
        thawing.retain(|_, task| !task.is_finished());
        let intents = folder.list()?;
        for intent in &intents {
            let in_time = boottime() < intent.deadline_boottime;
            let known = thawing.contains_key(&intent.checkpoint);
            if known || (in_time && guarded.holds(&intent.checkpoint)) {
                continue;
            }
            let (folder, own) = (folder.clone(), intent.clone());
            let task = tokio::spawn(async move { thaw(&folder, &own).await });
            thawing.insert(intent.checkpoint.clone(), task);
        }
        let busy = !intents.is_empty() || !guarded.is_empty() || !thawing.is_empty();
        if busy {
            idle = Duration::ZERO;
        } else if !stay && idle >= IDLE_MAX {
            return Ok(());
        }
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    let watched = watch(stream, folder.clone(), guarded.clone(), wake.clone());
                    tokio::spawn(watched);
                }
            }
            _ = woken.recv() => {}
            () = tokio::time::sleep(LOOK_EVERY) => idle += LOOK_EVERY,
        }
    }
}

/// Checkpoints whose daemon is connected.
#[derive(Debug, Clone, Default)]
struct Guarded(Arc<Mutex<HashMap<String, u32>>>);

impl Guarded {
    fn all(&self) -> std::sync::MutexGuard<'_, HashMap<String, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn holds(&self, checkpoint: &str) -> bool {
        self.all().contains_key(checkpoint)
    }

    fn is_empty(&self) -> bool {
        self.all().is_empty()
    }
}

/// One daemon's connection, to its end.
async fn watch(
    stream: UnixStream,
    folder: IntentFolder,
    guarded: Guarded,
    wake: mpsc::UnboundedSender<()>,
) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    if stream.read_line(&mut line).await.is_err() {
        return;
    }
    let checkpoint = line.trim().to_owned();
    let known = folder.list().is_ok_and(|intents| {
        let mut all = intents.iter();
        all.any(|intent| intent.checkpoint == checkpoint)
    });
    if !known {
        return;
    }
    *guarded.all().entry(checkpoint.clone()).or_default() += 1;
    if stream.write_all(line.as_bytes()).await.is_ok() && hangs(&mut stream).await {
        kill(&stream, &checkpoint);
        // Its end comes when it is dead.
        tokio::io::copy(&mut stream, &mut tokio::io::sink())
            .await
            .ok();
    }
    guarded.all().remove(&checkpoint);
    wake.send(()).ok();
}

/// Follows a daemon's signs of life. False: it has gone; true: it lives and is silent although its
/// guest has to be thawed.
pub(super) async fn hangs(stream: &mut BufReader<UnixStream>) -> bool {
    let mut look = tokio::time::interval(SIGN_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut lines = stream.lines();
    let mut thawed_by = None;
    let mut silent = 0;
    loop {
        tokio::select! {
            biased;
            line = lines.next_line() => {
                let Ok(Some(line)) = line else {
                    return false;
                };
                if let Some(limit) = line.strip_prefix(FREEZING)
                    && let Ok(limit) = limit.parse()
                    && thawed_by.is_none()
                {
                    let limit = Duration::from_millis(limit);
                    thawed_by = Some(Instant::now() + limit * HANGING_PERCENT / 100);
                }
                silent = 0;
            }
            _ = look.tick() => {
                silent += 1;
                let late = thawed_by.is_some_and(|by| by <= Instant::now());
                if late && silent > SILENT_LOOKS {
                    return true;
                }
            }
        }
    }
}

/// Kills the process at the other end; nothing that it answered is lost by that.
fn kill(stream: &BufReader<UnixStream>, checkpoint: &str) {
    let peer = stream
        .get_ref()
        .peer_cred()
        .ok()
        .and_then(|peer| peer.pid());
    let Some(pid) = peer.and_then(Pid::from_raw) else {
        tracing::error!(
            checkpoint,
            "a daemon hangs while its guest is frozen, and cannot be named: kill it"
        );
        return;
    };
    let number = pid.as_raw_nonzero();
    match kill_process(pid, Signal::KILL) {
        Ok(()) => tracing::error!(
            checkpoint,
            pid = number,
            "the process that froze a guest hangs; it was killed so that the guest can be thawed"
        ),
        Err(error) => tracing::error!(
            checkpoint, pid = number, %error,
            "the process that froze a guest hangs, and cannot be killed: kill it"
        ),
    }
}

/// Thaws what an intent names, until that is certain; ends early when somebody else has done it.
/// Waits for whoever holds the group, but not beyond the intent's deadline.
pub async fn thaw(folder: &IntentFolder, intent: &Intent) {
    let group = intent.group.as_str();
    let _lock = loop {
        if !folder.holds(intent) {
            return;
        }
        match folder.lock(group) {
            Ok(Some(lock)) => break Some(lock),
            Ok(None) if boottime() < intent.deadline_boottime => {}
            Ok(None) => break None,
            Err(error) => {
                tracing::error!(group, %error, "the lock of a group cannot be had; thawing without");
                break None;
            }
        }
        tokio::time::sleep(POLL_EVERY).await;
    };
    if !folder.holds(intent) {
        return;
    }
    tracing::warn!(group, checkpoint = %intent.checkpoint, "thawing: a checkpoint was not seen through");
    let names = intent.agents.iter().map(|agent| agent.name.clone());
    let providers = intent.agents.iter();
    let providers = providers.map(|agent| agent.provider(group, &intent.checkpoint));
    let host = Thaw {
        folder: folder.clone(),
        intent: intent.clone(),
    };
    let thawed = run(
        Sequence::thaw_only(names),
        providers.collect(),
        Arc::new(host),
    );
    tokio::select! {
        () = thawed => tracing::info!(group, "thawed"),
        () = gone(folder, intent) => {}
    }
}

async fn gone(folder: &IntentFolder, intent: &Intent) {
    while folder.holds(intent) {
        tokio::time::sleep(POLL_EVERY).await;
    }
}

/// A run that makes no checkpoint.
struct Thaw {
    folder: IntentFolder,
    intent: Intent,
}

fn not_asked<T>() -> Step<T> {
    Box::pin(async { Err("not part of a thaw".to_owned()) })
}

impl Host for Thaw {
    fn write_intent(&self) -> Step<()> {
        not_asked()
    }

    fn arm_watchdog(&self) -> Step<()> {
        not_asked()
    }

    fn mark(&self) -> Step<Lsn> {
        not_asked()
    }

    fn store(&self, _: CheckpointConfirmBody) -> Step<()> {
        not_asked()
    }

    fn remove_intent(&self) {
        if let Err(error) = self.folder.remove(&self.intent) {
            tracing::error!(group = %self.intent.group, %error, "the intent cannot be removed");
        }
    }

    fn settled(&self, _: Report) {}
}

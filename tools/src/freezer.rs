//! What freezing a group's guest needs on this host, whoever does it: the folder of intents, the
//! group's lock, the watchdog.
//!
//! Always holds: whoever has a [`Freezer`] is the only one that asks this group's guest to freeze,
//! and no earlier freeze of it is unfinished.

use afterimage_proxy::checkpoint::intent::{GroupLock, Intent, IntentFolder};
use afterimage_proxy::checkpoint::provider::Provider;
use afterimage_proxy::checkpoint::sequence::{Limits, Sequence};
use afterimage_proxy::checkpoint::watchdog::{self, Guard};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::GroupConfig;

/// Steps before the freeze that each may take as long as one exchange.
const STEPS_BEFORE: u32 = 5;

/// The right to freeze a guest once.
#[derive(Debug, Clone)]
pub struct Freezer(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    folder: IntentFolder,
    intent: Intent,
    limits: Limits,
    guard: Mutex<Option<Guard>>,
    lock: Mutex<Option<GroupLock>>,
}

impl Freezer {
    /// Takes the right to freeze a group's guest. None while somebody else has it, or a freeze
    /// before is not over.
    ///
    /// # Errors
    /// The folder cannot be used.
    pub fn take(state: &Path, group: &GroupConfig) -> io::Result<Option<Self>> {
        let folder = IntentFolder::open(state)?;
        let Some(lock) = folder.lock(&group.name)? else {
            return Ok(None);
        };
        let left = folder.list()?;
        if left.iter().any(|intent| intent.group == group.name) {
            return Ok(None);
        }
        let limits = limits(group);
        let within = limits.prepare * STEPS_BEFORE + limits.freeze;
        let intent = Intent::new(&group.name, &group.guest, within);
        Ok(Some(Self(Arc::new(Shared {
            folder,
            intent,
            limits,
            guard: Mutex::default(),
            lock: Mutex::new(Some(lock)),
        }))))
    }

    /// Its agents, in the order of the sequence.
    #[must_use]
    pub fn providers(&self) -> Vec<Provider> {
        let Intent {
            group,
            checkpoint,
            agents,
            ..
        } = &self.0.intent;
        let agents = agents.iter();
        agents.map(|a| a.provider(group, checkpoint)).collect()
    }

    /// Stores the intent durably. Blocks.
    ///
    /// # Errors
    /// In words.
    pub fn store(&self) -> Result<(), String> {
        let stored = self.0.folder.store(&self.0.intent);
        stored.map_err(|error| format!("{}: {error}", self.0.folder.path().display()))
    }

    /// Returns when a watchdog has the intent; starts one if there is none. `log` is where that
    /// one tells what it does: it lives on, and keeps open whatever it is given.
    ///
    /// # Errors
    /// In words.
    pub async fn arm(&self, log: fn() -> Stdio) -> Result<(), String> {
        let state = self.0.folder.path().to_owned();
        let start = || start_watchdog(&state, log());
        let guard = watchdog::arm(&self.0.folder, &self.0.intent, start).await?;
        *self.0.guard.lock().unwrap_or_else(PoisonError::into_inner) = Some(guard);
        Ok(())
    }

    /// Tells the watchdog that a guest is asked to freeze now.
    pub fn freezing(&self) {
        self.to_watchdog(|guard| guard.freezing(self.0.limits.freeze));
    }

    /// Tells the watchdog that the run goes on.
    pub fn alive(&self) {
        self.to_watchdog(Guard::alive);
    }

    fn to_watchdog(&self, tell: impl FnOnce(&Guard)) {
        let guard = self.0.guard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(guard) = &*guard {
            tell(guard);
        }
    }

    /// Everybody is thawed: removes the intent, lets the watchdog and the lock go.
    pub fn release(&self) {
        let Shared {
            folder,
            intent,
            guard,
            lock,
            ..
        } = &*self.0;
        // First: a disk that stalls now is no reason to be killed. The lock keeps the watchdog waiting.
        guard.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Err(error) = folder.remove(intent) {
            tracing::error!(group = %intent.group, %error, "the intent to freeze cannot be removed");
        }
        lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Limits of a group's checkpoints.
#[must_use]
pub fn limits(group: &GroupConfig) -> Limits {
    Limits {
        freeze: group.freeze_limit,
        ..Limits::default()
    }
}

/// The sequence of a group's checkpoint.
#[must_use]
pub fn sequence(group: &GroupConfig) -> Sequence {
    let names = group.guest.iter().map(|agent| agent.name.clone());
    Sequence::new(limits(group), names)
}

/// Starts a watchdog in a process group of its own. Where systemd runs one as a service of its own
/// this is never needed.
fn start_watchdog(state: &Path, log: Stdio) -> io::Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("guest-watchdog")
        .arg("--state")
        .arg(state)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .process_group(0)
        .spawn()?;
    // Reaped when it ends; if we end first, somebody else does it.
    let reaper = std::thread::Builder::new().name("watchdog-end".into());
    reaper.spawn(move || child.wait())?;
    Ok(())
}

//! The intent: a small file that says which guest is about to be frozen and how to thaw it.
//!
//! Durable (file and folder synced) before anybody is frozen, removed after everybody is thawed for
//! certain. Each checkpoint has a file of its own name, so that nobody removes another's. Beside it
//! lies a lock for each group: whoever asks a guest to freeze or to thaw holds it, and the kernel
//! lets it go when a process dies.

use super::exec::Exec;
use super::provider::Provider;
use super::qga::Qga;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

const VERSION: u32 = 1;
const SUFFIX: &str = ".intent";

/// How a guest, or a part of a group, is frozen and thawed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentSpec {
    /// For people.
    pub name: String,
    /// How.
    pub way: Way,
}

/// The way to an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// QEMU's guest agent.
    Qga {
        /// Unix socket of its chardev.
        socket: PathBuf,
        /// Mount points to freeze; empty for all.
        mounts: Vec<String>,
    },
    /// Two commands.
    Exec {
        /// Program and arguments.
        freeze: Vec<String>,
        /// Program and arguments.
        thaw: Vec<String>,
        /// Time for one run of the thaw.
        timeout: Duration,
    },
}

impl AgentSpec {
    /// The provider for one checkpoint.
    #[must_use]
    pub fn provider(&self, group: &str, checkpoint: &str) -> Provider {
        match &self.way {
            Way::Qga { socket, mounts } => Provider::Qga(Qga::new(socket, mounts)),
            Way::Exec {
                freeze,
                thaw,
                timeout,
            } => {
                let exec = Exec::new(freeze, thaw, *timeout, group, checkpoint);
                Provider::Exec(Box::new(exec))
            }
        }
    }
}

/// What a file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    version: u32,
    /// Name of the group.
    pub group: String,
    /// The checkpoint, a random number.
    pub checkpoint: String,
    /// When somebody else may thaw although this process lives: since the host's boot.
    pub deadline_boottime: Duration,
    /// Who may be frozen.
    pub agents: Vec<AgentSpec>,
}

impl Intent {
    /// An intent to freeze these.
    #[must_use]
    pub fn new(group: &str, agents: &[AgentSpec], within: Duration) -> Self {
        Self {
            version: VERSION,
            group: group.to_owned(),
            checkpoint: uuid::Uuid::new_v4().simple().to_string(),
            deadline_boottime: boottime() + within,
            agents: agents.to_owned(),
        }
    }

    /// As the file holds it.
    ///
    /// # Errors
    /// A path that is no UTF-8.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        Ok(serde_json::to_vec_pretty(self)?)
    }

    /// What a file says.
    ///
    /// # Errors
    /// It is no intent, or one of another version; in words.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let intent: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if intent.version == VERSION {
            return Ok(intent);
        }
        Err(format!(
            "it has version {}, this program knows {VERSION}",
            intent.version
        ))
    }
}

/// The folder of intents.
#[derive(Debug, Clone)]
pub struct IntentFolder(PathBuf);

/// A group's guests are this process's to freeze and thaw, until it is dropped or the process ends.
#[derive(Debug)]
pub struct GroupLock(#[expect(dead_code, reason = "the open file is the lock")] File);

impl IntentFolder {
    /// The folder at this path, made if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(path: &Path) -> io::Result<Self> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)?;
        Ok(Self(path.to_owned()))
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn file(&self, intent: &Intent) -> PathBuf {
        let (group, checkpoint) = (&intent.group, &intent.checkpoint);
        self.0.join(format!("{group}-{checkpoint}{SUFFIX}"))
    }

    /// Stores an intent; durable when this returns.
    ///
    /// # Errors
    /// It is not durable; nobody may be frozen.
    pub fn store(&self, intent: &Intent) -> io::Result<()> {
        let path = self.file(intent);
        let draft = path.with_extension("draft");
        let mut file = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&draft)?;
        file.write_all(&intent.encode()?)?;
        file.sync_all()?;
        fs::rename(&draft, &path)?;
        File::open(&self.0)?.sync_all()
    }

    /// Whether it is still there.
    #[must_use]
    pub fn holds(&self, intent: &Intent) -> bool {
        self.file(intent).exists()
    }

    /// Removes an intent: everybody it names is thawed.
    ///
    /// # Errors
    /// It stays, and its guests are thawed once more by the next who reads it: harmless.
    pub fn remove(&self, intent: &Intent) -> io::Result<()> {
        match fs::remove_file(self.file(intent)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// All intents. One that cannot be read is told, with its file: somebody has to look.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn list(&self) -> io::Result<Vec<Intent>> {
        let mut intents = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let path = entry?.path();
            if path.extension().is_none_or(|end| end != &SUFFIX[1..]) {
                continue;
            }
            let bytes = match fs::read(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                read => read?,
            };
            match Intent::decode(&bytes) {
                Ok(intent) => intents.push(intent),
                Err(why) => tracing::error!(
                    file = %path.display(), why,
                    "an intent cannot be read: a guest may be frozen; thaw it, then remove the file"
                ),
            }
        }
        Ok(intents)
    }

    /// Takes a group's lock, if nobody has it.
    ///
    /// # Errors
    /// The lock's file cannot be opened.
    pub fn lock(&self, group: &str) -> io::Result<Option<GroupLock>> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.0.join(format!("{group}.lock")))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(GroupLock(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Time since the host's boot, sleep included.
#[must_use]
pub fn boottime() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_intent_is_there_until_it_is_removed_and_only_its_own() {
        let folder = tempfile::tempdir().expect("a folder");
        let intents = IntentFolder::open(&folder.path().join("guest")).expect("made");
        let agent = AgentSpec {
            name: "agent0".into(),
            way: Way::Qga {
                socket: "/run/a.sock".into(),
                mounts: vec!["/".into()],
            },
        };
        let one = Intent::new("vm1", &[agent], Duration::from_secs(9));
        let two = Intent::new("vm1", &[], Duration::from_secs(9));
        intents.store(&one).expect("stored");
        intents.store(&two).expect("stored");
        fs::write(intents.path().join("vm9-1.intent"), "{half").expect("written");
        intents.remove(&two).expect("removed");
        intents.remove(&two).expect("may be repeated");
        assert!(intents.holds(&one) && !intents.holds(&two));
        assert_eq!(intents.list().expect("readable"), [one]);
    }

    #[test]
    fn a_group_is_one_holders_at_a_time() {
        let folder = tempfile::tempdir().expect("a folder");
        let intents = IntentFolder::open(folder.path()).expect("made");
        let held = intents.lock("vm1").expect("works");
        assert!(held.is_some());
        assert!(intents.lock("vm1").expect("works").is_none());
        assert!(intents.lock("vm2").expect("works").is_some());
        drop(held);
        assert!(intents.lock("vm1").expect("works").is_some());
    }
}

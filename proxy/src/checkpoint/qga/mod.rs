//! QEMU's guest agent over the unix socket of its chardev.
//!
//! Owns the connection. Always holds: an answer counts only if it belongs to a request that was
//! sent since the last freeze was asked, told by the sentinel and random number of
//! `guest-sync-delimited` and by the `id` that agents give back; since the agent works in order,
//! such an answer shows that the freeze is no longer waiting. Whether an agent gives ids back is
//! told by its answer to the sync, which is ours for certain by its random number: from one that
//! does, an answer without an id is somebody else's. One that refuses requests with an id (most
//! before QEMU 4.0) is asked without. An exchange may be dropped at any await: what was half sent is
//! finished before the next request.

pub mod wire;

use super::agent::{Answer, Request, Survey, Trouble};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use wire::{Message, Wire};

/// File systems that FIFREEZE or VSS can freeze.
const FREEZABLE: [&str; 13] = [
    "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "nilfs2", "gfs2", "reiserfs",
    "bcachefs", "ntfs", "refs",
];
/// Numbers that are remembered of each kind of request.
const REMEMBERED_MAX: usize = 1000;
/// After so many syncs without an answer the connection is made anew.
const UNANSWERED_MAX: u32 = 4;

/// An agent.
#[derive(Debug)]
pub struct Qga {
    path: PathBuf,
    /// Only these; empty for all.
    mounts: Vec<String>,
    connection: Option<UnixStream>,
    wire: Wire,
    /// Not sent yet.
    out: VecDeque<u8>,
    /// Numbers of syncs and other requests since the freeze.
    asked: VecDeque<(&'static str, u64)>,
    unanswered: u32,
    /// Whether the last sync's answer carried the id of its request.
    gives_ids: bool,
    /// Whether the agent has refused a request since it had an id.
    refuses_ids: bool,
}

/// What an agent says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Description {
    /// Version.
    pub version: String,
    /// Name of the guest's operating system; empty if it does not say.
    pub system: String,
    /// Whether it is Windows, where a freeze is a VSS snapshot.
    pub windows: bool,
    /// Commands that a checkpoint needs and that are switched off or missing.
    pub missing: Vec<String>,
}

impl Qga {
    /// The agent behind this socket; connects when it is asked first.
    #[must_use]
    pub fn new(path: &Path, mounts: &[String]) -> Self {
        Self {
            path: path.to_owned(),
            mounts: mounts.to_owned(),
            connection: None,
            wire: Wire::default(),
            out: VecDeque::new(),
            asked: VecDeque::new(),
            unanswered: 0,
            gives_ids: false,
            refuses_ids: false,
        }
    }

    /// One exchange; `sent` is called when the request has left.
    ///
    /// # Errors
    /// No answer that could be used. How long to wait is the caller's to decide.
    pub async fn ask(&mut self, request: Request, sent: impl FnOnce()) -> Result<Answer, Trouble> {
        let result = self.exchange(request, sent).await;
        if matches!(result, Err(Trouble::Disconnected | Trouble::Unreachable(_))) {
            self.disconnect();
        }
        result
    }

    async fn exchange(&mut self, request: Request, sent: impl FnOnce()) -> Result<Answer, Trouble> {
        match request {
            Request::Sync => {
                self.asked.clear();
                self.wire.clear();
                self.step_in(None, sent).await?;
                Ok(Answer::InStep)
            }
            Request::SyncThaw => {
                if self.unanswered >= UNANSWERED_MAX {
                    self.disconnect();
                }
                self.unanswered += 1;
                self.step_in(Some(THAW), sent).await?;
                self.unanswered = 0;
                // Whether it thawed is asked next; an error here is no answer to that.
                match self.answer(THAW, Value::is_number).await {
                    Ok(_) | Err(Trouble::Refused(_)) => Ok(Answer::InStep),
                    Err(trouble) => Err(trouble),
                }
            }
            Request::Status => {
                self.queue(STATUS, None);
                self.flush(sent).await?;
                let status = self.answer(STATUS, Value::is_string).await?;
                match status.as_str() {
                    Some("thawed") => Ok(Answer::Status { frozen: false }),
                    Some("frozen") => Ok(Answer::Status { frozen: true }),
                    _ => Err(Trouble::Garbled(status.to_string())),
                }
            }
            Request::Survey => {
                self.queue(FSINFO, None);
                self.flush(sent).await?;
                let list = self.answer(FSINFO, Value::is_array).await?;
                Ok(Answer::Survey(survey(&list, &self.mounts)))
            }
            Request::Freeze => {
                // Only what is asked from here on shows that this freeze is over.
                self.asked.clear();
                let command = if self.mounts.is_empty() {
                    self.queue(FREEZE, None);
                    FREEZE
                } else {
                    let arguments = json!({ "mountpoints": self.mounts });
                    self.queue(FREEZE_LIST, Some(arguments));
                    FREEZE_LIST
                };
                self.flush(sent).await?;
                let count = self.answer(command, Value::is_number).await?;
                self.asked.clear();
                Ok(Answer::Frozen {
                    count: number(&count)?,
                })
            }
            Request::Thaw => {
                self.queue(THAW, None);
                self.flush(sent).await?;
                let count = self.answer(THAW, Value::is_number).await?;
                Ok(Answer::Thawed {
                    count: number(&count)?,
                })
            }
        }
    }

    /// A sync, with a command right behind it, up to the sync's answer; once more without ids if the
    /// agent refuses them.
    async fn step_in(
        &mut self,
        behind: Option<&'static str>,
        sent: impl FnOnce(),
    ) -> Result<(), Trouble> {
        let mut sent = Some(sent);
        loop {
            self.queue_sync();
            if let Some(command) = behind {
                self.queue(command, None);
            }
            self.flush(|| {
                if let Some(sent) = sent.take() {
                    sent();
                }
            })
            .await?;
            if self.synced().await? == Synced::InStep {
                return Ok(());
            }
        }
    }

    /// What the agent is and can; for people.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn describe(&mut self) -> Result<Description, Trouble> {
        self.queue(INFO, None);
        self.flush(|| ()).await?;
        let info = self.answer(INFO, Value::is_object).await?;
        self.queue(OSINFO, None);
        self.flush(|| ()).await?;
        let system = match self.answer(OSINFO, Value::is_object).await {
            Ok(system) => system,
            // Agents before 2.10 do not know it.
            Err(Trouble::Refused(_)) => Value::Null,
            Err(trouble) => return Err(trouble),
        };
        let commands = info["supported_commands"].as_array();
        let enabled = |name: &&str| {
            commands.into_iter().flatten().any(|command| {
                command["name"].as_str() == Some(name) && command["enabled"] != Value::Bool(false)
            })
        };
        let freeze = if self.mounts.is_empty() {
            FREEZE
        } else {
            FREEZE_LIST
        };
        let needed = [SYNC, STATUS, freeze, THAW];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(Description {
            version: text(&info["version"]),
            system: text(&system["pretty-name"]),
            windows: system["id"].as_str() == Some("mswindows"),
            missing: needed
                .iter()
                .filter(|name| !enabled(name))
                .map(|name| (*name).to_owned())
                .collect(),
        })
    }

    fn disconnect(&mut self) {
        self.connection = None;
        self.wire.clear();
        self.out.clear();
        self.unanswered = 0;
        self.gives_ids = false;
    }

    fn queue_sync(&mut self) {
        let id = self.remember(SYNC);
        // Ends whatever half line of somebody else the agent is still reading.
        self.out.push_back(0xFF);
        let mut line = json!({ "execute": SYNC, "arguments": { "id": id } });
        if !self.refuses_ids {
            line["id"] = id.into();
        }
        self.queue_line(&line);
    }

    fn queue(&mut self, command: &'static str, arguments: Option<Value>) {
        let id = self.remember(command);
        let mut line = json!({ "execute": command });
        if !self.refuses_ids {
            line["id"] = id.into();
        }
        if let Some(arguments) = arguments {
            line["arguments"] = arguments;
        }
        self.queue_line(&line);
    }

    fn queue_line(&mut self, line: &Value) {
        self.out.extend(line.to_string().bytes());
        self.out.push_back(b'\n');
    }

    fn remember(&mut self, command: &'static str) -> u64 {
        // Fits every reader of JSON numbers.
        let id = uuid::Uuid::new_v4().as_u64_pair().0 >> 12;
        self.asked.push_back((command, id));
        if self.asked.len() > REMEMBERED_MAX {
            self.asked.pop_front();
        }
        id
    }

    fn was_asked(&self, command: &str, id: u64) -> bool {
        self.asked.iter().any(|asked| *asked == (command, id))
    }

    async fn connected(&mut self) -> Result<&mut UnixStream, Trouble> {
        if self.connection.is_none() {
            let connected = UnixStream::connect(&self.path).await;
            let connected = connected
                .map_err(|error| Trouble::Unreachable(format!("{}: {error}", self.path.display())));
            self.connection = Some(connected?);
        }
        self.connection.as_mut().ok_or(Trouble::Disconnected)
    }

    async fn flush(&mut self, sent: impl FnOnce()) -> Result<(), Trouble> {
        while !self.out.is_empty() {
            let line = self.out.make_contiguous().to_vec();
            let written = self.connected().await?.write(&line).await;
            match written {
                Ok(0) | Err(_) => return Err(Trouble::Disconnected),
                Ok(count) => drop(self.out.drain(..count)),
            }
        }
        sent();
        Ok(())
    }

    async fn line(&mut self) -> Result<wire::Line, Trouble> {
        loop {
            if let Some(line) = self.wire.next_line() {
                return Ok(line);
            }
            let mut bytes = [0; 4096];
            let read = self.connected().await?.read(&mut bytes).await;
            match read {
                Ok(0) | Err(_) => return Err(Trouble::Disconnected),
                Ok(count) => self.wire.push(&bytes[..count]),
            }
        }
    }

    /// Reads up to the answer to one of our syncs; everything before it is somebody's past. Ends
    /// early when the agent turns out to refuse ids: what was asked with them is to be asked again.
    async fn synced(&mut self) -> Result<Synced, Trouble> {
        loop {
            let line = self.line().await?;
            let Ok(Message { id, outcome }) = line.message else {
                continue;
            };
            match outcome {
                Ok(value)
                    if line.delimited
                        && value.as_u64().is_some_and(|id| self.was_asked(SYNC, id)) =>
                {
                    self.gives_ids = id.is_some() && id == value.as_u64();
                    return Ok(Synced::InStep);
                }
                Err(text) if !self.refuses_ids && is_about_ids(&text) => {
                    self.refuses_ids = true;
                    return Ok(Synced::WithoutIds);
                }
                _ => {}
            }
        }
    }

    /// Reads the answer to a command: what carries another number, or none although the agent gives
    /// them back, is not it; from agents that give none back, what has another form is not.
    async fn answer(
        &mut self,
        command: &'static str,
        form: fn(&Value) -> bool,
    ) -> Result<Value, Trouble> {
        loop {
            let line = self.line().await?;
            if line.delimited {
                continue;
            }
            let message = line.message.map_err(Trouble::Garbled)?;
            let ours = match message.id {
                Some(id) => self.was_asked(command, id),
                None => !self.gives_ids,
            };
            if !ours {
                continue;
            }
            match message.outcome {
                Ok(value) if form(&value) => return Ok(value),
                Ok(value) if message.id.is_some() => {
                    return Err(Trouble::Garbled(value.to_string()));
                }
                Ok(_) => {}
                Err(text) => return Err(Trouble::Refused(text)),
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Synced {
    InStep,
    WithoutIds,
}

/// As QEMU's dispatcher refuses a member that it does not know: "QMP input member 'id' is
/// unexpected", "QMP input object member 'id' is unexpected".
fn is_about_ids(error: &str) -> bool {
    error.contains("member 'id' is unexpected")
}

const SYNC: &str = "guest-sync-delimited";
const STATUS: &str = "guest-fsfreeze-status";
const FREEZE: &str = "guest-fsfreeze-freeze";
const FREEZE_LIST: &str = "guest-fsfreeze-freeze-list";
const THAW: &str = "guest-fsfreeze-thaw";
const FSINFO: &str = "guest-get-fsinfo";
const INFO: &str = "guest-info";
const OSINFO: &str = "guest-get-osinfo";

fn number(value: &Value) -> Result<u32, Trouble> {
    let number = value.as_u64().and_then(|count| u32::try_from(count).ok());
    number.ok_or_else(|| Trouble::Garbled(value.to_string()))
}

fn survey(list: &Value, mounts: &[String]) -> Survey {
    let mut survey = Survey::default();
    // A volume's name on Windows is not what the agent lists; its VSS refuses one that is not there.
    let is_path = |mount: &&String| !mount.starts_with(r"\\?\");
    let mut missing: Vec<&String> = mounts.iter().filter(is_path).collect();
    for entry in list.as_array().into_iter().flatten() {
        let text = |key: &str| entry[key].as_str().unwrap_or_default();
        let mount = text("mountpoint").to_owned();
        // Drive letters may be written either way.
        let same = |other: &String| other.eq_ignore_ascii_case(&mount);
        let wanted = mounts.is_empty() || mounts.iter().any(same);
        missing.retain(|missing| !same(missing));
        let kind = text("type").to_ascii_lowercase();
        if wanted && FREEZABLE.contains(&kind.as_str()) {
            survey.freezable.push(mount);
        } else if wanted {
            survey.skipped.push(format!("{mount}({kind})"));
        }
    }
    survey.freezable.sort();
    survey.skipped.sort();
    survey.missing = missing.into_iter().cloned().collect();
    survey
}

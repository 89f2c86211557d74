//! A guest's agent on a unix socket that misbehaves as told, and the guest behind it.
//!
//! Works as the real one behind QEMU's chardev does: one client at a time, requests in order, and
//! what was sent is executed although the client has gone.

use serde_json::{Value, json};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;

/// How the agent behaves, each once unless said otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Script {
    /// As it should.
    Good,
    /// As it should, without giving back ids.
    WithoutIds,
    /// As it should, but refuses every request with an id (agents before QEMU 4).
    RefusesIds,
    /// Freezes at once, answers that after so long.
    AnswersLate(Duration),
    /// Takes the freeze, executes and answers it after so long.
    Hangs(Duration),
    /// Before the freeze's answer: the answer to somebody else's request.
    OtherId,
    /// Instead of the freeze's answer: garbage and half a line. Frozen all the same.
    Garbage,
    /// Answers the sync with another number, never with the right one.
    WrongSync,
    /// An earlier client's answer comes before the sync's.
    LateAnswerOfAnother,
    /// Freezes nothing.
    Zero,
    /// Thaws all and says fewer.
    Fewer,
    /// Thaws and answers with VSS's error, as after its 10 s.
    ThawError,
    /// Takes the first thaw, neither executes nor answers it.
    LosesThaw,
    /// And the second.
    LosesThaws,
    /// Somebody else asks the same, without ids, and is answered on the same connection: before
    /// ours is executed.
    Shared,
    /// Both: what somebody else is told is not true of the guest.
    SharedLosesThaw,
    /// Ends the connection after the freeze was executed.
    CutFrozen,
    /// Ends the connection after the freeze was executed, is away for so long, comes back frozen.
    DiesFrozen(Duration),
    /// Never answers anything.
    Deaf,
    /// Frozen by somebody else.
    FrozenBefore,
}

#[derive(Debug, Default)]
pub(super) struct Guest {
    pub(super) frozen_since: Option<Instant>,
    pub(super) frozen_max: Duration,
    pub(super) freezes: u32,
    /// From the next client on the agent is good.
    pub(super) healed: bool,
}

pub(super) type Shared = Arc<Mutex<Guest>>;

pub(super) const MOUNTS: u32 = 3;

/// Serves until it is dropped. The script counts for the first freeze; after it the agent is good.
pub(super) fn start(path: &Path, script: Script) -> (Shared, tokio::task::JoinHandle<()>) {
    let guest = Shared::default();
    if script == Script::FrozenBefore {
        guest.lock().expect("whole").frozen_since = Some(Instant::now());
    }
    let listener = UnixListener::bind(path).expect("bound");
    let agent = Agent {
        script,
        guest: Arc::clone(&guest),
    };
    (guest, tokio::spawn(agent.serve(listener)))
}

struct Agent {
    script: Script,
    guest: Shared,
}

impl Agent {
    async fn serve(mut self, listener: UnixListener) {
        loop {
            let (stream, _) = listener.accept().await.expect("a client");
            self.client(stream).await;
            if let Script::DiesFrozen(away) = self.script {
                self.script = Script::Good;
                tokio::time::sleep(away).await;
            }
        }
    }

    /// One client, to its end.
    async fn client(&mut self, mut stream: UnixStream) {
        let mut received = Vec::new();
        if self.guest.lock().expect("whole").healed {
            self.script = Script::Good;
        }
        loop {
            while let Some(end) = received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = received.drain(..=end).collect();
                let line = line.strip_prefix(b"\xff").unwrap_or(&line);
                let request: Value = serde_json::from_slice(line).expect("valid JSON");
                if let Some(other) = self.answer_to_another(&request) {
                    stream.write_all(other.as_bytes()).await.ok();
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                let Some(answer) = self.execute(&request).await else {
                    return;
                };
                // The client may be gone.
                stream.write_all(&answer).await.ok();
            }
            let mut bytes = [0; 4096];
            match stream.read(&mut bytes).await {
                Ok(0) | Err(_) => return,
                Ok(count) => received.extend_from_slice(&bytes[..count]),
            }
        }
    }

    fn answer_to_another(&self, request: &Value) -> Option<String> {
        if !matches!(self.script, Script::Shared | Script::SharedLosesThaw) {
            return None;
        }
        let answer = match request["execute"].as_str()? {
            "guest-fsfreeze-status" => json!({ "return": "thawed" }),
            "guest-fsfreeze-freeze" => json!({ "return": MOUNTS }),
            "guest-fsfreeze-thaw" => json!({ "error": { "desc": "somebody else's" } }),
            "guest-get-fsinfo" => json!({ "return": [] }),
            _ => return None,
        };
        Some(format!("{answer}\n"))
    }

    /// The bytes to answer; none to end the connection.
    async fn execute(&mut self, request: &Value) -> Option<Vec<u8>> {
        let script = self.script;
        let answer = |value: Value| {
            let mut answer = json!({ "return": value });
            if script != Script::WithoutIds && !request["id"].is_null() {
                answer["id"] = request["id"].clone();
            }
            format!("{answer}\n").into_bytes()
        };
        let good = Some(answer(json!(MOUNTS)));
        if script == Script::RefusesIds && !request["id"].is_null() {
            let text = "QMP input object member 'id' is unexpected";
            let refused = json!({ "error": { "class": "GenericError", "desc": text } });
            return Some(format!("{refused}\n").into_bytes());
        }
        if self.script == Script::Deaf {
            return Some(Vec::new());
        }
        match request["execute"].as_str().expect("a command") {
            "guest-sync-delimited" => {
                let id = request["arguments"]["id"].as_u64().expect("a number");
                let id = if self.script == Script::WrongSync {
                    id + 1
                } else {
                    id
                };
                let mut bytes = Vec::new();
                if self.script == Script::LateAnswerOfAnother {
                    bytes.extend(b"{\"return\": \"frozen\"}\n{\"return\": 17}\n{\"retu");
                }
                bytes.push(0xFF);
                bytes.extend(answer(json!(id)));
                Some(bytes)
            }
            "guest-fsfreeze-status" => {
                let frozen = self.guest.lock().expect("whole").frozen_since.is_some();
                Some(answer(json!(if frozen { "frozen" } else { "thawed" })))
            }
            "guest-get-fsinfo" => {
                let disk = |mountpoint: &str, kind: &str| json!({"mountpoint": mountpoint, "type": kind, "disk": []});
                Some(answer(json!([
                    disk("/", "ext4"),
                    disk("/srv", "xfs"),
                    disk("/var", "ext4"),
                    disk("/boot/efi", "vfat"),
                ])))
            }
            "guest-fsfreeze-freeze" if script == Script::Zero => {
                self.script = Script::Good;
                Some(answer(json!(0)))
            }
            "guest-fsfreeze-freeze" | "guest-fsfreeze-freeze-list" => self.freeze(good).await,
            "guest-fsfreeze-thaw" if script == Script::LosesThaw => {
                self.script = Script::Good;
                Some(Vec::new())
            }
            "guest-fsfreeze-thaw" if script == Script::LosesThaws => {
                self.script = Script::LosesThaw;
                Some(Vec::new())
            }
            "guest-fsfreeze-thaw" if script == Script::SharedLosesThaw => {
                self.script = Script::Shared;
                Some(Vec::new())
            }
            "guest-fsfreeze-thaw" => {
                self.thaw();
                match self.script {
                    Script::Fewer => {
                        self.script = Script::Good;
                        Some(answer(json!(MOUNTS - 1)))
                    }
                    Script::ThawError => {
                        self.script = Script::Good;
                        let error = json!({
                            "error": {"class": "GenericError", "desc": "couldn't hold writes"},
                            "id": request["id"],
                        });
                        Some(format!("{error}\n").into_bytes())
                    }
                    _ => good,
                }
            }
            other => panic!("unexpected {other}"),
        }
    }

    async fn freeze(&mut self, good: Option<Vec<u8>>) -> Option<Vec<u8>> {
        let script = self.script;
        let stays = [
            Script::Fewer,
            Script::ThawError,
            Script::WithoutIds,
            Script::RefusesIds,
            Script::LosesThaw,
            Script::LosesThaws,
            Script::Shared,
            Script::SharedLosesThaw,
        ];
        if !stays.contains(&script) && !matches!(script, Script::DiesFrozen(_)) {
            self.script = Script::Good;
        }
        if let Script::Hangs(late) = script {
            tokio::time::sleep(late).await;
        }
        {
            let mut guest = self.guest.lock().expect("whole");
            guest.freezes += 1;
            guest.frozen_since = Some(Instant::now());
        }
        match script {
            Script::AnswersLate(late) => tokio::time::sleep(late).await,
            Script::Garbage => return Some(b"{\"return\": {{{\n{\"ret".to_vec()),
            Script::OtherId => {
                let mut bytes = b"{\"return\": 99, \"id\": 1}\n".to_vec();
                bytes.extend(good?);
                return Some(bytes);
            }
            Script::CutFrozen | Script::DiesFrozen(_) => return None,
            _ => {}
        }
        good
    }

    fn thaw(&self) {
        let mut guest = self.guest.lock().expect("whole");
        if let Some(since) = guest.frozen_since.take() {
            guest.frozen_max = guest.frozen_max.max(since.elapsed());
        }
    }
}

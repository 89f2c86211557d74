//! A primary's connection to a replica, byte by byte: hellos, segments, signs of life, messages out
//! of turn, noise, and an end anywhere.
//!
//! What must hold: the replica ends; all it says is whole messages, of those that a replica sends; a
//! refusal is its last word; it acknowledges no more than it was sent, in order, each cursor a place
//! of this log; and what it acknowledged is in the repository.

use crate::bytes_of::Script;
use crate::receive::{Log, NAME, group};
use afterimage_format::ids::{Epoch, Lsn};
use afterimage_format::op::Op;
use afterimage_format::wire::{ErrorCode, HelloReply, Message, RemoteError};
use afterimage_proxy::ship::codec::{CodecError, read_message, write_message};
use afterimage_replica::group::Group;
use afterimage_replica::receive::{Conversation, Peer, Receiver, ServerLimits};
use afterimage_replica::repository::Repository;
use afterimage_replica::verify::verify;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncWriteExt, duplex};
use tokio_util::sync::CancellationToken;

const STEPS_MAX: usize = 32;
const SILENCE: Duration = Duration::from_secs(60);

/// What was said, for the judge.
#[derive(Default)]
struct Said {
    hellos: usize,
    segments: u64,
}

pub(crate) fn run(data: &[u8]) {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
    }
    RUNTIME.with(|runtime| runtime.block_on(talk(Script::new(data))));
}

async fn talk(mut script: Script<'_>) {
    let mut log = Log::new(0x11);
    let mut said = Said::default();
    let mut bytes: Vec<u8> = Vec::new();
    for _ in 0..STEPS_MAX {
        if script.is_empty() {
            break;
        }
        match script.below(10) {
            0 | 1 => {
                said.hellos += 1;
                log.epoch = Epoch(script.below(3) as u64);
                let hello = log.hello(log.epoch, script.below(8) == 7);
                say(&mut bytes, Message::Hello(hello)).await;
            }
            2 => log.write(&mut script),
            3 => log.append(Op::Trim, script.below(8) as u64, 3, Vec::new()),
            4..=6 => {
                let from = 1 + script.below(log.last().min(256));
                let to = (from + script.below(4)).min(log.last());
                log.epoch = Epoch(1 + script.below(2) as u64);
                if let Some(segment) = log.segment(from, to) {
                    said.segments += 1;
                    say(&mut bytes, Message::Segment(segment)).await;
                }
            }
            7 => say(&mut bytes, odd(&mut script)).await,
            // From here on the two are out of step.
            8 => {
                let len = script.below(64);
                bytes.extend_from_slice(script.take(len));
            }
            _ => {
                let cut = script.below(64).min(bytes.len());
                bytes.truncate(bytes.len() - cut);
            }
        }
    }
    let repository = Repository::in_memory();
    let heard = converse(&bytes, &repository).await;
    judge(heard, &said, &log, &repository).await;
}

/// A message that is not a primary's, or says nothing.
fn odd(script: &mut Script<'_>) -> Message {
    match script.below(4) {
        0 => Message::HelloReply(HelloReply::NewEpoch(Epoch(2))),
        1 => Message::Error(RemoteError {
            code: ErrorCode::Protocol,
            text: "no".to_owned(),
        }),
        2 => Message::Segment(script.take(40).to_vec().into()),
        _ => Message::KeepAlive,
    }
}

async fn say(bytes: &mut Vec<u8>, message: Message) {
    let said = write_message(bytes, &message, SILENCE).await;
    said.expect("memory takes everything");
}

/// All that the replica says to these bytes.
async fn converse(bytes: &[u8], repository: &Repository) -> Vec<Message> {
    let (mut client, server) = duplex(1 << 20);
    let limits = ServerLimits::default();
    let receiver = Receiver::new(repository.clone());
    let conversation = Conversation::new(receiver, limits, Arc::new(|| 1));
    let stop = CancellationToken::new();
    let serving = conversation.run(server, &Peer::Direct, stop);
    let speaking = async {
        // Who was refused early is not listened to any more.
        let _ = client.write_all(bytes).await;
        let _ = client.shutdown().await;
        let mut heard = Vec::new();
        loop {
            match read_message(&mut client, SILENCE).await {
                Ok(message) => heard.push(message),
                Err(CodecError::Closed) => return heard,
                Err(error) => panic!("no message: {error}"),
            }
        }
    };
    tokio::join!(serving, speaking).1
}

async fn judge(heard: Vec<Message>, said: &Said, log: &Log, repository: &Repository) {
    let mut acked = Lsn::ZERO;
    let (mut replies, mut acks) = (0, 0);
    let count = heard.len();
    for (at, message) in heard.into_iter().enumerate() {
        match message {
            Message::HelloReply(_) => replies += 1,
            Message::Ack(ack) => {
                acks += 1;
                assert_eq!(ack.segments, acks, "an acknowledgement left out");
                assert!(ack.cursor.lsn >= acked, "the cursor went back");
                acked = ack.cursor.lsn;
                let chain = log.chain.get(acked.0 as usize);
                assert_eq!(chain, Some(&ack.cursor.chain), "another history");
            }
            Message::KeepAlive => {}
            Message::Error(_) => assert_eq!(at + 1, count, "words after the last"),
            other => panic!("not a replica's: {other:?}"),
        }
    }
    assert!(replies <= said.hellos && acks <= said.segments);
    let Ok(stored) = Group::load(repository, group()).await else {
        assert_eq!(acked, Lsn::ZERO, "what was acknowledged is gone");
        return;
    };
    {
        let history = stored.history();
        let last = history.newest().map_or(Lsn::ZERO, |epoch| epoch.cursor.lsn);
        assert!(last >= acked, "what was acknowledged is gone");
    }
    let report = verify(repository, NAME, |_| {}).await.expect("a report");
    assert_eq!(report.problems, []);
}

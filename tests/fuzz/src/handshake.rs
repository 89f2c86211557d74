//! The NBD handshake as a state machine. What must hold: the server ends; it answers the options that
//! came whole, in order, each with answers of that option of which only the last is final; what it
//! opens is the export, and only after GO or EXPORT_NAME; its answers are bounded.

use afterimage_format::ids::{DiskIndex, GroupId};
use afterimage_format::nbd::constants::{opt, rep};
use afterimage_format::nbd::option::{OptionHeader, decode_reply, greeting};
use afterimage_proxy::nbd::export::{
    BoxFuture, ExportInfo, Exports, ListedExport, OpenError, Peer, PeerAddress, Target,
};
use afterimage_proxy::nbd::handshake::{TlsPolicy, Watch, negotiate};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

/// What an answer is at most longer than its question: the list of exports, information.
const ANSWER_MAX: usize = 4096;

struct OneDisk;

fn disk(name: &str) -> ExportInfo {
    ExportInfo {
        name: name.into(),
        description: "a disk".into(),
        size: 1 << 20,
        read_only: false,
        rotational: false,
        has_dirty: true,
        target: Target::Disk {
            group: GroupId::from_bytes([1; 16]),
            disk: DiskIndex(0),
        },
    }
}

impl Exports for OneDisk {
    fn list<'a>(&'a self, _: &'a Peer) -> BoxFuture<'a, Vec<ListedExport>> {
        let one = ListedExport {
            name: "vm1/vda".into(),
            description: "a disk".into(),
        };
        Box::pin(async move { vec![one] })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
        _: &'a Peer,
    ) -> BoxFuture<'a, Result<ExportInfo, OpenError>> {
        let found = match name {
            "vm1/vda" => Ok(disk(name)),
            _ => Err(OpenError::Unknown),
        };
        Box::pin(async move { found })
    }

    fn quiesce<'a>(&'a self, _: &'a ExportInfo) -> BoxFuture<'a, Result<(), OpenError>> {
        Box::pin(async { Ok(()) })
    }
}

pub(crate) fn run(data: &[u8]) {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
    }
    RUNTIME.with(|runtime| runtime.block_on(speak(data)));
}

async fn speak(data: &[u8]) {
    let peer = Peer {
        address: PeerAddress::Unix { uid: 0, pid: 0 },
        groups: None,
        tls: false,
        identity: None,
        ack_durable: false,
    };
    let (mut client, server) = duplex(16 << 20);
    client.write_all(data).await.expect("room");
    client.shutdown().await.expect("closed");
    let (watch, exports) = (Watch::default(), OneDisk);
    let outcome = negotiate(server, peer, &TlsPolicy::Off, &watch, &exports).await;
    let opened = matches!(outcome, Ok(Some(_)));
    if let Ok(Some(connected)) = &outcome {
        assert_eq!(connected.negotiated.export.name, "vm1/vda");
    }
    let left = matches!(outcome, Ok(None));
    let answer = match &outcome {
        Ok(Some(connected)) => connected.negotiated.answer.clone(),
        _ => Vec::new(),
    };
    drop(outcome);
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).await.expect("an end");
    heard.extend(answer);
    // An option is at least 16 bytes long.
    let answers = 2 + data.len() / 16;
    assert!(heard.len() <= answers * ANSWER_MAX, "{} bytes", heard.len());
    judge(data, &heard, opened, left);
}

/// What was said and heard, option by option.
fn judge(said: &[u8], heard: &[u8], opened: bool, left: bool) {
    let mut heard = heard.strip_prefix(&greeting()[..]).expect("a greeting");
    let options = options(said.get(4..).unwrap_or_default());
    for option in &options {
        if heard.is_empty() {
            break;
        }
        if *option == opt::EXPORT_NAME {
            assert!(
                opened && [10, 134].contains(&heard.len()),
                "no answer to EXPORT_NAME"
            );
            return;
        }
        let mut last = false;
        while !last {
            let (head, rest) = heard.split_first_chunk().expect("a whole answer");
            let (to, kind, len) = decode_reply(head).expect("an answer");
            let (data, rest) = rest.split_at_checked(len as usize).expect("all of it");
            assert_eq!(to, *option, "an answer to something else");
            last = kind == rep::ACK || kind & rep::ERROR_BIT != 0;
            assert!(last || [rep::SERVER, rep::INFO, rep::META_CONTEXT].contains(&kind));
            assert!(kind != rep::ACK || data.is_empty());
            heard = rest;
            if kind == rep::ACK && *option == opt::GO {
                assert!(opened && heard.is_empty(), "GO is the end");
                return;
            }
            if kind == rep::ACK && *option == opt::ABORT {
                assert!(left && heard.is_empty(), "ABORT is the end");
                return;
            }
        }
    }
    assert!(heard.is_empty(), "an answer to nothing");
    assert!(!opened, "opened without GO");
}

/// The options that came whole.
fn options(mut said: &[u8]) -> Vec<u32> {
    let mut options = Vec::new();
    while let Some((head, rest)) = said.split_first_chunk()
        && let Ok(header) = OptionHeader::decode(head)
        && let Some((_, rest)) = rest.split_at_checked(header.length as usize)
    {
        options.push(header.option);
        said = rest;
    }
    options
}

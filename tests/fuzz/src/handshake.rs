//! The NBD handshake as a state machine: the server ends, without a panic, with bounded answers.

use afterimage_format::ids::{DiskIndex, GroupId};
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
    if let Ok(Some(connected)) = &outcome {
        assert_eq!(connected.negotiated.export.name, "vm1/vda");
    }
    drop(outcome);
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).await.expect("an end");
    // An option is at least 16 bytes long.
    let answers = 2 + data.len() / 16;
    assert!(heard.len() <= answers * ANSWER_MAX, "{} bytes", heard.len());
}

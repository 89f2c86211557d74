//! For tests: exports in memory, and a client that says exactly what it is told to.

use super::device::Device;
use super::export::{
    BoxFuture, ExportInfo, Exports, ListedExport, OpenError, Peer, PeerAddress, Target,
};
use crate::engine::request::{Extent, RequestError};
use afterimage_format::ids::{DiskIndex, GroupId};
use afterimage_format::nbd::constants::{opt, rep};
use afterimage_format::nbd::option::{
    InfoQuery, MetaQuery, OPTION_REPLY_BYTES, OptionHeader, decode_reply,
};
use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;

/// Bytes of every disk here.
pub(crate) const SIZE: u64 = 1 << 20;

/// A device of zeroes.
struct Zeroes;

impl Device for Zeroes {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read<'a>(&'a self, _: u64, buffer: &'a mut [u8]) -> BoxFuture<'a, Result<(), RequestError>> {
        buffer.fill(0);
        Box::pin(async { Ok(()) })
    }

    fn block_status(
        &self,
        _: u64,
        len: u64,
        _: u32,
    ) -> BoxFuture<'_, Result<Vec<Extent>, RequestError>> {
        let extent = Extent {
            len,
            hole: true,
            zero: true,
            dirty: false,
        };
        Box::pin(async move { Ok(vec![extent]) })
    }
}

/// Notes writes and keeps nothing.
#[derive(Default)]
pub(crate) struct Notes(Mutex<Vec<String>>);

impl Notes {
    /// What was written since the last call.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().expect("no panic"))
    }
}

impl Device for Notes {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read<'a>(&'a self, _: u64, _: &'a mut [u8]) -> BoxFuture<'a, Result<(), RequestError>> {
        Box::pin(async { Err(RequestError::Io) })
    }

    fn block_status(
        &self,
        _: u64,
        _: u64,
        _: u32,
    ) -> BoxFuture<'_, Result<Vec<Extent>, RequestError>> {
        Box::pin(async { Err(RequestError::Io) })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        data: &'a [u8],
        _: bool,
    ) -> BoxFuture<'a, Result<(), RequestError>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            let note = format!("write {offset} {}", data.len());
            self.0.lock().expect("no panic").push(note);
            Ok(())
        })
    }
}

/// `vm1/vda`, `vm1/vdb` (disks) and `vm2@latest/vda` (a read-only device).
pub(crate) struct TestExports {
    /// What was called, in order.
    pub(crate) calls: Mutex<Vec<String>>,
    /// `quiesce` takes one of these each time.
    pub(crate) quiet: Semaphore,
}

impl TestExports {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            calls: Mutex::new(Vec::new()),
            quiet: Semaphore::new(1000),
        })
    }

    fn note(&self, call: String) {
        self.calls.lock().expect("no panic").push(call);
    }
}

impl Exports for TestExports {
    fn list<'a>(&'a self, _: &'a Peer) -> BoxFuture<'a, Vec<ListedExport>> {
        let all = ["vm1/vda", "vm1/vdb", "vm2@latest/vda"].map(|name| ListedExport {
            name: name.into(),
            description: "a disk".into(),
        });
        Box::pin(async move { all.into() })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
        _: &'a Peer,
    ) -> BoxFuture<'a, Result<ExportInfo, OpenError>> {
        self.note(format!("open {name}"));
        let disk = |disk| Target::Disk {
            group: GroupId::from_bytes([1; 16]),
            disk: DiskIndex(disk),
        };
        let target = match name {
            "vm1/vda" => Ok(disk(0)),
            "vm1/vdb" => Ok(disk(1)),
            "vm2@latest/vda" => Ok(Target::Device(Arc::new(Zeroes))),
            "vm1/broken" => Err(OpenError::Unavailable),
            _ => Err(OpenError::Unknown),
        };
        let info = target.map(|target| ExportInfo {
            name: name.into(),
            description: "a disk".into(),
            size: SIZE,
            read_only: matches!(target, Target::Device(_)),
            rotational: false,
            has_dirty: matches!(target, Target::Disk { .. }),
            target,
        });
        Box::pin(async move { info })
    }

    fn quiesce<'a>(&'a self, export: &'a ExportInfo) -> BoxFuture<'a, Result<(), OpenError>> {
        Box::pin(async move {
            let permit = self.quiet.acquire().await;
            permit.map_err(|_| OpenError::ShuttingDown)?.forget();
            self.note(format!("quiesce {}", export.name));
            Ok(())
        })
    }
}

/// A peer that may open everything.
pub(crate) fn anybody() -> Peer {
    Peer {
        address: PeerAddress::Unix { uid: 0, pid: 0 },
        groups: None,
        tls: false,
        identity: None,
        ack_durable: false,
    }
}

/// A client in the handshake.
pub(crate) struct Client<S> {
    pub(crate) stream: S,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    /// Reads the greeting and answers it.
    pub(crate) async fn greet(mut stream: S, flags: u32) -> io::Result<Self> {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(greeting[16..], [0, 3]);
        stream.write_all(&flags.to_be_bytes()).await?;
        stream.flush().await?;
        Ok(Self { stream })
    }

    pub(crate) async fn say(&mut self, option: u32, length: u32, data: &[u8]) -> io::Result<()> {
        let mut out = Vec::new();
        OptionHeader { option, length }.encode(&mut out);
        out.extend_from_slice(data);
        self.stream.write_all(&out).await?;
        self.stream.flush().await
    }

    /// Sends an option; gives the answers up to the last.
    pub(crate) async fn ask(
        &mut self,
        option: u32,
        data: &[u8],
    ) -> io::Result<Vec<(u32, Vec<u8>)>> {
        self.say(option, data.len() as u32, data).await?;
        let mut all = Vec::new();
        loop {
            let mut header = [0; OPTION_REPLY_BYTES];
            self.stream.read_exact(&mut header).await?;
            let (to, kind, length) = decode_reply(&header).expect("an answer");
            assert_eq!(to, option);
            let mut data = vec![0; length as usize];
            self.stream.read_exact(&mut data).await?;
            all.push((kind, data));
            if kind == rep::ACK || kind & rep::ERROR_BIT != 0 {
                return Ok(all);
            }
        }
    }

    /// Sends an option; gives the type of the last answer.
    pub(crate) async fn last(&mut self, option: u32, data: &[u8]) -> io::Result<u32> {
        let all = self.ask(option, data).await?;
        Ok(all.last().map_or(0, |(kind, _)| *kind))
    }

    pub(crate) async fn go(&mut self, name: &str) -> io::Result<u32> {
        self.last(opt::GO, &info(name, &[])).await
    }

    /// The server has closed: nothing but end of file (or a reset) is left.
    pub(crate) async fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest).await {
            Ok(_) => rest.is_empty(),
            Err(_) => true,
        }
    }
}

/// Data of INFO and GO.
pub(crate) fn info(name: &str, items: &[u16]) -> Vec<u8> {
    let mut out = Vec::new();
    let items = items.to_vec();
    InfoQuery { name, items }.encode(&mut out);
    out
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = Vec::new();
    let queries = queries.to_vec();
    MetaQuery { name, queries }.encode(&mut out);
    out
}

//! A replica in memory that speaks the real codec and checks what a replica must check. What it
//! stores survives its connections; how it answers is up to the test.

use crate::ship::codec::{CodecError, read_message, write_message};
use crate::ship::resume::is_base_of;
use crate::ship::source::Record;
use afterimage_format::chain::RecordChain;
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Epoch, LogId, Lsn};
use afterimage_format::op::Op;
use afterimage_format::segment::{PassEndBody, SegmentIndex, SegmentKind, SinkId, verify};
use afterimage_format::wire::{
    Ack, ActivePass, Comparisons, Cursor, ErrorCode, Hello, HelloReply, Message, RemoteError,
    Resume,
};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};

/// (disk, block) → (LSN, content).
type Blocks = BTreeMap<(u16, u64), (Lsn, Vec<u8>)>;

#[derive(Default)]
pub(super) struct Replica {
    pub(super) epoch: Epoch,
    pub(super) log: Option<LogId>,
    pub(super) cursor: Cursor,
    pub(super) completed: Lsn,
    pub(super) active: Option<ActivePass>,
    pub(super) comparisons: Comparisons,
    pub(super) blocks: Blocks,
    pub(super) hellos: Vec<Hello>,
    pub(super) gaps: Vec<Lsn>,
    pub(super) log_segments: u64,
    pub(super) pass_segments: u64,
    /// The sink's URL at the group, if it is not the usual one.
    pub(super) url: Option<String>,
    /// Refuses the end of the next pass.
    pub(super) loses_pass_blocks: bool,
    /// Drops the next pass at its end, and acknowledges the record.
    pub(super) drops_pass: bool,
}

/// Any connection.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// One connection with the group.
pub(super) struct Peer {
    stream: Box<dyn Stream>,
    pub(super) segments: u64,
}

fn refuse(code: ErrorCode, text: impl Into<String>) -> RemoteError {
    RemoteError {
        code,
        text: text.into(),
    }
}

impl Peer {
    pub(super) fn new(stream: impl Stream + 'static) -> Self {
        Self {
            stream: Box::new(stream),
            segments: 0,
        }
    }

    pub(super) async fn receive(&mut self) -> Result<Message, CodecError> {
        loop {
            let message = read_message(&mut self.stream, Duration::from_secs(3600)).await?;
            if message != Message::KeepAlive {
                return Ok(message);
            }
        }
    }

    pub(super) async fn send(&mut self, message: Message) {
        // The other side may have gone: the test sees that at the next receive.
        let _ = write_message(&mut self.stream, &message, Duration::from_secs(3600)).await;
    }

    pub(super) async fn segment(&mut self) -> Bytes {
        match self.receive().await {
            Ok(Message::Segment(bytes)) => {
                self.segments += 1;
                bytes
            }
            other => panic!("a segment was expected, not {other:?}"),
        }
    }

    /// Acknowledges all segments received so far.
    pub(super) async fn acknowledge(&mut self, replica: &Replica) {
        let ack = replica.ack(self.segments);
        self.send(Message::Ack(ack)).await;
    }

    /// Answers hellos until the group is content.
    pub(super) async fn greet(&mut self, replica: &mut Replica) {
        loop {
            let Ok(Message::Hello(hello)) = self.receive().await else {
                panic!("a hello was expected");
            };
            let reply = replica.hello(hello);
            self.send(Message::HelloReply(reply)).await;
            if matches!(reply, HelloReply::Resume(_)) {
                return;
            }
        }
    }

    /// Stores and acknowledges what comes until `done` says so, or the connection ends.
    pub(super) async fn serve(
        &mut self,
        replica: &mut Replica,
        mut done: impl FnMut(&Replica) -> bool,
    ) {
        while !done(replica) {
            let bytes = match self.receive().await {
                Ok(Message::Segment(bytes)) => bytes,
                Ok(Message::Hello(hello)) => {
                    // After a demand for an epoch the same connection goes on.
                    let reply = replica.hello(hello);
                    self.send(Message::HelloReply(reply)).await;
                    continue;
                }
                Ok(other) => panic!("a segment was expected, not {other:?}"),
                Err(_) => return,
            };
            self.segments += 1;
            match replica.store(&bytes) {
                Ok(()) => self.acknowledge(replica).await,
                Err(error) => {
                    self.send(Message::Error(error)).await;
                    return;
                }
            }
        }
    }
}

impl Replica {
    pub(super) fn ack(&self, segments: u64) -> Ack {
        Ack {
            segments,
            cursor: self.cursor,
            completed_pass: self.completed,
            active_pass: self.active,
            comparisons: self.comparisons,
        }
    }

    pub(super) fn hello(&mut self, hello: Hello) -> HelloReply {
        self.hellos.push(hello.clone());
        let known = self.log == Some(hello.log) && hello.epoch == self.epoch;
        if hello.epoch > self.epoch && !hello.demands_epoch {
            self.epoch = hello.epoch;
            self.log = Some(hello.log);
            self.cursor = Cursor::default();
            self.completed = Lsn::ZERO;
            self.active = None;
        } else if hello.demands_epoch || !known {
            return HelloReply::NewEpoch(Epoch(self.epoch.0.max(hello.epoch.0) + 1));
        }
        HelloReply::Resume(Resume {
            epoch: self.epoch,
            cursor: self.cursor,
            completed_pass: self.completed,
            active_pass: self.active,
        })
    }

    pub(super) fn store(&mut self, bytes: &Bytes) -> Result<(), RemoteError> {
        let bad = |error| refuse(ErrorCode::BadSegment, format!("{error}"));
        let index = verify(bytes).map_err(bad)?;
        if index.header.epoch != self.epoch || Some(index.header.log) != self.log {
            return Err(refuse(ErrorCode::Fenced, "other epoch or log"));
        }
        match index.header.kind {
            SegmentKind::Log => self.store_log(&index, bytes),
            SegmentKind::Pass => self.store_pass(&index, bytes),
        }
    }

    fn store_log(&mut self, index: &SegmentIndex, bytes: &Bytes) -> Result<(), RemoteError> {
        let header = &index.header;
        if header.flags.declares_gap {
            self.gaps.push(header.first_lsn);
            self.active = None;
            self.completed = Lsn::ZERO;
            self.blocks.clear();
        } else if header.first_lsn != self.cursor.lsn.next() {
            return Err(refuse(
                ErrorCode::Gap,
                format!("{} after {}", header.first_lsn, self.cursor.lsn),
            ));
        } else if header.chain_before != self.cursor.chain {
            return Err(refuse(ErrorCode::Diverged, "record chain"));
        }
        if header.pass != Lsn::ZERO {
            self.active = Some(ActivePass {
                begin: header.pass,
                next_disk: DiskIndex(0),
                next_block: 0,
                blocks: 0,
                chain: RecordChain::BASE,
            });
        }
        for record in records(index, bytes) {
            let meta = &record.meta;
            if meta.op == Op::PassBegin && meta.lsn == header.pass {
                let url = self.url.as_deref().unwrap_or(super::URL);
                assert!(is_base_of(&record, SinkId::of_url(url)));
            }
            if meta.op == Op::PassEnd {
                self.end_pass(&record)?;
            }
            self.apply(&record);
        }
        self.cursor = Cursor {
            lsn: header.last_lsn,
            chain: header.chain_after,
        };
        self.log_segments += 1;
        Ok(())
    }

    fn end_pass(&mut self, record: &Record) -> Result<(), RemoteError> {
        let body = PassEndBody::decode(&record.payload).expect("a body");
        let Some(active) = self.active.filter(|active| active.begin == body.begin) else {
            return Ok(());
        };
        self.active = None;
        if std::mem::take(&mut self.drops_pass) {
            return Ok(());
        }
        if (active.blocks, active.chain) != (body.blocks, body.chain) || self.loses_pass_blocks {
            self.loses_pass_blocks = false;
            return Err(refuse(ErrorCode::PassMismatch, "pass numbers"));
        }
        self.completed = active.begin;
        Ok(())
    }

    fn store_pass(&mut self, index: &SegmentIndex, bytes: &Bytes) -> Result<(), RemoteError> {
        let header = &index.header;
        let Some(mut active) = self.active.filter(|active| active.begin == header.pass) else {
            return Err(refuse(ErrorCode::Protocol, "no such pass"));
        };
        if header.chain_before != active.chain {
            return Err(refuse(ErrorCode::Diverged, "pass chain"));
        }
        for record in records(index, bytes) {
            let meta = &record.meta;
            let place = (meta.disk, meta.first_block);
            if place < (active.next_disk, active.next_block) {
                return Err(refuse(ErrorCode::Protocol, "pass goes back"));
            }
            active.next_disk = meta.disk;
            active.next_block = meta.first_block + u64::from(meta.block_count);
            active.blocks += u64::from(meta.block_count);
            self.apply(&record);
        }
        active.chain = header.chain_after;
        self.active = Some(active);
        self.pass_segments += 1;
        Ok(())
    }

    /// Newest LSN wins; a pass block is older than a record with its LSN is not possible, since
    /// it was read after that record.
    fn apply(&mut self, record: &Record) {
        let meta = &record.meta;
        if !meta.op.changes_blocks() {
            return;
        }
        for nth in 0..u64::from(meta.block_count) {
            let start = nth as usize * BLOCK_SIZE;
            let content = match meta.op {
                Op::Write => record.payload[start..start + BLOCK_SIZE].to_vec(),
                _ => vec![0; BLOCK_SIZE],
            };
            let place = (meta.disk.0, meta.first_block + nth);
            let old = self.blocks.get(&place).map_or(Lsn::ZERO, |old| old.0);
            if meta.lsn >= old {
                self.blocks.insert(place, (meta.lsn, content));
            }
        }
    }

    /// A disk as the replica has it.
    pub(super) fn image(&self, disk: u16, bytes: usize) -> Vec<u8> {
        let mut image = vec![0; bytes];
        for ((at, block), (_, content)) in &self.blocks {
            if *at == disk {
                let start = *block as usize * BLOCK_SIZE;
                image[start..start + BLOCK_SIZE].copy_from_slice(content);
            }
        }
        image
    }
}

pub(super) fn records(index: &SegmentIndex, bytes: &Bytes) -> Vec<Record> {
    let fetch = |number: u32, info: &afterimage_format::segment::ChunkInfo| {
        let range = info.range();
        info.decode(number, &bytes[range.start as usize..range.end as usize])
    };
    let payload = |entry| index.payload(entry, fetch).expect("verified");
    let entries = index.entries.iter();
    entries
        .map(|entry| Record {
            meta: entry.record,
            payload: payload(entry).into(),
        })
        .collect()
}

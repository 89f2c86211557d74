//! Devices without a group's engine behind them, and their transmission on tokio.
//!
//! Owns the socket of such a connection from the end of the handshake on. Always holds: at most
//! [`DEVICE_REQUESTS_MAX`] requests of a connection run at a time, and the bounds of
//! [`super::session`] on replies; at end of file what is in flight finishes and is answered.

use super::export::BoxFuture;
use super::patience::{Owed, Patience};
use super::session::{Blocked, Event, OutChunk, Session, SessionConfig};
use crate::engine::request::{Extent, Reply, ReplyBody, Request, RequestError, RequestId};
use crate::io::buffer::AlignedBuffer;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Most requests of one connection that run at a time.
pub const DEVICE_REQUESTS_MAX: usize = 64;
/// How often a payload that found no memory asks again.
const BUDGET_RETRY: Duration = Duration::from_millis(10);
/// How often a client that holds memory is looked at: others may have begun to wait for it.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Something that can be read, and perhaps written, at byte granularity. Offsets and lengths are
/// within [`Device::size`]; lengths are not 0. Several connections call it at once. The cause of
/// an error is logged by the device.
pub trait Device: Send + Sync {
    /// In bytes; does not change.
    fn size(&self) -> u64;

    /// Fills the buffer from `offset` on.
    fn read<'a>(
        &'a self,
        offset: u64,
        buffer: &'a mut [u8],
    ) -> BoxFuture<'a, Result<(), RequestError>>;

    /// At least one and at most `extents_max` extents from `offset` on, up to `len` bytes.
    fn block_status(
        &self,
        offset: u64,
        len: u64,
        extents_max: u32,
    ) -> BoxFuture<'_, Result<Vec<Extent>, RequestError>>;

    /// Writes. Only called if the export is not read-only.
    fn write<'a>(
        &'a self,
        offset: u64,
        data: &'a [u8],
        fua: bool,
    ) -> BoxFuture<'a, Result<(), RequestError>> {
        let _ = (offset, data, fua);
        Box::pin(async { Err(RequestError::Invalid) })
    }

    /// Makes a range read as zero. Only called if the export is not read-only.
    fn zero(
        &self,
        offset: u64,
        len: u64,
        fua: bool,
        no_hole: bool,
    ) -> BoxFuture<'_, Result<(), RequestError>> {
        let _ = (offset, len, fua, no_hole);
        Box::pin(async { Err(RequestError::Invalid) })
    }

    /// Makes what was answered durable.
    fn flush(&self) -> BoxFuture<'_, Result<(), RequestError>> {
        Box::pin(async { Ok(()) })
    }
}

/// Serves one connection until the client leaves.
///
/// # Errors
/// When the socket fails, the client keeps others or us waiting ([`super::patience`]), or its stream
/// is out of step.
pub async fn serve<S>(stream: S, config: SessionConfig, device: Arc<dyn Device>) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Send,
{
    let capacity = config.inline_payload_max.max(4096);
    let (mut reader, mut writer) = tokio::io::split(stream);
    let budget = config.budget.clone();
    let mut session = Session::new(config);
    let mut running: JoinSet<Reply> = JoinSet::new();
    let mut input = Input::new(capacity);
    let mut out: Vec<OutChunk> = Vec::new();
    let mut out_at = 0;
    let (mut patience, begun) = (Patience::default(), Instant::now());
    loop {
        let next = take_requests(&mut session, &mut input, &mut running, &device)?;
        let wants_input = next == Next::Receive;
        if out.is_empty() {
            session.take_output(&mut out, 1, usize::MAX);
        }
        if session.is_finished() && out.is_empty() {
            return writer.shutdown().await;
        }
        let payload = session.awaited_payload().filter(|_| wants_input);
        let its_turn = payload.is_some() || !out.is_empty();
        let owed = Owed {
            payload,
            memory: its_turn && session.holds_budget(),
        };
        let now = begun.elapsed();
        let due = patience.look(now.as_nanos() as u64, owed, budget.is_wanted());
        let due = due.map_err(|why| io::Error::new(io::ErrorKind::TimedOut, why))?;
        let due = due.map(|ns| begun + Duration::from_nanos(ns));
        let look = owed.memory.then(|| Instant::now() + LOOK_EVERY);
        let look = [due, look].into_iter().flatten().min();
        tokio::select! {
            read = reader.read(input.space()), if wants_input => {
                match read? {
                    0 => session.close_input(),
                    bytes => {
                        input.end += bytes;
                        patience.moved(bytes);
                    }
                }
            }
            Some(reply) = running.join_next(), if !running.is_empty() => {
                session.complete(reply.map_err(io::Error::other)?);
            }
            written = write_next(&mut writer, &out, out_at), if !out.is_empty() => {
                let written = written?;
                patience.moved(written);
                out_at += written;
                if out.first().is_some_and(|chunk| chunk.len() == out_at) {
                    out_at = 0;
                    let chunk = out.remove(0);
                    session.sent(chunk);
                    if !session.has_output() {
                        writer.flush().await?;
                    }
                }
            }
            () = tokio::time::sleep(BUDGET_RETRY), if next == Next::AwaitBudget => {}
            () = tokio::time::sleep_until(look.unwrap_or(begun)), if look.is_some() => {}
        }
    }
}

async fn write_next(
    writer: &mut (impl AsyncWrite + Unpin),
    out: &[OutChunk],
    at: usize,
) -> io::Result<usize> {
    let Some(chunk) = out.first() else {
        return std::future::pending().await;
    };
    match writer.write(&chunk[at..]).await? {
        0 => Err(io::ErrorKind::WriteZero.into()),
        bytes => Ok(bytes),
    }
}

/// What was received and not yet used.
struct Input {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    fn new(capacity: usize) -> Self {
        Self {
            buffer: vec![0; capacity],
            start: 0,
            end: 0,
        }
    }

    /// Makes room for `contiguous` bytes from the start of what is unused.
    fn compact(&mut self, contiguous: usize) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start + contiguous > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }

    fn space(&mut self) -> &mut [u8] {
        &mut self.buffer[self.end..]
    }
}

/// What a connection can do besides finishing what runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// More can be received.
    Receive,
    /// Other connections must give back memory.
    AwaitBudget,
    /// A reply must be completed or sent first, or nothing more comes.
    Finish,
}

/// Starts what has arrived.
fn take_requests(
    session: &mut Session,
    input: &mut Input,
    running: &mut JoinSet<Reply>,
    device: &Arc<dyn Device>,
) -> io::Result<Next> {
    while running.len() < DEVICE_REQUESTS_MAX {
        let step = session.step(&input.buffer[input.start..input.end]);
        input.start += step.consumed;
        match step.event {
            Event::Request { id, request } => {
                running.spawn(run(device.clone(), id, OwnedRequest::from(request)));
            }
            Event::NeedInput { contiguous } => {
                input.compact(contiguous);
                return Ok(Next::Receive);
            }
            Event::Blocked(Blocked::Budget) => return Ok(Next::AwaitBudget),
            Event::Blocked(Blocked::Replies) => return Ok(Next::Finish),
            Event::Disconnect => {
                session.close_input();
                return Ok(Next::Finish);
            }
            Event::Broken(why) => return Err(io::Error::new(io::ErrorKind::InvalidData, why)),
        }
    }
    Ok(Next::Finish)
}

/// A request that outlives the receive buffer.
enum OwnedRequest {
    Read(u64, u32),
    Write(u64, Vec<u8>, bool),
    Zero(u64, u64, bool, bool),
    Flush,
    Status(u64, u64, u32),
}

impl From<Request<'_>> for OwnedRequest {
    fn from(request: Request<'_>) -> Self {
        match request {
            Request::Read { offset, len } => Self::Read(offset, len),
            Request::Write { offset, data, fua } => Self::Write(offset, data.to_vec(), fua),
            Request::Flush => Self::Flush,
            Request::Trim { offset, len, fua } => Self::Zero(offset, len, fua, false),
            Request::WriteZeroes {
                offset,
                len,
                fua,
                no_hole,
            } => Self::Zero(offset, len, fua, no_hole),
            Request::BlockStatus {
                offset,
                len,
                extents_max,
            } => Self::Status(offset, len, extents_max),
        }
    }
}

async fn run(device: Arc<dyn Device>, id: RequestId, request: OwnedRequest) -> Reply {
    let done = |()| ReplyBody::Done;
    let result = match request {
        OwnedRequest::Read(offset, len) => {
            let len = len as usize;
            let mut buffer = AlignedBuffer::new(len);
            device
                .read(offset, &mut buffer)
                .await
                .map(|()| ReplyBody::Data {
                    buffer,
                    start: 0,
                    len,
                })
        }
        OwnedRequest::Write(offset, data, fua) => device.write(offset, &data, fua).await.map(done),
        OwnedRequest::Zero(offset, len, fua, no_hole) => {
            device.zero(offset, len, fua, no_hole).await.map(done)
        }
        OwnedRequest::Flush => device.flush().await.map(done),
        OwnedRequest::Status(offset, len, extents_max) => device
            .block_status(offset, len, extents_max)
            .await
            .map(ReplyBody::Extents),
    };
    Reply { id, result }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::budget::PayloadBudget;
    use crate::nbd::patience::PAYLOAD_WINDOW_NS;
    use crate::nbd::test_support::Notes;
    use afterimage_format::nbd::constants::cmd;
    use afterimage_format::nbd::reply::ReplyForm;
    use afterimage_format::nbd::request::RequestHeader;
    use tokio::io::duplex;

    fn config(budget: PayloadBudget) -> SessionConfig {
        SessionConfig {
            connection: 0,
            size: 1 << 20,
            read_only: false,
            ack_durable: false,
            form: ReplyForm::Simple,
            contexts: Vec::new(),
            inline_payload_max: 64 << 10,
            budget,
            answer: Vec::new(),
        }
    }

    fn write(len: usize) -> Vec<u8> {
        let mut out = Vec::new();
        let header = RequestHeader {
            flags: 0,
            command: cmd::WRITE,
            cookie: 5,
            offset: 0,
            length: len as u64,
        };
        header.encode(false, &mut out);
        out.resize(out.len() + len, 1);
        out
    }

    #[tokio::test(start_paused = true)]
    async fn a_payload_without_memory_waits_for_others_and_goes_on() {
        let budget = PayloadBudget::new(0);
        assert!(budget.take(9, 1), "another connection uses up everything");
        let device = Arc::new(Notes::default());
        let (mut client, server) = duplex(1 << 20);
        let serving = tokio::spawn(serve(server, config(budget.clone()), device.clone()));
        client.write_all(&write(300_000)).await.expect("sent");
        // Far longer than a client may stall: but here the server does.
        tokio::time::sleep(Duration::from_nanos(PAYLOAD_WINDOW_NS * 3)).await;
        assert_eq!(device.take(), [""; 0]);
        budget.give_back(9, 1, 0);
        let mut reply = [0; 16];
        client.read_exact(&mut reply).await.expect("answered");
        assert_eq!(device.take(), ["write 0 300000"]);
        drop(client);
        serving.await.expect("no panic").expect("a proper end");
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_stalls_within_a_payload_is_cut_off_and_changes_nothing() {
        for len in [1000, 300_000] {
            let budget = PayloadBudget::default();
            let device = Arc::new(Notes::default());
            let (mut client, server) = duplex(1 << 20);
            let serving = tokio::spawn(serve(server, config(budget.clone()), device.clone()));
            let torn = &write(len)[..len];
            client.write_all(torn).await.expect("sent");
            let error = serving.await.expect("no panic").expect_err("cut off");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert_eq!(device.take(), [""; 0]);
            assert_eq!(budget.used(), 0);
        }
    }

    #[tokio::test]
    async fn half_close_lets_every_request_finish_and_answer() {
        let device = Arc::new(Notes::default());
        let (mut client, server) = duplex(1 << 20);
        let serving = tokio::spawn(serve(
            server,
            config(PayloadBudget::default()),
            device.clone(),
        ));
        for _ in 0..200 {
            client.write_all(&write(10)).await.expect("sent");
        }
        client.write_all(&write(10)[..30]).await.expect("sent");
        client.shutdown().await.expect("half closed");
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).await.expect("an end");
        assert_eq!(heard.len(), 200 * 16);
        assert_eq!(device.take().len(), 200, "and the torn one changed nothing");
        serving.await.expect("no panic").expect("a proper end");
    }
}

//! Receiving over the network: TLS 1.3, a client certificate required, one group per connection.
//!
//! Per connection two tasks: one reads messages, one commits what was read and answers. Bounded:
//! connections, bytes of segments that have been announced and not committed (over all
//! connections, see `room`), time of a handshake, silence of a peer. A peer that breaks the
//! protocol, finds no place or whose segment is refused gets the reason as the last message.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use afterimage_format::wire::{
    Ack, ErrorCode, Hello, HelloReply, Message, MessageKind, PROTOCOL_VERSION, RemoteError,
    WireError,
};
use afterimage_proxy::ship::codec::{CodecError, read_body, read_header, write_message};
use afterimage_proxy::tls::Identity;
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::comparing::Comparing;
use super::error::IngestError;
use super::peer::Peer;
use super::room::Room;
use super::session::{Session, Verified};
use super::{NowNs, Receiver};

/// Connections beyond `connections_max` that are told so at a time; more are dropped without a word.
const TURNED_AWAY_MAX: usize = 16;

/// Limits of a server.
#[derive(Debug, Clone, Copy)]
pub struct ServerLimits {
    /// Connections at a time, handshakes included.
    pub connections_max: usize,
    /// Bytes of segments received and not yet committed, over all connections.
    pub pending_bytes_max: usize,
    /// Deadline of TLS handshake and first hello.
    pub handshake: Duration,
    /// A peer that sends and takes nothing for this long is gone.
    pub silence: Duration,
    /// A sign of life is sent after this long without an answer.
    pub keep_alive: Duration,
    /// After this long of waiting for a part of `pending_bytes_max`, the peers that are slowest in
    /// sending what they have their part for are cut off. Less than a primary's own patience.
    pub patience: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections_max: 256,
            pending_bytes_max: 256 * 1024 * 1024,
            handshake: Duration::from_secs(10),
            silence: Duration::from_secs(30),
            keep_alive: Duration::from_secs(10),
            patience: Duration::from_secs(10),
        }
    }
}

/// A listening replica.
#[derive(Clone)]
pub struct Server {
    conversation: Conversation,
    tls: TlsAcceptor,
    connections: Arc<Semaphore>,
    turned_away: Arc<Semaphore>,
}

/// What is said on a connection once it is known who speaks.
#[derive(Clone)]
pub struct Conversation {
    receiver: Receiver,
    limits: ServerLimits,
    now: NowNs,
    room: Arc<Room>,
}

impl Server {
    /// A server for this receiver. `tls` must demand a client certificate
    /// (`proxy::tls::server_config` with a client CA).
    #[must_use]
    pub fn new(
        receiver: Receiver,
        tls: Arc<ServerConfig>,
        limits: ServerLimits,
        now: NowNs,
    ) -> Self {
        Self {
            conversation: Conversation::new(receiver, limits, now),
            tls: TlsAcceptor::from(tls),
            connections: Arc::new(Semaphore::new(limits.connections_max)),
            turned_away: Arc::new(Semaphore::new(TURNED_AWAY_MAX)),
        }
    }

    /// Serves until `stop` is cancelled, then waits for commits under way.
    pub async fn run(self, listener: TcpListener, stop: CancellationToken) {
        let tasks = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, address)) => {
                    let permit = self.connections.clone().try_acquire_owned();
                    let is_full = permit.is_err();
                    let turned_away = |_| self.turned_away.clone().try_acquire_owned();
                    let Ok(permit) = permit.or_else(turned_away) else {
                        tracing::warn!(%address, "far too many connections, one is dropped");
                        continue;
                    };
                    let server = self.clone();
                    let stop = stop.clone();
                    tasks.spawn(async move {
                        let _permit = permit;
                        server.connection(stream, address, is_full, stop).await;
                    });
                }
                Err(error) => {
                    // Out of descriptors, as a rule: others have to close first.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        tasks.close();
        tasks.wait().await;
    }

    async fn connection(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        is_full: bool,
        stop: CancellationToken,
    ) {
        // Acknowledgements are small and urgent; a failure only costs time.
        let _ = stream.set_nodelay(true);
        let handshake = self.conversation.limits.handshake;
        let accepted = timeout(handshake, self.tls.accept(stream)).await;
        let stream = match accepted {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                tracing::warn!(%address, %error, "TLS handshake of a primary failed");
                return;
            }
            Err(_) => {
                tracing::warn!(%address, "TLS handshake of a primary took too long");
                return;
            }
        };
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let identity = match Identity::of(chain) {
            Ok(identity) => identity,
            Err(error) => {
                tracing::warn!(%address, %error, "certificate of a primary cannot be used");
                return;
            }
        };
        let peer = Peer::Certificate {
            identity,
            address: address.to_string(),
        };
        match is_full {
            true => self.conversation.turn_away(stream, &peer).await,
            false => self.conversation.run(stream, &peer, stop).await,
        }
    }
}

impl Conversation {
    /// Connections of one receiver, within one budget for segments under way.
    #[must_use]
    pub fn new(receiver: Receiver, limits: ServerLimits, now: NowNs) -> Self {
        Self {
            receiver,
            room: Arc::new(Room::new(limits.pending_bytes_max, limits.patience)),
            limits,
            now,
        }
    }

    /// One connection to its end; any stream will do. `peer` is who TLS says it is.
    pub async fn run<S>(&self, stream: S, peer: &Peer, stop: CancellationToken)
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let address = peer.address();
        match self.serve(stream, peer, stop).await {
            Ok(()) | Err(Ended::Codec(CodecError::Closed)) => {
                tracing::debug!(%address, "primary has left");
            }
            Err(error) => tracing::warn!(%address, %error, "session of a primary ended"),
        }
    }

    /// Tells a peer that there is no place for it, once it has said its hello.
    async fn turn_away<S>(&self, mut stream: S, peer: &Peer)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let address = peer.address();
        tracing::warn!(%address, "too many connections, a primary is turned away");
        let handshake = self.limits.handshake;
        let hello = async {
            let header = read_header(&mut stream, handshake).await?;
            match header.kind {
                MessageKind::Hello => read_body(&mut stream, header, handshake).await.map(drop),
                _ => Ok(()),
            }
        };
        if let Ok(Ok(())) = timeout(handshake, hello).await {
            let reason = Ended::TooMany(self.limits.connections_max).to_remote();
            if let Some(reason) = reason {
                let _ = write_message(&mut stream, &Message::Error(reason), handshake).await;
            }
        }
        let _ = timeout(handshake, stream.shutdown()).await;
    }

    async fn serve<S>(&self, stream: S, peer: &Peer, stop: CancellationToken) -> Result<(), Ended>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (reader, mut writer) = tokio::io::split(stream);
        let (queue, mut messages) = mpsc::channel(1);
        let reading = tokio::spawn(read_task(reader, queue, self.limits, self.room.clone()));
        let outcome = self.answer(&mut writer, &mut messages, peer, &stop).await;
        if let Err(Some(error)) = outcome.as_ref().map_err(Ended::to_remote) {
            // The peer may be gone; then nobody needs the reason.
            let _ = write_message(&mut writer, &Message::Error(error), self.limits.handshake).await;
        }
        let _ = timeout(self.limits.handshake, writer.shutdown()).await;
        reading.abort();
        outcome
    }

    async fn answer<W>(
        &self,
        writer: &mut W,
        messages: &mut mpsc::Receiver<Incoming>,
        peer: &Peer,
        stop: &CancellationToken,
    ) -> Result<(), Ended>
    where
        W: AsyncWrite + Unpin,
    {
        let mut deadline = Instant::now() + self.limits.handshake;
        let mut session: Option<(Session, Comparing)> = None;
        loop {
            let next = async {
                match &mut session {
                    None => tokio::time::timeout_at(deadline, messages.recv())
                        .await
                        .map(Next::Message)
                        .map_err(|_| Ended::NoHello),
                    Some((session, comparing)) => tokio::select! {
                        biased;
                        () = session.superseded() => {
                            Err(IngestError::Superseded { group: session.group_id() }.into())
                        }
                        // Before the messages, or a busy primary would never be compared.
                        () = comparing.news() => Ok(Next::News(session.ack())),
                        message = messages.recv() => Ok(Next::Message(message)),
                    },
                }
            };
            let next = tokio::select! {
                biased;
                // Only here, between two commits.
                () = stop.cancelled() => return Err(Ended::Stopping),
                next = timeout(self.limits.keep_alive, next) => next,
            };
            let incoming = match next {
                Ok(Ok(Next::Message(incoming))) => incoming,
                Ok(Ok(Next::News(ack))) => {
                    write_message(writer, &Message::Ack(ack), self.limits.silence).await?;
                    continue;
                }
                Ok(Err(ended)) => return Err(ended),
                Err(_) => {
                    write_message(writer, &Message::KeepAlive, self.limits.silence).await?;
                    continue;
                }
            };
            match incoming {
                None => return Err(CodecError::Closed.into()),
                Some(Incoming::Failed(ended)) => return Err(ended),
                Some(Incoming::Hello(hello)) => {
                    if session.is_some() {
                        return Err(Ended::OutOfTurn("a second hello"));
                    }
                    let opened = self.receiver.hello(&hello, peer, (self.now)()).await?;
                    session = opened.session.map(|session| {
                        let comparing = Comparing::beside(&session, self.now.clone());
                        (session, comparing)
                    });
                    // For the hello with the new epoch, which has to become durable first.
                    deadline = Instant::now() + self.limits.silence;
                    self.reply(writer, opened.reply).await?;
                }
                Some(Incoming::Segment(bytes, permit)) => {
                    let session = session.as_mut().map(|(session, _)| session);
                    let session = session.ok_or(Ended::OutOfTurn("a segment"))?;
                    let ack = self.commit(writer, session, bytes).await?;
                    drop(permit);
                    write_message(writer, &Message::Ack(ack), self.limits.silence).await?;
                }
            }
        }
    }

    async fn reply<W>(&self, writer: &mut W, reply: HelloReply) -> Result<(), Ended>
    where
        W: AsyncWrite + Unpin,
    {
        Ok(write_message(writer, &Message::HelloReply(reply), self.limits.silence).await?)
    }

    /// Checks and commits; says that it is alive while that takes long.
    async fn commit<W>(
        &self,
        writer: &mut W,
        session: &mut Session,
        bytes: Bytes,
    ) -> Result<Ack, Ended>
    where
        W: AsyncWrite + Unpin,
    {
        let commit = async {
            let verified = Verified::check_aside(bytes).await?;
            Ok::<_, Ended>(session.accept(verified, (self.now)()).await?)
        };
        let mut commit = std::pin::pin!(commit);
        loop {
            match timeout(self.limits.keep_alive, &mut commit).await {
                Ok(ack) => return ack,
                Err(_) => write_message(writer, &Message::KeepAlive, self.limits.silence).await?,
            }
        }
    }
}

/// What an open session waits for.
enum Next {
    /// The peer's next message; `None` when there will be no more.
    Message(Option<Incoming>),
    /// Comparing has come on.
    News(Ack),
}

/// What the reading task hands over.
enum Incoming {
    Hello(Box<Hello>),
    Segment(Bytes, Option<OwnedSemaphorePermit>),
    Failed(Ended),
}

/// Reads messages. There must be room for a segment before it is read, and a hello before that; a
/// single connection is never more than two segments ahead.
async fn read_task<R>(
    mut reader: R,
    queue: mpsc::Sender<Incoming>,
    limits: ServerLimits,
    room: Arc<Room>,
) where
    R: AsyncRead + Unpin,
{
    let mut greeted = false;
    loop {
        let incoming = match read_one(&mut reader, limits, &room, greeted).await {
            Ok((Message::KeepAlive, _)) => continue,
            Ok((Message::Hello(hello), _)) => Incoming::Hello(Box::new(hello)),
            Ok((Message::Segment(bytes), permit)) => Incoming::Segment(bytes, permit),
            Ok((Message::Error(error), _)) => {
                Incoming::Failed(CodecError::Io(io::Error::other(error)).into())
            }
            Ok((Message::HelloReply(_) | Message::Ack(_), _)) => {
                let error = io::Error::other("the peer answers although it should ask");
                Incoming::Failed(CodecError::Io(error).into())
            }
            Err(ended) => Incoming::Failed(ended),
        };
        greeted |= matches!(incoming, Incoming::Hello(_));
        let last = matches!(incoming, Incoming::Failed(_));
        if queue.send(incoming).await.is_err() || last {
            return;
        }
    }
}

/// Reads a message, with what it takes up until it is committed.
async fn read_one<R>(
    reader: &mut R,
    limits: ServerLimits,
    room: &Arc<Room>,
    greeted: bool,
) -> Result<(Message, Option<OwnedSemaphorePermit>), Ended>
where
    R: AsyncRead + Unpin,
{
    let header = read_header(reader, limits.silence).await?;
    if header.kind == MessageKind::Segment && !greeted {
        return Err(Ended::OutOfTurn("a segment"));
    }
    let share = room.take(header.body_len as usize).await;
    let mut counted = share.counting(reader);
    let message = tokio::select! {
        biased;
        message = read_body(&mut counted, header, limits.silence) => message?,
        () = share.cut_off() => return Err(Ended::Slow),
    };
    Ok((message, share.filled()))
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error(transparent)]
    Ingest(#[from] Box<IngestError>),
    #[error("{0} out of turn")]
    OutOfTurn(&'static str),
    #[error("no hello came")]
    NoHello,
    #[error("{0} connections, as many as this replica takes")]
    TooMany(usize),
    #[error("a segment came so slowly that others waited for its memory")]
    Slow,
    #[error("this replica shuts down")]
    Stopping,
}

impl From<IngestError> for Ended {
    fn from(error: IngestError) -> Self {
        Self::Ingest(Box::new(error))
    }
}

impl Ended {
    /// What the peer is told, if it may still listen.
    fn to_remote(&self) -> Option<RemoteError> {
        let code = match self {
            Self::Ingest(error) => return Some(error.to_remote()),
            Self::Codec(CodecError::Wire(WireError::Version(_))) => ErrorCode::Version,
            Self::Codec(CodecError::Wire(_)) | Self::OutOfTurn(_) | Self::NoHello => {
                ErrorCode::Protocol
            }
            Self::TooMany(_) | Self::Slow => ErrorCode::Busy,
            Self::Stopping => ErrorCode::ShuttingDown,
            Self::Codec(_) => return None,
        };
        let text = match code {
            ErrorCode::Version => format!("{self}; this replica speaks {PROTOCOL_VERSION}"),
            _ => self.to_string(),
        };
        Some(RemoteError { code, text })
    }
}

//! The sink that is a replica at the other end of a TLS connection.
//!
//! Two tasks per connection: one writes what the session hands over and keep-alives between, one
//! reads and leaves the newest acknowledgement in a slot, so that nothing queues without bound. A
//! peer that neither sends nor takes a byte for `silence` is given up.

use super::BoxFuture;
use super::codec::{CodecError, read_message, write_message};
use super::sink::{Sink, SinkConnection, SinkError};
use afterimage_format::wire::{Ack, Hello, HelloReply, Message};
use bytes::Bytes;
use rustls_pki_types::ServerName;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// Port of a replica when the URL names none.
pub const DEFAULT_PORT: u16 = 9471;

/// Deadlines of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RemoteTimes {
    /// For the TCP connection and the TLS handshake together.
    pub connect: Duration,
    /// Longest time without a byte in either direction.
    pub silence: Duration,
    /// A keep-alive is sent after this long without another message. The peer does the same.
    pub keep_alive: Duration,
}

impl Default for RemoteTimes {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            silence: Duration::from_secs(30),
            keep_alive: Duration::from_secs(10),
        }
    }
}

/// Why a URL is no remote sink.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RemoteUrlError {
    /// Not of the form.
    #[error("{0:?} is not of the form afterimage://HOST[:PORT]")]
    Form(String),
    /// The host is neither a DNS name nor an IP address.
    #[error("{0:?} is neither a host name nor an IP address")]
    Host(String),
}

/// A replica, as configured.
pub struct RemoteSink {
    url: String,
    host: String,
    port: u16,
    name: ServerName<'static>,
    tls: TlsConnector,
    times: RemoteTimes,
}

impl RemoteSink {
    /// A sink for `afterimage://HOST[:PORT]`. The server's certificate must be for HOST.
    ///
    /// # Errors
    /// The URL is not of that form.
    pub fn new(
        url: &str,
        tls: Arc<rustls::ClientConfig>,
        times: RemoteTimes,
    ) -> Result<Self, RemoteUrlError> {
        let (host, port) = parse_url(url).ok_or_else(|| RemoteUrlError::Form(url.to_owned()))?;
        let name =
            ServerName::try_from(host.clone()).map_err(|_| RemoteUrlError::Host(host.clone()))?;
        let url = if host.contains(':') {
            format!("afterimage://[{host}]:{port}")
        } else {
            format!("afterimage://{host}:{port}")
        };
        Ok(Self {
            url,
            host,
            port,
            name,
            tls: TlsConnector::from(tls),
            times,
        })
    }

    async fn open(&self) -> Result<Box<dyn SinkConnection>, SinkError> {
        let peer = || self.url.clone();
        let tcp = TcpStream::connect((self.host.as_str(), self.port))
            .await
            .and_then(|tcp| tcp.set_nodelay(true).map(|()| tcp))
            .map_err(|cause| SinkError::Connect {
                peer: peer(),
                cause: Arc::new(cause),
            })?;
        let tls = self
            .tls
            .connect(self.name.clone(), tcp)
            .await
            .map_err(|cause| SinkError::Tls {
                peer: peer(),
                cause: Arc::new(cause),
            })?;
        Ok(Box::new(Connection::start(peer(), tls, self.times)))
    }
}

/// Host (without brackets) and port.
fn parse_url(url: &str) -> Option<(String, u16)> {
    let rest = url.strip_prefix("afterimage://")?;
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = if let Some(rest) = rest.strip_prefix('[') {
        let (host, after) = rest.split_once(']')?;
        match after {
            "" => (host, None),
            _ => (host, Some(after.strip_prefix(':')?)),
        }
    } else {
        match rest.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (rest, None),
        }
    };
    let port = port.map_or(Some(DEFAULT_PORT), |port| port.parse().ok())?;
    (!host.is_empty() && port != 0).then(|| (host.to_owned(), port))
}

impl Sink for RemoteSink {
    fn url(&self) -> &str {
        &self.url
    }

    fn connect(&self) -> BoxFuture<'_, Result<Box<dyn SinkConnection>, SinkError>> {
        Box::pin(async {
            timeout(self.times.connect, self.open())
                .await
                .unwrap_or_else(|_| {
                    Err(SinkError::Silent {
                        peer: self.url.clone(),
                        silence: self.times.connect,
                        during: "connecting",
                    })
                })
        })
    }
}

/// What the reading task has for the session. Newer acknowledgements replace older ones.
#[derive(Default)]
struct Inbox {
    replies: u64,
    reply: Option<HelloReply>,
    acks: u64,
    ack: Option<Ack>,
    end: Option<SinkError>,
}

/// A connection to a replica over a stream that is secured already, or needs no securing.
pub struct Connection {
    peer: String,
    outgoing: mpsc::Sender<Message>,
    inbox: watch::Receiver<Inbox>,
    replies_seen: u64,
    acks_seen: u64,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Connection {
    /// Starts the two tasks on the stream. `peer` is for messages.
    #[must_use]
    pub fn start<S>(peer: String, stream: S, times: RemoteTimes) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (reading, writing) = tokio::io::split(stream);
        let (outgoing, queue) = mpsc::channel(1);
        let (slot, inbox) = watch::channel(Inbox::default());
        let slot = Arc::new(slot);
        let reader = read_task(peer.clone(), reading, times, slot.clone());
        let writer = write_task(peer.clone(), writing, times, queue, slot);
        Self {
            peer,
            outgoing,
            inbox,
            replies_seen: 0,
            acks_seen: 0,
            tasks: [tokio::spawn(reader), tokio::spawn(writer)],
        }
    }

    async fn queue(&mut self, message: Message) -> Result<(), SinkError> {
        if self.outgoing.send(message).await.is_ok() {
            return Ok(());
        }
        Err(self.end().unwrap_or_else(|| SinkError::Lost {
            peer: self.peer.clone(),
            cause: Arc::new(io::ErrorKind::BrokenPipe.into()),
        }))
    }

    fn end(&self) -> Option<SinkError> {
        self.inbox.borrow().end.clone()
    }

    /// Waits until `take` finds something in the inbox, or the connection ended.
    async fn wait_for<T>(&mut self, take: impl Fn(&Inbox) -> Option<T>) -> Result<T, SinkError> {
        loop {
            {
                let inbox = self.inbox.borrow_and_update();
                if let Some(found) = take(&inbox) {
                    return Ok(found);
                }
                if let Some(end) = &inbox.end {
                    return Err(end.clone());
                }
            }
            if self.inbox.changed().await.is_err() {
                return Err(SinkError::Lost {
                    peer: self.peer.clone(),
                    cause: Arc::new(io::ErrorKind::BrokenPipe.into()),
                });
            }
        }
    }
}

impl SinkConnection for Connection {
    fn hello(&mut self, hello: Hello) -> BoxFuture<'_, Result<HelloReply, SinkError>> {
        Box::pin(async {
            self.queue(Message::Hello(hello)).await?;
            let seen = self.replies_seen;
            let reply = self
                .wait_for(|inbox| inbox.reply.filter(|_| inbox.replies > seen))
                .await?;
            self.replies_seen = seen + 1;
            Ok(reply)
        })
    }

    fn send(&mut self, segment: Bytes) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(self.queue(Message::Segment(segment)))
    }

    fn ack(&mut self) -> BoxFuture<'_, Result<Ack, SinkError>> {
        Box::pin(async {
            let seen = self.acks_seen;
            let (acks, ack) = self
                .wait_for(|inbox| Some((inbox.acks, inbox.ack?)).filter(|(acks, _)| *acks > seen))
                .await?;
            self.acks_seen = acks;
            Ok(ack)
        })
    }
}

async fn read_task(
    peer: String,
    mut stream: impl AsyncRead + Unpin,
    times: RemoteTimes,
    slot: Arc<watch::Sender<Inbox>>,
) {
    let out_of_turn = |message| SinkError::OutOfTurn {
        peer: peer.clone(),
        message,
    };
    let end = loop {
        match read_message(&mut stream, times.silence).await {
            Ok(Message::HelloReply(reply)) => slot.send_modify(|inbox| {
                inbox.replies += 1;
                inbox.reply = Some(reply);
            }),
            Ok(Message::Ack(ack)) => slot.send_modify(|inbox| {
                inbox.acks += 1;
                inbox.ack = Some(ack);
            }),
            Ok(Message::KeepAlive) => {}
            Ok(Message::Error(cause)) => {
                break SinkError::Refused {
                    peer: peer.clone(),
                    cause,
                };
            }
            Ok(Message::Hello(_)) => break out_of_turn("a hello"),
            Ok(Message::Segment(_)) => break out_of_turn("a segment"),
            Err(error) => break sink_error(&peer, error, "nothing came"),
        }
    };
    slot.send_modify(|inbox| inbox.end = Some(end));
}

async fn write_task(
    peer: String,
    mut stream: impl AsyncWrite + Unpin,
    times: RemoteTimes,
    mut queue: mpsc::Receiver<Message>,
    slot: Arc<watch::Sender<Inbox>>,
) {
    loop {
        let message = match timeout(times.keep_alive, queue.recv()).await {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(_) => Message::KeepAlive,
        };
        if let Err(error) = write_message(&mut stream, &message, times.silence).await {
            let end = sink_error(&peer, error, "nothing was taken");
            // A peer that gives up says why before it closes: the reader's end is the better one.
            tokio::time::sleep(Duration::from_millis(100)).await;
            slot.send_modify(|inbox| inbox.end = inbox.end.take().or(Some(end)));
            break;
        }
    }
    // The session is over either way; the peer may be gone already.
    let _ = timeout(times.keep_alive, stream.shutdown()).await;
}

fn sink_error(peer: &str, error: CodecError, during: &'static str) -> SinkError {
    let peer = peer.to_owned();
    match error {
        CodecError::Silent(silence) => SinkError::Silent {
            peer,
            silence,
            during,
        },
        CodecError::Wire(cause) => SinkError::Wire { peer, cause },
        CodecError::Closed => SinkError::Lost {
            peer,
            cause: Arc::new(io::ErrorKind::UnexpectedEof.into()),
        },
        CodecError::Io(cause) => {
            let tls = cause
                .get_ref()
                .is_some_and(|inner| inner.is::<rustls::Error>());
            let cause = Arc::new(cause);
            if tls {
                SinkError::Tls { peer, cause }
            } else {
                SinkError::Lost { peer, cause }
            }
        }
    }
}

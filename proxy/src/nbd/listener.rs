//! Accepts NBD clients, leads them through the handshake, and hands them on.
//!
//! Owns a listening socket and the connections in their handshake. Always holds: at most
//! `connections_max` connections of a listener exist, at most `handshakes_max` of them in the
//! handshake; when a new one comes, the oldest handshake that waits for its client makes room. A
//! failed handshake is logged and dropped; it harms nobody else.

use super::budget::PayloadBudget;
use super::device;
use super::export::{Exports, Negotiated, Peer, PeerAddress, Target};
use super::handshake::{Connected, HANDSHAKE_DEADLINE, MaybeTls, TlsPolicy, Watch, negotiate};
pub use super::socket::{ListenAddress, ListenError};
use super::socket::{Socket, Stream};
use rustls::ServerConnection;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

#[cfg(test)]
#[path = "listener_tests.rs"]
mod tests;

/// What a listener is told.
#[derive(Debug)]
pub struct ListenerConfig {
    /// Where.
    pub address: ListenAddress,
    /// Groups whose exports it serves; `None` is all.
    pub groups: Option<Arc<[String]>>,
    /// TLS.
    pub tls: TlsPolicy,
    /// Every write is answered only when it is durable in the log.
    pub ack_durable: bool,
    /// Most connections at a time.
    pub connections_max: usize,
    /// Most connections in the handshake at a time.
    pub handshakes_max: usize,
    /// Time a client has for its handshake.
    pub handshake_deadline: Duration,
}

impl ListenerConfig {
    /// A listener with every default: all groups, no TLS, answers from the ring.
    #[must_use]
    pub fn at(address: ListenAddress) -> Self {
        Self {
            address,
            groups: None,
            tls: TlsPolicy::Off,
            ack_durable: false,
            connections_max: 1024,
            handshakes_max: 64,
            handshake_deadline: HANDSHAKE_DEADLINE,
        }
    }
}

/// A place among a listener's connections; free again when dropped.
#[derive(Debug)]
pub struct ConnectionSlot {
    _permit: OwnedSemaphorePermit,
}

#[cfg(test)]
impl ConnectionSlot {
    /// A place of its own.
    pub(crate) fn for_test() -> Self {
        let places = Arc::new(Semaphore::new(1));
        let permit = places.try_acquire_owned().expect("one is free");
        Self { _permit: permit }
    }
}

/// A client in transmission, on its way to the thread that owns its disk.
#[derive(Debug)]
pub struct Connection {
    /// The socket, in blocking mode. Its next byte is the first of transmission.
    pub socket: OwnedFd,
    /// TLS, if it is on. May hold decrypted bytes already: read from it before the socket.
    pub tls: Option<Box<ServerConnection>>,
    /// Who the client is.
    pub peer: Peer,
    /// What was agreed. Its target is a [`Target::Disk`].
    pub negotiated: Negotiated,
    /// Keep it as long as the connection.
    pub slot: ConnectionSlot,
}

/// Takes over connections to disks of groups.
pub trait Attach: Send + Sync {
    /// Serves the connection from now on. If that cannot be, drop it.
    fn attach(&self, connection: Connection);
}

/// A listening socket and its rules.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    rules: Arc<Rules>,
    handshakes_max: usize,
}

#[derive(Debug)]
struct Rules {
    groups: Option<Arc<[String]>>,
    tls: TlsPolicy,
    ack_durable: bool,
    handshake_deadline: Duration,
    connections: Arc<Semaphore>,
    /// Numbers of connections to devices.
    next: AtomicU32,
    /// Large payloads to devices.
    budget: PayloadBudget,
}

impl Listener {
    /// Listens. From now on clients queue; nobody is answered until [`Listener::run`].
    ///
    /// # Errors
    /// Says what is wrong with the address.
    pub fn bind(config: ListenerConfig) -> Result<Self, ListenError> {
        Ok(Self {
            socket: Socket::bind(config.address)?,
            rules: Arc::new(Rules {
                groups: config.groups,
                tls: config.tls,
                ack_durable: config.ack_durable,
                handshake_deadline: config.handshake_deadline,
                connections: Arc::new(Semaphore::new(config.connections_max)),
                next: AtomicU32::new(0),
                budget: PayloadBudget::default(),
            }),
            handshakes_max: config.handshakes_max.max(1),
        })
    }

    /// The TCP address, with the port that was really taken.
    #[must_use]
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.socket.local_address()
    }

    /// Accepts clients until `stop`. Handshakes and connections to devices end with it;
    /// connections that were attached do not.
    pub async fn run(
        self,
        exports: Arc<dyn Exports>,
        attach: Arc<dyn Attach>,
        stop: CancellationToken,
    ) {
        let mut handshakes: VecDeque<(AbortHandle, Arc<Watch>)> = VecDeque::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.socket.accept() => accepted,
                () = stop.cancelled() => break,
            };
            let stream = match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    // Out of descriptors, as a rule: others may give some back.
                    tracing::warn!(%error, "cannot accept a client");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(permit) = self.rules.connections.clone().try_acquire_owned() else {
                tracing::warn!("too many connections: a client was turned away");
                continue;
            };
            handshakes.retain(|(task, _)| !task.is_finished());
            if handshakes.len() >= self.handshakes_max && !make_room(&mut handshakes) {
                tracing::warn!("too many handshakes: a client was turned away");
                continue;
            }
            let watch = Arc::new(Watch {
                deadline: self.rules.handshake_deadline,
                ..Watch::default()
            });
            let client = Client {
                rules: self.rules.clone(),
                exports: exports.clone(),
                attach: attach.clone(),
                watch: watch.clone(),
                stop: stop.clone(),
                slot: ConnectionSlot { _permit: permit },
            };
            let task = match stream {
                Stream::Unix(stream) => {
                    let address = unix_peer(&stream);
                    tokio::spawn(client.welcome(stream, address))
                }
                Stream::Tcp(stream, address) => {
                    tokio::spawn(client.welcome(stream, PeerAddress::Tcp(address)))
                }
            };
            handshakes.push_back((task.abort_handle(), watch));
        }
        for (task, _) in handshakes {
            task.abort();
        }
    }
}

/// Ends the oldest handshake that waits for its client.
fn make_room(handshakes: &mut VecDeque<(AbortHandle, Arc<Watch>)>) -> bool {
    let idle = |(_, watch): &(AbortHandle, Arc<Watch>)| watch.awaits_client.load(Ordering::Relaxed);
    let oldest = handshakes.iter().position(idle);
    match oldest.and_then(|index| handshakes.remove(index)) {
        Some((task, _)) => {
            tracing::warn!("too many handshakes: the oldest half-open one was dropped");
            task.abort();
            true
        }
        None => false,
    }
}

fn unix_peer(stream: &UnixStream) -> PeerAddress {
    let credentials = stream.peer_cred().ok();
    PeerAddress::Unix {
        uid: credentials.map_or(u32::MAX, |credentials| credentials.uid()),
        pid: credentials
            .and_then(|credentials| credentials.pid())
            .unwrap_or(0),
    }
}

/// One accepted client.
struct Client {
    rules: Arc<Rules>,
    exports: Arc<dyn Exports>,
    attach: Arc<dyn Attach>,
    watch: Arc<Watch>,
    stop: CancellationToken,
    slot: ConnectionSlot,
}

impl Client {
    async fn welcome<S>(self, stream: S, address: PeerAddress)
    where
        S: AsyncRead + AsyncWrite + IntoDescriptor + Unpin + Send + 'static,
    {
        let peer = Peer {
            address,
            groups: self.rules.groups.clone(),
            tls: false,
            identity: None,
            ack_durable: self.rules.ack_durable,
        };
        let tls = &self.rules.tls;
        match negotiate(stream, peer, tls, &self.watch, &*self.exports).await {
            Ok(Some(connected)) => self.hand_on(connected),
            Ok(None) => {}
            Err(error) => tracing::info!(%address, %error, "a handshake failed"),
        }
    }

    fn hand_on<S>(self, connected: Connected<S>)
    where
        S: AsyncRead + AsyncWrite + IntoDescriptor + Unpin + Send + 'static,
    {
        let Connected {
            stream,
            peer,
            negotiated,
        } = connected;
        let export = negotiated.export.name.clone();
        let address = peer.address;
        tracing::info!(%address, export, tls = peer.tls, form = ?negotiated.form, "a client attached");
        if let Target::Device(device) = &negotiated.export.target {
            let device = device.clone();
            let connection = self.rules.next.fetch_add(1, Ordering::Relaxed);
            let config = negotiated.session_config(connection, self.rules.budget.clone());
            // A task of its own: the handshake, which may be dropped to make room, is over.
            tokio::spawn(async move {
                let _slot = self.slot;
                tokio::select! {
                    result = device::serve(stream, config, device) => match result {
                        Ok(()) => tracing::info!(%address, export, "a client left"),
                        Err(error) => tracing::info!(%address, export, %error, "a client was cut off"),
                    },
                    () = self.stop.cancelled() => {}
                }
            });
            return;
        }
        let (stream, tls) = match stream {
            MaybeTls::Plain(stream) => (stream, None),
            MaybeTls::Tls(stream) => {
                let (stream, tls) = stream.into_inner();
                (stream, Some(Box::new(tls)))
            }
        };
        match stream.into_descriptor() {
            Ok(socket) => self.attach.attach(Connection {
                socket,
                tls,
                peer,
                negotiated,
                slot: self.slot,
            }),
            Err(error) => tracing::warn!(%address, export, %error, "a client was lost"),
        }
    }
}

/// Takes a stream out of tokio.
trait IntoDescriptor {
    /// The bare socket, in blocking mode.
    fn into_descriptor(self) -> io::Result<OwnedFd>;
}

impl IntoDescriptor for UnixStream {
    fn into_descriptor(self) -> io::Result<OwnedFd> {
        let stream = self.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream.into())
    }
}

impl IntoDescriptor for TcpStream {
    fn into_descriptor(self) -> io::Result<OwnedFd> {
        let stream = self.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream.into())
    }
}

//! The fixed newstyle handshake, on tokio, over any stream.
//!
//! Owns a connection from its first byte up to the answer of GO or EXPORT_NAME, which it leaves to
//! whoever serves the connection ([`Negotiated::answer`]). Always holds: exactly
//! the bytes of the handshake are read, so nothing sent before STARTTLS can be taken for something
//! that came encrypted, and nothing of transmission is lost; no choice of the client survives
//! STARTTLS; time (waiting for the server's own work apart), number and size of options are
//! bounded. On an error the connection is dropped; nothing else was touched.

mod options;
#[cfg(test)]
mod tests;
use super::export::{Exports, Negotiated, OpenError, Peer};
use crate::tls::{Identity, IdentityError};
use afterimage_format::nbd::constants::{FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES};
use afterimage_format::nbd::option::{OptionError, greeting};
use options::{Ending, Haggle};
use rustls::ServerConfig;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Time for a client's part of the handshake, unless configured.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(30);
/// Most options in one handshake.
pub const OPTIONS_MAX: u32 = 4096;
/// Longest data of an option that is looked at; longer ones are skipped and refused.
pub const OPTION_DATA_MAX: u32 = 64 << 10;

/// Whether a listener speaks TLS.
#[derive(Clone, Debug, Default)]
pub enum TlsPolicy {
    /// STARTTLS is refused.
    #[default]
    Off,
    /// Clients may upgrade.
    Offered(Arc<ServerConfig>),
    /// Clients must upgrade before anything else.
    Forced(Arc<ServerConfig>),
}

/// Why a handshake ended without an export.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The socket failed or was closed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The client took too long.
    #[error("the client did not finish the handshake in time")]
    Deadline,
    /// The client set flags that do not exist.
    #[error("the client's flags {0:#x} are unknown")]
    ClientFlags(u32),
    /// The stream is out of step.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// Without fixed newstyle there is only EXPORT_NAME.
    #[error("option {0} from a client that does not speak fixed newstyle")]
    NotFixed(u32),
    /// The client goes round in circles.
    #[error("more than {OPTIONS_MAX} options")]
    TooManyOptions,
    /// EXPORT_NAME failed, which has no answer.
    #[error("export {name:?} cannot be opened: {source}")]
    ExportName {
        /// What the client asked for.
        name: String,
        /// Why not.
        source: OpenError,
    },
    /// EXPORT_NAME without TLS where that is forced.
    #[error("the client did not use TLS, which this listener demands")]
    TlsRequired,
    /// The TLS handshake failed.
    #[error("TLS failed: {0}")]
    Tls(io::Error),
    /// The client's certificate says nothing.
    #[error(transparent)]
    Certificate(#[from] IdentityError),
}

/// A stream after the handshake.
#[derive(Debug)]
pub enum MaybeTls<S> {
    /// As it was.
    Plain(S),
    /// Encrypted. Its connection may hold decrypted bytes already.
    Tls(Box<TlsStream<S>>),
}

/// A client that has opened an export.
#[derive(Debug)]
pub struct Connected<S> {
    /// The stream, at the first byte of transmission.
    pub stream: MaybeTls<S>,
    /// Who it is.
    pub peer: Peer,
    /// What was agreed.
    pub negotiated: Negotiated,
}

/// What the listener shares with a handshake.
#[derive(Debug)]
pub struct Watch {
    /// Time for the client's part.
    pub deadline: Duration,
    /// The client keeps us waiting (as opposed to the server's own work).
    pub awaits_client: AtomicBool,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            deadline: HANDSHAKE_DEADLINE,
            awaits_client: AtomicBool::new(true),
        }
    }
}

/// Speaks with a client until it has opened an export (`Some`) or left properly (`None`).
///
/// # Errors
/// When the client breaks the protocol, takes too long, or asks by EXPORT_NAME for what it cannot
/// have. Drop the connection then.
pub async fn negotiate<S>(
    stream: S,
    mut peer: Peer,
    tls: &TlsPolicy,
    watch: &Watch,
    exports: &dyn Exports,
) -> Result<Option<Connected<S>>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut wire = Wire::new(stream, watch);
    wire.send(&greeting()).await?;
    let flags = u32::from_be_bytes(wire.receive().await?);
    let (fixed, no_zeroes) = (FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES);
    if flags & !u32::from(fixed | no_zeroes) != 0 {
        return Err(HandshakeError::ClientFlags(flags));
    }
    let has = |flag: u16| flags & u32::from(flag) != 0;
    let mut haggle = Haggle::new(has(fixed), has(no_zeroes), tls);
    match haggle.run(&mut wire, &peer, exports).await? {
        Ending::Left => Ok(None),
        Ending::Open(negotiated) => {
            let stream = MaybeTls::Plain(wire.stream);
            Ok(Some(Connected {
                stream,
                peer,
                negotiated,
            }))
        }
        Ending::StartTls(config) => {
            let deadline = wire.deadline;
            let accept = TlsAcceptor::from(config.clone()).accept(wire.stream);
            let stream = timeout_at(deadline, accept)
                .await
                .map_err(|_| HandshakeError::Deadline)?
                .map_err(HandshakeError::Tls)?;
            peer.tls = true;
            peer.identity = match stream.get_ref().1.peer_certificates() {
                Some(chain) => Some(Identity::of(chain)?),
                None => None,
            };
            let mut wire = Wire {
                stream,
                deadline,
                watch,
            };
            haggle.restart_encrypted();
            match haggle.run(&mut wire, &peer, exports).await? {
                Ending::Open(negotiated) => Ok(Some(Connected {
                    stream: MaybeTls::Tls(Box::new(wire.stream)),
                    peer,
                    negotiated,
                })),
                // STARTTLS is refused once TLS is on.
                Ending::Left | Ending::StartTls(_) => Ok(None),
            }
        }
    }
}

/// The stream with its deadline.
struct Wire<'a, S> {
    stream: S,
    deadline: Instant,
    watch: &'a Watch,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Wire<'a, S> {
    fn new(stream: S, watch: &'a Watch) -> Self {
        Self {
            stream,
            deadline: Instant::now() + watch.deadline,
            watch,
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        let send = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        timeout_at(self.deadline, send)
            .await
            .map_err(|_| HandshakeError::Deadline)??;
        Ok(())
    }

    async fn receive<const N: usize>(&mut self) -> Result<[u8; N], HandshakeError> {
        let mut bytes = [0; N];
        self.receive_into(&mut bytes).await?;
        Ok(bytes)
    }

    async fn receive_into(&mut self, bytes: &mut [u8]) -> Result<(), HandshakeError> {
        timeout_at(self.deadline, self.stream.read_exact(bytes))
            .await
            .map_err(|_| HandshakeError::Deadline)??;
        Ok(())
    }

    async fn skip(&mut self, mut bytes: u32) -> Result<(), HandshakeError> {
        let mut scrap = [0; 4096];
        while bytes > 0 {
            let part = (bytes as usize).min(scrap.len());
            self.receive_into(&mut scrap[..part]).await?;
            bytes -= part as u32;
        }
        Ok(())
    }

    /// Work of the server: the client's time stands still meanwhile.
    async fn work<T>(&mut self, work: impl Future<Output = T>) -> T {
        let begin = Instant::now();
        self.watch.awaits_client.store(false, Ordering::Relaxed);
        let result = work.await;
        self.watch.awaits_client.store(true, Ordering::Relaxed);
        self.deadline += begin.elapsed();
        result
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for MaybeTls<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for MaybeTls<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

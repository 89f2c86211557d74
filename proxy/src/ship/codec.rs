//! Messages of the replication protocol on a byte stream. Used by both sides.

use afterimage_format::wire::{FRAME_HEADER_BYTES, FrameHeader, Message, WireError};
use bytes::BytesMut;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// Bytes read or written under one deadline.
const STEP_BYTES: usize = 64 * 1024;

/// Why no message could be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The stream ended between two messages.
    #[error("the peer closed the connection")]
    Closed,
    /// The stream failed, or ended within a message.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Nothing moved for this long.
    #[error("no progress for {} s", .0.as_secs())]
    Silent(Duration),
    /// The bytes are no message.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Reads one message. `silence` is the longest time without a single byte. Memory grows with what
/// has come, not with what was announced.
///
/// # Errors
/// The stream failed, is silent, or holds something else.
pub async fn read_message<R>(stream: &mut R, silence: Duration) -> Result<Message, CodecError>
where
    R: AsyncRead + Unpin,
{
    let header = read_header(stream, silence).await?;
    read_body(stream, header, silence).await
}

/// Reads a message's header: for whoever wants to make room before the body is read.
///
/// # Errors
/// As [`read_message`].
pub async fn read_header<R>(stream: &mut R, silence: Duration) -> Result<FrameHeader, CodecError>
where
    R: AsyncRead + Unpin,
{
    let mut header = [0; FRAME_HEADER_BYTES];
    let mut have = 0;
    while have < header.len() {
        let step = timeout(silence, stream.read(&mut header[have..])).await;
        match step.map_err(|_| CodecError::Silent(silence))?? {
            0 if have == 0 => return Err(CodecError::Closed),
            0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            count => have += count,
        }
    }
    Ok(FrameHeader::decode(header)?)
}

/// Reads the body that a header announced.
///
/// # Errors
/// As [`read_message`].
pub async fn read_body<R>(
    stream: &mut R,
    header: FrameHeader,
    silence: Duration,
) -> Result<Message, CodecError>
where
    R: AsyncRead + Unpin,
{
    let want = header.body_len as usize;
    let mut body = BytesMut::new();
    while body.len() < want {
        let step = (want - body.len()).min(STEP_BYTES);
        body.reserve(step);
        let mut limited = (&mut *stream).take(step as u64);
        let read = timeout(silence, limited.read_buf(&mut body)).await;
        if read.map_err(|_| CodecError::Silent(silence))?? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
    Ok(Message::decode(header.kind, body.freeze())?)
}

/// Writes one message and flushes it. `silence` is the longest time in which not a single step of
/// 64 KiB gets away.
///
/// # Errors
/// The stream failed or takes nothing.
pub async fn write_message<W>(
    stream: &mut W,
    message: &Message,
    silence: Duration,
) -> Result<(), CodecError>
where
    W: AsyncWrite + Unpin,
{
    let (header, body) = message.encode();
    let late = |_| CodecError::Silent(silence);
    timeout(silence, stream.write_all(&header.encode()))
        .await
        .map_err(late)??;
    for step in body.chunks(STEP_BYTES) {
        timeout(silence, stream.write_all(step))
            .await
            .map_err(late)??;
    }
    timeout(silence, stream.flush()).await.map_err(late)??;
    Ok(())
}

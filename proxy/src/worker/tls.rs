//! TLS records of one connection: ciphertext from the socket to plaintext for the session, and
//! back. The handshake is over when a connection arrives here.

use crate::io::buffer::AlignedBuffer;
use crate::io::socket::Piece;
use rustls::ServerConnection;
use std::io::{self, Read, Write};

/// Bytes of ciphertext received at once.
const CIPHERTEXT_BYTES: usize = 128 << 10;
/// Emptied pieces kept for reuse.
const SPARE_MAX: usize = 4;

/// What [`TlsLayer::read`] found.
pub(super) struct Plaintext {
    pub(super) bytes: usize,
    /// The peer has closed its side in order.
    pub(super) ended: bool,
}

pub(super) struct TlsLayer {
    connection: ServerConnection,
    /// Not here while the kernel receives into it.
    ciphertext: Option<AlignedBuffer>,
    start: usize,
    end: usize,
    spare: Vec<Vec<u8>>,
}

impl TlsLayer {
    pub(super) fn new(mut connection: ServerConnection) -> Self {
        // What is handed in at once is bounded by the caller.
        connection.set_buffer_limit(None);
        Self {
            connection,
            ciphertext: Some(AlignedBuffer::new(CIPHERTEXT_BYTES)),
            start: 0,
            end: 0,
            spare: Vec::new(),
        }
    }

    /// The buffer for the next receive: only when all ciphertext is used up.
    pub(super) fn take_buffer(&mut self) -> Option<(AlignedBuffer, usize)> {
        if self.start < self.end {
            return None;
        }
        (self.start, self.end) = (0, 0);
        self.ciphertext.take().map(|buffer| (buffer, 0))
    }

    pub(super) fn received(&mut self, buffer: AlignedBuffer, bytes: usize) {
        self.ciphertext = Some(buffer);
        self.end += bytes;
    }

    /// Decrypts into `into` until it is full or the ciphertext is used up.
    pub(super) fn read(&mut self, into: &mut [u8]) -> io::Result<Plaintext> {
        let mut bytes = 0;
        loop {
            match self.connection.reader().read(&mut into[bytes..]) {
                Ok(0) if bytes < into.len() => return Ok(Plaintext { bytes, ended: true }),
                Ok(0) => break,
                Ok(have) => {
                    bytes += have;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            let Some(ciphertext) = &self.ciphertext else {
                break;
            };
            if self.start == self.end {
                break;
            }
            let mut rest = &ciphertext[self.start..self.end];
            self.start += self.connection.read_tls(&mut rest)?;
            self.connection
                .process_new_packets()
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
        Ok(Plaintext {
            bytes,
            ended: false,
        })
    }

    pub(super) fn has_output(&self) -> bool {
        self.connection.wants_write()
    }

    pub(super) fn write(&mut self, plaintext: &[u8]) -> io::Result<()> {
        self.connection.writer().write_all(plaintext)
    }

    pub(super) fn close(&mut self) {
        self.connection.send_close_notify();
    }

    /// All ciphertext that waits, as one piece.
    pub(super) fn take_output(&mut self) -> io::Result<Piece> {
        let mut piece = self.spare.pop().unwrap_or_default();
        while self.connection.wants_write() {
            self.connection.write_tls(&mut piece)?;
        }
        Ok(Piece::Small(piece))
    }

    pub(super) fn recycle(&mut self, piece: Piece) {
        if let Piece::Small(mut bytes) = piece
            && self.spare.len() < SPARE_MAX
        {
            bytes.clear();
            self.spare.push(bytes);
        }
    }
}

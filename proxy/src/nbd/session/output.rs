//! What waits to be sent: small encoded pieces and owned data buffers, in order.

use crate::io::buffer::AlignedBuffer;
use std::collections::VecDeque;

/// Heads are encoded into pieces of about this size.
const SMALL_BYTES: usize = 4096;
/// Emptied pieces kept for reuse: as many as a connection usually has requests in flight, since each
/// read has a head of its own.
const SPARE_MAX: usize = 128;

/// One piece of the outgoing stream.
pub use crate::io::socket::Piece as OutChunk;

#[derive(Debug, Default)]
pub(super) struct Output {
    chunks: VecDeque<OutChunk>,
    spare: Vec<Vec<u8>>,
}

impl Output {
    /// Appends what `encode` writes; says how many bytes that was.
    pub(super) fn small(&mut self, encode: impl FnOnce(&mut Vec<u8>)) -> usize {
        let open = matches!(
            self.chunks.back(),
            Some(OutChunk::Small(bytes)) if bytes.len() < SMALL_BYTES
        );
        if !open {
            let piece = self.spare.pop().unwrap_or_default();
            self.chunks.push_back(OutChunk::Small(piece));
        }
        match self.chunks.back_mut() {
            Some(OutChunk::Small(bytes)) => {
                let before = bytes.len();
                encode(bytes);
                bytes.len() - before
            }
            _ => 0,
        }
    }

    pub(super) fn data(&mut self, buffer: AlignedBuffer, start: usize, len: usize) {
        self.chunks.push_back(OutChunk::Data { buffer, start, len });
    }

    pub(super) fn take(&mut self, into: &mut Vec<OutChunk>, chunks_max: usize, bytes_max: usize) {
        let mut bytes = 0;
        while into.len() < chunks_max && bytes < bytes_max {
            let Some(chunk) = self.chunks.pop_front() else {
                return;
            };
            bytes += chunk.len();
            into.push(chunk);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    pub(super) fn recycle(&mut self, chunk: OutChunk) -> Option<AlignedBuffer> {
        match chunk {
            OutChunk::Small(mut bytes) => {
                if self.spare.len() < SPARE_MAX && bytes.capacity() <= 2 * SMALL_BYTES {
                    bytes.clear();
                    self.spare.push(bytes);
                }
                None
            }
            OutChunk::Data { buffer, .. } => Some(buffer),
        }
    }
}

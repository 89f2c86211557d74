//! From the engine's answers to what the client reads.

use super::check::Checked;
use super::{ContextKind, Session};
use crate::engine::request::{Extent, Reply, ReplyBody, RequestError};
use crate::io::buffer::AlignedBuffer;
use afterimage_format::nbd::constants::{Errno, STATE_DIRTY, STATE_HOLE, STATE_ZERO};
use afterimage_format::nbd::reply::{
    Answered, Descriptor, push_block_status, push_data_header, push_done, push_error,
};

impl Session {
    /// Takes the answer to a request of this session. Gives back the data buffer if it is not
    /// going to be sent.
    ///
    /// Panics if the id is not in flight here: the engine answers each request once.
    pub fn complete(&mut self, reply: Reply) -> Option<AlignedBuffer> {
        let unsent = self.answer(reply);
        self.settle_replies();
        unsent
    }

    fn answer(&mut self, reply: Reply) -> Option<AlignedBuffer> {
        debug_assert_eq!(Self::connection_of(reply.id), self.config.connection);
        let slot = (reply.id.0 & u64::from(u32::MAX)) as usize;
        let pending = self.pending.remove(slot);
        self.reply_bytes -= pending.reserved;
        let to = pending.to;
        if self.abandoned {
            return match reply.result {
                Ok(ReplyBody::Data { buffer, .. }) => Some(buffer),
                _ => None,
            };
        }
        match (pending.checked, reply.result) {
            (
                Checked::Read { len, .. },
                Ok(ReplyBody::Data {
                    buffer,
                    start,
                    len: have,
                }),
            ) if have == len as usize => {
                self.push_head(|out, form| push_data_header(out, form, to, len));
                self.reply_bytes += have;
                self.output.data(buffer, start, have);
                return None;
            }
            (Checked::BlockStatus { len, extents_max }, Ok(ReplyBody::Extents(extents)))
                if extents.first().is_some_and(|extent| extent.len > 0) =>
            {
                self.push_extents(to, len, extents_max as usize, &extents);
            }
            (
                Checked::Write { .. }
                | Checked::Flush
                | Checked::Trim { .. }
                | Checked::WriteZeroes { .. },
                Ok(ReplyBody::Done),
            ) => self.push_head(|out, form| push_done(out, form, to)),
            (_, Err(error)) => {
                let (errno, message) = wire_error(error);
                self.push_head(|out, form| push_error(out, form, to, errno, message));
            }
            (checked, Ok(body)) => {
                tracing::error!(?checked, ?body, "the answer does not fit the request");
                let message = "internal error";
                self.push_head(|out, form| push_error(out, form, to, Errno::Io, message));
                if let ReplyBody::Data { buffer, .. } = body {
                    return Some(buffer);
                }
            }
        }
        None
    }

    fn push_extents(&mut self, to: Answered, len: u64, extents_max: usize, extents: &[Extent]) {
        let contexts = std::mem::take(&mut self.config.contexts);
        for (index, context) in contexts.iter().enumerate() {
            let descriptors = describe(context.kind, len, extents_max, extents);
            let done = index + 1 == contexts.len();
            self.push_head(|out, form| {
                push_block_status(out, form, to, context.id, &descriptors, done);
            });
        }
        self.config.contexts = contexts;
    }
}

fn wire_error(error: RequestError) -> (Errno, &'static str) {
    match error {
        RequestError::Io => (Errno::Io, "input/output error"),
        RequestError::NoSpace => (Errno::NoSpace, "no space left"),
        RequestError::Invalid => (Errno::Invalid, "invalid request"),
        RequestError::NoMemory => (Errno::NoMemory, "no memory"),
        RequestError::ShuttingDown => (Errno::ShuttingDown, "the server is shutting down"),
    }
}

/// The extents as one context tells them: equal neighbours joined, nothing beyond `len`.
fn describe(kind: ContextKind, len: u64, max: usize, extents: &[Extent]) -> Vec<Descriptor> {
    let mut out: Vec<Descriptor> = Vec::with_capacity(extents.len().min(max));
    let mut left = len;
    for extent in extents {
        let length = extent.len.min(left);
        if length == 0 {
            break;
        }
        left -= length;
        let flags = match kind {
            ContextKind::Allocation => {
                let hole = if extent.hole { STATE_HOLE } else { 0 };
                let zero = if extent.zero { STATE_ZERO } else { 0 };
                hole | zero
            }
            ContextKind::Dirty => {
                if extent.dirty {
                    STATE_DIRTY
                } else {
                    0
                }
            }
        };
        let full = out.len() == max;
        match out.last_mut() {
            Some(last) if last.flags == flags => last.length += length,
            _ if full => break,
            _ => out.push(Descriptor { length, flags }),
        }
    }
    out
}

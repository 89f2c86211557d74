//! One operation in the kernel's hands: what it owns, its next submission entry, and what a result
//! means for it.
#![expect(unsafe_code, reason = "addresses within buffers that the slot owns")]

#[cfg(test)]
#[path = "operation_tests.rs"]
mod tests;

use super::buffer::AlignedBuffer;
use super::file::{StorageFile, ZeroMethod};
use super::mapping::RingMapping;
use super::uring::SocketCompletion;
use super::{Completion, FileId, RingSpan, Token};
use io_uring::{opcode, squeue, types};
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

/// Zeroes for devices that cannot zero by themselves.
static ZEROES: std::sync::LazyLock<AlignedBuffer> =
    std::sync::LazyLock::new(|| AlignedBuffer::new(ZEROES_LEN));
const ZEROES_LEN: usize = 1 << 18;
/// Transfers are resumed at multiples of this.
const SECTOR: usize = 512;
/// Times in a row that EAGAIN is tried again.
const RETRIES_MAX: u8 = 100;

/// One piece of an outgoing stream. Its bytes do not move as long as it is not touched.
#[derive(Debug)]
pub enum Piece {
    /// Encoded heads, small bodies, ciphertext.
    Small(Vec<u8>),
    /// Data of a read.
    Data {
        /// Where it lies.
        buffer: AlignedBuffer,
        /// First byte of it in the buffer.
        start: usize,
        /// How many bytes.
        len: usize,
    },
}

impl Deref for Piece {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Small(bytes) => bytes,
            Self::Data { buffer, start, len } => &buffer[*start..*start + *len],
        }
    }
}

/// The memory of a socket operation, given back at its end.
#[derive(Debug)]
pub enum SocketBuffers {
    /// Of a receive.
    Received(AlignedBuffer),
    /// Of a send, all pieces.
    Sent(Vec<Piece>),
    /// Of a wake-up.
    None,
}

/// What an operation does, and the memory it does it with.
pub(super) enum Kind {
    Read {
        file: FileId,
        offset: u64,
        buffer: AlignedBuffer,
    },
    WriteOwned {
        file: FileId,
        offset: u64,
        buffer: AlignedBuffer,
        dsync: bool,
    },
    WriteRing {
        file: FileId,
        offset: u64,
        span: RingSpan,
        dsync: bool,
    },
    WriteGather {
        file: FileId,
        offset: u64,
        spans: Vec<RingSpan>,
        vectors: Vec<libc::iovec>,
        total: usize,
        dsync: bool,
    },
    Sync {
        file: FileId,
    },
    Zero {
        file: FileId,
        offset: u64,
        len: u64,
        method: ZeroMethod,
    },
    Receive {
        socket: Rc<OwnedFd>,
        buffer: AlignedBuffer,
        start: usize,
    },
    Send {
        socket: Rc<OwnedFd>,
        pieces: Vec<Piece>,
        header: SendHeader,
        total: usize,
    },
    /// Reads an eventfd's counter.
    Event {
        eventfd: Arc<OwnedFd>,
        counter: Box<u64>,
    },
}

/// What sendmsg wants beside the data; pooled.
pub(super) struct SendHeader {
    vectors: Vec<libc::iovec>,
    message: Box<libc::msghdr>,
}

impl Default for SendHeader {
    fn default() -> Self {
        // SAFETY: msghdr is plain data; all zeroes is a valid value.
        let message = unsafe { std::mem::zeroed() };
        Self {
            vectors: Vec::new(),
            message: Box::new(message),
        }
    }
}

pub(super) struct Slot {
    pub(super) client: Option<usize>,
    token: Token,
    kind: Kind,
    done: u64,
    retries: u8,
}

pub(super) enum Step {
    Continue,
    Done(io::Result<usize>),
}

impl Slot {
    pub(super) fn of_client(client: usize, token: Token, kind: Kind) -> Self {
        Self {
            client: Some(client),
            token,
            kind,
            done: 0,
            retries: 0,
        }
    }

    pub(super) fn of_socket(token: Token, kind: Kind) -> Self {
        Self {
            client: None,
            token,
            kind,
            done: 0,
            retries: 0,
        }
    }

    pub(super) fn is_socket(&self) -> bool {
        self.client.is_none()
    }

    /// The entry for what is left to do.
    pub(super) fn entry(
        &mut self,
        files: &[Option<Arc<StorageFile>>],
        memory: Option<&RingMapping>,
    ) -> squeue::Entry {
        let done = usize::try_from(self.done).unwrap_or(usize::MAX);
        match &mut self.kind {
            Kind::Read {
                file,
                offset,
                buffer,
            } => {
                let file = file_of(files, *file);
                // The tail of a disk: ask for the whole sector, the end of the file cuts it.
                let wanted = buffer.len().next_multiple_of(file.align());
                let len = wanted.min(buffer.capacity()) - done;
                let at = *offset + self.done;
                let fd = types::Fd(file.descriptor(at, len as u64));
                // SAFETY: `done` is below the length.
                let address = unsafe { buffer.as_mut_ptr().add(done) };
                opcode::Read::new(fd, address, len as u32)
                    .offset(at)
                    .build()
            }
            Kind::WriteOwned {
                file,
                offset,
                buffer,
                dsync,
            } => {
                let rest = &buffer[done..];
                write_entry(
                    file_of(files, *file),
                    *offset + self.done,
                    rest.as_ptr(),
                    rest.len(),
                    *dsync,
                )
            }
            Kind::WriteRing {
                file,
                offset,
                span,
                dsync,
            } => {
                let len = span.len as usize - done;
                let memory = memory.expect("a storage that writes from the ring has one");
                let address = memory.address(span.offset as usize + done, len);
                write_entry(
                    file_of(files, *file),
                    *offset + self.done,
                    address,
                    len,
                    *dsync,
                )
            }
            Kind::WriteGather {
                file,
                offset,
                spans,
                vectors,
                total,
                dsync,
            } => {
                let memory = memory.expect("a storage that writes from the ring has one");
                let parts = spans
                    .iter()
                    .map(|span| (span.offset as usize, span.len as usize));
                fill_vectors(vectors, parts, done, |at, len| memory.address(at, len));
                let at = *offset + self.done;
                let fd = file_of(files, *file).descriptor(at, (*total - done) as u64);
                opcode::Writev::new(types::Fd(fd), vectors.as_ptr(), vectors.len() as u32)
                    .offset(at)
                    .rw_flags(if *dsync { libc::RWF_DSYNC } else { 0 })
                    .build()
            }
            Kind::Sync { file } => opcode::Fsync::new(types::Fd(file_of(files, *file).raw()))
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Kind::Zero {
                file,
                offset,
                len,
                method,
                ..
            } => {
                let file = file_of(files, *file);
                let at = *offset + self.done;
                let left = *len - self.done;
                let mode = match method {
                    ZeroMethod::Punch => libc::FALLOC_FL_PUNCH_HOLE,
                    ZeroMethod::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
                    ZeroMethod::Write => {
                        let step = left.min(ZEROES_LEN as u64) as usize;
                        return write_entry(file, at, ZEROES.as_ptr(), step, false);
                    }
                };
                opcode::Fallocate::new(types::Fd(file.raw()), left)
                    .offset(at)
                    .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
                    .build()
            }
            Kind::Receive {
                socket,
                buffer,
                start,
            } => {
                let len = buffer.len() - *start;
                // SAFETY: `start` is at most the length, checked when it was submitted.
                let address = unsafe { buffer.as_mut_ptr().add(*start) };
                opcode::Recv::new(types::Fd(socket.as_raw_fd()), address, len as u32).build()
            }
            Kind::Send {
                socket,
                pieces,
                header,
                ..
            } => {
                let SendHeader { vectors, message } = header;
                fill_piece_vectors(vectors, done, pieces);
                message.msg_iov = vectors.as_mut_ptr();
                message.msg_iovlen = vectors.len() as _;
                opcode::SendMsg::new(types::Fd(socket.as_raw_fd()), &raw const **message)
                    .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
                    .build()
            }
            Kind::Event { eventfd, counter } => {
                let address: *mut u64 = &raw mut **counter;
                opcode::Read::new(types::Fd(eventfd.as_raw_fd()), address.cast(), 8).build()
            }
        }
    }

    /// The lists of a gathered write that is over.
    pub(super) fn take_gather(&mut self) -> Option<(Vec<RingSpan>, Vec<libc::iovec>)> {
        match &mut self.kind {
            Kind::WriteGather { spans, vectors, .. } => {
                Some((std::mem::take(spans), std::mem::take(vectors)))
            }
            _ => None,
        }
    }

    /// What a result of the kernel means.
    pub(super) fn advance(&mut self, result: i32, files: &[Option<Arc<StorageFile>>]) -> Step {
        if result < 0 {
            return self.failed(-result, files);
        }
        self.retries = 0;
        let moved = u64::try_from(result).unwrap_or_default();
        match &mut self.kind {
            Kind::Sync { .. } => Step::Done(Ok(0)),
            Kind::Event { .. } | Kind::Receive { .. } => Step::Done(Ok(moved as usize)),
            Kind::Read { buffer, .. } => {
                self.done += moved;
                let have = self.done as usize;
                let at_end = moved == 0 || !have.is_multiple_of(SECTOR);
                if at_end || have >= buffer.len() {
                    return Step::Done(Ok(have.min(buffer.len())));
                }
                Step::Continue
            }
            Kind::Zero { len, method, .. } => {
                if *method != ZeroMethod::Write {
                    return Step::Done(Ok(0));
                }
                let step = (*len - self.done).min(ZEROES_LEN as u64);
                let total = *len;
                match self.wrote(moved, self.done + step) {
                    Step::Done(Ok(_)) if self.done < total => Step::Continue,
                    Step::Done(Ok(_)) => Step::Done(Ok(0)),
                    other => other,
                }
            }
            Kind::WriteOwned { buffer, .. } => {
                let total = buffer.len() as u64;
                self.wrote(moved, total)
            }
            Kind::WriteRing { span, .. } => {
                let total = u64::from(span.len);
                self.wrote(moved, total)
            }
            Kind::WriteGather { total, .. } => {
                let total = *total as u64;
                self.wrote(moved, total)
            }
            Kind::Send { total, .. } => {
                self.done += moved;
                if self.done >= *total as u64 {
                    Step::Done(Ok(*total))
                } else if moved == 0 {
                    Step::Done(Err(io::ErrorKind::WriteZero.into()))
                } else {
                    Step::Continue
                }
            }
        }
    }

    fn wrote(&mut self, moved: u64, total: u64) -> Step {
        let before = self.done;
        self.done += moved;
        if self.done >= total {
            return Step::Done(Ok(total as usize));
        }
        // Go on at a sector: what lies before it is written once more, with the same bytes.
        self.done = self.done / SECTOR as u64 * SECTOR as u64;
        if self.done <= before {
            return Step::Done(Err(io::ErrorKind::WriteZero.into()));
        }
        Step::Continue
    }

    fn failed(&mut self, errno: i32, files: &[Option<Arc<StorageFile>>]) -> Step {
        let error = || io::Error::from_raw_os_error(errno);
        match (&mut self.kind, errno) {
            // The error of a sync is reported by the kernel once only.
            (Kind::Sync { .. }, _) => Step::Done(Err(error())),
            (_, libc::EINTR) => Step::Continue,
            (_, libc::EAGAIN) if self.retries < RETRIES_MAX => {
                self.retries += 1;
                Step::Continue
            }
            (
                Kind::Zero { file, method, .. },
                libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV,
            ) if *method != ZeroMethod::Write => {
                if errno == libc::EOPNOTSUPP {
                    file_of(files, *file).refuse_zero_method(*method);
                }
                *method = method.next();
                Step::Continue
            }
            _ => Step::Done(Err(error())),
        }
    }

    pub(super) fn into_completion(self, result: io::Result<usize>) -> Completion {
        let buffer = match self.kind {
            Kind::Read { buffer, .. } | Kind::WriteOwned { buffer, .. } => Some(buffer),
            _ => None,
        };
        Completion {
            token: self.token,
            result,
            buffer,
        }
    }

    pub(super) fn into_socket_completion(
        self,
        result: io::Result<usize>,
    ) -> (SocketCompletion, Option<SendHeader>) {
        let (buffers, header) = match self.kind {
            Kind::Receive { buffer, .. } => (SocketBuffers::Received(buffer), None),
            Kind::Send { pieces, header, .. } => (SocketBuffers::Sent(pieces), Some(header)),
            _ => (SocketBuffers::None, None),
        };
        let completion = SocketCompletion {
            token: self.token,
            result,
            buffers,
        };
        (completion, header)
    }
}

fn file_of(files: &[Option<Arc<StorageFile>>], file: FileId) -> &StorageFile {
    files
        .get(file.0 as usize)
        .and_then(Option::as_deref)
        .expect("checked at submission; files stay until nothing is in flight")
}

fn write_entry(
    file: &StorageFile,
    offset: u64,
    address: *const u8,
    len: usize,
    dsync: bool,
) -> squeue::Entry {
    let fd = types::Fd(file.descriptor(offset, len as u64));
    opcode::Write::new(fd, address, len as u32)
        .offset(offset)
        .rw_flags(if dsync { libc::RWF_DSYNC } else { 0 })
        .build()
}

/// Vectors over parts (offset, length), the first `skip` bytes left out.
fn fill_vectors(
    vectors: &mut Vec<libc::iovec>,
    parts: impl Iterator<Item = (usize, usize)>,
    mut skip: usize,
    address: impl Fn(usize, usize) -> *mut u8,
) {
    vectors.clear();
    for (at, len) in parts {
        let skipped = skip.min(len);
        skip -= skipped;
        if skipped < len {
            vectors.push(libc::iovec {
                iov_base: address(at + skipped, len - skipped).cast(),
                iov_len: len - skipped,
            });
        }
    }
}

/// Vectors over what is left of the pieces, the first `skip` bytes left out.
fn fill_piece_vectors(vectors: &mut Vec<libc::iovec>, mut skip: usize, pieces: &[Piece]) {
    vectors.clear();
    for piece in pieces {
        let bytes: &[u8] = piece;
        let skipped = skip.min(bytes.len());
        skip -= skipped;
        let rest = &bytes[skipped..];
        if !rest.is_empty() {
            vectors.push(libc::iovec {
                iov_base: rest.as_ptr().cast_mut().cast(),
                iov_len: rest.len(),
            });
        }
    }
}

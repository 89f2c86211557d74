//! A group's storage on its thread's io_uring.
#![expect(unsafe_code, reason = "exclusive access to ring memory")]

use super::file::{StorageFile, ZeroMethod};
use super::mapping::RingMapping;
use super::operation::Kind;
use super::uring::Uring;
use super::{Completion, FileId, GATHER_SPANS_MAX, Operation, RingSpan, Source, Storage, Token};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// What a storage is made of: can be built on one thread and used on another.
#[derive(Debug, Default)]
pub struct StorageParts {
    /// The ring's memory; none where only files are handled.
    pub ring: Option<RingMapping>,
    /// Files by their ids.
    pub files: Vec<(FileId, StorageFile)>,
}

/// Ring memory and files of one group, on the io_uring of the thread that made this.
///
/// Dropping it waits for what is in flight, then closes the files and so gives up their locks.
#[derive(Debug)]
pub struct UringStorage {
    uring: Uring,
    client: usize,
    ring: Option<Arc<RingMapping>>,
    files: Vec<Option<Arc<StorageFile>>>,
}

impl UringStorage {
    /// A storage on this thread's ring.
    #[must_use]
    pub fn new(uring: &Uring, parts: StorageParts) -> Self {
        let ring = parts.ring.map(Arc::new);
        let mut storage = Self {
            uring: uring.clone(),
            client: uring.add_client(ring.clone()),
            ring,
            files: Vec::new(),
        };
        for (file, opened) in parts.files {
            storage.set_file(file, opened);
        }
        storage
    }

    /// Adds a file, or puts another in its place. Nothing of the old one may be in flight.
    pub fn set_file(&mut self, file: FileId, opened: StorageFile) {
        let opened = Arc::new(opened);
        self.uring
            .set_file(self.client, file, Some(Arc::clone(&opened)));
        let at = file.0 as usize;
        if self.files.len() <= at {
            self.files.resize_with(at + 1, || None);
        }
        self.files[at] = Some(opened);
    }

    /// Gives an open file another number, in the place of the file that has it. Nothing of either
    /// may be in flight.
    pub fn move_file(&mut self, from: FileId, to: FileId) {
        let Some(moved) = self.files.get_mut(from.0 as usize).and_then(Option::take) else {
            return;
        };
        self.uring.set_file(self.client, from, None);
        self.uring
            .set_file(self.client, to, Some(Arc::clone(&moved)));
        let at = to.0 as usize;
        if self.files.len() <= at {
            self.files.resize_with(at + 1, || None);
        }
        self.files[at] = Some(moved);
    }

    /// An open file.
    #[must_use]
    pub fn file(&self, file: FileId) -> Option<&Arc<StorageFile>> {
        self.files.get(file.0 as usize)?.as_ref()
    }

    /// Its number on the ring, for [`Uring::take_ready`].
    #[must_use]
    pub fn client(&self) -> usize {
        self.client
    }

    /// Operations whose completion was not handed out by the kernel yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.uring.client_in_flight(self.client)
    }

    /// Waits for what is in flight and gives the parts back, for use on another thread. None if
    /// somebody else still has a handle of a part.
    #[must_use]
    pub fn into_parts(mut self) -> Option<StorageParts> {
        self.uring.remove_client(self.client);
        self.client = usize::MAX;
        let ring = match self.ring.take() {
            Some(ring) => Some(Arc::into_inner(ring)?),
            None => None,
        };
        let mut files = Vec::new();
        for (at, file) in std::mem::take(&mut self.files).into_iter().enumerate() {
            if let Some(file) = file {
                files.push((FileId(u32::try_from(at).ok()?), Arc::into_inner(file)?));
            }
        }
        Some(StorageParts { ring, files })
    }

    fn ring_mapping(&self) -> &RingMapping {
        self.ring
            .as_deref()
            .expect("the group's storage has a ring")
    }

    fn kind(&self, operation: Operation) -> Result<Kind, Operation> {
        let file = match &operation {
            Operation::Read { file, .. }
            | Operation::Write { file, .. }
            | Operation::Sync { file }
            | Operation::PunchHole { file, .. }
            | Operation::WriteZeroes { file, .. } => *file,
        };
        let Some(opened) = self.file(file) else {
            return Err(operation);
        };
        Ok(match operation {
            Operation::Read {
                file,
                offset,
                buffer,
            } => Kind::Read {
                file,
                offset,
                buffer,
            },
            Operation::Write {
                file,
                offset,
                source,
                dsync,
            } => match source {
                Source::Owned(buffer) => Kind::WriteOwned {
                    file,
                    offset,
                    buffer,
                    dsync,
                },
                Source::Ring(span) => {
                    self.check_span(span);
                    Kind::WriteRing {
                        file,
                        offset,
                        span,
                        dsync,
                    }
                }
                Source::Gather(spans) => {
                    assert!(
                        spans.len() <= GATHER_SPANS_MAX,
                        "{} runs in one write",
                        spans.len()
                    );
                    spans.iter().for_each(|span| self.check_span(*span));
                    Kind::WriteGather {
                        file,
                        offset,
                        total: spans.iter().map(|span| span.len as usize).sum(),
                        vectors: self.uring.take_vectors(),
                        spans,
                        dsync,
                    }
                }
            },
            Operation::Sync { file } => Kind::Sync { file },
            Operation::PunchHole { file, offset, len } => Kind::Zero {
                file,
                offset,
                len,
                method: opened.zero_method(false),
            },
            Operation::WriteZeroes { file, offset, len } => Kind::Zero {
                file,
                offset,
                len,
                method: opened.zero_method(true).max(ZeroMethod::ZeroRange),
            },
        })
    }

    fn check_span(&self, span: RingSpan) {
        let end = span.offset.checked_add(u64::from(span.len));
        assert!(
            end.is_some_and(|end| end <= self.ring_len() as u64),
            "{span:?} is outside the ring"
        );
    }
}

impl Storage for UringStorage {
    fn submit(&mut self, token: Token, operation: Operation) {
        match self.kind(operation) {
            Ok(kind) => self.uring.submit(self.client, token, kind),
            Err(operation) => {
                let buffer = match operation {
                    Operation::Read { buffer, .. }
                    | Operation::Write {
                        source: Source::Owned(buffer),
                        ..
                    } => Some(buffer),
                    _ => None,
                };
                let completion = Completion {
                    token,
                    result: Err(io::Error::from_raw_os_error(libc::EBADF)),
                    buffer,
                };
                self.uring.fail(self.client, completion);
            }
        }
    }

    fn take_spans(&mut self) -> Vec<RingSpan> {
        self.uring.take_spans()
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) {
        self.uring.poll_client(self.client, completions);
    }

    fn wait(&mut self, completions: &mut Vec<Completion>) -> io::Result<()> {
        self.uring.wait_client(self.client, completions)
    }

    fn file_len(&mut self, file: FileId) -> io::Result<u64> {
        match self.file(file) {
            Some(file) => file.len(),
            None => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    fn allocated(
        &mut self,
        file: FileId,
        offset: u64,
        len: u64,
        runs_max: usize,
    ) -> io::Result<Vec<Range<u64>>> {
        match self.file(file) {
            Some(file) => file.allocated(offset, len, runs_max),
            None => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    fn ring_len(&self) -> usize {
        self.ring.as_deref().map_or(0, RingMapping::len)
    }

    fn ring(&self, offset: usize, len: usize) -> &[u8] {
        self.ring_mapping().bytes(offset, len)
    }

    fn ring_write(&mut self, offset: usize, bytes: &[u8]) {
        self.ring_mut(offset, bytes.len()).copy_from_slice(bytes);
    }

    fn ring_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        // SAFETY: this storage is the ring's one user, and `&mut self` excludes its other views.
        // The kernel only reads, and what it reads is not written until its completion.
        unsafe { self.ring_mapping().bytes_mut(offset, len) }
    }

    fn ring_store(&mut self, offset: usize, value: u64) {
        self.ring_mapping().store(offset, value);
    }

    fn ring_load(&self, offset: usize) -> u64 {
        self.ring_mapping().load(offset)
    }
}

impl Drop for UringStorage {
    fn drop(&mut self) {
        if self.client != usize::MAX {
            self.uring.remove_client(self.client);
        }
    }
}

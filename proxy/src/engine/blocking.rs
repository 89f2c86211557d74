//! A [`Storage`] used step by step: submit, wait, go on. For recovery and other work done while no
//! client is served.
//!
//! Owns nothing but the numbers of its operations. Always holds: between two calls nothing of it is
//! in flight, except what [`Blocking::start`] put there and [`Blocking::finish_all`] waits for.
//! Every error names the file.

use crate::io::buffer::AlignedBuffer;
use crate::io::{Completion, FileId, Operation, Source, Storage, Token};
use afterimage_format::ids::{DISKS_MAX, DiskIndex};
use std::io;
use std::path::PathBuf;

/// What people call the files of a group. Used in errors only.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileNames {
    /// The log.
    pub log: PathBuf,
    /// The log that is to take its place; empty when there is none.
    pub next_log: PathBuf,
    /// The ring.
    pub ring: PathBuf,
    /// The backings, by disk index.
    pub backings: Vec<PathBuf>,
    /// Their claims, by disk index; beside the backings where there is no name.
    pub claims: Vec<PathBuf>,
}

impl FileNames {
    /// The name of an open file.
    #[must_use]
    pub fn of(&self, file: FileId) -> PathBuf {
        let disk_of = |base: FileId| {
            let index = file.0.checked_sub(base.0)? as usize;
            (index < DISKS_MAX).then_some(index)
        };
        let backing = |index: usize| {
            let unnamed = || PathBuf::from(format!("disk {index}"));
            self.backings.get(index).cloned().unwrap_or_else(unnamed)
        };
        if file == FileId::LOG {
            return self.log.clone();
        }
        if file == FileId::NEXT_LOG {
            return self.next_log.clone();
        }
        if let Some(index) = disk_of(FileId::backing(DiskIndex(0))) {
            return backing(index);
        }
        let index = disk_of(FileId::claim(DiskIndex(0))).unwrap_or_default();
        if let Some(name) = self
            .claims
            .get(index)
            .filter(|name| !name.as_os_str().is_empty())
        {
            return name.clone();
        }
        let mut name = backing(index);
        name.as_mut_os_string()
            .push(afterimage_format::claim::CLAIM_SUFFIX);
        name
    }
}

/// An operation on a file failed, or can never complete.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot {action} at byte {offset}: {source}", path.display())]
pub struct StorageError {
    /// The file.
    pub path: PathBuf,
    /// What was tried.
    pub action: &'static str,
    /// Where.
    pub offset: u64,
    /// What the system said.
    pub source: io::Error,
}

/// What is in flight.
struct Started {
    token: Token,
    file: FileId,
    action: &'static str,
    offset: u64,
    len: u64,
}

/// Step by step use of a storage.
pub struct Blocking<'a, S: Storage> {
    storage: &'a mut S,
    names: &'a FileNames,
    next_token: u64,
    started: Vec<Started>,
    completions: Vec<Completion>,
}

/// Tokens of this module begin here, far from those of an engine that used the storage before.
const TOKENS_BEGIN: u64 = 1 << 62;

impl<'a, S: Storage> Blocking<'a, S> {
    /// Uses a storage that has nothing in flight.
    #[must_use]
    pub fn new(storage: &'a mut S, names: &'a FileNames) -> Self {
        Self {
            storage,
            names,
            next_token: TOKENS_BEGIN,
            started: Vec::new(),
            completions: Vec::new(),
        }
    }

    /// The storage itself, for ring memory and lengths.
    #[must_use]
    pub fn storage(&mut self) -> &mut S {
        self.storage
    }

    /// A view of ring memory.
    #[must_use]
    pub fn ring(&self, offset: usize, len: usize) -> &[u8] {
        self.storage.ring(offset, len)
    }

    /// The names of the files.
    #[must_use]
    pub fn names(&self) -> &'a FileNames {
        self.names
    }

    /// Length of a file.
    ///
    /// # Errors
    /// The error of the operating system.
    pub fn file_len(&mut self, file: FileId) -> Result<u64, StorageError> {
        let len = self.storage.file_len(file);
        len.map_err(|source| self.error(file, "find out its length", 0, source))
    }

    /// Fills the buffer from a file; the number of bytes is short at the end of the file only.
    ///
    /// # Errors
    /// The error of the operating system.
    pub fn read(
        &mut self,
        file: FileId,
        offset: u64,
        buffer: AlignedBuffer,
    ) -> Result<(AlignedBuffer, usize), StorageError> {
        debug_assert!(self.started.is_empty());
        let len = buffer.len() as u64;
        let read = Operation::Read {
            file,
            offset,
            buffer,
        };
        self.start_as(read, file, "read", offset, len);
        let (completion, _) = self.take()?;
        match (completion.result, completion.buffer) {
            (Ok(len), Some(buffer)) => Ok((buffer, len)),
            (Ok(_), None) => unreachable!("a read brings its buffer back"),
            (Err(source), _) => Err(self.error(file, "read", offset, source)),
        }
    }

    /// Writes all of the source.
    ///
    /// # Errors
    /// The error of the operating system.
    pub fn write(&mut self, file: FileId, offset: u64, source: Source) -> Result<(), StorageError> {
        self.start(Operation::Write {
            file,
            offset,
            source,
            dsync: false,
        })?;
        self.finish_all()
    }

    /// Writes some bytes, whole blocks.
    ///
    /// # Errors
    /// The error of the operating system.
    pub fn write_bytes(
        &mut self,
        file: FileId,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), StorageError> {
        let mut buffer = AlignedBuffer::new(bytes.len());
        buffer.copy_from_slice(bytes);
        self.write(file, offset, Source::Owned(buffer))
    }

    /// Makes every finished write of the file durable.
    ///
    /// # Errors
    /// The error of the operating system. What was written since the last good sync may be lost,
    /// whatever a later sync says.
    pub fn sync(&mut self, file: FileId) -> Result<(), StorageError> {
        self.finish_all()?;
        self.start(Operation::Sync { file })?;
        self.finish_all()
    }

    /// Starts an operation that is no read; waits first when [`DEPTH_MAX`] are in flight.
    ///
    /// # Errors
    /// Of an operation started earlier.
    pub fn start(&mut self, operation: Operation) -> Result<(), StorageError> {
        while self.started.len() >= DEPTH_MAX {
            self.finish_one()?;
        }
        let (file, action, offset, len) = match &operation {
            Operation::Read { .. } => unreachable!("reads have their own call"),
            Operation::Write {
                file,
                offset,
                source,
                ..
            } => (*file, "write", *offset, source_len(source)),
            Operation::Sync { file } => (*file, "make durable what was written", 0, 0),
            Operation::PunchHole { file, offset, .. } => (*file, "free a range", *offset, 0),
            Operation::WriteZeroes { file, offset, .. } => (*file, "write zeroes", *offset, 0),
        };
        self.start_as(operation, file, action, offset, len);
        Ok(())
    }

    /// Waits for everything in flight.
    ///
    /// # Errors
    /// The first that failed.
    pub fn finish_all(&mut self) -> Result<(), StorageError> {
        while !self.started.is_empty() {
            self.finish_one()?;
        }
        Ok(())
    }

    fn start_as(
        &mut self,
        operation: Operation,
        file: FileId,
        action: &'static str,
        offset: u64,
        len: u64,
    ) {
        let token = Token(self.next_token);
        self.next_token += 1;
        self.started.push(Started {
            token,
            file,
            action,
            offset,
            len,
        });
        self.storage.submit(token, operation);
    }

    /// The next completion of ours and what it was of. Its error is still in it.
    fn take(&mut self) -> Result<(Completion, Started), StorageError> {
        loop {
            while let Some(completion) = self.completions.pop() {
                let ours = |started: &Started| started.token == completion.token;
                // A completion of an earlier user of the storage is not ours to judge.
                if let Some(at) = self.started.iter().position(ours) {
                    return Ok((completion, self.started.swap_remove(at)));
                }
            }
            if let Err(source) = self.storage.wait(&mut self.completions) {
                let (file, action, offset) = match self.started.first() {
                    Some(first) => (first.file, first.action, first.offset),
                    None => (FileId::LOG, "wait", 0),
                };
                self.started.clear();
                return Err(self.error(file, action, offset, source));
            }
        }
    }

    fn finish_one(&mut self) -> Result<(), StorageError> {
        let (completion, started) = self.take()?;
        match completion.result {
            Ok(done) if started.len == 0 || done as u64 == started.len => Ok(()),
            Ok(done) => {
                let short = io::ErrorKind::WriteZero.into();
                let offset = started.offset + done as u64;
                Err(self.error(started.file, started.action, offset, short))
            }
            Err(source) => Err(self.error(started.file, started.action, started.offset, source)),
        }
    }

    fn error(
        &self,
        file: FileId,
        action: &'static str,
        offset: u64,
        source: io::Error,
    ) -> StorageError {
        StorageError {
            path: self.names.of(file),
            action,
            offset,
            source,
        }
    }
}

/// Most operations in flight.
pub const DEPTH_MAX: usize = 32;

fn source_len(source: &Source) -> u64 {
    match source {
        Source::Owned(buffer) => buffer.len() as u64,
        Source::Ring(span) => u64::from(span.len),
        Source::Gather(spans) => spans.iter().map(|span| u64::from(span.len)).sum(),
    }
}

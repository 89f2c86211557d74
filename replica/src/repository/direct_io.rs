//! Large objects of a folder, written past the page cache.
//!
//! A segment is written once and seldom read soon: to copy it into the page cache was the largest single
//! cost of shipping (decision 0018), and drove out what others had cached. So it is written with
//! O_DIRECT, under a staging name as `object_store`'s local file system has them, made durable, and linked to
//! its key, which must not exist. Always holds: a key exists only with its whole content durable; when
//! a create has succeeded the key is durable, too.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use afterimage_proxy::io::buffer::{AlignedBuffer, BUFFER_ALIGN};
use bytes::Bytes;
use object_store::Error;
use rustix::fs::OFlags;

use super::directories::SyncFolder;
use crate::aside;

/// Objects from this size on are written directly.
const DIRECT_BYTES_MIN: usize = 128 << 10;
/// Bytes of one write.
const STEP_BYTES: usize = 2 << 20;
/// Names tried for staging: more than one are taken only if as many processes died at the same key.
const STAGING_NAMES: u32 = 1000;

/// Makes a file's content durable.
type SyncFile = dyn Fn(&File) -> io::Result<()> + Send + Sync;

/// Creates large files.
pub(super) struct DirectWriter {
    /// The file system takes O_DIRECT, as far as is known.
    direct: AtomicBool,
    /// Memory of the last write, for the next.
    buffer: Mutex<Option<AlignedBuffer>>,
    sync_file: Box<SyncFile>,
    sync_folder: Arc<SyncFolder>,
}

/// Why a file was not created. Nothing of it was left behind.
enum Failure {
    /// There is no folder for it yet, or no name to write it under.
    NoPlace,
    /// The file system or its device does not take it so.
    NotDirect,
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl DirectWriter {
    pub(super) fn new(sync_folder: Arc<SyncFolder>) -> Self {
        Self::syncing(Box::new(File::sync_all), sync_folder)
    }

    fn syncing(sync_file: Box<SyncFile>, sync_folder: Arc<SyncFolder>) -> Self {
        Self {
            direct: AtomicBool::new(true),
            buffer: Mutex::default(),
            sync_file,
            sync_folder,
        }
    }

    /// Creates the file with this content, durably. `None`: it has to be created in another way, since it
    /// is small, its folder does not exist or the file system does not take it so; nothing was done.
    pub(super) async fn create(
        self: &Arc<Self>,
        file: PathBuf,
        content: Bytes,
    ) -> Option<object_store::Result<()>> {
        if content.len() < DIRECT_BYTES_MIN || !self.direct.load(Ordering::Relaxed) {
            return None;
        }
        let path = file.display().to_string();
        let own = Arc::clone(self);
        let created = aside::wait(move || own.create_here(&file, &content)).await;
        match created.unwrap_or_else(|error| Err(error.into())) {
            Ok(()) => Some(Ok(())),
            Err(Failure::NoPlace) => None,
            Err(Failure::NotDirect) => {
                self.direct.store(false, Ordering::Relaxed);
                None
            }
            Err(Failure::Io(error)) => Some(Err(match error.kind() {
                io::ErrorKind::AlreadyExists => Error::AlreadyExists {
                    path,
                    source: error.into(),
                },
                _ => Error::Generic {
                    store: "folder",
                    source: error.into(),
                },
            })),
        }
    }

    fn create_here(&self, file: &Path, content: &[u8]) -> Result<(), Failure> {
        let folder = file.parent().ok_or(Failure::NoPlace)?;
        let (staged, staging) = open_staging(file)?;
        let written = self
            .fill(&staged, content)
            .and_then(|()| Ok((self.sync_file)(&staged)?));
        // Network file systems may want a file to be closed before others see it.
        drop(staged);
        let linked = written.and_then(|()| Ok(fs::hard_link(&staging, file)?));
        // What stays behind here harms nobody: no key has such a name.
        let _ = fs::remove_file(&staging);
        linked?;
        Ok((self.sync_folder)(folder)?)
    }

    /// Writes the content in steps. The last is rounded up to whole blocks and cut off again.
    fn fill(&self, file: &File, content: &[u8]) -> Result<(), Failure> {
        let kept = self.kept().take();
        let mut buffer = kept.unwrap_or_else(|| AlignedBuffer::new(STEP_BYTES));
        let mut at = 0;
        for step in content.chunks(STEP_BYTES) {
            let padded = step.len().next_multiple_of(BUFFER_ALIGN);
            buffer[..step.len()].copy_from_slice(step);
            buffer[step.len()..padded].fill(0);
            file.write_all_at(&buffer[..padded], at)
                .map_err(not_direct)?;
            at += step.len() as u64;
        }
        *self.kept() = Some(buffer);
        Ok(file.set_len(content.len() as u64)?)
    }

    fn kept(&self) -> MutexGuard<'_, Option<AlignedBuffer>> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What it means that something is no valid argument: no O_DIRECT here, or larger sectors than ours.
fn not_direct(error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::InvalidInput => Failure::NotDirect,
        _ => Failure::Io(error),
    }
}

/// A new file beside the one that is to be created, and its name.
fn open_staging(file: &Path) -> Result<(File, PathBuf), Failure> {
    for number in 1..STAGING_NAMES {
        let mut staging = file.as_os_str().to_owned();
        staging.push(format!("#{number}"));
        let staging = PathBuf::from(staging);
        let opened = File::options()
            .write(true)
            .create_new(true)
            .custom_flags(OFlags::DIRECT.bits().cast_signed())
            .open(&staging);
        match opened {
            Ok(opened) => return Ok((opened, staging)),
            Err(error) => match error.kind() {
                io::ErrorKind::AlreadyExists => {}
                // The first object of a folder.
                io::ErrorKind::NotFound => return Err(Failure::NoPlace),
                io::ErrorKind::InvalidInput => {
                    // Kernels create the file before they find that it cannot be opened so.
                    let _ = fs::remove_file(&staging);
                    return Err(Failure::NotDirect);
                }
                _ => return Err(error.into()),
            },
        }
    }
    Err(Failure::NoPlace)
}

#[cfg(test)]
#[path = "direct_io_tests.rs"]
mod tests;

//! A folder's store that writes large objects past the page cache.
//!
//! A segment is written once and seldom read soon: copying it into the page cache took a quarter of
//! the processor time of shipping, and drove out what others had cached. So a large object is written
//! with O_DIRECT, under a staging name as [`LocalFileSystem`] has them, made durable, and linked to its
//! key, which must not exist; everything else is left to [`LocalFileSystem`]. Always holds: a key
//! exists only with its whole content durable; when a put has succeeded the key is durable, too.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path as FsPath, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use afterimage_proxy::io::buffer::{AlignedBuffer, BUFFER_ALIGN};
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use rustix::fs::OFlags;

use super::directories::SyncFolder;

/// Objects from this size on are written directly.
const DIRECT_BYTES_MIN: usize = 128 << 10;
/// Bytes of one write.
const STEP_BYTES: usize = 2 << 20;
/// Names tried for staging: more than one are taken only if as many processes died at the same key.
const STAGING_NAMES: u32 = 1000;

/// Makes a file's content durable.
type SyncFile = dyn Fn(&File) -> io::Result<()> + Send + Sync;

/// A folder as an object store.
pub(super) struct DirectFolder {
    inner: LocalFileSystem,
    writer: Arc<Writer>,
}

struct Writer {
    /// The file system takes O_DIRECT, as far as is known.
    direct: AtomicBool,
    /// Memory of the last write, for the next.
    buffer: Mutex<Option<AlignedBuffer>>,
    sync_file: Box<SyncFile>,
    sync_folder: Arc<SyncFolder>,
}

/// Why an object was not written directly. Nothing of it was left behind.
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

impl DirectFolder {
    /// A store of this folder; [`LocalFileSystem::with_fsync`] is to be set.
    pub(super) fn new(inner: LocalFileSystem, sync_folder: Arc<SyncFolder>) -> Self {
        Self::syncing(inner, Box::new(File::sync_all), sync_folder)
    }

    fn syncing(
        inner: LocalFileSystem,
        sync_file: Box<SyncFile>,
        sync_folder: Arc<SyncFolder>,
    ) -> Self {
        Self {
            inner,
            writer: Arc::new(Writer {
                direct: AtomicBool::new(true),
                buffer: Mutex::default(),
                sync_file,
                sync_folder,
            }),
        }
    }
}

impl Writer {
    /// Creates the file with this content, durably.
    fn create(&self, file: &FsPath, payload: &PutPayload) -> Result<(), Failure> {
        let (staged, staging) = open_staging(file)?;
        let written = self
            .fill(&staged, payload)
            .and_then(|()| Ok((self.sync_file)(&staged)?))
            .and_then(|()| Ok(fs::hard_link(&staging, file)?));
        // What stays behind here harms nobody: no key has such a name.
        let _ = fs::remove_file(&staging);
        written?;
        let parent = file
            .parent()
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok((self.sync_folder)(parent)?)
    }

    fn fill(&self, file: &File, payload: &PutPayload) -> Result<(), Failure> {
        let kept = self.kept().take();
        let mut buffer = kept.unwrap_or_else(|| AlignedBuffer::new(STEP_BYTES));
        let result = copy_through(file, payload, &mut buffer);
        *self.kept() = Some(buffer);
        result
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Option<AlignedBuffer>> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A new file beside the one that is to be created, and its name.
fn open_staging(file: &FsPath) -> Result<(File, PathBuf), Failure> {
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

/// Writes the payload in steps of the buffer's size. The last is rounded up to whole sectors and cut
/// off again.
fn copy_through(
    file: &File,
    payload: &PutPayload,
    buffer: &mut AlignedBuffer,
) -> Result<(), Failure> {
    let write = |step: &[u8], at: usize| {
        file.write_all_at(step, at as u64)
            .map_err(|error| match error.kind() {
                // Sectors larger than ours.
                io::ErrorKind::InvalidInput => Failure::NotDirect,
                _ => Failure::Io(error),
            })
    };
    let (mut held, mut at) = (0, 0);
    for mut part in payload.iter().map(Bytes::as_ref) {
        while !part.is_empty() {
            let count = part.len().min(buffer.len() - held);
            let (now, rest) = part.split_at(count);
            buffer[held..held + count].copy_from_slice(now);
            (held, part) = (held + count, rest);
            if held == buffer.len() {
                write(buffer, at)?;
                (held, at) = (0, at + buffer.len());
            }
        }
    }
    if held > 0 {
        let padded = held.next_multiple_of(BUFFER_ALIGN);
        buffer[held..padded].fill(0);
        write(&buffer[..padded], at)?;
        file.set_len((at + held) as u64)?;
    }
    Ok(())
}

impl fmt::Debug for DirectFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DirectFolder").field(&self.inner).finish()
    }
}

impl fmt::Display for DirectFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait::async_trait]
impl ObjectStore for DirectFolder {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        let writer = &self.writer;
        if opts.mode != PutMode::Create
            || payload.content_length() < DIRECT_BYTES_MIN
            || !writer.direct.load(Ordering::Relaxed)
        {
            return self.inner.put_opts(location, payload, opts).await;
        }
        let file = self.inner.path_to_filesystem(location)?;
        let created = {
            let (writer, file, payload) = (Arc::clone(writer), file.clone(), payload.clone());
            aside(move || writer.create(&file, &payload)).await
        };
        match created {
            Ok(()) => Ok(PutResult {
                e_tag: None,
                version: None,
                extensions: Default::default(),
            }),
            Err(Failure::NoPlace) => self.inner.put_opts(location, payload, opts).await,
            Err(Failure::NotDirect) => {
                writer.direct.store(false, Ordering::Relaxed);
                self.inner.put_opts(location, payload, opts).await
            }
            Err(Failure::Io(source)) if source.kind() == io::ErrorKind::AlreadyExists => {
                Err(Error::AlreadyExists {
                    path: file.display().to_string(),
                    source: source.into(),
                })
            }
            Err(Failure::Io(source)) => Err(Error::Generic {
                store: "folder",
                source: source.into(),
            }),
        }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.inner.get_ranges(location, ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// On a thread that may wait, if there are such.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => match runtime.spawn_blocking(work).await {
            Ok(done) => done,
            Err(failed) => Err(io::Error::other(failed).into()),
        },
        Err(_) => work(),
    }
}

#[cfg(test)]
#[path = "direct_io_tests.rs"]
mod tests;

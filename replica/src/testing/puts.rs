//! A store that keeps account of what was put, and can lose an answer.

use std::fmt;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// What a put answered after its effect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum After {
    Succeeds,
    Fails,
}

/// A folder with an account of its puts.
#[derive(Debug)]
pub(crate) struct Puts {
    inner: LocalFileSystem,
    fails: AtomicBool,
    seen: Mutex<Vec<(PutMode, After)>>,
}

impl Puts {
    pub(crate) fn new(inner: LocalFileSystem) -> Self {
        Self {
            inner,
            fails: AtomicBool::new(false),
            seen: Mutex::default(),
        }
    }

    /// The next put has its effect and fails then, as when the sync behind it fails.
    pub(crate) fn fail_after_the_effect(&self) {
        self.fails.store(true, Ordering::Relaxed);
    }

    /// Puts since the last call.
    pub(crate) fn take(&self) -> Vec<(PutMode, After)> {
        std::mem::take(&mut self.seen.lock().expect("not poisoned"))
    }
}

impl fmt::Display for Puts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("puts")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Puts {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        let mode = opts.mode.clone();
        let put = self.inner.put_opts(location, payload, opts).await;
        let fails = self.fails.swap(false, Ordering::Relaxed);
        let after = if fails { After::Fails } else { After::Succeeds };
        self.seen.lock().expect("not poisoned").push((mode, after));
        if fails {
            return Err(Error::Generic {
                store: "puts",
                source: Box::new(std::io::Error::from_raw_os_error(5)),
            });
        }
        put
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

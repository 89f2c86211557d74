//! An object store that fails at chosen calls, before or after the effect.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// What happens at the chosen call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// Nothing is done.
    Before,
    /// It is done, and the answer is lost.
    After,
    /// No room.
    Full,
    /// No room for keys with this in them, from the first call on; all others are served.
    FullFor(&'static str),
}

/// A store in memory that fails at one call, and at every call from then on until it is healed:
/// the process is dead to it.
#[derive(Debug)]
pub(crate) struct FaultyStore {
    pub(crate) inner: Arc<InMemory>,
    calls: AtomicU64,
    /// Calls until the fault; negative: down.
    left: AtomicI64,
    fault: Fault,
}

impl FaultyStore {
    pub(crate) fn new(inner: Arc<InMemory>, after_calls: i64, fault: Fault) -> Self {
        Self {
            inner,
            calls: AtomicU64::new(0),
            left: AtomicI64::new(after_calls),
            fault,
        }
    }

    pub(crate) fn heal(&self) {
        self.left.store(i64::MAX, Ordering::Relaxed);
    }

    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Whether there is never room for this key.
    fn refuses(&self, location: &Path) -> bool {
        let Fault::FullFor(part) = self.fault else {
            return false;
        };
        let refuses = location.as_ref().contains(part) && self.left.load(Ordering::Relaxed) == 0;
        self.calls.fetch_add(refuses.into(), Ordering::Relaxed);
        refuses
    }

    fn step(&self) -> Option<Fault> {
        if matches!(self.fault, Fault::FullFor(_)) {
            return None;
        }
        self.calls.fetch_add(1, Ordering::Relaxed);
        match self.left.fetch_sub(1, Ordering::Relaxed) {
            left if left > 0 => None,
            0 => Some(self.fault),
            _ if self.fault == Fault::Full => Some(Fault::Full),
            _ => Some(Fault::Before),
        }
    }

    fn error(&self) -> Error {
        let source: Box<dyn std::error::Error + Send + Sync> = match self.fault {
            Fault::Full | Fault::FullFor(_) => {
                Box::new(std::io::Error::from(std::io::ErrorKind::StorageFull))
            }
            _ => "the store is gone".into(),
        };
        Error::Generic {
            store: "faulty",
            source,
        }
    }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait::async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        if self.refuses(location) {
            return Err(self.error());
        }
        match self.step() {
            None => self.inner.put_opts(location, payload, opts).await,
            Some(Fault::After) => {
                let _ = self.inner.put_opts(location, payload, opts).await;
                Err(self.error())
            }
            Some(_) => Err(self.error()),
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
        // A full disk can be read.
        if self.fault != Fault::Full && self.step().is_some() {
            return Err(self.error());
        }
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

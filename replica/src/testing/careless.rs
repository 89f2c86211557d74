//! An object store that does not create atomically.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt as _, PutMode, PutMultipartOptions, PutOptions, PutPayload,
    PutResult, Result,
};

/// In which way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Care {
    /// The condition is ignored, as by servers that do not know `If-None-Match`.
    None,
    /// The key is looked for first and created afterwards: two writers at once both win.
    LookThenWrite,
    /// The loser is told so, and what it wrote is kept all the same.
    LoserOverwrites,
    /// The bucket does not exist.
    NoBucket,
}

/// Such a store, in memory.
#[derive(Debug)]
pub(crate) struct CarelessStore {
    inner: InMemory,
    care: Care,
}

impl CarelessStore {
    pub(crate) fn new(care: Care) -> Self {
        Self {
            inner: InMemory::new(),
            care,
        }
    }
}

impl fmt::Display for CarelessStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("careless")
    }
}

fn exists(location: &Path) -> Error {
    Error::AlreadyExists {
        path: location.to_string(),
        source: "it exists".into(),
    }
}

#[async_trait::async_trait]
impl ObjectStore for CarelessStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        let overwrite = PutOptions {
            mode: PutMode::Overwrite,
            ..opts.clone()
        };
        let there = self.inner.head(location).await.is_ok();
        match self.care {
            Care::None => self.inner.put_opts(location, payload, overwrite).await,
            Care::LookThenWrite => {
                tokio::task::yield_now().await;
                if there {
                    return Err(exists(location));
                }
                self.inner.put_opts(location, payload, overwrite).await
            }
            Care::LoserOverwrites => {
                let put = self.inner.put_opts(location, payload, overwrite).await;
                if there {
                    return Err(exists(location));
                }
                put
            }
            Care::NoBucket => Err(Error::NotFound {
                path: location.to_string(),
                source: "NoSuchBucket".into(),
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

//! Opening a repository by its URL.

use std::fs;
use std::io;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use super::directories::{Directories, sync_folder};
use super::{Repository, RepositoryError};

/// Marker of a repository: version of the key scheme, created at the first opening.
const MARKER: &str = "afterimage-repository";
const MARKER_CONTENT: &[u8] = b"afterimage repository 1\n";

impl Repository {
    /// Opens a repository for reading and writing: `file:///folder` (created when absent) or
    /// `s3://bucket/prefix` (credentials, region and endpoint from the usual `AWS_…` variables).
    ///
    /// A bucket is probed: one that lets two writers create the same key is refused.
    ///
    /// # Errors
    /// Says what about the URL, folder or bucket is wrong.
    pub async fn open(url: &str) -> Result<Self, RepositoryError> {
        let repository = if let Some(folder) = folder_of(url) {
            Self::open_folder(&folder, url)?
        } else if url.starts_with("s3://") {
            let repository = open_bucket(url)?;
            repository.probe().await?;
            repository
        } else {
            return Err(RepositoryError::BadUrl {
                url: url.to_owned(),
            });
        };
        repository
            .create(MARKER, Bytes::from_static(MARKER_CONTENT))
            .await?;
        Ok(repository)
    }

    /// Opens a repository that must exist, without creating or probing anything.
    ///
    /// # Errors
    /// Says what about the URL, folder or bucket is wrong.
    pub async fn open_existing(url: &str) -> Result<Self, RepositoryError> {
        let repository = if let Some(folder) = folder_of(url) {
            if let Err(source) = fs::read_dir(&folder) {
                return Err(RepositoryError::Folder { folder, source });
            }
            Self::on_folder(&folder, url)?
        } else if url.starts_with("s3://") {
            open_bucket(url)?
        } else {
            return Err(RepositoryError::BadUrl {
                url: url.to_owned(),
            });
        };
        repository.get(MARKER).await?;
        Ok(repository)
    }

    fn open_folder(folder: &FsPath, url: &str) -> Result<Self, RepositoryError> {
        create_durably(folder).map_err(|source| RepositoryError::Folder {
            folder: folder.to_path_buf(),
            source,
        })?;
        Self::on_folder(folder, url)
    }

    fn on_folder(folder: &FsPath, url: &str) -> Result<Self, RepositoryError> {
        let store = LocalFileSystem::new_with_prefix(folder)
            .map_err(|source| RepositoryError::Store {
                url: url.to_owned(),
                key: String::new(),
                action: "open",
                source,
            })?
            .with_fsync(true);
        let directories = Directories::new(folder.to_path_buf());
        Ok(Self {
            store: Arc::new(store),
            directories: Some(Arc::new(directories)),
            url: url.into(),
        })
    }

    /// Creates one key twice: a store that agrees both times would lose segments.
    async fn probe(&self) -> Result<(), RepositoryError> {
        let key = Path::from(format!("probe-{}", uuid::Uuid::new_v4()));
        let put = |content: &'static [u8]| {
            let options = PutOptions {
                mode: PutMode::Create,
                ..PutOptions::default()
            };
            self.store
                .put_opts(&key, PutPayload::from_static(content), options)
        };
        let wrap =
            |source| RepositoryError::store(self, key.as_ref(), "probe the bucket with", source);
        put(b"first").await.map_err(wrap)?;
        let second = put(b"second").await;
        // A probe that stays behind harms nobody.
        let _ = self.store.delete(&key).await;
        match second {
            Err(object_store::Error::AlreadyExists { .. }) => Ok(()),
            Err(source) => Err(wrap(source)),
            Ok(_) => Err(RepositoryError::NoCreateIfAbsent {
                url: self.url().to_owned(),
            }),
        }
    }
}

/// The folder that a URL of kind `file:` names.
fn folder_of(url: &str) -> Option<PathBuf> {
    let rest = url.strip_prefix("file:")?;
    let path = rest.strip_prefix("//").unwrap_or(rest);
    (path.starts_with('/') && !path.contains('\0')).then(|| PathBuf::from(path))
}

fn open_bucket(url: &str) -> Result<Repository, RepositoryError> {
    // The process may have chosen a provider already; either is fine.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    let rest = url.strip_prefix("s3://").unwrap_or(url);
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err(RepositoryError::BadUrl {
            url: url.to_owned(),
        });
    }
    let plain = std::env::var("AWS_ENDPOINT_URL").is_ok_and(|url| url.starts_with("http://"));
    let store = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_allow_http(plain)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .build()
        .map_err(|source| RepositoryError::Store {
            url: url.to_owned(),
            key: String::new(),
            action: "open",
            source,
        })?;
    let store: Arc<dyn ObjectStore> = match prefix.trim_matches('/') {
        "" => Arc::new(store),
        prefix => Arc::new(PrefixStore::new(store, prefix)),
    };
    Ok(Repository::on(store, url))
}

/// Creates a folder and its parents, each durable before the next.
fn create_durably(folder: &FsPath) -> io::Result<()> {
    if folder.is_dir() {
        return sync_folder(folder);
    }
    if let Some(parent) = folder.parent() {
        create_durably(parent)?;
        match fs::create_dir(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        sync_folder(parent)?;
    }
    if !folder.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    sync_folder(folder)
}

//! Opening a repository by its URL.

use std::fs;
use std::io;
use std::path::{Component, Path as FsPath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{
    ClientConfigKey, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, RetryConfig,
};

use super::directories::{Directories, sync_folder};
use super::{Repository, RepositoryError, keys};

/// Marker of a repository: version of the key scheme, created at the first opening.
const MARKER: &str = "afterimage-repository";
const MARKER_CONTENT: &[u8] = b"afterimage repository 1\n";

/// Writers that a probe lets race for one key.
const PROBE_WRITERS: usize = 8;
/// How often, and for how long, the client of a bucket tries a request again before it fails.
const RETRIES: usize = 3;
const RETRY_FOR: Duration = Duration::from_secs(20);
/// One request, with the upload of a whole segment, may take so long.
const REQUEST_TIMEOUT: &str = "120 seconds";

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
            let repository = Self::open_folder(&folder, url)?;
            // A full disk can be read: nothing is written that is there.
            if repository
                .get(MARKER)
                .await
                .is_ok_and(|held| held == MARKER_CONTENT)
            {
                repository.resync(MARKER).await?;
                return Ok(repository);
            }
            repository
        } else {
            let repository = open_bucket(url)?;
            repository.probe().await?;
            repository
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
        } else {
            open_bucket(url)?
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
        let directories = Directories::new(folder.to_path_buf(), Arc::new(sync_folder));
        Ok(Self {
            store: Arc::new(store),
            directories: Some(Arc::new(directories)),
            url: url.into(),
        })
    }

    /// Lets several writers create one key at once: a store that agrees with two of them, or that
    /// then holds what a loser wrote, would lose segments.
    pub(super) async fn probe(&self) -> Result<(), RepositoryError> {
        let name = format!("probe-{}", uuid::Uuid::new_v4());
        let key = Path::from(name.as_str());
        let put = |content: usize| {
            let options = PutOptions {
                mode: PutMode::Create,
                ..PutOptions::default()
            };
            let content = Bytes::from(content.to_string());
            self.store
                .put_opts(&key, PutPayload::from_bytes(content), options)
        };
        let mut outcomes = join_all((0..PROBE_WRITERS).map(put)).await;
        // At rest, too, a key that exists is taken.
        outcomes.push(put(PROBE_WRITERS).await);
        let held = self.get(&name).await;
        // A probe that stays behind harms nobody.
        let _ = self.store.delete(&key).await;
        let mut winners = Vec::new();
        for (writer, outcome) in outcomes.into_iter().enumerate() {
            match outcome {
                Ok(_) => winners.push(writer),
                Err(object_store::Error::AlreadyExists { .. }) => {}
                Err(object_store::Error::NotFound { .. }) => {
                    return Err(RepositoryError::NoBucket {
                        url: self.url().to_owned(),
                    });
                }
                Err(source) => {
                    return Err(RepositoryError::store(
                        self,
                        &name,
                        "probe the bucket with",
                        source,
                    ));
                }
            }
        }
        let held = held?;
        match winners.as_slice() {
            [winner] if held == winner.to_string() => Ok(()),
            _ => Err(RepositoryError::NoCreateIfAbsent {
                url: self.url().to_owned(),
            }),
        }
    }
}

/// The folder that a URL of kind `file:` names.
fn folder_of(url: &str) -> Option<PathBuf> {
    let rest = url.strip_prefix("file:")?;
    let path = rest.strip_prefix("//").unwrap_or(rest);
    let path = (path.starts_with('/') && !path.contains('\0')).then(|| PathBuf::from(path))?;
    // Two URLs of one folder would be two targets.
    let goes_up = path.components().any(|part| part == Component::ParentDir);
    (!goes_up).then_some(path)
}

/// Bucket and prefix of a URL of kind `s3:`. Both are made of plain parts only.
fn bucket_of(url: &str) -> Option<(&str, &str)> {
    let rest = url.strip_prefix("s3://")?;
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    let plain = keys::check(bucket).is_ok() && (prefix.is_empty() || keys::check(prefix).is_ok());
    plain.then_some((bucket, prefix))
}

fn open_bucket(url: &str) -> Result<Repository, RepositoryError> {
    // The process may have chosen a provider already; either is fine.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    let Some((bucket, prefix)) = bucket_of(url) else {
        return Err(RepositoryError::BadUrl {
            url: url.to_owned(),
        });
    };
    let plain = std::env::var("AWS_ENDPOINT_URL").is_ok_and(|url| url.starts_with("http://"));
    let store = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_allow_http(plain)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        // Shipping tries again by itself, and says so meanwhile.
        .with_retry(RetryConfig {
            max_retries: RETRIES,
            retry_timeout: RETRY_FOR,
            ..RetryConfig::default()
        })
        .with_config(
            AmazonS3ConfigKey::Client(ClientConfigKey::Timeout),
            REQUEST_TIMEOUT,
        )
        .build()
        .map_err(|source| RepositoryError::Store {
            url: url.to_owned(),
            key: String::new(),
            action: "open",
            source,
        })?;
    let store: Arc<dyn ObjectStore> = match prefix {
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

//! Opening a repository by its URL.

use std::fs;
use std::path::{Component, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{
    ClientConfigKey, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, RetryConfig,
};

use super::root::{Root, could_be_made};
use super::{Kept, Repository, RepositoryError, keys};

/// What the marker holds.
pub(super) const MARKER_CONTENT: &str = "afterimage repository 1\n";

/// Writers that a probe lets race for one key.
const PROBE_WRITERS: usize = 8;
/// How often, and for how long, the client of a bucket tries a request again before it fails.
const RETRIES: usize = 3;
const RETRY_FOR: Duration = Duration::from_secs(20);
/// One request, with the upload of a whole segment, may take so long.
const REQUEST_TIMEOUT: &str = "120 seconds";

impl Repository {
    /// Opens a repository for reading and writing: `file:///folder` or `s3://bucket/prefix`
    /// (credentials, region and endpoint from the usual `AWS_…` variables).
    ///
    /// A folder is made when the first object is stored, not before: who knows that there should
    /// be something can still say so. A bucket is probed: one that lets two writers create the
    /// same key is refused.
    ///
    /// # Errors
    /// Says what about the URL, folder or bucket is wrong.
    pub async fn open(url: &str) -> Result<Self, RepositoryError> {
        if let Some(folder) = folder_of(url) {
            return Self::open_folder(folder, url).await;
        }
        let repository = open_bucket(url)?;
        repository.probe().await?;
        repository.establish().await?;
        repository.check_marker().await?;
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
            Self::on_folder(folder, url)
        } else {
            open_bucket(url)?
        };
        repository.check_marker().await?;
        Ok(repository)
    }

    /// Refuses a scheme of keys that is not ours.
    async fn check_marker(&self) -> Result<(), RepositoryError> {
        let held = self.get(keys::MARKER).await?;
        if held == MARKER_CONTENT {
            return Ok(());
        }
        let found = String::from_utf8_lossy(&held);
        Err(RepositoryError::Marker {
            url: self.url().to_owned(),
            found: found.trim_end().chars().take(80).collect(),
            known: MARKER_CONTENT.trim_end(),
        })
    }

    async fn open_folder(folder: PathBuf, url: &str) -> Result<Self, RepositoryError> {
        if let Err(source) = could_be_made(&folder) {
            return Err(RepositoryError::Folder { folder, source });
        }
        let root = Arc::new(Root::new(folder));
        let repository = Self {
            kept: Kept::Folder(Arc::clone(&root)),
            url: url.into(),
        };
        repository.attend().await?;
        let marked = repository.check_marker().await;
        if let Err(other @ RepositoryError::Marker { .. }) = marked {
            return Err(other);
        }
        if marked.is_ok() {
            repository.resync(keys::MARKER).await?;
            if !root.is_known()
                && let Err(error) = repository.establish().await
            {
                // A full disk can be read.
                tracing::warn!(%error, repository = url, "the repository could not be given an identity");
            }
        } else if root.is_known() {
            repository.establish().await?;
        }
        Ok(repository)
    }

    fn on_folder(folder: PathBuf, url: &str) -> Self {
        Self {
            kept: Kept::Folder(Arc::new(Root::new(folder))),
            url: url.into(),
        }
    }

    /// Lets several writers create one key at once: a store that agrees with two of them, or that
    /// then holds what a loser wrote, would lose segments.
    pub(super) async fn probe(&self) -> Result<(), RepositoryError> {
        let name = format!("probe-{}", uuid::Uuid::new_v4());
        let store = self.store(&name)?;
        let key = Path::from(name.as_str());
        let put = |content: usize| {
            let options = PutOptions {
                mode: PutMode::Create,
                ..PutOptions::default()
            };
            let content = Bytes::from(content.to_string());
            store.put_opts(&key, PutPayload::from_bytes(content), options)
        };
        let mut outcomes = join_all((0..PROBE_WRITERS).map(put)).await;
        // At rest, too, a key that exists is taken.
        outcomes.push(put(PROBE_WRITERS).await);
        let held = self.get(&name).await;
        // A probe that stays behind harms nobody.
        let _ = store.delete(&key).await;
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

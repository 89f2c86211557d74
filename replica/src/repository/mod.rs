//! Where a replica keeps its groups: a folder or a bucket behind [`object_store`].
//!
//! Owns the keys ([`keys`]), the opening of a repository by URL ([`open`]), and the one way in which
//! anything is committed: [`Repository::create`], the creation of a key that did not exist.
//!
//! What always holds: an object is never changed after its creation. When `create` answers, object
//! and directory entries are durable, also when the object was found there already: a crash may
//! have come between an earlier process's link and its directory sync, so the directories are
//! synced before an existing object counts. A failure whose outcome is unknown is read back and
//! compared. Errors name the key and what to do.

mod direct_io;
mod directories;
mod error;
pub mod keys;
pub(crate) mod numbered;
mod open;
mod root;

#[cfg(test)]
mod durability_tests;
#[cfg(test)]
mod probe_tests;
#[cfg(test)]
mod root_tests;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
};

use afterimage_format::ids::RepositoryId;
use afterimage_format::manifest::RepositoryIdentity;
pub use error::RepositoryError;
use root::Root;

use crate::aside;

/// What became of a [`Repository::create`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    /// The key is ours and durable: created now, or found with exactly these bytes.
    Ours,
    /// The key holds something else, which is given back.
    Taken(Bytes),
}

/// A folder or bucket of groups. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Repository {
    kept: Kept,
    url: Arc<str>,
}

/// What is behind it.
#[derive(Debug, Clone)]
enum Kept {
    /// A bucket, or a store of the tests.
    Store(Arc<dyn ObjectStore>),
    /// A folder, which may not be there.
    Folder(Arc<Root>),
}

impl Repository {
    /// A repository on any object store that creates atomically when a key is absent. The
    /// simulator and tests bring their own.
    #[must_use]
    pub fn on(store: Arc<dyn ObjectStore>, url: &str) -> Self {
        Self {
            kept: Kept::Store(store),
            url: url.into(),
        }
    }

    /// A repository in memory, for tests and simulation.
    #[must_use]
    pub fn in_memory() -> Self {
        Self::on(Arc::new(object_store::memory::InMemory::new()), "memory:")
    }

    /// The URL it was opened with.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Looks whether it is there before anything is built on it. A folder without an identity
    /// passes: nobody stored anything in it.
    ///
    /// # Errors
    /// [`RepositoryError::Gone`] or [`RepositoryError::Another`].
    pub async fn attend(&self) -> Result<(), RepositoryError> {
        match &self.kept {
            Kept::Store(_) => Ok(()),
            Kept::Folder(root) => look_at(root, Root::attend).await.map(|_| ()),
        }
    }

    /// Changes when a copy of it came in its place: what was read before does not count any longer.
    #[must_use]
    pub fn turn(&self) -> u64 {
        match &self.kept {
            Kept::Store(_) => 0,
            Kept::Folder(root) => root.turn(),
        }
    }

    /// Creates `key` with `bytes`. This is every commit of this crate.
    ///
    /// A store may fail after it has created the object (an answer lost, a directory sync failed),
    /// so every failure is followed by a look at the key. The first object of all is the
    /// repository's identity; from then on it must be there before and after.
    ///
    /// # Errors
    /// The object is not known to be durable; it may exist. The caller must not acknowledge and
    /// must look again before it goes on.
    pub async fn create(&self, key: &str, bytes: Bytes) -> Result<Created, RepositoryError> {
        let Kept::Folder(root) = &self.kept else {
            return self.create_here(key, bytes).await;
        };
        keys::check(key)?;
        if !look_at(root, Root::check).await? {
            self.establish().await?;
        }
        let created = self.create_here(key, bytes).await;
        // It may have gone in between, and the object with it.
        look_at(root, Root::check).await?;
        created
    }

    /// Stores identity and marker: from now on this is a repository.
    async fn establish(&self) -> Result<(), RepositoryError> {
        if let Kept::Folder(root) = &self.kept {
            look_at(root, |root| root.make().map(|_| ())).await?;
        }
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let identity = RepositoryIdentity {
            repository: RepositoryId::from_bytes(uuid::Uuid::new_v4().into_bytes()),
            created_ns: now.map_or(0, |now| now.as_nanos() as u64),
        };
        // Whoever was first: the identity that is there counts.
        self.create_here(keys::IDENTITY, identity.encode().into())
            .await?;
        self.create_here(
            keys::MARKER,
            Bytes::from_static(open::MARKER_CONTENT.as_bytes()),
        )
        .await?;
        self.attend().await
    }

    async fn create_here(&self, key: &str, bytes: Bytes) -> Result<Created, RepositoryError> {
        let path = self.path(key)?;
        let store = self.store(key)?;
        let options = PutOptions {
            mode: PutMode::Create,
            ..PutOptions::default()
        };
        let put = match self.put_directly(key, &bytes).await? {
            Some(put) => put,
            None => store
                .put_opts(&path, PutPayload::from(bytes.clone()), options)
                .await
                .map(|_| ()),
        };
        let failure = match put {
            Ok(()) => return self.settle(key).await.map(|()| Created::Ours),
            Err(failure) => failure,
        };
        let found = match self.get(key).await {
            Ok(found) => found,
            Err(RepositoryError::NotFound { .. }) => {
                return Err(RepositoryError::store(self, key, "create", failure));
            }
            // What is wrong was said by the first failure; the key's state stays unknown.
            Err(_) => return Err(RepositoryError::store(self, key, "create", failure)),
        };
        if found != bytes {
            self.resync(key).await?;
            return Ok(Created::Taken(found));
        }
        if !matches!(failure, object_store::Error::AlreadyExists { .. })
            && matches!(self.kept, Kept::Folder(_))
        {
            // A sync failed on the way. A second sync of the same pages may succeed without having
            // written them, so the same bytes are written anew, under the same name.
            let options = PutOptions {
                mode: PutMode::Overwrite,
                ..PutOptions::default()
            };
            store
                .put_opts(&path, PutPayload::from(bytes), options)
                .await
                .map_err(|source| RepositoryError::store(self, key, "write again", source))?;
        }
        self.resync(key).await?;
        Ok(Created::Ours)
    }

    /// The whole object.
    ///
    /// # Errors
    /// [`RepositoryError::NotFound`] when the key does not exist, else what the store said.
    pub async fn get(&self, key: &str) -> Result<Bytes, RepositoryError> {
        let path = self.path(key)?;
        let store = self.store(key)?;
        let read = async { store.get(&path).await?.bytes().await };
        read.await
            .map_err(|source| RepositoryError::store(self, key, "read", source))
    }

    /// Bytes `range` of the object. May be shorter where the object ends early.
    ///
    /// # Errors
    /// As [`Repository::get`].
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, RepositoryError> {
        let path = self.path(key)?;
        self.store(key)?
            .get_range(&path, range)
            .await
            .map_err(|source| RepositoryError::store(self, key, "read", source))
    }

    /// The last `length` bytes of the object (all of it if it is shorter) and the object's size.
    ///
    /// # Errors
    /// As [`Repository::get`].
    pub async fn get_suffix(
        &self,
        key: &str,
        length: u64,
    ) -> Result<(Bytes, u64), RepositoryError> {
        let path = self.path(key)?;
        let store = self.store(key)?;
        let read = async {
            let options = GetOptions {
                range: Some(GetRange::Suffix(length)),
                ..GetOptions::default()
            };
            let result = store.get_opts(&path, options).await?;
            let size = result.meta.size;
            Ok((result.bytes().await?, size))
        };
        read.await
            .map_err(|source| RepositoryError::store(self, key, "read", source))
    }

    /// Names of everything directly below `prefix`: for display, and for finding what exists by
    /// name. Never used to decide what is committed.
    ///
    /// # Errors
    /// What the store said.
    pub async fn names_below(&self, prefix: &str) -> Result<Vec<String>, RepositoryError> {
        let path = self.path(prefix)?;
        let store = match self.store(prefix) {
            Err(RepositoryError::NotFound { .. }) => return Ok(Vec::new()),
            store => store?,
        };
        let listed = store
            .list_with_delimiter(Some(&path))
            .await
            .map_err(|source| RepositoryError::store(self, prefix, "list", source))?;
        let objects = listed.objects.iter().map(|meta| &meta.location);
        let mut names: Vec<String> = objects
            .chain(listed.common_prefixes.iter())
            .filter_map(|location| location.filename().map(str::to_owned))
            .collect();
        names.sort();
        Ok(names)
    }

    /// Makes directory entries durable that an earlier process may have created and not synced.
    /// To be called before existing objects below `key`'s folder are acknowledged.
    ///
    /// # Errors
    /// A directory could not be synced: nothing in it may be acknowledged.
    pub async fn resync(&self, key: &str) -> Result<(), RepositoryError> {
        match self.folder()? {
            Some(opened) => opened.directories.sync_to(key).await,
            None => Ok(()),
        }
    }

    /// Damages an object.
    #[cfg(test)]
    pub(crate) async fn overwrite_for_tests(
        &self,
        key: &str,
        bytes: Bytes,
    ) -> Result<(), object_store::Error> {
        let store = self.store(key).expect("a folder");
        let payload = PutPayload::from(bytes);
        store.put(&Path::from(key), payload).await.map(|_| ())
    }

    /// Removes an object.
    #[cfg(test)]
    pub(crate) async fn delete_for_tests(&self, key: &str) -> Result<(), object_store::Error> {
        let store = self.store(key).expect("a folder");
        store.delete(&Path::from(key)).await
    }

    /// Past the page cache, where the repository is a folder and the object is worth it.
    async fn put_directly(
        &self,
        key: &str,
        bytes: &Bytes,
    ) -> Result<Option<object_store::Result<()>>, RepositoryError> {
        match self.folder()? {
            Some(opened) => {
                let file = opened.folder.join(key);
                Ok(opened.direct.create(file, bytes.clone()).await)
            }
            None => Ok(None),
        }
    }

    /// After a create that synced its own folder: the folders above it, once per process.
    async fn settle(&self, key: &str) -> Result<(), RepositoryError> {
        match self.folder()? {
            Some(opened) => opened.directories.sync_once(key).await,
            None => Ok(()),
        }
    }

    /// The store; there is nothing in a folder that is not there.
    fn store(&self, key: &str) -> Result<&Arc<dyn ObjectStore>, RepositoryError> {
        match &self.kept {
            Kept::Store(store) => Ok(store),
            Kept::Folder(root) => match root.opened()? {
                Some(opened) => Ok(&opened.store),
                None => Err(RepositoryError::NotFound {
                    url: self.url().to_owned(),
                    key: key.to_owned(),
                }),
            },
        }
    }

    fn folder(&self) -> Result<Option<&root::Opened>, RepositoryError> {
        match &self.kept {
            Kept::Store(_) => Ok(None),
            Kept::Folder(root) => root.opened(),
        }
    }

    fn path(&self, key: &str) -> Result<Path, RepositoryError> {
        keys::check(key)?;
        Path::parse(key).map_err(|_| RepositoryError::BadKey {
            key: key.to_owned(),
        })
    }
}

/// Looks at a folder where waiting for a file system holds up nobody else.
async fn look_at<T: Send + 'static>(
    root: &Arc<Root>,
    look: fn(&Root) -> Result<T, RepositoryError>,
) -> Result<T, RepositoryError> {
    let own = Arc::clone(root);
    aside::wait(move || look(&own))
        .await
        .map_err(|source| RepositoryError::Folder {
            folder: root.folder().to_owned(),
            source,
        })?
}

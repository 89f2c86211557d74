//! The simulated object store of a repository.
//!
//! A create takes effect or not, whatever its answer says; what a killed process had asked for may
//! still take effect later, also when its successor has been at work for a while. What is there
//! stays there, unless somebody flips a bit of it.

use super::faults::Fault;
use super::trace;
use afterimage_proxy::io::sim::SimRng;
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    Result,
};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What happens at a chosen call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// The process dies there.
    Kill,
    /// The call fails.
    Fail,
}

struct State {
    rng: SimRng,
    /// The process that is alive.
    process: u64,
    calls: u64,
    trouble: Option<(u64, Trouble)>,
    /// The process was killed within a call.
    killed: bool,
    full: bool,
    /// Creates of killed processes that have not taken effect.
    late: Vec<(Path, Bytes)>,
    /// Calls take this long at most, in milliseconds.
    delay_ms: u64,
}

/// The objects, and what goes wrong with them. Clones share them.
#[derive(Clone)]
pub struct Shelf {
    objects: Arc<InMemory>,
    state: Arc<Mutex<State>>,
}

impl Shelf {
    /// An empty one.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let state = State {
            rng: SimRng::new(seed),
            process: 0,
            calls: 0,
            trouble: None,
            killed: false,
            full: false,
            late: Vec::new(),
            delay_ms: 0,
        };
        Self {
            objects: Arc::default(),
            state: Arc::new(Mutex::new(state)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store as a new process sees it; the one before is dead.
    #[must_use]
    pub fn open(&self) -> Arc<dyn ObjectStore> {
        let mut state = self.state();
        state.process += 1;
        state.killed = false;
        state.trouble = None;
        Arc::new(Store {
            shelf: self.clone(),
            process: state.process,
        })
    }

    /// The store without any trouble, for the judge.
    #[must_use]
    pub fn plain(&self) -> Arc<dyn ObjectStore> {
        self.objects.clone()
    }

    /// Something goes wrong so many calls from now.
    pub fn trouble_after(&self, calls: u64, trouble: Trouble) {
        let mut state = self.state();
        state.trouble = Some((state.calls + calls, trouble));
    }

    /// No more trouble is due.
    pub fn heal(&self) {
        let mut state = self.state();
        state.trouble = None;
        state.full = false;
    }

    /// The process ends now.
    pub fn kill(&self) {
        self.state().process += 1;
    }

    /// Whether the process was killed within a call.
    #[must_use]
    pub fn was_killed(&self) -> bool {
        self.state().killed
    }

    /// No room, or room again.
    pub fn set_full(&self, full: bool) {
        self.state().full = full;
    }

    /// Longest time that a call takes.
    pub fn set_delay(&self, delay_ms: u64) {
        self.state().delay_ms = delay_ms;
    }

    /// What a killed process had asked for takes effect, or some of it.
    pub async fn land_late(&self) {
        let late = std::mem::take(&mut self.state().late);
        for (path, bytes) in late {
            if self.create(&path, bytes).await.is_ok() {
                trace::count(Fault::ReplicaLatePut);
                trace::note(&[60], || format!("an old process's {path} appears"));
            }
        }
    }

    async fn create(&self, path: &Path, bytes: Bytes) -> Result<PutResult> {
        let options = PutOptions {
            mode: PutMode::Create,
            ..PutOptions::default()
        };
        self.objects
            .put_opts(path, PutPayload::from(bytes), options)
            .await
    }

    /// Flips a bit of some object, and says of which.
    pub async fn flip_bit(&self, rng: &mut SimRng) -> Option<String> {
        let listed: Vec<_> = self.objects.list(None).collect().await;
        let mut objects: Vec<ObjectMeta> = listed.into_iter().filter_map(Result::ok).collect();
        objects.sort_by(|a, b| a.location.cmp(&b.location));
        let at = rng.below(objects.len() as u64) as usize;
        let path = objects.get(at)?.location.clone();
        let mut bytes = self
            .objects
            .get(&path)
            .await
            .ok()?
            .bytes()
            .await
            .ok()?
            .to_vec();
        let place = rng.below(bytes.len() as u64) as usize;
        *bytes.get_mut(place)? ^= 1 << rng.below(8);
        let text = format!("{path} at byte {place}");
        self.objects.put(&path, bytes.into()).await.ok()?;
        trace::count(Fault::FlipRepository);
        Some(text)
    }
}

/// The store of one process.
struct Store {
    shelf: Shelf,
    process: u64,
}

/// How a call goes.
enum Course {
    Well,
    Full,
    /// Fails, without or with effect.
    Fails(bool),
    /// The process dies: before, after, or the effect comes later.
    Dies(Effect),
}

enum Effect {
    None,
    Now,
    Later,
}

impl Store {
    /// Takes its time, then decides. A dead process gets no further.
    async fn step(&self, creates: bool) -> Course {
        let delay = {
            let mut state = self.shelf.state();
            let delay_ms = state.delay_ms;
            state.rng.below(delay_ms + 1)
        };
        if delay > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(delay)).await;
        }
        let course = {
            let mut state = self.shelf.state();
            if state.process != self.process || state.killed {
                None
            } else {
                state.calls += 1;
                let due = state.trouble.filter(|(at, _)| state.calls >= *at);
                Some(match due {
                    Some((_, Trouble::Fail)) => {
                        state.trouble = None;
                        Course::Fails(creates && state.rng.chance(5000))
                    }
                    Some((_, Trouble::Kill)) => {
                        state.trouble = None;
                        state.killed = true;
                        Course::Dies(match state.rng.below(3) {
                            1 if creates => Effect::Now,
                            2 if creates => Effect::Later,
                            _ => Effect::None,
                        })
                    }
                    None if state.full && creates => Course::Full,
                    None => Course::Well,
                })
            }
        };
        match course {
            Some(course) => course,
            None => std::future::pending().await,
        }
    }
}

fn failed(kind: std::io::ErrorKind) -> Error {
    Error::Generic {
        store: "simulated",
        source: Box::new(std::io::Error::from(kind)),
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated store")
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated store")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Store {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let effect = match self.step(true).await {
            Course::Well => {
                return self
                    .shelf
                    .objects
                    .put_opts(location, payload, options)
                    .await;
            }
            Course::Full => {
                trace::count(Fault::RepositoryFull);
                return Err(failed(std::io::ErrorKind::StorageFull));
            }
            Course::Fails(effect) => {
                trace::count(if effect {
                    Fault::StoreFailedAfter
                } else {
                    Fault::StoreFailedBefore
                });
                trace::note(&[61, u64::from(effect)], || {
                    format!("creating {location} fails, effect: {effect}")
                });
                if effect {
                    let _ = self
                        .shelf
                        .objects
                        .put_opts(location, payload, options)
                        .await;
                }
                return Err(failed(std::io::ErrorKind::ConnectionReset));
            }
            Course::Dies(effect) => effect,
        };
        match effect {
            Effect::None => trace::count(Fault::ReplicaKilledBefore),
            Effect::Now => {
                trace::count(Fault::ReplicaKilledAfter);
                let _ = self
                    .shelf
                    .objects
                    .put_opts(location, payload, options)
                    .await;
            }
            Effect::Later => {
                let bytes = Bytes::from(payload);
                self.shelf.state().late.push((location.clone(), bytes));
            }
        }
        trace::note(&[62], || format!("killed while creating {location}"));
        std::future::pending().await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.shelf
            .objects
            .put_multipart_opts(location, options)
            .await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        match self.step(false).await {
            Course::Well | Course::Full => self.shelf.objects.get_opts(location, options).await,
            Course::Fails(_) => {
                trace::count(Fault::StoreFailedBefore);
                trace::note(&[63], || format!("reading {location} fails"));
                Err(failed(std::io::ErrorKind::ConnectionReset))
            }
            Course::Dies(_) => {
                trace::count(Fault::ReplicaKilledBefore);
                trace::note(&[64], || format!("killed while reading {location}"));
                std::future::pending().await
            }
        }
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.shelf.objects.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.shelf.objects.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.shelf.objects.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.shelf.objects.copy_opts(from, to, options).await
    }
}

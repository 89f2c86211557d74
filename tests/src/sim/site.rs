//! The replica: a process that takes segments in, killed and started again, and the judge of what
//! can be restored from its objects.

use super::host::group;
use super::model::LogModel;
use super::net::Net;
use super::store::Shelf;
use super::trace;
use afterimage_format::ids::{DiskIndex, Epoch, Lsn};
use afterimage_proxy::io::sim::SimRng;
use afterimage_proxy::ship::sink::Sink;
use afterimage_replica::group::{Group, GroupError};
use afterimage_replica::history::Position;
use afterimage_replica::image::{ChunkCache, Image};
use afterimage_replica::points::PointList;
use afterimage_replica::receive::{
    Conversation, DirectSink, NowNs, Peer, Place, Receiver, ServerLimits,
};
use afterimage_replica::repository::Repository;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const CACHE_BYTES: usize = 1 << 20;

/// How segments reach the repository.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// The primary's process writes it.
    Direct,
    /// A process of its own, over connections.
    Remote,
}

/// The site.
pub struct Site {
    /// Its objects.
    pub shelf: Shelf,
    /// The way to it.
    pub net: Net,
    way: Way,
    /// Extents after which a layer is stored.
    seal_extents: usize,
    clock_ns: Arc<AtomicU64>,
    process: Option<Process>,
    /// Points seen: by epoch and first record of a range, its last.
    seen: BTreeMap<(u64, u64), u64>,
    /// Images opened and compared.
    pub compared: u64,
}

struct Process {
    conversation: Conversation,
    connections: Vec<JoinHandle<()>>,
}

impl Site {
    /// An empty replica.
    #[must_use]
    pub fn new(way: Way, shelf: Shelf, net: Net, seal_extents: usize) -> Self {
        Self {
            shelf,
            net,
            way,
            seal_extents,
            clock_ns: Arc::new(AtomicU64::new(1_700_000_000_000_000_000)),
            process: None,
            seen: BTreeMap::new(),
            compared: 0,
        }
    }

    /// How segments reach it.
    #[must_use]
    pub const fn way(&self) -> Way {
        self.way
    }

    fn now(&self) -> NowNs {
        let clock = self.clock_ns.clone();
        Arc::new(move || clock.load(Ordering::Relaxed))
    }

    /// Its wall clock jumps.
    pub fn jump_clock(&self, ahead: bool) {
        const TEN_YEARS_NS: u64 = 10 * 365 * 86_400 * 1_000_000_000;
        if ahead {
            self.clock_ns.fetch_add(TEN_YEARS_NS, Ordering::Relaxed);
        } else {
            self.clock_ns.fetch_sub(TEN_YEARS_NS, Ordering::Relaxed);
        }
    }

    /// The sink for a new life of the primary.
    #[must_use]
    pub fn sink(&self, url: &str) -> Arc<dyn Sink> {
        match self.way {
            Way::Remote => Arc::new(self.net.clone()),
            Way::Direct => {
                let repository = Repository::on(self.shelf.open(), url);
                let place = Place::of(Receiver::new(repository).sealing(self.seal_extents));
                Arc::new(DirectSink::new(Arc::new(place), self.now()))
            }
        }
    }

    /// Starts the replica's process.
    pub fn start(&mut self) {
        let limits = ServerLimits {
            connections_max: 16,
            pending_bytes_max: 1 << 20,
            handshake: Duration::from_millis(300),
            silence: Duration::from_millis(300),
            keep_alive: Duration::from_millis(100),
            patience: Duration::from_millis(100),
        };
        let receiver = Receiver::new(Repository::on(self.shelf.open(), "sim:"));
        let receiver = receiver.sealing(self.seal_extents);
        self.process = Some(Process {
            conversation: Conversation::new(receiver, limits, self.now()),
            connections: Vec::new(),
        });
    }

    /// Whether the process runs.
    #[must_use]
    pub const fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// Kills the process; its connections break.
    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            self.shelf.kill();
            process.connections.iter().for_each(JoinHandle::abort);
            self.net.cut_all();
            drop(self.net.arrivals());
        }
    }

    /// Takes the connections that have come.
    pub fn accept(&mut self) {
        self.clock_ns.fetch_add(1_000_000, Ordering::Relaxed);
        let arrivals = self.net.arrivals();
        let Some(process) = &mut self.process else {
            return;
        };
        for stream in arrivals {
            let conversation = process.conversation.clone();
            let task = async move {
                conversation
                    .run(stream, &Peer::Direct, CancellationToken::new())
                    .await;
            };
            process.connections.push(tokio::spawn(task));
        }
    }

    /// Whether `n` objects at least are there.
    async fn load(&self) -> Result<Option<Arc<Group>>, GroupError> {
        let repository = Repository::on(self.shelf.plain(), "sim:");
        match Group::load(&repository, group()).await {
            Ok(group) => Ok(Some(Arc::new(group))),
            Err(GroupError::Unknown { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Checks that what was listed is listed still, and opens some points of what is listed now.
    /// The newest point, if there is one.
    ///
    /// # Errors
    /// In words: a point is gone, or shows something else than the disks held.
    pub async fn check_points(
        &mut self,
        rng: &mut SimRng,
        logs: &[LogModel],
        open: usize,
    ) -> Result<Option<(u64, u64)>, String> {
        let loaded = self.load().await;
        let loaded = loaded.map_err(|error| format!("the history cannot be read: {error}"))?;
        let Some(group) = loaded else {
            if self.seen.is_empty() {
                return Ok(None);
            }
            return Err("the group is gone".to_owned());
        };
        let list = PointList::of(&group.history());
        for ((epoch, first), last) in &self.seen {
            let still = list.ranges.iter().any(|range| {
                range.epoch == *epoch && range.first_lsn <= *first && *last <= range.last_lsn
            });
            if !still {
                return Err(format!(
                    "points lsn:{epoch}/{first} to {last} were listed and are not any more: {:?}",
                    list.ranges
                ));
            }
        }
        for range in &list.ranges {
            self.seen
                .insert((range.epoch, range.first_lsn), range.last_lsn);
            trace::note(&[70, range.epoch, range.first_lsn, range.last_lsn], || {
                format!(
                    "points lsn:{}/{} to {}",
                    range.epoch, range.first_lsn, range.last_lsn
                )
            });
        }
        let Some(newest) = list.ranges.last() else {
            return Ok(None);
        };
        for at in 0..open {
            let range = match at {
                0 => newest,
                _ => &list.ranges[rng.below(list.ranges.len() as u64) as usize],
            };
            let lsn = match at {
                0 => range.last_lsn,
                1 => range.first_lsn,
                _ => range.first_lsn + rng.below(range.last_lsn - range.first_lsn + 1),
            };
            self.compare(&group, (range.epoch, lsn), logs).await?;
        }
        for point in &list.checkpoints {
            let inside = list.ranges.iter().any(|range| {
                range.epoch == point.epoch
                    && (range.first_lsn..=range.last_lsn).contains(&point.lsn)
            });
            if !inside {
                return Err(format!("{point:?} is listed outside of all ranges"));
            }
        }
        for range in &list.ranges {
            let model = model_of(&group, range.epoch, logs)?;
            let taken = model.checkpoints(range.first_lsn..=range.last_lsn);
            let inside = list.checkpoints.iter().filter(|point| {
                point.epoch == range.epoch
                    && (range.first_lsn..=range.last_lsn).contains(&point.lsn)
            });
            let listed: Vec<u64> = inside.map(|point| point.lsn).collect();
            if listed != taken {
                return Err(format!(
                    "checkpoints were taken at {taken:?} and are listed at {listed:?}: {range:?}"
                ));
            }
        }
        Ok(Some((newest.epoch, newest.last_lsn)))
    }

    /// Opens an image and compares all of it.
    async fn compare(
        &mut self,
        group: &Arc<Group>,
        (epoch, lsn): (u64, u64),
        logs: &[LogModel],
    ) -> Result<(), String> {
        let at = Position {
            epoch: Epoch(epoch),
            lsn: Lsn(lsn),
        };
        let model = model_of(group, epoch, logs)?;
        if lsn > model.head {
            return Err(format!(
                "{at} is listed, and the log ends at {}",
                model.head
            ));
        }
        let cache = Arc::new(ChunkCache::new(CACHE_BYTES));
        let image = Image::open(group.clone(), at, cache);
        let image = image.map_err(|error| format!("{at} is listed and does not open: {error}"))?;
        for (disk, size) in model.sizes().iter().enumerate() {
            let mut content = vec![0; *size as usize];
            let read = image.read(DiskIndex(disk as u16), 0, &mut content).await;
            read.map_err(|error| format!("{at}: disk {disk} cannot be read: {error}"))?;
            if let Some(block) = model.point_differs(disk, lsn, &content) {
                let start = block as usize * 4096;
                let bytes = &content[start..content.len().min(start + 4096)];
                let when = model.when(disk, block, bytes);
                return Err(format!(
                    "{at} is wrong: disk {disk} block {block} has {when}"
                ));
            }
        }
        self.compared += 1;
        Ok(())
    }

    /// After bits were flipped: every point is right or cannot be had. How many were right.
    ///
    /// # Errors
    /// In words: wrong content was served.
    pub async fn check_damaged(&mut self, logs: &[LogModel]) -> Result<u64, String> {
        let Ok(Some(group)) = self.load().await else {
            return Ok(0);
        };
        let ranges = PointList::of(&group.history()).ranges;
        let mut right = 0;
        for range in &ranges {
            for lsn in [range.first_lsn, range.last_lsn] {
                match self.compare(&group, (range.epoch, lsn), logs).await {
                    Ok(()) => right += 1,
                    Err(error) if error.contains("cannot be read") => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(right)
    }
}

/// What the log of an epoch held.
fn model_of<'a>(group: &Group, epoch: u64, logs: &'a [LogModel]) -> Result<&'a LogModel, String> {
    let log = group.history().epoch(Epoch(epoch)).map(|epoch| epoch.log);
    let model = logs.iter().find(|model| Some(model.log) == log);
    model.ok_or_else(|| format!("epoch {epoch} is of a log that never was"))
}

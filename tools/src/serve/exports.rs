//! What NBD clients can open: disks of running groups, and images.

use afterimage_format::ids::GroupId;
use afterimage_proxy::nbd::export::{
    BoxFuture, ExportInfo, Exports, ListedExport, OpenError, Peer, Target,
};
use afterimage_proxy::nbd::listener::{Attach, Connection};
use afterimage_proxy::worker::Attachment;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::detach::Detaches;
use super::group::Running;
use super::images::Images;

/// The exports of this daemon.
#[derive(Debug, Default)]
pub(super) struct Served {
    groups: RwLock<BTreeMap<String, Arc<Running>>>,
    /// Images.
    pub(super) images: Images,
    /// Groups that become plain disks.
    pub(super) detaches: Detaches,
    stopping: AtomicBool,
}

impl Served {
    /// Adds a running group.
    pub(super) fn add(&self, group: Arc<Running>) {
        let name = group.config.name.clone();
        self.write().insert(name, group);
    }

    /// Takes a group out; its clients are not served any more.
    pub(super) fn remove(&self, name: &str) -> Option<Arc<Running>> {
        self.write().remove(name)
    }

    /// A running group.
    pub(super) fn group(&self, name: &str) -> Option<Arc<Running>> {
        self.read().get(name).cloned()
    }

    /// All running groups.
    pub(super) fn groups(&self) -> Vec<Arc<Running>> {
        self.read().values().cloned().collect()
    }

    /// No more clients.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    fn by_id(&self, id: GroupId) -> Option<Arc<Running>> {
        let groups = self.read();
        groups
            .values()
            .find(|group| group.handle.identity().group == id)
            .cloned()
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Arc<Running>>> {
        self.groups.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, Arc<Running>>> {
        self.groups.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &str) -> Result<ExportInfo, OpenError> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(OpenError::ShuttingDown);
        }
        if name.contains('@') {
            return self.images.find(name).ok_or(OpenError::Unknown);
        }
        let (group, disk) = name.split_once('/').ok_or(OpenError::Unknown)?;
        if self.detaches.is_running(group) {
            return Err(OpenError::Unavailable);
        }
        let group = self.group(group).ok_or(OpenError::Unknown)?;
        let disk = group.disk(disk).ok_or(OpenError::Unknown)?;
        Ok(ExportInfo {
            name: name.to_owned(),
            description: format!("disk of group {}", group.config.name),
            size: disk.size,
            read_only: false,
            rotational: disk.rotates,
            has_dirty: !group.targets.is_empty(),
            target: Target::Disk {
                group: group.handle.identity().group,
                disk: disk.index,
            },
        })
    }
}

impl Exports for Served {
    fn list<'a>(&'a self, _peer: &'a Peer) -> BoxFuture<'a, Vec<ListedExport>> {
        Box::pin(async {
            let mut all: Vec<ListedExport> = Vec::new();
            for group in self.groups() {
                all.extend(group.disks.iter().map(|disk| ListedExport {
                    name: format!("{}/{}", group.config.name, disk.name),
                    description: format!("disk of group {}", group.config.name),
                }));
            }
            all.extend(self.images.list());
            all
        })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
        _peer: &'a Peer,
    ) -> BoxFuture<'a, Result<ExportInfo, OpenError>> {
        Box::pin(async { self.find(name) })
    }

    fn quiesce<'a>(&'a self, export: &'a ExportInfo) -> BoxFuture<'a, Result<(), OpenError>> {
        Box::pin(async {
            let Target::Disk { group, disk } = &export.target else {
                return Ok(());
            };
            let group = self.by_id(*group).ok_or(OpenError::Unavailable)?;
            let quiet = group.handle.quiesce(*disk).await;
            quiet.map_err(|_| OpenError::Unavailable)
        })
    }
}

impl Attach for Served {
    fn attach(&self, connection: Connection) {
        let Target::Disk { group, disk } = connection.negotiated.export.target else {
            return;
        };
        let Some(group) = self.by_id(group) else {
            tracing::info!("a client's group ended during its handshake");
            return;
        };
        let attachment = Attachment {
            disk,
            socket: connection.socket,
            tls: connection.tls.map(|tls| *tls),
            negotiated: connection.negotiated,
            peer: connection.peer.to_string(),
            slot: connection.slot,
        };
        if group.handle.attach(attachment).is_err() {
            tracing::info!("a client's group ended during its handshake");
        }
    }
}

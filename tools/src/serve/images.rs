//! Images that the daemon exports: opened by a request, served until they are closed.

use afterimage_proxy::nbd::device::Device;
use afterimage_proxy::nbd::export::{ExportInfo as NbdExport, ListedExport, Target};
use afterimage_replica::image::{Image, ImageDevice};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::api::types::{ExportInfo, ExportedDisk};
use crate::commands::attach_help;
use crate::config::units::ListenAddress;

/// All images, by name.
#[derive(Debug, Default)]
pub struct Images {
    open: Mutex<BTreeMap<String, Opened>>,
}

#[derive(Debug)]
struct Opened {
    info: ExportInfo,
    image: Image,
}

impl Images {
    /// Adds an image; one that is there already is shown again.
    pub fn add(
        &self,
        group: &str,
        image: Image,
        (wall_ns, warning): (u64, Option<String>),
        opened_in_us: u64,
        address: &ListenAddress,
    ) -> ExportInfo {
        let at = image.position();
        let name = format!("{group}@{}-{}", at.epoch, at.lsn);
        let disk = |entry: &afterimage_format::manifest::DiskEntry| ExportedDisk {
            name: entry.name.clone(),
            bytes: entry.size_bytes,
            uri: attach_help::uri(address, false, &format!("{name}/{}", entry.name)),
        };
        let info = ExportInfo {
            group: group.to_owned(),
            lsn: at.lsn.0,
            wall_ns,
            warning,
            opened_in_us,
            disks: image.disks().iter().map(disk).collect(),
            name: name.clone(),
        };
        let opened = Opened {
            info: info.clone(),
            image,
        };
        self.lock().insert(name, opened);
        info
    }

    /// Forgets an image; connections to it go on until their clients leave. False if there is none.
    pub fn remove(&self, name: &str) -> bool {
        self.lock().remove(name).is_some()
    }

    /// What is open.
    pub fn infos(&self) -> Vec<ExportInfo> {
        self.lock()
            .values()
            .map(|opened| opened.info.clone())
            .collect()
    }

    /// All disks of all images.
    pub fn list(&self) -> Vec<ListedExport> {
        let images = self.lock();
        let disks = images.values().flat_map(|opened| {
            opened.info.disks.iter().map(|disk| ListedExport {
                name: format!("{}/{}", opened.info.name, disk.name),
                description: format!("{} at lsn:{}", opened.info.group, opened.info.lsn),
            })
        });
        disks.collect()
    }

    /// A disk of an image, by its export name.
    pub fn find(&self, export: &str) -> Option<NbdExport> {
        let (name, disk) = export.rsplit_once('/')?;
        let images = self.lock();
        let opened = images.get(name)?;
        let index = opened.image.disk_by_name(disk)?;
        let device = ImageDevice::new(opened.image.clone(), index).ok()?;
        Some(NbdExport {
            name: export.to_owned(),
            description: format!(
                "{} at lsn:{}, read-only",
                opened.info.group, opened.info.lsn
            ),
            size: device.size(),
            read_only: true,
            rotational: false,
            has_dirty: false,
            target: Target::Device(Arc::new(device)),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Opened>> {
        // Nothing here is half-done when somebody panics.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

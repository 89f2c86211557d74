//! Opens the files of a group: log, backings, claims, ring; all locked on the descriptions that
//! carry their I/O.
//!
//! Blocking. What is read of a file is read when its lock is held. Finds out who the group is: its
//! UUID and those of its disks stand in the log and in the claims beside the backings, so that a log
//! or a backing of another group is refused before anything is written. A claim is created empty,
//! which counts as none.
//!
//! Always holds: a start that is refused leaves the files that were there, and no others. So whatever
//! can be refused is looked at before anything is made: every disk, its claim, the log. A new ring is
//! allocated before the log is written and has no name until then; claims come last, since a log that
//! never ran needs none. What was made is taken back by [`Made::take_back`], the backings being locked
//! still, which keeps any other start of these disks out. A kill in between leaves a log that never
//! ran or empty claims, which the next start takes as they are.

use afterimage_format::claim::{CLAIM_FILE_BYTES, CLAIM_SUFFIX, Claim, ClaimError, ClaimState};
use afterimage_format::ids::{BLOCK_SIZE, BootId, DiskId, DiskIndex, GroupId, LogId};
use afterimage_format::segment::SinkId;
use afterimage_format::superblock::{self, DiskState, Superblock, SuperblockError};
use afterimage_proxy::backing::{Backing, BackingError, BackingOptions};
use afterimage_proxy::engine::blocking::FileNames;
use afterimage_proxy::engine::log::create::{self, CreateError, NewLog};
use afterimage_proxy::engine::recovery::claims::disk_slots;
use afterimage_proxy::engine::recovery::{Accepted, ConfiguredDisk, LastWrite, RecoveryInput};
use afterimage_proxy::io::FileId;
use afterimage_proxy::io::file::{OpenError, OpenOptions, StorageFile, sync_folder_of};
use afterimage_proxy::io::mapping::{MappingError, RingMapping, boot_id};
use afterimage_proxy::io::storage::StorageParts;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

use super::device;
use crate::config::{Config, DiskConfig, GroupConfig};

/// A start retries so long before it says who holds a lock.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why the files of a group could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenGroupError {
    /// A backing.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The log, or a claim.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A new log.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The ring.
    #[error(transparent)]
    Ring(#[from] MappingError),
    /// The log is none, or of a newer version.
    #[error("{}: not a usable log: {source}; it was left as it is: if a newer version of Afterimage wrote it, run that; if it is damaged, keep it and recover the group from its replica; if it is no log, give the group another log path", path.display())]
    Superblock {
        /// The log.
        path: PathBuf,
        /// Why.
        source: SuperblockError,
    },
    /// A claim cannot be understood.
    #[error("{}: not a valid marker: {source}; move it away only if you know that no log holds newer writes of this disk", path.display())]
    Claim {
        /// The claim.
        path: PathBuf,
        /// Why.
        source: ClaimError,
    },
    /// The log's group has none of these disks.
    #[error("{}: this log belongs to group {group}, which has none of the configured disks; give each group a log path of its own", path.display())]
    LogOfAnotherGroup {
        /// The log.
        path: PathBuf,
        /// Its group.
        group: GroupId,
    },
    /// The claim names a log that is not where it should be.
    #[error("{}: the newest writes of this disk are in the log {}, which is not the configured one ({}); set log.path to it, or put it back", backing.display(), claimed.display(), configured.display())]
    LogMissing {
        /// The backing.
        backing: PathBuf,
        /// Where the log was.
        claimed: PathBuf,
        /// Where it should be.
        configured: PathBuf,
    },
    /// There is no log to recover from.
    #[error("{}: there is no log: the disks of group '{group}' are as plain as they get", path.display())]
    NoLog {
        /// Where it should be.
        path: PathBuf,
        /// The group.
        group: String,
    },
    /// Disks of different groups.
    #[error("{}: this disk belongs to group {found}, another disk of '{group}' to {wanted}; detach one of them", backing.display())]
    Mixed {
        /// The backing.
        backing: PathBuf,
        /// The configured group.
        group: String,
        /// Group in its claim.
        found: GroupId,
        /// Group in another claim.
        wanted: GroupId,
    },
    /// A system call.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What an opening is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be served: a missing log is created.
    Serve,
    /// To be left in peace: everything must be there.
    Leave,
}

/// Open files of a group.
#[derive(Debug)]
pub struct OpenGroup {
    /// For a storage.
    pub parts: StorageParts,
    /// For recovery.
    pub input: RecoveryInput,
    /// The superblock as found, or as created.
    pub superblock: Superblock,
    /// Path of the ring; with `true` when it was made just now.
    pub ring: (PathBuf, bool),
    /// Log and claims that were made just now.
    pub made: Made,
    /// Configured disks with their place in the superblock's table.
    pub disks: Vec<OpenDisk>,
}

/// One open disk.
#[derive(Clone, Debug)]
pub struct OpenDisk {
    /// Name.
    pub name: String,
    /// Identity.
    pub id: DiskId,
    /// Place in the superblock's table.
    pub index: DiskIndex,
    /// The backing.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Its medium rotates.
    pub rotates: bool,
}

struct Claimed<'a> {
    config: &'a DiskConfig,
    path: PathBuf,
    /// None where there is none yet.
    file: Option<StorageFile>,
    claim: Option<Claim>,
}

/// What an opening has made, to be taken back when the group is refused after all.
#[derive(Debug, Default)]
pub struct Made {
    /// The log.
    log: Option<(PathBuf, LogId)>,
    /// Claims.
    claims: Vec<PathBuf>,
    /// Claims of all disks of the group.
    of_group: Vec<PathBuf>,
    /// Folders; what lies in another comes behind it.
    folders: Vec<PathBuf>,
}

impl Made {
    /// Removes what was made and is of no use yet: claims that claim nothing, a log that no claim
    /// names. To be called while the backings are locked.
    pub fn take_back(&self) {
        let empty =
            |path: &PathBuf| fs::read(path).is_ok_and(|bytes| bytes.iter().all(|byte| *byte == 0));
        for claim in self.claims.iter().filter(|path| empty(path)) {
            removed(claim, fs::remove_file(claim));
        }
        if let Some((path, log)) = &self.log
            && !self.of_group.iter().any(|claim| may_name(claim, *log))
            && read_superblock(path).is_ok_and(|found| found.log == *log)
        {
            removed(path, remove_log(path));
        }
        for folder in self.folders.iter().rev() {
            // What else has come into it is not ours to remove.
            let _ = fs::remove_dir(folder);
        }
    }

    /// Makes a folder and what it lies in, where they are not there.
    fn folder(&mut self, folder: &Path) -> Result<(), OpenGroupError> {
        let missing = folder.ancestors().take_while(|above| !above.exists());
        let mut missing: Vec<PathBuf> = missing.map(Path::to_owned).collect();
        let mut builder = fs::DirBuilder::new();
        while let Some(next) = missing.pop() {
            match builder.mode(0o700).create(&next) {
                Ok(()) => self.folders.push(next.clone()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(OpenGroupError::Io { path: next, source }),
            }
            sync_folder_of(&next).map_err(at(&next))?;
        }
        Ok(())
    }
}

fn removed(path: &Path, outcome: io::Result<()>) {
    if let Err(error) = outcome {
        tracing::warn!(path = %path.display(), %error, "was made for a start that is refused, and could not be removed");
    }
}

/// Whether a claim names a log, or cannot be understood.
fn may_name(claim: &Path, log: LogId) -> bool {
    match fs::read(claim) {
        Ok(bytes) if bytes.iter().all(|byte| *byte == 0) => false,
        Ok(bytes) => Claim::decode_file(&bytes).map_or(true, |claim| {
            claim.log == log || claim.next_log == Some(log)
        }),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// A device was empty before it became a log, and is so again.
fn remove_log(path: &Path) -> io::Result<()> {
    if !fs::metadata(path)?.file_type().is_block_device() {
        return fs::remove_file(path);
    }
    let device = fs::File::options().write(true).open(path)?;
    device.write_all_at(&[0; 2 * BLOCK_SIZE], 0)?;
    device.sync_all()
}

/// What is open so far, all of it locked.
struct Opening<'a> {
    backings: Vec<Backing>,
    claimed: Vec<Claimed<'a>>,
    log: Option<StorageFile>,
    ring: Option<RingMapping>,
    ring_is_new: bool,
    made: Made,
}

/// Who a group is.
struct Identity {
    superblock: Superblock,
    ids: Vec<DiskId>,
    ring_path: PathBuf,
    boot: BootId,
}

/// Opens everything of a group.
///
/// # Errors
/// Says which file and what to do. Every file is as it was then.
pub fn open(
    config: &Config,
    group: &GroupConfig,
    accepted: Accepted,
    purpose: Purpose,
) -> Result<OpenGroup, OpenGroupError> {
    let mut opening = Opening {
        backings: Vec::new(),
        claimed: Vec::new(),
        log: None,
        ring: None,
        ring_is_new: false,
        made: Made {
            of_group: claim_paths(group),
            ..Made::default()
        },
    };
    match opening.all(config, group, accepted, purpose) {
        Ok(identity) => Ok(opening.into_group(group, accepted, identity)),
        Err(error) => {
            opening.made.take_back();
            if let Some(ring) = opening.ring.filter(|_| opening.ring_is_new) {
                let path = ring.path().to_owned();
                removed(&path, ring.remove());
            }
            Err(error)
        }
    }
}

impl<'a> Opening<'a> {
    fn all(
        &mut self,
        config: &Config,
        group: &'a GroupConfig,
        accepted: Accepted,
        purpose: Purpose,
    ) -> Result<Identity, OpenGroupError> {
        let boot = boot_id().map_err(at(Path::new("/proc/sys/kernel/random/boot_id")))?;
        let boot = BootId::from_bytes(boot);
        // The backings first: whether they exist and are free is the commonest trouble.
        for disk in &group.disks {
            let options = BackingOptions {
                raw: disk.raw,
                patience: PATIENCE,
            };
            self.backings.push(Backing::open(&disk.path, &options)?);
            self.claimed.push(read_claim(group, disk)?);
        }
        let (new, superblock, ids) = match has_log(&group.log_path)? {
            true => {
                let found = existing_log(group, &self.claimed, &self.backings, accepted)?;
                let (log, superblock, ids) = found;
                self.log = Some(log);
                (None, superblock, ids)
            }
            false if purpose == Purpose::Leave => {
                let mut needed = self.claimed.iter().filter_map(|d| log_missing(group, d));
                if let Some(missing) = needed.next() {
                    return Err(missing);
                }
                return Err(OpenGroupError::NoLog {
                    path: group.log_path.clone(),
                    group: group.name.clone(),
                });
            }
            false => {
                let (new, ids) = new_log(group, &self.claimed, &self.backings, boot)?;
                let superblock = create::initial_superblock(&new);
                (Some(new), superblock, ids)
            }
        };
        // What went on without its log may have left something in the ring that its disks lack.
        let abandoned = self.claimed.iter().any(|disk| {
            let claim = disk.claim.as_ref();
            claim.is_some_and(|claim| claim.state == ClaimState::Abandoned)
        });
        let ring_path = ring_path(config, &group.name, superblock.group);
        let ring = find_ring(&ring_path, group, &superblock, abandoned)?;
        let superblock = match new {
            Some(new) => self.create_log(group, &new)?,
            None => superblock,
        };
        for disk in &mut self.claimed {
            if disk.file.is_none() {
                disk.file = Some(make_claim(group, disk, &mut self.made)?);
            }
        }
        self.ring_is_new = matches!(ring, FoundRing::New(_));
        self.ring = Some(match ring {
            FoundRing::Kept(ring) => ring,
            FoundRing::New(ring) => {
                ring.publish()?;
                ring
            }
            FoundRing::OfNoUse(wanted) => RingMapping::create(&ring_path, wanted, PATIENCE)?,
        });
        Ok(Identity {
            superblock,
            ids,
            ring_path,
            boot,
        })
    }

    fn create_log(
        &mut self,
        group: &GroupConfig,
        new: &NewLog,
    ) -> Result<Superblock, OpenGroupError> {
        let path = &group.log_path;
        tracing::info!(group = %group.name, path = %path.display(), bytes = group.log_size, "writing a new log");
        if let Some(folder) = path.parent() {
            self.made.folder(folder)?;
        }
        self.log = Some(create::create(path, new)?);
        self.made.log = Some((path.clone(), new.log));
        read_superblock(path)
    }

    fn into_group(self, group: &GroupConfig, accepted: Accepted, identity: Identity) -> OpenGroup {
        let Identity {
            superblock,
            ids,
            ring_path,
            boot,
        } = identity;
        let slots = disk_slots(&superblock, &ids);
        let mut parts = StorageParts {
            ring: self.ring,
            files: Vec::new(),
        };
        parts.files.extend(self.log.map(|log| (FileId::LOG, log)));
        let mut names = FileNames {
            log: group.log_path.clone(),
            next_log: PathBuf::new(),
            ring: ring_path.clone(),
            backings: vec![PathBuf::new(); superblock.disks.len().max(slots.len())],
            claims: vec![PathBuf::new(); superblock.disks.len().max(slots.len())],
        };
        let mut configured = Vec::new();
        let mut disks = Vec::new();
        let files = self.claimed.into_iter().zip(self.backings);
        for (((disk, backing), id), index) in files.zip(ids).zip(slots) {
            let path = disk.config.path.clone();
            let place = usize::from(index.0);
            if names.backings.len() <= place {
                names.backings.resize(place + 1, PathBuf::new());
                names.claims.resize(place + 1, PathBuf::new());
            }
            names.backings[place].clone_from(&path);
            names.claims[place] = disk.path;
            configured.push(ConfiguredDisk {
                id,
                size: backing.size,
                last_write: last_write(&path),
            });
            disks.push(OpenDisk {
                name: disk.config.name.clone(),
                id,
                index,
                rotates: device::rotates(&path),
                path,
                size: backing.size,
            });
            parts.files.push((FileId::backing(index), backing.file));
            let claim = disk.file.map(|file| (FileId::claim(index), file));
            parts.files.extend(claim);
        }
        OpenGroup {
            parts,
            input: RecoveryInput {
                names,
                group: superblock.group,
                boot,
                disks: configured,
                sinks: sinks(group),
                claims: true,
                accepted,
            },
            superblock,
            ring: (ring_path, self.ring_is_new),
            made: self.made,
            disks,
        }
    }
}

fn sinks(group: &GroupConfig) -> Vec<SinkId> {
    let sinks = group.to.iter();
    sinks
        .map(|sink| SinkId::of_url(&sink.url.to_string()))
        .collect()
}

/// What the system knows of the last write to a backing.
#[must_use]
pub fn last_write(path: &Path) -> LastWrite {
    LastWrite {
        mtime_ns: mtime_ns(path),
        device: device::writes(path),
    }
}

/// Modification time of a backing, nanoseconds since 1970; 0 for a block device.
fn mtime_ns(path: &Path) -> u64 {
    fs::metadata(path)
        .ok()
        .filter(|meta| meta.is_file())
        .and_then(|meta| {
            let seconds = u64::try_from(meta.mtime()).ok()?;
            Some(seconds * 1_000_000_000 + u64::try_from(meta.mtime_nsec()).ok()?)
        })
        .unwrap_or(0)
}

/// Where the claim of a disk lies: beside an image file; a device's in a folder for them, since what
/// lies in `/dev` is gone after a restart of the host.
fn claim_path(group: &GroupConfig, disk: &DiskConfig) -> PathBuf {
    let is_device = fs::metadata(&disk.path).is_ok_and(|m| m.file_type().is_block_device());
    let mut path = if is_device {
        let name = format!("{}.{}", group.name, disk.name);
        group.claims.join(name).into_os_string()
    } else {
        disk.path.as_os_str().to_owned()
    };
    path.push(CLAIM_SUFFIX);
    path.into()
}

/// The claim of a disk if it has one. A process that was killed may have written it until its lock
/// is free.
fn read_claim<'a>(
    group: &GroupConfig,
    disk: &'a DiskConfig,
) -> Result<Claimed<'a>, OpenGroupError> {
    let path = claim_path(group, disk);
    let none = |path| Claimed {
        config: disk,
        path,
        file: None,
        claim: None,
    };
    let file = match StorageFile::open(&path, &OpenOptions::log().patience(PATIENCE)) {
        Ok(file) => file,
        Err(OpenError::Missing(_)) => return Ok(none(path)),
        Err(error) => return Err(error.into()),
    };
    let mut bytes = vec![0; file.len().map_err(at(&path))? as usize];
    file.read_at(0, &mut bytes).map_err(at(&path))?;
    let claim = if bytes.iter().all(|byte| *byte == 0) {
        None
    } else {
        let claim = Claim::decode_file(&bytes);
        Some(claim.map_err(|source| OpenGroupError::Claim {
            path: path.clone(),
            source,
        })?)
    };
    Ok(Claimed {
        file: Some(file),
        claim,
        ..none(path)
    })
}

/// Makes an empty claim, durable with its directory entry, where none is.
fn make_claim(
    group: &GroupConfig,
    disk: &Claimed<'_>,
    made: &mut Made,
) -> Result<StorageFile, OpenGroupError> {
    let path = &disk.path;
    if path.parent() == Some(&group.claims) {
        made.folder(&group.claims)?;
    }
    let created = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let file = created.map_err(at(path))?;
    made.claims.push(path.clone());
    file.set_len(CLAIM_FILE_BYTES as u64).map_err(at(path))?;
    file.sync_all().map_err(at(path))?;
    sync_folder_of(path).map_err(at(path))?;
    let options = OpenOptions::log().patience(PATIENCE);
    Ok(StorageFile::open(path, &options)?)
}

/// Whether a log is there. A block device counts as one once it has a superblock.
fn has_log(path: &Path) -> Result<bool, OpenGroupError> {
    match fs::metadata(path) {
        Ok(meta) if meta.file_type().is_block_device() => {
            let mut head = [0; 2 * BLOCK_SIZE];
            let file = fs::File::open(path).map_err(at(path))?;
            file.read_exact_at(&mut head, 0).map_err(at(path))?;
            Ok(head.iter().any(|byte| *byte != 0))
        }
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(OpenGroupError::Io {
            path: path.to_owned(),
            source,
        }),
    }
}

type OpenedLog = (StorageFile, Superblock, Vec<DiskId>);

fn existing_log(
    group: &GroupConfig,
    claimed: &[Claimed<'_>],
    backings: &[Backing],
    accepted: Accepted,
) -> Result<OpenedLog, OpenGroupError> {
    let path = &group.log_path;
    let file = StorageFile::open(path, &OpenOptions::log().patience(PATIENCE))?;
    let superblock = read_superblock(path)?;
    let ours = |disk: &&Claimed<'_>| {
        disk.claim
            .as_ref()
            .is_some_and(|claim| claim.group == superblock.group)
    };
    // This log has just taken the place of a failed one: its name must be durable before the claims
    // forget that other one.
    let awaited = |disk: &Claimed<'_>| {
        let claim = disk.claim.as_ref();
        claim.is_some_and(|claim| claim.next_log == Some(superblock.log))
    };
    if claimed.iter().any(awaited) {
        sync_folder_of(path).map_err(at(path))?;
    }
    let any_ours = claimed.iter().find(ours).is_some();
    let any_claim = claimed.iter().any(|disk| disk.claim.is_some());
    let never_started = superblock.incarnation == 0;
    // Without any claim, only the operator can know that log and disks belong together.
    let trusted = !any_claim && (accepted.edited_backing || never_started);
    if !any_ours && !trusted {
        return Err(OpenGroupError::LogOfAnotherGroup {
            path: path.clone(),
            group: superblock.group,
        });
    }
    // Disks of the log that no claim names, and backings without one: as many, and of the same sizes in
    // the same order, are the same disks, whose claims are gone. Else the backings are new disks.
    let is_claimed = |id: DiskId| {
        let mut claims = claimed.iter().filter_map(|disk| disk.claim.as_ref());
        claims.any(|claim| claim.disk == id)
    };
    let in_place = superblock.disks.iter().filter(|disk| !disk.removed);
    let missing: Vec<&DiskState> = in_place.filter(|disk| !is_claimed(disk.id)).collect();
    let unclaimed = claimed.iter().zip(backings);
    let unclaimed = unclaimed.filter(|(disk, _)| disk.claim.is_none());
    let sizes: Vec<u64> = unclaimed.map(|(_, backing)| backing.size).collect();
    let same = missing.iter().map(|disk| disk.size).eq(sizes);
    let mut lost = missing.iter().filter(|_| same).map(|disk| disk.id);
    let id = |disk: &Claimed<'_>| match &disk.claim {
        Some(claim) => claim.disk,
        None => lost.next().unwrap_or_else(|| DiskId(Uuid::new_v4())),
    };
    let ids = claimed.iter().map(id).collect();
    Ok((file, superblock, ids))
}

/// Where no log is: what to say of a disk whose newest writes are in one.
fn log_missing(group: &GroupConfig, disk: &Claimed<'_>) -> Option<OpenGroupError> {
    let claim = disk.claim.as_ref()?;
    let needs = matches!(claim.state, ClaimState::Attached | ClaimState::Clean(_));
    needs.then(|| OpenGroupError::LogMissing {
        backing: disk.config.path.clone(),
        claimed: std::ffi::OsStr::from_bytes(&claim.log_path).into(),
        configured: group.log_path.clone(),
    })
}

/// What a new log is to be, if there may be one.
fn new_log(
    group: &GroupConfig,
    claimed: &[Claimed<'_>],
    backings: &[Backing],
    boot: BootId,
) -> Result<(NewLog, Vec<DiskId>), OpenGroupError> {
    let mut known: Option<GroupId> = None;
    let mut ids = Vec::new();
    for disk in claimed {
        let Some(claim) = &disk.claim else {
            ids.push(DiskId(Uuid::new_v4()));
            continue;
        };
        if let Some(missing) = log_missing(group, disk) {
            return Err(missing);
        }
        if let Some(wanted) = known.replace(claim.group).filter(|id| *id != claim.group) {
            return Err(OpenGroupError::Mixed {
                backing: disk.path.clone(),
                group: group.name.clone(),
                found: claim.group,
                wanted,
            });
        }
        ids.push(claim.disk);
    }
    let state = |(id, backing): (&DiskId, &Backing)| DiskState {
        id: *id,
        size: backing.size,
        removed: false,
    };
    let new = NewLog {
        group: known.unwrap_or_else(|| GroupId(Uuid::new_v4())),
        log: LogId(Uuid::new_v4()),
        size: group.log_size,
        disks: ids.iter().zip(backings).map(state).collect(),
        sinks: sinks(group),
        boot,
        now_ns: wall_ns(),
    };
    Ok((new, ids))
}

/// The valid superblock of a log.
///
/// # Errors
/// It cannot be read, or neither copy is valid.
pub fn read_superblock(path: &Path) -> Result<Superblock, OpenGroupError> {
    let mut blocks = vec![0; 2 * BLOCK_SIZE];
    let file = fs::File::open(path).map_err(at(path))?;
    let read = file.read_exact_at(&mut blocks, 0);
    match read {
        // Too short for superblocks: what is there decides what is said.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        other => other.map_err(at(path))?,
    }
    superblock::choose([&blocks[..BLOCK_SIZE], &blocks[BLOCK_SIZE..]]).map_err(|source| {
        OpenGroupError::Superblock {
            path: path.to_owned(),
            source,
        }
    })
}

/// Name of a group's ring: for people its name, against mistakes its UUID.
#[must_use]
pub fn ring_path(config: &Config, name: &str, group: GroupId) -> PathBuf {
    let id = group.to_string();
    config
        .ring_dir
        .join(format!("afterimage-{name}-{}.ring", &id[..8]))
}

/// Where a group's ring comes from.
enum FoundRing {
    /// As a dead process left it.
    Kept(RingMapping),
    /// Where none was; it has no name yet.
    New(RingMapping),
    /// It is not needed, and the configuration wants another size.
    OfNoUse(u64),
}

/// The ring as a dead process left it. A new one only where none is, or where it is not needed and
/// the configuration wants another size.
fn find_ring(
    path: &Path,
    group: &GroupConfig,
    superblock: &Superblock,
    abandoned: bool,
) -> Result<FoundRing, OpenGroupError> {
    let wanted = group.ring_size.next_multiple_of(BLOCK_SIZE as u64);
    let Some(len) = fs::metadata(path).ok().map(|meta| meta.len()) else {
        return Ok(FoundRing::New(RingMapping::prepare(path, wanted)?));
    };
    if len == wanted || (len > 0 && (!superblock.clean || abandoned)) {
        return Ok(FoundRing::Kept(RingMapping::open(path, PATIENCE)?));
    }
    Ok(FoundRing::OfNoUse(wanted))
}

/// Wall clock, nanoseconds since 1970.
#[must_use]
pub fn wall_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> OpenGroupError {
    let path = path.to_owned();
    move |source| OpenGroupError::Io { path, source }
}

/// Where the claims of a group's disks lie.
#[must_use]
pub fn claim_paths(group: &GroupConfig) -> Vec<PathBuf> {
    let path = |disk: &DiskConfig| claim_path(group, disk);
    group.disks.iter().map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_proxy::io::locks::LockError;

    #[test]
    fn a_claim_is_locked_as_long_as_it_may_be_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("vda.raw");
        fs::write(&path, [0; BLOCK_SIZE]).expect("a backing");
        let text = format!(
            "[[group]]\nname = \"vm1\"\nlog = {{ path = \"{0}/vm1.log\", size = \"64MiB\" }}\nto = [\"file://{0}/repo\"]\n[[group.disk]]\nname = \"vda\"\npath = \"{0}/vda.raw\"\n",
            folder.path().display()
        );
        let file = folder.path().join("afterimage.toml");
        fs::write(&file, text).expect("a configuration");
        let config = Config::load(Some(&file)).expect("valid");
        let group = &config.groups[0];
        let none = read_claim(group, &group.disks[0]).expect("looked at");
        assert!(none.file.is_none() && none.claim.is_none());
        let open = make_claim(group, &none, &mut Made::default()).expect("made");
        let again = || {
            let options = OpenOptions::log().patience(Duration::ZERO);
            StorageFile::open(&claim_path(group, &group.disks[0]), &options)
        };
        assert!(matches!(
            again(),
            Err(OpenError::Lock {
                source: LockError::Held(_),
                ..
            })
        ));
        drop(open);
        again().expect("free");
    }

    #[test]
    fn what_a_claim_names_is_not_taken_back() {
        let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
        let (rings, new) = (folder.path().join("rings"), folder.path().join("a/b"));
        fs::create_dir(&rings).expect("a folder");
        let disk = |name: &str| {
            let path = folder.path().join(format!("{name}.raw"));
            fs::write(&path, [0; BLOCK_SIZE]).expect("a backing");
            format!("[[group.disk]]\nname = {name:?}\npath = {path:?}\n")
        };
        let text = format!(
            "ring_dir = {rings:?}\n[[group]]\nname = \"vm1\"\nring = \"8MiB\"\n\
             log = {{ path = {:?}, size = \"32MiB\" }}\n{}{}",
            new.join("vm1.log"),
            disk("vda"),
            disk("vdb")
        );
        let file = folder.path().join("afterimage.toml");
        fs::write(&file, text).expect("a configuration");
        let config = Config::load(Some(&file)).expect("valid");
        let group = &config.groups[0];
        let start = || open(&config, group, Accepted::default(), Purpose::Serve).expect("opens");
        let claims = claim_paths(group);

        let first = start();
        first.made.take_back();
        assert!(claims.iter().all(|claim| !claim.exists()));
        assert!(!new.exists() && !folder.path().join("a").exists());
        drop(first);
        fs::remove_file(ring_path_in(&rings)).expect("the ring is the caller's");

        let second = start();
        let claim = Claim {
            group: second.superblock.group,
            disk: second.disks[0].id,
            disk_index: second.disks[0].index,
            log: second.superblock.log,
            next_log: None,
            generation: 1,
            state: ClaimState::Attached,
            log_path: Vec::new(),
        };
        let mut bytes = vec![0; CLAIM_FILE_BYTES];
        bytes[BLOCK_SIZE..].copy_from_slice(&claim.encode());
        fs::write(&claims[0], bytes).expect("written");
        second.made.take_back();
        assert!(claims[0].exists() && !claims[1].exists());
        assert!(group.log_path.exists(), "it may have what the disk lacks");
    }

    fn ring_path_in(rings: &Path) -> PathBuf {
        let mut found = fs::read_dir(rings).expect("read");
        found.next().expect("a ring").expect("read").path()
    }
}

//! The ring file: memory that outlives the process.
//!
//! Always holds: the file lies on a tmpfs (so its pages are never written back and survive until
//! power is lost), is allocated in full (a store never fails for want of memory), is readable by
//! its owner alone, and is locked through the description that the mapping keeps open.
#![expect(unsafe_code, reason = "access to mapped memory")]

use super::locks::{self, LockError};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{CWD, Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// `f_type` of a tmpfs (`TMPFS_MAGIC` in `linux/magic.h`).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Why a ring file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The folder is not on a tmpfs.
    #[error(
        "{} is not on a tmpfs: answered writes would not survive a kill of the process; \
         set ring_dir to a tmpfs such as /dev/shm", .0.display()
    )]
    NotTmpfs(PathBuf),
    /// The tmpfs has no room.
    #[error(
        "no room for a ring of {len} bytes at {}: enlarge that tmpfs or make `ring` smaller",
        path.display()
    )]
    NoSpace {
        /// The ring file.
        path: PathBuf,
        /// What was asked for.
        len: u64,
    },
    /// The ring file does not exist.
    #[error("there is no ring file {}", .0.display())]
    Missing(PathBuf),
    /// Another process uses it.
    #[error("ring file {}: {source}", path.display())]
    Lock {
        /// The ring file.
        path: PathBuf,
        /// Who has it.
        source: LockError,
    },
    /// Anything else the system said.
    #[error("ring file {}: cannot {action}: {source}", path.display())]
    System {
        /// The ring file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What came of it.
        source: io::Error,
    },
}

/// A mapped ring file, locked while this lives.
#[derive(Debug)]
pub struct RingMapping {
    path: PathBuf,
    memory: MmapRaw,
    file: File,
}

impl RingMapping {
    /// Creates the ring file with `len` zero bytes, maps and locks it. A file that is there
    /// already is opened and, under its lock, emptied first, unless there is no room: then it stays
    /// as it was.
    ///
    /// # Errors
    /// Not on a tmpfs, no room, or held by another process for longer than `patience`.
    pub fn create(path: &Path, len: u64, patience: Duration) -> Result<Self, MappingError> {
        let file = Self::open_locked(path, true, patience)?;
        let system = |action| {
            move |source: io::Error| MappingError::System {
                path: path.to_owned(),
                action,
                source,
            }
        };
        let before = file.metadata().map_err(system("read its length"))?.len();
        if let Err(error) = Self::allocate(&file, path, len) {
            // Not to leave a file of whatever fitted.
            let _ = file.set_len(before);
            return Err(error);
        }
        file.set_len(0).map_err(system("empty it"))?;
        Self::allocate(&file, path, len)?;
        Self::map(file, path)
    }

    /// A ring of `len` zero bytes for `path`, mapped and locked, that has no name before
    /// [`RingMapping::publish`]: whatever ends the process until then, nothing of it stays.
    ///
    /// # Errors
    /// Not on a tmpfs, or no room.
    pub fn prepare(path: &Path, len: u64) -> Result<Self, MappingError> {
        let folder = Self::tmpfs_of(path)?;
        let system = |action| {
            move |errno: rustix::io::Errno| MappingError::System {
                path: path.to_owned(),
                action,
                source: errno.into(),
            }
        };
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::TMPFILE;
        let file = rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(file.map_err(system("make it"))?);
        rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR).map_err(system("set its mode"))?;
        locks::lock_whole(file.as_fd()).map_err(|source| MappingError::Lock {
            path: path.to_owned(),
            source,
        })?;
        Self::allocate(&file, path, len)?;
        Self::map(file, path)
    }

    /// Gives a prepared ring its name, where nothing may be.
    ///
    /// # Errors
    /// The error of the operating system.
    pub fn publish(&self) -> Result<(), MappingError> {
        let same = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let flags = rustix::fs::AtFlags::SYMLINK_FOLLOW;
        let linked = rustix::fs::linkat(CWD, same, CWD, &self.path, flags);
        linked.map_err(|errno| MappingError::System {
            path: self.path.clone(),
            action: "give it its name",
            source: errno.into(),
        })
    }

    /// The folder of a ring, which must be on a tmpfs.
    fn tmpfs_of(path: &Path) -> Result<&Path, MappingError> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let statfs = rustix::fs::statfs(folder).map_err(|errno| MappingError::System {
            path: path.to_owned(),
            action: "look at its folder",
            source: errno.into(),
        })?;
        if statfs.f_type as u64 != TMPFS_MAGIC {
            return Err(MappingError::NotTmpfs(folder.to_owned()));
        }
        Ok(folder)
    }

    /// Maps and locks a ring file that exists, as long as it is.
    ///
    /// # Errors
    /// Missing, not on a tmpfs, or held by another process for longer than `patience`.
    pub fn open(path: &Path, patience: Duration) -> Result<Self, MappingError> {
        let file = Self::open_locked(path, false, patience)?;
        Self::map(file, path)
    }

    fn open_locked(path: &Path, create: bool, patience: Duration) -> Result<File, MappingError> {
        let system = |action| {
            move |errno: rustix::io::Errno| MappingError::System {
                path: path.to_owned(),
                action,
                source: errno.into(),
            }
        };
        Self::tmpfs_of(path)?;
        let mut flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        if create {
            flags |= OFlags::CREATE;
        }
        let file = match rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::NOENT) if !create => {
                return Err(MappingError::Missing(path.to_owned()));
            }
            Err(errno) => return Err(system("open it")(errno)),
        };
        rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR).map_err(system("set its mode"))?;
        locks::with_patience(patience, || locks::lock_whole(file.as_fd())).map_err(|source| {
            MappingError::Lock {
                path: path.to_owned(),
                source,
            }
        })?;
        Ok(file)
    }

    fn allocate(file: &File, path: &Path, len: u64) -> Result<(), MappingError> {
        match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::NOSPC) => Err(MappingError::NoSpace {
                path: path.to_owned(),
                len,
            }),
            Err(errno) => Err(MappingError::System {
                path: path.to_owned(),
                action: "allocate it",
                source: errno.into(),
            }),
        }
    }

    fn map(file: File, path: &Path) -> Result<Self, MappingError> {
        let system = |action, source| MappingError::System {
            path: path.to_owned(),
            action,
            source,
        };
        let len = file
            .metadata()
            .map_err(|source| system("read its length", source))?
            .len();
        if len == 0 {
            let source = io::Error::new(io::ErrorKind::UnexpectedEof, "it is empty");
            return Err(system("map it", source));
        }
        // A hole that a shrunken tmpfs left would be a SIGBUS at a store: fill it now.
        Self::allocate(&file, path, len)?;
        let memory = MmapOptions::new()
            .map_raw(&file)
            .map_err(|source| system("map it", source))?;
        Ok(Self {
            path: path.to_owned(),
            memory,
            file,
        })
    }

    /// Where the ring file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of ring memory.
    #[must_use]
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Never: an empty ring file is not mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.memory.len() == 0
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len()),
            "{len} bytes at {offset} are outside a ring of {} bytes",
            self.len()
        );
    }

    /// Address of a run, for the kernel. Panics if out of range.
    pub(super) fn address(&self, offset: usize, len: usize) -> *mut u8 {
        self.check(offset, len);
        // SAFETY: in range by the check.
        unsafe { self.memory.as_mut_ptr().add(offset) }
    }

    /// A view of a run. Panics if out of range.
    #[must_use]
    pub fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        let start = self.address(offset, len);
        // SAFETY: in range, mapped as long as `self`; writers need `&mut UringStorage`, which the
        // borrow of the view through it excludes, and other processes are kept out by the lock.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// A run to be written. Panics if out of range.
    ///
    /// # Safety
    /// The caller is the ring's one user (its storage, through `&mut`), so that no view of the run
    /// from [`RingMapping::bytes`] lives as long as this one.
    #[expect(
        clippy::mut_from_ref,
        reason = "exclusive through the storage's &mut, see Safety"
    )]
    pub(super) unsafe fn bytes_mut(&self, offset: usize, len: usize) -> &mut [u8] {
        let start = self.address(offset, len);
        // SAFETY: in range; exclusive by the function's contract.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "word at {offset} is not aligned");
        let address = self.address(offset, 8);
        // SAFETY: in range, aligned (the mapping begins at a page), and only ever accessed as an
        // atomic while shared.
        unsafe { AtomicU64::from_ptr(address.cast()) }
    }

    /// Stores one aligned word, little-endian, with release ordering.
    pub fn store(&self, offset: usize, value: u64) {
        self.word(offset).store(value.to_le(), Ordering::Release);
    }

    /// Loads one aligned little-endian word with acquire ordering.
    #[must_use]
    pub fn load(&self, offset: usize) -> u64 {
        u64::from_le(self.word(offset).load(Ordering::Acquire))
    }

    /// Removes the ring file after a clean close, by its name; the mapping itself goes with this.
    ///
    /// # Errors
    /// The error of the operating system.
    pub fn remove(self) -> io::Result<()> {
        std::fs::remove_file(&self.path)
    }
}

/// Identity of the running boot: with another one, ring memory is gone.
///
/// # Errors
/// `/proc` is not mounted, or holds something else.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    uuid::Uuid::try_parse(text.trim())
        .map(uuid::Uuid::into_bytes)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

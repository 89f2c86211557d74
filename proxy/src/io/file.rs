//! Files and block devices opened for O_DIRECT, locked on the descriptions that carry their I/O.
//!
//! Always holds: what is transferred through the direct descriptor is aligned as the device wants
//! it; what cannot be (the tail of an image whose size is no multiple of a 4096-byte sector) goes
//! through a second, buffered description with the same locks. Nothing is durable before a sync.

use super::locks::{self, LockError};
use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It does not exist.
    #[error("{} does not exist", .0.display())]
    Missing(PathBuf),
    /// It is neither a regular file nor a block device.
    #[error("{} is neither a regular file nor a block device", .0.display())]
    WrongKind(PathBuf),
    /// Another process uses it.
    #[error("{} is {source}", path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// Who has it.
        source: LockError,
    },
    /// The file system has no room for it.
    #[error("no room for {len} bytes at {}", path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        len: u64,
    },
    /// Anything else the system said.
    #[error("{}: cannot {action}: {source}", path.display())]
    System {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What came of it.
        source: io::Error,
    },
}

/// Who else may use the file while it is open here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Locking {
    /// Ours alone, the whole file: logs.
    Whole,
    /// A disk image, with QEMU's lock bytes.
    Image,
    /// None: a reader beside the owner.
    None,
}

/// What to open, and how.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// For reading only.
    pub read_only: bool,
    /// Which locks to take.
    pub locking: Locking,
    /// How long to wait for somebody else's lock.
    pub patience: Duration,
}

impl OpenOptions {
    /// A log: read and written, ours alone.
    #[must_use]
    pub fn log() -> Self {
        Self {
            read_only: false,
            locking: Locking::Whole,
            patience: locks::LOCK_PATIENCE,
        }
    }

    /// A disk's backing: read and written, with QEMU's lock bytes.
    #[must_use]
    pub fn image() -> Self {
        Self {
            locking: Locking::Image,
            ..Self::log()
        }
    }

    /// A reader beside the owner: no locks.
    #[must_use]
    pub fn reader() -> Self {
        Self {
            read_only: true,
            locking: Locking::None,
            patience: Duration::ZERO,
        }
    }

    /// The same with another patience.
    #[must_use]
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }
}

/// How a file makes a range read as zero; falls from one to the next where it is not supported.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum ZeroMethod {
    /// FALLOC_FL_PUNCH_HOLE: on a block device only with guaranteed zeroes.
    Punch = 0,
    /// FALLOC_FL_ZERO_RANGE.
    ZeroRange = 1,
    /// Written zeroes.
    Write = 2,
}

impl ZeroMethod {
    pub(super) fn next(self) -> Self {
        match self {
            Self::Punch => Self::ZeroRange,
            Self::ZeroRange | Self::Write => Self::Write,
        }
    }

    fn from_u8(value: u8) -> Self {
        match value {
            0 => Self::Punch,
            1 => Self::ZeroRange,
            _ => Self::Write,
        }
    }
}

/// An open, locked file or block device.
#[derive(Debug)]
pub struct StorageFile {
    path: PathBuf,
    main: OwnedFd,
    /// For transfers that O_DIRECT cannot carry.
    buffered: Option<OwnedFd>,
    block_device: bool,
    direct: bool,
    /// Has locks to give up.
    locked: bool,
    /// Offsets and lengths on `main` are multiples of this.
    align: u32,
    /// Best methods not yet known to be unsupported: for punching, and for zeroing in place.
    punch: AtomicU8,
    zero: AtomicU8,
}

impl StorageFile {
    /// Opens and locks what exists.
    ///
    /// # Errors
    /// Missing, of a wrong kind, or in use for longer than the options' patience.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, OpenError> {
        Self::open_with(path, options, OFlags::empty())
    }

    /// Creates a file of `len` zero bytes that are allocated and written (an unwritten extent would
    /// make a pure overwrite a change of metadata), durable with its directory entry, and locks it.
    /// Refuses a path that exists. On an error nothing stays behind.
    ///
    /// # Errors
    /// Exists, no room, or what the system said.
    pub fn create_zeroed(path: &Path, len: u64, options: &OpenOptions) -> Result<Self, OpenError> {
        let file = Self::open_with(path, options, OFlags::CREATE | OFlags::EXCL)?;
        let filled = file.fill(len).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => OpenError::NoSpace {
                path: path.to_owned(),
                len,
            },
            _ => file.system("allocate it")(error),
        });
        match filled {
            Ok(()) => Ok(file),
            Err(error) => {
                // The file is ours alone and not in use yet.
                let _ = std::fs::remove_file(path);
                Err(error)
            }
        }
    }

    fn open_with(path: &Path, options: &OpenOptions, extra: OFlags) -> Result<Self, OpenError> {
        let mode = if options.read_only {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
        let flags = mode | extra | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let existing_kind = rustix::fs::stat(path).ok().map(|stat| kind(stat.st_mode));
        if let Some(kind) = existing_kind
            && !matches!(kind, FileType::RegularFile | FileType::BlockDevice)
        {
            return Err(OpenError::WrongKind(path.to_owned()));
        }
        let block_device = existing_kind == Some(FileType::BlockDevice);
        // O_EXCL without O_CREAT claims a block device: refused while it is mounted or claimed.
        let claim = if block_device && options.locking != Locking::None {
            OFlags::EXCL
        } else {
            OFlags::empty()
        };
        let (main, direct) = open_descriptor(path, flags | claim, options.patience)?;
        // Only the open was to return at once (a FIFO in the file's place).
        let status = rustix::fs::fcntl_getfl(&main).unwrap_or(flags);
        let _ = rustix::fs::fcntl_setfl(&main, status - OFlags::NONBLOCK);
        let mut file = Self {
            path: path.to_owned(),
            align: 1,
            main,
            buffered: None,
            block_device,
            direct,
            locked: options.locking != Locking::None,
            punch: AtomicU8::new(ZeroMethod::Punch as u8),
            zero: AtomicU8::new(ZeroMethod::ZeroRange as u8),
        };
        file.lock(options)?;
        if direct {
            file.align = file.direct_align();
        }
        if file.align > 512 && !options.read_only && !block_device {
            file.buffered = Some(file.open_buffered(options)?);
        }
        Ok(file)
    }

    fn lock(&self, options: &OpenOptions) -> Result<(), OpenError> {
        locks::with_patience(options.patience, || match options.locking {
            Locking::Whole => locks::lock_whole(self.main.as_fd()),
            Locking::Image => locks::lock_image(self.main.as_fd()),
            Locking::None => Ok(()),
        })
        .map_err(|source| OpenError::Lock {
            path: self.path.clone(),
            source,
        })
    }

    fn open_buffered(&self, options: &OpenOptions) -> Result<OwnedFd, OpenError> {
        let same = format!("/proc/self/fd/{}", self.main.as_raw_fd());
        let buffered = rustix::fs::open(same, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| self.system("open it a second time")(errno.into()))?;
        if options.locking == Locking::Image {
            locks::lock_image_again(buffered.as_fd()).map_err(self.system("lock it again"))?;
        }
        Ok(buffered)
    }

    fn direct_align(&self) -> u32 {
        let statx = rustix::fs::statx(
            &self.main,
            "",
            rustix::fs::AtFlags::EMPTY_PATH,
            rustix::fs::StatxFlags::DIOALIGN,
        );
        match statx {
            Ok(statx) if statx.stx_dio_offset_align > 0 => statx.stx_dio_offset_align.max(512),
            // Not known (a kernel before 6.1, or the file system does not say): a block device
            // has its logical block size; for a file the largest usual one is safe.
            _ if self.block_device => rustix::fs::ioctl_blksszget(&self.main).unwrap_or(4096),
            _ => 4096,
        }
    }

    fn fill(&self, len: u64) -> io::Result<()> {
        rustix::fs::fallocate(&self.main, rustix::fs::FallocateFlags::empty(), 0, len).or_else(
            |errno| match errno {
                rustix::io::Errno::OPNOTSUPP => rustix::fs::ftruncate(&self.main, len),
                other => Err(other),
            },
        )?;
        let zeroes = super::buffer::AlignedBuffer::new(1 << 20);
        let mut at = 0;
        while at < len {
            let step =
                usize::try_from(len - at).map_or(zeroes.len(), |left| left.min(zeroes.len()));
            at += rustix::io::pwrite(&self.main, &zeroes[..step], at)? as u64;
        }
        rustix::fs::fsync(&self.main)?;
        sync_folder_of(&self.path)
    }

    fn system(&self, action: &'static str) -> impl Fn(io::Error) -> OpenError + use<'_> {
        move |source| OpenError::System {
            path: self.path.clone(),
            action,
            source,
        }
    }

    /// As opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A block device rather than a regular file.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Transfers bypass the page cache. False on file systems that cannot.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Length in bytes, as of now.
    ///
    /// # Errors
    /// The error of the operating system.
    pub fn len(&self) -> io::Result<u64> {
        if self.block_device {
            // The end of a block device is its size; all I/O here is positional.
            return Ok(rustix::fs::seek(&self.main, SeekFrom::End(0))?);
        }
        let stat = rustix::fs::fstat(&self.main)?;
        Ok(u64::try_from(stat.st_size).unwrap_or_default())
    }

    /// Whether it has no bytes at all.
    ///
    /// # Errors
    /// The error of the operating system.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Reads at an offset, blocking, whatever its alignment; for checks at opening. Short at the
    /// end of the file.
    ///
    /// # Errors
    /// The error of the operating system.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let align = u64::from(self.align.max(1));
        let start = offset / align * align;
        let skip = usize::try_from(offset - start).unwrap_or_default();
        let mut bounce = super::buffer::AlignedBuffer::new(
            (skip + into.len()).next_multiple_of(self.align.max(1) as usize),
        );
        let mut done = 0;
        while done < bounce.len() {
            let got = rustix::io::pread(&self.main, &mut bounce[done..], start + done as u64)?;
            done += got;
            if got == 0 || !got.is_multiple_of(512) {
                break;
            }
        }
        let have = done.saturating_sub(skip).min(into.len());
        into[..have].copy_from_slice(&bounce[skip..skip + have]);
        Ok(have)
    }

    /// The runs within `offset..offset + len` that are allocated (SEEK_DATA), clipped to it, in
    /// order, at most `runs_max`. All of it where the file cannot say.
    ///
    /// # Errors
    /// The error of the operating system.
    pub fn allocated(&self, offset: u64, len: u64, runs_max: usize) -> io::Result<Vec<Range<u64>>> {
        let end = offset.saturating_add(len);
        let whole = || std::iter::once(offset..end).collect();
        if self.block_device {
            return Ok(whole());
        }
        let mut runs = Vec::new();
        let mut at = offset;
        while at < end && runs.len() < runs_max {
            let start = match rustix::fs::seek(&self.main, SeekFrom::Data(at)) {
                Ok(start) if start >= end => break,
                Ok(start) => start,
                Err(rustix::io::Errno::NXIO) => break,
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => return Ok(whole()),
                Err(errno) => return Err(errno.into()),
            };
            let stop = rustix::fs::seek(&self.main, SeekFrom::Hole(start))?.min(end);
            if stop <= start {
                break;
            }
            runs.push(start..stop);
            at = stop;
        }
        Ok(runs)
    }

    /// The descriptor that can carry a transfer, and whether lengths are to be rounded up to the
    /// alignment (reads only).
    pub(super) fn descriptor(&self, offset: u64, len: u64) -> RawFd {
        let align = u64::from(self.align);
        let aligned = offset.is_multiple_of(align) && len.is_multiple_of(align);
        match &self.buffered {
            Some(buffered) if !aligned => buffered.as_raw_fd(),
            _ => self.main.as_raw_fd(),
        }
    }

    pub(super) fn raw(&self) -> RawFd {
        self.main.as_raw_fd()
    }

    pub(super) fn align(&self) -> usize {
        self.align.max(1) as usize
    }

    pub(super) fn zero_method(&self, keep_allocated: bool) -> ZeroMethod {
        let cell = if keep_allocated {
            &self.zero
        } else {
            &self.punch
        };
        ZeroMethod::from_u8(cell.load(Ordering::Relaxed))
    }

    /// The method is not supported by this file: never try it again.
    pub(super) fn refuse_zero_method(&self, method: ZeroMethod) {
        for cell in [&self.punch, &self.zero] {
            let known = ZeroMethod::from_u8(cell.load(Ordering::Relaxed));
            if known <= method {
                cell.store(method.next() as u8, Ordering::Relaxed);
            }
        }
    }

    #[cfg(test)]
    pub(super) fn force_align(&mut self, align: u32) {
        self.align = align;
        self.buffered = self.open_buffered(&OpenOptions::image()).ok();
    }
}

impl Drop for StorageFile {
    /// Who holds a file in use (an io_uring) holds it until it has seen the end of all its I/O, so
    /// no write can land after the locks are gone.
    fn drop(&mut self) {
        if self.locked {
            locks::unlock(self.main.as_fd());
            if let Some(buffered) = &self.buffered {
                locks::unlock(buffered.as_fd());
            }
        }
    }
}

impl AsFd for StorageFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.main.as_fd()
    }
}

fn kind(mode: u32) -> FileType {
    FileType::from_raw_mode(mode)
}

/// Opens with O_DIRECT where the file system has it. Waits while a block device is claimed.
fn open_descriptor(
    path: &Path,
    flags: OFlags,
    patience: Duration,
) -> Result<(OwnedFd, bool), OpenError> {
    let mode = Mode::RUSR | Mode::WUSR;
    let mut opened = None;
    let claimed = locks::with_patience(patience, || {
        let attempt = match rustix::fs::open(path, flags | OFlags::DIRECT, mode) {
            // A file system without O_DIRECT. With O_CREAT the file may be there by now.
            Err(rustix::io::Errno::INVAL) => {
                rustix::fs::open(path, flags - OFlags::EXCL, mode).map(|file| (file, false))
            }
            other => other.map(|file| (file, true)),
        };
        match attempt {
            Err(rustix::io::Errno::BUSY) => Err(LockError::Held(Vec::new())),
            other => {
                opened = Some(other);
                Ok(())
            }
        }
    });
    claimed.map_err(|source| OpenError::Lock {
        path: path.to_owned(),
        source,
    })?;
    match opened {
        Some(Ok(file)) => Ok(file),
        Some(Err(rustix::io::Errno::NOENT)) => Err(OpenError::Missing(path.to_owned())),
        Some(Err(rustix::io::Errno::ISDIR)) => Err(OpenError::WrongKind(path.to_owned())),
        Some(Err(errno)) => Err(OpenError::System {
            path: path.to_owned(),
            action: "open it",
            source: errno.into(),
        }),
        None => Err(OpenError::Missing(path.to_owned())),
    }
}

/// Makes the directory entry of a path durable.
///
/// # Errors
/// The error of the operating system.
pub fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let folder = rustix::fs::open(
        folder,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    Ok(rustix::fs::fsync(&folder)?)
}

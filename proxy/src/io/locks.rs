//! Locks on open file descriptions (OFD locks), and who holds them.
//!
//! Always holds: a lock sits on the very description that carries the I/O. A killed process is
//! reaped at once, but its writes in the kernel hold the description, and with it the lock, until
//! they have landed; a successor that waits for the lock never starts under late writes.
#![expect(unsafe_code, reason = "fcntl with OFD commands has no safe wrapper")]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long a start waits for a predecessor's locks before it says who holds them.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(30);

/// First of QEMU's lock bytes: byte 100 + n is read-locked by who uses permission n.
const QEMU_PERMISSION_BASE: i64 = 100;
/// Byte 200 + n is read-locked by who does not let others use permission n.
const QEMU_UNSHARED_BASE: i64 = 200;
/// Permissions in QEMU's order: consistent read, write, write unchanged, resize.
const QEMU_PERMISSIONS: i64 = 4;
const CONSISTENT_READ: u8 = 1 << 0;
const WRITE: u8 = 1 << 1;
const RESIZE: u8 = 1 << 3;

/// A process that has a lock on a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Process id.
    pub pid: u32,
    /// Its command's name.
    pub command: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.command, self.pid)
    }
}

/// The holders in words, for an error message.
#[must_use]
pub fn describe_holders(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return "a process that cannot be seen from here".to_owned();
    }
    let names: Vec<String> = holders.iter().map(Holder::to_string).collect();
    names.join(", ")
}

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it.
    #[error("in use by {}", describe_holders(.0))]
    Held(Vec<Holder>),
    /// The system refused the call (a file system without locks, for one).
    #[error("the file system does not lock: {0}")]
    System(#[source] io::Error),
}

fn lock_description(kind: i32, start: i64, len: i64) -> libc::flock {
    // SAFETY: flock is plain data; all zeroes is a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).unwrap_or_default();
    lock.l_whence = 0; // SEEK_SET
    lock.l_start = start;
    lock.l_len = len;
    lock
}

/// Takes a lock without waiting. False: somebody else has a conflicting one.
fn set_lock(file: BorrowedFd<'_>, kind: i32, start: i64, len: i64) -> io::Result<bool> {
    let lock = lock_description(kind, start, len);
    // SAFETY: the descriptor is open and the structure lives through the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Whether a write lock on the byte could be had, that is, no other description has any lock on it.
fn byte_is_free(file: BorrowedFd<'_>, byte: i64) -> io::Result<bool> {
    let mut lock = lock_description(libc::F_WRLCK, byte, 1);
    // SAFETY: as in `set_lock`; the kernel writes into the structure.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(lock.l_type) == libc::F_UNLCK)
}

/// Takes the whole file for this description alone. Meant for logs and rings.
///
/// # Errors
/// Held elsewhere, or the file system does not lock.
pub fn lock_whole(file: BorrowedFd<'_>) -> Result<(), LockError> {
    match set_lock(file, libc::F_WRLCK, 0, 0) {
        Ok(true) => Ok(()),
        Ok(false) => Err(LockError::Held(holders(file))),
        Err(error) => Err(LockError::System(error)),
    }
}

/// Takes a disk image the way QEMU does (`block/file-posix.c`): used are consistent read and
/// write; not shared are consistent read (what a reader sees behind our back is not the disk),
/// write and resize. A running QEMU, qemu-nbd or qemu-img then refuses the file, and we refuse
/// theirs.
///
/// # Errors
/// Held elsewhere (nothing stays locked then), or the file system does not lock.
pub fn lock_image(file: BorrowedFd<'_>) -> Result<(), LockError> {
    let taken = try_lock_image(
        file,
        CONSISTENT_READ | WRITE,
        CONSISTENT_READ | WRITE | RESIZE,
    );
    match taken {
        Ok(true) => Ok(()),
        Ok(false) => {
            unlock_image(file);
            Err(LockError::Held(holders(file)))
        }
        Err(error) => {
            unlock_image(file);
            Err(LockError::System(error))
        }
    }
}

/// The same locks on a second description of a file that [`lock_image`] has taken already. Read
/// locks do not exclude each other, so this cannot conflict.
///
/// # Errors
/// The file system does not lock.
pub fn lock_image_again(file: BorrowedFd<'_>) -> io::Result<()> {
    set_image_bytes(
        file,
        CONSISTENT_READ | WRITE,
        CONSISTENT_READ | WRITE | RESIZE,
    )
    .map(|_| ())
}

fn set_image_bytes(file: BorrowedFd<'_>, used: u8, unshared: u8) -> io::Result<bool> {
    for permission in 0..QEMU_PERMISSIONS {
        let bit = 1u8 << permission;
        let bytes = [
            (used & bit != 0, QEMU_PERMISSION_BASE + permission),
            (unshared & bit != 0, QEMU_UNSHARED_BASE + permission),
        ];
        for (wanted, byte) in bytes {
            if wanted && !set_lock(file, libc::F_RDLCK, byte, 1)? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn try_lock_image(file: BorrowedFd<'_>, used: u8, unshared: u8) -> io::Result<bool> {
    // First lock, then look: of two who start at once at least one sees the other.
    if !set_image_bytes(file, used, unshared)? {
        return Ok(false);
    }
    for permission in 0..QEMU_PERMISSIONS {
        let bit = 1u8 << permission;
        if used & bit != 0 && !byte_is_free(file, QEMU_UNSHARED_BASE + permission)? {
            return Ok(false);
        }
        if unshared & bit != 0 && !byte_is_free(file, QEMU_PERMISSION_BASE + permission)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Gives up every lock of this description. For when nothing of its I/O is in flight any more: the
/// kernel may keep the description, and with it the locks, for a while after the last completion.
pub(super) fn unlock(file: BorrowedFd<'_>) {
    // Unlocking what is not locked is no error; what fails here goes with the description.
    let _ = set_lock(file, libc::F_UNLCK, 0, 0);
}

fn unlock_image(file: BorrowedFd<'_>) {
    // Unlocking what is not locked is no error; what fails here goes with the description.
    let _ = set_lock(
        file,
        libc::F_UNLCK,
        QEMU_PERMISSION_BASE,
        QEMU_UNSHARED_BASE + QEMU_PERMISSIONS - QEMU_PERMISSION_BASE,
    );
}

/// Tries again every 100 ms while the lock is held by another, up to `patience`.
///
/// # Errors
/// The last refusal.
pub fn with_patience(
    patience: Duration,
    mut attempt: impl FnMut() -> Result<(), LockError>,
) -> Result<(), LockError> {
    let start = Instant::now();
    loop {
        match attempt() {
            Err(LockError::Held(_)) if start.elapsed() < patience => {
                thread::sleep(Duration::from_millis(100));
            }
            other => return other,
        }
    }
}

/// Processes that hold a lock on the file through a description of theirs, as far as `/proc` lets
/// us see. This process itself is left out unless it alone holds one.
#[must_use]
pub fn holders(file: BorrowedFd<'_>) -> Vec<Holder> {
    let Ok(stat) = rustix::fs::fstat(file) else {
        return Vec::new();
    };
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let own = std::process::id();
    let mut found: Vec<Holder> = processes
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let locked = process_locks(&entry.path(), stat.st_dev, stat.st_ino, pid == own, file);
            locked.then(|| Holder {
                pid,
                command: std::fs::read_to_string(entry.path().join("comm"))
                    .map_or_else(|_| "?".to_owned(), |comm| comm.trim_end().to_owned()),
            })
        })
        .collect();
    found.sort_by_key(|holder| holder.pid);
    found
}

fn process_locks(
    process: &Path,
    device: u64,
    inode: u64,
    own_process: bool,
    asking: BorrowedFd<'_>,
) -> bool {
    let Ok(descriptors) = std::fs::read_dir(process.join("fd")) else {
        return false;
    };
    descriptors.flatten().any(|descriptor| {
        let name = descriptor.file_name();
        let is_asking = own_process && name.to_str() == Some(&asking.as_raw_fd().to_string());
        if is_asking {
            return false;
        }
        let same_file = std::fs::metadata(descriptor.path())
            .is_ok_and(|meta| meta.dev() == device && meta.ino() == inode);
        same_file
            && std::fs::read_to_string(process.join("fdinfo").join(&name))
                .is_ok_and(|info| info.lines().any(|line| line.starts_with("lock:")))
    })
}

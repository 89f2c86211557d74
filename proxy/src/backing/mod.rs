//! The backing of a disk: the file or block device that holds its content at the primary.
//!
//! Always holds: a backing in use here is locked against everybody else, has a size that a disk
//! may have, and does not begin like an image format that would make its raw bytes something else. Opening
//! changes nothing in it.

use crate::io::file::{OpenError, OpenOptions, StorageFile};
use crate::io::locks::LOCK_PATIENCE;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[cfg(test)]
mod tests;

/// Sizes of disks are multiples of this.
pub const SECTOR_BYTES: u64 = 512;
/// Largest disk: 16 TiB.
pub const DISK_BYTES_MAX: u64 = 16 << 40;

/// Image formats that must not be taken for raw bytes by mistake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImageFormat {
    /// QEMU's qcow, version 2 or 3.
    Qcow2,
    /// VMware's sparse image.
    Vmdk,
    /// Hyper-V's image.
    Vhdx,
    /// VirtualBox's image.
    Vdi,
}

impl std::fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "VMDK",
            Self::Vhdx => "VHDX",
            Self::Vdi => "VDI",
        })
    }
}

/// Why a backing cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// It does not open.
    #[error("backing {0}")]
    Open(#[from] OpenError),
    /// It holds an image in another format.
    #[error(
        "backing {} begins like a {format} image: convert it to raw (qemu-img convert -O raw), or \
         say raw = true in its [[group.disk]] if its raw bytes are the disk", path.display()
    )]
    Formatted {
        /// The backing.
        path: PathBuf,
        /// What it looks like.
        format: ImageFormat,
    },
    /// Its size cannot be a disk's.
    #[error(
        "backing {} has {found} bytes; a disk has a multiple of 512, at least 512, at most 16 TiB",
        path.display()
    )]
    BadSize {
        /// The backing.
        path: PathBuf,
        /// Its length.
        found: u64,
    },
    /// It cannot be read.
    #[error("backing {}: cannot read it: {source}", path.display())]
    Read {
        /// The backing.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
}

/// How to open a backing.
#[derive(Clone, Debug)]
pub struct BackingOptions {
    /// The configuration says that the bytes are the disk, whatever they look like.
    pub raw: bool,
    /// How long to wait for somebody else's lock.
    pub patience: Duration,
}

impl Default for BackingOptions {
    fn default() -> Self {
        Self {
            raw: false,
            patience: LOCK_PATIENCE,
        }
    }
}

/// An open, locked, checked backing.
#[derive(Debug)]
pub struct Backing {
    /// The file; goes into the group's storage.
    pub file: StorageFile,
    /// Bytes of the disk.
    pub size: u64,
}

impl Backing {
    /// Opens, locks and checks a backing.
    ///
    /// # Errors
    /// Missing, in use (after `patience`), of an odd size, or formatted.
    pub fn open(path: &Path, options: &BackingOptions) -> Result<Self, BackingError> {
        let file = StorageFile::open(path, &OpenOptions::image().patience(options.patience))?;
        let read = |source| BackingError::Read {
            path: path.to_owned(),
            source,
        };
        let size = file.len().map_err(read)?;
        // Before the size: files of other formats have odd sizes, and that would be said instead.
        if !options.raw
            && let Some(format) = detect_format(&file).map_err(read)?
        {
            return Err(BackingError::Formatted {
                path: path.to_owned(),
                format,
            });
        }
        if size == 0 || !size.is_multiple_of(SECTOR_BYTES) || size > DISK_BYTES_MAX {
            return Err(BackingError::BadSize {
                path: path.to_owned(),
                found: size,
            });
        }
        Ok(Self { file, size })
    }
}

/// What the first sector looks like.
fn detect_format(file: &StorageFile) -> io::Result<Option<ImageFormat>> {
    let mut head = [0; SECTOR_BYTES as usize];
    let have = file.read_at(0, &mut head)?;
    let head = &head[..have];
    let signatures: [(usize, &[u8], ImageFormat); 4] = [
        (0, b"QFI\xfb", ImageFormat::Qcow2),
        (0, b"KDMV", ImageFormat::Vmdk),
        (0, b"vhdxfile", ImageFormat::Vhdx),
        (0x40, &[0x7f, 0x10, 0xda, 0xbe], ImageFormat::Vdi),
    ];
    Ok(signatures
        .into_iter()
        .find(|(at, signature, _)| {
            head.get(*at..)
                .is_some_and(|rest| rest.starts_with(signature))
        })
        .map(|(_, _, format)| format))
}

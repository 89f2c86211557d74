//! Writing an image's disks into files.
//!
//! What always holds: a file appears under its name only when it is whole and durable, and all
//! disks of the group are written before the first gets its name, as a rule all at once
//! (`staging`); nothing that exists is ever overwritten; every byte comes out of a chunk whose
//! checksum was checked. What was begun and not finished is removed, also when the restore is
//! dropped half-way; what a killed one left, by the next into the same folder.

mod output;
mod staging;

#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

use afterimage_format::ids::{BLOCK_SIZE, DiskIndex};
use futures::{StreamExt, stream};

use crate::image::{Image, ImageError};
use crate::index::Source;
use output::Output;
use staging::Staging;

/// Bytes read at a time.
const READ_BYTES: usize = 1024 * 1024;
/// Reads under way at a time.
const READS_MAX: usize = 8;

/// Format of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RestoreFormat {
    /// The disk's bytes, with holes where it reads as zero. `DISK.raw`.
    #[default]
    Raw,
    /// QEMU's format. `DISK.qcow2`.
    Qcow2,
}

impl RestoreFormat {
    /// File name extension.
    #[must_use]
    pub const fn extension(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// How far a restore is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RestoreProgress {
    /// Bytes of all disks that were dealt with, holes included.
    pub bytes_done: u64,
    /// Bytes of all disks.
    pub bytes_total: u64,
    /// Bytes of data written.
    pub bytes_written: u64,
}

/// One restored disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoredDisk {
    /// Its name.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Bytes of data in it.
    pub data_bytes: u64,
}

/// Why a restore failed. Nothing is left under the final names.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Would overwrite something.
    #[error("{} exists already: restore into another folder, or move it away", .0.display())]
    Exists(PathBuf),
    /// A restore was killed while its disks got their names.
    #[error(
        "an earlier restore was ended before all of its disks had their names: {} without the others. Remove what is there, then restore again",
        listed(.0)
    )]
    HalfNamed(Vec<PathBuf>),
    /// The folder or a file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The image cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
}

fn listed(paths: &[PathBuf]) -> String {
    let paths: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
    let verb = if paths.len() == 1 { "is" } else { "are" };
    format!("{} {verb} there", paths.join(", "))
}

impl RestoreError {
    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Write { path, source }
    }
}

/// Writes every disk of an image into `folder`, which is created if it does not exist. Files are
/// readable by their owner alone, and so is a folder that is created. They get their names once all
/// of them are whole and durable: all at once, even if the process is killed, where the folder does
/// not exist, or is empty and can be replaced by one that is like it. Needs a tokio runtime: files are written on threads of their own.
///
/// # Errors
/// What could not be read or written. Files that were begun are removed, also when this is dropped
/// before its end.
pub async fn restore(
    image: &Image,
    folder: &Path,
    format: RestoreFormat,
    mut progress: impl FnMut(RestoreProgress),
) -> Result<Vec<RestoredDisk>, RestoreError> {
    let extension = format.extension();
    let disks = image.disks().iter();
    let names: Vec<String> = disks
        .map(|disk| format!("{}.{extension}", disk.name))
        .collect();
    let staging = Staging::create(folder, &names)?;
    let mut state = RestoreProgress {
        bytes_total: image.disks().iter().map(|disk| disk.size_bytes).sum(),
        ..RestoreProgress::default()
    };
    progress(state);
    let mut restored = Vec::new();
    for (place, (disk, name)) in image.disks().iter().zip(&names).enumerate() {
        let before = state.bytes_written;
        let output = Output::create(&staging.path(name), disk.size_bytes, format).await?;
        let place = DiskIndex(place as u16);
        copy(image, place, output, &mut state, &mut progress).await?;
        restored.push(RestoredDisk {
            name: disk.name.clone(),
            path: folder.join(name),
            size_bytes: disk.size_bytes,
            data_bytes: state.bytes_written - before,
        });
    }
    staging.publish(&names)?;
    Ok(restored)
}

/// Copies one disk into its file, which is whole and durable then.
async fn copy(
    image: &Image,
    disk: DiskIndex,
    mut output: Output,
    state: &mut RestoreProgress,
    progress: &mut impl FnMut(RestoreProgress),
) -> Result<(), RestoreError> {
    let size = image.size(disk)?;
    let base = state.bytes_done;
    let mut start = 0;
    while start < size {
        let (ranges, end) = data_ranges(image, disk, start, size).await?;
        let mut reads = stream::iter(ranges)
            .map(|(offset, len)| async move {
                let mut buffer = vec![0; len];
                image
                    .read(disk, offset, &mut buffer)
                    .await
                    .map(|()| (offset, buffer))
            })
            .buffered(READS_MAX);
        while let Some(read) = reads.next().await {
            let (offset, buffer) = read?;
            let len = buffer.len() as u64;
            output.write(offset, buffer).await?;
            state.bytes_written += len;
            state.bytes_done = base + offset + len;
            progress(*state);
        }
        state.bytes_done = base + end;
        progress(*state);
        start = end;
    }
    output.finish().await
}

/// Ranges of one lookup that hold data, joined and cut to what is read at a time, and the byte at
/// which it ends.
async fn data_ranges(
    image: &Image,
    disk: DiskIndex,
    start: u64,
    size: u64,
) -> Result<(Vec<(u64, usize)>, u64), ImageError> {
    let block = BLOCK_SIZE as u64;
    let mut ranges: Vec<(u64, usize)> = Vec::new();
    let mut end = size;
    let blocks = size.div_ceil(block) - start / block;
    for piece in image.pieces(disk, start / block, blocks).await? {
        end = size.min((piece.first_block + piece.block_count as u64) * block);
        if !matches!(piece.source, Source::Data { .. }) {
            continue;
        }
        let mut from = piece.first_block * block;
        let to = (from + piece.block_count as u64 * block).min(size);
        while from < to {
            if let Some((offset, len)) = ranges.last_mut()
                && *offset + *len as u64 == from
                && *len < READ_BYTES
            {
                let step = (to - from).min((READ_BYTES - *len) as u64);
                *len += step as usize;
                from += step;
                continue;
            }
            let step = (to - from).min(READ_BYTES as u64);
            ranges.push((from, step as usize));
            from += step;
        }
    }
    Ok((ranges, end))
}

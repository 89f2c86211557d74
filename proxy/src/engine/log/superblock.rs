//! Reading and updating the superblocks of a log.

use super::error::LogError;
use super::reader::LogSource;
use crate::engine::blocking::{Blocking, StorageError};
use crate::io::buffer::AlignedBuffer;
use crate::io::{FileId, Operation, Source, Storage};
use afterimage_format::ids::BLOCK_SIZE;
use afterimage_format::superblock::{SUPERBLOCK_COPIES, Superblock, SuperblockError, choose};

/// Byte offset in the log file of the copy that a generation belongs into.
#[must_use]
pub const fn copy_offset(generation: u64) -> u64 {
    generation % SUPERBLOCK_COPIES * BLOCK_SIZE as u64
}

/// Raises the generation and gives the write that stores the superblock. It counts once the log is
/// synced after the write's completion; until then the copy before it does.
pub fn update(superblock: &mut Superblock) -> Operation {
    superblock.generation += 1;
    let mut buffer = AlignedBuffer::new(BLOCK_SIZE);
    buffer.copy_from_slice(&superblock.encode());
    Operation::Write {
        file: FileId::LOG,
        offset: copy_offset(superblock.generation),
        source: Source::Owned(buffer),
        dsync: false,
    }
}

/// Stores the superblock with the next generation and makes it durable.
///
/// # Errors
/// The log cannot be written or synced.
pub fn store<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    file: FileId,
    superblock: &mut Superblock,
) -> Result<(), StorageError> {
    superblock.generation += 1;
    let offset = copy_offset(superblock.generation);
    blocking.write_bytes(file, offset, &superblock.encode())?;
    blocking.sync(file)
}

/// The superblock of a log file that is open, before anything else is: whose it is, which disks
/// and sinks it knows. Blocks.
///
/// # Errors
/// The file cannot be read, or neither copy is valid.
pub fn peek(file: &mut impl LogSource) -> Result<Superblock, LogError> {
    let len = SUPERBLOCK_COPIES as usize * BLOCK_SIZE;
    let (mut buffer, got) = file.read(0, AlignedBuffer::new(len))?;
    buffer[got..].fill(0);
    let (a, b) = buffer.split_at(BLOCK_SIZE);
    choose([a, b]).map_err(|source| LogError::Superblock {
        path: file.path(),
        source,
    })
}

/// The superblock that counts.
///
/// # Errors
/// The log cannot be read. The inner error: neither copy is valid.
pub fn read<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    file: FileId,
) -> Result<Result<Superblock, SuperblockError>, StorageError> {
    let block = read_both(blocking, file)?;
    let (a, b) = block.split_at(BLOCK_SIZE);
    Ok(choose([a, b]))
}

fn read_both<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    file: FileId,
) -> Result<AlignedBuffer, StorageError> {
    let len = SUPERBLOCK_COPIES as usize * BLOCK_SIZE;
    let (mut buffer, got) = blocking.read(file, 0, AlignedBuffer::new(len))?;
    buffer[got..].fill(0);
    Ok(buffer)
}

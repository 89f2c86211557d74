//! One verify record against the image at its LSN.

use std::sync::Arc;

use afterimage_format::chain::RecordMeta;
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Epoch};
use afterimage_format::verify::{BlockHashes, Content, VERIFY_BLOCKS_MAX, VerifyBody};

use crate::group::{Group, GroupError};
use crate::history::Position;
use crate::image::{ChunkCache, Image, ImageError};
use crate::index::Source;

/// Most blocks that are looked up at a time.
const LOOKUP_BLOCKS: u64 = 1 << 40;

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Every block was compared.
    Compared {
        /// Blocks with other content.
        differing: u64,
        /// The first of them.
        first: Option<u64>,
    },
    /// It says nothing, for this reason.
    Skipped(String),
}

/// Compares. `buffer` is any; it is used again.
///
/// # Errors
/// The repository does not answer; to be tried again.
pub(super) async fn compare(
    group: &Arc<Group>,
    cache: &Arc<ChunkCache>,
    buffer: &mut Vec<u8>,
    epoch: Epoch,
    record: &RecordMeta,
    body: &VerifyBody,
) -> Result<Outcome, GroupError> {
    let at = Position {
        epoch,
        lsn: body.at,
    };
    let image = match Image::open(group.clone(), at, cache.clone()) {
        Ok(image) => image,
        Err(error) => return skipped(error),
    };
    let size = image.size(record.disk).unwrap_or(0);
    let end = record.first_block.saturating_add(record.block_count.into());
    let fits = match &body.content {
        Content::Zero => true,
        Content::Data(hashes) => hashes.tags.len() == record.block_count as usize,
    };
    if body.at >= record.lsn || end > size.div_ceil(BLOCK_SIZE as u64) || !fits {
        return Ok(Outcome::Skipped("it makes no sense".to_owned()));
    }
    let mut reader = Reader {
        image,
        disk: record.disk,
        size,
        buffer,
    };
    let compared = match &body.content {
        Content::Zero => reader.non_zero(record.first_block..end).await,
        Content::Data(hashes) => reader.other_than(record.first_block, hashes).await,
    };
    match compared {
        Ok((differing, first)) => Ok(Outcome::Compared { differing, first }),
        Err(error) => skipped(error),
    }
}

/// A store that fails is asked again; what is damaged or gone stays so.
fn skipped(error: ImageError) -> Result<Outcome, GroupError> {
    match error {
        ImageError::Group(GroupError::Repository(error)) if !error.is_not_found() => {
            Err(error.into())
        }
        error => Ok(Outcome::Skipped(error.to_string())),
    }
}

struct Reader<'a> {
    image: Image,
    disk: DiskIndex,
    size: u64,
    buffer: &'a mut Vec<u8>,
}

/// How many blocks differ, and the first.
type Differing = (u64, Option<u64>);

impl Reader<'_> {
    /// Reads whole blocks, behind the disk's end zeroes.
    async fn read(&mut self, first: u64, blocks: usize) -> Result<&[u8], ImageError> {
        let offset = first * BLOCK_SIZE as u64;
        let len = blocks * BLOCK_SIZE;
        self.buffer.clear();
        self.buffer.resize(len, 0);
        let within = usize::try_from(self.size - offset).map_or(len, |left| left.min(len));
        let buffer = &mut self.buffer[..within];
        self.image.read(self.disk, offset, buffer).await?;
        Ok(self.buffer)
    }

    async fn other_than(
        &mut self,
        first: u64,
        hashes: &BlockHashes,
    ) -> Result<Differing, ImageError> {
        let ours = BlockHashes::of(self.read(first, hashes.tags.len()).await?);
        let differing = hashes.differing(&ours);
        let at = differing.first().map(|at| first + *at as u64);
        Ok((differing.len() as u64, at))
    }

    async fn non_zero(&mut self, blocks: std::ops::Range<u64>) -> Result<Differing, ImageError> {
        let (mut count, mut first) = (0, None);
        let mut next = blocks.start;
        while next < blocks.end {
            let left = (blocks.end - next).min(LOOKUP_BLOCKS);
            let pieces = self.image.pieces(self.disk, next, left).await?;
            for piece in pieces {
                let end = piece.first_block + piece.block_count as u64;
                if !matches!(piece.source, Source::Nothing | Source::Zero) {
                    let mut at = piece.first_block;
                    while at < end {
                        let blocks = (end - at).min(VERIFY_BLOCKS_MAX as u64) as usize;
                        let data = self.read(at, blocks).await?;
                        for (block, content) in (at..).zip(data.chunks(BLOCK_SIZE)) {
                            if content.iter().any(|byte| *byte != 0) {
                                count += 1;
                                first = first.or(Some(block));
                            }
                        }
                        at += blocks as u64;
                    }
                }
                next = end;
            }
            // A run of zeroes may be as long as a disk.
            tokio::task::yield_now().await;
        }
        Ok((count, first))
    }
}

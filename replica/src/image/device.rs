//! One disk of an image as a read-only NBD device.

use afterimage_format::ids::{BLOCK_SIZE, DiskIndex};
use afterimage_proxy::engine::request::{Extent, RequestError};
use afterimage_proxy::nbd::device::Device;
use afterimage_proxy::nbd::export::BoxFuture;

use super::{Image, ImageError};
use crate::index::Source;

/// Lookups that one status request may make before it answers with what it has.
const LOOKUPS_MAX: usize = 64;

/// A disk of an image.
#[derive(Debug, Clone)]
pub struct ImageDevice {
    image: Image,
    disk: DiskIndex,
    size: u64,
}

impl ImageDevice {
    /// The disk of this place in the disk table.
    ///
    /// # Errors
    /// No such disk.
    pub fn new(image: Image, disk: DiskIndex) -> Result<Self, ImageError> {
        let size = image.size(disk)?;
        Ok(Self { image, disk, size })
    }

    /// Extents from `offset` on; adjacent ones differ.
    async fn extents(
        &self,
        offset: u64,
        len: u64,
        extents_max: usize,
    ) -> Result<Vec<Extent>, ImageError> {
        let end = offset.saturating_add(len).min(self.size);
        let block = BLOCK_SIZE as u64;
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = offset;
        for _ in 0..LOOKUPS_MAX {
            if at >= end {
                break;
            }
            let blocks = end.div_ceil(block) - at / block;
            let pieces = self.image.pieces(self.disk, at / block, blocks).await?;
            for piece in pieces {
                let stop = end.min((piece.first_block + piece.block_count as u64) * block);
                if stop <= at {
                    continue;
                }
                let hole = !matches!(piece.source, Source::Data { .. });
                let count = extents.len();
                match extents.last_mut() {
                    Some(last) if last.hole == hole => last.len += stop - at,
                    _ if count == extents_max => return Ok(extents),
                    _ => extents.push(Extent {
                        len: stop - at,
                        hole,
                        zero: hole,
                        dirty: false,
                    }),
                }
                at = stop;
            }
        }
        Ok(extents)
    }

    fn failed(&self, error: &ImageError) -> RequestError {
        tracing::error!(group = %self.image.group().id(), at = %self.image.position(), %error, "image");
        RequestError::Io
    }
}

impl Device for ImageDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read<'a>(
        &'a self,
        offset: u64,
        buffer: &'a mut [u8],
    ) -> BoxFuture<'a, Result<(), RequestError>> {
        Box::pin(async move {
            let read = self.image.read(self.disk, offset, buffer).await;
            read.map_err(|error| self.failed(&error))
        })
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        extents_max: u32,
    ) -> BoxFuture<'_, Result<Vec<Extent>, RequestError>> {
        Box::pin(async move {
            let extents = self.extents(offset, len, extents_max.max(1) as usize).await;
            extents.map_err(|error| self.failed(&error))
        })
    }
}

//! Layers in the repository: written from what was sealed, joined when there are many of one size,
//! read when a group is opened.
//!
//! Owns the objects below a group's `layers` folder. What always holds: the head is created after
//! all files that it names, so that a head that exists is whole; objects are never changed and never
//! removed. A layer repeats what the segments say: one that is missing, damaged or does not fit is
//! left out, with a warning, and the segments are read instead. Memory is bounded by a file of pages
//! and some pages of each layer that is joined, whatever their size.

mod error;
mod join;
mod read;
mod write;

#[cfg(test)]
mod tests;

pub use error::LayerError;
pub use join::Joiner;
pub use read::{PageReader, ranges, read_head};
pub(crate) use read::{page_of, together};
pub use write::LayerWriter;

/// Extents after which what came is sealed: 2 MiB of memory.
pub const SEAL_EXTENTS: usize = 64 * 1024;

/// Bytes after which a file of pages is closed.
const FILE_BYTES: usize = 4 << 20;

//! Layers: what a range of an epoch's segments says, sorted by block instead of by time.
//!
//! A layer is derived: everything in it follows from the segments that it covers, and it can be
//! made anew from them. Whoever opens a group reads the heads of a few layers instead of the
//! indexes of all segments, and of a layer's pages only those that hold the blocks asked for.
//!
//! Two kinds of objects (`docs/format.md`, "Layer"): a [`LayerHead`] with what the segments add to
//! the history and where each page is, and files of pages ([`encode_page`]), which hold sorted
//! [`Extent`]s. The head is written last: without it the files mean nothing.

mod entry;
mod extent;
mod head;
mod page;

pub use entry::{BaseEntry, CheckpointEntry, ClockEra, PassProgress, PassState, SegmentEntry};
pub use extent::{Extent, LEVEL_MAX};
pub use head::{LAYER_HEAD_BYTES_MAX, LayerHead, LayerRun};
pub use page::{PAGE_EXTENTS_MAX, PageEntry, PageError, PagePlace, decode_page, encode_page};

#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod tests;

//! Aligned buffers that are used again and again.

use crate::io::buffer::AlignedBuffer;

/// Sizes from 4 KiB to 1 MiB, by powers of two; larger ones are not kept.
const CLASSES: usize = 9;
const SMALLEST_SHIFT: u32 = 12;
/// Bytes kept per class.
const CLASS_BYTES_MAX: usize = 2 << 20;

#[derive(Debug, Default)]
pub(super) struct BufferPool {
    classes: [Vec<AlignedBuffer>; CLASSES],
}

fn class_of(len: usize) -> usize {
    let len = len.max(1 << SMALLEST_SHIFT).next_power_of_two();
    (len.trailing_zeros() - SMALLEST_SHIFT) as usize
}

impl BufferPool {
    /// A buffer of this length. Its bytes have no meaning.
    pub(super) fn take(&mut self, len: usize) -> AlignedBuffer {
        let class = class_of(len);
        let Some(kept) = self.classes.get_mut(class) else {
            return AlignedBuffer::new(len);
        };
        let mut buffer = kept
            .pop()
            .unwrap_or_else(|| AlignedBuffer::new(1 << (SMALLEST_SHIFT as usize + class)));
        buffer.set_len(len);
        buffer
    }

    /// Keeps a buffer for later, or frees it if there are enough.
    pub(super) fn give(&mut self, buffer: AlignedBuffer) {
        let capacity = buffer.capacity();
        if !capacity.is_power_of_two() {
            return;
        }
        if let Some(kept) = self.classes.get_mut(class_of(capacity))
            && (kept.len() + 1) * capacity <= CLASS_BYTES_MAX
        {
            kept.push(buffer);
        }
    }
}

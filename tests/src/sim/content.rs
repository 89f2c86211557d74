//! What clients write: every byte follows from the write's number and the byte's place on the disk,
//! so that neither an old version nor a misplaced one can pass for the right one.

/// Fills with the content of write `value` for the bytes from `offset` on.
pub fn fill(value: u64, offset: u64, into: &mut [u8]) {
    let mut at = offset;
    let mut done = 0;
    while done < into.len() {
        let word = word(value, at / 8).to_le_bytes();
        let skip = (at % 8) as usize;
        let len = (8 - skip).min(into.len() - done);
        into[done..done + len].copy_from_slice(&word[skip..skip + len]);
        done += len;
        at += len as u64;
    }
}

fn word(value: u64, index: u64) -> u64 {
    // No byte of it is 0: content is never taken for zeroes.
    let mixed = value
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(index.wrapping_mul(0xd6e8_feb8_6659_fd93));
    (mixed ^ (mixed >> 29)) | 0x0101_0101_0101_0101
}

//! CRC32C, the checksum of every small part of every format.

/// CRC32C (Castagnoli) of the bytes.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    let value = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes);
    u32::try_from(value).expect("a 32-bit CRC fits 32 bits")
}

#[cfg(test)]
mod tests {
    #[test]
    fn known_answer() {
        assert_eq!(super::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(super::crc32c(b""), 0);
    }
}

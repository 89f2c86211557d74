//! A bounded reader over bytes and its writing twin, for messages and small objects of variable
//! length. Every read checks what is left; [`Reader::finish`] refuses leftovers.

/// Why bytes could not be read as what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CursorError {
    /// The bytes end within a field.
    #[error("the bytes end within {0}")]
    Short(&'static str),
    /// More bytes than the fields need.
    #[error("{0} bytes too many")]
    Trailing(usize),
    /// A length or count above its limit.
    #[error("{what} is {value}, the limit is {limit}")]
    Limit {
        /// Which number.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The most it may be.
        limit: u64,
    },
    /// A field with a value that is not allowed.
    #[error("invalid {0}")]
    Invalid(&'static str),
}

/// Reads fields from the front of a slice.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// A reader over all of `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// Fewer are left. `field` names what was to be read; so in all methods.
    pub fn bytes(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], CursorError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(CursorError::Short(field))?;
        self.rest = rest;
        Ok(taken)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// Fewer are left.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], CursorError> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N, field)?);
        Ok(out)
    }

    /// One byte.
    ///
    /// # Errors
    /// None is left.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, CursorError> {
        self.array(field).map(u8::from_le_bytes)
    }

    /// Two bytes, little-endian.
    ///
    /// # Errors
    /// Fewer are left.
    pub fn u16(&mut self, field: &'static str) -> Result<u16, CursorError> {
        self.array(field).map(u16::from_le_bytes)
    }

    /// Four bytes, little-endian.
    ///
    /// # Errors
    /// Fewer are left.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, CursorError> {
        self.array(field).map(u32::from_le_bytes)
    }

    /// Eight bytes, little-endian.
    ///
    /// # Errors
    /// Fewer are left.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, CursorError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// A string behind its length in two bytes.
    ///
    /// # Errors
    /// Longer than `limit` bytes, cut, or not UTF-8.
    pub fn string(&mut self, limit: usize, field: &'static str) -> Result<String, CursorError> {
        let len = usize::from(self.u16(field)?);
        within(len as u64, limit, field)?;
        let bytes = self.bytes(len, field)?;
        let text = std::str::from_utf8(bytes).map_err(|_| CursorError::Invalid(field))?;
        Ok(text.to_owned())
    }

    /// A count in four bytes, of items of at least `item_bytes` each.
    ///
    /// # Errors
    /// Above `limit`, or more than the bytes left can hold: checked before anything is allocated.
    pub fn count(
        &mut self,
        limit: usize,
        item_bytes: usize,
        field: &'static str,
    ) -> Result<usize, CursorError> {
        let count = self.u32(field)? as usize;
        within(count as u64, limit, field)?;
        if count.saturating_mul(item_bytes) > self.rest.len() {
            return Err(CursorError::Short(field));
        }
        Ok(count)
    }

    /// `len` bytes that must be zero.
    ///
    /// # Errors
    /// Cut, or not zero.
    pub fn zeroes(&mut self, len: usize, field: &'static str) -> Result<(), CursorError> {
        if self.bytes(len, field)?.iter().any(|byte| *byte != 0) {
            return Err(CursorError::Invalid(field));
        }
        Ok(())
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// Bytes are left.
    pub fn finish(self) -> Result<(), CursorError> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(CursorError::Trailing(left)),
        }
    }
}

fn within(value: u64, limit: usize, what: &'static str) -> Result<(), CursorError> {
    if value > limit as u64 {
        return Err(CursorError::Limit {
            what,
            value,
            limit: limit as u64,
        });
    }
    Ok(())
}

/// Appends fields to bytes.
pub(crate) trait Put {
    fn put(&mut self, bytes: &[u8]);
    fn put_u8(&mut self, value: u8) {
        self.put(&[value]);
    }
    fn put_u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }
    fn put_u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }
    fn put_u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }
    /// The string, cut at a character's boundary if it is longer than `limit` bytes.
    fn put_string(&mut self, text: &str, limit: usize) {
        let cut = &text[..text.floor_char_boundary(limit)];
        self.put_u16(cut.len() as u16);
        self.put(cut.as_bytes());
    }
    fn put_count(&mut self, count: usize) {
        self.put_u32(count as u32);
    }
}

impl Put for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

//! Names that people give to groups, disks and checkpoints, and that reach paths and object keys.

/// Longest name, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Why a name was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The name has no characters.
    #[error("a name needs at least one character")]
    Empty,
    /// The name is longer than [`NAME_BYTES_MAX`].
    #[error("a name has at most {NAME_BYTES_MAX} characters, this one has {0}")]
    TooLong(usize),
    /// The name begins with a dot or a dash.
    #[error("a name must not begin with '.' or '-'")]
    BadStart,
    /// The name holds a character outside `A-Z a-z 0-9 . _ -`.
    #[error("a name is made of A-Z a-z 0-9 . _ - only; byte {0} is something else")]
    BadCharacter(usize),
}

/// Checks a name of a group, a disk or a checkpoint: 1 to [`NAME_BYTES_MAX`] characters of
/// `A-Z a-z 0-9 . _ -`, the first neither dot nor dash. Such a name is safe in a path, an object
/// key, an NBD export name and a metric label.
///
/// # Errors
/// Says which rule the name breaks.
pub fn validate(name: &str) -> Result<(), NameError> {
    let bytes = name.as_bytes();
    match bytes {
        [] => return Err(NameError::Empty),
        [b'.' | b'-', ..] => return Err(NameError::BadStart),
        _ if bytes.len() > NAME_BYTES_MAX => return Err(NameError::TooLong(bytes.len())),
        _ => {}
    }
    let allowed = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    match bytes.iter().position(|b| !allowed(b)) {
        Some(at) => Err(NameError::BadCharacter(at)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_ordinary_names() {
        for name in ["vm1", "web-01.prod", "A_b", "0"] {
            assert_eq!(validate(name), Ok(()), "{name}");
        }
    }

    #[test]
    fn refuses_what_could_leave_a_folder() {
        assert_eq!(validate(""), Err(NameError::Empty));
        assert_eq!(validate(".."), Err(NameError::BadStart));
        assert_eq!(validate("-rf"), Err(NameError::BadStart));
        assert_eq!(validate("a/b"), Err(NameError::BadCharacter(1)));
        assert_eq!(validate("a\0"), Err(NameError::BadCharacter(1)));
        assert_eq!(validate("ä"), Err(NameError::BadCharacter(0)));
        assert_eq!(validate(&"x".repeat(65)), Err(NameError::TooLong(65)));
    }
}

//! Which requests are good, and the errno of those that are not.

use super::{EXTENTS_MAX, PAYLOAD_BYTES_MAX, SessionConfig};
use crate::engine::request::Request;
use afterimage_format::nbd::constants::{Errno, cmd, cmd_flag};
use afterimage_format::nbd::reply::ReplyForm;
use afterimage_format::nbd::request::RequestHeader;

/// A request that passed, with what its reply needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checked {
    /// Success without doing anything: length 0, or CACHE.
    AtOnce,
    Read {
        len: u32,
    },
    Write {
        fua: bool,
    },
    Flush,
    Trim {
        fua: bool,
    },
    WriteZeroes {
        fua: bool,
        no_hole: bool,
    },
    BlockStatus {
        len: u64,
        extents_max: u32,
    },
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refusal {
    pub(super) errno: Errno,
    pub(super) message: &'static str,
}

const fn refusal(errno: Errno, message: &'static str) -> Refusal {
    Refusal { errno, message }
}

impl Checked {
    /// Bytes of payload that follow the header.
    pub(super) fn payload_bytes(self, header: &RequestHeader) -> usize {
        match self {
            // Checked to be at most PAYLOAD_BYTES_MAX.
            Self::Write { .. } => header.length as usize,
            _ => 0,
        }
    }

    /// Bytes of the reply's body, at most.
    pub(super) fn reply_bytes(self, config: &SessionConfig) -> usize {
        match self {
            Self::Read { len, .. } => len as usize,
            Self::BlockStatus { extents_max, .. } => {
                (extents_max as usize * 16 + 64) * config.contexts.len()
            }
            _ => 0,
        }
    }

    /// The request for the engine.
    pub(super) fn request<'a>(self, header: &RequestHeader, data: &'a [u8]) -> Request<'a> {
        let (offset, len) = (header.offset, header.length);
        match self {
            Self::Read { len } => Request::Read { offset, len },
            Self::Write { fua } => Request::Write { offset, data, fua },
            Self::Trim { fua } => Request::Trim { offset, len, fua },
            Self::WriteZeroes { fua, no_hole } => Request::WriteZeroes {
                offset,
                len,
                fua,
                no_hole,
            },
            Self::BlockStatus { len, extents_max } => Request::BlockStatus {
                offset,
                len,
                extents_max,
            },
            // `AtOnce` is answered before anything is yielded.
            Self::Flush | Self::AtOnce => Request::Flush,
        }
    }
}

/// Checks a request other than DISC.
pub(super) fn check(header: &RequestHeader, config: &SessionConfig) -> Result<Checked, Refusal> {
    let extended = config.form == ReplyForm::Extended;
    let structured = config.form != ReplyForm::Simple;
    let fua = config.ack_durable || header.flags & cmd_flag::FUA != 0;
    let allowed = cmd_flag::FUA
        | match header.command {
            cmd::READ if structured => cmd_flag::DF,
            cmd::WRITE if extended => cmd_flag::PAYLOAD_LEN,
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
            cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
            cmd::READ | cmd::WRITE | cmd::FLUSH | cmd::TRIM | cmd::CACHE => 0,
            _ => return Err(refusal(Errno::Invalid, "unknown command")),
        };
    let writes = matches!(header.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
    if writes && config.read_only {
        return Err(refusal(Errno::Permission, "the export is read-only"));
    }
    if header.flags & !allowed != 0 {
        return Err(refusal(Errno::Invalid, "unknown flag for this command"));
    }
    if header.command == cmd::FLUSH {
        return if header.offset == 0 && header.length == 0 {
            Ok(Checked::Flush)
        } else {
            Err(refusal(Errno::Invalid, "a flush has no range"))
        };
    }
    let len32 = u32::try_from(header.length)
        .ok()
        .filter(|len| *len <= PAYLOAD_BYTES_MAX);
    if len32.is_none() && matches!(header.command, cmd::READ | cmd::WRITE) {
        return Err(refusal(Errno::Invalid, "longer than 64 MiB"));
    }
    let end = header.offset.checked_add(header.length);
    if end.is_none_or(|end| end > config.size) {
        let errno = match header.command {
            cmd::WRITE | cmd::WRITE_ZEROES => Errno::NoSpace,
            _ => Errno::Invalid,
        };
        return Err(refusal(errno, "beyond the end of the export"));
    }
    if header.command == cmd::BLOCK_STATUS {
        if config.contexts.is_empty() {
            return Err(refusal(Errno::Invalid, "no metadata context was selected"));
        }
        if header.length == 0 {
            return Err(refusal(Errno::Invalid, "a status needs a range"));
        }
        let one = header.flags & cmd_flag::REQ_ONE != 0;
        return Ok(Checked::BlockStatus {
            len: header.length,
            extents_max: if one { 1 } else { EXTENTS_MAX },
        });
    }
    if header.length == 0 {
        return Ok(Checked::AtOnce);
    }
    Ok(match (header.command, len32) {
        (cmd::READ, Some(len)) => Checked::Read { len },
        (cmd::WRITE, _) => Checked::Write { fua },
        (cmd::TRIM, _) => Checked::Trim { fua },
        (cmd::WRITE_ZEROES, _) => Checked::WriteZeroes {
            fua,
            no_hole: header.flags & cmd_flag::NO_HOLE != 0,
        },
        _ => Checked::AtOnce,
    })
}

//! Numbers of the NBD protocol, under the names of its document without the `NBD_` prefix.

/// `NBDMAGIC`, first 8 bytes of a server's greeting.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: second 8 bytes of the greeting, first 8 of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First 8 bytes of every answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First 4 bytes of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First 4 bytes of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First 4 bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First 4 bytes of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First 4 bytes of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Longest string in any message, in bytes.
pub const STRING_BYTES_MAX: usize = 4096;
/// Zero bytes after the answer to EXPORT_NAME, unless [`FLAG_NO_ZEROES`] was agreed.
pub const EXPORT_NAME_PADDING: usize = 124;

/// Handshake flag of the server, and its echo by the client: fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag of the server, and its echo by the client: no padding after EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Transmission flags of an export.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is known.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is known.
    pub const SEND_FUA: u16 = 1 << 3;
    /// The medium rotates.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// TRIM is known.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is known.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The DF flag of READ is known. Only with structured replies.
    pub const SEND_DF: u16 = 1 << 7;
    /// What is flushed on one connection is durable for all, what is answered on one is read on all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is known.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The FAST_ZERO flag of WRITE_ZEROES is known.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Option types.
pub mod opt {
    /// Choose an export and enter transmission; cannot report an error.
    pub const EXPORT_NAME: u32 = 1;
    /// End the handshake.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Upgrade to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and enter transmission.
    pub const GO: u32 = 7;
    /// Agree on structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name the metadata contexts of an export.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts of an export.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Agree on extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of answers to options.
pub mod rep {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// An item of information on an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every type that reports an error.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// The option is unknown.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// Forbidden by the server's configuration.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// Malformed.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// STARTTLS first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// The server is going down.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The option's data is too large.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
    /// Extended headers have been agreed, so this makes no sense any more.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT | 10;
}

/// Types of information on an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Commands.
pub mod cmd {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; a payload follows.
    pub const WRITE: u16 = 1;
    /// Disconnect.
    pub const DISC: u16 = 2;
    /// Make what was answered durable.
    pub const FLUSH: u16 = 3;
    /// The range is not needed any more.
    pub const TRIM: u16 = 4;
    /// The range will be read soon.
    pub const CACHE: u16 = 5;
    /// The range shall read as zero.
    pub const WRITE_ZEROES: u16 = 6;
    /// What is allocated.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod cmd_flag {
    /// Answer when durable.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES keeps the space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ is answered in one chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS wants one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES fails rather than being slow.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length is that of a payload. Only with extended headers.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Set in the last chunk of a reply.
pub const REPLY_FLAG_DONE: u16 = 1 << 0;

/// Types of reply chunks.
pub mod chunk {
    /// Nothing; the end.
    pub const NONE: u16 = 0;
    /// Data at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of one context, 32 bits each.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents of one context, 64 bits each; only with extended headers.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// An error with a text.
    pub const ERROR: u16 = 1 << 15 | 1;
}

/// In `base:allocation`: not allocated.
pub const STATE_HOLE: u32 = 1 << 0;
/// In `base:allocation`: reads as zero.
pub const STATE_ZERO: u32 = 1 << 1;
/// In the dirty context: may differ from what every replica has.
pub const STATE_DIRTY: u32 = 1 << 0;

/// The metadata context every client knows.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
/// Our metadata context for what may differ from what every replica has.
pub const CONTEXT_DIRTY: &str = "afterimage:dirty";

/// The only errors that go on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// EPERM: a write to a read-only export.
    Permission = 1,
    /// EIO.
    Io = 5,
    /// ENOMEM.
    NoMemory = 12,
    /// EINVAL.
    Invalid = 22,
    /// ENOSPC: also a write beyond the end.
    NoSpace = 28,
    /// EOVERFLOW.
    Overflow = 75,
    /// ENOTSUP.
    NotSupported = 95,
    /// ESHUTDOWN.
    ShuttingDown = 108,
}

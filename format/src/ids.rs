//! Identifiers shared by every format: groups, disks, logs, epochs, log sequence numbers.

use std::fmt;
use uuid::Uuid;

/// Bytes in a block: the unit of the log, the index and the image.
pub const BLOCK_SIZE: usize = 4096;

/// [`BLOCK_SIZE`] as a power of two.
pub const BLOCK_SHIFT: u32 = 12;

const _: () = assert!(1 << BLOCK_SHIFT == BLOCK_SIZE);

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        pub struct $name(pub Uuid);

        impl $name {
            /// The identifier from its 16 bytes, in RFC 4122 order.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }

            /// The 16 bytes, in RFC 4122 order.
            #[must_use]
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0.into_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }
    };
}

uuid_id! {
    /// Identity of a group: the disks that must be consistent with each other.
    GroupId
}
uuid_id! {
    /// Identity of one disk of a group.
    DiskId
}
uuid_id! {
    /// Identity of one log file. A new log has a new identity even for the same group.
    LogId
}

uuid_id! {
    /// A repository: a folder or bucket of groups. Given when the first object is stored there.
    RepositoryId
}

uuid_id! {
    /// One boot of a machine, as the kernel names it (`/proc/sys/kernel/random/boot_id`). Shared
    /// memory and CLOCK_BOOTTIME mean nothing beyond it.
    BootId
}
/// Log sequence number: +1 for each record of a group. 0 stands before the first record.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, serde::Serialize, serde::Deserialize,
)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Before the first record of any log.
    pub const ZERO: Self = Self(0);
    /// The highest that is taken from anybody: the one after it has a number, too.
    pub const MAX: Self = Self(u64::MAX - 1);

    /// The LSN of the record after this one, which is at most [`Lsn::MAX`].
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lsn({})", self.0)
    }
}

/// Number of a reign. 0 stands for "not yet assigned by a replica".
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Default,
    Debug,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The highest: keys of a repository hold ten digits, and their order is that of the epochs.
    pub const MAX: Self = Self(9_999_999_999);

    /// The epoch after this one, if there can be one.
    #[must_use]
    pub const fn next(self) -> Option<Self> {
        if self.0 < Self::MAX.0 {
            Some(Self(self.0 + 1))
        } else {
            None
        }
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Position of a disk in its group's disk table. Stable for the life of a log.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Default,
    Debug,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct DiskIndex(pub u16);

/// Most disks that one group can have.
pub const DISKS_MAX: usize = 64;

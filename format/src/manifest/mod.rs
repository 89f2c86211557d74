//! Small objects of a repository: its identity, manifests, name bindings, epoch terminators, check
//! results.
//!
//! Each is written once under a key that did not exist before. All share one envelope
//! (`docs/format.md`, "Repository objects"): magic 8, version 2, reserved 2, total length 4, body,
//! CRC32C 4 over everything before it.

pub(crate) mod envelope;
mod manifest_v1;
mod objects;

pub use envelope::ObjectError;
pub(crate) use manifest_v1::decode_disks;
pub use manifest_v1::{DiskEntry, EPOCHS_MAX, EpochEntry, MANIFEST_BYTES_MAX, Manifest};
pub use objects::{
    CHECK_RESULT_BYTES_MAX, COMPARISON_RESULT_BYTES_MAX, CheckResult, ComparisonResult,
    NAME_BINDING_BYTES_MAX, NameBinding, REPOSITORY_IDENTITY_BYTES_MAX, RepositoryIdentity,
    TERMINATOR_BYTES_MAX, Terminator, is_terminator,
};

/// Longest name of a peer (the SAN of its certificate), in bytes.
pub const PEER_NAME_BYTES_MAX: usize = 253;

#[cfg(test)]
mod tests;

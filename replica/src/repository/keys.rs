//! Keys of a repository, and nothing else builds one.
//!
//! ```text
//! afterimage-repository                       version of these keys
//! identity                                    which repository this is
//! names/NAME                                  binding of a group's name to UUID and certificate
//! groups/UUID/manifests/00000000000000000001  numbered manifests
//! groups/UUID/segments/0000000001/00000000000000000001
//!                                             epoch / dense sequence: segment or terminator
//! groups/UUID/layers/0000000001/FIRST-LAST    head of the layer of these segments
//! groups/UUID/layers/0000000001/FIRST-LAST.0000000000
//!                                             its files of pages
//! groups/UUID/checks/00000000000000000001     results of checks
//! groups/UUID/comparisons/00000000000000000001
//!                                             results of comparisons with the primary's disks
//! groups/UUID/conflicts/…                     refused content with an identity that was taken
//! ```

use afterimage_format::ids::{Epoch, GroupId};
use afterimage_format::names::{self, NameError};

use super::RepositoryError;
use crate::index::LayerRange;

/// Marker of a repository: version of the key scheme.
pub const MARKER: &str = "afterimage-repository";

/// Key of the repository's identity.
pub const IDENTITY: &str = "identity";

/// Folder of the name bindings.
pub const NAMES: &str = "names";

/// Folder of the groups.
pub const GROUPS: &str = "groups";

/// First number of manifests and of an epoch's segments.
pub const FIRST: u64 = 1;

/// Key of the binding of a group's name.
///
/// # Errors
/// The name may not reach a key.
pub fn name(group: &str) -> Result<String, NameError> {
    names::validate(group)?;
    Ok(format!("{NAMES}/{group}"))
}

/// Folder of everything of a group.
#[must_use]
pub fn group(group: GroupId) -> String {
    format!("{GROUPS}/{group}")
}

/// Key of a manifest.
#[must_use]
pub fn manifest(group: GroupId, number: u64) -> String {
    format!("{GROUPS}/{group}/manifests/{number:020}")
}

/// Key of a segment, or of the terminator that ends its epoch.
#[must_use]
pub fn segment(group: GroupId, epoch: Epoch, sequence: u64) -> String {
    format!("{GROUPS}/{group}/segments/{:010}/{sequence:020}", epoch.0)
}

/// Folder of the layers of an epoch.
#[must_use]
pub fn layers(group: GroupId, epoch: Epoch) -> String {
    format!("{GROUPS}/{group}/layers/{:010}", epoch.0)
}

/// Key of the head of the layer that covers these segments.
#[must_use]
pub fn layer(group: GroupId, epoch: Epoch, range: LayerRange) -> String {
    let LayerRange { first, last } = range;
    format!("{}/{first:020}-{last:020}", layers(group, epoch))
}

/// Key of a file of pages of that layer.
#[must_use]
pub fn layer_file(group: GroupId, epoch: Epoch, range: LayerRange, number: u32) -> String {
    format!("{}.{number:010}", layer(group, epoch, range))
}

/// Key for content that was refused because its identity is taken by other content.
#[must_use]
pub fn conflict(group: GroupId, epoch: Epoch, content: &blake3::Hash) -> String {
    format!(
        "{GROUPS}/{group}/conflicts/{:010}-{}",
        epoch.0,
        content.to_hex()
    )
}

/// Folder of the results of a group's checks.
#[must_use]
pub fn checks(group: GroupId) -> String {
    format!("{GROUPS}/{group}/checks")
}

/// Key of the result of a check.
#[must_use]
pub fn check_result(group: GroupId, number: u64) -> String {
    format!("{GROUPS}/{group}/checks/{number:020}")
}

/// Folder of the results of a group's comparisons.
#[must_use]
pub fn comparisons(group: GroupId) -> String {
    format!("{GROUPS}/{group}/comparisons")
}

/// Key of the result of a comparison.
#[must_use]
pub fn comparison_result(group: GroupId, number: u64) -> String {
    format!("{GROUPS}/{group}/comparisons/{number:020}")
}

/// Checks that a key is made of plain parts only: whatever reaches the store passes here.
///
/// # Errors
/// [`RepositoryError::BadKey`].
pub(super) fn check(key: &str) -> Result<(), RepositoryError> {
    if key
        .split('/')
        .all(|part| part.len() <= 128 && is_plain(part))
    {
        return Ok(());
    }
    Err(RepositoryError::BadKey {
        key: key.to_owned(),
    })
}

fn is_plain(part: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !part.is_empty() && !part.starts_with(['.', '-']) && part.bytes().all(allowed)
}

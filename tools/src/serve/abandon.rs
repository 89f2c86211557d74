//! The markers of `on_log_error = "detach"`: every claim of a group says, durably, that its log must
//! never be replayed.
//!
//! Blocking. Beside the storage, which holds the claims open and locked: writes and syncs of this
//! thread end before the process gives up those locks. May end after any of the claims, killed or by
//! an error, and be done again; what a start makes of that stands in
//! `afterimage_proxy::engine::recovery::abandoned`.

use afterimage_format::claim::{Claim, ClaimState};
use afterimage_format::ids::BLOCK_SIZE;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// Makes every claim say, durably, that the disk goes on without its log.
///
/// # Errors
/// A claim cannot be read, written or synced; those before it may say so already.
pub(super) fn abandon_claims(paths: &[PathBuf]) -> io::Result<()> {
    paths.iter().try_for_each(|path| abandon(path))
}

fn abandon(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut &file, &mut bytes)?;
    let mut claim = Claim::decode_file(&bytes).map_err(io::Error::other)?;
    // That it can be read does not make it durable (an attempt before this one may have failed at
    // the sync), and the copy before it is overwritten next.
    store(&file, &claim)?;
    if claim.state != ClaimState::Abandoned {
        claim.generation += 1;
        claim.state = ClaimState::Abandoned;
        claim.next_log = None;
        store(&file, &claim)?;
    }
    Ok(())
}

fn store(file: &File, claim: &Claim) -> io::Result<()> {
    let offset = claim.generation % 2 * BLOCK_SIZE as u64;
    file.write_all_at(&claim.encode(), offset)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_format::claim::CLAIM_FILE_BYTES;
    use afterimage_format::ids::{DiskId, DiskIndex, GroupId, LogId};

    fn attached(path: &Path, generation: u64) -> Claim {
        let claim = Claim {
            group: GroupId::from_bytes([1; 16]),
            disk: DiskId::from_bytes([2; 16]),
            disk_index: DiskIndex(0),
            log: LogId::from_bytes([3; 16]),
            next_log: None,
            generation,
            state: ClaimState::Attached,
            log_path: b"/log".to_vec(),
        };
        let file = File::create(path).expect("a file");
        file.set_len(CLAIM_FILE_BYTES as u64).expect("long enough");
        store(&file, &claim).expect("stored");
        claim
    }

    fn read(path: &Path) -> Claim {
        Claim::decode_file(&std::fs::read(path).expect("read")).expect("valid")
    }

    #[test]
    fn an_attempt_that_broke_off_is_made_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let paths = [folder.path().join("a"), folder.path().join("b")];
        let before = attached(&paths[0], 7);
        abandon_claims(&paths).expect_err("the second is missing");
        let expected = Claim {
            generation: 8,
            state: ClaimState::Abandoned,
            ..before
        };
        assert_eq!(read(&paths[0]), expected);
        attached(&paths[1], 4);
        abandon_claims(&paths).expect("both");
        assert_eq!(read(&paths[0]), expected, "not again");
        assert_eq!(read(&paths[1]).state, ClaimState::Abandoned);
        assert_eq!(read(&paths[1]).generation, 5);
    }
}

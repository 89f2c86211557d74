//! The parts of the quickstart's story that touch data: hashing, encrypting, comparing.

use anyhow::{Context as _, ensure};
use std::path::Path;

use super::disk::{BLOCK, Placed, next_random};
use super::nbd::Client;

/// Most bytes of one request.
const RUN_BYTES_MAX: usize = 256 << 10;

/// Hashes of files, in order.
pub(super) type Hashes = Vec<blake3::Hash>;

/// Runs of neighbouring blocks, so that a file is read in few requests.
fn runs(blocks: &[u64]) -> impl Iterator<Item = (u64, usize)> {
    let mut rest = blocks;
    std::iter::from_fn(move || {
        let first = *rest.first()?;
        let follows = |(n, block): (usize, &u64)| *block == first + n as u64;
        let count = rest.iter().enumerate().take(RUN_BYTES_MAX / BLOCK);
        let count = count.take_while(|&at| follows(at)).count();
        rest = &rest[count..];
        Some((first, count))
    })
}

/// Reads every file through NBD and hashes it; `progress` hears of each run's bytes.
///
/// # Errors
/// When something cannot be read.
pub(super) fn hash_files(
    socket: &Path,
    export: &str,
    files: &[Placed],
    mut progress: impl FnMut(u64),
) -> anyhow::Result<Hashes> {
    let mut client = Client::connect(socket, export)
        .with_context(|| format!("cannot open {export} at {}", socket.display()))?;
    let mut buffer = vec![0; RUN_BYTES_MAX];
    let mut hashes = Vec::with_capacity(files.len());
    let end = |file: &Placed| {
        file.blocks
            .iter()
            .max()
            .map_or(0, |last| (last + 1) * BLOCK as u64)
    };
    let needed = files.iter().map(end).max().unwrap_or(0);
    ensure!(
        client.size() >= needed,
        "{export} has {} bytes, at least {needed} were there",
        client.size()
    );
    for file in files {
        let mut hasher = blake3::Hasher::new();
        for (first, count) in runs(&file.blocks) {
            let part = &mut buffer[..count * BLOCK];
            client
                .read(first * BLOCK as u64, part)
                .with_context(|| format!("cannot read {} of {export}", file.name))?;
            hasher.update(part);
            progress(part.len() as u64);
        }
        hashes.push(hasher.finalize());
    }
    Ok(hashes)
}

/// What ransomware does: reads every file, writes it back unreadable. Returns the number of writes.
///
/// # Errors
/// When something cannot be read or written.
pub(super) fn encrypt_files(
    socket: &Path,
    export: &str,
    files: &[Placed],
    mut progress: impl FnMut(u64),
) -> anyhow::Result<u64> {
    let mut client = Client::connect(socket, export)?;
    let mut buffer = vec![0; RUN_BYTES_MAX];
    let mut key = 0x00c0_ffee;
    let mut writes = 0;
    for file in files {
        for (first, count) in runs(&file.blocks) {
            let part = &mut buffer[..count * BLOCK];
            let offset = first * BLOCK as u64;
            client.read(offset, part)?;
            for word in part.chunks_exact_mut(8) {
                key = next_random(key);
                for (byte, pad) in word.iter_mut().zip(key.to_le_bytes()) {
                    *byte ^= pad;
                }
            }
            client.write(offset, part)?;
            writes += 1;
            progress(part.len() as u64);
        }
    }
    client.flush()?;
    Ok(writes)
}

/// Bytes of all files together.
#[must_use]
pub(super) fn total_bytes(files: &[Placed]) -> u64 {
    files
        .iter()
        .map(|file| (file.blocks.len() * BLOCK) as u64)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_read_together() {
        let found: Vec<_> = runs(&[5, 6, 7, 9, 8, 20]).collect();
        assert_eq!(found, [(5, 3), (9, 1), (8, 1), (20, 1)]);
        let long: Vec<u64> = (0..200).collect();
        assert_eq!(runs(&long).map(|(_, count)| count).sum::<usize>(), 200);
        assert_eq!(runs(&long).next(), Some((0, 64)));
    }
}

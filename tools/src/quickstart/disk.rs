//! The disk of the quickstart: a small file system with files whose place on the disk is known.
//!
//! Nothing is mounted and no root is needed. Where a file lies is found by its content: each block
//! of each file is unique, so the blocks of the finished image tell which file they belong to.
//! With a disk of the user's, its blocks that hold data take the place of files, and blocks of
//! zeroes the place of the application's own file.

use anyhow::{Context as _, bail};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::fat;

/// Bytes of a block.
pub(super) const BLOCK: usize = 4096;
/// Size of the disk that the quickstart makes.
const DISK_BYTES: u64 = 256 << 20;
/// Size of the file that the application keeps writing to.
const LIVE_BYTES: usize = 32 << 20;
/// Most blocks of a user's disk that the application writes to.
const LIVE_BLOCKS_MAX: usize = LIVE_BYTES / BLOCK;
/// Bytes of a user's disk that count as one file.
const PIECE_BYTES: usize = 4 << 20;
/// Most data of a user's disk that is encrypted and compared, beside what the application writes.
const FILES_BYTES_MAX: u64 = 512 << 20;
/// The file that the application writes.
const LIVE_NAME: &str = "app/orders.db";

/// A file: its name and its blocks on the disk, in order.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    /// Name within the file system.
    pub(super) name: String,
    /// Block numbers.
    pub(super) blocks: Vec<u64>,
}

/// A disk and what is on it.
#[derive(Debug)]
pub(super) struct Disk {
    /// The raw image.
    pub(super) path: PathBuf,
    /// Its size.
    pub(super) bytes: u64,
    /// What it is, for people.
    pub(super) what: String,
    /// All files. The application writes to the last one until the attack, to the others nobody.
    pub(super) files: Vec<Placed>,
    /// Bytes of data beside these files, which nobody touches.
    pub(super) left_out: u64,
}

impl Disk {
    /// Blocks that the application keeps writing to.
    #[must_use]
    pub(super) fn live(&self) -> &[u64] {
        self.files.last().map_or(&[], |file| &file.blocks)
    }
}

/// A file to be put on the disk.
pub(super) struct Content {
    /// Path without a leading slash.
    pub(super) name: String,
    /// Whole blocks, each unique.
    pub(super) data: Vec<u8>,
}

/// Makes a disk with a file system in `folder`.
///
/// # Errors
/// When a file cannot be written.
pub(super) fn make(folder: &Path) -> anyhow::Result<Disk> {
    let path = folder.join("vm1.raw");
    let contents = contents();
    let what = match ext4(folder, &path, &contents)? {
        true => "ext4, made by mke2fs",
        false => {
            fat::write(&path, &contents).context("cannot write the file system")?;
            "FAT16, since mke2fs is not installed"
        }
    };
    let placed = locate(&path, &contents)?;
    Ok(Disk {
        bytes: fs::metadata(&path)?.len(),
        path,
        what: format!("{} files on {what}", placed.len()),
        files: placed,
        left_out: 0,
    })
}

/// Uses a copy of a user's disk.
///
/// # Errors
/// When it cannot be copied or has no use for the quickstart.
pub(super) fn copy(from: &Path, folder: &Path) -> anyhow::Result<Disk> {
    copy_up_to(from, folder, FILES_BYTES_MAX)
}

fn copy_up_to(from: &Path, folder: &Path, files_bytes_max: u64) -> anyhow::Result<Disk> {
    let path = folder.join("vm1.raw");
    let mut head = [0; 4];
    let mut source = File::open(from).with_context(|| format!("cannot open {}", from.display()))?;
    source
        .read_exact(&mut head)
        .with_context(|| format!("{} is too small", from.display()))?;
    if head == *b"QFI\xfb" {
        bail!(
            "{} is a qcow2 image; make it raw first: qemu-img convert -O raw {} disk.raw",
            from.display(),
            from.display()
        );
    }
    // Sparse and, where the file system can, without copying data.
    let copied = Command::new("cp")
        .args(["--sparse=always", "--reflink=auto", "--"])
        .arg(from)
        .arg(&path)
        .status();
    if !copied.is_ok_and(|status| status.success()) {
        bail!("cannot copy {} to {}", from.display(), folder.display());
    }
    let mut files = Vec::new();
    let mut live = Vec::new();
    let (mut counted, mut left_out) = (0, 0);
    each_block(&path, |block, data| {
        if data.iter().all(|byte| *byte == 0) {
            if live.len() < LIVE_BLOCKS_MAX {
                live.push(block);
            }
        } else if counted < files_bytes_max {
            let name = format!("piece-{:05}", block as usize * BLOCK / PIECE_BYTES);
            match files.last_mut() {
                Some(Placed { name: last, blocks }) if *last == name => blocks.push(block),
                _ => files.push(Placed {
                    name,
                    blocks: vec![block],
                }),
            }
            counted += BLOCK as u64;
        } else {
            left_out += BLOCK as u64;
        }
    })?;
    if files.is_empty() || live.is_empty() {
        bail!(
            "{} needs both data and some blocks of zeroes for the quickstart to write to",
            from.display()
        );
    }
    files.push(Placed {
        name: LIVE_NAME.to_owned(),
        blocks: live,
    });
    Ok(Disk {
        bytes: fs::metadata(&path)?.len(),
        path,
        what: format!("a copy of {}", from.display()),
        files,
        left_out,
    })
}

/// Some office, some logs, some photographs; the application's file last.
fn contents() -> Vec<Content> {
    let mut contents = Vec::new();
    let mut add = |name: String, bytes: usize, dense: bool| {
        contents.push(Content {
            data: unique_blocks(&name, bytes / BLOCK, dense),
            name,
        });
    };
    for n in 1..=24 {
        add(
            format!("offers/offer{n:02}.txt"),
            (64 + n * 16) << 10,
            false,
        );
    }
    for n in 1..=12 {
        add(format!("logs/day{n:02}.log"), (512 + n * 32) << 10, false);
    }
    for n in 1..=12 {
        add(format!("photos/img{n:02}.jpg"), 2 << 20, true);
    }
    add(LIVE_NAME.to_owned(), LIVE_BYTES, false);
    contents
}

/// Blocks of which no two are equal: text, or bytes that do not compress.
fn unique_blocks(name: &str, blocks: usize, dense: bool) -> Vec<u8> {
    let mut data = Vec::with_capacity(blocks * BLOCK);
    for number in 0..blocks {
        let mut block = format!("{name} block {number}\n").into_bytes();
        let mut state = name.bytes().fold(number as u64 + 1, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        while block.len() < BLOCK {
            state = next_random(state);
            if dense {
                block.extend_from_slice(&state.to_le_bytes());
            } else {
                let line = format!(
                    "{:08} order {} of customer {}\n",
                    state % 97,
                    state % 9973,
                    state % 89
                );
                block.extend_from_slice(line.as_bytes());
            }
        }
        data.extend_from_slice(&block[..BLOCK]);
    }
    data
}

/// xorshift64*: good enough to be incompressible.
pub(super) fn next_random(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1
}

/// An ext4 file system by mke2fs; false when there is no mke2fs.
fn ext4(folder: &Path, path: &Path, contents: &[Content]) -> anyhow::Result<bool> {
    let found = ["mke2fs", "/sbin/mke2fs", "/usr/sbin/mke2fs"]
        .into_iter()
        .find(|name| {
            let version = Command::new(name)
                .arg("-V")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            version.is_ok_and(|status| status.success())
        });
    let Some(mke2fs) = found else {
        return Ok(false);
    };
    let tree = folder.join("tree");
    for Content { name, data } in contents {
        let file = tree.join(name);
        fs::create_dir_all(file.parent().unwrap_or(&tree))?;
        fs::write(&file, data)?;
    }
    File::create(path)?.set_len(DISK_BYTES)?;
    let made = Command::new(mke2fs)
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-L", "vm1", "-d"])
        .arg(&tree)
        .arg(path)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .context("cannot run mke2fs")?;
    fs::remove_dir_all(&tree)?;
    if !made.status.success() {
        bail!(
            "mke2fs failed: {}",
            String::from_utf8_lossy(&made.stderr).trim()
        );
    }
    Ok(true)
}

/// Finds the blocks of the files on the disk.
fn locate(path: &Path, contents: &[Content]) -> anyhow::Result<Vec<Placed>> {
    let mut wanted: HashMap<&[u8], (usize, usize)> = HashMap::new();
    let mut placed: Vec<Placed> = Vec::new();
    for (file, Content { name, data }) in contents.iter().enumerate() {
        for (number, block) in data.chunks_exact(BLOCK).enumerate() {
            wanted.insert(block, (file, number));
        }
        placed.push(Placed {
            name: name.clone(),
            blocks: vec![u64::MAX; data.len() / BLOCK],
        });
    }
    each_block(path, |block, data| {
        if let Some(&(file, number)) = wanted.get(data) {
            placed[file].blocks[number] = block;
        }
    })?;
    match placed.iter().find(|p| p.blocks.contains(&u64::MAX)) {
        Some(missing) => bail!("{} is not whole on the disk", missing.name),
        None => Ok(placed),
    }
}

/// Calls `each` for every whole block of a file.
fn each_block(path: &Path, mut each: impl FnMut(u64, &[u8])) -> anyhow::Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let mut block = 0;
    let size = file.metadata()?.len();
    while (block * BLOCK as u64) < size {
        let rest = size - block * BLOCK as u64;
        let part = &mut buffer[..rest.min(1 << 20) as usize];
        file.read_exact(part)?;
        for data in part.chunks_exact(BLOCK) {
            each(block, data);
            block += 1;
        }
        if !part.len().is_multiple_of(BLOCK) {
            break;
        }
    }
    Ok(())
}

/// Writes the same blocks everywhere: used where a file system is laid out by hand.
pub(super) fn write_at(file: &File, offset: u64, data: &[u8]) -> std::io::Result<()> {
    file.write_all_at(data, offset)
}

/// Writes a new file with these bytes.
///
/// # Errors
/// When it cannot be written.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    File::create_new(path)?.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_where_they_lie() {
        let folder = tempfile::tempdir().expect("folder");
        let disk = make(folder.path()).expect("made");
        assert_eq!(disk.live().len(), LIVE_BYTES / BLOCK);
        assert_eq!(disk.files.len(), contents().len(), "all of them");
        let image = fs::read(&disk.path).expect("image");
        let first = &disk.files[0];
        let at = first.blocks[0] as usize * BLOCK;
        let start = format!("{} block 0\n", first.name);
        assert!(image[at..].starts_with(start.as_bytes()));
    }

    #[test]
    fn a_disk_of_the_user_is_cut_into_pieces() {
        let folder = tempfile::tempdir().expect("folder");
        let given = folder.path().join("given.raw");
        let mut bytes = vec![0; 64 * BLOCK + 512];
        bytes[5 * BLOCK] = 1;
        bytes[6 * BLOCK] = 1;
        fs::write(&given, &bytes).expect("write");
        let disk = copy(&given, folder.path()).expect("copied");
        assert_eq!(disk.files.len(), 2);
        assert_eq!(disk.files[0].blocks, [5, 6]);
        assert_eq!((disk.live().len(), disk.left_out), (62, 0));
        let disk = copy_up_to(&given, folder.path(), BLOCK as u64).expect("copied");
        assert_eq!(disk.files[0].blocks, [5]);
        assert_eq!((disk.live().len(), disk.left_out), (62, BLOCK as u64));
        fs::write(&given, b"QFI\xfb and so on").expect("write");
        let refused = copy(&given, folder.path()).expect_err("qcow2");
        assert!(refused.to_string().contains("qemu-img convert"));
    }
}

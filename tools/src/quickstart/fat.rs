//! A FAT16 file system with some files, for machines without mke2fs.
//!
//! Just enough to be mounted anywhere: 8.3 names, one level of folders, clusters of 4096 bytes
//! that begin at multiples of 4096.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;

use super::disk::{BLOCK, Content, write_at};

const SECTOR: usize = 512;
/// One reserved block: the boot sector and seven more.
const RESERVED: usize = BLOCK / SECTOR;
const CLUSTERS: usize = 40_000;
const FAT_SECTORS: usize = ((CLUSTERS + 2) * 2).next_multiple_of(BLOCK) / SECTOR;
const ROOT_ENTRIES: usize = 512;
const ROOT_BYTES: usize = ROOT_ENTRIES * 32;
const DATA_START: usize = (RESERVED + 2 * FAT_SECTORS) * SECTOR + ROOT_BYTES;
const SECTORS: usize = DATA_START / SECTOR + CLUSTERS * (BLOCK / SECTOR);
const END_OF_CHAIN: u16 = 0xffff;
const FOLDER: u8 = 0x10;
const FILE: u8 = 0x20;

const _: () = assert!(DATA_START.is_multiple_of(BLOCK));

struct Image {
    file: File,
    table: Vec<u16>,
}

/// Writes the file system to a new file.
pub(super) fn write(path: &Path, contents: &[Content]) -> io::Result<()> {
    let file = File::create(path)?;
    file.set_len((SECTORS * SECTOR) as u64)?;
    write_at(&file, 0, &boot_sector())?;
    let mut image = Image {
        file,
        table: vec![0xfff8, END_OF_CHAIN],
    };
    let mut folders: BTreeMap<&str, Vec<u8>> = BTreeMap::new();
    for Content { name, data } in contents {
        let (folder, name) = name.split_once('/').unwrap_or(("misc", name));
        let first = image.store(data)?;
        let entry = entry(name, FILE, first, data.len() as u32);
        folders.entry(folder).or_default().extend_from_slice(&entry);
    }
    let mut root = Vec::new();
    for (name, entries) in folders {
        let own = image.table.len() as u16;
        let mut data = entry_named(b".          ", FOLDER, own, 0).to_vec();
        data.extend_from_slice(&entry_named(b"..         ", FOLDER, 0, 0));
        data.extend_from_slice(&entries);
        let first = image.store(&data)?;
        root.extend_from_slice(&entry(name, FOLDER, first, 0));
    }
    let mut table: Vec<u8> = image
        .table
        .iter()
        .flat_map(|next| next.to_le_bytes())
        .collect();
    table.resize(FAT_SECTORS * SECTOR, 0);
    for copy in 0..2 {
        let at = (RESERVED + copy * FAT_SECTORS) * SECTOR;
        write_at(&image.file, at as u64, &table)?;
    }
    let root_at = (RESERVED + 2 * FAT_SECTORS) * SECTOR;
    write_at(&image.file, root_at as u64, &root)
}

impl Image {
    /// Stores data in clusters that follow each other; returns the first.
    fn store(&mut self, data: &[u8]) -> io::Result<u16> {
        let first = self.table.len();
        let count = data.len().div_ceil(BLOCK).max(1);
        if first + count > CLUSTERS {
            return Err(io::ErrorKind::StorageFull.into());
        }
        write_at(&self.file, (DATA_START + (first - 2) * BLOCK) as u64, data)?;
        for next in first + 1..first + count {
            self.table.push(next as u16);
        }
        self.table.push(END_OF_CHAIN);
        Ok(first as u16)
    }
}

fn boot_sector() -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xeb, 0x3c, 0x90]);
    put(3, b"AFTERIMG");
    put(11, &(SECTOR as u16).to_le_bytes());
    put(13, &[(BLOCK / SECTOR) as u8]);
    put(14, &(RESERVED as u16).to_le_bytes());
    put(16, &[2]);
    put(17, &(ROOT_ENTRIES as u16).to_le_bytes());
    put(21, &[0xf8]);
    put(22, &(FAT_SECTORS as u16).to_le_bytes());
    put(24, &32u16.to_le_bytes());
    put(26, &2u16.to_le_bytes());
    put(32, &(SECTORS as u32).to_le_bytes());
    put(36, &[0x80, 0, 0x29, 1, 0, 0, 0]);
    put(43, b"VM1        FAT16   ");
    put(510, &[0x55, 0xaa]);
    sector
}

/// A directory entry for a name of at most 8 and 3 characters.
fn entry(name: &str, attributes: u8, first: u16, len: u32) -> [u8; 32] {
    let (base, extension) = name.split_once('.').unwrap_or((name, ""));
    let mut short = [b' '; 11];
    for (slot, byte) in short[..8].iter_mut().zip(base.bytes()) {
        *slot = byte.to_ascii_uppercase();
    }
    for (slot, byte) in short[8..].iter_mut().zip(extension.bytes()) {
        *slot = byte.to_ascii_uppercase();
    }
    entry_named(&short, attributes, first, len)
}

fn entry_named(short: &[u8; 11], attributes: u8, first: u16, len: u32) -> [u8; 32] {
    let mut entry = [0; 32];
    entry[..11].copy_from_slice(short);
    entry[11] = attributes;
    // 1980-01-01, the first day that FAT knows.
    entry[24..26].copy_from_slice(&0x21u16.to_le_bytes());
    entry[26..28].copy_from_slice(&first.to_le_bytes());
    entry[28..].copy_from_slice(&len.to_le_bytes());
    entry
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_checker_finds_nothing_wrong() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("fat.raw");
        let contents = [
            Content {
                name: "logs/a.log".into(),
                data: vec![1; 3 * BLOCK],
            },
            Content {
                name: "app/b.db".into(),
                data: vec![2; BLOCK],
            },
        ];
        write(&path, &contents).expect("written");
        let image = std::fs::read(&path).expect("image");
        assert_eq!(image.len(), SECTORS * SECTOR);
        assert_eq!(image[DATA_START..DATA_START + 3 * BLOCK], [1; 3 * BLOCK]);
        match Command::new("fsck.fat").arg("-n").arg(&path).output() {
            Ok(output) => assert!(output.status.success(), "{output:?}"),
            Err(_) => eprintln!("fsck.fat is not installed: layout compared by hand only"),
        }
    }
}

//! Makes a history of any length in a repository, and measures what opening it takes.
//!
//!     history write FOLDER RECORDS DISK_BYTES    writes of 4 KiB all over the disk
//!     history open FOLDER                        prints one JSON object
//!
//! The payloads are all alike, so that 10^8 records fit a disk: what is measured is the index.

use std::sync::Arc;
use std::time::Instant;

use afterimage_benches::payload::{Numbers, half_compressible};
use afterimage_benches::primary::{GROUP, Primary, SEGMENT_WRITES, give};
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_replica::group::Group;
use afterimage_replica::history::Position;
use afterimage_replica::image::{ChunkCache, Image};
use afterimage_replica::receive::Receiver;
use afterimage_replica::repository::Repository;
use anyhow::{Context, bail};

const READS: u64 = 1000;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().build()?;
    match arguments[..] {
        ["write", folder, records, disk_bytes] => {
            let (records, disk_bytes) = (records.parse()?, disk_bytes.parse()?);
            runtime.block_on(write(folder, records, disk_bytes))
        }
        ["open", folder] => runtime.block_on(open(folder)),
        _ => bail!("give: history write FOLDER RECORDS DISK_BYTES, or history open FOLDER"),
    }
}

async fn write(folder: &str, records: usize, disk_bytes: u64) -> anyhow::Result<()> {
    let mut primary = Primary::new(disk_bytes);
    let receiver = Receiver::new(Repository::open(&format!("file://{folder}")).await?);
    let mut session = primary.connect(&receiver).await?;
    let mut numbers = Numbers::new(1);
    let payload = half_compressible(&mut numbers);
    let blocks = primary.blocks();
    let mut left = records;
    while left > 0 {
        let count = left.min(SEGMENT_WRITES);
        let places: Vec<u64> = (0..count).map(|_| numbers.below(blocks)).collect();
        let bytes = primary.segment(places.iter().map(|block| (*block, &payload[..])))?;
        give(&mut session, bytes, 1).await?;
        left -= count;
    }
    Ok(())
}

async fn open(folder: &str) -> anyhow::Result<()> {
    let repository = Repository::open_existing(&format!("file://{folder}")).await?;
    let resident_before = resident_bytes("VmRSS")?;
    let start = Instant::now();
    let group = Arc::new(Group::find(&repository, GROUP).await?);
    let load = start.elapsed();
    let resident = resident_bytes("VmRSS")?.saturating_sub(resident_before);
    let peak = resident_bytes("VmHWM")?.saturating_sub(resident_before);

    let at = {
        let history = group.history();
        let epoch = history.newest().context("the group has no epoch")?;
        Position {
            epoch: epoch.number,
            lsn: epoch.resume().cursor.lsn,
        }
    };
    let start = Instant::now();
    let image = Image::open(group, at, Arc::new(ChunkCache::new(64 << 20)))?;
    let image_open = start.elapsed();
    let blocks = image.size(DiskIndex(0))? / BLOCK_SIZE as u64;
    let mut numbers = Numbers::new(2);
    let start = Instant::now();
    for _ in 0..READS {
        image.pieces(DiskIndex(0), numbers.below(blocks), 1).await?;
    }
    let lookup = start.elapsed();
    println!(
        "{{\"records\": {}, \"load_ms\": {:.1}, \"resident_bytes\": {resident}, \
         \"peak_bytes\": {peak}, \"image_open_us\": {:.1}, \"lookup_us\": {:.2}}}",
        at.lsn.0 - Lsn(2).0,
        load.as_secs_f64() * 1e3,
        image_open.as_secs_f64() * 1e6,
        lookup.as_secs_f64() * 1e6 / READS as f64,
    );
    Ok(())
}

/// A line of /proc/self/status in bytes.
fn resident_bytes(line: &str) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let value = status.lines().find_map(|l| l.strip_prefix(line));
    let kib = value.and_then(|v| v.split_whitespace().nth(1));
    let kib: u64 = kib.context("/proc/self/status lacks the line")?.parse()?;
    Ok(kib * 1024)
}

//! `afterimage log inspect`: superblock and frames of a log, for people. Reads only, takes no lock.

use afterimage_format::ids::BLOCK_SIZE;
use afterimage_proxy::engine::log::inspect::{InspectedFrame, frames, superblocks};
use afterimage_proxy::io::file::{OpenOptions, StorageFile};
use anyhow::{Context as _, bail};
use serde::Serialize;
use std::path::PathBuf;

use super::segment_inspect::hex;
use crate::cli::output::{Output, bytes, local_time, table, table_text};
use crate::cli::values::GroupName;
use crate::config::{Config, ConfigError};

/// What a log says.
#[derive(Debug, Serialize)]
struct Inspected {
    /// The file.
    path: String,
    /// UUID of the group.
    group: String,
    /// UUID of the log.
    log: String,
    /// Epoch.
    epoch: u64,
    /// Incarnation.
    incarnation: u32,
    /// Whether it was closed cleanly.
    clean: bool,
    /// Generation of the superblock that counts.
    generation: u64,
    /// Copies of the superblock that cannot be used, and why.
    damaged_copies: Vec<String>,
    /// Size of the frame area.
    area_bytes: u64,
    /// LSN of the oldest frame.
    tail_lsn: u64,
    /// Everything up to here is in the disks.
    destaged_lsn: u64,
    /// Everything up to here was durable when the superblock was written.
    durable_lsn: u64,
    /// Size of each disk, by its place in the table.
    disks: Vec<u64>,
    /// Targets.
    sinks: Vec<Sink>,
    /// Frames, as many as were asked for.
    frames: Vec<Frame>,
    /// Where the log ends, if it was followed so far.
    end: Option<End>,
}

#[derive(Debug, Serialize)]
struct Sink {
    id: String,
    acked_lsn: u64,
    dirty_lsn: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Frame {
    number: u64,
    offset: u64,
    bytes: u64,
    first_lsn: u64,
    last_lsn: u64,
    wall_ns: u64,
    incarnation: u32,
    durable_lsn: u64,
    records: Vec<Record>,
}

#[derive(Debug, Serialize)]
struct Record {
    lsn: u64,
    op: String,
    disk: u16,
    first_block: u64,
    block_count: u32,
    wall_ns: u64,
}

#[derive(Debug, Serialize)]
struct End {
    last_lsn: u64,
    frames: u64,
    offset: u64,
    because: String,
    corrupt: bool,
}

/// Runs the command.
///
/// # Errors
/// When the log cannot be read, or neither of its superblocks is valid.
pub fn run(
    load: impl Fn() -> Result<Config, ConfigError>,
    log: &str,
    records: bool,
    limit: Option<usize>,
    output: Output,
) -> anyhow::Result<()> {
    let path = path_of(load, log)?;
    let mut file = StorageFile::open(&path, &OpenOptions::reader())?;
    let found = superblocks(&mut file)?;
    let superblock = found
        .current
        .with_context(|| format!("{} is not a usable log", path.display()))?;
    let mut shown: Vec<Frame> = Vec::new();
    let limit = limit.unwrap_or(usize::MAX);
    let end = frames(&mut file, &superblock, |found| {
        if shown.len() < limit {
            shown.push(frame(&found, records));
        }
        shown.len() < limit
    })?;
    let damaged = found.copies.iter().zip(["A", "B"]);
    let damaged =
        damaged.filter_map(|(copy, name)| Some(format!("{name}: {}", copy.as_ref().err()?)));
    let inspected = Inspected {
        path: path.display().to_string(),
        group: superblock.group.to_string(),
        log: superblock.log.to_string(),
        epoch: superblock.epoch.0,
        incarnation: superblock.incarnation,
        clean: superblock.clean,
        generation: superblock.generation,
        damaged_copies: damaged.collect(),
        area_bytes: superblock.area_blocks * BLOCK_SIZE as u64,
        tail_lsn: superblock.tail.lsn.0,
        destaged_lsn: superblock.destaged.0,
        durable_lsn: superblock.durable.0,
        disks: superblock.disks.iter().map(|disk| disk.size).collect(),
        sinks: superblock
            .sinks
            .iter()
            .map(|sink| Sink {
                id: hex(&sink.id.0),
                acked_lsn: sink.acked.0,
                dirty_lsn: sink.dirty.map(|lsn| lsn.0),
            })
            .collect(),
        frames: shown,
        end: end.map(|end| End {
            last_lsn: end.last.0,
            frames: end.frames,
            offset: end.offset,
            because: end.absence.to_string(),
            corrupt: end.below_durable,
        }),
    };
    output.result(&inspected, |inspected| text(inspected, records))?;
    Ok(())
}

/// The log that was named: a path, or the log of a configured group.
fn path_of(load: impl Fn() -> Result<Config, ConfigError>, log: &str) -> anyhow::Result<PathBuf> {
    if log.contains('/') || PathBuf::from(log).exists() {
        return Ok(log.into());
    }
    if log.parse::<GroupName>().is_ok()
        && let Some(group) = load()?.group(log)
    {
        return Ok(group.log_path.clone());
    }
    bail!("'{log}' is neither a file nor a configured group");
}

fn frame(found: &InspectedFrame, records: bool) -> Frame {
    let header = &found.descriptor.header;
    let record = |entry: &afterimage_format::frame::Entry| Record {
        lsn: entry.lsn.0,
        op: format!("{:?}", entry.op),
        disk: entry.disk.0,
        first_block: entry.first_block,
        block_count: entry.block_count,
        wall_ns: entry.wall_ns,
    };
    let entries = &found.descriptor.entries;
    Frame {
        number: header.start.number,
        offset: found.offset,
        bytes: u64::from(header.frame_blocks()) * BLOCK_SIZE as u64,
        first_lsn: header.start.first_lsn.0,
        last_lsn: header.last_lsn().0,
        wall_ns: header.start.wall_ns,
        incarnation: header.start.incarnation,
        durable_lsn: header.durable_lsn.0,
        records: if records {
            entries.iter().map(record).collect()
        } else {
            Vec::new()
        },
    }
}

fn text(log: &Inspected, records: bool) -> String {
    let state = if log.clean {
        "closed cleanly"
    } else {
        "in use, or not closed cleanly"
    };
    let mut text = format!(
        "{}\n\
         group        {}\n\
         log          {}\n\
         epoch        {}, incarnation {}, {state}\n\
         area         {}\n\
         oldest LSN   {}\n\
         in disks to  {}\n\
         durable to   {} (when superblock {} was written)\n",
        log.path,
        log.group,
        log.log,
        log.epoch,
        log.incarnation,
        bytes(log.area_bytes),
        log.tail_lsn,
        log.destaged_lsn,
        log.durable_lsn,
        log.generation,
    );
    for damaged in &log.damaged_copies {
        text += &format!("superblock   copy {damaged}\n");
    }
    for (number, size) in log.disks.iter().enumerate() {
        text += &format!("disk {number}       {}\n", bytes(*size));
    }
    for sink in &log.sinks {
        let dirty = sink
            .dirty_lsn
            .map(|lsn| format!(", incomplete up to LSN {lsn}"));
        text += &format!(
            "target       {} has LSN {}{}\n",
            &sink.id[..8],
            sink.acked_lsn,
            dirty.unwrap_or_default()
        );
    }
    if !log.frames.is_empty() {
        let mut rows = table(&["FRAME", "AT BYTE", "SIZE", "LSN", "TIME", "OP"]);
        for frame in &log.frames {
            rows.add_row([
                frame.number.to_string(),
                frame.offset.to_string(),
                frame.bytes.to_string(),
                format!("{}..{}", frame.first_lsn, frame.last_lsn),
                local_time(frame.wall_ns),
                String::new(),
            ]);
            for record in frame.records.iter().filter(|_| records) {
                rows.add_row([
                    String::new(),
                    String::new(),
                    (u64::from(record.block_count) * BLOCK_SIZE as u64).to_string(),
                    record.lsn.to_string(),
                    local_time(record.wall_ns),
                    format!(
                        "{} disk {} block {}",
                        record.op, record.disk, record.first_block
                    ),
                ]);
            }
        }
        text += &format!("\n{}", table_text(&rows));
    }
    if let Some(end) = &log.end {
        let corrupt = if end.corrupt {
            "; CORRUPT: this is below what was durable"
        } else {
            ""
        };
        text += &format!(
            "\n{} frames, last LSN {}; at byte {}: {}{corrupt}\n",
            end.frames, end.last_lsn, end.offset, end.because
        );
    }
    text
}

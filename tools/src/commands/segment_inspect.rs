//! `afterimage segment inspect`: header and index of a segment, for people.

use afterimage_format::ids::BLOCK_SIZE;
use afterimage_format::manifest::{Terminator, is_terminator};
use afterimage_format::segment::{self, SegmentIndex, SegmentKind};
use afterimage_replica::verify::damage_offset;
use anyhow::{Context as _, bail};
use serde::Serialize;
use std::path::Path;

use crate::cli::output::{Output, bytes, local_time, table, table_text};

/// What a segment says.
#[derive(Debug, Serialize)]
pub struct Inspected {
    /// `log` or `pass`.
    pub kind: &'static str,
    /// UUID of the group.
    pub group: String,
    /// Epoch.
    pub epoch: u64,
    /// UUID of the log.
    pub log: String,
    /// First LSN.
    pub first_lsn: u64,
    /// Last LSN.
    pub last_lsn: u64,
    /// LSN of the pass it belongs to or begins; 0 for none.
    pub pass_lsn: u64,
    /// Records before this segment are missing, by declaration.
    pub declares_gap: bool,
    /// Number of records.
    pub records: usize,
    /// Number of chunks.
    pub chunks: usize,
    /// Payload before compression.
    pub payload_bytes: u64,
    /// Size of the object.
    pub stored_bytes: u64,
    /// Chain before the first record, in hexadecimal.
    pub chain_before: String,
    /// Chain after the last record, in hexadecimal.
    pub chain_after: String,
    /// Hash of the content, in hexadecimal.
    pub content_hash: String,
    /// Whether every byte was checked.
    pub checked: bool,
    /// Records, when asked for.
    pub entries: Vec<Entry>,
}

/// One record.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// LSN.
    pub lsn: u64,
    /// Time of the primary.
    pub wall_ns: u64,
    /// Operation.
    pub op: String,
    /// Position of the disk in the group's table.
    pub disk: u16,
    /// First block.
    pub first_block: u64,
    /// Number of blocks.
    pub block_count: u32,
}

/// Runs the command.
///
/// # Errors
/// When the file cannot be read or is no valid segment.
pub fn run(file: &Path, records: bool, check: bool, output: Output) -> anyhow::Result<()> {
    let stored = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    if is_terminator(&stored) {
        let end = Terminator::decode(&stored)
            .with_context(|| format!("{} is a damaged terminator", file.display()))?;
        bail!(
            "{} is no segment: it ends epoch {} of group {}, followed by epoch {}",
            file.display(),
            end.epoch,
            end.group,
            end.next_epoch
        );
    }
    let index = if check {
        segment::verify(&stored)
    } else {
        SegmentIndex::of_segment(&stored)
    };
    let index = index.with_context(|| {
        format!(
            "{} is no valid segment at byte {}; put it back from a copy of the repository",
            file.display(),
            damage_offset(&stored)
        )
    })?;
    output.result(&inspect(&index, records, check), text)?;
    Ok(())
}

fn inspect(index: &SegmentIndex, records: bool, checked: bool) -> Inspected {
    let header = &index.header;
    let entry = |entry: &segment::IndexEntry| Entry {
        lsn: entry.record.lsn.0,
        wall_ns: entry.record.wall_ns,
        op: format!("{:?}", entry.record.op),
        disk: entry.record.disk.0,
        first_block: entry.record.first_block,
        block_count: entry.record.block_count,
    };
    Inspected {
        kind: match header.kind {
            SegmentKind::Log => "log",
            SegmentKind::Pass => "pass",
        },
        group: header.group.to_string(),
        epoch: header.epoch.0,
        log: header.log.to_string(),
        first_lsn: header.first_lsn.0,
        last_lsn: header.last_lsn.0,
        pass_lsn: header.pass.0,
        declares_gap: header.flags.declares_gap,
        records: index.entries.len(),
        chunks: index.chunks.len(),
        payload_bytes: header.payload_bytes,
        stored_bytes: index.footer.total_len,
        chain_before: hex(&header.chain_before.0),
        chain_after: hex(&header.chain_after.0),
        content_hash: hex(&index.footer.content_hash),
        checked,
        entries: if records {
            index.entries.iter().map(entry).collect()
        } else {
            Vec::new()
        },
    }
}

/// Bytes in hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn text(segment: &Inspected) -> String {
    let mut text = format!(
        "{kind} segment, epoch {epoch}, LSN {first} to {last}\n\
         group         {group}\n\
         log           {log}\n\
         records       {records}\n\
         payload       {payload} in {chunks} chunks, stored as {stored}\n\
         chain         {before}\n\
         \x20           → {after}\n\
         content hash  {hash}{checked}\n",
        kind = segment.kind,
        epoch = segment.epoch,
        first = segment.first_lsn,
        last = segment.last_lsn,
        group = segment.group,
        log = segment.log,
        records = segment.records,
        payload = bytes(segment.payload_bytes),
        chunks = segment.chunks,
        stored = bytes(segment.stored_bytes),
        before = segment.chain_before,
        after = segment.chain_after,
        hash = segment.content_hash,
        checked = if segment.checked {
            ", every byte checked"
        } else {
            ""
        },
    );
    if segment.pass_lsn != 0 {
        text += &format!("pass          begun at LSN {}\n", segment.pass_lsn);
    }
    if segment.declares_gap {
        text += "gap           records before it are missing, by declaration\n";
    }
    if !segment.entries.is_empty() {
        let mut rows = table(&["LSN", "TIME", "OP", "DISK", "BLOCK", "BYTES"]);
        for entry in &segment.entries {
            rows.add_row([
                entry.lsn.to_string(),
                local_time(entry.wall_ns),
                entry.op.clone(),
                entry.disk.to_string(),
                entry.first_block.to_string(),
                (u64::from(entry.block_count) * BLOCK_SIZE as u64).to_string(),
            ]);
        }
        text += &format!("\n{}", table_text(&rows));
    }
    text
}

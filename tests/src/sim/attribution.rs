//! Whose record is it? The log does not say; the content does, and where two open requests would
//! have had the same effect, either may be it.

use super::clients::{Ask, Clients, Open};
use super::content;
use super::model::LogModel;
use super::tap::Record;
use afterimage_format::ids::BLOCK_SIZE;
use afterimage_format::op::Op;
use std::ops::Range;

const BLOCK: u64 = BLOCK_SIZE as u64;

/// A record that would have been the effect of more than one open request: the content is the same,
/// so it may change hands until all of them are answered.
pub(super) struct Shared {
    bytes: Range<u64>,
    lsn: u64,
    pub(super) owner: u64,
    others: Vec<u64>,
}

impl Clients {
    /// A record that changes blocks: whose is it, and does it bring what was asked? The model takes
    /// it in.
    ///
    /// # Errors
    /// In words: nobody asked for this.
    pub fn take_record(&mut self, record: &Record, model: &mut LogModel) -> Result<(), String> {
        let disk = usize::from(record.disk.0);
        let blocks = record.first_block..record.first_block + u64::from(record.block_count);
        let size = *model.sizes().get(disk).ok_or("no such disk")?;
        let bytes = record.first_block * BLOCK..(blocks.end * BLOCK).min(size);
        if bytes.is_empty() {
            return Err(format!("{record:?} is about nothing"));
        }
        let mut why = String::new();
        let mut fitting = Vec::new();
        for (id, open) in &self.open {
            match fits(open, record, disk, &bytes, model) {
                Ok(true) => fitting.push(*id),
                Ok(false) => {}
                Err(what) => why = what,
            }
        }
        // Who lacks all of it; or who can have it back by giving other records away.
        let owner = fitting.iter().copied().find(|id| self.lacks(*id, &bytes));
        let owner = owner.or_else(|| {
            let mut fitting = fitting.iter().copied();
            fitting.find(|id| self.give_away(*id, &bytes))
        });
        let Some(owner) = owner else {
            return Err(format!(
                "record {} ({:?} of disk {disk}, bytes {bytes:?}) is not what anybody asked for; {why}",
                record.lsn, record.op
            ));
        };
        self.take(owner, &bytes, record.lsn);
        fitting.retain(|id| *id != owner);
        if !fitting.is_empty() {
            self.shared.push(Shared {
                bytes: bytes.clone(),
                lsn: record.lsn,
                owner,
                others: fitting,
            });
        }
        for (at, block) in blocks.enumerate() {
            let content = match record.op {
                Op::Write => Some(&record.payload[at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE]),
                _ => None,
            };
            model.set(disk, block, record.lsn, content);
        }
        Ok(())
    }

    /// The part of a request that lies in a record's bytes.
    fn part(&self, id: u64, bytes: &Range<u64>) -> Range<u64> {
        let range = &self.open[&id].request.range;
        range.start.max(bytes.start)..range.end.min(bytes.end)
    }

    /// Whether no record has brought any of this part of a request.
    fn lacks(&self, id: u64, bytes: &Range<u64>) -> bool {
        let part = self.part(id, bytes);
        let left = &self.open[&id].left;
        left.iter()
            .any(|left| left.start <= part.start && part.end <= left.end)
    }

    fn take(&mut self, id: u64, bytes: &Range<u64>, lsn: u64) {
        if let Some(open) = self.open.get_mut(&id) {
            open.left = without(&open.left, bytes);
            open.last = open.last.max(lsn);
        }
    }

    /// Gives records of a request in this place to others that they would fit as well and that lack
    /// them, until it lacks this place itself.
    fn give_away(&mut self, id: u64, bytes: &Range<u64>) -> bool {
        for at in 0..self.shared.len() {
            let shared = &self.shared[at];
            if shared.owner != id
                || shared.bytes.start >= bytes.end
                || bytes.start >= shared.bytes.end
            {
                continue;
            }
            let heir = shared.others.iter().copied();
            let mut heir = heir.filter(|other| self.open.contains_key(other));
            if let Some(heir) = heir.find(|other| self.lacks(*other, &shared.bytes)) {
                self.hand_over(at, heir);
            }
        }
        self.lacks(id, bytes)
    }

    /// Takes over what a request lacks from others that are still open and may get it later.
    pub(super) fn claim_missing(&mut self, id: u64) {
        for at in 0..self.shared.len() {
            let shared = &self.shared[at];
            let mine = shared.others.contains(&id) && self.lacks(id, &shared.bytes);
            if mine && self.open.contains_key(&shared.owner) {
                self.hand_over(at, id);
            }
        }
    }

    fn hand_over(&mut self, at: usize, heir: u64) {
        let shared = &mut self.shared[at];
        let before = std::mem::replace(&mut shared.owner, heir);
        shared.others.retain(|other| *other != heir);
        shared.others.push(before);
        let (bytes, lsn) = (shared.bytes.clone(), shared.lsn);
        let part = self.part(before, &bytes);
        if let Some(open) = self.open.get_mut(&before) {
            give_back(&mut open.left, part);
        }
        self.take(heir, &bytes, lsn);
    }
}

/// Whether the record could be an effect of the request, had no other brought it yet.
fn fits(
    open: &Open,
    record: &Record,
    disk: usize,
    bytes: &Range<u64>,
    model: &LogModel,
) -> Result<bool, String> {
    let request = &open.request;
    if request.disk != disk || !request.changes() {
        return Ok(false);
    }
    let range = &request.range;
    if range.start >= bytes.end || bytes.start >= range.end {
        return Ok(false);
    }
    let mine = range.start.max(bytes.start)..range.end.min(bytes.end);
    if record.op != Op::Write {
        let zeroing = matches!(request.ask, Ask::Zero { .. });
        return Ok(zeroing && mine == *bytes);
    }
    let mut expected = vec![0; BLOCK_SIZE];
    for (at, payload) in record.payload.chunks(BLOCK_SIZE).enumerate() {
        let block = record.first_block + at as u64;
        let valid = model.valid(disk, block);
        let start = block * BLOCK;
        let from = mine.start.clamp(start, start + BLOCK) - start;
        let to = mine.end.clamp(start, start + BLOCK) - start;
        if from >= to {
            return Err(format!(
                "{request:?} does not reach block {block} of the record"
            ));
        }
        model.block(disk, block, u64::MAX).copy_to(&mut expected);
        let part = &mut expected[from as usize..to as usize];
        match request.ask {
            Ask::Write(value) => content::fill(value, start + from, part),
            _ => part.fill(0),
        }
        if payload[..valid] != expected[..valid] {
            let differs = payload[..valid]
                .iter()
                .zip(&expected)
                .position(|(a, b)| a != b);
            return Err(format!(
                "{request:?} would make block {block} other from byte {differs:?} on"
            ));
        }
    }
    Ok(true)
}

fn without(left: &[Range<u64>], taken: &Range<u64>) -> Vec<Range<u64>> {
    let parts = left.iter().flat_map(|range| {
        [
            range.start..range.end.min(taken.start),
            range.start.max(taken.end)..range.end,
        ]
    });
    parts.filter(|range| !range.is_empty()).collect()
}

/// Adds a part again; parts that touch become one.
fn give_back(left: &mut Vec<Range<u64>>, mut part: Range<u64>) {
    left.retain(|range| {
        let touches = range.start <= part.end && part.start <= range.end;
        if touches {
            part = range.start.min(part.start)..range.end.max(part.end);
        }
        !touches
    });
    left.push(part);
}

//! An application that keeps writing, and remembers what was answered.
//!
//! Each writer owns its own blocks, so what a block must hold is never in doubt: the last answered
//! version, or the version that was under way when the connection broke. Anything else is lost.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::disk::{BLOCK, next_random};
use super::nbd::Client;

/// Connections that write at once.
pub(super) const WRITERS: usize = 4;
/// Every so many writes a writer asks for a flush.
const FLUSH_EVERY: u64 = 64;
/// Rest after each write: an application, not a benchmark.
const REST: Duration = Duration::from_micros(300);

/// Runs while it writes.
#[derive(Debug)]
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    writers: Vec<JoinHandle<Writer>>,
}

/// One writer's blocks and what they must hold.
#[derive(Debug)]
pub(super) struct Writer {
    export: String,
    blocks: Vec<u64>,
    /// Block → last answered version.
    answered: HashMap<u64, u64>,
    /// Written and not answered when the connection broke.
    uncertain: Option<(u64, u64)>,
    version: u64,
    random: u64,
    writes: u64,
    /// Why it ended, unless it was told to.
    broken: Option<io::Error>,
}

/// What a check found.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Checked {
    /// Blocks that were compared.
    pub(super) blocks: u64,
    /// Blocks that do not hold their last answered write.
    pub(super) lost: u64,
}

/// Writers over `blocks`, which they share out among them.
#[must_use]
pub(super) fn writers(export: &str, blocks: &[u64]) -> Vec<Writer> {
    let writer = |n: usize| Writer {
        export: export.to_owned(),
        blocks: blocks.iter().copied().skip(n).step_by(WRITERS).collect(),
        answered: HashMap::new(),
        uncertain: None,
        version: 0,
        random: n as u64 + 1,
        writes: 0,
        broken: None,
    };
    (0..WRITERS.min(blocks.len())).map(writer).collect()
}

impl Load {
    /// Lets the writers run, each on its own connection.
    ///
    /// # Errors
    /// When a connection cannot be made.
    pub(super) fn start(socket: &Path, writers: Vec<Writer>) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let mut running = Vec::new();
        for mut writer in writers {
            let mut client = Client::connect(socket, &writer.export)?;
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            running.push(thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Err(error) = writer.write(&mut client) {
                        writer.broken = Some(error);
                        break;
                    }
                    answered.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(REST);
                }
                writer
            }));
        }
        Ok(Self {
            stop,
            answered,
            writers: running,
        })
    }

    /// Writes answered so far.
    #[must_use]
    pub(super) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits until the writers have ended because the server is gone.
    #[must_use]
    pub(super) fn wait_broken(self) -> Vec<Writer> {
        self.join()
    }

    /// Tells the writers to stop after the write they are at.
    ///
    /// # Errors
    /// When a writer had broken off before.
    pub(super) fn stop(self) -> io::Result<Vec<Writer>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut writers = self.join();
        for writer in &mut writers {
            if let Some(error) = writer.broken.take() {
                return Err(error);
            }
        }
        Ok(writers)
    }

    fn join(self) -> Vec<Writer> {
        let join = |handle: JoinHandle<Writer>| handle.join();
        self.writers
            .into_iter()
            .map(join)
            .filter_map(Result::ok)
            .collect()
    }
}

impl Writer {
    /// Writes answered so far.
    #[must_use]
    pub(super) fn writes(&self) -> u64 {
        self.writes
    }

    fn write(&mut self, client: &mut Client) -> io::Result<()> {
        self.random = next_random(self.random);
        let block = self.blocks[(self.random >> 16) as usize % self.blocks.len()];
        self.version += 1;
        self.uncertain = Some((block, self.version));
        client.write(block * BLOCK as u64, &content(block, self.version))?;
        self.uncertain = None;
        self.answered.insert(block, self.version);
        self.writes += 1;
        if self.writes.is_multiple_of(FLUSH_EVERY) {
            client.flush()?;
        }
        Ok(())
    }

    /// Compares every block that was ever written with what it must hold.
    ///
    /// # Errors
    /// When a block cannot be read.
    pub(super) fn check(&mut self, client: &mut Client) -> io::Result<Checked> {
        let mut checked = Checked::default();
        let mut data = vec![0; BLOCK];
        if let Some((block, version)) = self.uncertain.take() {
            client.read(block * BLOCK as u64, &mut data)?;
            if data == content(block, version) {
                self.answered.insert(block, version);
            }
        }
        for (&block, &version) in &self.answered {
            client.read(block * BLOCK as u64, &mut data)?;
            checked.blocks += 1;
            checked.lost += u64::from(data != content(block, version));
        }
        self.broken = None;
        Ok(checked)
    }
}

/// What a block holds after a write: unique for each version.
fn content(block: u64, version: u64) -> Vec<u8> {
    let mut data = format!("orders.db block {block} version {version}\n").into_bytes();
    let mut state = block.wrapping_mul(0x9e37_79b9) ^ version;
    while data.len() < BLOCK {
        state = next_random(state | 1);
        let line = format!(
            "{:05} item {:04} qty {:02}\n",
            version % 99_991,
            state % 9973,
            state % 89
        );
        data.extend_from_slice(line.as_bytes());
    }
    data.truncate(BLOCK);
    data
}

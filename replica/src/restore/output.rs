//! A file that is being restored, written by a thread of its own.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use afterimage_format::ids::BLOCK_SIZE;
use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Storage,
    StorageOpenOptions,
};
use tokio::sync::mpsc;

use super::{RestoreError, RestoreFormat};

/// Buffers on their way to the thread.
const QUEUE_MAX: usize = 8;

type Part = (u64, Vec<u8>);

/// A file that takes data.
#[derive(Debug)]
pub(super) struct Output {
    path: PathBuf,
    parts: mpsc::Sender<Part>,
    thread: JoinHandle<io::Result<()>>,
}

impl Output {
    pub(super) async fn create(
        path: &Path,
        size: u64,
        format: RestoreFormat,
    ) -> Result<Self, RestoreError> {
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        let file = file.map_err(RestoreError::write(path))?;
        let path = path.to_owned();
        let written = path.clone();
        let (parts, queue) = mpsc::channel(QUEUE_MAX);
        let thread = thread::Builder::new()
            .name("restore".into())
            .spawn(move || match format {
                RestoreFormat::Raw => write_raw(&file, size, queue),
                RestoreFormat::Qcow2 => write_qcow2(&file, &written, size, queue),
            });
        let thread = thread.map_err(RestoreError::write(&path))?;
        Ok(Self {
            path,
            parts,
            thread,
        })
    }

    /// Hands data over.
    pub(super) async fn write(&mut self, offset: u64, data: Vec<u8>) -> Result<(), RestoreError> {
        if self.parts.send((offset, data)).await.is_ok() {
            return Ok(());
        }
        // The thread ends early only with an error, which `finish` brings.
        Err(RestoreError::write(&self.path)(io::Error::other(
            "the writing thread has ended",
        )))
    }

    /// Waits until everything is written and durable.
    pub(super) async fn finish(self) -> Result<(), RestoreError> {
        let Self {
            path,
            parts,
            thread,
        } = self;
        drop(parts);
        let joined = tokio::task::spawn_blocking(|| thread.join()).await;
        let outcome = match joined {
            Ok(Ok(outcome)) => outcome,
            _ => Err(io::Error::other("the writing thread failed")),
        };
        outcome.map_err(RestoreError::write(&path))
    }
}

fn write_raw(file: &File, size: u64, mut queue: mpsc::Receiver<Part>) -> io::Result<()> {
    file.set_len(size)?;
    while let Some((offset, data)) = queue.blocking_recv() {
        for (from, len) in nonzero_runs(&data) {
            file.write_all_at(&data[from..from + len], offset + from as u64)?;
        }
    }
    file.sync_all()
}

/// qcow2 through imago, whose futures stay on one thread.
fn write_qcow2(
    file: &File,
    path: &Path,
    size: u64,
    mut queue: mpsc::Receiver<Part>,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(async {
        let storage = ImagoFile::open(StorageOpenOptions::new().filename(path).write(true)).await?;
        let qcow2 = Qcow2::<ImagoFile>::create_builder(storage)
            .size(size)
            .create_open(DenyImplicitOpenGate::default(), |image| {
                Ok(Qcow2::<ImagoFile>::builder(image).backing(None).write(true))
            })
            .await?;
        let access = FormatAccess::new(qcow2);
        while let Some((offset, data)) = queue.recv().await {
            for (from, len) in nonzero_runs(&data) {
                access
                    .write(&data[from..from + len], offset + from as u64)
                    .await?;
            }
        }
        access.flush().await?;
        access.sync().await
    })?;
    file.sync_all()
}

/// Runs of blocks that are not all zero.
fn nonzero_runs(data: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (at, block) in data.chunks(BLOCK_SIZE).enumerate() {
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        let from = at * BLOCK_SIZE;
        match runs.last_mut() {
            Some((start, len)) if *start + *len == from => *len += block.len(),
            _ => runs.push((from, block.len())),
        }
    }
    runs
}

//! A file that is being restored, written by a thread of its own.

use std::fs::{self, File};
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
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::{RestoreError, RestoreFormat};

/// Buffers on their way to the thread.
const QUEUE_MAX: usize = 8;

type Part = (u64, Vec<u8>);

/// A file under its temporary name; removed when dropped, unless it was published.
#[derive(Debug)]
pub(super) struct Unfinished {
    temporary: PathBuf,
    path: PathBuf,
}

impl Unfinished {
    /// Gives the file its name, unless something else has it.
    fn publish(&self) -> Result<(), RestoreError> {
        // Where a file system cannot rename without replacing, it may be able to link.
        let given = match rename_noreplace(&self.temporary, &self.path) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                fs::hard_link(&self.temporary, &self.path)
            }
            given => given.map_err(io::Error::from),
        };
        match given {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(RestoreError::Exists(self.path.clone()))
            }
            Err(source) => Err(RestoreError::write(&self.path)(source)),
        }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Nothing can be done about a leftover that cannot be removed; its name says what it is.
        let _ = fs::remove_file(&self.temporary);
    }
}

fn rename_noreplace(from: &Path, to: &Path) -> rustix::io::Result<()> {
    renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)
}

/// Gives all files their names, or none.
pub(super) fn publish_all(files: &[Unfinished]) -> Result<(), RestoreError> {
    for (done, file) in files.iter().enumerate() {
        if let Err(error) = file.publish() {
            for published in &files[..done] {
                // A moment ago this was ours; if it cannot be removed, the error says what failed.
                let _ = fs::remove_file(&published.path);
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Makes the names in a folder durable.
pub(super) fn sync_folder(folder: &Path) -> Result<(), RestoreError> {
    let sync = File::open(folder).and_then(|folder| folder.sync_all());
    sync.map_err(RestoreError::write(folder))
}

/// A file that takes data.
#[derive(Debug)]
pub(super) struct Output {
    file: Unfinished,
    parts: mpsc::Sender<Part>,
    thread: JoinHandle<io::Result<()>>,
}

impl Output {
    pub(super) async fn create(
        path: &Path,
        size: u64,
        format: RestoreFormat,
    ) -> Result<Self, RestoreError> {
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}.partial", uuid::Uuid::new_v4()));
        let temporary = path.with_file_name(name);
        let raw = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary);
        let raw = raw.map_err(RestoreError::write(&temporary))?;
        let file = Unfinished {
            temporary: temporary.clone(),
            path: path.to_owned(),
        };
        let (parts, queue) = mpsc::channel(QUEUE_MAX);
        let thread = thread::Builder::new()
            .name("restore".into())
            .spawn(move || match format {
                RestoreFormat::Raw => write_raw(&raw, size, queue),
                RestoreFormat::Qcow2 => write_qcow2(&raw, &temporary, size, queue),
            });
        let thread = thread.map_err(RestoreError::write(path))?;
        Ok(Self {
            file,
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
        Err(RestoreError::write(&self.file.path)(io::Error::other(
            "the writing thread has ended",
        )))
    }

    /// Waits until everything is written and durable.
    pub(super) async fn finish(self) -> Result<Unfinished, RestoreError> {
        let Self {
            file,
            parts,
            thread,
        } = self;
        drop(parts);
        let joined = tokio::task::spawn_blocking(|| thread.join()).await;
        let outcome = match joined {
            Ok(Ok(outcome)) => outcome,
            _ => Err(io::Error::other("the writing thread failed")),
        };
        outcome.map_err(RestoreError::write(&file.path))?;
        Ok(file)
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

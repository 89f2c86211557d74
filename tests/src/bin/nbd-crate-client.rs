//! Writes and reads back through the `nbd` crate's client: `nbd-crate-client SOCKET EXPORT`.
//!
//! The crate is an implementation independent of ours; it opens the export with the oldest option
//! (`NBD_OPT_EXPORT_NAME`) and expects simple replies.

use anyhow::{Context, Result, ensure};
use nbd::client::{NbdClient, handshake};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;

/// Offset and length of each write: blocks, ragged edges, parts of a block.
const WRITES: [(u64, usize); 6] = [
    (0, 4096),
    (8192, 65536),
    (1_000_001, 512),
    (2_000_000, 100_000),
    (4095, 2),
    (3 << 20, 1 << 20),
];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, export] = arguments.as_slice() else {
        anyhow::bail!("usage: nbd-crate-client SOCKET EXPORT");
    };
    let mut model = vec![0_u8; 8 << 20];
    let mut client = open(socket, export)?;
    for (number, (offset, length)) in WRITES.into_iter().enumerate() {
        let content: Vec<u8> = (0..length).map(|at| (at * 7 + number) as u8).collect();
        client.seek(SeekFrom::Start(offset))?;
        client.write_all(&content)?;
        let start = usize::try_from(offset)?;
        model[start..start + length].copy_from_slice(&content);
        compare(&mut client, &model).with_context(|| format!("after write {number}"))?;
    }
    client.flush()?;
    drop(client);
    compare(&mut open(socket, export)?, &model).context("on a second connection")
}

fn open(socket: &str, export: &str) -> Result<NbdClient<UnixStream>> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("connecting to {socket}"))?;
    let found =
        handshake(&mut stream, export.as_bytes()).with_context(|| format!("opening {export}"))?;
    ensure!(!found.readonly, "{export} is read-only");
    Ok(NbdClient::new(stream, &found))
}

fn compare(client: &mut NbdClient<UnixStream>, model: &[u8]) -> Result<()> {
    client.seek(SeekFrom::Start(0))?;
    let mut seen = vec![0_u8; model.len()];
    for part in seen.chunks_mut(256 << 10) {
        client.read_exact(part)?;
    }
    let different = seen.iter().zip(model).position(|(a, b)| a != b);
    ensure!(
        different.is_none(),
        "byte {different:?} differs from what was written"
    );
    Ok(())
}

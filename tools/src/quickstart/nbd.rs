//! A small NBD client of its own, so that the quickstart judges the server from outside.
//!
//! Blocking, one request at a time per connection, simple replies: written from the protocol's
//! description and sharing no code with the server.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const MAGIC_NBD: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const MAGIC_OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const MAGIC_REQUEST: u32 = 0x2560_9513;
const MAGIC_REPLY: u32 = 0x6744_6698;
const CLIENT_FIXED_NEWSTYLE_NO_ZEROES: u32 = 3;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const REPLY_BYTES_MAX: u32 = 4096;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
/// A server that says nothing for so long is taken for dead.
const PATIENCE: Duration = Duration::from_secs(20);

/// One connection to one export.
#[derive(Debug)]
pub(super) struct Client {
    stream: UnixStream,
    size: u64,
    cookie: u64,
}

fn broken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Client {
    /// Connects and opens an export.
    ///
    /// # Errors
    /// When nobody listens, the server refuses the export, or it does not speak NBD.
    pub(super) fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut client = Self {
            stream,
            size: 0,
            cookie: 0,
        };
        client.greet()?;
        client.go(export)?;
        Ok(client)
    }

    /// Size of the export in bytes.
    #[must_use]
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    fn greet(&mut self) -> io::Result<()> {
        let mut greeting = [0; 18];
        self.stream.read_exact(&mut greeting)?;
        if be64(&greeting[..8]) != MAGIC_NBD || be64(&greeting[8..16]) != MAGIC_OPTION {
            return Err(broken("the server does not speak newstyle NBD"));
        }
        self.stream
            .write_all(&CLIENT_FIXED_NEWSTYLE_NO_ZEROES.to_be_bytes())
    }

    fn go(&mut self, export: &str) -> io::Result<()> {
        let mut data = (export.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(export.as_bytes());
        data.extend_from_slice(&[0, 0]);
        let mut option = MAGIC_OPTION.to_be_bytes().to_vec();
        option.extend_from_slice(&OPTION_GO.to_be_bytes());
        option.extend_from_slice(&(data.len() as u32).to_be_bytes());
        option.extend_from_slice(&data);
        self.stream.write_all(&option)?;
        loop {
            let mut header = [0; 20];
            self.stream.read_exact(&mut header)?;
            let (kind, len) = (be32(&header[12..16]), be32(&header[16..20]));
            if be64(&header[..8]) != MAGIC_OPTION_REPLY || len > REPLY_BYTES_MAX {
                return Err(broken("an option reply is garbled"));
            }
            let mut body = vec![0; len as usize];
            self.stream.read_exact(&mut body)?;
            match kind {
                REPLY_ACK => return Ok(()),
                REPLY_INFO if body.len() == 12 && body[..2] == [0, 0] => {
                    self.size = be64(&body[2..10]);
                }
                REPLY_INFO => {}
                error if error & REPLY_ERROR != 0 => {
                    return Err(io::Error::other(format!(
                        "the server refuses export '{export}': {}",
                        String::from_utf8_lossy(&body)
                    )));
                }
                _ => return Err(broken("an option reply of unknown kind")),
            }
        }
    }

    fn request(&mut self, kind: u16, offset: u64, len: u32, payload: &[u8]) -> io::Result<()> {
        self.cookie += 1;
        let mut message = Vec::with_capacity(28 + payload.len());
        message.extend_from_slice(&MAGIC_REQUEST.to_be_bytes());
        message.extend_from_slice(&0u16.to_be_bytes());
        message.extend_from_slice(&kind.to_be_bytes());
        message.extend_from_slice(&self.cookie.to_be_bytes());
        message.extend_from_slice(&offset.to_be_bytes());
        message.extend_from_slice(&len.to_be_bytes());
        message.extend_from_slice(payload);
        self.stream.write_all(&message)
    }

    fn reply(&mut self) -> io::Result<()> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        if be32(&reply[..4]) != MAGIC_REPLY || be64(&reply[8..]) != self.cookie {
            return Err(broken("a reply is garbled"));
        }
        match be32(&reply[4..8]) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno.cast_signed())),
        }
    }

    /// Writes; it is answered when this returns.
    ///
    /// # Errors
    /// The server's errno, or a broken connection: then the write may or may not have happened.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.request(WRITE, offset, data.len() as u32, data)?;
        self.reply()
    }

    /// Reads into the whole of `data`.
    ///
    /// # Errors
    /// The server's errno, or a broken connection.
    pub(super) fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.request(READ, offset, data.len() as u32, &[])?;
        self.reply()?;
        self.stream.read_exact(data)
    }

    /// Everything answered before is durable when this returns.
    ///
    /// # Errors
    /// The server's errno, or a broken connection.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.request(FLUSH, 0, 0, &[])?;
        self.reply()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The server may be gone already: that is no loss.
        let _ = self.request(DISCONNECT, 0, 0, &[]);
    }
}

fn be32(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn be64(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

//! Independent clients (libnbd, QEMU, the `nbd` crate) against the NBD server with a disk in
//! memory. They come from Debian's packages libnbd-bin, python3-libnbd and qemu-utils.

use afterimage_proxy::engine::request::{Extent, RequestError};
use afterimage_proxy::nbd::device::Device;
use afterimage_proxy::nbd::export::{
    BoxFuture, ExportInfo, Exports, ListedExport, OpenError, Peer, Target,
};
use afterimage_proxy::nbd::listener::{
    Attach, Connection, ListenAddress, Listener, ListenerConfig,
};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Arc, RwLock};
use tokio_util::sync::CancellationToken;

const SIZE: usize = 8 << 20;
const BLOCK: usize = 4096;

/// A disk in memory. Blocks of zeroes are holes.
struct Memory(RwLock<Vec<u8>>);

impl Memory {
    fn change(&self, offset: u64, change: impl FnOnce(&mut [u8])) {
        let mut data = self.0.write().expect("no panic");
        change(&mut data[offset as usize..]);
    }
}

impl Device for Memory {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn read<'a>(
        &'a self,
        offset: u64,
        buffer: &'a mut [u8],
    ) -> BoxFuture<'a, Result<(), RequestError>> {
        let data = self.0.read().expect("no panic");
        buffer.copy_from_slice(&data[offset as usize..][..buffer.len()]);
        Box::pin(async { Ok(()) })
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        extents_max: u32,
    ) -> BoxFuture<'_, Result<Vec<Extent>, RequestError>> {
        let data = self.0.read().expect("no panic");
        let (mut at, end) = (offset as usize, (offset + len) as usize);
        let mut extents: Vec<Extent> = Vec::new();
        while at < end {
            let next = (at / BLOCK + 1) * BLOCK;
            let zero = data[at..next.min(SIZE)].iter().all(|b| *b == 0);
            let len = (next.min(end) - at) as u64;
            let full = extents.len() == extents_max as usize;
            match extents.last_mut() {
                Some(last) if last.zero == zero => last.len += len,
                _ if full => break,
                _ => extents.push(Extent {
                    len,
                    hole: zero,
                    zero,
                    dirty: !zero,
                }),
            }
            at = next;
        }
        Box::pin(async move { Ok(extents) })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        data: &'a [u8],
        _: bool,
    ) -> BoxFuture<'a, Result<(), RequestError>> {
        self.change(offset, |disk| disk[..data.len()].copy_from_slice(data));
        Box::pin(async { Ok(()) })
    }

    fn zero(
        &self,
        offset: u64,
        len: u64,
        _: bool,
        _: bool,
    ) -> BoxFuture<'_, Result<(), RequestError>> {
        self.change(offset, |disk| disk[..len as usize].fill(0));
        Box::pin(async { Ok(()) })
    }
}

/// `vm1/vda`, which can be written, and `vm1@latest/vda`, the same without.
struct One(Arc<Memory>);

impl Exports for One {
    fn list<'a>(&'a self, _: &'a Peer) -> BoxFuture<'a, Vec<ListedExport>> {
        let all = ["vm1/vda", "vm1@latest/vda"].map(|name| ListedExport {
            name: name.into(),
            description: "a disk in memory".into(),
        });
        Box::pin(async move { all.into() })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
        _: &'a Peer,
    ) -> BoxFuture<'a, Result<ExportInfo, OpenError>> {
        let known = matches!(name, "vm1/vda" | "vm1@latest/vda");
        let info = ExportInfo {
            name: name.into(),
            description: "a disk in memory".into(),
            size: SIZE as u64,
            read_only: name != "vm1/vda",
            rotational: false,
            has_dirty: true,
            target: Target::Device(self.0.clone()),
        };
        Box::pin(async move { known.then_some(info).ok_or(OpenError::Unknown) })
    }

    fn quiesce<'a>(&'a self, _: &'a ExportInfo) -> BoxFuture<'a, Result<(), OpenError>> {
        Box::pin(async { Ok(()) })
    }
}

struct Nobody;

impl Attach for Nobody {
    fn attach(&self, connection: Connection) {
        panic!("there are no disks of groups here: {connection:?}");
    }
}

/// A server on a thread of its own.
struct Server {
    folder: tempfile::TempDir,
    disk: Arc<Memory>,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let disk = Arc::new(Memory(RwLock::new(vec![0; SIZE])));
        let exports = Arc::new(One(disk.clone()));
        let stop = CancellationToken::new();
        let (path, stopped) = (folder.path().join("nbd.sock"), stop.clone());
        let (ready, listens) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                let address = ListenAddress::Unix {
                    path,
                    owner: None,
                    group: None,
                    mode: 0o600,
                };
                let listener = Listener::bind(ListenerConfig::at(address)).expect("bound");
                ready.send(()).expect("the test waits");
                listener.run(exports, Arc::new(Nobody), stopped).await;
            });
        });
        listens.recv().expect("the server started");
        Self {
            folder,
            disk,
            stop,
            thread: Some(thread),
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).expect("written");
        path.display().to_string()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} is needed (see the top of this file): {error}"));
    let text = String::from_utf8_lossy(&stdout).into_owned();
    let errors = String::from_utf8_lossy(&stderr);
    assert!(
        status.success(),
        "{program} {arguments:?}\n{text}\n{errors}"
    );
    text
}

/// Bytes that look like nothing else, with holes.
fn pattern() -> Vec<u8> {
    let mut data: Vec<u8> = (0..SIZE)
        .map(|i| (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] | 1)
        .collect();
    data[1 << 20..2 << 20].fill(0);
    data[5 << 20..(5 << 20) + 8192].fill(0);
    data
}

#[test]
fn nbdinfo_sees_everything() {
    let server = Server::start();
    server.disk.change(4096, |disk| disk[..4096].fill(7));
    let text = run("nbdinfo", &[&server.uri("vm1/vda")]);
    for line in [
        "export=\"vm1/vda\"",
        "description: a disk in memory",
        "export-size: 8388608",
        "base:allocation",
        "afterimage:dirty",
        "is_read_only: false",
        "can_cache: true",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let text = run("nbdinfo", &["--list", &server.uri("")]);
    assert!(
        text.contains("vm1/vda") && text.contains("vm1@latest/vda"),
        "{text}"
    );
    let map = run("nbdinfo", &["--map", &server.uri("vm1/vda")]);
    let fields: Vec<Vec<&str>> = map
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(fields[0][..3], ["0", "4096", "3"], "{map}");
    assert_eq!(fields[1][..3], ["4096", "4096", "0"], "{map}");
    assert_eq!(fields[2][..3], ["8192", "8380416", "3"], "{map}");
    let read_only = run("nbdinfo", &["--json", &server.uri("vm1@latest/vda")]);
    assert!(read_only.contains("\"is_read_only\": true"), "{read_only}");
}

#[test]
fn nbdcopy_and_qemu_img_carry_a_disk_in_and_out() {
    let server = Server::start();
    let source = server.file("source.raw", &pattern());
    run(
        "nbdcopy",
        &[
            "--connections=4",
            "--flush",
            &source,
            &server.uri("vm1/vda"),
        ],
    );
    assert!(*server.disk.0.read().expect("no panic") == pattern());
    let copy = server.file("copy.raw", b"");
    run(
        "nbdcopy",
        &["--connections=4", &server.uri("vm1@latest/vda"), &copy],
    );
    assert!(std::fs::read(&copy).expect("read") == pattern());
    run(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            &source,
            &server.uri("vm1/vda"),
        ],
    );
    let qcow2 = server
        .folder
        .path()
        .join("copy.qcow2")
        .display()
        .to_string();
    let image = server.uri("vm1@latest/vda");
    run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", &image, &qcow2],
    );
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "qcow2", &source, &qcow2],
    );
}

#[test]
fn qemu_io_writes_and_verifies_patterns_of_odd_sizes() {
    let server = Server::start();
    let commands = [
        "write -P 0x5a 513 4097",
        "read -P 0x5a 513 4097",
        "read -P 0 0 513",
        "write -f -P 0x33 1M 2M",
        "read -P 0x33 1M 2M",
        "write -z 1M 64k",
        "read -P 0 1M 64k",
        "read -P 0x33 1088k 1984k",
        "discard 2M 512k",
        "flush",
    ];
    let mut arguments = vec!["-f", "raw"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    let uri = server.uri("vm1/vda");
    arguments.push(&uri);
    let text = run("qemu-io", &arguments);
    assert!(!text.contains("failed"), "{text}");
}

/// Illegal requests over every form of replies libnbd here knows; and what is written on one
/// connection is read on the next.
#[test]
fn libnbd_says_illegal_things_and_two_connections_agree() {
    let server = Server::start();
    let script = format!(
        r#"
import errno, nbd
uri = "{uri}"
for structured in (False, True):
    a = nbd.NBD(); b = nbd.NBD()
    for h in (a, b):
        h.set_request_structured_replies(structured)
        h.set_strict_mode(0)
        h.connect_uri(uri)
    size = a.get_size()
    assert size == {SIZE}
    def fails(expected, call, *arguments):
        try:
            call(*arguments)
        except nbd.Error as e:
            assert e.errnum == expected, (call, arguments, e)
        else:
            assert False, (call, arguments)
    for h in (a, b):
        fails(errno.EINVAL, h.pread, 512, size - 511)
        fails(errno.EINVAL, h.pread, 512, 2**64 - 512)
        fails(errno.ENOSPC, h.pwrite, b"x" * 512, size - 511)
        fails(errno.ENOSPC, h.zero, 512, size)
        fails(errno.EINVAL, h.trim, 512, size)
        fails(errno.EINVAL, h.cache, 512, size)
        fails(errno.EINVAL, h.pwrite, b"x", 0, nbd.CMD_FLAG_NO_HOLE)
    a.pwrite(b"", 0); a.zero(0, size); a.trim(0, 0)
    a.pwrite(b"seen by all", 1000)
    assert b.pread(11, 1000) == b"seen by all"
    b.pwrite(b"SEEN", 1000, nbd.CMD_FLAG_FUA)
    a.flush()
    assert a.pread(11, 1000) == b"SEEN by all"
    a.zero(11, 1000, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
    assert b.pread(11, 1000) == bytes(11)
    # Many at once, answered in any order.
    buffers = [nbd.Buffer(4096) for _ in range(200)]
    cookies = [a.aio_pread(buffer, i * 4096) for i, buffer in enumerate(buffers)]
    while a.aio_in_flight():
        a.poll(-1)
        for cookie in list(cookies):
            if a.aio_command_completed(cookie):
                cookies.remove(cookie)
    for h in (a, b):
        h.shutdown()
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(uri.replace("vm1/vda", "vm1@latest/vda"))
try:
    h.pwrite(b"x", 0)
except nbd.Error as e:
    assert e.errnum == errno.EPERM
else:
    assert False
h = nbd.NBD()
try:
    h.connect_uri(uri.replace("vm1/vda", "vm1/none"))
except nbd.Error as e:
    assert "no such export" in str(e) or e.errnum == errno.ENOENT, e
else:
    assert False
"#,
        uri = server.uri("vm1/vda")
    );
    // Debian's Python, which its binding is for.
    run("/usr/bin/python3", &["-c", &script]);
}

#[test]
fn the_nbd_crates_client_reads_what_it_wrote() {
    let server = Server::start();
    let mut stream = UnixStream::connect(server.socket()).expect("connected");
    let export = nbd::client::handshake(&mut stream, b"vm1/vda").expect("an export");
    assert_eq!(export.size, SIZE as u64);
    let mut client = nbd::client::NbdClient::new(&mut stream, &export);
    client.seek(SeekFrom::Start(4000)).expect("sought");
    client
        .write_all(b"across a block's edge, as it happens, for once, and on and on and on")
        .expect("written");
    client.seek(SeekFrom::Start(4000)).expect("sought");
    let mut bytes = [0; 22];
    client.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"across a block's edge,");
}

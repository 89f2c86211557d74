//! A worker, an engine and real files, spoken to over a socket pair in plain NBD.

use super::*;
use crate::backing::{Backing, BackingOptions};
use crate::io::FileId;
use crate::io::mapping::RingMapping;
use crate::io::storage::StorageParts;
use crate::nbd::export::{ExportInfo, Negotiated, Target};
use crate::ship::port::GroupIdentity;
use afterimage_format::ids::{DiskIndex, GroupId, LogId};
use afterimage_format::nbd::reply::ReplyForm;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const DISK: DiskIndex = DiskIndex(0);
const DISK_BYTES: u64 = 64 << 20;
const RING_BLOCKS: u32 = 1023;
const LOG_BLOCKS: u64 = 4096;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;

struct Rig {
    folder: tempfile::TempDir,
    shm: tempfile::TempDir,
    proxy: ProxyHandle,
    runtime: tokio::runtime::Runtime,
    group: GroupHandle,
}

fn rig() -> Rig {
    let folder = tempfile::tempdir().expect("a folder");
    let shm = tempfile::tempdir_in("/dev/shm").expect("a tmpfs");
    let disk = folder.path().join("disk");
    std::fs::File::create(&disk)
        .and_then(|file| file.set_len(DISK_BYTES))
        .expect("a disk");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let proxy = ProxyHandle::start(Some(1)).expect("a worker");
    let recovered = recovered(folder.path(), shm.path());
    let group = runtime.block_on(proxy.add_group(recovered)).expect("added");
    Rig {
        folder,
        shm,
        proxy,
        runtime,
        group,
    }
}

impl Rig {
    fn connect(&self) -> Client {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let export = ExportInfo {
            name: "vm1/vda".to_owned(),
            description: String::new(),
            size: DISK_BYTES,
            read_only: false,
            rotational: false,
            has_dirty: false,
            target: Target::Disk {
                group: self.group.identity().group,
                disk: DISK,
            },
        };
        let attachment = Attachment {
            disk: DISK,
            socket: theirs.into(),
            tls: None,
            negotiated: Negotiated {
                export,
                form: ReplyForm::Simple,
                contexts: Vec::new(),
                ack_durable: false,
            },
            peer: "test".to_owned(),
        };
        self.group.attach(attachment).expect("attached");
        Client { socket: ours }
    }

    fn connections(&self) -> usize {
        let snapshot = self.runtime.block_on(self.group.snapshot());
        snapshot.expect("a snapshot").connections.len()
    }
}

struct Client {
    socket: UnixStream,
}

fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(0x2560_9513u32.to_be_bytes());
    bytes.extend(0u16.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

impl Client {
    fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("sends");
    }

    fn write(&mut self, cookie: u64, offset: u64, data: &[u8]) {
        let mut bytes = request(WRITE, cookie, offset, data.len() as u32);
        bytes.extend(data);
        self.send(&bytes);
    }

    /// Cookie of the next reply, which must be a success.
    fn reply(&mut self) -> u64 {
        let mut head = [0; 16];
        self.socket.read_exact(&mut head).expect("a reply");
        assert_eq!(head[..4], 0x6744_6698u32.to_be_bytes());
        assert_eq!(head[4..8], [0; 4], "no error");
        u64::from_be_bytes(head[8..].try_into().expect("8 bytes"))
    }

    fn data(&mut self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.socket.read_exact(&mut data).expect("data");
        data
    }

    fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.send(&request(READ, 9, offset, len as u32));
        assert_eq!(self.reply(), 9);
        self.data(len)
    }
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let word = |at: u64| (seed << 32 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..len as u64 / 8)
        .flat_map(|at| word(at).to_le_bytes())
        .collect()
}

#[test]
fn writes_of_all_sizes_read_back() {
    let rig = rig();
    let mut client = rig.connect();
    // Small, odd, a receive buffer full, and more than one.
    let writes = [
        (0, 4096),
        (8192 + 512, 1024),
        (1 << 20, 256 << 10),
        (2 << 20, 3 << 20),
        (16 << 20, 32 << 20),
    ];
    for (number, (offset, len)) in writes.into_iter().enumerate() {
        client.write(number as u64, offset, &pattern(number as u64, len));
        assert_eq!(client.reply(), number as u64);
    }
    client.send(&request(FLUSH, 77, 0, 0));
    assert_eq!(client.reply(), 77);
    for (number, (offset, len)) in writes.into_iter().enumerate() {
        let same = client.read(offset, len) == pattern(number as u64, len);
        assert!(same, "write {number}");
    }
    client.send(&request(DISCONNECT, 0, 0, 0));
    assert_eq!(client.socket.read(&mut [0; 1]).expect("closes"), 0);
}

#[test]
fn many_requests_share_a_system_call() {
    let rig = rig();
    let mut client = rig.connect();
    let before = rig.runtime.block_on(rig.proxy.uring_stats())[0];
    let (rounds, depth) = (200, 32u64);
    for round in 0..rounds {
        let mut batch = Vec::new();
        for n in 0..depth {
            batch.extend(request(WRITE, n, ((round * depth + n) % 4096) * 4096, 4096));
            batch.extend(pattern(n, 4096));
        }
        client.send(&batch);
        let mut answered: Vec<u64> = (0..depth).map(|_| client.reply()).collect();
        answered.sort_unstable();
        assert!(answered.into_iter().eq(0..depth));
    }
    let after = rig.runtime.block_on(rig.proxy.uring_stats())[0];
    let enters = after.enters - before.enters;
    eprintln!("{enters} enters for {} requests", rounds * depth);
    assert!(enters < rounds * depth, "{enters} enters");
}

#[test]
fn a_client_that_stalls_in_a_payload_or_never_reads_does_not_stop_another() {
    let rig = rig();
    let mut stalled = rig.connect();
    let mut second = rig.connect();
    for client in [&mut stalled, &mut second] {
        client.send(&request(WRITE, 1, 0, 32 << 20));
        client.send(&[1; 100_000]);
    }
    let deaf = rig.connect();
    deaf.socket.set_nonblocking(true).expect("set");
    let read = request(READ, 5, 0, 1 << 20);
    // Until the server takes no more from it.
    let mut sender = &deaf.socket;
    while sender.write_all(&read).is_ok() {}
    let mut client = rig.connect();
    for n in 0..100 {
        client.write(n, n * 4096, &pattern(n, 4096));
        assert_eq!(client.reply(), n);
        assert!(client.read(n * 4096, 4096) == pattern(n, 4096), "write {n}");
    }
    assert_eq!(rig.connections(), 4);
}

#[test]
fn a_write_cut_by_a_close_changes_nothing() {
    let rig = rig();
    let mut client = rig.connect();
    let mut cut = rig.connect();
    cut.send(&request(WRITE, 1, 0, 4096));
    cut.send(&[7; 4095]);
    drop(cut);
    rig.runtime
        .block_on(rig.group.quiesce(DISK))
        .expect("quiet");
    assert_eq!(rig.connections(), 1);
    assert!(client.read(0, 4096) == vec![0; 4096]);
}

#[test]
fn after_quiesce_nothing_of_a_dead_client_takes_effect() {
    let rig = rig();
    for round in 0..20 {
        let mut dead = rig.connect();
        for n in 0..64u64 {
            dead.write(n, n * 4096, &pattern(round, 4096));
        }
        drop(dead);
        rig.runtime
            .block_on(rig.group.quiesce(DISK))
            .expect("quiet");
        // Whatever was not executed by now never will be: what the next client writes stays.
        let mut next = rig.connect();
        for n in 0..64u64 {
            let seen = next.read(n * 4096, 4096);
            let old = round.checked_sub(1).map(|last| pattern(1000 + last, 4096));
            let known = seen == pattern(round, 4096) || seen == old.unwrap_or(vec![0; 4096]);
            assert!(known, "round {round}, block {n}");
            next.write(n, n * 4096, &pattern(1000 + round, 4096));
            next.reply();
        }
        for n in 0..64u64 {
            let same = next.read(n * 4096, 4096) == pattern(1000 + round, 4096);
            assert!(same, "round {round}, block {n}");
        }
    }
}

#[test]
fn half_closed_clients_get_their_answers() {
    let rig = rig();
    let mut client = rig.connect();
    for n in 0..8u64 {
        client.send(&request(READ, n, 0, 1 << 20));
    }
    client
        .socket
        .shutdown(std::net::Shutdown::Write)
        .expect("half");
    for _ in 0..8 {
        client.reply();
        client.data(1 << 20);
    }
    assert_eq!(client.socket.read(&mut [0; 1]).expect("closes"), 0);
}

#[test]
fn an_idle_thread_is_not_woken() {
    let rig = rig();
    let mut client = rig.connect();
    client.write(1, 0, &pattern(1, 4096));
    client.reply();
    client.send(&request(FLUSH, 2, 0, 0));
    client.reply();
    // Draining leaves the engine without a deadline.
    rig.runtime.block_on(rig.group.drain()).expect("drained");
    let before = rig.runtime.block_on(rig.proxy.uring_stats())[0];
    std::thread::sleep(Duration::from_millis(200));
    let after = rig.runtime.block_on(rig.proxy.uring_stats())[0];
    // The question itself wakes it.
    assert!(after.enters - before.enters <= 4, "{before:?} {after:?}");
}

#[test]
fn a_removed_group_lets_go_of_its_files() {
    let rig = rig();
    let mut client = rig.connect();
    client.write(1, 4096, &pattern(3, 4096));
    client.reply();
    rig.runtime.block_on(rig.group.drain()).expect("drained");
    rig.runtime.block_on(rig.group.remove());
    assert!(matches!(client.socket.read(&mut [0; 1]), Ok(0) | Err(_)));
    let path = rig.folder.path().join("disk");
    let options = BackingOptions {
        patience: Duration::ZERO,
        ..BackingOptions::default()
    };
    Backing::open(&path, &options).expect("free again");
    let content = std::fs::read(&path).expect("readable");
    assert!(content[4096..8192] == pattern(3, 4096));
    assert!(rig.runtime.block_on(rig.group.snapshot()).is_err());
    let Rig { proxy, shm, .. } = rig;
    proxy.stop();
    drop(shm);
}

/// A new log, recovered.
fn recovered(folder: &Path, shm: &Path) -> RecoveredGroup {
    use afterimage_format::ids::{BootId, Epoch};
    let ring = RingMapping::create(
        &shm.join("ring"),
        (u64::from(RING_BLOCKS) + 1) * 4096,
        Duration::ZERO,
    )
    .expect("a ring");
    let backing = Backing::open(&folder.join("disk"), &BackingOptions::default()).expect("opens");
    let log = crate::io::file::StorageFile::create_zeroed(
        &folder.join("log"),
        (LOG_BLOCKS + 2) * 4096,
        &crate::io::file::OpenOptions::log(),
    )
    .expect("a log");
    let superblock = afterimage_format::superblock::Superblock {
        group: GroupId::from_bytes([1; 16]),
        log: LogId::from_bytes([2; 16]),
        boot: BootId::from_bytes([0; 16]),
        generation: 1,
        epoch: Epoch(0),
        area_blocks: LOG_BLOCKS,
        incarnation: 1,
        incarnation_frame: 1,
        ring_blocks: RING_BLOCKS,
        clean: false,
        tail: afterimage_format::superblock::Tail {
            position: 0,
            frame: 1,
            lsn: Lsn(1),
            lap: 0,
            previous_crc: 0,
        },
        destaged: Lsn(0),
        durable: Lsn(0),
        created_ns: 0,
        disks: vec![afterimage_format::superblock::DiskState {
            id: afterimage_format::ids::DiskId::from_bytes([3; 16]),
            size: DISK_BYTES,
            removed: false,
        }],
        sinks: Vec::new(),
    };
    RecoveredGroup {
        identity: GroupIdentity {
            group: GroupId::from_bytes([1; 16]),
            name: "vm1".to_owned(),
            log: LogId::from_bytes([2; 16]),
            disks: Vec::new(),
        },
        parts: StorageParts {
            ring: Some(ring),
            files: vec![(FileId::LOG, log), (FileId::backing(DISK), backing.file)],
        },
        start: crate::engine::LogStart {
            superblock,
            ring_blocks: RING_BLOCKS,
            next_frame: 1,
            next_lsn: Lsn(1),
            previous_crc: 0,
            position: 0,
            lap: 0,
            frames: Vec::new(),
        },
        config: crate::engine::EngineConfig::default(),
        payload_budget_bytes: 64 << 20,
        detach_marker: Arc::new(|| Ok(())),
    }
}

//! A steady load allocates nothing per request on the thread that serves it: everything a request
//! needs is kept from those before it. Counted by the allocator of this test, on that thread alone.
//! Zeroed ranges are the exception: the map that holds them until they are destaged has nodes.
#![expect(unsafe_code, reason = "an allocator that counts")]

use afterimage_format::ids::{BootId, DiskId, DiskIndex, GroupId, LogId};
use afterimage_format::superblock::DiskState;
use afterimage_proxy::backing::{Backing, BackingOptions};
use afterimage_proxy::engine::EngineConfig;
use afterimage_proxy::engine::blocking::FileNames;
use afterimage_proxy::engine::log::create::{self, NewLog};
use afterimage_proxy::engine::recovery::{Accepted, ConfiguredDisk, RecoveryInput, recover};
use afterimage_proxy::io::FileId;
use afterimage_proxy::io::file::{OpenOptions, StorageFile};
use afterimage_proxy::io::mapping::{RingMapping, boot_id};
use afterimage_proxy::io::storage::{StorageParts, UringStorage};
use afterimage_proxy::io::uring::Uring;
use afterimage_proxy::nbd::export::{
    BoxFuture, ExportInfo, Exports, ListedExport, OpenError, Peer, Target,
};
use afterimage_proxy::nbd::listener::{
    Attach, Connection, ListenAddress, Listener, ListenerConfig,
};
use afterimage_proxy::ship::port::GroupIdentity;
use afterimage_proxy::worker::{Attachment, GroupHandle, ProxyHandle, RecoveredGroup};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The thread that is watched.
static WATCHED: AtomicI32 = AtomicI32::new(0);
static COUNT: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

struct Counting;

fn count(layout: &Layout) {
    thread_local! {
        static THREAD: Cell<i32> = const { Cell::new(0) };
    }
    let watched = WATCHED.load(Ordering::Relaxed);
    if watched == 0 {
        return;
    }
    let thread = THREAD.with(|known| {
        if known.get() == 0 {
            // SAFETY: takes nothing, touches nothing.
            known.set(unsafe { libc::gettid() });
        }
        known.get()
    });
    if thread == watched {
        COUNT.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(layout.size() as u64, Ordering::Relaxed);
    }
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(&layout);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DISK_BYTES: u64 = 64 << 20;
const GROUP: GroupId = GroupId::from_bytes([1; 16]);
const LOG: LogId = LogId::from_bytes([2; 16]);
const DISK_ID: DiskId = DiskId::from_bytes([3; 16]);
const DISK: DiskIndex = DiskIndex(0);

/// The group's disk, as the only export.
struct Only(GroupHandle);

impl Exports for Only {
    fn list<'a>(&'a self, _: &'a Peer) -> BoxFuture<'a, Vec<ListedExport>> {
        Box::pin(async { Vec::new() })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
        _: &'a Peer,
    ) -> BoxFuture<'a, Result<ExportInfo, OpenError>> {
        let info = ExportInfo {
            name: name.to_owned(),
            description: String::new(),
            size: DISK_BYTES,
            read_only: false,
            rotational: false,
            has_dirty: false,
            target: Target::Disk {
                group: GROUP,
                disk: DISK,
            },
        };
        Box::pin(async move { Ok(info) })
    }

    fn quiesce<'a>(&'a self, _: &'a ExportInfo) -> BoxFuture<'a, Result<(), OpenError>> {
        Box::pin(async { Ok(()) })
    }
}

impl Attach for Only {
    fn attach(&self, connection: Connection) {
        let attachment = Attachment {
            disk: DISK,
            socket: connection.socket,
            tls: None,
            negotiated: connection.negotiated,
            peer: "test".to_owned(),
            slot: connection.slot,
        };
        self.0.attach(attachment).expect("the group runs");
    }
}

fn group(folder: &Path, shm: &Path) -> RecoveredGroup {
    let (log, disk, ring) = (folder.join("log"), folder.join("disk"), shm.join("ring"));
    std::fs::File::create(&disk)
        .and_then(|file| file.set_len(DISK_BYTES))
        .expect("a disk");
    let boot = BootId::from_bytes(boot_id().expect("a boot id"));
    let new = NewLog {
        group: GROUP,
        log: LOG,
        size: 64 << 20,
        disks: vec![DiskState {
            id: DISK_ID,
            size: DISK_BYTES,
            removed: false,
        }],
        sinks: Vec::new(),
        boot,
        now_ns: 1,
    };
    drop(create::create(&log, &new).expect("a log"));
    let ring_memory = RingMapping::create(&ring, 16 << 20, Duration::ZERO).expect("a ring");
    let backing = Backing::open(&disk, &BackingOptions::default()).expect("opens");
    let parts = StorageParts {
        ring: Some(ring_memory),
        files: vec![
            (
                FileId::LOG,
                StorageFile::open(&log, &OpenOptions::log()).expect("opens"),
            ),
            (FileId::backing(DISK), backing.file),
        ],
    };
    let input = RecoveryInput {
        names: FileNames {
            log,
            next_log: Default::default(),
            ring,
            backings: vec![disk],
            claims: Vec::new(),
        },
        group: GROUP,
        boot,
        disks: vec![ConfiguredDisk {
            id: DISK_ID,
            size: DISK_BYTES,
            last_write: Default::default(),
        }],
        sinks: Vec::new(),
        claims: false,
        accepted: Accepted::default(),
    };
    let uring = Uring::new().expect("io_uring");
    let mut storage = UringStorage::new(&uring, parts);
    let start = recover(&mut storage, &input)
        .expect("recovers")
        .into_start();
    RecoveredGroup {
        identity: GroupIdentity {
            group: GROUP,
            name: "vm1".to_owned(),
            log: LOG,
            disks: Vec::new(),
        },
        parts: storage.into_parts().expect("nobody else has them"),
        start,
        config: EngineConfig::default(),
        payload_budget_bytes: 64 << 20,
        detach_marker: Arc::new(|| Ok(())),
    }
}

/// The thread of this name.
fn thread_named(name: &str) -> i32 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("proc");
    let found = tasks.filter_map(Result::ok).find(|task| {
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
    });
    let id = found.expect("the thread runs").file_name();
    id.to_string_lossy().parse().expect("a number")
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const DEPTH: usize = 16;

struct Client {
    socket: UnixStream,
    dice: u64,
}

impl Client {
    fn open(path: &Path) -> Self {
        let mut socket = UnixStream::connect(path).expect("listens");
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting).expect("a greeting");
        let mut hello = 3u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(1u32.to_be_bytes());
        hello.extend(7u32.to_be_bytes());
        hello.extend(b"vm1/vda");
        socket.write_all(&hello).expect("sends");
        socket.read_exact(&mut [0; 10]).expect("size and flags");
        Self { socket, dice: 1 }
    }

    fn roll(&mut self) -> u64 {
        self.dice = self
            .dice
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        self.dice >> 33
    }

    /// Batches of requests, answered before the next is sent.
    fn load(&mut self, batches: usize, kind: impl Fn(u64) -> (u16, u32)) {
        let mut bytes = Vec::new();
        for _ in 0..batches {
            bytes.clear();
            let mut owed = 0;
            for _ in 0..DEPTH {
                let roll = self.roll();
                let (command, len) = kind(roll);
                let offset = (self.roll() % 4096) * 4096;
                bytes.extend(0x2560_9513u32.to_be_bytes());
                bytes.extend(0u16.to_be_bytes());
                bytes.extend(command.to_be_bytes());
                bytes.extend(7u64.to_be_bytes());
                let offset = if command == FLUSH { 0 } else { offset };
                bytes.extend(offset.to_be_bytes());
                bytes.extend(len.to_be_bytes());
                if command == WRITE {
                    bytes.resize(bytes.len() + len as usize, roll as u8);
                }
                owed += 16 + if command == READ { len as usize } else { 0 };
            }
            self.socket.write_all(&bytes).expect("sends");
            bytes.resize(owed, 0);
            self.socket.read_exact(&mut bytes[..owed]).expect("replies");
        }
    }
}

#[test]
fn a_steady_load_allocates_nothing_per_request() {
    let folder = tempfile::tempdir().expect("a folder");
    let shm = tempfile::tempdir_in("/dev/shm").expect("a tmpfs");
    let path = folder.path().join("nbd.sock");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let proxy = ProxyHandle::start(Some(1)).expect("a worker");
    let group = group(folder.path(), shm.path());
    let handle = runtime.block_on(proxy.add_group(group)).expect("added");
    let stop = CancellationToken::new();
    let only = Arc::new(Only(handle));
    let address = ListenAddress::Unix {
        path: path.clone(),
        owner: None,
        group: None,
        mode: 0o600,
    };
    let _entered = runtime.enter();
    let listener = Listener::bind(ListenerConfig::at(address)).expect("bound");
    let listening = runtime.spawn(listener.run(only.clone(), only, stop.clone()));
    let mut client = Client::open(&path);

    let mix = |roll: u64| match roll % 16 {
        0 => (FLUSH, 0),
        1..=3 => (READ, 4096),
        4 => (READ, 16384),
        5 => (TRIM, 8192),
        _ => (WRITE, 4096),
    };
    type Load = fn(u64) -> (u16, u32);
    let flush = |roll: u64| match roll % 8 {
        0 => (FLUSH, 0),
        _ => (WRITE, 4096),
    };
    // Load, and how many allocations a thousand requests may take: what destage and superblocks need
    // now and then, and never one for each request or each batch of sixteen.
    let loads: [(&str, Load, u64); 6] = [
        ("write", |_| (WRITE, 4096), 50),
        ("read", |_| (READ, 4096), 50),
        ("read of four blocks", |_| (READ, 16384), 50),
        ("write and flush", flush, 50),
        ("trim", |_| (TRIM, 8192), 300),
        ("mix", mix, 100),
    ];
    // Everything grows to what it needs, and the last zeroed range is destaged.
    for (_, kind, _) in loads {
        client.load(200, kind);
    }
    client.load(1_000, |_| (WRITE, 4096));
    WATCHED.store(thread_named("worker-0"), Ordering::Relaxed);
    let mut report = String::new();
    let mut too_many = false;
    for (name, kind, most) in loads {
        COUNT.store(0, Ordering::Relaxed);
        BYTES.store(0, Ordering::Relaxed);
        let batches = 400;
        client.load(batches, kind);
        let (count, bytes) = (COUNT.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed));
        let requests = (batches * DEPTH) as u64;
        report += &format!("{name}: {count} allocations ({bytes} bytes) in {requests} requests\n");
        too_many |= count * 1000 > most * requests;
    }
    WATCHED.store(0, Ordering::Relaxed);
    println!("{report}");
    assert!(!too_many, "more than agreed:\n{report}");
    stop.cancel();
    let _ = runtime.block_on(listening);
    proxy.stop();
}

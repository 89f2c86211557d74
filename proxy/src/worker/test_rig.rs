//! Groups, threads and clients for tests: real files in folders of their own.

use super::{Attachment, GroupHandle, ProxyHandle, RecoveredGroup};
use crate::backing::{Backing, BackingOptions};
use crate::engine::EngineConfig;
use crate::engine::blocking::FileNames;
use crate::engine::log::create::{self, NewLog};
use crate::engine::recovery::{Accepted, ConfiguredDisk, RecoveryInput, recover};
use crate::io::FileId;
use crate::io::file::{OpenOptions, StorageFile};
use crate::io::mapping::{RingMapping, boot_id};
use crate::io::storage::{StorageParts, UringStorage};
use crate::io::uring::Uring;
use crate::nbd::export::{ExportInfo, Negotiated, Target};
use crate::nbd::listener::ConnectionSlot;
use crate::ship::port::GroupIdentity;
use afterimage_format::ids::{BootId, DiskId, DiskIndex, GroupId, LogId};
use afterimage_format::nbd::reply::ReplyForm;
use afterimage_format::superblock::DiskState;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub(super) const DISK: DiskIndex = DiskIndex(0);
const DISK_BYTES: u64 = 64 << 20;
const GROUP: GroupId = GroupId::from_bytes([1; 16]);
const LOG: LogId = LogId::from_bytes([2; 16]);
const DISK_ID: DiskId = DiskId::from_bytes([3; 16]);

pub(super) const READ: u16 = 0;
pub(super) const WRITE: u16 = 1;
pub(super) const DISCONNECT: u16 = 2;
pub(super) const FLUSH: u16 = 3;

/// A thread with one group of one disk.
pub(super) struct Rig {
    pub(super) folder: tempfile::TempDir,
    pub(super) shm: tempfile::TempDir,
    pub(super) proxy: ProxyHandle,
    pub(super) runtime: tokio::runtime::Runtime,
    pub(super) group: GroupHandle,
}

impl Rig {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let shm = tempfile::tempdir_in("/dev/shm").expect("a tmpfs");
        let disk = folder.path().join("disk");
        std::fs::File::create(&disk)
            .and_then(|file| file.set_len(DISK_BYTES))
            .expect("a disk");
        let new = NewLog {
            group: GROUP,
            log: LOG,
            size: 32 << 20,
            disks: vec![DiskState {
                id: DISK_ID,
                size: DISK_BYTES,
                removed: false,
            }],
            sinks: Vec::new(),
            boot: BootId::from_bytes(boot_id().expect("a boot id")),
            now_ns: 1,
        };
        drop(create::create(&folder.path().join("log"), &new).expect("a log"));
        let ring = RingMapping::create(&shm.path().join("ring"), 4 << 20, Duration::ZERO);
        drop(ring.expect("a ring"));
        Self::start(folder, shm)
    }

    /// Recovers what is in the folders and serves it.
    fn start(folder: tempfile::TempDir, shm: tempfile::TempDir) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let proxy = ProxyHandle::start(Some(1)).expect("a worker");
        let recovered = recovered(folder.path(), shm.path());
        let group = runtime.block_on(proxy.add_group(recovered)).expect("added");
        Self {
            folder,
            shm,
            proxy,
            runtime,
            group,
        }
    }

    /// Ends the thread without draining, and starts again from what is left.
    pub(super) fn restart(self) -> Self {
        self.proxy.stop();
        Self::start(self.folder, self.shm)
    }

    fn attachment(&self, socket: UnixStream) -> Attachment {
        Attachment {
            disk: DISK,
            socket: socket.into(),
            tls: None,
            negotiated: Negotiated {
                export: ExportInfo {
                    name: "vm1/vda".to_owned(),
                    description: String::new(),
                    size: DISK_BYTES,
                    read_only: false,
                    rotational: false,
                    has_dirty: false,
                    target: Target::Disk {
                        group: GROUP,
                        disk: DISK,
                    },
                },
                form: ReplyForm::Simple,
                contexts: Vec::new(),
                ack_durable: false,
                answer: Vec::new(),
            },
            peer: "test".to_owned(),
            slot: ConnectionSlot::for_test(),
        }
    }

    /// A client that has not had its last answer of the handshake.
    pub(super) fn connect_unanswered(&self, answer: &[u8]) -> Client<UnixStream> {
        let (socket, theirs) = UnixStream::pair().expect("a socket pair");
        let mut attachment = self.attachment(theirs);
        attachment.negotiated.answer = answer.to_vec();
        self.group.attach(attachment).expect("attached");
        Client { socket }
    }

    pub(super) fn connect(&self) -> Client<UnixStream> {
        let (socket, theirs) = UnixStream::pair().expect("a socket pair");
        self.group
            .attach(self.attachment(theirs))
            .expect("attached");
        Client { socket }
    }

    /// A client whose TLS handshake is done on a thread beside it.
    pub(super) fn connect_tls(
        &self,
        server: Arc<rustls::ServerConfig>,
        client: Arc<rustls::ClientConfig>,
    ) -> Client<rustls::StreamOwned<rustls::ClientConnection, UnixStream>> {
        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        let accepting = std::thread::spawn(move || {
            let mut tls = rustls::ServerConnection::new(server).expect("a connection");
            while tls.is_handshaking() || tls.wants_write() {
                tls.complete_io(&mut theirs).expect("handshake");
            }
            (tls, theirs)
        });
        let name = "vm1.example".try_into().expect("a name");
        let tls = rustls::ClientConnection::new(client, name).expect("a connection");
        let mut socket = rustls::StreamOwned::new(tls, ours);
        while socket.conn.is_handshaking() {
            socket
                .conn
                .complete_io(&mut socket.sock)
                .expect("handshake");
        }
        let (tls, theirs) = accepting.join().expect("no panic");
        let attachment = Attachment {
            tls: Some(tls),
            ..self.attachment(theirs)
        };
        self.group.attach(attachment).expect("attached");
        Client { socket }
    }

    pub(super) fn connections(&self) -> usize {
        let snapshot = self.runtime.block_on(self.group.snapshot());
        snapshot.expect("a snapshot").connections.len()
    }
}

/// Opens the files, runs recovery on a ring of its own.
fn recovered(folder: &Path, shm: &Path) -> RecoveredGroup {
    let (log, disk, ring) = (folder.join("log"), folder.join("disk"), shm.join("ring"));
    let backing = Backing::open(&disk, &BackingOptions::default()).expect("opens");
    let parts = StorageParts {
        ring: Some(RingMapping::open(&ring, Duration::ZERO).expect("a ring")),
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
        boot: BootId::from_bytes(boot_id().expect("a boot id")),
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

/// Speaks just enough NBD.
pub(super) struct Client<S> {
    pub(super) socket: S,
}

pub(super) fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(0x2560_9513u32.to_be_bytes());
    bytes.extend(0u16.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

impl<S: Read + Write> Client<S> {
    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("sends");
    }

    pub(super) fn write(&mut self, cookie: u64, offset: u64, data: &[u8]) {
        let mut bytes = request(WRITE, cookie, offset, data.len() as u32);
        bytes.extend(data);
        self.send(&bytes);
    }

    /// Cookie of the next reply, which must be a success.
    pub(super) fn reply(&mut self) -> u64 {
        let mut head = [0; 16];
        self.socket.read_exact(&mut head).expect("a reply");
        assert_eq!(head[..4], 0x6744_6698u32.to_be_bytes());
        assert_eq!(head[4..8], [0; 4], "no error");
        u64::from_be_bytes(head[8..].try_into().expect("8 bytes"))
    }

    pub(super) fn data(&mut self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.socket.read_exact(&mut data).expect("data");
        data
    }

    pub(super) fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.send(&request(READ, 9, offset, len as u32));
        assert_eq!(self.reply(), 9);
        self.data(len)
    }
}

//! Real files on this machine's disk and on /dev/shm, without privileges.

use super::buffer::AlignedBuffer;
use super::file::{Locking, OpenError, OpenOptions, StorageFile};
use super::locks::LockError;
use super::mapping::{MappingError, RingMapping, boot_id};
use super::operation::{Piece, SocketBuffers};
use super::socket::Sockets;
use super::storage::{StorageParts, UringStorage};
use super::uring::{Uring, Wait};
use super::*;
use afterimage_format::ids::DiskIndex;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

const DISK: FileId = FileId::backing(DiskIndex(0));

fn shm() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm")
}

fn disk_folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn image(path: &std::path::Path, len: u64) -> StorageFile {
    std::fs::File::create(path)
        .and_then(|file| file.set_len(len))
        .expect("a new image");
    StorageFile::open(path, &OpenOptions::image().patience(Duration::ZERO)).expect("opens")
}

fn filled(len: usize, byte: u8) -> AlignedBuffer {
    let mut buffer = AlignedBuffer::new(len);
    buffer.fill(byte);
    buffer
}

/// Submits and waits for this one operation.
fn run(storage: &mut UringStorage, operation: Operation) -> Completion {
    storage.submit(Token(7), operation);
    let mut completions = Vec::new();
    storage.wait(&mut completions).expect("the ring works");
    assert_eq!(completions.len(), 1);
    let completion = completions.remove(0);
    assert_eq!(completion.token, Token(7));
    completion
}

fn read(storage: &mut UringStorage, offset: u64, len: usize) -> Vec<u8> {
    let completion = run(
        storage,
        Operation::Read {
            file: DISK,
            offset,
            buffer: AlignedBuffer::new(len),
        },
    );
    let have = completion.result.expect("read works");
    completion.buffer.expect("comes back")[..have].to_vec()
}

fn storage(uring: &Uring, shm: &tempfile::TempDir, disk: StorageFile) -> UringStorage {
    let ring = RingMapping::create(&shm.path().join("ring"), 1 << 20, Duration::ZERO);
    UringStorage::new(
        uring,
        StorageParts {
            ring: Some(ring.expect("a ring")),
            files: vec![(DISK, disk)],
        },
    )
}

#[test]
fn writes_from_everywhere_read_back() {
    let (shm, folder) = (shm(), disk_folder());
    let uring = Uring::new().expect("io_uring");
    let disk = image(&folder.path().join("disk"), 1 << 20);
    let mut storage = storage(&uring, &shm, disk);

    let write = |offset, source, dsync| Operation::Write {
        file: DISK,
        offset,
        source,
        dsync,
    };
    let done = run(
        &mut storage,
        write(4096, Source::Owned(filled(8192, 1)), false),
    );
    assert_eq!(done.result.expect("written"), 8192);
    assert!(done.buffer.is_some(), "the buffer comes back");

    storage.ring_write(4096, &[2; 4096]);
    storage.ring_mut(8192, 4096).fill(3);
    let span = |offset| RingSpan { offset, len: 4096 };
    let done = run(&mut storage, write(16384, Source::Ring(span(4096)), true));
    assert_eq!(done.result.expect("written"), 4096);
    let gather = Source::Gather(vec![span(8192), span(4096), span(8192)]);
    let done = run(&mut storage, write(32768, gather, false));
    assert_eq!(done.result.expect("written"), 12288);
    run(&mut storage, Operation::Sync { file: DISK })
        .result
        .expect("synced");

    assert_eq!(
        read(&mut storage, 0, 12288),
        [vec![0; 4096], vec![1; 8192]].concat()
    );
    assert_eq!(read(&mut storage, 16384, 4096), vec![2; 4096]);
    let gathered = [vec![3; 4096], vec![2; 4096], vec![3; 4096]].concat();
    assert_eq!(read(&mut storage, 32768, 12288), gathered);
    assert_eq!(storage.file_len(DISK).expect("length"), 1 << 20);
}

#[test]
fn a_read_past_the_end_is_short_and_of_nothing_is_empty() {
    let (shm, folder) = (shm(), disk_folder());
    let uring = Uring::new().expect("io_uring");
    let disk = image(&folder.path().join("disk"), 8192 + 512);
    let mut storage = storage(&uring, &shm, disk);
    assert_eq!(read(&mut storage, 4096, 8192).len(), 4096 + 512);
    assert_eq!(read(&mut storage, 65536, 4096).len(), 0);
}

#[test]
fn the_tail_of_an_odd_sized_disk_is_written_and_the_size_kept() {
    for forced in [None, Some(4096)] {
        let (shm, folder) = (shm(), disk_folder());
        let uring = Uring::new().expect("io_uring");
        let path = folder.path().join("disk");
        let mut disk = image(&path, 8192 + 512);
        if let Some(align) = forced {
            // As on a device of 4096-byte sectors: O_DIRECT cannot carry the tail.
            disk.force_align(align);
        }
        let mut storage = storage(&uring, &shm, disk);
        let tail = Operation::Write {
            file: DISK,
            offset: 8192,
            source: Source::Owned(filled(512, 9)),
            dsync: false,
        };
        assert_eq!(run(&mut storage, tail).result.expect("written"), 512);
        run(&mut storage, Operation::Sync { file: DISK })
            .result
            .expect("synced");
        assert_eq!(read(&mut storage, 8192, 512), vec![9; 512], "{forced:?}");
        assert_eq!(storage.file_len(DISK).expect("length"), 8192 + 512);
    }
}

#[test]
fn punched_and_zeroed_ranges_read_as_zero() {
    let (shm, folder) = (shm(), disk_folder());
    let uring = Uring::new().expect("io_uring");
    let disk = image(&folder.path().join("disk"), 1 << 20);
    let mut storage = storage(&uring, &shm, disk);
    let all = Operation::Write {
        file: DISK,
        offset: 0,
        source: Source::Owned(filled(1 << 20, 5)),
        dsync: false,
    };
    run(&mut storage, all).result.expect("written");
    let (offset, len) = (65536, 131_072);
    run(
        &mut storage,
        Operation::PunchHole {
            file: DISK,
            offset,
            len,
        },
    )
    .result
    .expect("punched");
    let (offset, len) = (262_144, 65536);
    run(
        &mut storage,
        Operation::WriteZeroes {
            file: DISK,
            offset,
            len,
        },
    )
    .result
    .expect("zeroed");
    run(&mut storage, Operation::Sync { file: DISK })
        .result
        .expect("synced");
    let content = read(&mut storage, 0, 1 << 20);
    for (at, byte) in content.iter().enumerate() {
        let zeroed = (65536..196_608).contains(&at) || (262_144..327_680).contains(&at);
        assert_eq!(*byte, if zeroed { 0 } else { 5 }, "at {at}");
    }
    let runs = storage
        .allocated(DISK, 0, 1 << 20, 100)
        .expect("allocation");
    assert!(
        runs.iter()
            .all(|run| run.end <= 65536 || run.start >= 196_608),
        "the punched range is a hole: {runs:?}"
    );
}

#[test]
fn what_cannot_zero_by_itself_gets_written_zeroes() {
    let (shm, folder) = (shm(), disk_folder());
    let uring = Uring::new().expect("io_uring");
    let disk = image(&folder.path().join("disk"), 1 << 20);
    disk.refuse_zero_method(super::file::ZeroMethod::ZeroRange);
    let mut storage = storage(&uring, &shm, disk);
    let all = Operation::Write {
        file: DISK,
        offset: 0,
        source: Source::Owned(filled(1 << 20, 5)),
        dsync: false,
    };
    run(&mut storage, all).result.expect("written");
    let (offset, len) = (4096, 700_416);
    run(
        &mut storage,
        Operation::PunchHole {
            file: DISK,
            offset,
            len,
        },
    )
    .result
    .expect("zeroed");
    let content = read(&mut storage, 0, 1 << 20);
    let wrong = content
        .iter()
        .enumerate()
        .find(|(at, byte)| (**byte == 0) != (4096..704_512).contains(at));
    assert_eq!(wrong, None);
}

#[test]
fn many_operations_share_one_enter() {
    let (shm, folder) = (shm(), disk_folder());
    let uring = Uring::new().expect("io_uring");
    let disk = image(&folder.path().join("disk"), 1 << 22);
    let mut storage = storage(&uring, &shm, disk);
    uring.set_driven(true);
    for n in 0..3000u64 {
        let operation = Operation::Write {
            file: DISK,
            offset: (n % 1024) * 4096,
            source: Source::Owned(filled(4096, 1)),
            dsync: false,
        };
        storage.submit(Token(n), operation);
    }
    let mut completions = Vec::new();
    while completions.len() < 3000 {
        uring.enter(Wait::Forever).expect("the ring works");
        storage.poll(&mut completions);
    }
    let mut tokens: Vec<u64> = completions.iter().map(|done| done.token.0).collect();
    tokens.sort_unstable();
    assert!(tokens.iter().copied().eq(0..3000), "each answered once");
    assert!(
        completions
            .iter()
            .all(|done| matches!(done.result, Ok(4096)))
    );
    assert!(uring.stats().enters < 3000, "{:?}", uring.stats());
}

#[test]
fn dropping_waits_for_what_is_in_flight() {
    let (shm, folder) = (shm(), disk_folder());
    let path = folder.path().join("disk");
    let uring = Uring::new().expect("io_uring");
    let mut storage = storage(&uring, &shm, image(&path, 1 << 22));
    for n in 0..4u64 {
        let operation = Operation::Write {
            file: DISK,
            offset: n << 20,
            source: Source::Owned(filled(1 << 20, 7)),
            dsync: false,
        };
        storage.submit(Token(n), operation);
    }
    drop(storage);
    assert_eq!(uring.in_flight(), 0);
    let content = std::fs::read(&path).expect("readable");
    assert!(content.iter().all(|byte| *byte == 7));
    let again = StorageFile::open(&path, &OpenOptions::image().patience(Duration::ZERO));
    assert!(again.is_ok(), "its locks are gone");
}

#[test]
fn parts_move_to_another_thread() {
    let (shm, folder) = (shm(), disk_folder());
    let disk = image(&folder.path().join("disk"), 1 << 20);
    let uring = Uring::new().expect("io_uring");
    let mut first = storage(&uring, &shm, disk);
    first.ring_write(0, b"kept");
    let parts = first.into_parts().expect("nobody else has them");
    let moved = std::thread::spawn(move || {
        let uring = Uring::new().expect("io_uring");
        let mut second = UringStorage::new(&uring, parts);
        assert_eq!(second.ring(0, 4), b"kept");
        read(&mut second, 0, 4096).len()
    });
    assert_eq!(moved.join().expect("no panic"), 4096);
}

#[test]
fn an_image_in_use_is_refused_and_the_holder_named() {
    let folder = disk_folder();
    let path = folder.path().join("disk");
    let _first = image(&path, 8192);
    let second = StorageFile::open(&path, &OpenOptions::image().patience(Duration::ZERO));
    let Err(OpenError::Lock {
        source: LockError::Held(holders),
        ..
    }) = second
    else {
        panic!("opened twice: {second:?}");
    };
    assert_eq!(
        holders.iter().map(|holder| holder.pid).collect::<Vec<_>>(),
        [std::process::id()]
    );
    assert!(
        StorageFile::open(&path, &OpenOptions::reader()).is_ok(),
        "a reader needs no lock"
    );
}

#[test]
fn qemus_lock_bytes_are_honoured_both_ways() {
    let folder = disk_folder();
    let path = folder.path().join("disk");
    let qemu = |args: &[&str]| {
        std::process::Command::new("qemu-io")
            .args(["-f", "raw", "-c"])
            .args(args)
            .arg(&path)
            .output()
    };
    if qemu(&["quit"]).is_err() {
        eprintln!("qemu-io is not installed: skipped");
        return;
    }
    let ours = image(&path, 1 << 20);
    let refused = qemu(&["write 0 4096"]).expect("runs");
    assert!(
        !refused.status.success(),
        "QEMU writes while we have the image"
    );
    assert!(String::from_utf8_lossy(&refused.stderr).contains("lock"));
    drop(ours);
    let allowed = qemu(&["write 0 4096"]).expect("runs");
    assert!(allowed.status.success(), "{allowed:?}");

    let mut user = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "read 0 512", "-c", "sleep 20000"])
        .arg(&path)
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("runs");
    let reader = std::fs::File::open(&path).expect("readable");
    while super::locks::holders(std::os::fd::AsFd::as_fd(&reader)).is_empty() {
        std::thread::yield_now();
    }
    let refused = StorageFile::open(&path, &OpenOptions::image().patience(Duration::ZERO));
    let Err(OpenError::Lock {
        source: LockError::Held(holders),
        ..
    }) = refused
    else {
        panic!("opened under QEMU: {refused:?}");
    };
    assert_eq!(
        holders.iter().map(|holder| holder.pid).collect::<Vec<_>>(),
        [user.id()]
    );
    user.kill().expect("was running");
    user.wait().expect("is reaped");
}

#[test]
fn opening_names_what_is_wrong() {
    let folder = disk_folder();
    let missing = StorageFile::open(&folder.path().join("no"), &OpenOptions::image());
    assert!(matches!(missing, Err(OpenError::Missing(_))), "{missing:?}");
    let wrong = StorageFile::open(folder.path(), &OpenOptions::image());
    assert!(matches!(wrong, Err(OpenError::WrongKind(_))), "{wrong:?}");
}

#[test]
fn a_log_is_created_written_once_and_not_over_another() {
    let folder = disk_folder();
    let path = folder.path().join("log");
    let options = OpenOptions::log().patience(Duration::ZERO);
    let log = StorageFile::create_zeroed(&path, 3 << 20, &options).expect("created");
    assert_eq!(log.len().expect("length"), 3 << 20);
    let runs = log.allocated(0, 3 << 20, 10).expect("allocation");
    assert_eq!(
        runs,
        std::iter::once(0..3 << 20).collect::<Vec<_>>(),
        "written, not a hole"
    );
    let second = StorageFile::create_zeroed(&path, 3 << 20, &options);
    assert!(
        matches!(second, Err(OpenError::System { .. })),
        "{second:?}"
    );
    assert!(path.exists(), "the first one stays");
}

/// What a killed process has in flight holds the description, not the file's name: the lock must
/// sit on that very description. To whoever holds a lock it is free.
#[test]
fn a_lock_is_on_the_description_that_carries_the_io() {
    let folder = disk_folder();
    for options in [OpenOptions::log(), OpenOptions::image()] {
        let options = options.patience(Duration::ZERO);
        let path = folder.path().join("file");
        std::fs::write(&path, vec![0; 65536]).expect("written");
        let file = StorageFile::open(&path, &options).expect("opened");
        let refused = StorageFile::open(&path, &options);
        assert!(
            matches!(refused, Err(OpenError::Lock { .. })),
            "{refused:?}"
        );
        let description = std::os::fd::AsFd::as_fd(&file);
        let again = match options.locking {
            Locking::Whole => super::locks::lock_whole(description),
            _ => super::locks::lock_image(description),
        };
        again.expect("this description has the lock");
    }
}

#[test]
fn a_log_that_does_not_fit_leaves_nothing() {
    let folder = shm();
    let path = folder.path().join("log");
    let options = OpenOptions::log().patience(Duration::ZERO);
    let full = StorageFile::create_zeroed(&path, 1 << 60, &options);
    assert!(matches!(full, Err(OpenError::NoSpace { .. })), "{full:?}");
    assert!(!path.exists());
}

#[test]
fn a_ring_survives_its_user_and_is_refused_twice() {
    let folder = shm();
    let path = folder.path().join("ring");
    let ring = RingMapping::create(&path, 65536, Duration::ZERO).expect("created");
    ring.store(8, 0xfeed);
    let second = RingMapping::open(&path, Duration::ZERO);
    assert!(
        matches!(second, Err(MappingError::Lock { .. })),
        "{second:?}"
    );
    drop(ring);
    let again = RingMapping::open(&path, Duration::ZERO).expect("is there");
    assert_eq!((again.len(), again.load(8)), (65536, 0xfeed));
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(&path).expect("is there").permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
    drop(again);
    let emptied = RingMapping::create(&path, 65536, Duration::ZERO).expect("created anew");
    assert_eq!(emptied.load(8), 0);
    emptied.remove().expect("removed");
    assert!(matches!(
        RingMapping::open(&path, Duration::ZERO),
        Err(MappingError::Missing(_))
    ));
}

#[test]
fn a_ring_belongs_on_a_tmpfs_and_must_fit() {
    let folder = disk_folder();
    let on_disk = RingMapping::create(&folder.path().join("ring"), 65536, Duration::ZERO);
    assert!(
        matches!(on_disk, Err(MappingError::NotTmpfs(_))),
        "{on_disk:?}"
    );
    assert!(!folder.path().join("ring").exists());
    let folder = shm();
    let path = folder.path().join("ring");
    let ring = RingMapping::create(&path, 65536, Duration::ZERO).expect("created");
    ring.store(8, 0xfeed);
    drop(ring);
    let huge = RingMapping::create(&path, 1 << 50, Duration::ZERO);
    assert!(
        matches!(huge, Err(MappingError::NoSpace { .. })),
        "{huge:?}"
    );
    let kept = RingMapping::open(&path, Duration::ZERO).expect("is there");
    assert_eq!((kept.len(), kept.load(8)), (65536, 0xfeed));
}

#[test]
fn a_prepared_ring_is_nowhere_until_it_gets_its_name() {
    let folder = shm();
    let path = folder.path().join("ring");
    let huge = RingMapping::prepare(&path, 1 << 50);
    assert!(
        matches!(huge, Err(MappingError::NoSpace { .. })),
        "{huge:?}"
    );
    let ring = RingMapping::prepare(&path, 65536).expect("made");
    let names = || std::fs::read_dir(folder.path()).expect("read").count();
    assert_eq!(names(), 0);
    ring.publish().expect("named");
    let second = RingMapping::open(&path, Duration::ZERO);
    assert!(
        matches!(second, Err(MappingError::Lock { .. })),
        "{second:?}"
    );
    let taken = RingMapping::prepare(&path, 65536).expect("made").publish();
    assert!(
        matches!(taken, Err(MappingError::System { .. })),
        "{taken:?}"
    );
    ring.remove().expect("removed");
    assert_eq!(names(), 0);
}

#[test]
fn the_boot_id_stays() {
    let id = boot_id().expect("Linux");
    assert_ne!(id, [0; 16]);
    assert_eq!(id, boot_id().expect("Linux"));
}

#[test]
fn sockets_send_pieces_and_receive_beside_storage() {
    let uring = Uring::new().expect("io_uring");
    let sockets = Sockets::new(&uring);
    let (near, far) = UnixStream::pair().expect("a socket pair");
    let near = Rc::new(OwnedFd::from(near));
    let piece = |byte, start, len| Piece::Data {
        buffer: filled(4096, byte),
        start,
        len,
    };
    // More than the socket's buffer takes at once.
    let mut pieces: Vec<Piece> = (0..900).map(|_| piece(1, 0, 4096)).collect();
    pieces.push(piece(2, 100, 2));
    pieces.push(Piece::Small(vec![2]));
    let reader = std::thread::spawn(move || {
        let mut far = far;
        let mut all = vec![0; 900 * 4096 + 3];
        std::io::Read::read_exact(&mut far, &mut all).expect("all arrives");
        std::io::Write::write_all(&mut far, b"answer").expect("sends");
        all
    });
    sockets.send(Token(1), &near, pieces);
    sockets.receive(Token(2), &near, AlignedBuffer::new(4096), 10);
    let mut done = Vec::new();
    while done.len() < 2 {
        uring.enter(Wait::Forever).expect("the ring works");
        sockets.poll(&mut done);
    }
    done.sort_by_key(|completion| completion.token.0);
    assert_eq!(done[0].result.as_ref().expect("sent"), &(900 * 4096 + 3));
    assert!(matches!(&done[0].buffers, SocketBuffers::Sent(pieces) if pieces.len() == 902));
    assert_eq!(done[1].result.as_ref().expect("received"), &6);
    let SocketBuffers::Received(buffer) = &done[1].buffers else {
        panic!("the buffer comes back");
    };
    assert_eq!(&buffer[10..16], b"answer");
    let all = reader.join().expect("no panic");
    assert!(all[..900 * 4096].iter().all(|byte| *byte == 1));
    assert_eq!(&all[900 * 4096..], [2; 3]);
}

#[test]
fn an_event_wakes_and_a_timeout_ends_the_wait() {
    let uring = Uring::new().expect("io_uring");
    let sockets = Sockets::new(&uring);
    let flags = rustix::event::EventfdFlags::CLOEXEC;
    let event = Arc::new(rustix::event::eventfd(0, flags).expect("an eventfd"));
    sockets.wait_event(Token(3), &event);
    assert_eq!(
        uring
            .enter(Wait::For(Duration::from_millis(1)))
            .expect("works"),
        0
    );
    let other = Arc::clone(&event);
    std::thread::spawn(move || rustix::io::write(&other, &1u64.to_ne_bytes()))
        .join()
        .expect("no panic")
        .expect("counts");
    assert_eq!(uring.enter(Wait::Forever).expect("works"), 1);
    // A receive that never ends does not keep the thread from closing.
    let (near, _far) = UnixStream::pair().expect("a socket pair");
    sockets.receive(Token(4), &Rc::new(near.into()), AlignedBuffer::new(4096), 0);
    assert_eq!(uring.enter(Wait::No).expect("works"), 0);
    drop((sockets, uring));
}

/// A thread keeps a registered ring alive although it was dropped, at most 16 of them; and such a
/// ring may hold the last files of its operations, with their locks, for as long.
#[test]
fn a_dropped_ring_leaves_nothing_with_its_thread() {
    for _ in 0..40 {
        drop(Uring::new().expect("io_uring"));
    }
    let ring = io_uring::IoUring::new(2).expect("io_uring");
    let mut submitter = ring.submitter();
    match submitter.register_ring_fd() {
        Ok(()) => submitter.unregister_ring_fd().expect("just registered"),
        // A kernel before 5.18 has no such thing.
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{error}"),
    }
}

//! A worker, an engine and real files, spoken to over a socket pair in plain NBD.

use super::test_rig::{Client, DISCONNECT, DISK, FLUSH, READ, Rig, WRITE, request};
use crate::backing::{Backing, BackingOptions};
use crate::io::file::{OpenError, OpenOptions, StorageFile};
use crate::ship::port::GroupPort as _;
use crate::tls;
use crate::tls::test_certificates::Authority;
use afterimage_format::chain::RecordChain;
use afterimage_format::segment::SinkId;
use afterimage_format::wire::Cursor;
use std::io::{Read, Write};
use std::time::Duration;

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let word = |at: u64| (seed << 32 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..len as u64 / 8)
        .flat_map(|at| word(at).to_le_bytes())
        .collect()
}

#[test]
fn writes_of_all_sizes_read_back() {
    let rig = Rig::new();
    let mut client = rig.connect();
    write_and_read_back(&mut client);
    client.send(&request(DISCONNECT, 0, 0, 0));
    assert_eq!(client.socket.read(&mut [0; 1]).expect("closes"), 0);
}

#[test]
fn so_they_do_over_tls() {
    let rig = Rig::new();
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new(folder.path(), "ca");
    let files = authority.issue("server", &["vm1.example"], &[], false);
    let mine = authority.issue("client", &["vm1.example"], &[], false);
    let server = tls::server_config(&files, Some(&authority.file)).expect("configured");
    let client = tls::client_config(&mine, &authority.file).expect("configured");
    let mut client = rig.connect_tls(server, client);
    write_and_read_back(&mut client);
    client.send(&request(DISCONNECT, 0, 0, 0));
    assert_eq!(client.socket.read(&mut [0; 1]).expect("closes in order"), 0);
}

#[test]
fn what_was_answered_is_there_after_an_end_without_a_drain() {
    let mut rig = Rig::new();
    for round in 0..3u64 {
        let mut client = rig.connect();
        for n in 0..500u64 {
            client.write(n, n * 4096, &pattern(round * 1000 + n, 4096));
            assert_eq!(client.reply(), n);
        }
        rig = rig.restart();
        let mut client = rig.connect();
        for n in 0..500u64 {
            let same = client.read(n * 4096, 4096) == pattern(round * 1000 + n, 4096);
            assert!(same, "round {round}, write {n}");
        }
    }
}

/// A sink that compares its cursor with a stale beginning of the log walks through records that
/// are not there any more, one failed session each.
#[test]
fn the_beginning_of_the_log_is_shown_though_nothing_new_becomes_durable() {
    let rig = Rig::new();
    let mut client = rig.connect();
    for n in 0..50u64 {
        client.write(n, n * 4096, &pattern(n, 4096));
        assert_eq!(client.reply(), n);
    }
    client.send(&request(FLUSH, 99, 0, 0));
    assert_eq!(client.reply(), 99);
    let progress = rig.group.progress();
    // Without sinks, everything leaves the log once it is destaged.
    for _ in 0..600 {
        let now = *progress.borrow();
        if now.oldest == now.durable.next() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("the log is empty, what is shown is {:?}", progress.borrow());
}

/// A turn in which nothing new becomes durable publishes nothing: whoever looks at what was published
/// holds up no client.
#[test]
fn whoever_looks_at_the_progress_holds_up_no_read() {
    let rig = Rig::new();
    let mut client = rig.connect();
    assert_eq!(client.read(0, 4096), [0; 4096]);
    let progress = rig.group.progress();
    let looked_at = progress.borrow();
    for at in 0..10 {
        assert_eq!(client.read(at * 4096, 4096), [0; 4096]);
    }
    drop(looked_at);
}

#[test]
fn a_snapshot_says_what_each_sink_lacks() {
    let rig = Rig::new();
    let (near, far) = (SinkId([1; 16]), SinkId([2; 16]));
    let (group, runtime) = (&rig.group, &rig.runtime);
    let stored = runtime.block_on(group.set_sinks(vec![near, far]));
    stored.expect("stored");
    let mut client = rig.connect();
    client.write(1, 0, &pattern(1, 256 << 10));
    assert_eq!(client.reply(), 1);
    client.send(&request(FLUSH, 2, 0, 0));
    assert_eq!(client.reply(), 2);
    let acked = Cursor {
        lsn: group.progress().borrow().durable,
        chain: RecordChain::BASE,
    };
    let reported = runtime.block_on(group.report_acked(near, acked, false));
    reported.expect("reported");
    let sinks = runtime.block_on(group.snapshot()).expect("running").sinks;
    let lacking = |sink| {
        let found = sinks.iter().find(|backlog| backlog.sink == sink);
        found.expect("a sink of the group").log_bytes
    };
    assert_eq!(sinks.len(), 2);
    assert_eq!(lacking(near), 0);
    assert!(lacking(far) >= 256 << 10, "{}", lacking(far));
}

fn write_and_read_back<S: Read + Write>(client: &mut Client<S>) {
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
}

#[test]
fn many_requests_share_a_system_call() {
    let rig = Rig::new();
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
    let rig = Rig::new();
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

/// Three payloads of 32 MiB but for their last bytes, which trickle, use up the budget of 64 MiB;
/// so do clients that ask for much and read nothing. Whoever needs some gets it all the same.
#[test]
fn clients_that_hold_memory_and_do_not_move_make_room_for_another() {
    let rig = Rig::new();
    let patience = Some(Duration::from_secs(60));
    let trickling: Vec<_> = (0..3)
        .map(|_| {
            let mut client = rig.connect();
            client.send(&request(WRITE, 1, 0, 32 << 20));
            client.send(&vec![1; (32 << 20) - 1000]);
            std::thread::spawn(move || {
                // Until it is cut off.
                while client.socket.write_all(&[1]).is_ok() {
                    std::thread::sleep(Duration::from_millis(200));
                }
            })
        })
        .collect();
    let mut client = rig.connect();
    client.socket.set_read_timeout(patience).expect("set");
    let data = pattern(5, 1 << 20);
    client.write(1, 0, &data);
    assert_eq!(client.reply(), 1);
    let deaf: Vec<_> = (0..5).map(|_| rig.connect()).collect();
    for client in &deaf {
        client.socket.set_nonblocking(true).expect("set");
        let read = request(READ, 5, 0, 1 << 20);
        while (&client.socket).write_all(&read).is_ok() {}
    }
    assert!(client.read(0, 1 << 20) == data);
    drop(rig);
    for client in trickling {
        client.join().expect("it was cut off");
    }
}

#[test]
fn a_write_cut_by_a_close_changes_nothing() {
    let rig = Rig::new();
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
    let rig = Rig::new();
    for round in 0..20 {
        let mut dead = rig.connect();
        for n in 0..64u64 {
            dead.write(n, n * 4096, &pattern(round, 4096));
        }
        // The disk takes a while for so much; until then the worker cannot let go of the client.
        for n in 64..72u64 {
            dead.write(n, n << 18, &pattern(round, 1 << 18));
        }
        dead.send(&request(FLUSH, 72, 0, 0));
        drop(dead);
        rig.runtime
            .block_on(rig.group.quiesce(DISK))
            .expect("quiet");
        assert_eq!(rig.connections(), 0, "round {round}");
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

/// The answer to a client's GO comes from its worker, which has the connection by then: a quiesce
/// that is asked for after a client could write finds it, however short its life was.
#[test]
fn the_worker_answers_go_and_a_later_quiesce_finds_the_connection() {
    let rig = Rig::new();
    for round in 1..=20u64 {
        let mut dead = rig.connect_unanswered(b"GO!");
        let mut answer = [0; 3];
        dead.socket.read_exact(&mut answer).expect("answered");
        assert_eq!(&answer, b"GO!");
        dead.write(1, 0, &pattern(round, 4096));
        drop(dead);
        rig.runtime
            .block_on(rig.group.quiesce(DISK))
            .expect("quiet");
        assert_eq!(rig.connections(), 0, "round {round}");
    }
}

#[test]
fn half_closed_clients_get_their_answers() {
    let rig = Rig::new();
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
    let rig = Rig::new();
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
    let rig = Rig::new();
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

#[test]
fn the_files_of_a_group_that_ends_stay_locked_until_its_owner_lets_go() {
    let rig = Rig::new();
    let mut client = rig.connect();
    client.write(1, 0, &pattern(1, 4096));
    assert_eq!(client.reply(), 1);
    let left = rig.runtime.block_on(rig.group.remove());
    let log = rig.folder.path().join("log");
    let open = || StorageFile::open(&log, &OpenOptions::log().patience(Duration::ZERO));
    assert!(matches!(open(), Err(OpenError::Lock { .. })));
    drop(left.expect("it was there"));
    open().expect("free");
    assert!(rig.runtime.block_on(rig.group.remove()).is_none(), "gone");
}

"""A guest moves between two QEMU processes that share the export; its data is whole afterwards.

A first move is called off in the middle, while the guest writes: the other side has connected and read by
then, the guest goes on here and nothing it wrote differs.

Inside, a program writes numbered blocks with fsync all the time. After the move it
must still be running, no block it wrote may differ, and the file system must be clean.

The guest stands still while its memory is copied for good. With QEMU 7.2's software emulation a copy of a running
guest's memory can miss a store that races with the tracking of dirty pages (about one move in twenty then
ends in a crashed kernel, whatever serves the disk); the disk's side of the move is the same.
"""
# limit: 900

from harness.process import expect, expect_equal, run, say, scratch, wait_until
from harness.server import STANDIN, Server
from vm.guest import Guest, copy_root, nbd_root

WRITER = """
import os, hashlib
count = 0
with open('/srv/blocks', 'w+b', buffering=0) as file:
    while not os.path.exists('/srv/stop'):
        file.write(hashlib.sha256(str(count).encode()).digest() * 128)
        os.fsync(file.fileno())
        count += 1
        if count % 20 == 0:
            with open('/run/count', 'w') as note:
                note.write(str(count))
with open('/run/count', 'w') as note:
    note.write(str(count))
"""
CHECKER = """
import hashlib
count = int(open('/run/count').read())
with open('/srv/blocks', 'rb') as file:
    for number in range(count):
        assert file.read(4096) == hashlib.sha256(str(number).encode()).digest() * 128, number
    assert file.read(1) == b''
print(count)
"""


PART_CHECKER = """
import hashlib, sys
with open('/srv/blocks', 'rb') as file:
    for number in range(int(sys.argv[1])):
        assert file.read(4096) == hashlib.sha256(str(number).encode()).digest() * 128, number
"""
# Slow enough that a move is never over before it is called off.
CRAWL_BYTES_PER_SECOND = 1 << 20


def called_off(folder, server, source):
    """A move of the running guest that ends in the middle."""
    incoming = f"unix:{folder}/called-off.sock"
    with Guest(folder, "called-off", nbd_root(server.socket, "vm1/vda"), incoming=incoming) as target:
        source.qmp("migrate-set-parameters", **{"max-bandwidth": CRAWL_BYTES_PER_SECOND})
        source.qmp("migrate", uri=incoming)
        wait_until(lambda: source.qmp("query-migrate").get("ram", {}).get("transferred", 0) > 1 << 20, "a part of the move")
        # Both have the disk open; the source writes, the target reads.
        before = blocks_written(source)
        for _ in range(5):
            said = target.qmp("human-monitor-command", **{"command-line": 'qemu-io root "read 0 4M"'})
            expect("error" not in said.lower() and "failed" not in said.lower(), f"a read at the target: {said}")
        wait_until(lambda: blocks_written(source) >= before + 20, "blocks written during the move")
        expect_equal(source.qmp("query-migrate")["status"], "active", "status of the move")
        source.qmp("migrate_cancel")
        wait_until(lambda: source.qmp("query-migrate")["status"] == "cancelled", "the move to be called off")
        expect_equal(source.run_state(), "running", "state of the source")
    after = blocks_written(source)
    wait_until(lambda: blocks_written(source) >= after + 20, "blocks written after the move was called off")
    source.run("echo 3 > /proc/sys/vm/drop_caches")
    source.run(f"cat > /run/part_checker.py <<'END'\n{PART_CHECKER}\nEND\npython3 /run/part_checker.py {after}")
    source.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
    say(f"a move was called off; {after} blocks are right, and more are being written")


def blocks_written(guest):
    """How many blocks the program inside has noted."""
    return int(guest.run("cat /run/count 2>/dev/null || echo 0"))


with scratch() as folder, Server(folder, groups={"vm1": {"vda": "1600MiB"}}, log="512MiB", ring="64MiB") as server:
    copy_root(folder / "root.raw")
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", folder / "root.raw", server.uri())
    incoming = f"unix:{folder}/migration.sock"
    with Guest(folder, "source", nbd_root(server.socket, "vm1/vda")) as source:
        source.wait_until_up()
        source.run(f"cat > /run/writer.py <<'END'\n{WRITER}\nEND\n")
        source.run("systemd-run --unit=writer /usr/bin/python3 /run/writer.py")
        wait_until(lambda: blocks_written(source) >= 40, "blocks written before the move")

        called_off(folder, server, source)
        with Guest(folder, "target", nbd_root(server.socket, "vm1/vda"), incoming=incoming) as target:
            source.qmp("stop")
            source.qmp("migrate", uri=incoming)
            wait_until(
                lambda: source.qmp("query-migrate").get("status") in ("completed", "failed"),
                "the migration", 300,
            )
            expect_equal(source.qmp("query-migrate")["status"], "completed", "status of the migration")
            expect_equal(source.run_state(), "postmigrate", "state of the source")
            wait_until(lambda: target.run_state() == "paused", "the target to have the guest")
            target.qmp("cont")
            target.wait_until_up()
            moved_at = blocks_written(target)
            say(f"moved with {moved_at} blocks written")
            wait_until(lambda: blocks_written(target) >= moved_at + 40, "blocks written after the move")
            source.kill()
            target.run("touch /srv/stop; while systemctl -q is-active writer; do sleep 0.2; done")
            target.run("sync; echo 3 > /proc/sys/vm/drop_caches")
            target.run(f"cat > /run/checker.py <<'END'\n{CHECKER}\nEND\n")
            say(f"{target.run('python3 /run/checker.py').strip()} blocks are right")
            target.power_off()
    if not STANDIN:
        server.cli("detach", "vm1")
    server.stop()
    checked = run("e2fsck", "-fn", server.backing(), ok=None)
    expect(checked.returncode == 0, f"the file system is clean:\n{checked.stdout}")

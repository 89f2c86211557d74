"""A reader written from docs/format.md alone rebuilds the disks at every checkpoint, over two epochs."""

from pathlib import Path

from harness.by_the_docs import PASS_BEGIN, PASS_END, TRIM, WRITE, ZERO, History, Unreadable
from harness.model import Disk
from harness.nbd_client import TRIM as TRIM_COMMAND
from harness.nbd_client import WRITE_ZEROES
from harness.process import expect, expect_equal, scratch
from harness.server import Afterimage

FLAG_NO_HOLE = 2
SIZES = {"vda": (4 << 20) + 512, "vdb": 1 << 20}


def pattern(number, length):
    """Bytes that compress well: the reader's checksums are plain Python."""
    return (f"{number:08} is what this block holds. " * (length // 32 + 1)).encode()[:length]


def some_writes(disks, numbers):
    """Writes of many sizes and places, trims and zeroes, over both disks."""
    for number in numbers:
        for name, disk in disks.items():
            length = (512, 4096, 1000, 20_000, 150_000)[number % 5]
            disk.write(number * 77_777 % (SIZES[name] - length), pattern(number, length))
        if number % 7 == 0:
            disk = disks["vda"]
            offset, length = number * 50_000 % (3 << 20), 70_000
            command, flags = (TRIM_COMMAND, 0) if number % 2 else (WRITE_ZEROES, FLAG_NO_HOLE)
            expect_equal(disk.connection.call(command, offset, length, flags=flags), 0, "errno of trim or zeroing")
            disk.content[offset:offset + length] = bytes(length)
    for disk in disks.values():
        disk.flush()


def attached(server, contents):
    """Connections to both disks, with what they hold."""
    disks = {}
    for name, size in SIZES.items():
        disks[name] = Disk(server.socket, f"vm1/{name}", size)
        disks[name].content[:] = contents[name]
    return disks


def checkpoint(server, disks, label, wanted):
    """A named point, and what it must hold."""
    server.checkpoint(label)
    wanted[label] = {name: bytes(disk.content) for name, disk in disks.items()}


with scratch() as folder:
    server = Afterimage(folder, groups={"vm1": SIZES}, log="32MiB", ring="8MiB")
    contents = {}
    for name in SIZES:
        with open(server.backing(name), "r+b") as file:
            file.seek(1 << 19)
            file.write(pattern(7, 200_000))
        contents[name] = server.backing(name).read_bytes()
    wanted = {}
    with server:
        server.wait_shipped()
        disks = attached(server, contents)
        checkpoint(server, disks, "copied", wanted)
        some_writes(disks, range(30))
        checkpoint(server, disks, "first", wanted)
        some_writes(disks, range(30, 60))
        server.kill()
        server.start()
        disks = attached(server, {name: disk.content for name, disk in disks.items()})
        some_writes(disks, range(60, 70))
        checkpoint(server, disks, "after-a-kill", wanted)
        server.wait_shipped()
        # A new log: another epoch, so a terminator, another manifest and another pass.
        for disk in disks.values():
            disk.close()
        server.cli("detach", "vm1")
        server.stop()
        server.log_path().rename(folder / "old.log")
        server.start()
        server.wait_shipped()
        disks = attached(server, {name: disk.content for name, disk in disks.items()})
        some_writes(disks, range(70, 90))
        checkpoint(server, disks, "second-epoch", wanted)
        server.wait_shipped()

    history = History(server.repository, "vm1")
    expect_equal((len(history.bases), history.terminators), (2, 1), "epochs and terminators")
    found = history.checkpoints()
    expect_equal(sorted(found), sorted(wanted), "the named points")
    for label, (epoch, lsn) in found.items():
        for name in SIZES:
            expect(history.image(epoch, lsn, name) == wanted[label][name], f"{name} at {label}, LSN {lsn}")
    ops = {record.op for bases in history.bases.values() for base in bases for record in base.records}
    expect(ops >= {WRITE, ZERO, TRIM, PASS_BEGIN, PASS_END}, f"every kind of record was met: {sorted(ops)}")

    # It would have noticed: one flipped bit in any part of a segment is refused.
    path = max(Path(history.folder).glob("segments/*/*"), key=lambda path: path.stat().st_size)
    good = path.read_bytes()
    for at in (9, 100, 300, len(good) // 2, len(good) - 450, len(good) - 200, len(good) - 60):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1:])
        try:
            History(server.repository, "vm1")
        except Unreadable:
            continue
        expect(False, f"a flipped bit at byte {at} of {path} was not noticed")

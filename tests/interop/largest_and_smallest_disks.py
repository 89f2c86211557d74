"""The largest disk, one whose end is ragged, and the smallest: written, copied, restored, exported, compared."""

import errno
import os

from harness.nbd_client import Connection
from harness.process import expect, expect_equal, run, say, scratch
from harness.server import Afterimage

LARGEST = 16 << 40
RAGGED = (15 << 40) + 512
SMALLEST = 512
LENGTH = 1 << 20


def data_of(path):
    """What is allocated of a file: {offset: bytes}, zeroes left out."""
    found = {}
    with open(path, "rb") as file:
        at = 0
        while True:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return found
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            data = os.pread(file.fileno(), end - at, at)
            for number in range(0, len(data), 4096):
                if any(data[number:number + 4096]):
                    found[at + number] = data[number:number + 4096]
            at = end


def as_blocks(runs, size):
    """{offset: bytes} of whole blocks that these writes leave."""
    blocks = {}
    for offset, data in runs.items():
        for at in range(offset - offset % 4096, offset + len(data), 4096):
            block = bytearray(blocks.get(at, bytes(min(4096, size - at))))
            begin, end = max(at, offset), min(at + 4096, offset + len(data))
            block[begin - at:end - at] = data[begin - offset:end - offset]
            blocks[at] = bytes(block)
    return blocks


def large(folder, size):
    """A sparse disk: writes at both ends, pass, restore and export."""
    # First and last MiB, and around the places where 32 bits of sectors or blocks end.
    places = [0, (1 << 41) - 4096, (1 << 43) + 12345, size - LENGTH]
    server = Afterimage(folder, name=f"large-{size}", groups={"vm1": {"vda": size}}, log="32MiB", ring="8MiB")
    first = {place: os.urandom(LENGTH) for place in places}
    with open(server.backing(), "r+b") as file:
        for place, data in first.items():
            file.seek(place)
            file.write(data)
    with server:
        server.wait_shipped()
        say("copied")
        server.checkpoint("copied")
        with Connection(server.socket).open_export("vm1/vda") as client:
            expect_equal(client.size, size, "size of the export")
            for place, data in first.items():
                expect(client.read(place, LENGTH) == data, f"what was there at {place}")
            second = dict(first)
            for number, place in enumerate(places):
                changed = os.urandom(65536)
                offset = place + (LENGTH - 65536 if number % 2 else 0)
                client.write(offset, changed)
                within = offset - place
                second[place] = first[place][:within] + changed + first[place][within + 65536:]
            client.flush()
            server.checkpoint("written")
            server.wait_shipped()
            expect_equal(client.call(4, 4096, 1 << 31), 0, "errno of a trim of 2 GiB")
        server.checkpoint("trimmed")
        server.wait_shipped()
        third = dict(second)
        third[0] = second[0][:4096]
        for label, wanted in [("copied", first), ("written", second), ("trimmed", third)]:
            say("restore")
            restored = server.restore(label, server.folder / label) / "vda.raw"
            say("restored")
            expect_equal(restored.stat().st_size, size, f"{label}: size")
            expect(data_of(restored) == as_blocks(wanted, size), f"{label}: all that is not zero is as it was")
        say("export")
        uri = server.export("written")["vda"]
        said = run("qemu-io", "-r", "-f", "raw", "-c", f"read -v {size - 512} 512", uri).stdout
        expect(" ".join(f"{byte:02x}" for byte in second[size - LENGTH][-16:]) in said, "the last sector of the image")
        say("kill")
        server.kill()
        server.start()
        with Connection(server.socket).open_export("vm1/vda") as client:
            expect(client.read(size - 65536, 65536) == second[size - LENGTH][-65536:], "the end after a kill")

def smallest(folder):
    """One sector: written, flushed, shipped, trimmed, kept over a kill, restored, exported."""
    first, second = os.urandom(SMALLEST), os.urandom(SMALLEST)
    server = Afterimage(folder, name="small", groups={"vm1": {"vda": SMALLEST}}, log="32MiB", ring="8MiB")
    server.backing().write_bytes(first)
    with server:
        server.wait_shipped()
        server.checkpoint("copied")
        with Connection(server.socket).open_export("vm1/vda") as client:
            expect_equal(client.size, SMALLEST, "size of the export")
            expect(client.read(0, SMALLEST) == first, "what was there")
            client.write(0, second)
            client.flush()
            expect_equal(client.call(1, 1, SMALLEST, second), errno.ENOSPC, "errno of a write past the end")
            server.checkpoint("written")
            client.write(17, b"part")
            third = second[:17] + b"part" + second[21:]
            client.flush()
            server.checkpoint("part")
        server.wait_shipped()
        for label, wanted in [("copied", first), ("written", second), ("part", third)]:
            restored = server.restore(label, server.folder / label) / "vda.raw"
            expect(restored.read_bytes() == wanted, f"{label}: the restored disk")
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.export("part")["vda"], server.folder / "part/vda.raw")
        server.kill()
        server.start()
        with Connection(server.socket).open_export("vm1/vda") as client:
            expect(client.read(0, SMALLEST) == third, "the disk after a kill")
            expect_equal(client.call(4, 0, SMALLEST), 0, "errno of a trim")
            expect(client.read(0, SMALLEST) == bytes(SMALLEST), "trimmed")
        server.cli("detach", "vm1")
        expect(server.backing().read_bytes() == bytes(SMALLEST), "the plain disk")


with scratch() as folder:
    # On a tmpfs: a file of 16 TiB is allowed everywhere there.
    run("mount", "-t", "tmpfs", "-o", "size=1g", "afterimage-test", folder)
    try:
        large(folder, LARGEST)
        large(folder, RAGGED)
        smallest(folder)
    finally:
        run("umount", "--lazy", folder)

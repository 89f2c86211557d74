"""A sparse disk of 15 TiB: writes at both ends, pass, restore and export, compared at both ends."""

import os

from harness.nbd_client import Connection
from harness.process import expect, expect_equal, run, say, scratch
from harness.server import Afterimage

SIZE = (15 << 40) + 512
LENGTH = 1 << 20
# First and last MiB, and around the places where 32 bits of sectors or blocks end.
PLACES = [0, (1 << 41) - 4096, (1 << 43) + 12345, SIZE - LENGTH]


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


def as_blocks(runs):
    """{offset: bytes} of whole blocks that these writes leave."""
    blocks = {}
    for offset, data in runs.items():
        for at in range(offset - offset % 4096, offset + len(data), 4096):
            block = bytearray(blocks.get(at, bytes(min(4096, SIZE - at))))
            begin, end = max(at, offset), min(at + 4096, offset + len(data))
            block[begin - at:end - at] = data[begin - offset:end - offset]
            blocks[at] = bytes(block)
    return blocks


with scratch() as folder:
    # On a tmpfs: a file of 15 TiB is allowed everywhere there.
    run("mount", "-t", "tmpfs", "-o", "size=512m", "afterimage-test", folder)
    try:
        server = Afterimage(folder, groups={"vm1": {"vda": SIZE}}, log="32MiB", ring="8MiB")
        first = {place: os.urandom(LENGTH) for place in PLACES}
        with open(server.backing(), "r+b") as file:
            for place, data in first.items():
                file.seek(place)
                file.write(data)
        with server:
            server.wait_shipped()
            say("copied")
            server.checkpoint("copied")
            with Connection(server.socket).open_export("vm1/vda") as client:
                expect_equal(client.size, SIZE, "size of the export")
                for place, data in first.items():
                    expect(client.read(place, LENGTH) == data, f"what was there at {place}")
                second = dict(first)
                for number, place in enumerate(PLACES):
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
                restored = server.restore(label, folder / label) / "vda.raw"
                say("restored")
                expect_equal(restored.stat().st_size, SIZE, f"{label}: size")
                expect(data_of(restored) == as_blocks(wanted), f"{label}: all that is not zero is as it was")
            say("export")
            uri = server.export("written")["vda"]
            said = run("qemu-io", "-r", "-f", "raw", "-c", f"read -v {SIZE - 512} 512", uri).stdout
            expect(" ".join(f"{byte:02x}" for byte in second[SIZE - LENGTH][-16:]) in said, "the last sector of the image")
            say("kill")
            server.kill()
            server.start()
            with Connection(server.socket).open_export("vm1/vda") as client:
                expect(client.read(SIZE - 65536, 65536) == second[SIZE - LENGTH][-65536:], "the end after a kill")
    finally:
        run("umount", "--lazy", folder)

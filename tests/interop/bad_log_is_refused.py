"""Logs of another group, of a newer version, truncated, or with a flipped bit: refused and kept."""

import hashlib
import re
import shutil

from harness.by_the_docs import crc32c
from harness.nbd_client import Connection
from harness.ports import free_port
from harness.process import expect, scratch
from harness.server import Afterimage
from harness.sites import Certificates

# A target that nobody listens at: the log then keeps every record.
AWAY = f"afterimage://127.0.0.1:{free_port()}"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def written(folder, name, certificates_lines):
    """A server that was killed after flushed writes."""
    server = Afterimage(folder, name=name, to=[AWAY], lines=certificates_lines, log="32MiB", ring="8MiB")
    server.start()
    with Connection(server.socket).open_export("vm1/vda") as client:
        for number in range(64):
            client.write(number * 4096, bytes([number + 1]) * 4096)
        client.flush()
    server.kill()
    return server


def refused(server, what, *words):
    before = digest(server.log_path())
    said = server.start_refused()
    for word in [str(server.log_path()), *words]:
        expect(word in said, f"{what}: the message says {word!r}:\n{said}")
    expect(digest(server.log_path()) == before, f"{what}: the log is kept as it was")
    server.close()
    return said


with scratch() as folder:
    certificates = Certificates(folder / "ca")
    lines = f"[ship]\ntls = {certificates.client_table(certificates.client('vm1', 'vm2'))}\n"

    server = written(folder, "truncated", lines)
    with open(server.log_path(), "r+b") as file:
        file.truncate(16 << 20)
    refused(server, "truncated", "truncated")

    server = written(folder, "flipped", lines)
    with open(server.log_path(), "r+b") as file:
        content = file.read()
        at = content.index(bytes([33]) * 4096, 8192)  # the payload of the 33rd write
        file.seek(at + 77)
        file.write(bytes([content[at + 77] ^ 0x10]))
    said = refused(server, "flipped bit below the durable bound", "corrupt at byte ", "keep the file", "its replica")
    told = int(re.search(r"corrupt at byte (\d+)", said)[1])
    expect(at - (1 << 20) <= told <= at + 77, f"damaged at {at + 77}, told {told}")

    server = written(folder, "newer", lines)
    with open(server.log_path(), "r+b") as file:
        for block in (0, 4096):  # both superblocks
            file.seek(block)
            head = bytearray(file.read(4096))
            head[8:10] = (int.from_bytes(head[8:10], "little") + 1).to_bytes(2, "little")
            head[4092:] = crc32c(head[:4092]).to_bytes(4, "little")
            file.seek(block)
            file.write(head)
    refused(server, "newer version", "superblock layout version 2")

    server = written(folder, "superblocks", lines)
    with open(server.log_path(), "r+b") as file:
        for block in (0, 4096):
            file.seek(block + 300)
            byte = file.read(1)[0]
            file.seek(block + 300)
            file.write(bytes([byte ^ 1]))
    refused(server, "both superblocks damaged", "checksum is", "recover the group from its replica")

    # One damaged superblock is no reason to refuse.
    server = written(folder, "one-superblock", lines)
    with open(server.log_path(), "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)
    server.start()
    with Connection(server.socket).open_export("vm1/vda") as client:
        expect(client.read(63 * 4096, 4096) == bytes([64]) * 4096, "what was flushed is there")
    server.close()

    # The log of another group: that group is refused, the other one is served.
    server = Afterimage(folder, name="mixed", groups={"vm1": {"vda": "64MiB"}, "vm2": {"vda": "64MiB"}})
    with server:
        server.stop()
        shutil.copy(server.log_path("vm2"), server.log_path("vm1"))
        other = server.cli_json("log", "inspect", server.log_path("vm2"))["group"]
        before = digest(server.log_path("vm1"))
        server.start()
        said = server.said()
        expect(f"not started: {server.log_path('vm1')}: this log belongs to group {other}, which has none of the "
               "configured disks; give each group a log path of its own" in said, f"log of another group:\n{said}")
        expect(digest(server.log_path("vm1")) == before, "log of another group: it is kept as it was")
        Connection(server.socket).open_export("vm2/vda").close()

    # Something that is no log at all is not overwritten.
    server = Afterimage(folder, name="text")
    server.log_path().write_text("my diary\n" * 10000)
    refused(server, "no log", "magic missing", "another log path")

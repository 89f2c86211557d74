"""What came onto a disk past the log reaches the replica with a new pass, and no point is mixed up.

Three ways: a backing edited while the group was down, and accepted; a disk with content added to a group
that has shipped already; a disk taken out, changed, and put back. What was written before and not shipped
is shipped first, and points from before stay as they were.
"""

from harness.nbd_client import Connection
from harness.process import expect, expect_equal, scratch
from harness.server import Afterimage

SIZE = 8 << 20
BLOCK = 4096


def write(server, disk, blocks, byte):
    with Connection(server.socket).open_export(f"vm1/{disk}") as connection:
        for block in blocks:
            connection.write(block * BLOCK, bytes([byte]) * BLOCK)


def edit(path, block, byte):
    with path.open("r+b") as file:
        file.seek(block * BLOCK)
        file.write(bytes([byte]) * BLOCK)


def configure(server, disks):
    server.groups = {"vm1": dict.fromkeys(disks, SIZE)}
    server.write_config()


def compare(server, contents, point, what):
    """Restores a point and compares it with `contents`, {disk: bytes}."""
    restored = server.restore(point, server.folder / what)
    for disk, ours in contents.items():
        theirs = (restored / f"{disk}.raw").read_bytes()
        expect_equal(len(theirs), len(ours), f"{what}: bytes of {disk}")
        wrong = [at // BLOCK for at in range(0, len(ours), BLOCK) if ours[at:at + BLOCK] != theirs[at:at + BLOCK]]
        expect_equal(wrong, [], f"{what}: wrong blocks of {disk}")


def backings(server):
    return {disk: server.backing(disk).read_bytes() for disk in server.groups["vm1"]}


with scratch() as folder:
    server = Afterimage(folder, groups={"vm1": {"vda": SIZE}})
    known = {}
    with server:
        write(server, "vda", range(64), 0xA1)
        server.wait_shipped()
        # Nothing reaches the repository now; the log keeps what is written, and a point of it.
        away = server.repository.with_name("away")
        server.repository.rename(away)
        server.repository.write_text("not a folder")
        write(server, "vda", range(32), 0xA2)
        known["unshipped"] = server.checkpoint("unshipped")
        write(server, "vda", range(32), 0xA3)
        server.stop()
        before = backings(server)
        server.repository.unlink()
        away.rename(server.repository)

        edit(server.backing("vda"), 10, 0xE1)
        refused = server.start_refused()
        expect("--accept-edited" in refused, f"an edited backing is refused: {refused}")
        server.start("--accept-edited")
        write(server, "vda", [63], 0xA4)
        server.wait_shipped()
        server.stop()
        compare(server, backings(server), "latest", "edited")
        compare(server, {"vda": bytes([0xA2]) * (32 * BLOCK) + before["vda"][32 * BLOCK:]}, "unshipped", "unshipped")

        (server.folder / "vm1-vdb.raw").write_bytes(bytes(BLOCK) + b"b" * (SIZE - BLOCK))
        configure(server, ["vda", "vdb"])
        server.start()
        server.wait_shipped()
        server.checkpoint("added")
        server.wait_shipped()
        server.stop()
        added = backings(server)
        compare(server, added, "latest", "added")

        configure(server, ["vdb"])
        server.start()
        write(server, "vdb", [5], 0xB2)
        server.stop()
        edit(server.backing("vda"), 20, 0xE3)
        configure(server, ["vda", "vdb"])
        refused = server.start_refused()
        expect("--accept-edited" in refused, f"changed while it was away, it is refused: {refused}")
        server.start("--accept-edited")
        server.wait_shipped()
        server.stop()
        compare(server, backings(server), "latest", "back")
        compare(server, added, "added", "added-later")

"""The initial copy of a disk that is being written, cut by a kill, ends in an exact image."""

import os

from harness.nbd_client import Connection
from harness.process import expect, expect_equal, run, say, scratch, wait_until
from harness.resending_client import ResendingClient
from harness.server import Afterimage


def pass_done_bytes(server):
    """How far the running pass is."""
    running = server.group_status()["targets"][0]["pass"]
    return running["done_bytes"] if running else 0


with scratch() as folder:
    server = Afterimage(folder, groups={"vm1": {"vda": "96MiB"}}, group_lines='pass_rate = "16MiB"')
    with open(server.backing(), "r+b") as file:
        for position in range(0, 96 << 20, 8 << 20):
            file.seek(position)
            file.write(os.urandom(5 << 20))  # the rest of each 8 MiB stays a hole
    with server:
        client = ResendingClient(server.socket, "vm1/vda", blocks=6000, connections=2, depth=4, seed="copy").start()
        wait_until(lambda: pass_done_bytes(server) > 16 << 20, "a part of the pass")
        # 60 of the 96 MiB are allocated, and holes of the client's 24 MiB may fill while it writes.
        total = server.group_status()["targets"][0]["pass"]["total_bytes"]
        expect(60 << 20 <= total <= 72 << 20, f"the pass copies allocated blocks only: {total >> 20} MiB")
        server.kill()
        say("killed within the pass")
        server.start()
        wait_until(lambda: client.answered_writes >= 3000, "more writes")
        client.finish()
        server.wait_shipped()
        server.checkpoint("after")
        server.wait_shipped()
        expect_equal(server.child.log().count("initial pass begins"), 1, "passes begun: the second start resumes")
        now = folder / "now.raw"
        run("nbdcopy", server.uri(), now)
        run("cmp", now, server.restore("after", folder / "restored") / "vda.raw")
        with Connection(server.socket).open_export("vm1/vda") as reader:
            # Blocks that this client never wrote hold what the file held: only compare the others.
            for block in range(client.blocks):
                if client.answered[block]:
                    client.verify_block(block, reader.read(block * 4096, 4096))

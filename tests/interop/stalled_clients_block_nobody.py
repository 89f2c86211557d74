"""Two clients stuck within a 32 MiB payload and one that never reads its replies: others go on."""

import struct

from harness.nbd_client import READ, REQUEST_MAGIC, WRITE, Connection
from harness.process import expect_equal, say, scratch, wait_until
from harness.resending_client import ResendingClient
from harness.server import Server

PAYLOAD = 32 << 20

with scratch() as folder, Server(folder, groups={"vm1": {"vda": "96MiB"}}, ring="16MiB") as server:
    stuck = []
    for _ in range(2):
        client = Connection(server.socket).open_export("vm1/vda")
        client.send(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 1, 64 << 20, PAYLOAD) + b"S" * (1 << 20))
        stuck.append(client)
    silent = Connection(server.socket).open_export("vm1/vda")
    silent.socket.settimeout(0.5)
    try:
        for cookie in range(1, 2000):
            silent.request(READ, 0, 1 << 20, cookie=cookie)
    except TimeoutError:
        pass  # The server stopped taking requests from it: bounded, as it should be.

    busy = ResendingClient(server.socket, "vm1/vda", blocks=8192, connections=2, seed="busy").start()
    wait_until(lambda: busy.answered_writes >= 20000, "20000 writes beside the stalled clients")
    busy.finish()
    expect_equal(busy.reconnects, 0, "reconnects of the busy client")
    with Connection(server.socket).open_export("vm1/vda") as reader:
        busy.verify(reader.read)
        # What the stuck clients began has changed nothing.
        expect_equal(reader.read(64 << 20, 1 << 20), bytes(1 << 20), "the range of the torn writes")
        reader.flush()
    for client in [*stuck, silent]:
        client.close()
    say("the torn writes are dropped")
    with Connection(server.socket).open_export("vm1/vda") as reader:
        expect_equal(reader.read(64 << 20, 1 << 20), bytes(1 << 20), "the range of the torn writes")
        busy.verify(reader.read)

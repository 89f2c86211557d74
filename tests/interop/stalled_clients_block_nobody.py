"""Clients stuck within a 32 MiB payload and clients that never read their replies: others go on.

Also when they hold all the memory that there is for such payloads and replies, and move a byte now and then.
"""

import struct
import threading

from harness.nbd_client import READ, REQUEST_MAGIC, WRITE, Connection
from harness.process import expect, expect_equal, say, scratch, wait_until
from harness.resending_client import ResendingClient
from harness.server import Server

PAYLOAD = 32 << 20
# More payloads than fit into what a group has for them, and as many replies.
HOLDERS, DEAF = 5, 12


def begin_write(server, lacking):
    """A client whose payload lacks its last bytes."""
    client = Connection(server.socket).open_export("vm1/vda")
    client.send(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 1, 64 << 20, PAYLOAD) + b"S" * (PAYLOAD - lacking))
    return client


def trickle(client, enough):
    """A byte now and then, until it is cut off."""
    try:
        while not enough.wait(0.5):
            client.send(b"S")
    except OSError:
        pass


def never_read(server):
    """A client that asks for much and reads nothing."""
    silent = Connection(server.socket).open_export("vm1/vda")
    silent.socket.settimeout(0.5)
    try:
        for cookie in range(1, 2000):
            silent.request(READ, 0, 1 << 20, cookie=cookie)
    except (TimeoutError, ConnectionError):
        pass  # The server stopped taking requests from it: bounded, as it should be.
    return silent


with scratch() as folder, Server(folder, groups={"vm1": {"vda": "96MiB"}}, ring="16MiB") as server:
    stuck = []
    for _ in range(2):
        client = Connection(server.socket).open_export("vm1/vda")
        client.send(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 1, 64 << 20, PAYLOAD) + b"S" * (1 << 20))
        stuck.append(client)
    silent = never_read(server)
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

    # All the memory for large payloads is taken, by clients that stand still just before the end or
    # trickle. A large write of somebody else is done all the same, and then they are gone.
    for trickles in (False, True):
        holders = [begin_write(server, 4096) for _ in range(HOLDERS)]
        enough = threading.Event()
        threads = [threading.Thread(target=trickle, args=(client, enough)) for client in holders if trickles]
        for thread in threads:
            thread.start()
        with Connection(server.socket).open_export("vm1/vda") as client:
            for number in range(8):
                client.write(number << 20, bytes([number + 1]) * (1 << 20))
            for number in range(8):
                expect(client.read(number << 20, 1 << 20) == bytes([number + 1]) * (1 << 20), "what was written")
            expect_equal(client.read(64 << 20, 1 << 20), bytes(1 << 20), "the range of the torn writes")
        enough.set()
        for thread in threads:
            thread.join()
        say(f"large writes beside {HOLDERS} clients that {'trickle' if trickles else 'stand still'}")
        for client in holders:
            client.close()
    deaf = [never_read(server) for _ in range(DEAF)]
    with Connection(server.socket).open_export("vm1/vda") as client:
        for number in range(8):
            expect(client.read(number << 20, 1 << 20) == bytes([number + 1]) * (1 << 20), "what was written")
            client.write(number << 20, bytes([number + 2]) * (1 << 20))
    say(f"large reads and writes beside {DEAF} clients that read nothing")
    for client in deaf:
        client.close()

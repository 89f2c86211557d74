"""kill -9 in the middle of writes, several times: after each restart every answered write is there."""
# limit: 1800

import os

from harness.nbd_client import BLOCK, WRITE_ZEROES, Connection, ResendingClient
from harness.process import expect_equal, say, scratch, wait_until
from harness.server import Server

ROUNDS = 40 if os.environ.get("AFTERIMAGE_TESTS_FULL") else 4

with scratch() as folder, Server(folder) as server:
    for round_number in range(ROUNDS):
        # A client that reconnects and sends again.
        client = ResendingClient(server.socket, "vm1/vda", blocks=4096, seed=f"dies-{round_number}").start()
        wait_until(lambda: client.answered_writes >= 2000, "2000 writes")
        server.kill()
        say(f"round {round_number}: {client.answered_writes} writes answered before the kill")
        server.start()
        wait_until(lambda: client.reconnects >= 4, "all connections to be back")
        client.finish()
        with Connection(server.socket).open_export("vm1/vda") as reader:
            client.verify(reader.read)
            expect_equal(reader.call(WRITE_ZEROES, 0, 4096 * BLOCK), 0, "zeroing")

        # A client that never comes back: nothing is sent again, all answered writes are there.
        client = ResendingClient(server.socket, "vm1/vda", blocks=4096, seed=f"gone-{round_number}").start()
        wait_until(lambda: client.answered_writes >= 1000 * (round_number + 1), "writes")
        client.stay_away()
        server.kill()
        client.finish()
        server.start()
        with Connection(server.socket).open_export("vm1/vda") as connection:
            client.verify_without_resend(connection.read)
            # Zeroes again, so that the next round knows what unwritten blocks hold.
            expect_equal(connection.call(WRITE_ZEROES, 0, 4096 * BLOCK), 0, "zeroing")

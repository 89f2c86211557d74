"""SIGTERM and a new start in the middle of writes, several times: no client sees an error, nothing is lost."""

from harness.nbd_client import Connection
from harness.process import say, scratch, wait_until
from harness.resending_client import ResendingClient
from harness.server import Server


def more_writes(client, count):
    wanted = client.answered_writes + count
    wait_until(lambda: client.check() or client.answered_writes >= wanted, f"{count} more writes")


with scratch() as folder, Server(folder) as server:
    client = ResendingClient(server.socket, "vm1/vda", blocks=8192, connections=3, depth=16, seed="restart").start()
    for number in range(5):
        more_writes(client, 1000)
        server.restart()
        say(f"restart {number}: {client.answered_writes} writes answered")
    more_writes(client, 1000)
    client.finish()
    with Connection(server.socket).open_export("vm1/vda") as reader:
        client.verify(reader.read)

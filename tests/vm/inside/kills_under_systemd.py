"""Runs inside the guest: a re-sending client while systemd kills, restarts and stops the service."""

import subprocess
import sys

from harness.nbd_client import Connection
from harness.process import expect, expect_equal, say, wait_until
from harness.resending_client import ResendingClient

SOCKET = "/run/afterimage/nbd.sock"
KILLS = 5


def systemctl(*words):
    return subprocess.run(["systemctl", *words], check=True, capture_output=True, text=True).stdout.strip()


def main_pid():
    return int(systemctl("show", "--property=MainPID", "--value", "afterimage.service"))


def more_writes(client, count):
    wanted = client.answered_writes + count
    wait_until(lambda: client.check() or client.answered_writes >= wanted, f"{count} more writes", 300)


client = ResendingClient(SOCKET, "vm1/vda", blocks=8192, connections=3, depth=8, seed="systemd").start()
more_writes(client, 500)
for number in range(KILLS):
    before = main_pid()
    systemctl("kill", "-s", "KILL", "afterimage.service")
    wait_until(lambda: main_pid() not in (0, before), "systemd to start it again")
    more_writes(client, 300)
    say(f"kill {number}: on with process {main_pid()}")
expect(client.reconnects >= KILLS, f"the client reconnected, {client.reconnects} times")

systemctl("restart", "afterimage.service")
more_writes(client, 300)
say("restarted under load")

# Stopped, the socket stays: a client that connects starts the service again.
systemctl("stop", "afterimage.service")
more_writes(client, 300)
expect_equal(systemctl("is-active", "afterimage.service"), "active", "the service after a connection to its socket")
say("started by its socket")

# A client that never comes back: what was answered is there after a kill.
client.finish()
gone = ResendingClient(SOCKET, "vm1/vda", blocks=8192, connections=3, depth=8, seed="gone").start()
more_writes(gone, 500)
gone.stay_away()
systemctl("kill", "-s", "KILL", "afterimage.service")
gone.finish()
with Connection(SOCKET, patience_seconds=300).open_export("vm1/vda") as connection:
    gone.verify_without_resend(connection.read)
    for block in range(client.blocks):
        if client.answered[block] and not gone.touched(block):
            client.verify_block(block, connection.read(block * 4096, 4096))
say("every answered write is there")
sys.exit(0)

"""A group that nobody uses wakes nobody: the threads that serve groups sleep, connections or not.

Five groups, written, shipped and then left alone, one with its client still attached. What counts is how
often the kernel has put the worker threads to sleep: not once more while they are watched.
"""
# limit: 310

import time
from contextlib import ExitStack
from pathlib import Path

from harness.nbd_client import Connection
from harness.process import expect, scratch, wait_until
from harness.server import Afterimage

WATCHED_SECONDS = 6


def sleeps(pid):
    """How often each worker thread has gone to sleep so far."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().startswith("worker-"):
            lines = dict(line.split(":\t") for line in (task / "status").read_text().splitlines() if ":\t" in line)
            found[task.name] = int(lines["voluntary_ctxt_switches"])
    return found


with scratch() as folder, ExitStack() as stack:
    groups = {f"vm{number}": {"vda": "16MiB"} for number in range(5)}
    server = stack.enter_context(Afterimage(folder, groups=groups, log="16MiB", ring="4MiB"))
    for group in groups:
        client = Connection(server.socket).open_export(f"{group}/vda")
        client.write(0, bytes(65536))
        client.flush()
        if group == "vm0":
            stack.enter_context(client)
        else:
            client.close()
    for group in groups:
        server.wait_shipped(group)

    def asleep():
        """Whether nobody woke for a while. Right after the writes, rates still fall and disks are synced."""
        before = sleeps(server.child.pid)
        time.sleep(WATCHED_SECONDS)
        return sleeps(server.child.pid) == before

    expect(sleeps(server.child.pid), "worker threads are found by their names")
    wait_until(asleep, "the workers to sleep", 120)

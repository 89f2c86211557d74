"""`verify --disks`: every block of the disks is compared with what the targets hold for the same moment.

While a guest writes; at a repository of one's own and at a replica over TLS. Two bytes that somebody
changes behind our back, at either site, are found, counted and named, until they are put right. What
cannot be compared is never said to be the same.
"""

import json
import os
import random
import threading
import time
import urllib.request

from harness.nbd_client import BLOCK, Connection
from harness.process import expect, expect_equal, scratch, wait_until
from harness.sites import Certificates, primary, replica

MIB = 1 << 20
# One disk ends within a block.
DISKS = {"vda": 48 * MIB, "vdb": 9 * MIB + 1536}


def fill(server):
    """Data, holes, and blocks of zeroes that were written."""
    rng = random.Random(5)
    with Connection(server.socket).open_export("vm1/vda") as disk:
        for at in range(0, 20 * MIB, MIB):
            disk.write(at, rng.randbytes(MIB))
        disk.write(30 * MIB, bytes(MIB))
        disk.trim(5 * MIB + 3 * BLOCK, 2 * MIB)
    with Connection(server.socket).open_export("vm1/vdb") as disk:
        disk.write(9 * MIB + 512, rng.randbytes(1024))
        disk.flush()


class Writer:
    """Writes and trims all the time, mostly within two megabytes."""

    def __init__(self, server):
        self.server, self.over, self.writes = server, threading.Event(), 0
        self.thread = threading.Thread(target=self.write)

    def write(self):
        rng = random.Random(6)
        with Connection(self.server.socket).open_export("vm1/vda") as disk:
            while not self.over.is_set():
                block = rng.randrange(512) if rng.random() < 0.9 else rng.randrange(48 * 256)
                if rng.random() < 0.1:
                    disk.trim(block * BLOCK, BLOCK)
                else:
                    disk.write(block * BLOCK, rng.randbytes(BLOCK))
                self.writes += 1
                # No faster than it is shipped, or a new copy would be due.
                time.sleep(0.0005)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, kind, error, trace):
        self.over.set()
        self.thread.join()


def verify(server, code=0):
    """Runs the comparison; what it found by target."""
    done = server.cli("--json", "verify", "vm1", "--disks", ok=code == 0)
    expect_equal(done.returncode, code, f"exit code: {done.stderr}")
    return {target["url"]: target["compared"] for target in json.loads(done.stdout)["targets"]}


def all_the_same(server, targets):
    found = verify(server)
    expect_equal(len(found), targets, "targets asked")
    for url, compared in found.items():
        expect(compared["whole"] and compared["skipped"] == 0, f"{url}: {compared}")
        expect_equal(compared["mismatched_blocks"], 0, url)
        expect_equal(compared["ranges"], compared["total"], url)
        # The ragged end counts as a block.
        expect_equal(compared["bytes"], 48 * MIB + 9 * MIB + BLOCK, f"{url}: every block once")


def metric(server, name):
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30).read().decode()
    return [line for line in text.splitlines() if line.startswith(f"afterimage_{name}")]


def change(path, offset, count=1):
    """Flips a byte in each of `count` blocks, past every cache and lock; gives back how to undo it."""
    before = []
    with open(path, "r+b", buffering=0) as file:
        for block in range(count):
            at = offset + block * BLOCK
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 0x10]), at)
            before.append((at, byte))
        os.fsync(file.fileno())

    def undo():
        with open(path, "r+b", buffering=0) as file:
            for at, byte in before:
                os.pwrite(file.fileno(), byte, at)
            os.fsync(file.fileno())

    return undo


def settle(server):
    """Everything is on the disks, so that a change to them is no race with our own writes."""
    wait_until(lambda: server.group_status()["log_undestaged_bytes"] == 0, "all to be destaged")


def a_changed_disk_is_found(here, there):
    settle(here)
    undo = change(here.backing("vda"), 12 * MIB + 100, 3)
    found = verify(here, 1)
    expect_equal([compared["mismatched_blocks"] for compared in found.values()], [3, 3], "at both targets")
    status = here.group_status()
    expect_equal(status["state"], "degraded", "the group's state")
    expect("3 blocks" in status["reason"] and "operating.md" in status["reason"], status["reason"])
    expect("3 blocks DIFFER" in here.cli("status", "vm1").stdout, "status for people")
    lines = metric(here, "verify_mismatched_blocks_total")
    expect(len(lines) == 2 and all(line.endswith(" 3") for line in lines), f"{lines}")
    said = here.cli("verify", "vm1", "--disks", ok=False)
    expect("3 blocks DIFFER" in said.stdout and "2 of 2 targets" in said.stderr, said.stdout + said.stderr)
    # The replica's own administrator sees it, with disk and place.
    received = there.cli_json("status")["received"][0]
    expect_equal(received["mismatched_blocks"], 6, "found in two runs")
    named = f"3 blocks are not what the primary's disks held, the first at byte {12 * MIB} of disk vda"
    expect(named in received["alarm"], received["alarm"])
    # Known to whoever looks, until a comparison finds that it is right: also after a restart of the
    # primary alone, with a guest that does nothing.
    here.restart()
    wait_until(lambda: here.group_status()["state"] == "degraded", "the difference to be known after a restart")
    lines = metric(here, "verify_mismatched_blocks_total")
    expect(all(line.endswith(" 0") for line in lines), f"what was known before is not found again: {lines}")
    expect_equal([compared["mismatched_blocks"] for compared in verify(here, 1).values()], [3, 3], "found again")
    undo()
    all_the_same(here, 2)
    expect_equal(here.group_status()["state"], "running", "the group's state after it was put right")
    expect_equal(there.cli_json("status")["received"][0]["alarm"], None, "the replica's alarm is over")
    lines = metric(here, "verify_mismatched_blocks_total")
    expect(all(line.endswith(" 3") for line in lines), f"a counter never falls: {lines}")


def a_hole_that_got_data_is_found(here):
    settle(here)
    undo = change(here.backing("vda"), 40 * MIB)
    found = verify(here, 1)
    expect_equal([compared["mismatched_blocks"] for compared in found.values()], [1, 1], "data where a hole was")
    undo()
    all_the_same(here, 2)


def a_new_copy_puts_it_right(here):
    """The disk is what counts: the way out that the manual describes."""
    settle(here)
    change(here.backing("vda"), 3 * MIB, 2)
    found = verify(here, 1)
    expect_equal([compared["mismatched_blocks"] for compared in found.values()], [2, 2], "before the new copy")
    here.stop()
    here.cli("recover", "vm1", "--to-plain")
    here.log_path().rename(here.folder / "old.log")
    here.start()
    here.wait_shipped()
    # What was found in the old log says nothing about this one.
    settle(here)
    undo = change(here.backing("vda"), 7 * MIB)
    expect_equal([compared["mismatched_blocks"] for compared in verify(here, 1).values()], [1, 1], "in the new log")
    undo()
    all_the_same(here, 2)
    expect_equal(here.group_status()["state"], "running", "the group's state with the new copy")


def known_after_a_restart(here, there):
    times = metric(there, "last_compared_timestamp_seconds")
    expect_equal(len(times), 1, "the replica keeps when it was")
    for server in (there, here):
        server.restart()
    wait_until(lambda: metric(there, "last_compared_timestamp_seconds") == times, "the same time after a restart")
    # What the targets found is known again without another run.
    wait_until(lambda: all((target.get("compared") or {}).get("whole") for target in here.group_status()["targets"]),
               "the targets' word after a restart")
    expect_equal(here.group_status().get("verify"), None, "no run in this process")


def killed_means_due_until_compared(here):
    expect_equal(here.group_status()["verify_due"], None, "after a clean stop nothing is due")
    here.kill()
    here.start()
    expect(here.group_status()["verify_due"], "a verify is due after a kill")
    wait_until(lambda: all(target["state"] == "shipping" for target in here.group_status()["targets"]), "both targets")
    all_the_same(here, 2)
    wait_until(lambda: not here.group_status()["verify_due"], "it is done")


def a_target_that_is_away_is_not_called_the_same(here, there):
    there.stop()
    wait_until(lambda: [target["state"] for target in here.group_status()["targets"]] == ["shipping", "away"],
               "the replica to be away")
    found = verify(here, 1)
    expect(found.popitem()[1] is None and found.popitem()[1]["whole"], f"only one compared: {found}")
    there.start()
    wait_until(lambda: here.group_status()["targets"][1]["state"] == "shipping", "the replica to be back")
    all_the_same(here, 2)


def refusals(here):
    done = here.cli("verify", "--disks", ok=False)
    expect_equal(done.returncode, 2, "a group has to be named")
    done = here.cli("verify", "vm9", "--disks", ok=False)
    expect(done.returncode == 1 and "vm9" in done.stderr, done.stderr)


with scratch() as folder:
    certificates = Certificates(folder / "pki")
    there = replica(folder, certificates)
    own = folder / "own"
    here = primary(folder, certificates, there.repository_port, groups={"vm1": DISKS},
                   log="256MiB", to=[f"file://{own}", f"afterimage://127.0.0.1:{there.repository_port}"])
    with there, here:
        fill(here)
        here.wait_shipped()
        all_the_same(here, 2)
        with Writer(here) as writer:
            for _ in range(3):
                all_the_same(here, 2)
        expect(writer.writes > 500, f"{writer.writes} writes meanwhile")
        refusals(here)
        a_changed_disk_is_found(here, there)
        a_hole_that_got_data_is_found(here)
        a_new_copy_puts_it_right(here)
        known_after_a_restart(here, there)
        killed_means_due_until_compared(here)
        a_target_that_is_away_is_not_called_the_same(here, there)
        here.stop()
        there.stop()

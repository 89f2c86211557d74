"""Runs inside the guest: a group on the logged disk, written by a recorder that notes what it was promised.

A note is one sector at the end of the same disk, written past its cache only when the
promise has been made: wherever the power is cut, the notes before the cut say what must be
there. `kill -9` of the server comes in between, so that recoveries are cut as well.
"""

import json
import mmap
import os
import struct
import sys
import threading
import time
from pathlib import Path

from harness.history import Recorder
from harness.nbd_client import BLOCK
from harness.process import say, wait_until
from harness.server import Afterimage

LOGGED, OUT = "/dev/disk/by-id/virtio-logged", "/dev/disk/by-id/virtio-out"
NOTE = struct.Struct("<8sQqQ")  # magic, floor, own, LSN acknowledged by the replica
plan = json.loads(Path("/tools/inside/plan.json").read_text())


class Notes:
    """The sectors at the end of the logged disk."""

    def __init__(self):
        self.file = os.open(LOGGED, os.O_WRONLY | os.O_DIRECT)
        self.sector = mmap.mmap(-1, 512)
        self.next, self.count = plan["notes_offset"], 0
        self.lock = threading.Lock()

    def write(self, floor=0, own=None, acked=0):
        """Store one note."""
        with self.lock:
            self.sector[:NOTE.size] = NOTE.pack(b"promised", floor, -1 if own is None else own, acked)
            os.pwrite(self.file, self.sector, self.next)
            self.next += 512
            if self.next >= plan["notes_end"]:
                self.next = plan["notes_offset"]
            self.count += 1


def target_of(server):
    """The group's view of its replica."""
    return server.api_status()["groups"][0]["targets"][0]


def main():
    """Write, kill, checkpoint, until enough has been written."""
    notes = Notes()
    groups = {"vm1": {disk: blocks * BLOCK for disk, blocks in plan["disks"].items()}}
    server = Afterimage(plan["place"], groups=groups, log=plan["log"], ring=plan["ring"], ring_dir=None)
    say("starting the server")
    server.start()
    # Cuts within the initial copy find nothing acknowledged: let it come to its end first.
    wait_until(lambda: target_of(server)["acked_lsn"] and not target_of(server)["pass"], "the initial copy", 300)
    say("the initial copy is done")
    recorder = Recorder(server.socket, "vm1", plan["disks"], seed=plan["seed"], promise=notes.write).start()
    began, next_kill, acked, kills = time.monotonic(), plan["seconds"] / (plan["kills"] + 1), 0, 0
    while (spent := time.monotonic() - began) < plan["seconds"]:
        recorder.check()
        if target_of(server)["acked_lsn"] > acked:
            acked = target_of(server)["acked_lsn"]
            notes.write(acked=acked)
        if spent > next_kill * (kills + 1) and kills < plan["kills"]:
            server.kill()
            kills += 1
            server.start()
        time.sleep(0.1)
    recorder.finish()
    say(f"{len(recorder.events)} writes, {recorder.flushes} flushes, {notes.count} notes, {kills} kills")
    text = recorder.to_json()
    with open(OUT, "r+b") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.flush()
        os.fsync(out.fileno())
    server.kill()
    os.sync()
    server.close()


main()
sys.exit(0)

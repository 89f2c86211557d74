"""Power cuts: the group's disk is replayed to moments of a write log, recovered and compared.

Afterimage runs in a guest, with log, backings and repository on an ext4 of a disk whose
writes QEMU logs. Every cut is replayed from that log: what was flushed, and nothing, all, some
writes or some sectors of what was not. Then the host mounts the result and recovers it.
Everything flushed must be there, nothing out of order, and the replica must have what it
acknowledged.
"""
# limit: 5400

import contextlib
import json
import os
import random
import shutil
import struct
from collections import Counter
from pathlib import Path

from harness.history import Judge
from harness.nbd_client import BLOCK, Connection
from harness.process import expect, fallocate_sparse, run, say, scratch
from harness.server import Afterimage
from vm.guest import Guest, copy_root, data_disk, raw_root
from vm.tools_disk import MOUNT, tools_disk
from vm.write_log import WriteLog

FULL = bool(os.environ.get("AFTERIMAGE_TESTS_FULL"))
CUTS = 500 if FULL else 20
SEED = int(os.environ.get("AFTERIMAGE_TESTS_SEED", "1"))
MIB = 1 << 20
FILE_SYSTEM, DISK = 192 * MIB, 200 * MIB
PLAN = {
    "seed": f"power/{SEED}", "disks": {"vda": 512, "vdb": 128}, "log": "16MiB", "ring": "4MiB",
    "notes_offset": FILE_SYSTEM, "notes_end": DISK, "kills": 6 if FULL else 2, "seconds": 240 if FULL else 30,
}
NOTE = struct.Struct("<8sQqQ")
HOW = ["none", "all", "writes", "sectors", "sectors", "writes"]

dice = random.Random(f"power/{SEED}")
counts = Counter()


def logged_disk(image, log):
    """QEMU arguments for a disk whose writes are logged."""
    return [
        # The guest's flushes are logged all the same; the host need not sync for them.
        "-blockdev", f"driver=file,node-name=logged-file,filename={image},cache.no-flush=on",
        "-blockdev", f"driver=file,node-name=write-log,filename={log},cache.no-flush=on",
        "-blockdev", "driver=blklogwrites,node-name=logged,file=logged-file,log=write-log,log-super-update-interval=1",
        "-device", "virtio-blk-pci,drive=logged,serial=logged",
    ]


def run_the_guest(folder):
    """One run in the guest; returns the write log and what the client knew."""
    image, log, out = folder / "logged.raw", folder / "write.log", fallocate_sparse(folder / "out.raw", 64 * MIB)
    shutil.copy(folder / "base.raw", image)
    fallocate_sparse(log, 0)
    # At the same place as later here: the repository's URL is the target's identity.
    place = folder / "mounted"
    tools = tools_disk(folder, {"plan.json": json.dumps({**PLAN, "place": str(place)})})
    more = [*data_disk("tools", tools, "tools"), *data_disk("out", out, "out"), *logged_disk(image, log)]
    with Guest(folder, "guest", raw_root(copy_root(folder / "root.raw")), more=more) as guest:
        guest.wait_until_up()
        guest.run(f"{MOUNT}; mkdir -p {place}; mount /dev/disk/by-id/virtio-logged {place}")
        inside = ("AFTERIMAGE=/tools/afterimage PYTHONPATH=/tools PYTHONDONTWRITEBYTECODE=1 "
                  "python3 /tools/inside/writes_until_the_power_goes.py 2>&1")
        result = guest.finish(guest.start(inside), ok=None, patience_seconds=900)
        say(f"inside:\n{result.stdout[-6000:]}")
        expect(result.exit_code == 0, "the guest's part ends well")
        guest.qmp("quit")
        guest.child.wait()
    raw = out.read_bytes()
    return WriteLog(log), Judge(raw[8:8 + struct.unpack_from("<Q", raw)[0]])


def promises(log, cut):
    """What had been promised before the cut: floor, numbers of single writes, acknowledged LSN."""
    floor, owned, acked = 0, set(), 0
    for entry in log.entries[:cut]:
        if entry.offset >= FILE_SYSTEM and entry.length == 512:
            magic, note_floor, own, note_acked = NOTE.unpack(log.data(entry)[:NOTE.size])
            expect(magic == b"promised", "a note has its magic")
            floor, acked = max(floor, note_floor), max(acked, note_acked)
            if own >= 0:
                owned.add(own)
    return floor, owned, acked


@contextlib.contextmanager
def mounted(image, place):
    """The image's file system; mounting it replays its journal."""
    place.mkdir(exist_ok=True)
    run("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        run("umount", place)


def read_disks(folder, disks):
    """The raw files of a restored or plain group."""
    return {disk: Path(folder, name).read_bytes() for disk, name in disks.items()}


def recover_and_judge(place, folder, number, judge, floor, owned, acked):
    """Recover what is left on the mounted file system and judge it."""
    groups = {"vm1": {disk: blocks * BLOCK for disk, blocks in PLAN["disks"].items()}}
    server = Afterimage(place, groups=groups, log=PLAN["log"], ring=PLAN["ring"], create_backings=False)
    try:
        if number % 2:
            server.cli("recover", "vm1", "--to-plain")
            counts["recovered offline"] += 1
            contents = read_disks(server.folder, {disk: f"vm1-{disk}.raw" for disk in PLAN["disks"]})
            judge.check(f"cut {number}", contents, floor, owned)
            return
        server.start()
        counts["recovered by serve"] += 1
        contents = {}
        for disk, blocks in PLAN["disks"].items():
            with Connection(server.socket).open_export(f"vm1/{disk}") as reader:
                contents[disk] = reader.read(0, blocks * BLOCK)
        judge.check(f"cut {number}", contents, floor, owned)
        received = server.api_status()["received"]
        newest = received[0]["last_lsn"] if received else 0
        expect(newest >= acked, f"cut {number}: the replica acknowledged LSN {acked} and has {newest}")
        counts["acknowledged LSNs checked"] += acked > 0
        # Replication goes on, and ends with the very same disks.
        server.wait_shipped()
        restored = server.restore("latest", folder / f"restored-{number}")
        for disk, content in contents.items():
            expect((restored / f"{disk}.raw").read_bytes() == content, f"cut {number}: {disk} as the replica has it")
        counts["replicas compared"] += 1
        shutil.rmtree(restored)
        server.stop()
    except Exception:
        if server.child:
            say(server.child.log_tail())
        raise
    finally:
        server.close()


def replay(log, judge, folder):
    """All cuts, in the order of the log."""
    first_note = next(n for n, entry in enumerate(log.entries) if entry.offset >= FILE_SYSTEM and entry.length == 512)
    cuts = sorted([dice.randrange(first_note, len(log.entries) + 1) for _ in range(CUTS - CUTS // 10)]
                  + [dice.choice([n for n in log.flushes if n > first_note]) + 1 for _ in range(CUTS // 10)])
    flushed_image, image, done = folder / "flushed.raw", folder / "cut.raw", 0
    shutil.copy(folder / "base.raw", flushed_image)
    for number, cut in enumerate(cuts):
        durable = log.flushed_before(cut)
        with open(flushed_image, "r+b") as file:
            log.apply(file, done, durable)
        done = durable
        run("cp", "--sparse=always", flushed_image, image)
        how = HOW[number % len(HOW)]
        with open(image, "r+b") as file:
            kept, lost = log.apply_some(file, durable, cut, dice, how)
        counts.update({f"cuts with {how} of the unflushed": 1, "unflushed sectors kept": kept, "unflushed sectors lost": lost})
        floor, owned, acked = promises(log, cut)
        try:
            with mounted(image, folder / "mounted") as place:
                recover_and_judge(place, folder, number, judge, floor, owned, acked)
        except Exception:
            say(f"cut {number}: at entry {cut} of {len(log.entries)}, flushed {durable}, {how}; promised: "
                f"before {floor}, {len(owned)} writes with FUA, LSN {acked}")
            raise


with scratch() as folder:
    fallocate_sparse(folder / "base.raw", DISK)
    run("mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", folder / "base.raw", f"{FILE_SYSTEM // 1024}k")
    log, judge = run_the_guest(folder)
    say(f"{len(log.entries)} requests logged, {len(log.flushes)} flushes, {len(judge.events)} writes of the client")
    replay(log, judge, folder)
    counts.update({"blocks compared": judge.blocks_compared, "flushed versions found": judge.writes_checked,
                   "unflushed versions lost": judge.writes_lost})
    for what, count in sorted(counts.items()):
        say(f"{what}: {count}")
    say(f"{CUTS} power cuts from one run, seed {SEED}")
    for kind in ("unflushed sectors kept", "unflushed sectors lost", "acknowledged LSNs checked", "unflushed versions lost"):
        expect(counts[kind] > 0, f"the run had none of: {kind}")

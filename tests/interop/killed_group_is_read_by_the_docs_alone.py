"""After a kill -9, a reader written from the documents rebuilds the disks from log, ring, claims and backings."""

from harness.by_the_docs import BLOCK
from harness.log_by_the_docs import Ring, disks_of, records_of
from harness.model import Disk
from harness.process import expect, expect_equal, scratch
from harness.server import Afterimage

SIZES = {"vda": 8 << 20, "vdb": (1 << 20) + 512}


def rebuilt(server):
    """The disks as the documents say they are, with how many records the log ahead of them holds."""
    log, ring = server.log_path().read_bytes(), server.ring_path().read_bytes()
    backings = {}
    for place, name in enumerate(SIZES):
        path = server.backing(name)
        backings[place] = path.read_bytes(), path.with_name(path.name + ".afterimage").read_bytes()
    superblock, records = records_of(log, ring)
    header = Ring.read(ring[:BLOCK], superblock)
    print(f"{len(records)} records, {sum(r.lsn > superblock.destaged for r in records)} not destaged, "
          f"{sum(r.lsn > header.durable for r in records)} not durable, incarnation {superblock.incarnation}, "
          f"superblock {superblock.generation}")
    return disks_of(log, ring, backings), len(records)


# Small enough that log and ring go round more than once.
with scratch() as folder, Afterimage(folder, groups={"vm1": SIZES}, log="16MiB", ring="4MiB") as server:
    most = 0
    for round_number, writes in enumerate([5, 400, 1, 150]):
        disks = {name: Disk(server.socket, f"vm1/{name}", size, seed=f"{name} {round_number}")
                 for name, size in SIZES.items()}
        if round_number:
            for name, disk in disks.items():
                disk.content[:] = before[name]
        for _ in range(writes):
            for disk in disks.values():
                disk.write_somewhere()
        if round_number == 1:
            server.checkpoint("in-between")
        server.kill()
        found, records = rebuilt(server)
        most = max(most, records)
        for place, (name, disk) in enumerate(disks.items()):
            expect(found[place] == bytes(disk.content), f"round {round_number}: {name} as the documents say")
        before = {name: bytes(disk.content) for name, disk in disks.items()}
        if round_number < 3:
            server.start()
    expect(most > 0, "there were records to be read")
    server.cli("recover", "vm1", "--to-plain")
    for name, content in before.items():
        expect_equal(server.backing(name).read_bytes() == content, True, f"{name} as recover left it")

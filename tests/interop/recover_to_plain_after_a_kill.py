"""`recover --to-plain` after a kill -9 makes the backing complete and current, without a daemon."""

from harness.model import Disk, same_content
from harness.process import scratch
from harness.server import Afterimage

SIZES = {"vda": 32 << 20, "vdb": (1 << 20) + 512}

with scratch() as folder, Afterimage(folder, groups={"vm1": SIZES}) as server:
    disks = {name: Disk(server.socket, f"vm1/{name}", size, seed=name) for name, size in SIZES.items()}
    for _ in range(200):
        for disk in disks.values():
            disk.write_somewhere()
    server.kill()
    server.cli("recover", "vm1", "--to-plain")
    for name, disk in disks.items():
        same_content(f"{name} as a plain disk", server.backing(name), bytes(disk.content))

"""What the replica acknowledged is on its disk: the power fails there right after the acknowledgement.

The repository lies on an ext4 of its own that writes nothing back by itself for a long
time. A copy of the device, taken while all of it runs, is what a power cut would leave.
"""

import contextlib
import shutil
import subprocess

from harness.model import Disk, same_content
from harness.process import expect, expect_equal, fallocate_sparse, run, scratch
from harness.server import Afterimage

SIZE = 16 << 20


@contextlib.contextmanager
def mounted(device, path):
    """An ext4 whose journal is committed by syncs alone."""
    path.mkdir()
    run("mount", "-o", "loop,commit=3000,noauto_da_alloc", device, path)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=False)


with scratch() as folder:
    device = fallocate_sparse(folder / "device.img", 256 << 20)
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
    with mounted(device, folder / "disk") as disk_folder:
        url = f"file://{disk_folder}/deep/repo"
        server = Afterimage(folder, groups={"vm1": {"vda": SIZE}}, to=[url], replica=f'repository = "{url}"')
        with server:
            disk = Disk(server.socket, "vm1/vda", SIZE)
            # What lies before the end of the initial copy is no recovery point.
            server.wait_shipped()
            cuts = []
            for number in range(3):
                for _ in range(40):
                    disk.write_somewhere()
                label = f"cut-{number}"
                lsn = server.checkpoint(label)
                server.wait_shipped()
                copy = folder / f"{label}.img"
                shutil.copyfile(device, copy)
                cuts.append((label, lsn, copy, bytes(disk.content)))
                if number == 1:  # The next process finds what this one has left.
                    server.kill()
                    server.start()
                    disk = Disk(server.socket, "vm1/vda", SIZE)
                    disk.content[:] = cuts[-1][3]

    for label, lsn, copy, content in cuts:
        with mounted(copy, folder / f"after-{label}") as after:
            repository = f"file://{after}/deep/repo"
            listed = server.cli_json("points", "vm1", "--repository", repository)
            expect(listed["latest"], f"{label}: there are points")
            found = {point["label"]: point["lsn"] for point in listed["points"]}
            expect_equal(found.get(label), lsn, f"{label} after the power cut: {found}")
            target = folder / f"restored-{label}"
            server.cli("restore", "--repository", repository, f"vm1@{label}", target)
            same_content(label, target / "vda.raw", content)
            server.cli("verify", "vm1", "--repository", repository)

"""A repository on a file system that refuses O_DIRECT is written all the same, through the page cache."""

import errno
import os
import subprocess

from harness.model import Disk, same_content
from harness.process import expect, expect_equal, run, scratch
from harness.server import Afterimage

SIZE = 16 << 20


def refuses_direct_io(folder):
    """Whether no file here can be opened with O_DIRECT."""
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        return error.errno == errno.EINVAL
    finally:
        (folder / "probe").unlink(missing_ok=True)
    return False


with scratch() as folder:
    place = folder / "ramfs"
    place.mkdir()
    run("mount", "-t", "ramfs", "ramfs", place)
    url = f"file://{place}/repo"
    try:
        expect(refuses_direct_io(place), "a file system without O_DIRECT")
        with Afterimage(folder, groups={"vm1": {"vda": SIZE}}, to=[url]) as server:
            disk = Disk(server.socket, "vm1/vda", SIZE)
            for megabyte in range(SIZE >> 20):
                disk.write(megabyte << 20, disk.dice.randbytes(1 << 20))
            disk.flush()
            server.wait_shipped()
            stored = [file for file in place.rglob("*") if file.is_file()]
            expect(max(file.stat().st_size for file in stored) > 1 << 20, f"large objects: {stored}")
            expect_equal([file for file in stored if "#" in file.name], [], "what was left under staging names")
            server.cli("restore", "--repository", url, "vm1@latest", folder / "restored")
            same_content("restored", folder / "restored" / "vda.raw", bytes(disk.content))
            server.cli("verify", "vm1", "--repository", url)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=False)

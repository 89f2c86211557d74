"""A small disk for guests in which Afterimage itself runs: the binary, its units, our client."""

import shutil
from pathlib import Path

from harness.process import run
from harness.server import REPOSITORY, binary

MOUNT = "mkdir -p /tools && mount -o ro /dev/disk/by-id/virtio-tools /tools"
CONFIGURATION = """\
[nbd]
listen = ["unix:/run/afterimage/nbd.sock"]
[[group]]
name = "vm1"
log = { path = "/var/lib/afterimage/vm1.log", size = "128MiB" }
ring = "16MiB"
to = ["file:///var/lib/afterimage/repo"]
  [[group.disk]]
  name = "vda"
  path = "/var/lib/afterimage/vda.raw"
[replica]
repository = "file:///var/lib/afterimage/repo"
"""
INSTALL = f"""
{MOUNT}
install -m 755 /tools/afterimage /usr/bin/afterimage
mkdir -p /etc/afterimage /var/lib/afterimage/repo
cp /tools/afterimage.toml /etc/afterimage/
cp /tools/systemd/* /etc/systemd/system/
truncate -s 256M /var/lib/afterimage/vda.raw
systemctl daemon-reload
"""


def tools_disk(folder, inside=None):
    """Make the disk in `folder`, with further files {name: text} in `inside`; returns its path."""
    folder = Path(folder)
    tree = folder / "tools"
    tree.mkdir()
    run("strip", "-o", tree / "afterimage", binary())
    (tree / "afterimage.toml").write_text(CONFIGURATION)
    (tree / "systemd").mkdir()
    for unit in (REPOSITORY / "tools/systemd").glob("afterimage*"):
        shutil.copy(unit, tree / "systemd")
    shutil.copytree(REPOSITORY / "tests/harness", tree / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "tests/vm/inside", tree / "inside", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in (inside or {}).items():
        (tree / "inside" / name).write_text(text)
    disk = folder / "tools.ext4"
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, disk, "256M")
    shutil.rmtree(tree)
    return disk

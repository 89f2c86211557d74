"""The Debian guest of the VM checks: built once, kept in a cache.

Owns: the cache folder's `guest-HASH/` (root file system image, kernel, initrd).
The hash covers this file, so a change of the recipe builds anew. A folder is
renamed into place when it is whole; a build that was cut off leaves a
`.building` folder that the next one removes. Nothing is mounted: mke2fs copies
the tree into the image, so it works in any container that has root.
"""

import fcntl
import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from harness.process import run, say

SUITE = "bookworm"
ROOT_SIZE = "1600M"
PACKAGES = [
    "linux-image-cloud-amd64", "systemd", "systemd-sysv", "udev", "dbus", "kmod",
    "util-linux", "mount", "procps", "iproute2", "qemu-guest-agent",
    "fio", "nbd-client", "e2fsprogs", "xfsprogs", "python3", "postgresql-15",
]
# Of no use to a test guest, and half of the image.
LEFT_OUT = [
    "/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*",
    "/usr/lib/x86_64-linux-gnu/libLLVM*", "/usr/lib/x86_64-linux-gnu/libz3*", "/usr/lib/postgresql/*/lib/bitcode/*",
]
# Timers and mounts that would run in the middle of a check.
MASKED_UNITS = [
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer",
    "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer", "systemd-timesyncd.service",
    "logrotate.timer", "man-db.timer", "nbd-client.service", "postgresql.service",
]
# A database with checksums, for checks that start it themselves: `ledger` takes what a check counts.
DATABASE = r"""
set -e
export PATH=/usr/lib/postgresql/15/bin:$PATH
initdb --data-checksums --no-locale --encoding=UTF8 --auth=trust -D /srv/pg >/dev/null
cat >> /srv/pg/postgresql.conf <<END
listen_addresses = ''
unix_socket_directories = '/tmp'
shared_buffers = 32MB
jit = off
END
pg_ctl -D /srv/pg -w -l /srv/pg/log start >/dev/null
createdb -h /tmp bench
pgbench -h /tmp -i -q bench 2>/dev/null
psql -h /tmp -q bench -c 'create table ledger (id int primary key)' -c 'create extension amcheck'
pg_ctl -D /srv/pg -w stop >/dev/null
"""
# The initial ramdisk holds only what it takes to mount the root: under TCG its
# size is boot time.
INITRD_MODULES = ["virtio_pci", "virtio_blk", "ext4"]
NETWORK = "[Match]\nName=e*\n\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n"


@dataclass(frozen=True)
class GuestImage:
    """The parts that a guest boots from; `root` is a raw ext4 file to be copied."""

    root: Path
    kernel: Path
    initrd: Path


def cache_folder():
    """Where built guests are kept between runs."""
    return Path(os.environ.get("AFTERIMAGE_TEST_CACHE", "/var/cache/afterimage-tests"))


def debian_sources():
    """The machine's own Debian apt sources, so that its mirrors are used.

    Third-party sources stand in files of other names and are not taken along.
    """
    deb822 = Path("/etc/apt/sources.list.d/debian.sources")
    if deb822.exists():
        return [str(deb822)]
    classic = Path("/etc/apt/sources.list")
    if classic.exists():
        lines = [line.strip() for line in classic.read_text().splitlines()]
        return [line for line in lines if line.startswith("deb ") and f" {SUITE}" in line]
    return []


def guest_image():
    """The guest for this recipe, built first if the cache has none."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready = cache / f"guest-{recipe}"
        if not ready.exists():
            for stale in cache.glob("guest-*"):
                shutil.rmtree(stale)
            building = cache / f"guest-{recipe}.building"
            building.mkdir()
            _build(building)
            building.rename(ready)
    return GuestImage(ready / "root.ext4", ready / "vmlinuz", ready / "initrd.img")


def _build(folder):
    tree = folder / "tree"
    say(f"building the Debian guest in {folder} (a minute or two, once)")
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=" + ",".join(PACKAGES)]
    command += [f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT]
    command += [
        '--essential-hook=mkdir -p "$1/etc/initramfs-tools/conf.d"',
        '--essential-hook=echo MODULES=list > "$1/etc/initramfs-tools/conf.d/small"',
        f'--essential-hook=printf "%s\\n" {" ".join(INITRD_MODULES)} > "$1/etc/initramfs-tools/modules"',
        '--essential-hook=mkdir -p "$1/etc/postgresql-common"',
        '--essential-hook=echo "create_main_cluster = false" > "$1/etc/postgresql-common/createcluster.conf"',
        '--customize-hook=install -d -m 700 -o "$(chroot "$1" id -u postgres)" -g "$(chroot "$1" id -g postgres)" "$1/srv/pg"',
        '--customize-hook=chroot "$1" su postgres -s /bin/sh -c "$DATABASE"',
    ]
    command += [SUITE, str(tree), *debian_sources()]
    # The time zone and locale of the machine are of no concern to the guest.
    run(*command, patience_seconds=900, env={**os.environ, "LC_ALL": "C.UTF-8", "DATABASE": DATABASE})
    _configure(tree)
    shutil.copy(next((tree / "boot").glob("vmlinuz-*")), folder / "vmlinuz")
    shutil.copy(next((tree / "boot").glob("initrd.img-*")), folder / "initrd.img")
    run("mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", tree, folder / "root.ext4", ROOT_SIZE,
        patience_seconds=300)
    shutil.rmtree(tree)


def _configure(tree):
    (tree / "etc/hostname").write_text("guest\n")
    (tree / "etc/fstab").write_text("LABEL=root / ext4 defaults 0 1\n")
    (tree / "etc/systemd/network/10-user.network").write_text(NETWORK)
    units = tree / "etc/systemd/system"
    for unit in MASKED_UNITS:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "systemd-networkd.service").unlink(missing_ok=True)
    (wants / "systemd-networkd.service").symlink_to("/lib/systemd/system/systemd-networkd.service")


if __name__ == "__main__":
    print(guest_image())
    sys.exit(0)

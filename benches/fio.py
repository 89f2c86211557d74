"""fio: the load of all measurements of disks."""

import json
import shutil
import subprocess
import sys

# What is written compresses to half.
DATA = ("--buffer_compress_percentage=50", "--refill_buffers")
# Random places, anew in each run and without a map of those that had their turn.
RANDOM = ("--norandommap", "--randrepeat=0")


def needed():
    if not shutil.which("fio"):
        sys.exit("fio is missing: apt-get install fio")


def nbd(uri):
    """The options for a disk behind an NBD server."""
    return ("--ioengine=nbd", f"--uri={uri}")


def file(path):
    """The options for a file or device past the page cache."""
    return ("--ioengine=io_uring", "--direct=1", f"--filename={path}")


def command(*options):
    return ["fio", "--name=job", "--group_reporting", "--output-format=json", *options]


def run(*options):
    """Runs one job to its end; returns fio's figures of it."""
    out = subprocess.run(command(*options), capture_output=True, text=True)
    if out.returncode != 0:
        sys.exit(f"fio {' '.join(options)} failed:\n{out.stdout}\n{out.stderr}")
    return json.loads(out.stdout[out.stdout.index("{"):])["jobs"][0]


def fill(path, size):
    """Makes a file that is fully written, so that no run pays for allocation."""
    run(*file(path), f"--size={size}", "--rw=write", "--bs=1m", "--iodepth=8", *DATA,
        "--end_fsync=1")

"""What a disk must hold, kept beside it while a check writes.

A `Disk` is one connection and a copy of the content in memory: every write goes to
both. `same_content` compares a file or an NBD export with such a copy.
"""

import os
import random

from harness.nbd_client import FLAG_FUA, TRIM, WRITE_ZEROES, Connection
from harness.process import CheckFailed, expect_equal, run


class Disk:
    """A disk under test and its expected content."""

    def __init__(self, path, export, size, seed=1):
        self.connection = Connection(path).open_export(export)
        expect_equal(self.connection.size, size, f"size of {export}")
        self.content = bytearray(size)
        self.dice = random.Random(seed)

    def write(self, offset, data, flags=0):
        """Write and remember."""
        self.connection.write(offset, data, flags)
        self.content[offset:offset + len(data)] = data

    def write_somewhere(self):
        """One random operation of a random kind, as a guest might send it."""
        length = self.dice.choice([512, 4096, 4096, 8192, 65536, 3000, 1, 300_000])
        offset = self.dice.randrange(0, len(self.content) - length)
        if self.dice.random() < 0.8:
            offset -= offset % 512
        kind = self.dice.random()
        if kind < 0.85:
            self.write(offset, self.dice.randbytes(length), FLAG_FUA if kind < 0.1 else 0)
            return
        command = TRIM if kind < 0.92 else WRITE_ZEROES
        expect_equal(self.connection.call(command, offset, length), 0, "errno of a trim or zeroing")
        self.content[offset:offset + length] = bytes(length)

    def flush(self):
        """Flush."""
        self.connection.flush()

    def close(self):
        """Close the connection."""
        self.connection.close()


def same_content(what, path, content):
    """Fail unless the raw file holds exactly these bytes."""
    with open(path, "rb") as file:
        seen = file.read()
    expect_equal(len(seen), len(content), f"{what}: size")
    if seen != content:
        at = next(i for i in range(0, len(content), 512) if seen[i:i + 512] != content[i:i + 512])
        raise CheckFailed(f"{what}: differs from the disk of that moment, first in the sector at {at}")


def same_export(what, uri, content, folder):
    """Fail unless the NBD export holds exactly these bytes."""
    target = folder / "export.raw"
    target.unlink(missing_ok=True)
    run("nbdcopy", uri, target)
    same_content(what, target, content)
    os.unlink(target)



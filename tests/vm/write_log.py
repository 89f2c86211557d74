"""Logs of a disk's writes, as QEMU's `blklogwrites` makes them, and what a power cut leaves of them.

The format is dm-log-writes': a superblock, then for each request a header of one sector and
its data, in the order in which the requests reached the disk. Before the last flush ahead
of a cut everything is on the disk; behind it any of the writes, or of their 512-byte
sectors, may be there or not. (A write that was under way while the flush was is taken for
flushed: a real disk could lose that, too.)
"""

import struct
from bisect import bisect_left
from dataclasses import dataclass

SECTOR = 512
MAGIC, VERSION = 0x6A736677736872, 1
FLUSH, DISCARD = 1, 4


@dataclass(frozen=True)
class Entry:
    """One request; `position` is where its data begins in the log file."""

    offset: int
    length: int
    flags: int
    position: int


class WriteLog:
    """A log of writes, read from its file."""

    def __init__(self, path):
        self.file = open(path, "rb")
        magic, version, count, sector = struct.unpack("<QQQI", self.file.read(28))
        assert (magic, version, sector) == (MAGIC, VERSION, SECTOR), (magic, version, sector)
        self.entries, position = [], SECTOR
        for _ in range(count):
            self.file.seek(position)
            first, sectors, flags, _ = struct.unpack("<QQQQ", self.file.read(32))
            position += SECTOR
            self.entries.append(Entry(first * SECTOR, sectors * SECTOR, flags, position))
            if not flags & DISCARD:
                position += sectors * SECTOR
        self.flushes = [number for number, entry in enumerate(self.entries) if entry.flags & FLUSH]

    def data(self, entry):
        """What the request wrote; a discarded range reads as zeroes."""
        if entry.flags & DISCARD:
            return bytes(entry.length)
        self.file.seek(entry.position)
        return self.file.read(entry.length)

    def flushed_before(self, cut):
        """How many entries are certain to be on the disk when the power is cut before entry `cut`."""
        found = bisect_left(self.flushes, cut)
        return self.flushes[found - 1] + 1 if found else 0

    def apply(self, image, first, end):
        """Write the entries [first, end) to an open image, all of them."""
        for entry in self.entries[first:end]:
            if entry.length:
                image.seek(entry.offset)
                image.write(self.data(entry))

    def apply_some(self, image, first, end, dice, how):
        """Write some of the entries [first, end); `how`: none, all, writes, sectors.

        Returns how many sectors were written and how many left out.
        """
        kept = lost = 0
        share = dice.choice([0.1, 0.5, 0.9])
        for entry in self.entries[first:end]:
            sectors = entry.length // SECTOR
            whole = {"none": False, "all": True, "writes": dice.random() < share, "sectors": None}[how]
            data = self.data(entry)
            for number in range(sectors):
                if dice.random() < share if whole is None else whole:
                    image.seek(entry.offset + number * SECTOR)
                    image.write(data[number * SECTOR:][:SECTOR])
                    kept += 1
                else:
                    lost += 1
        return kept, lost

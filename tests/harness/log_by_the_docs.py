"""A reader of a group's log, ring, claims and backings that was written from docs/format.md and shares no
code with Afterimage.

Owns: what a killed group's disks hold, rebuilt from those files alone. What always holds: what cannot be
read as the document says raises `Unreadable`. Everything is read into memory: for small groups.
"""

import struct
from dataclasses import dataclass

from harness.by_the_docs import BLOCK, TRIM, WRITE, ZERO, crc32c, must

OPERATIONS = range(1, 12)
LSN_NEVER = 2**64 - 1


def checked(block, at, what):
    """Whether the CRC that stands at this offset is that of the bytes before."""
    must(crc32c(block[:at]) == struct.unpack_from("<I", block, at)[0], f"{what}: CRC")


def zero(data, what):
    """Reserved bytes."""
    must(not any(data), f"{what}: reserved bytes")


def newer_copy(data, read):
    """Of two blocks the valid one with the higher generation; generation g stands in copy g mod 2."""
    found = []
    for copy in (0, 1):
        block = data[copy * BLOCK:(copy + 1) * BLOCK]
        if crc32c(block[:4092]) == struct.unpack_from("<I", block, 4092)[0]:
            made = read(block)
            must(made.generation % 2 == copy, "a generation in its copy")
            found.append(made)
    must(found, "no valid copy")
    return max(found, key=lambda made: made.generation)


@dataclass
class Superblock:
    """What of a superblock is needed to find the records."""

    clean: bool
    group: bytes
    log: bytes
    boot: bytes
    generation: int
    blocks: int
    incarnation: int
    ring_blocks: int
    first_frame: int
    tail_block: int
    tail_number: int
    tail_lsn: int
    tail_lap: int
    tail_crc: int
    destaged: int
    durable: int
    disks: list

    @staticmethod
    def read(block):
        """From one block whose CRC is right."""
        magic, version, disks, sinks, flags = struct.unpack_from("<8sHHHH", block)
        must(magic == b"AFILOGSB" and version == 1, "the superblock's magic and version")
        must(1 <= disks <= 64 and sinks <= 8 and flags <= 1, "the superblock's counts and flags")
        generation, _, blocks, incarnation, ring, first = struct.unpack_from("<QQQIIQ", block, 64)
        tail_block, tail_number, tail_lsn, lap, crc = struct.unpack_from("<QQQII", block, 104)
        destaged, durable = struct.unpack_from("<QQ", block, 136)
        must(blocks >= 8 and tail_number >= 1 and tail_lsn >= 1, "the superblock's least numbers")
        must(tail_lsn - 1 <= destaged <= durable < LSN_NEVER, "the superblock's LSNs in order")
        for start, end in ((160, 256), (256 + sinks * 80, 896), (896 + sinks * 8, 1024),
                           (1024 + disks * 32, 4092)):
            zero(block[start:end], "superblock")
        table = []
        for place in range(disks):
            uuid, size, disk_flags, reserved = struct.unpack_from("<16sQII", block, 1024 + place * 32)
            must(size % 512 == 0 and disk_flags <= 1 and reserved == 0, f"disk {place}")
            table.append((uuid, size, bool(disk_flags & 1)))
        return Superblock(bool(flags & 1), block[16:32], block[32:48], block[48:64], generation, blocks, incarnation,
                          ring, first, tail_block, tail_number, tail_lsn, lap, crc, destaged, durable, table)


@dataclass
class Ring:
    """A ring's header."""

    incarnation: int
    blocks: int
    durable: int
    latch: int
    next_block: int
    next_number: int
    newest: int

    @staticmethod
    def read(block, superblock):
        """From the first block of the ring, which must belong to the log."""
        magic, version, length, incarnation = struct.unpack_from("<8sHHI", block)
        must(magic == b"AFIRINGH" and version == 1 and length == 128, "the ring's magic, version and length")
        must(block[16:32] == superblock.group and block[32:48] == superblock.log, "the ring is of this log")
        must(block[48:64] == superblock.boot, "the ring is of the superblock's boot")
        zero(block[72:124], "ring header")
        checked(block, 124, "ring header")
        blocks, = struct.unpack_from("<Q", block, 64)
        durable, latch, upcoming, newest = (struct.unpack_from("<Q", block, at)[0] for at in (128, 192, 256, 320))
        return Ring(incarnation, blocks, durable, latch, upcoming >> 32, upcoming & 0xFFFFFFFF, newest)


@dataclass
class Record:
    """One entry."""

    lsn: int
    disk: int
    operation: int
    first: int
    count: int
    payload: bytes


@dataclass
class Frame:
    """A whole frame, or what an open one holds."""

    number: int
    blocks: int
    crc: int
    closed: bool
    records: list


@dataclass
class Expected:
    """What the frame before leads one to expect."""

    number: int
    lsn: int
    crc: int


def read_frame(area, at, superblock, expected, lap):
    """The frame of the chain at this block, or None. `lap` is None in a ring, where frames may be open."""
    descriptor = area[at * BLOCK:(at + 1) * BLOCK]
    if len(descriptor) < BLOCK:
        return None
    magic, version, length, incarnation = struct.unpack_from("<8sHHI", descriptor)
    number, lsn = struct.unpack_from("<QQ", descriptor, 48)
    count, reserved, payload_blocks, blocks, found_lap = struct.unpack_from("<HHIII", descriptor, 88)
    before, crc = struct.unpack_from("<II", descriptor, 120)
    if (magic, descriptor[16:32], number, lsn, before) != (
            b"AFIFRAME", superblock.log, expected.number, expected.lsn, expected.crc):
        return None
    must(version == 1 and length == 128, "a frame's version and length")
    if lap is not None and found_lap != lap:
        return None
    of_this = number >= superblock.first_frame
    if (incarnation != superblock.incarnation) if of_this else (incarnation >= superblock.incarnation):
        return None
    closed = blocks == payload_blocks + 1 and crc == crc32c(descriptor[:124])
    if not closed and lap is not None:
        return None
    must(reserved == 0 and not any(descriptor[104:120]), "a frame's reserved bytes")
    must(count <= 82 and (count or not closed) and payload_blocks <= 512, "a frame's counts")
    seed = struct.pack("<I", crc32c(superblock.log + struct.pack("<QI", number, incarnation)))
    records = []
    for place in range(count):
        entry = descriptor[128 + place * 48:128 + (place + 1) * 48]
        lsn_at, first, _, run, payload_at, payload_crc, disk, operation, flags = struct.unpack_from("<QQQIIIHBB", entry)
        must(crc32c(seed + entry[:44]) == struct.unpack_from("<I", entry, 44)[0], f"entry {place} of frame {number}")
        must(lsn_at == lsn + place and flags == 0 and operation in OPERATIONS, f"entry {place} of frame {number}")
        payload = b""
        if payload_at:
            bytes_of = (run if operation == WRITE else 1) * BLOCK
            start = (at + payload_at) * BLOCK
            payload = area[start:start + bytes_of]
            must(len(payload) == bytes_of and crc32c(payload) == payload_crc, f"the payload of record {lsn_at}")
        must(bool(payload) == (operation not in (ZERO, TRIM)), f"whether record {lsn_at} has a payload")
        records.append(Record(lsn_at, disk, operation, first, run, payload))
    if closed:
        zero(descriptor[128 + count * 48:], "a descriptor")
    return Frame(number, blocks, crc, closed, records)


def follow(area, blocks, superblock, expected, at, lap=None):
    """The frames of a chain, from a place on, and what would come next."""
    frames = []
    while True:
        places = [(at, lap)] if at < blocks else []
        places.append((0, None if lap is None else lap + 1))
        for place, its_lap in places:
            frame = read_frame(area, place, superblock, expected, its_lap)
            if frame:
                break
        else:
            return frames, expected
        frames.append(frame)
        if not frame.closed:
            return frames, None
        at, lap = place + frame.blocks, its_lap
        expected = Expected(frame.number + 1, expected.lsn + len(frame.records), frame.crc)


def records_of(log, ring):
    """The superblock and all records from the tail to the newest."""
    superblock = newer_copy(log, Superblock.read)
    area = log[2 * BLOCK:(2 + superblock.blocks) * BLOCK]
    tail = Expected(superblock.tail_number, superblock.tail_lsn, superblock.tail_crc)
    frames, expected = follow(area, superblock.blocks, superblock, tail, superblock.tail_block, superblock.tail_lap)
    bound = superblock.durable
    if not superblock.clean:
        header = Ring.read(ring[:BLOCK], superblock)
        must(header.incarnation == superblock.incarnation, "the ring is of the superblock's incarnation")
        must(header.blocks == superblock.ring_blocks and header.latch == 0, "the ring's size and latch")
        bound = max(bound, header.durable)
        area = ring[BLOCK:(1 + header.blocks) * BLOCK]
        # The ring is newer than the log: it goes on from where everything is durable.
        while frames and frames[-1].number & 0xFFFFFFFF != (header.next_number - 1) & 0xFFFFFFFF:
            last = frames.pop()
            expected = Expected(last.number, expected.lsn - len(last.records), None)
        expected.crc = frames[-1].crc if frames else superblock.tail_crc
        must(expected.number & 0xFFFFFFFF == header.next_number, "the log reaches to where the ring begins")
        frames += follow(area, header.blocks, superblock, expected, header.next_block)[0]
    records = [record for frame in frames for record in frame.records]
    last = records[-1].lsn if records else superblock.tail_lsn - 1
    must(last >= bound, f"records up to {bound} were durable, there are some up to {last}")
    if not superblock.clean:
        must(last >= header.newest, f"the ring says {header.newest}, there are records up to {last}")
    return superblock, records


@dataclass
class Claim:
    """What stands beside a backing."""

    generation: int
    state: int
    place: int
    group: bytes
    disk: bytes
    log: bytes
    successor: bytes
    path: str

    @staticmethod
    def read(block):
        """From one block whose CRC is right."""
        magic, version, state, reserved, length, place = struct.unpack_from("<8sHBBHH", block)
        must(magic == b"AFICLAIM" and version == 1, "the claim's magic and version")
        must(state in (1, 2, 3, 4) and reserved == 0 and length <= 2048, "the claim's state and path")
        zero(block[176:256] + block[256 + length:4092], "claim")
        must(state in (2, 3) or not any(block[88:176]), "a claim without a fingerprint")
        return Claim(struct.unpack_from("<Q", block, 80)[0], state, place, block[16:32], block[32:48], block[48:64],
                     block[64:80], block[256:256 + length].decode())


def disks_of(log, ring, backings):
    """What the disks hold: by place, from the bytes of log, ring and, by place, backing and claim."""
    superblock, records = records_of(log, ring)
    disks = {}
    for place, (backing, claim) in backings.items():
        uuid, size, removed = superblock.disks[place]
        made = newer_copy(claim, Claim.read)
        must((made.group, made.disk, made.log, made.place) == (superblock.group, uuid, superblock.log, place),
             f"the claim of disk {place}")
        must(made.state == 1 and not removed and len(backing) == size, f"disk {place} is attached")
        disks[place] = bytearray(backing.ljust(-size % BLOCK + size, b"\0"))
    for record in records:
        if record.lsn <= superblock.destaged or record.operation not in (WRITE, ZERO, TRIM):
            continue
        start, length = record.first * BLOCK, record.count * BLOCK
        must(start + length <= len(disks[record.disk]), f"record {record.lsn} is within its disk")
        disks[record.disk][start:start + length] = record.payload or bytes(length)
    return {place: bytes(disk[:superblock.disks[place][1]]) for place, disk in disks.items()}

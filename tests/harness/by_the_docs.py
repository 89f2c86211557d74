"""A reader of a repository that was written from docs/format.md and shares no code with Afterimage.

Owns: BLAKE3 and CRC32C in plain Python, every check that the document asks of a full check, and the
image of a disk at an LSN. What always holds: what cannot be read as the document says raises
`Unreadable`. Zstandard is libzstd, which is part of every Debian. It is slow and for small disks.
"""

import ctypes
import struct
from pathlib import Path

BLOCK = 4096
WRITE, ZERO, TRIM, CHECKPOINT, PASS_BEGIN, PASS_END = 1, 2, 3, 4, 7, 8
NO_CHAIN = bytes(32)


class Unreadable(Exception):
    """The repository is not as the document says."""


def must(condition, what):
    """Raise unless `condition` holds."""
    if not condition:
        raise Unreadable(what)


# Checksums

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
ORDER = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
LANES = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
         (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
MASK = 0xFFFFFFFF


def _compress(chaining, words, counter, length, flags):
    v = [*chaining, *IV[:4], counter & MASK, counter >> 32, length, flags]
    for turn in range(7):
        for lane, (a, b, c, d) in enumerate(LANES):
            va, vb, vc, vd = v[a], v[b], v[c], v[d]
            va = (va + vb + words[2 * lane]) & MASK
            vd ^= va
            vd = (vd >> 16) | ((vd << 16) & MASK)
            vc = (vc + vd) & MASK
            vb ^= vc
            vb = (vb >> 12) | ((vb << 20) & MASK)
            va = (va + vb + words[2 * lane + 1]) & MASK
            vd ^= va
            vd = (vd >> 8) | ((vd << 24) & MASK)
            vc = (vc + vd) & MASK
            vb ^= vc
            vb = (vb >> 7) | ((vb << 25) & MASK)
            v[a], v[b], v[c], v[d] = va, vb, vc, vd
        if turn < 6:
            words = [words[place] for place in ORDER]
    return [v[i] ^ v[i + 8] for i in range(8)]


def _chunk(data, number, root):
    chaining, pieces = IV, [data[at:at + 64] for at in range(0, len(data), 64)] or [b""]
    for at, piece in enumerate(pieces):
        flags = CHUNK_START if at == 0 else 0
        if at == len(pieces) - 1:
            flags |= CHUNK_END | root
        chaining = _compress(chaining, struct.unpack("<16I", piece.ljust(64, b"\0")), number, len(piece), flags)
    return chaining


def _tree(data, first, root):
    if len(data) <= 1024:
        return _chunk(data, first, root)
    left = 1024
    while left * 2 < len(data):
        left *= 2
    words = _tree(data[:left], first, 0) + _tree(data[left:], first + left // 1024, 0)
    return _compress(IV, words, 0, 64, PARENT | root)


def blake3(data):
    """The 32 bytes of BLAKE3 in its plain mode."""
    return struct.pack("<8I", *_tree(data, 0, ROOT))


def _crc_table():
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


CRC_TABLE = _crc_table()


def crc32c(data):
    """CRC32C, Castagnoli."""
    value = MASK
    for byte in data:
        value = CRC_TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ MASK


must(crc32c(b"123456789") == 0xE3069283, "the CRC of the document's example")
must(blake3(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262", "BLAKE3 of nothing")


def zstd_frame(data, raw_bytes):
    """What one Zstandard frame holds."""
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    out = ctypes.create_string_buffer(raw_bytes)
    must(library.ZSTD_decompress(out, raw_bytes, data, len(data)) == raw_bytes, "a chunk's raw length")
    return out.raw


# Objects


class Fields:
    """Takes fields from the front; `end` demands that nothing is left."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        must(self.at + count <= len(self.data), "an object that is cut short")
        self.at += count
        return self.data[self.at - count:self.at]

    def number(self, count):
        return int.from_bytes(self.take(count), "little")

    def string(self):
        return self.take(self.number(2)).decode()

    def zero(self, count):
        must(not any(self.take(count)), "reserved bytes that are not zero")

    def end(self):
        must(self.at == len(self.data), "bytes behind the end of an object")


def uuid_text(raw):
    """A UUID as keys have it."""
    text = raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def envelope(data, magic):
    """The body of a small object."""
    must(data[:8] == magic, f"the magic {magic}")
    fields = Fields(data[8:16])
    must(fields.number(2) == 1, "version 1")
    fields.zero(2)
    must(fields.number(4) == len(data), "the length of an object")
    must(crc32c(data[:-4]) == int.from_bytes(data[-4:], "little"), "the CRC of an object")
    return Fields(data[16:-4])


def manifest(data):
    """{"number", "group", "name", "disks": [(name, size)], "epochs": [(epoch, log, first sequence)]}"""
    fields = envelope(data, b"AFTRMANI")
    found = {"number": fields.number(8), "group": fields.take(16)}
    fields.number(8)
    found["name"] = fields.string()
    fields.string()
    found["disks"] = []
    for _ in range(fields.number(4)):
        fields.take(16)
        size = fields.number(8)
        found["disks"].append((fields.string(), size))
    found["epochs"] = []
    for _ in range(fields.number(4)):
        found["epochs"].append((fields.number(8), fields.take(16), fields.number(8)))
        fields.take(16)
    fields.zero(8)
    fields.end()
    return found


class Record:
    """One entry of a segment's index."""

    def __init__(self, raw):
        (self.lsn, self.wall_ns, self.first_block, self.blocks, self.crc, self.aux, self.chunk, self.place,
         self.payload_blocks, self.disk, self.op, self.flags) = struct.unpack("<QQQIIIIHHHBB", raw)
        must(1 <= self.op <= 11 and self.flags == 0, "an operation of the table")
        self.payload = b""

    def chained(self, before):
        """The chain after this record."""
        return blake3(before + struct.pack("<QQQIIIHBBI", self.lsn, self.first_block, self.wall_ns, self.blocks, 0,
                                           self.crc, self.disk, self.op, self.flags, self.aux))


class Segment:
    """A segment, checked in full."""

    def __init__(self, data):
        header, footer = data[:256], Fields(data[-128:])
        must(header[:8] == b"AFTRSEGM" and footer.take(8) == b"AFTRSEGF", "the magics of a segment")
        must(footer.number(2) == 1 and footer.number(2) == 128, "version 1 of the footer")
        footer.zero(4)
        index_at, chunks_at, length = (footer.number(8) for _ in range(3))
        counts = footer.number(4), footer.number(4)
        index_hash, content_hash = footer.take(32), footer.take(32)
        footer.zero(12)
        must(crc32c(data[-128:-4]) == footer.number(4), "the footer's CRC")
        must(length == len(data), "the length of a segment")
        must(crc32c(header[:252]) == int.from_bytes(header[252:], "little"), "the header's CRC")
        self._header(Fields(header[8:252]), counts)
        records, chunks = counts
        must(index_at + 48 * records == chunks_at and chunks_at + 24 * chunks + 256 + 128 == length, "the layout")
        must(data[-384:-128] == header, "the copy of the header")
        must(blake3(data[index_at:-128]) == index_hash, "the index's hash")
        must(blake3(data[:-128]) == content_hash, "the content's hash")
        self.records = [Record(data[at:at + 48]) for at in range(index_at, chunks_at, 48)]
        self._chunks(data, [data[at:at + 24] for at in range(chunks_at, length - 384, 24)], index_at)
        chain = self.chain_before
        for record in self.records:
            chain = record.chained(chain)
        must(chain == self.chain_after, "the chain over a segment's records")

    def _header(self, fields, counts):
        must(fields.number(2) == 1 and fields.number(2) == 256, "version 1 of the header")
        self.kind = fields.number(1)
        must(self.kind in (1, 2) and fields.number(1) == 0, "kind and encryption of a segment")
        self.gap = bool(fields.number(2) & 1)
        self.group, self.log = fields.take(16), fields.take(16)
        self.epoch, self.first, self.last, self.names_pass = (fields.number(8) for _ in range(4))
        self.chain_before, self.chain_after = fields.take(32), fields.take(32)
        fields.take(32)  # clock anchor
        must((fields.number(4), fields.number(4)) == counts, "the counts in header and footer")
        self.raw_bytes = fields.number(8)
        fields.zero(16 + 32 + 12)
        fields.end()

    def _chunks(self, data, table, index_at):
        raw, starts, at = b"", [], 256
        for entry in table:
            offset, stored, raw_length, crc, codec, zero = struct.unpack("<QIIIB3s", entry)
            must(offset == at and not any(zero) and codec in (0, 1), "an entry of the chunk table")
            at += stored
            bytes_there = data[offset:at]
            must(crc32c(bytes_there) == crc, "a chunk's CRC")
            starts.append(len(raw) // BLOCK)
            raw += zstd_frame(bytes_there, raw_length) if codec else bytes_there
            must(len(raw) % BLOCK == 0, "chunks of whole blocks")
        must(at == index_at and len(raw) == self.raw_bytes, "chunks that reach from header to index")
        expected = 0
        for record in self.records:
            if record.payload_blocks:
                start = starts[record.chunk] + record.place
                must(start == expected, "payloads in the order of the records")
                expected += record.payload_blocks
                record.payload = raw[start * BLOCK:expected * BLOCK]
                must(crc32c(record.payload) == record.crc, "a payload's CRC")
            if record.op == WRITE:
                must(record.payload_blocks == record.blocks, "a write's payload is its blocks")


# History


class Base:
    """From one pass to the next: its records, and the LSNs that it can show."""

    def __init__(self, begin):
        self.begin, self.readable_from, self.last = begin, None, begin
        self.records, self.checkpoints = [], {}
        self.pass_blocks, self.pass_chain = 0, NO_CHAIN


class History:
    """A group of a repository folder, read as docs/format.md says under "Reading a group"."""

    def __init__(self, repository, name):
        repository = Path(repository)
        binding = envelope((repository / "names" / name).read_bytes(), b"AFTRNAME")
        self.group = binding.take(16)
        self.folder = repository / "groups" / uuid_text(self.group)
        self.terminators = 0
        self.manifests = []
        while (path := self.folder / f"manifests/{len(self.manifests) + 1:020}").exists():
            found = manifest(path.read_bytes())
            must((found["number"], found["group"], found["name"]) == (len(self.manifests) + 1, self.group, name),
                 "a manifest under its own key")
            self.manifests.append(found)
        epochs = self.manifests[-1]["epochs"]
        self.bases = {}
        for place, (epoch, log, sequence) in enumerate(epochs):
            ended = self._epoch(epoch, log, sequence, epochs[place + 1:])
            must(ended or place == len(epochs) - 1, "an epoch that ended has its terminator")

    def disks(self, epoch):
        """The disk table of an epoch."""
        return [found for found in self.manifests if found["epochs"][-1:] and found["epochs"][-1][0] == epoch][-1]["disks"]

    def _epoch(self, epoch, log, sequence, later):
        bases = self.bases[epoch] = []
        last, chain = 0, NO_CHAIN
        while (path := self.folder / f"segments/{epoch:010}/{sequence:020}").exists():
            data = path.read_bytes()
            if data[:8] == b"AFTRTERM":
                fields = envelope(data, b"AFTRTERM")
                said = fields.take(16), fields.number(8), fields.number(8), fields.number(8), fields.take(16)
                must(said[:3] == (self.group, epoch, sequence), "a terminator under its own key")
                must(not later or said[3:] == later[0][:2], "the epoch that a terminator names")
                self.terminators += 1
                return True
            segment = Segment(data)
            must((segment.group, segment.epoch, segment.log) == (self.group, epoch, log), "a segment of this epoch")
            if segment.kind == 2:
                self._pass_segment(bases, segment)
            else:
                last, chain = self._log_segment(bases, segment, last, chain)
            sequence += 1
        return False

    @staticmethod
    def _pass_segment(bases, segment):
        must(bases and bases[-1].begin == segment.names_pass, "the pass that a pass segment names")
        base = bases[-1]
        must(segment.chain_before == base.pass_chain, "the chain of a pass")
        base.pass_chain = segment.chain_after
        base.pass_blocks += sum(record.blocks for record in segment.records)
        base.records += segment.records

    @staticmethod
    def _log_segment(bases, segment, last, chain):
        lsns = [record.lsn for record in segment.records]
        must(lsns == list(range(segment.first, segment.last + 1)), "consecutive LSNs")
        if segment.gap:
            must(segment.names_pass == segment.first and segment.chain_before == NO_CHAIN, "a gap begins a base")
        elif segment.first == last + 1:
            must(segment.chain_before == chain, "a segment goes on where the last one ended")
        else:
            must(segment.first <= last, "no gap that is not declared")
            over = segment.chain_before
            for record in segment.records[:last - segment.first + 1]:
                over = record.chained(over)
            must(over == chain, "a re-cut says the same again")
        for record in segment.records:
            if record.lsn <= last:
                continue
            if record.op == PASS_BEGIN and record.lsn == segment.names_pass:
                must(record.payload[:6] == b"PBGN\1\0", "the body of PassBegin")
                bases.append(Base(record.lsn))
            if not bases:
                continue
            base = bases[-1]
            base.last = record.lsn
            base.records.append(record)
            if record.op == CHECKPOINT:
                must(record.payload[:6] == b"CKPT\1\0", "the body of a checkpoint")
                length = record.payload[8]
                must(not any(record.payload[16 + length:]), "zeroes behind a label")
                base.checkpoints[record.payload[16:16 + length].decode()] = record.lsn
            if record.op == PASS_END:
                fields = Fields(record.payload)
                must(fields.take(8) == b"PEND\1\0\0\0", "the body of PassEnd")
                fields.take(16)
                said = fields.number(8), fields.number(8), fields.take(32)
                if said[0] == base.begin and base.readable_from is None:
                    must(said[1:] == (base.pass_blocks, base.pass_chain), "what PassEnd says of its pass")
                    base.readable_from = record.lsn
        return segment.last, segment.chain_after

    def checkpoints(self):
        """{label: (epoch, LSN)} of the named recovery points."""
        return {label: (epoch, lsn) for epoch, bases in self.bases.items() for base in bases
                for label, lsn in base.checkpoints.items() if base.readable_from and lsn >= base.readable_from}

    def image(self, epoch, lsn, disk):
        """The content of the disk of that name at an LSN."""
        bases = [base for base in self.bases[epoch]
                 if base.readable_from is not None and base.readable_from <= lsn <= base.last]
        must(bases, f"LSN {lsn} of epoch {epoch} is no recovery point")
        (number, size), = [(at, size) for at, (name, size) in enumerate(self.disks(epoch)) if name == disk]
        content = bytearray(-(-size // BLOCK) * BLOCK)
        for record in sorted(bases[0].records, key=lambda record: record.lsn):
            if record.disk != number or record.lsn > lsn or record.op not in (WRITE, ZERO, TRIM):
                continue
            start = record.first_block * BLOCK
            bytes_new = record.payload if record.op == WRITE else bytes(record.blocks * BLOCK)
            content[start:start + len(bytes_new)] = bytes_new
        must(len(content) == -(-size // BLOCK) * BLOCK, "records within the disk")
        return bytes(content[:size])

"""A small NBD client of our own, for what no finished client can be told to do.

`Connection` speaks the protocol by hand (fixed newstyle, simple replies), so a
check can stall, cut or garble it anywhere. `ResendingClient` behaves as QEMU
with `reconnect-delay`: it keeps requests in flight, reconnects when the server
dies and sends again exactly what was not answered; it knows afterwards what
every block must hold.
"""

import hashlib
import random
import socket
import struct
import threading
import time

from harness.process import CheckFailed, expect

MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO, OPT_STRUCTURED = 1, 2, 3, 5, 6, 7, 8
REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
REP_ERR = 1 << 31
REP_ERR_UNSUP, REP_ERR_POLICY, REP_ERR_INVALID = REP_ERR | 1, REP_ERR | 2, REP_ERR | 3
REP_ERR_TLS_REQD, REP_ERR_UNKNOWN, REP_ERR_TOO_BIG = REP_ERR | 5, REP_ERR | 6, REP_ERR | 9
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES = range(7)
FLAG_FUA = 1
BLOCK = 4096


class ExportRefused(CheckFailed):
    """GO was answered with an error."""


class Connection:
    """One connection; `open_export` brings it into the transmission phase."""

    def __init__(self, path=None, *, address=None, patience_seconds=60):
        if path is not None:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(patience_seconds)
            self.socket.connect(str(path))
        else:
            self.socket = socket.create_connection(address, patience_seconds)
        self.cookie = 0
        self.size = self.flags = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()

    def close(self):
        """Close without DISC."""
        self.socket.close()

    def send(self, data):
        """Send raw bytes."""
        self.socket.sendall(data)

    def receive(self, length):
        """Receive exactly so many bytes."""
        parts = bytearray()
        while len(parts) < length:
            part = self.socket.recv(min(1 << 20, length - len(parts)))
            if not part:
                raise ConnectionError("the server closed the connection")
            parts += part
        return bytes(parts)

    def closed_by_server(self):
        """Whether the server closes without sending anything more."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    # Handshake

    def greet(self, client_flags=3):
        """Server's greeting and the client's flags."""
        magic, option_magic, flags = struct.unpack(">QQH", self.receive(18))
        expect(magic == MAGIC and option_magic == OPTION_MAGIC, "the greeting has NBD's magic numbers")
        expect(flags & 1, "the server speaks fixed newstyle")
        self.send(struct.pack(">I", client_flags))
        return flags

    def option(self, option, data=b"", length=None):
        """Send an option; `length` may lie."""
        size = len(data) if length is None else length
        self.send(struct.pack(">QII", OPTION_MAGIC, option, size) + data)

    def option_reply(self):
        """One reply to an option: (option, kind, payload)."""
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        expect(magic == OPTION_REPLY_MAGIC, "an option's reply has its magic number")
        return option, kind, self.receive(length)

    def option_outcome(self, option, data=b"", length=None):
        """Send an option and return the kind of its last reply and all payloads before it."""
        self.option(option, data, length)
        payloads = []
        while True:
            _, kind, payload = self.option_reply()
            if kind == REP_ACK or kind & REP_ERR:
                return kind, payloads
            payloads.append(payload)

    def open_export(self, name):
        """Greeting and GO; the connection then takes requests."""
        self.greet()
        name = name.encode() if isinstance(name, str) else name
        kind, payloads = self.option_outcome(OPT_GO, struct.pack(">I", len(name)) + name + b"\0\0")
        if kind != REP_ACK:
            raise ExportRefused(f"GO {name!r} was answered with {kind:#x}")
        for payload in payloads:
            if payload[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", payload[2:12])
        return self

    # Transmission

    def request(self, command, offset=0, length=0, payload=b"", flags=0, cookie=None):
        """Send a request; returns its cookie."""
        if cookie is None:
            self.cookie += 1
            cookie = self.cookie
        self.send(struct.pack(">IHHQQI", REQUEST_MAGIC, flags, command, cookie, offset, length) + payload)
        return cookie

    def reply(self):
        """One simple reply without data: (errno, cookie)."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        expect(magic == REPLY_MAGIC, f"a simple reply has its magic number, not {magic:#x}")
        return error, cookie

    def call(self, command, offset=0, length=0, payload=b"", flags=0):
        """A request and its reply, one at a time; returns the errno."""
        cookie = self.request(command, offset, length, payload, flags)
        error, answered = self.reply()
        expect(cookie == answered, "the reply carries the request's cookie")
        return error

    def write(self, offset, data, flags=0):
        """Write; fails the check on an error."""
        error = self.call(WRITE, offset, len(data), data, flags)
        expect(error == 0, f"write of {len(data)} at {offset}: errno {error}")

    def flush(self):
        """Flush; fails the check on an error."""
        error = self.call(FLUSH)
        expect(error == 0, f"flush: errno {error}")

    def read(self, offset, length):
        """Read; fails the check on an error."""
        error = self.call(READ, offset, length)
        expect(error == 0, f"read of {length} at {offset}: errno {error}")
        return self.receive(length)


def block_content(seed, block, version):
    """What a block holds in its nth version; version 0 is never written: zeroes."""
    if version == 0:
        return bytes(BLOCK)
    digest = hashlib.blake2b(f"{seed}/{block}/{version}".encode(), digest_size=32).digest()
    return (digest * (BLOCK // 32))[:BLOCK]


class ResendingClient:
    """Writes on several connections until told to stop; survives the server's death.

    Each connection has blocks of its own (block % connections), so the newest
    version of a block is well defined. `verify` reads everything back.
    """

    def __init__(self, path, export, *, blocks, connections=4, depth=16, seed=1):
        self.path, self.export, self.seed = path, export, seed
        self.blocks, self.connections, self.depth = blocks, connections, depth
        self.answered = [0] * blocks
        self.answered_writes = self.reconnects = 0
        self._next_version = [0] * blocks
        self._stop, self._stay_away = threading.Event(), threading.Event()
        self._threads, self._errors = [], []
        self._lock = threading.Lock()

    def start(self):
        """Begin writing."""
        for number in range(self.connections):
            thread = threading.Thread(target=self._run, args=(number,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def finish(self):
        """Stop, and wait until every request in flight has been answered."""
        self._stop.set()
        for thread in self._threads:
            thread.join(300)
            expect(not thread.is_alive(), "the client's connections finish")
        self.check()

    def check(self):
        """Fail if a connection has failed for good."""
        if self._errors:
            raise CheckFailed(f"a connection failed: {self._errors[0]}")

    def stay_away(self):
        """Do not reconnect after the next disconnect: the client is gone for good."""
        self._stay_away.set()

    def _connect(self):
        deadline = time.monotonic() + 120
        while True:
            try:
                return Connection(self.path, patience_seconds=120).open_export(self.export)
            except (OSError, ConnectionError, ExportRefused):
                # Refused, too: a server that is about to end says so, and QEMU tries again.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _run(self, number):
        try:
            self._write_until_stopped(number, random.Random(f"{self.seed}/{number}"))
        except Exception as error:  # noqa: BLE001 - handed to finish()
            self._errors.append(f"connection {number}: {error!r}")

    def _write_until_stopped(self, number, dice):
        connection, in_flight = self._connect(), {}
        while in_flight or not self._stop.is_set():
            try:
                while len(in_flight) < self.depth and not self._stop.is_set():
                    block = dice.randrange(number, self.blocks, self.connections)
                    if any(block == other for other, _ in in_flight.values()):
                        continue
                    self._next_version[block] += 1
                    connection.cookie += 1
                    in_flight[connection.cookie] = (block, self._next_version[block])
                    self._send(connection, connection.cookie, *in_flight[connection.cookie])
                error, cookie = connection.reply()
                expect(error == 0, f"write answered with errno {error}")
                block, version = in_flight.pop(cookie)
                self.answered[block] = version
                with self._lock:
                    self.answered_writes += 1
            except (OSError, ConnectionError):
                connection.close()
                if self._stay_away.is_set():
                    return
                cookie, connection = connection.cookie, self._connect()
                connection.cookie = cookie
                with self._lock:
                    self.reconnects += 1
                self._send_again(connection, in_flight)
        connection.close()

    def _send(self, connection, cookie, block, version):
        content = block_content(self.seed, block, version)
        connection.request(WRITE, block * BLOCK, BLOCK, content, cookie=cookie)

    def _send_again(self, connection, in_flight):
        try:
            for cookie, (block, version) in in_flight.items():
                self._send(connection, cookie, block, version)
        except (OSError, ConnectionError):
            pass  # Dead again: the next turn of the loop notices and reconnects.

    def verify(self, read):
        """Compare every block with the version answered last, given `read(offset, length)`."""
        for first in range(0, self.blocks, 256):
            count = min(256, self.blocks - first)
            content = read(first * BLOCK, count * BLOCK)
            for block in range(first, first + count):
                self.verify_block(block, content[(block - first) * BLOCK:][:BLOCK])

    def verify_without_resend(self, read):
        """Compare every written block when the client never came back.

        A block may then also hold a version that was in flight: at the kill it had
        been sent, but not answered.
        """
        for block in range(self.blocks):
            if self.answered[block]:
                self.verify_block(block, read(block * BLOCK, BLOCK), self._next_version[block])

    def touched(self, block):
        """Whether any version of the block was ever sent."""
        return self._next_version[block] > 0

    def verify_block(self, block, seen, newest=None):
        """Compare one block: it must hold the version answered last, or up to `newest`."""
        answered = self.answered[block]
        newest = answered if newest is None else newest
        if not any(seen == block_content(self.seed, block, version) for version in range(answered, newest + 1)):
            raise CheckFailed(f"block {block} does not hold version {answered}, which was answered")

"""Clients that write for long, know what every block must hold, and survive the server's death.

`ResendingClient` behaves as QEMU with `reconnect-delay`: it keeps requests in
flight on several connections, reconnects when the server dies and sends again
exactly what was not answered. `MixedClient` does the same with whole and partial
writes, zeroes, trims, FUA and flushes. What always holds: a block has at most one
request in flight, so at any time it must hold the version answered last or, if
nothing was sent again, the one in flight.
"""

import hashlib
import random
import threading
import time

from harness.nbd_client import BLOCK, FLAG_FUA, FLUSH, TRIM, WRITE, WRITE_ZEROES, Connection, ExportRefused
from harness.process import CheckFailed, expect


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

    def __init__(self, path, export, *, blocks, connections=4, depth=16, seed=1, tolerated=()):
        self.path, self.export, self.seed, self.tolerated = path, export, seed, frozenset(tolerated)
        self.blocks, self.connections, self.depth = blocks, connections, depth
        self.answered = [0] * blocks
        self.answered_writes = self.reconnects = self.errors = self.compared = 0
        self._next_version = [0] * blocks
        self._stop, self._stay_away = threading.Event(), threading.Event()
        self._threads, self._errors = [], []
        self._lost = set()
        self._lock = threading.Lock()
        self._attached_at = [None] * connections

    def start(self):
        """Begin writing, or go on after `finish`."""
        self._stop.clear()
        self._stay_away.clear()
        self._threads.clear()
        self._attached_at = [None] * self.connections
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

    def attached_since(self, moment):
        """Whether every connection has attached since then, be it for the first time or again."""
        return all(at is not None and at >= moment for at in self._attached_at)

    def stay_away(self):
        """Do not reconnect after the next disconnect: the client is gone for good."""
        self._stay_away.set()

    def _connect(self, number):
        """A connection, or none when the client is to stay away and there is no server."""
        deadline = time.monotonic() + 120
        while True:
            try:
                connection = Connection(self.path, patience_seconds=120).open_export(self.export)
                self._attached_at[number] = time.monotonic()
                return connection
            except (OSError, ConnectionError, ExportRefused):
                # Refused, too: a server that is about to end says so, and QEMU tries again.
                if self._stay_away.is_set():
                    return None
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _run(self, number):
        try:
            self._write_until_stopped(number, random.Random(f"{self.seed}/{number}"))
        except Exception as error:  # noqa: BLE001 - handed to finish()
            self._errors.append(f"connection {number}: {error!r}")

    def _write_until_stopped(self, number, dice):
        connection, in_flight = self._connect(number), {}
        if connection is None:
            return
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
                if error and error in self.tolerated:
                    # As QEMU with werror=stop: the guest waits, and the request is sent again.
                    with self._lock:
                        self.errors += 1
                    time.sleep(0.1)
                    self._send(connection, cookie, *in_flight[cookie])
                    continue
                expect(error == 0, f"write answered with errno {error}")
                block, version = in_flight.pop(cookie)
                self.answered[block] = version
                with self._lock:
                    self.answered_writes += 1
            except (OSError, ConnectionError):
                connection.close()
                if self._stay_away.is_set():
                    return
                cookie, connection = connection.cookie, self._connect(number)
                if connection is None:
                    return
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

    def content(self, block, version):
        """What the block holds in that version."""
        return block_content(self.seed, block, version)

    def settle(self, read):
        """After `stay_away`: compare everything, and take for true what became of the last requests.

        Returns how many requests that were never answered had been carried out all the same.
        """
        kept = 0
        for first in range(0, self.blocks, 256):
            count = min(256, self.blocks - first)
            content = read(first * BLOCK, count * BLOCK)
            for block in range(first, first + count):
                seen = content[(block - first) * BLOCK:][:BLOCK]
                self.verify_block(block, seen, self._next_version[block])
                for version in range(self.answered[block] + 1, self._next_version[block] + 1):
                    if seen == self.content(block, version):
                        self.answered[block] = version
                        kept += 1
                    else:
                        self._lost.add((block, version))
        return kept

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
        if not any(seen == self.content(block, version) for version in range(answered, newest + 1)):
            older = [version for version in range(answered) if seen == self.content(block, version)]
            raise CheckFailed(f"{self.export}: block {block} does not hold version {answered}, which was answered"
                              + (f", but version {older[-1]}" if older else ""))
        self.compared += 1


class MixedClient(ResendingClient):
    """As `ResendingClient`, with every kind of request that changes a disk, and flushes.

    What a version does follows from seed, block and number alone; a partial write lets the
    rest of its block be what it was in the version before.
    """

    filled = False

    def fill(self, path):
        """Make the backing, with content of its own in every block."""
        self.filled = True
        with open(path, "wb") as file:
            for block in range(self.blocks):
                file.write(self.content(block, 0))

    def _dice(self, block, version):
        return hashlib.blake2b(f"{self.seed}/kind/{block}/{version}".encode(), digest_size=4).digest()

    def content(self, block, version):
        while (block, version) in self._lost:
            version -= 1
        if version == 0:
            return block_content(self.seed, block, "filled") if self.filled else bytes(BLOCK)
        kind, first, last, _ = self._dice(block, version)
        whole = block_content(self.seed, block, version)
        if kind < 160:
            return whole
        if kind < 210:
            first, end = self._part(first, last)
            before = self.content(block, version - 1)
            return before[:first] + whole[first:end] + before[end:]
        return bytes(BLOCK)

    @staticmethod
    def _part(first, last):
        """Bytes of a partial write: half of them on sectors, the others anywhere."""
        first, last = sorted((first, last))
        unit = 512 if first % 2 else 16
        return first * 16 // unit * unit, min(BLOCK, (last * 16 // unit + 1) * unit)

    def request_of(self, block, version):
        """The request that makes a version: command, offset, payload (of zeroes and trims: all of the block)."""
        kind, first, last, _ = self._dice(block, version)
        if kind >= 210:
            return WRITE_ZEROES if kind < 235 else TRIM, block * BLOCK, b""
        first, end = (0, BLOCK) if kind < 160 else self._part(first, last)
        return WRITE, block * BLOCK + first, block_content(self.seed, block, version)[first:end]

    def _send(self, connection, cookie, block, version):
        fua = FLAG_FUA if self._dice(block, version)[3] < 8 else 0
        command, offset, content = self.request_of(block, version)
        connection.request(command, offset, len(content) or BLOCK, content, fua, cookie)


class Flusher:
    """Flushes on a connection of its own, reconnecting as the clients do; counts what was answered."""

    def __init__(self, path, export, tolerated=()):
        self.path, self.export, self.tolerated = path, export, frozenset(tolerated)
        self.answered = self.errors = 0
        self._problem, self._stop = None, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        """Begin flushing."""
        self._thread.start()
        return self

    def finish(self):
        """Stop; fail if a flush was answered with an error that is not tolerated."""
        self._stop.set()
        self._thread.join(300)
        if self._problem:
            raise CheckFailed(f"flushes: {self._problem!r}")

    def _run(self):
        while not self._stop.is_set():
            try:
                with Connection(self.path).open_export(self.export) as connection:
                    while not self._stop.wait(0.01):
                        error = connection.call(FLUSH)
                        expect(error == 0 or error in self.tolerated, f"flush answered with errno {error}")
                        self.errors += error != 0
                        self.answered += error == 0
            except (OSError, ConnectionError, ExportRefused):
                time.sleep(0.05)
            except CheckFailed as problem:
                self._problem = problem
                return

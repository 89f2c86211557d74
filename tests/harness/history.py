"""What a client did and when it knew: judged against a disk that may have lost its newest writes.

`Recorder` writes blocks one request at a time on each of several connections and notes, on one
counter, when each request was sent and when answered. `Judge` says of a disk's content whether
it is one that a power cut may leave: every block in a version that it had, everything promised
there, and no write there while one that was answered before it was sent is not.
"""

import hashlib
import json
import random
import threading
import time

from harness.nbd_client import BLOCK, FLAG_FUA, FLUSH, Connection, ExportRefused
from harness.process import CheckFailed, expect
from harness.resending_client import MixedClient


class Recorder:
    """Writes to the disks of a group; `disks` maps a disk's name to its number of blocks.

    `promise(floor, own)` is called after each answered flush or FUA write: every write answered
    before `floor` is durable, and the one with the number `own`, if there is one.
    """

    def __init__(self, path, group, disks, *, seed, promise, connections=2):
        self.path, self.group, self.disks, self.seed, self.promise = path, group, disks, seed, promise
        self.connections = connections
        self.events = []  # [disk, block, version, sent, answered]; unanswered: answered is None
        self.flushes = 0
        self._clock, self._lock = 0, threading.Lock()
        self._stop = threading.Event()
        self._threads, self._errors = [], []

    def tick(self):
        """The next moment."""
        with self._lock:
            self._clock += 1
            return self._clock

    def start(self):
        """Begin writing."""
        for disk, blocks in self.disks.items():
            model = MixedClient(self.path, f"{self.group}/{disk}", blocks=blocks, seed=f"{self.seed}/{disk}")
            for number in range(self.connections):
                thread = threading.Thread(target=self._guarded, args=(disk, model, number), daemon=True)
                thread.start()
                self._threads.append(thread)
        return self

    def finish(self):
        """Stop, and wait for the last answers."""
        self._stop.set()
        for thread in self._threads:
            thread.join(300)
            expect(not thread.is_alive(), "the recorder's connections finish")
        self.check()

    def check(self):
        """Fail if a connection has failed."""
        if self._errors:
            raise CheckFailed(f"a connection failed: {self._errors[0]}")

    def _guarded(self, disk, model, number):
        try:
            self._write(disk, model, random.Random(f"{self.seed}/{disk}/{number}"), number)
        except Exception as error:  # noqa: BLE001 - handed to check()
            self._errors.append(f"{disk} {number}: {error!r}")

    def _write(self, disk, model, dice, number):
        connection = self._connect(disk)
        versions = {}
        while not self._stop.is_set():
            if dice.random() < 0.06:
                sent = self.tick()
                connection = self._call(connection, disk, lambda c: c.request(FLUSH))
                self.flushes += 1
                self.promise(sent, None)
                continue
            # Few blocks, so that they have many versions; the other connections have others.
            block = dice.randrange(number, model.blocks, self.connections)
            version = versions[block] = versions.get(block, 0) + 1
            event = [disk, block, version, self.tick(), None]
            with self._lock:
                own = len(self.events)
                self.events.append(event)
            fua = dice.random() < 0.05
            connection = self._call(connection, disk, lambda c: send_version(c, model, block, version, fua))
            event[4] = self.tick()
            if fua:
                self.promise(0, own)
        connection.close()

    def _connect(self, disk):
        deadline = time.monotonic() + 120
        while True:
            try:
                return Connection(self.path, patience_seconds=120).open_export(f"{self.group}/{disk}")
            except (OSError, ConnectionError, ExportRefused):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _call(self, connection, disk, send):
        """Send until answered; returns the connection that it was answered on."""
        while True:
            try:
                send(connection)
                error, _ = connection.reply()
                expect(error == 0, f"answered with errno {error}")
                return connection
            except (OSError, ConnectionError):
                connection.close()
                connection = self._connect(disk)

    def to_json(self):
        """Everything that a `Judge` needs."""
        return json.dumps({"seed": self.seed, "disks": self.disks, "events": self.events}).encode()


def send_version(connection, model, block, version, fua):
    """Send the request that makes a block's version."""
    command, offset, content = model.request_of(block, version)
    connection.request(command, offset, len(content) or BLOCK, content, FLAG_FUA if fua else 0)


class Judge:
    """Judges disks by a recorder's notes."""

    def __init__(self, text):
        notes = json.loads(text)
        self.disks, self.events = notes["disks"], notes["events"]
        self.models = {
            disk: MixedClient(None, disk, blocks=blocks, seed=f"{notes['seed']}/{disk}")
            for disk, blocks in self.disks.items()
        }
        self.versions = {disk: [[] for _ in range(blocks)] for disk, blocks in self.disks.items()}
        for number, (disk, block, version, sent, answered) in enumerate(self.events):
            self.versions[disk][block].append((sent, float("inf") if answered is None else answered, number))
            expect(len(self.versions[disk][block]) == version, "versions of a block are in order")
        self._contents = {
            disk: [[self._digest(model.content(block, version)) for version in range(len(versions) + 1)]
                   for block, versions in enumerate(self.versions[disk])]
            for disk, model in self.models.items()
        }
        self.blocks_compared = self.writes_lost = self.writes_checked = 0

    @staticmethod
    def _digest(content):
        return hashlib.blake2b(content, digest_size=12).digest()

    def check(self, what, contents, floor, owned):
        """Fail unless the disks' contents are allowed; `floor` and `owned` are what was promised.

        `owned` is a set of numbers of events.
        """
        newest_sent, oldest_lost = (0, None), (float("inf"), None)
        for disk, content in contents.items():
            for block, versions in enumerate(self.versions[disk]):
                known = self._contents[disk][block]
                seen = self._digest(content[block * BLOCK:][:BLOCK])
                found = [version for version, digest in enumerate(known) if digest == seen]
                place = f"{what}: {disk}: block {block}"
                expect(found, f"{place} holds none of its {len(known)} versions")
                self.blocks_compared += 1
                promised = max([version + 1 for version, (_, answered, number) in enumerate(versions)
                                if answered < floor or number in owned], default=0)
                expect(found[-1] >= promised, f"{place} holds version {found[-1]}, version {promised} was flushed")
                self.writes_checked += promised
                self.writes_lost += len(versions) - found[-1]
                if found[0] > 0:
                    newest_sent = max(newest_sent, (versions[found[0] - 1][0], (disk, block, found[0])))
                if found[-1] < len(versions):
                    oldest_lost = min(oldest_lost, (versions[found[-1]][1], (disk, block, found[-1] + 1)))
        expect(newest_sent[0] < oldest_lost[0],
               f"{what}: {newest_sent[1]} is there, but {oldest_lost[1]} is not, which was answered before it was sent")

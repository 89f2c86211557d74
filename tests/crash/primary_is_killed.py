"""kill -9 of the primary at random moments and at named points: every answered write is there.

Two disks of one group are written with every kind of request while `serve` ships into
its embedded repository. Rounds alternate between clients that reconnect and send again
and clients that never come back. At the end all checkpoints taken on the way restore
exactly, and none has vanished from the list.
"""
# limit: 5400

import os
import random
import signal
import time
from collections import Counter

from harness.nbd_client import BLOCK, Connection
from harness.process import expect, expect_equal, say, scratch, wait_until
from harness.resending_client import Flusher, MixedClient
from harness.server import Afterimage

FULL = bool(os.environ.get("AFTERIMAGE_TESTS_FULL"))
ROUNDS = 500 if FULL else 30
SEED = int(os.environ.get("AFTERIMAGE_TESTS_SEED", "1"))
DISKS = {"vda": 1536, "vdb": 512}  # blocks
SNAPSHOTS_KEPT = 40
# Until this round the initial copy may be under way; before its end there are no points.
LAST_OF_THE_PASS = 9
TRACED = ["io_uring_enter", "fdatasync", "fsync", "pwrite64", "ftruncate", "mmap", "fcntl", "openat", "futex"]

dice = random.Random(f"primary/{SEED}")
counts, kills = Counter(), Counter()


class Site:
    """The server, its clients, and what must be true."""

    def __init__(self, folder):
        self.server = Afterimage(
            folder, groups={"vm1": {name: blocks * BLOCK for name, blocks in DISKS.items()}},
            log="16MiB", ring="4MiB", create_backings=False, group_lines='pass_rate = "1MiB"',
        )
        self.clients = [
            MixedClient(self.server.socket, f"vm1/{name}", blocks=blocks, connections=2, depth=12, seed=f"{SEED}/{name}")
            for name, blocks in DISKS.items()
        ]
        for client, name in zip(self.clients, DISKS):
            client.fill(self.server.backing(name))
        self.snapshots, self.shipped, self.busy = {}, [], {}

    def start_clients(self):
        """Let all clients write."""
        self.flusher = Flusher(self.server.socket, "vm1/vda").start()
        for client in self.clients:
            client.start()

    def writes(self):
        """Writes answered so far."""
        return sum(client.answered_writes for client in self.clients)

    def wait_for_writes(self, count):
        """Wait until so many more writes have been answered."""
        wanted = self.writes() + count

        def enough():
            for client in self.clients:
                client.check()
            return self.writes() >= wanted

        wait_until(enough, f"{count} more writes")

    def compare(self, settle):
        """Compare both disks with what was answered."""
        for client in self.clients:
            with Connection(self.server.socket).open_export(client.export) as reader:
                if settle:
                    counts["unanswered requests found carried out"] += client.settle(reader.read)
                else:
                    client.verify(reader.read)

    def snapshot(self, number):
        """A checkpoint while nobody writes, and what it must hold."""
        label = f"quiet-{number}"
        self.server.checkpoint(label)
        # From here on the replica has it: no gap takes it away again.
        self.server.wait_shipped()
        self.shipped.append(label)
        self.snapshots[label] = [list(client.answered) for client in self.clients]
        if len(self.snapshots) > SNAPSHOTS_KEPT:
            del self.snapshots[dice.choice(list(self.snapshots))]


# Ways to kill. Each leaves a dead process behind; what it is called is what the report counts.

def at_random(site):
    """Anywhere."""
    time.sleep(dice.uniform(0, 0.5))
    site.server.kill()


def ring_half_full(site):
    """More than half of the ring is in use: destaging is under way."""
    def full():
        group = site.server.api_status()["groups"][0]
        return group["ring_used_bytes"] > group["ring_bytes"] // 2
    wait_until(full, "a ring half full")
    site.server.kill()


def in_a_pass(site):
    """While blocks of the initial copy are read and sent; later, when it is done, anywhere."""
    target = site.server.api_status()["groups"][0]["targets"][0]
    counts["kills within the initial copy"] += target.get("pass") is not None
    site.server.kill()


def after_a_checkpoint(site):
    """At once when a checkpoint has been answered: it must be listed ever after."""
    # One that falls into the initial copy is no point; it is taken all the same.
    in_pass = site.server.api_status()["groups"][0]["targets"][0].get("pass") is not None
    label = f"busy-{len(site.busy)}-{dice.randrange(1 << 30)}"
    lsn = site.server.checkpoint(label)
    site.server.kill()
    if not in_pass and site.snapshots:
        site.busy[label] = lsn


def draining(site):
    """After SIGTERM, while logs are written back to their disks."""
    site.server.child.process.send_signal(signal.SIGTERM)
    time.sleep(dice.uniform(0, 0.4))
    site.server.kill()


def recovering(site):
    """Several times while it recovers."""
    site.server.kill()
    for _ in range(dice.randrange(1, 5)):
        site.server.spawn()
        time.sleep(dice.uniform(0.01, 0.35))
        counts["kills before ready"] += not site.server.said_ready()
        site.server.kill()


def recovering_at_a_call(site):
    """At the nth system call of some kind of its start; the call itself may still be done or not."""
    site.server.kill()
    for _ in range(3):
        call, number = dice.choice(TRACED), dice.choice([1, 1, 2, 3, 4, 6, 9, 14])
        site.server.spawn(under=["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}",
                                 "-e", f"inject={call}:signal=KILL:when={number}"])
        child = site.server.child
        deadline = time.monotonic() + 20
        while child.running() and not site.server.said_ready() and time.monotonic() < deadline:
            time.sleep(0.02)
        counts["kills at a system call"] += not child.running()
        site.server.kill()


WAYS = [in_a_pass, at_random, recovering, ring_half_full, after_a_checkpoint, draining,
        recovering_at_a_call]


def killed_while_its_log_is_made(site):
    """A start that was cut off within the creation of the log leaves nothing that hinders the next."""
    for _ in range(20 if FULL else 4):
        site.server.spawn()
        time.sleep(dice.uniform(0.02, 0.3))
        site.server.kill()
        kills["while the log is made"] += 1


def rounds(site):
    """All rounds."""
    site.start_clients()
    for number in range(ROUNDS):
        site.wait_for_writes(dice.randrange(20, 250))
        way = WAYS[number % len(WAYS)]
        gone = dice.random() < 0.5
        if gone:
            for client in site.clients:
                client.stay_away()
        way(site)
        kills[way.__name__.replace("_", " ")] += 1
        if gone:
            for client in site.clients:
                client.finish()
        # At once: writes of the dead process may still be on their way to the disk.
        dead_at = time.monotonic()
        site.server.start()
        if not gone:
            for client in site.clients:
                wait_until(lambda: client.check() or client.attached_since(dead_at), "the connections to be back")
                client.finish()
        site.flusher.finish()
        counts["flushes answered"] += site.flusher.answered
        site.compare(settle=gone)
        counts["rounds with clients gone" if gone else "rounds with requests sent again"] += 1
        if number >= LAST_OF_THE_PASS and number % 3 == 0:
            site.server.wait_shipped()
            site.snapshot(number)
        say(f"round {number}: {way.__name__}, {'gone' if gone else 'sent again'}, {site.writes()} writes")
        site.start_clients()
    for client in site.clients:
        client.finish()
    site.flusher.finish()
    site.compare(settle=False)


def check_history(site, folder):
    """What was shipped is listed, the rest unless a gap took it; quiet points restore exactly, and the present."""
    site.server.checkpoint("end")
    site.server.wait_shipped()
    site.snapshots["end"] = [list(client.answered) for client in site.clients]
    history = site.server.points()
    say(f"gaps: {history['gaps']}")
    listed = {point.get("label") for point in history["points"]}
    expect_equal([label for label in site.shipped if label not in listed], [], "shipped checkpoints missing")
    # A log that ran full before it was shipped takes its points with it, and says so.
    causes = {gap["cause"] for gap in history["gaps"]}
    expect(causes <= {"records-missing"}, f"causes of gaps: {causes}")
    missing = {label: lsn for label, lsn in site.busy.items() if label not in listed}
    expect(not missing or history["gaps"], f"checkpoints missing from the list, which has no gap: {missing}")
    restorable = lambda lsn: any(span["first_lsn"] <= lsn <= span["last_lsn"] for span in history["spans"])
    expect_equal([label for label, lsn in missing.items() if restorable(lsn)], [], "checkpoints missing from the list")
    counts["checkpoints lost in a gap of the history"] = len(missing)
    for number, (label, versions) in enumerate(site.snapshots.items()):
        target = site.server.restore(label, folder / f"restored-{number}")
        for client, answered in zip(site.clients, versions):
            with open(target / f"{client.export.split('/')[1]}.raw", "rb") as file:
                for block, version in enumerate(answered):
                    seen = file.read(BLOCK)
                    expect(seen == client.content(block, version), f"{label}: {client.export}: block {block}")
                    counts["blocks of restored points compared"] += 1
    counts["points restored"] = len(site.snapshots)
    site.server.cli("verify", "vm1")


with scratch() as folder:
    site = Site(folder)
    killed_while_its_log_is_made(site)
    with site.server:
        rounds(site)
        check_history(site, folder)
    counts["writes answered"] = site.writes()
    counts["blocks compared"] = sum(client.compared for client in site.clients)
    for what, count in [*sorted(kills.items()), *sorted(counts.items())]:
        say(f"{what}: {count}")
    say(f"{sum(kills.values())} kills in {ROUNDS} rounds, seed {SEED}")
    for kind in ("kills before ready", "kills at a system call", "kills within the initial copy",
                 "unanswered requests found carried out", "points restored"):
        expect(counts[kind] > 0, f"the run had none of: {kind}")

"""kill -9 of a replica behind TLS at random moments and at chosen system calls, during intake and passes.

After each restart it has every LSN that it ever acknowledged, every point that was ever
listed is listed, and what they restore equals the disk of that moment. The primary is
killed now and then as well, and its log overflows once, so that a pass bridges a gap.
The guest never sees an error.
"""
# limit: 5400

import os
import random
import shutil
import time
from collections import Counter

from harness.nbd_client import BLOCK, Connection
from harness.process import expect, expect_equal, say, scratch, wait_until
from harness.resending_client import MixedClient
from harness.sites import Certificates, primary, replica

FULL = bool(os.environ.get("AFTERIMAGE_TESTS_FULL"))
ROUNDS = 500 if FULL else 30
SEED = int(os.environ.get("AFTERIMAGE_TESTS_SEED", "1"))
BLOCKS = 1024
OPENED_PER_ROUND = 2

# Every site begins anew: restarts and restores take longer with each round of history.
ROUNDS_A_SITE = 10

# Steps of a commit: an object's bytes and its folder are synced, the object gets its name.
STEPS = {"at a sync": "fsync,fdatasync", "at a commit": "link,linkat,rename,renameat,renameat2"}

counts = Counter()


def target(site):
    """The primary's view of the replica."""
    return site.api_status()["groups"][0]["targets"][0]


class Points:
    """What is known of one group's points, and what they are held against."""

    def __init__(self, dr, folder, client, dice):
        self.dr, self.folder, self.client, self.dice = dr, folder, client, dice
        self.listed, self.quiet = {}, {}  # label -> LSN; label -> versions

    def check(self, acked, opened=OPENED_PER_ROUND):
        """Nothing acknowledged is missing, nothing listed has vanished, some points equal the model."""
        points = self.dr.points()
        if acked:
            newest = self.dr.api_status()["received"][0]["last_lsn"]
            expect(newest >= acked, f"LSN {acked} was acknowledged, the newest is {newest}: {points['spans']}")
        seen = {point["label"]: point["lsn"] for point in points["points"] if point.get("label")}
        expect_equal({label: seen.get(label) for label in self.listed}, self.listed, "points that were listed before")
        self.listed.update(seen)
        ready = [label for label in self.quiet if label in seen]
        for label in self.dice.sample(ready, min(opened, len(ready))):
            counts["points opened and compared"] += 1
            restored = self.dr.restore(label, self.folder / "restored")
            with open(restored / "vda.raw", "rb") as file:
                for block, version in enumerate(self.quiet[label]):
                    expect(file.read(BLOCK) == self.client.content(block, version), f"{label}: block {block}")
            shutil.rmtree(restored)


def overflow(site, client):
    """Write until records must leave the log unshipped."""
    client.start()
    wait_until(lambda: client.check() or target(site)["gap"], "the log to overflow", 300)
    client.finish()
    counts["gaps"] += 1


def killed_at_a_step(dr, dice):
    """Let it take segments in until one of its threads makes the nth call of a kind, which kills it."""
    step, number = dice.choice(sorted(STEPS)), dice.choice([1, 2, 3, 4, 6, 9])
    dr.kill()
    dr.spawn(under=["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={STEPS[step]}",
                    "-e", f"inject={STEPS[step]}:signal=KILL:when={number}"])
    deadline = time.monotonic() + 6
    while dr.child.running() and time.monotonic() < deadline:
        time.sleep(0.02)
    counts[f"kills of the replica {step}"] += not dr.child.running()
    dr.kill()


def rounds_of_a_site(folder, name, rounds):
    """A primary and a replica from their first moment on, through so many rounds of kills."""
    dice = random.Random(f"replica/{name}")
    certificates = Certificates(folder / "ca")
    dr = replica(folder, certificates)
    site = primary(folder, certificates, dr.repository_port, groups={"vm1": {"vda": BLOCKS * BLOCK}},
                   log="16MiB", ring="4MiB", ship_interval="20ms", group_lines='pass_rate = "4MiB"',
                   create_backings=False)
    client = MixedClient(site.socket, "vm1/vda", blocks=BLOCKS, connections=2, depth=8, seed=f"{name}/dr")
    client.fill(site.backing())
    points = Points(dr, folder, client, dice)
    with dr, site:
        for number in range(rounds):
            # Kill the replica a few times while the client writes and segments and pass blocks travel.
            client.start()
            for _ in range(dice.randrange(1, 4)):
                time.sleep(dice.uniform(0, 0.4))
                state = target(site)
                acked = state["acked_lsn"]
                counts["kills within a pass"] += state.get("pass") is not None
                dr.kill()
                counts["kills of the replica"] += 1
                if dice.random() < 0.2:
                    dr.spawn()
                    time.sleep(dice.uniform(0.01, 0.2))
                    dr.kill()
                    counts["kills of the replica while it starts"] += 1
                dr.start()
                points.check(acked)
            if number % 2:
                killed_at_a_step(dr, dice)
                acked = target(site)["acked_lsn"]
                dr.start()
                points.check(acked)
            if dice.random() < 0.15:
                site.kill()
                site.start()
                counts["kills of the primary"] += 1
            client.finish()
            if number % 10 == 6:
                dr.kill()
                counts["kills of the replica"] += 1
                overflow(site, client)
                dr.start()
            # Now and then the replica catches up and is killed in the middle of streaming; in between
            # it is not left the time.
            if number % 3 == 1:
                site.wait_shipped()
            site.checkpoint(f"quiet-{number}")
            points.quiet[f"quiet-{number}"] = list(client.answered)
            say(f"site {name}, round {number}: {client.answered_writes} writes, {len(points.listed)} points, "
                f"{target(site)['state']}")
        site.wait_shipped()
        lsn = site.checkpoint("end")
        points.quiet["end"] = list(client.answered)
        site.wait_shipped()
        points.check(lsn, opened=50)
        expect("end" in points.listed, "the last checkpoint is listed")
        dr.cli("verify", "vm1")
        with Connection(site.socket).open_export("vm1/vda") as reader:
            client.verify(reader.read)
    counts.update({"writes answered": client.answered_writes, "points listed": len(points.listed)})


for number, first in enumerate(range(0, ROUNDS, ROUNDS_A_SITE)):
    with scratch() as folder:
        rounds_of_a_site(folder, f"{SEED}/{number}", min(ROUNDS_A_SITE, ROUNDS - first))
for what, count in sorted(counts.items()):
    say(f"{what}: {count}")
say(f"seed {SEED}, {ROUNDS} rounds")
for kind in (*(f"kills of the replica {step}" for step in STEPS), "kills within a pass", "kills of the primary", "gaps", "points opened and compared"):
    expect(counts[kind] > 0, f"the run had none of: {kind}")

"""Application-consistent checkpoints of a guest under load: their images need no journal replay.

A Debian guest with its root disk here writes records, each synced and then counted in a
file of its own, beside a load of random writes. Every point is restored from the replica: the
file system says that it needs no recovery, e2fsck finds nothing, and every record that was
committed before the freeze is there. A plain checkpoint in between comes up through its journal.
At last the daemon is killed in the middle of a checkpoint: the guest is thawed and goes on.
"""
# limit: 1200

import os
import re
import threading
import time

from harness.process import expect, expect_equal, run, say, scratch, wait_until
from harness.server import Afterimage, binary
from vm.guest import Guest, copy_root, nbd_root

ROUNDS = 20 if os.environ.get("AFTERIMAGE_TESTS_FULL") else 5
LOAD = """
mkdir -p /srv/load
( number=0
  while [ ! -e /srv/stop ]; do
      number=$((number + 1))
      head -c 3000 /dev/urandom > /srv/load/record-$((number % 50))
      echo "record $number" >> /srv/records
      sync /srv/records
      echo "committed $number" > /dev/ttyS0
  done ) >/dev/null 2>&1 &
fio --name=load --directory=/srv/load --size=32m --rw=randwrite --bs=4k --fsync=64 --rate_iops=100 \
    --time_based --runtime=3600 --ioengine=psync >/dev/null 2>&1 &
"""


def committed(guest):
    """The last record that the guest has said to be committed."""
    seen = re.findall(r"committed (\d+)", guest.console())
    return int(seen[-1]) if seen else 0


def restored(server, folder, label):
    """(needs recovery, number of records, what e2fsck -n says) of a point."""
    target = folder / f"restored-{label}"
    server.restore(f"vm1@{label}", target)
    image = target / "vda.raw"
    features = run("dumpe2fs", "-h", image).stdout
    needs = "needs_recovery" in features
    records = run("debugfs", "-R", "cat /srv/records", image, ok=None).stdout.split("\n")
    numbers = [int(line.split()[1]) for line in records if re.fullmatch(r"record \d+", line)]
    checked = run("e2fsck", "-fn", image, ok=None)
    image.unlink()
    return needs, numbers, checked


with scratch() as folder:
    agent = folder / "primary.qga"
    lines = f'guest = [{{ qga = "{agent}" }}]'
    server = Afterimage(
        folder, groups={"vm1": {"vda": "1600MiB"}}, log="512MiB", ring="64MiB", group_lines=lines
    )
    copy_root(server.backing())
    with server:
        with Guest(folder, "primary", nbd_root(server.socket, "vm1/vda")) as guest:
            guest.wait_until_up()
            guest.run(LOAD)
            wait_until(lambda: committed(guest) > 3, "records", 300)
            # QEMU serves one client of the agent's socket at a time: it is the server's now.
            guest.release_agent()
            server.wait_shipped(patience_seconds=900)
            checked = server.cli("guest", "check", "vm1", patience_seconds=60)
            say(checked.stdout.strip())
            windows, owns, before = [], [], {}
            for number in range(ROUNDS):
                reached = committed(guest)
                wait_until(lambda: committed(guest) > reached + 2, "more records", 300)
                before[f"frozen-{number}"] = committed(guest)
                done = server.cli_json("checkpoint", "vm1", "--app", "--label", f"frozen-{number}")
                expect_equal(done["kind"], "application", f"kind: {done}")
                windows.append(done["freeze"]["window_ns"] / 1e6)
                owns.append(done["freeze"]["own_ns"] / 1e6)
                if number == 1:
                    server.checkpoint("plain")
            say(f"windows {[f'{ms:.0f}' for ms in windows]} ms, ours {[f'{ms:.2f}' for ms in owns]} ms")
            server.wait_shipped(patience_seconds=600)
            kinds = {point["label"]: point["kind"] for point in server.points()["points"]}
            expect_equal(
                kinds, {**dict.fromkeys(before, "application"), "plain": "crash"}, "kinds at the replica"
            )
            for label, last in before.items():
                needs, numbers, checked = restored(server, folder, label)
                expect(not needs, f"{label}: the file system needs no journal replay")
                expect(checked.returncode == 0, f"{label}: e2fsck finds nothing:\n{checked.stdout}")
                expect_equal(numbers[: last], list(range(1, last + 1)), f"{label}: committed records")
                say(f"{label}: clean, {len(numbers)} records, {last} were committed before")
            needs, _, _ = restored(server, folder, "plain")
            expect(needs, "a crash-consistent point of a mounted ext4 needs its journal")

            # Killed in the middle of a checkpoint: the guest is thawed and goes on.
            def take():
                run(binary(), "--config", server.config, "checkpoint", "vm1", "--app", "--label", "killed", ok=None)

            intents = lambda: list((server.folder / "guest").glob("*.intent"))
            taker = threading.Thread(target=take, daemon=True)
            taker.start()
            wait_until(intents, "an intent", 60)
            began = time.monotonic()
            server.kill()
            server.start()
            wait_until(lambda: not intents(), "the guest to be thawed", 60)
            say(f"thawed {time.monotonic() - began:.1f} s after the kill")
            taker.join(60)
            reached = committed(guest)
            wait_until(lambda: committed(guest) > reached + 2, "the guest to go on", 120)
            after = server.cli_json("checkpoint", "vm1", "--app", "--label", "after")
            expect_equal(after["kind"], "application", f"kind of the next one: {after}")
            guest.kill()

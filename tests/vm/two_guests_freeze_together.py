"""Two guests in one group: frozen together or not at all, thawed whatever fails, one LSN for all disks.

The first has a second disk that its agent is told to leave alone (`mounts = ["/"]`): what runs there
goes on while its root is frozen. Then one agent's connection breaks after its guest was frozen, and one
guest's agent is away: nobody stays frozen, and the points say why they are crash-consistent. The point
of both is restored, and each root needs no replay of its journal.
"""
# long tier
# limit: 1200

import json
import re
import time

from harness.agent import Relay
from harness.process import expect, expect_equal, run, say, scratch, wait_until
from harness.server import Afterimage
from vm.guest import Guest, copy_root, nbd_root

HELD_SECONDS = 4.0
# Writes to a file of each file system all the time. $1 is where, $2 its name on the console.
TICKS = """
while :; do
    read up _ < /proc/uptime
    echo "$up" >> $1/ticks
    echo "$2 $up" > /dev/ttyS0
    sleep 0.1
done
"""


def ticks(guest, name, since):
    """Times of the ticks that were told after the console was `since` long, in the guest's seconds."""
    told = re.findall(rf"^{name} ([0-9.]+)\r?$", guest.console()[since:], re.MULTILINE)
    return [float(tick) for tick in told]


def longest_pause(guest, name, since):
    """Between which two ticks the most time went by."""
    told = ticks(guest, name, since)
    return max(zip(told, told[1:]), key=lambda pair: pair[1] - pair[0])


def ticks_on(guest, name):
    """Wait until there are ticks that are newer than this call."""
    since = len(guest.console())
    wait_until(lambda: len(re.findall(rf"^{name} ", guest.console()[since:], re.MULTILINE)) > 3, f"ticks {name}")


def whole_without_replay(path):
    """A root file system that was frozen: nothing in its journal, nothing to repair."""
    header = run("dumpe2fs", "-h", path).stdout
    expect("needs_recovery" not in header, f"{path.name}: the journal has nothing to replay")
    checked = run("e2fsck", "-fn", path, ok=None)
    expect(checked.returncode == 0, f"{path.name}: the file system is clean:\n{checked.stdout}")


with scratch() as folder:
    relays = [folder / "one.relay", folder / "two.relay"]
    server = Afterimage(
        folder, groups={"vm1": {"one": "1600MiB", "data": "64MiB", "two": "1600MiB"}}, log="512MiB", ring="64MiB",
        group_lines=f'guest = [{{ qga = "{relays[0]}", mounts = ["/"] }}, {{ qga = "{relays[1]}" }}]',
    )
    copy_root(server.backing("one"))
    copy_root(server.backing("two"))
    run("mkfs.ext4", "-q", "-F", server.backing("data"))
    data = nbd_root(server.socket, "vm1/data")
    data[1] = data[1].replace("node-name=root", "node-name=data")
    data += ["-device", "virtio-blk-pci,drive=data,serial=data"]
    with (
        server,
        Guest(folder, "one", nbd_root(server.socket, "vm1/one"), more=data, memory_mib=512,
              root_device="/dev/vda") as one,
        Guest(folder, "two", nbd_root(server.socket, "vm1/two"), memory_mib=512) as two,
    ):
        for guest, places in ((one, {"root": "/srv", "data": "/mnt"}), (two, {"root": "/srv"})):
            guest.wait_until_up()
            if "data" in places:
                guest.run("mount /dev/disk/by-id/virtio-data /mnt")
            for name, place in places.items():
                guest.run(f"set -- {place} {name}; ( {TICKS} ) >/dev/null 2>&1 &")
                ticks_on(guest, name)
            guest.release_agent()
        first, second = Relay(relays[0], one.agent_path), Relay(relays[1], two.agent_path)
        # An agent of a busy guest may not answer within the command's patience.
        ready = lambda: (seen := server.cli("guest", "check", "vm1", ok=None)).returncode == 0 and seen.stdout
        said = wait_until(ready, "both agents to be ready", 300)
        say(said.strip())
        expect("would freeze: /\n" in said and "/mnt" not in said, f"what would be frozen:\n{said}")
        server.wait_shipped(patience_seconds=900)

        # Both, and only the root of the first.
        hold = lambda command, when: time.sleep(HELD_SECONDS) if (command, when) == ("fsfreeze-thaw", "before") else None
        first.hook = hold
        since = {guest: len(guest.console()) for guest in (one, two)}
        taken = server.cli_json("checkpoint", "vm1", "--app", "--label", "both")
        expect_equal(taken["kind"], "application", f"kind: {taken}")
        first.hook = lambda command, when: None
        for guest, name in ((one, "root"), (one, "data"), (two, "root")):
            ticks_on(guest, name)
        began, ended = longest_pause(one, "root", since[one])
        meanwhile = sum(began < tick < ended for tick in ticks(one, "data", since[one]))
        say(f"frozen: {taken['freeze']['frozen']}; the first root for {ended - began:.1f} s; "
            f"ticks on its other mount meanwhile: {meanwhile}")
        expect(ended - began >= HELD_SECONDS, "the first root was frozen")
        # One may be under way when it begins, and one be told late.
        expect(meanwhile > 2, "the other mount of the first was not")

        # The second breaks when both are frozen; then it is away from the start.
        def breaks(command, when):
            if (command, when) == ("fsfreeze-freeze", "after"):
                raise OSError("cut")

        second.hook = breaks
        broken = json.loads(server.cli("--json", "checkpoint", "vm1", "--app", "--label", "broken", ok=False).stdout)
        expect_equal(broken["kind"], "crash", f"kind: {broken}")
        second.hook = lambda command, when: None
        wait_until(lambda: first.frozen_since is None and second.frozen_since is None, "both to be thawed", 60)
        second.close()
        relays[1].unlink()
        away = json.loads(server.cli("--json", "checkpoint", "vm1", "--app", "--label", "away", ok=False).stdout)
        expect_equal(away["kind"], "crash", f"kind: {away}")
        for guest, name in ((one, "root"), (one, "data"), (two, "root")):
            ticks_on(guest, name)
        second = Relay(relays[1], two.agent_path)
        again = server.cli_json("checkpoint", "vm1", "--app", "--label", "again")
        expect_equal(again["kind"], "application", f"kind: {again}")
        say(server.cli("points", "vm1").stdout)
        server.wait_shipped(patience_seconds=600)
        points = {point["label"]: point for point in server.points()["points"]}
        for label in ("broken", "away"):
            expect(points[label]["freeze"]["reason"], f"{label} says why it is crash-consistent")
            say(f"{label}: {points[label]['freeze']['reason']}")
        for label in ("both", "again"):
            server.restore(label, folder / label)
            for disk in ("one", "two"):
                whole_without_replay(folder / label / f"{disk}.raw")
        first.close()
        second.close()

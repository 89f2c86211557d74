"""A Debian guest with PostgreSQL under load: its application-consistent points open without surprises.

Inside: pgbench, a ledger of which each number is told on the console once it is committed, files that
are synced and then told, fio. Points are taken under that load, frozen ones through QEMU's agent and one
without. Then the daemon is killed at every step of the sequence, once with the watchdog alone and once
with a new daemon at once: the guest is thawed in time. At the end the points are exported from the
replica to one guest that boots from the first of them and has the others as further disks: the frozen
ones need no replay of the journal, e2fsck finds nothing, all that was told before the freeze is there,
PostgreSQL starts, pg_amcheck and the checksums are clean. The crash-consistent one comes up through its
journal and holds as much.
"""
# limit: 2000

import os
import re
import time
from urllib.request import urlopen

from harness.agent import Relay
from harness.process import expect, expect_equal, say, scratch, wait_until
from harness.server import Afterimage
from vm.guest import Guest, copy_root, nbd_root, point_overlay

FULL = bool(os.environ.get("AFTERIMAGE_TESTS_FULL"))
ROUNDS = 20 if FULL else 5
POINTS_A_GUEST = 6
# The system's own tables are a third of the time under TCG.
CHECKED = "''" if FULL else "'-t pgbench_* -t ledger'"
FREEZE_LIMIT_SECONDS = 8.0
STEPS = [
    ("sync-delimited", "before"), ("fsfreeze-status", "after"), ("get-fsinfo", "after"),
    ("fsfreeze-freeze", "before"), ("fsfreeze-freeze", "after"),
    ("fsfreeze-thaw", "before"), ("fsfreeze-thaw", "after"),
]
LOAD = r"""
export PATH=/usr/lib/postgresql/15/bin:$PATH
su postgres -c 'pg_ctl -D /srv/pg -w -l /srv/pg/log start' >/dev/null
mkdir -p /srv/load /srv/files
( su postgres -c 'pgbench -h /tmp -n -c 4 -T 3600 --rate=20 bench' & ) >/dev/null 2>&1
( su postgres -c '
n=0
while :; do
    n=$((n + 1))
    echo "insert into ledger values ($n) returning '"'row '"' || id;"
    sleep 0.1
done | psql -h /tmp -qAtX bench' & ) >/dev/ttyS0 2>/dev/null
( n=0
while :; do
    n=$((n + 1))
    head -c 30000 /dev/urandom > /srv/files/$n
    sha256sum /srv/files/$n > /tmp/sum
    sync /srv/files/$n /srv/files
    cat /tmp/sum >> /srv/sums
    sync /srv/sums
    echo "file $n" >/dev/ttyS0
    sleep 0.2
done & ) >/dev/null 2>&1
( fio --name=load --directory=/srv/load --size=24m --rw=randwrite --bs=4k --fsync=64 --rate_iops=50 \
    --time_based --runtime=3600 --ioengine=psync & ) >/dev/null 2>&1
"""
# $1 is a device to be mounted, or / for the guest's own; $2 is for pg_amcheck. Prints what a point is
# judged by.
JUDGE = r"""
export PATH=/usr/lib/postgresql/15/bin:$PATH
if [ "$1" = / ]; then
    at=; device=vda
    echo "checked $(systemctl show -p ExecMainStatus --value systemd-fsck-root.service)"
else
    at=/mnt; device=$(basename "$(readlink -f "$1")")
    dumpe2fs -h "$1" 2>/dev/null | grep -q needs_recovery && echo "dirty"
    e2fsck -fn "$1" >/tmp/fsck 2>&1 && echo "checked 0" || { echo "checked $?"; head -40 /tmp/fsck >&2; }
    mount "$1" /mnt
fi
dmesg | grep -q "($device): recovery complete" && echo replayed
sed "s|  /|  $at/|" $at/srv/sums > /tmp/sums
echo "files $(wc -l < /tmp/sums)"
sha256sum --quiet -c /tmp/sums && echo "files whole"
rm -f $at/srv/pg/log
export AT=$at CHECKED="$2"
su postgres <<'END'
pg_ctl -D $AT/srv/pg -w -l $AT/srv/pg/log start >/dev/null
psql -h /tmp -qAtX bench <<SQL
select 'rows ' || count(*) || ' ' || max(id) from ledger;
select 'sums ' || (a = b and b = t and t = h)::text from (select (select sum(abalance) from pgbench_accounts) a,
    (select sum(bbalance) from pgbench_branches) b, (select sum(tbalance) from pgbench_tellers) t,
    (select coalesce(sum(delta), 0) from pgbench_history) h) every;
SQL
set -f
pg_amcheck -h /tmp --heapallindexed $CHECKED bench && echo "amcheck clean"
pg_ctl -D $AT/srv/pg -w -m fast stop >/dev/null
pg_checksums --check -D $AT/srv/pg | grep "Bad checksums"
END
[ -z "$at" ] || umount /mnt
"""


def told(guest):
    """The last row and the last file that the guest has told to be committed."""
    console = guest.console()
    last = lambda what: int((re.findall(rf"{what} (\d+)\r?\n", console) or [0])[-1])
    return last("row"), last("file")


def goes_on(guest, patience_seconds=300):
    """Wait until more rows and files are told than now; returns what is told then."""
    row, file = told(guest)
    more = lambda: (now := told(guest))[0] > row + 1 and now[1] > file and now
    return wait_until(more, "rows and files of the guest", patience_seconds)


def killed_at_every_step(server, guest, relay):
    """The guest is thawed whenever the daemon is killed. Returns the labels that were used."""
    intents = lambda: list((server.folder / "guest").glob("*.intent"))
    labels = []
    for restart in (False, True):
        for step in STEPS:
            fired = []

            def hook(command, when, step=step, fired=fired):
                if (command, when) == step and not fired:
                    fired.append(time.monotonic())
                    server.kill()

            relay.hook, relay.frozen_max, relay.thaw_asked = hook, 0.0, None
            labels.append(f"killed-{step[0]}-{step[1]}-{restart}")
            server.cli("checkpoint", "vm1", "--app", "--label", labels[-1], ok=False)
            expect(fired, f"{step} came")
            relay.hook = lambda command, when: None
            if not restart:
                # ext4 writes its superblock while it thaws, so the answer may need the disk.
                wait_until(lambda: not intents() or relay.thaw_asked, f"the watchdog after a kill at {step}", 60)
                asked = (relay.thaw_asked or fired[0]) - fired[0]
                expect(asked < FREEZE_LIMIT_SECONDS, f"asked to thaw {asked:.1f} s after a kill at {step}")
            server.start()
            wait_until(lambda: not intents(), f"the guest to be thawed after a kill at {step}", 60)
            expect(relay.frozen_since is None, f"thawed after a kill at {step}")
            expect(relay.frozen_max < FREEZE_LIMIT_SECONDS, f"frozen for {relay.frozen_max:.1f} s after a kill at {step}")
            say(f"killed {step[1]} {step[0]}, {'restarted' if restart else 'watchdog alone'}: "
                f"frozen for {relay.frozen_max:.2f} s, over {time.monotonic() - fired[0]:.2f} s after the kill")
    relay.frozen_max = 0.0
    goes_on(guest)
    return labels


def judge(guest, label, device, last, frozen):
    """Hold what the guest finds on a point's disk against what was told before it was taken."""
    seen = guest.run(f"set -- {device} {CHECKED}\n{JUDGE}", patience_seconds=600)
    say(f"{label}: {' / '.join(seen.split(chr(10)))}")
    has = lambda line: line in seen.splitlines()
    number = lambda what: [int(n) for n in re.findall(rf"^{what} (\d+)(?: (\d+))?$", seen, re.MULTILINE)[0] if n]
    if frozen:
        expect(not has("dirty") and not has("replayed"), f"{label}: the journal has nothing to replay")
        expect_equal(number("checked"), [0], f"{label}: e2fsck")
    else:
        expect(has("dirty") and has("replayed"), f"{label}: a plain point of a mounted ext4 needs its journal")
    rows, highest = number("rows")
    expect_equal(rows, highest, f"{label}: no row is missing")
    expect(rows >= last[0], f"{label}: {last[0]} rows were committed before, {rows} are there")
    files, = number("files")
    expect(files >= last[1] and has("files whole"), f"{label}: {last[1]} files were synced before, {files} are there")
    expect(has("sums true"), f"{label}: pgbench's sums agree")
    expect(has("amcheck clean"), f"{label}: pg_amcheck")
    expect(re.search(r"Bad checksums: +0$", seen, re.MULTILINE), f"{label}: checksums")


with scratch() as folder:
    path = folder / "relay.qga"
    server = Afterimage(
        folder, groups={"vm1": {"vda": "1600MiB"}}, log="512MiB", ring="64MiB",
        group_lines=f'guest = [{{ qga = "{path}" }}]',
    )
    copy_root(server.backing())
    before = {}
    with server:
        with Guest(folder, "primary", nbd_root(server.socket, "vm1/vda")) as guest:
            guest.wait_until_up()
            guest.run(LOAD)
            guest.release_agent()
            relay = Relay(path, guest.agent_path)
            say(server.cli("guest", "check", "vm1", "--freeze").stdout.strip())
            goes_on(guest)
            server.wait_shipped(patience_seconds=900)
            done = []
            for number in range(ROUNDS):
                before[f"frozen-{number}"] = goes_on(guest)
                taken = server.cli_json("checkpoint", "vm1", "--app", "--label", f"frozen-{number}")
                expect_equal(taken["kind"], "application", f"kind: {taken}")
                expect_equal(taken["freeze"]["frozen"], "/", f"frozen: {taken}")
                done.append(taken["freeze"])
                if number == 1:
                    before["plain"] = goes_on(guest)
                    server.checkpoint("plain")
            milliseconds = lambda key: " ".join(f"{freeze[key] / 1e6:.2f}" for freeze in done)
            say(f"windows, ms: {milliseconds('window_ns')}; ours, ms: {milliseconds('own_ns')}")
            metrics = urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30).read().decode()
            expect(re.search(rf"^afterimage_freeze_window_seconds_count\{{.*\}} {ROUNDS}$", metrics, re.MULTILINE),
                   "every window is counted")

            labels = killed_at_every_step(server, guest, relay)
            after = server.cli("checkpoint", "vm1", "--app", "--label", "after").stdout
            say(after)
            server.wait_shipped(patience_seconds=600)
            relay.close()
        points = {point["label"]: point for point in server.points()["points"]}
        say(server.cli("points", "vm1").stdout)
        wrong = {
            label: point["kind"] for label, point in points.items()
            if (point["kind"] == "application") != (label == "after" or label.startswith("frozen"))
        }
        expect_equal(wrong, {}, "points of the wrong kind")
        expect({*before, "after"} <= {*points}, f"all points are there: {[*points]}")
        for label in {*labels} & {*points}:
            expect(points[label]["freeze"]["reason"], f"{label} says why it is crash-consistent")

        # The first of a batch is what the guest boots from, and none of those is the plain one.
        waiting = list(before)
        while waiting:
            batch, waiting = waiting[:POINTS_A_GUEST], waiting[POINTS_A_GUEST:]
            disks = {label: server.export(label)["vda"] for label in batch}
            root, *others = batch
            more = []
            for label in others:
                more += point_overlay(folder, disks[label], label)
                more += ["-device", f"virtio-blk-pci,drive={label},serial={label}"]
            with Guest(folder, f"judge-{root}", point_overlay(folder, disks[root], "root"), more=more,
                       root_device="/dev/vda") as guest:
                guest.wait_until_up()
                judge(guest, root, "/", before[root], True)
                for label in others:
                    judge(guest, label, f"/dev/disk/by-id/virtio-{label}", before[label], label != "plain")

"""A schedule freezes the guest; one that refuses is asked less often, with an alarm; reload ends it.

While the guest is frozen, writes are answered: to a disk of its own group and to another group's; a
second freeze is refused. With a log that is nearly full nobody is frozen.
"""

import json
import signal
import urllib.request

from harness.agent import FakeGuest
from harness.model import Disk
from harness.process import expect, expect_equal, scratch, wait_until
from harness.server import Afterimage
from harness.sites import Certificates, primary, replica

SIZE = 8 << 20
APP = 'checkpoint = { every = "1h", app = { every = "1s" } }'


def metric(server, name, group="vm1"):
    """The value of a group's metric."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30).read().decode()
    line = next(line for line in text.splitlines() if line.startswith(f'afterimage_{name}{{group="{group}"'))
    return float(line.split()[-1])


with scratch() as folder:
    path = folder / "vm1.sock"
    guest = FakeGuest(path)
    server = Afterimage(folder, groups={"vm1": {"vda": SIZE, "vdb": SIZE}, "vm2": {"vda": SIZE}},
                        group_lines=f'{APP}\nguest = [{{ qga = "{folder}/{{group}}.sock" }}]')
    with server:
        disks = [Disk(server.socket, name, SIZE) for name in ("vm1/vdb", "vm2/vda")]
        written, refused = [], []

        def write_while_frozen(command, when):
            if (command, when) == ("fsfreeze-freeze", "after"):
                for disk in disks:
                    disk.write(0, bytes([len(written) % 256]) * 4096)
                written.append(guest.frozen_since)
                if not refused:
                    refused.append(server.cli("checkpoint", "vm1", "--app", "--label", "overlap", ok=False).stderr)

        guest.hook = write_while_frozen
        made = lambda kind: [point for point in server.points()["points"]
                             if (point["kind"], point["trigger"]) == (kind, "schedule")]
        server.wait_shipped()
        wait_until(lambda: len(made("application")) >= 2, "two scheduled points with a frozen guest")
        expect(len(written) >= 2 and all(written), "writes were answered while the guest was frozen")
        expect_equal(metric(server, "freeze_window_seconds_sum") > 0, True, "windows are measured")
        expect("is being frozen or thawed already" in refused[0], f"a second freeze: {refused}")
        expect("overlap" not in [point["label"] for point in server.points()["points"]], "no point of a refused one")

        failed = lambda: [point["wall_ns"] for point in made("crash") if point.get("freeze")]
        guest.hook, guest.refuses = lambda command, when: None, "the guest is not in the mood"
        excused = len(failed())
        alarm = wait_until(lambda: server.group_status().get("guest_alarm"), "an alarm")
        expect("not in the mood" in alarm, alarm)
        expect(metric(server, "application_checkpoint_failures") >= 3, "failures in a row")
        wait_until(lambda: made("crash"), "points of a guest that was not frozen")
        expect("not in the mood" in made("crash")[0]["freeze"]["reason"], f"the reason: {made('crash')[0]}")
        expect("not in the mood" in server.cli("points", "vm1").stdout, "points says why")

        # Due each second; after three failures in a row three times are left out.
        wait_until(lambda: len(failed()) >= excused + 4, "a fourth failure")
        times = failed()[excused:]
        expect(times[3] - times[2] > 2e9, f"a guest that fails is asked less often: {times}")

        guest.refuses = None
        wait_until(lambda: not server.group_status().get("guest_alarm"), "the alarm to end")
        expect_equal(metric(server, "application_checkpoint_failures"), 0, "failures in a row")
        wait_until(lambda: metric(server, "guest_maybe_frozen") == 0, "a thawed guest")

        seen = len(server.child.log())
        server.config.write_text(server.config.read_text().replace(APP, 'checkpoint = { every = "1h" }'))
        server.child.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "group 'vm1' takes checkpoints" in server.child.log()[seen:], "the reload")
        wait_until(lambda: metric(server, "guest_maybe_frozen") == 0, "a run under way to end")
        asked = len(guest.commands)
        server.wait_shipped()
        server.cli("checkpoint", "vm1", "--app", "--label", "by-hand")
        own = guest.commands[asked:].count("fsfreeze-freeze")
        wait_until(lambda: "by-hand" in [point["label"] for point in server.points()["points"]], "the point")
        expect_equal((own, guest.frozen_since), (1, None), "freezes without a schedule")

        # The next process knows the last one of each kind.
        server.checkpoint("plain")
        known = lambda: {kind: server.group_status()[kind]["lsn"] for kind in ("last_crash", "last_application")}
        before = known()
        remembered = lambda: {json.loads(kept.read_text())[kind]["lsn"] for kind in ("crash", "application")}
        kept = server.log_path().with_name(server.log_path().name + ".checkpoints.json")
        wait_until(lambda: remembered() == {*before.values()}, "the checkpoints to be kept")
        server.kill()
        server.start()
        expect_equal(known(), before, "last checkpoints after a kill")
        expect(metric(server, "last_checkpoint_timestamp_seconds") > 1e9, "the metric after a kill")
    guest.close()

    # Nobody is frozen when the log is nearly full: a freeze flushes into it.
    guest = FakeGuest(folder / "full.sock")
    certificates = Certificates(folder / "ca")
    with replica(folder, certificates) as dr, primary(
        folder, certificates, dr.repository_port, groups={"vm1": {"vda": SIZE}}, log="64MiB", ring="8MiB",
        group_lines=f'guest = [{{ qga = "{folder}/full.sock" }}]',
    ) as server:
        server.wait_shipped()
        dr.stop()
        disk = Disk(server.socket, "vm1/vda", SIZE)
        used = lambda: (status := server.api_status()["groups"][0])["log_used_bytes"] / status["log_bytes"]
        # At 86 % it is nearly full; at 87.5 % unshipped records leave it, and it is not full any more.
        while used() < 0.862:
            disk.write(0, disk.dice.randbytes(1 << (18 if used() < 0.8 else 15)))
        refused = server.cli("checkpoint", "vm1", "--app", ok=False)
        expect("the log is nearly full" in refused.stderr, refused.stderr)
        expect("fsfreeze-freeze" not in guest.commands, f"asked: {guest.commands}")
    guest.close()

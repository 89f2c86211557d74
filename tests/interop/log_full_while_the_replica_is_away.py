"""The replica is away and the log fills: the guest goes on, and a new pass heals the gap.

`status` says how long the log lasts. Points from before stay restorable all the time, `points` shows the
gap, and points after it are exact. The group had another target before, which is gone.
"""

import urllib.request

from harness.model import Disk, same_content
from harness.process import expect, expect_equal, say, scratch, wait_until
from harness.sites import Certificates, primary, replica

SIZE = 32 << 20

with scratch() as folder:
    certificates = Certificates(folder / "ca")
    dr = replica(folder, certificates)
    first, target = f"file://{folder}/first", f"afterimage://127.0.0.1:{dr.repository_port}"
    with dr, primary(folder, certificates, dr.repository_port, groups={"vm1": {"vda": SIZE}}, to=[first],
                     log="32MiB", ring="8MiB") as site:
        site.wait_shipped()
        site.stop()
        site.config.write_text(site.config.read_text().replace(first, target))
        site.start()
        disk = Disk(site.socket, "vm1/vda", SIZE)
        # What lies before the end of the initial copy is no recovery point.
        site.wait_shipped()
        for _ in range(100):
            disk.write_somewhere()
        site.checkpoint("before")
        before = bytes(disk.content)
        site.wait_shipped()
        expect_equal(site.group_status().get("gap_in_seconds"), None, "time to a gap while all is shipped")
        dr.stop()
        say("the replica is away")

        disk.write(0, disk.dice.randbytes(2 << 20))
        wait_until(lambda: site.group_status().get("gap_in_seconds"), "the time to a gap")
        header, row = site.cli("status", "vm1").stdout.splitlines()[:2]
        shown = row[header.index("GAP IN"):header.index("CLIENTS")].strip()
        expect(shown[:1].isdigit(), f"GAP IN of a log that fills: {shown!r}")

        written = 0
        while written < 160 << 20:  # five times the log
            disk.write(disk.dice.randrange(0, SIZE // 4096 - 256) * 4096, disk.dice.randbytes(1 << 20))
            written += 1 << 20
        disk.flush()
        status = site.group_status()
        expect(status["targets"][0]["gap"], f"the target's state says that there is a gap: {status}")
        expect_equal(status["state"], "degraded", "the group's state")
        expect("history has a gap" in status["reason"], f"the group says why: {status}")
        expect("history has a gap" in site.cli("status", "vm1").stdout, "status says so")
        line = next((line for line in site.child.log().splitlines() if "left the log: history has a gap" in line), "")
        expect(target in line, f"the log line names the target: {line!r}")
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{site.metrics_port}/metrics", timeout=30).read().decode()
        gap = [line for line in metrics.splitlines() if line.startswith("afterimage_history_gap{")]
        expect(len(gap) == 1 and gap[0].endswith(" 1"), f"the metric: {gap}")
        say("the log has overflowed and the guest went on")

        dr.start()
        wait_until(lambda: site.group_status()["targets"][0]["state"] in ("copying", "shipping"), "the replica")
        same_content("before, during the pass", dr.restore("before", folder / "a") / "vda.raw", before)
        for _ in range(50):
            disk.write_somewhere()
        site.wait_shipped()
        site.checkpoint("after")
        site.wait_shipped()

        points = dr.points()
        expect(len(points["spans"]) >= 2, f"the points show the gap: {points['spans']}")
        expect(points["spans"][0]["last_lsn"] < points["spans"][1]["first_lsn"] - 1, f"a gap: {points['spans']}")
        same_content("before, afterwards", dr.restore("before", folder / "b") / "vda.raw", before)
        same_content("after", dr.restore("after", folder / "c") / "vda.raw", bytes(disk.content))
        lost = points["spans"][1]["first_lsn"] - 1
        dr.cli("restore", f"vm1@lsn:{lost}", folder / "d", ok=1)
        expect(not (folder / "d/vda.raw").exists(), "no file for a point within the gap")

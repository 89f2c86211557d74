"""A replica that stops answering is noticed: the state says so, GAP IN counts, a gap is told once and stays known.

Its first copy is no gap. The last moment that can be restored there stays known, also after a restart of the primary.
"""

import os
import signal
import time
import urllib.request

from harness.model import Disk
from harness.process import expect, expect_equal, say, scratch, wait_until
from harness.sites import Certificates, primary, replica

SIZE = 32 << 20
GAP = "history has a gap"


def metric(server, name, *labels):
    """The value of the metric's only line that has these labels; None without one."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30).read().decode()
    lines = [line for line in text.splitlines() if line.startswith(f"afterimage_{name}{{")]
    lines = [line for line in lines if all(label in line for label in labels)]
    expect(len(lines) <= 1, f"one {name} with {labels}: {lines}")
    return float(lines[0].rsplit(" ", 1)[1]) if lines else None


def column(server, name, behind):
    """A column of `status`."""
    header, row = server.cli("status", "vm1").stdout.splitlines()[:2]
    return row[header.index(name):header.index(behind)].strip()


with scratch() as folder:
    certificates = Certificates(folder / "ca")
    dr = replica(folder, certificates)
    with dr:
        dr.stop()
        with primary(folder, certificates, dr.repository_port, groups={"vm1": {"vda": SIZE}}, log="32MiB",
                     ring="8MiB") as site:
            disk = Disk(site.socket, "vm1/vda", SIZE)
            disk.write(0, disk.dice.randbytes(1 << 20))
            wait_until(lambda: site.group_status()["targets"][0]["state"] == "away", "a replica that is not there")
            expect(GAP not in site.group_status()["reason"], f"a first copy is no gap: {site.group_status()}")
            expect(GAP not in site.cli("status", "vm1").stdout, "a first copy is no gap in the text")
            expect_equal(column(site, "RPO", "LOG"), "not yet", "RPO without any copy")
            expect_equal(metric(site, "recoverable_timestamp_seconds"), None, "the metric without any copy")
            dr.start()
            site.wait_shipped()
            wait_until(lambda: site.group_status()["state"] == "running", "the group to be well")
            for _ in range(50):
                disk.write_somewhere()
            site.wait_shipped()
            status = site.group_status()
            expect_equal((status["state"], status.get("gap_in_seconds")), ("running", None), "with a target that is well")

            def seen():
                """The state, after a little write."""
                disk.write(disk.dice.randrange(0, SIZE // 4096 - 16) * 4096, disk.dice.randbytes(1 << 16))
                return site.group_status()

            os.kill(dr.child.pid, signal.SIGSTOP)
            say("the replica stands still")
            early = time.time()
            seen()
            late = time.time()
            # What it has is how things stood until then, however long ago the last write before was.
            moment = wait_until(lambda: (at := metric(site, "recoverable_timestamp_seconds")) <= late and at >= early and at,
                                "the moment up to which it has everything")
            seen()
            expect_equal(metric(site, "recoverable_timestamp_seconds"), moment, "the moment while nothing gets there")
            wait_until(lambda: seen().get("gap_in_seconds") is not None, "the time to a gap while the log fills")
            expect(column(site, "GAP IN", "CLIENTS")[:1].isdigit(), "GAP IN in the text")
            status = wait_until(lambda: (now := seen())["state"] == "degraded" and now, "the state while the log fills")
            expect(site.to[0] in status["reason"] and GAP not in status["reason"], f"the reason: {status['reason']}")

            for _ in range(160):  # five times the log
                disk.write(disk.dice.randrange(0, SIZE // 4096 - 256) * 4096, disk.dice.randbytes(1 << 20))
            disk.flush()
            status = wait_until(lambda: (now := seen())["targets"][0]["gap"] and now, "the gap")
            expect_equal(status["state"], "degraded", "the state after the log has overflowed")
            expect(GAP in status["reason"] and GAP in site.cli("status", "vm1").stdout, f"the reason: {status['reason']}")
            wait_until(lambda: seen().get("gap_in_seconds") == 0, "no time left")
            told = [line for line in site.child.log().splitlines() if f"left the log: {GAP}" in line]
            expect_equal(len(told), 1, "times that the gap was told")
            expect_equal(metric(site, "errors_total", 'kind="history_gap"'), 1.0, "gaps counted")
            last = metric(site, "recoverable_timestamp_seconds")
            expect(last is not None, "what was restorable before the gap stays so")
            expect(column(site, "RPO", "LOG") != "not yet", "the RPO in a gap")
            say("the log has overflowed")

            disk.close()
            site.kill()
            site.start()
            disk = Disk(site.socket, "vm1/vda", SIZE, seed=2)
            wait_until(lambda: site.group_status()["state"] == "degraded", "the state after a restart")
            expect(GAP in site.group_status()["reason"], f"the reason after a restart: {site.group_status()}")
            expect_equal(metric(site, "recoverable_timestamp_seconds"), last, "the last moment, after a restart")
            expect(column(site, "RPO", "LOG")[:1].isdigit(), "the RPO after a restart")
            for _ in range(64):
                disk.write(disk.dice.randrange(0, SIZE // 4096 - 256) * 4096, disk.dice.randbytes(1 << 20))
            expect_equal(metric(site, "errors_total", 'kind="history_gap"'), 0.0, "the same gap after a restart")

            os.kill(dr.child.pid, signal.SIGCONT)
            say("the replica goes on")
            site.wait_shipped()
            wait_until(lambda: site.group_status()["state"] == "running", "the group to be well again")
            expect(GAP not in site.cli("status", "vm1").stdout, "no gap any more")
            expect(metric(site, "recoverable_timestamp_seconds") > last, "the moment goes on")

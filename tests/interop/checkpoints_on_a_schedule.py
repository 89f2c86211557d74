"""Scheduled checkpoints come by themselves, over a restart too, and a reload changes when.

Groups have different schedules: an interval, and cron's words with seconds. `points` shows
each with its kind, its trigger and the size of what changed; metrics count them.
"""

import os
import re
import signal
import urllib.request

from harness.model import Disk, same_content
from harness.process import expect, say, scratch, wait_until
from harness.server import Afterimage

SIZE = 8 << 20


def scheduled(server, group="vm1"):
    """Points of that group that the schedule made."""
    return [point for point in server.points(group)["points"] if point["trigger"] == "schedule"]


with scratch() as folder:
    server = Afterimage(folder, groups={"vm1": {"vda": SIZE}, "vm2": {"vda": SIZE}},
                        group_lines='checkpoint = { every = "1s" }')
    text = server.config.read_text()
    before, after = text.split('name = "vm2"')
    server.config.write_text(before + 'name = "vm2"' + after.replace('every = "1s"', 'cron = "*/2 * * * * *"'))
    with server:
        disk = Disk(server.socket, "vm1/vda", SIZE)
        server.wait_shipped()
        for group in ("vm1", "vm2"):
            wait_until(lambda: len(scheduled(server, group)) >= 2, f"two scheduled checkpoints of {group}")
        for _ in range(20):
            disk.write_somewhere()
        content, seen = bytes(disk.content), {point["lsn"] for point in scheduled(server)}
        last = server.group_status()["appended_lsn"]

        def newest():
            """The first point behind the last write."""
            return next((point for point in scheduled(server) if point["lsn"] > last), None)

        point = wait_until(newest, "a checkpoint after the last write")
        expect(point["kind"] == "crash" and not point["label"], f"the point: {point}")
        expect(any(p["changed_bytes"] > 0 for p in scheduled(server)), "the size of what changed is shown")
        same_content("a scheduled point", server.restore(point["point"], folder / "out") / "vda.raw", content)
        listed = server.cli("points", "vm1").stdout
        for column in ("TIME", "POINT", "KIND", "AGE", "CHANGED", "crash (schedule)"):
            expect(column in listed, f"{column} in the list:\n{listed}")
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as answer:
            metrics = answer.read().decode()
        counted = re.search(r'checkpoints_total\{group="vm1",kind="crash",result="ok"\} (\d+)', metrics)
        expect(counted and int(counted.group(1)) >= 3, f"checkpoints are counted: {counted}")

        say("restart")
        server.restart()
        wait_until(lambda: {point["lsn"] for point in scheduled(server)} - seen - {point["lsn"]},
                   "a scheduled checkpoint after the restart")

        say("reload: no schedule any more")
        server.config.write_text(server.config.read_text().replace('checkpoint = { every = "1s" }', ""))
        os.kill(server.child.pid, signal.SIGHUP)
        wait_until(lambda: "takes checkpoints on demand only" in server.child.log(), "the reload")
        server.checkpoint("by-hand")
        server.wait_shipped()
        wait_until(lambda: len(scheduled(server, "vm2")) >= 6, "more checkpoints of the other group")
        server.wait_shipped()
        points = server.points()["points"]
        behind = [point for point in points if point["trigger"] == "schedule" and point["lsn"] > points[-1]["lsn"]]
        expect(points[-1]["label"] == "by-hand" and not behind, f"none after the reload: {points[-3:]}")

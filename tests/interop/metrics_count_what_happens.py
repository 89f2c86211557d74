"""/metrics rises with what was done: requests, connections, bytes, stalls, the copy, and the moments that can be restored."""

import random
import time
import urllib.request

from harness.nbd_client import Connection
from harness.process import expect, expect_equal, scratch, wait_until
from harness.server import Afterimage

SIZE = 16 << 20
WRITES, READS, FLUSHES = 20, 7, 3
DICE = random.Random(9)


def metric(name, *labels):
    """The value of the metric's only line that has these labels."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30).read().decode()
    lines = [line for line in text.splitlines() if line.startswith(f"afterimage_{name}{{")]
    lines = [line for line in lines if all(label in line for label in labels)]
    expect(len(lines) == 1, f"one {name} with {labels}: {lines}")
    return float(lines[0].rsplit(" ", 1)[1])


def requests(op):
    """Requests of a kind that were timed."""
    return metric("nbd_request_duration_seconds_count", f'op="{op}"')


with scratch() as folder:
    server = Afterimage(folder, groups={"vm1": {"vda": SIZE}}, log="32MiB", ring="4MiB",
                        group_lines='pass_rate = "4MiB"')
    server.backing().write_bytes(DICE.randbytes(SIZE))
    server.start()
    # A slow copy of a full disk.
    left = wait_until(lambda: metric("pass_remaining_bytes"), "a copy that runs")
    expect(0 < left <= SIZE, f"what is left of the copy: {left}")
    wait_until(lambda: metric("pass_remaining_bytes") < left, "the copy to get on")
    server.wait_shipped()
    expect_equal(metric("pass_remaining_bytes"), 0.0, "what is left of a copy that is over")
    copied = metric("segment_payload_bytes_total")
    expect(copied >= SIZE, f"the whole disk was sent: {copied}")
    shipped = metric("shipped_bytes_total")
    expect(shipped >= SIZE, f"and cannot be compressed: {shipped}")

    expect_equal(metric("nbd_connections"), 0.0, "connections before there are any")
    before = {op: requests(op) for op in ("read", "write", "flush")}
    with Connection(server.socket).open_export("vm1/vda") as client:
        expect_equal(metric("nbd_connections"), 1.0, "connections")
        with Connection(server.socket).open_export("vm1/vda") as other:
            wait_until(lambda: metric("nbd_connections") == 2, "the other connection")
            other.read(0, 4096)
        wait_until(lambda: metric("nbd_connections") == 1, "the other connection to be gone")
        for number in range(WRITES):
            client.write(number * 65536, DICE.randbytes(65536))
        for number in range(READS - 1):
            client.read(number * 4096, 4096)
        for _ in range(FLUSHES):
            client.flush()
        for op, count in (("read", READS), ("write", WRITES), ("flush", FLUSHES)):
            expect_equal(requests(op) - before[op], float(count), f"requests that were timed: {op}")
        server.wait_shipped()
        payload = metric("segment_payload_bytes_total") - copied
        expect(WRITES * 65536 <= payload < 2 * WRITES * 65536, f"payload of the writes: {payload}")
        expect(metric("shipped_bytes_total") - shipped >= WRITES * 65536, "bytes of the writes")

        # Nothing is unshipped: now, by the clock of this machine.
        early = time.time()
        recoverable = metric("recoverable_timestamp_seconds")
        expect(early <= recoverable <= time.time(), f"restorable up to now: {recoverable}, not {early}")
        first = server.points()["spans"][0]["first_wall_ns"]
        oldest = metric("oldest_point_timestamp_seconds")
        expect(abs(oldest - first / 1e9) < 1e-5, f"the oldest point: {oldest}, not {first}")

        # More than the ring holds, again and again, until a request had to wait.
        def stalled():
            for number in range(16):
                client.write(number << 20, DICE.randbytes(1 << 20))
            return metric("write_stall_seconds_total")

        stall = wait_until(stalled, "a request that had to wait for room")
        expect(metric("write_stall_seconds_total") >= stall, "a counter never falls")
    server.close()

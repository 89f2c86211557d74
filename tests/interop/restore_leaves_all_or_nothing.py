"""A restore that is ended by a signal leaves nothing; one that ends well is for its owner alone."""

import signal
import subprocess
import time

from harness.nbd_client import Connection
from harness.process import expect, expect_equal, scratch
from harness.server import Afterimage, binary

SIZE = 96 << 20
CHUNK = 1 << 20

with scratch() as folder, Afterimage(folder, groups={"vm1": {"vda": SIZE, "vdb": SIZE}}) as server:
    for disk in ("vda", "vdb"):
        with Connection(server.socket).open_export(f"vm1/{disk}") as client:
            for offset in range(0, SIZE, CHUNK):
                client.write(offset, offset.to_bytes(8, "little") * (CHUNK // 8))
            client.flush()
    server.wait_shipped()

    ended = 0
    for number, sent in enumerate([signal.SIGTERM, signal.SIGINT] * 5):
        target = folder / f"ended-{number}"
        with subprocess.Popen([binary(), "--config", server.config, "restore", "vm1@latest", target],
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              env=server.environment, text=True) as restore:
            while restore.poll() is None and not any(target.glob(".*.partial")):
                time.sleep(0.002)
            restore.send_signal(sent)
            said = restore.communicate(timeout=120)[1]
        left = sorted(path.name for path in target.iterdir())
        if restore.returncode == 0:
            expect_equal(left, ["vda.raw", "vdb.raw"], "files of one that was quicker than the signal")
        else:
            ended += 1
            expect_equal((restore.returncode, left), (1, []), f"exit code and files after {sent.name}")
            expect("nothing was restored" in said, f"what it says after {sent.name}: {said}")
    expect(ended > 0, "no restore was ended")

    target = server.restore("latest", folder / "whole")
    expect_equal(target.stat().st_mode & 0o777, 0o700, "mode of the folder")
    for disk in ("vda", "vdb"):
        expect_equal((target / f"{disk}.raw").stat().st_mode & 0o777, 0o600, f"mode of {disk}.raw")

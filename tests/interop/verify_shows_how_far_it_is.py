"""`verify` on a terminal counts the objects it has read, without a total that nobody knows, and cleans up behind itself."""

import os
import pty
import re
import subprocess

from harness.model import Disk
from harness.process import expect, expect_equal, scratch
from harness.server import Afterimage, binary

SIZE = 64 << 20

with scratch() as folder, Afterimage(folder, groups={"vm1": {"vda": SIZE}}) as server:
    disk = Disk(server.socket, "vm1/vda", SIZE)
    for number in range(SIZE >> 20):
        disk.write(number << 20, disk.dice.randbytes(1 << 20))
    disk.flush()
    server.wait_shipped()
    ours, theirs = pty.openpty()
    child = subprocess.Popen([binary(), "--config", server.config, "verify", "vm1"], stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"}, text=True)
    os.close(theirs)
    drawn = b""
    try:
        while chunk := os.read(ours, 65536):
            drawn += chunk
    except OSError:
        pass  # that is how the end of a terminal reads
    os.close(ours)
    result, _ = child.communicate(timeout=120)
    expect_equal(child.returncode, 0, "exit code")
    drawn = drawn.decode()
    expect("objects read" in drawn, f"it counts: {drawn!r}")
    expect(not re.search(r"\d[.]\d", drawn), f"no fractions of objects: {drawn!r}")
    expect(" of " not in drawn, f"no total: {drawn!r}")
    expect(result.startswith("vm1: whole; "), f"the result stands alone on standard output: {result!r}")

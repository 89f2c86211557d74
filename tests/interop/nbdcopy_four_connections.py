"""nbdcopy with four connections brings an image in and out again unchanged."""

import os

from harness.process import run, scratch
from harness.server import Server

with scratch() as folder, Server(folder, groups={"vm1": {"vda": "96MiB"}}) as server:
    source, target = folder / "source.raw", folder / "target.raw"
    with open(source, "wb") as file:
        for position in range(0, 96 << 20, 4 << 20):
            file.seek(position)
            if position % (12 << 20):  # every third part stays a hole
                file.write(os.urandom(4 << 20))
        file.truncate(96 << 20)
    run("nbdcopy", "--connections=4", "--requests=16", "--flush", source, server.uri())
    run("nbdcopy", "--connections=4", server.uri(), target)
    run("cmp", source, target)
    server.restart()
    run("nbdcopy", "--connections=4", server.uri(), target)
    run("cmp", source, target)

"""qemu-img converts an image into the export, compares it, and benches it."""

import os

from harness.process import run, scratch
from harness.server import Server

with scratch() as folder, Server(folder) as server:
    source = folder / "source.qcow2"
    raw = folder / "source.raw"
    with open(raw, "wb") as file:
        file.write(os.urandom(20 << 20))
        file.truncate(64 << 20)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, source)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", source, server.uri())
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", source, server.uri())
    back = folder / "back.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri(), back)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, back)
    for more in [["-w", "--flush-interval=64"], ["-w", "-s", "64k"], []]:
        run("qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "32", "-o", "32M", *more, server.uri())

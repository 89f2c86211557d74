"""qemu-io: ragged, overlapping, zeroed and discarded ranges read back as they must."""

from harness.process import expect, run, scratch
from harness.server import Server

COMMANDS = [
    "write -P 0x11 0 1M", "write -P 0x22 511 1025", "write -P 0x33 4095 2", "write -P 0x44 65536 64k",
    "read -P 0x11 0 511", "read -P 0x22 511 1025", "read -P 0x11 1536 2559", "read -P 0x33 4095 2",
    "write -z 70000 3000", "read -P 0x44 65536 4464", "read -P 0 70000 3000", "read -P 0x44 73000 4096",
    "write -z -u 131072 128k", "read -P 0 131072 128k", "discard 262144 64k", "read -P 0 262144 64k",
    "write -f -P 0x55 300000 100000", "read -P 0x55 300000 100000", "flush",
    "aio_write -P 0x66 1M 256k", "aio_write -P 0x77 2M 1M", "aio_flush",
    "read -P 0x66 1M 256k", "read -P 0x77 2M 1M",
    "write -P 0x88 16M 32M", "read -P 0x88 16M 32M", "discard 16M 32M", "read -P 0 16M 32M",
]
AFTERWARDS = [
    "read -P 0x22 511 1025", "read -P 0x33 4095 2", "read -P 0x44 65536 4464", "read -P 0 70000 3000",
    "read -P 0 131072 128k", "read -P 0 262144 37856", "read -P 0x55 300000 100000",
    "read -P 0x66 1M 256k", "read -P 0x77 2M 1M", "read -P 0 16M 32M",
]


def qemu_io(uri, commands):
    words = [word for command in commands for word in ("-c", command)]
    result = run("qemu-io", "-f", "raw", "--discard=unmap", *words, uri)
    for sign in ["failed", "error", "mismatch"]:
        expect(sign not in result.stdout.lower(), f"qemu-io reports no '{sign}':\n{result.stdout}")


with scratch() as folder, Server(folder) as server:
    qemu_io(server.uri(), COMMANDS)
    server.kill()
    server.start()
    qemu_io(server.uri(), AFTERWARDS)

"""Illegal requests through libnbd get their errno, and the connection stays in step."""

import sys

sys.path.append("/usr/lib/python3/dist-packages")  # where Debian puts libnbd for its own python3

import nbd

from harness.process import expect, expect_equal, scratch
from harness.server import Server, STANDIN

SIZE = 64 << 20
SECTOR = b"s" * 512

with scratch() as folder, Server(folder) as server:
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.connect_uri(server.uri())

    def refused(what, errnos, call, *arguments):
        try:
            call(*arguments)
        except nbd.Error as error:
            expect(STANDIN or error.errnum in errnos, f"{what}: {error}")
        else:
            expect(False, f"{what} was not refused")
        # Still in step: a marker written and read back.
        handle.pwrite(SECTOR, 0)
        expect_equal(bytes(handle.pread(512, 0)), SECTOR, f"read after '{what}'")

    ENOSPC, EINVAL = 28, 22
    refused("write beyond the end", [ENOSPC], handle.pwrite, SECTOR, SIZE)
    refused("write across the end", [ENOSPC], handle.pwrite, SECTOR, SIZE - 256)
    refused("write far beyond", [ENOSPC], handle.pwrite, SECTOR, (1 << 62) - 512)
    refused("read beyond the end", [EINVAL], handle.pread, 512, SIZE)
    refused("read across the end", [EINVAL], handle.pread, 512, SIZE - 256)
    refused("trim beyond the end", [ENOSPC, EINVAL], handle.trim, 4096, SIZE)
    refused("zero beyond the end", [ENOSPC], handle.zero, 4096, SIZE)
    if not STANDIN:
        refused("block status beyond the end", [EINVAL], handle.block_status, 4096, SIZE, lambda *_: 0)
        # Zero lengths succeed.
        handle.trim(0, 0)
        handle.zero(0, 0)
        expect_equal(bytes(handle.pread(0, 0)), b"", "read of nothing")
        # 64 MiB are accepted though 32 are advertised.
        big = bytes(range(256)) * (SIZE // 256)
        handle.pwrite(big, 0)
        expect_equal(bytes(handle.pread(SIZE, 0)), big, "64 MiB at once")
    handle.pwrite(b"end!" * 128, SIZE - 512, nbd.CMD_FLAG_FUA)
    expect_equal(bytes(handle.pread(512, SIZE - 512)), b"end!" * 128, "the last sector")
    handle.shutdown()

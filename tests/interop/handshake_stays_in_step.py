"""Options with lies in them get an error and the stream stays in step; unknown flags close it."""

import struct

from harness.nbd_client import (
    OPT_ABORT, OPT_GO, OPT_INFO, OPT_LIST, REP_ACK, REP_ERR_INVALID, REP_ERR_TOO_BIG, REP_ERR_UNKNOWN,
    REP_ERR_UNSUP, Connection,
)
from harness.process import expect, expect_equal, scratch
from harness.server import Server


def go_data(name):
    return struct.pack(">I", len(name)) + name + b"\0\0"


with scratch() as folder, Server(folder) as server:
    with Connection(server.socket) as client:
        client.greet()
        for option in [77, 0x7FFFFFFF]:
            expect_equal(client.option_outcome(option, b"?" * 100)[0], REP_ERR_UNSUP, f"option {option}")
        lies = [b"", b"\0\0\0\x20abc", struct.pack(">I", 3) + b"abc", go_data(b"vm1/vda") + b"trailing"]
        for lie in lies:
            expect_equal(client.option_outcome(OPT_INFO, lie)[0], REP_ERR_INVALID, f"INFO with {lie!r}")
        for unknown in [b"nobody/vda", b"vm1/../vm1/vda", b"../vm1/vda", b"vm1", b"vm1/vdb", b"vm1/vda\0"]:
            kind, _ = client.option_outcome(OPT_GO, go_data(unknown))
            expect(kind in (REP_ERR_UNKNOWN, REP_ERR_INVALID), f"GO {unknown!r}: {kind:#x}")
        # The protocol's longest string, one byte more, and more than an option may be.
        for length, error in [(4096, REP_ERR_UNKNOWN), (4097, REP_ERR_INVALID), (70000, REP_ERR_TOO_BIG)]:
            for option in (OPT_INFO, OPT_GO):
                kind, _ = client.option_outcome(option, go_data(b"n" * length))
                expect_equal(hex(kind), hex(error), f"option {option} with a name of {length} bytes")
        kind, exports = client.option_outcome(OPT_LIST)
        expect_equal((kind, len(exports)), (REP_ACK, 1), "LIST afterwards")
        kind, _ = client.option_outcome(OPT_GO, go_data(b"vm1/vda"))
        expect_equal(kind, REP_ACK, "GO afterwards")
        client.write(0, b"a" * 512)

    with Connection(server.socket) as client:
        client.greet()
        expect_equal(client.option_outcome(OPT_ABORT)[0], REP_ACK, "ABORT")
        expect(client.closed_by_server(), "ABORT ends the connection")

    with Connection(server.socket) as client:
        client.greet(client_flags=0x80000001)
        expect(client.closed_by_server(), "an unknown client flag closes the connection")

    with Connection(server.socket) as client:
        client.greet()
        client.option(OPT_GO, b"", length=0xFFFFFFFF)
        client.socket.shutdown(1)
        # Whatever it says about such a length, it must not wait for 4 GiB nor hold them.
        while client.socket.recv(4096):
            pass

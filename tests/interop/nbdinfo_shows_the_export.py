"""nbdinfo sees each export with its size, flags and block sizes, and lists them all."""

import json

from harness.process import expect, expect_equal, run, scratch, wait_until
from harness.server import Server, STANDIN


def dirty(server):
    """What the dirty context says of the disk: it covers all of it with one extent."""
    extents = json.loads(run("nbdinfo", "--json", "--map=afterimage:dirty", server.uri()).stdout)
    expect_equal([(extent["offset"], extent["length"]) for extent in extents], [(0, 64 << 20)], "extents")
    return extents[0]["type"]


with scratch() as folder, Server(folder, groups={"vm1": {"vda": "64MiB"}}) as server:
    export = json.loads(run("nbdinfo", "--json", server.uri()).stdout)["exports"][0]
    expect_equal(export["export-name"], "vm1/vda", "export name")
    expect_equal(export["export-size"], 64 << 20, "export size")
    expect_equal(export["is_read_only"], False, "read-only")
    for flag in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df", "can_cache"]:
        if not STANDIN:
            expect(export[flag], f"{flag} is offered")
    contexts = [context if isinstance(context, str) else context["description"]
                for context in export.get("contexts", [])]
    expect("base:allocation" in " ".join(contexts), f"base:allocation is offered, saw {contexts}")
    if not STANDIN:
        expect_equal(export["block_size_minimum"], 1, "minimum block size")
        expect_equal(export["block_size_preferred"], 4096, "preferred block size")
        expect_equal(export["block_size_maximum"], 32 << 20, "maximum block size")

    listed = json.loads(run("nbdinfo", "--json", "--list", f"nbd+unix:///?socket={server.socket}").stdout)
    expect_equal([entry["export-name"] for entry in listed["exports"]], ["vm1/vda"], "listed exports")

    # Data, then its map: what was written is allocated, the rest is a hole that reads as zeroes.
    run("/usr/bin/python3", "-c", f"""
import nbd
h = nbd.NBD()
h.connect_uri({server.uri()!r})
h.pwrite(b'x' * 1048576, 8 << 20)
h.flush()
""")
    extents = json.loads(run("nbdinfo", "--json", "--map", server.uri()).stdout)
    covered = 0
    for extent in extents:
        expect_equal(extent["offset"], covered, "extents follow each other")
        covered += extent["length"]
    expect_equal(covered, 64 << 20, "extents cover the disk")
    data = [extent for extent in extents if extent["type"] == 0]
    expect(any(extent["offset"] <= 8 << 20 < extent["offset"] + extent["length"] for extent in data),
           f"the written MiB is data: {extents}")
    expect(sum(extent["length"] for extent in data) < 32 << 20, f"the unwritten rest is a hole: {extents}")

    # Dirty until the target has everything, also what it cannot get for now.
    if not STANDIN:
        write = f"""
import nbd
h = nbd.NBD()
h.connect_uri({server.uri()!r})
h.pwrite(b'y' * 4096, 0)
"""
        server.wait_shipped()
        wait_until(lambda: dirty(server) == 0, "a disk that the target has all of to be clean")
        server.repository.rename(server.folder / "away")
        run("/usr/bin/python3", "-c", write)
        for _ in range(3):
            expect_equal(dirty(server), 1, "dirty while the target lacks the last write")
        (server.folder / "away").rename(server.repository)
        server.wait_shipped()
        wait_until(lambda: dirty(server) == 0, "the disk to be clean again")

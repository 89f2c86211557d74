"""Backings that are missing, too small, somebody else's, qcow2, or changed behind our back."""
# limit: 320

import os
from concurrent.futures import ThreadPoolExecutor

from harness.nbd_client import Connection
from harness.process import Child, expect, fallocate_sparse, run, scratch, wait_until
from harness.server import Afterimage


def refused(server, what, *words):
    said = server.start_refused()
    for word in [str(server.backing()), *words]:
        expect(word in said, f"{what}: the message says {word!r}:\n{said}")
    expect(not server.log_path().exists() or what.startswith("later"), f"{what}: no log was left behind")
    server.close()


with scratch() as folder:
    server = Afterimage(folder, name="missing", create_backings=False)
    refused(server, "missing")

    server = Afterimage(folder, name="empty", groups={"vm1": {"vda": 0}})
    refused(server, "empty")

    server = Afterimage(folder, name="other-format", create_backings=False)
    run("qemu-img", "create", "-q", "-f", "qcow2", server.backing(), "64M")
    refused(server, "qcow2", "like a qcow2 image", "raw = true")

    # The second disk of a group: nothing is made for the first one either.
    two = {"vm1": {"vdb": "8MiB", "vda": "8MiB"}}
    server = Afterimage(folder, name="second-missing", groups=two)
    server.backing().unlink()
    refused(server, "missing")
    server = Afterimage(folder, name="second-odd", groups=two)
    os.truncate(server.backing(), 1000)
    refused(server, "odd", "has 1000 bytes")
    server = Afterimage(folder, name="second-claimed", groups=two)
    (server.folder / "vm1-vda.raw.afterimage").write_text("not a marker")
    refused(server, "no marker", "not a valid marker")

    # A disk more for a group that has a log, whose other disk is refused.
    server = Afterimage(folder, name="grown", groups={"vm1": {"vda": "8MiB"}})
    with server:
        server.stop()
        with open(server.backing(), "r+b") as file:
            file.write(b"changed behind our back")
        server.groups = two
        fallocate_sparse(server.backing("vdb"), 8 << 20)
        server.write_config()
        refused(server, "later: another disk was changed", "the backing was changed")

    # QEMU holds its locks on the image: the start waits a while, then says that it is in use.
    server = Afterimage(folder, name="in-use")
    holder = Child(["qemu-nbd", "-f", "raw", "-k", folder / "holder.sock", "-t", server.backing()], folder / "holder.log")
    wait_until(lambda: (folder / "holder.sock").exists(), "qemu-nbd to hold the image")

    # Two servers, one backing and log; both refusals are waited for at once.
    with Afterimage(folder, name="first") as first, ThreadPoolExecutor() as pool:
        held = pool.submit(refused, server, "in use", f"is in use by qemu-nbd (pid {holder.pid})")
        second = Afterimage(folder, name="second", create_backings=False)
        os.symlink(first.backing(), second.backing())
        said = second.start_refused()
        expect(f"{second.backing()} is in use by afterimage (pid {first.child.pid})" in said,
               f"a backing of another server:\n{said}")
        second.close()
        held.result()
    holder.kill()

    # And the other way round: while we serve it, QEMU may not open it.
    with Afterimage(folder, name="ours") as server:
        run("qemu-io", "-f", "raw", "-c", "write 0 4096", server.backing(), ok=False)

    server = Afterimage(folder, name="changed")
    with server:
        with Connection(server.socket).open_export("vm1/vda") as client:
            client.write(0, b"x" * 4096)
        server.stop()
        with open(server.backing(), "r+b") as file:
            file.seek(1 << 20)
            file.write(b"changed behind our back")
        said = server.start_refused()
        expect(f"{server.backing()}.afterimage: the backing was changed" in said, f"changed backing:\n{said}")

    server = Afterimage(folder, name="shrunk")
    with server:
        server.stop()
        os.truncate(server.backing(), 1 << 20)
        said = server.start_refused()
        expect(str(server.backing()) in said and f"has {1 << 20} bytes" in said, f"backing too small:\n{said}")

    # A marker says that another log belongs to the backing.
    server = Afterimage(folder, name="claimed")
    with server:
        server.stop()
        server.log_path().rename(folder / "taken-away.log")
        for ring in server.ring_dir.iterdir():
            ring.unlink()
        said = server.start_refused()
        expect(f"{server.backing()}: the newest writes of this disk are in the log {server.log_path()}" in said,
               f"claimed backing:\n{said}")


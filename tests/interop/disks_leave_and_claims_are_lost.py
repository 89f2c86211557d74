"""A disk is taken out of a group, and a claim is lost: nothing answered is lost by either.

After a kill, writes of the disk are in the log only: a start without it, or without its claim, is refused
with what to do, and changes nothing. After a clean stop the disk may leave, also in the middle of the
initial copy, which then goes on without it; and it comes back as a new one.
"""

from harness.nbd_client import Connection
from harness.process import expect, expect_equal, scratch
from harness.server import Afterimage

SIZES = {"vda": 8 << 20, "vdb": 12 << 20}
BLOCKS = 200


def content(disk, block):
    return bytes([block % 251 + 1, ord(disk[-1])]) * 2048


def write(server):
    for disk in server.groups["vm1"]:
        with Connection(server.socket).open_export(f"vm1/{disk}") as connection:
            for block in range(BLOCKS):
                connection.write(block * 4096, content(disk, block))


def all_there(server, what, disks=SIZES):
    for disk in disks:
        with Connection(server.socket).open_export(f"vm1/{disk}") as connection:
            seen = connection.read(0, BLOCKS * 4096)
        wrong = [block for block in range(BLOCKS) if seen[block * 4096:][:4096] != content(disk, block)]
        expect_equal(wrong, [], f"{what}: wrong blocks of {disk}")


def configure(server, disks):
    server.groups = {"vm1": {disk: SIZES[disk] for disk in disks}}
    server.write_config()


with scratch() as folder:
    # So slow that the initial copy is still at the first disk when that disk leaves.
    server = Afterimage(folder, groups={"vm1": SIZES}, log="64MiB", ring="16MiB", group_lines='pass_rate = "4KiB"')
    claim = server.backing("vda").with_name(server.backing("vda").name + ".afterimage")
    with server:
        write(server)
        server.kill()
        before = server.backing("vda").read_bytes()
        for command in ("serve", "recover"):
            configure(server, ["vdb"])
            refused = (server.start_refused() if command == "serve"
                       else server.cli("recover", "vm1", "--to-plain", ok=False).stderr)
            expect("is not configured any more" in refused and "stop the group cleanly" in refused,
                   f"{command} without vda: {refused}")
            configure(server, SIZES)
            claim.rename(folder / "away")
            refused = (server.start_refused() if command == "serve"
                       else server.cli("recover", "vm1", "--to-plain", ok=False).stderr)
            expect(str(claim) in refused and "put it back" in refused, f"{command} without vda's claim: {refused}")
            (folder / "away").rename(claim)
        expect(server.backing("vda").read_bytes() == before, "nobody has written to vda meanwhile")
        server.start()
        all_there(server, "after a kill and four refusals")

        server.stop()
        server.group_lines = ""
        configure(server, ["vdb"])
        server.start()
        all_there(server, "vda has left after a clean stop", ["vdb"])
        server.wait_shipped()
        restored = server.restore("latest", folder / "without")
        expect((restored / "vdb.raw").read_bytes() == server.backing("vdb").read_bytes(), "vdb restored, vda away")
        expect(not (restored / "vda.raw").exists(), "no vda in the newest point")
        server.stop()
        configure(server, SIZES)
        server.start()
        all_there(server, "vda is back")
        server.wait_shipped()
        restored = server.restore("latest", folder / "with")
        for disk in SIZES:
            expect((restored / f"{disk}.raw").read_bytes() == server.backing(disk).read_bytes(), f"{disk} restored")

        # Clean as well, a lost claim is not taken for a new disk: the log knows that it had one.
        server.stop()
        claim.rename(folder / "away")
        refused = server.start_refused()
        expect(str(claim) in refused and "put it back" in refused, f"clean, without vda's claim: {refused}")
        (folder / "away").rename(claim)
        server.start()
        all_there(server, "in the end")
        server.stop()

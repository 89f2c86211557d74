"""A repository's folder vanishes, is exchanged, and comes back: history never begins anew in its place.

While the daemon runs, at its start, and at a replica: what stands where the folder was (nothing, an empty
mount point, another repository) is left as it is, the state says what to do, the guest goes on, and
shipping goes on by itself when the folder is back. Only who says that it is lost gets a new one.
"""

import shutil

from harness.nbd_client import Connection
from harness.process import expect, expect_equal, scratch, wait_until
from harness.server import Afterimage
from harness.sites import Certificates, primary, replica

SIZE = 8 << 20
BLOCK = 4096


def write(server, number):
    with Connection(server.socket).open_export("vm1/vda") as connection:
        for block in range(64):
            connection.write(block * BLOCK, bytes([number, block]) * (BLOCK // 2), 1)


def holds(restored, number, what):
    seen = (restored / "vda.raw").read_bytes()[:64 * BLOCK]
    expect(seen == b"".join(bytes([number, block]) * (BLOCK // 2) for block in range(64)), f"{what}: content")


def is_away(server, *words):
    """Waits until the target is away for this reason; it stays so over several attempts."""
    def seen():
        target = server.group_status()["targets"][0]
        return target["state"] == "away" and all(word in (target.get("error") or "") for word in words)
    wait_until(seen, f"the target to be away: {words}")
    status = server.group_status()
    expect_equal(status["state"], "degraded", "the group's state")


def repositories_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def while_it_runs(server):
    folder, away = server.repository, server.repository.with_name("away")
    write(server, 1)
    # What lies before the end of the initial copy is no recovery point.
    server.wait_shipped()
    server.checkpoint("one")
    server.wait_shipped()

    folder.rename(away)
    write(server, 2)
    is_away(server, "is gone", "mount it or put it back")
    expect(not folder.exists(), "no folder was made in its place")
    # An unmounted disk leaves an empty folder.
    folder.mkdir()
    write(server, 3)
    server.checkpoint("three")
    is_away(server, "is gone")
    expect_equal(repositories_in(folder), [], "the mount point stays empty")
    folder.rmdir()
    away.rename(folder)
    server.wait_shipped()
    holds(server.restore("one", server.folder / "r1"), 1, "from before")
    holds(server.restore("three", server.folder / "r3"), 3, "written while it was away")


def at_a_start(server):
    folder, away = server.repository, server.repository.with_name("away")
    write(server, 4)
    server.wait_shipped()
    server.stop()
    folder.rename(away)
    server.start()
    is_away(server, "nothing of group", "--accept-new-repository")
    expect(not folder.exists(), "a start makes none where there was one")
    folder.mkdir()
    write(server, 5)
    is_away(server, "nothing of group", "--accept-new-repository")
    expect_equal(repositories_in(folder), [], "the mount point stays empty")
    folder.rmdir()
    away.rename(folder)
    server.wait_shipped()
    holds(server.restore("latest", server.folder / "r5"), 5, "written while it was away")
    holds(server.restore("one", server.folder / "r1again"), 1, "from before")


def another_and_a_copy(server, folder_of_another):
    folder, away = server.repository, server.repository.with_name("away")
    folder.rename(away)
    shutil.copytree(folder_of_another, folder)
    before = repositories_in(folder)
    write(server, 6)
    is_away(server, "is another one")
    expect_equal(repositories_in(folder), before, "another repository is left alone")
    shutil.rmtree(folder)
    # Moved to another disk: a copy is the same repository.
    shutil.copytree(away, folder)
    server.wait_shipped()
    holds(server.restore("latest", server.folder / "r6"), 6, "into the copy")
    shutil.rmtree(away)


def lost_for_good(server):
    server.stop()
    shutil.rmtree(server.repository)
    server.start()
    is_away(server, "--accept-new-repository")
    server.stop()
    server.start("--accept-new-repository")
    server.checkpoint("anew")
    server.wait_shipped()
    holds(server.restore("latest", server.folder / "r7"), 6, "begun anew")
    server.stop()


def at_a_replica(folder):
    certificates = Certificates(folder / "pki")
    there = replica(folder, certificates)
    here = primary(folder, certificates, there.repository_port, groups={"vm1": {"vda": SIZE}})
    kept, away = there.repository, there.repository.with_name("away")
    with there, here:
        write(here, 1)
        here.wait_shipped()
        here.checkpoint("one")
        here.wait_shipped()
        kept.rename(away)
        write(here, 2)
        is_away(here, "is gone")
        expect(not kept.exists(), "no folder was made in its place")
        there.stop()
        there.start()
        is_away(here, "nothing of group")
        expect(not kept.exists(), "a start makes none, either")
        away.rename(kept)
        here.wait_shipped()
        holds(there.restore("latest", folder / "replica-latest"), 2, "at the replica")
        holds(there.restore("one", folder / "replica-one"), 1, "at the replica, from before")
        here.stop()
        there.stop()


with scratch() as folder:
    other = Afterimage(folder, name="other", groups={"vm1": {"vda": SIZE}})
    with other:
        write(other, 9)
        other.wait_shipped()
        other.stop()
    server = Afterimage(folder, groups={"vm1": {"vda": SIZE}})
    with server:
        while_it_runs(server)
        at_a_start(server)
        another_and_a_copy(server, other.repository)
        lost_for_good(server)
    at_a_replica(folder)

"""Two repositories with different histories of a group: one log becomes the newest epoch of both.

The first has had one epoch of the group, the second three. The log got its number from the
first; at the second it is new, and gets a higher one, which the first follows. All earlier
points stay.
"""

from harness.model import Disk, same_content
from harness.process import expect, expect_equal, scratch, wait_until
from harness.server import Afterimage

SIZE = 8 << 20


def restored(server, repository, point, folder):
    """The disk at a point, out of that repository."""
    server.cli("restore", "--repository", repository, f"vm1@{point}", folder)
    return folder / "vda.raw"


with scratch() as folder:
    less, more = (f"file://{folder}/{name}" for name in ("less", "more"))
    server = Afterimage(folder, groups={"vm1": {"vda": SIZE}}, to=[more], replica=False)
    content = bytes(SIZE)
    moments = {less: {}, more: {}}

    def write(label, repository):
        """Some writes and a checkpoint that all targets hold."""
        global content
        disk = Disk(server.socket, "vm1/vda", SIZE, seed=label)
        disk.content[:] = content
        server.wait_shipped()
        for _ in range(30):
            disk.write_somewhere()
        server.checkpoint(label)
        server.wait_shipped()
        content = bytes(disk.content)
        for url in repository:
            moments[url][label] = content
        disk.close()

    with server:
        for number in range(3):
            write(f"more-{number}", [more])
            expect_equal(server.group_status()["epoch"], number + 1, "epoch")
            # A new log: nobody shall take it for the continuation of the old one.
            server.cli("detach", "vm1")
            server.stop()
            server.log_path().unlink()
            if number == 2:
                server.to = [less]
                server.write_config()
            server.start()
        write("less-0", [less])
        expect_equal(server.group_status()["epoch"], 1, "epoch of the log at its first target")
        server.stop()

        server.to = [less, more]
        server.write_config()
        server.start()
        wait_until(lambda: server.group_status()["epoch"] == 4, "the epoch above all that both have seen")
        write("both-0", [less, more])
        states = [target["state"] for target in server.group_status()["targets"]]
        expect_equal(states, ["shipping", "shipping"], "both targets")
        server.kill()
        server.start()
        write("both-1", [less, more])
        expect_equal(server.group_status()["epoch"], 4, "the epoch after a kill")

        for url, points in moments.items():
            listed = server.cli_json("points", "vm1", "--repository", url)
            expect_equal([point["label"] for point in listed["points"]], list(points), f"points of {url}")
            for label, wanted in points.items():
                out = folder / f"out-{url.rsplit('/')[-1]}-{label}"
                same_content(f"{label} of {url}", restored(server, url, label, out), wanted)
            server.cli("verify", "vm1", "--repository", url)
            causes = [gap["cause"] for gap in listed["gaps"]]
            expect(causes and set(causes) == {"new-epoch"}, f"gaps of {url}: {causes}")

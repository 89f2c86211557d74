"""A bucket as target and repository: points restore exactly, over restarts of both sides.

The real server's create-if-absent is what every commit hangs on; the probe at the opening
leaves nothing behind, and a start without the bucket's server keeps no guest waiting.
"""

from harness.model import Disk, same_content, same_export
from harness.objects import SeaweedFs
from harness.process import expect, expect_equal, say, scratch, wait_until
from harness.server import Afterimage

SIZE = 24 << 20


def away(server):
    """The target's state, once it is known to be away."""
    target = server.group_status()["targets"][0]
    return target["state"] == "away" and target["error"]


with scratch() as folder, SeaweedFs(folder) as s3:
    url = "s3://history/dr/site-1"
    server = Afterimage(folder, groups={"vm1": {"vda": SIZE}}, to=[url], replica=f'repository = "{url}"',
                        environment=s3.environment)
    said = server.start_refused()
    expect("s3://history" in said and "no such bucket" in said, f"a missing bucket is named:\n{said}")

    s3.make_bucket("history")
    moments = {}
    with server:
        disk = Disk(server.socket, "vm1/vda", SIZE)
        server.wait_shipped()
        for number in range(4):
            for _ in range(60):
                disk.write_somewhere()
            label = f"moment-{number}"
            moments[label] = (server.checkpoint(label), bytes(disk.content))
            if number == 1:
                server.wait_shipped()
                server.kill()
                server.start()
                disk = Disk(server.socket, "vm1/vda", SIZE)
                disk.content[:] = moments[label][1]
        server.wait_shipped()
        listed = {point["label"]: point["lsn"] for point in server.points()["points"]}
        expect_equal(listed, {label: lsn for label, (lsn, _) in moments.items()}, "listed points")
        for label, (_, content) in moments.items():
            same_content(label, server.restore(label, folder / label) / "vda.raw", content)
        same_export("an exported image", server.export("moment-2")["vda"], moments["moment-2"][1], folder)
        server.cli("verify", "vm1")
        names = s3.objects("history")
        expect(all(name.startswith("dr/site-1/") for name in names), f"all lies below the prefix: {names}")
        expect(not [name for name in names if "probe" in name], f"no probe stays behind: {names}")

        say("the bucket's server is away")
        s3.kill()
        for _ in range(30):
            disk.write_somewhere()
        disk.flush()
        print(f"while away: {wait_until(lambda: away(server), 'the target to be away')}")
        server.kill()
        server.start()
        disk.close()
        content = bytes(disk.content)
        disk = Disk(server.socket, "vm1/vda", SIZE)
        disk.content[:] = content
        for _ in range(30):
            disk.write_somewhere()
        disk.flush()
        expect(away(server) or wait_until(lambda: away(server), "the target to be away"), "away after the start")

        say("the bucket's server is back")
        s3.start()
        server.checkpoint("back")
        server.wait_shipped()
        same_content("back", server.restore("back", folder / "back") / "vda.raw", bytes(disk.content))
        same_content("moment-0", server.restore("moment-0", folder / "again") / "vda.raw", moments["moment-0"][1])
        server.cli("verify", "vm1")
        # Another machine with no more than the bucket's URL.
        server.cli("restore", "--repository", url, "vm1@moment-3", folder / "elsewhere")
        same_content("elsewhere", folder / "elsewhere/vda.raw", moments["moment-3"][1])

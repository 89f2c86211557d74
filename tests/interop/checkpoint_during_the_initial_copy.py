"""A checkpoint that no target can restore says so: during the initial copy, and while a target is away."""

from harness.model import Disk, same_content
from harness.nbd_client import Connection
from harness.process import expect, expect_equal, scratch, wait_until
from harness.server import Afterimage
from harness.sites import Certificates, primary, replica

SIZE = 32 << 20

with scratch() as folder:
    server = Afterimage(folder, groups={"vm1": {"vda": SIZE}}, group_lines='pass_rate = "1MiB"')
    with open(server.backing(), "r+b") as file:
        file.write(bytes(range(256)) * (16 << 12))  # 16 MiB that must be copied
    with server:
        wait_until(lambda: server.group_status()["targets"][0]["state"] == "copying", "the initial copy")
        done = server.cli_json("checkpoint", "vm1", "--label", "early")
        expect_equal([(at["target"], at["certain"]) for at in done["no_point_at"]],
                     [(f"file://{server.repository}", True)], "where it is no point")
        said = server.cli("checkpoint", "vm1").stdout
        expect("NO recovery point" in said and "copy" in said, f"the command says so:\n{said}")
        said = server.cli("status").stdout
        expect("last checkpoint" in said and "NO recovery point" in said, f"status says so:\n{said}")
        server.cli("restore", "vm1@early", folder / "none", ok=1)
        expect(not (folder / "none/vda.raw").exists(), "nothing is restored")

        # A reload lifts the limit, and the copy ends.
        server.config.write_text(server.config.read_text().replace('pass_rate = "1MiB"', ""))
        server.child.process.send_signal(1)
        server.wait_shipped()
        with Connection(server.socket).open_export("vm1/vda") as client:
            client.write(4096, b"x" * 4096)
        done = server.cli_json("checkpoint", "vm1", "--label", "late")
        expect_equal(done["no_point_at"], [], "a point at every target")
        server.wait_shipped()
        expect_equal([point["label"] for point in server.points()["points"]], ["late"], "the points")
        expect("NO recovery point" not in server.cli("status").stdout, "status is content")

    certificates = Certificates(folder / "ca")
    dr = replica(folder, certificates)
    site = primary(folder, certificates, dr.repository_port, groups={"vm1": {"vda": 1 << 20}})
    with site:
        # The replica has never been there.
        wait_until(lambda: site.group_status()["targets"][0]["state"] == "away", "the target to be away")
        done = site.cli_json("checkpoint", "vm1", "--label", "unknown")
        expect_equal([at["certain"] for at in done["no_point_at"]], [True], "nothing has been copied yet")
        with dr:
            site.wait_shipped()
            disk = Disk(site.socket, "vm1/vda", 1 << 20)
            disk.write(0, b"y" * 512)
            # Reached and complete: it becomes a point when it has been shipped, whatever happens to the link.
            dr.kill()
            wait_until(lambda: site.group_status()["targets"][0]["state"] == "away", "the target to be away again")
            done = site.cli_json("checkpoint", "vm1", "--label", "offline")
            expect_equal(done["no_point_at"], [], "it will be one")
            dr.start()
            site.wait_shipped()
            same_content("offline", dr.restore("offline", folder / "offline") / "vda.raw", bytes(disk.content))

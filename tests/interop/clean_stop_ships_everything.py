"""A clean stop leaves nothing unshipped while the target can be reached, however long `ship_interval` is.

And while it cannot be reached, the stop does not wait for it for ever: the log keeps what is missing.
"""

from harness.model import Disk, same_content
from harness.process import expect, expect_equal, scratch, wait_until
from harness.server import Afterimage
from harness.sites import Certificates, primary, replica

SIZE = 16 << 20

with scratch() as folder:
    # Into a folder. Nothing closes the last segment but the end itself.
    server = Afterimage(folder, groups={"vm1": {"vda": SIZE}}, ship_interval="1h")
    with server:
        disk = Disk(server.socket, "vm1/vda", SIZE)
        server.checkpoint("begin")  # Closes a segment.
        server.wait_shipped()
        for _ in range(60):
            disk.write_somewhere()
        last = server.group_status()["appended_lsn"]
        expect(server.group_status()["targets"][0]["acked_lsn"] < last, "something is unshipped")
        disk.close()
        server.stop()
        expect("unshipped" not in server.child.log(), f"nothing is said to be unshipped:\n{server.child.log_tail()}")
        expect_equal(server.points()["spans"][-1]["last_lsn"], last, "the last record at the repository")
        same_content("latest", server.restore("latest", folder / "out") / "vda.raw", bytes(disk.content))
        same_content("the plain backing", server.backing(), bytes(disk.content))
        server.start()
        expect(not server.group_status()["verify_due"], "the stop was clean")
        server.stop()

    # Over TLS, with the replica there and then away.
    certificates = Certificates(folder / "ca")
    dr = replica(folder, certificates)
    site = primary(folder, certificates, dr.repository_port, groups={"vm1": {"vda": SIZE}}, ship_interval="1h")
    with dr, site:
        disk = Disk(site.socket, "vm1/vda", SIZE)
        site.checkpoint("begin")
        site.wait_shipped()
        for _ in range(60):
            disk.write_somewhere()
        disk.close()
        site.stop()
        same_content("latest", dr.restore("latest", folder / "remote") / "vda.raw", bytes(disk.content))
        before = bytes(disk.content)

        site.start()
        disk = Disk(site.socket, "vm1/vda", SIZE)
        disk.content[:] = before
        site.checkpoint("again")
        site.wait_shipped()
        for _ in range(20):
            disk.write_somewhere()
        dr.kill()
        wait_until(lambda: site.group_status()["targets"][0]["state"] == "away", "the target to be away")
        disk.close()
        site.stop()
        expect("unshipped records in the log" in site.child.log(), "the log says what is missing")
        dr.start()
        site.start()
        site.checkpoint("late")
        site.wait_shipped()
        same_content("late", dr.restore("late", folder / "late") / "vda.raw", bytes(disk.content))
        expect(len(dr.points()["spans"]) == 1, f"no gap: {dr.points()['spans']}")

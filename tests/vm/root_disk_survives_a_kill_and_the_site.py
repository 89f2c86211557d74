"""A guest's root disk: the server is killed under load, the site is lost, the replica's image boots.

Files are written and synced inside; a checkpoint; more writes; kill -9 of the server
under load, with QEMU's reconnect-delay bridging it; the guest goes on and its file
system is clean. Then everything of the primary is destroyed, and the checkpoint's
image is booted from the replica: it holds exactly the files of that moment.
"""
# limit: 1200

from harness.process import expect, expect_equal, run, say, scratch
from harness.server import STANDIN, Afterimage, Server
from urllib.parse import parse_qs, urlparse
from vm.guest import Guest, copy_root, nbd_root, nbd_root_overlay

SUMS = "cd /srv/data && sha256sum *"
FIRST_FILES = """
mkdir -p /srv/data
for number in $(seq 1 20); do
    head -c $((number * 37000)) /dev/urandom > /srv/data/file-$number
done
sync
"""
LATER_FILES = """
rm /srv/data/file-3
head -c 500000 /dev/urandom > /srv/data/file-5
echo later > /srv/data/written-later
sync
"""
LOAD = """
mkdir -p /srv/load
fio --name=load --directory=/srv/load --size=64m --rw=randwrite --bsrange=4k-64k --numjobs=2 \
    --fsync=16 --verify=crc32c --verify_backlog=256 --number_ios=1500 --ioengine=psync >/srv/load/report
"""

with scratch() as folder:
    server = Server(folder, groups={"vm1": {"vda": "1600MiB"}}, log="512MiB", ring="64MiB")
    copy_root(server.backing())
    with server:
        with Guest(folder, "primary", nbd_root(server.socket, "vm1/vda")) as guest:
            guest.wait_until_up()
            guest.run(FIRST_FILES)
            wanted = guest.run(SUMS)
            if not STANDIN:
                server.checkpoint("monday")
            guest.run(LATER_FILES)

            load = guest.start(LOAD)
            guest.run("while [ $(stat -c %b /srv/load/load.1.0 2>/dev/null || echo 0) -lt 2000 ]; do sleep 0.2; done")
            for round_number in range(2):
                server.kill()
                say("killed the server under load")
                server.start()
                guest.run("echo still here; sync")
            guest.finish(load, patience_seconds=600)
            expect_equal(guest.run_state(), "running", "state of QEMU after the kills")
            later = guest.run(SUMS)
            expect(later != wanted, "the files have changed since the checkpoint")
            expect_equal(guest.run("dmesg --level=err,crit,alert,emerg | grep -i vda || true"), "", "errors of the disk")
            guest.power_off()
        if not STANDIN:
            server.wait_shipped(patience_seconds=600)
            server.cli("detach", "vm1")
        server.stop()
        checked = run("e2fsck", "-fn", server.backing(), ok=None)
        expect(checked.returncode == 0, f"the file system is clean:\n{checked.stdout}")

    if not STANDIN:
        # The site is lost: disk, log and ring are gone.
        server.backing().unlink()
        server.log_path().unlink()
        with Afterimage(folder, name="dr", groups={}, replica=f'repository = "file://{server.repository}"') as dr:
            uri = urlparse(dr.export("monday")["vda"])
            overlay = folder / "overlay.qcow2"
            run("qemu-img", "create", "-q", "-f", "qcow2", overlay, "1600M")
            socket_path, export = parse_qs(uri.query)["socket"][0], uri.path.lstrip("/")
            with Guest(folder, "revived", nbd_root_overlay(socket_path, export, overlay)) as guest:
                guest.wait_until_up()
                expect_equal(guest.run(SUMS), wanted, "the files of the checkpoint")
                expect_equal(guest.run("ls /srv"), "data\n", "what else there was")
                guest.power_off()

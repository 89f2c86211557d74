"""A guest's root disk: the server is killed under load, the site is lost, the replica's image boots.

Files are written and synced inside; a checkpoint; more writes; kill -9 of the server
under load, with QEMU's reconnect-delay bridging it; the guest goes on. All is shipped
over mutual TLS to a replica. Then server and guest are killed under load and everything
of the primary is destroyed: disk, log and ring. The checkpoint's image is booted from
the replica and holds exactly the files of that moment; the newest image, restored, has
a file system that its journal makes clean, and the files of later.
"""
# limit: 1200

import shutil
from urllib.parse import parse_qs, urlparse

from harness.process import expect, expect_equal, run, say, scratch
from harness.server import STANDIN, Server
from harness.sites import Certificates, primary, replica
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



def killed_under_load(guest, server):
    """The guest goes on through two kills of the server while it writes, and finds no error."""
    load = guest.start(LOAD)
    guest.run("while [ $(stat -c %b /srv/load/load.1.0 2>/dev/null || echo 0) -lt 2000 ]; do sleep 0.2; done")
    for _ in range(2):
        server.kill()
        say("killed the server under load")
        server.start()
        guest.run("echo still here; sync")
    guest.finish(load, patience_seconds=600)
    expect_equal(guest.run_state(), "running", "state of QEMU after the kills")
    expect_equal(guest.run("dmesg --level=err,crit,alert,emerg | grep -iE 'vda|ext4' || true"), "",
                 "errors of disk and file system")


def only_the_client(folder):
    """The guest's half of the check, at a server that is not ours."""
    server = Server(folder, groups={"vm1": {"vda": "1600MiB"}})
    copy_root(server.backing())
    with server, Guest(folder, "primary", nbd_root(server.socket, "vm1/vda")) as guest:
        guest.wait_until_up()
        guest.run(FIRST_FILES + LATER_FILES)
        killed_under_load(guest, server)
        guest.power_off()


def the_site_is_lost(folder, dr, site):
    """Guest and server until both are killed; returns the digests of the checkpoint's files."""
    copy_root(site.backing())
    with site, Guest(folder, "primary", nbd_root(site.socket, "vm1/vda")) as guest:
        guest.wait_until_up()
        guest.run(FIRST_FILES)
        wanted = guest.run(SUMS)
        site.checkpoint("monday")
        guest.run(LATER_FILES)
        expect(guest.run(SUMS) != wanted, "the files have changed since the checkpoint")
        killed_under_load(guest, site)

        # Wanted is there, more is under way: the end of the site, without a word of farewell.
        shipped = site.wait_shipped(patience_seconds=600)
        guest.start(LOAD)
        guest.run("sleep 1")
        site.kill()
        guest.kill()
        say(f"killed server and guest; LSN {shipped} and what came after it was shipped")
        shutil.rmtree(site.folder)
        shutil.rmtree(site.ring_dir)
        expect(dr.child.running(), "the replica is alive")
        return wanted


def boots_at_the_checkpoint(folder, dr, wanted):
    """The image of the checkpoint, with an overlay for the guest's writes."""
    uri = urlparse(dr.export("monday")["vda"])
    overlay = folder / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", overlay, "1600M")
    socket_path, export = parse_qs(uri.query)["socket"][0], uri.path.lstrip("/")
    with Guest(folder, "revived", nbd_root_overlay(socket_path, export, overlay)) as guest:
        guest.wait_until_up()
        expect_equal(guest.run(SUMS), wanted, "the files of the checkpoint")
        expect_equal(guest.run("ls /srv"), "data\npg\n", "what else there was")
        guest.power_off()


def newest_is_clean(folder, dr):
    """The newest moment: the journal makes the file system clean, and the later file is there."""
    disk = dr.restore("latest", folder / "latest") / "vda.raw"
    replayed = run("e2fsck", "-fp", disk, ok=None)
    expect(replayed.returncode in (0, 1), f"the journal is enough:\n{replayed.stdout}{replayed.stderr}")
    run("e2fsck", "-fn", disk)
    expect_equal(run("debugfs", "-R", "cat /srv/data/written-later", disk).stdout, "later\n", "the later file")


with scratch() as folder:
    if STANDIN:
        only_the_client(folder)
    else:
        certificates = Certificates(folder / "ca")
        with replica(folder, certificates) as dr:
            site = primary(folder, certificates, dr.repository_port, groups={"vm1": {"vda": "1600MiB"}},
                           log="512MiB", ring="64MiB")
            wanted = the_site_is_lost(folder, dr, site)
            newest_is_clean(folder, dr)
            boots_at_the_checkpoint(folder, dr, wanted)

"""The systemd units in a real system: socket activation, kills, restarts, a ring that survives a stop."""
# limit: 1500

from harness.process import expect, expect_equal, scratch
from vm.guest import Guest, copy_root, data_disk, raw_root
from vm.tools_disk import INSTALL, tools_disk

with scratch() as folder:
    tools = data_disk("tools", tools_disk(folder), "tools")
    with Guest(folder, "guest", raw_root(copy_root(folder / "root.raw")), more=tools) as guest:
        guest.wait_until_up()
        guest.run(INSTALL)
        # Only the socket: the first client starts the service, which is ready once it has recovered.
        guest.run("systemctl enable afterimage.socket afterimage.service; systemctl start afterimage.socket")
        expect_equal(guest.run("systemctl is-active afterimage.service || true").strip(), "inactive", "the service")
        inside = ("PYTHONPATH=/tools PYTHONDONTWRITEBYTECODE=1 python3 /tools/inside/kills_under_systemd.py "
                  ">/dev/ttyS0 2>&1")
        result = guest.finish(guest.start(inside), ok=None, patience_seconds=600)
        journal = guest.run("journalctl --no-pager -u afterimage.service | tail -60")
        expect(result.exit_code == 0, f"the end of the console says why; the service said:\n{journal}")

        # Stop and start: the ring is the same file, and the disk the same content.
        read_all = "nbd-client -unix /run/afterimage/nbd.sock /dev/nbd0 -N vm1/vda && sha256sum < /dev/nbd0 && nbd-client -d /dev/nbd0"
        guest.run("modprobe nbd")
        before = guest.run(read_all).splitlines()
        ring = "find /dev/shm -type f -name 'afterimage-vm1-*' -printf '%i %p\\n'"
        rings = guest.run(ring)
        expect_equal(len(rings.splitlines()), 1, f"rings in /dev/shm: {rings}")
        guest.run("systemctl stop afterimage.service afterimage.socket")
        expect_equal(guest.run("systemctl is-active afterimage.service || true").strip(), "inactive", "the stop")
        expect_equal(guest.run(ring), rings, "inode and name of the ring after the stop")
        guest.run("systemctl start afterimage.socket afterimage.service")
        expect_equal(guest.run(ring), rings, "inode and name of the ring after the start")
        expect_equal(guest.run(read_all).splitlines(), before, "the disk's digest after stop and start")
        guest.run("afterimage status; afterimage points vm1 >/dev/null")

        # It starts with the system, and nothing is failed afterwards.
        guest.run("systemctl is-enabled afterimage.socket afterimage.service")
        expect_equal(guest.run("systemctl --failed --no-legend --plain").strip(), "", "failed units")
        guest.power_off()

"""The systemd units in a real system: their settings, socket activation, kills, restarts, a ring that survives a stop.

And the watchdog's unit: the daemon is killed at every step of a checkpoint with a frozen guest.
"""
# limit: 1500

from harness.process import expect, expect_equal, scratch
from vm.guest import Guest, copy_root, data_disk, raw_root
from vm.tools_disk import INSTALL, tools_disk

# As systemd understood the unit, which says nothing about a line that it did not.
SETTINGS = {
    "Type": "notify", "OOMScoreAdjust": "-900", "LimitMEMLOCK": "infinity", "RuntimeDirectoryPreserve": "yes",
    "TimeoutStartUSec": "10min", "TimeoutStopUSec": "10min", "KillMode": "mixed", "Restart": "always",
}
# What must find its disks, and may need them until it is down.
GUESTS = {"libvirtd.service", "virtqemud.service", "libvirt-guests.service", "pve-guests.service"}
FROZEN_GROUP = """\
[[group]]
name = "vm2"
log = { path = "/var/lib/afterimage/vm2.log", size = "64MiB" }
ring = "8MiB"
to = ["file:///var/lib/afterimage/repo"]
  [[group.guest]]
  qga = "/run/vm2.qga"
  [[group.disk]]
  name = "vda"
  path = "/var/lib/afterimage/vm2.raw"
"""


def shown(guest, unit):
    """The properties of a unit."""
    lines = guest.run(f"systemctl show {unit}").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def settings_are_taken(guest):
    """What the design promises of the units."""
    service, watchdog = shown(guest, "afterimage.service"), shown(guest, "afterimage-watchdog.service")
    expect_equal({key: service[key] for key in SETTINGS}, SETTINGS, "settings of the service")
    missing = GUESTS - set(service["Before"].split())
    expect_equal(missing, set(), f"guests that it does not start before; Before={service['Before']}")
    expect("afterimage.service" in watchdog["Before"].split(), f"the watchdog comes first: {watchdog['Before']}")
    expect_equal(watchdog["OOMScoreAdjust"], "-900", "the watchdog's OOMScoreAdjust")
    # The guest has no manual pages.
    warnings = guest.run("systemd-analyze verify --man=no /etc/systemd/system/afterimage*.service 2>&1 | grep -i afterimage || true")
    expect_equal(warnings.strip(), "", "what systemd says of the units")


def process_has_them(guest):
    """The kernel's side of it, and the watchdog beside the daemon in a group of its own."""
    of = "/proc/$(systemctl show -P MainPID afterimage.service)"
    expect_equal(guest.run(f"cat {of}/oom_score_adj").strip(), "-900", "oom_score_adj of the daemon")
    locked = guest.run(f"grep 'Max locked memory' {of}/limits").split()
    expect_equal(locked[3:5], ["unlimited", "unlimited"], "locked memory of the daemon")
    expect_equal(guest.run("systemctl is-active afterimage-watchdog.service || true").strip(), "active", "the watchdog")


def run_inside(guest, script):
    """Run a script of `inside/` that says on the console what it does."""
    inside = f"PYTHONPATH=/tools PYTHONDONTWRITEBYTECODE=1 python3 /tools/inside/{script} >/dev/ttyS0 2>&1"
    result = guest.finish(guest.start(inside), ok=None, patience_seconds=600)
    journal = guest.run("journalctl --no-pager -u afterimage.service | tail -60")
    expect(result.exit_code == 0, f"the end of the console says why; the service said:\n{journal}")


with scratch() as folder:
    tools = data_disk("tools", tools_disk(folder, {"vm2.toml": FROZEN_GROUP}), "tools")
    with Guest(folder, "guest", raw_root(copy_root(folder / "root.raw")), more=tools) as guest:
        guest.wait_until_up()
        # The client writes 32 MiB of the disk, and an emulated guest takes its time to read the rest.
        guest.run(INSTALL + "truncate -s 64M /var/lib/afterimage/vda.raw")
        # Only the socket: the first client starts the service, which is ready once it has recovered.
        settings_are_taken(guest)
        guest.run("systemctl enable afterimage.socket afterimage.service afterimage-watchdog.service; "
                  "systemctl start afterimage-watchdog.service afterimage.socket")
        expect_equal(guest.run("systemctl is-active afterimage.service || true").strip(), "inactive", "the service")
        run_inside(guest, "kills_under_systemd.py")

        process_has_them(guest)
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
        watchdog = guest.run("systemctl is-active afterimage-watchdog.service || true").strip()
        expect_equal(watchdog, "active", "the watchdog while the daemon is stopped")
        expect(guest.run("ls -d /run/afterimage").strip() != "", "the runtime folder stays")
        guest.run("systemctl start afterimage.socket afterimage.service")
        expect_equal(guest.run(ring), rings, "inode and name of the ring after the start")
        expect_equal(guest.run(read_all).splitlines(), before, "the disk's digest after stop and start")
        guest.run("afterimage status; afterimage points vm1 >/dev/null")

        guest.run("mkdir -p /etc/afterimage/groups.d && cp /tools/inside/vm2.toml /etc/afterimage/groups.d/ && "
                  "truncate -s 16M /var/lib/afterimage/vm2.raw && systemctl restart afterimage.service")
        run_inside(guest, "frozen_under_systemd.py")

        # It starts with the system, and nothing is failed afterwards.
        guest.run("systemctl is-enabled afterimage.socket afterimage.service")
        expect_equal(guest.run("systemctl --failed --no-legend --plain").strip(), "", "failed units")
        guest.power_off()

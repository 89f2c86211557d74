"""Two primaries ship to one replica over TLS at once; one of them is killed, the replica restarts."""

from harness.model import Disk, same_content
from harness.process import scratch
from harness.sites import Certificates, primary, replica

SIZE = 24 << 20

with scratch() as folder:
    certificates = Certificates(folder / "ca")
    with replica(folder, certificates) as dr:
        port = dr.repository_port
        with primary(folder, certificates, port, name="one", groups={"vm1": {"vda": SIZE}}) as one, \
                primary(folder, certificates, port, name="two", groups={"vm2": {"sda": SIZE}}) as two:
            disks = {"vm1": Disk(one.socket, "vm1/vda", SIZE, 1), "vm2": Disk(two.socket, "vm2/sda", SIZE, 2)}

            def write(count):
                for _ in range(count):
                    for disk in disks.values():
                        disk.write_somewhere()

            write(200)
            one.kill()
            one.start()
            disks["vm1"].close()
            content = disks["vm1"].content
            disks["vm1"] = Disk(one.socket, "vm1/vda", SIZE, 3)
            disks["vm1"].content = content
            dr.kill()
            write(200)
            dr.start()
            write(100)
            for site, group in [(one, "vm1"), (two, "vm2")]:
                site.checkpoint("end", group)
                site.wait_shipped(group)
            for group, name in [("vm1", "vda"), ("vm2", "sda")]:
                target = dr.restore("end", folder / group, group=group)
                same_content(f"{group}/{name}", target / f"{name}.raw", bytes(disks[group].content))
                dr.cli("verify", group)

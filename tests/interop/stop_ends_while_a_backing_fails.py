"""A stop while a backing fails waits for it; told again, it ends at once, says so, and nothing is lost."""

import signal

from harness.devices import FailingFile
from harness.model import Disk
from harness.nbd_client import Connection
from harness.process import expect, expect_equal, fallocate_sparse, scratch, wait_until
from harness.server import Afterimage

SIZE = 32 << 20

with scratch() as folder:
    server = Afterimage(folder, groups={"vm1": {"vda": SIZE}}, create_backings=False)
    image = fallocate_sparse(server.folder / "image", SIZE)
    with FailingFile(server.folder / "failing", image) as failing:
        server.backing().symlink_to(failing.path)
        with server:
            disk = Disk(server.socket, "vm1/vda", SIZE)
            for again in (signal.SIGTERM, signal.SIGINT):
                failing.fail()
                for block in range(0, 2000, 7):
                    disk.write(block * 4096, disk.dice.randbytes(4096))
                wait_until(lambda: server.api_status()["groups"][0]["state"] == "degraded", "the state to say it")
                server.child.process.send_signal(signal.SIGTERM)
                wait_until(lambda: "writing logs back" in server.said(), "the end to begin")
                expect(server.child.running(), "it waits for the backing")
                server.child.process.send_signal(again)
                expect_equal(server.child.wait(), 1, f"exit code after SIGTERM and {again.name}")
                said = server.said()
                expect("nothing is lost: log and ring keep what its disks lack" in said, f"what it says:\n{said}")
                failing.heal()
                server.start()
                disk.close()
                content, dice = disk.content, disk.dice
                disk = Disk(server.socket, "vm1/vda", SIZE)
                disk.content, disk.dice = content, dice
                with Connection(server.socket).open_export("vm1/vda") as reader:
                    expect(reader.read(0, SIZE) == bytes(disk.content), f"everything answered, after {again.name}")
            disk.close()
            server.stop()

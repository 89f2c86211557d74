"""Block devices as log and as backings, also of sizes that are no multiple of 4096.

Written with every kind of request, killed, recovered, stopped, started, detached: the devices
hold exactly what was written, and nothing behind the end of a disk is touched. A device with content
becomes no log; a backing that was written while nobody served it is refused, though no block that the
fingerprint samples has changed; ROTATIONAL is offered where it is true.
"""

import os
from contextlib import ExitStack
from pathlib import Path

from harness.devices import loop_device
from harness.model import Disk, same_content
from harness.nbd_client import Connection
from harness.process import expect, expect_equal, run, scratch
from harness.server import Afterimage

# Sector size of the devices, size of the log, sizes of the disks.
CASES = {
    "sectors-of-512": (512, (32 << 20) + 512 * 5, {"vda": (12 << 20) + 512 * 3, "vdb": (5 << 20) + 512 * 7, "vdc": 512 * 9}),
    "sectors-of-4096": (4096, 32 << 20, {"vda": 12 << 20, "vdb": (5 << 20) + 4096}),
}

ROTATIONAL = 1 << 4


def rotates(device, value):
    """Make a loop device say so, or not."""
    (Path("/sys/block") / Path(device).name / "queue/rotational").write_text(value)


def write_past_the_server(device, at, data):
    """As somebody who has mounted it would."""
    with open(device, "r+b") as file:
        file.seek(at)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


for name, (sector, log_size, sizes) in CASES.items():
    with scratch() as folder, ExitStack() as devices:
        server = Afterimage(folder, groups={"vm1": sizes}, log="32MiB", ring="8MiB", create_backings=False)
        images = {disk: server.folder / f"{disk}.image" for disk in sizes}
        log_image = server.folder / "log.image"
        # Names of their own, as udev and LVM give them: devices are found through links.
        server.log_path().symlink_to(devices.enter_context(loop_device(log_image, log_size, sector)))
        for disk, size in sizes.items():
            device = devices.enter_context(loop_device(images[disk], size, sector))
            rotates(device, "1" if disk == "vda" else "0")
            server.backing(disk).symlink_to(device)
        # As btrfs, ISO 9660, LVM and the second GPT do it.
        last = log_size // 4096 * 4096
        for at in (64 << 10, 32 << 10, 8 << 10, last - 4096):
            write_past_the_server(server.log_path(), at, b"somebody's".ljust(4096))
            said = server.start_refused()
            expect("the device is not empty" in said and f"at byte {at}" in said, f"{name}: content at {at}:\n{said}")
            expect("blkdiscard" in said, f"{name}: what to do:\n{said}")
            write_past_the_server(server.log_path(), at, bytes(4096))
        # Refused when the log is there and the first marker, too: the device is as empty as it was.
        claims = server.folder / "claims"
        claims.mkdir(mode=0o700)
        in_the_way = claims / "vm1.vdb.afterimage"
        in_the_way.symlink_to(folder / "nowhere")
        said = server.start_refused()
        expect("writing a new log" in said and f"{in_the_way}: " in said, f"{name}: a marker that cannot be made:\n{said}")
        with open(server.log_path(), "rb") as log:
            expect_equal(log.read(1 << 20).count(0), 1 << 20, f"{name}: zeroes at the device's begin")
        in_the_way.unlink()
        with server:
            for disk in sizes:
                with Connection(server.socket).open_export(f"vm1/{disk}") as client:
                    expect_equal(bool(client.flags & ROTATIONAL), disk == "vda", f"{name}: {disk} rotates")
            disks = {disk: Disk(server.socket, f"vm1/{disk}", size, seed=disk) for disk, size in sizes.items()
                     if size > 1 << 20}
            small = {disk: Disk(server.socket, f"vm1/{disk}", size) for disk, size in sizes.items() if size <= 1 << 20}

            def write(count):
                """A number of operations on each disk, its very last sector among them."""
                for _ in range(count):
                    for disk in disks.values():
                        disk.write_somewhere()
                for disk in [*disks.values(), *small.values()]:
                    disk.write(len(disk.content) - 512, disk.dice.randbytes(512))
                    disk.write(len(disk.content) - 1000, disk.dice.randbytes(700))

            def again():
                """New connections, the old content."""
                for group in (disks, small):
                    for disk, old in group.items():
                        old.close()
                        group[disk] = Disk(server.socket, f"vm1/{disk}", len(old.content), seed=f"{disk} again")
                        group[disk].content = old.content
                        seen = group[disk].connection.read(0, len(old.content))
                        expect(seen == old.content, f"{name}: {disk} after a start")

            # Not beside the devices: what lies in /dev is gone after a restart of the host.
            claims = {path.name for path in (server.folder / "claims").iterdir()}
            expect_equal(claims, {f"vm1.{disk}.afterimage" for disk in sizes}, f"{name}: claims")
            expect_equal([*Path("/dev").glob("*afterimage*")], [], f"{name}: what lies in /dev")

            for _ in range(3):
                write(120)
                server.kill()
                server.start()
                again()
            write(60)
            server.restart()
            expect_equal(server.group_status()["verify_due"], None, f"{name}: after a stop that left nothing open")
            again()
            server.stop()
            # Somebody writes to it, and no sampled block shows that: its 21st is not among them, and
            # holds in the end what it held.
            at = 20 * 4096
            with open(server.backing("vda"), "rb") as file:
                file.seek(at)
                held = file.read(4096)
            write_past_the_server(server.backing("vda"), at, bytes(byte ^ 1 for byte in held))
            write_past_the_server(server.backing("vda"), at, held)
            said = server.start_refused()
            expect("vm1.vda.afterimage: the backing was changed" in said, f"{name}: an edit behind our back:\n{said}")
            server.start("--accept-edited")
            again()
            write(60)
            server.wait_shipped()
            target = server.restore("latest", folder / "restored")
            for disk, model in {**disks, **small}.items():
                same_content(f"{name}: {disk} restored", target / f"{disk}.raw", model.content)
            # The log goes elsewhere; whose the devices are is still known.
            server.stop()
            claim = server.folder / "claims/vm1.vda.afterimage"
            claim.rename(folder / "away")
            refused = server.cli("recover", "vm1", "--to-plain", ok=False)
            expect(refused.returncode == 1 and str(claim) in refused.stderr, f"{name}: without a claim: {refused.stderr}")
            (folder / "away").rename(claim)
            server.start()
            again()
            server.cli("detach", "vm1")
            server.stop()
            for disk, model in {**disks, **small}.items():
                same_content(f"{name}: {disk} as a plain device", server.backing(disk), model.content)
            said = run("losetup", "--list", "--noheadings").stdout
            expect_equal(said.count(str(folder)), len(sizes) + 1, "devices in use until here")

"""Checkpoints of a group of two disks: raw, qcow2 and exported images equal the disks of each moment.

One write before a checkpoint is a moment of its own, too.
"""

from harness.model import Disk, same_content, same_export
from harness.process import expect, expect_equal, run, scratch
from harness.server import Afterimage

SIZES = {"vda": 16 << 20, "vdb": (5 << 20) + 512}

with scratch() as folder, Afterimage(folder, groups={"vm1": SIZES}) as server:
    disks = {name: Disk(server.socket, f"vm1/{name}", size, seed=name) for name, size in SIZES.items()}
    # What lies before the end of the initial copy is no recovery point.
    server.wait_shipped()
    moments = {}
    for number in range(6):
        for _ in range(60):
            for disk in disks.values():
                disk.write_somewhere()
        label = f"moment-{number}"
        lsn = server.checkpoint(label)
        moments[label] = (lsn, {name: bytes(disk.content) for name, disk in disks.items()})
    # The write that spoils everything, and the moment before it.
    before = server.group_status()["appended_lsn"]
    contents = {name: bytes(disk.content) for name, disk in disks.items()}
    moments[f"lsn:{before}"] = (before, contents)
    disks["vda"].write(0, b"encrypted" * 10000)
    moments["latest"] = (None, {name: bytes(disk.content) for name, disk in disks.items()})
    server.wait_shipped()

    listed = {point["label"]: point for point in server.points()["points"] if point.get("label")}
    for point, (lsn, contents) in moments.items():
        if point.startswith("moment"):
            expect_equal(listed[point]["lsn"], lsn, f"LSN of {point} in the list")
            expect_equal(listed[point]["kind"], "crash", f"kind of {point}")
        target = server.restore(point, folder / f"restored-{point}")
        expect_equal(sorted(path.name for path in target.iterdir()), ["vda.raw", "vdb.raw"], "restored files")
        for name, content in contents.items():
            same_content(f"{name} at {point}", target / f"{name}.raw", content)
        uris = server.export(point)
        for name, content in contents.items():
            same_export(f"export of {name} at {point}", uris[name], content, folder)

    qcow2 = server.restore("moment-3", folder / "as-qcow2", "--format", "qcow2")
    for name in SIZES:
        run("qemu-img", "check", qcow2 / f"{name}.qcow2")
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw",
            qcow2 / f"{name}.qcow2", folder / "restored-moment-3" / f"{name}.raw")
    # An image is read-only, and an existing target is not overwritten unasked.
    refused = run("qemu-io", "-f", "raw", "-c", "write 0 4096", server.export("moment-3")["vda"], ok=None)
    expect("read-only" in (refused.stdout + refused.stderr).lower() or refused.returncode != 0,
           f"a write to an image is refused: {refused.stdout}{refused.stderr}")
    server.cli("restore", "vm1@moment-2", folder / "restored-moment-3", ok=1)
    same_content("the file that was there", folder / "restored-moment-3/vda.raw", moments["moment-3"][1]["vda"])
    server.cli("verify", "vm1")

"""All disks of a restore appear at once. One that is ended by a signal leaves nothing, not even a folder;
what one that is killed leaves is removed by the next; one that ends well is for its owner alone."""

import signal
import subprocess
import time

from harness.devices import small_file_system
from harness.nbd_client import Connection
from harness.process import expect, expect_equal, run, scratch
from harness.server import Afterimage, binary

SIZE = 96 << 20
CHUNK = 1 << 20

with scratch() as folder, Afterimage(folder, groups={"vm1": {"vda": SIZE, "vdb": SIZE}}) as server:
    for disk in ("vda", "vdb"):
        with Connection(server.socket).open_export(f"vm1/{disk}") as client:
            for offset in range(0, SIZE, CHUNK):
                client.write(offset, offset.to_bytes(8, "little") * (CHUNK // 8))
            client.flush()
    server.wait_shipped()

    def end_midway(target, how):
        """Begin a restore into `target` and end it with a signal as soon as there is something to leave
        behind. Its exit code and what it said."""
        hidden = f".{target.name}.*.partial/*.raw"
        with subprocess.Popen([binary(), "--config", server.config, "restore", "vm1@latest", target],
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              env=server.environment, text=True) as restore:
            while restore.poll() is None and not any([*folder.glob(hidden), *target.glob(hidden)]):
                time.sleep(0.002)
            restore.send_signal(how)
            said = restore.communicate(timeout=120)[1]
        return restore.returncode, said

    def left(target):
        """Names of what lies in the folder of `target` because of it, and in it."""
        beside = [path.name for path in folder.glob(f".{target.name}.*")]
        inside = [path.name for path in target.iterdir()] if target.exists() else ["no folder"]
        return sorted(beside) + sorted(inside)

    WHOLE = ["vda.raw", "vdb.raw"]
    ended = 0
    for number, sent in enumerate([signal.SIGTERM, signal.SIGINT] * 5):
        target = folder / f"ended-{number}"
        if number >= 5:
            target.mkdir()
        code, said = end_midway(target, sent)
        if code == 0:
            expect_equal(left(target), WHOLE, "files of one that was quicker than the signal")
        else:
            ended += 1
            nothing = [] if number >= 5 else ["no folder"]
            expect_equal((code, left(target)), (1, nothing), f"exit code and files after {sent.name}")
            expect("nothing was restored" in said, f"what it says after {sent.name}: {said}")
    expect(ended > 0, "no restore was ended")

    killed = 0
    for number in range(6):
        target = folder / f"killed-{number}"
        if number >= 3:
            target.mkdir()
        code, _ = end_midway(target, signal.SIGKILL)
        if code == 0:
            continue
        killed += 1
        inside = sorted(target.iterdir()) if target.exists() else []
        expect(inside in ([], [target / name for name in WHOLE]), f"some disks without the others: {inside}")
        if not inside:
            expect(any(folder.glob(f".{target.name}.*.partial")), "the kill left nothing to be removed")
            server.restore("latest", target)
        expect_equal(left(target), WHOLE, "files of a restore after a killed one")
    expect(killed > 0, "no restore was killed")

    # A mount point stays one, be it of another file system or of the same.
    target = folder / "mounted"
    with small_file_system(target, "256m"):
        end_midway(target, signal.SIGKILL)
        if not any((target / name).exists() for name in WHOLE):
            server.restore("latest", target)
            expect_equal(left(target), WHOLE, "files in a file system of their own")
    expect_equal(left(target), [], "what lies under the mount point")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    run("mount", "--bind", elsewhere, target)
    try:
        server.restore("latest", target)
    finally:
        run("umount", target)
    expect_equal((left(target), left(elsewhere)), ([], WHOLE), "files behind a bind mount")

    # A shell that stands in its empty folder sees the disks there.
    target = folder / "stood-in"
    target.mkdir()
    before = target.stat().st_ino
    subprocess.run([binary(), "--config", server.config, "restore", "vm1@latest", "."], cwd=target, check=True,
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=server.environment)
    expect_equal((target.stat().st_ino, left(target)), (before, WHOLE), "the folder of the shell")

    target = server.restore("latest", folder / "whole")
    expect_equal(target.stat().st_mode & 0o777, 0o700, "mode of the folder")
    for disk in ("vda", "vdb"):
        expect_equal((target / f"{disk}.raw").stat().st_mode & 0o777, 0o600, f"mode of {disk}.raw")

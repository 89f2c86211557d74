"""No space for a log, in a sparse backing's file system, in the repository: a clear state, nothing lost."""
# limit: 310

import errno
import subprocess
from contextlib import contextmanager

from harness.model import Disk, same_content
from harness.nbd_client import Connection
from harness.process import expect, expect_equal, fallocate_sparse, run, scratch, wait_until
from harness.server import Afterimage


@contextmanager
def small_file_system(path, size):
    """A tmpfs of that size."""
    path.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "afterimage-test", path)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=False)


with scratch() as folder:
    # The log does not fit.
    with small_file_system(folder / "log-site", "16m"):
        server = Afterimage(folder, name="log-site", groups={"vm1": {"vda": "1MiB", "vdb": "1MiB"}}, log="64MiB")
        said = server.start_refused()
        expect(str(server.log_path()) in said, f"the log is named:\n{said}")
        expect(not server.log_path().exists(), "no half a log is left behind")
        server.close()

    # The ring does not fit: nothing stays of it, nor of log and markers. With room it starts.
    with small_file_system(folder / "rings", "4m") as rings:
        server = Afterimage(folder, name="ring-site", groups={"vm1": {"vda": "1MiB", "vdb": "1MiB"}}, ring="8MiB",
                            ring_dir=rings)
        said = server.start_refused()
        expect("no room for a ring of 8388608 bytes" in said and str(rings) in said, f"the ring is named:\n{said}")
        run("mount", "-o", "remount,size=12m", rings)
        with server:
            server.stop()
            # A larger one, for a group that has a log.
            server.ring = "16MiB"
            server.write_config()
            said = server.start_refused()
            expect("no room for a ring of 16777216 bytes" in said, f"the ring is named:\n{said}")
            run("mount", "-o", "remount,size=32m", rings)
            server.start()

    # The marker of the second disk does not fit, log and first marker did: they go again.
    server = Afterimage(folder, name="marker-site", groups={"vm1": {"vda": "1MiB", "vdb": "1MiB"}},
                        create_backings=False)
    with small_file_system(server.folder / "images", "16m,nr_inodes=4") as images:
        server.backing = lambda disk="vda", group="vm1": images / f"{disk}.raw"
        for disk in ("vda", "vdb"):
            fallocate_sparse(server.backing(disk), 1 << 20)
        server.write_config()
        said = server.start_refused()
        expect(f"{images}/vdb.raw.afterimage: No space left" in said, f"the marker is named:\n{said}")
        run("mount", "-o", "remount,nr_inodes=16", images)
        with server:
            expect_equal(len(list(images.iterdir())), 4, "two images and their markers")

    # The repository fills: the guest goes on, the state says it, and it resumes by itself.
    with small_file_system(folder / "full-repo", "24m") as repository:
        server = Afterimage(folder, name="site", groups={"vm1": {"vda": "32MiB"}}, log="256MiB",
                            to=[f"file://{repository}"], replica=f'repository = "file://{repository}"')
        with server:
            disk = Disk(server.socket, "vm1/vda", 32 << 20)
            # What lies before the end of the initial copy is no recovery point.
            server.wait_shipped()
            disk.write(0, disk.dice.randbytes(1 << 20))
            server.checkpoint("early")
            early = bytes(disk.content)
            server.wait_shipped()
            for number in range(48):
                disk.write(((number * 7) % 31) << 20, disk.dice.randbytes(1 << 20))
            disk.flush()
            seen = wait_until(lambda: (found := server.group_status()["targets"][0]).get("error") and found,
                              "the target's error in the status")
            print(f"full: {seen['state']}: {seen['error']}")
            same_content("early, while full", server.restore("early", folder / "early") / "vda.raw", early)
            # A start finds it full, and keeps no guest waiting.
            disk.close()
            server.kill()
            server.start()
            content = disk.content
            disk = Disk(server.socket, "vm1/vda", 32 << 20)
            disk.content[:] = content
            disk.write(5000, disk.dice.randbytes(5000))
            same_content("early, full at the start", server.restore("early", folder / "again") / "vda.raw", early)
            run("mount", "-o", "remount,size=256m", repository)
            server.checkpoint("late")
            server.wait_shipped()
            same_content("late", server.restore("late", folder / "late") / "vda.raw", bytes(disk.content))

    # The backing's file system fills: what was answered stays readable and survives a kill.
    with small_file_system(folder / "backing-site", "96m"):
        server = Afterimage(folder, name="backing-site", groups={"vm1": {"vda": "64MiB"}}, log="48MiB", to=[],
                            ring="8MiB", replica=False)
        with server, Connection(server.socket, patience_seconds=120).open_export("vm1/vda") as client:
            answered, error = 0, 0
            while answered < 64 and not error:
                error = client.call(1, answered << 20, 1 << 20, bytes([answered + 1]) * (1 << 20))
                answered += not error
            expect(answered >= 8, f"writes up to the limit were answered, {answered} MiB")
            expect_equal(error, errno.ENOSPC, "what the client gets when the log has no room left")
            seen = server.group_status()
            expect_equal(seen["state"], "degraded", "the group's state")
            expect("the backing of disk vda (" in seen["reason"] and "No space left" in seen["reason"], f"why: {seen['reason']}")
            with Connection(server.socket).open_export("vm1/vda") as reader:
                for number in range(answered):
                    expect(reader.read(number << 20, 4096) == bytes([number + 1]) * 4096, f"MiB {number} is there")
            server.kill()
            run("mount", "-o", "remount,size=256m", server.folder)
            server.start()
            with Connection(server.socket).open_export("vm1/vda") as reader:
                for number in range(answered):
                    expect(reader.read(number << 20, 4096) == bytes([number + 1]) * 4096, f"MiB {number} is there")

"""Loop devices and small file systems for checks. Each is let go of at the end, however that comes."""

import subprocess
from contextlib import contextmanager
from pathlib import Path

from harness.process import Child, fallocate_sparse, run, wait_until


@contextmanager
def loop_device(image, size=None, sector=512):
    """A block device whose content is the file `image`, made first if `size` is given."""
    if size is not None:
        fallocate_sparse(image, size)
    device = run("losetup", "--find", "--show", "--sector-size", str(sector), image).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=False)


@contextmanager
def small_file_system(path, size):
    """A tmpfs of that size."""
    Path(path).mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "afterimage-test", path)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=False)


def resize(path, size):
    """Another size for such a file system."""
    run("mount", "-o", f"remount,size={size}", path)


class FailingFile:
    """A file whose reads and writes fail with EIO while `fail()` holds, until `heal()`.

    nbdkit serves the file `image` through its error filter, nbdfuse shows that as `path`. (Its
    flushes succeed all the time; failing syncs are the simulator's.)
    """

    def __init__(self, folder, image):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        self._trigger = self.folder / "fail"
        self._mount = self.folder / "mounted"
        self._mount.mkdir()
        self.path = self._mount / "disk"
        socket = self.folder / "nbdkit.sock"
        self._server = Child(["nbdkit", "-f", "-U", socket, "--filter=error", "file", image, "error=EIO",
                              "error-rate=100%", f"error-file={self._trigger}"], self.folder / "nbdkit.log")
        wait_until(socket.exists, "nbdkit")
        self._fuse = Child(["nbdfuse", self.path, f"nbd+unix:///?socket={socket}"], self.folder / "nbdfuse.log")
        wait_until(self.path.exists, "nbdfuse")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.heal()
        subprocess.run(["umount", "--lazy", str(self._mount)], check=False)
        self._fuse.kill()
        self._server.kill()

    def fail(self):
        """From now on every transfer fails."""
        self._trigger.touch()

    def heal(self):
        """From now on everything works again."""
        self._trigger.unlink(missing_ok=True)

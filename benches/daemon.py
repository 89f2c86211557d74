"""A running `afterimage serve` to measure: its configuration, start, rest, memory and end."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import page

READY_SECONDS = 600
SETTLE_SECONDS = 600
STOP_SECONDS = 120
MIB = 1 << 20
GIB = 1 << 30


def binary(given, program="afterimage", package="afterimage"):
    """The program to measure: the one that was given, else a release build."""
    if given:
        return pathlib.Path(given)
    subprocess.run(["cargo", "build", "--release", "--package", package, "--bin", program],
                   cwd=page.ROOT, check=True)
    target = os.environ.get("CARGO_TARGET_DIR", page.ROOT / "target")
    return pathlib.Path(target) / "release" / program


class Folder(type(pathlib.Path())):
    """A folder with one for rings, on a tmpfs, beside it."""

    def part(self, name):
        """A folder in this one, with a folder for rings of its own."""
        folder = Folder(self / name)
        folder.rings = self.rings / name
        folder.mkdir()
        folder.rings.mkdir()
        return folder


def in_folder(parent, measure):
    """Calls `measure` with a folder that goes afterwards."""
    folder = Folder(tempfile.mkdtemp(prefix="afterimage-bench-", dir=parent))
    folder.rings = pathlib.Path(tempfile.mkdtemp(prefix="afterimage-bench-", dir="/dev/shm"))
    try:
        return measure(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder.rings, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of one disk, which is called `disk`."""

    name: str
    disk: pathlib.Path
    ring: str = "128MiB"
    log: str = "4GiB"


class Daemon:
    """`afterimage serve` with these groups, shipping to a repository in the same folder."""

    def __init__(self, folder, program, groups):
        self.folder, self.program = folder, program
        self.process = None
        self.config = folder / "afterimage.toml"
        self.metrics_port = free_port()
        text = [f'ring_dir = "{folder.rings}"\nring_budget = "1TiB"\n'
                f'[nbd]\nlisten = ["unix:{folder}/nbd.sock"]\nimages = "{folder}/images.sock"\n'
                f'[http]\napi = "unix:{folder}/api.sock"\n'
                f'metrics = "127.0.0.1:{self.metrics_port}"\n']
        for group in groups:
            text.append(f'[[group]]\nname = "{group.name}"\nring = "{group.ring}"\n'
                        f'log = {{ path = "{folder}/{group.name}.log", size = "{group.log}" }}\n'
                        f'to = ["file://{folder}/repository"]\n'
                        f'[[group.disk]]\nname = "disk"\npath = "{group.disk}"\n')
        self.config.write_text("".join(text))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def uri(self, group):
        """Where the disk of `group` is served."""
        return f"nbd+unix:///{group}/disk?socket={self.folder}/nbd.sock"

    def start(self, *more):
        """Seconds until it says that it serves."""
        address = self.folder / "notify.sock"
        address.unlink(missing_ok=True)
        with (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
              open(self.folder / "daemon.log", "ab") as log):
            notify.bind(str(address))
            notify.settimeout(1)
            begin = time.monotonic()
            self.process = subprocess.Popen(
                [str(self.program), "--config", str(self.config), "serve", *more], stdout=log,
                stderr=log, stdin=subprocess.DEVNULL,
                env={**os.environ, "NOTIFY_SOCKET": str(address)})
            while time.monotonic() < begin + READY_SECONDS and self.process.poll() is None:
                try:
                    if b"READY=1" in notify.recv(4096):
                        return time.monotonic() - begin
                except TimeoutError:
                    pass
        sys.exit("the daemon did not start:\n"
                 + (self.folder / "daemon.log").read_text()[-2000:])

    def command(self, *words):
        return subprocess.run([str(self.program), "--config", str(self.config), *words, "--json"],
                              capture_output=True, text=True)

    def settle(self):
        """Until every target has everything, a running pass included, and the backings too."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            out = self.command("status")
            if out.returncode == 0 and all(map(at_rest, json.loads(out.stdout)["groups"])):
                return
            time.sleep(0.5)
        sys.exit(f"still not at rest after {SETTLE_SECONDS} s: {out.stdout}{out.stderr}")

    def metric(self, name, group, label=""):
        """One figure of one group, with this label, read from the metrics as Prometheus does."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics",
                                    timeout=30) as answer:
            text = answer.read().decode()
        for line in text.splitlines():
            if line.startswith(f'afterimage_{name}{{group="{group}"') and label in line:
                return float(line.rsplit(" ", 1)[1])
        raise LookupError(f"no metric afterimage_{name} of {group}")

    def resident(self):
        """Bytes of RAM beside shared memory, which is the rings."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))

    def wakes(self):
        """How often each thread went to sleep of its own will so far."""
        found = {}
        for task in pathlib.Path(f"/proc/{self.process.pid}/task").iterdir():
            try:
                status = (task / "status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # It has ended since.
            fields = dict(line.split(":", 1) for line in status.splitlines())
            found[task.name] = int(fields["voluntary_ctxt_switches"])
        return found

    def idle(self, seconds):
        """CPU and wake-ups per second while nobody does anything."""
        cpu, wakes = cpu_seconds(self.process), self.wakes()
        time.sleep(seconds)
        cpu_after, wakes_after = cpu_seconds(self.process), self.wakes()
        # A thread that ended took its count along.
        woken = sum(count - wakes.get(task, 0) for task, count in wakes_after.items())
        return (cpu_after - cpu) / seconds, woken / seconds

    def kill(self):
        """Ends it as a crash does: nothing is written back or closed."""
        self.process.kill()
        self.process.wait()

    def stop(self):
        stop(self.process)


def at_rest(group):
    """Whether nothing of a group, as `status` shows it, is on its way."""
    return not group["log_undestaged_bytes"] and all(
        target["state"] == "shipping" and not target["backlog_bytes"] and not target["pass"]
        and not target["gap"] for target in group["targets"])


def cpu_seconds(process):
    """CPU time of a process until now."""
    stat = pathlib.Path(f"/proc/{process.pid}/stat").read_text()
    fields = stat.rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stop(process):
    """Ends a process that may be over, cleanly if it can."""
    if process and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def stored_bytes(folder):
    """Bytes of all files below a folder that nobody writes to now."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def free_port():
    """A TCP port of the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

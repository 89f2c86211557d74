"""An `afterimage serve` for one check: configuration, start, kill, command line.

Owns: the configuration, the sockets and the folder of rings of one server. What
always holds: it is ready when `start` returns (it said so over NOTIFY_SOCKET,
as it does to systemd); its rings lie on a tmpfs folder of their own that goes
away with the fixture. `QemuNbd` stands in for it where only the client half of
a check is to be tried: AFTERIMAGE_TESTS_SERVER=qemu-nbd.
"""

import http.client
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

from harness.ports import free_port
from harness.process import CheckFailed, Child, expect, expect_equal, fallocate_sparse, run, say, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
READY_PATIENCE_SECONDS = 120.0
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def binary():
    """The program under test: $AFTERIMAGE, or the workspace's debug build."""
    return os.environ.get("AFTERIMAGE", str(REPOSITORY / "target/debug/afterimage"))


def size_bytes(text):
    """'64MiB' as a number; numbers stay as they are."""
    if isinstance(text, int):
        return text
    for unit, factor in UNITS.items():
        if text.endswith(unit):
            return int(text[: -len(unit)]) * factor
    return int(text)


class Afterimage:
    """One server. By default: group `vm1`, disk `vda`, shipping into a folder `repo` beside it.

    `groups` maps a group's name to its disks ({name: size}). `to` is the list of
    targets, None meaning the embedded repository. `group_lines` and `lines` are
    further TOML, put into every `[[group]]` and at the end of the file. `environment` is added
    to that of the server and of the commands.
    `nbd_listen` replaces the listener (TOML). `replica=False` leaves `[replica]` out.
    """

    def __init__(self, folder, *, name="site", groups=None, log="64MiB", ring="16MiB", to=None,
                 ship_interval="100ms", group_lines="", lines="", nbd_listen=None, replica=True,
                 ring_dir=None, ring_budget="1GiB", create_backings=True, environment=None):
        self.folder = Path(folder) / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.groups = groups if groups is not None else {"vm1": {"vda": "64MiB"}}
        self.repository = self.folder / "repo"
        self.socket = self.folder / "nbd.sock"
        self.images_socket = self.folder / "images.sock"
        self.config = self.folder / "afterimage.toml"
        self._own_ring_dir = ring_dir is None
        self.ring_dir = Path(ring_dir or tempfile.mkdtemp(prefix="afterimage-rings-", dir="/dev/shm"))
        self.metrics_port = free_port()
        self.child = self._notify = None
        self.child_options = {}
        self.log, self.ring, self.to = log, ring, to
        self.environment = {**os.environ, **(environment or {})}
        self.ship_interval, self.group_lines, self.lines = ship_interval, group_lines, lines
        self.nbd_listen, self.replica, self.ring_budget = nbd_listen, replica, ring_budget
        if replica:
            self.repository.mkdir(exist_ok=True)
        if create_backings:
            for group, disks in self.groups.items():
                for disk, size in disks.items():
                    if not self.backing(disk, group).exists():
                        fallocate_sparse(self.backing(disk, group), size_bytes(size))
        self.write_config()

    # Paths and addresses

    def backing(self, disk="vda", group="vm1"):
        """The file that holds the disk at the primary."""
        return self.folder / f"{group}-{disk}.raw"

    def log_path(self, group="vm1"):
        """The group's write-ahead log."""
        return self.folder / f"{group}.log"

    def ring_path(self, group="vm1"):
        """The group's ring; its name carries the group's name and a part of its UUID."""
        found = [path for path in self.ring_dir.iterdir() if f"-{group}-" in path.name]
        expect(len(found) == 1, f"one ring in {self.ring_dir}, saw {[path.name for path in self.ring_dir.iterdir()]}")
        return found[0]

    def uri(self, disk="vda", group="vm1"):
        """The disk's NBD URI."""
        return f"nbd+unix:///{group}/{disk}?socket={self.socket}"

    # Configuration

    def write_config(self):
        """(Re)write the configuration file from the fields."""
        targets = self.to if self.to is not None else [f"file://{self.repository}"]
        listen = self.nbd_listen or f'["unix:{self.socket}"]'
        text = [
            f'guest_state = "{self.folder}/guest"',
            f'claims = "{self.folder}/claims"',
            f'ring_dir = "{self.ring_dir}"', f'ring_budget = "{self.ring_budget}"',
            "[nbd]", f"listen = {listen}", f'images = "{self.images_socket}"',
            "[http]", f'api = "unix:{self.folder}/api.sock"', f'metrics = "127.0.0.1:{self.metrics_port}"',
        ]
        for group, disks in self.groups.items():
            text += [
                "[[group]]", f'name = "{group}"',
                f'log = {{ path = "{self.log_path(group)}", size = "{self.log}" }}',
                f'ring = "{self.ring}"', f"to = {json.dumps(targets)}",
                f'ship_interval = "{self.ship_interval}"', self.group_lines,
            ]
            for disk in disks:
                text += ["[[group.disk]]", f'name = "{disk}"', f'path = "{self.backing(disk, group)}"']
        if self.replica and self.replica is not True:
            text += ["[replica]", self.replica]
        elif self.replica:
            text += ["[replica]", f'repository = "file://{self.repository}"']
        self.config.write_text("\n".join([*text, self.lines, ""]))

    # Life

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, kind, error, trace):
        if error is not None and self.child is not None:
            say(f"{self.folder.name}: end of the server's log:\n{self.child.log_tail(6000)}")
        self.close()

    def close(self):
        """End the server, however it is, and remove its rings."""
        if self.child is not None:
            self.child.kill()
        if self._notify is not None:
            self._notify.close()
        if self._own_ring_dir:
            shutil.rmtree(self.ring_dir, ignore_errors=True)

    def spawn(self, options=(), under=()):
        """Start the process without waiting for it to be ready; `under` is a command that execs it."""
        if self.child is not None and self.child.killed:
            # By another thread, perhaps: it listens until it is quite gone.
            self.child.process.wait(READY_PATIENCE_SECONDS)
        if self._notify is not None:
            self._notify.close()
        notify_path = self.folder / "notify.sock"
        notify_path.unlink(missing_ok=True)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(notify_path))
        self._notify.setblocking(False)
        environment = {**self.environment, "NOTIFY_SOCKET": str(notify_path), "RUST_BACKTRACE": "1"}
        log = self.folder / "serve.log"
        self._said_before = len(log.read_text(errors="replace")) if log.exists() else 0
        self.child = Child(
            [*under, binary(), "--config", self.config, "serve", *options], log,
            env=environment, **self.child_options,
        )

    def said(self):
        """What the process has printed since its start."""
        return self.child.log()[self._said_before:]

    def start(self, *options):
        """Start the process and wait until it has recovered and says that it is ready."""
        self.spawn(options)
        return self.wait_ready()

    def said_ready(self):
        """Whether the process has said that it is ready since this was asked last."""
        try:
            return b"READY=1" in self._notify.recv(4096)
        except BlockingIOError:
            return False

    def wait_ready(self):
        """Wait until a spawned process says that it is ready."""

        def ready():
            if not self.child.running():
                raise CheckFailed(f"serve ended with {self.child.wait()}:\n{self.said()[-4000:]}")
            return self.said_ready()

        wait_until(ready, "serve to be ready", READY_PATIENCE_SECONDS)
        return self

    def files(self):
        """Sizes of the files in the server's folder and that of its rings, by name; folders have none.

        Sockets, the repository and the harness's own files are left out.
        """
        own = [self.folder / "serve.log", self.repository]
        found = {}
        for folder in (self.folder, self.ring_dir):
            for path in folder.rglob("*"):
                if path.is_socket() or path in own or self.repository in path.parents:
                    continue
                found[str(path)] = path.stat().st_size if path.is_file() else None
        return found

    def start_refused(self, code=1):
        """Start a server that must refuse with that exit code; returns what this start printed.

        It leaves exactly the files that were there.
        """
        before = self.files()
        self.spawn()
        seen = self.child.wait(READY_PATIENCE_SECONDS)
        expect(seen == code, f"serve was to refuse with {code}, it ended with {seen}:\n{self.said()[-4000:]}")
        expect_equal(self.files(), before, f"files after a refused start:\n{self.said()[-4000:]}\n")
        return self.said()

    def kill(self):
        """SIGKILL: what was answered must survive this."""
        self.child.kill()

    def stop(self):
        """SIGTERM: drains, and ends with exit code 0."""
        code = self.child.terminate()
        expect(code == 0, f"serve ended with {code} after SIGTERM:\n{self.child.log_tail()}")

    def restart(self):
        """Stop cleanly and start again."""
        self.stop()
        self.start()

    # Command line

    def cli(self, *arguments, ok=True, patience_seconds=300):
        """Run a command of the binary with this server's configuration."""
        return run(binary(), "--config", self.config, *arguments, ok=ok, patience_seconds=patience_seconds,
                   env=self.environment)

    def cli_json(self, *arguments):
        """Run a command with --json; returns the document."""
        return json.loads(self.cli("--json", *arguments).stdout)

    def api_status(self):
        """The status document straight from the API's socket: quicker than the command, for polling."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(self.folder / "api.sock"))
            client.sendall(b"GET /v1/status HTTP/1.1\r\nHost: afterimage\r\nConnection: close\r\n\r\n")
            answer = http.client.HTTPResponse(client)
            answer.begin()
            return json.loads(answer.read())

    def group_status(self, group="vm1"):
        """The group's part of `status --json`."""
        report = self.cli_json("status", group)
        return next(entry for entry in report["groups"] if entry["name"] == group)

    def checkpoint(self, label, group="vm1"):
        """Take a labelled checkpoint; returns its LSN."""
        return self.cli_json("checkpoint", group, "--label", label)["lsn"]

    def wait_shipped(self, group="vm1", patience_seconds=300):
        """Wait until every target holds everything that was written so far; returns the LSN."""
        wanted = self.group_status(group)["appended_lsn"]

        def arrived():
            targets = self.group_status(group)["targets"]
            return targets and all(
                target["acked_lsn"] >= wanted and not target.get("pass") and not target.get("gap")
                for target in targets
            )

        wait_until(arrived, f"{group} to be shipped up to LSN {wanted}", patience_seconds)
        return wanted

    def points(self, group="vm1"):
        """`points --json`."""
        return self.cli_json("points", group)

    def export(self, point, group="vm1"):
        """Export a moment; returns {disk: NBD URI}."""
        info = self.cli_json("export", f"{group}@{point}")
        return {disk["name"]: disk["uri"] for disk in info["disks"]}

    def restore(self, point, target, *more, group="vm1"):
        """Restore a moment into a folder; returns the folder."""
        self.cli("restore", f"{group}@{point}", target, *more)
        return Path(target)


class QemuNbd:
    """A stand-in with one disk, for trying the client half of a check."""

    def __init__(self, folder, *, groups=None, **_unused):
        self.folder = Path(folder) / "standin"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.groups = groups if groups is not None else {"vm1": {"vda": "64MiB"}}
        self.socket = self.folder / "nbd.sock"
        (self.group, disks), = self.groups.items()
        (self.disk, size), = disks.items()
        fallocate_sparse(self.backing(), size_bytes(size))
        self.child = None

    def backing(self, disk="vda", group="vm1"):
        """The file that holds the disk."""
        return self.folder / "disk.raw"

    def uri(self, disk="vda", group="vm1"):
        """The disk's NBD URI."""
        return f"nbd+unix:///{group}/{disk}?socket={self.socket}"

    def start(self):
        """Start and wait for the socket."""
        self.socket.unlink(missing_ok=True)
        self.child = Child(
            ["qemu-nbd", "-f", "raw", "-k", self.socket, "-x", f"{self.group}/{self.disk}", "-e", "16", "-t",
             "--discard=unmap", self.backing()], self.folder / "serve.log")
        wait_until(lambda: self.socket.exists() or not self.child.running(), "qemu-nbd's socket")
        return self

    def kill(self):
        """SIGKILL; the host's page cache keeps what was written."""
        self.child.kill()

    def stop(self):
        """A clean end."""
        self.child.terminate()

    def restart(self):
        """Stop cleanly and start again."""
        self.stop()
        self.start()

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, error, trace):
        self.kill()


STANDIN = os.environ.get("AFTERIMAGE_TESTS_SERVER") == "qemu-nbd"
Server = QemuNbd if STANDIN else Afterimage

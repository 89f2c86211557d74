"""A real S3 server for one check: SeaweedFS, as `tests/run` keeps it in the cache.

Owns: the process, its folder, its one pair of keys. What always holds: every port is
one of the loopback, nothing is reported to anybody, and `environment` is all that a
client needs (the usual AWS_… variables).
"""

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from harness.ports import free_port
from harness.process import Child, CheckFailed, wait_until

VERSION = "4.48"
CACHE = Path(os.environ.get("AFTERIMAGE_TEST_CACHE", "/var/cache/afterimage-tests"))
ACCESS, SECRET = "afterimage", "afterimage-secret"
READY = (200, 403)


def weed():
    """The server's program."""
    path = CACHE / f"seaweedfs-{VERSION}/weed"
    if not path.exists():
        raise CheckFailed(f"{path} is not there: run tests/run --only tools")
    return path


class SeaweedFs:
    """One S3 server; it keeps its data over `kill` and `start`."""

    def __init__(self, folder):
        self.folder = Path(folder) / "s3"
        self.folder.mkdir(parents=True)
        self.port = free_port()
        self.child = None
        identity = {"name": "test", "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}],
                    "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    @property
    def environment(self):
        """What a client's environment needs."""
        return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_ACCESS_KEY_ID": ACCESS,
                "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}

    def start(self):
        """Start, or start again after `kill`, and wait until it answers."""
        # A connection to a gRPC port may also go through a socket in /tmp named by the port.
        self.ports = {name: free_port() for name in (
            "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port",
            "filer.port.grpc", "s3.port.grpc")}
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        self.child = Child(
            [weed(), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}", "-master.telemetry=false",
             "-master.volumeSizeLimitMB=64", "-volume.max=32", "-filer", "-s3", f"-s3.port={self.port}",
             "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false", "-s3.iam=false",
             f"-s3.config={self.folder}/s3.json", f"-filer.localSocket={self.folder}/filer.sock",
             f"-s3.localSocket={self.folder}/s3.sock", *(f"-{name}={port}" for name, port in self.ports.items())],
            self.folder / "weed.log", cwd=self.folder)
        wait_until(self._answers, "the S3 server to answer")
        return self

    def _answers(self):
        if not self.child.running():
            raise CheckFailed(f"the S3 server ended:\n{self.child.log_tail()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5) as answer:
                return answer.status in READY
        except urllib.error.HTTPError as error:
            return error.code in READY
        except OSError:
            return False

    def kill(self):
        """SIGKILL; what it answered is in its files."""
        self.child.kill()
        for socket in Path("/tmp").glob("seaweedfs-*.sock"):
            if any(socket.stem.endswith(f"-{port}") for port in [self.port, *self.ports.values()]):
                socket.unlink(missing_ok=True)

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, error, trace):
        self.kill()

    def make_bucket(self, name):
        """A bucket is a folder of the filer's."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.ports['filer.port']}/buckets/{name}/", method="POST")

        def made():
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    return answer.status == 201
            except OSError:
                return False  # The filer may come up a moment after S3.

        wait_until(made, f"bucket {name}")

    def objects(self, bucket, prefix=""):
        """Names of what lies below a prefix, as the filer sees it."""
        found, folders = [], [prefix]
        while folders:
            folder = folders.pop()
            url = f"http://127.0.0.1:{self.ports['filer.port']}/buckets/{bucket}/{folder}?limit=10000"
            request = urllib.request.Request(url, headers={"Accept": "application/json"})
            with urllib.request.urlopen(request, timeout=10) as answer:
                entries = json.load(answer).get("Entries") or []
            for entry in entries:
                name = entry["FullPath"].removeprefix(f"/buckets/{bucket}/")
                is_folder = entry["Mode"] & 0x80000000
                (folders if is_folder else found).append(f"{name}/" if is_folder else name)
        return sorted(found)

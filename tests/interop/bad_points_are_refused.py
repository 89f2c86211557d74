"""Points that do not exist, or lie within the initial copy: exit code 1, a message that names them, and no file left behind."""

from harness.nbd_client import Connection
from harness.process import expect, scratch
from harness.server import Afterimage

with scratch() as folder, Afterimage(folder) as server:
    with Connection(server.socket).open_export("vm1/vda") as client:
        client.write(0, b"x" * 65536)
        client.flush()
    server.wait_shipped()
    server.checkpoint("there")
    server.wait_shipped()
    for point in ["nowhere", "lsn:999999999", "2001-01-01T00:00:00Z", "-3650d", "lsn:1", "lsn:1/2"]:
        result = server.cli("restore", f"vm1@{point}", folder / "out", ok=1)
        expect(point in result.stderr or "no recovery point" in result.stderr, f"{point} is named:\n{result.stderr}")
        expect(not (folder / "out").exists() or not any((folder / "out").iterdir()), f"{point}: nothing half-done")
        server.cli("export", f"vm1@{point}", ok=1)
    result = server.cli("restore", "vm9@latest", folder / "out", ok=1)
    expect("vm9" in result.stderr, f"an unknown group is named:\n{result.stderr}")
    server.cli("restore", "vm1@there", folder / "out")

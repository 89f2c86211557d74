"""Points that do not exist, or lie within the initial copy: exit code 1, a message that names them, and no file left behind."""

import time

from harness.nbd_client import Connection
from harness.process import expect, scratch, wait_until
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

    # A time past all that was received gives the newest, and says so; a time within says nothing.
    newest = server.points()["spans"][-1]["last_wall_ns"]
    wait_until(lambda: time.time_ns() > newest + 1_000_000_000, "a second without a record")
    for words in (["restore", "vm1@-100ms", folder / "late"], ["export", "vm1@-100ms"]):
        said = server.cli(*words).stderr
        expect("warning: nothing was received after" in said, f"{words[0]} past what was received: {said!r}")
    for point in ("latest", "there"):
        said = server.cli("export", f"vm1@{point}").stderr
        expect("warning" not in said and "as of LSN" in said, f"export of {point}: {said!r}")
    shown = server.cli_json("export", "vm1@-100ms")
    expect("nothing was received after" in shown["warning"], f"the same in JSON: {shown}")
    refused = server.cli("checkpoint", "vm1", "--label", "2024-06-01T010203Z", ok=2)
    expect("label" in refused.stderr, f"a label that reads as a time: {refused.stderr}")

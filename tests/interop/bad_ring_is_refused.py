"""A ring that is missing in the same boot: refused until the operator accepts; a damaged one, too."""

from harness.nbd_client import Connection
from harness.process import expect, scratch
from harness.server import Afterimage


def killed(folder, name):
    server = Afterimage(folder, name=name)
    server.start()
    with Connection(server.socket).open_export("vm1/vda") as client:
        for number in range(100):
            client.write(number * 4096, bytes([number + 1]) * 4096)
    server.kill()
    return server


with scratch() as folder:
    server = killed(folder, "missing")
    ring = server.ring_path()
    ring.unlink()
    said = server.start_refused()
    expect(f"{ring}: the ring" in said, f"the ring is named:\n{said}")
    expect("--accept-ring-loss" in said, f"the way out is named:\n{said}")
    server.cli("recover", "vm1", "--to-plain", ok=1)
    server.cli("recover", "vm1", "--to-plain", "--accept-ring-loss")
    server.close()

    server = killed(folder, "damaged")
    with open(server.ring_path(), "r+b") as file:
        file.write(b"\0" * 64)
    said = server.start_refused()
    expect(f"{server.ring_path()}: the ring is missing (no ring header here" in said, f"what is wrong is said:\n{said}")
    server.close()

    # The ring of another group in its place.
    server, other = killed(folder, "one"), killed(folder, "two")
    server.ring_path().write_bytes(other.ring_path().read_bytes())
    log = other.cli_json("log", "inspect", other.log_path())["log"]
    said = server.start_refused()
    expect(f"{server.ring_path()}: the ring belongs to log {log}, though the group was not stopped cleanly" in said,
           f"what is wrong is said:\n{said}")
    expect("put the ring file back" in said, f"the way out is named:\n{said}")
    other.close()
    server.close()

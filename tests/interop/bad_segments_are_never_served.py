"""Segments with a flipped bit, cut or missing: found by verify and inspect, never restored from."""

from harness.nbd_client import Connection
from harness.process import expect, scratch
from harness.server import Afterimage


def segments(repository):
    """The group's segment objects, largest first."""
    found = [path for path in repository.rglob("*") if path.is_file() and "segments" in path.parts]
    return sorted(found, key=lambda path: -path.stat().st_size)


with scratch() as folder, Afterimage(folder) as server:
    with Connection(server.socket).open_export("vm1/vda") as client:
        for number in range(64):
            client.write(number * 65536, bytes(((number * 31 + at * at) >> 3) & 0xFF for at in range(65536)))
        client.flush()
    server.checkpoint("good")
    server.wait_shipped()
    server.stop()
    victim = segments(server.repository)[0]
    whole = victim.read_bytes()
    server.cli("segment", "inspect", victim, "--check")
    server.cli("verify", "vm1")

    for at in [10, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 3]:
        victim.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        said = server.cli("segment", "inspect", victim, "--check", ok=1).stderr
        expect(victim.name in said, f"bit flipped at {at}: the file is named:\n{said}")
        result = server.cli("verify", "vm1", ok=1)
        expect(victim.name in result.stdout + result.stderr or "segment" in result.stdout + result.stderr,
               f"bit flipped at {at}: verify names the segment:\n{result.stdout}{result.stderr}")
    victim.write_bytes(whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 4]) + whole[len(whole) // 2 + 1:])
    server.cli("restore", "vm1@good", folder / "out", ok=1)
    expect(not (folder / "out/vda.raw").exists(), "nothing is restored from a damaged segment")

    for length in [0, 100, len(whole) - 1]:
        victim.write_bytes(whole[:length])
        server.cli("segment", "inspect", victim, "--check", ok=1)
        server.cli("verify", "vm1", ok=1)
    victim.write_bytes(whole + b"\0")
    server.cli("segment", "inspect", victim, "--check", ok=1)

    victim.write_bytes(whole)
    server.cli("verify", "vm1")
    server.cli("restore", "vm1@good", folder / "out")

"""Objects with a flipped bit, cut or missing: told with place and advice, never served, never deleted.

Segments, the group's manifest and its name: `verify`, `segment inspect`, `points`, `restore` and `export`
name the object, the daemon names it in `status`, its target is away, and the guest goes on. Once the object
is put back, all is as before.
"""

import json
import re

from harness.nbd_client import Connection
from harness.process import expect, expect_equal, scratch, wait_until
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

    ADVICE = "from a copy of the repository"

    def told(said, path, damaged_at, what):
        """The message has the object, a byte at or before the damage, and what to do."""
        place = re.search(rf"{re.escape(path.name)}\S* .*?at byte (\d+)", said)
        expect(place and ADVICE in said, f"{what}: file, offset and advice:\n{said}")
        expect(int(place[1]) <= damaged_at, f"{what}: damaged at {damaged_at}, told {place[1]}")
        return int(place[1])

    def flipped(path, whole, at):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])

    places = set()
    for at in [10, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 3]:
        flipped(victim, whole, at)
        told(server.cli("segment", "inspect", victim, "--check", ok=1).stderr, victim, at, f"inspect, bit {at}")
        places.add(told(server.cli("verify", "vm1", ok=1).stdout, victim, at, f"verify, bit {at}"))
    expect(len(places) >= 3, f"header, content and footer are told from each other: {places}")
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

    # Without its name or its manifest nothing of a group is told, and nothing is begun in their place; nor
    # is a repository of another version touched.
    for part in ("names", "manifests", "afterimage-repository"):
        path = next(path for path in server.repository.rglob("*") if path.is_file() and part in path.parts)
        whole, advice = path.read_bytes(), ADVICE
        if part == "afterimage-repository":
            path.write_bytes(whole.replace(b"1", b"2"))
            advice = "use the version of Afterimage that wrote it"
            said = server.cli("verify", "vm1", ok=1).stderr
            expect(path.name in said and advice in said, f"verify of another version:\n{said}")
        else:
            flipped(path, whole, len(whole) // 2)
            told(server.cli("verify", "vm1", ok=1).stdout, path, len(whole) // 2, f"verify of {part}")
        bad = path.read_bytes()
        export = ["export", "vm1@good", "--repository", f"file://{server.repository}", "--foreground",
                  "--listen", f"unix:{folder}/image.sock"]
        for command in (["points", "vm1"], ["restore", "vm1@good", folder / part], export):
            said = server.cli(*command, ok=1).stderr
            expect(path.name in said and advice in said, f"{command}:\n{said}")
        expect(not (folder / part).exists() or not list((folder / part).iterdir()), "nothing is restored")
        server.start()
        target = lambda: server.group_status()["targets"][0]
        wait_until(lambda: path.name in (target().get("error") or ""), f"the target to name {path}")
        expect_equal(target()["state"], "away", f"state of the target: {target()}")
        with Connection(server.socket).open_export("vm1/vda") as client:
            client.write(0, b"more" * 1024)
            client.flush()
        server.stop()
        expect_equal(path.read_bytes(), bad, f"content of {path}, which nobody may put right")
        path.write_bytes(whole)
        server.start()
        server.wait_shipped()
        points = json.loads(server.cli("--json", "points", "vm1").stdout)["points"]
        expect("good" in [point["label"] for point in points], f"points after {part} was put back: {points}")
        server.stop()
        server.cli("verify", "vm1")

"""`segment inspect` as text says what its --json says: header, sizes, hashes, and with --records every record.

What is damaged, and what is no segment, is refused with its name.
"""

import json

from harness.nbd_client import TRIM, Connection
from harness.process import expect, expect_equal, run, scratch
from harness.server import Afterimage, binary


def inspected(path, *options):
    """The document and the text of one segment."""
    document = json.loads(run(binary(), "--json", "segment", "inspect", path, *options).stdout)
    return document, run(binary(), "segment", "inspect", path, *options).stdout


with scratch() as folder, Afterimage(folder) as server:
    with Connection(server.socket).open_export("vm1/vda") as client:
        client.write(0, b"base" * 1024)
        server.wait_shipped()
        for number in range(12):
            client.write(number * 8192, bytes([number + 1]) * 8192)
        expect_equal(client.call(TRIM, 1 << 20, 65536), 0, "errno of a trim")
        server.checkpoint("here")
        server.wait_shipped()
    uuid, last = server.points()["uuid"], server.points()["spans"][-1]["last_lsn"]
    paths = sorted(path for path in (server.repository / "groups" / uuid / "segments").rglob("*") if path.is_file())
    told = [(path, *inspected(path, "--records")) for path in paths]
    expect_equal({document["group"] for _, document, _ in told}, {uuid}, "the group")
    logs = [document for _, document, _ in told if document["kind"] == "log"]
    records = [entry for document in logs for entry in document["entries"]]
    expect_equal([entry["lsn"] for entry in records], list(range(logs[0]["first_lsn"], last + 1)), "LSNs of the records")
    ops = [entry["op"] for entry in records]
    expect_equal(ops[-14:], ["Write"] * 12 + ["Trim", "Checkpoint"], "what was done")
    expect_equal((records[-14]["first_block"], records[-14]["block_count"]), (0, 2), "place of a write")
    expect_equal((records[-2]["first_block"], records[-2]["block_count"]), (256, 16), "place of the trim")
    expect(all(entry["wall_ns"] > 0 for entry in records), "every record has a time")
    expect("pass" in {document["kind"] for _, document, _ in told}, "the initial copy's segments are there")
    for before, after in zip(logs, logs[1:]):
        expect_equal(after["first_lsn"], before["last_lsn"] + 1, "first LSN of the next segment")
        expect_equal(after["chain_before"], before["chain_after"], "its chain")

    for path, document, text in told:
        expect_equal(document["stored_bytes"], path.stat().st_size, f"size of {path.name}")
        expect_equal(document["records"], len(document["entries"]), f"records of {path.name}")
        for word in [f"{document['kind']} segment, epoch {document['epoch']}, LSN {document['first_lsn']} to",
                     uuid, document["log"], document["chain_before"], document["chain_after"], document["content_hash"],
                     f"in {document['chunks']} chunks"]:
            expect(word in text, f"{word!r} in\n{text}")
        expect_equal(f"begun at LSN {document['pass_lsn']}" in text, document["pass_lsn"] != 0, "the pass in the text")
        rows = [line.split() for line in text.split("BYTES\n", 1)[1].splitlines()] if document["entries"] else []
        shown = [(int(row[0]), row[3], int(row[-1])) for row in rows]
        wanted = [(entry["lsn"], entry["op"], entry["block_count"] * 4096) for entry in document["entries"]]
        expect_equal(shown, wanted, f"rows of {path.name}")

        short, text = inspected(path)
        expect_equal({**short, "entries": document["entries"]}, document, "without --records all else is the same")
        expect(short["entries"] == [] and "BYTES" not in text, f"no records unless asked for:\n{text}")
    path = paths[-1]
    checked, text = inspected(path, "--check")
    expect(checked["checked"] and "every byte checked" in text, f"--check says so:\n{text}")
    expect(not told[-1][1]["checked"] and "checked" not in told[-1][2], "and nothing else does")

    damaged = folder / "damaged"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    said = run(binary(), "segment", "inspect", damaged, "--check", ok=1).stderr
    expect(str(damaged) in said and "is no valid segment" in said, f"a damaged one is named: {said}")
    damaged.write_bytes(b"no segment")
    said = run(binary(), "segment", "inspect", damaged, ok=1).stderr
    expect(str(damaged) in said, f"something else is named: {said}")

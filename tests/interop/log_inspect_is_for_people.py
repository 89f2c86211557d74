"""`log inspect` as text says what its --json says: superblock, frames, records, and where the log ends."""

import json

from harness.nbd_client import Connection
from harness.ports import free_port
from harness.process import expect, expect_equal, run, scratch
from harness.server import Afterimage, binary
from harness.sites import Certificates

with scratch() as folder:
    certificates = Certificates(folder / "ca")
    tls = f"[ship]\ntls = {certificates.client_table(certificates.client('vm1'))}\n"
    # Nobody listens there: the log keeps every record.
    server = Afterimage(folder, to=[f"afterimage://127.0.0.1:{free_port()}"], lines=tls, log="32MiB", ring="8MiB")
    server.start()
    with Connection(server.socket).open_export("vm1/vda") as client:
        for number in range(20):
            client.write(number * 8192, bytes([number + 1]) * 8192)
            client.flush()
        expect_equal(client.call(4, 1 << 20, 65536), 0, "errno of a trim")
        client.flush()
    server.checkpoint("here")
    server.kill()

    path = server.log_path()
    told = json.loads(run(binary(), "--json", "log", "inspect", path, "--records").stdout)
    text = run(binary(), "log", "inspect", path, "--records").stdout
    records = [record for frame in told["frames"] for record in frame["records"]]
    expect_equal([record["lsn"] for record in records], list(range(1, len(records) + 1)), "LSNs of the records")
    expect_equal([record["op"] for record in records], ["Write"] * 20 + ["Trim", "Checkpoint"], "what was done")
    for word in [str(path), told["group"], told["log"], "in use, or not closed cleanly", "64.0 MiB",
                 f"durable to   {told['durable_lsn']}", f"target       {told['sinks'][0]['id'][:8]} has LSN 0",
                 "Write disk 0 block 38", "Trim disk 0 block 256", "Checkpoint disk 0",
                 f"{len(told['frames'])} frames, last LSN {len(records)};"]:
        expect(word in text, f"{word!r} in\n{text}")
    expect("CORRUPT" not in text, f"nothing is corrupt:\n{text}")
    for frame in told["frames"]:
        expect(f"{frame['first_lsn']}..{frame['last_lsn']}" in text, f"frame {frame['number']} in\n{text}")

    # By the group's name, without records, and only some frames.
    short = server.cli("log", "inspect", "vm1", "--limit", "1").stdout
    expect(told["log"] in short and "Write disk" not in short and " frames, last LSN" not in short, f"in short:\n{short}")

    # A damaged frame is where the log ends, and what is wrong with it is said.
    with open(path, "r+b") as file:
        file.seek(told["frames"][3]["offset"] + 100)
        file.write(b"\xff")
    text = run(binary(), "log", "inspect", path).stdout
    expect(f"3 frames, last LSN 3; at byte {told['frames'][3]['offset']}: is missing (header checksum" in text,
           f"damage is said:\n{text}")

    # A clean stop is seen.
    server.close()
    with Afterimage(folder, name="clean") as clean:
        clean.stop()
        text = clean.cli("log", "inspect", "vm1").stdout
        expect("closed cleanly" in text and "in use" not in text, f"a clean stop:\n{text}")
    said = run(binary(), "log", "inspect", server.backing(), ok=1).stderr
    expect("not a usable log" in said, f"something else than a log: {said}")

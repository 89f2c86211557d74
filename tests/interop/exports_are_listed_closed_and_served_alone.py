"""`export --list` and `--close`, and `export --foreground --listen` without a daemon."""

from harness.model import Disk, same_export
from harness.process import Child, expect, expect_equal, run, scratch, wait_until
from harness.server import Afterimage, binary

SIZE = 4 << 20

with scratch() as folder:
    with Afterimage(folder, groups={"vm1": {"vda": SIZE}}) as server:
        disk = Disk(server.socket, "vm1/vda", SIZE)
        server.wait_shipped()
        moments = {}
        for label in ("monday", "tuesday"):
            for _ in range(10):
                disk.write_somewhere()
            server.checkpoint(label)
            moments[label] = bytes(disk.content)
        server.wait_shipped()
        uris = {label: server.export(label)["vda"] for label in moments}
        listed = {entry["name"]: entry for entry in server.cli_json("export", "--list")}
        expect_equal(len(listed), 2, f"exports: {listed}")
        text = server.cli("export", "--list").stdout
        for label, uri in uris.items():
            expect(uri in text, f"{label} is in the list:\n{text}")
            same_export(label, uri, moments[label], folder)

        # A moment that nobody named has a time as well.
        disk.write(0, b"unnamed " * 512)
        server.wait_shipped()
        last = server.points()["spans"][-1]["last_wall_ns"]
        shown = server.cli_json("export", "vm1@latest")
        expect(last > 0, "the time of the last record")
        expect_equal(shown["wall_ns"], last, "time of an image that is no checkpoint")
        (entry,) = [entry for entry in server.cli_json("export", "--list") if entry["name"] == shown["name"]]
        expect_equal(entry["wall_ns"], last, "its time in the list")
        server.cli("export", "--close", shown["name"])

        (closed,) = [name for name, entry in listed.items() if entry["disks"][0]["uri"] == uris["monday"]]
        expect(closed in server.cli("export", "--close", closed).stdout, "what was closed is named")
        run("nbdinfo", uris["monday"], ok=False)
        same_export("tuesday after monday was closed", uris["tuesday"], moments["tuesday"], folder)
        expect_equal([entry["name"] for entry in server.cli_json("export", "--list")],
                     [name for name in listed if name != closed], "the list afterwards")
        said = server.cli("export", "--close", closed, ok=1).stderr
        expect(closed in said, f"an image that is not exported is named: {said}")

    # Without the daemon, from the repository alone.
    address = folder / "alone.sock"
    alone = Child([binary(), "export", "--foreground", "--listen", f"unix:{address}", "--repository",
                   f"file://{server.repository}", "vm1@monday"], folder / "alone.log")
    try:
        uri = wait_until(lambda: next((line for line in alone.log().splitlines() if line.startswith("nbd+unix:")), None)
                         or expect(alone.running(), f"the export runs: {alone.log()}"), "its address")
        same_export("monday, served alone", uri, moments["monday"], folder)
        expect_equal(oct(address.stat().st_mode & 0o777), oct(0o600), "mode of its socket")
        expect_equal(alone.terminate(), 0, "exit code after SIGTERM")
    finally:
        alone.kill()
    said = run(binary(), "export", "--foreground", "--listen", "tcp://0.0.0.0:1", "--repository",
               f"file://{server.repository}", "vm1@monday", ok=1).stderr
    expect("other hosts" in said, f"images are not for other hosts: {said}")

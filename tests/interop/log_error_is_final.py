"""The log fails: no flush lies, nothing answered is lost, and the next start goes on with a new log.

What fails is real: the process may write no file beyond some length (RLIMIT_FSIZE), which the log's
frames soon are and everything else is not.
"""

import resource

from harness.model import same_content
from harness.nbd_client import FLUSH, WRITE, Connection
from harness.process import expect, expect_equal, run, say, scratch
from harness.server import Afterimage, binary

MIB = 1 << 20
LIMIT = 12 * MIB
DISK = 4 * MIB
EIO = 5


def file_limit(pid, bytes_max):
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (bytes_max, hard))


def server_of(folder, name, **more):
    server = Afterimage(folder, name=name, groups={"vm1": {"vda": DISK}}, log="32MiB", ring="8MiB", **more)
    # Python ignores SIGXFSZ; its children are to do so too, and get the error instead.
    server.child_options = {"restore_signals": False}
    return server


def fill(client, content, number, at, length=64 << 10):
    data = bytes([number % 255 + 1]) * length
    error = client.call(WRITE, at, length, data)
    if error == 0:
        content[at : at + length] = data
    return error


def broken(server):
    """Lets the log go past the limit, then fail. Returns a client and what was answered."""
    content = bytearray(DISK)
    client = Connection(server.socket).open_export("vm1/vda")
    for number in range(16 * 16):
        expect_equal(fill(client, content, number, number * (64 << 10) % DISK), 0, "write")
    expect_equal(client.call(FLUSH), 0, "flush")
    file_limit(server.child.pid, LIMIT)
    for number in range(24):
        fill(client, content, 100 + number, (number * 5 % 64) * (64 << 10))
    return client, content


def read_all(server):
    with Connection(server.socket).open_export("vm1/vda") as client:
        return b"".join(client.read(at, MIB) for at in range(0, DISK, MIB))


def check(server, content, what):
    expect(read_all(server) == bytes(content), f"{what}: every answered write is there, nothing else")


def log_uuid(server):
    return server.cli_json("log", "inspect", server.log_path())["log"]


with scratch() as folder:
    # "fail": the guest is told; the next start writes what the log lacks to a new one.
    server = server_of(folder, "fail")
    with server:
        old = log_uuid(server)
        client, content = broken(server)
        for _ in range(3):
            expect_equal(client.call(FLUSH), EIO, "flush on a failed log")
        expect(read_all(server) == bytes(content), "reads go on, with all that was answered")
        status = server.group_status()
        expect_equal(status["state"], "failed", "state")
        epoch = status["epoch"]
        client.close()
        server.kill()

        # No room for the new log: refused, and said what to do; nothing is lost by it.
        server.child_options["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        said = server.start_refused()
        for word in [str(server.log_path()), "no room", "do not reboot", "--new-log"]:
            expect(word in said, f"the refusal says {word!r}:\n{said[-3000:]}")
        expect(not list(server.folder.glob("*.creating")), "no half a log is left behind")
        del server.child_options["preexec_fn"]

        server.start()
        check(server, content, "after the replacement")
        status = server.group_status()
        expect_equal(status["state"], "running", "state")
        expect(status["verify_due"], "a verify is due")
        expect(log_uuid(server) != old, "the log is another one")
        with Connection(server.socket).open_export("vm1/vda") as client:
            expect_equal(fill(client, content, 77, 0), 0, "write")
            expect_equal(client.call(FLUSH), 0, "flush on the new log")
        server.wait_shipped()
        server.checkpoint("after")
        server.wait_shipped()
        expect(server.group_status()["epoch"] > epoch, "the new log has an epoch of its own")
        same_content("after", server.restore("after", folder / "after") / "vda.raw", bytes(content))
        server.kill()
        server.start()
        check(server, content, "after a kill on the new log")
        server.stop()
        server.start()
        expect(not server.group_status().get("verify_due"), "clean after a clean stop")

    # The same after an orderly end, which cannot be clean.
    with server_of(folder, "term") as server:
        client, content = broken(server)
        client.close()
        expect(server.child.terminate() != 0, "an end that could not drain says so")
        server.start()
        check(server, content, "after SIGTERM")

    # Plain disks from a failed log.
    with server_of(folder, "plain") as server:
        client, content = broken(server)
        expect_equal(client.call(FLUSH), EIO, "flush")
        client.close()
        server.kill()
        server.cli("recover", "vm1", "--to-plain")
        same_content("plain", server.backing(), bytes(content))

    # A new log elsewhere; the old one may not come back then.
    with server_of(folder, "moved") as server:
        client, content = broken(server)
        expect_equal(client.call(FLUSH), EIO, "flush")
        client.close()
        server.kill()
        old = server.log_path()
        new = server.folder / "elsewhere.log"
        server.cli("recover", "vm1", "--new-log", new)
        server.log_path = lambda group="vm1": new
        server.write_config()
        server.start()
        check(server, content, "on the moved log")
        expect(server.group_status()["verify_due"], "a verify is due on the moved log")
        server.stop()
        server.log_path = lambda group="vm1": old
        server.write_config()
        said = server.start_refused()
        expect("belongs to log" in said, f"the old log is refused:\n{said[-3000:]}")
        # On a log that has not failed there is nothing to move.
        server.log_path = lambda group="vm1": new
        server.write_config()
        run(binary(), "--config", server.config, "recover", "vm1", "--new-log", server.folder / "third.log", ok=False)
        expect(not (server.folder / "third.log").exists(), "nothing was made")
        server.start()
        check(server, content, "back on the moved log")

    # "detach": the guest goes on without a log, which may never be replayed.
    with server_of(folder, "detach", group_lines='on_log_error = "detach"') as server:
        client, content = broken(server)
        expect_equal(client.call(FLUSH), 0, "flush goes to the disk itself")
        for number in range(40):
            expect_equal(fill(client, content, 200 + number, (number % 64) * (64 << 10)), 0, "write")
        expect_equal(client.call(FLUSH), 0, "flush")
        status = server.group_status()
        expect_equal(status["state"], "degraded", "state")
        client.close()
        server.kill()
        same_content("the disk", server.backing(), bytes(content))
        before = server.log_path().read_bytes()
        said = server.start_refused()
        expect("must not be replayed" in said, f"the old log is refused:\n{said[-3000:]}")
        expect(server.log_path().read_bytes() == before, "the old log is kept as it was")
        same_content("the disk after the refusal", server.backing(), bytes(content))
        server.log_path().rename(server.folder / "old.log")
        server.start()
        expect(server.group_status()["verify_due"], "a verify is due")
        check(server, content, "with a new log")
    say("no flush lied, nothing answered was lost")

"""The log fails: no flush lies, nothing answered is lost, and the next start goes on with a new log.

What fails is real: the process may write no file beyond some length (RLIMIT_FSIZE), which the log's
frames soon are and everything else is not.
"""

import resource
import threading

from harness.model import same_content
from harness.nbd_client import FLUSH, WRITE, Connection
from harness.process import expect, expect_equal, run, say, scratch, wait_until
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
    """Lets the log go past the limit, then fail. Returns a client and what was answered.

    The writes after the limit begin with the block that was flushed last: the disk lacks it still, and
    what was written over it never becomes durable.
    """
    content = flushed(server)
    client = Connection(server.socket).open_export("vm1/vda")
    file_limit(server.child.pid, LIMIT)
    for number in range(24):
        fill(client, content, 100 + number, (63 - number) * (64 << 10))
    return client, content


def flushed(server, content=None):
    """Writes until the log is past the limit, flushes. Returns what the disk holds."""
    content = content or bytearray(DISK)
    with Connection(server.socket).open_export("vm1/vda") as client:
        for number in range(16 * 16):
            expect_equal(fill(client, content, number, number * (64 << 10) % DISK), 0, "write")
        expect_equal(client.call(FLUSH), 0, "flush")
    return content


def flush_or_end(client):
    """Waits for the answer to a flush, or for the end of the server."""
    try:
        client.call(FLUSH)
    except (OSError, EOFError, AssertionError):
        pass


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
        expect(server.group_status()["verify_due"], "a verify is due")
        # Degraded while its target has no copy of the new log.
        wait_until(lambda: server.group_status()["state"] == "running", "the group to run")
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
        expect_equal(server.group_status()["state"], "failed", "state")
        expect_equal(server.child.terminate(), 1, "an end that could not drain says so, and comes")
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
        server.stop()
        same_content("the disk after a clean stop", server.backing(), bytes(content))

    # The same, ended in order: the disk stays without the log that failed.
    with server_of(folder, "detach-term", group_lines='on_log_error = "detach"') as server:
        client, content = broken(server)
        expect_equal(client.call(FLUSH), 0, "flush goes to the disk itself")
        expect_equal(fill(client, content, 7, 5 << 16), 0, "write")
        client.close()
        expect_equal(server.child.terminate(), 0, "all is in the disk")
        said = server.start_refused()
        expect("must not be replayed" in said, f"the old log is refused:\n{said[-3000:]}")
        same_content("the disk after the refusal", server.backing(), bytes(content))

    # The marker cannot be stored: the guest waits, the state says why, and it is tried again.
    with server_of(folder, "marker", group_lines='on_log_error = "detach"') as server:
        content = flushed(server)
        marker = server.backing().with_name(server.backing().name + ".afterimage")
        aside = marker.with_suffix(".aside")
        for comes_back in [True, False]:
            # The records of a pass are appended when they come: the log must fail by the write below.
            server.wait_shipped()
            marker.rename(aside)
            file_limit(server.child.pid, LIMIT)
            client = Connection(server.socket).open_export("vm1/vda")
            expect_equal(fill(client, content, 31, 63 << 16), 0, "the last write that the ring takes")
            waiting = threading.Thread(target=flush_or_end, args=(client,), daemon=True)
            waiting.start()
            wait_until(lambda: "markers" in (server.group_status().get("reason") or ""), "the state says why")
            expect_equal(server.group_status()["state"], "failed", "state")
            expect(waiting.is_alive(), "the guest waits")
            expect(read_all(server) == bytes(content), "reads go on")
            if comes_back:
                aside.rename(marker)
                waiting.join(60)
                expect(not waiting.is_alive(), "the flush is answered")
                expect_equal(server.group_status()["state"], "degraded", "state")
                server.kill()
                same_content("the disk", server.backing(), bytes(content))
                server.log_path().unlink()
                server.start()
                content = flushed(server, content)
            else:
                # Nothing came past the log: the next start goes on with a new one.
                server.kill()
                aside.rename(marker)
                server.start()
                check(server, content, "killed before the marker")
                wait_until(lambda: server.group_status()["state"] == "running", "the group to run")
            client.close()
    say("no flush lied, nothing answered was lost")

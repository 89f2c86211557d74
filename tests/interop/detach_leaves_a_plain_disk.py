"""After `detach` the backing is a plain disk, complete and current; editing it makes a start refuse.

A detach goes on whether anybody waits for it or not: the command is interrupted while the backing fails;
the state says that the disk is not complete; asked again, it is waited for; one that fails says what to do
and can be asked for again. The old log moved away, the group starts anew.
"""

import signal

from harness.devices import FailingFile
from harness.model import Disk, same_content
from harness.nbd_client import Connection, ExportRefused
from harness.process import Child, expect, expect_equal, fallocate_sparse, scratch, wait_until
from harness.server import Afterimage, binary

SIZE = 32 << 20


def edited_is_refused(folder):
    """What somebody wrote to the plain disk is never overwritten."""
    with Afterimage(folder, groups={"vm1": {"vda": SIZE}}) as server:
        disk = Disk(server.socket, "vm1/vda", SIZE)
        for _ in range(300):
            disk.write_somewhere()
        disk.close()
        server.cli("detach", "vm1")
        same_content("the plain disk", server.backing(), bytes(disk.content))
        server.stop()
        same_content("the plain disk after the stop", server.backing(), bytes(disk.content))

        with open(server.backing(), "r+b") as file:
            file.seek(8192)
            file.write(b"edited by somebody")
        said = server.start_refused()
        expect(str(server.backing()) in said, f"the refusal names the backing:\n{said}")
        expect("(the disk was detached) and must not be replayed" in said, f"the refusal says why:\n{said}")


def asked(server, name):
    """A detach that somebody waits for."""
    return Child([binary(), "--config", server.config, "detach", "vm1"], server.folder / name, env=server.environment)


def state_is(server, state, words=""):
    """Wait for this state with these words in its reason; returns the reason."""

    def seen():
        group = server.api_status()["groups"][0]
        return group["state"] == state and words in (group["reason"] or "") and group

    return wait_until(seen, f"{state}: {words}")["reason"]


def goes_on_without_the_command(folder):
    """The command is a spectator."""
    server = Afterimage(folder, name="failing", groups={"vm1": {"vda": SIZE}}, create_backings=False)
    image = fallocate_sparse(server.folder / "image", SIZE)
    with FailingFile(server.folder / "failing", image) as failing:
        server.backing().symlink_to(failing.path)
        with server:
            disk = Disk(server.socket, "vm1/vda", SIZE)
            for _ in range(100):
                disk.write_somewhere()
            failing.fail()
            for block in range(0, 2000, 7):
                disk.write(block * 4096, disk.dice.randbytes(4096))
            disk.close()
            first = asked(server, "first.log")
            reason = state_is(server, "detaching", "fails")
            expect("not complete" in reason, f"the state says that the disk is not complete: {reason}")
            first.process.send_signal(signal.SIGINT)
            first.wait()
            state_is(server, "detaching", "fails")
            try:
                Connection(server.socket).open_export("vm1/vda")
                expect(False, "a disk that is being detached cannot be opened")
            except ExportRefused:
                pass
            busy = server.cli("checkpoint", "vm1", ok=False)
            expect("is being detached" in busy.stderr, f"what a checkpoint is told:\n{busy.stderr}")

            # Once it is drained it wants its log; that is not there.
            away = server.folder / "away.log"
            server.log_path().rename(away)
            second = asked(server, "second.log")
            failing.heal()
            expect(second.wait() != 0, "a detach without its log fails")
            reason = state_is(server, "failed", "NOT complete")
            expect("afterimage detach vm1' again" in reason, f"the state says what to do: {reason}")
            expect("NOT complete" in second.log() and str(server.log_path()) in second.log(),
                   f"so does the command, and what is missing:\n{second.log()}")
            away.rename(server.log_path())

            done = server.cli_json("detach", "vm1")
            expect_equal(done["disks"], [str(server.backing())], "the plain disks")
            expect_equal(state_is(server, "detached"), None, "the reason")
            expect_equal(server.cli_json("detach", "vm1"), done, "the answer to one more detach")
            same_content("the plain disk", image, bytes(disk.content))
            late = server.cli("checkpoint", "vm1", ok=False)
            expect("move the log" in late.stderr, f"what to do to attach it again:\n{late.stderr}")
            server.stop()
            said = server.start_refused()
            expect("move the old log away" in said, f"the way back:\n{said}")
            server.log_path().rename(away)
            server.start()
            with Connection(server.socket).open_export("vm1/vda") as reader:
                expect(reader.read(0, SIZE) == bytes(disk.content), "the disk after the way back")
            server.wait_shipped()


with scratch() as folder:
    edited_is_refused(folder)
    goes_on_without_the_command(folder)

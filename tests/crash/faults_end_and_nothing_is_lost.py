"""Full disks and I/O errors under load, with kills in between: said in the state, nothing answered lost, goes on by itself.

The client treats an error as a guest does whose disk has werror=stop: it waits and sends
the same request again. Whatever was answered without an error must be there.
"""
# limit: 1800

import errno
import os
import time
from collections import Counter
from contextlib import ExitStack

from harness.devices import FailingFile, loop_device, resize, small_file_system
from harness.nbd_client import BLOCK, FLUSH, WRITE, Connection
from harness.process import expect, expect_equal, fallocate_sparse, say, scratch, wait_until
from harness.resending_client import MixedClient
from harness.server import Afterimage

FAULTS = {errno.EIO, errno.ENOSPC}
counts = Counter()


def group(server):
    """The group's status."""
    return server.api_status()["groups"][0]


def state_is(server, *states):
    """Wait for one of these states; returns the reason."""
    found = wait_until(lambda: (seen := group(server))["state"] in states and seen, f"a state of {states}")
    return found["reason"]


def client_of(server, blocks, **options):
    """A mixed client on vm1/vda that bears errors."""
    return MixedClient(server.socket, "vm1/vda", blocks=blocks, connections=2, depth=8, tolerated=FAULTS, **options)


def more_writes(client, count):
    """Wait for so many more answers."""
    wanted = client.answered_writes + count
    wait_until(lambda: client.check() or client.answered_writes >= wanted, f"{count} more writes")


def verify(server, client):
    """Compare the disk with what was answered."""
    with Connection(server.socket).open_export("vm1/vda") as reader:
        client.verify(reader.read)


def start_under_the_fault(server):
    """A start while the fault lasts: either it serves, or it refuses and says why. Nothing must be lost by it."""
    server.spawn()
    deadline = time.monotonic() + 60
    while server.child.running() and not server.said_ready():
        expect(time.monotonic() < deadline, "a start under the fault comes to an end")
        time.sleep(0.05)
    if server.child.running():
        counts["starts under a fault that served"] += 1
    else:
        counts["starts under a fault that were refused"] += 1
        say(f"refused: {server.child.log_tail(300).strip().splitlines()[-1]}")
    server.kill()


def backing_fails(folder, kill):
    """EIO from the backing, for reads and writes."""
    blocks = 6000
    server = Afterimage(folder, name="eio", groups={"vm1": {"vda": blocks * BLOCK}}, log="16MiB", ring="4MiB", to=[],
                        replica=False, create_backings=False)
    image = fallocate_sparse(server.folder / "image", blocks * BLOCK)
    with FailingFile(server.folder / "failing", image) as failing:
        server.backing().symlink_to(failing.path)
        with server:
            client = client_of(server, blocks, seed="eio").start()
            more_writes(client, 1500)
            failing.fail()
            say(f"backing fails: {state_is(server, 'degraded', 'failed')}")
            if not kill:
                wait_until(lambda: client.check() or client.errors > 0, "errors at the guest")
            counts["EIO phases of the backing"] += 1
            if kill:
                server.kill()
                start_under_the_fault(server)
                failing.heal()
                server.start()
                counts["kills under a fault"] += 1
            else:
                failing.heal()
            say("the fault is over")
            more_writes(client, 1500)
            state_is(server, "running")
            say("it went on by itself")
            client.finish()
            say("all answered")
            verify(server, client)
            say("all compared")
            counts["errors that the guest saw"] += client.errors
            counts["writes checked"] += client.answered_writes


def backing_full(folder, kill):
    """ENOSPC from the backing's file system."""
    blocks = 12_000
    with small_file_system(folder / "full", "30m"):
        server = Afterimage(folder, name="full", groups={"vm1": {"vda": blocks * BLOCK}}, log="16MiB", ring="4MiB",
                            to=[], replica=False)
        with server:
            client = client_of(server, blocks, seed="full").start()
            wait_until(lambda: client.check() or group(server)["state"] != "running", "the state to say it")
            say(f"backing full: {group(server)['reason']}")
            wait_until(lambda: client.check() or client.errors > 0, "errors at the guest")
            counts["ENOSPC phases of the backing"] += 1
            if kill:
                server.kill()
                start_under_the_fault(server)
                resize(server.folder, "256m")
                server.start()
                counts["kills under a fault"] += 1
            else:
                resize(server.folder, "256m")
            say("the fault is over")
            more_writes(client, 1500)
            state_is(server, "running")
            say("it went on by itself")
            client.finish()
            say("all answered")
            verify(server, client)
            say("all compared")
            counts["errors that the guest saw"] += client.errors
            counts["writes checked"] += client.answered_writes


def log_fails(folder, policy):
    """EIO from the log's device: final under `fail`; under `detach` the disk goes on by itself."""
    blocks = 2000
    server = Afterimage(folder, name=f"log-{policy}", groups={"vm1": {"vda": blocks * BLOCK}}, log="32MiB", ring="4MiB",
                        to=[], replica=False, group_lines=f'on_log_error = "{policy}"')
    image = fallocate_sparse(server.folder / "log.image", 32 << 20)
    with ExitStack() as stack:
        failing = stack.enter_context(FailingFile(server.folder / "failing", image))
        server.log_path().symlink_to(stack.enter_context(loop_device(failing.path)))
        with server:
            client = client_of(server, blocks, seed=policy).start()
            more_writes(client, 1000)
            failing.fail()
            if policy == "detach":
                say(f"log fails, detach: {state_is(server, 'degraded', 'detached')}")
                more_writes(client, 500)
                client.finish()
                verify(server, client)
                server.stop()
                client.verify(lambda offset, length: server.backing().read_bytes()[offset:offset + length])
                failing.heal()
                said = server.start_refused()
                expect("log" in said, f"the log must never be replayed, and the message says so:\n{said}")
            else:
                say(f"log fails: {state_is(server, 'failed', 'degraded')}")
                failing.heal()
                with Connection(server.socket).open_export("vm1/vda") as late:
                    for _ in range(3):
                        expect(late.call(FLUSH) != 0, "a flush after the first error of the log fails")
                        expect(late.call(WRITE, 0, BLOCK, bytes(BLOCK), 1) != 0, "so does a write with FUA")
                client.stay_away()
                server.kill()
                client.finish()
                server.spawn()
                wait_until(lambda: not server.child.running() or server.said_ready(), "a start after the log failed")
                if server.child.running():
                    with Connection(server.socket).open_export("vm1/vda") as reader:
                        # Block 0 was written with FUA above, and that was answered with an error.
                        client.verify_without_resend(lambda offset, length: reader.read(offset, length) if offset
                                                     else client.content(0, client.answered[0]))
                    counts["failed logs that were rewritten"] += 1
                else:
                    expect("log" in server.child.log_tail(600), "the refusal says that the log failed")
                    counts["failed logs that were refused"] += 1
            counts[f"EIO phases of the log, {policy}"] += 1
            counts["writes checked"] += client.answered_writes


def repository_full(folder, kill):
    """ENOSPC from the repository: intake stops and says so, points stay readable, it goes on by itself."""
    blocks = 4096
    with small_file_system(folder / "repository", "4m") as repository:
        server = Afterimage(folder, name="shipping", groups={"vm1": {"vda": blocks * BLOCK}}, log="64MiB", ring="4MiB",
                            to=[f"file://{repository}"], replica=f'repository = "file://{repository}"')
        with server:
            client = client_of(server, blocks, seed="repository").start()
            more_writes(client, 300)
            client.finish()
            server.wait_shipped()
            server.checkpoint("early")
            server.wait_shipped()
            early = list(client.answered)

            def check_early(number):
                with open(server.restore("early", folder / f"early-{number}") / "vda.raw", "rb") as file:
                    for block, version in enumerate(early):
                        expect(file.read(BLOCK) == client.content(block, version), f"early: block {block}")

            client.start()
            say("the repository has a point; filling it")
            error = wait_until(lambda: client.check() or group(server)["targets"][0]["error"], "the target's error")
            say(f"repository full: {error}")
            check_early(1)
            if kill:
                server.kill()
                server.start()
                counts["kills under a fault"] += 1
                wait_until(lambda: client.check() or group(server)["targets"][0]["error"], "the target's error again")
                check_early(2)
            more_writes(client, 200)
            expect_equal(client.errors, 0, "errors at the guest while the repository is full")
            resize(repository, "512m")
            client.finish()
            server.wait_shipped()
            check_early(3)
            server.checkpoint("late")
            server.wait_shipped()
            with open(server.restore("late", folder / "late") / "vda.raw", "rb") as file:
                client.verify(lambda offset, length: os.pread(file.fileno(), length, offset))
            counts["ENOSPC phases of the repository"] += 1
            counts["writes checked"] += client.answered_writes


FULL = bool(os.environ.get("AFTERIMAGE_TESTS_FULL"))
CASES = [(backing_fails, False), (backing_fails, True), (backing_full, True), (repository_full, True)]
MORE_CASES = [(backing_full, False), (repository_full, False)]
for _ in range(4 if FULL else 1):
    for case, kill in CASES + (MORE_CASES if FULL else []):
        with scratch() as folder:
            case(folder, kill)
    for policy in ("fail", "detach"):
        with scratch() as folder:
            log_fails(folder, policy)
for what, count in sorted(counts.items()):
    say(f"{what}: {count}")

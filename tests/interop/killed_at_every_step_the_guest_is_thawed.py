"""The daemon is killed at every step of an application-consistent checkpoint: the guest is thawed.

Once by the watchdog alone, while the daemon stays away, and once with the daemon started
again at once. Afterwards no intent is left, the point (if there is one) is crash-consistent,
and the next checkpoint is application-consistent. Before that, seen from outside: the intent and
its folder are synced before the agent is asked to freeze. And a daemon that hangs in the window, so
that nobody else can reach the agent, is killed by the watchdog.
"""
# limit: 400

import json
import re
import signal
import threading

from harness.agent import FakeGuest
from harness.process import expect, expect_equal, run, say, scratch, wait_until
from harness.server import Afterimage, binary

STEPS = [
    ("sync-delimited", "before"), ("fsfreeze-status", "after"), ("get-fsinfo", "after"),
    ("fsfreeze-freeze", "before"), ("fsfreeze-freeze", "after"),
    ("fsfreeze-thaw", "before"), ("fsfreeze-thaw", "after"),
]


def checkpoint(server, label):
    command = [binary(), "--config", server.config, "--json", "checkpoint", "vm1", "--app", "--label", label]
    return run(*command, ok=None)


def intent_is_durable_before_the_freeze(server, folder):
    """What the daemon does, in the order of its system calls."""
    trace = folder / "trace"
    server.spawn(under=["strace", "-D", "-f", "-qq", "-y", "-s", "100", "-o", trace, "-e",
                        "trace=fsync,fdatasync,rename,renameat,renameat2,write,writev,sendto,sendmsg"])
    server.wait_ready()
    checkpoint(server, "traced")
    server.stop()
    calls = trace.read_text().splitlines()
    state = re.escape(str(server.folder / "guest"))
    wanted = [
        rf"fsync\(\d+<{state}/[^>]*\.draft>", rf"rename.*\.intent\"", rf"fsync\(\d+<{state}>",
        r"(write|send)\S*\(\d+<.*guest-fsfreeze-freeze",
    ]
    at = [next((at for at, call in enumerate(calls) if re.search(what, call)), None) for what in wanted]
    expect(None not in at and at == sorted(at), f"order of {wanted}: lines {at}")


with scratch() as folder:
    agent_path = folder / "agent.sock"
    guest = FakeGuest(agent_path)
    agent = f'guest = [{{ qga = "{agent_path}" }}]'
    with Afterimage(folder, group_lines=agent) as server:
        intents = lambda: list((server.folder / "guest").glob("*.intent"))
        server.wait_shipped()
        checked = run(binary(), "--config", server.config, "guest", "check", "vm1", "--freeze")
        expect("would freeze: / /srv" in checked.stdout and "ready for" in checked.stdout, checked.stdout)
        good = json.loads(checkpoint(server, "good").stdout)
        expect_equal(good["kind"], "application", f"kind: {good}")
        say(f"window {good['freeze']['window_ns'] / 1e6:.2f} ms, ours {good['freeze']['own_ns'] / 1e6:.3f} ms")

        server.stop()
        intent_is_durable_before_the_freeze(server, folder)
        server.start()

        for restart in (False, True):
            for step in STEPS:
                fired = threading.Event()

                def hook(command, when, step=step, fired=fired):
                    if (command, when) == step and not fired.is_set():
                        fired.set()
                        server.kill()

                guest.hook = hook
                label = f"killed-{step[0]}-{step[1]}-{restart}"
                killed = checkpoint(server, label)
                expect(fired.is_set(), f"{step} came")
                expect(killed.returncode != 0, f"the command fails when the daemon is killed: {killed.stdout}")
                guest.hook = lambda command, when: None
                if restart:
                    server.start()
                wait_until(lambda: not intents(), f"the intent to go after {step}", 30)
                expect(guest.frozen_since is None, f"thawed after a kill at {step}")
                expect(guest.frozen_max < 8.0, f"frozen for {guest.frozen_max:.2f} s after a kill at {step}")
                if not restart:
                    server.start()
                after = json.loads(checkpoint(server, f"after-{label}").stdout)
                expect_equal(after["kind"], "application", f"kind of the next one: {after}")
        def hang(command, when):
            if (command, when) == ("fsfreeze-freeze", "after"):
                server.child.process.send_signal(signal.SIGSTOP)

        guest.hook = hang
        checkpoint(server, "killed-while-it-hung")
        guest.hook = lambda command, when: None
        expect_equal(server.child.wait(), -signal.SIGKILL, "end of a daemon that hangs while its guest is frozen")
        wait_until(lambda: not intents(), "the intent of a daemon that hung to go")
        expect_equal(guest.frozen_since, None, "frozen after the end of a daemon that hung")
        server.start()
        after = json.loads(checkpoint(server, "after-it-hung").stdout)
        expect_equal(after["kind"], "application", f"kind of the next one: {after}")

        server.wait_shipped()
        points = json.loads(run(binary(), "--config", server.config, "--json", "points", "vm1").stdout)["points"]
        kinds = {point["label"]: point["kind"] for point in points}
        wrong = {
            label: kind for label, kind in kinds.items()
            if (kind == "application") == label.startswith("killed")
        }
        expect_equal(wrong, {}, "points with the wrong kind")
        expect_equal(sum(kind == "application" for kind in kinds.values()), 3 + 2 * len(STEPS), "confirmed points")
        killed = [point for point in points if point["label"].startswith("killed")]
        expect(killed, "kills behind the marker left points")
        for point in killed:
            expect(point["freeze"]["reason"], f"{point['label']} says why it is crash-consistent")
        say(f"longest freeze {guest.frozen_max:.2f} s over {len(STEPS) * 2} kills")
    guest.close()

"""Runs inside the guest: systemd kills the daemon at every step of a checkpoint with a frozen guest.

The frozen one is made up (harness/agent.py); the watchdog is the unit's, in a control group of its own.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path

from harness.agent import FakeGuest
from harness.process import expect, expect_equal, say, wait_until

AGENT = "/run/vm2.qga"
INTENTS = Path("/var/lib/afterimage/guest")
STEPS = [
    ("sync-delimited", "before"), ("fsfreeze-status", "after"), ("get-fsinfo", "after"),
    ("fsfreeze-freeze", "before"), ("fsfreeze-freeze", "after"),
    ("fsfreeze-thaw", "before"), ("fsfreeze-thaw", "after"),
]


def systemctl(*words):
    return subprocess.run(["systemctl", *words], check=True, capture_output=True, text=True).stdout.strip()


def main_pid(unit):
    return int(systemctl("show", "--property=MainPID", "--value", unit))


def control_group(pid):
    return Path(f"/proc/{pid}/cgroup").read_text().strip()


def checkpoint(label):
    command = ["afterimage", "--json", "checkpoint", "vm2", "--app", "--label", label]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def kind(label):
    done = checkpoint(label)
    return json.loads(done.stdout)["kind"] if done.stdout else done.stderr


guest = FakeGuest(AGENT)
watchdog = main_pid("afterimage-watchdog.service")
expect(control_group(watchdog) != control_group(main_pid("afterimage.service")), "control groups of daemon and watchdog")
expect_equal(kind("before"), "application", "kind of a checkpoint that nobody disturbs")
for step in STEPS:
    fired = threading.Event()

    def hook(command, when, step=step, fired=fired):
        if (command, when) == step and not fired.is_set():
            fired.set()
            systemctl("kill", "-s", "KILL", "afterimage.service")

    before = main_pid("afterimage.service")
    guest.hook = hook
    label = f"killed-{step[0]}-{step[1]}"
    killed = checkpoint(label)
    guest.hook = lambda command, when: None
    expect(fired.is_set() and killed.returncode != 0, f"{step} came: {killed}")
    wait_until(lambda: not [*INTENTS.glob("*.intent")], f"the intent to go after a kill at {step}", 120)
    expect_equal(guest.frozen_since, None, f"frozen after a kill at {step}")
    wait_until(lambda: main_pid("afterimage.service") not in (0, before), "systemd to start it again", 120)
    wait_until(lambda: systemctl("show", "-P", "ActiveState", "afterimage.service") == "active", "the service", 120)
    expect_equal(kind(f"after-{label}"), "application", f"kind of the checkpoint after a kill at {step}")
    say(f"killed {step[1]} {step[0]}: frozen for at most {guest.frozen_max:.2f} s so far")
expect_equal(main_pid("afterimage-watchdog.service"), watchdog, "process of the watchdog")
journal = ["journalctl", "--no-pager", "-u", "afterimage-watchdog.service"]
said = subprocess.run(journal, capture_output=True, text=True, check=True).stdout
expect("thawing: a checkpoint was not seen through" in said, f"the watchdog thawed:\n{said}")
guest.close()
sys.exit(0)

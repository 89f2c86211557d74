"""Child processes, waiting and temporary folders of the whole-system checks.

Owns: every process a check starts. What always holds: a child is ended through
the handle that started it, never by name, and a check that ends in any way
leaves neither processes nor files behind (set KEEP=1 to keep its folder).
Waiting is by polling a condition with a generous deadline; nothing here
asserts how long something took.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 120.0


class CheckFailed(Exception):
    """An expectation did not hold; the message says which and what was seen."""


def say(text):
    """A line in the check's log, with the time since the check began."""
    print(f"[{time.monotonic() - _BEGAN:7.1f}] {text}", flush=True)


_BEGAN = time.monotonic()


def expect(condition, message):
    """Fail the check with `message` unless `condition` holds."""
    if not condition:
        raise CheckFailed(message)


def expect_equal(seen, wanted, what):
    """Fail the check unless `seen` equals `wanted`."""
    if seen != wanted:
        raise CheckFailed(f"{what}: wanted {wanted!r}, saw {seen!r}")


def wait_until(condition, what, patience_seconds=PATIENCE_SECONDS):
    """Poll until `condition()` is truthy and return its value."""
    deadline = time.monotonic() + patience_seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise CheckFailed(f"gave up after {patience_seconds:.0f} s waiting for: {what}")
        time.sleep(POLL_SECONDS)


def run(*command, ok=True, patience_seconds=PATIENCE_SECONDS, **options):
    """Run a command to its end; returns it with stdout and stderr as text.

    `ok=True` demands exit code 0, `ok=False` anything else, `ok=None` nothing,
    a number that very exit code.
    """
    command = [str(word) for word in command]
    options.setdefault("stdin", subprocess.DEVNULL)
    if "input" in options:
        del options["stdin"]
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace",
        timeout=patience_seconds, **options,
    )
    wanted = {True: result.returncode == 0, False: result.returncode != 0, None: True}
    fine = result.returncode == ok if type(ok) is int else wanted[ok]
    if not fine:
        raise CheckFailed(
            f"{' '.join(command)}: exit code {result.returncode} (wanted {ok})\n"
            f"--- stdout\n{result.stdout[-4000:]}\n--- stderr\n{result.stderr[-4000:]}"
        )
    return result


class Child:
    """A long-running process with its output in a file."""

    def __init__(self, command, log_path, **options):
        self.command = [str(word) for word in command]
        self.killed = False
        self.log_path = Path(log_path)
        self._log = open(self.log_path, "ab")
        options.setdefault("stdin", subprocess.DEVNULL)
        self.process = subprocess.Popen(
            self.command, stdout=self._log, stderr=subprocess.STDOUT, **options
        )

    @property
    def pid(self):
        return self.process.pid

    def running(self):
        """Whether the process has not ended yet."""
        return self.process.poll() is None

    def kill(self):
        """SIGKILL, and wait until it is gone."""
        self.killed = True
        if self.running():
            self.process.kill()
        self.process.wait()
        self._log.close()

    def terminate(self, patience_seconds=PATIENCE_SECONDS):
        """SIGTERM, and wait for its own clean end; returns the exit code."""
        if self.running():
            self.process.terminate()
        return self.wait(patience_seconds)

    def wait(self, patience_seconds=PATIENCE_SECONDS):
        """Wait for the end; returns the exit code."""
        try:
            code = self.process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            raise CheckFailed(
                f"still running after {patience_seconds:.0f} s: {' '.join(self.command)}\n{self.log_tail()}"
            ) from None
        self._log.close()
        return code

    def log(self):
        """All it has printed so far."""
        return self.log_path.read_text(errors="replace")

    def log_tail(self, characters=4000):
        """The end of what it has printed."""
        return self.log()[-characters:]


@contextlib.contextmanager
def scratch(prefix="afterimage-"):
    """A temporary folder, removed at the end unless KEEP is set."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        if os.environ.get("KEEP"):
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def fallocate_sparse(path, size_bytes):
    """Create a sparse file of that size."""
    with open(path, "wb") as file:
        file.truncate(size_bytes)
    return Path(path)

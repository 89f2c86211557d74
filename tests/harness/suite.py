"""Runs the scripts of a folder: `python3 -m harness.suite FOLDER [NAME...]`.

Each script is a process in a process group of its own, with its output in
target/test-logs/FOLDER/NAME.log and a time limit (a line `# limit: SECONDS` in
the script changes it). One with a line `# long tier` runs in `--full`, or when it is
named. Four run at a time, since most of them wait most of the time;
of those with guests two.
Whatever is left of a script's group afterwards is ended by the group's id and
counts as a failure. The last line is `N passed, N failed`.
"""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
LOGS = TESTS.parent / "target/test-logs"
LIMIT_SECONDS = 300
AT_ONCE, GUESTS_AT_ONCE = 4, 2
NOT_SCRIPTS = {"__init__", "image", "guest", "tools_disk", "write_log"}


def scripts(folder, names):
    """The scripts of a folder, or those of them whose name contains one of `names`."""
    every = sorted(path for path in (TESTS / folder).glob("*.py") if path.stem not in NOT_SCRIPTS)
    if names:
        return [path for path in every if any(name in path.stem for name in names)]
    full = bool(os.environ.get("AFTERIMAGE_TESTS_FULL"))
    return [path for path in every if full or not re.search(r"^# long tier$", path.read_text(), re.MULTILINE)]


def limit_seconds(path):
    """The script's own time limit."""
    stated = re.search(r"^# limit: (\d+)", path.read_text(), re.MULTILINE)
    return int(stated.group(1)) if stated else LIMIT_SECONDS


def end_group(group):
    """End what is left of a process group; returns whether there was anything."""
    try:
        os.killpg(group, signal.SIGKILL)
        return True
    except ProcessLookupError:
        return False


running_groups = set()


def run_script(path, log_path):
    """Run one script; returns None when it passed, else why it failed."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTHONDONTWRITEBYTECODE": "1"}
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(path)], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, env=environment,
        )
        running_groups.add(process.pid)
        try:
            code = process.wait(limit_seconds(path))
        except subprocess.TimeoutExpired:
            end_group(process.pid)
            process.wait()
            return f"not done after {limit_seconds(path)} s"
        finally:
            running_groups.discard(process.pid)
    left_over = end_group(process.pid)
    if code != 0:
        return f"exit code {code}"
    return "left processes behind" if left_over else None


def report(path):
    """Run one script and print how it went; returns whether it passed."""
    began = time.monotonic()
    name = f"{path.parent.name}/{path.stem}"
    log_path = LOGS / f"{name}.log"
    problem = run_script(path, log_path)
    took = time.monotonic() - began
    if problem is None:
        print(f"ok    {name}  ({took:.1f} s)", flush=True)
        return True
    said = log_path.read_text(errors="replace").splitlines()
    # The reason stands in the same line: it must be there where only a part of the output is kept.
    lines = [f"FAIL  {name}  ({took:.1f} s): {problem}: {reason(said)[:400]}; all of it in {log_path}"]
    print("\n".join(lines + [f"      | {line}" for line in said[-40:]]), flush=True)
    return False


def reason(said):
    """Of what a failed script printed, the line that says why: that of its exception, or the last one."""
    exceptions = [line for line in said if re.match(r"[\w.]+(Error|Failed|Refused|Expired)\b", line)]
    return (exceptions or said or ["it printed nothing"])[-1].strip()


def interrupted(*_):
    """End what runs, and this program, at once."""
    for group in list(running_groups):
        end_group(group)
    os._exit(143)


def main():
    """Run, report, and end with 1 if anything failed."""
    folder, names = sys.argv[1], sys.argv[2:]
    (LOGS / folder).mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupted)
    # Those that take longest by their own word begin first.
    chosen = sorted(scripts(folder, names), key=limit_seconds, reverse=True)
    with ThreadPoolExecutor(GUESTS_AT_ONCE if folder == "vm" else AT_ONCE) as pool:
        outcomes = list(pool.map(report, chosen))
    passed = sum(outcomes)
    failed = len(outcomes) - passed
    print(f"{passed} passed, {failed} failed", flush=True)
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()

"""Tests the tests: breaks the code on purpose and demands that a named test notices.

The breaks stand in the `*.toml` files beside this one. All of them are put into one copy of the
workspace at once, each behind a question that is asked at run time,

    crate::mutation::on("name-of-the-break")

so the copy is built once. The function reads AFTERIMAGE_MUTATION; it exists in the copy only.
Then each named test runs alone: once with no break, when it must pass, and once for every break
that names it, when it must fail. A break whose text is not in its file exactly once is an error,
so the table cannot go stale without being noticed.
"""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPY = ROOT / "target/mutations/workspace"
TARGET = ROOT / "target/mutations/target"
LOGS = ROOT / "target/test-logs/mutations"
# Packages that a break may be in or a test may come from.
COPIED = ["format", "proxy", "replica", "tools", "benches", "tests"]
# Folders whose tests are named, and their packages.
TESTED = {"format": "afterimage-format", "proxy": "afterimage-proxy", "replica": "afterimage-replica",
          "tools": "afterimage"}
QUESTION = "crate::mutation::on"
PAGE = ROOT / "docs/testing.md"
# The first seed at which the simulation's judge notices a break; `--simulation` writes it.
NOTICED = HERE / "noticed-by-the-simulation.txt"
SEEDS = 2000
AT_ONCE = 2
LIMIT_SECONDS = 240

MODULE = '''
/// Whether this break is asked for. In the copy that tests the tests only.
#[allow(dead_code, missing_docs, unreachable_pub)]
pub mod mutation {
    static NAME: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    #[must_use]
    pub fn on(name: &str) -> bool {
        NAME.get_or_init(|| std::env::var("AFTERIMAGE_MUTATION").ok()).as_deref() == Some(name)
    }
}
'''


@dataclass
class Edit:
    """One text that is replaced by another."""

    file: str
    find: str
    put: str


@dataclass
class Break:
    """A break of the code and the tests that must notice it."""

    name: str
    what: str
    area: str
    tests: list
    seeds: str
    edits: list = field(default_factory=list)


class TableError(Exception):
    """The table does not fit the code."""


def read_breaks():
    """All breaks, in the order of the files and within them."""
    breaks = []
    for path in sorted(HERE.glob("*.toml")):
        table = tomllib.loads(path.read_text())
        for entry in table["break"]:
            edits = [Edit(entry["file"], entry["find"], entry["put"])] if "find" in entry else []
            edits += [Edit(also.get("file", entry.get("file")), also["find"], also["put"])
                      for also in entry.get("also", [])]
            tests = entry["test"] if isinstance(entry["test"], list) else [entry["test"]]
            breaks.append(Break(entry["name"], entry["what"], path.stem, tests, entry.get("seeds", ""), edits))
    names = [item.name for item in breaks]
    double = {name for name in names if names.count(name) > 1}
    if double:
        raise TableError(f"two breaks of one name: {', '.join(sorted(double))}")
    for item in breaks:
        if not any("BREAK" in edit.put for edit in item.edits):
            raise TableError(f"{item.name}: no replacement asks BREAK")
        if not item.tests:
            raise TableError(f"{item.name}: names no test")
    return breaks


def broken_sources(breaks):
    """The content of every file that a break changes, with all breaks in it."""
    by_file = {}
    for item in breaks:
        for edit in item.edits:
            by_file.setdefault(edit.file, []).append((item, edit))
    sources = {}
    problems = []
    for file, edits in by_file.items():
        text = (ROOT / file).read_text()
        places = []
        for item, edit in edits:
            found = text.count(edit.find)
            if found != 1:
                problems.append(f"{item.name}: its text is {found} times in {file}, not once:\n    {edit.find.strip()}")
                continue
            at = text.index(edit.find)
            put = edit.put.replace("BREAK", f'{QUESTION}("{item.name}")')
            places.append((at, at + len(edit.find), put, item.name))
        places.sort()
        for before, after in zip(places, places[1:]):
            if before[1] > after[0]:
                problems.append(f"{before[3]} and {after[3]} change the same text of {file}")
        for start, end, put, _ in reversed(places):
            text = text[:start] + put + text[end:]
        sources[file] = text
    if problems:
        raise TableError("\n".join(problems))
    return sources


def write_if_other(path, content):
    """Leaves a file alone that is as it should be, so that cargo need not build it again."""
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def make_copy(sources):
    """The workspace with all breaks in it. Returns nothing; files that did not change keep their time."""
    # The last is built into a test.
    wanted = {Path("Cargo.toml"), Path("Cargo.lock"), Path("docs/afterimage.toml")}
    for package in COPIED:
        for path in (ROOT / package).rglob("*"):
            relative = path.relative_to(ROOT)
            rust = path.suffix in {".rs", ".toml"} or "golden" in relative.parts or "src" in relative.parts
            if path.is_file() and rust and "__pycache__" not in relative.parts:
                wanted.add(relative)
    for relative in wanted:
        content = (ROOT / relative).read_bytes()
        if str(relative) in sources:
            content = sources[str(relative)].encode()
        if relative.parts[1:] in {("src", "lib.rs")}:
            content += MODULE.encode()
        write_if_other(COPY / relative, content)
    for path in COPY.rglob("*"):
        if path.is_file() and path.relative_to(COPY) not in wanted:
            path.unlink()


def build(simulation=False):
    """Builds the copy's tests, or the simulation; returns the executable of each package."""
    # In a folder of its own: cargo names what it builds by the place of a package within its
    # workspace, so the copy's would be taken for the ordinary ones.
    if simulation:
        command = ["cargo", "build", "--package", "afterimage-tests", "--bin", "afterimage-sim", "--message-format=json"]
    else:
        command = ["cargo", "test", "--lib", "--no-run", "--message-format=json"]
        command += [word for name in TESTED.values() for word in ("--package", name)]
    environment = {**os.environ, "CARGO_TARGET_DIR": str(TARGET)}
    done = subprocess.run(command, cwd=COPY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    executables, messages = {}, []
    for line in done.stdout.splitlines():
        if not line.startswith("{"):
            continue
        message = json.loads(line)
        if message["reason"] == "compiler-message" and message["message"]["level"] == "error":
            messages.append(message["message"]["rendered"])
        if message["reason"] == "compiler-artifact" and message.get("executable"):
            package = Path(message["manifest_path"]).parent.name
            executables[package] = message["executable"]
    (LOGS / "build.log").write_text(done.stderr)
    if done.returncode != 0:
        raise TableError("\n".join(messages[:8]) or done.stderr[-4000:])
    return executables


def run_test(executables, test, mutation):
    """Runs one test alone. Returns (how it ended, its output): passed, failed, late or missing."""
    package, name = test.split("::", 1)
    if package not in executables:
        return "missing", f"no tests of package {package}"
    environment = {**os.environ, "PROPTEST_MAX_SHRINK_ITERS": "0", "PROPTEST_FAILURE_PERSISTENCE": "off"}
    environment.pop("AFTERIMAGE_MUTATION", None)
    if mutation:
        environment["AFTERIMAGE_MUTATION"] = mutation
    process = subprocess.Popen(
        [executables[package], "--exact", name], cwd=COPY / package, env=environment, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return "late", output
    if re.search(r"^running 0 tests", output, re.MULTILINE):
        return "missing", f"{test}: no such test"
    return ("passed" if process.returncode == 0 else "failed"), output


def reason(output):
    """The line of a failed test's output that says what it noticed."""
    lines = output.splitlines()
    for index, line in enumerate(lines):
        if "panicked at" in line:
            return " ".join(lines[index + 1:index + 2]).strip()[:150]
    return lines[-1][:150] if lines else "no output"


def noticed():
    """{name of a break: (seed at which the simulation noticed it, what it said)}."""
    lines = NOTICED.read_text().splitlines() if NOTICED.exists() else []
    split = (line.split(" ", 2) for line in lines if line and not line.startswith("#"))
    return {name: (int(seed), said) for name, seed, said in split}


def first_seed(executable, item):
    """The first seed at which the simulation notices a break; returns it and what was said, or None."""
    environment = {**os.environ, "AFTERIMAGE_MUTATION": item.name}
    command = [executable, "--seeds", str(SEEDS), "--jobs", "1", "--allow-missing"]
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors="replace", timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    (LOGS / f"{item.name}.simulation.log").write_text(done.stdout + done.stderr)
    found = re.search(r"^seed (\d+) FAILED: (.*)$", done.stdout, re.MULTILINE)
    return (int(found[1]), found[2][:110]) if found else None


def simulate(breaks, chosen):
    """Looks which breaks the simulation's judge notices by itself, and keeps that; returns the exit code.

    It need not notice all: what is outside the simulation (TLS, decoders' limits, schedules) it cannot
    see, and some breaks need a rarer meeting of faults. One that it noticed before and does not any
    more is a failure: either the judge has become blind, or its runs no longer lead there."""
    executable = build(simulation=True)["tests"]
    before, now, lost = noticed(), {}, []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for item, found in zip(chosen, pool.map(lambda item: first_seed(executable, item), chosen)):
            if found:
                now[item.name] = found
                print(f"ok    {item.name}: seed {found[0]}: {found[1]}", flush=True)
            elif item.name in before:
                lost.append(item.name)
                print(f"FAIL  {item.name}: not noticed in {SEEDS} seeds; it was at {before[item.name][0]}", flush=True)
            else:
                print(f"--    {item.name}: not noticed in {SEEDS} seeds", flush=True)
    kept = {**{name: entry for name, entry in before.items() if name in {item.name for item in breaks}}, **now}
    head = "# Which breaks the simulation notices by itself: name, first seed, what its judge said.\n"
    lines = [f"{name} {seed} {said}" for name, (seed, said) in sorted(kept.items())]
    NOTICED.write_text(head + "\n".join(lines) + "\n")
    print(f"{len(now)} of {len(chosen)} breaks noticed by the simulation within {SEEDS} seeds each")
    print(f"{len(now)} passed, {len(lost)} failed")
    return 1 if lost or not now else 0


def table(breaks):
    """The table for docs/testing.md."""
    seen = noticed()
    lines = ["| break | in | noticed by | seeds of the simulation |", "| --- | --- | --- | --- |"]
    for item in breaks:
        where = ", ".join(f"`{file}`" for file in sorted({edit.file for edit in item.edits}))
        tests = ", ".join(f"`{test.split('::')[-1]}`" for test in item.tests)
        seeds = f" ({item.seeds})" if item.seeds else ""
        simulated = seen[item.name][0] if item.name in seen else ""
        lines.append(f"| `{item.name}`: {item.what} | {where} | {tests}{seeds} | {simulated} |")
    return "\n".join(lines)


def main(arguments):
    """Runs what was asked for; returns the exit code."""
    breaks = read_breaks()
    sources = broken_sources(breaks)
    if arguments == ["--table"]:
        print(table(breaks))
        return 0
    if arguments == ["--check"]:
        stated = table(breaks) in PAGE.read_text()
        print(f"{len(breaks)} breaks fit the code" + ("" if stated else f"; the table in {PAGE} is another"))
        return 0 if stated else 1
    simulation = "--simulation" in arguments
    arguments = [word for word in arguments if word != "--simulation"]
    unknown = [word for word in arguments if not any(word in item.name for item in breaks)]
    if unknown:
        print(f"no break's name contains {', '.join(unknown)}; the head of tests/mutations/run says how to call it")
        return 2
    chosen = [item for item in breaks if not arguments or any(word in item.name for word in arguments)]
    LOGS.mkdir(parents=True, exist_ok=True)
    make_copy(sources)
    if simulation:
        return simulate(breaks, chosen)
    began = time.monotonic()
    executables = build()
    print(f"built with {len(breaks)} breaks in {time.monotonic() - began:.0f} s", flush=True)

    passed = failed = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tests = sorted({test for item in chosen for test in item.tests})
        for test, (how, output) in zip(tests, pool.map(lambda test: run_test(executables, test, None), tests)):
            if how != "passed":
                failed += 1
                print(f"FAIL  {test} without any break: {how}\n{output[-2000:]}", flush=True)
        pairs = [(item, test) for item in chosen for test in item.tests]
        outcomes = pool.map(lambda pair: run_test(executables, pair[1], pair[0].name), pairs)
        for (item, test), (how, output) in zip(pairs, outcomes):
            (LOGS / f"{item.name}.{test.split('::')[-1]}.log").write_text(output)
            if how == "failed":
                passed += 1
                print(f"ok    {item.name}: {test.split('::')[-1]}: {reason(output)}", flush=True)
            else:
                failed += 1
                said = {"passed": "SURVIVED", "late": f"not done after {LIMIT_SECONDS} s"}.get(how, how)
                print(f"FAIL  {item.name}: {said}: {test}", flush=True)
    print(f"{time.monotonic() - began:.0f} s, the build included")
    print(f"{passed} passed, {failed} failed", flush=True)
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TableError as error:
        print(f"the table does not fit the code:\n{error}\n0 passed, 1 failed")
        sys.exit(1)

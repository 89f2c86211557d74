"""`quickstart` with a disk of the user's own, without mke2fs, and with --keep."""
# limit: 600

import hashlib
import json
import os
import shutil
import signal
import tomllib
from pathlib import Path

from harness.process import expect, expect_equal, run, scratch, wait_until
from harness.server import binary


def arguments(path):
    """A process's command line, empty when it is gone."""
    try:
        return path.read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def leftovers(folder):
    """What a run leaves in its temporary folder and on the tmpfs."""
    return sorted(path.name for path in folder.iterdir())


with scratch() as folder:
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}

    # The user's own disk is read, never written.
    own = folder / "own.img"
    with open(own, "wb") as file:
        for number in range(24):
            file.seek(number << 20)
            file.write(hashlib.blake2b(bytes([number])).digest() * 4096)
        file.truncate((24 << 20) + 512)
    before = hashlib.sha256(own.read_bytes()).hexdigest()
    told = json.loads(run(binary(), "--json", "quickstart", "--disk", own, env=environment,
                          patience_seconds=200).stdout)
    expect_equal((told["disk_bytes"], told["writes_lost"]), ((24 << 20) + 512, 0), "what the story tells")
    # Six pieces of it, and what the application writes.
    expect_equal((told["files"], told["files_identical"], told["left_out_bytes"]), (7, 7, 0), f"all is as it was: {told}")
    expect_equal([point["label"] for point in told["checkpoints"]], ["before-lunch", "after-lunch"], "the checkpoints")
    expect_equal(hashlib.sha256(own.read_bytes()).hexdigest(), before, "the user's disk")
    expect_equal(leftovers(temporary), [], "nothing is left behind")
    refused = run(binary(), "quickstart", "--disk", folder / "none.img", env=environment, ok=1)
    expect("none.img" in refused.stderr, f"a missing disk is named: {refused.stderr}")
    expect_equal(leftovers(temporary), [], "nothing is left behind")

    # As nobody, with the 64 KiB of locked memory of old systems, and with nothing of root's to write.
    for_nobody = folder / "for-nobody"
    for_nobody.mkdir()
    os.chown(for_nobody, 65534, 65534)
    folder.chmod(0o755)
    program = folder / "afterimage"  # The build folder may be root's alone.
    shutil.copy(binary(), program)
    told = json.loads(run("prlimit", "--memlock=65536:65536", "setpriv", "--reuid", "65534", "--regid", "65534",
                          "--clear-groups", program, "--json", "quickstart", cwd=for_nobody, patience_seconds=200,
                          env={**os.environ, "TMPDIR": str(for_nobody), "HOME": str(for_nobody)}).stdout)
    expect_equal((told["writes_lost"], told["files"] > 0, told["files"]), (0, True, told["files_identical"]),
                 "the story as nobody")
    expect_equal(leftovers(for_nobody), [], "nothing is left behind")

    # Without mke2fs a file system of our own takes its place. Only what it needs is on the path.
    tools = folder / "bin"
    tools.mkdir()
    for name in ("cp", "sh"):
        (tools / name).symlink_to(shutil.which(name))
    hidden = {**environment, "PATH": str(tools)}
    found = [path for path in ("/sbin/mke2fs", "/usr/sbin/mke2fs") if os.path.exists(path)]
    command = [binary(), "quickstart"]
    if found:  # It is looked for there as well: hide it from this one process.
        empty = folder / "empty"
        empty.touch()
        hide = "; ".join(f"mount --bind {empty} {path}" for path in {os.path.realpath(path) for path in found})
        command = ["/usr/bin/unshare", "--mount", "/bin/sh", "-c", f'PATH=/usr/bin:/bin; {hide}; PATH={tools}; exec "$0" "$@"', *command]
    done = run(*command, env=hidden, patience_seconds=200)
    said = done.stdout + done.stderr
    expect("FAT16" in said, f"the fallback is named:\n{said}")
    # Every file, that of the application included.
    for line in ("49 files on FAT16", "49 of 49 unreadable", "49 of 49 files identical"):
        expect(line in said, f"'{line}' is said:\n{said}")
    expect("before-lunch (lsn:" in said and "after-lunch (lsn:" in said, f"the checkpoints are listed:\n{said}")
    expect_equal(leftovers(temporary), [], "nothing is left behind")

    # --keep leaves a daemon that can be looked at, and the folder.
    told = json.loads(run(binary(), "--json", "quickstart", "--keep", env=environment, patience_seconds=200).stdout)
    kept = told["kept"]
    expect(kept and os.path.isdir(kept), f"the folder is there: {told}")
    config = next(os.path.join(kept, name) for name in os.listdir(kept) if name.endswith(".toml"))
    status = json.loads(run(binary(), "--config", config, "--json", "status").stdout)
    expect_equal([group["state"] for group in status["groups"]], ["running"], "the daemon that was kept")
    [daemon] = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if config in arguments(path)]
    os.kill(daemon, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{daemon}").exists(), "the kept daemon to end")
    # The daemon is gone; what it kept is enough to restore from.
    run(binary(), "--config", config, "restore", f"{status['groups'][0]['name']}@latest", folder / "out")
    rings = tomllib.loads(Path(config).read_text())["ring_dir"]
    expect(os.path.isdir(rings), "the rings are there")
    shutil.rmtree(kept)
    shutil.rmtree(rings)

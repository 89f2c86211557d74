"""Wrong configurations and names: exit code 2, and a message that names file, key and remedy."""

import socket

from harness.process import expect, run, scratch
from harness.server import Afterimage, binary

CASES = [
    ("unknown key", 'colour = "blue"', ["colour"]),
    ("unknown table", "[nonsense]\na = 1", ["nonsense"]),
    ("wrong type", "workers = 'many'", ["wrong.toml:1", "many"]),
    ("size without sense", 'ring_budget = "12 parsecs"', ["wrong.toml:1", "12 parsecs"]),
]
BAD_NAMES = ["../etc", "a/b", ".hidden", "-dash", "", "n" * 65, "nul\\u0000name", "white space", "."]

with scratch() as folder:
    for what, line, words in CASES:
        path = folder / "wrong.toml"
        path.write_text(f"ring_dir = '/dev/shm'\n{line}\n" if "[" not in line else f"{line}\n")
        if "ring_budget" in line or "workers" in line:
            path.write_text(f"{line}\n")
        for command in [["config", "check"], ["serve"]]:
            result = run(binary(), "--config", path, *command, ok=2)
            said = result.stdout + result.stderr
            for word in [*words, str(path)]:
                expect(word in said, f"{what}, {' '.join(command)}: the message names {word!r}:\n{said}")

    missing = folder / "missing.toml"
    said = run(binary(), "--config", missing, "config", "check", ok=2).stderr
    expect(str(missing) in said, f"a missing file is named:\n{said}")

    for name in BAD_NAMES:
        path = folder / "name.toml"
        path.write_text(f'[[group]]\nname = "{name}"\n  [[group.disk]]\n  name = "vda"\n  path = "/nowhere/disk"\n')
        said = run(binary(), "--config", path, "config", "check", ok=2).stderr
        expect(str(path) in said and "name" in said, f"group name {name!r}:\n{said}")
        path.write_text(f'[[group]]\nname = "vm1"\n  [[group.disk]]\n  name = "{name}"\n  path = "/nowhere/disk"\n')
        said = run(binary(), "--config", path, "config", "check", ok=2).stderr
        expect(str(path) in said and "name" in said, f"disk name {name!r}:\n{said}")

    # Names on the command line reach paths, too.
    server = Afterimage(folder)
    for words in [
        ["status", "../vm1"], ["checkpoint", "../../x"], ["points", "a/b"], ["detach", ".."],
        ["checkpoint", "vm1", "--label", "../up"], ["checkpoint", "vm1", "--label", "latest"],
        ["checkpoint", "vm1", "--label", "lsn:12"], ["checkpoint", "vm1", "--label", "-90s"],
        ["export", "../x@latest"], ["restore", "vm1/../x@latest", folder / "out"], ["attach-help", "vm1/../vda"],
        ["cert", "client", "../x", "--out", folder / "certs"],
        ["cert", "client", "vm1", "--name", "../x", "--out", folder / "certs"],
        ["no-such-command"], ["restore", "vm1@latest"], ["recover", "vm1"],
    ]:
        server.cli(*words, ok=2)
    server.close()

    # A start that is refused leaves the files that were there (`start_refused` compares), of two disks too.
    two = {"vm1": {"vda": "8MiB", "vdb": "8MiB"}}

    # A folder for rings that would not outlive the process.
    with scratch() as elsewhere:
        rings = elsewhere / "rings"
        rings.mkdir()
        server = Afterimage(folder, name="disk-rings", ring_dir=rings, groups=two)
        try:
            said = server.start_refused()
            expect(str(rings) in said and "tmpfs" in said, f"ring_dir on a disk:\n{said}")
        finally:
            server.close()

    # An address that somebody has.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = Afterimage(folder, name="taken", groups=two)
        server.metrics_port = taken.getsockname()[1]
        server.write_config()
        said = server.start_refused()
        expect(f"127.0.0.1:{server.metrics_port} for metrics" in said, f"a taken address:\n{said}")
        server.close()

    # A folder for the log that cannot be made; the folders above it are not there either.
    server = Afterimage(folder, name="folders", groups=two)
    config = server.config.read_text()
    server.config.write_text(config.replace(str(server.log_path()), f"{server.folder}/new/{'n' * 256}/vm1.log"))
    said = server.start_refused()
    expect(f"{server.folder}/new/nnn" in said, f"a folder that cannot be made:\n{said}")

    # What is refused is no hindrance once it is put right.
    server.config.write_text(config.replace(str(server.log_path()), f"{server.folder}/new/vm1.log"))
    with server:
        expect((server.folder / "new/vm1.log").exists(), "the log in its new folder")

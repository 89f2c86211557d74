"""Wrong configurations and names: exit code 2, and a message that names file, key and remedy."""

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

    # A folder for rings that would not outlive the process.
    with scratch() as elsewhere:
        rings = elsewhere / "rings"
        rings.mkdir()
        server = Afterimage(folder, name="disk-rings", ring_dir=rings)
        try:
            said = server.start_refused()
            expect(str(rings) in said and "tmpfs" in said, f"ring_dir on a disk:\n{said}")
        finally:
            server.close()

"""The scripts of docs/guests/ for PostgreSQL, MariaDB and bare metal, word for word, on the real things.

Each is a `[[group.guest]]` before an agent that is made up. Seen from inside the window: PostgreSQL's
session in backup mode is there, MariaDB takes no write, a write to the file system waits. Afterwards all
is as before; also when a server does not answer, when a thaw comes without a freeze, when the daemon
was killed in the window, and when a freeze waits for the very thing that it froze and cannot be killed.
"""

import contextlib
import json
import os
import pwd
import re
import subprocess
from pathlib import Path

from harness.agent import FakeGuest
from harness.devices import loop_device
from harness.process import Child, expect, expect_equal, run, scratch, wait_until
from harness.server import Afterimage

DOCS = Path(__file__).resolve().parents[2] / "docs/guests"
POSTGRES = Path("/usr/lib/postgresql/15/bin")


def scripts_of(page, folder):
    """Write the page's shell scripts into `folder`; their state goes there, too."""
    for script in re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        name = re.search(r"^# /usr/local/lib/afterimage/([a-z-]+)", script, re.MULTILINE).group(1)
        path = folder / name
        path.write_text(script.replace("/run/afterimage-", f"{folder}/state-"))
        path.chmod(0o755)


class Postgres:
    """PostgreSQL in a folder of its own, on a unix socket there."""

    def __init__(self, folder):
        self.folder = folder / "pg"
        self.folder.mkdir()
        user = pwd.getpwnam("postgres")
        os.chown(self.folder, user.pw_uid, user.pw_gid)
        as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        run(*as_user, POSTGRES / "initdb", "-D", self.folder / "data", "-A", "trust", "--no-sync", cwd=self.folder)
        self.child = Child([*as_user, POSTGRES / "postgres", "-D", self.folder / "data", "-k", self.folder,
                            "-c", "listen_addresses=", "-c", "wal_level=replica"], folder / "pg.log", cwd=self.folder)
        self.environment = [f"PGHOST={self.folder}", "PGUSER=postgres"]
        wait_until(lambda: self.ask("select 1", ok=None) == "1", "PostgreSQL")

    def ask(self, query, ok=True):
        return run("env", *self.environment, "psql", "-XAtq", "-c", query, "postgres", ok=ok).stdout.strip()

    def in_backup_mode(self):
        """Sessions that began backup mode and are still there."""
        return int(self.ask("select count(*) from pg_stat_activity where pid <> pg_backend_pid() and query like '%ready%'"))


class MariaDb:
    """MariaDB in a folder of its own, on a unix socket there."""

    def __init__(self, folder):
        self.folder = folder / "maria"
        self.environment = [f"HOME={self.folder}"]
        run("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={self.folder}",
            "--auth-root-authentication-method=normal", "--skip-test-db")
        self.child = Child(["mariadbd", "--no-defaults", "--user=root", f"--datadir={self.folder}",
                            f"--socket={self.folder}/sock", "--skip-networking"], folder / "maria.log")
        (self.folder / ".my.cnf").write_text(f"[client]\nuser = root\nsocket = {self.folder}/sock\n")
        wait_until(lambda: self.ask("select 1").returncode == 0, "MariaDB")
        self.ask("create database shop; create table shop.sold (n int) engine=MyISAM")

    def ask(self, query):
        return run("env", *self.environment, "mysql", "-BN", "-e", query, ok=None)

    def takes_writes(self):
        """Whether a row gets into the table without waiting."""
        done = self.ask("set session lock_wait_timeout = 1; insert into shop.sold values (1)")
        expect(done.returncode == 0 or "Lock wait timeout" in done.stderr, done.stderr)
        return done.returncode == 0


class Mounted:
    """An ext4 on a loop device."""

    def __init__(self, folder, device):
        self.path = folder / "mounted"
        self.path.mkdir()
        self.writer = None
        run("mkfs.ext4", "-q", device)
        run("mount", device, self.path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        subprocess.run(["fsfreeze", "--unfreeze", self.path], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["umount", "--lazy", self.path], check=False)

    def takes_writes(self):
        """Whether a write gets through without waiting; one that waits is left to `wait`."""
        self.writer = subprocess.Popen(["sh", "-c", f"echo more >> {self.path}/file"])
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.writer.wait(0.5)
        return self.writer.returncode == 0

    def wait(self):
        """The write that waited gets through in the end."""
        expect_equal(self.writer.wait(60), 0, "exit code of the write that waited")


with scratch() as folder, loop_device(folder / "image", 32 << 20) as device, Mounted(folder, device) as mounted:
    folder.chmod(0o755)
    scripts_of("xfs-bare-metal.md", folder)
    scripts_of("postgresql.md", folder)
    scripts_of("mysql.md", folder)
    postgres, maria = Postgres(folder), MariaDb(folder)
    agent = FakeGuest(folder / "agent.sock")
    guests = []
    for name, environment in (("pg", postgres.environment), ("mysql", maria.environment)):
        command = lambda step: str(["env", *environment, f"{folder}/{name}-{step}"]).replace("'", '"')
        guests.append(f"{{ freeze = {command('freeze')}, thaw = {command('thaw')} }}")
    guests.append(f'{{ freeze = ["fsfreeze", "--freeze", "{mounted.path}"], thaw = ["{folder}/thaw", "{mounted.path}"] }}')
    guests.append(f'{{ qga = "{folder}/agent.sock" }}')
    seen = []

    def look(command, when):
        if (command, when) == ("fsfreeze-freeze", "after"):
            seen.append((postgres.in_backup_mode(), maria.takes_writes(), mounted.takes_writes()))

    def at_ease():
        now = postgres.in_backup_mode(), maria.takes_writes(), mounted.takes_writes()
        expect_equal(now, (0, True, True), "sessions in backup mode, and whether writes go through")

    for name, environment in (("pg", postgres.environment), ("mysql", maria.environment)):
        run("env", *environment, f"{folder}/{name}-thaw")
    run(folder / "thaw", mounted.path)
    with Afterimage(folder, group_lines=f"guest = [{', '.join(guests)}]") as server:
        server.wait_shipped()
        at_ease()
        agent.hook = look
        taken = server.cli_json("checkpoint", "vm1", "--app", "--label", "good")
        expect_equal(taken["kind"], "application", f"kind: {taken}")
        expect_equal(seen, [(1, False, False)], "the same in the window")
        mounted.wait()
        at_ease()

        def die(command, when):
            if (command, when) == ("fsfreeze-freeze", "after"):
                look(command, when)
                server.kill()

        agent.hook = die
        server.cli("checkpoint", "vm1", "--app", "--label", "killed", ok=False)
        agent.hook = lambda command, when: None
        expect_equal(seen[1:], [(1, False, False)], "the same in the window that the daemon did not survive")
        server.start()
        wait_until(lambda: not list((server.folder / "guest").glob("*.intent")), "everything to be thawed", 60)
        mounted.wait()
        at_ease()

        # A server that is not there: the freeze says so at once, and the others are thawed.
        postgres.child.terminate()
        refused = server.cli("--json", "checkpoint", "vm1", "--app", "--label", "no-database", ok=False)
        refused = json.loads(refused.stdout)
        expect_equal(refused["kind"], "crash", f"kind: {refused}")
        expect("No such file or directory" in refused["freeze"]["reason"], f"why: {refused}")
        expect(maria.takes_writes(), "the other database goes on")
        # A freeze that writes to what it froze: no signal ends that write, only the thaw does. It counts
        # once nothing of the freeze lives any more.
        stuck = f'["sh", "-c", "fsfreeze --freeze {mounted.path} && echo frozen > {mounted.path}/file"]'
        thaw = f'["{folder}/thaw", "{mounted.path}"]'
        config = server.config.read_text()
        agents = f"guest = [{{ freeze = {stuck}, thaw = {thaw} }}]\ncheckpoint = {{ freeze_limit = \"2s\" }}"
        config = config.replace(f"guest = [{', '.join(guests)}]", agents)
        server.config.write_text(config)
        server.restart()
        refused = json.loads(server.cli("--json", "checkpoint", "vm1", "--app", "--label", "stuck", ok=False).stdout)
        expect_equal(refused["kind"], "crash", f"kind: {refused}")
        expect("did not answer" in refused["freeze"]["reason"], f"why: {refused}")
        wait_until(lambda: not list((server.folder / "guest").glob("*.intent")), "the stuck freeze to be thawed", 60)
        expect(mounted.takes_writes(), "the file system takes writes again")
    maria.child.terminate()
    agent.close()

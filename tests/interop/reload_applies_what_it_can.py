"""SIGHUP: intervals, rates and the log level change at once; the rest is named; an error changes nothing."""

import signal

from harness.model import Disk
from harness.process import expect, scratch, wait_until
from harness.server import Afterimage

SIZE = 8 << 20

with scratch() as folder, Afterimage(folder, groups={"vm1": {"vda": SIZE}}, ship_interval="1h") as server:
    def reload(change, said):
        """Change the file, send SIGHUP, wait for a line behind what was logged before."""
        seen = len(server.child.log())
        server.config.write_text(change(server.config.read_text()))
        server.child.process.send_signal(signal.SIGHUP)
        return wait_until(lambda: said in server.child.log()[seen:] and server.child.log()[seen:], f"'{said}'")

    disk = Disk(server.socket, "vm1/vda", SIZE)
    server.checkpoint("begin")
    server.wait_shipped()
    disk.write(0, b"a" * 4096)
    wanted = server.group_status()["appended_lsn"]
    expect(server.group_status()["targets"][0]["acked_lsn"] < wanted, "it waits in an open segment")

    reload(lambda text: text + "\nnonsense = 1\n", "the configuration has an error")
    server.config.write_text(server.config.read_text().replace("\nnonsense = 1\n", ""))
    expect(server.group_status()["targets"][0]["acked_lsn"] < wanted, "an error changes nothing")
    reload(lambda text: text.replace('"1h"', '"50ms"'), "ships every 50ms")
    wait_until(lambda: server.group_status()["targets"][0]["acked_lsn"] >= wanted, "the open segment to be sent")

    said = reload(lambda text: text.replace('ring = "16MiB"', 'ring = "32MiB"'), "live after a restart")
    expect("vm1" in said, f"the group is named:\n{said}")
    text = server.config.read_text().replace('ring = "32MiB"', 'ring = "16MiB"')
    server.config.write_text('log_level = "warn"\n' + text)
    server.child.process.send_signal(signal.SIGHUP)
    disk.close()

    def is_quiet():
        """Whether a client comes and goes without a word."""
        seen = len(server.child.log())
        for _ in range(3):
            Disk(server.socket, "vm1/vda", SIZE).close()
        server.cli("status")
        return "INFO" not in server.child.log()[seen:]

    wait_until(is_quiet, "the log level to change")
    reload(lambda text: text.replace('log_level = "warn"\n', 'log_level = "info"\n'), "log_level is info")
    server.config.write_text('log_level = "loud=yes=no"\n' + server.config.read_text().replace('log_level = "info"\n', ""))
    refused = server.cli("config", "check", ok=False)
    expect(f"{server.config.name}:1" in refused.stderr and "log level" in refused.stderr, refused.stderr)

"""Each listener has its own groups, owner, mode and TLS: required, or offered beside plain text."""

import grp
import json
import os
import pwd

from harness.nbd_client import Connection, ExportRefused
from harness.ports import free_port
from harness.process import expect, expect_equal, run, scratch
from harness.server import Afterimage, binary
from harness.sites import Certificates

NOBODY = pwd.getpwnam("nobody")


def listed(uri):
    """Names of the exports that a client is told."""
    return sorted(entry["export-name"] for entry in json.loads(run("nbdinfo", "--json", "--list", uri).stdout)["exports"])


with scratch() as folder:
    certificates = Certificates(folder / "ca")
    certificate = certificates.server("127.0.0.1", "localhost")
    tls = f'{{ cert = "{certificate}.pem", key = "{certificate}.key", required = false }}'
    every, only_vm1, port = folder / "every.sock", folder / "vm1.sock", free_port()
    users_group = grp.getgrgid(NOBODY.pw_gid).gr_name
    listen = (f'["unix:{every}",'
              f' {{ address = "unix:{only_vm1}", groups = ["vm1"], owner = "nobody", group = "{users_group}", mode = "0600" }},'
              f' {{ address = "tcp://127.0.0.1:{port}", groups = ["vm2"], tls = {tls} }}]')
    groups = {"vm1": {"vda": "4MiB"}, "vm2": {"vda": "4MiB"}}
    with Afterimage(folder, groups=groups, nbd_listen=listen) as server:
        expect_equal(listed(f"nbd+unix:///?socket={every}"), ["vm1/vda", "vm2/vda"], "exports without a rule")
        expect_equal(listed(f"nbd+unix:///?socket={only_vm1}"), ["vm1/vda"], "exports of one group's listener")
        with Connection(only_vm1).open_export("vm1/vda") as client:
            client.write(0, b"through its own listener")
        for path in (every, only_vm1):
            try:
                Connection(path).open_export("vm2/vda").close()
                expect(path == every, "another group's disk is not opened")
            except ExportRefused:
                expect(path == only_vm1, "all groups are served where no rule says less")

        seen = os.stat(only_vm1)
        expect_equal((seen.st_uid, seen.st_gid, oct(seen.st_mode & 0o777)),
                     (NOBODY.pw_uid, NOBODY.pw_gid, oct(0o600)), "owner, group and mode of the socket")
        expect_equal(oct(os.stat(every).st_mode & 0o777), oct(0o660), "the default mode")

        # TLS that is offered and not required: both ways lead in, to the same group and no other.
        trusted = folder / "trusted"
        trusted.mkdir()
        (trusted / "ca-cert.pem").write_bytes((certificates.folder / "ca.pem").read_bytes())
        plain, encrypted = f"nbd://localhost:{port}/", f"nbds://localhost:{port}/"
        for uri, is_encrypted in [(plain, False), (encrypted, True)]:
            with_ca = f"?tls-certificates={trusted}" if is_encrypted else ""
            expect_equal(listed(uri + with_ca), ["vm2/vda"], f"exports at {uri}")
            info = json.loads(run("nbdinfo", "--json", f"{uri}vm2/vda{with_ca}").stdout)
            expect_equal(info["TLS"], is_encrypted, f"TLS at {uri}")
            run("nbdinfo", f"{uri}vm1/vda{with_ca}", ok=False)

    # An empty list is not "all".
    server.nbd_listen = f'[{{ address = "unix:{every}", groups = [] }}]'
    server.write_config()
    said = run(binary(), "--config", server.config, "config", "check", ok=2).stderr
    line = 1 + next(n for n, text in enumerate(server.config.read_text().splitlines()) if text.startswith("listen = "))
    expect(f"{server.config}:{line}: unix:{every} has groups = []" in said, f"the refusal:\n{said}")

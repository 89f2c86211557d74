"""What `attach-help` prints, run as it is printed: over a socket, one with an odd name, and TLS."""

import os
import re
import shutil

from harness.ports import free_port
from harness.process import expect, expect_equal, run, scratch
from harness.server import Afterimage
from harness.sites import Certificates

SIZE = 16 << 20


def section(said, title):
    """The lines under a title, up to the next one."""
    found = re.search(rf"^{title}\b.*\n\n((?:.+\n)+)", said, re.MULTILINE)
    expect(found, f"'{title}' in what is printed:\n{said}")
    return found[1]


def try_lines(server, folder, said):
    """Runs the lines for libnbd and QEMU."""
    folder.mkdir()
    content = os.urandom(SIZE)

    # QEMU's arguments behind a command of a machine that does not run: its monitor tells what it opened.
    machine = "qemu-system-x86_64 -nodefaults -machine q35 -display none -S -monitor stdio \\\n"
    told = run("sh", "-c", machine + section(said, "QEMU"), input="info block\nquit\n").stdout
    expect(re.search(r"vda.*nbd.*vm1/vda|vda.*vm1/vda", told), f"QEMU has the disk:\n{told}")

    # The same node for qemu-io and qemu-img, which have options of their own for it.
    qemu = section(said, "QEMU").replace("\\\n", "")
    creds = re.search(r"-object ('tls-creds[^']*'|tls-creds\S*)", qemu)
    creds = f"--object {creds[1]}" if creds else ""
    node = re.search(r"-blockdev ('(?:[^']|'\\'')*'|\S+)", qemu)[1]
    (folder / "source.raw").write_bytes(content)
    run("sh", "-c", f"qemu-img convert -n {creds} -f raw --target-image-opts source.raw {node}", cwd=folder)
    pattern = f"qemu-io {creds} --image-opts {node} -c 'write -P 0x5a 8192 4096' -c 'read -P 0x5a 8192 4096' -c flush"
    told = run("sh", "-c", pattern).stdout
    expect("verification failed" not in told, f"qemu-io:\n{told}")
    content = content[:8192] + b"\x5a" * 4096 + content[12288:]

    # libnbd's commands: the export, and a copy of it.
    told = run("sh", "-ec", section(said, "libnbd"), cwd=folder).stdout
    expect(f"export-size: {SIZE} " in told and "uri: nbd" in told, f"nbdinfo:\n{told}")
    expect((folder / "vda.raw").read_bytes() == content, "nbdcopy copied what QEMU wrote")

    # The URI by itself, as QEMU takes it.
    uri = section(said, "URI").strip()
    if not creds:
        told = run("sh", "-c", f"qemu-img info '{uri}'").stdout
        expect("virtual size: 16 MiB" in told, f"qemu-img info {uri}:\n{told}")


with scratch() as folder:
    groups = {"vm1": {"vda": SIZE}}

    with Afterimage(folder, name="plain", groups=groups) as server:
        said = server.cli("attach-help", "vm1/vda").stdout
        expect(f"-unix {server.socket} /dev/nbd0" in section(said, "Linux kernel"), f"nbd-client:\n{said}")
        try_lines(server, folder / "plain-out", said)

    with Afterimage(folder, name="it's a site, with 50% & more", groups=groups) as server:
        said = server.cli("attach-help", "vm1/vda").stdout
        try_lines(server, folder / "odd-out", said)
        # The image of a moment has its socket in the same folder.
        server.checkpoint("here")
        server.wait_shipped()
        uri = server.export("here")["vda"]
        expect(" " not in uri and "'" not in uri, f"the URI of an image: {uri}")
        run("sh", "-c", f"nbdinfo '{uri}'")

    # TLS: only with the certificates that are named.
    certificates = Certificates(folder / "ca")
    port = free_port()
    table = certificates.server_table(certificates.server("127.0.0.1", "localhost"))
    listen = f'[{{ address = "tcp://127.0.0.1:{port}", tls = {table} }}]'
    with Afterimage(folder, name="tls", groups=groups, nbd_listen=listen) as server:
        own = folder / "own certificates"
        said = server.cli("attach-help", "vm1/vda", "--tls-certificates", own).stdout
        for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem", "client_ca", str(own)):
            expect(name in said, f"{name} is named:\n{said}")
        own.mkdir()
        shutil.copy(certificates.folder / "ca.pem", own / "ca-cert.pem")
        # What only trusts the server is not let in.
        run("sh", "-c", section(said, "libnbd").splitlines()[0], ok=False)
        client = certificates.client("vm1")
        shutil.copy(f"{client}.pem", own / "client-cert.pem")
        shutil.copy(f"{client}.key", own / "client-key.pem")
        try_lines(server, folder / "tls-out", said)
        expect("-certfile" in section(said, "Linux kernel"), f"nbd-client:\n{said}")
        expect("dir=/etc/pki/qemu" in server.cli("attach-help", "vm1/vda").stdout, "where QEMU looks by itself")

    # Without client_ca a client needs no certificate of its own. Every address is none to connect to.
    port = free_port()
    table = re.sub(r", client_ca = \S+", "", table)
    listen = f'[{{ address = "tcp://0.0.0.0:{port}", tls = {table} }}]'
    with Afterimage(folder, name="any", groups=groups, nbd_listen=listen) as server:
        trusting = folder / "trusting"
        trusting.mkdir()
        shutil.copy(certificates.folder / "ca.pem", trusting / "ca-cert.pem")
        said = server.cli("attach-help", "vm1/vda", "--tls-certificates", trusting).stdout
        expect("client-cert.pem" not in said, f"no certificate of its own:\n{said}")
        expect_equal(re.findall(r"0\.0\.0\.0|\[::\]", said), [], f"an address that nobody can connect to in\n{said}")
        host = os.uname().nodename
        expect(f"nbds://{host}:{port}/vm1/vda" in said and "every address" in said, f"the host's name:\n{said}")
        # The certificate is valid for this name of it.
        try_lines(server, folder / "any-out", re.sub(rf"\b{re.escape(host)}\b", "localhost", said))

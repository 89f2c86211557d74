"""NBD over TLS: forced, with client certificates whose SAN decides which exports open."""

import os
import shutil

from harness.nbd_client import OPT_GO, OPT_LIST, OPT_STARTTLS, REP_ACK, REP_ERR_TLS_REQD, Connection
from harness.ports import free_port
from harness.process import expect_equal, run, scratch
from harness.server import Afterimage
from harness.sites import Certificates
from harness.tls import only_1_3_is_spoken


class Over(Connection):
    """A connection over a stream that is there already."""

    def __init__(self, stream):
        self.socket = stream
        self.cookie = 0
        self.size = self.flags = None


def start_tls(plain):
    """What comes before TLS in NBD."""
    client = Over(plain)
    client.greet()
    expect_equal(client.option_outcome(OPT_STARTTLS)[0], REP_ACK, "STARTTLS")


def list_exports(stream):
    """Something that is answered."""
    expect_equal(Over(stream).option_outcome(OPT_LIST)[0], REP_ACK, "LIST over TLS")


def gnutls_folder(certificates, certificate, folder):
    """The file names that libnbd looks for."""
    folder.mkdir()
    shutil.copy(certificates.folder / "ca.pem", folder / "ca-cert.pem")
    shutil.copy(f"{certificate}.pem", folder / "client-cert.pem")
    shutil.copy(f"{certificate}.key", folder / "client-key.pem")
    return folder


with scratch() as folder:
    certificates = Certificates(folder / "ca")
    port = free_port()
    tls = certificates.server_table(certificates.server("127.0.0.1", "localhost"))
    listen = f'[{{ address = "tcp://127.0.0.1:{port}", tls = {tls} }}]'
    with Afterimage(folder, groups={"vm1": {"vda": "16MiB"}, "vm2": {"vda": "16MiB"}}, nbd_listen=listen):
        mine = gnutls_folder(certificates, certificates.client("vm1"), folder / "vm1")
        old = gnutls_folder(certificates, certificates.client("vm1", name="old", days=-1), folder / "old")
        other_ca = Certificates(folder / "other-ca")
        foreign = gnutls_folder(other_ca, other_ca.client("vm1"), folder / "foreign")
        shutil.copy(certificates.folder / "ca.pem", foreign / "ca-cert.pem")
        uri = "nbds://localhost:{port}/{export}?tls-certificates={folder}"

        run("nbdinfo", uri.format(port=port, export="vm1/vda", folder=mine))
        source, back = folder / "source.raw", folder / "back.raw"
        source.write_bytes(os.urandom(16 << 20))
        run("nbdcopy", "--connections=4", source, uri.format(port=port, export="vm1/vda", folder=mine))
        run("nbdcopy", "--connections=4", uri.format(port=port, export="vm1/vda", folder=mine), back)
        run("cmp", source, back)
        run("nbdinfo", uri.format(port=port, export="vm2/vda", folder=mine), ok=False)
        run("nbdinfo", uri.format(port=port, export="vm1/vda", folder=old), ok=False)
        run("nbdinfo", uri.format(port=port, export="vm1/vda", folder=foreign), ok=False)
        run("nbdinfo", f"nbd://localhost:{port}/vm1/vda", ok=False)

        with Connection(address=("127.0.0.1", port)) as client:
            client.greet()
            expect_equal(client.option_outcome(OPT_LIST)[0], REP_ERR_TLS_REQD, "LIST before STARTTLS")
            expect_equal(client.option_outcome(OPT_GO, b"\0\0\0\x07vm1/vda\0\0")[0], REP_ERR_TLS_REQD, "GO")
        only_1_3_is_spoken("an NBD listener", port, certificates.folder / "ca.pem", certificates.folder / "client-vm1",
                           before=start_tls, after=list_exports)

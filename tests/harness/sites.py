"""Several servers of one check: a replica reached over TLS and the certificates for it.

Owns: a development authority in a folder, made by `afterimage cert` itself, and the
TOML that the certificates go into.
"""

from pathlib import Path

from harness.ports import free_port
from harness.process import run
from harness.server import Afterimage, binary


class Certificates:
    """A development authority and what it signs."""

    def __init__(self, folder):
        self.folder = Path(folder)
        run(binary(), "cert", "ca", "--out", self.folder)

    def server(self, *hosts, name="server", days=30):
        """A server's certificate; returns its path without the ending."""
        run(binary(), "cert", "server", *hosts, "--ca", self.folder, "--out", self.folder,
            "--name", name, "--days", days)
        return self.folder / name

    def client(self, *groups, name=None, days=30):
        """A primary's certificate for these groups; returns its path without the ending."""
        name = name or f"client-{groups[0]}"
        run(binary(), "cert", "client", *groups, "--ca", self.folder, "--out", self.folder,
            "--name", name, "--days", days)
        return self.folder / name

    def server_table(self, certificate):
        """TOML table of a TLS server that demands clients' certificates."""
        return f'{{ cert = "{certificate}.pem", key = "{certificate}.key", client_ca = "{self.folder}/ca.pem" }}'

    def client_table(self, certificate):
        """TOML table of a TLS client."""
        return f'{{ cert = "{certificate}.pem", key = "{certificate}.key", ca = "{self.folder}/ca.pem" }}'


def replica(folder, certificates, name="replica", port=None, **options):
    """A server without groups of its own that takes in what primaries ship."""
    port = port or free_port()
    certificate = certificates.server("127.0.0.1", "localhost", name=f"{name}-server")
    repository = Path(folder) / name / "repo"
    repository.mkdir(parents=True, exist_ok=True)
    table = (f'listen = "127.0.0.1:{port}"\nrepository = "file://{repository}"\n'
             f"tls = {certificates.server_table(certificate)}")
    server = Afterimage(folder, name=name, groups={}, replica=table, **options)
    server.repository_port = port
    return server


def primary(folder, certificates, port, *, name="primary", client=None, groups=None, to=None, **options):
    """A server that ships its groups to a replica's port over TLS, unless it is told where `to`."""
    groups = groups if groups is not None else {"vm1": {"vda": "64MiB"}}
    client = client or certificates.client(*groups, name=f"{name}-client")
    lines = f"[ship]\ntls = {certificates.client_table(client)}\n" + options.pop("lines", "")
    return Afterimage(folder, name=name, groups=groups, to=to or [f"afterimage://127.0.0.1:{port}"],
                      lines=lines, replica=False, **options)

"""Certificates that expired, of another authority or for another group; old TLS; a known name with another UUID."""

import os

from harness.nbd_client import Connection
from harness.process import expect, expect_equal, scratch, wait_until
from harness.sites import Certificates, primary, replica
from harness.tls import only_1_3_is_spoken


def target(site, group="vm1"):
    return site.group_status(group)["targets"][0]


def refused(site, what, state, *words):
    """The primary's state names the cause, and the guest is none the wiser."""
    with site:
        with Connection(site.socket).open_export("vm1/vda") as client:
            client.write(0, b"goes on" * 1000)
            client.flush()
        seen = wait_until(lambda: (found := target(site)).get("error") and found, f"{what}: an error in the status")
        expect_equal(seen["state"], state, f"{what}: the target's state")
        for word in words:
            expect(word in seen["error"], f"{what}: the error says {word!r}: {seen['error']}")
        expect(seen["acked_lsn"] == 0, f"{what}: nothing was taken in: {seen}")


with scratch() as folder:
    certificates, foreign = Certificates(folder / "ca"), Certificates(folder / "foreign-ca")
    with replica(folder, certificates) as dr:
        port = dr.repository_port
        # A header with an unknown message is answered by an error.
        only_1_3_is_spoken("a replica", port, certificates.folder / "ca.pem", certificates.client("vm1", name="any"),
                           after=lambda stream: (stream.sendall(bytes([99] + 7 * [0])), stream.recv(1)))

        expired = certificates.client("vm1", name="expired", days=-1)
        refused(primary(folder, certificates, port, name="a", client=expired), "an expired certificate",
                "away", "CertificateExpired")

        foreign.client("vm1", name="foreign")
        os.replace(folder / "foreign-ca/foreign.pem", folder / "ca/foreign.pem")
        os.replace(folder / "foreign-ca/foreign.key", folder / "ca/foreign.key")
        refused(primary(folder, certificates, port, name="b", client=folder / "ca/foreign"), "another authority",
                # It has the name of the right one, so the signature is what is wrong.
                "away", "DecryptError")

        refused(primary(folder, certificates, port, name="c", client=certificates.client("vm2", name="vm2")),
                "a certificate for another group", "refused", "NotPermitted", "URI:afterimage://vm2")

        # The replica's own certificate must be of the primary's authority, too.
        own = primary(folder, foreign, port, name="d", client=foreign.client("vm1", name="again"))
        refused(own, "a replica of another authority", "away", "invalid peer certificate")

        client = certificates.client("vm1")
        with primary(folder, certificates, port, name="first", client=client) as first:
            first.wait_shipped()
            first.checkpoint("first")
            first.wait_shipped()
        refused(primary(folder, certificates, port, name="second", client=client), "another UUID under a known name",
                "refused", "Identity", "is bound to UUID")
        expect(any(point.get("label") == "first" for point in dr.points()["points"]), "the first one's points stay")

"""TLS spoken by a client that is not ours: Python's, which is OpenSSL."""

import socket
import ssl

from harness.process import expect, expect_equal


def context(authority, certificate, newest):
    """A client's context that offers TLS 1.2 up to `newest`."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_verify_locations(authority)
    made.load_cert_chain(f"{certificate}.pem", f"{certificate}.key")
    made.minimum_version, made.maximum_version = ssl.TLSVersion.TLSv1_2, newest
    return made


def only_1_3_is_spoken(what, port, authority, certificate, *, before=lambda client: None, after):
    """A listener refuses TLS 1.2, takes 1.3, and gives out no tickets by which to resume.

    `before` is said in plain text; `after` gets the stream and makes the server say something, which
    is when tickets would have come at the latest.
    """
    with socket.create_connection(("127.0.0.1", port), 60) as plain:
        before(plain)
        old = context(authority, certificate, ssl.TLSVersion.TLSv1_2)
        try:
            old.wrap_socket(plain, server_hostname="localhost")
        except ssl.SSLError as error:
            # Its alert, or the end of the stream: not a reason of the client's own.
            expect("PROTOCOL_VERSION" in str(error.reason), f"{what}: TLS 1.2 is refused for its version: {error}")
        else:
            expect(False, f"{what}: TLS 1.2 is refused")
    with socket.create_connection(("127.0.0.1", port), 60) as plain:
        before(plain)
        new = context(authority, certificate, ssl.TLSVersion.TLSv1_3)
        with new.wrap_socket(plain, server_hostname="localhost") as stream:
            expect_equal(stream.version(), "TLSv1.3", f"{what}: the version")
            after(stream)
            expect(not stream.session_reused, f"{what}: a new session")
            session = stream.session
            expect(session is None or not session.has_ticket, f"{what}: no ticket to resume with")

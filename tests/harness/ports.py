"""TCP ports of the loopback for servers that a check stops and starts again.

What always holds: a port belongs to one check as long as that check runs. They lie below
those that the kernel gives to connections, which would take one while its server is down;
other checks are kept off by a lock on one byte of a file, which ends with the process.
"""

import fcntl
import os
import random
import socket
import tempfile

PORTS = range(20000, 32000)
_own = set()
_locks = open(f"{tempfile.gettempdir()}/afterimage-test-ports-{os.getuid()}", "ab")


def free_port():
    """A port that nobody uses, and that no other check is given."""
    for port in random.sample(PORTS, len(PORTS)):
        if port in _own:
            continue
        try:
            fcntl.lockf(_locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
        except OSError:
            continue
        _own.add(port)
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
            return port
        except OSError:
            pass  # Somebody's server. It stays locked, so that nobody tries it again.
    raise RuntimeError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")

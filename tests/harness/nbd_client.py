"""A small NBD client of our own, for what no finished client can be told to do.

`Connection` speaks the protocol by hand (fixed newstyle, simple replies), so a
check can stall, cut or garble it anywhere. The clients that write for long are
in `resending_client`.
"""

import socket
import struct

from harness.process import CheckFailed, expect

MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO, OPT_STRUCTURED = 1, 2, 3, 5, 6, 7, 8
REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
REP_ERR = 1 << 31
REP_ERR_UNSUP, REP_ERR_POLICY, REP_ERR_INVALID = REP_ERR | 1, REP_ERR | 2, REP_ERR | 3
REP_ERR_TLS_REQD, REP_ERR_UNKNOWN, REP_ERR_TOO_BIG = REP_ERR | 5, REP_ERR | 6, REP_ERR | 9
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES = range(7)
FLAG_FUA = 1
BLOCK = 4096


class ExportRefused(CheckFailed):
    """GO was answered with an error."""


class Connection:
    """One connection; `open_export` brings it into the transmission phase."""

    def __init__(self, path=None, *, address=None, patience_seconds=60):
        if path is not None:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(patience_seconds)
            self.socket.connect(str(path))
        else:
            self.socket = socket.create_connection(address, patience_seconds)
        self.cookie = 0
        self.size = self.flags = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()

    def close(self):
        """Close without DISC."""
        self.socket.close()

    def send(self, data):
        """Send raw bytes."""
        self.socket.sendall(data)

    def receive(self, length):
        """Receive exactly so many bytes."""
        parts = bytearray()
        while len(parts) < length:
            part = self.socket.recv(min(1 << 20, length - len(parts)))
            if not part:
                raise ConnectionError("the server closed the connection")
            parts += part
        return bytes(parts)

    def closed_by_server(self):
        """Whether the server closes without sending anything more."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    # Handshake

    def greet(self, client_flags=3):
        """Server's greeting and the client's flags."""
        magic, option_magic, flags = struct.unpack(">QQH", self.receive(18))
        expect(magic == MAGIC and option_magic == OPTION_MAGIC, "the greeting has NBD's magic numbers")
        expect(flags & 1, "the server speaks fixed newstyle")
        self.send(struct.pack(">I", client_flags))
        return flags

    def option(self, option, data=b"", length=None):
        """Send an option; `length` may lie."""
        size = len(data) if length is None else length
        self.send(struct.pack(">QII", OPTION_MAGIC, option, size) + data)

    def option_reply(self):
        """One reply to an option: (option, kind, payload)."""
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        expect(magic == OPTION_REPLY_MAGIC, "an option's reply has its magic number")
        return option, kind, self.receive(length)

    def option_outcome(self, option, data=b"", length=None):
        """Send an option and return the kind of its last reply and all payloads before it."""
        self.option(option, data, length)
        payloads = []
        while True:
            _, kind, payload = self.option_reply()
            if kind == REP_ACK or kind & REP_ERR:
                return kind, payloads
            payloads.append(payload)

    def open_export(self, name):
        """Greeting and GO; the connection then takes requests."""
        self.greet()
        name = name.encode() if isinstance(name, str) else name
        kind, payloads = self.option_outcome(OPT_GO, struct.pack(">I", len(name)) + name + b"\0\0")
        if kind != REP_ACK:
            raise ExportRefused(f"GO {name!r} was answered with {kind:#x}")
        for payload in payloads:
            if payload[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", payload[2:12])
        return self

    # Transmission

    def request(self, command, offset=0, length=0, payload=b"", flags=0, cookie=None):
        """Send a request; returns its cookie."""
        if cookie is None:
            self.cookie += 1
            cookie = self.cookie
        self.send(struct.pack(">IHHQQI", REQUEST_MAGIC, flags, command, cookie, offset, length) + payload)
        return cookie

    def reply(self):
        """One simple reply without data: (errno, cookie)."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        expect(magic == REPLY_MAGIC, f"a simple reply has its magic number, not {magic:#x}")
        return error, cookie

    def call(self, command, offset=0, length=0, payload=b"", flags=0):
        """A request and its reply, one at a time; returns the errno."""
        cookie = self.request(command, offset, length, payload, flags)
        error, answered = self.reply()
        expect(cookie == answered, "the reply carries the request's cookie")
        return error

    def write(self, offset, data, flags=0):
        """Write; fails the check on an error."""
        error = self.call(WRITE, offset, len(data), data, flags)
        expect(error == 0, f"write of {len(data)} at {offset}: errno {error}")

    def trim(self, offset, length):
        """Trim; fails the check on an error."""
        error = self.call(TRIM, offset, length)
        expect(error == 0, f"trim of {length} at {offset}: errno {error}")

    def flush(self):
        """Flush; fails the check on an error."""
        error = self.call(FLUSH)
        expect(error == 0, f"flush: errno {error}")

    def read(self, offset, length):
        """Read; fails the check on an error."""
        error = self.call(READ, offset, length)
        expect(error == 0, f"read of {length} at {offset}: errno {error}")
        return self.receive(length)

"""A guest's agent on a unix socket, and the guest behind it: frozen or not, and for how long.

Works as QEMU's does behind its chardev: one client at a time, requests in order. What
was received is executed although the client has gone. `hook(command, when)` is called
"before" a command is executed and "after" it, before its answer is sent.
"""

import json
import socket
import threading
import time

MOUNTS = ["/", "/srv"]


class FakeGuest:
    """Serves in a thread until it is closed."""

    def __init__(self, path):
        self.hook = lambda command, when: None
        self.frozen_since = None
        self.frozen_max = 0.0
        self.commands = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(8)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def close(self):
        """No further clients."""
        self.listener.close()

    def _serve(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with client:
                try:
                    for line in client.makefile("rb"):
                        answer = self._execute(json.loads(line.lstrip(b"\xff")))
                        client.sendall(answer)
                except OSError:
                    pass

    def _execute(self, request):
        command = request["execute"].removeprefix("guest-")
        self.commands.append(command)
        self.hook(command, "before")
        answer = {"return": {}}
        prefix = b""
        if command == "sync-delimited":
            answer, prefix = {"return": request["arguments"]["id"]}, b"\xff"
        elif command == "fsfreeze-status":
            answer["return"] = "frozen" if self.frozen_since else "thawed"
        elif command == "get-fsinfo":
            answer["return"] = [{"mountpoint": mount, "type": "ext4", "disk": []} for mount in MOUNTS]
        elif command == "fsfreeze-freeze":
            self.frozen_since = time.monotonic()
            answer["return"] = len(MOUNTS)
        elif command == "fsfreeze-thaw":
            answer["return"] = len(MOUNTS) if self.frozen_since else 0
            if self.frozen_since:
                self.frozen_max = max(self.frozen_max, time.monotonic() - self.frozen_since)
            self.frozen_since = None
        elif command == "info":
            names = ["guest-sync-delimited", "guest-fsfreeze-status", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]
            answer["return"] = {
                "version": "9.9.9", "supported_commands": [{"name": name, "enabled": True} for name in names],
            }
        else:
            answer = {"error": {"class": "CommandNotFound", "desc": f"{command} is not known"}}
        if "id" in request:
            answer["id"] = request["id"]
        self.hook(command, "after")
        return prefix + json.dumps(answer).encode() + b"\n"

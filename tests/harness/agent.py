"""A guest's agent on a unix socket: one that is made up, or a real one behind a relay.

Works as QEMU's does behind its chardev: one client at a time, requests in order. What
was received is executed although the client has gone. `hook(command, when)` is called
"before" a command is executed and "after" it, before its answer is sent. `frozen_max` is the longest
time from a freeze that was asked to the answer to the thaw.
"""

import collections
import contextlib
import json
import socket
import threading
import time

MOUNTS = ["/", "/srv"]


class FakeGuest:
    """Serves in a thread until it is closed. `refuses` is what it says instead of freezing."""

    def __init__(self, path):
        self.hook = lambda command, when: None
        self.frozen_since = None
        self.frozen_max = 0.0
        self.commands = []
        self.refuses = None
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
        elif command == "fsfreeze-freeze" and self.refuses:
            answer = {"error": {"class": "GenericError", "desc": self.refuses}}
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


class Relay:
    """Stands before a real agent's socket and sees every command and answer. One client at a time, as
    QEMU does it; what the client has sent reaches the agent although the client has gone."""

    def __init__(self, path, agent_path):
        self.agent_path = str(agent_path)
        self.hook = lambda command, when: None
        self.frozen_since = self.thaw_asked = None
        self.frozen_max = 0.0
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
            agent = socket.socket(socket.AF_UNIX)
            agent.connect(self.agent_path)
            asked = collections.deque()
            answers = threading.Thread(target=self._answers, args=(client, agent, asked), daemon=True)
            answers.start()
            with client, agent:
                try:
                    for line in client.makefile("rb"):
                        command = json.loads(line.lstrip(b"\xff"))["execute"].removeprefix("guest-")
                        self.hook(command, "before")
                        if command.startswith("fsfreeze-freeze") and self.frozen_since is None:
                            self.frozen_since = time.monotonic()
                        if command == "fsfreeze-thaw":
                            self.thaw_asked = time.monotonic()
                        asked.append(command)
                        agent.sendall(line)
                except OSError:
                    pass
                with contextlib.suppress(OSError):
                    agent.shutdown(socket.SHUT_RDWR)
                answers.join()

    def _answers(self, client, agent, asked):
        try:
            for line in agent.makefile("rb"):
                answer = json.loads(line.lstrip(b"\xff"))
                # An answer to somebody who has gone may come before the one to our sync.
                delimited, command = line.startswith(b"\xff"), ""
                while asked and (delimited or asked[0] != "sync-delimited"):
                    command = asked.popleft()
                    if not delimited or command == "sync-delimited":
                        break
                thawed = command == "fsfreeze-thaw" and "return" in answer
                if self.frozen_since and (thawed or answer.get("return") == "thawed"):
                    self.frozen_max = max(self.frozen_max, time.monotonic() - self.frozen_since)
                    self.frozen_since = None
                self.hook(command, "after")
                client.sendall(line)
        except OSError:
            pass

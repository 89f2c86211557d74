"""A QEMU process with the Debian guest in it, and what one can ask of it.

Owns: the QEMU process, its QMP socket and the connection to the guest's agent.
What always holds: commands inside run through the guest agent, so a check needs
no network into the guest; the serial console is a file in the work folder; QEMU
is ended by its handle. There is no KVM on most CI machines: TCG it is, and all
waiting has deadlines of minutes.
"""

import base64
import json
import random
import socket
import time
from pathlib import Path
from urllib.parse import parse_qs, urlparse

from harness.process import CheckFailed, Child, run, say, wait_until
from vm.image import guest_image

BOOT_PATIENCE_SECONDS = 300.0
COMMAND_PATIENCE_SECONDS = 300.0
# Nothing here uses them, and under TCG each costs a second or more of the boot. No getty either: the
# console is the checks' own. (logind stays: without it the agent cannot shut the guest down.)
MASKED_AT_BOOT = [
    "systemd-networkd.service", "systemd-networkd.socket",
    "systemd-user-sessions.service", "getty@tty1.service", "serial-getty@ttyS0.service",
    "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service", "systemd-pstore.service",
    "systemd-random-seed.service", "systemd-journal-flush.service", "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount", "sys-kernel-config.mount", "sys-fs-fuse-connections.mount",
    "dev-hugepages.mount", "dev-mqueue.mount", "modprobe@drm.service", "modprobe@configfs.service",
    "modprobe@efi_pstore.service", "modprobe@fuse.service", "modprobe@dm_mod.service", "modprobe@loop.service",
    "proc-sys-fs-binfmt_misc.automount", "systemd-binfmt.service", "systemd-modules-load.service",
    "systemd-sysusers.service", "systemd-sysctl.service",
]
# Drivers of QEMU's machine that no check needs.
DRIVERS_LEFT_OUT = ["ata_piix", "ata_generic", "kvm", "kvm_amd", "powernow_k8", "psmouse", "floppy", "pcspkr", "i2c_piix4"]
# The least that Debian runs on. Under TCG every further extension costs: `max` a third of the boot, and
# what checksums and compresses twice the time.
PROCESSOR = "qemu64,-svm"
KERNEL_COMMAND_LINE = " ".join([
    "rw console=ttyS0 loglevel=4 panic=-1 mitigations=off net.ifnames=0",
    f"modprobe.blacklist={','.join(DRIVERS_LEFT_OUT)}",
    *(f"systemd.mask={unit}" for unit in MASKED_AT_BOOT),
])


class _JsonSocket:
    """Lines of JSON over a unix socket, as both QMP and the guest agent speak."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.buffered = b""

    def send(self, message, prefix=b""):
        self.socket.sendall(prefix + json.dumps(message).encode() + b"\n")

    def receive(self, patience_seconds):
        deadline = time.monotonic() + patience_seconds
        while b"\n" not in self.buffered:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            part = self.socket.recv(65536)
            if not part:
                raise ConnectionError("the socket was closed")
            self.buffered += part
        line, self.buffered = self.buffered.split(b"\n", 1)
        return json.loads(line.lstrip(b"\xff"))

    def close(self):
        self.socket.close()


class Result:
    """How a command inside the guest ended."""

    def __init__(self, exit_code, stdout, stderr):
        self.exit_code, self.stdout, self.stderr = exit_code, stdout, stderr


class Guest:
    """One guest. `root` are QEMU arguments that define a block node named `root`; `root_device` is
    what the kernel takes for it, to be named where several disks carry the same label. One processor
    unless a check wants more: a second one costs the boot a third more of the host's time under TCG."""

    def __init__(self, work, name, root, *, more=(), memory_mib=1024, incoming=None, root_device="LABEL=root",
                 processors=1):
        self.work, self.name = Path(work), name
        self.image = guest_image()
        self.qmp_path = self.work / f"{name}.qmp"
        self.agent_path = self.work / f"{name}.qga"
        self.console_path = self.work / f"{name}.console"
        self.console_path.write_bytes(b"")
        self._qmp = self._agent = None
        command = [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", PROCESSOR, "-smp", str(processors),
            "-m", str(memory_mib), "-nodefaults", "-no-user-config", "-display", "none",
            "-kernel", self.image.kernel, "-initrd", self.image.initrd,
            "-append", f"root={root_device} {KERNEL_COMMAND_LINE}",
            "-chardev", f"file,id=console,path={self.console_path}", "-serial", "chardev:console",
            "-qmp", f"unix:{self.qmp_path},server=on,wait=off",
            "-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,path={self.agent_path},server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
            "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
            "-object", "iothread,id=io",
            *root, "-device", "virtio-blk-pci,drive=root,iothread=io,werror=stop,rerror=stop",
            *more,
        ]
        if incoming:
            command += ["-incoming", incoming]
        self.child = Child(command, self.work / f"{name}.qemu.log")
        wait_until(lambda: self.qmp_path.exists() or not self.child.running(), "QEMU's QMP socket")
        self._connect_qmp()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None:
            lines = [line for line in self.console().splitlines() if line.strip()]
            say(f"{self.name}: the console, from its first boot on:\n" + "\n".join(lines))
            say(f"{self.name}: QEMU said: {self.child.log_tail(1000)}")
        self.kill()

    def console(self):
        """What the guest has printed on its serial console."""
        return self.console_path.read_text(errors="replace")

    def kill(self):
        """End QEMU at once (not a power cut for the host's files)."""
        for connection in (self._qmp, self._agent):
            if connection:
                connection.close()
        self._qmp = self._agent = None
        self.child.kill()

    # QMP

    def _connect_qmp(self):
        if not self.child.running():
            raise CheckFailed(f"{self.name}: QEMU did not start: {self.child.log_tail()}")
        self._qmp = _JsonSocket(self.qmp_path)
        self._qmp.receive(30)
        self.qmp("qmp_capabilities")

    def qmp(self, command, **arguments):
        """A QMP command; returns what it returns. Events that pass are dropped."""
        self._qmp.send({"execute": command, "arguments": arguments})
        while True:
            message = self._qmp.receive(60)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise CheckFailed(f"{self.name}: QMP {command}: {message['error']}")

    def run_state(self):
        """QEMU's run state: running, io-error, postmigrate, ..."""
        return self.qmp("query-status")["status"]

    # Guest agent

    def wait_until_up(self):
        """Wait for the guest agent's first answer."""
        began = time.monotonic()
        wait_until(self._agent_answers, f"{self.name}'s guest agent", BOOT_PATIENCE_SECONDS)
        say(f"{self.name}: up after {time.monotonic() - began:.0f} s")

    def _agent_answers(self):
        if not self.child.running():
            raise CheckFailed(f"{self.name}: QEMU ended: {self.child.log_tail()}")
        try:
            self._agent_in_step()
            return True
        except (OSError, ConnectionError):
            return False

    def _agent_in_step(self):
        if self._agent:
            self._agent.close()
        self._agent = _JsonSocket(self.agent_path)
        number = random.randrange(1 << 30)
        self._agent.send({"execute": "guest-sync-delimited", "arguments": {"id": number}}, b"\xff")
        deadline = time.monotonic() + 5
        while True:
            answer = self._agent.receive(max(0.1, deadline - time.monotonic()))
            if answer.get("return") == number:
                return

    def release_agent(self):
        """Let somebody else talk to the agent; `wait_until_up` takes it again."""
        if self._agent:
            self._agent.close()
        self._agent = None

    def agent(self, command, patience_seconds=60, **arguments):
        """A guest agent command; returns what it returns."""
        self._agent.send({"execute": command, "arguments": arguments})
        answer = self._agent.receive(patience_seconds)
        if "error" in answer:
            raise CheckFailed(f"{self.name}: agent {command}: {answer['error']}")
        return answer["return"]

    def start(self, script):
        """Start a shell script inside; returns its process id there."""
        return self.agent(
            "guest-exec", path="/bin/sh", arg=["-ec", script], **{"capture-output": True}
        )["pid"]

    def finish(self, pid, ok=True, patience_seconds=COMMAND_PATIENCE_SECONDS):
        """Wait for a started script and return how it ended."""
        status = wait_until(
            lambda: (seen := self.agent("guest-exec-status", pid=pid))["exited"] and seen,
            f"{self.name}: process {pid}", patience_seconds,
        )
        text = lambda key: base64.b64decode(status.get(key, "")).decode(errors="replace")
        result = Result(status.get("exitcode", -status.get("signal", 0)), text("out-data"), text("err-data"))
        if ok is not None and (result.exit_code == 0) != ok:
            raise CheckFailed(
                f"{self.name}: exit code {result.exit_code}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
            )
        return result

    def run(self, script, ok=True, patience_seconds=COMMAND_PATIENCE_SECONDS):
        """Run a shell script (sh -e) inside to its end; returns its stdout."""
        return self.finish(self.start(script), ok, patience_seconds).stdout

    def power_off(self):
        """Shut the guest down cleanly and wait until QEMU has ended."""
        try:
            self.agent("guest-shutdown", mode="powerdown", patience_seconds=5)
        except (OSError, ConnectionError, CheckFailed):
            # It answers nothing when it succeeds, or an error about the shutdown that ends it too.
            # Whether the guest goes down is seen in the next line.
            pass
        self.child.wait(BOOT_PATIENCE_SECONDS)


def raw_root(path):
    """QEMU arguments for a root disk in a plain file."""
    return ["-blockdev", f"driver=raw,node-name=root,file.driver=file,file.filename={path}"]


def nbd_root(socket_path, export, *, reconnect_seconds=300, read_only=False):
    """QEMU arguments for a root disk on NBD, as the manual tells people to attach one."""
    return ["-blockdev", (
        f"driver=nbd,node-name=root,server.type=unix,server.path={socket_path},export={export},"
        f"reconnect-delay={reconnect_seconds},open-timeout=60,discard=unmap,detect-zeroes=unmap"
        + (",read-only=on" if read_only else "")
    )]


def nbd_root_overlay(socket_path, export, overlay, node="root"):
    """QEMU arguments for a writable qcow2 overlay over a read-only NBD export."""
    return [
        "-blockdev", f"driver=nbd,node-name={node}-base,server.type=unix,server.path={socket_path},"
                     f"export={export},read-only=on,open-timeout=60",
        "-blockdev", f"driver=qcow2,node-name={node},file.driver=file,file.filename={overlay},backing={node}-base",
    ]


def point_overlay(folder, uri, node):
    """QEMU arguments for an overlay, made in `folder`, over what `export` said of a point's disk."""
    parts = urlparse(uri)
    overlay = Path(folder) / f"{node}.qcow2"
    size = json.loads(run("qemu-img", "info", "--output=json", uri).stdout)["virtual-size"]
    run("qemu-img", "create", "-q", "-f", "qcow2", overlay, size)
    return nbd_root_overlay(parse_qs(parts.query)["socket"][0], parts.path.lstrip("/"), overlay, node)


def copy_root(destination):
    """A fresh copy of the guest's root file system image."""
    run("cp", "--sparse=always", "--reflink=auto", guest_image().root, destination)
    return Path(destination)


def data_disk(node, path, serial):
    """QEMU arguments for a further disk in a plain file, /dev/disk/by-id/virtio-SERIAL inside."""
    return [
        "-blockdev", f"driver=raw,node-name={node},file.driver=file,file.filename={path}",
        "-device", f"virtio-blk-pci,drive={node},serial={serial}",
    ]

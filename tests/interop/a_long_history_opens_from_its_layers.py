"""150,000 random writes: the index goes into layers, and what is restored from them is what was written.

Layers only repeat the segments: with one damaged, and with none, the same is restored.
"""

import shutil

from harness.process import expect, expect_equal, run, scratch, wait_until
from harness.server import Afterimage

MIB = 1 << 20


def write(server, folder, mebibytes, seed):
    run("fio", "--name=load", "--ioengine=nbd", f"--uri={server.uri()}", "--rw=randwrite", "--bs=4k", "--iodepth=32",
        "--norandommap", f"--randseed={seed}", "--size=256MiB", f"--io_size={mebibytes}MiB", "--refill_buffers",
        "--buffer_compress_percentage=80", f"--aux-path={folder}", cwd=folder, patience_seconds=240)


def heads(server):
    return sorted(path for path in server.repository.glob("groups/*/layers/*/*") if "." not in path.name)


with scratch() as folder, Afterimage(folder, groups={"vm1": {"vda": 256 * MIB}}, log="1GiB") as server:
    server.wait_shipped()
    write(server, folder, 300, 1)
    server.checkpoint("middle")
    server.wait_shipped()
    middle = folder / "middle.raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri(), middle)
    # A process that begins anew opens the history from layers, and goes on behind them.
    server.restart()
    write(server, folder, 300, 2)
    server.wait_shipped()
    wait_until(lambda: len(heads(server)) >= 2, "two layers")

    def restored_equals(name):
        latest = server.restore("latest", folder / f"{name}-latest") / "vda.raw"
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", latest, server.uri())
        before = server.restore("middle", folder / f"{name}-middle") / "vda.raw"
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", before, middle)
        shutil.rmtree(latest.parent)
        shutil.rmtree(before.parent)

    restored_equals("layers")
    server.cli("verify", "vm1")

    head = heads(server)[0]
    good = head.read_bytes()
    head.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    restored_equals("damaged")
    refused = server.cli("verify", "vm1", ok=1)
    expect(head.name in refused.stdout + refused.stderr and "nothing is lost" in refused.stdout + refused.stderr,
           f"verify names the layer and says what to do:\n{refused.stdout}{refused.stderr}")

    server.stop()
    shutil.rmtree(head.parent)
    server.start()
    expect_equal(heads(server), [], "layers that are left")
    restored_equals("none")
    write(server, folder, 1, 3)
    server.wait_shipped()
    wait_until(lambda: len(heads(server)) >= 2, "the layers again")
    restored_equals("again")
    server.cli("verify", "vm1")

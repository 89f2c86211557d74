"""fio over NBD writes mixed sizes of 512 bytes to 64 KiB with fsyncs and verifies each by CRC32C."""

from harness.process import expect, run, scratch
from harness.server import Server


def fio(server, folder, *more):
    result = run(
        "fio", "--name=mixed", "--ioengine=nbd", f"--uri={server.uri()}", "--rw=randwrite", "--size=48MiB",
        "--bsrange=512-64k", "--blockalign=512", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1",
        "--norandommap=0", "--randrepeat=1", f"--aux-path={folder}", *more, cwd=folder, patience_seconds=240,
    )
    expect("err= 0" in result.stdout, f"fio reports no error:\n{result.stdout}")


with scratch() as folder, Server(folder) as server:
    fio(server, folder, "--fsync=32", "--do_verify=1")
    # The same content after a kill: the verify phase alone, from the state of the same seed.
    server.kill()
    server.start()
    fio(server, folder, "--verify_only=1")

"""The `nbd` crate's client, which knows only the oldest newstyle handshake, works as well."""

from harness.process import run, scratch
from harness.server import REPOSITORY, Server

with scratch() as folder, Server(folder) as server:
    program = REPOSITORY / "target/debug/nbd-crate-client"
    run(program, server.socket, "vm1/vda")

"""After `detach` the backing is a plain disk, complete and current; editing it makes a start refuse."""

from harness.model import Disk, same_content
from harness.process import expect, scratch
from harness.server import Afterimage

SIZE = 32 << 20

with scratch() as folder, Afterimage(folder, groups={"vm1": {"vda": SIZE}}) as server:
    disk = Disk(server.socket, "vm1/vda", SIZE)
    for _ in range(300):
        disk.write_somewhere()
    disk.close()
    server.cli("detach", "vm1")
    same_content("the plain disk", server.backing(), bytes(disk.content))
    server.stop()
    same_content("the plain disk after the stop", server.backing(), bytes(disk.content))

    with open(server.backing(), "r+b") as file:
        file.seek(8192)
        file.write(b"edited by somebody")
    said = server.start_refused()
    expect(str(server.backing()) in said, f"the refusal names the backing:\n{said}")
    expect("(the disk was detached) and must not be replayed" in said, f"the refusal says why:\n{said}")

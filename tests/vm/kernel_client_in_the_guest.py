"""The kernel's NBD driver against Afterimage, both inside a VM: block sizes, file systems, fsck."""
# limit: 1200

from harness.process import expect, say, scratch
from vm.guest import Guest, copy_root, data_disk, raw_root
from vm.tools_disk import INSTALL, tools_disk

WRITE_AND_CHECK = """
mount /dev/nbd0 /mnt
cd /mnt
for number in $(seq 1 30); do head -c $((number * 10000)) /dev/urandom > file-$number; done
sha256sum file-* > /run/sums
fio --name=mix --directory=/mnt --size=24m --rw=randwrite --bsrange=1k-64k --fsync=32 --verify=crc32c \
    --number_ios=600 --ioengine=psync > /run/fio
grep -q 'err= 0' /run/fio
cd /
umount /mnt
"""
CHECK_AGAIN = "mount -o ro /dev/nbd0 /mnt && cd /mnt && sha256sum --quiet -c /run/sums && cd / && umount /mnt"
CASES = [(512, "mkfs.ext4 -q -F", "e2fsck -fn"), (1024, "mkfs.ext4 -q -F -b 1024", "e2fsck -fn"),
         (4096, "mkfs.xfs -q -f", "xfs_repair -n")]

with scratch() as folder:
    tools = data_disk("tools", tools_disk(folder), "tools")
    with Guest(folder, "guest", raw_root(copy_root(folder / "root.raw")), more=tools) as guest:
        guest.wait_until_up()
        # xfs wants 300 MiB at the least.
        guest.run(INSTALL + "truncate -s 320M /var/lib/afterimage/vda.raw\nmodprobe nbd\n")
        guest.run("systemctl start afterimage.socket afterimage.service")
        for block_size, make, check in CASES:
            attach = (f"nbd-client -unix /run/afterimage/nbd.sock /dev/nbd0 -N vm1/vda -b {block_size} "
                      "-C 4 -t 600 -persist -nonetlink; udevadm settle; sleep 1")
            guest.run(attach)
            guest.run(f"{make} /dev/nbd0")
            guest.run(WRITE_AND_CHECK, patience_seconds=600)
            guest.run(f"nbd-client -d /dev/nbd0; {attach}")
            guest.run(f"{check} /dev/nbd0")
            guest.run(CHECK_AGAIN)
            guest.run("nbd-client -d /dev/nbd0")
            say(f"block size {block_size}: {make.split()[0]} is whole")
        messages = guest.run("dmesg --level=err,crit,alert,emerg | grep -i -E 'nbd|EXT4-fs|XFS' || true")
        expect(messages == "", f"no errors in the kernel's log:\n{messages}")
        guest.power_off()

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
# The driver has one receiver for each connection, a work item that never ends while the device is
# attached. Where new kernel threads are slow to come (under TCG, now and then) the work queue's rescuer
# takes all items that wait, and runs but the first of them: then a connection is deaf, and its requests
# hang until they time out. The threads are there when the device is attached again.
ATTACH = """
for attempt in 1 2 3 4; do
    nbd-client -unix /run/afterimage/nbd.sock /dev/nbd0 -N vm1/vda -b %d -C 4 -t 60 -persist -nonetlink
    for wait in 1 2 3 4 5; do
        receivers=$(ps -eo comm:40,wchan:40 | grep -c "nbd0-recv.*unix_stream" || true)
        [ $receivers = 4 ] && break 2
        sleep 0.2
    done
    echo "$receivers receivers for 4 connections: once more"
    nbd-client -d /dev/nbd0
    udevadm settle
    dmesg -C # what udev could not read meanwhile
done
[ $receivers = 4 ]
udevadm settle
"""
CHECK_AGAIN = "mount -o ro /dev/nbd0 /mnt && cd /mnt && sha256sum --quiet -c /run/sums && cd / && umount /mnt"
CASES = [(512, "mkfs.ext4 -q -F", "e2fsck -fn"), (1024, "mkfs.ext4 -q -F -b 1024", "e2fsck -fn"),
         (4096, "mkfs.xfs -q -f", "xfs_repair -n")]

with scratch() as folder:
    tools = data_disk("tools", tools_disk(folder), "tools")
    with Guest(folder, "guest", raw_root(copy_root(folder / "root.raw")), more=tools, processors=2) as guest:
        guest.wait_until_up()
        # xfs wants 300 MiB at the least.
        guest.run(INSTALL + "truncate -s 320M /var/lib/afterimage/vda.raw\nmodprobe nbd\n")
        guest.run("systemctl start afterimage.socket afterimage.service")
        for block_size, make, check in CASES:
            say(guest.run(ATTACH % block_size))
            guest.run(f"{make} /dev/nbd0")
            guest.run(WRITE_AND_CHECK, patience_seconds=600)
            guest.run("nbd-client -d /dev/nbd0")
            say(guest.run(ATTACH % block_size))
            guest.run(f"{check} /dev/nbd0")
            guest.run(CHECK_AGAIN)
            guest.run("nbd-client -d /dev/nbd0")
            say(f"block size {block_size}: {make.split()[0]} is whole")
        messages = guest.run("dmesg --level=err,crit,alert,emerg | grep -i -E 'nbd|EXT4-fs|XFS' || true")
        expect(messages == "", f"no errors in the kernel's log:\n{messages}")
        guest.power_off()

#!/bin/sh
# First process of a guest. Its root is the host's, read-only; the rest of the boot happens in a copy-on-write view of it.
# From the kernel's command line: lab_address, lab_hostname, lab_checkout, lab_port.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
mount -t proc proc /proc
for word in $(cat /proc/cmdline); do
    case $word in lab_*=*) eval "$word" ;; esac
done
release=$(uname -r)

halt() {
    echo "lab: $1"
    echo o >/proc/sysrq-trigger
    sleep 10
}

if [ "$1" != view ]; then
    mount -t tmpfs tmpfs /mnt || halt "no tmpfs"
    mkdir -p /mnt/modules/lib /mnt/upper /mnt/work /mnt/root
    ln -s /usr/lib/uml/modules /mnt/modules/lib/modules
    modprobe -d /mnt/modules overlay || halt "no overlay module"
    mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root || halt "no overlay"
    # the kernel loads modules by itself from here, wherever the host keeps them
    mkdir -p /mnt/root/lib/modules
    ln -sfn "/usr/lib/uml/modules/$release" "/mnt/root/lib/modules/$release"
    mount -t devtmpfs dev /mnt/root/dev
    exec chroot /mnt/root "$0" view
fi

mount -t sysfs sys /sys
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/rpc_pipefs /run/work
mount -t tmpfs tmpfs /mnt
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
hostname "$lab_hostname"
ip link set lo up
ip link set vec0 up
ip address add "$lab_address" dev vec0
modprobe nfsv4
cd "$lab_checkout" && PYTHONDONTWRITEBYTECODE=1 /usr/bin/python3 -m tests.lab.agent "$lab_port"
halt "the agent has ended"

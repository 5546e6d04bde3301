#!/bin/busybox sh
# The first process of the VM: makes the host's root the guest's own, then runs the job.
# The guest sees the host's files as they are and may write to all of them, but what it writes
# stays in memory: the host's root is mounted read-only below a tmpfs. What survives is written
# to the shares. The job, process 1 from then on, is testbed/vm.py's.
B=/bin/busybox
fail() { echo "init: $*"; $B poweroff -n -f; }

$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs dev /dev
for module in /modules/*.ko; do $B insmod "$module" || fail "cannot load $module"; done

. /settings
nine=trans=virtio,version=9p2000.L,msize=$msize
$B mkdir /mnt/host /mnt/memory /mnt/root
$B mount -t 9p -o "ro,$nine,cache=loose" root /mnt/host || fail "cannot mount the host's root"
$B mount -t tmpfs -o size=75% memory /mnt/memory
$B mkdir /mnt/memory/upper /mnt/memory/work
$B mount -t overlay \
    -o lowerdir=/mnt/host,upperdir=/mnt/memory/upper,workdir=/mnt/memory/work root /mnt/root ||
    fail "cannot lay a writable layer over the host's root"

cd /mnt/root || fail "no root"
for point in proc sys dev run tmp; do $B mkdir -p "$point"; done
for point in proc sys dev; do $B mount -o move "/$point" "$point"; done
$B mkdir -p dev/shm dev/pts
$B mount -t tmpfs -o mode=1777 shm dev/shm
$B mount -t devpts -o mode=620,ptmxmode=666 devpts dev/pts
$B mount -t cgroup2 cgroup sys/fs/cgroup
$B mount -t tmpfs -o mode=755 run run
$B mkdir -p run/lock run/vm "lib/modules/$($B uname -r)"
$B mount -o bind "/mnt/root$modules" "lib/modules/$($B uname -r)" || fail "no modules"
number=0
for share in $shares; do
    $B mkdir -p ".$share"
    $B mount -t 9p -o "rw,$nine,cache=none" "share$number" ".$share" || fail "cannot mount $share"
    number=$((number + 1))
done
for link in fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2; do
    [ -e "dev/${link%%:*}" ] || $B ln -s "${link#*:}" "dev/${link%%:*}"
done

$B ip link set lo up
$B ip link set eth0 up
$B ip addr add 10.0.2.15/24 dev eth0
$B ip route add default via 10.0.2.2
$B hostname rbdnbd-vm
echo "127.0.1.1 rbdnbd-vm" >>etc/hosts

$B cp /bin/busybox /job run/vm/
$B dmesg -n 7
exec $B switch_root /mnt/root /run/vm/busybox sh /run/vm/job

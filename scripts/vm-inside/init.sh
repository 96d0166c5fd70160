#!/bin/busybox sh
# PID 1 of the test VM, in the place of virtme-ng's own init, which spends half a minute under emulation on udev,
# tmpfiles and two dozen mounts that no test needs.
#
# The runner (run.py) leaves in /mnt what is to be done: `settings` (shell variables) and `command` (a script).
# The shell of Debian's static busybox runs its own applets first, so this starts no dynamic program but COMMAND.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LANG=C.UTF-8
tell() { echo "<6>vm-init: $*" >/dev/kmsg; }

# shellcheck source=/dev/null
. /mnt/settings
# Set there, and by the kernel from virtme-ng's part of its command line.
# shellcheck disable=SC2154
: "$msize" "$shell" "$module" "$guard" "$leak_scan" "$dmesg" "$cpus" "${virtme_console=}" "${virtme_stty_con=}"

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=1777 tmp /var/tmp
mkdir -p /dev/pts /dev/shm /dev/virtio-ports
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
mount -t 9p -o "version=9p2000.L,trans=virtio,access=any,msize=$msize" kdp.src /kdp/src || {
	tell "the checkout cannot be mounted"
	poweroff -f
}
ip link set lo up
hostname kdp-vm

# What udev is for in other systems: the ports by their names.
for port in /sys/class/virtio-ports/*; do
	[ -e "$port/name" ] || continue
	read -r name <"$port/name"
	ln -s "../${port##*/}" "/dev/virtio-ports/$name"
done

# For this process and all that it starts.
/usr/bin/taskset -pc "$cpus" $$ >/dev/null || tell "programs cannot be kept to CPUs $cpus"

for m in kvm_amd kvm_intel; do
	modprobe $m 2>/dev/null && break
done
# A vCPU that polls for work takes CPU time from the others, since a host has fewer CPUs than vCPUs.
halt_poll=/sys/module/kvm/parameters/halt_poll_ns
[ ! -e $halt_poll ] || echo 0 >$halt_poll
# Load the modules that tests use, and that some kernels have built in. Without one, its tests are
# skipped.
for m in hwpoison_inject mce-inject tun vhost_net loop 9pnet_fd; do modprobe $m 2>/dev/null; done
[ -e /dev/kvm ] || tell "there is no /dev/kvm: the VM's CPU offers no virtualization"

# Where nothing is emulated, or the VM has one CPU, there is nothing to guard.
if grep -q 'QEMU TCG' /proc/cpuinfo && [ "$(nproc)" -gt 1 ] && [ -e "$guard" ]; then
	insmod "$guard" || tell "the guard against the emulator's lost interrupts cannot be loaded"
fi

# This script scans for leaks at the end. An automatic scan holds a lock that each allocation takes,
# so an emulated VM stops for minutes.
leaks=/sys/kernel/debug/kmemleak
[ ! -e $leaks ] || echo scan=off >$leaks

jiffies() { awk '/^jiffies:/ { print $2; exit }' /proc/timer_list; }
export KDP_KERNEL KDP_MODULE="$module"
cd /kdp/src || poweroff -f

if [ "$shell" = yes ]; then
	exec <>"/dev/$virtme_console" >&0 2>&0
	# shellcheck disable=SC2086  # it is several words
	[ -z "$virtme_stty_con" ] || stty $virtme_stty_con 2>/dev/null
	insmod "$module" || echo "There is no module loaded. 'make modules' builds it; dmesg says what went wrong."
	echo "The test VM ($KDP_KERNEL kernel, $(uname -r)); the checkout is here. Leave it with 'exit'."
	setsid -c /bin/bash <>"/dev/$virtme_console" >&0 2>&0
	poweroff -f
fi

ports=/dev/virtio-ports
# A port has one opener at a time, so programs that open /dev/stdout by name get a second one.
ln -sf $ports/virtme.dev_stdout /dev/stdout
ln -sf $ports/virtme.dev_stderr /dev/stderr
tell "started; jiffies $(jiffies)"
setsid /bin/sh /mnt/command <$ports/virtme.stdin >$ports/virtme.stdout 2>$ports/kdp.stderr
status=$?
tell "command ended with status $status"

# Two scans: the first one only notes the checksums of what it cannot find a pointer to, and nothing younger than
# 5 seconds is looked at.
if [ -e $leaks ] && [ "$leak_scan" = yes ]; then
	sleep 6
	echo scan >$leaks && echo scan >$leaks
	while read -r line; do echo "<6>vm-kmemleak: $line" >/dev/kmsg; done <$leaks
	tell "kmemleak scanned"
fi
# The console may have stopped: an emulated serial port whose interrupt is lost says nothing more.
dmesg >"/kdp/src/$dmesg"
echo $status >$ports/virtme.ret
poweroff -f

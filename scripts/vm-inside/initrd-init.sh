#!/bin/busybox sh
# /init of the test VM if the kernel has 9p as a module: mounts the root of the VM, and runs its init.
# The kernel command line names both (rootflags=, init=).
export PATH=/bin
busybox mount -t proc proc /proc
# shellcheck disable=SC2013  # words are wanted
for arg in $(busybox cat /proc/cmdline); do
	case $arg in
	rootflags=*) flags=${arg#rootflags=} ;;
	init=*) init=${arg#init=} ;;
	esac
done
for module in /modules/*; do busybox insmod "$module"; done
busybox mount -t 9p -o "ro,$flags" /dev/root /root || busybox poweroff -f
busybox mount -t devtmpfs dev /root/dev
busybox umount /proc
exec busybox switch_root /root "$init"

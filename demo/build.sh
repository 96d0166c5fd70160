#!/usr/bin/env bash
# Builds the files for the demo and for the tests of Linux guests (build/demo):
#
#   bzImage         the guest's kernel, as it was given
#   initrd          an initramfs of one program, for the demo
#   initrd-load     an initramfs with a load that checks itself, and with drivers as modules
#   initrd-disk     an initramfs with a program that tests the guest's disk, and with its drivers
#   kdp-demo-fetch  the client of the comparison (built with the tools)
#
# Runs inside the toolbox. Usage: build.sh KERNEL_IMAGE [MODULES_DIR]
# KERNEL_IMAGE is a bzImage. MODULES_DIR is the kernel's /lib/modules/RELEASE; without it, the
# kernel must have all drivers built in.
set -euo pipefail
kernel=${1:?"build.sh needs a kernel image: build.sh KERNEL_IMAGE [MODULES_DIR]"}
modules=${2:-}
src=/kdp/src/demo
out=/kdp/src/build/demo

die() {
	echo "build.sh: $*" >&2
	exit 1
}

# pattern NAME: the names that a module's file may have: - and _ are the same.
pattern() { echo "${1//[-_]/[-_]}"; }

# files_of NAME: print the file of a module after the files of the modules that it depends on.
# A module that is built in has no file.
files_of() {
	local file dependency
	file=$(find "$modules/kernel" -name "$(pattern "$1").ko" -o -name "$(pattern "$1").ko.*")
	if [ -z "$file" ]; then
		grep -q "/$(pattern "$1")\.ko$" "$modules/modules.builtin" && return
		die "$modules has no module '$1', and the kernel does not have it built in"
	fi
	for dependency in $(modinfo -F depends "$file" | tr , ' '); do
		files_of "$dependency"
	done
	echo "$file"
}

# add_modules FOLDER DRIVER...: decompress the drivers into the folder. Their names begin with
# numbers, in the order in which the guest must insert them.
add_modules() {
	local folder=$1 files file name n=10
	shift
	files=
	for name; do
		files="$files $(files_of "$name")" || exit
	done
	mkdir -p "$folder"
	for file in $(echo "$files" | tr -s ' ' '\n' | awk 'NF && !seen[$0]++'); do
		name=${file##*/}
		name=$folder/$n-${name%%.ko*}.ko
		case $file in
		*.ko) cp "$file" "$name" ;;
		*.ko.xz) xz -dc "$file" >"$name" ;;
		*.ko.zst) zstd -dcq "$file" >"$name" ;;
		*.ko.gz) gzip -dc "$file" >"$name" ;;
		*) die "$file: unknown compression" ;;
		esac
		n=$((n + 1))
	done
}

# image INITRD PROGRAM [DRIVER...]: make an initramfs with PROGRAM as its init, and with DRIVERs.
# The guest needs them beside the driver of its serial port.
image() {
	local initrd=$1 program=$2
	shift 2
	rm -rf "$out/root"
	mkdir -p "$out/root"
	if [ -n "$modules" ] && (($# > 0)); then
		add_modules "$out/root/modules" "$@"
	fi
	gcc -std=gnu11 -O2 -Wall -Wextra -Wshadow -Werror -static -s \
		-o "$out/root/init" "$src/guest/$program"
	(cd "$out/root" && find . -mindepth 1 | sort | cpio -o -H newc --quiet) >"$out/initrd.part"
	mv "$out/initrd.part" "$out/$initrd"
}

[ -f "$kernel" ] || die "there is no kernel image '$kernel'"
[ -z "$modules" ] || [ -d "$modules/kernel" ] ||
	die "'$modules' is no /lib/modules/RELEASE: it has no 'kernel'"
mkdir -p "$out"
image initrd init.c
image initrd-load load.c virtio_mmio virtio_balloon
image initrd-disk disk.c virtio_pci virtio_blk
cp "$kernel" "$out/bzImage"
install -t "$out" /kdp/src/build/bin/kdp-demo-fetch

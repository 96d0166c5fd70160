#!/bin/sh
# Builds what the demo needs into build/demo: the guest's kernel (the test kernel's own image), its initramfs of one
# program, another with a load that checks itself, for migration, and the client of the comparison (built with the tools).
# Runs inside the toolbox. Usage: build.sh KERNEL_IMAGE MODULES_DIR
set -eu
kernel=${1:?"build.sh needs the guest's kernel"}
src=/kdp/src/demo
out=/kdp/src/build/demo

# image INITRD PROGRAM: an initramfs whose init is that program.
image() {
	mkdir -p "$out/root"
	gcc -std=gnu11 -O2 -Wall -Wextra -Wshadow -Werror -static -s -o "$out/root/init" "$src/guest/$2"
	(cd "$out/root" && echo init | cpio -o -H newc --quiet) >"$out/initrd.part"
	mv "$out/initrd.part" "$out/$1"
}

mkdir -p "$out"
image initrd init.c
image initrd-load load.c
cp "$kernel" "$out/bzImage"
install -t "$out" /kdp/src/build/bin/kdp-demo-fetch

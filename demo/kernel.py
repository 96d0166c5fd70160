#!/usr/bin/env python3
"""Extracts the ELF kernel (vmlinux) from a bzImage, so that no guest has to decompress it.

Usage: kernel.py IMAGE VMLINUX

If IMAGE is a vmlinux, it is copied. Prints "pvh" if the vmlinux has the entry that QEMU needs
(CONFIG_PVH=y), and nothing otherwise. If the kernel is compressed with zstd, the program zstd must
be installed.
"""

import lzma
import struct
import subprocess
import sys
import zlib

ELF = b"\x7fELF"
# Offsets in a bzImage: see "The Real-Mode Kernel Header", Documentation/arch/x86/boot.rst.
SETUP_SECTORS = 0x1F1
MAGIC = 0x202
VERSION = 0x206
PAYLOAD = 0x248
VERSION_WITH_PAYLOAD = 0x208
SECTOR = 512
# The last bytes of the payload are the length of the decompressed kernel.
LENGTH = 4

PT_NOTE = 4
PHYS32_ENTRY = 18


class Failure(Exception):
    """What is wrong with the image."""


def zstd(data):
    try:
        done = subprocess.run(["zstd", "-dcq"], input=data, capture_output=True, check=False)
    except FileNotFoundError as e:
        raise Failure("it is compressed with zstd: install the package zstd") from e
    if done.returncode != 0:
        raise Failure(f"zstd: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


DECOMPRESSORS = {
    b"\x1f\x8b": lambda data: zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(data),
    b"\xfd7zXZ\0": lambda data: lzma.LZMADecompressor().decompress(data),
    b"\x5d\0\0": lambda data: lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(data),
    b"\x28\xb5\x2f\xfd": zstd,
}


def vmlinux_of(image):
    """The ELF file in this bzImage, or the image itself if it is one."""
    if image.startswith(ELF):
        return image
    if image[MAGIC : MAGIC + 4] != b"HdrS":
        raise Failure("it is neither a bzImage nor an ELF file")
    (version,) = struct.unpack_from("<H", image, VERSION)
    if version < VERSION_WITH_PAYLOAD:
        raise Failure(f"its boot protocol is {version:#x}, before {VERSION_WITH_PAYLOAD:#x}")
    offset, length = struct.unpack_from("<II", image, PAYLOAD)
    start = ((image[SETUP_SECTORS] or 4) + 1) * SECTOR + offset
    payload = image[start : start + length]
    if len(payload) != length or length <= LENGTH:
        end = start + length
        raise Failure(f"it is cut off: it should have {end} bytes, and has {len(image)}")
    for magic, decompress in DECOMPRESSORS.items():
        if payload.startswith(magic):
            break
    else:
        found = payload[:6].hex(" ")
        raise Failure(f"its payload begins with {found}: it is none of gzip, xz, lzma and zstd")
    try:
        vmlinux = decompress(payload[:-LENGTH])
    except (lzma.LZMAError, zlib.error) as e:
        raise Failure(f"its payload cannot be decompressed: {e}") from e
    (expected,) = struct.unpack("<I", payload[-LENGTH:])
    if len(vmlinux) != expected or not vmlinux.startswith(ELF):
        found = len(vmlinux)
        raise Failure(f"its payload has {found} bytes instead of an ELF file of {expected}")
    return vmlinux


def has_pvh_entry(vmlinux):
    """Whether there is a note of the 32-bit entry that the PVH boot protocol uses."""
    (table,) = struct.unpack_from("<Q", vmlinux, 32)
    size, count = struct.unpack_from("<HH", vmlinux, 54)
    for n in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", vmlinux, table + n * size)
        if kind != PT_NOTE:
            continue
        at, end = offset, offset + length
        while at + 12 <= end:
            name_len, value_len, what = struct.unpack_from("<III", vmlinux, at)
            name = vmlinux[at + 12 : at + 12 + name_len]
            if name == b"Xen\0" and what == PHYS32_ENTRY:
                return True
            at += 12 + (name_len + 3) // 4 * 4 + (value_len + 3) // 4 * 4
    return False


def main(argv):
    if len(argv) != 3:
        raise SystemExit("usage: kernel.py IMAGE VMLINUX")
    _, image, out = argv
    try:
        with open(image, "rb") as f:
            vmlinux = vmlinux_of(f.read())
        pvh = has_pvh_entry(vmlinux)
        with open(out, "wb") as f:
            f.write(vmlinux)
    except struct.error:
        raise SystemExit(f"{image}: it is cut off: a header ends behind the file") from None
    except Failure as e:
        raise SystemExit(f"{image}: {e}") from e
    except OSError as e:
        raise SystemExit(f"{e.filename}: {e.strerror}") from e
    if pvh:
        print("pvh")


if __name__ == "__main__":
    main(sys.argv)

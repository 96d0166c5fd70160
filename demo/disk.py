"""Run a guest that tests its disk (guest/disk.c), and resume it with all of its memory absent.

The disk's backend has cache=none, so QEMU accesses guest memory by direct I/O.
"""

import ctypes
import mmap
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pages import Handler
from qemu import Failure, Qemu
from steps import ADDRESS, PAGE, SLOW, serving

WORKERS = 2
ROUNDS = 20
SLOTS = 4
CHUNK = 32 << 10
GUEST_ARGS = (
    f"kdp_workers={WORKERS} kdp_rounds={ROUNDS} kdp_slots={SLOTS} kdp_chunk={CHUNK} kdp_pause=50"
)
SECTOR = 512
BYTES = WORKERS * SLOTS * CHUNK
# guest/disk.c fills with this the memory that it reads to.
JUNK = b"\xa5" * PAGE
# Rounds of each worker before the snapshot. By then it has written each of its slots.
BEFORE = SLOTS
ROUND = re.compile(r"^KDP-DISK (\d+) round (\d+)$")
MASK = (1 << 64) - 1


@dataclass
class Disk:
    path: str
    aio: str

    def option(self):
        return f"file={self.path},format=raw,cache=none,aio={self.aio}"


@dataclass
class Snapshot:
    """A stopped guest: three files, an unfinished console line, each worker's last round.

    `pages` are the guest pages of rounds that have not begun. Those rounds write the pages to the
    disk, or read to them.
    """

    ram: str
    state: str
    disk: str
    rest: bytes
    rounds: list
    pages: list


@contextmanager
def filesystem(settings):
    """A folder whose files support direct I/O. A tmpfs accepts O_DIRECT, but copies."""
    image, folder = f"{settings.work}/filesystem", f"{settings.work}/mnt"
    with open(image, "wb") as f:
        f.truncate(16 << 20)
    os.makedirs(folder, exist_ok=True)
    run("busybox", "mke2fs", "-F", "-b", str(PAGE), image)
    run("mount", "-t", "ext4", "-o", "loop", image, folder)
    try:
        yield folder
    finally:
        run("umount", folder)
        os.unlink(image)


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failure(f"{' '.join(command)}: {done.stderr.strip()}")


def start(settings, memory, disk, **more):
    return Qemu(
        memory, settings.memory, settings.work,
        guest_args=GUEST_ARGS, initrd="initrd-disk", disk=disk, **more,
    )


def rounds_of(console, last):
    """Each worker's last round. Fails if the console lacks a round after those in `last`."""
    rounds = list(last)
    for line in console.text():
        if match := ROUND.match(line):
            worker, number = int(match[1]), int(match[2])
            if number != rounds[worker] + 1:
                raise Failure(f"worker {worker} went from round {rounds[worker]} to {number}")
            rounds[worker] = number
    return rounds


def wait_for_all(console, what, timeout):
    """Wait until each worker has printed `what`."""
    for worker in range(WORKERS):
        console.wait_for(f"^KDP-DISK {worker} {what}$", timeout, f"'{what}' of worker {worker}")


def boot_and_snapshot(settings):
    """Boots the guest in a plain file, and stops it when its workers have written all slots."""
    files = (f"{settings.work}/disk-guest.{part}" for part in ("ram", "state", "disk"))
    snapshot = Snapshot(*files, b"", [], [])
    with open(snapshot.ram, "wb") as f:
        f.truncate(settings.memory)
    with filesystem(settings) as folder:
        disk = Disk(f"{folder}/disk", "native")
        # Write zeros to the whole file: ext4 fills holes by buffered I/O.
        Path(disk.path).write_bytes(bytes(BYTES))
        with start(settings, snapshot.ram, disk) as qemu:
            qemu.console.wait_for("^KDP-USERSPACE", 180 * SLOW, "the guest's userspace")
            wait_for_all(qemu.console, f"round {BEFORE}", 60 * SLOW)
            monitor = qemu.monitor()
            monitor.run("stop")
            monitor.migrate("migrate", snapshot.state, 60 * SLOW)
            qemu.quit()
            rounds = rounds_of(qemu.console, [0] * WORKERS)
            shutil.copy(disk.path, snapshot.disk)
            # A worker may be in the middle of a round: leave that round out.
            pages = pages_of_rounds([last + 2 for last in rounds], snapshot.ram)
            return replace(snapshot, rest=qemu.console.rest, rounds=rounds, pages=pages)


def pages_of_rounds(first, ram):
    """The guest pages of each worker's rounds from `first` on.

    Until a round has read, only the disk accesses its pages.
    """
    step = CHUNK // SECTOR
    words = set()
    for worker in range(WORKERS):
        for round_ in range(first[worker], ROUNDS + 1):
            sector = (worker * SLOTS + round_ % SLOTS) * step
            words.update(word_of(sector + at, round_) for at in range(0, step, PAGE // SECTOR))
    written, junk = [], []
    with open(ram, "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as memory:
        for page in range(len(memory) // PAGE):
            word = memory[page * PAGE : page * PAGE + 8]
            if int.from_bytes(word, "little") in words:
                written.append(page)
            elif word == JUNK[:8] and memory[page * PAGE : (page + 1) * PAGE] == JUNK:
                junk.append(page)
    if len(written) != len(words) or len(junk) < 2 * len(words):
        found = f"{len(written)} of {len(words)} pages to write, {len(junk)} to read to"
        raise Failure(f"in the guest's memory are {found}")
    return written + junk


def resident(path, bytes_, pages):
    """How many of these pages of a memslot are in memory. mincore(2) tells without an access."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "r+b") as f, mmap.mmap(f.fileno(), bytes_) as memory:
        there = (ctypes.c_ubyte * (bytes_ // PAGE))()
        at = ctypes.c_char.from_buffer(memory)
        address, size = ctypes.c_void_p(ctypes.addressof(at)), ctypes.c_size_t(bytes_)
        failed = libc.mincore(address, size, there)
        # The mapping cannot be closed while something refers to it.
        del at
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {path}")
    return sum(there[page] & 1 for page in pages)


def restore(settings, snapshot, aio):
    """Resumes the guest with all of its memory absent, and waits until its workers have ended.

    Returns the number of rounds from then on, and two reports of the page handler: `before` these
    rounds and `after` them. `resident` in a report counts those of `snapshot.pages` that are in
    memory.
    """
    backing = (f"tcp:{ADDRESS}", 30 * SLOW, ["--shmem"])
    with (
        filesystem(settings) as folder,
        serving(settings, snapshot),
        Handler(settings.work, "disk", settings.memory, *backing) as handler,
    ):
        disk = Disk(f"{folder}/disk", aio)
        shutil.copy(snapshot.disk, disk.path)
        more = {"console_rest": snapshot.rest, "incoming": True}
        with start(settings, handler.memory, disk, **more) as qemu:
            monitor = qemu.monitor(60 * SLOW)
            monitor.migrate("migrate-incoming", snapshot.state, 60 * SLOW)
            before = handler.report(30 * SLOW)
            before["resident"] = resident(handler.memory, settings.memory, snapshot.pages)
            monitor.run("cont")
            wait_for_all(qemu.console, "done", 60 * SLOW)
            after = handler.report(30 * SLOW)
            after["resident"] = resident(handler.memory, settings.memory, snapshot.pages)
            engines = engines_of(qemu.process.pid)
            if aio not in engines:
                raise Failure(f"QEMU uses {engines} for a disk with aio={aio}")
            qemu.quit()
            rounds = rounds_of(qemu.console, snapshot.rounds)
        if rounds != [ROUNDS] * WORKERS:
            raise Failure(f"the workers have ended after their rounds {rounds}")
        check_image(Path(disk.path).read_bytes())
        handler.stop(30 * SLOW)
    return {"rounds": sum(rounds) - sum(snapshot.rounds), "before": before, "after": after}


def engines_of(pid):
    """The engines of asynchronous I/O that a process has set up, by QEMU's names."""
    engines = set()
    if "/[aio]" in Path(f"/proc/{pid}/maps").read_text("ascii"):
        engines.add("native")
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(fd) == "anon_inode:[io_uring]":
            engines.add("io_uring")
    return engines


def mix(z):
    """splitmix64, equal to mix() in guest/guest.h."""
    z = z + 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def word_of(sector, round_):
    """The first word of a sector that guest/disk.c writes in a round."""
    return mix(round_ << 32 | sector)


def sector_of(sector, round_):
    """The bytes of a sector that guest/disk.c writes in a round."""
    words = range(SECTOR // 8)
    same = word_of(sector, round_) * sum(1 << 64 * i for i in words)
    return (same ^ sum(i << 64 * i for i in words)).to_bytes(SECTOR, "little")


def last_round(slot):
    """The last round in which a worker writes a slot."""
    return ROUNDS - (ROUNDS - slot) % SLOTS


def check_image(image):
    """Fails unless each sector of the disk's file has what a worker wrote there last."""
    if len(image) != BYTES:
        raise Failure(f"the disk's file has {len(image)} bytes, not {BYTES}")
    for sector in range(BYTES // SECTOR):
        round_ = last_round(sector * SECTOR // CHUNK % SLOTS)
        if image[sector * SECTOR : (sector + 1) * SECTOR] != sector_of(sector, round_):
            raise Failure(f"sector {sector} of the disk's file is not that of round {round_}")

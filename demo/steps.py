"""The steps of the demo, each of which either measures something or says what went wrong.

A guest is booted and stopped once. Its memory then is a file, its devices' state another; everything that follows
is a way to go on from those two.
"""

import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pages import Handler, Restorer, Tool, memslot_counters, reserve_huge_pages
from qemu import Failure, Qemu

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / "build" / "bin"
BUILT = ROOT / "build" / "demo"
NEEDED = {
    BUILT / "bzImage": "scripts/demo-image",
    BUILT / "initrd": "scripts/demo-image",
    BUILT / "initrd-disk": "scripts/demo-image",
    BUILT / "kdp-demo-fetch": "scripts/demo-image",
    BIN / "kdp": "make tools",
    BIN / "kdp-vmm": "make tools",
}
PAGE = 4096
ADDRESS = "127.0.0.1:7411"
MODULE = "kvm_demand_paging"
# The debug kernel under emulation takes its time.
SLOW = 8 if os.environ.get("KDP_KERNEL") == "debug" else 1


@dataclass
class Settings:
    """How large the guest is, and where the demo may write."""

    memory: int = 256 << 20
    data_mib: int = 32  # data that it verifies on and on
    cold_mib: int = 0  # data that it has and does not use
    work: str = "/dev/shm/kdp-demo"

    def guest_args(self):
        return f"kdp_mib={self.data_mib} kdp_cold={self.cold_mib}"


@dataclass
class Snapshot:
    """A stopped guest: `ram` and `state` are files, `rest` a line of its console that it had not finished."""

    ram: str
    state: str
    last_tick: int
    rest: bytes
    pages: int  # that hold something


def prepare(settings):
    """A fresh working folder, with all that is measured in it: a file there costs no round trip to the VM's host."""
    shutil.rmtree(settings.work, ignore_errors=True)
    os.makedirs(settings.work)
    for path, made_by in NEEDED.items():
        if not path.exists():
            raise Failure(f"there is no {path}: run {made_by}")
        shutil.copy(path, settings.work)
    if not os.path.exists("/dev/kvm"):
        raise Failure("there is no /dev/kvm: modprobe kvm_amd or kvm_intel")


def insert_module():
    if Path(f"/sys/module/{MODULE}").exists():
        return
    ko = os.environ["KDP_MODULE"]
    done = subprocess.run(["insmod", ko], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failure(f"{ko} cannot be inserted: {done.stderr.strip()} (see dmesg)")


def boot_and_snapshot(settings):
    """Boots the guest in a plain file, lets it work for a moment, and stops it for good."""
    ram, state = f"{settings.work}/ram", f"{settings.work}/state"
    with open(ram, "wb") as f:
        f.truncate(settings.memory)
    with Qemu(ram, settings.memory, settings.work, guest_args=settings.guest_args()) as qemu:
        console = qemu.console
        at, _, _ = console.wait_for("^KDP-USERSPACE", 120 * SLOW, "the guest's userspace")
        at, _, _ = console.wait_for("^KDP-READY", 120 * SLOW, "the guest's data", at)
        at, _, _ = console.wait_for("^KDP-VERIFY ok", 60 * SLOW, "the guest's first verification", at)
        console.wait_for("^KDP-TICK", 30 * SLOW, "a tick of the guest's counter", at)
        monitor = qemu.monitor()
        monitor.run("stop")
        monitor.migrate("migrate", state, 60 * SLOW)
        qemu.quit()
        check_sequence(console.ticks(), 0)
        return Snapshot(
            ram=ram,
            state=state,
            last_tick=console.ticks()[-1],
            rest=console.rest,
            pages=os.stat(ram).st_blocks * 512 // PAGE,
        )


def warm_up(settings):
    """One start of QEMU that waits for a snapshot, as the restores do: both then find its files in the page cache."""
    memory = f"{settings.work}/warm-up"
    with open(memory, "wb") as f:
        f.truncate(settings.memory)
    with Qemu(memory, settings.memory, settings.work, incoming=True) as qemu:
        qemu.monitor(60 * SLOW)
        qemu.quit()
    os.unlink(memory)


def check_sequence(ticks, last):
    """The counter goes on where it was and leaves nothing out."""
    for n in ticks:
        if n != last + 1:
            raise Failure(f"the guest's counter went from {last} to {n}")
        last = n


def resume(settings, snapshot, memory_path, at_first_tick=None, at_first_verify=None):
    """Lets the guest go on in the memory at `memory_path`; returns the times, in seconds.

    The guest must count on without a gap and find its data whole: once from where it was in the middle of, and a
    second time from the beginning.
    """
    with Qemu(
        memory_path, settings.memory, settings.work, snapshot.rest, incoming=True, guest_args=settings.guest_args()
    ) as qemu:
        monitor = qemu.monitor(60 * SLOW)
        monitor.migrate("migrate-incoming", snapshot.state, 60 * SLOW)
        resumed = time.monotonic()
        monitor.run("cont")
        _, ticked, _ = qemu.console.wait_for("^KDP-TICK", 30 * SLOW, "the first tick after the resume")
        if at_first_tick:
            at_first_tick(qemu.process.pid)
        # The round that was under way at the stop may have ended with what was already read.
        at, _, _ = qemu.console.wait_for("^KDP-VERIFY ok", 120 * SLOW, "the first verification after the resume")
        at, verified, _ = qemu.console.wait_for("^KDP-VERIFY ok", 120 * SLOW, "a whole verification", at + 1)
        if at_first_verify:
            at_first_verify(qemu.process.pid)
        ticks = qemu.console.ticks()
        check_sequence(ticks, snapshot.last_tick)
        return {
            "start_to_tick_s": ticked - qemu.started,
            "cont_to_tick_s": ticked - resumed,
            "start_to_verify_s": verified - qemu.started,
            "ticks": len(ticks),
        }


@contextmanager
def serving(settings, snapshot):
    """`kdp serve` holds the snapshot's memory; it is not changed by who reads it."""
    with Tool(f"{settings.work}/kdp", "serve", "--listen", ADDRESS, snapshot.ram) as server:
        server.wait(lambda: any(line.startswith("listening") for line in server.lines), 30 * SLOW, "it listens")
        yield server


def restore_on_device(settings, snapshot, name="demo"):
    """The restore that this project is about: the guest runs at once, its pages follow when it touches them."""
    reserve_huge_pages(settings.memory)
    reports = {}
    began = time.monotonic()
    with Handler(settings.work, name, settings.memory, f"tcp:{ADDRESS}", 30 * SLOW) as handler:
        ready = time.monotonic()
        times = resume(
            settings,
            snapshot,
            handler.memory,
            lambda _: reports.update(at_first_tick=handler.report(30 * SLOW)),
            lambda _: reports.update(at_first_verify=handler.report(30 * SLOW)),
        )
        handler.stop(30 * SLOW)
    full = reports["at_first_verify"]
    if not 0 < full["pages_fetched"] < settings.memory // PAGE:
        raise Failure(f"the handler fetched {full['pages_fetched']} pages: they were not paged in on demand")
    return times | reports | {"before_s": ready - began}


def restore_from_file(settings, snapshot, name="demo-file"):
    """The restore without a handler: the kernel reads the snapshot itself, in the fault."""
    reserve_huge_pages(settings.memory)
    reports = {}
    began = time.monotonic()
    with Restorer(settings.work, name, snapshot.ram, 30 * SLOW) as restorer:
        ready = time.monotonic()

        def first_tick(pid):
            reports["at_first_tick"] = memslot_counters(settings.work, pid)
            # From here on nobody is there but QEMU and the kernel.
            restorer.stop(30 * SLOW)

        times = resume(
            settings,
            snapshot,
            restorer.memory,
            first_tick,
            lambda pid: reports.update(at_first_verify=memslot_counters(settings.work, pid)),
        )
    full = reports["at_first_verify"]
    if full["source-reads"] + full["source-ahead"] >= settings.memory // PAGE or full["source-reads"] == 0:
        raise Failure(f"the kernel read {full['source-reads']} pages: they were not paged in on demand")
    if full["exits"] or full["waits"] or full["source-errors"]:
        raise Failure(f"somebody was asked for pages that the file has: {json.dumps(full)}")
    return times | reports | {"before_s": ready - began}


def restore_after_fetch(settings, snapshot):
    """The same without us: all of the memory is fetched onto huge pages first, then the guest runs."""
    reserve_huge_pages(settings.memory)
    mount = f"{settings.work}/huge"
    os.makedirs(mount)
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "hugetlbfs", mount], check=True)
    try:
        began = time.monotonic()
        with Tool(f"{settings.work}/kdp-demo-fetch", f"tcp:{ADDRESS}", f"{mount}/ram") as fetch:
            report = fetch.answer(300 * SLOW)
        ready = time.monotonic()
        times = resume(settings, snapshot, f"{mount}/ram")
    finally:
        subprocess.run(["umount", mount], check=False)
    return times | {"before_s": ready - began, "bytes_received": report["bytes_received"]}


def small_vmm(settings, mode, backing, memory):
    """The small VMM's own guest; it verifies its memory's checksum and fails if that is wrong."""
    args = ["run", "--mode", mode, "--backing", backing, "--memory", str(memory), "--json"]
    with Tool(f"{settings.work}/kdp-vmm", *args) as vmm:
        report = vmm.answer(180 * SLOW)
    if report.get("ok") is not True:
        raise Failure(f"kdp-vmm --mode {mode} saw a wrong checksum: {json.dumps(report)}")
    return report


def clean_up(settings):
    """Gives the working folder's memory back; the VM may have other things to run."""
    shutil.rmtree(settings.work, ignore_errors=True)


def lose_a_page(settings, name="victim"):
    """A page of a Linux guest under an unmodified QEMU is lost while the guest uses it; returns what the guest said.

    The guest must log the page's address, lose the process that touched it and nothing else, and go on.
    """
    blank = f"{settings.work}/blank"
    with open(blank, "wb") as f:
        f.truncate(settings.memory)
    reserve_huge_pages(settings.memory)
    args = f"{settings.guest_args()} kdp_victim=1"
    # A guest on AMD recovers from an error only where its CPU says that it contains them (SUCCOR).
    with (
        Restorer(settings.work, name, blank, 30 * SLOW) as restorer,
        Qemu(restorer.memory, settings.memory, settings.work, guest_args=args, cpu="host,+succor,+overflow-recov") as qemu,
    ):
        console = qemu.console
        at, _, said = console.wait_for("^KDP-VICTIM 0x([0-9a-f]+)$", 120 * SLOW, "the guest's victim")
        address = int(said.group(1), 16)
        console.wait_for("^KDP-VERIFY ok", 60 * SLOW, "the guest's first verification", at)
        lost = [f"{settings.work}/kdp", "poison", "--pid", str(restorer.process.pid), str(address // PAGE)]
        done = subprocess.run(lost, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode != 0:
            raise Failure(f"kdp poison: {done.stderr.strip()}")
        at, _, told = console.wait_for(r"^KDP-SIGBUS code (\d+) lsb (\d+)$", 60 * SLOW, "the victim's signal", at)
        for _ in range(2):
            at, _, _ = console.wait_for("^KDP-VERIFY ok", 60 * SLOW, "a verification after the loss", at + 1)
        console.wait_for("^KDP-TICK", 30 * SLOW, "a tick after the loss", at)
        return {
            "address": address,
            "code": int(told.group(1)),
            "lsb": int(told.group(2)),
            "log": [line for line in console.text() if not line.startswith("KDP-")],
        }

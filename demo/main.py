"""The demo, inside the test VM: see scripts/demo."""

import argparse
import json
import os
import subprocess
import sys
import time

sys.dont_write_bytecode = True

import report  # noqa: E402
import steps  # noqa: E402
from qemu import Failure  # noqa: E402


def parse():
    p = argparse.ArgumentParser(description="Restore a real guest whose memory is paged in on demand.")
    p.add_argument("--memory", type=int, default=256, metavar="MIB", help="the guest's memory (256)")
    p.add_argument("--data", type=int, default=32, metavar="MIB", help="data in it that it verifies on and on (32)")
    p.add_argument("--cold", type=int, default=96, metavar="MIB", help="data in it that it does not use (96)")
    p.add_argument("--json", metavar="FILE", default=steps.BUILT / "latest.json", help="where all figures are written")
    args = p.parse_args()
    if args.memory % 2 or not 96 <= args.memory <= 2048:
        p.error(f"--memory {args.memory}: it must be even and from 96 to 2048")
    if not 1 <= args.data <= 512 or not 0 <= args.cold <= 512 or args.data + args.cold > args.memory * 5 // 8:
        p.error(f"--data {args.data}, --cold {args.cold}: together they may be five eighths of --memory, each at most 512")
    return args


def cpu_model():
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
        for line in f:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


class Steps:
    """Says what is being done, and how long it took."""

    def __init__(self):
        self.number = 0

    def run(self, text, function, *args, **kwargs):
        self.number += 1
        print(f"{self.number}. {text} ...", flush=True)
        started = time.monotonic()
        result = function(*args, **kwargs)
        print(f"   done in {time.monotonic() - started:.1f} s", flush=True)
        return result


def demo(args):
    settings = steps.Settings(memory=args.memory << 20, data_mib=args.data, cold_mib=args.cold)
    steps.prepare(settings)
    step = Steps()
    snapshot = step.run(
        "boot Linux under an unmodified QEMU, let it work, snapshot it", steps.boot_and_snapshot, settings
    )
    print(
        f"   stopped at tick {snapshot.last_tick}; {snapshot.pages:,} of its {settings.memory // 4096:,} pages hold something"
    )
    steps.warm_up(settings)
    step.run("insert the module", steps.insert_module)
    with steps.serving(settings, snapshot):
        device = step.run(
            "resume it at once on huge pages whose contents are still at 'kdp serve'",
            steps.restore_on_device, settings, snapshot,
        )
        eager = step.run(
            "the same without us: fetch all of its memory onto huge pages first, then resume",
            steps.restore_after_fetch, settings, snapshot,
        )
    from_file = step.run(
        "the same with no handler at all: the kernel reads the snapshot's file in the fault",
        steps.restore_from_file, settings, snapshot,
    )
    vmm_bytes = 16 << 20
    exits = step.run(
        "run the small VMM's guest with fault exits", steps.small_vmm, settings, "exit", "shmem", vmm_bytes
    )
    uffd = step.run("and on userfaultfd", steps.small_vmm, settings, "uffd-missing", "shmem", vmm_bytes)
    return {
        "memory_bytes": settings.memory,
        "data_mib": settings.data_mib,
        "cold_mib": settings.cold_mib,
        "pages_in_use": snapshot.pages,
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "device": device,
        "eager": eager,
        "file": from_file,
        "vmm_exit": exits,
        "vmm_uffd": uffd,
    }


def main():
    args = parse()
    try:
        run = demo(args)
    except (Failure, OSError, subprocess.SubprocessError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    with open(args.json, "w", encoding="utf-8") as f:
        json.dump(run, f, indent=1)
        f.write("\n")
    print()
    print(report.text(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Locks that CPUs meet at: the kernel's trace, made into two tables. scripts/contention says what is traced."""

import argparse
import bisect
import re
from collections import defaultdict
from pathlib import Path

EVENT = re.compile(r"^\s*(.+)-(\d+)\s+\[(\d+)\]\s+\S+\s+([\d.]+): (\w+|<stack trace>):?\s?(.*)$")
PROBE = re.compile(r"lock=(0x[0-9a-f]+) caller=(0x[0-9a-f]+)")
FRAME = re.compile(r"^ => (\S+)")
# What only locks for somebody.
LOCKING = re.compile(
    r"^(__traceiter_|__do_trace|trace_|rwsem_|down_|up_|__down|_?mutex_|__mutex_|_raw_|native_queued_|queued_"
    r"|__pv_queued_|__rwbase|percpu_down|__percpu_|do_raw_)"
)
CRATE = "17kvm_demand_paging"


def readable(name):
    """A mangled Rust name as file::function, near enough."""
    if not name.startswith("_R") or CRATE not in name:
        return name
    parts, at = [], name.index(CRATE) + len(CRATE)
    while match := re.compile(r"(\d+)_?").search(name, at):
        at = match.end()
        part = name[at : at + int(match[1])]
        if len(part) == int(match[1]) and re.fullmatch(r"[A-Za-z_]\w*", part):
            parts.append(part)
            at += len(part)
    return "::".join(parts[:1] + parts[-1:]) if len(parts) > 1 else name


class Symbols:
    """Functions by address."""

    def __init__(self, kallsyms):
        found = {}
        for line in Path(kallsyms).read_text(encoding="ascii").splitlines():
            address, kind, name, *_ = line.split()
            if kind in "tTwW":
                found.setdefault(int(address, 16), name)
        self.addresses = sorted(found)
        self.names = [found[a] for a in self.addresses]

    def find(self, address):
        i = bisect.bisect_right(self.addresses, address) - 1
        return self.names[i] if i >= 0 else "?"


class Acquisitions:
    """Of the module's locks, by the function that locks and the one it calls."""

    def __init__(self, symbols):
        self.symbols = symbols
        self.last_cpu = {}
        self.by_site = defaultdict(lambda: [0, 0, set()])

    def add(self, cpu, how, text):
        match = PROBE.search(text)
        if not match:
            return
        lock, caller = match.group(1), self.symbols.find(int(match.group(2), 16) - 1)
        row = self.by_site[(how, readable(caller))]
        row[0] += 1
        row[1] += self.last_cpu.get(lock, cpu) != cpu
        row[2].add(lock)
        self.last_cpu[lock] = cpu

    def show(self, pages):
        print(f"{'acquired':>9} {'a page':>7} {'bounced':>8} {'of them':>8} {'locks':>6}  the module's locks: how, where")
        total = [0, 0]
        for (how, where), (count, bounced, locks) in sorted(self.by_site.items(), key=lambda row: -row[1][0]):
            print(f"{count:9} {count / pages:7.2f} {bounced:8} {100 * bounced / count:6.1f} % {len(locks):6}  {how} {where}")
            total[0] += count
            total[1] += bounced
        share = 100 * total[1] / total[0] if total[0] else 0
        print(f"{total[0]:9} {total[0] / pages:7.2f} {total[1]:8} {share:6.1f} %         all")


class Contentions:
    """Of all locks, by the function that wanted the lock."""

    def __init__(self):
        self.begun = {}
        self.by_site = defaultdict(lambda: [0, 0.0])

    def begin(self, pid, time):
        self.begun[pid] = [time, None, None]

    def stack(self, pid, frames):
        if pid in self.begun and self.begun[pid][1] is None:
            wanted = [f for f in frames if not LOCKING.match(f)]
            how = next((f for f in frames if f.startswith(("down_", "mutex_", "_raw_", "_mutex"))), "lock")
            self.begun[pid][1:] = [how, wanted[0] if wanted else "?"]

    def end(self, pid, time):
        begun = self.begun.pop(pid, None)
        if begun and begun[1]:
            row = self.by_site[(begun[1], readable(begun[2]), begun[2].startswith("_R"))]
            row[0] += 1
            row[1] += time - begun[0]

    def show(self, pages):
        print(f"\n{'contended':>9} {'a page':>7} {'waited ms':>10}  all locks: how, for whom")
        for (how, where, ours), (count, waited) in sorted(self.by_site.items(), key=lambda row: -row[1][1])[:20]:
            mark = "  <- the module" if ours else ""
            print(f"{count:9} {count / pages:7.3f} {waited * 1e3:10.1f}  {how} {where}{mark}")
        ours = [row for (_, _, is_ours), row in self.by_site.items() if is_ours]
        rows = list(self.by_site.values())
        for name, rows in (("the module's", ours), ("all", rows)):
            print(f"{sum(r[0] for r in rows):9} {sum(r[0] for r in rows) / pages:7.3f} {1e3 * sum(r[1] for r in rows):10.1f}  {name}")


def main():
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument("trace")
    p.add_argument("kallsyms")
    p.add_argument("--pages", type=int, required=True)
    args = p.parse_args()
    acquisitions, contentions = Acquisitions(Symbols(args.kallsyms)), Contentions()
    pid, frames, lost = None, None, 0
    with open(args.trace, encoding="utf-8", errors="replace") as trace:
        for line in trace:
            frame = FRAME.match(line)
            if frame and frames is not None:
                frames.append(frame.group(1).split("+")[0])
                continue
            if frames is not None:
                contentions.stack(pid, frames)
                frames = None
            if "LOST" in line:
                lost += 1
            match = EVENT.match(line)
            if not match:
                continue
            pid, cpu, time, event, text = int(match[2]), int(match[3]), float(match[4]), match[5], match[6]
            if event == "<stack trace>":
                frames = []
            elif event == "contention_begin":
                contentions.begin(pid, time)
            elif event == "contention_end":
                contentions.end(pid, time)
            else:
                acquisitions.add(cpu, event, text)
    if lost:
        print(f"note: the tracer lost events {lost} times; counts are too low")
    acquisitions.show(args.pages)
    contentions.show(args.pages)


if __name__ == "__main__":
    main()

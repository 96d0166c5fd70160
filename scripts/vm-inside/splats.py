"""What counts as a complaint of the kernel, and how it is cut out of a console's log.

Also a command: `splats.py LOG` prints what it finds and exits with 1 if there is anything.
"""

import re
import sys

# Only lines that printk wrote count, so that nothing a program prints looks like a report.
PRINTK = re.compile(r"^(?:<\d+>)?\[ *(\d+\.\d+)\](?:\[ *[TC]\d+\])? ?(.*)$")

# Lockdep's and RCU's reports begin with "WARNING: " in their second line; KASAN's, soft lockups and sleeping in
# atomic context with "BUG: ".
BEGINS = re.compile(
    r"""
    \bWARNING:\ | \bBUG:\ | kernel\ BUG\ at | \bOops\b | general\ protection\ fault | Unable\ to\ handle
    | KASAN: | UBSAN: | KFENCE: | KCSAN: | kernel\ panic | Kernel\ panic
    | possible\ circular\ locking | possible\ recursive\ locking | inconsistent\ lock\ state
    | suspicious\ RCU\ usage | lock\ held\ when\ returning | bad\ unlock\ balance | bad\ (?:pgd|p4d|pud|pmd)\b | lockdep\ is\ turned\ off
    | trying\ to\ register\ non-static\ key | DEBUG_LOCKS_WARN_ON
    | rcu.*(?:self-)?detected.*stall | rcu.*kthread.*starved | RCU\ stall
    | sleeping\ function\ called\ from\ invalid\ context | scheduling\ while\ atomic
    | task\ .*\ blocked\ for\ more\ than | soft\ lockup | hard\ LOCKUP | workqueue\ lockup
    | ODEBUG: | refcount_t: | list_(?:add|del)\ corruption | Bad\ (?:page|rss-counter)\ state | page_table_check
    | rust_kernel:\ panicked | stack\ guard\ page | Objects\ remaining\ in | memory\ leak\ in
    | cut\ here
    """,
    re.VERBOSE,
)
# The lines after which a report is over; a report without one is cut off at LONGEST lines.
ENDS = re.compile(r"---\[ end (?:trace|Kernel panic)|</TASK>$|^=+$")
LONGEST = 60

# What the guard against the emulator's lost interrupts says (guard/kdp_emulator_guard.c).
GUARDED = "kdp_emulator_guard: the emulator has lost an interrupt"
OF_RCU = re.compile(r"rcu.*(?:detected.*stall|kthread.*starved|kthread.*wakeup)")

# A crash; a line of a call trace; those of them that are the entry of an exception.
CRASH = re.compile(r"stack guard page was hit|\bOops\b")
FRAME = re.compile(r"^ *(?:\? )?[\w.]+\+0x[0-9a-f]+/0x[0-9a-f]+")
EXCEPTION = re.compile(r"\b(?:asm_)?(?:exc_|sysvec_)\w+\+|\berror_(?:entry|return)\+|\bparanoid_entry\+")
PANIC = re.compile(r"Kernel panic - not syncing: Fatal exception")

# Seconds by which CPUs' clocks differ at most.
SKEW = 3.0

KMEMLEAK = re.compile(r"vm-kmemleak: (.*)$")
STARTED = re.compile(r"vm-init: started; jiffies (\d+)")
MODULE = "[kvm_demand_paging]"


def stamped_lines(text):
    for line in text.splitlines():
        m = PRINTK.match(line.rstrip("\r"))
        if m:
            yield float(m.group(1)), m.group(2)


def printk_lines(text):
    for _, line in stamped_lines(text):
        yield line


def reports(lines):
    """Each report as a list of its lines."""
    found, current = [], None
    for line in lines:
        if KMEMLEAK.search(line) or line.startswith("vm-init: "):
            continue
        if current is None and BEGINS.search(line):
            current = []
            found.append(current)
        if current is not None:
            current.append(line)
            # A line of "=" both begins and ends KASAN's and lockdep's reports.
            if (len(current) > 3 and ENDS.search(line)) or len(current) >= LONGEST:
                current = None
    return found


def is_of_rcu(report):
    """Whether a report says no more than that RCU waits for a CPU, or for its own thread."""
    return bool(OF_RCU.search(report[0]))


def are_of_a_lost_cpu(found):
    """Whether these reports tell of nothing but exceptions within exceptions within exceptions, and of the end.

    That is what is left of a CPU whose state an emulator has lost. Any other crash has a few entries of exceptions in
    its call trace, among more functions that led there; and a kernel that calls itself too deeply fills its stack with
    functions of its own.
    """

    def is_one(report):
        frames = [line for line in report if FRAME.search(line)]
        exceptions = sum(bool(EXCEPTION.search(line)) for line in frames)
        return CRASH.search("\n".join(report[:4])) and len(frames) >= 8 and exceptions * 2 > len(frames)

    causes = [report for report in found if not PANIC.search(report[0])]
    return bool(causes) and all(map(is_one, causes))


def crashed_at_another_time(text):
    """Whether the first complaint is of a crash, by a CPU whose clock is seconds behind what was printed before.

    The clocks of CPUs are alike. One that is that far behind is a guest's, whose TSC has an offset: it is the emulator's
    error that the host's CPU has it when it is not in that guest. What the kernel complains of later follows from that.
    """
    latest = 0.0
    for stamp, line in stamped_lines(text):
        if BEGINS.search(line):
            return bool(CRASH.search(line)) and stamp < latest - SKEW
        latest = max(latest, stamp)
    return False


def leaks(lines):
    """kmemleak's unreferenced objects that COMMAND is answerable for.

    That is what was allocated since it started (an unloaded module's functions have no names left in a backtrace,
    so the time is the better witness), and what our module allocated at any time. What the kernel and its drivers
    lost during boot is not ours to report.
    """
    started, objects = None, []
    for line in lines:
        if m := STARTED.search(line):
            started = int(m.group(1))
        if m := KMEMLEAK.search(line):
            if m.group(1).startswith("unreferenced object"):
                objects.append([])
            if objects:
                objects[-1].append(m.group(1))

    def ours(obj):
        text = "\n".join(obj)
        when = re.search(r"jiffies (\d+)", text)
        return MODULE in text or (started is not None and when is not None and int(when.group(1)) >= started)

    return [obj for obj in objects if ours(obj)]


def scan(text):
    lines = list(printk_lines(text))
    return reports(lines) + leaks(lines)


def main():
    with open(sys.argv[1], encoding="utf-8", errors="replace") as f:
        found = scan(f.read())
    for report in found:
        print("\n".join(report), end="\n\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

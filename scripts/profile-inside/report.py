"""Where the instructions went: counts by address and the VM's /proc/kallsyms, made into a table by function."""

import argparse
import bisect
import json
from collections import Counter
from pathlib import Path

KERNEL = 1 << 63


class Symbols:
    """Functions by address; a module's are marked with its name."""

    def __init__(self, kallsyms):
        found = {}
        for line in Path(kallsyms).read_text(encoding="ascii").splitlines():
            address, kind, name, *module = line.split()
            if kind in "tTwW":
                found.setdefault(int(address, 16), (name, module[0].strip("[]") if module else "kernel"))
        self.addresses = sorted(found)
        self.names = [found[a] for a in self.addresses]

    def find(self, address):
        """The function's name, and whose it is."""
        if address < KERNEL:
            # Guests of kdp-vmm run below 4 GiB, programs above.
            return ("(guest)", "guest") if address < 1 << 32 else ("(program)", "program")
        i = bisect.bisect_right(self.addresses, address) - 1
        return self.names[i] if i >= 0 else ("?", "kernel")


def profile(raw, symbols):
    """Instructions by function."""
    counts = Counter()
    for line in Path(raw).read_text(encoding="ascii").splitlines():
        address, count = line.split()
        counts[symbols.find(int(address, 16))] += int(count)
    return counts


def main():
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument("raw")
    p.add_argument("kallsyms")
    p.add_argument("--pages", type=int, required=True)
    p.add_argument("--top", type=int, default=60)
    p.add_argument("--json")
    args = p.parse_args()
    counts = profile(args.raw, Symbols(args.kallsyms))
    total = sum(counts.values())
    if not total:
        raise SystemExit("error: nothing was counted: the program that ran has no marks, or never came to them.")
    owners = Counter()
    for (_, owner), n in counts.items():
        owners[owner] += n
    per_page = {owner: n / args.pages for owner, n in owners.most_common()}
    print(f"{'instructions/page':>17}  of all")
    for owner, n in per_page.items():
        print(f"{n:17.1f}  {100 * n * args.pages / total:5.1f} %  {owner}")
    print(f"{total / args.pages:17.1f}  100.0 %  in all\n")
    print(f"{'instructions/page':>17}  function")
    for (name, owner), n in counts.most_common(args.top):
        print(f"{n / args.pages:17.1f}  {name}{'' if owner in ('kernel', name.strip('()')) else f' [{owner}]'}")
    if args.json:
        functions = [{"function": f, "owner": o, "per_page": n / args.pages} for (f, o), n in counts.most_common()]
        Path(args.json).write_text(
            json.dumps({"pages": args.pages, "owners": per_page, "functions": functions}, indent=1) + "\n",
            encoding="ascii",
        )


if __name__ == "__main__":
    main()

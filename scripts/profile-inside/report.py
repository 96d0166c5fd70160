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
    """By function: instructions, and pages of code and of data that it was the first to touch."""
    counts, code, data = Counter(), Counter(), Counter()
    for line in Path(raw).read_text(encoding="ascii").splitlines():
        address, *numbers = line.split()
        function = symbols.find(int(address, 16))
        for counter, n in zip((counts, code, data), numbers):
            counter[function] += int(n)
    return counts, code, data


def by_owner(counter):
    owners = Counter()
    for (_, owner), n in counter.items():
        owners[owner] += n
    return owners


def main():
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument("raw")
    p.add_argument("kallsyms")
    p.add_argument("--pages", type=int, required=True)
    p.add_argument("--top", type=int, default=60)
    p.add_argument("--json")
    args = p.parse_args()
    counts, code, data = profile(args.raw, Symbols(args.kallsyms))
    total = sum(counts.values())
    if not total:
        raise SystemExit("error: nothing was counted: the program that ran has no marks, or never came to them.")
    pages = args.pages
    owners, owners_code, owners_data = by_owner(counts), by_owner(code), by_owner(data)
    print("For each page that the guest visits: instructions, and first touches of a page of code or data.\n")
    print(f"{'instructions':>12}  of all  {'code':>6} {'data':>6}")
    for owner, n in owners.most_common():
        share = 100 * n / total
        print(f"{n / pages:12.1f} {share:5.1f} %  {owners_code[owner] / pages:6.2f} {owners_data[owner] / pages:6.2f}  {owner}")
    print(f"{total / pages:12.1f} 100.0 %  {sum(code.values()) / pages:6.2f} {sum(data.values()) / pages:6.2f}  in all\n")
    print(f"{'instructions':>12}  {'code':>6} {'data':>6}  function")
    for (name, owner), n in counts.most_common(args.top):
        where = "" if owner in ("kernel", name.strip("()")) else f" [{owner}]"
        f = (name, owner)
        print(f"{n / pages:12.1f}  {code[f] / pages:6.2f} {data[f] / pages:6.2f}  {name}{where}")
    if args.json:
        functions = [
            {
                "function": f[0],
                "owner": f[1],
                "instructions": n / pages,
                "code_pages": code[f] / pages,
                "data_pages": data[f] / pages,
            }
            for f, n in counts.most_common()
        ]
        Path(args.json).write_text(json.dumps({"pages": pages, "functions": functions}, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()

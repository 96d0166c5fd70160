"""The figures of a run, as a table for people and as an object for programs."""

MIB = 1 << 20


def seconds(value):
    return f"{value:.2f} s"


def mib(value):
    return f"{value / MIB:.1f} MiB"


def micros(value):
    return "-" if value is None else f"{value:,.0f} µs"


def touched(counts):
    """Who touched the pages that were fetched on demand."""
    return f"{counts['guest']:,} vCPU, {counts['kernel']:,} KVM, {counts['user']:,} VMM"


def total(way, what):
    """From the decision to restore the guest until its first tick, or until it has verified all its data."""
    return way["before_s"] + way[f"start_to_{what}_s"]


def read(counters):
    """Pages that the kernel has read from the file, by touch and ahead."""
    return counters["source-reads"] + counters["source-ahead"]


def restore_rows(run):
    """(what, by a handler, by the kernel, fetched first) for the three restores of the same guest."""
    device, file, eager = run["device"], run["file"], run["eager"]
    pages = run["memory_bytes"] // 4096
    now, full = device["at_first_tick"], device["at_first_verify"]
    file_now, file_full = file["at_first_tick"], file["at_first_verify"]

    def times(key):
        return [seconds(way[key]) for way in (device, file, eager)]

    def totals(what):
        return [seconds(total(way, what)) for way in (device, file, eager)]

    def fetched(*counts):
        return [f"{count:,} of {pages:,}" for count in counts]

    before = zip(times("before_s"), ("start the handler", "name the file", "fetch it all"))
    return [
        ("before QEMU starts", *(f"{time} ({what})" for time, what in before)),
        ("QEMU's start to the guest's first tick", *times("start_to_tick_s")),
        ("  of it, from 'cont'", *times("cont_to_tick_s")),
        ("both together", *totals("tick")),
        ("to the end of a whole verification", *totals("verify")),
        ("pages fetched at the first tick", *fetched(now["pages_fetched"], read(file_now), pages)),
        ("pages fetched when all was verified", *fetched(full["pages_fetched"], read(file_full), pages)),
        ("who touched them", touched(full["touched"]), f"{file_full['source-ahead']:,} of them read ahead", "-"),
        ("fetch latency p50 / p99", f"{micros(full['fetch_p50_us'])} / {micros(full['fetch_p99_us'])}", "-", "-"),
        ("bytes moved at the first tick", mib(now["bytes_received"]), mib(read(file_now) * 4096), mib(eager["bytes_received"])),
        ("bytes moved when all was verified", mib(full["bytes_received"]), mib(read(file_full) * 4096),
         mib(eager["bytes_received"])),
    ]


def vmm_rows(run):
    """(what, exits, userfaultfd) for the small VMM's two runs."""
    exits, uffd = run["vmm_exit"], run["vmm_uffd"]

    def both(text):
        return [text(report) for report in (exits, uffd)]

    return [
        ("pages visited, checksum", *both(lambda r: f"{r['pages']:,}, {'right' if r['ok'] else 'WRONG'}")),
        ("time a page", *both(lambda r: micros(r["us_per_page"]))),
        ("fault latency p50 / p99", *both(lambda r: f"{micros(r['p50_us'])} / {micros(r['p99_us'])}")),
        ("exits / events", *both(lambda r: f"{r['exits']:,} / {r['events']:,}")),
    ]


def table(title, heads, rows):
    cells = [("", *heads), *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    rule = "  " + "-" * (sum(widths) + 2 * (len(widths) - 1))
    out = [title, rule]
    for i, row in enumerate(cells):
        out.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        if i == 0:
            out.append(rule)
    return "\n".join(out)


def text(run):
    guest = (
        f"A Linux of {run['memory_bytes'] // MIB} MiB under an unmodified QEMU: {run['data_mib']} MiB of data that it "
        f"verifies on and on, {run['cold_mib']} MiB that it does not touch."
    )
    return "\n\n".join([
        f"Measured on: {run['cpu']}, {run['cpus']} CPU{'s' if run['cpus'] > 1 else ''} for guest, handler and server.",
        table(
            f"{guest}\nIts restore from a snapshot, on 2 MiB huge pages, over TCP or by the kernel from a file:",
            ("on demand, over TCP", "on demand, from a file", "fetched first, without us"),
            restore_rows(run),
        ),
        table(
            f"The guest of a small VMM, {run['vmm_exit']['bytes'] // MIB} MiB on {run['vmm_exit']['backing']}, in random order:",
            ("fault exits", "userfaultfd"),
            vmm_rows(run),
        ),
        "guest reached userspace in {:.2f} s after QEMU's start, {:.2f} s in all ({:.2f} s from a file); "
        "without us in {:.2f} s in all".format(
            run["device"]["start_to_tick_s"], *(total(run[way], "tick") for way in ("device", "file", "eager"))
        ),
    ])

"""The processes that hold and fetch pages, and huge pages to put them on."""

import json
import signal
import subprocess
import threading
import time
from pathlib import Path

from qemu import Failure

HUGE = 2 << 20
NR_HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
FREE_HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


def reserve_huge_pages(bytes_):
    """Makes sure that so many bytes of 2 MiB pages are free."""
    wanted = bytes_ // HUGE
    short = wanted - int(FREE_HUGEPAGES.read_text("ascii"))
    if short > 0:
        NR_HUGEPAGES.write_text(str(int(NR_HUGEPAGES.read_text("ascii")) + short), "ascii")
    free = int(FREE_HUGEPAGES.read_text("ascii"))
    if free < wanted:
        raise Failure(f"{wanted} huge pages of 2 MiB are needed, {free} are free: give the VM more --hugepages")


class Tool:
    """A running command of ours. Use it as a context manager: it does not outlive the block."""

    def __init__(self, program, *args):
        self.what = f"{Path(program).name} {args[0]}"
        self.process = subprocess.Popen(
            [program, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines = []
        self.errors = []
        self.awaited = False
        self.changed = threading.Condition()
        self.threads = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors), daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        early = None if self.awaited else self.process.poll()
        self.process.kill()
        self.process.wait()
        if isinstance(value, Failure) and early is not None:
            raise Failure(f"{value}\n{self.what} had ended by then, with status {early}; {self.said()}") from value

    def _read(self, stream, lines):
        for line in stream:
            with self.changed:
                lines.append(line.rstrip("\n"))
                self.changed.notify_all()

    def said(self):
        return "\n    ".join(["it said:", *self.errors, *self.lines]) if self.errors or self.lines else "it said nothing"

    def wait(self, done, timeout, what):
        """Until `done` gives something that is true, which is returned."""
        deadline = time.monotonic() + timeout
        while not (result := done()):
            if self.process.poll() is not None:
                raise Failure(f"{self.what} ended with status {self.process.returncode} before {what}; {self.said()}")
            if time.monotonic() > deadline:
                raise Failure(f"{what}: {self.what} took more than {timeout:.0f} s; {self.said()}")
            time.sleep(0.005)
        return result

    def stop(self, timeout):
        """Ask it to end, and wait until it has."""
        if self.process.poll() is not None:
            raise Failure(f"{self.what} ended early, with status {self.process.returncode}; {self.said()}")
        self.process.send_signal(signal.SIGTERM)
        self.finish(timeout)

    def finish(self, timeout):
        """Wait until it has ended; it must have succeeded."""
        self.awaited = True
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired as e:
            raise Failure(f"{self.what} did not end within {timeout:.0f} s; {self.said()}") from e
        for thread in self.threads:
            thread.join(5)
        if status != 0:
            raise Failure(f"{self.what} failed with status {status}; {self.said()}")

    def answer(self, timeout):
        """Wait until it has ended; its last line is a JSON object."""
        self.finish(timeout)
        try:
            return json.loads(self.lines[-1])
        except (IndexError, ValueError) as e:
            raise Failure(f"{self.what} gave no JSON; {self.said()}") from e


class Restorer(Tool):
    """`kdp restore`, with a memslot at /dev/kdp/NAME whose pages the kernel reads from `file`."""

    def __init__(self, work, name, file, timeout):
        ready = Path(work, "restore.ready")
        ready.unlink(missing_ok=True)
        super().__init__(f"{work}/kdp", "restore", "--create", name, "--hugetlb", "2M", "--ready-file", str(ready), file)
        self.work = work
        self.wait(ready.exists, timeout, f"/dev/kdp/{name} is there")
        self.memory = f"/dev/kdp/{name}"


def memslot_counters(work, pid):
    """What the module has counted of the memslot that a process has open."""
    done = subprocess.run(
        [f"{work}/kdp", "stat", "--json", str(pid)], capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode != 0:
        raise Failure(f"kdp stat: {done.stderr.strip()}")
    memslots = json.loads(done.stdout)["memslots"]
    if not memslots:
        raise Failure(f"process {pid} has no memslot open")
    return memslots[0]["values"]


class Handler(Tool):
    """`kdp handle`, with a memslot of its own at /dev/kdp/NAME and its pages at `source`."""

    def __init__(self, work, name, bytes_, source, timeout, backing=("--hugetlb", "2M")):
        self.report_file = Path(work, "handler.json")
        ready = Path(work, "handler.ready")
        self.report_file.unlink(missing_ok=True)
        ready.unlink(missing_ok=True)
        super().__init__(
            f"{work}/kdp", "handle", "--create", name, "--size", str(bytes_), *backing, "--source", source,
            "--ready-file", str(ready), "--json", str(self.report_file),
        )
        self.wait(ready.exists, timeout, f"/dev/kdp/{name} is there")
        self.memory = f"/dev/kdp/{name}"

    def report(self, timeout=30):
        """What it has done until now."""
        self.report_file.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        self.wait(self.report_file.exists, timeout, "it reports")
        return json.loads(self.report_file.read_text("utf-8"))

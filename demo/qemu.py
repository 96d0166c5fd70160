"""An unmodified QEMU: started, watched through its guest's serial console, driven through QMP."""

import json
import re
import socket
import subprocess
import threading
import time

TICK = re.compile(r"^KDP-TICK (\d+)$")
# The guest has one serial port. The other parameters make the boot of a distribution's kernel
# faster. They turn off what this guest does not need:
# - ACPI, security modules and auditing;
# - patches of the kernel's code for mitigations;
# - self-tests of ciphers;
# - making the kernel's code read-only, and checking all page tables for it;
# - clearing each page at its allocation.
GUEST_ARGS = (
    "console=ttyS0 quiet panic=-1 8250.nr_uarts=1 acpi=off lsm= audit=0 "
    "mitigations=off cryptomgr.notests rodata=off init_on_alloc=0"
)
# For guests without a disk, which do not need PCI.
NO_PCI = "pci=off"
VERIFIED = re.compile(r"^KDP-VERIFY ok (\d+)$")


class Failure(Exception):
    """What went wrong, in words for whoever runs the demo."""


class Console:
    """The lines of a guest's serial console, each with the time at which it was complete.

    A restored guest goes on where it was stopped, perhaps in the middle of a line: `rest` is what its predecessor
    left of one.
    """

    def __init__(self, stream, rest=b""):
        self.lines = []
        self.rest = rest
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self.thread.start()

    def _read(self, stream):
        while data := stream.read1(4096):
            now = time.monotonic()
            with self.changed:
                *whole, self.rest = (self.rest + data).split(b"\n")
                self.lines += [(now, line.decode("ascii", "replace").rstrip("\r")) for line in whole]
                self.changed.notify_all()
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def wait_for(self, pattern, timeout, what, since=0):
        """The index, the time and the match of the first line from `since` on that matches."""
        deadline = time.monotonic() + timeout
        at = since
        with self.changed:
            while True:
                while at < len(self.lines):
                    when, line = self.lines[at]
                    if match := re.search(pattern, line):
                        return at, when, match
                    if line.startswith("KDP-VERIFY BAD") or line.startswith("KDP-FAILED") or "Kernel panic" in line:
                        raise Failure(f"the guest says '{line}' while {what} was awaited")
                    at += 1
                left = deadline - time.monotonic()
                if self.closed:
                    raise Failure(f"QEMU ended while {what} was awaited; {self.tail()}")
                if left <= 0:
                    raise Failure(f"{what} did not come within {timeout:.0f} s; {self.tail()}")
                self.changed.wait(left)

    def text(self):
        with self.changed:
            return [line for _, line in self.lines]

    def ticks(self):
        return [int(m.group(1)) for line in self.text() if (m := TICK.match(line))]

    def tail(self):
        lines = self.text()[-8:]
        return "the console's last lines:\n    " + "\n    ".join(lines) if lines else "the console is empty"


class Qmp:
    """QEMU's monitor protocol: one JSON object a line, answers in order, events in between."""

    def __init__(self, path, process, timeout):
        deadline = time.monotonic() + timeout
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        while True:
            try:
                self.socket.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError) as e:
                if process.poll() is not None:
                    raise Failure(f"QEMU ended with status {process.returncode} before its monitor was there") from e
                if time.monotonic() > deadline:
                    raise Failure(f"QEMU's monitor was not there within {timeout:.0f} s") from e
                time.sleep(0.01)
        self.lines = self.socket.makefile("rb")
        self.socket.settimeout(timeout)
        self._next("QMP")
        self.run("qmp_capabilities")

    def _next(self, key):
        try:
            while line := self.lines.readline():
                message = json.loads(line)
                if "error" in message:
                    raise Failure(f"QEMU refuses: {message['error']['desc']}")
                if key in message:
                    return message[key]
        except TimeoutError as e:
            raise Failure("QEMU's monitor does not answer") from e
        raise Failure("QEMU closed its monitor")

    def run(self, command, **arguments):
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        return self._next("return")

    def migrate(self, command, state, timeout):
        """Migrate to or from a file, by the command. Shared memory stays where it is, out of the file."""
        self.run("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        self.run(command, uri=f"file:{state}")
        deadline = time.monotonic() + timeout
        while True:
            status = self.run("query-migrate").get("status")
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                raise Failure(f"QEMU's migration {status}")
            if time.monotonic() > deadline:
                raise Failure(f"QEMU's migration is still '{status}' after {timeout:.0f} s")
            time.sleep(0.02)


class Qemu:
    """One guest. Use it as a context manager: QEMU does not outlive the block.

    A guest without a `disk` has no PCI.
    """

    def __init__(
        self, memory_path, bytes_, work, console_rest=b"", incoming=False, guest_args="",
        cpu="host", initrd="initrd", disk=None,
    ):
        self.work = work
        self.name = f"qemu-{time.monotonic_ns()}"
        monitor = f"{work}/{self.name}.qmp"
        args = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", cpu, "-smp", "1", "-m", f"{bytes_ >> 20}M"]
        args += ["-object", f"memory-backend-file,id=ram,mem-path={memory_path},size={bytes_},share=on"]
        args += ["-machine", "pc,memory-backend=ram,usb=off,vmport=off", "-nodefaults", "-no-user-config"]
        args += ["-display", "none", "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        args += ["-qmp", f"unix:{monitor},server=on,wait=off", "-no-reboot"]
        args += ["-kernel", f"{work}/bzImage", "-initrd", f"{work}/{initrd}"]
        args += ["-append", f"{GUEST_ARGS} {guest_args if disk else f'{NO_PCI} {guest_args}'}"]
        if disk:
            args += ["-drive", f"{disk.option()},id=disk,if=none"]
            args += ["-device", "virtio-blk-pci,drive=disk"]
        if incoming:
            args += ["-incoming", "defer"]
        self.errors = open(f"{work}/{self.name}.err", "w+b")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.errors, bufsize=0
        )
        self.console = Console(open(self.process.stdout.fileno(), "rb", closefd=False), console_rest)
        self.monitor_path = monitor
        self.qmp = None

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        self.process.kill()
        self.process.wait()
        self.console.thread.join(5)
        self.errors.seek(0)
        said = self.errors.read().decode("utf-8", "replace").strip()
        self.errors.close()
        if isinstance(value, Failure) and said:
            raise Failure(f"{value}\nQEMU said: {said}") from value

    def monitor(self, timeout=60):
        if self.qmp is None:
            self.qmp = Qmp(self.monitor_path, self.process, timeout)
        return self.qmp

    def quit(self, timeout=30):
        self.qmp.run("quit")
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired as e:
            raise Failure(f"QEMU did not quit within {timeout} s") from e
        self.console.thread.join(5)

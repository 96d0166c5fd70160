"""The test VM's runner, inside the toolbox: virtme-ng builds the VM, this feeds and watches it.

scripts/vm has the interface. Started in the private mount namespace that the toolbox gives to every command.
"""

import argparse
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(__file__))
import monitor  # noqa: E402
import splats  # noqa: E402

SRC = "/kdp/src"
CACHE = "/kdp/cache"
HERE = f"{SRC}/scripts/vm-inside"
HANDOVER = Path("/mnt")
MONITOR = f"{HANDOVER}/qmp"
# virtme-ng's own init, in whose place ours is mounted.
VIRTME_INIT = "/usr/lib/python3/dist-packages/virtme/guest/virtme-init"
MODULE = f"{SRC}/build/module/{{}}/kvm_demand_paging.ko"
# What an emulated VM needs.
GUARD = f"{SRC}/build/module/{{}}/guard/kdp_emulator_guard.ko"

# Complaints that are shown; the log has all of them.
MOST_REPORTS = 8

# A VM that is not at its init by then hangs at boot, which emulated ones do now and then (a CPU loses an interrupt:
# guard/kdp_emulator_guard.c). Nothing has run in it, so another takes its place.
BOOT_SECONDS = 400
BOOTS = 3
# So long a booting kernel has something to say, unless it sleeps for ever.
BOOT_SILENCE = 100

# Where the log has what QEMU said of a silent VM.
EXAMINED = "\nrun.py: the VM is silent; its CPUs:\n"

# Where the log goes on with what the VM's kernel has kept, because its console had stopped before.
STOPPED = "\nrun.py: the console had stopped; the kernel's own log:\n"

# QEMU's last words where it has lost the VM by a fault of its own.
ASSERTION = re.compile(r"^qemu-system-.*: Assertion .* failed", re.MULTILINE)

# What init says when COMMAND has ended.
ENDED = "vm-init: command ended with status"

STATUS_SPLAT = 90
STATUS_DIED = 91
STATUS_LOST = 92
STATUS_TIMEOUT = 124

# Whatever way we end, the kernel ends all of the VM's processes: they are a PID namespace of their own, whose first
# process dies with unshare, which dies with us.
CONTAINED = ["setpriv", "--pdeathsig", "KILL"]
CONTAINED += ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "unchanged"]

# Requests of 9p are slow under emulation, so they are large. The root does not change while a VM runs: it is
# cached. The checkout is what results are written to: it is not.
MSIZE = 512 * 1024
ROOTFLAGS = f"version=9p2000.L,trans=virtio,access=any,cache=loose,msize={MSIZE}"


def die(text):
    print(f"error: {text}", file=sys.stderr)
    sys.exit(1)


def parse(argv):
    p = argparse.ArgumentParser(prog="vm", allow_abbrev=False, add_help=False)
    p.add_argument("action", choices=["run", "shell"])
    p.add_argument("--kernel", required=True)
    p.add_argument("--kernel-image", required=True)
    p.add_argument("--kernel-modules", required=True)
    p.add_argument("--kernel-initrd", required=True)
    p.add_argument("--module")
    p.add_argument("--memory", default="4G")
    p.add_argument("--cpus", type=int, default=2)
    p.add_argument("--nodes", type=int, default=1)
    p.add_argument("--hugepages", type=int, default=0)
    p.add_argument("--hugepages-1g", type=int, default=0)
    p.add_argument("--kernel-arg", action="append", default=[])
    p.add_argument("--icount", action="store_true")
    p.add_argument("--plugin")
    p.add_argument("--timeout", type=int)
    p.add_argument("--silence", type=int)
    p.add_argument("--allow-splat", action="store_true")
    command = []
    if "--" in argv:
        cut = argv.index("--")
        argv, command = argv[:cut], argv[cut + 1 :]
    args = p.parse_args(argv)
    args.command = command
    if args.action == "run":
        if not command:
            p.error("vm run needs a command after '--'")
        args.timeout = args.timeout or 600
    else:
        if command:
            p.error("vm shell takes no command: say vm run")
        if not sys.stdin.isatty() or not sys.stdout.isatty():
            p.error("vm shell needs a terminal: say vm run -- COMMAND")
    if args.icount:
        args.cpus = 1
    args.mib = mebibytes(args.memory)
    if args.mib is None:
        p.error(f"--memory {args.memory}: say how much, with M or G behind it")
    if not 1 <= args.nodes <= 8 or args.mib % (args.nodes * 128):
        p.error(f"--nodes {args.nodes}: from 1 to 8, which have parts of {args.memory} that are multiples of 128M")
    return args


def mebibytes(size):
    """A size of memory; None if it is none."""
    match = re.fullmatch(r"([1-9][0-9]*)([MG])", size)
    return match and int(match[1]) * {"M": 1, "G": 1024}[match[2]]


def mount(*args):
    subprocess.run(["mount", *args], check=True)


def prepare(args):
    """Lays out what the VM finds on its root. All of it is gone with our mount namespace but the kernel's log."""
    os.makedirs("/lib/modules", exist_ok=True)
    mount("--bind", os.path.dirname(args.kernel_modules), "/lib/modules")
    mount("--bind", f"{HERE}/init.sh", VIRTME_INIT)
    mount("-t", "tmpfs", "tmpfs", str(HANDOVER))
    settings = {
        "KDP_KERNEL": args.kernel,
        "shell": "yes" if args.action == "shell" else "no",
        "msize": MSIZE,
        "module": f"{SRC}/{args.module}" if args.module else MODULE.format(args.kernel),
        "guard": GUARD.format(args.kernel),
        "leak_scan": "yes" if args.kernel == "debug" else "no",
        "dmesg": dmesg_path().relative_to(SRC),
        "cpus": f"{args.spare}-{args.spare + args.cpus - 1}",
    }
    text = "".join(f"{k}={shlex.quote(str(v))}\n" for k, v in settings.items())
    # One of an interrupted VM must not pass for this one's.
    dmesg_path().unlink(missing_ok=True)
    (HANDOVER / "settings").write_text(text, encoding="utf-8")
    (HANDOVER / "command").write_text(f"exec {shlex.join(args.command)}\n", encoding="utf-8")


def host_runs_kernels(image):
    """Whether KVM here can run the test kernel, with virtualization for the guests inside it.

    /dev/kvm may exist where no kernel boots under it, so the kernel is booted, up to its init. The answer holds
    until this host or the kernel changes.
    """
    if not os.path.exists("/dev/kvm"):
        return False
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    cache = Path(f"{CACHE}/vm-kvm-{Path(image).stat().st_ino}")
    if cache.exists():
        known, _, answer = cache.read_text(encoding="utf-8").strip().rpartition(" ")
        if known == boot:
            return answer == "yes"
    with tempfile.TemporaryDirectory() as tmp:
        shutil.copy("/bin/busybox", f"{tmp}/busybox")
        init = Path(tmp, "init")
        init.write_text(
            "#!/busybox sh\nmkdir /proc; mount -t proc proc /proc\n"
            "grep -qE '^flags.* (svm|vmx)( |$)' /proc/cpuinfo && echo KDP-PROBE-OK\nreboot -f\n",
            encoding="ascii",
        )
        init.chmod(0o755)
        initrd = f"{tmp}/initrd"
        subprocess.run(
            f"cd {tmp} && printf '%s\\n' busybox init | cpio -o -H newc --quiet >{initrd}", shell=True, check=True
        )
        try:
            out = subprocess.run(
                ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "512M", "-nodefaults", "-display", "none"]
                + ["-no-reboot", "-serial", "stdio", "-kernel", image, "-initrd", initrd]
                + ["-append", "console=ttyS0 panic=-1"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=20,
                check=False,
            ).stdout
        except subprocess.TimeoutExpired as e:
            out = e.stdout or b""
    answer = b"KDP-PROBE-OK" in out
    cache.write_text(f"{boot} {'yes' if answer else 'no'}\n", encoding="utf-8")
    return answer


def nodes(args):
    """NUMA nodes with equal parts of the memory and of the CPUs; those that are left over are the first one's."""
    if args.nodes == 1:
        return []
    # CPUs that share a cache must be on one node.
    all_cpus = args.spare + args.cpus
    out, each, cpu = ["-smp", f"{all_cpus},sockets={all_cpus},cores=1,threads=1"], args.cpus // args.nodes, 0
    for node in range(args.nodes):
        end = cpu + each + (args.spare + args.cpus % args.nodes if node == 0 else 0)
        cpus = f",cpus={cpu}-{end - 1}" if end > cpu else ""
        out += ["-object", f"memory-backend-ram,id=node{node},size={args.mib // args.nodes}M"]
        out += ["-numa", f"node,nodeid={node},memdev=node{node}{cpus}"]
        cpu = end
    return out


def virtme_args(args, kvm, stderr_fd):
    kernel_args = [
        "root=/dev/root",
        f"rootflags={ROOTFLAGS}",
        # /lib/modules is the right one: virtme-ng need not look for it.
        "loglevel=7",
        "printk.time=1",
        # No device of the VM is worth probing for.
        "i8042.noaux",
        "i8042.nokbd",
        "8250.nr_uarts=1",
        # The clock source is the same for all CPUs, emulated or not.
        "tsc=reliable",
        "random.trust_cpu=on",
        # With KASLR, the kernel can occupy the only free GiB of a NUMA node. That node then has no
        # huge page of 1 GiB.
        "nokaslr",
    ]
    if not kvm:
        # Emulation on a busy host is not a lockup.
        kernel_args += ["rcupdate.rcu_cpu_stall_timeout=60", "watchdog_thresh=30"]
        # An emulated CPU does not speculate. Mitigations cost a fifth of the time.
        kernel_args += ["mitigations=off", "audit=0", "lsm="]
    if args.nodes > 1:
        # What it does costs time, and comes unasked: who wants it switches it on (kernel.numa_balancing).
        kernel_args += ["numa_balancing=disable"]
    if args.hugepages_1g:
        kernel_args += ["hugepagesz=1G", f"hugepages={args.hugepages_1g}"]
    if args.hugepages:
        kernel_args += ["hugepagesz=2M", f"hugepages={args.hugepages}"]
    if args.kernel == "debug":
        # Slabs with checks have no per-CPU arrays of free objects, in which kmemleak finds stale pointers to what was
        # leaked: without this it reports next to nothing.
        kernel_args += ["slab_debug=F"]
    kernel_args += args.kernel_arg

    if kvm:
        qemu = ["-cpu", "host"]
    else:
        # Without ERMS and FSRM: emulation does `rep movsb` byte by byte, and counts it so. Without LA57: the kernel's
        # KASAN takes a good address for a bad one when an interrupt comes while it identifies the boot CPU.
        qemu = ["-cpu", "max,family=23,model=49,+svm,+npt,-la57,-erms,-fsrm"]
        # An ioeventfd has QEMU's main loop poll it. Emulated timers wake this loop all the time, and
        # a virtio-serial device has 64 queues unless it has few ports.
        for device in ("virtio-9p-pci", "virtio-serial-pci"):
            qemu += ["-global", f"{device}.ioeventfd=off"]
        qemu += ["-global", "virtio-serial-pci.max_ports=8"]
        clock = ["-icount", "shift=0,sleep=off"] if args.icount else []
        qemu += ["-accel", "tcg" if args.icount else "tcg,thread=multi", *clock]
    # The root is read-only; the checkout, which lies in it, is exported once more to be written.
    qemu += ["-fsdev", f"local,id=kdpsrc,path={SRC},security_model=none,multidevs=remap"]
    qemu += ["-device", "virtio-9p-pci,fsdev=kdpsrc,mount_tag=kdp.src", "-no-reboot"]
    qemu += nodes(args)
    if args.kernel_initrd:
        qemu += ["-initrd", args.kernel_initrd]
    if args.plugin:
        qemu += ["-plugin", f"{SRC}/{args.plugin}"]

    out = ["virtme-run", "--kimg", args.kernel_image, "--mods", "none", "--force-9p"]
    out += ["--disable-microvm", "--memory", args.memory, "--cpus", str(args.spare + args.cpus)]
    if not kvm:
        out += ["--disable-kvm"]
    for arg in kernel_args:
        out += ["-a", arg]
    if args.action == "run":
        # The port's name is all that init knows; the command is in the hand-over folder. virtme-ng's own port for
        # stderr shares its fd with the console.
        out += ["--show-boot-console", "--script-sh", ":"]
        qemu += ["-chardev", f"file,id=kdperr,path=/proc/self/fd/{stderr_fd}", "-device", "virtio-serial-pci"]
        qemu += ["-device", "virtserialport,name=kdp.stderr,chardev=kdperr"]
        # QEMU's monitor, for tests that want a hardware error: it listens, and is its own client in the VM's name.
        tests = f"{HANDOVER}/monitor"
        qemu += ["-chardev", f"socket,id=kdpmon,path={tests},server=on,wait=off", "-mon", "kdpmon,mode=readline"]
        qemu += ["-chardev", f"socket,id=kdpcmd,path={tests}"]
        qemu += ["-device", "virtserialport,name=kdp.monitor,chardev=kdpcmd"]
        qemu += ["-qmp", f"unix:{MONITOR},server=on,wait=off"]
    return out + ["--qemu-opts", *qemu]


def log_path(args, boot):
    name = "shell" if args.action == "shell" else os.path.basename(args.command[0])
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:40]
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path(f"{SRC}/build/log/vm-{stamp}-{args.kernel}-{name}-{os.getppid()}{f'-{boot}' if boot > 1 else ''}.log")


def dmesg_path():
    """Where init leaves the kernel's log when COMMAND has ended."""
    return Path(f"{SRC}/build/log/dmesg-{os.getppid()}")


def complete(path):
    """Makes the console's log whole, if the console had stopped."""
    kept = dmesg_path()
    if not kept.exists():
        return
    if ENDED not in path.read_text(encoding="utf-8", errors="replace"):
        with open(path, "ab") as log:
            log.write(STOPPED.encode() + kept.read_bytes())
    kept.unlink()


def interrupted(_signum, _frame):
    raise KeyboardInterrupt


class Vm:
    """A running VM: its console goes into the log, COMMAND's output where it belongs."""

    def __init__(self, args, kvm, log):
        self.args = args
        self.kvm = kvm
        self.booted = False
        # How it is when it had to be ended for its silence: nothing comes, and all of its CPUs are asleep.
        self.silent = False
        self.asleep = False
        # What the console said last, until it has booted.
        self.heard = b""
        console_r, console_w = os.pipe()
        self.console = console_r
        routes = {console_r: log.fileno()}
        fds = {"stdin": None, "stdout": None, "stderr": console_w}
        passed, err_w = [], None
        if args.action == "run":
            # Pipes, as QEMU opens what it is given by its path again, and would truncate a file.
            out_r, out_w = os.pipe()
            err_r, err_w = os.pipe()
            routes |= {out_r: 1, err_r: 2}
            fds |= {"stdin": subprocess.DEVNULL, "stdout": out_w}
            passed = [err_w]
        self.routes = routes
        self.process = subprocess.Popen(
            CONTAINED + virtme_args(args, kvm, err_w),
            **fds,
            pass_fds=passed,
            # The shell's QEMU must be in the terminal's foreground group.
            start_new_session=args.action == "run",
        )
        for fd in (console_w, fds["stdout"], err_w):
            if isinstance(fd, int) and fd > 2:
                os.close(fd)

    def watch(self):
        """Until the VM has ended. Returns False if it is to be ended: at the timeout, or silent, or not booting."""
        start = heard = booting = time.monotonic()
        deadline = start + self.args.timeout if self.args.timeout else None
        with selectors.DefaultSelector() as sel:
            for fd in self.routes:
                sel.register(fd, selectors.EVENT_READ)
            while sel.get_map():
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                if not self.booted and self.args.action == "run" and time.monotonic() >= booting + BOOT_SILENCE:
                    self.examine()
                    if self.asleep or time.monotonic() >= start + BOOT_SECONDS:
                        return False
                    booting = time.monotonic()
                if self.args.silence and time.monotonic() >= heard + self.args.silence:
                    self.examine()
                    return False
                for key, _ in sel.select(1.0):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        sel.unregister(key.fd)
                        continue
                    if key.fd != self.console:
                        heard = time.monotonic()
                    elif not self.booted:
                        booting = time.monotonic()
                        self.heard = self.heard[-64:] + data
                        self.booted = b"vm-init: started" in self.heard
                    self.forward(self.routes[key.fd], data)
        return True

    def examine(self):
        """Why it is silent: what its CPUs do goes into the log."""
        self.silent = True
        try:
            text, self.asleep = monitor.state_of_cpus(MONITOR)
        except (OSError, ValueError) as e:
            text = f"QEMU's monitor does not answer: {e}\n"
        self.forward(self.routes[self.console], f"{EXAMINED}{text}".encode())

    @staticmethod
    def forward(fd, data):
        while data:
            data = data[os.write(fd, data) :]

    def kill(self):
        self.process.kill()
        self.process.wait()


def complaints(path, vm):
    """What the kernel complained of. That RCU waits is no more than a consequence where a CPU has lost its timer."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lost = vm.asleep or splats.GUARDED in text
    return [report for report in splats.scan(text) if not (lost and splats.is_of_rcu(report))]


def verdict(args, path, status, ended, vm):
    text = path.read_text(encoding="utf-8", errors="replace")
    where = str(path.relative_to(SRC))
    found = complaints(path, vm)
    lost_cpu = not vm.kvm and (splats.are_of_a_lost_cpu(found) or splats.crashed_at_another_time(text))
    for report in found[:MOST_REPORTS]:
        print(f"--- the kernel complained ({where}):", *report, sep="\n", file=sys.stderr)
    if len(found) > MOST_REPORTS:
        print(f"--- and {len(found) - MOST_REPORTS} times more", file=sys.stderr)
    if not ended:
        booted = "vm-init: started" in text
        said = text.partition(EXAMINED)[0].splitlines()
        if not booted:
            why = "does not boot"
        elif vm.silent:
            why = f"said nothing for {args.silence} s (--silence)"
            why += ", all of its CPUs asleep" if vm.asleep else "; its CPUs are at work"
        else:
            why = f"was ended after {args.timeout} s (--timeout)"
        print(f"error: the VM {why}. Its last lines:", file=sys.stderr)
        print("\n".join("    " + line for line in said[-10:]), file=sys.stderr)
        print(f"The whole console: {where}", file=sys.stderr)
        return STATUS_LOST if booted and vm.asleep and not found else STATUS_TIMEOUT
    if args.action == "run" and ENDED not in text:
        print(f"error: the VM died before the command ended. The console: {where}. Its last lines:", file=sys.stderr)
        print("\n".join("    " + line for line in text.splitlines()[-10:]), file=sys.stderr)
        if lost_cpu:
            return STATUS_LOST
        if found and not args.allow_splat:
            return STATUS_SPLAT
        return STATUS_LOST if ASSERTION.search(text) else STATUS_DIED
    if found and not args.allow_splat:
        print(f"error: the kernel complained {len(found)} time(s); the command's status was {status}.", file=sys.stderr)
        return STATUS_LOST if lost_cpu else STATUS_SPLAT
    if "vm-init: started" in text and args.kernel == "debug" and "vm-init: kmemleak scanned" not in text:
        print(f"error: kmemleak did not scan: is CONFIG_DEBUG_KMEMLEAK on? The console: {where}", file=sys.stderr)
        return STATUS_SPLAT
    return status


def main():
    args = parse(sys.argv[1:])
    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGHUP, interrupted)
    kvm = not args.icount and host_runs_kernels(args.kernel_image)
    # No program runs on the first CPU of several that are emulated. Every FXRSTOR or XRSTOR, on whichever CPU, changes a
    # flag of the first one's, not atomically (QEMU's cpu_set_fpus(), cpu_clear_ignne()). When VMRUN or #VMEXIT changes
    # that word at the same moment, a flag of those is lost: nested paging stays on in the host, or interrupts come that are
    # not allowed. The CPU, or the guest, is lost. On a CPU that runs no guest the word does not change.
    args.spare = 0 if kvm or args.cpus == 1 else 1
    prepare(args)
    for boot in range(1, BOOTS + 1):
        path = log_path(args, boot)
        with open(path, "wb", buffering=0) as log:
            vm = Vm(args, kvm, log)
            try:
                ended = vm.watch()
                if ended:
                    status = vm.process.wait()
                else:
                    vm.kill()
                    status = STATUS_TIMEOUT
            except KeyboardInterrupt:
                vm.kill()
                print(f"interrupted; the console: {path.relative_to(SRC)}", file=sys.stderr)
                return 130
        complete(path)
        if args.action == "shell" or vm.booted or boot == BOOTS or complaints(path, vm):
            break
        how = "died" if ended else "hung"
        print(f"The VM {how} at boot; here is another. Its console: {path.relative_to(SRC)}", file=sys.stderr)
    return verdict(args, path, status, ended, vm)


if __name__ == "__main__":
    sys.exit(main())

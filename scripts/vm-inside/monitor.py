"""Asks a running VM's QEMU what its CPUs do, through a monitor of the runner's own (QMP)."""

import json
import socket

# Long enough for a QEMU whose CPUs are all busy.
ANSWER_SECONDS = 20


class Monitor:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(ANSWER_SECONDS)
        self.socket.connect(path)
        self.stream = self.socket.makefile("rw", encoding="utf-8")
        self.read()
        self.call("qmp_capabilities")

    def read(self):
        line = self.stream.readline()
        if not line:
            raise OSError("QEMU has closed its monitor")
        return json.loads(line)

    def call(self, name, **arguments):
        self.stream.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self.stream.flush()
        while True:
            answer = self.read()
            if "error" in answer:
                raise OSError(f"{name}: {answer['error'].get('desc')}")
            if "return" in answer:
                return answer["return"]

    def ask(self, command, cpu):
        """A command of the monitor that people use, about a CPU, and its answer as text."""
        return self.call("human-monitor-command", **{"command-line": command, "cpu-index": cpu})

    def close(self):
        self.socket.close()


def state_of_cpus(path):
    """What QEMU knows of each CPU and of its local APIC, and whether all of them are asleep (HLT), as text and bool."""
    text = []
    asleep = True
    monitor = Monitor(path)
    try:
        for cpu in monitor.call("query-cpus-fast"):
            index = cpu["cpu-index"]
            registers = monitor.ask("info registers", index)
            asleep = asleep and "HLT=1" in registers
            text.append(f"CPU {index}:\n{registers}{monitor.ask('info lapic', index)}")
    finally:
        monitor.close()
    return "\n".join(text).replace("\r", ""), asleep

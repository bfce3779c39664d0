"""Memory of this process, for the benchmarks (Linux)."""

import resource
from pathlib import Path


def resident() -> int:
    """Bytes that are resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """The most bytes that were ever resident.

    `getrusage` will not do: a process that another one starts begins there with the size of that other one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

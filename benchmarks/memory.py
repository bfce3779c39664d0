"""Memory of this process, for the benchmarks (Linux)."""

import ctypes
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def resident() -> int:
    """Bytes that are resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """The most bytes that were ever resident.

    `getrusage` will not do: a process that another one starts begins there with the size of that other one.
    """
    return _status("VmHWM")


def anonymous() -> int:
    """Bytes that are resident now and belong to no file: pages of a mapped file can be dropped at any time."""
    return _status("RssAnon")


@contextmanager
def sampled_peak(seconds: float = 0.005) -> Iterator[list[int]]:
    """A list whose one number, at the end, is the most anonymous bytes that were seen, beyond those at the start."""
    # Memory that was freed and that the C library keeps would be in use at the start, and be used again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    start, peak, stop = anonymous(), [0], threading.Event()

    def sample() -> None:
        while not stop.wait(seconds):
            peak[0] = max(peak[0], anonymous() - start)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

"""The server, as a command."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator


@contextlib.contextmanager
def running_server() -> Iterator[tuple[str, int]]:
    """`emma-hf serve` of emma-tiny in a process of its own: its address, and its process id."""
    process = subprocess.Popen(
        [sys.executable, "-m", "emma_hf", "serve", "--port", "0", "--dtype", "float32", "--device", "cpu"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        address = next(line for line in process.stderr if "answers at" in line).split()[-1]
        # Its log must not fill the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(address.replace("/v1", "/health"), timeout=60):
                break
        yield address, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)

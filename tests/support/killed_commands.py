"""Write a folder, be killed, and write it again: the script that `cli/test_killed_commands.py` runs.

    python killed_commands.py KILLS SEED OUTPUT ARGUMENT...

`emma-hf ARGUMENT...` writes OUTPUT, which must be the only thing in its parent folder. It runs once to its end, then is
killed (SIGKILL) at KILLS random moments of that time, and then runs to its end once more. A run that ends before its
moment comes does not count, and its folder is removed. Every run is a fork of a process that has imported everything.
Prints, as JSON, how each run ended, what it found and left beside OUTPUT, and the hashes of OUTPUT's files.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import bitsandbytes  # noqa: F401

import emma_hf.auto_classes
import emma_hf.conversion
import emma_hf.hub  # noqa: F401
from emma_hf.cli import main


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(arguments: list[str], output: Path, seconds: float | None) -> dict:
    """Run the command in a fork, and kill it after `seconds`."""
    found = sorted(path.name for path in output.parent.iterdir())
    begin = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        try:
            log = os.open(os.devnull, os.O_WRONLY)
            os.dup2(log, 1)
            code = main(arguments)
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return {
        "killed": os.WIFSIGNALED(status),
        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "seconds": time.monotonic() - begin,
        "found": found,
        "left": sorted(path.name for path in output.parent.iterdir()),
        "files": hashes(output),
    }


if __name__ == "__main__":
    kills, seed, output, *arguments = sys.argv[1:]
    output, chance = Path(output), random.Random(int(seed))
    runs = [run(arguments, output, None)]
    duration = runs[0]["seconds"]
    while sum(each["killed"] for each in runs) < int(kills):
        shutil.rmtree(output, ignore_errors=True)
        runs.append(run(arguments, output, chance.uniform(0, duration)))
    shutil.rmtree(output, ignore_errors=True)
    runs.append(run(arguments, output, None))
    print(json.dumps(runs))

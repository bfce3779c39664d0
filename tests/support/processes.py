"""Python in other processes."""

import os
import subprocess
import sys
from pathlib import Path

OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}
# `PYTHONPATH` of a process that imports from this folder.
WITH_SUPPORT = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])


def run_python(code: str, *arguments: str | Path, cwd: Path | None = None, importable: bool = True, **environment: str):
    """Run `code` in a fresh process, offline; with `importable=False` the package cannot be imported there."""
    hide = "import sys; sys.modules['emma_hf'] = None\n"
    return subprocess.run(
        [sys.executable, "-c", ("" if importable else hide) + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**OFFLINE, **environment},
        timeout=300,
    )


def run_processes(
    script: str | Path, *arguments: str | Path, processes: int = 2, timeout: int = 240, **environment: str
):
    """Run `script`, or `"-m", module`, in several processes that share the steps of a training (torchrun, gloo)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**OFFLINE, "OMP_NUM_THREADS": "1", "PYTHONPATH": WITH_SUPPORT, **environment},
        timeout=timeout,
    )

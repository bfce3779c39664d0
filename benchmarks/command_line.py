"""The cost of the `emma-hf` command before it has anything to do: processor time of help, versions and mistakes.

Each run is a process of its own. What it prints and its exit status are checked first; the ratio is to a process that
does nothing, `python -c pass`, run in turns with it.

    python benchmarks/command_line.py [--runs 15] [--output FOLDER]
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Report, argument_parser, in_turns, quartiles, ratio

# What pip installs.
SCRIPT = "import sys\nfrom emma_hf.cli import main\nsys.exit(main())\n"
# Arguments, exit status, and text that the output must hold.
COMMANDS = (
    ("--help", 0, "usage: emma-hf [-h]"),
    ("--version", 0, "transformers "),
    ("ask --help", 0, "usage: emma-hf ask "),
    ("ask --colour red", 2, "usage: emma-hf ask "),
    ("ask photo.jpg", 2, "takes IMAGE QUESTION"),
    ("ask --dtype int photo.jpg Who?", 2, "must be auto, float32"),
)


def processor_seconds(command: list[str]) -> float:
    """Seconds of processor time, in user and system mode, of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def verify(command: list[str], status: int, text: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != status or text not in done.stdout + done.stderr:
        raise SystemExit(f"{command} is wrong, so its cost means nothing: {done}")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--runs", type=int, default=15, help="rounds (default: 15)")
    args = parser.parse_args()
    report = Report("command_line", args)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "emma-hf"
        script.write_text(SCRIPT)
        for arguments, status, text in COMMANDS:
            command = [sys.executable, str(script), *arguments.split()]
            verify(command, status, text)
            alternatives = {"command": command, "nothing": [sys.executable, "-c", "pass"]}
            times = in_turns(alternatives, args.runs, arguments, processor_seconds)
            report.add(
                "Command line",
                **{"`emma-hf`": f"`{arguments}`", "processor time, s": quartiles(times["command"])},
                **{"of `python -c pass`": ratio(times["command"], times["nothing"])},
            )
    report.save()


if __name__ == "__main__":
    main()

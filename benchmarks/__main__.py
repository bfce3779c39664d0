"""All benchmarks, or some of them, each in a process of its own: `python -m benchmarks [PART ...] [--output FOLDER]`.

Each verifies its results before it times them, and prints tables; with `--output` these are kept as `PART.md`, and
parts that make JSON and plots put them there.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# What each part measures, and its arguments; those that write JSON and plots take `--output`.
PARTS = {
    "vision": "the vision path against LLaVA's, and many questions about one picture",
    "language": "prefill and decoding against LLaVA's",
    "adaptation": "the kernels of the modality adaptation against plain PyTorch (CUDA)",
    "training": "a training step against LLaVA's, its peak memory, and the data path",
    "liger": "a training step with Liger's kernels against the plain one (CUDA)",
    "processor": "the image processor against LLaVA's",
    "first_answer": "loading emma-tiny and one answer",
    "command_line": "help, versions and wrong arguments of the command",
    "quantization": "memory, accuracy and speed in 4 and 8 bits",
    "convert": "time and memory of the converter",
}
WITH_OUTPUT = ("vision", "language")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    names = "\n".join(f"  {name:13} {what}" for name, what in PARTS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"parts:\n{names}"
    parser.add_argument("parts", nargs="*", metavar="PART", help="which (default: all)")
    parser.add_argument("--output", type=Path, help="folder for tables, JSON and plots")
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"unknown parts {unknown}: choose from {', '.join(PARTS)}")
    failed = []
    for part in args.parts or PARTS:
        command = [sys.executable, str(HERE / f"{part}.py")]
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            command += ["--output", str(args.output)] if part in WITH_OUTPUT else []
        print(f"## {part}: {PARTS[part]}", flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        if done.returncode:
            failed.append(part)
        elif args.output is not None:
            (args.output / f"{part}.md").write_text(done.stdout)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

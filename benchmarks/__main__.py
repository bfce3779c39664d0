"""All benchmarks, or some of them, each in a process of its own; or the tables of the documents from their results.

Each verifies its results before it measures, and prints tables. With `--output FOLDER` each writes `PART.json` there;
`--output benchmarks/results` replaces the results that are committed, and `--render` then puts their tables into the
documents, between `<!-- results: PART -->` and `<!-- end -->`.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS, DOCUMENTS = HERE / "results", HERE.parent / "docs"
# What each part measures.
PARTS = {
    "vision": "the vision path against LLaVA's, and many questions about one image",
    "language_model": "prefill and decoding against LLaVA's",
    "modality_adaptation": "the kernels of the modality adaptation against plain PyTorch (CUDA)",
    "training": "a training step against LLaVA's, its peak memory, and the data path",
    "liger": "a training step with Liger's kernels against the plain one (CUDA)",
    "processor": "the image processor against LLaVA's",
    "vision_options": "where the vision path's time goes on a CPU, and what options gain",
    "first_answer": "loading emma-tiny and one answer",
    "command_line": "help, versions and wrong arguments of the command",
    "quantization": "memory, answers and speed in 4 and 8 bits",
    "token_selection": "emma-tiny with fewer visual tokens, by how they are chosen",
    "convert": "peak memory and time of the converter",
    "released_geometry": "the released model's size: converting, loading, answering, and fewer visual tokens",
}


def rendered(page: str) -> str:
    """The text of a page with the tables of the committed results between its markers."""
    # Not at the top: the list of parts and wrong arguments need no torch.
    sys.path.insert(0, str(HERE))
    from common import as_markdown

    def tables(marker: re.Match) -> str:
        result = json.loads((RESULTS / f"{marker[1]}.json").read_text(encoding="utf-8"))
        return f"<!-- results: {marker[1]} -->\n{as_markdown(result)}\n<!-- end -->"

    return re.sub(r"<!-- results: (\w+) -->\n.*?<!-- end -->", tables, page, flags=re.DOTALL)


def render() -> None:
    for path in DOCUMENTS.rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        if (new := rendered(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(HERE.parent))


def main() -> int:
    names = "\n".join(f"  {name:19} {what}" for name, what in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"parts:\n{names}",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="which (default: all)")
    parser.add_argument("--output", type=Path, help="folder for the results and plots")
    parser.add_argument("--render", action="store_true", help="only write the tables of docs/ from the results")
    args = parser.parse_args()
    if args.render:
        render()
        return 0
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"unknown parts {unknown}: choose from {', '.join(PARTS)}")
    output = [] if args.output is None else ["--output", str(args.output)]
    failed = []
    for part in args.parts or PARTS:
        print(f"## {part}: {PARTS[part]}", flush=True)
        if subprocess.run([sys.executable, str(HERE / f"{part}.py"), *output]).returncode:
            failed.append(part)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

"""Process time of loading emma-tiny and answering one question, beyond importing torch and Transformers.

Processes of two kinds run by turns: one imports torch and Transformers, the other loads the model that ships with the
package as well, draws a scene and answers a question about it. The answer is compared with the truth first.

    python benchmarks/first_answer.py [--pairs 10]
"""

import argparse
import json
import statistics
import subprocess
import sys

from tqdm import tqdm

IMPORTS = """
import json, sys, time
import torch, transformers
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama
imported = time.process_time()
"""
ANSWER = """
import io
from contextlib import redirect_stdout
from emma_hf.cli import main
from emma_hf.scenes import Chance, Scene, ask, draw
scene = next(scene for scene in map(Scene.random, range(100)) if len(scene.things) == 3)
question = next(filter(None, (ask(scene, Chance(seed), "colour") for seed in range(100))))
buffer = io.BytesIO()
draw(scene).save(buffer, format="PNG")
sys.stdin = io.TextIOWrapper(io.BytesIO(buffer.getvalue()))
with redirect_stdout(io.StringIO()) as said:
    status = main(["ask", "-", question.text])
assert status == 0 and said.getvalue().strip() == question.answer, (said.getvalue(), question)
"""
REPORT = "print(json.dumps({'imports': imported, 'all': time.process_time()}))"


def seconds(code: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10, help="processes of each kind (default: 10)")
    spent, imports = [], []
    for _ in tqdm(range(parser.parse_args().pairs), leave=False):
        imports.append(seconds(IMPORTS + REPORT)["all"])
        spent.append(seconds(IMPORTS + ANSWER + REPORT)["all"] - imports[-1])
    for name, values in (("importing torch and Transformers", imports), ("loading and one answer, beyond that", spent)):
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name}: {middle:.2f} s [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()

"""What loading emma-tiny and one answer cost: process time, beyond importing torch and the parts of Transformers.

Each run is a process of its own that reads its processor clock at four marks, and whose answer is compared with what
the scene's facts say.

    python benchmarks/first_answer.py [--runs 10]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

# The classes are what EMMA is made of: Transformers imports a part of itself when it is first named.
BEFORE = """
import json, time
import torch, transformers
marks = {"import torch, transformers": time.process_time()}
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel, LlamaForCausalLM, LlamaTokenizerFast
marks["their parts"] = time.process_time()
"""
AFTER = """
from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.tiny.scenes import Scene
from emma_hf.tiny.drawing import draw
marks["import emma_hf"] = time.process_time()
processor = EmmaProcessor.from_pretrained(EMMA_TINY)
model = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype="auto").eval()
marks["load"] = time.process_time()
content = [{"type": "image", "image": draw(Scene.random(SEED))}, {"type": "text", "text": "How many things are there?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.dtype)
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
said = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
marks["answer"] = time.process_time()
right = said.strip() == str(len(Scene.random(SEED).things))
"""
SEED = 4


def run() -> dict[str, float]:
    """Seconds of processor time of each part of one process."""
    code = f"SEED = {SEED}\n{BEFORE}{AFTER}\nprint(json.dumps([marks, right]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    marks, right = json.loads(done.stdout.splitlines()[-1])
    if not right:
        raise SystemExit("The answer is wrong, so its cost means nothing.")
    ends = [0.0, *marks.values()]
    return {name: end - start for name, start, end in zip(marks, ends, ends[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run()
    runs = [run() for _ in range(args.runs)]
    imports = ("import torch, transformers", "their parts")
    rows = {name: [one[name] for one in runs] for name in runs[0]}
    rows["beyond the imports"] = [sum(value for name, value in one.items() if name not in imports) for one in runs]
    print("| part | process time: median [quartiles] |\n|---|---|")
    for name, seconds in rows.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        print(f"| {name} | {middle:.2f} s [{low:.2f}, {high:.2f}] |")


if __name__ == "__main__":
    main()

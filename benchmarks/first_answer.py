"""The cost of loading emma-tiny and one answer: processor time, beyond importing torch and the parts of Transformers.

Each run is a process of its own that reads its processor clock at five marks, and whose answer is compared with what
the scene's facts say. The ratio is that of the whole process to the imports of torch and Transformers in it.

    python benchmarks/first_answer.py [--runs 10] [--output FOLDER]
"""

import json
import os
import tempfile
from pathlib import Path

from common import Report, argument_parser, in_turns, quartiles, ratio, run_python

from emma_hf.tiny import Scene, draw

# The classes are what EMMA is made of: Transformers imports a part of itself when it is first named.
CODE = """
import json, sys, time
import torch, transformers
marks = {"import torch, transformers": time.process_time()}
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel, LlamaForCausalLM, LlamaTokenizerFast
marks["import the parts of Transformers that are used"] = time.process_time()
from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
marks["import emma_hf"] = time.process_time()
processor = EmmaProcessor.from_pretrained(EMMA_TINY)
model = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype="auto").eval()
marks["load"] = time.process_time()
content = [{"type": "image", "path": sys.argv[1]}, {"type": "text", "text": sys.argv[2]}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.dtype)
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
said = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
marks["answer"] = time.process_time()
print(json.dumps([marks, said]))
"""
QUESTION, SCENE = "How many things are there?", Scene.random(4)


def measure(image: Path) -> dict[str, float]:
    """Seconds of processor time of each part of one process."""
    marks, said = json.loads(run_python(CODE, image, QUESTION))
    if said.strip() != str(len(SCENE.things)):
        raise SystemExit(f"The answer {said!r} is wrong, so its cost means nothing.")
    ends = [0.0, *marks.values()]
    return {name: end - start for name, start, end in zip(marks, ends, ends[1:])}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--runs", type=int, default=10, help="processes (default: 10)")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    report = Report("first_answer", args)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "scene.png"
        draw(SCENE).save(image)
        runs = in_turns({"answer": image}, args.runs, "processes", measure)["answer"]
    imports = [sum(list(run.values())[:2]) for run in runs]
    parts = {name: [run[name] for run in runs] for name in runs[0]}
    parts["all"] = [sum(run.values()) for run in runs]
    for name, seconds in parts.items():
        report.add(
            "First answer",
            **{"part": name, "processor time, s": quartiles(seconds)},
            **{"of the imports of torch and Transformers": ratio(seconds, imports)},
        )
    report.save()


if __name__ == "__main__":
    main()

"""lmms-eval's own evaluator and tasks with `--model emma`, on rows drawn here."""

import json
import re
import subprocess
import sys

import pytest
from support.models import save_listening
from support.processes import OFFLINE

SCRIPT = r'''
import json, re, sys
from pathlib import Path

import datasets
import torch
import lmms_eval.tasks
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

from emma_hf import EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.inference.instruction_rules import CONSTANT, swap_instructions
from emma_hf.tiny.scenes import Scene
from emma_hf.tiny.drawing import draw

work, folder = Path(sys.argv[1]), sys.argv[2]
questions = ["Is there a red circle?", "Is there a blue square?", "Is there a green star?"]
pope = [
    {"id": str(i), "question_id": str(i), "question": questions[i % 3], "answer": "yes" if i % 2 else "no",
     "image": draw(Scene.random(i // 3), 96)}
    for i in range(6)
]
science = [
    {"image": draw(Scene.random(i), 96), "question": "Which shape is there?", "choices": ["circle", "star", "cross"],
     "answer": i % 3, "hint": ""}
    for i in range(4)
]


def local(place, name, rows):
    """lmms-eval's task `name` over `rows`: its file and its functions, with another place of the data."""
    source = Path(lmms_eval.tasks.__file__).parent / place
    target = work / place
    target.mkdir()
    datasets.DatasetDict(test=datasets.Dataset.from_list(rows)).save_to_disk(target / "data")
    (target / "utils.py").write_text((source / "utils.py").read_text())
    text = (source / f"{name}.yaml").read_text().replace("  token: True", "  load_from_disk: True")
    text = re.sub("^dataset_path:.*$", f"dataset_path: {target / 'data'}", text, flags=re.M)
    text = re.sub("^dataset_name:.*$", "", text, flags=re.M)
    text = re.sub("^(task: .)" + name, r"\1local_" + name, text, flags=re.M)
    (target / f"local_{name}.yaml").write_text(text)
    return f"local_{name}"


if __name__ == "__main__":
    names = [local("pope", "pope", pope), local("scienceqa", "scienceqa_img", science)]
    results = simple_evaluate(
        model="emma", model_args=f"pretrained={folder},device=cpu,dtype=float32", batch_size=4, tasks=names,
        task_manager=TaskManager(include_path=str(work), include_defaults=False), process_docs_parallel=1,
        bootstrap_iters=0,
    )
    samples = {
        name: [sample["filtered_resps"][0] for sample in sorted(results["samples"][name], key=lambda s: s["doc_id"])]
        for name in names
    }

    # The same questions, one at a time, by `generate`.
    processor = EmmaProcessor.from_pretrained(folder)
    model = EmmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def generated(image, text, limit, instruction=None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        instruction = text.split("\n")[0] if instruction is None else instruction
        inputs = processor(images=image, text=prompt, instructions=instruction, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return processor.decode(tokens[0], skip_special_tokens=True).strip()

    brief = "\nAnswer the question using a single word or phrase."
    letter = "\nA. circle\nB. star\nC. cross\nAnswer with the option's letter from the given choices directly."
    expected = {
        names[0]: [generated(row["image"], row["question"] + brief, 128) for row in pope],
        names[1]: [generated(row["image"], row["question"] + letter, 16) for row in science],
    }

    # What the evaluator does not reach.
    emma = get_model("emma")(folder, device="cpu", dtype="float32", batch_size=2)
    two = [draw(Scene.random(seed), 96) for seed in (1, 2)]
    visuals = {0: two, 1: [], 2: ["film.mp4"], 3: two, 4: two[:1]}
    emma.task_dict = {"t": {"s": visuals}}

    def request(number, text, **settings):
        arguments = (text, settings, lambda images: images, number, "t", "s")
        return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata={"task": "t", "doc_id": number, "repeats": 1})

    several = emma.generate_until([
        request(4, "Describe the picture.\nBe brief.", max_new_tokens=24),
        request(1, "Hello", max_new_tokens=3),
        request(3, "<image> or <image>?", max_new_tokens=12),
        request(4, "Describe the picture.\nBe brief.", max_new_tokens=24, until=["u", "e"]),
    ])

    # The instruction as an option.
    def ruled(rule, docs, texts):
        emma = get_model("emma")(folder, device="cpu", dtype="float32", batch_size=2, instruction=rule)
        emma.task_dict = {"t": {"s": docs}}
        visual = lambda doc: [doc["image"]]
        return emma.generate_until([
            Instance(request_type="generate_until", arguments=(text, {"max_new_tokens": 24}, visual, number, "t", "s"),
                     idx=0, metadata={"task": "t", "doc_id": number, "repeats": 1})
            for number, text in enumerate(texts)
        ])

    docs = [{"image": image, "question": question} for image, question in zip([*two, two[0]], ["red", "blue star", "How many?"])]
    texts = [f"Hint {number}.\nDescribe the picture.\nBe brief." for number in range(3)]
    swapped = swap_instructions({f"{number} t s": ("t", f"Hint {number}.") for number in range(3)})
    instructions = {
        "first_line": [f"Hint {number}." for number in range(3)],
        "question": [doc["question"] for doc in docs],
        "whole": texts,
        "empty": [""] * 3,
        "constant": [CONSTANT] * 3,
        "swapped": [swapped[f"{number} t s"] for number in range(3)],
    }
    by_rule = {rule: ruled(rule, docs, texts) for rule in instructions}
    expected_by_rule = {
        rule: [generated(doc["image"], text, 24, words) for doc, text, words in zip(docs, texts, column)]
        for rule, column in instructions.items()
    }
    errors = {}
    for name, call in {
        "film": lambda: emma.generate_until([request(2, "What?")]),
        "likelihood": lambda: emma.loglikelihood([]),
        "rounds": lambda: emma.generate_until_multi_round([]),
        "argument": lambda: get_model("emma")(pretraned="x"),
        "batch": lambda: get_model("emma")(batch_size="auto"),
        "instruction": lambda: get_model("emma")(instruction="none"),
        "question": lambda: ruled("question", [{"image": two[0], "words": "What?"}], ["What?"]),
    }.items():
        try:
            call()
        except (ValueError, NotImplementedError) as error:
            errors[name] = str(error)
    metrics = {name: {key: value for key, value in results["results"][name].items()} for name in names}
    described = generated(two[0], "Describe the picture.\nBe brief.", 24)
    print(json.dumps([samples, expected, metrics, several, described, errors, by_rule, expected_by_rule], default=str))
'''


@pytest.mark.slow
def test_its_evaluator_and_its_tasks_run(tmp_path):
    pytest.importorskip("lmms_eval", reason="needs lmms-eval, in an environment of its own")
    script = tmp_path / "run_tasks.py"
    script.write_text(SCRIPT)
    work = tmp_path / "tasks"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, script, work, save_listening(tmp_path / "model")],
        capture_output=True,
        text=True,
        env=OFFLINE,
        timeout=1800,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    samples, expected, metrics, several, described, errors, by_rule, expected_by_rule = json.loads(
        done.stdout.strip().splitlines()[-1]
    )
    assert samples == expected

    # The metrics are what its task files say, of answers that are `generate`'s.
    truth = ["yes" if number % 2 else "no" for number in range(6)]
    right = [answer.lower() == wanted for answer, wanted in zip(expected["local_pope"], truth)]
    assert metrics["local_pope"]["pope_accuracy,none"] == pytest.approx(sum(right) / 6)
    # The letter alone, or with a period behind it.
    letters = [
        answer.upper() == "ABC"[number % 3] or answer[:2] == "ABC"[number % 3] + "."
        for number, answer in enumerate(expected["local_scienceqa_img"])
    ]
    assert metrics["local_scienceqa_img"]["exact_match,none"] == pytest.approx(sum(letters) / 4)

    whole, _, placed, cut = several
    assert whole == described
    assert placed
    assert cut == re.split("[ue]", whole)[0].strip()
    assert by_rule == expected_by_rule
    assert len({tuple(answers) for answers in by_rule.values()}) > 3
    assert errors == {
        "film": "emma reads pictures: the task t gives str. Choose another task.",
        "likelihood": "emma answers by generating: choose tasks whose `output_type` is generate_until, such as pope.",
        "rounds": "emma answers tasks of one round: choose tasks without `generate_until_multi_round`.",
        "argument": "`--model_args` of emma are pretrained, device, dtype, batch_size, quantization, revision, "
        "instruction and visual_tokens: got pretraned.",
        "batch": "`batch_size` must be a whole number of at least 1: got 'auto'.",
        "instruction": "`instruction` must be one of own, first_line, question, whole, swapped, empty, constant: got 'none'.",
        "question": "The instruction rule `question` needs a task whose rows have a field `question`: t has image, words. "
        "Use `first_line` or `own`.",
    }


def test_without_lmms_eval_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "emma_hf.integrations.lmms_eval", raising=False)
    with pytest.raises(
        ImportError, match="is for lmms-eval, which cannot be imported here: .* `pip install lmms-eval`"
    ):
        import emma_hf.integrations.lmms_eval  # noqa: F401

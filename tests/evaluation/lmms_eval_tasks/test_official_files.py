"""Benchmarks through lmms-eval's own evaluator, and the same figures as without it."""

import json
import subprocess
import sys

import pytest
import yaml
from support.models import save_listening
from support.processes import OFFLINE, WITH_SUPPORT

from emma_hf.evaluation.lmms_eval_tasks import FOLDER
from emma_hf.evaluation.tasks import TASKS

SCRIPT = r"""
import json, os, sys
from hashlib import sha256
from pathlib import Path

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from support.benchmark_files import perfect_answer, task_of, write_benchmark
from support.benchmark_stubs import run_stub

from emma_hf.evaluation.lmms_eval_tasks import FOLDER
from emma_hf.evaluation.runner import evaluate
from emma_hf.evaluation.tasks import TASKS
from emma_hf.integrations.lmms_eval import Emma

work, folder = Path(sys.argv[1]), sys.argv[2]
names = ["amber-discriminative", "amber-generative", "foil", "mmbench-en", "mmbench-cn", "mathvista"]
TASKS["amber-generative"] = task_of("amber-generative")


def through_lmms_eval(name):
    # One at a time: each benchmark has a folder of its own.
    os.environ["EMMA_HF_DATA"] = str(work / name)
    task = f"emma_hf_{name.replace('-', '_')}"
    results = simple_evaluate(
        model="emma", model_args=f"pretrained={folder},device=cpu,dtype=float32", batch_size=4, tasks=[task],
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False), process_docs_parallel=1,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    figures = {key.removesuffix(",none"): value for key, value in results["results"][task].items() if key.endswith(",none")}
    return [sample["filtered_resps"][0] for sample in samples], {k: v for k, v in figures.items() if "_stderr" not in k}


def without(run):
    figures = run.task.summarize(run.rows["own"])
    return [row.answer for row in run.rows["own"]], {k.replace(",", ""): 100 * f.value for k, f in figures.items()}


def answer(prompt, right):
    # Right, wrong and unreadable answers, by what is asked.
    return [right, "A", "no", "yes", "I cannot tell", right][sha256(prompt.encode()).digest()[0] % 6]


if __name__ == "__main__":
    found = {}
    for name in names:
        write_benchmark(name, work / name)
        own = evaluate(folder, TASKS[name], work / name, work / "own" / name, rule="own", device="cpu", dtype="float32")
        found[name, "the model"] = [through_lmms_eval(name), without(own)]
    real = Emma.generate_until
    for name in names:
        samples = TASKS[name].load(work / name)
        right = {sample.prompt: perfect_answer(sample) for sample in samples}
        Emma.generate_until = lambda self, requests: [answer(each.args[0], right[each.args[0]]) for each in requests]
        stub = lambda batch, images, columns: [[answer(each.prompt, right[each.prompt]) for each in batch]]
        run = run_stub(work / "stub" / name, stub, TASKS[name], samples, ("own",))
        found[name, "a stub"] = [through_lmms_eval(name), without(run)]
    print(json.dumps([[*key, value] for key, value in found.items()]))
"""


def test_each_file_names_a_benchmark_and_no_task_of_lmms_evals_own():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    for path in FOLDER.glob("*.yaml"):
        task = yaml.load(path.read_text(), Loader)
        assert task["metadata"]["benchmark"] in TASKS
        assert task["task"] == f"emma_hf_{path.stem}"
        assert task["class"] == "emma_hf.evaluation.lmms_eval_tasks.official_files.OfficialFilesTask"
    assert len(list(FOLDER.glob("*.yaml"))) == 6


@pytest.mark.slow
@pytest.mark.once
def test_the_same_figures_through_lmms_eval_and_without(tmp_path):
    pytest.importorskip("lmms_eval", reason="needs lmms-eval, in an environment of its own")
    script = tmp_path / "run_tasks.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, tmp_path, save_listening(tmp_path / "model")],
        capture_output=True,
        text=True,
        env={**OFFLINE, "PYTHONPATH": WITH_SUPPORT},
        timeout=1800,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found) == 12
    for name, model, (through, without) in found:
        assert through[0] == [answer.strip() for answer in without[0]], (name, model)
        assert through[1] == pytest.approx(without[1]), (name, model)
        # Of the stub neither all nor none is right.
        assert model == "the model" or 0 < next(iter(through[1].values())) < 100 or name.startswith(("amber-g", "mmb"))


def test_without_lmms_eval_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.task", None)
    monkeypatch.delitem(sys.modules, "emma_hf.evaluation.lmms_eval_tasks.official_files", raising=False)
    with pytest.raises(ImportError, match="These task files are for lmms-eval, which cannot be imported here: .* `pip"):
        import emma_hf.evaluation.lmms_eval_tasks.official_files  # noqa: F401

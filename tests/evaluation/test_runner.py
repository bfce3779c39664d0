"""The runner: every question once by each rule, whatever is killed, batched or shared."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from support.benchmark_files import perfect_answer, task_of, write_benchmark
from support.benchmark_stubs import StubTask, always, run_stub, samples
from support.processes import run_processes, run_python

from emma_hf import EMMA_TINY
from emma_hf.evaluation.answer_files import MERGED, PART
from emma_hf.evaluation.instructions import columns_of, instructions_of
from emma_hf.evaluation.report import summarize
from emma_hf.evaluation.runner import Processes, evaluate
from emma_hf.evaluation.tasks import TASKS
from emma_hf.model.errors_emma import EmmaError
from emma_hf.tiny.evaluation import TinyQuestions

RULES = ("own", "swapped", "empty")


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / MERGED).read_text().splitlines()][1:]


def test_every_question_is_asked_once_by_each_rule(tmp_path):
    asked = []
    run = run_stub(tmp_path, always("Yes.", asked), batch_size=5)
    texts = {rule: instructions_of(samples(12), rule) for rule in RULES}
    assert sorted(asked) == sorted((f"q{index}", texts[rule][f"q{index}"]) for index in range(12) for rule in RULES)
    rows = rows_of(tmp_path)
    assert [(row["id"], row["rule"]) for row in rows] == [(f"q{index}", rule) for index in range(12) for rule in RULES]
    assert rows[1] == {
        "id": "q0",
        "rule": "swapped",
        "prompt": "Is thing 0 there?\nAnswer yes or no.",
        "instruction": texts["swapped"]["q0"],
        "answer": "Yes.",
        "parsed": "yes",
        "score": 0.0,
    }
    assert {rule: sum(row.score for row in rows) for rule, rows in run.rows.items()} == dict.fromkeys(RULES, 8.0)
    assert not run.unreadable
    assert not run.notes


def test_a_run_that_was_broken_off_anywhere_ends_as_any_other(tmp_path):
    def answer(sample, text):
        return "yes" if len(text) % 2 else "no"

    run_stub(tmp_path / "whole", always(answer), batch_size=1)
    whole = (tmp_path / "whole" / MERGED).read_bytes()
    asked = []
    for batches in range(3):
        left = iter(range(batches))

        def broken(*arguments, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return always(answer, asked)(*arguments)

        with pytest.raises(KeyboardInterrupt):
            run_stub(tmp_path / "broken", broken, batch_size=1 + batches)
        # What was written last may be torn.
        part = tmp_path / "broken" / PART.format(0)
        lines = part.read_bytes()
        part.write_bytes(lines[: len(lines) - 7 * (batches == 1)])
    run_stub(tmp_path / "broken", always(answer, asked), batch_size=3)
    assert (tmp_path / "broken" / MERGED).read_bytes() == whole
    # The torn answer alone was asked twice.
    assert len(asked) == 12 * 3 + 1
    assert run_stub(tmp_path / "broken", None).rows["own"][0].answer == answer(None, "Is thing 0 there?")


def test_processes_share_the_questions(tmp_path):
    run_stub(tmp_path / "one", always("no"))
    shares = [[], []]
    for index in (1, 0):
        run = run_stub(tmp_path / "two", always("no", shares[index]), processes=Processes(index, 2, lambda: None))
        assert (run is None) == (index == 1)
    assert [len(share) for share in shares] == [18, 18]
    assert (tmp_path / "two" / MERGED).read_bytes() == (tmp_path / "one" / MERGED).read_bytes()
    # Another number of processes goes on with what there is.
    part = tmp_path / "three" / PART.format(1)
    part.parent.mkdir()
    part.write_bytes(b"".join((tmp_path / "one" / MERGED).read_bytes().splitlines(True)[:20]))
    asked = []
    run_stub(tmp_path / "three", always("no", asked))
    assert len(asked) == 36 - 19
    assert (tmp_path / "three" / MERGED).read_bytes() == (tmp_path / "one" / MERGED).read_bytes()


def test_more_questions_go_on_with_the_same_swaps(tmp_path):
    run_stub(tmp_path, always("no"), limit=4)
    first = rows_of(tmp_path)
    asked = []
    run = run_stub(tmp_path, always("no", asked))
    assert len(run.rows["own"]) == 12
    assert {each for each, _ in asked} == {f"q{index}" for index in range(4, 12)}
    assert rows_of(tmp_path)[:12] == first
    # Fewer again: those that were asked besides stay in the file, and out of the figures.
    assert len(run_stub(tmp_path, None, limit=2).rows["own"]) == 2
    assert len(rows_of(tmp_path)) == 36


def test_images_that_cannot_be_read_are_named_and_wrong(tmp_path):
    whole = samples(6)
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])

    def missing():
        raise KeyError("bytes")

    broken = {1: (tmp_path / "none.png",), 2: (tmp_path / "torn.png",), 3: (missing,), 4: (lambda: Image.open(tmp_path / "torn.png"),)}  # fmt: skip
    asked = [replace(sample, images=broken.get(index, (tmp_path / "whole.png",))) for index, sample in enumerate(whole)]
    received = []
    run = run_stub(tmp_path / "run", always("yes", received), asked=asked)
    assert {each for each, _ in received} == {"q0", "q5"}
    assert set(run.unreadable) == {"q1", "q2", "q3", "q4"}
    assert "There is no picture at" in run.unreadable["q1"]
    assert "cannot be read" in run.unreadable["q2"]
    assert "KeyError" in run.unreadable["q3"]
    for row in run.rows["swapped"][1:5]:
        assert (row.answer, row.parsed, row.score) == ("", None, 0.0)
    # They are remembered, and those of a part are that part's.
    assert run_stub(tmp_path / "run", None, asked=asked).unreadable == run.unreadable
    assert set(run_stub(tmp_path / "run", None, asked=asked, limit=3).unreadable) == {"q1", "q2"}
    # One whose image is there now is asked, by all rules.
    Image.new("RGB", (64, 64)).save(tmp_path / "none.png")
    received.clear()
    run = run_stub(tmp_path / "run", always("no", received), asked=asked)
    assert {each for each, _ in received} == {"q1"}
    assert set(run.unreadable) == {"q2", "q3", "q4"}
    assert {rows[1].answer for rows in run.rows.values()} == {"no"}


def test_a_file_of_several_questions_is_read_once_a_batch(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    asked = [replace(sample, images=(tmp_path / "one.png",) * 2) for sample in samples(4)]
    objects = []

    def answerer(batch, images, columns):
        objects.append({id(image) for row in images for image in row})
        return always("no")(batch, images, columns)

    run_stub(tmp_path / "run", answerer, asked=asked, batch_size=4)
    assert [len(each) for each in objects] == [1]


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ([], {}, "The task stub needs one question at least: its files hold none."),
        ([*samples(3), samples(2)[1]], {}, "stub has 'q1' twice"),
        (samples(2), {"limit": 0}, "`limit` must be at least 1: got 0."),
        (samples(2), {"batch_size": 0}, "`batch_size` must be at least 1: got 0."),
        ([replace(samples(2)[0], prompt="Same?"), replace(samples(2)[1], prompt="same?")], {"columns": ["swapped"]}, "Use the rule empty or constant"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(tmp_path, asked, options, message):
    with pytest.raises(EmmaError) as error:
        run_stub(tmp_path / "run", None, asked=asked, **options)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_header_is_refused_before_anything_is_loaded(tmp_path):
    run_stub(tmp_path, always("no"), header={"model": "one 01"})
    with pytest.raises(EmmaError, match='its model is "one 01", that of this run is "two 02"'):
        run_stub(tmp_path, None, header={"model": "two 02"})
    # Other questions under the same names.
    other = [replace(samples(12)[0], target="yes"), *samples(12)[1:]]
    with pytest.raises(EmmaError, match="its samples is"):
        run_stub(tmp_path, None, asked=other, header={"model": "one 01"})


def test_notes_say_what_an_instruction_cannot_do(tmp_path):
    asked = [replace(sample, prompt="Same?", images=()) for sample in samples(3)]
    run = run_stub(tmp_path, always("no"), asked=asked)
    assert list(run.rows) == ["own", "empty"]
    assert run.notes[0].startswith(
        "There is no column `swapped`: Instructions can be swapped where at least two differ"
    )
    assert run.notes[1] == "No question was shown an image, so the instruction had nothing to act on."


def test_mistakes_are_told_before_a_model_is_looked_for(tmp_path):
    with pytest.raises(EmmaError, match=r"needs questions.txt in .*, which has none. Get it from https://example.org"):
        evaluate("no/such-model", StubTask(), tmp_path, tmp_path / "run")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_from_its_files_to_its_report(name, tmp_path):
    """Perfect and constant answers get through answer files and columns what the task says of them."""
    if name.startswith(("mmmu", "muirbench")):
        pytest.importorskip("pyarrow")
    task = task_of(name)
    write_benchmark(name, tmp_path / "data")
    asked = task.load(tmp_path / "data")
    answers = {"perfect": perfect_answer, "yes": lambda _: "Yes.", "no": lambda _: "no", "A": lambda _: "A"}
    for label, answer in answers.items():
        answerer = always(lambda sample, text, answer=answer: answer(sample))
        run = run_stub(tmp_path / label, answerer, task, asked, batch_size=2)
        expected = task.summarize([task.answered(sample, answer(sample)) for sample in asked])
        # One instruction for all questions, as FOIL has it, cannot be swapped.
        assert set(run.rows) == {"own", "empty", *(["swapped"] if len(run.notes) == 0 else [])}
        assert all(task.summarize(rows) == expected for rows in run.rows.values())
        assert not run.unreadable
    summary = summarize(run)
    assert {key: row["value"] for key, row in summary["figures"]["empty"].items()} == {
        key: figure.value for key, figure in expected.items()
    }
    assert all(each["task"] in name for each in summary["published"])
    # The authors' way of asking and scoring.
    asked = task.load(tmp_path / "data", authors=True)
    columns = columns_of(None, authors=True)
    run = run_stub(tmp_path / "authors", always("A"), task, asked, columns)
    scored = task.authors_figures([task.answered(sample, "A") for sample in asked])
    assert summarize(run)["by the authors' scoring"].get("authors", {}).keys() == scored.keys()


# Runs whose process is killed when some more answers are on disk, each in a fork of one process that has imported all
# that a run needs, and then one that is left alone.
KILLED = """
import json, os, signal, sys, time
from pathlib import Path

from emma_hf import EMMA_TINY
from emma_hf.evaluation.answer_files import PART
from emma_hf.evaluation.report import write_report
from emma_hf.evaluation.runner import evaluate
from emma_hf.tiny.evaluation import TinyQuestions

output, limit, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
part = output / PART.format(0)


def lines():
    return part.read_bytes().count(b"\\n") if part.exists() else 0


def run(batch_size):
    child = os.fork()
    if not child:
        arguments = {"limit": limit, "batch_size": batch_size, "device": "cpu", "dtype": "float32"}
        write_report(evaluate(EMMA_TINY, TinyQuestions(50), ".", output, **arguments), output)
        os._exit(0)
    return child


ends = []
for kill in range(kills):
    before, child = lines(), run(1)
    while lines() < before + 4:
        time.sleep(0.005)
    # At another moment of an answer each time.
    time.sleep(0.037 * kill)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    ends.append(lines())
assert os.waitpid(run(8), 0)[1] == 0
print(json.dumps(ends))
"""


@pytest.mark.slow
def test_batches_of_1_and_8_answer_alike(tmp_path):
    answers = {}
    for batch_size in (1, 8):
        folder = tmp_path / str(batch_size)
        evaluate(
            EMMA_TINY, TinyQuestions(200), ".", folder, limit=64, batch_size=batch_size, device="cpu", dtype="float32"
        )
        answers[batch_size] = (folder / MERGED).read_bytes()
    assert answers[1] == answers[8]
    own = [row for row in rows_of(tmp_path / "1") if row["rule"] == "own"]
    # As emma-tiny answers everywhere: 96.8% in its own evaluation.
    assert sum(row["score"] for row in own) / len(own) > 0.85


@pytest.mark.slow
@pytest.mark.once
def test_a_run_killed_five_times_has_the_same_table(tmp_path):
    done = [run_python(KILLED, tmp_path / name, "24", kills) for name, kills in (("whole", "0"), ("killed", "5"))]
    assert [each.returncode for each in done] == [0, 0], [each.stderr[-3000:] for each in done]
    ends = json.loads(done[1].stdout.splitlines()[-1])
    assert len(ends) == 5
    assert ends == sorted(set(ends))
    # The last run was killed too, long before its end.
    assert ends[-1] < 24 * 3
    for name in (MERGED, "results.md", "results.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    keys = [(row["id"], row["rule"]) for row in rows_of(tmp_path / "killed")]
    assert len(keys) == len(set(keys)) == 24 * 3


@pytest.mark.slow
@pytest.mark.once
def test_two_processes_answer_as_one(tmp_path):
    evaluate(EMMA_TINY, TinyQuestions(), ".", tmp_path / "one", limit=10, device="cpu", dtype="float32")
    arguments = f"evaluate {EMMA_TINY} --task emma-tiny --limit 10 --dtype float32 --device cpu"
    done = run_processes("-m", "emma_hf", *arguments.split(), "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two" / MERGED).read_bytes() == (tmp_path / "one" / MERGED).read_bytes()
    # One process reports.
    assert done.stdout.count("# emma-tiny's fresh questions") == 1


def test_a_run_says_how_many_visual_tokens_were_kept(tmp_path):
    task = TinyQuestions(4)
    options = {"rule": "own", "device": "cpu"}
    evaluate(EMMA_TINY, task, ".", tmp_path, **options, visual_tokens=16)
    assert json.loads((tmp_path / MERGED).read_text().splitlines()[0])["visual_tokens"] == 16
    with pytest.raises(EmmaError, match="its visual_tokens is 16, that of this run is null"):
        evaluate(EMMA_TINY, task, ".", tmp_path, **options)

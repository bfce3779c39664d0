"""Every command and every block of Python in the documents, run as written; every link; the README's promises."""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import split_off_lora, split_off_stage_one
from support.hub_server import HubServer
from support.rows import save_rows

from emma_hf.cli import main
from emma_hf.tiny import Scene, draw

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
# What is not run here, and why: installations, what goes on for hours or for ever, and what has tests of its own.
ELSEWHERE = {
    "python -m venv": "an installation",
    "pip install": "an installation",
    "make ": "test_the_make_targets_of_the_readme_exist, and CI",
    "emma-hf tiny train": "tests/tiny/test_training.py",
    "emma-hf tiny replicate": "tests/tiny/replication/test_running.py",
    "emma-hf analyze": "tests/cli/commands/test_analyze.py",
    "torchrun ": "tests/training/test_many_processes.py",
    "emma-hf serve": "tests/serving/test_server.py",
    "emma-hf evaluate emma-7b": "data sets are needed; tests/evaluation/test_runner.py",
    "accelerate launch -m emma_hf evaluate": "tests/evaluation/test_runner.py",
    "export EMMA_HF_DATA=": "tests/evaluation/lmms_eval_tasks/test_official_files.py",
    "lmms-eval ": "tests/integrations/test_lmms_eval.py, tests/evaluation/lmms_eval_tasks/test_official_files.py",
    "python examples/app.py": "tests/project/test_app.py",
    "python examples/batch_inference.py": "tests/project/test_batch_inference.py",
    "python -m benchmarks": "tests/project/test_benchmarks.py",
}


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[str]:
    """The commands of a page that are run here; each other one is listed above."""
    lines = "\n".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()
    here = [line for line in lines if line.strip() and not line.startswith(tuple(ELSEWHERE))]
    assert all(line.startswith("emma-hf ") for line in here), here
    return here


def furnish(folder: Path, converted: Path, reference: Path) -> Path:
    """Put the files that the documents speak of into `folder`."""
    shutil.copytree(converted, folder / "emma-7b")
    shutil.copytree(reference / "images", folder / "pictures")
    shutil.copy(folder / "pictures" / "photo.jpg", folder)
    save_rows(folder / "rows.json")
    draw(Scene.random(0), 336).save(folder / "scene.png")
    return folder


@pytest.fixture
def place(tmp_path, converted, reference, monkeypatch) -> Path:
    """The current folder, with the files that the documents speak of."""
    monkeypatch.chdir(furnish(tmp_path, converted, reference))
    return tmp_path


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "hub").mkdir()
    with HubServer(tmp_path / "hub", {"hf_writer": {"org"}}) as server:
        yield server


def environment(place: Path, **more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_MODULES_CACHE": str(place / "modules"), **more}


# Each folder's page in a fork of one process that has imported Transformers, as every page would for itself.
FORKS = """
import os, sys, traceback
from pathlib import Path
import transformers.trainer
failed = 0
for folder in map(Path, sys.argv[1:]):
    if child := os.fork():
        failed += os.waitpid(child, 0)[1] != 0
        continue
    try:
        os.chdir(folder)
        sys.stdout = open("said.txt", "w")
        exec(compile(Path("page.py").read_text(), folder.name, "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
sys.exit(failed)
"""


def test_the_python_of_every_page_runs_in_its_order(tmp_path, converted, trainable, reference):
    places = {}
    for page in [page for page in PAGES if blocks(page, "python")]:
        (tmp_path / Path(page).name).mkdir()
        places[page] = furnish(tmp_path / Path(page).name, converted, reference)
        (places[page] / "page.py").write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    # The repository's name stands for a folder here: nothing is fetched.
    code = "\n".join(blocks("MODEL_CARD.md", "python")).replace("org/emma-7b", "emma-7b")
    assert code.count("from_pretrained(") == 3
    assert "pipeline(" in code
    card = places["MODEL_CARD.md"] = tmp_path / "MODEL_CARD.md"
    # Sizes that can be packed into 4 bits, which those of the reference checkpoint cannot.
    shutil.copytree(trainable, card / "emma-7b")
    shutil.copy(reference / "images" / "photo.jpg", card)
    (card / "page.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", FORKS, *places.values()],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # What the README shows for the same question on the command line.
    said = (places["README.md"] / "said.txt").read_text(encoding="utf-8")
    assert f"```text\n{said}```" in (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("model.safetensors", "sample_answers.jsonl", "loss.png"):
        assert (places["docs/training.md"] / "emma-finetuned" / name).is_file(), name


def run_command(command: str, place: Path, hub: HubServer, monkeypatch) -> None:
    """Run a command of the documents, with small things in place of those that are large or far away."""
    original = place / "original"
    command = re.sub("(?<=tiny evaluate)", " --questions 16 --captions 2", command)
    command = command.replace("saraghznfri/emma-7b emma-7b", f"{original} emma-7b --clip {original / 'clip'}")
    command = command.replace("lmsys/vicuna-7b-v1.5", f"vicuna --clip {place / 'llava-lora' / 'clip'}")
    if command.startswith("emma-hf push"):
        # A Hub on this machine stands for the Hub; the client reads its settings when it is imported.
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1"}
        arguments = shlex.split(command, comments=True)
        done = subprocess.run(
            arguments, cwd=place, env=environment(place, **online), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return
    if " emma-7b" in command and command.startswith("emma-hf convert") and "--reverse" not in command:
        shutil.rmtree(place / "emma-7b")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who is it?\n\n"))
    assert main(shlex.split(command, comments=True)[1:]) == 0, command


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_of_a_page_run_in_their_order(page, place, reference, hub, monkeypatch, capsys):
    shutil.copytree(reference / "original", place / "original")
    if page == "docs/usage.md":
        split_off_stage_one(place / "original", place / "llava-stage-1", place / "base")
        split_off_lora(place / "original", place / "llava-lora", place / "vicuna")
    for command in commands(page):
        run_command(command, place, hub, monkeypatch)
        if command.startswith("emma-hf ask scene.png") and page == "README.md":
            assert f"```text\n{capsys.readouterr().out}```" in (ROOT / page).read_text(encoding="utf-8")
    if page == "docs/usage.md":
        assert (place / "emma-7b-authors" / "clip" / "config.json").is_file()
        assert (place / "emma-stage-1" / "model.safetensors").is_file()
        assert (place / "emma-lora" / "model.safetensors").is_file()
    if page == "docs/training.md":
        assert (place / "emma-lora" / "merged" / "model.safetensors").is_file()
    if page == "docs/hub.md":
        assert hub.repositories["org/emma-7b"].private
        assert "model.safetensors" in hub.files("org/emma-7b")


def test_the_make_targets_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text()
    for target in ("ask", "test"):
        assert f"`make {target}`" in text
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "examples/README.md"])
def test_what_a_page_links_to_exists(page):
    """Files, and headings of other pages."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_every_page_of_the_docs_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in text, path.name


def test_the_model_card_is_valid():
    from huggingface_hub import ModelCard

    card = ModelCard.load(ROOT / "MODEL_CARD.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    # The weights' licences are not the code's: MODEL_CARD.md tells them apart.
    assert card.data.license == "other"

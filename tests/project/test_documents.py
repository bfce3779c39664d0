"""The README's and the model card's commands and code, run as written on the reference checkpoint."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.hub_server import HubServer
from support.rows import save_rows

ROOT = Path(__file__).parents[2]


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory, converted, reference) -> Path:
    """A folder with the files that the README speaks of: `photo.jpg`, the converted `emma-7b`, and rows to train on."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(reference / "images" / "photo.jpg", folder)
    shutil.copytree(converted, folder / "emma-7b")
    shutil.copytree(reference / "images", folder / "pictures")
    save_rows(folder / "rows.json")
    return folder


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path, {"hf_writer": {"org"}}) as server:
        yield server


def environment(place: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_MODULES_CACHE": str(place / "modules")}


def test_the_python_of_the_readme_runs_in_its_order(place):
    code = "\n".join(blocks("README.md", "python"))
    assert code.count("generate(") == 2
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=environment(place), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    out = place / "emma-finetuned"
    for name in ("model.safetensors", "sample_answers.jsonl", "loss.png"):
        assert (out / name).is_file(), name


def test_the_python_of_the_model_card_runs(trainable, photo, tmp_path):
    # Sizes that can be packed into 4 bits, which those of the reference checkpoint cannot.
    shutil.copytree(trainable, tmp_path / "emma-7b")
    shutil.copy(photo, tmp_path)
    # The repository's name stands for a folder here: nothing is fetched.
    code = "\n".join(blocks("MODEL_CARD.md", "python")).replace("org/emma-7b", "emma-7b")
    assert code.count("from_pretrained(") == 3 and "pipeline(" in code
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_the_commands_of_the_readme_run(place, reference, hub):
    lines = "\n".join(blocks("README.md", "bash")).replace("\\\n", " ").splitlines()
    # Training emma-tiny takes hours, and a server goes on for ever; both have tests of their own.
    endless = ("emma-hf tiny train", "emma-hf serve")
    commands = [line for line in lines if line.startswith("emma-hf ") and not line.startswith(endless)]
    assert len(commands) == 13
    shutil.rmtree(place / "emma-7b", ignore_errors=True)
    original = reference / "original"
    for command in commands:
        # The reference checkpoint stands for the authors' on the Hub, and brings its own CLIP.
        command = re.sub("(?<=tiny evaluate)", " --questions 16 --captions 2", command)
        command = command.replace("saraghznfri/emma-7b emma-7b", f"{original} emma-7b --clip {original / 'clip'}")
        # A Hub on this machine stands for the Hub.
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1"}
        variables = environment(place) | (online if command.startswith("emma-hf push") else {})
        done = subprocess.run(
            command, shell=True, cwd=place, env=variables, capture_output=True, text=True, timeout=300,
            input="Who is it?\n\n",
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (place / "emma-lora" / "merged" / "model.safetensors").is_file()
    assert (place / "emma-7b-authors" / "clip" / "config.json").is_file()
    assert hub.repositories["org/emma-7b"].private and "model.safetensors" in hub.files("org/emma-7b")


def test_the_make_targets_of_the_readme_exist():
    targets = re.findall(r"^make (\S+)", "\n".join(blocks("README.md", "bash")), re.MULTILINE)
    assert targets == ["ask", "test"]
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_files_that_the_documents_name_exist():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / target).exists(), target
    for folder, file in re.findall(r"`(?:(tests/|src/emma_hf/|benchmarks/))?(\w+\.py)`", text):
        places = [ROOT / folder / file] if folder else [ROOT / "src" / "emma_hf" / file, ROOT / "tests" / file]
        assert any(place.is_file() for place in places), file


def test_the_model_card_is_valid():
    from huggingface_hub import ModelCard

    card = ModelCard.load(ROOT / "MODEL_CARD.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    # The weights' licences are not the code's: MODEL_CARD.md tells them apart.
    assert card.data.license == "other"

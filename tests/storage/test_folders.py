"""Folders that appear when they are complete, and JSON files whose errors name them."""

import os
import signal
import stat
import subprocess
import sys

import pytest
import torch

from emma_hf import EmmaError
from emma_hf.storage.folders import damaged_files_named, new_folder, read_json, write_json


def test_a_folder_appears_when_it_is_complete(tmp_path):
    output = tmp_path / "deep" / "out"
    with new_folder(output) as folder:
        assert folder.parent == output.parent
        (folder / "file").write_text("content")
        assert not output.exists()
    assert (output / "file").read_text() == "content"
    assert stat.S_IMODE(output.stat().st_mode) == 0o755
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing_behind(tmp_path, error):
    def fail() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("content")
            raise error

    with pytest.raises(error):
        fail()
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused(tmp_path):
    with pytest.raises(EmmaError, match=f"OUTPUT must not exist yet: {tmp_path} does"), new_folder(tmp_path):
        pass


def test_a_link_that_leads_nowhere_is_refused_before_the_work(tmp_path):
    for target in (tmp_path / "none", tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        with pytest.raises(EmmaError, match="OUTPUT must not exist yet: .*link does"), new_folder(tmp_path / "link"):
            raise AssertionError("no work")


# Writes half of a model, says so, and waits to be killed.
RUN = """
import sys, time
from pathlib import Path
from emma_hf.storage.folders import damaged_files_named, new_folder
with new_folder(sys.argv[1]) as folder:
    (folder / "model.safetensors").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def running(tmp_path):
    """A process in the middle of writing `tmp_path / "model"`, and its temporary folder."""
    process = subprocess.Popen([sys.executable, "-c", RUN, tmp_path / "model"], stdout=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_next_run_removes_what_a_killed_one_left(running, tmp_path):
    process, left = running
    # Other names, and folders of the user's, are nobody else's business.
    for name in (".model-original", ".model2-abcdefgh.incomplete", ".model-abcdefghi.incomplete"):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "model") as folder:
        # It runs still.
        assert os.path.isdir(left)
        assert left != str(folder)
    (tmp_path / "model").rmdir()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.path.isdir(left)
    with new_folder(tmp_path / "model"):
        assert not os.path.exists(left)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".model-abcdefghi.incomplete", ".model-original", ".model2-abcdefgh.incomplete", "model",
    ]  # fmt: skip


def test_json_is_written_for_people_and_read_back(tmp_path):
    values = {"name": "Émile", "list": [1, None]}
    write_json(tmp_path / "file.json", values)
    assert (tmp_path / "file.json").read_text(encoding="utf-8") == (
        '{\n  "name": "Émile",\n  "list": [\n    1,\n    null\n  ]\n}\n'
    )
    assert read_json(tmp_path / "file.json") == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"file\.json is not JSON \(.*\)\. Fetch it again"),
        (b"\xff", r"file\.json is not JSON"),
        (b"[1]", r"file\.json must hold a JSON object: got list"),
    ],
)
def test_a_damaged_json_file_is_named(tmp_path, content, message):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(EmmaError, match=message):
        read_json(tmp_path / "file.json")


def test_a_missing_json_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"file\.json is missing\. Fetch it with the checkpoint"):
        read_json(tmp_path / "file.json")


def test_what_a_library_says_of_damaged_files_names_the_folder():
    with pytest.raises(EmmaError, match=r"those of models/emma cannot be used \(KeyError: 'vocab'\)\. Save or fetch"), \
            damaged_files_named("models/emma"):  # fmt: skip
        raise KeyError("vocab")
    # What a user can read already, and what has other reasons, passes.
    for error in (
        EmmaError("plain"),
        FileNotFoundError("plain"),
        ImportError("plain"),
        torch.OutOfMemoryError("plain"),
    ):
        with pytest.raises(type(error), match="^plain$"), damaged_files_named("models/emma"):
            raise error

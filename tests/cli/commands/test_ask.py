"""`ask` and `chat`, as a user types them."""

import base64
import functools
import io
import os
import pty
import subprocess
import sys

import pytest

from emma_hf import EmmaModel
from emma_hf.cli import main


def ask(*arguments, model) -> int:
    return main(["ask", "--model", str(model), "--max-new-tokens", "6", *map(str, arguments)])


@pytest.fixture
def stdin(monkeypatch):
    def set_to(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    return set_to


def test_the_answer_goes_to_standard_output_and_nothing_else_does(converted, photo, capfd, stdin, processor, model):
    messages = [{"role": "user", "content": [{"type": "image", "path": str(photo)}, {"type": "text", "text": "Who?"}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    data = photo.read_bytes()
    for image in (photo, f"data:image/jpeg;base64,{base64.b64encode(data).decode()}", "-"):
        stdin(data)
        assert ask("--dtype", "float32", image, "Who?", model=converted) == 0
        assert capfd.readouterr().out.strip() == expected


def test_fewer_visual_tokens(converted, photo, capfd, monkeypatch):
    lengths = []
    forward = EmmaModel.get_image_features

    def get_image_features(self, *arguments, **options):
        outputs = forward(self, *arguments, **options)
        lengths.append(outputs.pooler_output.shape[1])
        return outputs

    monkeypatch.setattr(EmmaModel, "get_image_features", get_image_features)
    for more, expected in (([], 16), (["--visual-tokens", "5"], 5)):
        lengths.clear()
        assert ask(*more, photo, "Who is it?", model=converted) == 0
        assert set(lengths) == {expected}
    assert ask("--visual-tokens", "17", photo, "Who is it?", model=converted) == 2
    assert "`visual_tokens` must be a whole number from 1 to 16" in capfd.readouterr().err


def test_several_pictures_and_an_instruction(converted, photo, capfd):
    assert ask("--image", photo, photo, "What changed?", model=converted) == 0
    assert ask("--image", photo, "--image", photo, "What changed?", model=converted) == 0
    first, second = [line for line in capfd.readouterr().out.split("\n") if line.strip()][:2]
    assert first == second
    assert ask("--instruction", "the hat", photo, "Who?", model=converted) == 0


def test_several_questions_encode_the_picture_once(capfd, monkeypatch, tmp_path):
    from emma_hf import EmmaModel

    picture = tmp_path / "scene.png"
    assert main(["tiny", "draw", str(picture), "--seed", "3"]) == 0
    asked = ["How many things are there?", "Is there a star?", "What does the picture show?"]
    expected = []
    for question in asked:
        assert main(["ask", str(picture), question]) == 0
        expected.append(capfd.readouterr().out.strip())
    encoded = []
    original = EmmaModel.get_vision_features
    monkeypatch.setattr(
        EmmaModel, "get_vision_features", lambda self, pixels: encoded.append(len(pixels)) or original(self, pixels)
    )
    assert main(["ask", str(picture), asked[0], "--question", asked[1], "--question", asked[2]]) == 0
    assert capfd.readouterr().out.split("\n")[:3] == expected
    assert encoded == [1]


def test_a_chat_keeps_its_cache(converted, photo, capfd, stdin, monkeypatch):
    from emma_hf import EmmaForConditionalGeneration, EmmaModel

    encoded, lengths = [], []
    original, forward = EmmaModel.get_vision_features, EmmaForConditionalGeneration.forward
    monkeypatch.setattr(
        EmmaModel, "get_vision_features", lambda self, pixels: encoded.append(len(pixels)) or original(self, pixels)
    )

    @functools.wraps(forward)
    def counting(self, input_ids=None, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(EmmaForConditionalGeneration, "forward", counting)
    stdin(b"Who is it?\nAnd the hat?\n\n")
    assert main(["chat", "--model", str(converted), "--max-new-tokens", "4", str(photo)]) == 0
    assert encoded == [1]
    whole = [length for length in lengths if length > 1]
    assert len(whole) == 2
    assert whole[1] < whole[0]


def test_a_line_of_a_chat_that_is_not_utf_8_is_told(converted, photo, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Wh\xe9?\n"), encoding="utf-8", errors="strict"))
    assert main(["chat", "--model", str(converted), str(photo)]) == 2
    assert "emma-hf: Text must be encoded as UTF-8" in capfd.readouterr().err


def scene(tmp_path) -> str:
    path = str(tmp_path / "scene.png")
    assert main(["tiny", "draw", path, "--seed", "3"]) == 0
    return path


@pytest.mark.slow
def test_a_locale_that_is_not_utf_8(tmp_path):
    """The question arrives as bytes that the locale's encoding lacks, and is read as UTF-8."""
    picture = scene(tmp_path)
    arguments = ["ask", "--max-new-tokens", "8", picture, "Où est l'étoile ?"]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    answers = [
        subprocess.run([sys.executable, "-m", "emma_hf", *arguments], capture_output=True, env={**os.environ, **locale})
        for locale in (plain, {"PYTHONUTF8": "1"})
    ]
    assert [done.returncode for done in answers] == [0, 0], answers[0].stderr
    assert answers[0].stdout == answers[1].stdout != b""


@pytest.mark.slow
def test_a_chat_on_a_terminal_edits_lines_and_remembers_them(tmp_path, capfd):
    picture, question = scene(tmp_path), "How many things are there?"
    capfd.readouterr()
    assert main(["ask", picture, question]) == 0
    count = capfd.readouterr().out.strip()
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "emma_hf", "chat", picture],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(theirs)

    def read_until(text: str) -> str:
        found = ""
        while text not in found:
            found += os.read(ours, 1000).decode()
        return found

    read_until("> ")
    # "Hw", one to the left, the missing letter, to the end, the rest.
    os.write(ours, b"Hw\x02o\x05" + question[3:].encode() + b"\r")
    assert count in read_until("> ").split("there?")[-1]
    # The line before.
    os.write(ours, b"\x10\r")
    assert question in read_until("> ")
    os.write(ours, b"\r")
    assert running.wait(timeout=60) == 0

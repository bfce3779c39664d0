"""The command, as a user types it."""

import base64
import functools
import io
import re

import pytest

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


def test_conversion_and_back(reference, tmp_path, capfd):
    source = reference / "original"
    first, back = tmp_path / "first", tmp_path / "back"
    assert main(["convert", str(source), str(first), "--clip", str(source / "clip"), "--max-shard-size", "1MB"]) == 0
    assert main(["convert", "--reverse", str(first), str(back)]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert f"wrote {first}" in err
    assert "weights" in err
    assert (back / "vision_tower.bin").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "--model", "MODEL", "none.jpg", "Who?"], "There is no picture at 'none.jpg'"),
        (["ask", "--model", "MODEL", "Who?"], "takes IMAGE QUESTION"),
        (["ask", "--model", "MODEL", "PHOTO", "Who", "is"], "Quote the question"),
        (
            ["ask", "--model", "MODEL", "--dtype", "int", "PHOTO", "Who?"],
            "must be auto, float32, float16 or bfloat16: got 'int'",
        ),
        (["ask", "--model", "MODEL", "--device", "tpu9", "PHOTO", "Who?"], "a device of this machine: got 'tpu9'"),
        (["ask", "--model", "MODEL", "--max-new-tokens", "0", "PHOTO", "Who?"], "at least 1: got 0"),
        (["ask", "--model", "none/none", "PHOTO", "Who?"], "none/none"),
        (["chat", "--model", "MODEL", "-"], "no picture can come from there: got `-`"),
        (["convert", "OUTPUT"], "saraghznfri/emma-7b is no folder here and cannot be fetched"),
        (["convert", "--reverse", "OUTPUT"], "`--reverse` needs a SOURCE"),
        (["convert", "none/none/none", "OUTPUT"], "neither a folder nor a Hub id"),
        (["convert", "MODEL", "OUTPUT", "--reverse", "--clip", "x"], "CLIP is written, not read"),
        (["convert", "MODEL", "MODEL", "--reverse"], "OUTPUT must not exist yet"),
    ],
)
def test_mistakes_are_one_line_and_status_2(converted, photo, tmp_path, capfd, arguments, message):
    places = {"MODEL": str(converted), "PHOTO": str(photo), "OUTPUT": str(tmp_path / "out")}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("emma-hf: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_damaged_checkpoint_is_one_line_and_status_2(converted, photo, tmp_path, capfd):
    import shutil

    folder = shutil.copytree(converted, tmp_path / "copy")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert ask(photo, "Who?", model=folder) == 2
    assert re.search(r"^emma-hf: .+$", capfd.readouterr().err, re.MULTILINE)


def test_help_needs_no_model(capfd):
    with pytest.raises(SystemExit) as stopped:
        main(["ask", "--help"])
    assert stopped.value.code == 0
    assert "IMAGE QUESTION" in capfd.readouterr().out

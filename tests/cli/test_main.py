"""The command: its parser, its errors and how it ends."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from emma_hf.cli import main

COMMANDS = ["ask", "chat", "serve", "convert", "export", "push", "train", "evaluate", "analyze", "tiny"]


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
        (["convert", "OUTPUT"], "cannot be reached to read saraghznfri/emma-7b"),
        (["convert", "--reverse", "OUTPUT"], "`--reverse` needs a SOURCE"),
        (["convert", "none/none/none", "OUTPUT"], "neither a folder nor a Hub id"),
        (["convert", "MODEL", "OUTPUT", "--reverse", "--clip", "x"], "CLIP is written, not read"),
        (["convert", "MODEL", "OUTPUT", "--reverse", "--base", "x"], "`--reverse` starts from a complete model. Drop"),
        (["convert", "MODEL", "MODEL", "--reverse"], "OUTPUT must not exist yet"),
        (["ask", "--model", "none", "PHOTO", "Who?"], "neither a folder nor a Hub id"),
        (["ask", "--model", "AUTHORS", "PHOTO", "Who?"], "`emma-hf convert SOURCE OUTPUT`"),
        (["convert", "AUTHORS", "LINK"], "OUTPUT must not exist yet"),
        (["export", "MODEL", "LINK"], "OUTPUT must not exist yet"),
        (["tiny", "draw", "LINK"], "IMAGE must end in the name of a format, such as .png or .jpg: got"),
        (["tiny", "draw", "OUTPUT.psd"], "must end in the name of a format"),
        (["ask", "--model", "LINK", "PHOTO", "Who?"], "neither a folder nor a Hub id"),
        (["ask", "--model", "MODEL", "LINK", "Who?"], "There is no picture at"),
        (["ask", "--model", "MODEL", "PHOTO", " "], "A question must have words: got ' '"),
        (["ask", "--model", "MODEL", "PHOTO", "Who?", "--question", ""], "A question must have words: got ''"),
        (["ask", "--model", "MODEL", "PHOTO", "Who \udcff?"], "Text must be encoded as UTF-8"),
        (["ask", "--model", "MODEL", "--image", "-", "-", "Who?"], "Standard input holds one image"),
        (["tiny", "draw", "OUTPUT.png", "--side", "100000"], "must be at most 4096 pixels: got 100000"),
    ],
)
def test_mistakes_are_one_line_and_status_2(converted, reference, photo, tmp_path, capfd, arguments, message):
    link = tmp_path / "link"
    link.symlink_to(link)
    places = {
        "MODEL": converted,
        "PHOTO": photo,
        "OUTPUT": tmp_path / "out",
        "LINK": link,
        "AUTHORS": reference / "original",
    }
    places = {name: str(path) for name, path in places.items()}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("emma-hf: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_damaged_checkpoint_is_one_line_and_status_2(converted, photo, tmp_path, capfd):
    folder = shutil.copytree(converted, tmp_path / "copy")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert main(["ask", "--model", str(folder), str(photo), "Who?"]) == 2
    assert re.search(r"^emma-hf: .+$", capfd.readouterr().err, re.MULTILINE)


def command(*arguments: str, **environment: str) -> subprocess.Popen:
    """The command in a process of its own, offline."""
    return python("-m", "emma_hf", *arguments, **environment)


def python(*arguments: str, **environment: str) -> subprocess.Popen:
    """Python in a process of its own, which Ctrl-C interrupts."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "", **environment},
        # Where the tests run in the background, the signal of Ctrl-C is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture
def without_torch(tmp_path):
    """Environment in which neither torch nor Transformers can be imported."""
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemError('imported')")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize("name", ["emma-hf", "-m"])
@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "usage: emma-hf [-h]"),
        (["--version"], 0, "emma-hf "),
        (["ask", "--help"], 0, "usage: emma-hf ask [OPTION ...] IMAGE QUESTION"),
        (["serve", "--help"], 0, "--quantization {4bit,8bit}"),
        (["ask", "--colour", "a", "b"], 2, "usage: emma-hf ask [OPTION ...] IMAGE QUESTION\nemma-hf ask: error: unrecognized arguments: --colour"),
        (["tiny", "draw", "a.png", "b"], 2, "usage: emma-hf tiny draw "),
        (["ask", "--dtype", "int", "a", "b"], 2, "emma-hf: `--dtype` must be auto"),
        (["ask", "--quantization", "2", "a", "b"], 2, "emma-hf: `quantization` must be 4bit or 8bit: got '2'"),
        (["serve", "--max-megabytes", "0"], 2, "emma-hf: `--max-megabytes`"),
        (["serve", "--max-waiting-megabytes", "inf"], 2, "`--max-waiting-megabytes` must be a finite number: got inf"),
        (["analyze", "--seed", "50"], 2, "emma-hf: `--seed` of scenes must be 0 to 49: got 50"),
        (["export", "a"], 2, "emma-hf: `export` takes MODEL FOLDER"),
        (["paint"], 2, "invalid choice: 'paint'"),
    ],
)  # fmt: skip
def test_help_and_wrong_arguments_need_neither_torch_nor_transformers(
    without_torch, tmp_path, name, arguments, status, text
):
    script = tmp_path / "emma-hf"
    # What pip installs.
    script.write_text("import sys\nfrom emma_hf.cli import main\nsys.exit(main())")
    start = [sys.executable, str(script)] if name == "emma-hf" else [sys.executable, "-m", "emma_hf"]
    done = subprocess.run([*start, *arguments], capture_output=True, text=True, env={**os.environ, **without_torch})
    assert done.returncode == status
    assert text in (done.stdout if status == 0 else done.stderr)
    assert (done.stderr if status == 0 else done.stdout) == ""


def test_help_names_the_commands_ask_and_chat_first(capfd):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert re.findall(r"^    (\w+) ", capfd.readouterr().out, re.MULTILINE) == COMMANDS


def test_train_is_called_by_its_name_and_takes_hyphens(capfd):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capfd.readouterr().out
    assert out.startswith("usage: emma-hf train [-h]")
    assert "--train-data" in out
    required = ["--model", "a", "--train-data", "b", "--output-dir", "c"]
    with pytest.raises(SystemExit) as stopped:
        main(["train", *required, "--colour", "red"])
    assert stopped.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith("usage: emma-hf train [-h]")
    assert "emma-hf train: error: unrecognized arguments: --colour red" in err
    assert main(["train", *required, "--load-best-model-at-end", "true"]) == 2
    assert re.search(r"^emma-hf: `TrainingArguments` refuses this combination", capfd.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("place", [0, 1])
def test_debug_shows_the_traceback(converted, place):
    arguments = ["ask", "--model", str(converted), "none.jpg", "Who?"]
    arguments.insert(place, "--debug")
    with pytest.raises(FileNotFoundError, match="no picture at 'none.jpg'"):
        main(arguments)


def test_an_error_that_is_not_the_users_shows_its_traceback(converted, photo, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr("emma_hf.inference.Chat.answer", fail)
    with pytest.raises(ValueError, match="a mistake of ours"):
        main(["ask", "--model", str(converted), str(photo), "Who?"])


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "PHOTO", "Who?"]])
def test_a_closed_pipe_ends_quietly(photo, arguments):
    running = command(*(str(photo) if word == "PHOTO" else word for word in arguments))
    running.stdout.close()
    errors = running.stderr.read().decode()
    assert running.wait(timeout=120) == 141
    assert "Broken" not in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("seconds", [0.5, 1.5, 2.5])
def test_ctrl_c_ends_quietly(photo, seconds):
    """While torch and Transformers are imported, mostly."""
    running = command("ask", str(photo), "Who?")
    time.sleep(seconds)
    running.send_signal(signal.SIGINT)
    err = running.communicate(timeout=60)[1]
    # Where the signal meets code that `exec` runs, as in `dataclass`, `python -m` ends itself by the signal although
    # the exception was handled. A shell says 130 for either.
    assert running.returncode in (130, -signal.SIGINT)
    assert b"Traceback" not in err
    assert b"Interrupt" not in err


def test_ctrl_c_in_an_import_is_not_lost(photo):
    code = f"""
import os, signal, sys

class Importer:
    def find_spec(self, name, *rest):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                pass

sys.meta_path.insert(0, Importer())
sys.argv[0] = "/usr/bin/emma-hf"
from emma_hf.cli.main import main
sys.exit(main(["ask", {str(photo)!r}, "Who?"]))
"""
    running = python("-c", code)
    assert running.communicate(timeout=60) == (b"", b"")
    assert running.returncode == -signal.SIGINT


def test_ctrl_c_in_a_destructor_is_not_lost(photo):
    code = f"""
import sys, time
sys.argv[0] = "/usr/bin/emma-hf"
from emma_hf.cli.main import main
from emma_hf.inference import Chat

class Destroyed:
    def __del__(self):
        raise KeyboardInterrupt

def answer(*args, **kwargs):
    Destroyed()
    for _ in range(100):
        time.sleep(0.1)

Chat.answer = answer
hook = sys.unraisablehook
status = main(["ask", {str(photo)!r}, "Who?"])
assert sys.unraisablehook is hook
sys.exit(status)
"""
    running = python("-c", code)
    assert b"Interrupt" not in running.communicate(timeout=60)[1]
    assert running.returncode == 130


def test_ctrl_c_while_a_model_answers(converted, photo, capfd, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("emma_hf.inference.Chat.answer", interrupt)
    assert main(["ask", "--model", str(converted), str(photo), "Who?"]) == 130
    assert "Traceback" not in capfd.readouterr().err


def test_the_command_knows_the_public_names_when_it_needs_them():
    code = """
import sys
sys.argv[0] = "/usr/bin/emma-hf"
import emma_hf
assert "torch" not in sys.modules
assert not hasattr(emma_hf, "NoSuchClass")
config = emma_hf.EmmaConfig
from transformers import AutoConfig
assert AutoConfig.from_pretrained(emma_hf.EMMA_TINY).__class__ is config
print("known")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stdout == "known\n", done.stderr


@pytest.mark.parametrize("name", ["emma-hf.py", "script.py"])
def test_the_auto_classes_know_emma_in_a_script_of_any_other_name(tmp_path, name):
    script = tmp_path / name
    script.write_text(
        "import emma_hf\nfrom transformers import AutoConfig\nprint(AutoConfig.for_model('emma').model_type)"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=os.environ)
    assert done.stdout == "emma\n", done.stderr

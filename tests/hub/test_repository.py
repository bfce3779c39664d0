"""Exporting, pushing and checking repositories, with the real client of the Hub against a Hub on this machine."""

import json
import os
import re
import shutil
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import ModelCard, constants
from PIL import Image
from support.hub_server import HubServer
from support.processes import run_python

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor, HubError
from emma_hf.cli import main
from emma_hf.hub.model_card import TEMPLATE
from emma_hf.hub.repository import export, push
from emma_hf.hub.verification import MANIFEST_NAME, REQUIRED_FILES, _card, check, files_of, manifest_of, read_manifest
from emma_hf.model.code_files_emma import AUTO_MAP, HUB_FILES
from emma_hf.storage.tensors import read_checkpoint

ROOT = Path(__file__).parents[2]
NAME = "org/emma-tiny"
WRITER, READER = "hf_writer", "hf_reader"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """emma-tiny's complete repository, its weights in three files. Shared: a test that changes it copies it."""
    folder = tmp_path_factory.mktemp("exported") / "emma-tiny"
    return export(EMMA_TINY, folder, repo_id=NAME, max_shard_size="4MB")


@pytest.fixture(scope="module")
def tiny():
    model = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype="auto").eval()
    return model, EmmaProcessor.from_pretrained(EMMA_TINY)


def answer(tiny, picture: Path, question: str, tokens: int = 256) -> str:
    model, processor = tiny
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ).to(dtype=model.dtype)  # fmt: skip
    new = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running Hub that this process and its children talk to, as a user who may write to `org`."""
    (tmp_path / "storage").mkdir()
    with HubServer(tmp_path / "storage", {WRITER: {"org"}, READER: set()}) as server:
        connect(monkeypatch, server.url, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server
    new_sessions()


def connect(monkeypatch, url: str, cache: Path) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    # The client's older line keeps a copy of it.
    monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "tokens"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    # For child processes.
    for name, value in {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    new_sessions()


def new_sessions() -> None:
    """Forget open connections, and whether they were offline; the two lines of the client name it differently."""
    http = huggingface_hub.utils._http
    (http.close_session if hasattr(http, "close_session") else http.reset_sessions)()


@pytest.fixture
def no_waiting(monkeypatch):
    """The client waits longer and longer between its attempts."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


# The folder.


def test_the_folder_is_complete_and_its_manifest_is_true(exported):
    names = set(files_of(exported))
    assert names >= {*REQUIRED_FILES, MANIFEST_NAME, "model.safetensors.index.json"}
    assert len([name for name in names if name.endswith(".safetensors")]) == 3
    listed = read_manifest(exported)
    assert set(listed) == names - {MANIFEST_NAME}
    assert listed == manifest_of(exported)["files"]
    for name, entry in listed.items():
        assert (exported / name).stat().st_size == entry["size"], name
    for name in HUB_FILES:
        assert (exported / name).read_bytes() == (ROOT / "src" / "emma_hf" / "model" / name).read_bytes()
    assert json.loads((exported / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert not any(path.is_symlink() for path in exported.rglob("*"))


def test_the_weights_are_the_models(exported, tmp_path):
    before, after = read_checkpoint(EMMA_TINY), read_checkpoint(exported)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.load(), after[name].load()) for name, tensor in before.items())
    # Without a size the files themselves are copied; what was exported can be exported again, its pictures with it.
    again = export(exported, tmp_path / "again")
    for path in exported.glob("model*"):
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in (again / "widget").iterdir()) == ["scene-0.png", "scene-1.png", "scene-2.png"]


def test_what_endpoints_install_is_what_the_package_asks_for():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for requirement in (TEMPLATE / "requirements.txt").read_text(encoding="utf-8").splitlines():
        assert requirement in text, requirement


def test_a_model_of_another_shape_gets_no_figures_of_the_paper(converted, tmp_path):
    folder = export(converted, tmp_path / "mine")
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict().keys().isdisjoint({"base_model", "datasets", "license", "model-index"})
    assert card.data.library_name == "transformers" and "emma" in card.data.tags
    # Nor a licence, which is its owner's to name; the check says so, and finds nothing wrong with it.
    assert _card(folder) == ("", "ok, but it names no license")
    assert "# mine" in card.text and "89.42" not in card.text and "<!--" not in card.text
    # The figure of the architecture goes with it.
    with Image.open(folder / "docs" / "architecture.png") as picture:
        assert picture.width > 500


def test_examples_of_the_users_are_answered_by_the_model(converted, tmp_path, photo, model, processor):
    folder = export(converted, tmp_path / "mine", examples=[(photo, "Who is it?")])
    (example,) = ModelCard.load(folder / "README.md").data.to_dict()["widget"]
    assert example["src"] == "widget/1-photo.jpg"
    assert (folder / example["src"]).read_bytes() == photo.read_bytes()
    stored = EmmaForConditionalGeneration.from_pretrained(converted, dtype="auto").eval()
    assert example["output"]["text"] == answer((stored, processor), photo, "Who is it?")
    with pytest.raises(FileNotFoundError, match="example picture .*nowhere.png is not there"):
        export(converted, tmp_path / "other", examples=[("nowhere.png", "Who?")])
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_exported_says_why(converted, tmp_path):
    def broken(name: str, change) -> Path:
        folder = copied(converted, tmp_path / name)
        change(folder)
        return folder

    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def lead_outside(folder: Path) -> None:
        (tmp_path / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")

    def other_type(folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "llava"}')

    cases = [
        (other_type, ValueError, "model_type 'emma'.*'llava'.*emma-hf convert"),
        (cut, ValueError, "truncated"),
        (lead_outside, ValueError, "is a link to .*secret.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "no weights in safetensors"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "lacks config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, "is not JSON"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), FileNotFoundError, "processor.save_pretrained"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), ValueError, "must be YAML"),
    ]
    for number, (change, kind, message) in enumerate(cases):
        with pytest.raises(kind, match=message):
            export(broken(f"source{number}", change), tmp_path / "target")
        assert not (tmp_path / "target").exists()
    with pytest.raises(ValueError, match="must not exist"):
        export(converted, converted)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        export("nowhere", tmp_path / "target")
    with pytest.raises(ValueError, match="must be the evaluation.json"):
        export(converted, tmp_path / "target", evaluation=converted / "config.json")


def test_a_card_takes_no_file_from_outside_its_folder(converted, tmp_path):
    source = copied(converted, tmp_path / "source")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (source / "README.md").write_text(
        "---\nlicense: mit\n---\n# x\n![a](../secret.png)\n![b](own.png)\n![c](link.png)\n"
    )
    (source / "own.png").write_bytes(b"own")
    folder = export(source, tmp_path / "one")
    assert (folder / "own.png").exists() and not (tmp_path / "one" / "secret.png").exists()
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    (source / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="link.png is a link to .*secret.png"):
        export(source, tmp_path / "two")


# To the Hub.


def test_a_push_sends_all_of_it_once_and_afterwards_what_changed(hub, exported, tmp_path):
    address = push(exported, NAME, private=True)
    repository = hub.repositories[NAME]
    assert repository.private and len(repository.commits) == 2
    assert address == f"{hub.url}/{NAME}/commit/{repository.branches['main']}"
    held = hub.files(NAME)
    assert set(held) == set(files_of(exported))
    assert all(blob.path.read_bytes() == (exported / name).read_bytes() for name, blob in held.items())
    assert {name for name, blob in held.items() if blob.large} == {path.name for path in exported.glob("*.safetensors")}

    assert push(exported, NAME) == address and len(repository.commits) == 2
    sent = hub.count("PUT", "/storage/")
    changed = copied(exported, tmp_path / "changed")
    (changed / MANIFEST_NAME).unlink()
    (changed / "README.md").write_text((changed / "README.md").read_text() + "\nOne line more.\n")
    shutil.rmtree(changed / "widget")
    push(changed, NAME, message="A line")
    assert hub.count("PUT", "/storage/") == sent == 3
    held = hub.files(NAME)
    assert held["README.md"].path.read_text().endswith("One line more.\n")
    # Files of the first export that the second has not are gone, here the pictures that were there.
    assert not any(name.startswith("widget/") for name in held)


def test_a_model_is_pushed_as_it_lies_by_its_name(hub, capfd):
    assert main(["push", "emma-tiny", NAME]) == 0
    assert capfd.readouterr().out.strip() == f"{hub.url}/{NAME}/commit/{hub.repositories[NAME].branches['main']}"
    held = hub.files(NAME)
    assert set(held) >= {*REQUIRED_FILES, "model.safetensors", MANIFEST_NAME}
    assert held["model.safetensors"].path.read_bytes() == (EMMA_TINY / "model.safetensors").read_bytes()
    assert NAME in held["README.md"].path.read_text()


def test_another_model_is_replaced_only_by_force(hub, exported):
    hub.create(NAME, files={"model.safetensors": b"other", "notes.txt": b"keep?", "config.json": b"{}"})
    with pytest.raises(ValueError, match="holds another model.*model.safetensors.*--force"):
        push(exported, NAME)
    assert set(hub.files(NAME)) == {"model.safetensors", "notes.txt", "config.json"}
    push(exported, NAME, force=True)
    assert set(hub.files(NAME)) == set(files_of(exported))
    # Without weights there is no model: a page that was begun on the site is built upon.
    hub.create("org/begun", files={"README.md": b"# Soon\n", "LICENSE": b"mine"})
    push(exported, "org/begun")
    assert set(hub.files("org/begun")) == {*files_of(exported), "LICENSE"}


def test_nothing_outside_the_folder_is_uploaded(hub, exported, tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = copied(exported, tmp_path / "folder")
    (folder / "extra").symlink_to(tmp_path)
    (folder / "secret.txt").symlink_to(tmp_path / "secret")
    (folder / "more.txt").write_text("not in the manifest")
    push(folder, NAME)
    assert set(hub.files(NAME)) == set(files_of(exported))

    outside = copied(folder / "instruction_tokenizer", tmp_path / "outside")
    shutil.rmtree(folder / "instruction_tokenizer")
    (folder / "instruction_tokenizer").symlink_to(outside)
    with pytest.raises(ValueError, match="Nothing outside the folder is uploaded: .*is a link to .*outside"):
        push(folder, NAME)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["files"]["../secret"] = {"size": 6, "sha256": "0"}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"files of its own folder: .* names '\.\./secret'"):
        push(folder, NAME)
    manifest["files"] = []
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is not a manifest of this package"):
        push(folder, NAME)


def test_a_folder_is_uploaded_as_it_was_exported(hub, exported, tmp_path):
    folder = copied(exported, tmp_path / "folder")
    (folder / "chat_template.jinja").write_text("changed")
    with pytest.raises(ValueError, match="chat_template.jinja was changed since.*emma-hf export"):
        push(folder, NAME)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="lacks chat_template.jinja, which its manifest lists"):
        push(folder, NAME)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest_of(folder)))
    with pytest.raises(ValueError, match="not a complete repository: its manifest lacks chat_template.jinja"):
        push(folder, NAME)
    assert NAME not in hub.repositories


def test_an_upload_that_broke_off_goes_on(hub, exported, no_waiting):
    last = sorted(exported.glob("*.safetensors"))[-1]
    sha256 = read_manifest(exported)[last.name]["sha256"]
    # Refused for good, as when a proxy damages the bytes.
    hub.fail("PUT", sha256, 400)
    with pytest.raises(ValueError, match="broke off .*Nothing was committed.*Run the command again"):
        push(exported, NAME)
    assert not hub.files(NAME)
    arrived = hub.count("PUT", "/storage/")
    assert arrived < 3
    push(exported, NAME)
    assert hub.count("PUT", "/storage/") == 3
    assert set(hub.files(NAME)) == set(files_of(exported))


def test_a_connection_that_breaks_is_tried_again_by_the_client(hub, exported, no_waiting):
    hub.fail("PUT", "/storage/", 0)
    hub.fail("PUT", "/storage/", 503)
    push(exported, NAME)
    assert set(hub.files(NAME)) == set(files_of(exported))


def test_what_goes_wrong_with_the_hub_is_told(hub, exported, monkeypatch, no_waiting):
    def refused(message: str, kind: type[Exception] = ValueError, name: str = NAME, **options) -> None:
        with pytest.raises(kind, match=message):
            push(exported, name, **options)

    refused("named like org/name: got 'emma-tiny'", name="emma-tiny")
    refused("named like org/name: got 'org/a b'", name="org/a b")
    refused("has no right to .*org2/x", name="org2/x")
    hub.create("org2/public")
    refused(r"no right to write org2/public \(403\)", HubError, name="org2/public")
    push(exported, NAME)
    refused("org/emma-tiny has no revision 'v2'.*create_branch", FileNotFoundError, revision="v2")
    refused("exists and is public", private=True)
    # One file is missing there, so that there is something to send.
    hub.repositories[NAME].commits[hub.repositories[NAME].branches["main"]].pop("handler.py")
    hub.fail("POST", "/commit/", 412)
    refused(r"Somebody else changed org/emma-tiny .*\(412\)", HubError)
    hub.fail("POST", "/commit/", 413)
    refused(r"The Hub refused to write org/emma-tiny \(413", HubError)
    monkeypatch.setenv("HF_TOKEN", READER)
    refused(r"no right to write org/emma-tiny \(403\)", HubError)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(r"does not accept the token \(401\)", HubError)
    monkeypatch.delenv("HF_TOKEN")
    refused("needs a token: found none. Set HF_TOKEN")


def test_a_branch_that_exists_can_be_pushed_to(hub, exported):
    hub.create(NAME, files={"model.safetensors": b"other"})
    huggingface_hub.HfApi().create_branch(NAME, branch="next")
    push(exported, NAME, revision="next", force=True)
    assert set(hub.files(NAME, "next")) == set(files_of(exported))
    assert set(hub.files(NAME)) == {"model.safetensors"}


def test_no_network(hub, exported, monkeypatch, tmp_path, no_waiting):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        connect(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path / "cache")
        with pytest.raises(HubError, match="The Hub cannot be reached .*Nothing was committed"):
            push(exported, NAME)
        with pytest.raises(HubError, match="The Hub cannot be reached .*HF_ENDPOINT"):
            check(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    new_sessions()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        check(NAME)


# What a user gets.

USER = """
import json, sys
import torch, transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
name, picture, question = sys.argv[1:4]
trust = {"trust_remote_code": True}
messages = [{"role": "user", "content": [{"type": "image", "url": picture}, {"type": "text", "text": question}]}]
pipe = pipeline("image-text-to-text", model=name, **trust)
said = [pipe(text=messages, generate_kwargs={"max_new_tokens": 24, "do_sample": False}, return_full_text=False)]
said = [said[0][0]["generated_text"]]
processor = AutoProcessor.from_pretrained(name, **trust)
classes = [AutoModelForImageTextToText]
if transformers.__version__ < "5":
    from transformers import AutoModelForVision2Seq
    classes.append(AutoModelForVision2Seq)
for cls in classes:
    model = cls.from_pretrained(name, dtype="auto", **trust).eval()
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(dtype=model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    said.append(processor.decode(tokens, skip_special_tokens=True).strip())
print("SAID " + json.dumps([[text.strip() for text in said], type(model).__module__.split(".")[0]]))
"""


def test_a_user_with_transformers_alone_gets_the_models_answer_from_the_hub(hub, exported, tiny, tmp_path):
    push(exported, NAME, private=True)
    picture, question = exported / "widget" / "scene-0.png", "What do you see?"
    online = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = run_python(USER, NAME, picture, question, cwd=tmp_path, importable=False, **online)
    assert done.returncode == 0, done.stderr
    said, module = json.loads(done.stdout.split("SAID ")[-1])
    assert module == "transformers_modules"
    assert len(said) == (3 if transformers.__version__ < "5" else 2)
    assert set(said) == {answer(tiny, picture, question, tokens=24)}


# The check.


def test_an_exported_folder_passes_the_check(exported, capfd):
    assert main(["export", "--check", str(exported)]) == 0
    table = capfd.readouterr().out
    assert "WRONG" not in table
    listed = read_manifest(exported)
    for name, entry in listed.items():
        assert f"| {name} | {entry['size']} | {entry['sha256'][:12]} | ok |" in table
    assert re.search(r"\| weights \|.*\d+ tensors in whole files", table)
    assert re.search(rf"\| answer \|.*'.+' on Transformers {re.escape(transformers.__version__)}", table)


@pytest.mark.slow
def test_a_repository_passes_the_check(hub, exported):
    push(exported, NAME, private=True)
    report = check(NAME, revision="main")
    assert not report.wrong, report.table()
    assert {row.name for row in report.rows} >= {*files_of(exported), "weights", "config", "card", "answer"}
    with pytest.raises(FileNotFoundError, match="org/emma-tiny has no revision 'v9'"):
        check(NAME, revision="v9")
    with pytest.raises(FileNotFoundError, match="The Hub shows no repository org/nothing"):
        check("org/nothing")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        check("nothing")
    with pytest.raises(ValueError, match="has no revisions: got 'main'"):
        check(exported, revision="main")


@pytest.fixture
def unasked(monkeypatch):
    """Checks that do not get as far as a question, which takes a process of its own."""

    def asked(*_) -> None:
        raise AssertionError("code was run that should not have been")

    monkeypatch.setattr("emma_hf.hub.verification._check_answer", asked)


def found(report) -> dict[str, str]:
    return {row.name: row.found for row in report.wrong}


def test_the_check_finds_what_is_damaged_and_runs_no_foreign_code(exported, tmp_path, unasked):
    folder = copied(exported, tmp_path / "folder")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("USER", "RESU"))
    (folder / "tokenizer.json").unlink()
    (folder / "handler.py").unlink()
    (folder / "handler.py").symlink_to(exported / "handler.py")
    (folder / "modeling_emma.py").write_text("print('foreign')\n")
    (folder / "README.md").write_text("---\nlibrary_name: other\n---\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {}}))
    wrong = found(check(folder))
    size = shard.stat().st_size
    assert wrong.pop(shard.name) == f"the manifest says {size + 1} bytes"
    assert "the manifest says sha256" in wrong.pop("chat_template.jinja")
    assert wrong.pop("tokenizer.json") == "missing"
    assert "a link" in wrong.pop("handler.py")
    assert "the manifest says" in wrong.pop("modeling_emma.py")
    assert "the manifest says" in wrong.pop("README.md") and "the manifest says" in wrong.pop("config.json")
    assert "truncated" in wrong.pop("weights")
    assert "auto_map" in wrong.pop("config")
    assert "library_name: transformers" in wrong.pop("card")
    assert "other code than modeling_emma.py" in wrong.pop("answer")
    assert not wrong


def test_a_folder_without_code_or_manifest_is_told(hub, unasked):
    wrong = found(check(EMMA_TINY))
    assert wrong["modeling_emma.py"] == wrong["requirements.txt"] == "missing"
    assert "emma-hf export" in wrong[MANIFEST_NAME]
    assert "not asked: it lacks configuration_emma.py, modeling_emma.py" in wrong["answer"]
    hub.create("org/bare", files={name: (EMMA_TINY / name).read_bytes() for name in files_of(EMMA_TINY)})
    assert "not asked: it lacks configuration_emma.py, modeling_emma.py" in found(check("org/bare"))["answer"]


def test_a_hub_that_serves_other_contents_is_found(hub, exported, tmp_path, monkeypatch):
    push(exported, NAME)
    monkeypatch.setattr("emma_hf.hub.verification._check_answer", lambda *_: None)
    assert not check(NAME).wrong
    # What lies in the cache is changed behind the client's back.
    (path,) = (tmp_path / "cache").glob("*/snapshots/*/requirements.txt")
    path.resolve().write_bytes(path.read_bytes().replace(b"ftfy", b"evil"))
    problem = found(check(NAME))["requirements.txt"]
    assert "the manifest says sha256" in problem and "the Hub says another hash" in problem


def test_a_download_that_breaks_goes_on_where_it_stopped(hub, exported, monkeypatch, no_waiting):
    push(exported, NAME)
    monkeypatch.setattr("emma_hf.hub.verification._check_answer", lambda *_: None)
    # The client writes whole chunks; by default one is larger than these files.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    largest = max(exported.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    hub.fail("BREAK", read_manifest(exported)[largest.name]["sha256"], 0)
    try:
        report = check(NAME)
    except ValueError as error:
        # The client's older line does not try again by itself, but when it is called again.
        assert "cannot be reached" in str(error)
        report = check(NAME)
    assert not report.wrong, report.table()
    ((_, _, _, asked),) = [one for one in hub.requests if one[2] == 206]
    assert 0 < int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) <= largest.stat().st_size // 2


def test_the_commands_answer_mistakes_at_once(exported, capfd):
    for arguments, message in (
        (["export", str(exported)], "takes MODEL FOLDER"),
        (["export", str(exported), "new", "--revision", "main"], "belong to `--check`"),
        (["export", "--check", str(exported), "new"], "takes MODEL alone"),
        (["export", str(exported), str(exported)], "must not exist"),
    ):
        assert main(arguments) == 2
        assert message in capfd.readouterr().err


def test_a_failed_check_ends_with_status_2(capfd, unasked):
    assert main(["export", "--check", str(EMMA_TINY)]) == 2
    captured = capfd.readouterr()
    assert "WRONG: missing" in captured.out and "checks failed" in captured.err

"""Pushing repositories, with the real client of the Hub against a Hub on this machine."""

import json
import os
import shutil
import socket

import huggingface_hub
import pytest
import transformers
from huggingface_hub import constants
from support.hub_client import NAME, READER, connect, new_sessions
from support.models import answer
from support.processes import run_python

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor, HubError
from emma_hf.cli import main
from emma_hf.hub import check, push
from emma_hf.hub.manifest import MANIFEST_NAME, REQUIRED_FILES, files_of, manifest_of, read_manifest


def test_a_push_sends_all_of_it_once_and_afterwards_what_changed(hub, exported, tmp_path):
    address = push(exported, NAME, private=True)
    repository = hub.repositories[NAME]
    assert repository.private
    assert len(repository.commits) == 2
    assert address == f"{hub.url}/{NAME}/commit/{repository.branches['main']}"
    held = hub.files(NAME)
    assert set(held) == set(files_of(exported))
    assert all(blob.path.read_bytes() == (exported / name).read_bytes() for name, blob in held.items())
    assert {name for name, blob in held.items() if blob.large} == {path.name for path in exported.glob("*.safetensors")}

    assert push(exported, NAME) == address
    assert len(repository.commits) == 2
    sent = hub.count("PUT", "/storage/")
    changed = shutil.copytree(exported, tmp_path / "changed")
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
    folder = shutil.copytree(exported, tmp_path / "folder")
    (folder / "extra").symlink_to(tmp_path)
    (folder / "secret.txt").symlink_to(tmp_path / "secret")
    (folder / "more.txt").write_text("not in the manifest")
    push(folder, NAME)
    assert set(hub.files(NAME)) == set(files_of(exported))

    outside = shutil.copytree(folder / "instruction_tokenizer", tmp_path / "outside")
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
    folder = shutil.copytree(exported, tmp_path / "folder")
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
    with pytest.raises(HubError, match="broke off .*Nothing was committed.*Run the command again"):
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
    refused("has no right to .*org2/x", HubError, name="org2/x")
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
    refused("needs a token: found none. Set HF_TOKEN", HubError)


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


def test_a_user_with_transformers_alone_gets_the_models_answer_from_the_hub(hub, exported, tmp_path):
    push(exported, NAME, private=True)
    picture, question = exported / "widget" / "scene-0.png", "What do you see?"
    online = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = run_python(USER, NAME, picture, question, cwd=tmp_path, importable=False, **online)
    assert done.returncode == 0, done.stderr
    said, module = json.loads(done.stdout.split("SAID ")[-1])
    assert module == "transformers_modules"
    assert len(said) == (3 if transformers.__version__ < "5" else 2)
    model = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype="auto").eval()
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    assert set(said) == {answer(model, processor, picture, question, max_new_tokens=24)}

"""Checking folders and repositories, with the real client of the Hub against a Hub on this machine."""

import json
import re
import shutil
from contextlib import suppress

import pytest
import transformers
from huggingface_hub import constants
from support.hub_client import NAME

from emma_hf import EMMA_TINY, HubError, __version__
from emma_hf.cli import main
from emma_hf.hub import check, push
from emma_hf.hub.manifest import MANIFEST_NAME, files_of, read_manifest, sha256_of
from emma_hf.model.code_files_emma import HUB_FILES


def test_an_exported_folder_passes_the_check(exported, capfd):
    assert main(["export", "--check", str(exported)]) == 0
    table = capfd.readouterr().out
    assert "WRONG" not in table
    listed = read_manifest(exported)
    for name, entry in listed.items():
        assert f"| {name} | {entry['size']} | {entry['sha256'][:12]} | ok |" in table
    for name in (*HUB_FILES, "handler.py"):
        assert f"| {name} | {listed[name]['sha256']} | emma-hf {__version__} |" in table
    assert re.search(r"\| weights \|.*\d+ tensors in whole files", table)
    assert re.search(rf"\| answer \|.*'.+' on Transformers {re.escape(transformers.__version__)}", table)


@pytest.mark.slow
def test_a_repository_passes_the_check(hub, exported):
    push(exported, NAME, private=True)
    report = check(NAME, revision="main")
    assert not report.failures, report.table()
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


def failures_of(report) -> dict[str, str]:
    return {row.name: row.found for row in report.failures}


def test_the_check_finds_what_is_damaged_and_runs_no_foreign_code(exported, tmp_path, unasked):
    folder = shutil.copytree(exported, tmp_path / "folder")
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
    wrong = failures_of(check(folder))
    size = shard.stat().st_size
    assert wrong.pop(shard.name) == f"the manifest says {size + 1} bytes"
    assert "the manifest says sha256" in wrong.pop("chat_template.jinja")
    assert wrong.pop("tokenizer.json") == "missing"
    assert "a link" in wrong.pop("handler.py")
    assert "the manifest says" in wrong.pop("modeling_emma.py")
    assert "the manifest says" in wrong.pop("README.md")
    assert "the manifest says" in wrong.pop("config.json")
    assert "truncated" in wrong.pop("weights")
    assert "auto_map" in wrong.pop("config")
    assert "library_name: transformers" in wrong.pop("card")
    assert "other code than modeling_emma.py" in wrong.pop("answer")
    assert not wrong


def test_a_card_that_cannot_be_read_and_a_link_to_itself_are_named(exported, tmp_path, unasked):
    folder = shutil.copytree(exported, tmp_path / "folder")
    (folder / "README.md").write_text("---\ntags: [emma\n---\n")
    (folder / "handler.py").unlink()
    (folder / "handler.py").symlink_to("handler.py")
    (folder / "notes.txt").symlink_to("nowhere")
    wrong = failures_of(check(folder))
    assert "README.md must be YAML that the Hub reads" in wrong["card"]
    assert "handler.py" in wrong


def test_code_that_hides_is_run_only_by_permission(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "folder")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "processor_config.json").read_text())
    auto_map = {"AutoProcessor": "__pycache__/evil.EmmaProcessor"}
    (folder / "processor_config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    report = check(folder)
    answer = failures_of(report)["answer"]
    assert "not asked: this version of emma-hf has other code than __pycache__/evil.py, `auto_map`" in answer
    assert not (tmp_path / "ran").exists()
    assert f"| __pycache__/evil.py | {sha256_of(folder / '__pycache__' / 'evil.py')} | other code |" in report.table()
    check(folder, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_kernels_of_the_hub_are_named(exported, tmp_path, unasked):
    folder = shutil.copytree(exported, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    kernels = {"_attn_implementation": "org/kernel", "_attn_implementation_internal": "sdpa"}
    (folder / "config.json").write_text(json.dumps({**config, **kernels}))
    failures = failures_of(check(folder))
    assert failures["config"] == (
        "`_attn_implementation` 'org/kernel' loads code from elsewhere: remove it; "
        "`_attn_implementation_internal` 'sdpa' loads code from elsewhere: remove it"
    )
    assert "`_attn_implementation` 'org/kernel' in config.json" in failures["answer"]


def test_a_folder_without_code_or_manifest_is_told(hub, unasked):
    wrong = failures_of(check(EMMA_TINY))
    assert wrong["modeling_emma.py"] == wrong["requirements.txt"] == "missing"
    assert "emma-hf export" in wrong[MANIFEST_NAME]
    assert "not asked: it lacks configuration_emma.py, modeling_emma.py" in wrong["answer"]
    hub.create("org/bare", files={name: (EMMA_TINY / name).read_bytes() for name in files_of(EMMA_TINY)})
    assert "not asked: it lacks configuration_emma.py, modeling_emma.py" in failures_of(check("org/bare"))["answer"]


def test_a_hub_that_serves_other_contents_is_found(hub, exported, tmp_path, monkeypatch):
    push(exported, NAME)
    monkeypatch.setattr("emma_hf.hub.verification._check_answer", lambda *_: None)
    assert not check(NAME).failures
    # What lies in the cache is changed behind the client's back.
    (path,) = (tmp_path / "cache").glob("*/snapshots/*/requirements.txt")
    path.resolve().write_bytes(path.read_bytes().replace(b"ftfy", b"evil"))
    problem = failures_of(check(NAME))["requirements.txt"]
    assert "the manifest says sha256" in problem
    assert "the Hub says another hash" in problem


def test_a_download_that_breaks_goes_on_where_it_stopped(hub, exported, monkeypatch, no_waiting):
    push(exported, NAME)
    monkeypatch.setattr("emma_hf.hub.verification._check_answer", lambda *_: None)
    # The client writes whole chunks; by default one is larger than these files.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    largest = max(exported.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    hub.fail("BREAK", read_manifest(exported)[largest.name]["sha256"], 0)
    # The client's older line does not try again by itself, but when it is called again.
    with suppress(HubError):
        check(NAME)
    report = check(NAME)
    assert not report.failures, report.table()
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
    assert "WRONG: missing" in captured.out
    assert "checks failed" in captured.err

"""What would run code that is not the package's: each way is found."""

import json
import shutil
from pathlib import Path

import pytest

from emma_hf.hub.manifest import sha256_of
from emma_hf.hub.untrusted_code import find_untrusted_code, is_packaged_code, kernel_settings, python_files
from emma_hf.model.code_files_emma import AUTO_MAP, HUB_FILES


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "folder", ignore=shutil.ignore_patterns("*.safetensors")))


def write(path: Path, text: str = "print('evil')\n") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def set_keys(path: Path, **values) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    write(path, json.dumps({**known, **values}))


def test_an_exported_folder_has_the_packages_code_alone(folder, exported):
    assert find_untrusted_code(folder) == []
    code = python_files(folder)
    assert set(code) == {*HUB_FILES, "handler.py"}
    assert all(sha256 == sha256_of(exported / name) for name, sha256 in code.items())
    assert all(is_packaged_code(name, sha256) for name, sha256 in code.items())
    # The name decides with the contents.
    assert not is_packaged_code("handler.py", code["modeling_emma.py"])
    assert not is_packaged_code("sub/handler.py", code["handler.py"])


@pytest.mark.parametrize(
    "name",
    [
        "modeling_emma.py", "handler.py", "evil.py", "__pycache__/evil.py", ".hidden/evil.py", "custom_generate/generate.py",
        "instruction_tokenizer/evil.py", "EVIL.PY",
    ],
)  # fmt: skip
def test_a_python_file_of_others(folder, name):
    write(folder / name)
    assert find_untrusted_code(folder) == [name]
    assert python_files(folder)[name] == sha256_of(folder / name)


def test_links(folder, exported, tmp_path):
    # The contents decide.
    (folder / "handler.py").unlink()
    (folder / "handler.py").symlink_to(exported / "handler.py")
    assert find_untrusted_code(folder) == []
    write(tmp_path / "evil.py")
    (folder / "handler.py").unlink()
    (folder / "handler.py").symlink_to(tmp_path / "evil.py")
    (folder / "gone.py").symlink_to(tmp_path / "gone.py")
    (folder / "extra").symlink_to(tmp_path, target_is_directory=True)
    assert find_untrusted_code(folder) == ["gone.py", "handler.py", "the linked folder extra"]


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json",
        "generation_config.json", "instruction_tokenizer/config.json", "instruction_tokenizer/tokenizer_config.json",
        ".hidden/config.json", "added.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("auto_map", "entry"),
    [
        ({"AutoProcessor": "__pycache__/evil.EmmaProcessor"}, "__pycache__/evil.EmmaProcessor"),
        ({"AutoConfig": "org/other--" + AUTO_MAP["AutoConfig"]}, "org/other--configuration_emma.EmmaConfig"),
        ({"AutoTokenizer": ["evil.Tokenizer", None]}, ["evil.Tokenizer", None]),
        (["evil.Tokenizer", None], ["evil.Tokenizer", None]),
    ],
)
def test_an_auto_map_of_others(folder, name, auto_map, entry):
    set_keys(folder / name, auto_map=auto_map)
    assert find_untrusted_code(folder) == [f"`auto_map` {entry!r} in {name}"]
    # Also inside of another config.
    set_keys(folder / name, auto_map={}, inner=[{"auto_map": auto_map}])
    assert find_untrusted_code(folder) == [f"`auto_map` {entry!r} in {name}"]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("adapter_config.json", "base_model_name_or_path", "org/other"),
        ("audio_tokenizer_config.json", "audio_tokenizer_name_or_path", "/other/folder"),
        ("config.json", "custom_pipelines", {"task": {"impl": "org/other--evil.Pipeline"}}),
        ("config.json", "_attn_implementation", "org/kernel"),
        ("config.json", "attn_implementation", {"text_config": "org/kernel@v1:attention"}),
        ("config.json", "_attn_implementation_internal", "sdpa"),
    ],
)
def test_settings_that_load_code_from_elsewhere(folder, name, key, value):
    set_keys(folder / name, **{key: value})
    assert find_untrusted_code(folder) == [f"`{key}` {value!r} in {name}"]


def test_kernels_are_found_inside_of_other_configs():
    assert kernel_settings({"_attn_implementation": "sdpa", "attn_implementation": None}) == []
    inner = {"text_config": {"_attn_implementation": "org/kernel"}}
    assert kernel_settings(inner) == ["`_attn_implementation` 'org/kernel'"]


@pytest.mark.parametrize("text", ["{", "\ufeff{}", "[" * 200_000])
def test_json_that_cannot_be_read(folder, text):
    (folder / "added.json").write_text(text, encoding="utf-8")
    assert find_untrusted_code(folder) == ["unreadable settings in added.json"]

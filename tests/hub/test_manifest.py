"""The manifest: names, sizes and hashes of a repository's files."""

import hashlib
import json
from types import SimpleNamespace

import pytest

from emma_hf import EmmaError, __version__
from emma_hf.hub.manifest import MANIFEST_NAME, files_of, is_own_file, is_remote_file, manifest_of, read_manifest

CONTENTS = b"Hello, World!"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    for name in ("a.txt", "sub/b.txt", ".hidden", ".git/config", "__pycache__/c.pyc", MANIFEST_NAME):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(CONTENTS)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "d.txt").write_bytes(CONTENTS)
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "linked.txt").symlink_to(tmp_path / "outside" / "d.txt")
    return folder


def test_the_manifest_lists_the_visible_files_but_itself(folder):
    assert files_of(folder) == ["a.txt", "linked.txt", MANIFEST_NAME, "sub/b.txt"]
    entry = {"size": 13, "sha256": hashlib.sha256(CONTENTS).hexdigest()}
    files = {"a.txt": entry, "linked.txt": entry, "sub/b.txt": entry}
    manifest = manifest_of(folder)
    assert manifest == {"format": 1, "emma_hf": __version__, "files": files}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert read_manifest(folder) == files


def test_a_folder_without_a_manifest(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"files": []}', '{"files": {"a": {"size": 1}}}', '{"files": {"a": 1}}']
)
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(EmmaError, match="manifest.json is not a manifest of this package .*Export the model again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../a", "sub/../../a", "sub\\a"])
def test_a_manifest_names_files_of_its_own_folder_alone(tmp_path, name):
    entry = {"size": 1, "sha256": "0"}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({"files": {name: entry}}))
    with pytest.raises(EmmaError, match="must name files of its own folder"):
        read_manifest(tmp_path)


def test_a_link_is_not_the_folders_own_file(folder):
    own = {
        name: is_own_file(folder / name, folder) for name in ("a.txt", "sub/b.txt", "linked.txt", "linked/d.txt", "no")
    }
    assert own == {"a.txt": True, "sub/b.txt": True, "linked.txt": False, "linked/d.txt": False, "no": False}


def test_a_file_of_the_hub_is_known_by_the_hash_that_the_hub_reports(folder):
    path, sha256 = folder / "a.txt", hashlib.sha256(CONTENTS).hexdigest()
    # The example of `git hash-object` in the documentation of the Hub's library.
    small = SimpleNamespace(lfs=None, blob_id="b45ef6fec89518d314f546fd6c3025367b721684")
    large = SimpleNamespace(lfs=SimpleNamespace(sha256=sha256), blob_id="0" * 40)
    assert is_remote_file(path, small, sha256)
    assert is_remote_file(path, large, sha256)
    assert not is_remote_file(path, None, sha256)
    assert not is_remote_file(path, SimpleNamespace(lfs=None, blob_id=sha256), sha256)
    assert not is_remote_file(path, large, "0" * 64)

"""`convert`, as a user types it."""

import resource

import pytest
import torch

from emma_hf import EmmaConfig, EmmaProcessor
from emma_hf.cli import main
from emma_hf.storage.tensors import read_checkpoint


@pytest.fixture
def little_space():
    """No file can grow beyond 100 kB: writing on fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


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


def test_fewer_visual_tokens_than_the_authors_keep(reference, converted, tmp_path, capfd):
    source = str(reference / "original")
    command = ["convert", source, str(tmp_path / "fewer"), "--clip", f"{source}/clip", "--visual-tokens"]
    assert main([*command, "6"]) == 0
    assert EmmaConfig.from_pretrained(tmp_path / "fewer").image_seq_length == 6
    assert EmmaProcessor.from_pretrained(tmp_path / "fewer").image_seq_length == 6
    # Every weight is there, and may be used again.
    assert EmmaProcessor.from_pretrained(tmp_path / "fewer", visual_tokens=None).image_seq_length == 16
    whole, fewer = read_checkpoint(converted), read_checkpoint(tmp_path / "fewer")
    assert all(torch.equal(tensor.load(), fewer[name].load()) for name, tensor in whole.items())
    # What is wrong is said before anything is written.
    (tmp_path / "fewer").rename(tmp_path / "done")
    for number, message in (("0", "`--visual-tokens` must be at least 1: got 0."), ("17", "from 1 to 16,")):
        assert main([*command, number]) == 2
        assert message in capfd.readouterr().err
    assert main(["convert", "--reverse", str(converted), str(tmp_path / "back"), "--visual-tokens", "6"]) == 2
    assert "The authors' code keeps all visual tokens: drop `--visual-tokens`" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_full_disk_is_one_line_and_leaves_nothing(reference, converted, tmp_path, capfd, little_space, reverse):
    source = reference / "original"
    arguments = ["--reverse", converted] if reverse else ["--clip", source / "clip", source]
    assert main(["convert", *map(str, arguments), str(tmp_path / "output")]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("emma-hf: ")
    assert "File too large" in last
    assert not list(tmp_path.iterdir())


def test_a_link_that_points_nowhere_is_refused_before_the_work(reference, tmp_path, capfd):
    (tmp_path / "output").symlink_to(tmp_path / "nowhere" / "else")
    source = str(reference / "original")
    assert main(["convert", source, str(tmp_path / "output"), "--clip", f"{source}/clip"]) == 2
    assert capfd.readouterr().err.splitlines() == [
        f"emma-hf: OUTPUT must not exist yet: {tmp_path / 'output'} does. Name another folder, or remove it."
    ]

"""`convert`, as a user types it."""

import resource

import pytest

from emma_hf.cli import main


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

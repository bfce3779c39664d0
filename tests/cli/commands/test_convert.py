"""`convert`, as a user types it."""

from emma_hf.cli import main


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

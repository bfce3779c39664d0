"""The structure of the model's files, by the rules of Transformers' own linter for models (`transformers-mlinter`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlinter", reason="needs the extra `lint`")
ROOT = Path(__file__).parents[2]
# Left on purpose: the license stands in one file, and `auto_docstring` is Transformers' own and not the same in each
# version.
LEFT = {"TRF028", "TRF057"}


def test_the_models_files_keep_the_rules_of_transformers(tmp_path):
    command = [sys.executable, "-m", "mlinter", "--no-progress", "--no-cache", "--output-json", tmp_path / "findings"]
    subprocess.run([*command, ROOT / "src" / "emma_hf" / "model"], cwd=tmp_path, capture_output=True, check=False)
    findings = json.loads((tmp_path / "findings").read_text())["findings"]
    # It did look: these two are always there.
    assert {finding["rule"] for finding in findings} >= LEFT
    assert [finding["message"] for finding in findings if finding["rule"] not in LEFT] == []

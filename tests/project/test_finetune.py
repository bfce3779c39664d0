"""`examples/finetune.py`, the script to copy: what it trains and saves loads again and has learned."""

import runpy
from pathlib import Path

import torch
from support.rows import save_rows

from emma_hf import EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.data import ConversationDataset, DataCollator

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"


def test_the_script_trains_and_saves_a_model(trainable, reference, tmp_path):
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 80
    # PEP 723: what `uv run` and `pipx run` install.
    assert text.startswith("# /// script\n")
    assert '# dependencies = ["emma-hf[train]"]\n# ///\n' in text
    path, images, output = save_rows(tmp_path / "rows.json"), reference / "images", tmp_path / "out"
    arguments = [str(trainable), str(path), str(output), "--image-folder", str(images), "--epochs", "25"]
    torch.manual_seed(0)
    runpy.run_path(str(SCRIPT))["main"](arguments)
    losses = []
    for folder in (trainable, output):
        processor = EmmaProcessor.from_pretrained(folder)
        rows = ConversationDataset(path, processor, images)
        model = EmmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            losses.append(model(**DataCollator(processor)([rows[row] for row in range(len(rows))])).loss.item())
    assert losses[1] < losses[0] - 0.1, losses

"""Figures of a training run."""

import numpy as np
import pytest
from PIL import Image

from emma_hf.training import plot_loss


def test_the_loss_is_drawn(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "grad_norm": 1.0}, {"step": 2, "eval_loss": 1.5}]
    plot_loss(history, tmp_path / "loss.png")
    picture = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).reshape(-1, 3).astype(int)
    # Both curves are there, in matplotlib's first two colours.
    for colour in ((31, 119, 180), (255, 127, 14)):
        assert (np.abs(picture - colour).sum(-1) < 10).sum() > 100
    plot_loss(history, tmp_path / "loss.svg", unit="bits per token", title="Stage 1")
    text = (tmp_path / "loss.svg").read_text()
    # matplotlib writes each text beside its outlines.
    assert all(f"<!-- {words} -->" in text for words in ("Stage 1", "optimizer step", "loss (bits per token)"))
    with pytest.raises(ValueError, match="There is no loss to draw"):
        plot_loss([{"step": 1, "train_runtime": 2.0}], tmp_path / "none.png")

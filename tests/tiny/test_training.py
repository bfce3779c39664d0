"""emma-tiny's training from nothing, in small."""

import json

import numpy as np
import pytest
import torch
from transformers import CLIPModel, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from emma_hf import EmmaForConditionalGeneration
from emma_hf.tiny.recipe import SMOKE
from emma_hf.tiny.rows import PackedQuestionsCollator, TinyEmmaDataset
from emma_hf.tiny.training import SequentialEmmaTrainer, cross_entropy_excluding, train_tiny


def losses(folder) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.once
@pytest.mark.slow
def test_smoke_training_learns_in_every_phase_and_does_none_twice(tmp_path):
    folder = train_tiny(tmp_path, SMOKE, disable_tqdm=True)
    for phase in ("clip", "pretrain", "finetune"):
        seen = losses(tmp_path / phase)
        assert np.mean(seen[-2:]) < 0.97 * seen[0], (phase, seen)
        assert (tmp_path / phase / "loss.png").is_file()
    model = EmmaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12_000_000
    # The towers are CLIP's, unmoved.
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    ours = dict(model.named_parameters())
    for name, weight in clip.named_parameters():
        tower, _, rest = name.partition(".")
        if tower in ("vision_model", "text_model"):
            module = "vision_tower" if tower == "vision_model" else "instruction_encoder"
            (found,) = [key for key in ours if key.startswith(f"model.{module}.") and key.endswith(f".{rest}")]
            assert torch.equal(ours[found], weight.bfloat16()), name
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model.safetensors") if path.parent != folder}
    train_tiny(tmp_path, SMOKE)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_what_is_never_shown_is_not_learned_to_be_wrong(untrained, tmp_path):
    processor, model = untrained
    features = np.random.default_rng(0).normal(size=(5, 64, 128)).astype(np.float16)
    rows = TinyEmmaDataset("finetune", features, processor, 80, batch_size=4, seed=0)
    batch = PackedQuestionsCollator(processor)([rows[index] for index in range(52, 56)])
    marked = batch["excluded_tokens"][:, 1:].flatten().tolist()
    assert sum(other >= 0 for other in marked) > 5
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    trainer = SequentialEmmaTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)
    loss = trainer.compute_loss(model, dict(batch))
    rest = {name: values for name, values in batch.items() if name not in ("labels", "excluded_tokens")}
    logits = model(**rest).logits.detach().requires_grad_()
    expected = []
    for row, label, other in zip(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten().tolist(), marked):
        if label != -100:
            among = [token for token in range(len(row)) if token != other]
            expected.append(row[among].logsumexp(0) - row[label])
    assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-5)
    outputs = CausalLMOutput(logits=logits)
    whole = cross_entropy_excluding(outputs, (batch["labels"], batch["excluded_tokens"]), 7)
    assert torch.allclose(whole, torch.stack(expected).sum() / 7, atol=1e-4)
    # What takes no part gets no gradient; where nothing is marked it is the model's own loss.
    (gradient,) = torch.autograd.grad(whole, logits)
    for (row, place), other in zip(np.ndindex(4, logits.shape[1] - 1), marked):
        assert other < 0 or gradient[row, place, other] == 0 != gradient[row, place].abs().sum()
    nothing = torch.full_like(batch["excluded_tokens"], -1)
    assert torch.allclose(
        cross_entropy_excluding(outputs, (batch["labels"], nothing)), model(**rest, labels=batch["labels"]).loss
    )


def test_its_linear_layers_can_be_packed_in_4_bit(untrained):
    _, model = untrained
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert (module.in_features % 64, module.out_features % 64) == (0, 0), name

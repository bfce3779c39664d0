"""emma-tiny while it is trained: the same loss and gradients with less to compute."""

import numpy as np
import pytest
import torch

from emma_hf import EmmaError, EmmaForConditionalGeneration
from emma_hf.tiny.learner import TinyLearner, cross_entropy_excluding
from emma_hf.tiny.rows import RowKind, TinyEmmaCollator, TinyEmmaDataset


@pytest.fixture(scope="module")
def rows(untrained):
    features = np.random.default_rng(0).normal(size=(5, 64, 128)).astype(np.float16)
    return TinyEmmaDataset("finetune", features, untrained[0], 80, batch_size=4, seed=0)


@pytest.fixture(scope="module")
def untrained(untrained):
    """The untrained model as a learner."""
    processor, model = untrained
    learner = TinyLearner(model.config).eval()
    learner.load_state_dict(model.state_dict())
    return processor, learner


def batch_of(rows, kind: RowKind, processor, count: int = 4) -> dict[str, torch.Tensor]:
    indices = [index for index in range(len(rows)) if rows.kind(index) is kind][:count]
    return TinyEmmaCollator(processor)([rows[index] for index in indices])


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", [RowKind.QUESTION, RowKind.CHAT])
def test_loss_and_gradients_are_those_of_whole_rows(untrained, rows, kind):
    processor, learner = untrained
    model = EmmaForConditionalGeneration(learner.config)
    model.load_state_dict(learner.state_dict())
    batch = batch_of(rows, kind, processor)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
    nothing = torch.full_like(batch["excluded_tokens"], -1)
    outputs = learner(**{**batch, "excluded_tokens": nothing})
    whole = model(**{name: values for name, values in batch.items() if name != "excluded_tokens"})
    assert torch.allclose(outputs.loss, whole.loss, atol=1e-5)
    learned = batch["labels"][:, 1:] != -100
    assert torch.allclose(outputs.logits, whole.logits[:, :-1][learned], atol=1e-5)
    found, expected = gradients(learner, outputs.loss), gradients(model, whole.loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * max(1, gradient.abs().max())), name
    by_seven = learner(**{**batch, "excluded_tokens": nothing}, num_items_in_batch=7)
    assert torch.allclose(by_seven.loss * 7, whole.loss * learned.sum(), rtol=1e-5)


def test_what_is_never_shown_is_not_learned_to_be_wrong(untrained, rows):
    processor, learner = untrained
    batch = batch_of(rows, RowKind.QUESTION, processor, 24)
    labels = batch["labels"]
    marked = batch["excluded_tokens"][labels != -100]
    assert (marked >= 0).sum() > 2
    outputs = learner(**batch)
    logits = outputs.logits.detach().requires_grad_()
    targets = labels[labels != -100]
    expected = []
    for row, label, other in zip(logits, targets.tolist(), marked.tolist()):
        among = [token for token in range(len(row)) if token != other]
        expected.append(row[among].logsumexp(0) - row[label])
    assert torch.allclose(outputs.loss, torch.stack(expected).mean(), atol=1e-5)
    # What takes no part gets no gradient.
    (gradient,) = torch.autograd.grad(cross_entropy_excluding(logits, targets, marked), logits)
    for row, other in zip(gradient, marked.tolist()):
        assert other < 0 or row[other] == 0 != row.abs().sum()


def test_rows_that_begin_differently_are_refused(untrained, rows):
    processor, learner = untrained
    batch = batch_of(rows, RowKind.QUESTION, processor)
    batch["input_ids"][1, 3] += 1
    with pytest.raises(EmmaError, match="must have the same tokens in front of their image"):
        learner(**batch)


def test_what_is_saved_is_an_emma(untrained, tmp_path):
    _, learner = untrained
    learner.save_pretrained(tmp_path)
    loaded = EmmaForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in learner.state_dict().items())

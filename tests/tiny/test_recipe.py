"""What all phases share: rows in order, and bfloat16 where it is fast."""

import pytest
import torch
from torch.utils.data import SequentialSampler

from emma_hf.tiny.recipe import SMOKE, Budget, SequentialTrainer, has_fast_bfloat16, stable_schedule, training_arguments


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"bf16": True}, True),
    ],
)
def test_bfloat16_is_for_processors_that_multiply_in_it(capabilities, fast):
    assert has_fast_bfloat16(capabilities) is fast


def test_rows_come_in_order_and_matrices_have_their_own_learning_rate(tmp_path, untrained):
    _, model = untrained
    args = training_arguments(tmp_path, 60, 8, 1e-3, seed=5, overrides={"bf16": False, "logging_steps": 7})
    expected = (60, 8, 1e-3, 5, False, 7, 20)
    given = args.max_steps, args.per_device_train_batch_size, args.learning_rate, args.seed, args.bf16
    assert (*given, args.logging_steps, args.save_steps) == expected
    trainer = SequentialTrainer(model=model, args=args, train_dataset=list(range(16)))
    assert isinstance(trainer._get_train_sampler(), SequentialSampler)
    rates = [part.param_groups[0]["lr"] for part in trainer.create_optimizer().parts]
    assert rates == [0.5e-3, 1e-3]


def rates(steps: int, folder) -> list[float]:
    args = training_arguments(folder, steps, 8, 2e-3, seed=0, overrides={"bf16": False, **stable_schedule(steps)})
    trainer = SequentialTrainer(model=torch.nn.Linear(2, 2), args=args, train_dataset=list(range(8)))
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=args.learning_rate)
    schedule = trainer.create_scheduler(steps)
    found = []
    for _ in range(steps):
        found.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        schedule.step()
    return found


def test_the_rate_of_the_second_stage_depends_on_its_length_only_at_the_end(tmp_path):
    short, long = rates(2000, tmp_path), rates(4000, tmp_path)
    assert short[:1600] == long[:1600]
    assert [short[step] for step in (0, 75, 300, 1600)] == pytest.approx([0, 0.5e-3, 2e-3, 2e-3])
    # One minus the square root of the share that is done.
    assert [short[step] for step in (1700, 1999)] == pytest.approx([1e-3, 2e-3 * (1 - (399 / 400) ** 0.5)])
    assert [rates(24, tmp_path)[step] for step in (0, 5, 18, 19)] == pytest.approx([0, 2e-3, 2e-3, 2e-3])


def test_the_smoke_budget_is_a_small_one():
    for name in ("clip_steps", "pictures", "pretrain_rows", "finetune_rows"):
        assert 0 < 20 * getattr(SMOKE, name) < getattr(Budget(), name)

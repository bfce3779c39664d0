"""Two processes train, evaluate and answer by `Trainer`, for `test_many_processes.py`."""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import GenerationConfig, Seq2SeqTrainingArguments

from emma_hf import EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.data import ConversationDataset, DataCollator
from emma_hf.training import EmmaTrainer, prepare


def answer_and_train(folder: Path, model_folder: Path, images: Path, end: int, sharded: bool, processes: int) -> dict:
    """Predictions, metrics, and the weights of one step, of rows that the processes take in turns."""
    processor = EmmaProcessor.from_pretrained(model_folder)
    model = prepare(EmmaForConditionalGeneration.from_pretrained(model_folder), "finetune").eval()
    rows = ConversationDataset(folder / "rows.json", processor, images)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for module in list(model.modules()):
            if type(module).__name__ in ("LlamaDecoderLayer", "CLIPEncoderLayer", "EmmaModalityAdaptation"):
                fully_shard(module)
        fully_shard(model)

    def trainer(**kwargs) -> EmmaTrainer:
        args = Seq2SeqTrainingArguments(
            output_dir=str(folder / "out"), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
            per_device_eval_batch_size=2 // processes, per_device_train_batch_size=2 // processes, max_steps=1, learning_rate=0.1,
            lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, logging_steps=1, **kwargs,
        )  # fmt: skip
        data = {"train_dataset": rows, "eval_dataset": rows, "data_collator": DataCollator(processor)}
        return EmmaTrainer(
            model=model, args=args, compute_metrics=lambda seen: {"rows": len(seen.predictions)},
            group_by_modality=False, **data,
        )  # fmt: skip

    # An odd number: the processes take one row twice, which must not be seen in the answers.
    some = Subset(rows, range(len(rows) - 1))
    config = GenerationConfig(eos_token_id=end, pad_token_id=0, max_new_tokens=6)
    answers = trainer(predict_with_generate=True, generation_config=config).predict(some)
    seen: dict[str, Any] = {"answers": answers.predictions, "expected": answers.label_ids}
    if not sharded:
        teacher_forced = trainer()
        seen["training_loss"] = teacher_forced.train().training_loss
        seen["weights"] = {name: parameter.detach() for name, parameter in model.named_parameters()}
        logits = teacher_forced.predict(some)
        seen |= {"logits": logits.predictions, "labels": logits.label_ids}
        metrics = teacher_forced.evaluate()
        seen["metrics"] = {name: metrics[f"eval_{name}"] for name in ("loss", "rows")}
    return seen


def main() -> None:
    folder, model_folder, images = map(Path, sys.argv[1:4])
    # A fork has imported what this process has.
    child = os.fork()
    rank = int(child == 0)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = "0"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=100)
    )
    for sharded in (True, False):
        seen = answer_and_train(folder, model_folder, images, int(sys.argv[4]), sharded, processes=2)
        if rank == 0:
            torch.save(seen, folder / f"{'sharded' if sharded else 'ddp'}.pt")
    torch.distributed.destroy_process_group()
    if child:
        sys.exit(os.waitpid(child, 0)[1] != 0)

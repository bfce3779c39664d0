"""Training of emma-tiny from nothing: tokenizers, a small CLIP, and EMMA's two stages on top of it.

All data are scenes of [`emma_hf.tiny`]. Each phase leaves its result in the output folder and is skipped where there is
one; a phase that was killed continues from its last complete checkpoint.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import CLIPModel, set_seed

from ..data.conversations import IGNORE_INDEX
from ..model.compat_emma import unwrap_clip_model
from ..model.configuration_emma import EmmaConfig
from ..model.errors_emma import EmmaError
from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import EmmaProcessor
from ..training.checkpoints import IncompleteCheckpointCallback
from ..training.plots import figure_class
from ..training.stages import prepare
from ..training.trainer import EmmaTrainer
from .clip import train_clip
from .recipe import PROMPT_VOCABULARY, SMOKE, TEXT, Budget, SequentialTrainer, run_phase, training_arguments
from .rows import PackedQuestionsCollator, TinyEmmaDataset, vision_features
from .tokenizers import tiny_processor


def train_tiny(
    output: str | Path, budget: Budget | None = None, seed: int = 0, compiled: bool = False, **arguments: Any
) -> Path:
    """Train emma-tiny and save it in `output/emma-tiny`.

    Several processes (torchrun) share the steps of each phase; on a CPU one per core is the fastest.

    Args:
        output: folder for the phases: `tokenizers`, `clip`, `pretrain`, `finetune`, `emma-tiny`.
        budget: length and learning rates of training. Default: those of the recipe.
        seed: seed of the initial weights and the data.
        compiled: whether to compile the language model for the second stage, which needs a C++ compiler.
        **arguments: arguments of `TrainingArguments` for every phase.

    Returns:
        The folder of the model.

    Raises:
        MissingPackageError: matplotlib is not installed.
        EmmaError: the rows of a step are no multiple of the number of processes.
    """
    figure_class()
    budget, output = budget or Budget(), Path(output)
    processes = PartialState(cpu=not torch.cuda.is_available())
    for rows in (budget.clip_groups, budget.batch_size):
        if rows % processes.num_processes:
            raise EmmaError(
                f"The {rows} rows of a step must be a multiple of the number of processes: got "
                f"{processes.num_processes} processes."
            )
    with processes.main_process_first():
        processor = tiny_processor(output / "tokenizers")
    phases = {
        "clip": lambda: train_clip(output / "clip", processor, budget, seed, arguments),
        "pretrain": lambda: _train_stage("pretrain", output, processor, budget, seed, False, arguments),
        "finetune": lambda: _train_stage("finetune", output, processor, budget, seed, compiled, arguments),
    }
    seconds_path = output / "seconds.json"
    for name, phase in phases.items():
        done = output / name / "done"
        if done.is_file():
            continue
        start = time.time()
        phase()
        processes.wait_for_everyone()
        if processes.is_main_process:
            seconds = json.loads(seconds_path.read_text()) if seconds_path.is_file() else {}
            seconds[name] = round(seconds.get(name, 0) + time.time() - start)
            seconds_path.write_text(json.dumps(seconds))
            done.touch()
        processes.wait_for_everyone()
    if processes.is_main_process:
        model = EmmaForConditionalGeneration.from_pretrained(output / "finetune", dtype=torch.bfloat16)
        model.save_pretrained(output / "emma-tiny")
        processor.save_pretrained(output / "emma-tiny")
    processes.wait_for_everyone()
    return output / "emma-tiny"


class SequentialEmmaTrainer(SequentialTrainer, EmmaTrainer):
    """[`EmmaTrainer`] with rows in order, which does not learn that what is never shown is never right."""

    adam_share = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=cross_entropy_excluding, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """[`cross_entropy_excluding`] of the labels and the `excluded_tokens` beside them."""
        # `Trainer` passes `labels` on to `compute_loss_func` as they are.
        inputs["labels"] = inputs["labels"], inputs.pop("excluded_tokens")
        return super().compute_loss(model, inputs, *args, **kwargs)


def cross_entropy_excluding(
    outputs: Any, labels: tuple[torch.Tensor, torch.Tensor], num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of the next token, with one token excluded from the softmax where that is asked for.

    Args:
        outputs: outputs of the model, with `logits` (rows, tokens, vocabulary).
        labels: labels, and at each the excluded token or a negative number; both int64 (rows, tokens), not yet
            shifted.
        num_items_in_batch: divisor of the sum. Default: the number of labels that are not ignored.
    """
    targets, excluded = (each[:, 1:] for each in labels)
    logits = outputs.logits[:, :-1].float()
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    logits = logits.masked_fill(excluded[..., None] == vocabulary, -math.inf)
    total = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return total / ((targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)


def untrained_tiny(folder: Path, processor: EmmaProcessor, seed: int) -> EmmaForConditionalGeneration:
    """EMMA with the two towers of the CLIP in a folder and random weights in everything else."""
    set_seed(seed)
    clip = CLIPModel.from_pretrained(folder)
    config = EmmaConfig(
        vision_config=clip.config.vision_config,
        instruction_config=clip.config.text_config,
        text_config={
            "model_type": "llama",
            **TEXT,
            "vocab_size": PROMPT_VOCABULARY + 1,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        image_token_index=PROMPT_VOCABULARY,
        instruction_length=processor.instruction_length,
    )
    model = EmmaForConditionalGeneration(config)
    unwrap_clip_model(model.model.vision_tower).load_state_dict(unwrap_clip_model(clip.vision_model).state_dict())
    unwrap_clip_model(model.model.instruction_encoder).load_state_dict(unwrap_clip_model(clip.text_model).state_dict())
    return model


def _train_stage(
    stage: str, output: Path, processor: EmmaProcessor, budget: Budget, seed: int, compiled: bool, overrides: dict
) -> None:
    if stage == "pretrain":
        model = untrained_tiny(output / "clip", processor, seed)
        rows, rate = budget.pretrain_rows, budget.pretrain_rate
    else:
        # At these small sizes the plain attention is faster than the fused one.
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        model = EmmaForConditionalGeneration.from_pretrained(output / "pretrain", **options)
        rows, rate = budget.finetune_rows, budget.finetune_rate
    if torch.cuda.is_available():
        model.cuda()
    features = vision_features(model, processor, budget.pictures, output / "vision_features.f16")
    model = prepare(model, stage)
    if compiled:
        model.model.language_model.compile(dynamic=False)
    trainer = SequentialEmmaTrainer(
        model=model,
        args=training_arguments(output / stage, rows // budget.batch_size, budget.batch_size, rate, seed, overrides),
        train_dataset=TinyEmmaDataset(stage, features, processor, rows, budget.batch_size, seed),
        data_collator=PackedQuestionsCollator(processor),
        processing_class=processor,
        group_by_modality=False,
        callbacks=[IncompleteCheckpointCallback()],
    )
    run_phase(trainer, output / stage, "nats per token")


__all__ = ["SMOKE", "Budget", "tiny_processor", "train_tiny", "untrained_tiny"]

"""Training of emma-tiny from nothing: tokenizers, a small CLIP, and EMMA's two stages on top of it.

All data are scenes of [`emma_hf.tiny`]. Each phase leaves its result in the output folder and is skipped where there is
one; a phase that was killed continues from its last complete checkpoint.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import CLIPModel, set_seed

from ..model.compat_emma import unwrap_clip_model
from ..model.configuration_emma import EmmaConfig
from ..model.errors_emma import EmmaError
from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import EmmaProcessor
from ..storage.folders import read_json, write_json
from ..training.checkpoints import IncompleteCheckpointCallback
from ..training.plots import figure_class
from ..training.stages import prepare
from ..training.trainer import EmmaTrainer
from .clip import train_clip
from .curve import CurveCallback, QuickAccuracy, plot_curve, read_curve
from .learner import TinyLearner
from .recipe import (
    PROMPT_VOCABULARY,
    TEXT,
    Budget,
    SequentialTrainer,
    run_phase,
    stable_schedule,
    training_arguments,
)
from .rows import TinyEmmaCollator, TinyEmmaDataset, vision_features
from .tokenizers import tiny_processor


def train_tiny(output: str | Path, budget: Budget | None = None, seed: int = 0, **arguments: Any) -> Path:
    """Train emma-tiny and save it in `output/emma-tiny`.

    A run that was stopped, at any time, goes on when it is called again with the same arguments. Several processes
    (torchrun) share the steps of each phase; on a CPU one per core is the fastest.

    Args:
        output: folder for the phases: `tokenizers`, `clip`, `pretrain`, `finetune`, `emma-tiny`; for `curve.jsonl` (see
            [`~emma_hf.tiny.curve.CurveCallback`]) and its picture `curve.png`.
        budget: length and learning rates of training. Default: those of the recipe.
        seed: seed of the initial weights and the data; the images of both stages are the same for every seed.
        **arguments: arguments of `TrainingArguments` for every phase.

    Returns:
        The folder of the model.

    Raises:
        MissingPackageError: matplotlib is not installed.
        EmmaError: the rows or groups of a step are no multiple of the number of processes, one process sees several
            GPUs, or `output` holds a run of another budget or seed.
    """
    figure_class()
    budget, output = budget or Budget(), Path(output)
    processes = PartialState(cpu=not torch.cuda.is_available())
    for name, count in (("groups", budget.clip_groups), ("rows", budget.batch_size)):
        if count % processes.num_processes:
            raise EmmaError(
                f"The {count} {name} of a step must be a multiple of the number of processes: got "
                f"{processes.num_processes} processes."
            )
    if processes.num_processes == 1 and torch.cuda.device_count() > 1:
        raise EmmaError(
            f"One process must see one GPU, or its steps have several times the rows: got {torch.cuda.device_count()}. "
            "Start a process for each with torchrun, or choose one with CUDA_VISIBLE_DEVICES."
        )
    with processes.main_process_first():
        _check_recipe(output, {"seed": seed, **asdict(budget)})
        processor = tiny_processor(output / "tokenizers")
    phases = {
        "clip": lambda: train_clip(output / "clip", processor, budget, seed, arguments),
        "pretrain": lambda: _train_stage("pretrain", output, processor, budget, seed, arguments),
        "finetune": lambda: _train_stage("finetune", output, processor, budget, seed, arguments),
    }
    for name, phase in phases.items():
        done = output / name / "done"
        if not done.is_file():
            phase()
            processes.wait_for_everyone()
            if processes.is_main_process:
                done.touch()
            processes.wait_for_everyone()
    if processes.is_main_process:
        model = EmmaForConditionalGeneration.from_pretrained(output / "finetune", dtype=torch.bfloat16)
        model.save_pretrained(output / "emma-tiny")
        processor.save_pretrained(output / "emma-tiny")
        plot_curve(read_curve(output / "curve.jsonl"), output / "curve.png")
    processes.wait_for_everyone()
    return output / "emma-tiny"


def _check_recipe(output: Path, recipe: dict[str, Any]) -> None:
    """Refuse to go on with another recipe than the one that a folder was begun with."""
    path = output / "recipe.json"
    if not path.is_file():
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, recipe)
    begun = read_json(path)
    differing = [name for name in recipe if begun.get(name) != recipe[name]]
    if differing:
        name = differing[0]
        raise EmmaError(
            f"The run in {output} was begun with {name}={begun.get(name)}: got {recipe[name]}. Choose another folder, "
            "or go on with what it was begun with."
        )


class SequentialEmmaTrainer(SequentialTrainer, EmmaTrainer):
    """[`EmmaTrainer`] with rows in order."""

    adam_share = 1.0


def untrained_tiny(
    folder: Path,
    processor: EmmaProcessor,
    seed: int,
    model_class: type[EmmaForConditionalGeneration] = EmmaForConditionalGeneration,
) -> EmmaForConditionalGeneration:
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
    model = model_class(config)
    unwrap_clip_model(model.model.vision_tower).load_state_dict(unwrap_clip_model(clip.vision_model).state_dict())
    unwrap_clip_model(model.model.instruction_encoder).load_state_dict(unwrap_clip_model(clip.text_model).state_dict())
    return model


def _train_stage(
    stage: str, output: Path, processor: EmmaProcessor, budget: Budget, seed: int, overrides: dict
) -> None:
    if stage == "pretrain":
        model = untrained_tiny(output / "clip", processor, seed, TinyLearner)
        rows, rate = budget.pretrain_rows, budget.pretrain_rate
    else:
        # At these small sizes the plain attention is faster than the fused one.
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        model = TinyLearner.from_pretrained(output / "pretrain", **options)
        rows, rate = budget.finetune_rows, budget.finetune_rate
        overrides = {**stable_schedule(rows // budget.batch_size), **overrides}
    if torch.cuda.is_available():
        model.cuda()
    features = vision_features(model, processor, budget.pictures, output / "vision_features.f16")
    model = prepare(model, stage)
    curve = CurveCallback(
        output / "curve.jsonl", stage, QuickAccuracy(model, processor) if stage == "finetune" else None
    )
    trainer = SequentialEmmaTrainer(
        model=model,
        args=training_arguments(output / stage, rows // budget.batch_size, budget.batch_size, rate, seed, overrides),
        train_dataset=TinyEmmaDataset(stage, features, processor, rows, budget.batch_size, seed),
        data_collator=TinyEmmaCollator(processor),
        processing_class=processor,
        group_by_modality=False,
        callbacks=[IncompleteCheckpointCallback(), curve],
    )
    run_phase(trainer, output / stage, "nats per token")


__all__ = ["train_tiny", "untrained_tiny"]

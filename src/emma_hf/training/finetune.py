"""`emma-hf train`: the authors' two stages, LoRA and QLoRA, on one process or many.

    emma-hf train --stage lora --model emma-7b --train-data rows.json --output-dir out
    accelerate launch -m emma_hf train --stage finetune --model emma-7b --train-data rows.json --output-dir out

The defaults are the authors' hyper-parameters of the stage. A run that is started again resumes from its last complete
checkpoint. Every argument of `TrainingArguments` is an option.
"""

import os
import pickle
import shutil
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, HfArgumentParser, TrainingArguments, set_seed
from transformers.utils import logging

from ..data.collator import DataCollator
from ..data.datasets import ConversationDataset
from ..model.errors_emma import EmmaError
from ..model.modeling_emma import EmmaForConditionalGeneration, is_sharded
from ..model.processing_emma import EmmaProcessor
from .callbacks import SampleAnswersCallback, report_skipped_rows
from .checkpoints import (
    IncompleteCheckpointCallback,
    last_complete_checkpoint,
    stage_of_checkpoint,
    why_incomplete,
)
from .plots import figure_class, plot_loss
from .stages import STAGES, prepare, stage_of
from .trainer import EmmaTrainer

logger = logging.get_logger(__name__)


@dataclass
class ScriptArguments:
    """The model, the rows and the stage."""

    model: str = field(metadata={"help": "folder or Hub id of a converted model"})
    train_data: str = field(metadata={"help": "JSON or JSONL in LLaVA's format"})
    stage: str = field(default="finetune", metadata={"help": ", ".join(STAGES)})
    eval_data: str | None = field(default=None, metadata={"help": "rows to evaluate on; default: none"})
    image_folder: str | None = field(default=None, metadata={"help": "folder of the images; default: that of the rows"})
    on_error: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "a row that cannot be used: raise, or skip and report"}
    )
    group_by_modality: bool = field(default=True, metadata={"help": "batches of one modality and similar lengths"})
    global_batch_size: int | None = field(
        default=None, metadata={"help": "rows in a step, over all processes; default: the authors'"}
    )
    projector_learning_rate: float | None = field(default=None, metadata={"help": "default: the authors'"})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "of the weights; `--bf16` also computes in bfloat16"}
    )
    lora_r: int = field(default=128, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=256, metadata={"help": "scale of the adapter, times its rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout probability of the adapter's inputs"})
    sample_answers: int = field(default=3, metadata={"help": "number of rows to answer at each evaluation"})
    visual_tokens: int | None = field(
        default=None, metadata={"help": "visual tokens to keep of each image; default: as stored"}
    )

    @property
    def token_options(self) -> dict[str, int]:
        """What both the model and its processor are loaded with."""
        return {} if self.visual_tokens is None else {"visual_tokens": self.visual_tokens}


def main(arguments: list[str]) -> None:
    """Train, evaluate, save, and draw the loss."""
    script, args = parse(arguments)
    figure_class()
    set_seed(args.seed)
    processor = EmmaProcessor.from_pretrained(script.model, **script.token_options)
    train_data = _read_rows("--train_data", script.train_data, script, processor)
    eval_data = _read_rows("--eval_data", script.eval_data, script, processor) if script.eval_data else None

    trainer = EmmaTrainer(
        model=prepare(load(script), script.stage, script.lora_r, script.lora_alpha, script.lora_dropout),
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=DataCollator(processor),
        processing_class=processor,
        projector_learning_rate=script.projector_learning_rate,
        group_by_modality=script.group_by_modality,
        callbacks=[IncompleteCheckpointCallback(script.stage)],
    )
    if eval_data is not None:
        trainer.add_callback(SampleAnswersCallback(eval_data, processor, script.sample_answers))
    checkpoint = args.resume_from_checkpoint or last_complete_checkpoint(args.output_dir)
    if checkpoint is not None:
        _check_checkpoint(Path(checkpoint), script.stage, is_named=args.resume_from_checkpoint is not None)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise EmmaError(
            f"A checkpoint must hold what this command wrote: a file of {checkpoint} holds something else, and none of "
            f"it is run ({reason}). Remove that checkpoint; the run then goes on from the one before."
        ) from error

    if eval_data is not None:
        # Those of evaluations during training are reported at its end.
        known = eval_data.skipped_rows
        trainer.save_metrics("eval", trainer.evaluate())
        if eval_data.skipped_rows != known:
            report_skipped_rows(eval_data)
    merged = Path(args.output_dir) / "merged"
    if script.stage == "lora" and trainer.is_world_process_zero():
        # Of an earlier start. `save_model` pushes the whole folder.
        shutil.rmtree(merged, ignore_errors=True)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        plot_loss(trainer.state.log_history, Path(args.output_dir) / "loss.png")
    # Before the adapter is merged, which leaves none to save.
    if args.push_to_hub:
        trainer.push_to_hub()
    if script.stage == "lora" and trainer.is_world_process_zero():
        _save_merged(trainer, processor, merged)


def _save_merged(trainer: EmmaTrainer, processor: EmmaProcessor, folder: Path) -> None:
    """Save the model with its adapter merged in, where one process has all of its weights."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if any(map(is_sharded, model.parameters())):
        logger.warning(
            f"The adapter in {trainer.args.output_dir} is not merged, as each process has a part of the weights. Merge "
            "it in one: `PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(MERGED)`."
        )
        return
    model.merge_and_unload().save_pretrained(folder)
    processor.save_pretrained(folder)


def _check_checkpoint(folder: Path, stage: str, is_named: bool) -> None:
    """Refuse a checkpoint that does not exist, is incomplete, or of another stage."""
    if not folder.is_dir():
        raise EmmaError(f"`--resume_from_checkpoint` must be the folder of a checkpoint: there is none at {folder}.")
    reason = why_incomplete(folder)
    if reason is not None:
        raise EmmaError(
            f"`--resume_from_checkpoint` must be a complete checkpoint: of {folder}, {reason}. To begin with its "
            "weights alone, pass it as `--model`."
        )
    begun = stage_of_checkpoint(folder)
    if begun not in (None, stage):
        remedy = (
            "Pass it as `--model`, without `--resume_from_checkpoint`." if is_named else "Name another `--output_dir`."
        )
        raise EmmaError(
            f"A run goes on from checkpoints of its own stage: {folder} is of {begun}, this one is {stage}. {remedy}"
        )


def _read_rows(option: str, path: str, script: ScriptArguments, processor: EmmaProcessor) -> ConversationDataset:
    rows = ConversationDataset(
        path,
        processor,
        script.image_folder,
        template=STAGES[script.stage].template,
        on_error=script.on_error,
    )
    if not len(rows):
        raise EmmaError(f"`{option}` must hold at least one row: {path} holds none.")
    return rows


def parse(arguments: list[str]) -> tuple[ScriptArguments, TrainingArguments]:
    """Parse the arguments; the defaults are the authors' for the stage.

    Raises:
        EmmaError: an unknown stage, an option that has no effect or cannot be used with another, or a global batch that
            the processes cannot share evenly.
    """
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), prog="emma-hf train")
    parser.set_defaults(gradient_accumulation_steps=None)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    stage = stage_of(given.stage)
    _check_options(given)
    parser.set_defaults(
        **stage.training_arguments(),
        projector_learning_rate=stage.projector_learning_rate,
        gradient_accumulation_steps=accumulated_steps(given, stage.batch_size),
        eval_strategy="epoch" if given.eval_data else "no",
        logging_steps=10,
        logging_first_step=True,
        save_total_limit=2,
        report_to=["none"],
        dataloader_pin_memory=torch.cuda.is_available(),
        # The logits of every token over the whole vocabulary would fill the memory.
        prediction_loss_only=True,
    )
    try:
        return parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:
        raise EmmaError(f"`TrainingArguments` refuses this combination of options: {error}") from error


def _check_options(given: Namespace) -> None:
    """Refuse options of which training would say nothing, or fail after the model is loaded."""
    least = {"global_batch_size": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "lora_r": 1}
    for name, value in least.items():
        found = getattr(given, name)
        if found is not None and found < value:
            raise EmmaError(f"`--{name}` must be at least {value}: got {found}.")
    if not 0 <= given.lora_dropout < 1:
        raise EmmaError(f"`--lora_dropout` must be at least 0 and below 1: got {given.lora_dropout}.")
    # Options of Transformers 5, and then of 4.
    sampling = getattr(given, "train_sampling_strategy", "random")
    is_sampled = sampling != "random" or getattr(given, "group_by_length", False)
    is_overwritten = getattr(given, "overwrite_output_dir", False)
    strategy = str(getattr(given.eval_strategy, "value", given.eval_strategy))
    is_evaluated = strategy != "no" or given.eval_on_start
    refused = [
        (
            is_overwritten,
            "`--overwrite_output_dir` is of no use: a run goes on from its folder's checkpoints. Remove them.",
        ),
        (
            given.global_batch_size is not None and given.gradient_accumulation_steps is not None,
            "`--global_batch_size` and `--gradient_accumulation_steps` both say how many rows a step has. Give one.",
        ),
        (
            is_evaluated and not given.eval_data,
            "`--eval_strategy` and `--eval_on_start` need rows to evaluate on. Name them by `--eval_data`.",
        ),
        (
            is_sampled and given.group_by_modality,
            "Rows are sampled by modality and length. For another sampling pass `--group_by_modality false` too.",
        ),
    ]
    for applies, text in refused:
        if applies:
            raise EmmaError(text)


def accumulated_steps(given: Namespace, authors_batch_size: int) -> int:
    """Number of accumulated steps with which all processes together see the global batch."""
    if given.gradient_accumulation_steps is not None:
        return given.gradient_accumulation_steps
    # `TrainingArguments` knows both, but DeepSpeed copies the accumulation from it at construction.
    devices = 1 if given.use_cpu else max(1, torch.cuda.device_count())
    processes = int(os.environ.get("WORLD_SIZE", devices))
    rows = given.per_device_train_batch_size * processes
    batch_size = given.global_batch_size or authors_batch_size
    if batch_size % rows:
        raise EmmaError(
            f"`--global_batch_size` must be a multiple of the rows that all processes take at once: got {batch_size} "
            f"and {rows} ({processes} times {given.per_device_train_batch_size}). Change "
            "`--per_device_train_batch_size`, or give `--gradient_accumulation_steps`."
        )
    return batch_size // rows


def load(script: ScriptArguments) -> EmmaForConditionalGeneration:
    """Load the model, in 4 bits for QLoRA."""
    options: dict[str, Any] = dict(script.token_options)
    if script.stage == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        )
    # Pickles are not read here.
    return EmmaForConditionalGeneration.from_pretrained(
        script.model, dtype=script.dtype, use_safetensors=True, **options
    )

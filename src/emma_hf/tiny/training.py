"""emma-tiny from nothing: its tokenizers, a small CLIP, and EMMA's two stages on top of it.

Everything is learned from [`emma_hf.tiny`]. Each phase leaves its result in the output folder and is skipped where it
has one; a phase that was killed goes on from its last complete checkpoint.
"""

import gzip
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..conversion.converter import generation_config, prompt_tokenizer
from ..conversion.instruction_vocabulary import BPE_NAME, load_instruction_tokenizer
from ..data.conversations import IGNORED
from ..model.compat_emma import WARMUP_SHARE, core_of
from ..model.configuration_emma import EmmaConfig
from ..model.errors_emma import EmmaError
from ..model.image_processing_emma import EmmaImageProcessor
from ..model.instruction_emma import encode_instruction
from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import SYSTEM_PROMPT, EmmaProcessor
from ..training.checkpoints import CrashSafety, last_complete_checkpoint
from ..training.plots import figure_class, plot_loss
from ..training.stages import prepare
from ..training.trainer import EmmaTrainer
from .muon import MuonWithAdamW
from .rows import CLIP_SEEDS, TRAIN_SEEDS, Rows, SideBySide, vision_features
from .scenes import Chance, Scene, caption, caption_question, close_up, draw, questions, reshaped, siblings

SIDE, PATCH = 112, 14
VISUAL_TOKENS = (SIDE // PATCH) ** 2
VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
INSTRUCTION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 3}
PROMPT_VOCABULARY, INSTRUCTION_MERGES = 600, 400
# Scenes in a group of contrastive learning.
GROUP = 4


@dataclass(frozen=True)
class Budget:
    """How long to train.

    Args:
        clip_steps: of contrastive learning, of `clip_groups` scenes with their siblings.
        pictures: of which V is computed and kept, for both stages.
        pretrain_rows, finetune_rows: of the stages, a picture and what is said about it each.
        batch_size: rows in a step of the stages.

    Groups and rows of a step are those of all processes together.
    """

    clip_steps: int = 9_000
    clip_groups: int = 8
    pictures: int = 80_000
    pretrain_rows: int = 6_400
    finetune_rows: int = 176_000
    batch_size: int = 32
    clip_rate: float = 2e-3
    pretrain_rate: float = 1e-3
    finetune_rate: float = 2e-3


SMOKE = Budget(
    clip_steps=150, clip_groups=8, clip_rate=2e-3, pictures=64, pretrain_rows=512, finetune_rows=768, batch_size=32
)


def train_tiny(
    output: str | Path, budget: Budget = Budget(), seed: int = 0, compiled: bool = False, **arguments: Any
) -> Path:
    """Train emma-tiny and save it in `output/emma-tiny`.

    Several processes (torchrun) share the steps of each phase; on a CPU one per core is the fastest.

    Args:
        output: folder of the phases: `tokenizers`, `clip`, `pretrain`, `finetune`, `emma-tiny`.
        budget: how long.
        seed: of the first weights and the data.
        compiled: compile the language model for the second stage; it needs a C++ compiler.
        **arguments: of `TrainingArguments`, for each phase.

    Returns:
        The folder of the model.

    Raises:
        MissingPackageError: matplotlib is not installed.
        EmmaError: a step cannot be shared evenly.
    """
    figure_class()
    output = Path(output)
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
        "clip": lambda: _train_clip(output / "clip", processor, budget, seed, arguments),
        "pretrain": lambda: _train_stage("pretrain", output, processor, budget, seed, False, arguments),
        "finetune": lambda: _train_stage("finetune", output, processor, budget, seed, compiled, arguments),
    }
    seconds = output / "seconds.json"
    for name, phase in phases.items():
        done = output / name / "done"
        if done.is_file():
            continue
        start = time.time()
        phase()
        processes.wait_for_everyone()
        if processes.is_main_process:
            spent = json.loads(seconds.read_text()) if seconds.is_file() else {}
            seconds.write_text(json.dumps({**spent, name: round(spent.get(name, 0) + time.time() - start)}))
            done.touch()
        processes.wait_for_everyone()
    if processes.is_main_process:
        model = EmmaForConditionalGeneration.from_pretrained(output / "finetune", dtype=torch.bfloat16)
        model.save_pretrained(output / "emma-tiny")
        processor.save_pretrained(output / "emma-tiny")
    processes.wait_for_everyone()
    return output / "emma-tiny"


def _texts(count: int) -> Iterator[tuple[str, str]]:
    """Everything that is asked and said about some scenes."""
    for seed in range(TRAIN_SEEDS - count, TRAIN_SEEDS):
        scene, chance = Scene.random(seed), Chance(seed)
        yield caption_question(chance), caption(scene)
        for held_out in (False, True):
            for question in questions(scene, chance, held_out):
                yield question.text, question.answer


def tiny_processor(folder: Path) -> EmmaProcessor:
    """The processor with tokenizers of its own, learned from the scenes' words."""
    if (folder / "processor_config.json").is_file():
        return EmmaProcessor.from_pretrained(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(_texts(2000))
    processor = EmmaProcessor(
        EmmaImageProcessor(size=SIDE, crop_size=SIDE),
        _learn_prompt_tokenizer(
            [f"{SYSTEM_PROMPT} USER: \n{asked} ASSISTANT: {said}" for asked, said in texts], folder
        ),
        _learn_instruction_tokenizer([text for pair in texts for text in pair], folder),
        image_seq_length=VISUAL_TOKENS,
    )
    processor.save_pretrained(folder)
    return processor


def _learn_instruction_tokenizer(texts: list[str], folder: Path) -> Any:
    """Byte-pair merges in CLIP's format: lower case, `</w>` at the end of a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator([text.lower() for text in texts], trainer)
    merges = [" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:INSTRUCTION_MERGES]
    path = folder / BPE_NAME
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *merges]).encode(), mtime=0))
    return load_instruction_tokenizer(path)


def _learn_prompt_tokenizer(texts: list[str], folder: Path) -> Any:
    """A sentencepiece model with Llama's settings."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=PROMPT_VOCABULARY,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    values = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "pad_token": "<unk>", "unk_token": "<unk>"}
    values |= {"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return prompt_tokenizer(folder, {}, PROMPT_VOCABULARY)


# CLIP


class Captioned(Dataset):
    """Groups of scenes, and a caption of some things of each: a curriculum.

    Random scenes are told apart by their colours and places, so that nothing is learned of shapes. Close-ups of one
    thing, of which only colour and shape are said, teach these first; then come scenes of one thing and of two, alike
    but for a shape; last are siblings of any kind.
    """

    def __init__(self, groups: int, processor: EmmaProcessor, seed: int) -> None:
        self.groups, self.processor, self.seed = groups, processor, CLIP_SEEDS + seed * GROUP * groups

    def __len__(self) -> int:
        return self.groups

    def pairs(self, index: int) -> list[tuple[Scene, str]]:
        """The scenes of a group and their captions."""
        seed = self.seed + GROUP * index
        chance, part = Chance(seed), index / self.groups
        if part < 0.1:
            scenes = [close_up(Scene.random(seed + place, most=1)) for place in range(GROUP)]
            return [(scene, "A {} {}.".format(*scene.things[0].pair)) for scene in scenes]
        if part < 0.6:
            return reshaped(Scene.random(seed, most=1 if part < 0.35 else 2), chance, GROUP)
        return siblings(Scene.random(seed), chance) if chance.maybe() else reshaped(Scene.random(seed), chance, GROUP)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pairs = self.pairs(index)
        tokenizer = self.processor.instruction_tokenizer
        pictures = [draw(scene, SIDE) for scene, _ in pairs]
        return {
            "pixel_values": self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"],
            "input_ids": torch.tensor([encode_instruction(tokenizer, text) for _, text in pairs]),
        }


def collate_groups(groups: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """All groups in one batch, texts cut where the longest ends."""
    batch = {name: torch.cat([group[name] for group in groups]) for name in groups[0]}
    length = int((batch["input_ids"] != 0).sum(-1).max())
    return {**batch, "input_ids": batch["input_ids"][:, :length], "return_loss": True}


class InOrder(Trainer):
    """Rows in the order of their numbers: none is ever seen twice, so there is nothing to shuffle.

    Matrices are trained by Muon, the rest by AdamW at a share of its rate.
    """

    adam_share = 0.5
    optimizer: Any

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        """[`MuonWithAdamW`]."""
        if self.optimizer is None:
            args = self.args
            rates = args.learning_rate, self.adam_share * args.learning_rate
            self.optimizer = MuonWithAdamW(self.model, *rates, args.weight_decay, (args.adam_beta1, args.adam_beta2))
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class InOrderEmma(InOrder, EmmaTrainer):
    """[`EmmaTrainer`] in the order of the rows, which does not learn that what is never shown is never right."""

    adam_share = 1.0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loss of the answers' tokens, without the tokens of `unshown` answers."""
        self.compute_loss_func = partial(loss_without, inputs.pop("unshown"))
        return super().compute_loss(model, inputs, *args, **kwargs)


def loss_without(
    unshown: torch.Tensor, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy among all tokens but one.

    Args:
        unshown: int64 (rows, tokens), the token that takes no part where another is right; negative where all do.
        outputs: of the model, with `logits`, (rows, tokens, vocabulary).
        labels: int64 (rows, tokens), not yet moved.
        num_items_in_batch: by how many tokens the sum is divided; by the labels' own number if None.
    """
    logits, labels, unshown = outputs.logits[:, :-1].float(), labels[:, 1:], unshown[:, 1:, None]
    logits = logits.masked_fill(unshown == torch.arange(logits.shape[-1], device=logits.device), -math.inf)
    total = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum")
    return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def _arguments(folder: Path, steps: int, batch_size: int, rate: float, seed: int, more: dict) -> TrainingArguments:
    processes = PartialState().num_processes
    values: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size // processes,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        WARMUP_SHARE: 0.03,
        "weight_decay": 0.01,
        "adam_beta2": 0.95,
        "logging_steps": max(1, min(50, steps // 6)),
        "logging_first_step": True,
        "save_steps": max(1, min(500, steps // 3)),
        "save_total_limit": 1,
        "seed": seed,
        "report_to": "none",
        "bf16": torch.cuda.is_available() or has_fast_bfloat16(torch.cpu.get_capabilities()),
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_num_workers": 1,
        "ddp_backend": "gloo" if processes > 1 and not torch.cuda.is_available() else None,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**values, **more})


def has_fast_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU of these `torch.cpu.get_capabilities()` multiplies in bfloat16.

    Where it does not, float32 was eight times faster.
    """
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def _run(trainer: Trainer, folder: Path, unit: str) -> None:
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    trainer.save_model()
    trainer.save_state()
    plot_loss(trainer.state.log_history, folder / "loss.png", unit)


def clip_model(processor: EmmaProcessor, seed: int) -> CLIPModel:
    """The small CLIP, at random."""
    set_seed(seed)
    tokenizer = processor.instruction_tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text = CLIPTextConfig(**INSTRUCTION, vocab_size=len(tokenizer), max_position_embeddings=77, **ids)
    vision = CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    model = CLIPModel(config)
    # At these small sizes the plain attention is faster than the fused one.
    model.set_attn_implementation("eager")
    # A random place is too small beside a patch: it took thousands of pictures to learn where things are.
    places = core_of(model.vision_model).embeddings.position_embedding.weight
    with torch.no_grad():
        places[1:] = 0.5 * _waves(SIDE // PATCH, VISION["hidden_size"])
    return model


def _waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, (side², width)."""
    frequencies = math.pi * (2.0 * side) ** -(torch.arange(width // 4) * 4 / width)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    turns = [(place.reshape(-1, 1) * frequencies) for place in (row, column)]
    return torch.cat([wave(turn) for turn in turns for wave in (torch.sin, torch.cos)], dim=1)


def _train_clip(folder: Path, processor: EmmaProcessor, budget: Budget, seed: int, more: dict) -> None:
    trainer = InOrder(
        model=clip_model(processor, seed),
        # As OpenAI's CLIP was trained (arXiv 2103.00020, table 18).
        args=_arguments(
            folder, budget.clip_steps, budget.clip_groups, budget.clip_rate, seed, {"adam_beta2": 0.98, **more}
        ),
        train_dataset=Captioned(budget.clip_steps * budget.clip_groups, processor, seed),
        data_collator=collate_groups,
        callbacks=[CrashSafety()],
    )
    _run(trainer, folder, "nats per picture")


# EMMA


def untrained_tiny(folder: Path, processor: EmmaProcessor, seed: int) -> EmmaForConditionalGeneration:
    """EMMA around the towers of a CLIP, its language model at random."""
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
    model.generation_config = generation_config(config)
    core_of(model.model.vision_tower).load_state_dict(core_of(clip.vision_model).state_dict())
    core_of(model.model.instruction_encoder).load_state_dict(core_of(clip.text_model).state_dict())
    return model


def _train_stage(
    stage: str, output: Path, processor: EmmaProcessor, budget: Budget, seed: int, compiled: bool, more: dict
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
    trainer = InOrderEmma(
        model=model,
        args=_arguments(output / stage, rows // budget.batch_size, budget.batch_size, rate, seed, more),
        train_dataset=Rows(stage, features, processor, rows, budget.batch_size, seed),
        data_collator=SideBySide(processor),
        processing_class=processor,
        group_by_modality=False,
        callbacks=[CrashSafety()],
    )
    _run(trainer, output / stage, "nats per token")


__all__ = ["SMOKE", "Budget", "tiny_processor", "train_tiny", "untrained_tiny"]

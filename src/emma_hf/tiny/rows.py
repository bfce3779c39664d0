"""Training rows of emma-tiny's two stages: vision features of scenes, and questions and answers about each."""

import itertools
import math
from dataclasses import replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from tqdm import tqdm

from ..data.collator import DataCollator
from ..data.conversations import IGNORE_INDEX, encode_conversation
from ..model.instruction_emma import encode_instruction, training_instruction
from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import EmmaProcessor
from .drawing import draw
from .questions import ENDING, Question, ask, captioned
from .scenes import Scene, SeededRandom

# The seeds of each purpose are its own: no test scene was ever trained on.
CLIP_SEEDS, TRAIN_SEEDS, TEST_SEEDS = 1_000_000_000, 2_000_000_000, 3_000_000_000
# How often each family is asked: most what needs most questions. Few scenes allow one that compares two things.
TRAINED_FAMILIES = {
    "same": 12, "told": 6, "alike": 8, "both": 5,
    "count": 36, "position": 8, "side": 8, "left": 2, "above": 1, "place": 2, "places": 2,
    "shape": 7, "existence": 6, "size": 5, "colour": 5,
}  # fmt: skip
ASKED_FAMILIES = tuple(family for family, times in TRAINED_FAMILIES.items() for _ in range(times))
# Shares of the questions with these counts that are kept: few groups of things have three members and more.
KEPT_COUNTS = {"0": 0.4, "1": 0.5, "2": 0.8}
# This share of the images, the first, shows two things at most, and this share of the rows, the first, is about them.
EASY_IMAGES, EASY_ROWS = 0.3, 0.25
# Steps of this share of all images visit each image equally often, and neighboring rows are as different as any two.
STRIDE = (math.sqrt(5) - 1) / 2
# Share of the questions with an ending that keep it: it takes a third of their tokens.
ENDINGS = 0.25
# Share of captions among the questions, at first and later: they say everything at once, which is worth most at first.
CAPTIONS_AT_FIRST, CAPTIONS = 0.1, 0.04
# Largest number of tokens of a row of the second stage.
ROW_TOKENS = 256


class RowKind(Enum):
    """What a row holds beside its image."""

    # The caption alone, in the first stage.
    CAPTION = "caption"
    # Questions until the row is full, none of which sees another. The answers are what is learned from, and an image
    # costs more than twenty of them.
    PACKED = "packed"
    # One question, as `emma-hf ask` asks it: only here does the answered question always guide the visual tokens.
    SINGLE = "single"
    # Questions that see the earlier ones, as in a chat. Answers can be copied from earlier ones, so these are rare.
    CHAT = "chat"


# The kinds of the second stage take turns, a step each.
KINDS = (RowKind.CHAT, RowKind.PACKED, RowKind.PACKED, RowKind.PACKED, RowKind.PACKED, RowKind.SINGLE)


def training_scene(index: int, images: int) -> Scene:
    """The scene of an image, of `images` that both stages train on."""
    return Scene.random(TRAIN_SEEDS + index, max_things=2 if index < EASY_IMAGES * images else 6)


def _conversation(turns: list[Question]) -> list[dict[str, str]]:
    """Questions about one image and their answers in LLaVA's format."""
    messages = []
    for number, turn in enumerate(turns):
        text = turn.text if number else "\n".join(filter(None, ("<image>", turn.text)))
        messages += [{"from": "human", "value": text}, {"from": "gpt", "value": turn.answer}]
    return messages


class TinyEmmaDataset(Dataset):
    """Rows of a stage: V of an image, and what is said about the image.

    Args:
        stage: `pretrain` (captions) or `finetune` (questions, and captions among them).
        features: V of the images, (images, visual tokens, width).
        processor: the processor whose tokenizers encode the texts.
        rows: number of rows.
        batch_size: number of rows in a step.
        seed: seed of the texts.
    """

    def __init__(
        self, stage: str, features: np.ndarray, processor: EmmaProcessor, rows: int, batch_size: int, seed: int
    ) -> None:
        self.stage, self.features, self.processor = stage, features, processor
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._encode_question = cache(lambda text, answer: self._encode([Question(text, answer, "")]))
        # Number of tokens of system turn and image.
        input_ids, _ = self._encode_question("?" if stage == "finetune" else "", "!")
        self.start = processor.image_seq_length + input_ids.index(processor.image_token_id)

    def __len__(self) -> int:
        return self.rows

    def kind(self, index: int) -> RowKind:
        """The kind of a row."""
        return RowKind.CAPTION if self.stage == "pretrain" else KINDS[index // self.batch_size % len(KINDS)]

    def image_index(self, index: int) -> int:
        """The index of a row's image: all take turns."""
        easy = self.stage == "finetune" and index < EASY_ROWS * self.rows
        return int(index * STRIDE % 1 * max(1, round((EASY_IMAGES if easy else 1) * len(self.features))))

    def turns(self, index: int) -> list[Question]:
        """The questions about the image of a row."""
        kind = self.kind(index)
        scene = training_scene(self.image_index(index), len(self.features))
        rng = SeededRandom((self.seed << 40) + index)
        if kind is RowKind.CAPTION:
            return [replace(captioned(scene, rng), text="")]
        caption_share = CAPTIONS_AT_FIRST if 5 * index < self.rows else CAPTIONS
        turns: list[Question] = []
        while not turns or kind is not RowKind.SINGLE:
            turn = captioned(scene, rng) if rng.bernoulli(caption_share) else _training_question(scene, rng)
            if len(self._join([*turns, turn], kind)["input_ids"]) > ROW_TOKENS:
                break
            turns.append(turn)
        return turns

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        kind, turns = self.kind(index), self.turns(index)
        row = self._join(turns, kind)
        tokenizer = self.processor.instruction_tokenizer
        instruction = training_instruction(_conversation(turns if kind is RowKind.CHAT else turns[:1]), tokenizer)
        features = torch.from_numpy(self.features[self.image_index(index)].astype(np.float32))
        return {
            **{name: torch.tensor(values) for name, values in row.items()},
            "excluded_tokens": torch.tensor(self._exclude(row["labels"], turns)),
            "vision_features": features[None],
            "instruction_input_ids": torch.tensor([encode_instruction(tokenizer, instruction)]),
        }

    def _join(self, turns: list[Question], kind: RowKind) -> dict[str, list[int]]:
        """`input_ids`, `labels`, `position_ids` and `segments` of a row.

        Segment 0 is system turn and image, which stand in the row once; the others count the texts that do not see
        each other.
        """
        if kind is RowKind.CHAT:
            parts = [self._encode(turns)]
        else:
            parts = [self._encode_question(turn.text, turn.answer) for turn in turns]
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": [], "segments": []}
        for number, (input_ids, labels) in enumerate(parts):
            start = self.start if number else 0
            row["input_ids"] += input_ids[start:]
            row["labels"] += labels[start:]
            row["position_ids"] += range(start, len(input_ids))
            row["segments"] += [number + 1 if i >= self.start else 0 for i in range(start, len(input_ids))]
        return row

    def _encode(self, turns: list[Question]) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation about the image."""
        template = "vicuna_v1" if turns[0].text else "plain"
        return encode_conversation(self.processor, _conversation(turns), template)

    def _exclude(self, labels: list[int], turns: list[Question]) -> list[int]:
        """For each label the token that takes no part in the loss there, or -1."""
        excluded = [-1] * len(labels)
        with_previous = enumerate(itertools.pairwise([IGNORE_INDEX, *labels]))
        starts = (i for i, (previous, label) in with_previous if previous == IGNORE_INDEX != label)
        for start, turn in zip(starts, turns, strict=True):
            for offset, token in self._excluded_tokens(turn):
                excluded[start + offset] = token
        return excluded

    def _excluded_tokens(self, turn: Question) -> list[tuple[int, int]]:
        """Offset in the answer's tokens at which each excluded answer departs from it, and the other token there."""
        # Answers are encoded alike after every question, and are few.
        text = "?" if turn.text else ""
        input_ids, labels = self._encode_question(text, turn.answer)
        start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        excluded = []
        for answer in turn.excluded_answers:
            other_ids, _ = self._encode_question(text, answer)
            pairs = enumerate(zip(input_ids, other_ids, strict=False))
            excluded.append(next((i - start, other) for i, (token, other) in pairs if token != other))
        return excluded


def _training_question(scene: Scene, rng: SeededRandom) -> Question:
    while True:
        question = ask(scene, rng, rng.choice(ASKED_FAMILIES))
        kept_share = KEPT_COUNTS.get(question.answer, 1) if question else 0
        if question and rng.bernoulli(kept_share):
            return question if rng.bernoulli(ENDINGS) else replace(question, text=question.text.removesuffix(ENDING))


class PackedQuestionsCollator(DataCollator):
    """Batches of rows that hold several questions, none of which sees another.

    Rows are padded to one of few lengths, so that a compiled model is compiled for these and no more.
    """

    lengths = (136, ROW_TOKENS)

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(items)
        longest = batch["input_ids"].shape[1]
        length = next((length for length in self.lengths if length >= longest), longest)

        def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])

        batch["input_ids"] = padded(list(batch["input_ids"]), self.pad_token_id)
        batch["labels"] = padded(list(batch["labels"]), IGNORE_INDEX)
        batch["excluded_tokens"] = padded([item["excluded_tokens"] for item in items], -1)
        batch["position_ids"] = padded([item["position_ids"] for item in items], 0)
        # Segment 0 is visible to all, padding included: a softmax over nothing is not a number.
        segments = padded([item["segments"] for item in items], -1)
        visible = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        visible &= torch.ones(length, length, dtype=torch.bool).tril()
        batch["attention_mask"] = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]
        return batch


class TrainingImages(Dataset):
    """Pixels of the scenes that both stages train on."""

    def __init__(self, count: int, processor: EmmaProcessor) -> None:
        self.count, self.processor = count, processor

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        image = draw(training_scene(index, self.count))
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]


def vision_features(
    model: EmmaForConditionalGeneration, processor: EmmaProcessor, count: int, path: Path
) -> np.ndarray:
    """V of the first `count` images, float16 (count, visual tokens, width), computed once and kept in a file.

    Each process computes a part.
    """
    shape = (count, model.config.vision_seq_length, model.config.vision_config.hidden_size)
    processes, partial_path = PartialState(), path.with_suffix(".part")
    processes.wait_for_everyone()
    if not path.is_file() or path.stat().st_size != 2 * np.prod(shape):
        if processes.is_main_process:
            np.memmap(partial_path, np.float16, "w+", shape=shape)
        processes.wait_for_everyone()
        features: np.memmap[Any, Any] = np.memmap(partial_path, np.float16, "r+", shape=shape)
        with processes.split_between_processes(list(range(count))) as part:
            images = torch.utils.data.Subset(TrainingImages(count, processor), part)
            start = part[0]
        for pixels in tqdm(
            torch.utils.data.DataLoader(images, batch_size=128, num_workers=1),
            desc="vision features",
            disable=not processes.is_main_process,
        ):
            with torch.no_grad():
                batch = model.get_vision_features(pixels.to(model.device))
            features[start : start + len(batch)] = batch.cpu().numpy()
            start += len(batch)
        features.flush()
        processes.wait_for_everyone()
        if processes.is_main_process:
            partial_path.rename(path)
        processes.wait_for_everyone()
    return np.memmap(path, np.float16, "r", shape=shape)

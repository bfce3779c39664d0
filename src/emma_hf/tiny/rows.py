"""Training rows of emma-tiny's two stages: vision features of scenes, and questions and answers about each."""

import itertools
import math
from dataclasses import replace
from enum import Enum
from functools import lru_cache
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
    "count": 28, "position": 8, "side": 8, "left": 2, "above": 1, "place": 2, "places": 2,
    "shape": 9, "existence": 6, "size": 7, "colour": 6,
}  # fmt: skip
ASKED_FAMILIES = tuple(family for family, times in TRAINED_FAMILIES.items() for _ in range(times))
# Shares of the questions with these counts that are kept: few groups of things have three members and more.
KEPT_COUNTS = {"0": 0.4, "1": 0.5, "2": 0.8}
# This share of the images, the first, shows two things at most. So many rows, the first, are about them, but at most
# this share of all.
EASY_IMAGES, EASY_ROWS, EASY_SHARE = 0.3, 128_000, 0.25
# Steps of this share of all images visit each image equally often, and neighboring rows are as different as any two.
STRIDE = (math.sqrt(5) - 1) / 2
# Questions of a chat. With more, more would be learned with another question's instruction.
CHAT_TURNS = 3
# Images whose V is computed together.
FEATURE_BATCH = 128


class RowKind(Enum):
    """What a row holds beside its image."""

    # The caption alone, in the first stage.
    CAPTION = "caption"
    # One question without the ending that asks for a single word, and one with it, which is a third longer.
    QUESTION = "question"
    ENDED = "ended"
    # A question that asks for the caption. Captions say everything at once.
    DESCRIPTION = "description"
    # Questions that see the earlier ones. Their answers can be copied from earlier ones, so these rows are rare.
    CHAT = "chat"


# The kinds of the second stage take turns, a step each: rows of a kind are of similar length, so that few tokens of a
# step are padding. In all but the chats the question that is learned from is the instruction.
KINDS = (
    *(RowKind.QUESTION, RowKind.QUESTION, RowKind.ENDED, RowKind.QUESTION, RowKind.QUESTION, RowKind.DESCRIPTION),
    *(RowKind.QUESTION, RowKind.QUESTION, RowKind.ENDED, RowKind.QUESTION, RowKind.CHAT, RowKind.DESCRIPTION),
)


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
        self._encode_question = lru_cache(1024)(lambda text, answer: self._encode([Question(text, answer, "")]))

    def __len__(self) -> int:
        return self.rows

    def kind(self, index: int) -> RowKind:
        """The kind of a row."""
        return RowKind.CAPTION if self.stage == "pretrain" else KINDS[index // self.batch_size % len(KINDS)]

    def image_index(self, index: int) -> int:
        """The index of a row's image: all take turns."""
        easy = self.stage == "finetune" and index < min(EASY_ROWS, EASY_SHARE * self.rows)
        return int(index * STRIDE % 1 * max(1, round((EASY_IMAGES if easy else 1) * len(self.features))))

    def turns(self, index: int) -> list[Question]:
        """The questions about the image of a row."""
        kind = self.kind(index)
        scene = training_scene(self.image_index(index), len(self.features))
        rng = SeededRandom((self.seed << 40) + index)
        if kind is RowKind.CAPTION:
            return [replace(captioned(scene, rng), text="")]
        if kind is RowKind.DESCRIPTION:
            return [captioned(scene, rng)]
        count = CHAT_TURNS if kind is RowKind.CHAT else 1
        return [_training_question(scene, rng, kind is RowKind.ENDED) for _ in range(count)]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        turns = self.turns(index)
        input_ids, labels = self._encode(turns)
        tokenizer = self.processor.instruction_tokenizer
        instruction = training_instruction(_conversation(turns), tokenizer)
        features = torch.from_numpy(self.features[self.image_index(index)].astype(np.float32))
        return {
            "input_ids": torch.tensor(input_ids),
            "labels": torch.tensor(labels),
            "excluded_tokens": torch.tensor(self._exclude(labels, turns)),
            "vision_features": features[None],
            "instruction_input_ids": torch.tensor([encode_instruction(tokenizer, instruction)]),
        }

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
        # Answers are encoded alike after every question.
        text = "?" if turn.text else ""
        input_ids, labels = self._encode_question(text, turn.answer)
        start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        excluded = []
        for answer in turn.excluded_answers:
            other_ids, _ = self._encode_question(text, answer)
            pairs = enumerate(zip(input_ids, other_ids, strict=False))
            excluded.append(next((i - start, other) for i, (token, other) in pairs if token != other))
        return excluded


def _training_question(scene: Scene, rng: SeededRandom, ended: bool) -> Question:
    while True:
        question = ask(scene, rng, rng.choice(ASKED_FAMILIES))
        if question and rng.bernoulli(KEPT_COUNTS.get(question.answer, 1)):
            return replace(question, text=question.text.removesuffix(ENDING) + (ENDING if ended else ""))


class TinyEmmaCollator(DataCollator):
    """Batches of [`TinyEmmaDataset`]."""

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """A batch of `DataCollator` with `excluded_tokens` (batch, tokens), -1 where there is none."""
        excluded = [item["excluded_tokens"] for item in items]
        padded = torch.nn.utils.rnn.pad_sequence(excluded, batch_first=True, padding_value=-1)
        return {**super().__call__(items), "excluded_tokens": padded}


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

    Each process computes a part. A run that was stopped goes on where the file is still zero.
    """
    shape = (count, model.config.vision_seq_length, model.config.vision_config.hidden_size)
    size = 2 * math.prod(shape)
    processes, partial_path = PartialState(), path.with_suffix(".part")
    processes.wait_for_everyone()
    if not path.is_file() or path.stat().st_size != size:
        if processes.is_main_process and not (partial_path.is_file() and partial_path.stat().st_size == size):
            np.memmap(partial_path, np.float16, "w+", shape=shape)
        processes.wait_for_everyone()
        features: np.memmap[Any, Any] = np.memmap(partial_path, np.float16, "r+", shape=shape)
        with processes.split_between_processes(list(range(count))) as part:
            _fill_features(features, list(part), TrainingImages(count, processor), model)
        processes.wait_for_everyone()
        if processes.is_main_process:
            partial_path.rename(path)
        processes.wait_for_everyone()
    return np.memmap(path, np.float16, "r", shape=shape)


def _fill_features(
    features: np.memmap, part: list[int], images: TrainingImages, model: EmmaForConditionalGeneration
) -> None:
    """Compute V of a part of the images, from the last batch that the file holds: it may be incomplete."""
    done = next((number for number, index in enumerate(part) if not features[index, 0].any()), len(part))
    part = part[max(0, done // FEATURE_BATCH - 1) * FEATURE_BATCH :]
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(images, part), batch_size=FEATURE_BATCH, num_workers=1)
    for number, pixels in enumerate(tqdm(loader, desc="vision features", disable=not PartialState().is_main_process)):
        with torch.no_grad():
            batch = model.get_vision_features(pixels.to(model.device))
        start = part[0] + number * FEATURE_BATCH
        features[start : start + len(batch)] = batch.cpu().numpy()
        features.flush()
